"""What a user does wrong is refused by name, before anything is written, or it works.

The parts are like a researcher's first ones: buffers of whole numbers, tied parameters, a class
with a name that is taken, a router that returns something else.
"""

import enum
import json
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from files import edit_json
from tiny import (
    agreeable,
    gqa,
    mla,
    model_config,
    random_tokens,
    sized,
    softmax_experts,
    transformer,
)
from torch import nn

import moe
from checkpoints import CheckpointError, load_model, save_model, verify
from modeling import (
    EntryCache,
    LayerConfig,
    Transformer,
    generate,
    generate_batch,
    mtp_loss,
)
from moe import Config, ConfigError, Count, TopK
from tools.__main__ import main

D = 11


@dataclass(frozen=True, kw_only=True)
class PartConfig(Config):
    """Builds any module: the class attribute `module`."""

    width: Count = 3

    def build(self, d_model):
        return PART[0](d_model)


PART: list[Any] = [None]


def with_part(module, attention=None):
    """A model whose first feed-forward layer is this module, built by `module(d_model)`."""
    PART[0] = module
    layer = LayerConfig(attention=attention or gqa(), feed_forward=PartConfig())
    return Transformer(sized(layers=(layer, layer)))


def reload(model, path, **options):
    save_model(model, path)
    return load_model(path, classes=[PartConfig], progress=False, **options)


# --- tensors of an own part


