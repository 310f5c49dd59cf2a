"""The pictures of `look`: what a model did with a text, as figures of matplotlib.

Lengths are in points (1/72 inch), places from the top left. `labels` are the tokens as they are
shown, spaces before words included. `experts` and `loads` are by the names of the layers.

Shapes: H heads, T positions of one layer.
"""

import io
import math
import tempfile
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm, TwoSlopeNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager, get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

FONT = "DejaVu Sans"  # comes with matplotlib
TITLE, TEXT, SMALL, TINY = 11.0, 9.0, 7.0, 5.8  # font sizes
INK, GREY, PALE = "#262626", "#6e6e6e", "#efefef"
DPI = 150
STYLE: dict[Any, Any] = {
    "font.size": SMALL,
    "text.color": INK,
    "text.parse_math": False,  # a $ in the text begins no formula
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.5,
    "axes.labelcolor": INK,
    "figure.dpi": DPI,
    **{f"{axis}tick.color": GREY for axis in "xy"},
    **{f"{axis}tick.labelcolor": INK for axis in "xy"},
    **{f"{axis}tick.major.width": 0.5 for axis in "xy"},
    **{f"{axis}tick.major.size": 2 for axis in "xy"},
}
MARGIN, BODY = 22.0, 540.0  # around every picture; the width of a page of text
DIGIT = 0.64 * TINY  # the width of a digit
GAP = 0.8  # between two tokens of a word
WIDEST = 45.0  # the most that a token gets for the numbers of its experts
WARM = LinearSegmentedColormap.from_list("warm", ["#f8f5ee", "#fbdfa8", "#f2a05f", "#d9503a"])
# Okabe and Ito 2008: colours that differ with every kind of colour vision
HUES = ["#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#f0e442", "#0072b2", "#d55e00", "#555555"]
TINTS = [("#ffffff", 0.2), ("#ffffff", 0.62), ("#000000", 0.3)]  # what is mixed in, and how much

Colour = str | tuple[float, ...]
TokenExperts = Sequence[tuple[int, float]]  # experts with their shares of the weights


@contextmanager
def drawing_style(text: str) -> Iterator[None]:
    """The style of all pictures, whatever a matplotlibrc says, for the length of a `with` block.

    Characters of the text that the usual font lacks come from other installed fonts. Warns of those
    that all of them lack.
    """
    families, missing = find_fonts({character for character in text if character.isprintable()})
    if missing:
        shown = " ".join(sorted(missing)[:10])
        problem = f"{len(missing)} characters that no installed font has are shown as boxes"
        warnings.warn(f"{problem}: {shown}", stacklevel=3)
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"font.family": families})
        yield


def find_fonts(characters: set[str]) -> tuple[list[str], set[str]]:
    """(FONT and the families that have what it lacks, the characters that no font has)."""
    families, missing = [FONT], characters
    plain = [font for font in fontManager.ttflist if (font.style, font.weight) == ("normal", 400)]
    for font in sorted(plain, key=lambda font: font.name != FONT):
        if missing and not font.name.startswith("Last Resort"):  # that one has boxes for all
            known = get_font(font.fname).get_charmap()
            found = {character for character in missing if ord(character) in known}
            missing = missing - found
            families += [font.name] if found and font.name not in families else []
    return families, missing


def text_width(text: str, size: float) -> float:
    """The width of a text, spaces at its ends included."""
    renderer, font = RendererAgg(1, 1, 720), FontProperties(size=size)

    def width(text: str) -> float:
        return renderer.get_text_width_height_descent(text, font, ismath=False)[0] / 10

    return width(f"|{text}|") - width("||")


