"""Renders a chat template: the request is JSON on stdin, the text or an error JSON on stdout.

`chat.py` runs this file as a process. A template is a program by the author of the checkpoint:
jinja2's sandbox keeps it from the internals of Python, and the limits of a process keep it from
filling the memory or running forever, which no sandbox within one process can.
"""

import json
import sys
import traceback
from datetime import datetime
from typing import Any

import jinja2
import jinja2.sandbox
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

if sys.platform != "win32":
    import resource


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks answers for training: prints the body.

    A variable that is set inside stays inside, as in transformers.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Namespace(jinja2.utils.Namespace):
    """jinja2's `namespace`, without names that Python itself looks up on it."""

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **values).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not hold the name {name!r}")
        super().__setitem__(name, value)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def make_dict(*args: Any, **values: Any) -> dict[Any, Any]:
    return dict(*args, **values)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter is for HTML, and escapes < and >."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def make_environment() -> jinja2.Environment:
    """The environment that chat templates expect: transformers' names and settings, no loader."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": Namespace,
        "dict": make_dict,
    }
    return made


def render(template: str, variables: dict[str, Any], characters: int) -> str:
    pieces, length = [], 0
    for piece in make_environment().from_string(template).generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > characters:
            raise jinja2.TemplateError(f"the text grew beyond {characters:,} characters")
    text = "".join(pieces)
    text.encode("utf-8")  # a template can spell half a surrogate pair
    return text


def find_line(error: Exception) -> int | None:
    """The line in the template, to which jinja2 makes tracebacks point."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == "<template>"
    ]
    return lines[-1] if lines else None


def format_error(error: Exception, megabytes: int) -> str:
    """The error in at most a thousand characters."""
    if isinstance(error, MemoryError):
        return f"it needs more than {megabytes} MB of memory"
    if isinstance(error, jinja2.TemplateError):
        return str(error.message)[:1000]
    return f"{type(error).__name__}: {error}"[:1000]


def limit_process(seconds: int, megabytes: int) -> None:
    """Limit the CPU time, in case the parent process has ended, and the memory."""
    if sys.platform != "win32":
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20, megabytes * 2**20))


def main() -> None:
    request = json.load(sys.stdin.buffer)
    limit_process(request["seconds"], request["megabytes"])
    reply: dict[str, Any]
    try:
        text = render(request["template"], request["variables"], request["characters"])
        reply = {"text": text}
    except Exception as error:  # a template can raise anything
        reply = {"error": format_error(error, request["megabytes"]), "line": find_line(error)}
    sys.stdout.buffer.write(json.dumps(reply, ensure_ascii=False).encode("utf-8", "replace"))


if __name__ == "__main__":
    main()
