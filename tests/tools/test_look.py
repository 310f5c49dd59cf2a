"""look: the data of its pictures, recomputed plainly; that they show it whole; what it refuses."""

import io
import math
import struct
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from files import SHIPPED, TALE
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from outside import DecayConfig
from tiny import gqa, mla, model_config, random_tokens, transformer, windows_and_sinks

from checkpoints import load_tokenizer
from modeling import LayerConfig, record_attention
from moe import ExpertChoice, MoEConfig, Routing, record_routing
from tools import draw
from tools.__main__ import main
from tools.corpus import train_vocabulary
from tools.look import (
    NO_TEXT,
    choose_layer,
    draw_pictures,
    make_label,
    observe,
    rank_experts,
    read_pieces,
    read_tokens,
)
from tools.make_tiny import SAMPLE_TEXT

NAMES = ["experts", "load", "attention", "surprise"]
ODD = 'It costs $5 — naïve 漢字 🙂\n\n\tdef f(x):\n    "$x^2$"'


@pytest.fixture(autouse=True)
def _own_warnings(monkeypatch):
    """`main` shows warnings its own way; give the way of the tests back afterwards."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.fixture
def look(capsys, tmp_path):
    """look(model, text, *options): (exit code, stdout, stderr); text: what the file has."""

    def run(model, text, *options):
        (tmp_path / "text.txt").write_text(text, encoding="utf-8")
        arguments = (model, tmp_path / "text.txt", "--out", tmp_path / "out", *options)
        return main(["look", *map(str, arguments)]), *capsys.readouterr()

    return run


# what a model did


def test_surprise_is_the_logarithm_of_what_the_logits_say():
    model, tokens_N = transformer(model_config(gqa())), random_tokens(1, 12)[0]
    logits = model(tokens_N[None])[0].tolist()
    expected = [
        math.log2(sum(math.exp(value) for value in row)) - row[token] / math.log(2)
        for row, token in zip(logits, tokens_N[1:].tolist(), strict=False)
    ]
    assert observe(model, tokens_N, None).bits_n.tolist() == pytest.approx(expected)


def test_the_routing_of_every_sparse_layer_is_observed_mtp_modules_too():
    model, tokens_1N = transformer(model_config(mla(), mtp=2)), random_tokens(1, 9)
    with record_routing(model) as recorded:
        model.mtp_logits(tokens_1N)
    seen = observe(model, tokens_1N[0], 1).routings
    assert list(seen) == ["layer 1", "layer 2", "layer 3 (MTP)", "layer 4 (MTP)"]
    assert [len(routing.experts_NK) for routing in seen.values()] == [9, 9, 8, 7]
    for routing, expected in zip(seen.values(), recorded.values(), strict=True):
        assert torch.equal(routing.experts_NK, expected.experts_NK)
        assert torch.equal(routing.weights_NK, expected.weights_NK)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_the_attention_of_the_layer_is_observed_with_its_sinks(layer):
    model, tokens_1N = transformer(windows_and_sinks(mtp=1)), random_tokens(1, 9)
    with record_attention(model) as recorded:
        model.mtp_logits(tokens_1N)
    seen = observe(model, tokens_1N[0], layer)
    assert seen.layer == ("layer 3 (MTP)" if layer == 3 else f"layer {layer}")
    assert torch.equal(seen.attention.weights_BHTS, recorded[layer].weights_BHTS)
    assert torch.equal(seen.attention.sinks_BHT, recorded[layer].sinks_BHT)


def test_a_prediction_that_saw_later_tokens_is_told():
    chosen = MoEConfig(router=ExpertChoice(num_experts=4, capacity=2.0), expert_width=5)
    layer = LayerConfig(attention=gqa(), feed_forward=chosen)
    model = transformer(model_config(gqa(), layers=(layer,)))
    with pytest.warns(UserWarning, match="the surprise is no prediction"):
        observe(model, random_tokens(1, 9)[0], 0)


def test_experts_are_ranked_by_their_weights_and_empty_slots_are_left_out():
    weights_NK = torch.tensor([[0.2, 0.6, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, 1.0]])
    experts_NK = torch.tensor([[3, 1, 4], [4, 4, 4], [2, 0, 3]])
    scores_NE = torch.zeros(3, 4)
    ranked = rank_experts(Routing(weights_NK, experts_NK, scores_NE, scores_NE))
    assert [[expert for expert, _ in token] for token in ranked] == [[1, 3], [], [0, 2, 3]]
    shares = [share for token in ranked for _, share in token]
    assert shares == pytest.approx([0.75, 0.25, 0.5, 0.25, 0.25])


def without_weights(*layers):
    """A model whose attention in these layers, and its MTP module, has no weights."""
    config = model_config(gqa(), mtp=1)
    decay = DecayConfig(num_heads=2, head_width=3)
    mixed = [
        replace(layer, attention=decay) if number in layers else layer
        for number, layer in enumerate(config.layers)
    ]
    module = replace(config.mtp.blocks[0], attention=decay)
    return transformer(
        replace(config, layers=tuple(mixed), mtp=replace(config.mtp, blocks=(module,)))
    )


def test_the_attention_of_the_last_layer_that_has_weights_is_shown():
    assert choose_layer(without_weights(2), None, 9) == 1
    assert choose_layer(without_weights(0), None, 9) == 2
    with pytest.warns(UserWarning, match=r"no attention\.png"):
        assert choose_layer(without_weights(0, 1, 2), None, 9) is None


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (2, "--layer 2: its attention has no weights to draw; layers that have: 0, 1"),
        (3, "--layer 3: its attention has no weights"),
        (4, "--layer 4: the model has layers 0 to 3"),
        (-1, "--layer -1: the model has layers 0 to 3"),
    ],
)
def test_a_layer_that_cannot_be_shown_is_named(layer, told):
    with pytest.raises(ValueError, match=told):
        choose_layer(without_weights(2), layer, 9)


def test_a_module_that_reads_no_token_of_the_text_is_named():
    model = transformer(model_config(gqa(), mtp=3))
    assert choose_layer(model, 4, 3) == 4
    with pytest.raises(ValueError, match="--layer 5: needs a text of at least 4 tokens"):
        choose_layer(model, 5, 3)


# the tokens' texts


def test_pieces_join_to_the_text_and_bytes_wait_for_their_character():
    tokenizer = load_tokenizer(SHIPPED)
    ids = tokenizer.encode(ODD)
    pieces = read_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == ODD
    smile = pieces.index("🙂")
    assert pieces[smile - 3 : smile] == ["", "", ""]
    assert set(read_pieces(tokenizer, ids[:smile])[-1]) == {"\N{REPLACEMENT CHARACTER}"}  # cut


def test_control_tokens_have_their_names(pristine):
    tokenizer = load_tokenizer(pristine())
    assert read_pieces(tokenizer, tokenizer.encode("Once"))[0] == "<s>"


@pytest.mark.parametrize(
    ("piece", "label"),
    [
        (" king", " king"),
        ("", NO_TEXT),
        ("   ", "␣␣␣"),
        ("a b ", "a b␣"),
        (".\n\n", ".↵↵"),
        ("\n  ", "↵␣␣"),
        ("\tif\r", r"⇥if\r"),
        ("\u200d\x00", r"\u200d\x00"),
        ("-" * 99, "-" * 23 + "…"),
        (" " * 99, "␣" * 23 + "…"),
    ],
)
def test_what_cannot_be_seen_has_a_sign(piece, label):
    assert make_label(piece) == label


tokens = st.lists(
    st.tuples(
        st.text("abc", min_size=1, max_size=9), st.integers(0, 2), st.integers(0, 40), st.booleans()
    ),
    min_size=1,
    max_size=20,
)


@given(tokens)
def test_tokens_are_set_in_order_without_overlap_and_words_stay_whole(tokens):
    labels = [" " * spaces + text for text, spaces, _, _ in tokens]
    least = [width for _, _, width, _ in tokens]
    ends = [int(end) for *_, end in tokens]
    places = draw.place_tokens(labels, least, ends, 120)
    words = draw.split_words(labels, ends)
    assert [i for word in words for i in word] == list(range(len(labels)))
    for i, (line, x, width) in enumerate(places):
        assert width >= max(least[i], draw.text_width(labels[i].strip(" "), draw.TEXT) - 1e-6)
        assert x >= 0
        assert x + width <= 120 or x == 0 or i == 0 or ends[i - 1]
        if i and places[i - 1].line == line:
            assert not ends[i - 1]
            assert x > places[i - 1].x + places[i - 1].width
    for word in words:
        length = sum(places[i].width + draw.GAP for i in word)
        if length <= 100:
            assert len({places[i].line for i in word}) == 1


# the pictures


def read_size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


def test_every_picture_is_written_and_its_path_printed(look, tmp_path):
    code, out, err = look(SHIPPED, ODD)
    assert (code, out.split()) == (0, [str(tmp_path / "out" / f"{name}.png") for name in NAMES])
    assert err == "note: 3 characters that no installed font has are shown as boxes: 字 漢 🙂\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"{name}.png" for name in NAMES
    )
    for name in NAMES:
        png = (tmp_path / "out" / f"{name}.png").read_bytes()
        width, height = read_size(png)
        assert 800 < width < 3000, name
        assert 300 < height < 3000, name
        assert 10_000 < len(png) < 500_000, name


def make_figures(model, pieces, layer=0, heads=(0, 2, 5)):
    """The figures that would be written, by their names; none of them may cause a warning."""
    made = {}
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr(draw, "write_figures", lambda folder, figures: made.update(figures))
        tokens_N = random_tokens(1, len(pieces), model.config.vocab_size)[0]
        draw_pictures(Path(), "a model", pieces, observe(model, tokens_N, layer), list(heads))
    return made


def texts_of(figure):
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def overlaps(boxes):
    """The pairs of boxes, (left, bottom, right, top) each, that have more than 1.5 in common."""
    boxes = np.reshape(boxes, (-1, 4))
    starts = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    common = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - starts
    return np.argwhere(np.triu((common > 1.5).all(axis=2), 1))


def check_layout(figure):
    """No two texts overlap, nor do two heat maps; no text leaves the figure."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # places the labels of axes
    texts = texts_of(figure)
    boxes = np.array([text.get_window_extent(renderer).extents for text in texts])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= figure.bbox.extents[2:]).all()
    assert [[texts[i].get_text() for i in pair] for pair in overlaps(boxes)] == []
    _, *maps = figure.axes
    assert len(overlaps([axes.bbox.extents for axes in maps])) == 0


