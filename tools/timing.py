"""Timing in turns: contenders take steps one after the other, so other load slows all alike."""

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from tqdm import tqdm

LONG_SECONDS = 60.0  # a contender whose steps would take longer in all takes fewer
LEAST_ROUNDS = 3
LOSES = 2.0  # a rival that took this many times as long as the fastest one is measured no further


@dataclass(frozen=True)
class Contender:
    """Something that is timed: `step(round)` takes one step and returns its seconds.

    least: the number of rounds that it takes part in however long they are; most: at most.
    rival: of the contenders with this on, only those near the fastest are measured after warm-up.
    """

    step: Callable[[int], float]
    least: int = LEAST_ROUNDS
    most: int | None = None
    rival: bool = False


class Rounds:
    """The seconds of every contender in every round that it took part in, and before that."""

    def __init__(
        self, seconds: Mapping[str, Mapping[int, float]], warm_up: Mapping[str, float]
    ) -> None:
        self.seconds, self.warm_up = seconds, warm_up

    def __contains__(self, name: str) -> bool:
        return name in self.seconds

    def __iter__(self) -> Iterator[str]:
        return iter(self.seconds)

    def only(self, names: Iterable[str]) -> "Rounds":
        return Rounds({name: self.seconds[name] for name in names}, self.warm_up)

    def values(self, name: str) -> list[float]:
        return list(self.seconds[name].values())

    def median(self, name: str) -> float:
        return median(self.values(name))

    def ratios(self, name: str, other: str) -> list[float]:
        """How many times as fast as `other` it was, in each round of both."""
        own, others = self.seconds[name], self.seconds[other]
        return [others[i] / own[i] for i in own.keys() & others.keys()]


def take_turns(contenders: Mapping[str, Contender], steps: int, what: str) -> Rounds:
    """Let contenders take a step each, `steps` rounds long, after one round that does not count.

    The order shifts from round to round. what: the name of the progress bar.
    """
    warm_up = {name: contender.step(0) for name, contender in contenders.items()}
    names = drop_slow_rivals(contenders, warm_up)
    rounds = {name: count_rounds(contenders[name], steps, warm_up[name]) for name in names}
    seconds: dict[str, dict[int, float]] = {name: {} for name in names}
    for i in tqdm(range(max(rounds.values())), what, unit="round", file=sys.stderr, disable=None):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            if i < rounds[name]:
                seconds[name][i] = contenders[name].step(i)
    return Rounds(seconds, warm_up)


def drop_slow_rivals(
    contenders: Mapping[str, Contender], warm_up: Mapping[str, float]
) -> list[str]:
    """The names of the contenders, without rivals that took LOSES times as long as the fastest."""
    fastest = min((warm_up[name] for name, c in contenders.items() if c.rival), default=0.0)
    return [n for n, c in contenders.items() if not c.rival or warm_up[n] <= LOSES * fastest]


def count_rounds(contender: Contender, steps: int, seconds: float) -> int:
    """How many rounds a contender takes part in whose steps take this long."""
    fitting = max(contender.least, int(LONG_SECONDS / max(seconds, 1e-9)))
    return min(steps, fitting, contender.most or steps)


def clock(device: torch.device, work: Callable[[], Any]) -> float:
    """The seconds that some work takes on a device."""
    synchronize(device)
    started = time.perf_counter()
    result = work()
    synchronize(device)
    seconds = time.perf_counter() - started
    del result  # freeing it is not part of the work
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for the work that was given to an accelerator; a CPU has done it already."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def shorten(value: float) -> float:
    """Four digits, which is more than a measured figure has."""
    return float(f"{value:.4g}")


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of some figures."""
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return {"median": shorten(middle), "quartiles": [shorten(low), shorten(high)]}


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most bytes in use so far: of the process, and of tensors on an accelerator.

    Those of the process contain what is mapped of files and was read.
    """
    peaks = {"process": peak_process_memory()}
    if device.type != "cpu":
        peaks["device"] = torch.accelerator.max_memory_allocated(device)
    return peaks


def peak_process_memory() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss may be that of the process that started this one
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be used on a device; None where the system does not say."""
    if device.type != "cpu":
        return torch.accelerator.get_memory_info(device)[0]
    information = Path("/proc/meminfo")
    if not information.exists():
        return None
    lines = (line.split() for line in information.read_text().splitlines())
    return {words[0]: int(words[1]) * 1024 for words in lines}["MemAvailable:"]
