"""Generation: prefill, decode, sampling, and self-speculation with the MTP modules.

Every round is one forward of the main model over each row's newest tokens: the whole prompt in
the first round; later the one token just chosen, followed by what the MTP modules drafted after
it. From every position's logits a token is chosen, and the round goes on while that is what was
drafted: so each round gains one token more than the drafts that proved right. Plain decoding is the
same loop with no drafts.

What is promised, in exact arithmetic: greedy text is that of plain decoding, token by token;
sampled text has its distribution (see `sampling`). In bfloat16 near-ties may fall differently,
because a forward over several tokens rounds otherwise than one over each.

Rows of a batch have their own lengths: they are padded on the right, and their caches cut back to
what is valid.

Shapes: B rows, T new tokens (of the longest row), n positions of one row to choose at, D model
width, V vocabulary.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

import torch
from torch import Tensor

from ..cache import Cache
from ..model import States, Transformer
from ..mtp import first_state
from .draft_count import FixedCount, MeasuredCount, Round
from .drafting import Drafter, pad_tokens
from .sampling import Draft, RandomStream, Sampling

DraftCount = int | Literal["auto"]


@dataclass
class GenerationStatistics:
    """Counts and seconds of one generation, over all rows; grows while it runs."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    cache_bytes_per_token: int = 0
    cache_constant_bytes: int = 0  # of a row, however long it is: windows, states
    forwards: int = 0  # of the main model, over all rows at once, the prompt's included
    forwards_without_drafts: int = 0  # what the same text would have taken
    drafted: list[int] = field(default_factory=list)  # per draft position
    accepted: list[int] = field(default_factory=list)
    drafting_seconds: float = 0.0
    verifying_seconds: float = 0.0  # in forwards over drafts, and in judging them

    def begin(self, prompts: Sequence[Sequence[int]], max_drafts: int) -> None:
        self.prompt_tokens = sum(map(len, prompts))
        self.drafted, self.accepted = [0] * max_drafts, [0] * max_drafts

    def add(self, seen: Round, rows: Sequence["Row"], cache: Cache) -> None:
        if self.forwards == 0:
            self.prompt_seconds = seen.forward_seconds
            self.cache_bytes_per_token = cache.bytes_per_token
            self.cache_constant_bytes = cache.constant_bytes
        else:
            self.generation_seconds += seen.drafting_seconds + seen.forward_seconds
        self.forwards += 1
        self.forwards_without_drafts = max(row.choices for row in rows)
        self.generated_tokens += sum(len(row.gained) for row in rows)
        self.drafting_seconds += seen.drafting_seconds
        self.verifying_seconds += seen.forward_seconds if any(seen.drafted) else 0.0
        for drafted, kept in zip(seen.drafted, seen.accepted, strict=True):
            for position in range(drafted):
                self.drafted[position] += 1
                self.accepted[position] += position < kept

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / max(self.prompt_seconds, 1e-9)

    @property
    def generation_tokens_per_second(self) -> float:
        """Of the tokens after the first, which the prompt's forward gives for free."""
        return max(0, self.generated_tokens - 1) / max(self.generation_seconds, 1e-9)

    @property
    def forwards_saved(self) -> int:
        return self.forwards_without_drafts - self.forwards

    @property
    def mean_accepted_length(self) -> float:
        """Tokens gained where there were drafts: those kept, and the verifier's own one."""
        return 1 + sum(self.accepted) / self.drafted[0] if any(self.drafted) else 1.0


