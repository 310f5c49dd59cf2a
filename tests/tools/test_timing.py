"""Turns: all contenders in every round, in shifting order; long steps and slow rivals in fewer."""

from collections import Counter

import pytest
import torch

from tools import timing
from tools.timing import Contender, Rounds, available_memory, clock, peak_memory, take_turns


def contender(name, taken, seconds=0.001, **fields):
    """A contender that says it took so long, and notes its turns."""
    return Contender(lambda i: taken.append((i, name)) or seconds, **fields)


def test_every_round_lets_all_take_a_step_and_shifts_their_order():
    taken = []
    contenders = {name: contender(name, taken) for name in "abc"}
    rounds = take_turns(contenders, 4, "x")
    assert "".join(name for _, name in taken) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert [i for i, _ in taken] == [0] * 3 + [i for i in range(4) for _ in range(3)]
    assert {name: len(rounds.values(name)) for name in rounds} == {"a": 4, "b": 4, "c": 4}
    assert rounds.warm_up == dict.fromkeys("abc", 0.001)


def test_long_steps_take_part_in_fewer_rounds():
    taken = []
    contenders = {
        "short": contender("short", taken, 1.0),
        "long": contender("long", taken, 12.0),
        "longest": contender("longest", taken, 1e4),
        "unlimited": contender("unlimited", taken, 1e4, least=9),
        "few": contender("few", taken, most=2),
    }
    take_turns(contenders, 9, "x")
    counted = Counter(name for _, name in taken)
    assert counted == {"short": 10, "long": 6, "longest": 4, "unlimited": 10, "few": 3}


def test_only_rivals_near_the_fastest_are_measured():
    taken = []
    contenders = {
        name: contender(name, taken, seconds, rival=name.startswith("rival"))
        for name, seconds in {"own": 9.0, "rival 1": 1.0, "rival 2": 1.9, "rival 3": 2.1}.items()
    }
    rounds = take_turns(contenders, 3, "x")
    assert list(rounds) == ["own", "rival 1", "rival 2"]
    assert list(rounds.warm_up) == list(contenders)


def test_ratios_are_those_of_the_rounds_that_both_took_part_in():
    rounds = Rounds({"a": {0: 1.0, 1: 2.0, 2: 4.0}, "b": {0: 3.0, 2: 2.0}}, {})
    assert sorted(rounds.ratios("a", "b")) == [0.5, 3.0]
    assert rounds.median("a") == 2.0
    assert "b" not in rounds.only(["a"])


def test_the_clock_waits_for_an_accelerator(monkeypatch):
    done = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: done.append(device.type))
    assert clock(torch.device("meta"), lambda: done.append("work")) >= 0
    assert done == ["meta", "work", "meta"]
    clock(torch.device("cpu"), lambda: done.append("work"))
    assert done == ["meta", "work", "meta", "work"]


def test_memory_is_that_of_the_process(monkeypatch):
    cpu = torch.device("cpu")
    held = torch.ones(1 << 20)
    peak = peak_memory(cpu)
    assert list(peak) == ["process"]
    assert held.nbytes < peak["process"] < 1 << 50
    monkeypatch.setattr(timing, "Path", lambda _: timing.sys)  # a system without /proc
    monkeypatch.setattr(timing.sys, "exists", lambda: False, raising=False)
    assert peak_memory(cpu)["process"] == pytest.approx(peak["process"], rel=0.5)
    assert available_memory(cpu) is None