class Page:
    """A figure with a title, a caption and a body; places count from the corner of the body."""

    def __init__(self, width: float, height: float, title: str, caption: str) -> None:
        lines = textwrap.wrap(caption, int(width / (0.55 * SMALL)))
        self.top = MARGIN + 1.7 * TITLE + 1.5 * SMALL * (len(lines) + 1)
        self.width, self.height = width + 2 * MARGIN, self.top + height + MARGIN
        self.figure = Figure(figsize=(self.width / 72, self.height / 72))
        self.canvas = self.figure.add_axes((0, 0, 1, 1))
        self.canvas.set(xlim=(-MARGIN, width + MARGIN), ylim=(height + MARGIN, -self.top))
        self.canvas.set_axis_off()
        self.boxes: list[list[tuple[float, float]]] = []
        self.colours: list[Colour] = []
        self.write(0, MARGIN + 0.8 * TITLE - self.top, title, TITLE, fontweight="bold")
        for number, line in enumerate(lines):
            self.write(0, 1.5 * SMALL * (number - len(lines) - 0.4), line, SMALL, color=GREY)

    def write(self, x: float, baseline: float, text: str, size: float, **style: Any) -> None:
        self.canvas.text(x, baseline, text, fontsize=size, **style)

    def paint(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """A box, under all texts and over the boxes before it."""
        self.boxes.append([(x, y), (x + width, y), (x + width, y + height), (x, y + height)])
        self.colours.append(colour)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        left, bottom = x + MARGIN, self.height - self.top - y - height
        place = left / self.width, bottom / self.height, width / self.width, height / self.height
        return self.figure.add_axes(place)

    def add_colour_bar(
        self, axes: Axes, shown: ScalarMappable, label: str, direction: str, **ticks: Any
    ) -> None:
        self.figure.colorbar(shown, axes, orientation=direction, label=label, **ticks)

    def finish(self, edge: float = 0.4) -> Figure:
        """The figure; edge: width of the white lines around boxes."""
        boxes = PolyCollection(
            self.boxes, facecolors=self.colours, edgecolors="white", linewidths=edge
        )
        self.canvas.add_collection(boxes, autolim=False)
        return self.figure


class Place(NamedTuple):
    """Where a token stands on a page of text."""

    line: int
    x: float
    width: float


def place_tokens(
    labels: Sequence[str], least: Sequence[float], ends: Sequence[int], line_width: float
) -> list[Place]:
    """Set tokens like a page of text: a word is not broken if it fits on a line.

    least: the least width of each token; ends: how many lines end behind it. Where a line is too
    long, the next one begins without the spaces before its label.
    """
    indents = [text_width(" ", TEXT) * (len(text) - len(text.lstrip(" "))) for text in labels]
    widths = [max(text_width(s.strip(" "), TEXT), w) for s, w in zip(labels, least, strict=True)]
    places: list[Place] = []
    line, x = 0, 0.0
    for word in split_words(labels, ends):
        length = sum(indents[i] + widths[i] + GAP for i in word)
        for i in word:
            needed = length if i == word[0] and length <= line_width else indents[i] + widths[i]
            if x > 0 and x + needed > line_width:
                line, x = line + 1, -indents[i]
            x += indents[i]
            places.append(Place(line, x, widths[i]))
            x += widths[i] + GAP
            if ends[i]:
                line, x = line + ends[i], 0.0
    return places


def split_words(labels: Sequence[str], ends: Sequence[int]) -> list[list[int]]:
    """The token numbers of each word; a space or the end of a line begins a word."""
    words: list[list[int]] = []
    for i, label in enumerate(labels):
        if not words or label.startswith(" ") or labels[i - 1].endswith("␣") or ends[i - 1]:
            words.append([])
        words[-1].append(i)
    return words


def draw_experts(
    subject: str, labels: Sequence[str], experts: Mapping[str, Sequence[TokenExperts]]
) -> Figure:
    """Under each token a bar for each layer, which its experts share by their weights.

    A layer may have fewer tokens.
    """
    title = "The experts of each token"
    caption = (
        f"{subject}. Under a token, one bar for each sparse layer: its experts by number, the "
        "strongest first. Widths are shares of the token's weights, but the strongest has room for "
        "its number. Pale: no expert. Experts of different layers share only the number."
    )
    indent, head, row = label_width(experts), 1.6 * TEXT, 1.6 * TINY
    strip = head + row * len(experts) + 1.5 * TEXT
    least = [width_for_numbers(experts.values(), i) for i in range(len(labels))]
    places = place_tokens(labels, least, [0] * len(labels), BODY - indent)
    num_lines = places[-1].line + 1
    page = Page(BODY, strip * num_lines - 1.5 * TEXT, title, caption)
    for line in range(num_lines):
        write_names(page, list(experts), strip * line + head, row)
    for i, (line, x, width) in enumerate(places):
        page.write(indent + x, strip * line + TEXT, labels[i].strip(" "), TEXT)
        for number, of_layer in enumerate(experts.values()):
            used = of_layer[i] if i < len(of_layer) else ()
            draw_bar(page, indent + x, strip * line + head + row * number, width, row, used)
    return page.finish()


def label_width(names: Iterable[str]) -> float:
    """The width that names of layers take at the left, with a distance behind them."""
    return max(text_width(name, SMALL) for name in names) + SMALL


def write_names(page: Page, names: Sequence[str], y: float, row: float) -> None:
    """The names of layers at the left, one a row."""
    for number, name in enumerate(names):
        page.write(0, y + row * (number + 0.5) + 0.35 * SMALL, name, SMALL, color=GREY)


def width_for_numbers(layers: Iterable[Sequence[TokenExperts]], token: int) -> float:
    """How wide a token must be so that the numbers of its strongest experts fit, at most WIDEST."""
    widths = [DIGIT]
    for of_layer in layers:
        for expert, share in of_layer[token][:1] if token < len(of_layer) else ():
            widths.append(number_width(expert) / max(share, 0.01))
    return min(max(widths), WIDEST)


def number_width(number: int) -> float:
    return DIGIT * len(str(number)) + 2


def divide_bar(width: float, experts: TokenExperts) -> list[float]:
    """The widths of a token's experts: their shares, but at least the first has its number's."""
    if not experts:
        return []
    (first, share), *rest = experts
    least = max(width * share, min(number_width(first), width))
    left = (width - least) / max(1 - share, 1e-6)
    return [least, *(left * share for _, share in rest)]


def draw_bar(
    page: Page, x: float, y: float, width: float, height: float, experts: TokenExperts
) -> None:
    """The experts of a token in one layer; numbers where they fit."""
    page.paint(x, y, width, height, PALE)
    for (expert, _), part in zip(experts, divide_bar(width, experts), strict=True):
        colour = expert_colour(expert)
        page.paint(x, y, part, height, colour)
        if number_width(expert) - 1 <= part:
            write_number(page, x + part / 2, y + height / 2, str(expert), colour)
        x += part


def write_number(page: Page, x: float, y: float, text: str, background: Sequence[float]) -> None:
    """A number around a place, in a colour that can be read on the background."""
    red, green, blue = background[:3]
    ink = INK if 0.3 * red + 0.59 * green + 0.11 * blue > 0.53 else "white"
    page.write(x, y + 0.36 * TINY, text, TINY, ha="center", color=ink)


def expert_colour(expert: int) -> tuple[float, ...]:
    """One of 24 colours."""
    mixed, amount = TINTS[expert // len(HUES) % len(TINTS)]
    pairs = zip(to_rgb(HUES[expert % len(HUES)]), to_rgb(mixed), strict=True)
    return tuple((1 - amount) * own + amount * other for own, other in pairs)


def draw_load(subject: str, loads: Mapping[str, Sequence[float]]) -> Figure:
    """A row for each layer and a column for each expert: loads relative to the fair share."""
    title = "The load of each expert"
    caption = (
        f"{subject}. How often each expert of each sparse layer was chosen, relative to its fair "
        "share: 1 if all experts of the layer were chosen equally often."
    )
    indent, num_experts, row = label_width(loads), max(map(len, loads.values())), 18.0
    column = min(30.0, (BODY - indent) / num_experts)
    bottom = row * len(loads)
    page = Page(BODY, bottom + 60, title, caption)
    greatest = max(2, *(load for of_layer in loads.values() for load in of_layer))
    shown = ScalarMappable(TwoSlopeNorm(1, 0, greatest), "RdBu_r")
    write_names(page, list(loads), 0, row)
    for number, of_layer in enumerate(loads.values()):
        colours = shown.to_rgba(np.array(of_layer)).tolist()
        for expert, (load, colour) in enumerate(zip(of_layer, colours, strict=True)):
            x, y = indent + column * expert, row * number
            page.paint(x, y, column, row, colour)
            if column >= 16:
                write_number(page, x + column / 2, y + row / 2, f"{load:.1f}", colour)
    for expert in range(0, num_experts, math.ceil(14 / column)):
        x = indent + column * (expert + 0.5)
        page.write(x, bottom + 1.6 * TINY, str(expert), TINY, ha="center", color=GREY)
    page.write(0, bottom + 1.6 * TINY, "expert", SMALL, color=GREY)
    axes, label = page.axes(indent, bottom + 32, 150, 6), "load relative to the fair share"
    ticks = [0, 0.5, 1, (1 + greatest) / 2, greatest]
    page.add_colour_bar(axes, shown, label, "horizontal", ticks=ticks, format="%.1f")
    return page.finish(min(0.4, column / 50))


def draw_surprise(
    subject: str, labels: Sequence[str], ends: Sequence[int], bits: Sequence[float]
) -> Figure:
    """The text as a page. ends: lines that end behind each token; bits: of all but the first."""
    title = "The surprise of each token"
    caption = (
        f"{subject}, {sum(bits) / len(bits):.2f} bits a token on average. Surprise is −log₂ of the "
        "probability that the model gave to the token before it read it. The first token (dashed) "
        "is not predicted."
    )
    places = place_tokens(labels, [0] * len(labels), ends, BODY)
    line_height = 1.9 * TEXT
    bottom = line_height * (places[-1].line + 1)
    page = Page(BODY, bottom + 42, title, caption)
    shown = ScalarMappable(Normalize(0, max(1, *bits)), WARM)
    colours = ["white", *shown.to_rgba(np.array(bits)).tolist()]
    for label, colour, (line, x, width) in zip(labels, colours, places, strict=True):
        page.paint(x - GAP / 2, line_height * line, width + GAP, 1.5 * TEXT, colour)
        page.write(x, line_height * line + 1.08 * TEXT, label.strip(" "), TEXT)
    dashed: dict[str, Any] = {"fill": False, "edgecolor": GREY, "linestyle": (0, (3, 2))}
    corner, width = (places[0].x - 1.5, 0), places[0].width + 1.5
    page.canvas.add_patch(Rectangle(corner, width, 1.5 * TEXT, linewidth=0.7, zorder=2, **dashed))
    axes, ticks = page.axes(0, bottom + 12, 150, 6), MaxNLocator(6, integer=True)
    page.add_colour_bar(axes, shown, "surprise (bits)", "horizontal", ticks=ticks)
    return page.finish()


def draw_attention(
    subject: str,
    labels: Sequence[str],
    weights: Mapping[int, np.ndarray],
    sinks: Mapping[int, np.ndarray],
) -> Figure:
    """A square for each head; weights: (T, T) by head; sinks: (T,) by head, empty without sinks."""
    title = "Where each token attends"
    caption = (
        f"{subject}. Each row is a token, which attends to itself and to tokens before it, the "
        "columns; the darker, the more."
        + (" At the left: the share of the head's sink, which no token gets." if sinks else "")
    )
    columns, T = math.ceil(math.sqrt(len(weights))), len(labels)
    side = min(max(7.5 * T, 140), 1000 / columns)
    sink = max(side / T, 5) if sinks else 0.0
    width, height = side + 2 * sink + 12, side + 12
    indent = max(text_width(label, TINY) for label in labels) + 6
    num_rows = math.ceil(len(weights) / columns)
    body = max(400, indent + columns * width + 40)
    page = Page(body, num_rows * height + indent, title, caption)
    for number, (head, weights_TT) in enumerate(weights.items()):
        row, column = divmod(number, columns)
        axes = page.axes(indent + column * width, row * height, width - 12, side)
        image = draw_head(axes, f"head {head}", weights_TT, sinks.get(head), side, sink)
        lowest = number + columns >= len(weights)
        name_tokens(axes, labels, side, sink, column == 0, lowest)
    axes = page.axes(indent + columns * width, 0, 6, min(side, 150))
    page.add_colour_bar(axes, image, "attention weight", "vertical")
    return page.finish()


def draw_head(
    axes: Axes,
    name: str,
    weights_TT: np.ndarray,
    sinks_T: np.ndarray | None,
    side: float,
    sink: float,
) -> ScalarMappable:
    """The weights of one head in a square, and left of it, with a gap, the share of its sink."""
    later_TT = np.triu(np.ones_like(weights_TT, dtype=bool), 1) & (weights_TT == 0)
    style: dict[str, Any] = {
        "cmap": matplotlib.colormaps["Blues"].with_extremes(bad=PALE),
        "norm": PowerNorm(0.5, 0, 1),
        "interpolation": "nearest",
    }
    if sinks_T is not None:
        axes.imshow(sinks_T[:, None], extent=(-2 * sink, -sink, side, 0), **style)
    shown_TT = np.ma.masked_where(later_TT, weights_TT)
    image = axes.imshow(shown_TT, extent=(0, side, side, 0), **style)
    axes.set(xlim=(-2 * sink, side), ylim=(side, 0), facecolor="none", aspect="auto")
    axes.spines[:].set_visible(False)
    axes.text(side - 4, 9, name, ha="right", color=GREY)
    return image


def name_tokens(
    axes: Axes, labels: Sequence[str], side: float, sink: float, at_left: bool, below: bool
) -> None:
    """The tokens beside a square and below it; where they stand too close, every second or so."""
    cell = side / len(labels)
    size = min(TINY, max(4.2, 0.9 * cell))
    numbers = range(0, len(labels), math.ceil(1.1 * size / cell))
    places, names = [cell * (i + 0.5) for i in numbers], [labels[i].strip(" ") for i in numbers]
    axes.set_yticks(places if at_left else [], names if at_left else [], fontsize=size)
    if sink:
        places, names = [-1.5 * sink, *places], ["sink", *names]
    axes.set_xticks(places if below else [], names if below else [], fontsize=size, rotation=90)


def write_figures(folder: Path, figures: Mapping[str, Figure]) -> list[Path]:
    """Write NAME.png of each name into a folder, which it makes: all, or none on an error."""
    images = {f"{name}.png": encode_png(figure) for name, figure in figures.items()}
    for name in images:
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name}: a directory stands where a picture must be written")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".look-", dir=folder) as scratch:
        for name, image in images.items():
            (Path(scratch) / name).write_bytes(image)
        return [(Path(scratch) / name).replace(folder / name) for name in images]


def encode_png(figure: Figure) -> bytes:
    canvas, png = FigureCanvasAgg(figure), io.BytesIO()
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[:, :, :3]  # nothing is transparent
    Image.fromarray(pixels).save(png, "png", dpi=(DPI, DPI))
    return png.getvalue()