class Permute(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.register_buffer("order", torch.arange(d_model).flip(0))
        self.register_buffer("keep", torch.arange(d_model) % 2 == 0)

    def forward(self, x_BTD):
        return x_BTD[..., self.order] * self.keep


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_buffers_of_whole_numbers_and_flags_are_saved_and_loaded_as_they_are(tmp_path, dtype):
    model = with_part(Permute)
    model.layers[0].feed_forward.order.copy_(torch.randperm(D))
    again = reload(model, tmp_path / "saved", dtype=dtype)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            assert again.state_dict()[name].equal(tensor), name
            assert again.state_dict()[name].dtype == tensor.dtype, name
    assert again.embed.weight.dtype == (dtype or torch.float32)
    if dtype is None:
        tokens_BT = random_tokens(2, 5)
        assert again(tokens_BT).equal(model(tokens_BT))


def lost_buffer(d_model):
    part = nn.Linear(d_model, d_model, bias=False)
    part.register_buffer("table", torch.arange(d_model), persistent=False)
    return part


def lost_attribute(d_model):
    part = nn.Linear(d_model, d_model, bias=False)
    part.table = torch.arange(d_model)
    return part


@pytest.mark.parametrize("part", [lost_buffer, lost_attribute])
def test_a_tensor_that_no_file_holds_is_refused_when_saving(part, tmp_path):
    with pytest.raises(CheckpointError, match="feed_forward.table is in no file, so it cannot be"):
        save_model(with_part(part), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_part_that_reads_values_while_it_is_built_is_refused_when_saving(tmp_path):
    def part(d_model):
        made = nn.Linear(d_model, d_model, bias=False)
        made.largest = float(torch.arange(d_model).max())
        return made

    with pytest.raises(CheckpointError, match="cannot be built on the meta device, where no value"):
        save_model(with_part(part), tmp_path / "saved")


def test_parameters_that_are_one_and_would_be_two_are_refused(tmp_path):
    def part(d_model):
        made = nn.Sequential(nn.Linear(d_model, d_model), nn.Linear(d_model, d_model))
        made[1].weight = made[0].weight
        return made

    told = r"feed_forward.1.weight and layers.0.feed_forward.0.weight are one parameter"
    with pytest.raises(CheckpointError, match=told):
        save_model(with_part(part), tmp_path / "saved")


def test_another_head_of_a_tied_model_is_not_lost(tmp_path):
    model = transformer(model_config(gqa(), tied_embeddings=True), torch.float32)
    model.head = nn.Linear(D, 23, bias=False)
    with pytest.raises(CheckpointError, match="head.weight is another parameter: set tied_embedd"):
        save_model(model, tmp_path / "saved")
    model.config = replace(model.config, tied_embeddings=False)
    save_model(model, tmp_path / "saved")
    assert load_model(tmp_path / "saved", progress=False).head.weight.equal(model.head.weight)


@pytest.mark.parametrize("attribute", ["exact", "quantizable"])
@pytest.mark.parametrize("names", ["weight", ("wieght",), ["weight"]])
def test_declarations_that_name_nothing_are_refused(attribute, names, tmp_path):
    def part(d_model):
        made = nn.Sequential(nn.Linear(d_model, d_model, bias=False))
        setattr(made[0], attribute, names)
        setattr(made, attribute, names)
        return made

    with pytest.raises(CheckpointError, match=rf"{attribute} = .*, expected a tuple of the names"):
        save_model(with_part(part), tmp_path / "saved", dtype=torch.float8_e4m3fn)


# --- configs that would be read back as others


class Mode(enum.StrEnum):
    FAST = "fast"


@dataclass(frozen=True, kw_only=True)
class Chosen(PartConfig):
    mode: str = "plain"


@dataclass(frozen=True, kw_only=True)
class Derived(PartConfig):
    twice: int = field(init=False, default=2)


@dataclass(frozen=True, kw_only=True)
class Started(PartConfig):
    seed: InitVar[int]

    def __post_init__(self, seed):
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class Anything(PartConfig):
    value: Any = None


@dataclass(frozen=True, kw_only=True)
class Moded(PartConfig):
    mode: Mode = Mode.FAST


DenseConfig = dataclass(frozen=True, kw_only=True)(type("DenseConfig", (moe.DenseConfig,), {}))
Twin = dataclass(frozen=True, kw_only=True)(type("Chosen", (PartConfig,), {}))


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([Derived()], "twice"),
        ([Started(seed=1)], "seed"),
        ([Anything(value=float("nan"))], "value = nan: JSON has no such number"),
        ([Anything(value=float("inf"))], "value = inf: JSON has no such number"),
        ([Moded()], "Moded.mode = 'fast': must be of type Mode"),
        ([DenseConfig(width=3)], "there is another class of the name DenseConfig"),
        ([Chosen(), Twin()], "there is another class of the name Chosen"),
    ],
)
def test_a_config_that_would_be_read_back_as_another_is_refused_when_saving(parts, told, tmp_path):
    PART[0] = lambda d_model: nn.Linear(d_model, d_model)
    layers = tuple(LayerConfig(attention=gqa(), feed_forward=part) for part in parts)
    with pytest.raises(CheckpointError, match=told):
        save_model(Transformer(sized(layers=layers)), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"vocab_size": 10**19}, "cannot be built|describes"),
        ({"vocab_size": 2**62}, "cannot be built|describes"),
        ({"d_model": 10**12}, "cannot be built|describes"),
        ({"norm_epsilon": 10**400}, "norm_epsilon = 10{70,}: must be a number > 0"),
    ],
)
def test_huge_numbers_are_one_line(change, told, tmp_path, capsys):
    path = tmp_path / "saved"
    save_model(transformer(model_config(gqa()), torch.float32), path)
    model = json.loads((path / "config.json").read_text())["model"]
    edit_json(path / "config.json", model=model | change)
    with pytest.raises(CheckpointError, match=told):
        load_model(path, progress=False)
    errors, _ = verify(path)
    assert len(errors) == 1
    assert main(["convert", str(path), str(tmp_path / "target")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_value_that_is_nested_deeply_is_one_line(tmp_path):
    path = tmp_path / "saved"
    save_model(transformer(model_config(gqa()), torch.float32), path)
    text = (path / "config.json").read_text().replace('"vocab_size": 23', '"vocab_size": %s')
    (path / "config.json").write_text(text % ("[" * 700 + "]" * 700))
    with pytest.raises(CheckpointError, match="nested too deeply|must be a whole number"):
        load_model(path, progress=False)


# --- dtypes


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e5m2, "bf16"])
def test_dtypes_that_weights_cannot_have_are_refused(dtype, tmp_path, pristine):
    model = transformer(model_config(gqa()), torch.float32)
    with pytest.raises(ValueError, match="dtype = .*: expected None, torch.float64"):
        save_model(model, tmp_path / "saved", dtype=dtype)
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="dtype = .*: expected None, torch.float64"):
        load_model(pristine(), dtype=dtype, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_in_fp8_runs_as_it_is_loaded(dtype, tmp_path):
    model = transformer(model_config(mla(), mtp=1)).to(dtype)
    save_model(model, tmp_path / "saved", dtype=torch.float8_e4m3fn)
    again = load_model(tmp_path / "saved", progress=False)
    assert again.dtype == dtype
    assert len(list(generate(again, [1, 2], 4, draft_tokens=2))) == 4


# --- routers


def routed(change):
    """A layer whose router's routing is changed by this function."""
    layer = softmax_experts().build(D)
    really_route = layer.router.forward
    layer.router.forward = lambda x_ND: change(really_route(x_ND))
    return layer


@pytest.mark.parametrize(
    "change",
    [
        lambda r: replace(r, weights_NK=r.weights_NK[:, :1]),
        lambda r: replace(r, weights_NK=r.weights_NK[0]),
        lambda r: replace(r, weights_NK=r.weights_NK.bfloat16()),
        lambda r: replace(r, experts_NK=r.experts_NK.double()),
        lambda r: replace(r, experts_NK=r.experts_NK[:4]),
    ],
)
def test_a_routing_of_other_shapes_or_dtypes_is_refused(change):
    with pytest.raises(ValueError, match="expected weights >= float32, int64 ids, both"):
        routed(change)(torch.randn(2, 3, D))


# --- parts in each other's place


@dataclass(frozen=True, kw_only=True)
class Nothing(Config):
    def build(self, d_model):
        return None


@pytest.mark.parametrize("attention", [moe.DenseConfig(width=3), softmax_experts(), Nothing()])
def test_what_is_no_attention_is_refused(attention):
    layer = LayerConfig(attention=attention, feed_forward=softmax_experts())
    with pytest.raises(TypeError, match=f"{type(attention).__name__} builds no attention"):
        Transformer(sized(layers=(layer,)))


def test_a_class_where_a_config_is_needed_is_refused_in_few_words():
    router = TopK(num_experts=4, top_k=2, scoring="softmax")
    with pytest.raises(ConfigError, match="must be of type AttentionConfig"):
        LayerConfig(attention=3, feed_forward=moe.MoEConfig(router=router, expert_width=4))
    layers = [LayerConfig(attention=gqa(), feed_forward=softmax_experts())] * 50
    with pytest.raises(ConfigError) as caught:
        sized(layers=layers)
    assert len(str(caught.value)) < 300


# --- caches and counts


@pytest.mark.parametrize("counts", [[5, 3], [-1, 2], [3], [1, 2, 3]])
@pytest.mark.parametrize("cached", [False, True])
def test_counts_that_do_not_fit_are_refused(counts, cached):
    model = transformer(model_config(mla()))
    cache = model.make_cache(2, 9) if cached else None
    with pytest.raises(ValueError, match=r"counts = \[.*\]: expected 2 numbers from 0 to 3"):
        model.hidden_states(random_tokens(2, 3), cache, counts)


def test_the_cache_of_another_model_is_refused():
    model, other = transformer(model_config(mla())), transformer(sized(layers=with_part_layers()))
    with pytest.raises(ValueError, match="1 layers in the cache, 3 here"):
        model(random_tokens(2, 3), other.make_cache(2, 9))


def with_part_layers():
    return (LayerConfig(attention=gqa(), feed_forward=softmax_experts()),)


def test_an_entry_of_a_wider_dtype_is_kept_in_it():
    cache = EntryCache(1, 4, [2, 1])
    wide = torch.tensor([[[1.0 + 2**-20]]])
    (_, kept), _ = cache.append(torch.ones(1, 1, 2, dtype=torch.bfloat16), wide)
    assert kept.equal(wide)
    (_, kept), _ = cache.append(torch.ones(1, 1, 2, dtype=torch.bfloat16), wide)
    assert kept.equal(wide.expand(1, 2, 1))


def test_an_attention_that_does_not_append_is_told_by_the_lengths():
    model = transformer(model_config(gqa()))
    cache = model.make_cache(1, 9)
    model.layers[1].attention.forward = lambda x_BTD, step, cache: x_BTD
    model(random_tokens(1, 3), cache)
    with pytest.raises(ValueError, match="the cache's layers differ in length"):
        model(random_tokens(1, 1), cache)


# --- arguments of generate and of losses


@pytest.mark.parametrize("prompt", [torch.tensor([1, 2]), np.array([1, 2]), (1, 2), range(1, 3)])
def test_a_prompt_may_be_any_row_of_whole_numbers(prompt):
    model = agreeable(model_config(gqa(), mtp=1))
    expected = list(generate(model, [1, 2], 4))
    assert list(generate(model, prompt, 4)) == expected
    assert generate_batch(model, [prompt, prompt], 4, stop_ids=np.array([22])) == [expected] * 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"prompt_ids": [1.5, 2.7]}, "prompt 0 = .1.5, 2.7.: expected a list of token ids"),
        ({"prompt_ids": [[1, 2]]}, "prompt 0 = ..1, 2..: expected a list of token ids"),
        ({"prompt_ids": torch.ones(1, 2, dtype=torch.int64)}, "prompt 0 = tensor"),
        ({"prompt_ids": 3}, "prompt 0 = 3: expected a list of token ids"),
        ({"stop_ids": ["a"]}, "stop_ids = .'a'.: expected a list of token ids"),
        ({"stop_ids": 5}, "stop_ids = 5: expected a list of token ids"),
        ({"top_k": 2.5}, "top_k = 2.5: must be a whole number >= 1"),
        ({"seed": 1.5}, "seed = 1.5: must be a whole number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5: must be a whole number"),
        ({"draft_tokens": "3"}, "draft_tokens = '3': must be a whole number"),
        ({"temperature": float("inf")}, "temperature = inf: must be finite"),
    ],
)
def test_arguments_of_other_types_are_refused_by_name(arguments, told):
    model = agreeable(model_config(gqa(), mtp=1))
    with pytest.raises(ValueError, match=told):
        generate(model, **{"prompt_ids": [1, 2], "max_new_tokens": 4} | arguments)


