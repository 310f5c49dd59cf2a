"""A cache of states against a list of all inputs: what it gives, cut back or not, row by row."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from outside import DecayConfig
from tiny import random_tokens, randomize, sized, softmax_experts, transformer

from modeling import LayerConfig, StateCache, Step
from modeling.generation.teacher_forcing import spread_row

MAX_LENGTH, H, W = 14, 2, 3
shares = st.lists(st.floats(0, 1), min_size=3, max_size=3)  # one per row


def recur(states, inputs, real_BL):
    """A recurrence that is not linear and forgets nothing, with two states and two inputs."""
    (state_BW, count_B1), (x_BLW, gate_BLH), outputs = states, inputs, []
    for i in range(x_BLW.shape[1]):
        new_BW = (
            torch.tanh(0.9 * state_BW.roll(1, dims=1) + x_BLW[:, i])
            + gate_BLH[:, i].sum(1)[:, None]
        )
        real_B1 = real_BL[:, i, None]
        state_BW = torch.where(real_B1, new_BW, state_BW)
        count_B1 = torch.where(real_B1, count_B1 + 1, count_B1)
        outputs.append(torch.cat([state_BW, count_B1], dim=1))
    B = len(state_BW)
    y = torch.stack(outputs, dim=1) if outputs else state_BW.new_zeros(B, 0, W + 1)
    return y, [state_BW, count_B1]


def expected_outputs(row):
    """What the recurrence gives for one row's inputs, from the beginning."""
    states = [torch.zeros(1, W).double(), torch.zeros(1, 1).double()]
    if not row:
        return torch.zeros(0, W + 1).double()
    x, gate = (torch.stack(entries)[None] for entries in zip(*row, strict=True))
    y, _ = recur(states, [x, gate], torch.ones(1, len(row), dtype=torch.bool))
    return y[0]


class StatesBesideLists(RuleBasedStateMachine):
    @initialize(batch=st.integers(1, 3), rollback=st.integers(0, 4))
    def begin(self, batch, rollback):
        self.rollback, self.round = rollback, 0
        self.cache = StateCache(batch, MAX_LENGTH, [(W,), (1,)], [(W,), (H,)], rollback)
        self.lists = [[] for _ in range(batch)]
        self.floors = [0] * batch

    def lengths(self):
        return [len(row) for row in self.lists]

    @rule(num_new=st.integers(0, 6), shares=st.none() | shares)
    def append(self, num_new, shares):
        """The same number to every row, or to each its share, padded with what must not spread."""
        starts, self.round = self.lengths(), self.round + 1
        given = None if shares is None else [round(f * num_new) for f in shares[: len(starts)]]
        counts = given or [num_new] * len(starts)
        generator = torch.Generator().manual_seed(self.round)
        new = [
            torch.randn(len(starts), num_new, w, generator=generator, dtype=torch.float64)
            for w in (W, H)
        ]
        for row, count in enumerate(counts):
            for entries in new:
                entries[row, count:] = math.nan
        if max(map(sum, zip(starts, counts, strict=True))) > MAX_LENGTH:
            before = [tensor.clone() for tensor in self.cache.tensors]
            with pytest.raises(ValueError, match="max_length"):
                self.cache.append(recur, *new, counts=given)
            assert all(map(torch.equal, before, self.cache.tensors))
            return
        y_BTw = self.cache.append(recur, *new, counts=given)
        assert y_BTw.shape == (len(starts), num_new, W + 1)
        for row, count, *entries in zip(self.lists, counts, *new, strict=True):
            row.extend([*zip(*entries, strict=True)][:count])
        for number, (row, start, count) in enumerate(zip(self.lists, starts, counts, strict=True)):
            close = {"rtol": 1e-12, "atol": 1e-12}
            torch.testing.assert_close(
                y_BTw[number, :count], expected_outputs(row)[start:], **close
            )
        self.floors = [
            max(floor, n - self.rollback)
            for floor, n in zip(self.floors, self.lengths(), strict=True)
        ]

    @rule(shares=shares)
    def truncate_to(self, shares):
        self.truncate([int(f * n) for f, n in zip(shares, self.lengths(), strict=False)])

    @rule()
    def truncate_to_nothing(self):
        self.truncate([0 for _ in self.lists])

    @rule(cuts=st.lists(st.integers(0, 4), min_size=3, max_size=3))
    def truncate_by(self, cuts):
        self.truncate([max(0, n - cut) for n, cut in zip(self.lengths(), cuts, strict=False)])

    def truncate(self, lengths):
        refused = [0 < n < floor for n, floor in zip(lengths, self.floors, strict=True)]
        if any(refused):
            with pytest.raises(ValueError, match=f"row {refused.index(True)} .* rollback"):
                self.cache.truncate(lengths)
            return
        self.cache.truncate(lengths)
        self.lists = [row[:n] for row, n in zip(self.lists, lengths, strict=True)]
        self.floors = [f if n else 0 for f, n in zip(self.floors, lengths, strict=True)]

    @invariant()
    def it_has_the_lists_lengths_a_constant_size_and_nothing_of_the_padding(self):
        assert self.cache.lengths == self.lengths()
        assert self.cache.bytes_per_token == 0
        if self.cache.tensors:
            numbers = W + 1 + self.rollback * (W + H)
            assert self.cache.nbytes == len(self.lists) * numbers * 8
            assert self.cache.constant_bytes == numbers * 8
        assert all(tensor.isfinite().all() for tensor in self.cache.tensors)


