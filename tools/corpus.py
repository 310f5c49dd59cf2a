"""Training text: reading it, holding out a part, its vocabulary, and the tokens of each step.

Shapes: N tokens of the text, B sequences, T positions.
"""

import io
import lzma
import sys
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints import Tokenizer

DOCUMENT_END = "\n\n\n"  # documents are separated by two blank lines


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, decompressed if its name ends in .xz; of stdin, if it is "-"."""
    name = "stdin" if str(path) == "-" else path
    try:
        raw = sys.stdin.buffer.read() if name == "stdin" else path.read_bytes()
        return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text ({error.reason})") from None
    except lzma.LZMAError as error:
        raise ValueError(f"{path}: cannot decompress ({error})") from None


def hold_out(text: str, num_documents: int) -> tuple[str, str]:
    """(training text, held-out text): the last `num_documents` documents are held out."""
    documents = text.split(DOCUMENT_END)
    if not 0 <= num_documents < len(documents):
        raise ValueError(
            f"the text has {len(documents)} documents (separated by two blank lines): "
            f"cannot hold out {num_documents}"
        )
    split = len(documents) - num_documents
    return DOCUMENT_END.join(documents[:split]), DOCUMENT_END.join(documents[split:])


def train_vocabulary(text: str, num_pieces: int) -> bytes:
    """A sentencepiece model of byte-pair pieces; single bytes spell all other characters.

    Text is not normalised, so decoding returns it exactly. Line ends and paragraph ends are pieces
    of their own.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=num_pieces,
        byte_fallback=True,
        user_defined_symbols=["\n", "\n\n"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        max_sentence_length=1_000_000,
        minloglevel=1,
    )
    return model.getvalue()


def shuffle_starts(num_tokens: int, length: int, seed: int, epoch: int) -> Tensor:
    """The positions at which an epoch's training sequences start, in random order.

    The sequences tile the text after a random offset, so every epoch cuts it at other places.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    offset = int(torch.randint(length, (), generator=generator))
    starts = torch.arange(offset, num_tokens - length + 1, length)
    return starts[torch.randperm(len(starts), generator=generator)]


def choose_batch(num_tokens: int, step: int, batch_size: int, length: int, seed: int) -> Tensor:
    """The places of a step's tokens in the text, (B, T); a resumed run gets the same ones.

    Raises ValueError if the text is too short for one batch.
    """
    per_epoch = (num_tokens - length) // length // batch_size
    if per_epoch < 1:
        raise ValueError(
            f"{num_tokens} tokens of text are too few for a batch of {batch_size} x {length}"
        )
    epoch, index = divmod(step, per_epoch)
    starts_B = shuffle_starts(num_tokens, length, seed, epoch)[index * batch_size :][:batch_size]
    return starts_B[:, None] + torch.arange(length)


def cut_passages(tokens_N: Tensor, count: int, length: int) -> list[list[int]]:
    """`count` evenly spaced pieces of a text, of `length` tokens each; ValueError if too short."""
    if len(tokens_N) < length:
        raise ValueError(f"{len(tokens_N)} tokens of text are too few for passages of {length}")
    starts = torch.linspace(0, len(tokens_N) - length, count).long().tolist()
    return [tokens_N[start : start + length].tolist() for start in starts]


def pack_documents(tokenizer: Tokenizer, text: str) -> tuple[Tensor, Tensor]:
    """The documents of a text as one stream: its tokens, (N,), and each token's document number."""
    documents = text.split(DOCUMENT_END)
    ends = [DOCUMENT_END] * (len(documents) - 1) + [""]
    whole = [document + end for document, end in zip(documents, ends, strict=True)]
    bar = tqdm(whole, desc="tokenizing", unit="document", file=sys.stderr, disable=None)
    ids = [tokenizer.encode(document) for document in bar]
    lengths = torch.tensor([len(document) for document in ids])
    tokens_N = torch.tensor([token for document in ids for token in document])
    return tokens_N, torch.arange(len(ids)).repeat_interleave(lengths)
