"""Our own format: what is written comes back bit for bit, and nothing is guessed."""

import json
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest
import torch
from files import REMOVED, edit_json, shards_of, tensors_of, write_tensors
from hypothesis import given
from hypothesis import strategies as st
from tiny import (
    VARIED,
    YARN,
    gqa,
    grouped_experts,
    mla,
    model_config,
    random_tokens,
    rope,
    softmax_experts,
    transformer,
)

from checkpoints import (
    CheckpointError,
    convert,
    load_model,
    load_tokenizer,
    read_config,
    save_model,
    verify,
)
from checkpoints.config_file import Fields
from checkpoints.families import native
from modeling import LayerConfig, QKNormConfig, generate
from moe import Config, ConfigError, DenseConfig, ExpertChoice, TopP
from tools.__main__ import main
from tools.make_tiny import CONFIGS

MODELS = {
    **{
        f"{name}, {mtp} modules": (config, mtp) for name, config in VARIED.items() for mtp in (0, 2)
    },
    "mla": (lambda mtp: model_config(mla(rope=rope(yarn=YARN)), mtp), 3),
    "other routers": (
        lambda mtp: model_config(
            gqa(),
            layers=tuple(
                LayerConfig(attention=gqa(), feed_forward=replace(softmax_experts(), router=router))
                for router in (
                    TopP(num_experts=5, mass=0.6, max_experts=4),
                    ExpertChoice(num_experts=5, capacity=1.5),
                )
            ),
        ),
        0,
    ),
}
every_model = pytest.mark.parametrize(("config", "mtp"), MODELS.values(), ids=MODELS)


def same(ours, theirs) -> bool:
    pair = ours.state_dict(), theirs.state_dict()
    return pair[0].keys() == pair[1].keys() and all(
        tensor.equal(pair[1][name]) and tensor.dtype == pair[1][name].dtype
        for name, tensor in pair[0].items()
    )


def load(path, **more):
    return load_model(path, progress=False, **more)


@every_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_of_no_family_comes_back_bit_for_bit(config, mtp, dtype, tmp_path):
    model = transformer(config(mtp), dtype)
    save_model(model, tmp_path / "saved", max_shard_bytes=4000)
    loaded = load(tmp_path / "saved")
    assert loaded.config == model.config
    assert same(loaded, model)
    tokens_BT = random_tokens(2, 9)
    assert loaded(tokens_BT).equal(model(tokens_BT))
    assert verify(tmp_path / "saved", values=True)[0] == []
    save_model(loaded, tmp_path / "again", max_shard_bytes=4000)
    for file in shards_of(tmp_path / "saved") + [tmp_path / "saved" / "config.json"]:
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_model_of_every_family_comes_back_bit_for_bit(family, pristine, tmp_path):
    published = load(pristine(family))
    convert(pristine(family), tmp_path / "converted", to="abacus", progress=False)
    save_model(published, tmp_path / "saved", to="abacus")
    for path in (tmp_path / "converted", tmp_path / "saved"):
        loaded = load(path)
        assert loaded.config == published.config
        assert same(loaded, published)
        assert len(loaded.mtp) == len(published.mtp)
    assert tensors_of(path).keys() == published.state_dict().keys() - {
        "head.weight" if published.config.tied_embeddings else ""
    }
    ours, theirs = load_tokenizer(tmp_path / "converted"), load_tokenizer(pristine(family))
    assert ours.stop_ids == theirs.stop_ids
    assert ours.encode("the king") == theirs.encode("the king")


def test_a_converted_model_drafts_as_before(pristine, tmp_path):
    convert(pristine(), tmp_path / "converted", to="abacus", progress=False)
    ours, theirs = load(tmp_path / "converted"), load(pristine())
    for model in (ours, theirs):
        model.double()
    drafted = generate(ours, [1, 2, 3], 12, draft_tokens=2)
    assert list(drafted) == list(generate(theirs, [1, 2, 3], 12))
    assert sum(drafted.statistics.drafted) > 0


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "gpt_oss"])
def test_it_stores_stacked_experts_in_fp8_as_if_each_were_alone(family, pristine, tmp_path):
    """A published file with one tensor per expert, quantised, is the oracle; gpt-oss has none."""
    fp8 = torch.float8_e4m3fn
    convert(pristine(family), tmp_path / "ours", dtype=fp8, to="abacus", progress=False)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    ours = load(tmp_path / "ours", dtype=torch.float32)
    assert tensors_of(tmp_path / "ours")["layers.1.feed_forward.experts.gate"].dtype == fp8
    if family != "gpt_oss":
        convert(pristine(family), tmp_path / "theirs", dtype=fp8, progress=False)
        assert same(ours, load(tmp_path / "theirs", dtype=torch.float32))
    convert(tmp_path / "ours", tmp_path / "plain", dtype=torch.float32, progress=False)
    assert same(load(tmp_path / "plain"), ours)


