"""evaluate: every figure against a recomputation, one token after the other, without caches."""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from files import SHIPPED, TALE, tensors_of, write_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from outside import CosineRouterConfig
from tiny import (
    VARIED,
    gqa,
    mla,
    model_config,
    modules,
    plain_states,
    random_tokens,
    sized,
    softmax_experts,
    transformer,
)

from checkpoints import load_model, load_tokenizer
from modeling import LayerConfig
from moe import ExpertChoice, MoEConfig, Routing, TopK, TopP, record_routing
from tools import evaluate
from tools.__main__ import main
from tools.evaluate import (
    Measures,
    choice_margins,
    choose_depths,
    cut_windows,
    list_figures,
    measure_text,
    score_entropies,
    summarize,
)
from tools.held_out import measure_held_out, measure_without_overlap
from tools.make_tiny import SAMPLE_TEXT
from tools.probe_mtp import probe_wirings

EXACT = {"rel": 1e-9, "abs": 1e-9}


def window_start(target: int, window: int, stride: int) -> int:
    """Where the first window that reaches a token begins."""
    return stride * max(0, math.ceil((target + 1 - window) / stride))


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def plain_scores(router: TopK, logits: list[float]) -> list[float]:
    powers = [math.exp(logit) for logit in logits]
    softmax = router.scoring == "softmax"
    return [p / sum(powers) if softmax else p / (1 + p) for p in powers]


def plain_choice(router: TopK, choice: list[float]) -> tuple[list[int], float | None]:
    """(chosen experts, margin) from one token's choice scores."""
    size, best = router.num_experts // router.num_groups, 2 if router.group_score != "max" else 1
    groups = [range(g * size, (g + 1) * size) for g in range(router.num_groups)]
    groups.sort(key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:best]))
    candidates = [e for group in groups[: router.groups_kept] for e in group]
    ranked = sorted(candidates, key=lambda e: -choice[e])
    chosen, refused = ranked[: router.top_k], ranked[router.top_k :]
    return chosen, choice[chosen[-1]] - choice[refused[0]] if refused else None


class PlainRouter:
    """What one top-k router does, summed up token by token."""

    def __init__(self, router) -> None:
        self.config, self.bias = router.config, router.selection_bias
        self.counts: Counter[int] = Counter()
        self.entropies: list[float] = []
        self.margins: list[float] = []

    def add(self, logits_E) -> None:
        scores = plain_scores(self.config, logits_E.tolist())
        bias = [0.0] * len(scores) if self.bias is None else self.bias.tolist()
        choice = [score + b for score, b in zip(scores, bias, strict=True)]
        chosen, margin = plain_choice(self.config, choice)
        self.counts.update(chosen)
        shares = [score / sum(scores) for score in scores]
        self.entropies.append(-sum(share * math.log2(share) for share in shares))
        self.margins += [] if margin is None else [margin]

    @property
    def load(self) -> list[float]:
        experts = self.config.num_experts
        return [self.counts[e] * experts / max(1, self.counts.total()) for e in range(experts)]


@torch.no_grad()
def plain_figures(model, tokens: list[int], window: int, stride: int) -> dict:
    """All figures of a text, from one forward for each token that is predicted."""
    log_p, right, routers = [], [], {}
    agreed = {k: [] for k in range(1, len(model.mtp) + 1)}
    accepted = {k: [] for k in agreed}
    for t in range(1, len(tokens)):
        before_1T = torch.tensor([tokens[window_start(t, window, stride) : t]])
        own_V = model(before_1T)[0, -1]
        log_p.append(own_V.log_softmax(dim=-1)[tokens[t]].item())
        right.append(own_V.argmax().item() == tokens[t])
        with record_routing(model) as routings:
            depths = model.mtp_logits(before_1T)
        for k, logits_1TV in enumerate(depths, start=1):
            if logits_1TV.shape[1]:
                draft = logits_1TV[0, -1].argmax().item()
                agreed[k].append(draft == tokens[t])
                accepted[k].append(draft == own_V.argmax().item())
        for layer, routing in routings.items():
            plain = routers.setdefault(layer, PlainRouter(routings.routers[layer]))
            for logits_E in routing.logits_NE[-1:]:
                plain.add(logits_E)
    return {
        "bits": -sum(log_p) / math.log(2),
        "perplexity": math.exp(-sum(log_p) / len(log_p)),
        "accuracy": mean(right),
        "agreed": agreed,
        "accepted": accepted,
        "routers": routers,
    }


