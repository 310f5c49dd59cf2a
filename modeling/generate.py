"""Generation: prefill, decode, sampling, and self-speculation with the MTP modules.

Every round is one forward of the main model over each row's newest tokens: the whole prompt in
the first round; later the one token just chosen, followed by what the MTP modules drafted after
it. From every position's logits a token is chosen exactly as without drafts, and the round goes on
while the choice is what was drafted: so each round gains one token more than the drafts that
proved right, and in exact arithmetic the text is that of plain decoding, which is the same loop
with no drafts. In bfloat16 near-ties may fall differently.

Rows of a batch have their own lengths: they are padded on the right, and their caches cut back to
what is valid.

Shapes: B rows, T new tokens (of the longest row), n positions of one row to choose at, D model
width, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .drafting import Drafter, padded
from .model import Transformer
from .sampling import Sampling, random_stream


@dataclass
class GenerationStatistics:
    """Counts and seconds of one generation, over all rows; grows while it runs."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    cache_bytes_per_token: int = 0
    drafted: list[int] = field(default_factory=list)  # per draft position
    accepted: list[int] = field(default_factory=list)

    def add_round(self, new_tokens: int, seconds_since_start: float) -> None:
        if self.generated_tokens == 0:
            self.prompt_seconds = seconds_since_start
        self.generated_tokens += new_tokens
        self.generation_seconds = seconds_since_start - self.prompt_seconds

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / max(self.prompt_seconds, 1e-9)

    @property
    def generation_tokens_per_second(self) -> float:
        """Of the tokens after the first, which the prompt's forward gives for free."""
        return max(0, self.generated_tokens - 1) / max(self.generation_seconds, 1e-9)


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
    draft_tokens: int = 0,
) -> Generation:
    """Continue one sequence; an iterator of token ids that ends before a stop id.

    temperature 0 is greedy; otherwise `seed` makes the draws repeatable (None: fresh each time).
    draft_tokens: how many tokens the MTP modules guess per round; changes the speed, not the text.
    Raises ValueError for an empty prompt, unknown ids, a length that exceeds the model's
    max_length, and settings that no distribution has.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    statistics = GenerationStatistics()
    prompts = [list(prompt_ids)]
    check(model, prompts, max_new_tokens, draft_tokens)
    rounds = decode(
        model, prompts, max_new_tokens, sampling, seed, set(stop_ids), draft_tokens, statistics
    )
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
    draft_tokens: int = 0,
) -> list[list[int]]:
    """Continue several sequences together; each row equals its own `generate` with these arguments.

    Each row draws its random numbers from its own stream, begun at `seed`.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    rows = [list(prompt) for prompt in prompts]
    check(model, rows, max_new_tokens, draft_tokens)
    texts: list[list[int]] = [[] for _ in rows]
    statistics = GenerationStatistics()
    rounds = decode(
        model, rows, max_new_tokens, sampling, seed, set(stop_ids), draft_tokens, statistics
    )
    for new in rounds:
        for text, tokens in zip(texts, new, strict=True):
            text.extend(tokens)
    return texts


def check(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    draft_tokens: int,
) -> None:
    """Refuse what cannot be generated, before any work is done."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: must be >= 0")
    if draft_tokens < 0:
        raise ValueError(f"draft_tokens = {draft_tokens}: must be >= 0")
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


@torch.inference_mode()
def decode(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | None,
    stop_ids: set[int],
    draft_tokens: int,
    statistics: GenerationStatistics,
) -> Iterator[list[list[int]]]:
    """Yield each round's new tokens, row by row. `prompts` grow in place to the whole sequences."""
    if max_new_tokens == 0 or not prompts:
        return
    rows, limits = range(len(prompts)), [len(prompt) + max_new_tokens for prompt in prompts]
    capacity = max(limits) + draft_tokens
    cache = model.make_cache(len(prompts), capacity, rollback=draft_tokens)
    drafter = Drafter(model, len(prompts), capacity, rollback=draft_tokens)
    random = [random_stream(seed) for _ in rows]
    finished = [False for _ in rows]
    drafts: list[list[int]] = [[] for _ in rows]
    statistics.prompt_tokens = sum(map(len, prompts))
    statistics.cache_bytes_per_token = cache.nbytes // (capacity * len(prompts))
    statistics.drafted, statistics.accepted = [0] * draft_tokens, [0] * draft_tokens
    started = time.perf_counter()
    while not all(finished):
        held = cache.lengths
        fed = [prompts[row][held[row] :] + drafts[row] for row in rows]
        states_BTD = model.hidden_states(padded(fed, model), cache, [len(row) for row in fed])
        deciding = [
            states_BTD[row, max(0, len(fed[row]) - len(drafts[row]) - 1) : len(fed[row])]
            for row in rows
        ]
        logits = model.logits(torch.cat(deciding)).split([len(states) for states in deciding])
        new: list[list[int]] = [[] for _ in rows]
        for row in rows:
            if not finished[row]:
                choose = partial(sampling.choose, random=random[row])
                room = limits[row] - len(prompts[row])
                new[row], finished[row] = chosen(logits[row], drafts[row], choose, stop_ids, room)
            count_drafts(statistics, drafts[row], new[row])
            prompts[row] += new[row]
        # All but the newest token has been through the model; what was fed beyond is forgotten,
        # except by rows that are finished: they are fed nothing more.
        lengths = cache.lengths
        valid = [lengths[row] if finished[row] else len(prompts[row]) - 1 for row in rows]
        cache.truncate(valid)
        statistics.add_round(sum(map(len, new)), time.perf_counter() - started)
        yield new
        new_states = [0 if finished[row] else valid[row] - held[row] for row in rows]
        confirmed = [states_BTD[row, : new_states[row]] for row in rows]
        spare = [0 if finished[row] else limits[row] - len(prompts[row]) - 1 for row in rows]
        drafts = drafter.draft(confirmed, prompts, min(draft_tokens, max(spare)))
        drafts = [drafts[row][: spare[row]] for row in rows]


def chosen(
    logits_nV: Tensor,
    drafts: list[int],
    choose: Callable[[Tensor], int],
    stop_ids: set[int],
    room: int,
) -> tuple[list[int], bool]:
    """A row's next tokens, as long as they are what was drafted, and whether the row ends there."""
    new: list[int] = []
    for draft, logits_V in zip([*drafts, None], logits_nV, strict=True):
        token = choose(logits_V)
        if token in stop_ids:
            return new, True
        new.append(token)
        if token != draft or len(new) == room:
            break
    return new, len(new) == room


def count_drafts(statistics: GenerationStatistics, drafts: list[int], new: list[int]) -> None:
    """Count how many of a row's drafts were asked for and how many became part of the text."""
    agreeing = True
    for position, draft in enumerate(drafts):
        agreeing = agreeing and position < len(new) and new[position] == draft
        statistics.drafted[position] += 1
        statistics.accepted[position] += agreeing