def test_a_tied_model_whose_file_has_another_head_keeps_that_head(pristine, tmp_path, tiny):
    path = tiny("qwen3_moe", tie_word_embeddings=True)
    tensors = tensors_of(path)
    head = tensors["model.embed_tokens.weight"] + 1
    write_tensors(path, tensors | {"lm_head.weight": head})
    convert(path, tmp_path / "ours", to="abacus", progress=False)
    loaded = load(tmp_path / "ours")
    assert not loaded.config.tied_embeddings
    assert loaded.head.weight.equal(head)


@pytest.fixture
def saved(tmp_path):
    """A saved model with MTP modules, and the description in its config.json."""
    path = tmp_path / "saved"
    save_model(transformer(model_config(mla(), mtp=1)), path)
    return path, json.loads((path / "config.json").read_text())["model"]


def at(data: Any, *steps: str | int) -> Any:
    for step in steps:
        data = data[step]
    return data


DENSE = ("layers", 0, "feed_forward")
MOE, ATTENTION = ("layers", 1, "feed_forward"), ("layers", 2, "attention")
PLANTED = {
    "unknown class": (
        *ATTENTION,
        {"class": "LightningAttention"},
        r"model.layers\[2\].attention.class = 'LightningAttention' is no config",
    ),
    "a near miss": (*MOE, {"class": "MoeConfig"}, "did you mean .*MoEConfig"),
    "no class": (*DENSE, {"class": REMOVED}, r"layers\[0\].feed_forward.class = None is no config"),
    "a class of another kind": (
        *DENSE,
        {"class": "RopeConfig"},
        "feed_forward.theta is missing",
    ),
    "missing field": (
        *ATTENTION,
        {"kv_rank": REMOVED},
        r"attention.kv_rank is missing: a file holds every",
    ),
    "missing field with a default": (*MOE, {"clamp": REMOVED}, "feed_forward.clamp is missing"),
    "further field": (*MOE, {"jitter": 0.1}, "feed_forward.jitter is no field of a MoEConfig"),
    "a string for a number": (
        *ATTENTION,
        {"kv_rank": "6"},
        "MLAConfig.kv_rank = '6': must be",
    ),
    "a float for a count": (
        *ATTENTION,
        {"kv_rank": 6.0},
        "MLAConfig.kv_rank = 6.0: must be",
    ),
    "a flag for a number": (
        *DENSE,
        {"width": True},
        r"layers.0..feed_forward: DenseConfig.width =",
    ),
    "null for a number": (*DENSE, {"width": None}, "DenseConfig.width = None: must be a whole"),
    "a list for an object": (
        *MOE,
        {"router": []},
        r"MoEConfig.router = \(\): must be of type RouterConfig",
    ),
    "an object for a list": (
        {"layers": {"class": "DenseConfig", "width": 2}},
        "ModelConfig.layers =",
    ),
    "a broken rule": (
        *MOE,
        "router",
        {"top_k": 99},
        r"layers\[1\].feed_forward.router: TopK.top_k = 99: must be <= num_experts = 8",
    ),
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_a_planted_error_is_refused_by_name(planted, saved):
    path, described = saved
    *steps, changes, said = planted
    place = at(described, *steps)
    for name, value in changes.items():
        place[name] = value
        if value is REMOVED:
            del place[name]
    edit_json(path / "config.json", model=described)
    with pytest.raises(CheckpointError, match=r"config.json: .*" + said):
        load(path)
    errors, _ = verify(path)
    assert len(errors) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": 2}, "format_version = 2, expected <= 1, or a newer program"),
        ({"format_version": "1"}, "format_version = '1', expected a whole number"),
        ({"format_version": REMOVED}, "format_version is missing"),
        ({"model": REMOVED}, "model.class is missing"),
        ({"model": 3}, "model = 3, expected an object"),
        ({"hidden_size": 8}, "hidden_size is no key of this format"),
        ({"model": {"class": "DenseConfig", "width": 2}}, "expected one of ModelConfig"),
    ],
)
def test_a_file_of_another_version_or_shape_is_refused(changes, said, saved):
    path, _ = saved
    edit_json(path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=rf"config.json: .*{said}"):
        load(path)


