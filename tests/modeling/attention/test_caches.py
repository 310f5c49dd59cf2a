"""The kinds of cache against lists of entries: what they hold, what they refuse."""

import math

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from tiny import gqa, model_config, transformer

from modeling import EntryCache, WindowCache
from modeling.generation.teacher_forcing import spread_row

WIDTHS, MAX_LENGTH = [2, 3], 12


shares = st.lists(st.floats(0, 1), min_size=3, max_size=3)  # one per row


class CacheBesideLists(RuleBasedStateMachine):
    """A cache, with or without a window, and row by row a list of all entries, none forgotten."""

    @initialize(
        batch=st.integers(1, 3),
        window=st.sampled_from([None, 1, 2, 3, 4, 5, 99]),
        rollback=st.integers(0, 3),
    )
    def begin(self, batch, window, rollback):
        self.window, self.rollback, self.round = window, rollback, 0
        if window is None:
            self.cache, self.kept = EntryCache(batch, MAX_LENGTH, WIDTHS), MAX_LENGTH
        else:
            self.cache = WindowCache(batch, MAX_LENGTH, WIDTHS, window, rollback)
            self.kept = min(window - 1 + rollback, MAX_LENGTH)
        self.lists = [[] for _ in range(batch)]
        self.peaks = [0] * batch  # how long the rows have been since they were empty

    def lengths(self):
        return [len(row) for row in self.lists]

    @rule(num_new=st.integers(0, 5), shares=st.none() | shares)
    def append(self, num_new, shares):
        """The same number to every row, or to each its share, padded with what must not spread."""
        starts, self.round = self.lengths(), self.round + 1
        given = None if shares is None else [round(f * num_new) for f in shares[: len(starts)]]
        counts = given or [num_new] * len(starts)
        shapes = [(len(starts), num_new, width) for width in WIDTHS]
        new = [torch.arange(math.prod(s)).view(s).double() + 100 * self.round for s in shapes]
        for row, count in enumerate(counts):
            for entries in new:
                entries[row, count:] = math.nan
        if max(map(sum, zip(starts, counts, strict=True))) > MAX_LENGTH:
            with pytest.raises(ValueError, match="max_length"):
                self.cache.append(*new, counts=given)
            return
        for row, count, *entries in zip(self.lists, counts, *new, strict=True):
            row.extend([*zip(*entries, strict=True)][:count])
        self.peaks = [*map(max, self.peaks, self.lengths())]
        shown, keys_BS = self.cache.append(*new, counts=given)
        assert (keys_BS is None) == (not any(starts))
        keys_BS = torch.arange(num_new)[None] if keys_BS is None else keys_BS
        for row, keys in enumerate(keys_BS.expand(len(starts), -1).tolist()):
            assert len(set(keys)) == shown[0].shape[1]  # none counts twice
            entries = [{key: e[row, s] for s, key in enumerate(keys)} for e in shown]
            self.check_row(self.lists[row], starts[row], entries)

    def check_row(self, row, start, entries_by_position):
        """Each new query sees what it should; so will the next one, whose own is yet to come."""
        for query in range(start, len(row) + 1):
            first = 0 if self.window is None else max(0, query - self.window + 1)
            for position in range(first, min(query + 1, len(row))):
                for entry, entries in zip(row[position], entries_by_position, strict=True):
                    assert torch.equal(entries[position], entry)

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
        pairs = [*zip(lengths, self.peaks, strict=True)]
        refused = [0 < n < peak - self.rollback and peak > self.kept for n, peak in pairs]
        if any(refused):
            with pytest.raises(ValueError, match=f"row {refused.index(True)} .* rollback"):
                self.cache.truncate(lengths)
            return
        self.cache.truncate(lengths)
        self.lists = [row[:n] for row, n in zip(self.lists, lengths, strict=True)]
        self.peaks = [peak if n else 0 for n, peak in pairs]

    @invariant()
    def it_has_the_lists_lengths_and_a_windows_size_and_nothing_of_the_padding(self):
        assert self.cache.lengths == self.lengths()
        if self.cache.tensors:  # made by the first append
            assert self.cache.nbytes == len(self.lists) * self.kept * sum(WIDTHS) * 8
        assert all(tensor.isfinite().all() for tensor in self.cache.tensors)


def test_a_cache_shows_every_query_what_a_list_of_all_entries_would():
    run_state_machine_as_test(
        CacheBesideLists, settings=settings(max_examples=100, stateful_step_count=20)
    )


def test_a_window_cut_back_goes_no_further_back_until_a_row_is_empty():
    """Of nine entries 5 to 8 are kept. The query at 6 needs 5; the one at 5 would need 4, and
    that one more entry was appended meanwhile does not bring it back."""
    cache = WindowCache(1, 20, [3], window=2, rollback=3)
    cache.append(torch.ones(1, 9, 3).double())
    cache.truncate([6])
    cache.append(torch.ones(1, 1, 3).double())
    with pytest.raises(ValueError, match="cannot be truncated to 5"):
        cache.truncate([5])
    cache.truncate([0])
    cache.append(torch.ones(1, 3, 3).double())
    cache.truncate([1])
    assert cache.lengths == [1]