def test_the_loss_of_no_modules_is_zero():
    assert mtp_loss([], [], random_tokens(1, 3), []).item() == 0


def test_classes_must_be_a_list(pristine, tmp_path):
    save_model(transformer(model_config(gqa()), torch.float32), tmp_path / "saved")
    with pytest.raises(ValueError, match="classes = .*: expected a list of config classes"):
        load_model(tmp_path / "saved", classes=PartConfig, progress=False)


# --- models that are wrapped


@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated")
def test_a_wrapped_embedding_acts_and_a_compiled_model_is_saved(tmp_path):
    model = transformer(model_config(gqa(), mtp=1), torch.float32)
    tokens_BT = random_tokens(2, 5)
    expected = model(tokens_BT)
    save_model(torch.compile(model), tmp_path / "saved")
    assert load_model(tmp_path / "saved", progress=False)(tokens_BT).equal(expected)
    model.embed = nn.Sequential(model.embed)
    assert model(tokens_BT).equal(expected)
    assert len(list(generate(model, [1, 2], 4, draft_tokens=2))) == 4


def test_a_model_on_the_meta_device_has_nothing_to_save(tmp_path):
    with torch.device("meta"):
        model = Transformer(model_config(gqa()))
    with pytest.raises(CheckpointError, match="the model is on the meta device"):
        save_model(model, tmp_path / "saved")
