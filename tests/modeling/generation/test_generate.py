"""Generation: greedy is the argmax of plain forwards, drafts change nothing, rows stand alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import agreeable, gqa, mla, model_config, transformer, windows_and_sinks

from modeling import Transformer, generate, generate_batch

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
    alone = [
        list(generate(model, prompt, 12, draft_tokens=draft_tokens, **sampling))
        for prompt in prompts
    ]
    assert generate_batch(model, prompts, 12, draft_tokens=draft_tokens, **sampling) == alone
    if not sampling:
        assert alone == [list(generate(model, prompt, 12)) for prompt in prompts]


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


@pytest.mark.parametrize("draft_tokens", [0, 1, 3])
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
    accepted, drafted = sum(statistics.accepted), sum(statistics.drafted)
    assert (0 < accepted < drafted) == (draft_tokens > 0)
    for counts in (statistics.accepted, statistics.drafted):
        assert counts == sorted(counts, reverse=True)
        assert len(counts) == draft_tokens
    # every round gains the drafts it accepts and one token more
    assert statistics.forwards == len(forwards) == 20 - accepted
    assert statistics.forwards_without_drafts == 20
    assert statistics.forwards_saved == accepted
    if draft_tokens:
        assert statistics.mean_accepted_length == 1 + accepted / statistics.drafted[0]
    assert statistics.prompt_seconds > 0
    seconds = statistics.drafting_seconds + statistics.verifying_seconds
    assert (seconds > 0) == (draft_tokens > 0)
    assert statistics.generation_seconds >= seconds
    assert statistics.cache_bytes_per_token == model.make_cache(1, 1).nbytes


def test_the_stop_id_costs_plain_decoding_a_forward_too():
    model = agreeable(CONFIGS["mla"](1))
    plain = list(generate(model, [5, 2, 8], 20))
    stop = plain[7]
    generation = generate(model, [5, 2, 8], 20, stop_ids=[stop], draft_tokens=2)
    shorter = list(generation)
    assert shorter == plain[: plain.index(stop)]
    assert generation.statistics.forwards_without_drafts == len(shorter) + 1


def test_drafts_that_no_room_is_left_for_cost_nothing():
    model = MODELS["mla", 2]
    for count in (1, 2, 5):
        generation = generate(model, [5, 2, 8], count, draft_tokens=10**12)
        assert list(generation) == list(generate(model, [5, 2, 8], count))
        assert len(generation.statistics.drafted) == count - 1


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
        ({"draft_tokens": "many"}, "draft_tokens = 'many'"),
        ({"draft_tokens": 1.5}, "draft_tokens = 1.5"),
        ({"temperature": -0.5}, "temperature = -0.5"),
        ({"seed": 2**64}, "seed = 18446744073709551616: must be a whole number"),
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
    with pytest.raises(ValueError, match="MTP modules"):
        generate(model, [1], 3, draft_tokens="auto")


@settings(max_examples=12)
@given(
    st.sampled_from(sorted(MODELS)),
    st.lists(prompt_lists, min_size=1, max_size=3),
    st.integers(1, 9),
    st.sampled_from([0, 2]),
)
def test_prompts_read_in_chunks_change_no_token(which, prompts, chunk, draft_tokens):
    model, sizes = MODELS[which], []
    hook = model.embed.register_forward_hook(lambda *inputs: sizes.append(inputs[1][0].shape[1]))
    try:
        chunked = generate_batch(model, prompts, 8, draft_tokens=draft_tokens, prefill_chunk=chunk)
    finally:
        hook.remove()
    assert chunked == generate_batch(model, prompts, 8, draft_tokens=draft_tokens)
    if draft_tokens == 0:
        assert max(sizes) <= chunk
    elif len(prompts) == 1:
        generation = generate(model, prompts[0], 8, draft_tokens=2, prefill_chunk=chunk)
        assert list(generation) == chunked[0]
        assert generation.statistics.prompt_tokens == len(prompts[0])


@pytest.mark.parametrize("chunk", [0, -1, 1.5, None])
def test_a_chunk_that_is_no_count_is_refused(chunk):
    for run, prompt in ((generate, [1]), (generate_batch, [[1]])):
        with pytest.raises(ValueError, match=r"prefill_chunk = .*: must be a whole number >= 1"):
            run(MODELS["gqa", 1], prompt, 1, prefill_chunk=chunk)