@pytest.mark.parametrize("window", [None, 1, 2, 5])
@pytest.mark.parametrize("held", [1, 4, 9])
def test_a_row_spread_over_many_is_what_each_would_have_been(window, held):
    """Every row equals a cache of its own that was given so much of the text and no more."""

    def cache(rows: int):
        if window is None:
            return EntryCache(rows, MAX_LENGTH, WIDTHS)
        return WindowCache(rows, MAX_LENGTH, WIDTHS, window, rollback=MAX_LENGTH)

    entries = [torch.randn(1, held + 1, width, dtype=torch.float64) for width in WIDTHS]
    whole, ends = cache(1), list(range(held + 1))
    whole.append(*(entry[:, :held] for entry in entries))
    before = [tensor.clone() for tensor in whole.tensors]
    spread = spread_row(whole, ends)
    assert spread.lengths == ends
    shown, keys = spread.append(*(entry[:, held:].expand(len(ends), -1, -1) for entry in entries))
    for row, end in enumerate(ends):
        alone = cache(1)
        alone.append(*(entry[:, :end] for entry in entries))
        expected, positions = alone.append(*(entry[:, held:] for entry in entries))
        if positions is None:
            continue
        first = 0 if window is None else max(0, end + 1 - window)
        for ours, theirs in zip(shown, expected, strict=True):
            for position in range(first, end + 1):
                place = (keys.expand(len(ends), -1)[row] == position).nonzero()[-1]
                there = (positions[0] == position).nonzero()[-1]
                assert ours[row, place].equal(theirs[0, there])
    assert whole.lengths == [held]  # and the spread cache is another one
    assert all(map(torch.equal, whole.tensors, before))


def test_a_row_is_not_spread_to_where_its_window_shows_nothing_any_more():
    cache = WindowCache(1, MAX_LENGTH, WIDTHS, window=3, rollback=1)
    cache.append(*(torch.ones(1, 6, width).double() for width in WIDTHS))
    assert spread_row(cache, [6, 5]).lengths == [6, 5]
    with pytest.raises(ValueError, match="row 1 cannot be truncated to 4"):
        spread_row(cache, [6, 4])


@pytest.mark.parametrize("window", [None, 4, 99])
def test_padding_beside_a_row_that_fills_the_cache_is_never_written(window):
    cache = transformer(model_config(gqa(window=window))).make_cache(2, 8).layers[0]
    cache.append(*torch.zeros(2, 2, 7, 21).double(), counts=[7, 2])
    cache.append(*torch.ones(2, 2, 4, 21).double(), counts=[1, 4])
    assert cache.lengths == [8, 6]
    ones_per_row = [[int(row.sum()) // 21 for row in tensor] for tensor in cache.tensors]
    assert ones_per_row == [[1, 3 if window == 4 else 4]] * 2  # a window of 4 keeps 3


@pytest.mark.parametrize("lengths", [[6, 6], [2, 6]])
def test_more_than_max_length_is_refused_with_the_numbers_and_without_a_trace(lengths):
    cache = EntryCache(2, 8, [3])
    cache.append(torch.ones(2, 6, 3))
    cache.truncate(lengths)
    with pytest.raises(ValueError, match="max_length") as caught:
        cache.append(torch.zeros(2, 3, 3))
    assert "8" in str(caught.value)
    assert "9" in str(caught.value)
    assert cache.lengths == lengths
    assert (cache.tensors[0][:, :6] == 1).all()


@pytest.mark.parametrize(
    ("lengths", "told"),
    [([4, 3], "row 1 holds 2 positions.* 3"), ([-1, 2], "row 0 holds 4 positions.* -1")],
)
def test_truncating_forward_or_below_zero_is_refused(lengths, told):
    cache = EntryCache(2, 8, [3])
    cache.append(torch.zeros(2, 4, 3))
    cache.truncate([4, 2])
    with pytest.raises(ValueError, match=told):
        cache.truncate(lengths)
    assert cache.lengths == [4, 2]


def test_truncating_another_number_of_rows_is_refused():
    cache = EntryCache(2, 8, [3])
    with pytest.raises(ValueError, match="argument|rows"):
        cache.truncate([0])


def test_impossible_caches_and_truncations_are_refused_by_name():
    with pytest.raises(ValueError, match="0 rows, 4 positions, rollback"):
        EntryCache(0, 4, [3])
    with pytest.raises(ValueError, match="1 lengths for a cache of 2 rows"):
        EntryCache(2, 4, [3]).truncate([0])
