"""Renders conversations with a checkpoint's chat template, and finds its control tokens.

A template prints control tokens around the messages. A message may contain the text of a control
token, which must stay text. So before rendering, two marks, characters that the conversation does
not contain, are put around each such text: a control token without marks in the rendered text is
one that the template printed. The marks are not put inside the text, since templates search the
model's messages for some tokens (`</think>`).
"""

import json
import re
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..config_file import CheckpointError, check_regular

RENDERER = Path(__file__).with_name("template.py")
MAX_SECONDS = 10  # templates take milliseconds, and their process a tenth of a second to start
MAX_MEGABYTES = 512
MAX_CHARACTERS = 4 * 2**20


class Part(NamedTuple):
    """A piece of a rendered conversation: one control token of the template, or plain text."""

    text: str
    control: bool


@dataclass(frozen=True)
class Template:
    source: str
    where: str  # the file, for errors


class ChatTemplates:
    """The chat templates of a checkpoint directory, read when one is needed.

    settings: its tokenizer_config.json; special: the tokens that a template can print by name.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], special: dict[str, str]) -> None:
        self.directory, self.settings, self.special = directory, settings, special

    @property
    def names(self) -> list[str]:
        """The names of the templates."""
        return list(self._all())

    def find(self, name: str | None = None) -> Template:
        """The template of that name, or `default`; CheckpointError if there is none."""
        found = self._all()
        if not found:
            raise CheckpointError(
                f"{self.directory}: no chat template, neither a chat_template.jinja nor a "
                "chat_template in tokenizer_config.json: this model continues texts only"
            )
        if (name or "default") not in found:
            known = ", ".join(found)
            raise CheckpointError(
                f"{self.directory}: no chat template named {name or 'default'}; it has {known}"
            )
        return found[name or "default"]

    def parts(self, messages: Any, name: str | None, control: Collection[str]) -> list[Part]:
        """Render a conversation up to the start of the answer; control: the control tokens."""
        check_messages(messages)
        texts = [text for message in messages for text in message.values()]
        opening, closing = find_spare_characters("".join([*texts, *control]))
        token = match_any(control)
        marked = [
            {key: re.sub(token, rf"{opening}\g<0>{closing}", text) for key, text in message.items()}
            for message in messages
        ]
        text = render(self.find(name), self.special | {"messages": marked})
        return split_control_tokens(text, token, opening, closing)

    def _all(self) -> dict[str, Template]:
        """From chat_template.jinja, or else from tokenizer_config.json, which may have several."""
        file = self.directory / "chat_template.jinja"
        check_regular(file)
        if file.exists():
            return {"default": Template(read_text(file), str(file))}
        where = f"{self.directory / 'tokenizer_config.json'}: chat_template"
        listed = self.settings.get("chat_template")
        if isinstance(listed, str):
            return {"default": Template(listed, where)}
        found = {}
        for entry in [] if listed is None else listed if isinstance(listed, list) else [listed]:
            match entry:
                case {"name": str(name), "template": str(source)}:
                    found[name] = Template(source, f"{where} {name}")
                case _:
                    expected = "a template, or a list of names and templates"
                    raise CheckpointError(f"{where} = {listed!r:.80}: expected {expected}")
        return found


def render(template: Template, variables: dict[str, Any]) -> str:
    """Render a template; CheckpointError, with the line, if it fails or takes too long.

    It runs in a process that gets the request only, and no environment variables.
    """
    # transformers has these as None, and templates ask `is not none`
    nothing = {"tools": None, "documents": None}
    request = {
        "template": template.source,
        "variables": nothing | variables | {"add_generation_prompt": True},
        "seconds": int(MAX_SECONDS) + 1,  # of CPU time: a later limit than the timeout below
        "megabytes": MAX_MEGABYTES,
        "characters": MAX_CHARACTERS,
    }
    command = [sys.executable, "-I", str(RENDERER)]
    data = json.dumps(request).encode()
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=MAX_SECONDS, env={})
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{template.where}: not done after {MAX_SECONDS} seconds") from None
    if done.returncode != 0:
        raise CheckpointError(f"{template.where}: its process ended with code {done.returncode}")
    reply = json.loads(done.stdout)
    if "error" in reply:
        line = "" if reply["line"] is None else f" line {reply['line']}:"
        raise CheckpointError(f"{template.where}:{line} {reply['error']}")
    return reply["text"]


def split_control_tokens(text: str, token: str, opening: str, closing: str) -> list[Part]:
    """Split a rendered text into control tokens and the text between them; remove the marks."""
    parts, end = [], 0
    unmarked = str.maketrans("", "", opening + closing)
    for match in re.finditer(f"{opening}{token}{closing}|(?P<own>{token})", text):
        if match["own"]:
            parts.append(Part(text[end : match.start()].translate(unmarked), control=False))
            parts.append(Part(match["own"], control=True))
            end = match.end()
    parts.append(Part(text[end:].translate(unmarked), control=False))
    return [part for part in parts if part.text]


def check_messages(messages: Any) -> None:
    if not isinstance(messages, list):
        raise ValueError(f"the messages are a {type(messages).__name__}, expected a list")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            found = list(message) if isinstance(message, dict) else type(message).__name__
            raise ValueError(f"{where}: expected a dict of role and content, found {found}")
        for key, text in message.items():
            if not isinstance(text, str):
                raise ValueError(
                    f"{where}: the {key} is a {type(text).__name__}, expected a string"
                )
            check_unicode(text, f"the {key} of {where}")


def check_unicode(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        where = f"position {error.start}"
        raise ValueError(f"{what} has half a surrogate pair at {where}: not Unicode") from None


def find_spare_characters(text: str) -> tuple[str, str]:
    """Two characters that the text does not contain, of those reserved for internal use."""
    spare = [chr(code) for code in range(0xFDD0, 0xFDF0) if chr(code) not in text]
    if len(spare) < 2:
        raise ValueError(
            "fewer than two of U+FDD0 to U+FDEF are free: remove such characters from the messages"
        )
    return spare[0], spare[1]


def match_any(strings: Collection[str]) -> str:
    """A pattern that matches any of the strings, the longest first; nothing if there are none."""
    longest_first = sorted(strings, key=len, reverse=True)
    return "(?:" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")"


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not UTF-8 ({error.reason})") from None
