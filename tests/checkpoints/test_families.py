"""Every family has its test file, and what that says of the family in data holds.

A file tests/checkpoints/families/test_<adapter>.py has, as data:

  MODEL_TYPES  the model_types of the adapter
  PUBLISHED    release -> its config.json
  FIGURES      release -> billions of parameters: all (MTP modules apart), used per token, of them
               without the input embedding; None where it is not known
  NAMES        tensor -> shape, written by hand, of the first release: what is there once, one layer
               of each kind (of its experts the first and the last), one MTP module
  PEERS        variant -> what makes the family's transformers config a tiny model; test_parity.py
               goes through them. Without any, the file has its own `test_logits_equal_...`
  layouts      a tiny checkpoint's tensors as transformers writes them -> the same content in every
               other layout that the adapter accepts, by name

and a `test_trap_<number>_...` for the places in tests/TRAPS.md that concern it.
"""

import ast
import io
import json
import re
import tokenize
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from files import ROOT, tensors_of, write_tensors
from published import entries_of, family_tests, write_peer
from traps import build_on_meta, check_refused, read

from checkpoints import CheckpointError, load_model, read_config, unread_keys
from checkpoints.families import FAMILIES, MECHANISMS, NOT_YET, native
from modeling import ModelConfig
from moe import DenseConfig
from tools.describe import count_parameters
from tools.make_tiny import CONFIGS

MODULES = family_tests()
PUBLISHED_TYPES = sorted(FAMILIES.keys() - {native.MODEL_TYPE})
every_family = pytest.mark.parametrize("family", MODULES, ids=lambda module: module.__name__[5:])
RELEASES = [
    pytest.param(family, name, id=f"{family.__name__[5:]}: {name}")
    for family in MODULES
    for name in getattr(family, "PUBLISHED", {})
]
every_release = pytest.mark.parametrize(("family", "release"), RELEASES)


@pytest.mark.parametrize("model_type", PUBLISHED_TYPES)
def test_exactly_one_file_tests_a_family_and_is_named_after_its_adapter(model_type):
    (family,) = [module for module in MODULES if model_type in module.MODEL_TYPES]
    adapters = ROOT / "checkpoints" / "families"
    assert (adapters / f"{family.__name__.removeprefix('test_')}.py").is_file()


@every_family
def test_nothing_is_left_unsaid_of_a_family(family):
    for name in ("MODEL_TYPES", "PUBLISHED", "FIGURES", "NAMES"):
        assert getattr(family, name), name
    assert set(family.MODEL_TYPES) <= FAMILIES.keys()
    assert family.FIGURES.keys() == family.PUBLISHED.keys()
    assert {raw["model_type"] for raw in family.PUBLISHED.values()} == set(family.MODEL_TYPES)
    own_parity = any(name.startswith("test_logits_equal") for name in dir(family))
    assert family.PEERS or own_parity
    assert callable(family.layouts)
    traps = [name for name in dir(family) if name.startswith("test_trap_")]
    assert traps
    assert all(re.match(r"test_trap_\d\d_\w", name) for name in traps)


# --- configs


@every_release
def test_a_published_config_is_read_and_leaves_out_nothing_that_matters(tmp_path, family, release):
    raw = family.PUBLISHED[release]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path) == read(raw)
    for key in MECHANISMS.keys() & set(unread_keys(tmp_path)):
        assert raw[key] is not True, key
        assert raw[key] in (None, False, [], 0, 1, "default"), key


@every_family
def test_a_key_that_changes_other_families_is_read_or_refused_and_never_passed_over(
    tmp_path, family
):
    raw = next(iter(family.PUBLISHED.values()))
    for key in MECHANISMS:
        for something in (True, 7, 0.25, [1], "some"):
            (tmp_path / "config.json").write_text(json.dumps(raw | {key: something}))
            with suppress(CheckpointError):
                assert key not in unread_keys(tmp_path), (key, something)


@every_release
def test_parameters_add_up_to_the_known_totals(family, release):
    """To the last digit that is known."""
    counted = count_parameters(build_on_meta(family.PUBLISHED[release]))
    kinds = ("total", "active", "active_without_embedding")
    for kind, known in zip(kinds, family.FIGURES[release], strict=True):
        if known is not None:
            digits = len(str(known).partition(".")[2])
            assert counted[kind] / 1e9 == pytest.approx(known, abs=0.501 * 10**-digits), kind


def changed(raw: dict, **changes) -> dict:
    """The same config.json with keys changed where those of the text model stand."""
    if "text_config" in raw:
        return raw | {"text_config": raw["text_config"] | changes}
    return raw | changes


PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}


