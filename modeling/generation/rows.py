"""The rows of a generation: prompts and settings that are checked, and one sequence each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from operator import index

from ..model import Transformer
from .draft_count import DraftCount
from .sampling import Draft, RandomStream


@dataclass
class Row:
    """One sequence of a batch while it is generated."""

    tokens: list[int]  # the prompt and the tokens generated so far
    limit: int  # the number of tokens at which the row is finished
    random: RandomStream
    drafts: list[Draft] = field(default_factory=list)  # for the next forward to verify
    new_tokens: list[int] = field(default_factory=list)  # of the last round
    num_chosen: int = 0  # tokens chosen so far; a stop id at the end counts
    finished: bool = False

    def extend(self, chosen: Iterable[int], stop_ids: set[int]) -> None:
        """Append a round's tokens, until a stop id (which is not appended) or the limit."""
        self.new_tokens = []
        for token in chosen:
            self.num_chosen += 1
            if token not in stop_ids:
                self.tokens.append(token)
                self.new_tokens.append(token)
            self.finished = token in stop_ids or len(self.tokens) == self.limit
            if self.finished:
                return

    @property
    def num_accepted(self) -> int:
        """How many of the drafts are now part of the text; a drafted stop id is not."""
        pairs = zip(self.drafts, self.new_tokens, strict=False)
        return len(list(takewhile(lambda pair: pair[0].token == pair[1], pairs)))

    @property
    def max_useful_drafts(self) -> int:
        """One less than the tokens still to come: every forward gives a token beside its drafts."""
        return 0 if self.finished else self.limit - len(self.tokens) - 1


def make_rows(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    draft_tokens: DraftCount,
    seed: int | None,
) -> list[Row]:
    """A row for each prompt; ValueError, before any work, if `generate` cannot continue it."""
    if seed is not None and not (hasattr(seed, "__index__") and -(2**63) <= seed < 2**64):
        raise ValueError(f"seed = {seed}: must be a whole number from -2**63 to 2**64 - 1")
    if not hasattr(max_new_tokens, "__index__") or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: must be a whole number >= 0")
    if draft_tokens != "auto" and not (hasattr(draft_tokens, "__index__") and draft_tokens >= 0):
        raise ValueError(f'draft_tokens = {draft_tokens!r}: must be a whole number >= 0, or "auto"')
    if draft_tokens and not model.mtp:
        raise ValueError("draft_tokens needs MTP modules, and none are loaded: load them, or use 0")
    if (path := find_non_causal(model)) is not None:
        raise ValueError(
            f"{path} routes each token by all tokens of a forward, later ones included: "
            "such a model cannot generate text"
        )
    rows = []
    for number, prompt in enumerate(prompts):
        tokens = read_ids(prompt, f"prompt {number}")
        check_prompt(model, tokens, number, max_new_tokens)
        rows.append(Row(tokens, len(tokens) + max_new_tokens, RandomStream(seed)))
    return rows


def read_ids(ids: Iterable[int], name: str) -> list[int]:
    """Token ids as a list; ValueError for anything but whole numbers."""
    try:
        return [index(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError:
        raise ValueError(f"{name} = {ids!r:.80}: expected a list of token ids") from None


def check_prompt(
    model: Transformer, tokens: Sequence[int], number: int, max_new_tokens: int
) -> None:
    """Raise ValueError if the model cannot continue prompt `number` by so many tokens."""
    limit, vocab_size = model.config.max_length, model.config.vocab_size
    for position, token in enumerate(tokens):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"token id {token} at position {position} of prompt {number} is outside the "
                f"vocabulary of {vocab_size}"
            )
    if not tokens:
        raise ValueError(
            f"prompt {number} has no token: start with the tokenizer's BOS token, or some text"
        )
    if len(tokens) + max_new_tokens > limit:
        raise ValueError(
            f"the {len(tokens)} tokens of prompt {number} + {max_new_tokens} new tokens exceed the "
            f"model's {limit} positions: shorten the prompt, or lower max_new_tokens"
        )


def find_non_causal(model: Transformer) -> str | None:
    """The path of a module in which a token sees later ones; None: there is none."""
    modules = model.named_modules()
    return next((path for path, m in modules if getattr(m, "sees_other_tokens", False)), None)
