"""The report of bench as tables for people."""

from collections.abc import Sequence
from typing import Any

from .drafting_speed import format_drafting

HEADS = "tokens/s (quartiles)", "of the floor", "times transformers", "steps"
SIZES = {
    "prefill": ("tokens",),
    "decode": ("context", "batch"),
    "training": ("batch", "length"),
}
UNITS = {0: "B", 3: "kB", 6: "MB", 9: "GB"}
NOTE = """\
Tokens a second: medians of the steps, of all rows together. The floor: reading the weights that the
tokens use and the cache, or computing the products, whichever takes longer, at the speed at which
torch read a large buffer and multiplied large matrices between the steps. Times transformers: how
many times as fast as its fastest setting, step by step."""


def format_report(report: dict[str, Any]) -> str:
    """The tables of those parts that the report has."""
    parts = [format_head(report)] if "parameters" in report else []
    if "load" in report:
        parts.append(format_loading(report["load"]))
    parts += map(format_phase, report.get("profile", []))
    for name, sizes in SIZES.items():
        if report.get(name):
            parts.append(format_figures(name, sizes, report[name]))
    if "drafts" in report:
        parts.append(f"drafts: {format_drafting(report['drafts'])}")
    if "peak" in report:
        parts.append(format_peak(report["peak"]))
    return "\n\n".join(parts)


def format_end(report: dict[str, Any]) -> str:
    """What the figures mean, and what was not measured."""
    notes = [NOTE] if any(report.get(name) for name in SIZES) else []
    skipped = [f"not measured: {line}" for line in report["skipped"]]
    return "\n\n".join([*notes, "\n".join(skipped)]).rstrip()


def format_head(report: dict[str, Any]) -> str:
    return (
        f"{report['model']}: {report['parameters']:,} parameters, "
        f"{report['active_parameters']:,} used per token; MTP modules left out\n"
        f"{size(report['weight_bytes'])} of weights in memory, {report['dtype']}, on "
        f"{report['device']}; threads: {report['threads']}"
    )


def format_loading(load: dict[str, Any]) -> str:
    rows = [["load", "seconds (quartiles)", *HEADS[1:]]]
    for run in load["runs"]:
        rows.append([run["name"], spread(run["seconds"]), *format_shares(run)])
    before, loading = load["peak_before"], load["peak"]
    return "\n".join(
        [
            align(rows),
            f"first load: {load['first_seconds']:.3g} s; later ones find the files in memory",
            f"floor: copying the {size(load['bytes'])} of tensors in memory",
            f"most memory in use: {say_peak(before)} before loading (Python and torch), "
            f"{say_peak(loading)} while",
            "loading (the weights, and of the mapped files what was read last)",
        ]
    )


def format_peak(peak: dict[str, int]) -> str:
    return (
        f"most memory in use over the run: {say_peak(peak)} (also caches, the buffers that\n"
        "the machine reads and multiplies, and a peer's weights)"
    )


def say_peak(peak: dict[str, int]) -> str:
    on_device = f" and {size(peak['device'])} on the device" if "device" in peak else ""
    return size(peak["process"]) + on_device


def format_figures(title: str, sizes: Sequence[str], figures: list[dict[str, Any]]) -> str:
    """A block of lines for each figure: its runs, and the floor with what makes it."""
    rows = [[*sizes, title, *HEADS]]
    for figure in figures:
        block = [[run["name"], *format_run(run)] for run in figure.get("runs", [])]
        if "floor" in figure:
            best = f"{figure['floor']['tokens_per_second']:,.3g}"
            block.append(["floor", best, format_floor(figure)])
        block += [[f"not measured: {line}"] for line in figure.get("skipped", [])]
        named, blank = [f"{figure[name]:,}" for name in sizes], [""] * len(sizes)
        rows += [[*(blank if i else named), *cells] for i, cells in enumerate(block)]
    return align(rows)


def format_run(run: dict[str, Any]) -> list[str]:
    return [spread(run["tokens_per_second"]), *format_shares(run)]


def format_shares(run: dict[str, Any]) -> list[str]:
    compared = ""
    if "ratio_to_transformers" in run:
        compared = spread(run["ratio_to_transformers"])
    elif "ratio_to_abacus" in run:
        compared = f"{spread(run['ratio_to_abacus'])} times abacus"
    return [f"{100 * run['share_of_floor']:.3g} %", compared, str(run["steps"])]


def format_floor(figure: dict[str, Any]) -> str:
    """What bounds a step, in words."""
    floor = figure["floor"]
    if floor["bound"] == "products":
        counted, best = (floor[name] / 1e9 for name in ("operations", "operations_per_second"))
        return f"{counted:,.3g} billion operations at {best:,.3g} billion a second"
    cache = f" and {size(floor['cache_bytes'])} of cache" if floor["cache_bytes"] else ""
    experts = figure.get("distinct_experts", {}).values()
    chosen = f" ({sum(experts) / len(experts):.3g} experts a layer)" if experts else ""
    weights, best = size(floor["weight_bytes"]), size(floor["read_bytes_per_second"])
    return f"reading {weights} of weights{chosen}{cache} at {best} a second"


def spread(figure: dict[str, Any]) -> str:
    low, high = figure["quartiles"]
    return f"{figure['median']:,.3g} ({low:,.3g} to {high:,.3g})"


def size(nbytes: float) -> str:
    power = next((power for power in (9, 6, 3) if nbytes >= 10**power), 0)
    return f"{nbytes / 10**power:.3g} {UNITS[power]}"


def align(rows: list[list[str]]) -> str:
    """Rows of cells as lines, under a row of heads, without columns of empty cells.

    The last cell of a row that has fewer cells than others is as wide as it likes.
    """
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    filled = [any(column[1:]) for column in zip(*full, strict=True)]
    if len(full) == 1:  # the heads alone
        filled = [True] * len(widths)
    lines = []
    for row in rows:
        cells = zip(row, widths, filled, strict=False)
        lines.append("  ".join(cell.ljust(width) for cell, width, kept in cells if kept).rstrip())
    return "\n".join(lines)


def format_phase(phase: dict[str, Any]) -> str:
    """Where the time of a prefill or of some decoding steps goes."""
    if phase["phase"] == "prefill":
        what = f"prefill of {phase['tokens']:,} tokens"
    else:
        what = f"decoding {phase['steps']} tokens after a context of {phase['context']:,}"
    rows = [["where the time goes", "seconds", "share"]]
    for name, seconds in phase["mechanisms"].items():
        rows.append([name, f"{seconds:.3g}", f"{100 * seconds / phase['seconds']:.0f} %"])
    return f"""{what}: {phase["seconds"]:.3g} s with the hooks that took these times, \
{phase["seconds_without_hooks"]:.3g} s without
{align(rows)}
trace: {phase["trace"]}"""