@every_family
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE}),
        ("rope_theta", [1e4, 1e6]),
        ("no_rope_layers", [1, 0]),
    ],
)
def test_trap_10_rope_that_differs_between_layers_is_refused(tmp_path, family, key, value):
    raw = next(iter(family.PUBLISHED.values()))
    check_refused(tmp_path, key, changed(raw, **{key: value}))


@every_family
def test_trap_43_a_scale_of_the_values_is_refused(tmp_path, family):
    raw = next(iter(family.PUBLISHED.values()))
    said = "attention_value_scale = 0.707 changes the model"
    check_refused(tmp_path, said, changed(raw, attention_value_scale=0.707))


WRONG_NUMBERS = (0, -1, 2, 7, 99999, 10**7, 1.5, -0.5)
OUR_NAMES = re.compile(
    r"\w+Config\b|\bTopK\b|\b(top_k|num_groups|groups_kept|head_width|kv_heads)\b"
)


@pytest.mark.parametrize("model_type", PUBLISHED_TYPES)
def test_an_error_about_a_config_names_the_published_key(tmp_path, model_type):
    """Also where rules between fields or numbers computed from several are broken."""
    published = CONFIGS[model_type]
    for path, key in numeric_keys(published):
        for value in WRONG_NUMBERS:
            changed = section = deepcopy(published)
            for part in path:
                section = section[part]
            section[key] = value
            (tmp_path / "config.json").write_text(json.dumps(changed))
            try:
                read_config(tmp_path)
            except CheckpointError as error:
                said = str(error).removeprefix(f"{tmp_path}/config.json: ")
                # a list may be too short for so many layers: then the list is named
                assert key in said or key == "num_hidden_layers", said
                assert not OUR_NAMES.search(said), said


def numeric_keys(section, path=()):
    """(path, key) of every number in a config."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from numeric_keys(value, (*path, key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path, key


@pytest.mark.parametrize("model_type", sorted(NOT_YET))
def test_what_only_looks_like_a_family_is_refused_by_name(tmp_path, model_type):
    raw = CONFIGS["deepseek_v3"] | {"model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        CheckpointError, match=f"model_type {model_type} is not supported"
    ) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


# --- names


@every_family
def test_the_files_of_a_release_are_read_to_the_last_name(family):
    config = read(next(iter(family.PUBLISHED.values())))
    expected = expanded(family.NAMES, config)
    loaded = entries_of(config, present=expected.keys())
    assert {entry.published: list(entry.shape) for entry in loaded} == expected


@every_family
def test_what_is_saved_has_the_names_of_the_release(family):
    config = read(next(iter(family.PUBLISHED.values())))
    short = replace(config, layers=config.layers[:4])
    saved = {kind_of(entry.published): list(entry.shape) for entry in entries_of(short)}
    assert saved == {kind_of(name): shape for name, shape in family.NAMES.items()}


def kind_of(name: str) -> str:
    """The same for names that differ in their numbers alone."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name)


LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")
EXPERT = re.compile(r"(.*\bexperts\.)(\d+)(\..*)")


def expanded(names: dict[str, list[int]], config: ModelConfig) -> dict[str, list[int]]:
    """All tensors of a model, of which one layer of each kind and two of its experts are listed."""
    kinds = kinds_of_layers(config)
    found = {}
    for name, shape in names.items():
        layer = LAYER.fullmatch(name)
        if layer is None:
            found[name] = shape
            continue
        like = [i for i, kind in enumerate(kinds) if kind == kinds[int(layer[2])]]
        for i in like:
            found |= {n: shape for n in all_experts(f"{layer[1]}{i}{layer[3]}", config, i)}
    return found


def all_experts(name: str, config: ModelConfig, layer: int) -> list[str]:
    expert = EXPERT.fullmatch(name)
    if expert is None:
        return [name]
    count = (*config.layers, *config.mtp.blocks)[layer].feed_forward.router.num_experts
    assert int(expert[2]) in (0, count - 1), "the first or the last one"
    return [f"{expert[1]}{e}{expert[3]}" for e in range(count)]


def kinds_of_layers(config: ModelConfig) -> list[str]:
    kinds = [
        "dense" if isinstance(x.feed_forward, DenseConfig) else "sparse" for x in config.layers
    ]
    return kinds + ["mtp"] * len(config.mtp.blocks)


@every_family
def test_a_layer_of_each_kind_is_written_down(family):
    config = read(next(iter(family.PUBLISHED.values())))
    kinds = kinds_of_layers(config)
    listed = {int(match[2]) for name in family.NAMES if (match := LAYER.fullmatch(name))}
    apart = {"mtp"} if any(name.startswith("model.mtp_") for name in family.NAMES) else set()
    assert sorted(kinds[layer] for layer in listed) == sorted(set(kinds) - apart)


# --- layouts


