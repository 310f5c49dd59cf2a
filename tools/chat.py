"""chat: talk with a model, a line at a time; /reset begins anew, /exit ends.

Ctrl-C stops an answer, of which the model remembers what it had said; at the prompt it ends the
program.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator

from checkpoints import Tokenizer, load_tokenizer
from modeling import Transformer, generate

from .generate import (
    add_generation_arguments,
    choices,
    load_for,
    print_text,
    system_message,
    text_of,
)

Messages = list[dict[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generation_arguments(parser)
    parser.set_defaults(max_new_tokens=1000)


def run(args: argparse.Namespace) -> int:
    tokenizer = load_tokenizer(args.model)
    tokenizer.templates.find()  # if there is none, to know it before the weights are read
    model = load_for(tokenizer, args)
    messages = system_message(args)
    for line in lines():
        if line == "/exit":
            break
        if line == "/reset":
            messages = system_message(args)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            messages = answered(asked, tokenizer, model, args) or messages
    return 0


def lines() -> Iterator[str]:
    """What is typed, without the white space around it."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        try:
            yield line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            print(f"error: this line is not UTF-8 text ({error.reason})", file=sys.stderr)


def answered(
    asked: Messages, tokenizer: Tokenizer, model: Transformer, args: argparse.Namespace
) -> Messages | None:
    """The conversation with the model's answer, printed as it comes; None if it is too long."""
    prompt_ids: list[int] = []
    answer_ids: list[int] = []
    try:
        prompt_ids = tokenizer.chat(asked)
        positions = model.config.max_length
        if len(prompt_ids) >= positions:
            print(
                f"error: the conversation would be {len(prompt_ids)} tokens long and the model has "
                f"{positions} positions; /reset begins a new one",
                file=sys.stderr,
            )
            return None
        room = min(args.max_new_tokens, positions - len(prompt_ids))
        tokens = generate(model, prompt_ids, room, **choices(tokenizer, args))
        print_text(tokenizer, prompt_ids, noted(tokens, answer_ids))
    except KeyboardInterrupt:
        pass  # it is for the answer
    return [*asked, {"role": "assistant", "content": text_of(tokenizer, prompt_ids, answer_ids)}]


def noted(tokens: Iterable[int], into: list[int]) -> Iterator[int]:
    for token in tokens:
        into.append(token)
        yield token
