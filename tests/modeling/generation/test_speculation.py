"""What drafting promises: the same greedy text, the same distribution of sampled text.

Greedy runs are compared token by token in float64, over drafts that were kept, drafts that were
not, and ends in the middle of drafts. For sampled runs chance is replaced by something that takes
every branch in turn, so that the probability of every text is found exactly.
"""

from dataclasses import replace
from functools import cache
from importlib import import_module

import pytest
import torch
from files import SHIPPED
from tiny import agreeable, gqa, mla, model_config, transformer, windows_and_sinks

from checkpoints import load_model, load_tokenizer
from modeling import LayerConfig, generate, generate_batch
from modeling.generation import draft_count as draft_counts
from modeling.generation import drafting as drafting_file
from modeling.generation.draft_count import FixedCount, Round
from modeling.generation.sampling import RandomStream, Sampling
from modeling.generation.teacher_forcing import forced_states
from moe import DenseConfig

GENERATE = import_module("modeling.generation.generate")  # the package has a function of that name
KINDS = {
    "mla": lambda mtp: model_config(mla(), mtp),
    "gqa": lambda mtp: model_config(gqa(), mtp),
    "windows and sinks": windows_and_sinks,
    # an epsilon so large that the norms let the multipliers through
    "multipliers": lambda mtp: model_config(
        gqa(), mtp, embedding_multiplier=0.1, logits_multiplier=0.3, norm_epsilon=0.5
    ),
}
# how much the layers add: little enough for drafts to be kept, too much for all of them to be
STRENGTHS = {"mla": 0.12, "gqa": 0.05, "windows and sinks": 0.08, "multipliers": 0.05}
MODELS = {
    (kind, mtp): agreeable(KINDS[kind](mtp), strength)
    for kind, strength in STRENGTHS.items()
    for mtp in (1, 2, 3)
}
WIRINGS = [
    {"input": "raw", "carry": "main"},
    {"carry": "raw", "final_norm": "none"},
    {"carry": "main", "first": "state", "final_norm": "main"},
    {"own_embedding": True, "own_head": True},
]


