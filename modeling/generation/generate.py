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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

import torch
from torch import Tensor

from ..cache import Cache
from ..model import Transformer
from ..mtp import States, first_state
from .draft_count import FixedCount, MeasuredCount, Round
from .drafting import Drafter, padded
from .sampling import Draft, RandomStream, Sampling


@dataclass
class GenerationStatistics:
    """Counts and seconds of one generation, over all rows; grows while it runs."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    cache_bytes_per_token: int = 0
    forwards: int = 0  # of the main model, over all rows at once, the prompt's included
    forwards_without_drafts: int = 0  # what the same text would have taken
    drafted: list[int] = field(default_factory=list)  # per draft position
    accepted: list[int] = field(default_factory=list)
    drafting_seconds: float = 0.0
    verifying_seconds: float = 0.0  # in forwards over drafts, and in judging them

    def begin(self, prompts: Sequence[Sequence[int]], cache_bytes: int, most_drafts: int) -> None:
        self.prompt_tokens = sum(map(len, prompts))
        self.cache_bytes_per_token = cache_bytes
        self.drafted, self.accepted = [0] * most_drafts, [0] * most_drafts

    def add(self, seen: Round, rows: Sequence["Row"]) -> None:
        if self.forwards == 0:
            self.prompt_seconds = seen.forward_seconds
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
    draft_tokens: int | Literal["auto"] = 0,
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
    prompts = [list(prompt_ids)]
    check(model, prompts, max_new_tokens, draft_tokens, seed)
    rule = rule_for(draft_tokens, max_new_tokens)
    rounds = decode(model, prompts, max_new_tokens, sampling, seed, set(stop_ids), rule, statistics)
    return Generation(rounds, statistics)


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
    draft_tokens: int | Literal["auto"] = 0,
) -> list[list[int]]:
    """Continue several sequences together; each row equals its own `generate` with these arguments.

    Each row draws its random numbers from its own stream, begun at `seed`. (Only with drafts
    counted "auto" are a row's draws others than alone; greedy text is the same even so.)
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    rows = [list(prompt) for prompt in prompts]
    check(model, rows, max_new_tokens, draft_tokens, seed)
    texts: list[list[int]] = [[] for _ in rows]
    statistics = GenerationStatistics()
    rule = rule_for(draft_tokens, max_new_tokens)
    rounds = decode(model, rows, max_new_tokens, sampling, seed, set(stop_ids), rule, statistics)
    for new in rounds:
        for text, tokens in zip(texts, new, strict=True):
            text.extend(tokens)
    return texts


def check(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    draft_tokens: int | str,
    seed: int | None,
) -> None:
    """Refuse what cannot be generated, before any work is done."""
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed = {seed}: must be a number of 64 bits")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: must be >= 0")
    if draft_tokens != "auto" and not (isinstance(draft_tokens, int) and draft_tokens >= 0):
        raise ValueError(f'draft_tokens = {draft_tokens}: must be >= 0, or "auto"')
    if draft_tokens and not model.mtp:
        raise ValueError("draft_tokens needs MTP modules, and this model has none loaded")
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


def rule_for(
    draft_tokens: int | Literal["auto"], max_new_tokens: int
) -> FixedCount | MeasuredCount:
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

    def extend(self, logits_nV: Tensor, sampling: Sampling, stop_ids: set[int]) -> None:
        """Choose the next tokens, as long as they are what was drafted."""
        self.gained = []
        for draft, logits_V in zip([*self.drafts, None], logits_nV, strict=True):
            if draft is None:
                token = sampling.choose(logits_V, self.random)
            else:
                token = sampling.judged(logits_V, draft, self.random)
            self.choices += 1
            if token in stop_ids:
                self.finished = True
                return
            self.gained.append(token)
            self.tokens.append(token)
            self.finished = len(self.tokens) == self.limit
            if self.finished or draft is None or token != draft.token:
                return

    @property
    def kept(self) -> int:
        """How many of the drafts became part of the text; a stop id never does."""
        pairs = zip(self.drafts, self.gained, strict=False)
        return len(list(takewhile(lambda pair: pair[0].token == pair[1], pairs)))