class Generation(Iterator[int]):
    """The token ids of one sequence as they are generated; `statistics` grows with them."""

    def __init__(self, rounds: Iterator[list[list[int]]], statistics: GenerationStatistics) -> None:
        self.statistics = statistics
        self._tokens = (token for (row,) in rounds for token in row)

    def __next__(self) -> int:
        return next(self._tokens)


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop_ids: Sequence[int] = (),
    draft_tokens: DraftCount = 0,
) -> Generation:
    """Continue one sequence; an iterator of token ids that ends before a stop id.

    temperature 0 is greedy; otherwise `seed` makes the draws repeatable (None: fresh each time).
    draft_tokens: how many tokens the MTP modules guess per round, "auto" for the number that
    proves fastest. It changes the speed and not the text: greedy text stays the same, sampled text
    keeps its distribution, though not its draws (with "auto" these depend on the time it takes).
    Raises ValueError for an empty prompt, unknown ids, a length that exceeds the model's
    max_length, and settings that no distribution has.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    statistics = GenerationStatistics()
    rows = make_rows(model, [prompt_ids], max_new_tokens, draft_tokens, seed)
    rule = make_count_rule(draft_tokens, max_new_tokens)
    return Generation(decode(model, rows, sampling, set(stop_ids), rule, statistics), statistics)


def generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop_ids: Sequence[int] = (),
    draft_tokens: DraftCount = 0,
) -> list[list[int]]:
    """Continue several sequences together; each row equals its own `generate` with these arguments.

    Each row draws its random numbers from its own stream, begun at `seed`. (Only with drafts
    counted "auto" are a row's draws others than alone; greedy text is the same even so.)
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    rows = make_rows(model, prompts, max_new_tokens, draft_tokens, seed)
    rule = make_count_rule(draft_tokens, max_new_tokens)
    for _ in decode(model, rows, sampling, set(stop_ids), rule, GenerationStatistics()):
        pass
    return [row.tokens[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def make_rows(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    draft_tokens: DraftCount,
    seed: int | None,
) -> list["Row"]:
    """A row for each prompt; refuses what cannot be generated, before any work is done."""
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed = {seed}: must be a number of 64 bits")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: must be >= 0")
    if draft_tokens != "auto" and not (isinstance(draft_tokens, int) and draft_tokens >= 0):
        raise ValueError(f'draft_tokens = {draft_tokens}: must be >= 0, or "auto"')
    if draft_tokens and not model.mtp:
        raise ValueError("draft_tokens needs MTP modules, and this model has none loaded")
    for path, module in model.named_modules():
        if getattr(module, "sees_other_tokens", False):
            raise ValueError(
                f"{path} routes a token by looking at the others of a forward, later ones too: "
                "such a model cannot generate"
            )
    limit, vocab_size = model.config.max_length, model.config.vocab_size
    for prompt in prompts:
        for position, token in enumerate(prompt):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"token id {token} at position {position} is outside the vocabulary "
                    f"of {vocab_size}"
                )
        if not prompt:
            raise ValueError(
                "the prompt holds no token: begin with the tokenizer's BOS, or some text"
            )
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"{len(prompt)} prompt tokens + {max_new_tokens} new ones exceed "
                f"the model's {limit} positions"
            )
    return [
        Row(list(prompt), len(prompt) + max_new_tokens, RandomStream(seed)) for prompt in prompts
    ]


def make_count_rule(draft_tokens: DraftCount, max_new_tokens: int) -> FixedCount | MeasuredCount:
    most = max(0, max_new_tokens - 1)  # the prompt gives the first token
    if draft_tokens == "auto":
        return MeasuredCount(min(8, most))
    return FixedCount(min(draft_tokens, most))


@dataclass
class Row:
    """One sequence of a batch on its way."""

    tokens: list[int]
    limit: int  # of its length
    random: RandomStream
    drafts: list[Draft] = field(default_factory=list)
    gained: list[int] = field(default_factory=list)  # in the last round
    choices: int = 0  # tokens chosen, with the stop id that may have ended the row
    finished: bool = False

    def extend(self, chosen: Iterable[int], stop_ids: set[int]) -> None:
        """Take a round's tokens one by one, up to a stop id or the row's limit."""
        self.gained = []
        for token in chosen:
            self.choices += 1
            if token in stop_ids:
                self.finished = True
                return
            self.gained.append(token)
            self.tokens.append(token)
            if len(self.tokens) == self.limit:
                self.finished = True
                return

    @property
    def kept(self) -> int:
        """How many of the drafts became part of the text; a stop id never does."""
        pairs = zip(self.drafts, self.gained, strict=False)
        return len(list(takewhile(lambda pair: pair[0].token == pair[1], pairs)))

    @property
    def room(self) -> int:
        """How many drafts it has use for: the last token of a text is never drafted."""
        return 0 if self.finished else self.limit - len(self.tokens) - 1


