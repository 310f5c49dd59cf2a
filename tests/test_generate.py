"""Generation: greedy is the argmax of plain forwards, drafts change nothing, rows stand alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import gqa, mla, model_config, transformer, windows_and_sinks

from modeling import ModelConfig, Transformer, drafting, generate, generate_batch

prompt_lists = st.lists(st.integers(0, 22), min_size=1, max_size=9)
CONFIGS = {
    "mla": lambda mtp: model_config(mla(), mtp),
    "gqa": lambda mtp: model_config(gqa(), mtp),
    "windows": lambda mtp: model_config(gqa(window=3), mtp),
    "windows of one": lambda mtp: model_config(gqa(window=1), mtp),
    "windows and sinks": windows_and_sinks,
    # an epsilon so large that the norms let the multipliers through
    "multipliers": lambda mtp: model_config(
        gqa(), mtp, embedding_multiplier=0.1, logits_multiplier=0.3, norm_epsilon=0.5
    ),
}
MODELS = {
    (kind, mtp): transformer(config(mtp)) for kind, config in CONFIGS.items() for mtp in (1, 2, 3)
}
SAMPLED = {"temperature": 1.3, "top_k": 15, "top_p": 0.95, "min_p": 0.001, "seed": 4}


def argmax_continuation(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without any cache: the whole forward again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@settings(max_examples=12)
@given(st.sampled_from(["mla", "windows and sinks"]), prompt_lists)
def test_greedy_is_the_argmax_of_whole_forwards(kind, prompt):
    model = MODELS[kind, 1]
    assert list(generate(model, prompt, 6)) == argmax_continuation(model, prompt, 6)


@settings(max_examples=8)
@given(
    st.sampled_from(sorted(MODELS)),
    st.lists(prompt_lists, min_size=1, max_size=4),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([{}, SAMPLED]),
)
def test_drafts_and_neighbours_change_no_token(which, prompts, draft_tokens, sampling):
    model = MODELS[which]
    plain = [list(generate(model, prompt, 12, **sampling)) for prompt in prompts]
    alone = [
        list(generate(model, prompt, 12, draft_tokens=draft_tokens, **sampling))
        for prompt in prompts
    ]
    assert alone == plain
    assert generate_batch(model, prompts, 12, draft_tokens=draft_tokens, **sampling) == plain


@pytest.mark.parametrize(
    ("kind", "draft_tokens"),
    [
        *(("windows", draft_tokens) for draft_tokens in range(4)),
        *(("windows of one", 2), ("windows and sinks", 1), ("windows and sinks", 3)),
    ],
)
def test_rows_of_very_unequal_lengths_need_no_more_than_the_windows_keep(kind, draft_tokens):
    model = agreeable(CONFIGS[kind](2))
    prompts = [[5], list(range(23)), [3, 1, 4, 1, 5, 9, 2], [2, 7]]
    plain = [argmax_continuation(model, prompt, 12) for prompt in prompts]
    assert generate_batch(model, prompts, 12, draft_tokens=draft_tokens) == plain
    alone = [generate(model, prompt, 12, draft_tokens=draft_tokens) for prompt in prompts]
    assert [list(generation) for generation in alone] == plain
    drafted, accepted = (
        sum(sum(getattr(generation.statistics, name)) for generation in alone)
        for name in ("drafted", "accepted")
    )
    assert 0 < accepted < drafted or draft_tokens == 0  # cut back by some and by none


@pytest.mark.parametrize("kind", ["mla", "windows", "windows and sinks"])
@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_a_row_that_stops_early_leaves_its_neighbours_alone(kind, draft_tokens):
    model, prompts = MODELS[kind, 2], [[5, 3, 5, 8], [3, 1, 4, 1, 5, 9, 2], [2, 7]]
    plain = [argmax_continuation(model, prompt, 8) for prompt in prompts]
    for stop in {token for row in plain for token in row}:
        expected = [row[: row.index(stop)] if stop in row else row for row in plain]
        found = generate_batch(model, prompts, 8, stop_ids=[stop], draft_tokens=draft_tokens)
        assert found == expected


@pytest.mark.parametrize(
    ("kind", "draft_tokens"),
    [("mla", 0), ("mla", 1), ("mla", 2), ("mla", 5), ("windows", 0), ("windows", 2)],
)
def test_stop_ids_and_limits_cut_where_plain_decoding_would(kind, draft_tokens):
    model = MODELS[kind, 2]
    plain = list(generate(model, [3, 1], 20))
    for stop in set(plain):
        expected = plain[: plain.index(stop)]
        found = generate(model, [3, 1], 20, stop_ids=[stop], draft_tokens=draft_tokens)
        assert list(found) == expected
    for limit in range(5):
        assert list(generate(model, [3, 1], limit, draft_tokens=draft_tokens)) == plain[:limit]
    whole_context = model.config.max_length - 2
    longest = list(generate(model, [3, 1], whole_context, draft_tokens=draft_tokens))
    assert len(longest) == whole_context
    assert longest[:20] == plain


def agreeable(config: ModelConfig) -> Transformer:
    """A model whose drafts are often right: its layers add little to the embedding."""
    model = transformer(config, seed=4)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(("attention.o.weight", "down", "down.weight")):
                tensor.mul_(0.05)
        for module in model.mtp.values():
            module.projection.weight.zero_()
            module.projection.weight[:, : model.config.d_model] += torch.eye(model.config.d_model)
            module.norm.weight.copy_(model.norm.weight)
    return model


@pytest.mark.parametrize("kind", ["mla", "windows and sinks", "multipliers"])
@pytest.mark.parametrize("num_modules", [1, 2, 3])
def test_drafts_are_what_the_modules_predict_from_the_whole_text(kind, num_modules, monkeypatch):
    """The caches of the modules hold, after any number of rejections, what they should."""
    model = agreeable(CONFIGS[kind](num_modules))
    rounds = []
    really_draft = drafting.Drafter.draft

    def recorded(self, confirmed, tokens, count):
        drafts = really_draft(self, confirmed, tokens, count)
        rounds.append(([list(row) for row in tokens], drafts))
        return drafts

    monkeypatch.setattr(drafting.Drafter, "draft", recorded)
    prompts = [[5], [3, 1, 4, 1, 5, 9, 2, 6], [2, 7]]
    generate_batch(model, prompts, 16, draft_tokens=num_modules)
    checked = 0
    for texts, drafts in rounds:
        for text, drafted in zip(texts, drafts, strict=True):
            for depth, draft in enumerate(drafted, start=1):
                known = torch.tensor([text + drafted[: depth - 1]])
                if known.shape[1] > depth:
                    assert draft == int(model.mtp_logits(known)[depth - 1][0, -1].argmax())
                    checked += 1
    assert checked > 20


@pytest.mark.parametrize("kind", ["mla", "windows"])
def test_drafts_beyond_the_modules_come_from_the_last_ones_own_state(kind, monkeypatch):
    model = agreeable(CONFIGS[kind](1))
    (module,) = model.mtp.values()
    rounds = []
    really_draft = drafting.Drafter.draft

    def recorded(self, confirmed, tokens, count):
        drafts = really_draft(self, confirmed, tokens, count)
        rounds.append((list(tokens[0]), drafts[0]))
        return drafts

    monkeypatch.setattr(drafting.Drafter, "draft", recorded)
    list(generate(model, [5, 2, 8], 14, draft_tokens=3))
    for text, drafted in rounds:
        states_BTD = model.hidden_states(torch.tensor([text]))[:, :-1]
        followers = list(text[1:])
        for draft in drafted:
            tokens_BT = torch.tensor([followers])
            positions = drafting.new_positions([0], tokens_BT)
            own_BTD = module(states_BTD, model.embed(tokens_BT), positions, None)
            assert draft == int(model.logits(own_BTD[:, -1]).argmax())
            states_BTD = torch.cat([states_BTD, own_BTD[:, -1:]], dim=1)
            followers.append(draft)


@pytest.mark.parametrize("draft_tokens", [1, 3])
def test_statistics_count_drafts_and_rounds(draft_tokens, monkeypatch):
    model = agreeable(CONFIGS["mla"](1))
    forwards = []
    really_forward = Transformer.hidden_states
    monkeypatch.setattr(
        Transformer,
        "hidden_states",
        lambda self, *inputs: forwards.append(1) or really_forward(self, *inputs),
    )
    generation = generate(model, [5, 2, 8], 20, draft_tokens=draft_tokens)
    tokens = list(generation)
    statistics = generation.statistics
    assert statistics.prompt_tokens == 3
    assert statistics.generated_tokens == len(tokens) == 20
    assert sum(statistics.accepted) > 0
    assert all(a <= d for a, d in zip(statistics.accepted, statistics.drafted, strict=True))
    # every round gains the drafts it accepts and one token more
    assert len(forwards) + sum(statistics.accepted) == 20
    assert statistics.prompt_seconds > 0
    assert statistics.generation_seconds > 0
    assert statistics.cache_bytes_per_token == model.make_cache(1, 1).nbytes


def test_a_greedy_run_draws_no_random_numbers():
    before = torch.random.get_rng_state()
    list(generate(MODELS["mla", 1], [1, 2], 5, draft_tokens=2))
    assert torch.random.get_rng_state().equal(before)


def test_tokens_come_one_by_one_before_the_end():
    generation = generate(MODELS["mla", 1], [1, 2], 30)
    first = next(generation)
    assert generation.statistics.generated_tokens == 1
    assert [first, *generation] == list(generate(MODELS["mla", 1], [1, 2], 30))


def test_nothing_to_do_gives_nothing():
    assert list(generate(MODELS["mla", 1], [1], 0)) == []
    assert generate_batch(MODELS["mla", 1], [], 5) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_ids": []}, "no token"),
        ({"prompt_ids": [1, 23]}, "token id 23 at position 1"),
        ({"prompt_ids": [-1]}, "token id -1 at position 0"),
        ({"max_new_tokens": -1}, "max_new_tokens = -1"),
        ({"max_new_tokens": 63}, "exceed the model's 64 positions"),
        ({"draft_tokens": -1}, "draft_tokens = -1"),
        ({"temperature": -0.5}, "temperature = -0.5"),
        ({"top_p": 0.0}, "top_p = 0.0"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_any_work(arguments, message):
    settings = {"prompt_ids": [1, 2], "max_new_tokens": 4} | arguments
    with pytest.raises(ValueError, match=message):
        generate(MODELS["mla", 1], **settings)


def test_drafts_need_modules():
    model = transformer(model_config(mla()))
    with pytest.raises(ValueError, match="MTP modules"):
        generate(model, [1], 3, draft_tokens=1)
