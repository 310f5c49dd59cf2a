"""Generation: prefill, decode, sampling, and greedy self-speculation with the MTP modules.

Every round is one forward of the main model over each row's newest tokens: the whole prompt in
the first round; later the one token just chosen, followed by what the MTP modules drafted after
it. Greedy decoding accepts a draft while it is what the model itself would have chosen, and always
gains one token of the model's own. In exact arithmetic the text is that of plain decoding, which
is the same loop with no drafts; in bfloat16 near-ties may fall differently.

Rows of a batch have their own lengths: they are padded on the right, and their caches cut back to
what is valid.

Shapes: B rows, T new tokens (of the longest row), D model width, V vocabulary.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .model import Transformer, new_positions


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


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from logits. temperature 0 is greedy and draws no random numbers."""

    temperature: float = 0.0
    top_k: int | None = None  # keep the k likeliest
    top_p: float | None = None  # keep the likeliest that together reach this probability
    min_p: float | None = None  # keep those at least this share as likely as the likeliest

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "be >= 0"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "be >= 1"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "be in (0, 1]"),
            ("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "be in [0, 1]"),
        )
        for name, value, holds, rule in checks:
            if not holds:
                raise ValueError(f"{name} = {value}: must {rule}")

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """The distribution to draw from, (V,): temperature, then top-k, top-p and min-p in turn."""
        logits_V = logits_V / self.temperature
        if self.top_k is not None and self.top_k < len(logits_V):
            logits_V = logits_V.where(logits_V >= logits_V.topk(self.top_k).values[-1], -torch.inf)
        probability_V = logits_V.softmax(dim=-1)
        if self.top_p is not None:
            sorted_V, order_V = probability_V.sort(descending=True, stable=True)
            before_V = sorted_V.cumsum(dim=-1) - sorted_V
            probability_V = probability_V.index_fill(0, order_V[before_V >= self.top_p], 0)
        if self.min_p is not None:
            likely_V = probability_V >= self.min_p * probability_V.max()
            probability_V = probability_V.where(likely_V, 0)
        return probability_V / probability_V.sum()

    def choose(self, logits_V: Tensor, random: torch.Generator) -> int:
        if logits_V.isnan().any():
            raise ValueError("the model's logits are not numbers (NaN): its weights are damaged")
        if self.temperature == 0:
            return int(logits_V.argmax())
        return int(self.probabilities(logits_V.cpu()).multinomial(1, generator=random))


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
    draft_tokens: how many tokens the MTP modules guess per round (greedy only).
    Raises ValueError for an empty prompt, unknown ids, a length that exceeds the model's
    max_length, and settings that no distribution has.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    statistics = GenerationStatistics()
    prompts = [list(prompt_ids)]
    check(model, prompts, max_new_tokens, draft_tokens, sampling)
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
    check(model, rows, max_new_tokens, draft_tokens, sampling)
    texts: list[list[int]] = [[] for _ in rows]
    if rows:
        for new in decode(
            model,
            rows,
            max_new_tokens,
            sampling,
            seed,
            set(stop_ids),
            draft_tokens,
            GenerationStatistics(),
        ):
            for text, tokens in zip(texts, new, strict=True):
                text.extend(tokens)
    return texts


def check(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    draft_tokens: int,
    sampling: Sampling,
) -> None:
    """Refuse what cannot be generated, before any work is done."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: must be >= 0")
    if draft_tokens < 0:
        raise ValueError(f"draft_tokens = {draft_tokens}: must be >= 0")
    if draft_tokens and not model.mtp:
        raise ValueError("draft_tokens needs MTP modules, and this model has none loaded")
    if draft_tokens and sampling.temperature > 0:
        raise ValueError("draft_tokens works with greedy decoding only: set temperature to 0")
    limit = model.config.max_length
    for prompt in prompts:
        if not prompt:
            raise ValueError("the prompt holds no token: begin with the tokenizer's BOS, or some text")
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
    if max_new_tokens == 0:
        return
    rows, limits = range(len(prompts)), [len(prompt) + max_new_tokens for prompt in prompts]
    capacity = max(limits) + draft_tokens
    cache = model.make_cache(len(prompts), capacity)
    drafter = Drafter(model, len(prompts), capacity)
    random = [row_generator(seed) for _ in rows]
    finished = [False for _ in rows]
    drafts: list[list[int]] = [[] for _ in rows]
    statistics.prompt_tokens = sum(map(len, prompts))
    statistics.cache_bytes_per_token = cache.nbytes // (capacity * len(prompts))
    statistics.drafted, statistics.accepted = [0] * draft_tokens, [0] * draft_tokens
    started = time.perf_counter()
    while not all(finished):
        held = cache.lengths
        fed = [prompts[row][held[row] :] + drafts[row] for row in rows]
        states_BTD = model.hidden_states(padded(fed, model), cache)
        deciding = [
            states_BTD[row, len(fed[row]) - len(drafts[row]) - 1 : len(fed[row])] for row in rows
        ]
        logits = model.logits(torch.cat(deciding)).split([len(states) for states in deciding])
        new: list[list[int]] = [[] for _ in rows]
        for row in rows:
            for draft, logits_V in zip([*drafts[row], None], logits[row], strict=True):
                if finished[row]:
                    break
                token = sampling.choose(logits_V, random[row])
                if token in stop_ids:
                    finished[row] = True
                    break
                new[row].append(token)
                finished[row] = len(prompts[row]) + len(new[row]) == limits[row]
                if token != draft:
                    break
            count_drafts(statistics, drafts[row], new[row])
            prompts[row] += new[row]
        # All but the newest token has been through the model; what was fed beyond is forgotten.
        valid = [len(prompts[row]) - 1 for row in rows]
        cache.truncate(valid)
        statistics.add_round(sum(map(len, new)), time.perf_counter() - started)
        yield new
        confirmed = [states_BTD[row, : valid[row] - held[row]] for row in rows]
        spare = [0 if finished[row] else limits[row] - len(prompts[row]) - 1 for row in rows]
        drafts = drafter.draft(confirmed, prompts, min(draft_tokens, max(spare)))
        drafts = [drafts[row][: spare[row]] for row in rows]


def row_generator(seed: int | None) -> torch.Generator:
    """A row's own stream of random numbers."""
    random = torch.Generator()
    if seed is None:
        random.seed()
    else:
        random.manual_seed(seed)
    return random


