"""Generation: prefill, decode, sampling, and self-speculation with the MTP modules.

Every round is one forward of the main model. It reads, in each row, the tokens that are not in the
cache: the whole prompt in the first round; later the token chosen last and the drafts of the MTP
modules after it. The logits at these positions then choose tokens, from left to right, until one
differs from its draft. So a round gains the accepted drafts and one more token. Plain decoding is
the same loop without drafts.

Guarantee, in exact arithmetic: greedy text equals that of plain decoding, token by token; sampled
text has the same distribution (see `sampling`). In bfloat16 near-ties may be decided differently,
because a forward over several tokens rounds differently from a forward over one.

Rows of a batch have unequal lengths: they are padded on the right, and each row of the cache is cut
back to the tokens that are accepted.

Shapes: B rows, T new tokens (of the longest row), n positions of one row to choose at, D model
width, V vocabulary.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..cache import Cache
from ..model import States, Transformer
from ..mtp import first_state
from .draft_count import DraftCount, FixedCount, MeasuredCount, Round
from .drafting import Drafter, pad_tokens
from .rows import Row, make_rows, read_ids
from .sampling import Sampling


@dataclass
class GenerationStatistics:
    """Counts and seconds of one generation, over all rows; updated after every round."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    cache_bytes_per_token: int = 0
    cache_constant_bytes: int = 0  # of a row of any length: windows, states
    forwards: int = 0  # of the main model, over all rows at once, including the prompt's
    forwards_without_drafts: int = 0  # that plain decoding of the same text needs
    drafted: list[int] = field(default_factory=list)  # drafts at each draft position
    accepted: list[int] = field(default_factory=list)
    drafting_seconds: float = 0.0
    verifying_seconds: float = 0.0  # of forwards over drafts, and of judging the drafts

    def begin(self, prompts: Sequence[Sequence[int]], max_drafts: int) -> None:
        self.prompt_tokens = sum(map(len, prompts))
        self.drafted, self.accepted = [0] * max_drafts, [0] * max_drafts

    def add_round(self, last_round: Round, rows: Sequence["Row"], cache: Cache) -> None:
        if self.forwards == 0:
            self.prompt_seconds = last_round.forward_seconds
            self.cache_bytes_per_token = cache.bytes_per_token
            self.cache_constant_bytes = cache.constant_bytes
        else:
            self.generation_seconds += last_round.drafting_seconds + last_round.forward_seconds
        self.forwards += 1
        self.forwards_without_drafts = max(row.num_chosen for row in rows)
        self.generated_tokens += sum(len(row.new_tokens) for row in rows)
        self.drafting_seconds += last_round.drafting_seconds
        self.verifying_seconds += last_round.forward_seconds if any(last_round.drafted) else 0.0
        for drafted, accepted in zip(last_round.drafted, last_round.accepted, strict=True):
            for position in range(drafted):
                self.drafted[position] += 1
                self.accepted[position] += position < accepted

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / max(self.prompt_seconds, 1e-9)

    @property
    def generation_tokens_per_second(self) -> float:
        """Speed of one sequence without its first token, which the prompt's forward gives."""
        return max(0, self.generated_tokens - 1) / max(self.generation_seconds, 1e-9)

    @property
    def forwards_saved(self) -> int:
        return self.forwards_without_drafts - self.forwards

    @property
    def mean_accepted_length(self) -> float:
        """Mean tokens of a row and round with drafts: the accepted ones and one more."""
        return 1 + sum(self.accepted) / self.drafted[0] if any(self.drafted) else 1.0