@pytest.fixture(scope="module")
def written(tmp_path_factory, pristine):
    """written(family): a tiny checkpoint as transformers writes it, or as we do where it cannot."""
    paths: dict[str, Path] = {}

    def checkpoint(family) -> Path:
        name = family.__name__
        if name not in paths and family.PEERS:
            paths[name] = tmp_path_factory.mktemp(name) / "peer"
            write_peer(family, next(iter(family.PEERS)), paths[name])
        elif name not in paths:
            paths[name] = pristine(family.MODEL_TYPES[0])
        return paths[name]

    return checkpoint


def rewritten(path: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text((path / "config.json").read_text())
    write_tensors(target, tensors)
    return target


@pytest.mark.filterwarnings("ignore:the config announces")
@every_family
def test_every_layout_loads_to_the_same_model_to_the_bit(tmp_path, written, family):
    path = written(family)
    expected = load_model(path, progress=False).state_dict()
    layouts = family.layouts(tensors_of(path))
    assert layouts
    for layout, tensors in layouts.items():
        assert tensors.keys() != tensors_of(path).keys(), layout
        state = load_model(
            rewritten(path, tmp_path / "other", tensors), progress=False
        ).state_dict()
        assert state.keys() == expected.keys()
        for name, tensor in state.items():
            assert tensor.equal(expected[name]), (layout, name)


@pytest.mark.filterwarnings("ignore:the config announces")
@every_family
def test_trap_28_no_layout_is_read_with_a_tensor_missing_or_left_over(tmp_path, written, family):
    """One tensor of every kind taken away, then one that nothing knows of added."""
    path, tried = written(family), set()
    for tensors in (tensors_of(path), *family.layouts(tensors_of(path)).values()):
        needed = one_of_each_kind(tensors, FAMILIES[family.MODEL_TYPES[0]].ignored)
        for name in needed - tried:
            fewer = {key: tensor for key, tensor in tensors.items() if key != name}
            with pytest.raises(CheckpointError, match=r"do not fit config.json: [1-9]"):
                load_model(rewritten(path, tmp_path / "other", fewer), progress=False)
        more = tensors | {"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(2)}
        with pytest.raises(CheckpointError, match=r"q_proj.weight_scale_inv is "):
            load_model(rewritten(path, tmp_path / "other", more), progress=False)
        tried |= needed


def one_of_each_kind(tensors, ignored: tuple[str, ...]) -> set[str]:
    """One name of those that differ in their numbers alone, the ignored ones left out."""
    needed = [name for name in tensors if not any(fnmatchcase(name, known) for known in ignored)]
    return set({kind_of(name): name for name in sorted(needed)}.values())


# --- where knowledge of families stands


ADAPTERS = sorted((ROOT / "checkpoints" / "families").glob("*.py"))
SHARED = ("__init__", "deepseek", "llama")  # no families themselves


@pytest.mark.parametrize("file", ADAPTERS, ids=lambda file: file.stem)
def test_an_adapter_has_at_most_130_lines(file):
    if file.stem not in SHARED:
        assert len(file.read_text().splitlines()) <= 130


SOURCES = [*ROOT.glob("moe/*.py"), *ROOT.glob("modeling/*.py")]
NAMES_OF_FAMILIES = {
    *PUBLISHED_TYPES,
    *NOT_YET,
    *("deepseek", "dots", "ernie", "flex", "glm", "gpt", "granite", "granitemoe", "hunyuan"),
    *("hy3", "kimi", "llama", "minimax", "mistral", "mixtral", "moonlight", "moonshot"),
    *("olmo", "olmoe", "oss", "qwen", "solar", "transformers"),
}


@pytest.mark.parametrize("source", SOURCES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_the_core_names_no_family_outside_its_remarks(source):
    words = words_of_code(source.read_text())
    assert words
    assert not words & NAMES_OF_FAMILIES


def words_of_code(text: str) -> set[str]:
    """Every word of names and strings, lower case, without comments and docstrings."""
    tree = ast.parse(text)
    remarks = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            remarks |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    words = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.start[0] not in remarks and token.type in (tokenize.NAME, tokenize.STRING):
            spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", token.string).lower()
            identifiers = re.findall(r"[a-z0-9_]+", spaced)
            words |= {*identifiers, *(part for word in identifiers for part in word.split("_"))}
            words |= {re.sub(r"\d+$", "", part) for word in identifiers for part in word.split("_")}
    return words


@pytest.mark.parametrize(
    "line", ["x = qwen2_moe", 'kind = "DeepseekV3"', "def glm(): pass", "x.mixtral_scale = 1"]
)
def test_the_names_of_families_would_be_found(line):
    assert words_of_code(line) & NAMES_OF_FAMILIES
