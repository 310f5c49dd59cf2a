"""Public checkpoints in and out. All knowledge of files, names and families is in here."""

from .config_file import CheckpointError
from .load import load_model, read_config, unread_keys
from .save import save_model
from .shards import StoredTensor, stored_tensors
from .tokenizer import TextStream, Tokenizer, load_tokenizer

__all__ = [
    "CheckpointError",
    "StoredTensor",
    "TextStream",
    "Tokenizer",
    "load_model",
    "load_tokenizer",
    "read_config",
    "save_model",
    "stored_tensors",
    "unread_keys",
]
