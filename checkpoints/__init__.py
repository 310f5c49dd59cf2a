"""Public checkpoints in and out. All knowledge of files, names and families is in here."""

from .config_file import CheckpointError
from .contents import own_state, read_headers
from .convert import companions, convert
from .load import load_model
from .published_config import read_config, unread_keys
from .save import save_model
from .storage.shards import StoredTensor
from .text.tokenizer import TextStream, Tokenizer, load_tokenizer
from .verify import verify

__all__ = [
    "CheckpointError",
    "StoredTensor",
    "TextStream",
    "Tokenizer",
    "companions",
    "convert",
    "load_model",
    "load_tokenizer",
    "own_state",
    "read_config",
    "read_headers",
    "save_model",
    "unread_keys",
    "verify",
]
