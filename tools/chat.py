"""chat: talk with a model that has a chat template; /reset starts a new conversation, /exit ends.

Each line is a message. Ctrl-C stops an answer: the part that was printed stays in the
conversation. At the prompt it ends the program.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from checkpoints import Tokenizer, load_tokenizer
from modeling import Transformer, generate

from .generate import (
    add_generation_arguments,
    check_chat_template,
    load_model_for,
    make_generation_options,
    make_system_message,
    print_text,
    text_of,
)

Messages = list[dict[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        help="checkpoint directory of a model with a chat template, such as instruct models have "
        "(the shipped model has none)",
    )
    add_generation_arguments(parser)
    parser.set_defaults(max_new_tokens=1000)


def run(args: argparse.Namespace) -> int:
    tokenizer = load_tokenizer(args.model)
    check_chat_template(tokenizer, args.model)
    model = load_model_for(tokenizer, args)
    messages = make_system_message(args)
    for line in read_lines():
        if line == "/exit":
            break
        if line == "/reset":
            messages = make_system_message(args)
        elif line:
            question = [*messages, {"role": "user", "content": line}]
            messages = answer(question, tokenizer, model, args) or messages
    return 0


def read_lines() -> Iterator[str]:
    """The lines that the user types, without white space at their ends."""
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


def answer(
    messages: Messages, tokenizer: Tokenizer, model: Transformer, args: argparse.Namespace
) -> Messages | None:
    """Print the model's answer while it is generated; return the conversation with the answer.

    Prints an error and returns None if the conversation is too long for the model.
    """
    prompt_ids: list[int] = []
    answer_ids: list[int] = []
    try:
        prompt_ids = tokenizer.chat(messages)
        positions = model.config.max_length
        if len(prompt_ids) >= positions:
            print(
                f"error: the conversation would be {len(prompt_ids)} tokens long and the model has "
                f"{positions} positions; /reset starts a new one",
                file=sys.stderr,
            )
            return None
        room = min(args.max_new_tokens, positions - len(prompt_ids))
        tokens = generate(model, prompt_ids, room, **make_generation_options(tokenizer, args))
        print_text(tokenizer, prompt_ids, record_tokens(tokens, answer_ids))
    except KeyboardInterrupt:
        pass  # it stops the answer, not the program
    return [*messages, {"role": "assistant", "content": text_of(tokenizer, prompt_ids, answer_ids)}]


def record_tokens(tokens: Iterable[int], record: list[int]) -> Iterator[int]:
    """Pass the tokens on, and append each to the record first."""
    for token in tokens:
        record.append(token)
        yield token
