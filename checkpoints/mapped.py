"""Experts that stay in the files of a checkpoint until a token needs them.

When the router has chosen, background threads read the experts that are not in memory, in the order
in which the loop over experts takes them. A cache that all layers share keeps the experts used
last. The results are those of `moe.Experts`, on a CPU bit for bit.

Shapes: N tokens, D model width, K slots of a token.
"""

import mmap
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn

from modeling import Transformer
from moe import Biases, Experts, Routing, experts_loop

from .config_file import CheckpointError
from .contents import Contents
from .mapping import Entry
from .storage.mapped_files import MappedFile, MappedShards, Span
from .storage.shards import Shards, StoredTensor
from .storage.weights import Weight

DEFAULT_MEMORY = 4 * 2**30
THREADS = 4  # that read: several reads at once keep a disk busy while their results are converted
UNIT = 16  # bytes: see `place`
RESIDENT = 'load the model with experts="resident"'


def check_expert_options(experts: str, expert_memory: int | None, quantize: str | None) -> None:
    """Raise ValueError for values that these arguments of `load_model` cannot have."""
    if experts not in ("resident", "mapped"):
        raise ValueError(f"experts = {experts!r}: must be resident or mapped")
    if experts == "mapped" and quantize is not None:
        raise ValueError(f"quantize = {quantize!r}, experts = 'mapped': give one of the two")
    if expert_memory is None:
        return
    if experts != "mapped":
        raise ValueError(f"expert_memory = {expert_memory!r}: give it with experts='mapped' only")
    if not isinstance(expert_memory, int) or isinstance(expert_memory, bool) or expert_memory < 0:
        raise ValueError(f"expert_memory = {expert_memory!r}: must be a number of bytes, >= 0")


class Expert(NamedTuple):
    """What was read of an expert, and where."""

    parts: dict[str, Tensor]  # by the names of the parameters of `Experts`
    spans: list[Span]


@dataclass(eq=False)
class StoredExperts:
    """The experts of a layer as files store them. Copies of a model share it."""

    shapes: dict[str, torch.Size]  # by the names of the parameters of `Experts`
    dtypes: dict[str, torch.dtype]  # that they are wanted in
    device: torch.device
    entries: list[list[Entry]]  # of each expert
    weights: Mapping[str, Weight]
    tensors: dict[str, StoredTensor]
    files: dict[Path, MappedFile]

    @cached_property
    def nbytes(self) -> int:
        """Of an expert in memory."""
        return sum(prod(s[1:]) * self.dtypes[name].itemsize for name, s in self.shapes.items())

    def read(self, expert: int, copied: bool) -> Expert:
        """Read an expert. Not copied, plain weights of the wanted dtype are views of the file."""
        found = Expert({}, [])
        for entry in self.entries[expert]:
            weight, sliced = self.weights[entry.published], entry.expert is None
            shards = MappedShards(self.tensors, self.files, expert if sliced else None, copied)
            names = [name.rpartition(".")[2] for name in entry.ours]
            # a plain weight is converted while it is placed
            wanted = (self.dtypes[names[0]], self.device) if weight.quantized else (None, "cpu")
            tensor = weight.read(shards, *wanted)
            found.spans.extend(shards.spans)
            for name, piece in zip(names, entry.split(tensor), strict=True):
                part, dtype = piece[0] if sliced else piece, self.dtypes[name]
                found.parts[name] = self.place(part, expert, dtype, moved=weight.quantized)
        return found

    def place(self, part: Tensor, expert: int, dtype: torch.dtype, moved: bool) -> Tensor:
        """A part with its numbers in order, in this dtype on the device; itself if it can be.

        The last bit of torch's products in float32 and float64 depends on where a matrix begins, in
        units of 16 bytes: that is where it would in the stack of all experts.
        moved: into memory of its own, which goes back to the system when it is no longer used: what
        threads get from malloc stays in their arenas, where other threads do not find it.
        """
        if self.device.type != "cpu":
            return part.to(self.device, dtype).contiguous()
        nbytes, unit = part.numel() * dtype.itemsize, UNIT if dtype.itemsize > 2 else dtype.itemsize
        fits = part.dtype == dtype and part.is_contiguous() and not moved
        if fits and (part.data_ptr() - expert * nbytes) % unit == 0:
            return part
        buffer = torch.frombuffer(mmap.mmap(-1, nbytes + UNIT), dtype=torch.uint8)
        start = (expert * nbytes - buffer.data_ptr()) % UNIT
        return buffer[start : start + nbytes].view(dtype).view(part.shape).copy_(part)

    def __deepcopy__(self, memo: dict) -> "StoredExperts":
        return self

    def __reduce__(self) -> NoReturn:
        raise ValueError(f"mapped experts cannot be pickled: {RESIDENT}")


