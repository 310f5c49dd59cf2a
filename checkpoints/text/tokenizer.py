"""The tokenizer of a checkpoint: its vocabulary, BOS token and stop ids."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config_file import CheckpointError, check_regular, read_json
from ..storage.shards import list_some
from .chat import ChatTemplates, check_unicode
from .vocabularies import AddedToken, JsonVocabulary, Ranks, SentencePieces, Vocabulary


class NoTokenizerError(CheckpointError):
    """A checkpoint directory without a file of a tokenizer."""


class Tokenizer:
    """Converts text to ids and back; knows the BOS token and the ids that end a text.

    bos_id: the id of the BOS token; None if the tokenizer has none. adds_bos: whether a text starts
    with it.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        bos_id: int | None,
        adds_bos: bool,
        stop_ids: tuple[int, ...],
        templates: ChatTemplates,
    ) -> None:
        self.vocabulary, self.stop_ids, self.templates = vocabulary, stop_ids, templates
        self.bos_id, self.adds_bos = bos_id, adds_bos

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The ids of a text. bos: put the BOS token first if the checkpoint's tokenizer does."""
        check_unicode(text, "the text")
        first = self.bos_id if bos and self.adds_bos else None
        ids = self.vocabulary.encode(text, special=first is not None)
        return ids if first is None or ids[:1] == [first] else [first, *ids]

    def chat(self, messages: list[dict[str, str]], template: str | None = None) -> list[int]:
        """The ids of a conversation, rendered by the chat template up to the start of the answer.

        messages: [{"role": "user", "content": "..."}, ...]; template: its name, if there are
        several. Only the template prints control tokens (the BOS too); in a message they are text.
        """
        parts = self.templates.parts(messages, template, self.vocabulary.control)
        return self.vocabulary.encode_parts(parts)

    def decode(self, ids: Sequence[int]) -> str:
        return self.vocabulary.decode(ids)


class TextStream:
    """Decodes tokens one by one, after `prompt_ids`, into whole characters."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        # some tokenizers decode a piece differently at the start of a text, or after half a
        # character: so each token is decoded after some others, which start with a whole character
        self.tokenizer, self.ids = tokenizer, list(prompt_ids)
        self.text, self.context_end = tokenizer.decode(self.ids), len(self.ids)

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self.ids.append(token)
        return self._new_text(hold_back=True)

    def finish(self) -> str:
        """The rest, if the last character is incomplete."""
        return self._new_text(hold_back=False)

    def _new_text(self, hold_back: bool) -> str:
        text = self.tokenizer.decode(self.ids)
        if hold_back and text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new, self.text = text[len(self.text) :], text
        if len(self.ids) - self.context_end >= 8:  # enough context: drop the older ids
            self.ids = self.ids[self.context_end :]
            self.text, self.context_end = self.tokenizer.decode(self.ids), len(self.ids)
        return new


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint directory, from the first of its three files.

    Chat templates are read when a conversation needs one.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    settings = read_json_if_present(directory / "tokenizer_config.json")
    vocabulary = read_vocabulary(directory, settings)
    special = vocabulary.named | read_special_tokens(settings, vocabulary)
    bos_id = vocabulary.find(special["bos_token"]) if "bos_token" in special else None
    begins = settings.get("add_bos_token", vocabulary.prefix_ids[:1] == [bos_id])
    adds_bos = bos_id is not None and bool(begins)
    stops = read_stop_ids(directory, special.get("eos_token"), vocabulary)
    templates = ChatTemplates(directory, settings, special)
    return Tokenizer(vocabulary, bos_id, adds_bos, stops, templates)


def check_vocabulary(directory: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise CheckpointError if the tokenizer makes ids for which a model has no embedding."""
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids and the model "
            f"{vocab_size}: they do not belong together; use the tokenizer of this model"
        )


def read_vocabulary(directory: Path, settings: dict[str, Any]) -> Vocabulary:
    names = ("tokenizer.json", "tokenizer.model", "tiktoken.model")
    in_json, in_pieces, in_ranks = files = [directory / name for name in names]
    for file in files:
        check_regular(file)
    if in_json.exists():
        return JsonVocabulary(in_json)
    if in_pieces.exists():
        return SentencePieces(in_pieces, read_added_tokens(directory, settings))
    if in_ranks.exists():
        return Ranks(in_ranks, read_added_tokens(directory, settings))
    found = list_some(sorted(entry.name for entry in directory.iterdir()))
    expected = "tokenizer.json, tokenizer.model or tiktoken.model"
    raise NoTokenizerError(f"{directory}: no {expected}; found {found}")


def read_added_tokens(directory: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """`added_tokens_decoder` of tokenizer_config.json: {"163585": {"content": "[EOS]", ...}}."""
    listed = settings.get("added_tokens_decoder")
    listed = {} if listed is None else listed
    found = {}
    for key, token in listed.items() if isinstance(listed, dict) else [("", listed)]:
        match token:
            case {"content": str(content)} if content and re.fullmatch("[0-9]{1,9}", key):
                found[int(key)] = AddedToken(content, bool(token.get("special", False)))
            case _:
                where = directory / "tokenizer_config.json"
                raise CheckpointError(
                    f"{where}: added_tokens_decoder has {key!r}: {token!r:.80}, expected an id and "
                    "an object with the token's content"
                )
    return found


def read_special_tokens(settings: dict[str, Any], vocabulary: Vocabulary) -> dict[str, str]:
    """bos_token, eos_token, ... of tokenizer_config.json: each a string, or an object with one."""
    found = {}
    for name, token in settings.items():
        content = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return {name: token for name, token in found.items() if vocabulary.find(token) is not None}


def read_stop_ids(
    directory: Path, eos_token: str | None, vocabulary: Vocabulary
) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, else of config.json, else the tokenizer's own."""
    config = directory / "config.json"
    described = read_json_if_present(config)
    inner = described.get("model")  # where our own format has the description
    rows = (inner if isinstance(inner, dict) else described).get("vocab_size")
    size = max(vocabulary.size, rows if isinstance(rows, int) else 0)
    for file in (directory / "generation_config.json", config):
        found = read_json_if_present(file).get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise CheckpointError(f"{file}: eos_token_id {token!r} is not a token id")
            if token >= size:
                raise CheckpointError(
                    f"{file}: eos_token_id {token} is no token: the ids are 0 to {size - 1}"
                )
        if ids:
            return tuple(ids)
    own = None if eos_token is None else vocabulary.find(eos_token)
    return () if own is None else (own,)


def read_json_if_present(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}
