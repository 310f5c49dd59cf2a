"""Drafting: the same text at every number of drafts, and figures that agree with each other."""

import pytest
import torch
from tiny import agreeable, gqa, model_config

from tools.drafting_speed import run_passages, summarize_runs


def test_figures_are_sums_over_the_passages():
    model, prompts = agreeable(model_config(gqa(), 1)), [[5, 2, 8], [3, 1, 4], [7, 7, 1], [9, 2, 6]]
    runs = run_passages(model, prompts, 12, [0, 2, "auto"])
    assert [len(found) for found in runs.values()] == [4, 4, 4]
    rows = [summarize_runs(count, runs[count], runs[0]) for count in runs]
    for row, found in zip(rows, runs.values(), strict=True):
        assert all(run.generated_tokens == 12 for run in found)
        forwards = sum(run.forwards for run in found)
        assert row["tokens_per_forward"] == round((4 * 12 - 4) / (forwards - 4), 3)
        speeds = sorted(run.generation_tokens_per_second for run in found)
        assert row["tokens_per_second"] == pytest.approx(sum(speeds[1:3]) / 2, abs=0.06)
    plain, two, _ = rows
    assert (plain["speed_ratio"], plain["tokens_per_forward"], plain["acceptance"]) == (1, 1, [])
    assert plain["drafting_share"] == 0
    assert 0 < two["drafting_share"] < 1
    drafted, kept = (
        sum(torch.tensor(getattr(run, name)) for run in runs[2]) for name in ("drafted", "accepted")
    )
    assert two["acceptance"] == [round(x, 4) for x in (kept / drafted).tolist()]
    ratios = [
        own.generation_tokens_per_second / other.generation_tokens_per_second
        for own, other in zip(runs[2], runs[0], strict=True)
    ]
    low, high = two["speed_ratio_quartiles"]
    assert min(ratios) - 1e-3 < low < high < max(ratios) + 1e-3
    assert low <= two["speed_ratio"] <= high