class Generation(Iterator[int]):
    """The token ids of one sequence as they are generated; `statistics` is updated with them."""

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
    prefill_chunk: int = 2048,
) -> Generation:
    """Continue one sequence: an iterator of token ids that ends before a stop id.

    temperature: 0 is greedy; otherwise `seed` makes the draws repeatable (None: new ones each run).
    draft_tokens: how many tokens the MTP modules draft per round, or "auto" for the number that is
    measured to be fastest. Drafts change the speed: greedy text stays the same, and sampled text
    keeps its distribution, but not its draws (with "auto" the draws depend on measured times).
    prefill_chunk: the most tokens of a prompt that one forward reads, which bounds its memory.
    Raises ValueError for an empty prompt, ids outside the vocabulary, a length beyond the model's
    max_length, a setting outside its range, drafts without MTP modules, and a model in which the
    routing of a token depends on later tokens.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    statistics = GenerationStatistics()
    check_chunk(prefill_chunk)
    rows = make_rows(model, [prompt_ids], max_new_tokens, draft_tokens, seed)
    stop_set = set(read_ids(stop_ids, "stop_ids"))
    rule = make_count_rule(draft_tokens, max_new_tokens)
    run = without_gradients(model)(decode)
    rounds = run(model, rows, sampling, stop_set, rule, statistics, prefill_chunk)
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
    draft_tokens: DraftCount = 0,
    prefill_chunk: int = 2048,
) -> list[list[int]]:
    """Continue several sequences together; each row equals its own `generate` with these arguments.

    Each row draws from its own random stream, which starts at `seed`. (With draft_tokens="auto" the
    draws differ from those of a run alone; greedy text does not.) Raises ValueError as `generate`.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    check_chunk(prefill_chunk)
    rows = make_rows(model, prompts, max_new_tokens, draft_tokens, seed)
    stop_set = set(read_ids(stop_ids, "stop_ids"))
    rule = make_count_rule(draft_tokens, max_new_tokens)
    prompt_lengths = [len(row.tokens) for row in rows]
    run = without_gradients(model)(decode)
    for _ in run(model, rows, sampling, stop_set, rule, GenerationStatistics(), prefill_chunk):
        pass
    return [row.tokens[length:] for row, length in zip(rows, prompt_lengths, strict=True)]


def check_chunk(prefill_chunk: int) -> None:
    if not hasattr(prefill_chunk, "__index__") or prefill_chunk < 1:
        raise ValueError(f"prefill_chunk = {prefill_chunk!r}: must be a whole number >= 1")


def make_count_rule(draft_tokens: DraftCount, max_new_tokens: int) -> FixedCount | MeasuredCount:
    """The rule that chooses the number of drafts of each round."""
    max_useful = max(0, max_new_tokens - 1)  # the forward over the prompt gives the first token
    if draft_tokens == "auto":
        return MeasuredCount(min(8, max_useful))
    return FixedCount(min(draft_tokens, max_useful))


def without_gradients(model: Transformer) -> torch.inference_mode | torch.no_grad:
    """Inference mode, which is faster, or no_grad where tensors may outlive the generation.

    Training could not use what hooks and trained modules keep of tensors made in inference mode,
    and `fully_shard` could not gather weights in it.
    """
    for module in model.modules():
        hooked = bool(module._forward_hooks or module._forward_pre_hooks)
        if hooked or hasattr(module, "unshard"):
            return torch.no_grad()
    trained = any(parameter.requires_grad for parameter in model.parameters())
    return torch.no_grad() if trained else torch.inference_mode()


def decode(
    model: Transformer,
    rows: list[Row],
    sampling: Sampling,
    stop_ids: set[int],
    rule: FixedCount | MeasuredCount,
    statistics: GenerationStatistics,
    prefill_chunk: int,
) -> Iterator[list[list[int]]]:
    """Generate in rounds; yield each round's new tokens, a list for each row."""
    if not rows or all(row.limit == len(row.tokens) for row in rows):
        return
    max_drafts, streams = rule.max_drafts, [row.random for row in rows]
    capacity = max(row.limit for row in rows) + max_drafts
    cache = model.make_cache(len(rows), capacity, max_drafts)
    drafter = Drafter(model, capacity, max_drafts, sampling, streams) if max_drafts else None
    statistics.begin([row.tokens for row in rows], max_drafts)
    drafting_seconds = 0.0
    with gather_weights(model):
        while unfinished := [row for row in rows if not row.finished]:
            started, old_lengths = time.perf_counter(), cache.lengths
            for states in read_long_prompts(model, rows, cache, prefill_chunk):
                if drafter is not None:
                    drafter.add_states(select_new_states(model, rows, states, old_lengths, cache))
                old_lengths = cache.lengths
            states, logits = verify_drafts(model, rows, cache)
            extend_rows(rows, logits, sampling, stop_ids)
            remove_rejected(cache, rows)
            drafted = [len(row.drafts) for row in unfinished]
            accepted = [row.num_accepted for row in unfinished]
            forward_seconds = time.perf_counter() - started
            last_round = Round(drafted, accepted, drafting_seconds, forward_seconds)
            if statistics.forwards:  # the first round, over the prompt, is not typical
                rule.observe(last_round)
            statistics.add_round(last_round, rows, cache)
            yield [row.new_tokens for row in rows]
            if drafter is not None:
                started = time.perf_counter()
                drafter.add_states(select_new_states(model, rows, states, old_lengths, cache))
                assign_drafts(rows, drafter, rule.choose_count())
                drafting_seconds = time.perf_counter() - started


