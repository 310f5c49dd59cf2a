"""Lists every error in a checkpoint directory.

Shapes: ... any dimensions, E experts.
"""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from modeling import ModelConfig, Transformer
from moe import TopK

from .config_file import CheckpointError, Fields
from .contents import Contents, compare_files
from .mapping import Entry
from .published_config import interpret
from .storage.shards import Shards, list_some, survey_shards
from .text.tokenizer import NoTokenizerError, Tokenizer, check_vocabulary, load_tokenizer

TINY = 1e-30  # no trained expert has only weights below this; unwritten memory may


def verify(
    path: str | Path,
    values: bool = False,
    progress: bool = False,
    classes: Sequence[type] = (),
) -> tuple[list[str], list[str]]:
    """The errors in a checkpoint directory, and notes, which do not prevent loading.

    values: also read every tensor, one by one, and look for NaN, infinities, experts that were
    never written, and experts that a selection bias excludes. classes: as in `load_model`.
    Raises CheckpointError only if there is no such directory.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: not a directory")
    errors: list[str] = []
    notes: list[str] = []
    config = None
    try:
        config, fields = interpret(directory, classes)
        notes += find_misspelled_keys(fields)
    except CheckpointError as error:
        errors.append(str(error))
    with survey_shards(directory) as shards:
        errors += shards.problems
        if config is not None:
            try:
                contents = compare_files(directory, config, shards)
                errors += contents.errors
                notes += contents.notes
                errors += check_values(contents, shards, progress) if values else []
            except CheckpointError as error:  # of a model that cannot be built
                errors.append(str(error))
    text_errors, text_notes = check_text_files(directory, config)
    return errors + text_errors, notes + text_notes


def find_misspelled_keys(fields: Fields) -> list[str]:
    """Config keys that nothing reads, but whose spelling is close to one that is read."""
    pairs = [
        (key, get_close_matches(key, fields.asked, n=1, cutoff=0.93)) for key in fields.unread()
    ]
    return [
        f"config.json: {key} is not read; did you mean {near[0]}?" for key, near in pairs if near
    ]


def check_text_files(directory: Path, config: ModelConfig | None) -> tuple[list[str], list[str]]:
    """Errors and notes about the tokenizer and the chat templates."""
    try:
        tokenizer = load_tokenizer(directory)
    except NoTokenizerError as error:
        return [], [str(error)]
    except CheckpointError as error:
        return [str(error)], []
    errors = check_templates(tokenizer)
    try:
        if config is not None:
            check_vocabulary(directory, tokenizer, config.vocab_size)
    except CheckpointError as error:
        errors.insert(0, str(error))
    return errors, []


def check_templates(tokenizer: Tokenizer) -> list[str]:
    """Render the shortest conversation with each chat template; list the errors."""
    errors = []
    try:
        for name in tokenizer.templates.names:
            tokenizer.chat([{"role": "user", "content": "Hello"}], name)
    except CheckpointError as error:
        errors.append(str(error))
    return errors


def check_values(contents: Contents, shards: Shards, progress: bool) -> list[str]:
    """Read every tensor and list the errors in its values."""
    homes = {entry.published: entry for entry in contents.entries}
    errors = []
    bar = tqdm(
        contents.weights.items(), desc="reading", unit="tensor", disable=None if progress else True
    )
    for name, weight in bar:
        try:
            tensor = weight.read(shards, None, "cpu")
        except CheckpointError as error:
            errors.append(str(error))
            continue
        found = list(check_tensor(name, tensor, homes.get(name), contents.model))
        errors += [f"{weight.file}: {error}" for error in found]
    return errors


def check_tensor(
    name: str, tensor: Tensor, home: Entry | None, model: Transformer
) -> Iterator[str]:
    """Yield the errors in one tensor. home: where it belongs in the model."""
    nans, infinities = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    if nans or infinities:
        yield f"{name} holds {nans:,} NaN and {infinities:,} infinite values of {tensor.numel():,}"
        return
    if home is None:
        return
    path, _, own = home.ours[0].rpartition(".")
    owner = model.get_submodule(path)
    if own in getattr(owner, "quantizable", ()):
        yield from find_unwritten_experts(name, tensor if tensor.dim() == 3 else tensor[None])
    rule = getattr(owner, "config", None)
    if own == "selection_bias" and isinstance(rule, TopK) and rule.num_groups == 1:
        yield from find_unreachable_experts(name, tensor.flatten(), rule.top_k)


def find_unwritten_experts(name: str, stack: Tensor) -> Iterator[str]:
    """Yield an error if experts, the first dimension, have only zero or nearly zero weights."""
    largest_E = stack.abs().flatten(1).amax(dim=1)
    bad = (largest_E < TINY).nonzero().flatten().tolist()
    if bad:
        which = f" (experts {list_some([str(expert) for expert in bad])})" if len(stack) > 1 else ""
        yield f"{name} is all zeros{which}"


def find_unreachable_experts(name: str, bias_E: Tensor, top_k: int) -> Iterator[str]:
    """Yield an error for experts that no token can choose: K biases exceed theirs by over 1."""
    least = bias_E.topk(top_k).values[-1] - 1
    bad = [str(expert) for expert in (bias_E < least).nonzero().flatten().tolist()]
    if bad:
        yield f"{name} keeps experts {list_some(bad)} from ever being chosen"