@pytest.mark.parametrize("length", [2, 45])
def test_every_token_is_shown_and_nothing_overlaps_or_is_clipped(length):
    tokenizer = load_tokenizer(SHIPPED)
    pieces = read_pieces(tokenizer, tokenizer.encode(TALE)[:length])
    figures = make_figures(transformer(windows_and_sinks(mtp=1)), pieces)
    assert list(figures) == NAMES
    labels = [make_label(piece).strip(" ") for piece in pieces]
    for name, figure in figures.items():
        check_layout(figure)
        shown = [text.get_text() for text in texts_of(figure)]
        if name != "load":
            assert all(shown.count(label) >= labels.count(label) for label in labels), name
    assert [text.get_text() for text in texts_of(figures["attention"])].count(
        "sink"
    ) == 2  # of three heads


def test_a_bar_is_divided_by_shares_and_the_strongest_has_room_for_its_number():
    assert draw.divide_bar(40, []) == []
    assert draw.divide_bar(40, [(3, 1.0)]) == [40]
    assert draw.divide_bar(40, [(3, 0.75), (12, 0.25)]) == pytest.approx([30, 10])
    first, *others = draw.divide_bar(40, [(255, 0.1), *((e, 0.1) for e in range(9))])
    assert first == draw.number_width(255) > 4
    assert others == pytest.approx([(40 - first) / 9] * 9)
    nearly_equal = [(100 + e, 1 / 8) for e in range(8)]
    figure = draw.draw_experts("a model", ["a", " b"], {"layer 0": [nearly_equal, []]})
    assert [text.get_text() for text in texts_of(figure)][-4:] == ["layer 0", "a", "100", "b"]