@contextmanager
def gather_weights(model: Transformer) -> Iterator[None]:
    """Gather the model's weights outside its layers, if `fully_shard` has sharded them.

    `fully_shard` gathers weights in a `forward`, and generation calls only those of the layers.
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


def read_long_prompts(
    model: Transformer, rows: list[Row], cache: Cache, chunk: int
) -> Iterator[States]:
    """Read `chunk` tokens at a time until none of the rows has more than that unread.

    Every row keeps its newest token unread, for `verify_drafts`. Yields the states of each forward.
    """

    def list_unread() -> list[list[int]]:
        pairs = zip(rows, cache.lengths, strict=True)
        return [[] if row.finished else row.tokens[length:] for row, length in pairs]

    while max(map(len, unread := list_unread())) > chunk:
        inputs = [tokens[:-1][:chunk] for tokens in unread]
        counts = [len(tokens) for tokens in inputs]
        yield model.hidden_states(pad_tokens(inputs, model.device), cache, counts)


def verify_drafts(
    model: Transformer, rows: list[Row], cache: Cache
) -> tuple[States, Sequence[Tensor]]:
    """One forward of the main model over the tokens that are not in the cache, and the drafts.

    Returns the states at all these positions, and for each row the logits, (n, V), at its newest
    token and at its drafts.
    """
    inputs = [
        [] if row.finished else row.tokens[length:] + [draft.token for draft in row.drafts]
        for row, length in zip(rows, cache.lengths, strict=True)
    ]
    states = model.hidden_states(
        pad_tokens(inputs, model.device), cache, [len(tokens) for tokens in inputs]
    )
    choosing_states = [
        state_TD[max(0, len(tokens) - len(row.drafts) - 1) : len(tokens)]
        for row, tokens, state_TD in zip(rows, inputs, states.normed_BTD, strict=True)
    ]
    logits_NV = model.logits(torch.cat(choosing_states))
    return states, logits_NV.split([len(state_nD) for state_nD in choosing_states])


def extend_rows(
    rows: list[Row], logits: Sequence[Tensor], sampling: Sampling, stop_ids: set[int]
) -> None:
    """Extend every unfinished row by the tokens that its logits, (n, V), choose."""
    for row, logits_nV in zip(rows, logits, strict=True):
        chosen = sampling.choose_tokens(row.drafts, logits_nV, row.random)
        row.extend([] if row.finished else chosen, stop_ids)


def remove_rejected(cache: Cache, rows: list[Row]) -> None:
    """Cut the cache back to the text without its newest token, which no forward has read yet.

    A finished row stays as it is: no forward reads more of it.
    """
    pairs = zip(rows, cache.lengths, strict=True)
    cache.truncate([length if row.finished else len(row.tokens) - 1 for row, length in pairs])


def select_new_states(
    model: Transformer, rows: list[Row], states: States, old_lengths: Sequence[int], cache: Cache
) -> list[Tensor]:
    """The states that MTP modules read at the positions that the round added, (n, D) for each row.

    old_lengths: of the cache before the round. A finished row has n = 0.
    """
    read_BTD = first_state(model.config.mtp, states)
    counts = [
        0 if row.finished else new_length - old_length
        for row, old_length, new_length in zip(rows, old_lengths, cache.lengths, strict=True)
    ]
    return [read_TD[:n] for read_TD, n in zip(read_BTD, counts, strict=True)]


def assign_drafts(rows: list[Row], drafter: Drafter, count: int) -> None:
    """Draft `count` tokens for every row, or fewer where its limit is near."""
    counts = [max(0, min(count, row.max_useful_drafts)) for row in rows]
    drafts = drafter.draft([row.tokens for row in rows], counts)
    for row, row_drafts in zip(rows, drafts, strict=True):
        row.drafts = row_drafts