def check_figures(figures: dict, plain: dict) -> None:
    def close(value):
        return value if value is None else pytest.approx(value, **EXACT)

    assert figures["bits_per_byte"] == close(plain["bits"] / figures["bytes"])
    assert figures["perplexity"] == close(plain["perplexity"])
    assert figures["accuracy"] == close(plain["accuracy"])
    assert [draft["depth"] for draft in figures["drafts"]] == list(plain["agreed"])
    for draft in figures["drafts"]:
        agreed, accepted = (plain[name][draft["depth"]] for name in ("agreed", "accepted"))
        assert draft["drafted"] == len(agreed)
        assert draft["agreement"] == close(mean(agreed))
        assert draft["acceptance"] == close(mean(accepted))
    assert [router["layer"] for router in figures["routers"]] == sorted(plain["routers"])
    for found in figures["routers"]:
        check_router(found, plain["routers"][found["layer"]], EXACT)


def check_router(found: dict, plain: PlainRouter, tolerance: dict) -> None:
    loads = [min(plain.load), max(plain.load)] if any(plain.load) else [None, None]  # none counts
    expected = [*loads, mean(plain.entropies), mean(plain.margins)]
    keys = ("least_load", "greatest_load", "entropy_bits", "margin")
    for key, value in zip(keys, expected, strict=True):
        assert found[key] == (value if value is None else pytest.approx(value, **tolerance)), key
    assert found["load"] == pytest.approx(plain.load, **tolerance)


def own_head(config):
    return replace(config, mtp=replace(config.mtp, own_head=True))


# few ids, so that drafts and predictions are often right
MODELS = {
    "mla": model_config(mla(), 2, vocab_size=3),
    "own head": own_head(model_config(gqa(), 2, vocab_size=3)),
    "windows and sinks": replace(VARIED["windows and sinks"](mtp=2), vocab_size=3),
}