def padded(rows: list[list[int]], model: Transformer) -> Tensor:
    """Rows of ids as one tensor, (B, T), padded on the right with id 0."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True).to(model.embed.weight.device)


def count_drafts(statistics: GenerationStatistics, drafts: list[int], new: list[int]) -> None:
    """Count how many of a row's drafts were asked for and how many became part of the text."""
    agreeing = True
    for position, draft in enumerate(drafts):
        agreeing = agreeing and position < len(new) and new[position] == draft
        statistics.drafted[position] += 1
        statistics.accepted[position] += agreeing


class Drafter:
    """Guesses tokens ahead with the MTP modules, each with its own cache.

    Module j's entry for position i is made from the previous module's state there and token
    i + j. With n known tokens its cache is therefore valid up to position n - j, exclusive; what
    rests on drafted tokens is cut off again. The previous module's states for the positions that
    it could not take yet wait in `waiting`. Drafts beyond the number of modules come from the
    last one, fed its own state and draft.
    """

    def __init__(self, model: Transformer, batch_size: int, capacity: int) -> None:
        self.model = model
        self.modules = list(model.mtp.values())
        self.caches = model.make_mtp_caches(batch_size, capacity)
        nothing = model.embed.weight.new_zeros(0, model.config.d_model)
        self.waiting = [[nothing] * batch_size for _ in self.modules]  # per module, per row

    def draft(
        self, confirmed: list[Tensor], tokens: list[list[int]], count: int
    ) -> list[list[int]]:
        """`count` drafted tokens for each row that has new states; none for the others.

        confirmed: per row the main model's (n, D) new states, the last one at the position before
        the newest of `tokens`. `count` may fall from round to round and must not rise.
        """
        rows, known = range(len(tokens)), [list(row) for row in tokens]
        states, left_over = confirmed, list(self.waiting)
        for depth in range(1, count + 1):
            number = min(depth, len(self.modules))
            if depth == number:
                states = [torch.cat(pair) for pair in zip(self.waiting[depth - 1], states, strict=True)]
            else:
                states = [states_nD[-1:] for states_nD in states]
            starts = self.caches[number - 1].lengths
            states = self.run(number, states, known)
            if depth < len(self.modules):
                left_over[depth] = [
                    states[row][untaken(depth, starts[row], len(tokens[row]))] for row in rows
                ]
            guessing = [row for row in rows if len(states[row])]
            logits_nV = self.model.logits(torch.stack([states[row][-1] for row in guessing]))
            for row, token in zip(guessing, logits_nV.argmax(dim=-1).tolist(), strict=True):
                known[row].append(token)
        self.waiting = left_over
        for number, cache in enumerate(self.caches[:count], start=1):
            lengths = zip(cache.lengths, tokens, strict=True)
            cache.truncate([min(held, max(0, len(row) - number)) for held, row in lengths])
        return [known[row][len(tokens[row]) :] for row in rows]

    def run(self, number: int, states: list[Tensor], known: list[list[int]]) -> list[Tensor]:
        """Module `number` on each row's states and the tokens `number` ahead of them; (n, D) each."""
        cache, module = self.caches[number - 1], self.modules[number - 1]
        starts, counts = cache.lengths, [len(states_nD) for states_nD in states]
        ahead = [
            row[start + number :][:n] for row, start, n in zip(known, starts, counts, strict=True)
        ]
        tokens_BT = padded(ahead, self.model)
        state_BTD = pad_sequence(states, batch_first=True)
        positions = new_positions(starts, tokens_BT)
        state_BTD = module(state_BTD, self.model.embed(tokens_BT), positions, cache)
        cache.truncate([start + n for start, n in zip(starts, counts, strict=True)])
        return [state_nD[:n] for state_nD, n in zip(state_BTD, counts, strict=True)]


def untaken(number: int, start: int, num_known: int) -> slice:
    """Which of module `number`'s new states, the first at `start`, the next one cannot take yet."""
    return slice(max(0, num_known - number - 1) - start, max(0, num_known - number) - start)
