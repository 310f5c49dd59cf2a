"""Public checkpoints in and out. All knowledge of files, names and families is in here."""

from .config_file import CheckpointError
from .contents import build_on_meta, own_state, read_headers
from .convert import companions, convert
from .load import load_model
from .mapped import ExpertStatistics, expert_statistics
from .published_config import read_config, unread_keys
from .save import plan_checkpoint, save_model
from .storage.shards import StoredTensor
from .text.tokenizer import TextStream, Tokenizer, check_vocabulary, load_tokenizer
from .verify import verify