@pytest.mark.parametrize(("window", "stride"), [(30, 29), (8, 7), (8, 3), (5, 1), (3, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_every_figure_is_that_of_a_recomputation_token_by_token(name, window, stride):
    model = transformer(MODELS[name], seed=1)
    tokens_N = random_tokens(1, 20, vocab_size=3, seed=3)[0]
    measures = measure_text(model, tokens_N, window, stride, len(model.mtp))
    figures = summarize(measures, model, num_bytes=77)
    assert (figures["tokens"], figures["predicted_tokens"], figures["bytes"]) == (20, 19, 77)
    plain = plain_figures(model, tokens_N.tolist(), window, stride)
    check_figures(figures, plain)
    assert plain["agreed"][1] != plain["accepted"][1]


def test_few_logits_exist_at_once(monkeypatch):
    monkeypatch.setattr(evaluate, "PIECE", 4)
    model, tokens_N = transformer(MODELS["mla"], seed=1), random_tokens(1, 20, vocab_size=3)[0]
    rows = []
    model.head.register_forward_hook(lambda head, inputs, output: rows.append(len(output)))
    figures = summarize(measure_text(model, tokens_N, 12, 9, 2), model, 77)
    assert max(rows) == 4
    check_figures(figures, plain_figures(model, tokens_N.tolist(), 12, 9))


def test_the_model_of_the_recomputation_is_that_of_the_papers():
    """One window, through the equations of `tiny`."""
    model, tokens_N = transformer(MODELS["mla"], seed=1), random_tokens(1, 9, vocab_size=3)[0]
    log_p_TV = (plain_states(model, tokens_N) @ model.head.weight.T).log_softmax(dim=-1)
    nats = [-log_p_TV[t - 1, tokens_N[t]].item() for t in range(1, 9)]
    assert measure_text(model, tokens_N, 9, 8, 0).nats.total == pytest.approx(sum(nats), rel=1e-6)


@st.composite
def cuttings(draw):
    window = draw(st.integers(2, 9))
    return draw(st.integers(2, 15)), window, draw(st.integers(1, window - 1))


@given(cuttings())
@settings(max_examples=200)
def test_windows_predict_every_token_but_the_first_once_with_enough_context(cutting):
    num_tokens, window, stride = cutting
    windows = list(cut_windows(*cutting))
    predicted = [t for _, first, end in windows for t in range(first, end)]
    assert predicted == list(range(1, num_tokens))
    for number, (start, first, end) in enumerate(windows):
        assert start == number * stride
        assert end - start <= window
        assert first - start >= (window - stride if number else 1)
        assert all(start == window_start(t, window, stride) for t in range(first, end))


SMALL = transformer(model_config(gqa(), 1))
SPARSE = [*SMALL.config.layers[1:], *SMALL.config.mtp.blocks]


@given(cuttings())
def test_every_token_counts_once_whatever_the_windows(cutting):
    num_tokens, window, stride = cutting
    tokens_N = random_tokens(1, num_tokens, seed=num_tokens)[0]
    measures = measure_text(SMALL, tokens_N, window, stride, 1)
    nats = 0.0
    for t in range(1, num_tokens):
        start = window_start(t, window, stride)
        log_p_V = SMALL(tokens_N[None, start:t])[0, -1].log_softmax(dim=-1)
        nats -= log_p_V[tokens_N[t]].item()
    assert measures.nats.total == pytest.approx(nats, **EXACT)
    assert measures.nats.count == measures.accuracy.count == num_tokens - 1
    drafted = [t for t in range(2, num_tokens) if t - 2 >= window_start(t, window, stride)]
    assert measures.acceptance[1].count == measures.agreement[1].count == len(drafted)
    used = {layer: use.counts_E.sum().item() for layer, use in measures.experts.items()}
    slots = [block.feed_forward.router.top_k for block in SPARSE]
    positions = [num_tokens - 1, num_tokens - 1, len(drafted)]
    assert used == {i: k * n for i, (k, n) in enumerate(zip(slots, positions, strict=True), 1)}


def test_without_overlap_windows_are_those_of_the_end_of_training():
    config = model_config(gqa(), 1, max_length=7)
    model, tokens_N = transformer(config), random_tokens(1, 20)[0]
    plain = plain_figures(model, tokens_N.tolist(), 7, 6)
    report = measure_held_out(model, tokens_N, 50)
    assert report["held_out_bits_per_byte"] == pytest.approx(plain["bits"] / 50, abs=1e-4)
    bits = measure_without_overlap(model, tokens_N).bits_per_byte(50)
    assert bits == pytest.approx(plain["bits"] / 50, **EXACT)
    for layer, router in plain["routers"].items():
        extremes = {"least": min(router.load), "greatest": max(router.load)}
        assert report["expert_load"][layer] == pytest.approx(extremes, abs=1e-3)


def test_depths_beyond_the_modules_are_those_that_probe_mtp_counts():
    model = transformer(model_config(gqa(), 1, vocab_size=3))
    tokens_N = random_tokens(1, 24, vocab_size=3)[0]
    measures = measure_text(model, tokens_N, 24, 23, 4)
    (probed,) = [
        result
        for result in probe_wirings(model, tokens_N, 4, 24)
        if result.wiring == model.config.mtp
    ]
    for k in range(1, 5):
        # probe-mtp counts the draft for the token behind the text, too
        hits_n = probed.hits_KN[k - 1, : 24 - k - 1]
        assert measures.acceptance[k].total == hits_n.sum().item()
        assert measures.acceptance[k].count == len(hits_n)
    module = measures.experts[3]
    top_k = model.config.mtp.blocks[0].feed_forward.router.top_k
    assert module.counts_E.sum() == 22 * top_k  # its use at depth 1 alone


def one_layer(router):
    layer = LayerConfig(attention=gqa(), feed_forward=MoEConfig(router=router, expert_width=5))
    return transformer(sized(layers=(layer,), mtp=modules((layer,), 1)))


def figures_of(model, num_tokens=20, window=8, stride=7):
    tokens_N = random_tokens(1, num_tokens)[0]
    measures = measure_text(model, tokens_N, window, stride, len(model.mtp))
    return summarize(measures, model, 40)


@pytest.mark.parametrize("top_k", [5, 4])
def test_a_router_that_uses_all_experts_has_no_margin(top_k):
    layers = model_config(gqa()).layers
    everything = LayerConfig(attention=gqa(), feed_forward=softmax_experts(top_k=top_k))
    figures = figures_of(transformer(sized(layers=(*layers[:1], everything))))
    (router,) = figures["routers"]
    assert (router["margin"] is None) == (top_k == 5)
    if top_k == 5:
        assert router["load"] == pytest.approx([1.0] * 5)


@pytest.mark.parametrize(
    "config",
    [
        TopP(num_experts=5, mass=0.6, max_experts=4),
        CosineRouterConfig(num_experts=5, slots=3, least_cosine=0.1),
    ],
)
def test_empty_slots_are_no_experts(config):
    """Without overlap in one window, so that the routing of one forward is all there is."""
    model, tokens_N = one_layer(config), random_tokens(1, 20)[0]
    router, *_ = figures_of(model, window=20, stride=19)["routers"]
    with record_routing(model) as routings:
        model(tokens_N[None, :-1])
    routing, bias_E = routings[0], routings.routers[0].selection_bias
    counts, margins = Counter(), []
    for experts, scores_E in zip(routing.experts_NK.tolist(), routing.scores_NE, strict=True):
        chosen = {e for e in experts if e < 5}
        choice = (scores_E if bias_E is None else scores_E + bias_E).tolist()
        counts.update(chosen)
        if 0 < len(chosen) < 5:
            refused = max(choice[e] for e in range(5) if e not in chosen)
            margins.append(min(choice[e] for e in chosen) - refused)
    assert (routing.experts_NK == 5).any()
    assert router["load"] == pytest.approx([5 * counts[e] / counts.total() for e in range(5)])
    assert router["margin"] == pytest.approx(mean(margins))


def test_where_experts_choose_tokens_there_are_no_margins_and_no_drafts():
    model = one_layer(ExpertChoice(num_experts=5, capacity=1.5))
    figures = figures_of(model, window=20, stride=19)
    assert math.isfinite(figures["bits_per_byte"])
    assert figures["drafts"] == []
    assert [router["margin"] for router in figures["routers"]] == [None, None]
    assert [router["mtp_depth"] for router in figures["routers"]] == [0, 1]
    with pytest.warns(UserWarning, match="router routes each token by later ones too"):
        assert choose_depths(model, None, 64) == 1
    with pytest.raises(ValueError, match="--draft-tokens 2: .* such a model cannot draft"):
        choose_depths(model, 2, 64)


def routed(config: TopK, scores: list[float], bias: list[float] | None = None) -> float:
    """The margin of one token with these scores."""
    router = config.build(3)
    bias_E = None if bias is None else torch.tensor(bias)
    if bias_E is not None:
        router.selection_bias.copy_(bias_E)
    routing = config.route(torch.tensor([scores]).logit(), bias_E)
    return choice_margins(routing, router).item()


def test_margins_of_choices_made_by_hand():
    plain = {"num_experts": 4, "scoring": "sigmoid"}
    scores = [0.9, 0.1, 0.6, 0.5]
    assert routed(TopK(**plain, top_k=1), scores) == pytest.approx(0.3)
    assert routed(TopK(**plain, top_k=3), scores) == pytest.approx(0.4)
    assert routed(TopK(**plain, top_k=4), scores) == math.inf
    # chosen 3 and 0 by 1.0 and 0.9; the best refused has 0.6 + 0.1
    biased = TopK(**plain, top_k=2, selection_bias=True)
    assert routed(biased, scores, [0, 0, 0.1, 0.5]) == pytest.approx(0.2)
    # the second group has the higher sum: expert 0, with the highest score, is no candidate
    grouped = {"num_groups": 2, "groups_kept": 1, "group_score": "top2_sum"}
    assert routed(TopK(**plain, **grouped, top_k=1), scores) == pytest.approx(0.1)
    assert routed(TopK(**plain, **grouped, top_k=2), scores) == math.inf


def test_entropies_of_scores_by_hand():
    scores_NE = torch.tensor([[0.5, 0.5], [0.2, 0.6], [0.3, 0.0], [0.0, 0.0], [-0.5, 1.0]])
    slots_N1 = torch.zeros(5, 1)
    found = score_entropies(Routing(slots_N1, slots_N1.long(), scores_NE, scores_NE)).tolist()
    quarter = 0.25 * 2 + 0.75 * math.log2(4 / 3)
    assert found[:3] == pytest.approx([1.0, quarter, 0.0])
    assert not any(map(math.isfinite, found[3:]))


def test_a_perplexity_beyond_all_numbers_is_left_out():
    measures = Measures()
    measures.nats.add(torch.tensor([800.0]))
    measures.accuracy.add(torch.tensor([False]))
    figures = summarize(measures, SMALL, 4)
    assert (figures["perplexity"], figures["accuracy"]) == (None, 0)
    assert dict(list_figures(figures))["perplexity"] == "-"


def evaluated(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["evaluate", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.fixture
def tale(tmp_path) -> Path:
    (tmp_path / "tale.txt").write_text(TALE, encoding="utf-8")
    return tmp_path / "tale.txt"


def test_the_shipped_model_on_a_tale_through_its_logits(tale, capsys):
    code, out, err = evaluated(capsys, SHIPPED, tale, "--dtype", "float32", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    settings = {"model": str(SHIPPED), "dtype": "float32", "window": 512, "stride": 511}
    assert settings.items() <= report.items()
    (figures,) = report["texts"]
    model = load_model(SHIPPED, dtype=torch.float32, progress=False)
    ids = load_tokenizer(SHIPPED).encode(TALE)
    tokens_1T, target_n = torch.tensor([ids]), torch.tensor(ids[1:])
    with record_routing(model) as routings:
        log_p_nV = model(tokens_1T)[0, :-1].log_softmax(dim=-1)
    nats = -log_p_nV.gather(1, target_n[:, None]).mean().item()
    assert (figures["text"], figures["tokens"]) == (str(tale), len(ids))
    assert figures["bytes"] == len(TALE.encode())
    bits = nats * len(target_n) / math.log(2)
    assert figures["bits_per_byte"] == pytest.approx(bits / len(TALE.encode()), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
    own_n = log_p_nV.argmax(dim=-1)
    assert figures["accuracy"] == pytest.approx((own_n == target_n).double().mean().item())
    draft_n = model.mtp_logits(tokens_1T)[0][0, :-1].argmax(dim=-1)
    (draft,) = figures["drafts"]
    assert draft["agreement"] == pytest.approx((draft_n == target_n[1:]).double().mean().item())
    assert draft["acceptance"] == pytest.approx((draft_n == own_n[1:]).double().mean().item())
    for found in figures["routers"][:3]:
        router = PlainRouter(routings.routers[found["layer"]])
        for logits_E in routings[found["layer"]].logits_NE[:-1]:
            router.add(logits_E)
        check_router(found, router, {"rel": 1e-4})


def test_the_table_has_a_column_for_each_text(tale, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("The king said nothing.", encoding="utf-8")
    options = ("--dtype", "float32", "--window", 64, "--stride", 16, "--draft-tokens", 2)
    arguments = (SHIPPED, tale, tmp_path / "other.txt", *options)
    _, out, _ = evaluated(capsys, *arguments, "--json")
    texts = json.loads(out)["texts"]
    code, out, err = evaluated(capsys, *arguments)
    assert (code, err) == (0, "")
    head, empty, names, *rows = out.splitlines()
    assert (head, empty) == ("windows of 64 tokens, stride 16, float32", "")
    assert names.split() == [text["text"] for text in texts]
    assert rows[0].split() == ["tokens", *(f"{text['tokens']:,}" for text in texts)]
    assert rows[2].split()[3:] == [f"{text['bits_per_byte']:.4f}" for text in texts]
    labels = [row[:21].strip() for row in rows]
    assert labels[5:10] == [
        *("agreement, depth 1", "acceptance, depth 1", "agreement, depth 2", "acceptance, depth 2"),
        "",
    ]
    assert labels[11:] == ["layer 1", "layer 2", "layer 3", "layer 4 (MTP)"]
    layer_2 = [text["routers"][1] for text in texts]
    keys = {"least_load": ".3f", "greatest_load": ".3f", "entropy_bits": ".3f", "margin": ".4f"}
    cells = [format(router[key], form) for router in layer_2 for key, form in keys.items()]
    assert rows[12].split() == ["layer", "2", *cells]


def test_the_first_tokens_are_read_in_whole_characters(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Héros 🙂🙂🙂", encoding="utf-8")
    ids = load_tokenizer(SHIPPED).encode("Héros 🙂🙂🙂")
    whole = len(ids) - 8  # the third last character ends here: the others are bytes
    for limit, tokens, text in [
        (whole, whole, "Héros 🙂"),
        (whole + 3, whole, "Héros 🙂"),
        (whole + 4, whole + 4, "Héros 🙂🙂"),
        (len(ids) + 5, len(ids), "Héros 🙂🙂🙂"),
    ]:
        arguments = (SHIPPED, tmp_path / "text.txt", "--max-tokens", limit, "--json")
        (figures,) = json.loads(evaluated(capsys, *arguments)[1])["texts"]
        assert (figures["tokens"], figures["bytes"]) == (tokens, len(text.encode()))


def test_a_bos_token_predicts_the_first_token(pristine, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("A", encoding="utf-8")
    path = pristine()
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("A")[0] == tokenizer.bos_id
    code, out, _ = evaluated(capsys, path, tmp_path / "text.txt", "--json")
    (figures,) = json.loads(out)["texts"]
    assert code == 0
    assert figures["predicted_tokens"] == len(tokenizer.encode("A", bos=False))


def test_the_first_layers_alone_have_no_drafts(pristine, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(SAMPLE_TEXT, encoding="utf-8")
    _, out, _ = evaluated(capsys, pristine(), tmp_path / "text.txt", "--layers", 2, "--json")
    (figures,) = json.loads(out)["texts"]
    assert figures["drafts"] == []
    assert [router["mtp_depth"] for router in figures["routers"]] == [0]


def test_the_help_says_what_every_figure_means(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--help"])
    out = capsys.readouterr().out
    for name in ("windows", "bits per byte", "perplexity", "accuracy", "load", "entropy"):
        assert f"\n{name}:\n" in out
    for name in ("agreement", "acceptance", "margin"):
        assert f"\n{name}:\n" in out
    assert "Shapes" not in out


@pytest.mark.parametrize(
    ("text", "flags", "told"),
    [
        (b"", (), "text.txt: 1 tokens of text, at least 2 needed"),  # a BOS token
        (b"\xff\xfe", (), "text.txt: not UTF-8 text"),
        (None, (), "text.txt: No such file"),
        (b"Once", ("--max-tokens", 1), "--max-tokens 1: must be >= 2"),
        (b"Once", ("--window", 257), "--window 257: must be from 2 to the model's 256 positions"),
        (b"Once", ("--window", 1), "--window 1: must be from 2"),
        (b"Once", ("--window", 9, "--stride", 10), "--stride 10: must be from 1 to 8"),
        (b"Once", ("--window", 9, "--stride", 9), "--stride 9: must be from 1 to 8"),
        (b"Once", ("--stride", 0), "--stride 0: must be from 1 to 255"),
        (b"Once", ("--draft-tokens", -1), "--draft-tokens -1: must be from 0 to 254"),
        (b"Once", ("--layers", 2, "--draft-tokens", 1), "no MTP modules are loaded"),
        (b"Once", ("--device", "abacus"), "--device abacus"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(pristine, tmp_path, capsys, text, flags, told):
    if text is not None:
        (tmp_path / "text.txt").write_bytes(text)
    check_refusal(evaluated(capsys, pristine(), tmp_path / "text.txt", *flags), told)


def check_refusal(result: tuple[int, str, str], told: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert told in err


def test_a_text_without_a_token_to_predict_is_refused(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a")
    told = "text.txt: 1 tokens of text, at least 2 needed"
    check_refusal(evaluated(capsys, SHIPPED, tmp_path / "text.txt"), told)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tiny, tale, capsys):
    path = tiny()
    shutil.copy(SHIPPED / "tokenizer.model", path)
    check_refusal(evaluated(capsys, path, tale), "the tokenizer has 4096 ids and the model")


@pytest.mark.parametrize(
    ("tensor", "whose"),
    [("model.norm.weight", "the model"), ("model.layers.3.enorm.weight", "an MTP module")],
)
def test_logits_that_are_no_numbers_are_refused(tiny, tmp_path, capsys, tensor, whose):
    path, tensors = tiny(), tensors_of(tiny())
    tensors[tensor][0] = math.nan
    write_tensors(path, tensors)
    (tmp_path / "text.txt").write_text(SAMPLE_TEXT)
    told = f"the logits of {whose} are not finite: `verify --values`"
    check_refusal(evaluated(capsys, path, tmp_path / "text.txt"), told)
