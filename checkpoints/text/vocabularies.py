"""Vocabularies: one interface to the three libraries that read tokenizer files."""

import base64
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import sentencepiece
import tiktoken
import tokenizers

from ..config_file import CheckpointError
from .chat import Part, find_spare_characters, match_any

# A rank file does not hold the rule that splits text into words. This is the rule in Kimi's
# tokenization_kimi.py, which is code and is not run.
BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
AFTER_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT = "|".join(
    [
        r"[\p{Han}]+",
        BEFORE_WORD + UPPER + "*" + LOWER + "+" + AFTER_WORD,
        BEFORE_WORD + UPPER + "+" + LOWER + "*" + AFTER_WORD,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# From tokenization_kimi.py too; it names two more tokens, for which published models lack rows.
RESERVED = 256  # ids after the ranks; those without a name are <|reserved_token_N|>
LONGEST_RUN = 25_000  # of white space or of other characters: longer ones exceed tiktoken's stack
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # kinds of pieces, in sentencepiece_model.proto


class AddedToken(NamedTuple):
    content: str
    special: bool  # decoding omits it


class Vocabulary(Protocol):
    """The interface that all tokenizer libraries get."""

    size: int
    prefix_ids: list[int]  # ids that the library puts before a text
    named: dict[str, str]  # bos_token and eos_token, if the file defines them

    @property
    def control(self) -> dict[str, int]: ...  # the tokens that structure a conversation

    def encode(self, text: str, special: bool) -> list[int]: ...
    def encode_parts(self, parts: Sequence[Part]) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def find(self, piece: str) -> int | None: ...


class SentencePieces:
    """A sentencepiece `tokenizer.model`, with tokens added to it."""

    def __init__(self, file: Path, added: dict[int, AddedToken]) -> None:
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{file}: not a sentencepiece model ({error})") from None
        # The same model for text after other text: two appended fields (in protobuf the last value
        # counts) keep it from adding a space before a text and from removing spaces.
        self.model = file.read_bytes()
        self.inner = sentencepiece.SentencePieceProcessor(
            model_proto=self.model + b"\x1a\x04\x18\x00\x20\x00"
        )
        self.added = added
        self.pieces = self.processor.vocab_size()
        self.size = max([self.pieces, *(token + 1 for token in added)])
        self.prefix_ids = [token for token in [self.processor.bos_id()] if token >= 0]
        ends = {"bos_token": self.processor.bos_id(), "eos_token": self.processor.eos_id()}
        self.named = {name: self.processor.id_to_piece(i) for name, i in ends.items() if i >= 0}

    @cached_property
    def control(self) -> dict[str, int]:
        found = {}
        for token, (piece, kind) in enumerate(read_pieces(self.model)):
            content = piece.replace("▁", " ")
            if kind in (UNKNOWN, CONTROL) or kind == USER_DEFINED and is_structural(content):
                found[content] = token
        listed = {token.content: i for i, token in self.added.items() if is_structural(*token)}
        return found | listed

    def encode(self, text: str, special: bool) -> list[int]:
        return (self.prefix_ids if special else []) + self.processor.encode(text)

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        ids = []
        for index, part in enumerate(parts):
            if part.control:
                ids.append(self.control[part.text])
            else:
                processor = self.inner if index else self.processor
                ids += self.encode_plain(processor.normalize(part.text))
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Encode normalised text without control tokens: those in it are cut in two."""
        pattern = match_any([token.replace(" ", "▁") for token in self.control])
        cuts = [match.start() + 1 for match in re.finditer(f"(?={pattern})", text)]
        spans = pairwise([0, *cuts, len(text)])
        return [token for start, end in spans for token in self.inner.encode(text[start:end])]

    def decode(self, ids: Sequence[int]) -> str:
        texts = []
        for index, (added, run) in enumerate(groupby(ids, lambda token: token >= self.pieces)):
            if added:  # ids beyond the tokenizer's, from a padded vocabulary, are skipped
                tokens = [self.added[token] for token in run if token in self.added]
                texts += [token.content for token in tokens if not token.special]
            else:
                texts.append((self.inner if index else self.processor).decode(list(run)))
        return "".join(texts)

    def find(self, piece: str) -> int | None:
        found = self.processor.piece_to_id(piece)
        return self.control.get(piece) if found == self.processor.unk_id() else found


class JsonVocabulary:
    """A `tokenizer.json` of the tokenizers library."""

    named: dict[str, str] = {}

    def __init__(self, file: Path) -> None:
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for every fault
            raise CheckpointError(f"{file}: not a tokenizer ({error})") from None
        self.tokenizer.no_truncation()  # settings that remain from training
        self.tokenizer.no_padding()
        self.size = 1 + max(self.tokenizer.get_vocab().values(), default=-1)
        self.prefix_ids = self.encode("", special=True)
        added = self.tokenizer.get_added_tokens_decoder()
        self.control = {
            token.content: i
            for i, token in added.items()
            if is_structural(token.content, token.special)
        }
        self.marked: dict[str, tokenizers.Tokenizer] = {}  # by their marks

    def encode(self, text: str, special: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        opening, closing = find_spare_characters("".join(part.text for part in parts))
        if opening + closing not in self.marked:
            self.marked[opening + closing] = self.rename_control_tokens(opening, closing)
        text = "".join(
            f"{opening}{part.text}{closing}" if part.control else part.text for part in parts
        )
        return self.marked[opening + closing].encode(text, add_special_tokens=False).ids

    def rename_control_tokens(self, opening: str, closing: str) -> tokenizers.Tokenizer:
        """The same tokenizer, with marks in the names of its control tokens, which no text has.

        They are renamed in the model's vocabulary too, where some models list control tokens.
        """
        names = {token: opening + token + closing for token in self.control}
        parts = json.loads(self.tokenizer.to_str())
        for token in parts["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model, vocab = parts["model"], parts["model"]["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {names.get(piece, piece): token for piece, token in vocab.items()}
        else:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
        if "unk_token" in model:
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        if "merges" in model:
            merges = model["merges"]
            model["merges"] = [m for m in merges if not names.keys() & {*m, "".join(m)}]
        return tokenizers.Tokenizer.from_str(json.dumps(parts))

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def find(self, piece: str) -> int | None:
        return self.tokenizer.token_to_id(piece)


class Ranks:
    """A `tiktoken.model`: byte strings in the order of their merges, then control tokens."""

    prefix_ids: list[int] = []
    named: dict[str, str] = {}

    def __init__(self, file: Path, added: dict[int, AddedToken]) -> None:
        ranks = read_ranks(file)
        self.size = len(ranks) + RESERVED
        for token in added:
            if not len(ranks) <= token < self.size:
                raise CheckpointError(
                    f"{file}: with its {len(ranks)} ranks, added tokens are {len(ranks)} to "
                    f"{self.size - 1}; tokenizer_config.json has one of id {token}"
                )
        tokens = {
            i: added.get(i, AddedToken(f"<|reserved_token_{i}|>", special=True))
            for i in range(len(ranks), self.size)
        }
        self.control = {token.content: i for i, token in tokens.items()}
        if len(self.control) < RESERVED:
            raise CheckpointError(f"{file}: tokenizer_config.json has two added tokens of one name")
        self.skipped_ids = {i for i, token in tokens.items() if token.special}
        self.encoding = tiktoken.Encoding(
            file.name, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=self.control
        )

    def encode(self, text: str, special: bool) -> list[int]:
        pieces = split_long_runs(text)
        return [i for part in pieces for i in self.encoding.encode(part, allowed_special="all")]

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        ids = []
        for part in parts:
            if part.control:
                ids.append(self.control[part.text])
            else:
                for piece in split_long_runs(part.text):
                    ids += self.encoding.encode_ordinary(piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        kept = [i for i in ids if i < self.size and i not in self.skipped_ids]
        return self.encoding.decode_bytes(kept).decode("utf-8", errors="replace")

    def find(self, piece: str) -> int | None:
        return self.control.get(piece)


def read_pieces(model: bytes) -> Iterator[tuple[str, int]]:
    """Yield every piece of a sentencepiece model with its kind; the library shows only some."""
    for number, piece in read_fields(model):
        if number == 1:
            fields = dict(read_fields(piece))
            yield fields[1].decode(errors="replace"), fields.get(3, 1)


def read_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of the fields of a protobuf message that is known to be valid."""
    position = 0

    def varint() -> int:
        nonlocal position
        start = position
        while message[position] & 0x80:
            position += 1
        position += 1
        return sum((byte & 0x7F) << 7 * i for i, byte in enumerate(message[start:position]))

    while position < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        else:
            length = {1: 8, 5: 4}.get(kind) or varint()
            yield number, message[position : position + length]
            position += length


def read_ranks(file: Path) -> dict[bytes, int]:
    """Read the ranks: each line holds the bytes of a token, in base64, and its rank."""
    lines = [line for line in file.read_bytes().splitlines() if line]
    ranks = {}
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise CheckpointError(
                f"{file}: not a tiktoken rank file: line {number} is {line!r:.80}, "
                "expected a token in base64 and its rank"
            ) from None
    if sorted(ranks.values()) != list(range(len(lines))):
        raise CheckpointError(
            f"{file}: not a tiktoken rank file: the ranks of its {len(lines)} tokens are not "
            f"0 to {len(lines) - 1}, each once"
        )
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise CheckpointError(f"{file}: not a tiktoken rank file: it lacks some of the 256 bytes")
    return ranks


def split_long_runs(text: str) -> Iterator[str]:
    """Yield the text in pieces that hold no longer run of white space, or of anything else."""
    start = 0
    for run in re.finditer(r"\s+|\S+", text):
        for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


def is_structural(content: str, special: bool = False) -> bool:
    """Whether an added token is more than text: single characters and white space are text."""
    return special or len(content.strip()) > 1