def test_tensors_that_the_description_does_not_have_are_refused_and_missing_ones_too(saved):
    path, described = saved
    described["layers"] = described["layers"][:2]
    edit_json(path / "config.json", model=described)
    with pytest.raises(CheckpointError, match=r"0 tensors are missing.*unexpected \(layers.2\."):
        load(path)


def every_field_is_written(described: Any, config: Any) -> bool:
    return isinstance(config, tuple) or all(
        field.name in described for field in fields(config) if field.compare
    )


numbers = st.floats(1e-6, 1e6)
counts = st.integers(1, 2**40)


@st.composite
def model_configs(draw):
    attention = draw(
        st.sampled_from([gqa(), gqa(window=3, sinks=True), mla(), mla(query_rank=None, bias=False)])
    )
    if draw(st.booleans()) and hasattr(attention, "qk_norm"):
        attention = replace(
            attention,
            qk_norm=QKNormConfig(over="all", epsilon=draw(numbers)),
            scale=draw(numbers),
            rope=rope(theta=1 + draw(numbers), amplitude=draw(numbers), yarn=YARN),
        )
    dense = DenseConfig(width=draw(counts))
    router = TopP(num_experts=5, mass=draw(st.floats(0.01, 1)), max_experts=draw(st.integers(1, 5)))
    sparse = replace(grouped_experts(), router=router)
    kinds = st.sampled_from([dense, sparse, softmax_experts()])
    layers = tuple(
        LayerConfig(attention=attention, feed_forward=kind, residual_multiplier=draw(numbers))
        for kind in draw(st.lists(kinds, min_size=1, max_size=4))
    )
    config = model_config(attention, mtp=draw(st.integers(0, 2)), layers=layers)
    return replace(config, logits_multiplier=draw(numbers), max_length=draw(counts))


@given(model_configs())
def test_what_is_spelled_out_is_read_as_the_same_description(config):
    written = json.loads(json.dumps(native.write_config(config)))
    assert native.read_config(Fields(written)) == config
    assert every_field_is_written(written["model"], config)


@dataclass(frozen=True, kw_only=True)
class Strange(Config):
    width: int
    table: Any = None
    note: str = field(default="", compare=False)

    def build(self, d_model):
        raise NotImplementedError


@pytest.mark.parametrize("value", [{"a": 1}, [1], torch.ones(1), {1}, 1j, Strange])
def test_what_no_file_can_say_is_refused_before_anything_is_written(value, tmp_path):
    config = model_config(gqa())
    layer = replace(config.layers[0], feed_forward=Strange(width=2, table=(value,)))
    with pytest.raises(ConfigError, match=r"ModelConfig.layers\[1\].feed_forward.table\[0\] = "):
        native.write_config(replace(config, layers=(config.layers[0], layer)))


def test_classes_must_be_named_and_are_then_read(tmp_path):
    config = model_config(gqa())
    layer = replace(config.layers[0], feed_forward=Strange(width=2, note="not saved"))
    with pytest.raises(ConfigError, match="feed_forward.note = 'not saved': compare=False, so it"):
        native.write_config(replace(config, layers=(layer,)))
    layer = replace(config.layers[0], feed_forward=Strange(width=2))
    written = native.write_config(replace(config, layers=(layer,)))
    assert "note" not in written["model"]["layers"][0]["feed_forward"]
    with pytest.raises(ConfigError, match=r"'Strange' is no config of this package; load_model"):
        native.read_config(Fields(written))
    assert native.read_config(Fields(written), [Strange]).layers == (layer,)


@pytest.mark.parametrize("classes", [["Strange"], [object], [Strange(width=1)]])
def test_what_is_no_class_of_a_config_is_refused(classes, saved):
    with pytest.raises(ValueError, match="is not a dataclass"):
        load(saved[0], classes=classes)