@torch.inference_mode()
def decode(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | None,
    stop_ids: set[int],
    rule: FixedCount | MeasuredCount,
    statistics: GenerationStatistics,
) -> Iterator[list[list[int]]]:
    """Yield each round's new tokens, row by row. `prompts` grow in place to the whole sequences."""
    if max_new_tokens == 0 or not prompts:
        return
    rows = [Row(prompt, len(prompt) + max_new_tokens, RandomStream(seed)) for prompt in prompts]
    random, capacity = [row.random for row in rows], max(row.limit for row in rows) + rule.most
    cache = model.make_cache(len(rows), capacity, rollback=rule.most)
    drafter = Drafter(model, capacity, rule.most, sampling, random) if rule.most else None
    statistics.begin(prompts, cache.nbytes // (capacity * len(rows)), rule.most)
    drafting_seconds = 0.0
    while going := [row for row in rows if not row.finished]:
        started, held = time.perf_counter(), cache.lengths
        states, logits = looked_at(model, rows, cache)
        for row, logits_nV in zip(rows, logits, strict=True):
            if row.finished:
                row.gained = []
            else:
                row.extend(logits_nV, sampling, stop_ids)
        # All but the newest token has been through the model; what was fed beyond is forgotten,
        # except by rows that are finished: they are fed nothing more.
        lengths = zip(rows, cache.lengths, strict=True)
        valid = [length if row.finished else len(row.tokens) - 1 for row, length in lengths]
        cache.truncate(valid)
        drafted, kept = [len(row.drafts) for row in going], [row.kept for row in going]
        seen = Round(drafted, kept, drafting_seconds, time.perf_counter() - started)
        if statistics.forwards:
            rule.observe(seen)
        statistics.add(seen, rows)
        yield [row.gained for row in rows]
        if drafter is not None:
            started = time.perf_counter()
            read_BTD = first_state(model.config.mtp, states)
            spans = zip(rows, held, valid, strict=True)
            fresh = [0 if row.finished else end - start for row, start, end in spans]
            drafter.add([read_TD[:n] for read_TD, n in zip(read_BTD, fresh, strict=True)])
            draft_for(rows, drafter, rule.next())
            drafting_seconds = time.perf_counter() - started


def looked_at(model: Transformer, rows: list[Row], cache: Cache) -> tuple[States, Sequence[Tensor]]:
    """The main model on what each row's cache lacks and on its drafts.

    Returns the states of all of it, and the logits, (n, V) for each row, of the newest token and
    the drafts.
    """
    pairs = zip(rows, cache.lengths, strict=True)
    fed = [
        [] if row.finished else row.tokens[held:] + [draft.token for draft in row.drafts]
        for row, held in pairs
    ]
    states = model.hidden_states(padded(fed, model), cache, [len(tokens) for tokens in fed])
    deciding = [
        state_TD[max(0, len(tokens) - len(row.drafts) - 1) : len(tokens)]
        for row, tokens, state_TD in zip(rows, fed, states.normed_BTD, strict=True)
    ]
    logits_NV = model.logits(torch.cat(deciding))
    return states, logits_NV.split([len(state_nD) for state_nD in deciding])


def draft_for(rows: list[Row], drafter: Drafter, count: int) -> None:
    """Give every row its drafts: none beyond the last token that it may have."""
    room = [0 if row.finished else row.limit - len(row.tokens) for row in rows]
    counts = [max(0, min(count, tokens - 1)) for tokens in room]
    drafts = drafter.draft([row.tokens for row in rows], counts)
    for row, drafted in zip(rows, drafts, strict=True):
        row.drafts = drafted