def test_a_square_shows_the_weights_of_its_head_and_beside_them_its_sink():
    weights_TT = np.tril(np.random.default_rng(0).random((4, 4)))
    weights_TT[2, 1] = 0.0
    head = Figure().add_subplot()
    image = draw.draw_head(head, "head 0", weights_TT, weights_TT[:, 0], side=40.0, sink=10.0)
    sink, square = head.images
    assert square is image
    assert np.array_equal(square.get_array().filled(-1), np.where(np.tri(4) > 0, weights_TT, -1))
    assert np.array_equal(sink.get_array()[:, 0], weights_TT[:, 0])
    assert (sink.get_extent(), square.get_extent()) == ([-20, -10, 40, 0], [0, 40, 40, 0])


def test_a_dollar_begins_no_formula_and_a_foreign_matplotlibrc_changes_nothing(monkeypatch):
    monkeypatch.setitem(draw.matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setitem(draw.matplotlib.rcParams, "font.size", 40.0)
    figures = make_figures(transformer(model_config(gqa())), ["$\\frac$", " $x^2$"])
    for figure in figures.values():
        check_layout(figure)
        assert len(draw.encode_png(figure)) > 5000
    assert draw.matplotlib.rcParams["font.size"] == 40.0


def test_a_model_without_sparse_layers_has_fewer_pictures():
    config = model_config(gqa())
    dense = replace(config, layers=config.layers[:1])
    with pytest.raises(UserWarning, match=r"no sparse layers: no experts\.png, no load\.png"):
        make_figures(transformer(dense), ["a", " b"])


def test_pictures_of_another_model_that_stay_are_named(look, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "experts.png").write_bytes(b"of another model")
    code, out, err = look(SHIPPED, "Once upon a time", "--layers", "1")  # a dense one
    assert code == 0
    assert "experts.png was there before and is not of this model" in err
    assert "load.png was" not in err
    assert "experts.png" not in out


def test_characters_that_the_font_lacks_come_from_other_fonts():
    assert draw.find_fonts(set("aβ")) == ([draw.FONT], set())
    families, missing = draw.find_fonts({"a", "\U0001d49c", "漢"})  # a script letter of mathematics
    assert families[0] == draw.FONT
    assert len(families) == 2
    assert missing == {"漢"}


def test_experts_have_colours_of_their_own_with_readable_numbers():
    assert len({draw.expert_colour(expert) for expert in range(24)}) == 24
    assert draw.expert_colour(24) == draw.expert_colour(0)


def test_pictures_that_cannot_be_written_leave_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "experts.png").write_text("before")
    written = []

    def fail_at_the_third(path, data):
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device", str(path))
        io.FileIO(path, "w").write(data)

    monkeypatch.setattr(Path, "write_bytes", fail_at_the_third)
    with pytest.raises(OSError, match="No space left on device"):
        draw.write_figures(tmp_path, {name: Figure(figsize=(1, 1)) for name in NAMES})
    assert len(written) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["experts.png"]
    assert (tmp_path / "experts.png").read_text() == "before"


