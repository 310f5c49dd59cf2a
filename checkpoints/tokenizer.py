"""Text to token ids and back, with whichever library reads the checkpoint's tokenizer file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from .config_file import CheckpointError, check_regular, read_json
from .shards import some


class Vocabulary(Protocol):
    """What both libraries are brought down to."""

    size: int
    begins: list[int]  # what the library itself puts before a text

    def encode(self, text: str, special: bool) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def find(self, piece: str) -> int | None: ...


class SentencePieces:
    """A sentencepiece `tokenizer.model`."""

    def __init__(self, file: Path) -> None:
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{file}: not a sentencepiece model ({error})") from None
        self.size = self.processor.vocab_size()
        self.begins = [token for token in [self.processor.bos_id()] if token >= 0]

    def encode(self, text: str, special: bool) -> list[int]:
        return (self.begins if special else []) + self.processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        # a model's vocabulary may be padded beyond the tokenizer's
        return self.processor.decode([token for token in ids if token < self.size])

    def find(self, piece: str) -> int | None:
        found = self.processor.piece_to_id(piece)
        return None if found == self.processor.unk_id() else found


class JsonVocabulary:
    """A `tokenizer.json` of the tokenizers library."""

    def __init__(self, file: Path) -> None:
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for every fault
            raise CheckpointError(f"{file}: not a tokenizer ({error})") from None
        self.size = 1 + max(self.tokenizer.get_vocab().values(), default=-1)
        self.begins = self.encode("", special=True)

    def encode(self, text: str, special: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def find(self, piece: str) -> int | None:
        return self.tokenizer.token_to_id(piece)


class Tokenizer:
    """Text <-> ids of one checkpoint; knows which token begins a text and which end one."""

    def __init__(
        self, vocabulary: Vocabulary, bos_id: int | None, stop_ids: tuple[int, ...]
    ) -> None:
        self.vocabulary, self.bos_id, self.stop_ids = vocabulary, bos_id, stop_ids

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text; with `bos`, begun as the checkpoint's own tokenizer begins one."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            where = f"position {error.start}"
            raise ValueError(
                f"the text has half a surrogate pair at {where}: not Unicode"
            ) from None
        ids = self.vocabulary.encode(text, special=bos and self.bos_id is not None)
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.vocabulary.decode(ids)


class TextStream:
    """Text of tokens as they come, continuing `prompt_ids`; whole characters only."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        # some tokenizers decode a piece differently at the start of a text, or after half a
        # character: so each token is decoded behind some others, which begin with a whole one
        self.tokenizer, self.ids = tokenizer, list(prompt_ids)
        self.told, self.whole = tokenizer.decode(self.ids), len(self.ids)

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is still in pieces."""
        self.ids.append(token)
        return self._new_text(hold_back=True)

    def finish(self) -> str:
        """What is left of a character that never became whole."""
        return self._new_text(hold_back=False)

    def _new_text(self, hold_back: bool) -> str:
        text = self.tokenizer.decode(self.ids)
        if hold_back and text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new, self.told = text[len(self.told) :], text
        if len(self.ids) - self.whole >= 8:  # enough of them: let go of those before
            self.ids = self.ids[self.whole :]
            self.told, self.whole = self.tokenizer.decode(self.ids), len(self.ids)
        return new


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory: `tokenizer.json`, else `tokenizer.model`."""
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    vocabulary: Vocabulary
    in_json, in_pieces = directory / "tokenizer.json", directory / "tokenizer.model"
    check_regular(in_json)
    check_regular(in_pieces)
    if in_json.exists():
        vocabulary = JsonVocabulary(in_json)
    elif in_pieces.exists():
        vocabulary = SentencePieces(in_pieces)
    else:
        found = some(sorted(entry.name for entry in directory.iterdir()))
        raise CheckpointError(f"{directory}: no tokenizer.json or tokenizer.model; found {found}")
    settings = optional_json(directory / "tokenizer_config.json")
    bos_id = token_id(settings.get("bos_token"), vocabulary)
    if bos_id is None and isinstance(vocabulary, SentencePieces) and vocabulary.begins:
        bos_id = vocabulary.begins[0]
    if not settings.get("add_bos_token", vocabulary.begins[:1] == [bos_id]):
        bos_id = None
    return Tokenizer(vocabulary, bos_id, stop_ids(directory, settings, vocabulary))


def stop_ids(directory: Path, settings: dict[str, Any], vocabulary: Vocabulary) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, else of config.json, else the tokenizer's own."""
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        found = optional_json(file).get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise CheckpointError(f"{file}: eos_token_id {token!r} is not a token id")
        if ids:
            return tuple(ids)
    own = token_id(settings.get("eos_token"), vocabulary)
    if own is None and isinstance(vocabulary, SentencePieces):
        own = vocabulary.processor.eos_id()
    return () if own is None or own < 0 else (own,)


def token_id(token: Any, vocabulary: Vocabulary) -> int | None:
    """The id of a token as tokenizer_config.json writes it: a string, or an object with one."""
    content = token.get("content") if isinstance(token, dict) else token
    return vocabulary.find(content) if isinstance(content, str) else None


def optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}