def test_a_class_may_not_take_the_name_of_another(saved):
    other = dataclass(frozen=True, kw_only=True)(type("MoEConfig", (Config,), {}))
    with pytest.raises(ValueError, match="another class of the name MoEConfig"):
        load(saved[0], classes=[other])


def test_a_changed_published_model_says_which_fields_differ_and_is_written_natively(
    pristine, tmp_path
):
    """Half of the experts are dropped, and a layer."""
    model = load(pristine("qwen3_moe"))
    kept, config = 4, model.config
    for layer in model.layers:
        if hasattr(layer.feed_forward, "router"):
            experts, router = layer.feed_forward.experts, layer.feed_forward.router
            for name in ("gate", "up", "down"):
                setattr(experts, name, torch.nn.Parameter(getattr(experts, name)[:kept].clone()))
            router.weight = torch.nn.Parameter(router.weight[:kept].clone())
    with pytest.raises(
        CheckpointError, match=r"the model differs from model.config: .* shape \[4, 42"
    ):
        save_model(model, tmp_path / "x")

    def pruned(layer: LayerConfig) -> LayerConfig:
        moe = layer.feed_forward
        if isinstance(moe, DenseConfig):
            return layer
        return replace(layer, feed_forward=replace(moe, router=replace(moe.router, num_experts=4)))

    del model.layers[2]
    model.config = replace(config, layers=tuple(map(pruned, config.layers[:2])))
    with pytest.raises(CheckpointError) as caught:
        save_model(model, tmp_path / "x")
    assert "layers has 2 elements here and 3 as published" in str(caught.value)
    assert 'save_model(model, path, to="abacus") writes it' in str(caught.value)
    model.config = config
    with pytest.raises(CheckpointError, match=r"layers.2.attention.k.weight is missing"):
        save_model(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    model.config = replace(config, layers=tuple(map(pruned, config.layers[:2])))
    save_model(model, tmp_path / "saved", to="abacus")
    loaded = load(tmp_path / "saved")
    assert same(loaded, model)
    assert loaded(random_tokens(1, 5)).equal(model(random_tokens(1, 5)))
    save_model(loaded, tmp_path / "again")  # which stays in this format
    assert same(load(tmp_path / "again"), model)


@pytest.mark.parametrize("to", ["native", "deepseek_v3", ""])
def test_another_format_is_refused(to, pristine, tmp_path):
    with pytest.raises(ValueError, match=f"to = {to!r}: expected None or 'abacus'"):
        save_model(load(pristine()), tmp_path / "x", to=to)
    with pytest.raises(ValueError, match=f"to = {to!r}: expected None or 'abacus'"):
        convert(pristine(), tmp_path / "x", to=to)


def test_every_command_works_on_it(pristine, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tools.held_out.NUM_PROMPTS", 2)  # each is continued by many tokens
    path, text = str(tmp_path / "ours"), tmp_path / "text.txt"
    text.write_text("\n\n\n".join(f"The king had {i} sons and a tree. " * 40 for i in range(5)))
    assert main(["convert", str(pristine()), path, "--to", "abacus"]) == 0
    assert main(["verify", path, "--values"]) == 0
    assert main(["describe", path]) == 0
    assert "abacus" in capsys.readouterr().out
    asked = ["generate", "--model", path, "--prompt", "the king", "--max-new-tokens", "4", "--json"]
    assert main([*asked, "--draft-tokens", "1"]) == 0
    ours = json.loads(capsys.readouterr().out)
    asked[2] = str(pristine())
    assert main(asked) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == ours["ids"]
    assert main(["probe-mtp", path, str(text), "--max-tokens", "40", "--draft-tokens", "2"]) == 0
    sizes = ["--passages", "2", "--prompt-tokens", "8", "--new-tokens", "4", "--draft-tokens", "1"]
    drafts = ["--sections", "drafts", "--text", str(text)]
    assert main(["bench", path, *drafts, *sizes]) == 0
    training = ["--text", str(text), "--steps", "2", "--batch-size", "2", "--sequence-length", "16"]
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", *training, *out, "--start-from", path]) == 0
    trained = load(tmp_path / "run" / "model")
    assert trained.config == load(path).config
    assert not same(trained, load(path))
    assert read_config(tmp_path / "run" / "model").published["model_type"] == "abacus"