@torch.no_grad()
def decode(
    model: Transformer,
    rows: list[Row],
    sampling: Sampling,
    stop_ids: set[int],
    rule: FixedCount | MeasuredCount,
    statistics: GenerationStatistics,
) -> Iterator[list[list[int]]]:
    """Yield each round's new tokens, row by row, which the rows have then gained."""
    if not rows or all(row.limit == len(row.tokens) for row in rows):
        return
    capacity = max(row.limit for row in rows) + rule.most
    cache = model.make_cache(len(rows), capacity, rule.most)
    streams = [row.random for row in rows]
    drafter = Drafter(model, capacity, rule.most, sampling, streams) if rule.most else None
    statistics.begin([row.tokens for row in rows], rule.most)
    drafting_seconds = 0.0
    with whole_weights(model):
        while unfinished := [row for row in rows if not row.finished]:
            started, held = time.perf_counter(), cache.lengths
            states, logits = verify_drafts(model, rows, cache)
            choose_tokens(rows, logits, sampling, stop_ids)
            cut_back(cache, rows)
            drafted, kept = [len(row.drafts) for row in unfinished], [r.kept for r in unfinished]
            seen = Round(drafted, kept, drafting_seconds, time.perf_counter() - started)
            if statistics.forwards:
                rule.observe(seen)
            statistics.add(seen, rows, cache)
            yield [row.gained for row in rows]
            if drafter is not None:
                started = time.perf_counter()
                drafter.add_states(confirmed_states(model, rows, states, held, cache))
                give_drafts(rows, drafter, rule.next())
                drafting_seconds = time.perf_counter() - started


@contextmanager
def whole_weights(model: Transformer) -> Iterator[None]:
    """Gather what `fully_shard` has sharded of the model itself.

    A forward gathers it by itself, but generation calls other methods. Layers that are sharded
    are called as they always are.
    """
    unshard, reshard = getattr(model, "unshard", None), getattr(model, "reshard", None)
    if unshard is None or reshard is None:
        yield
        return
    unshard()
    try:
        yield
    finally:
        reshard()


def verify_drafts(
    model: Transformer, rows: list[Row], cache: Cache
) -> tuple[States, Sequence[Tensor]]:
    """The main model on what each row's cache lacks, which ends with its drafts.

    Returns the states of all of it, and the logits, (n, V) for each row, of the newest token and
    the drafts.
    """
    pairs = zip(rows, cache.lengths, strict=True)
    fed = [
        [] if row.finished else row.tokens[held:] + [draft.token for draft in row.drafts]
        for row, held in pairs
    ]
    states = model.hidden_states(
        pad_tokens(fed, model.device), cache, [len(tokens) for tokens in fed]
    )
    deciding = [
        state_TD[max(0, len(tokens) - len(row.drafts) - 1) : len(tokens)]
        for row, tokens, state_TD in zip(rows, fed, states.normed_BTD, strict=True)
    ]
    logits_NV = model.logits(torch.cat(deciding))
    return states, logits_NV.split([len(state_nD) for state_nD in deciding])


def choose_tokens(
    rows: list[Row], logits: Sequence[Tensor], sampling: Sampling, stop_ids: set[int]
) -> None:
    """Extend every unfinished row by what its logits, (n, V), choose."""
    for row, logits_nV in zip(rows, logits, strict=True):
        chosen = sampling.choose_after(row.drafts, logits_nV, row.random)
        row.extend([] if row.finished else chosen, stop_ids)


def cut_back(cache: Cache, rows: list[Row]) -> None:
    """Forget what was fed and is no text: all but a row's newest token has been through the model.

    A finished row is fed nothing more and stays as it is.
    """
    pairs = zip(rows, cache.lengths, strict=True)
    cache.truncate([held if row.finished else len(row.tokens) - 1 for row, held in pairs])


def confirmed_states(
    model: Transformer, rows: list[Row], states: States, held: Sequence[int], cache: Cache
) -> list[Tensor]:
    """Of each row, what MTP modules read of the positions that the round has added, (n, D).

    held: how long the rows were before the round.
    """
    read_BTD = first_state(model.config.mtp, states)
    added = [
        0 if row.finished else now - before
        for row, before, now in zip(rows, held, cache.lengths, strict=True)
    ]
    return [read_TD[:n] for read_TD, n in zip(read_BTD, added, strict=True)]


def give_drafts(rows: list[Row], drafter: Drafter, count: int) -> None:
    """Give every row its drafts: none beyond the last token that it may have."""
    counts = [max(0, min(count, row.room)) for row in rows]
    drafts = drafter.draft([row.tokens for row in rows], counts)
    for row, drafted in zip(rows, drafts, strict=True):
        row.drafts = drafted
