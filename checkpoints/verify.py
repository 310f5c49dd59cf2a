"""Everything that can be wrong in a checkpoint directory, all of it at once.

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
from .contents import Contents, compare
from .mapping import Entry
from .published_config import interpret
from .storage.shards import Shards, some, survey_shards
from .text.tokenizer import Tokenizer, load_tokenizer

TINY = 1e-30  # no trained weight is this small throughout: memory that was never written


def verify(
    path: str | Path,
    values: bool = False,
    progress: bool = False,
    classes: Sequence[type] = (),
) -> tuple[list[str], list[str]]:
    """What is wrong with a checkpoint directory, and what is only worth knowing.

    values: read every tensor too, one after the other, and look for NaN, infinities, experts that
    were never written and selection biases that shut experts out. classes: as of `load_model`.
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
        notes += misspelled(fields)
    except CheckpointError as error:
        errors.append(str(error))
    with survey_shards(directory) as shards:
        errors += shards.problems
        if config is not None:
            contents = compare(directory, config, shards)
            errors += contents.errors
            notes += contents.notes
            if values:
                found = value_errors(contents, shards, progress)
                errors += found
    told = text_errors(directory, config)
    return errors + told[0], notes + told[1]


def misspelled(fields: Fields) -> list[str]:
    """Config keys that nothing reads and that are one slip away from one that is."""
    pairs = [
        (key, get_close_matches(key, fields.asked, n=1, cutoff=0.93)) for key in fields.unread()
    ]
    return [f"config.json: {key} is not read; {near[0]} would be" for key, near in pairs if near]


def text_errors(directory: Path, config: ModelConfig | None) -> tuple[list[str], list[str]]:
    """What is wrong with tokenizer and chat template."""
    try:
        tokenizer = load_tokenizer(directory)
    except CheckpointError as error:
        missing = "no tokenizer" in str(error)
        return ([], [str(error)]) if missing else ([str(error)], [])
    errors = []
    if config is not None and tokenizer.vocab_size > config.vocab_size:
        errors.append(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids and the model "
            f"{config.vocab_size}: they do not belong together"
        )
    return errors + template_errors(tokenizer), []


def template_errors(tokenizer: Tokenizer) -> list[str]:
    """What goes wrong when each chat template is given the shortest conversation."""
    errors = []
    try:
        for name in tokenizer.templates.names:
            tokenizer.chat([{"role": "user", "content": "Hello"}], name)
    except CheckpointError as error:
        errors.append(str(error))
    return errors


def value_errors(contents: Contents, shards: Shards, progress: bool) -> list[str]:
    """What is wrong with the values, tensor by tensor."""
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
        found = list(tensor_errors(name, tensor, homes.get(name), contents.model))
        errors += [f"{weight.file}: {error}" for error in found]
    return errors


def tensor_errors(
    name: str, tensor: Tensor, home: Entry | None, model: Transformer
) -> Iterator[str]:
    """What is wrong with one tensor. home: where it belongs in the model."""
    nans, infinities = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    if nans or infinities:
        yield f"{name} holds {nans:,} NaN and {infinities:,} infinite values of {tensor.numel():,}"
        return
    if home is None:
        return
    path, _, own = home.ours[0].rpartition(".")
    owner = model.get_submodule(path)
    if own in getattr(owner, "quantizable", ()):
        yield from unwritten(name, tensor if tensor.dim() == 3 else tensor[None])
    rule = getattr(owner, "config", None)
    if own == "selection_bias" and isinstance(rule, TopK) and rule.num_groups == 1:
        yield from shut_out(name, tensor.flatten(), rule.top_k)


def unwritten(name: str, stack: Tensor) -> Iterator[str]:
    """Experts, the first dimension, whose weights are all zero, or noise next to it."""
    largest_E = stack.abs().flatten(1).amax(dim=1)
    bad = (largest_E < TINY).nonzero().flatten().tolist()
    if bad:
        which = f" (experts {some([str(expert) for expert in bad])})" if len(stack) > 1 else ""
        yield f"{name} is all zeros{which}"


def shut_out(name: str, bias_E: Tensor, top_k: int) -> Iterator[str]:
    """Experts that no token can choose: scores are between 0 and 1, and K others lead by more."""
    least = bias_E.topk(top_k).values[-1] - 1
    bad = (bias_E < least).nonzero().flatten().tolist()
    if bad:
        yield f"{name} keeps experts {some([str(expert) for expert in bad])} from ever being chosen"