def test_outputs_are_those_of_all_inputs_of_a_row_however_appended_and_cut_back():
    run_state_machine_as_test(
        StatesBesideLists, settings=settings(max_examples=150, stateful_step_count=20)
    )


@given(
    rollback=st.integers(0, 4),
    counts=st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2), min_size=1, max_size=4),
    data=st.data(),
)
def test_after_an_append_a_row_can_be_cut_back_by_the_rollback_or_to_nothing(
    rollback, counts, data
):
    cache = StateCache(2, 20, [(W,), (1,)], [(W,), (H,)], rollback)
    for pair in counts:
        new = torch.ones(2, 5, W).double(), torch.ones(2, 5, H).double()
        cache.append(recur, *new, counts=pair)
    lengths = [data.draw(st.integers(max(0, n - rollback), n) | st.just(0)) for n in cache.lengths]
    cache.truncate(lengths)
    assert cache.lengths == lengths


@pytest.mark.parametrize("held", [1, 4, 9])
def test_a_row_spread_over_many_is_what_each_would_have_been(held):
    cache = StateCache(1, MAX_LENGTH, [(W,), (1,)], [(W,), (H,)], rollback=MAX_LENGTH)
    inputs = [torch.randn(1, held + 1, w, dtype=torch.float64) for w in (W, H)]
    cache.append(recur, *(x[:, :held] for x in inputs))
    ends = list(range(held + 1))
    spread = spread_row(cache, ends)
    y = spread.append(recur, *(x[:, held:].expand(len(ends), -1, -1) for x in inputs))
    for row, end in enumerate(ends):
        text = [(x, g) for x, g in zip(inputs[0][0], inputs[1][0], strict=True)]
        expected = expected_outputs([*text[:end], text[held]])[-1]
        torch.testing.assert_close(y[row, 0], expected, rtol=1e-12, atol=1e-12)
    assert cache.lengths == [held]


def test_states_are_float32_at_least_and_inputs_have_the_dtype_they_come_in():
    cache = StateCache(1, 4, [(W,), (1,)], [(W,), (H,)], rollback=2)
    cache.append(recur, torch.ones(1, 1, W).bfloat16(), torch.ones(1, 1, H).bfloat16())
    assert [tensor.dtype for tensor in cache.tensors] == [torch.float32] * 2 + [torch.bfloat16] * 2


@pytest.mark.parametrize("rollback", [0, 1, 3])
@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=2),
    more=st.lists(st.integers(0, 3), min_size=2, max_size=2),
)
def test_a_layer_with_padded_rows_is_each_row_by_itself(rollback, lengths, more):
    module = DecayConfig(num_heads=2, head_width=3).build(11).double().requires_grad_(False)
    randomize(module, 0)
    cache, alone = module.make_cache(2, 12, rollback), [module.make_cache(1, 12) for _ in range(2)]
    for round_number, counts in enumerate((lengths, more, [1, 1])):
        T = max(counts)
        x_BTD = torch.randn(
            2, T, 11, generator=torch.Generator().manual_seed(round_number)
        ).double()
        whole = module(x_BTD, Step(torch.arange(T)[None], counts), cache)
        for row, count in enumerate(counts):
            y = module(x_BTD[row : row + 1, :count], Step(torch.arange(count)[None]), alone[row])
            torch.testing.assert_close(whole[row, :count], y[0], rtol=1e-11, atol=1e-11)


def test_without_a_cache_padding_leaves_no_trace_either():
    layer = LayerConfig(
        attention=DecayConfig(num_heads=2, head_width=3), feed_forward=softmax_experts()
    )
    model, tokens_BT = transformer(sized(layers=(layer, layer))), random_tokens(2, 7)
    padded = model.hidden_states(tokens_BT, counts=[3, 7]).normed_BTD
    torch.testing.assert_close(padded[:1, :3], model.hidden_states(tokens_BT[:1, :3]).normed_BTD)