def test_nothing_is_made_where_nothing_can_be_drawn(look, tmp_path, monkeypatch):
    def refuse(figure):
        raise ValueError("too large")

    monkeypatch.setattr(draw, "encode_png", refuse)
    assert look(SHIPPED, "Once upon a time")[0] == 2
    assert not (tmp_path / "out").exists()


# the command


def test_the_text_may_come_from_stdin_and_is_cut_with_a_note(monkeypatch):
    tokenizer = load_tokenizer(SHIPPED)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße".encode())))
    with pytest.warns(
        UserWarning, match=r"-: the first 3 of . tokens are shown \(--max-tokens 3\)"
    ):
        assert read_tokens(tokenizer, Path("-"), 3, 512) == tokenizer.encode("Grüße")[:3]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße".encode("latin-1"))))
    with pytest.raises(ValueError, match="stdin: not UTF-8 text"):
        read_tokens(tokenizer, Path("-"), 3, 512)


def test_a_text_longer_than_the_model_is_cut_with_a_note(look, tiny):
    path = tiny("gpt_oss", max_position_embeddings=8)
    code, _, err = look(path, SAMPLE_TEXT, "--layer", 0, "--heads", 5, 0)
    assert code == 0
    assert "the first 8 of" in err
    assert err.endswith("tokens are shown (the model reads no more)\n")


@pytest.mark.parametrize(
    ("text", "options", "told"),
    [
        ("", (), "0 tokens of text, at least 2 needed"),
        ("a", (), "1 tokens of text, at least 2 needed"),
        ("Once upon", ("--max-tokens", 1), "--max-tokens 1: must be >= 2"),
        ("Once upon", ("--layer", 9), "--layer 9: the model has layers 0 to 4"),
        ("Once upon", ("--heads", 0, 4), "--heads 4: layer 3 has heads 0 to 3"),
        ("Once upon", ("--out", __file__), f"{__file__} is a file"),
        ("Once upon", ("--out", f"{__file__}/a/b"), f"{__file__} is a file"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(look, text, options, told):
    code, out, err = look(SHIPPED, text, *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err


def test_a_tokenizer_of_another_model_is_one_line(look, tiny):
    path = tiny()
    (path / "tokenizer.model").write_bytes(train_vocabulary(SAMPLE_TEXT, 330))
    code, _, err = look(path, SAMPLE_TEXT)
    assert code == 2
    assert "330 ids and the model 320: they do not belong together" in err


def test_without_matplotlib_one_line_tells_what_to_install(look, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert look(SHIPPED, "Once upon") == (
        2,
        "",
        'error: matplotlib, which draws, is not installed: pip install -e ".[look]"\n',
    )
