"""Text to ids and back, from a sentencepiece `tokenizer.model` or a `tokenizer.json`."""

from pathlib import Path

import sentencepiece


class Tokenizer:
    def __init__(self, path):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(Path(path) / "tokenizer.model"))

    def encode(self, text, bos=True):
        return ([self.sp.bos_id()] if bos else []) + self.sp.encode(text)

    def decode(self, ids):
        return self.sp.decode(ids)


def load_tokenizer(path):
    return Tokenizer(path)