@dataclass
class ExpertStatistics:
    """Counts over all layers since the model was loaded."""

    hits: int = 0  # times that an expert was in memory when needed
    misses: int = 0  # times that it was not
    bytes_read: int = 0  # of the files, whether from disk or from what the system keeps of it
    seconds_waited: float = 0.0

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


Key = tuple[StoredExperts, int]  # an expert of a layer


class ExpertCache:
    """The experts that were used last, of all layers, in at most `limit` bytes.

    Beside them are in memory the THREADS experts that are being read, and one too large to keep
    while it is used. Copies of a model share it.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self.statistics = ExpertStatistics()
        self._experts: OrderedDict[Key, Expert] = OrderedDict()  # the one used last is the last
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="experts")
        self._lock = Lock()

    def fetch(self, layer: StoredExperts, experts: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        """Yield these experts of a layer, in this order, while the next missing ones are read."""
        keep = layer.nbytes <= self.limit
        reading: dict[int, Future[Expert]] = {}

        def start(expert: int) -> Future[Expert]:
            return self._pool.submit(layer.read, expert, keep)

        def read_ahead(experts: Sequence[int]) -> None:
            for expert in experts:
                if len(reading) == THREADS:
                    return
                if expert not in reading and (layer, expert) not in self._experts:
                    reading[expert] = start(expert)

        for expert in experts:
            self.find((layer, expert))  # so that others make room first
        read_ahead(experts)
        for i, expert in enumerate(experts):
            found = self.find((layer, expert), counted=True)
            if found is None:
                if expert not in reading:  # another thread has put something else in its place
                    reading[expert] = start(expert)
                found = self.receive((layer, expert), reading.pop(expert))
            read_ahead(experts[i + 1 :])
            try:
                yield expert, found
            finally:
                if not keep:
                    for file, first, nbytes in found.spans:
                        file.release(first, nbytes)

    def find(self, key: Key, counted: bool = False) -> Expert | None:
        """An expert if it is in memory; it is now the one used last."""
        with self._lock:
            if key not in self._experts:
                return None
            self._experts.move_to_end(key)
            self.statistics.hits += counted
            return self._experts[key]

    def receive(self, key: Key, read: Future[Expert]) -> Expert:
        """Wait for an expert; keep it, and as many of those used before it as there is room for."""
        started, (layer, _) = time.perf_counter(), key
        expert = read.result()
        with self._lock:
            self.statistics.misses += 1
            self.statistics.seconds_waited += time.perf_counter() - started
            self.statistics.bytes_read += sum(nbytes for *_, nbytes in expert.spans)
            if layer.nbytes > self.limit or key in self._experts:
                return expert
            while self.nbytes + layer.nbytes > self.limit:
                (oldest, _), _ = self._experts.popitem(last=False)
                self.nbytes -= oldest.nbytes
            self._experts[key] = expert
            self.nbytes += layer.nbytes
            return expert

    def __deepcopy__(self, memo: dict) -> "ExpertCache":
        return self


@dataclass
class ArrivingStack:
    """Stands for a stacked tensor of `Experts`, and waits for the expert that is asked for."""

    take: Callable[[int], Expert]
    name: str
    shape: torch.Size

    def __getitem__(self, expert: int) -> Tensor:
        return self.take(expert).parts[self.name]


class MappedExperts(nn.Module):
    """Routed experts like `moe.Experts`, read from files when tokens need them. Cannot be trained,
    converted or saved."""

    def __init__(self, experts: Experts, stored: StoredExperts, cache: ExpertCache) -> None:
        super().__init__()
        self.activation, self.stored, self.cache = experts.activation, stored, cache

    def forward(self, x_ND: Tensor, routing: Routing) -> Tensor:
        if torch.compiler.is_compiling():  # reading files is no part of a graph; as a decorator,
            return torch.compiler.disable(self.run)(x_ND, routing)  # this imports the compiler
        return self.run(x_ND, routing)

    def run(self, x_ND: Tensor, routing: Routing) -> Tensor:
        routing.check()
        weights_NK, experts_NK = routing.weights_NK, routing.experts_NK
        if torch.is_grad_enabled() and (x_ND.requires_grad or weights_NK.requires_grad):
            raise ValueError(f"mapped experts have no gradients: {RESIDENT}, or use no_grad()")
        chosen = [e for e in experts_NK.unique().tolist() if e < len(self.stored.entries)]
        arriving = self.cache.fetch(self.stored, chosen)
        current: dict[int, Expert] = {}

        def take(expert: int) -> Expert:
            if expert not in current:
                current.clear()  # the next may need its memory
                current.update([next(arriving)])
            return current[expert]

        stacks: Any = {n: ArrivingStack(take, n, shape) for n, shape in self.stored.shapes.items()}
        weights = stacks["gate"], stacks["up"], stacks["down"]
        biases = Biases(*(stacks.get(name) for name in ("gate_bias", "up_bias", "down_bias")))
        return experts_loop(x_ND, weights_NK, experts_NK, *weights, biases, self.activation)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> NoReturn:
        raise ValueError(f"{prefix.rstrip('.')} is mapped and in no state_dict: {RESIDENT}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MappedExperts":
        probe = torch.empty(0, dtype=self.stored.dtypes["gate"], device=self.stored.device)
        made = fn(probe)
        if (made.dtype, made.device) != (probe.dtype, probe.device):
            raise ValueError(
                f"mapped experts stay {probe.dtype} on {probe.device}, while other parts of the "
                "model may have changed: load it again with the wanted dtype and device"
            )
        return super()._apply(fn, recurse)


def take_experts(
    contents: Contents, shards: Shards, dtypes: Mapping[str, torch.dtype], device: torch.device
) -> tuple[dict[str, StoredExperts], Contents]:
    """Map the files of routed experts: {path of a module: what stores its experts}; also returns
    the contents without them."""
    stored: dict[str, StoredExperts] = {}
    weights, tensors, files = contents.weights, shards.tensors, dict[Path, MappedFile]()
    for path, module in contents.model.named_modules():
        if type(module) is Experts:
            shapes = {name: part.shape for name, part in module.named_parameters()}
            own = {name: dtypes[f"{path}.{name}"] for name in shapes}
            entries: list[list[Entry]] = [[] for _ in range(len(module.gate))]
            stored[path] = StoredExperts(shapes, own, device, entries, weights, tensors, files)
    others = []
    for entry in contents.entries:
        layer = stored.get(entry.ours[0].rpartition(".")[0])
        if layer is None:
            others.append(entry)
            continue
        check_layout(entry)
        for of_expert in layer.entries if entry.expert is None else [layer.entries[entry.expert]]:
            of_expert.append(entry)
        for file in {tensors[name].file for name in weights[entry.published].names} - files.keys():
            files[file] = MappedFile(file)
    return stored, replace(contents, entries=others)


def check_layout(entry: Entry) -> None:
    """Raise CheckpointError unless each expert can be read alone."""
    theirs, _, ours = (entry.pattern or "E -> 1 E").partition("->")
    if entry.expert is None and (theirs.split()[0], ours.split()[1]) != ("E", "E"):
        raise CheckpointError(
            f"{entry.published} holds {', '.join(entry.ours)} in a layout ({entry.pattern}) of "
            f"which no expert can be read alone: {RESIDENT}, or convert the files to our format"
        )


def map_experts(model: Transformer, stored: Mapping[str, StoredExperts], limit: int) -> None:
    """Put mapped experts, with one cache, into the places of the model's routed experts."""
    cache = ExpertCache(limit)
    for path, experts in stored.items():
        replaced = cast(Experts, model.get_submodule(path))
        model.set_submodule(path, MappedExperts(replaced, experts, cache))


def expert_statistics(model: nn.Module) -> ExpertStatistics | None:
    """What was read for a model's mapped experts, and how often; None if it has none.

    It counts on while the model runs; copies of the model count together.
    """
    for module in model.modules():
        if isinstance(module, MappedExperts):
            return module.cache.statistics
    return None
