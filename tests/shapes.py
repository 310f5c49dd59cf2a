"""Names tell shapes: x_BTD has three dimensions, and a letter is one size within a call.

A letter of a suffix is a dimension, upper and lower case apart; a digit is a dimension of that
size. Where a file's legend allows any leading dimensions ("..."), a suffix names the last ones.
A dimension of size 1 may stand for any other: it broadcasts.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from files import ROOT
from torch import Tensor

CHECKED = tuple(str(ROOT / package) + "/" for package in ("moe", "modeling"))
SUFFIX = re.compile(r"_([A-Z][A-Za-z0-9]*|[a-z](?:[A-Z0-9][A-Za-z0-9]*)?)$")


def wrong_shapes(tensors: dict[str, Tensor], leading: bool) -> Iterator[str]:
    """Complaints about the tensors of one call whose names end in a suffix."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, tensor in tensors.items():
        letters = SUFFIX.search(name)
        if letters is None:
            continue
        shape = tuple(tensor.shape)[-len(letters[1]) :] if leading else tuple(tensor.shape)
        if len(shape) != len(letters[1]):
            yield f"{name} has {len(shape)} dimensions"
            continue
        for letter, size in zip(letters[1], shape, strict=True):
            known, where = (int(letter), "its name") if letter.isdigit() else (size, name)
            known, where = sizes.setdefault(letter, (known, where))
            if known == 1 and not letter.isdigit():
                sizes[letter] = size, name
            elif size != known and (size != 1 or letter.isdigit()):
                yield f"{name}: {letter} = {size}, but {known} in {where}"


@contextmanager
def checked_shapes(folders: tuple[str, ...] = CHECKED) -> Iterator[dict[str, set[str]]]:
    """Collect {function: complaints} for every function below `folders` that returns inside."""
    found: dict[str, set[str]] = {}

    def on_event(frame, event, _):
        if event == "return" and frame.f_code.co_filename.startswith(folders):
            values = frame.f_locals.items()
            tensors = {name: value for name, value in values if isinstance(value, Tensor)}
            leading = "Shapes: ... any" in (frame.f_globals.get("__doc__") or "")
            place = f"{Path(frame.f_code.co_filename).name}: {frame.f_code.co_qualname}"
            found.setdefault(place, set()).update(wrong_shapes(tensors, leading))

    sys.setprofile(on_event)
    try:
        yield found
    finally:
        sys.setprofile(None)