def prompts_of(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of very unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + (7 * i) % 23 for i in range(count)]
    return [torch.randint(23, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = prompts_of(9)


@pytest.fixture
def rounds(monkeypatch):
    """Of every round of drafting: the rows' tokens, and what was drafted after them."""
    seen = []
    really_draft = drafting_file.Drafter.draft

    def recorded(self, tokens, counts):
        drafts = really_draft(self, tokens, counts)
        if any(counts):
            tokens_now = [list(row) for row in tokens]
            seen.append((tokens_now, [[draft.token for draft in row] for row in drafts]))
        return drafts

    monkeypatch.setattr(drafting_file.Drafter, "draft", recorded)
    return seen


@cache
def plain_texts(kind: str, num_modules: int) -> list[list[int]]:
    return [list(generate(MODELS[kind, num_modules], prompt, 16)) for prompt in PROMPTS]


@pytest.mark.parametrize("draft_tokens", [1, 3, 8])
@pytest.mark.parametrize(
    ("kind", "num_modules"), [("mla", 1), ("mla", 2), ("gqa", 1), ("windows and sinks", 2)]
)
def test_greedy_text_is_that_of_plain_decoding(kind, num_modules, draft_tokens):
    model, kept, made = MODELS[kind, num_modules], 0, 0
    plain = plain_texts(kind, num_modules)
    for prompt, expected in zip(PROMPTS, plain, strict=True):
        generation = generate(model, prompt, 16, draft_tokens=draft_tokens)
        assert list(generation) == expected
        kept += sum(generation.statistics.accepted)
        made += sum(generation.statistics.drafted)
    assert kept > 8
    assert made - kept > 5
    for rows in (PROMPTS[:3], PROMPTS[3:]):
        expected = [plain[PROMPTS.index(prompt)] for prompt in rows]
        assert generate_batch(model, rows, 16, draft_tokens=draft_tokens) == expected


@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
@pytest.mark.parametrize("num_modules", [1, 2])
def test_greedy_text_is_that_of_plain_decoding_under_every_wiring(wiring, num_modules):
    config = model_config(gqa(), num_modules)
    model = agreeable(replace(config, mtp=replace(config.mtp, **wiring)))
    plain = [list(generate(model, prompt, 15)) for prompt in PROMPTS[:6]]
    for draft_tokens in (1, 3):
        assert generate_batch(model, PROMPTS[:6], 15, draft_tokens=draft_tokens) == plain


@pytest.mark.parametrize("draft_tokens", [2, 8])
@pytest.mark.parametrize("num_modules", [1, 2])
def test_a_stop_id_among_kept_drafts_ends_the_text_there(num_modules, draft_tokens, rounds):
    model, inside = MODELS["mla", num_modules], 0
    for prompt in PROMPTS[:6]:
        plain = list(generate(model, prompt, 20))
        for stop in set(plain):
            rounds.clear()
            expected = plain[: plain.index(stop)]
            found = generate(model, prompt, 20, stop_ids=[stop], draft_tokens=draft_tokens)
            assert list(found) == expected
            for (before,), (drafted,) in rounds[-1:]:  # none where the first token is the stop id
                ahead = (prompt + expected)[len(before) :]
                inside += drafted[: len(ahead) + 1] == [*ahead, stop]
    assert inside >= 2


@pytest.mark.parametrize("draft_tokens", [1, 3, 8])
@pytest.mark.parametrize("kind", ["mla", "windows and sinks"])
def test_the_contexts_end_cuts_where_plain_decoding_does(kind, draft_tokens, rounds):
    model = MODELS[kind, 2]
    limit = model.config.max_length
    for prompt in PROMPTS[3:5]:
        count = limit - len(prompt)
        plain = list(generate(model, prompt, count))
        assert len(plain) == count
        rounds.clear()
        assert list(generate(model, prompt, count, draft_tokens=draft_tokens)) == plain
        ends = [len(rows[0]) + len(drafts[0]) for rows, drafts in rounds]
        assert max(ends) < limit  # the verifier's own token fills the last place


class Wandering(FixedCount):
    """Another number of drafts every round, none among them."""

    def choose_count(self) -> int:
        self.turn = getattr(self, "turn", 0) + 1
        return (self.turn * 3) % (self.max_drafts + 1)


@pytest.mark.parametrize("kind", ["mla", "windows and sinks", "multipliers"])
@pytest.mark.parametrize("num_modules", [1, 2, 3])
@pytest.mark.parametrize("rule", [FixedCount, Wandering])
def test_drafts_are_what_the_modules_predict_from_the_whole_text(
    kind, num_modules, rule, rounds, monkeypatch
):
    """The modules' caches hold, after any number of rejections, what they should."""
    monkeypatch.setattr(GENERATE, "FixedCount", rule)
    check_drafts(MODELS[kind, num_modules], rounds)


@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
@pytest.mark.parametrize("num_modules", [1, 2])
def test_drafts_follow_the_wiring(wiring, num_modules, rounds):
    config = model_config(gqa(), num_modules)
    check_drafts(agreeable(replace(config, mtp=replace(config.mtp, **wiring))), rounds)


def check_drafts(model, rounds):
    prompts = [[5], [3, 1, 4, 1, 5, 9, 2, 6], [2, 7]]
    generate_batch(model, prompts, 16, draft_tokens=4)
    checked = 0
    for texts, drafts in rounds:
        for text, drafted in zip(texts, drafts, strict=True):
            if not drafted:
                continue
            tokens_BT = torch.tensor([text + drafted])
            states, k = model.hidden_states(tokens_BT), len(drafted)
            depths = forced_states(model, states, tokens_BT, k, model.config.mtp)
            for number, (draft, normed_BnD) in enumerate(zip(drafted, depths, strict=True)):
                module = model.mtp_modules[min(number, len(model.mtp) - 1)]
                logits_V = model.logits(normed_BnD[0, len(text) - 2], module)
                assert draft == int(logits_V.argmax())
                checked += 1
    assert checked > 25


def test_a_measured_number_of_drafts_changes_no_token():
    model = MODELS["mla", 1]
    plain = [list(generate(model, prompt, 30)) for prompt in PROMPTS[:6]]
    assert [list(generate(model, p, 30, draft_tokens="auto")) for p in PROMPTS[:6]] == plain
    assert generate_batch(model, PROMPTS[:6], 30, draft_tokens="auto") == plain


def test_drafting_stops_where_it_does_not_pay(monkeypatch):
    """Seconds are made up: a draft takes as long as a plain step."""

    class Slow(draft_counts.MeasuredCount):
        def observe(self, last_round):
            drafted, accepted = last_round.drafted, last_round.accepted
            count = max(drafted)
            super().observe(Round(drafted, accepted, 1.0 * count, 1.0 + 0.1 * count))

    monkeypatch.setattr(GENERATE, "MeasuredCount", Slow)
    generation = generate(MODELS["mla", 1], [5, 2, 8], 60, draft_tokens="auto")
    assert list(generation) == list(generate(MODELS["mla", 1], [5, 2, 8], 60))
    drafted = generation.statistics.drafted[0]
    assert 2 <= drafted <= 8 < generation.statistics.forwards


def test_greedy_drafting_draws_no_random_numbers(monkeypatch):
    def refuse(*_):
        raise AssertionError("a greedy run drew a random number")

    monkeypatch.setattr(RandomStream, "draw", refuse)
    monkeypatch.setattr(RandomStream, "draw_bool", refuse)
    before = torch.random.get_rng_state()
    list(generate(MODELS["mla", 1], [5, 2], 20, draft_tokens=3))
    generate_batch(MODELS["mla", 1], [[5, 2], [1]], 20, draft_tokens=3)
    assert torch.random.get_rng_state().equal(before)


class EveryBranch:
    """Chance that takes every branch in turn; `weight` is the probability of the one just taken."""

    def __init__(self) -> None:
        self.path: list[list[int]] = []  # per decision: which option, of how many
        self.restart()

    def restart(self) -> None:
        self.decisions, self.weight = 0, 1.0

    def branch(self, probabilities: list[float]) -> int:
        options = [i for i, probability in enumerate(probabilities) if probability > 0]
        if self.decisions == len(self.path):
            self.path.append([0, len(options)])
        choice = options[self.path[self.decisions][0]]
        self.decisions += 1
        self.weight *= probabilities[choice]
        return choice

    def draw(self, probability_V) -> int:
        return self.branch(probability_V.tolist())

    def draw_bool(self, probability: float) -> bool:
        return self.branch([probability, 1 - probability]) == 0

    def advance(self) -> bool:
        """Go on to the next path; False after the last."""
        while self.path and self.path[-1][0] + 1 == self.path[-1][1]:
            self.path.pop()
        if self.path:
            self.path[-1][0] += 1
        self.restart()
        return bool(self.path)


def enumerated(monkeypatch, run) -> dict[tuple, float]:
    """The probability of everything that `run` can return."""
    chance, found = EveryBranch(), {}
    monkeypatch.setattr("modeling.generation.rows.RandomStream", lambda seed: chance)
    while True:
        outcome = run()
        found[outcome] = found.get(outcome, 0.0) + chance.weight
        if not chance.advance():
            return found


def exact(model, prompt, count, sampling, stop_ids=()) -> dict[tuple, float]:
    """The probability of every text by the chain rule, from whole forwards."""
    if count == 0:
        return {(): 1.0}
    found = {}
    probability_V = sampling.probabilities(model(torch.tensor([prompt]))[0, -1])
    for token, probability in enumerate(probability_V.tolist()):
        if probability > 0 and token in stop_ids:
            found[()] = found.get((), 0.0) + probability
        elif probability > 0:
            rest = exact(model, [*prompt, token], count - 1, sampling, stop_ids)
            for text, share in rest.items():
                found[token, *text] = found.get((token, *text), 0.0) + probability * share
    return found


def small_model(num_modules: int, vocab_size: int = 3, seed: int = 1):
    """Two dense layers over a few tokens, whose modules draft something else than it chooses."""
    layer = LayerConfig(attention=gqa(), feed_forward=DenseConfig(width=10))
    config = model_config(gqa(), num_modules, layers=(layer, layer), vocab_size=vocab_size)
    mtp = replace(config.mtp, blocks=(layer,) * num_modules)
    model = transformer(replace(config, mtp=mtp), seed=seed)
    with torch.no_grad():
        model.head.weight *= 0.3
    return model


@pytest.mark.parametrize(
    ("settings", "num_modules", "draft_tokens", "count"),
    [
        ({}, 1, 1, 3),
        ({}, 2, 2, 4),
        ({"temperature": 0.6}, 1, 3, 3),
        ({"temperature": 2.5}, 1, 2, 3),
        ({"top_k": 2}, 1, 2, 3),
        ({"top_p": 0.7}, 1, 2, 3),
        ({"min_p": 0.4}, 1, 2, 3),
        ({"top_k": 2, "top_p": 0.9, "min_p": 0.1, "temperature": 1.4}, 1, 2, 4),
        ({"stop_ids": [1]}, 1, 2, 3),
        ({"stop_ids": [0, 2]}, 2, 2, 4),
    ],
)
def test_the_distribution_of_sampled_text_is_that_of_plain_sampling(
    settings, num_modules, draft_tokens, count, monkeypatch
):
    model, prompt, settings = small_model(num_modules), [2, 0, 1], {"temperature": 1.0} | settings
    stop_ids = settings.pop("stop_ids", ())
    more = {"stop_ids": stop_ids, "draft_tokens": draft_tokens, **settings}
    found = enumerated(monkeypatch, lambda: tuple(generate(model, prompt, count, **more)))
    expected = exact(model, prompt, count, Sampling(**settings), stop_ids)
    assert found == pytest.approx(expected, abs=1e-12)
    assert sum(found.values()) == pytest.approx(1)


def test_rows_of_a_batch_are_sampled_independently(monkeypatch):
    model, prompts = small_model(1), [[2], [0, 1, 1]]

    def run():
        rows = generate_batch(model, prompts, 3, temperature=1.0, top_k=2, draft_tokens=1)
        return tuple(map(tuple, rows))

    found = enumerated(monkeypatch, run)
    one, other = (exact(model, p, 3, Sampling(temperature=1.0, top_k=2)) for p in prompts)
    product = {(a, b): p * q for a, p in one.items() for b, q in other.items()}
    assert found == pytest.approx(product, abs=1e-12)


def test_texts_drawn_with_fixed_seeds_pass_a_chi_square_test():
    """End to end with real random numbers: 1,000 texts of 3 tokens, out of 64."""
    model, prompt, draws = small_model(1, vocab_size=4), [2, 0, 1], 1000
    expected = exact(model, prompt, 3, Sampling(temperature=1.0))
    counts = dict.fromkeys(expected, 0)
    for seed in range(draws):
        text = generate(model, prompt, 3, temperature=1.0, seed=seed, draft_tokens=2)
        counts[tuple(text)] += 1
    likely = {text for text, probability in expected.items() if probability * draws >= 5}
    cells = [(counts[text], expected[text] * draws) for text in likely]
    rest = [(counts[text], expected[text] * draws) for text in expected if text not in likely]
    cells.append(tuple(map(sum, zip(*rest, strict=True))))
    statistic = sum((found - wanted) ** 2 / wanted for found, wanted in cells)
    freedom = torch.tensor((len(cells) - 1) / 2)
    p_value = torch.special.gammaincc(freedom, torch.tensor(statistic / 2)).item()
    print(f"chi-square {statistic:.1f} over {len(cells)} cells, p = {p_value:.2f}")
    assert p_value > 0.01


BEGINNINGS = (
    "Once upon a time there was",
    'The old witch said to the boy, "',
    "There was once a king who had three daughters. The eldest",
    '"Come with me," said the fox,',
    "In the forest stood a little house, and",
    "The princess wept and",
    "He went on and on until",
    "When the giant heard this",
)


@pytest.fixture(scope="module")
def tales():
    tokenizer = load_tokenizer(SHIPPED)
    return [tokenizer.encode(text) for text in BEGINNINGS]


def test_the_shipped_model_tells_the_same_tales_with_drafts(tales):
    model = load_model(SHIPPED, dtype=torch.float64, progress=False)
    plain = generate_batch(model, tales, 30)
    (full_stop,) = load_tokenizer(SHIPPED).encode(".")
    until_stop = [row[: row.index(full_stop)] if full_stop in row else row for row in plain]
    assert until_stop != plain
    for draft_tokens in (2, 8):
        found = [generate(model, tale, 30, draft_tokens=draft_tokens) for tale in tales[:3]]
        assert [list(generation) for generation in found] == plain[:3]
        assert all(generation.statistics.forwards_saved > 6 for generation in found)
        settings = {"draft_tokens": draft_tokens, "stop_ids": [full_stop]}
        assert generate_batch(model, tales, 30, **settings) == until_stop


@torch.no_grad()
def test_in_bfloat16_texts_part_at_near_ties_only(tales):
    """Where plain and speculative text first differ, the two tokens are the likeliest ones, and
    apart by no more than bfloat16 itself is wrong there: twice the largest error of a logit among
    ways to read the same text, which differ in how many tokens each forward is given."""
    rounded = load_model(SHIPPED, dtype=torch.bfloat16, progress=False)
    exact_model = load_model(SHIPPED, dtype=torch.float32, progress=False)
    parted = []
    for tale in tales[3:]:
        plain = list(generate(rounded, tale, 46))
        for draft_tokens in (1, 3):
            drafted = list(generate(rounded, tale, 46, draft_tokens=draft_tokens))
            differing = [i for i, (a, b) in enumerate(zip(plain, drafted, strict=True)) if a != b]
            for i in differing[:1]:
                text = torch.tensor([tale + plain[:i]])
                exact_V = exact_model(text)[0, -1]
                error = max(
                    (read_by(rounded, text, at_once) - exact_V).abs().max().item()
                    for at_once in (1, 2, 4, text.shape[1])
                )
                gap = (exact_V[plain[i]] - exact_V[drafted[i]]).abs().item()
                assert {plain[i], drafted[i]} <= set(exact_V.topk(3).indices.tolist())
                assert gap <= 2 * error
                parted.append((gap, error, exact_V.max().item()))
    for gap, error, largest in parted:
        print(f"gap {gap:.3f}, error of bfloat16 {error:.3f}, logit {largest:.1f}")
    print(f"{len(parted)} of 10 texts part; widest gap {max(parted)[0]:.3f}")


def read_by(model, tokens_BT, at_once: int):
    """The last position's logits, the text having been read by so many tokens at once."""
    kept = model.make_cache(1, tokens_BT.shape[1])
    for piece_BT in tokens_BT.split(at_once, dim=1):
        logits_BTV = model(piece_BT, cache=kept)
    return logits_BTV[0, -1]
