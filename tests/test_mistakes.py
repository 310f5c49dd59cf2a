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
    model = with_part(lambda d_model: nn.Sequential(*(nn.Linear(d_model, d_model) for _ in "ab")))
    part = model.layers[0].feed_forward
    part[1].weight = part[0].weight
    told = r"feed_forward.1.weight and layers.0.feed_forward.0.weight are one parameter"
    with pytest.raises(CheckpointError, match=told):
        save_model(model, tmp_path / "saved")


def one_module_twice(d_model):
    one = nn.Linear(d_model, d_model)
    return nn.Sequential(one, one)


def two_modules_of_one_weight(d_model):
    made = nn.Sequential(nn.Linear(d_model, d_model), nn.Linear(d_model, d_model))
    made[1].weight = made[0].weight
    return made


@pytest.mark.parametrize("part", [one_module_twice, two_modules_of_one_weight])
def test_parameters_that_a_part_shares_are_shared_when_loaded(part, tmp_path):
    model, tokens_BT = with_part(part), random_tokens(2, 5)
    again = reload(model, tmp_path / "saved")
    assert again(tokens_BT).equal(model(tokens_BT))
    assert len(list(again.parameters())) == len(list(model.parameters()))
    loaded = again.layers[0].feed_forward
    assert loaded[1].weight is loaded[0].weight


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_part_that_computes_its_weight_in_a_hook_is_saved(tmp_path):
    class Normed(nn.Module):
        def __init__(self, d_model):
            super().__init__()
            self.inner = nn.utils.weight_norm(Drawn(d_model, d_model))

        def forward(self, x_BTD):
            return self.inner(x_BTD)

    class Drawn(nn.Linear):
        def reset_parameters(self):
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -1, 1)

    model, tokens_BT = with_part(Normed), random_tokens(2, 5)
    assert reload(model, tmp_path / "saved")(tokens_BT).equal(model(tokens_BT))


@pytest.mark.parametrize("way", ["assign", "copied"])
def test_a_tied_head_that_is_equal_is_saved(way, tmp_path):
    model = transformer(model_config(gqa(), tied_embeddings=True), torch.float32)
    if way == "assign":
        other = transformer(model_config(gqa(), tied_embeddings=True), torch.float32)
        model.load_state_dict(other.state_dict(), assign=True)
    else:
        model.head.weight = nn.Parameter(model.embed.weight.data.clone())
    again = reload(model, tmp_path / "saved")
    assert again.head.weight is again.embed.weight


@pytest.mark.parametrize(
    ("buffer", "told"),
    [
        (torch.arange(D, dtype=torch.int32), "order is torch.int32, built as torch.int64"),
        (torch.zeros(D), "order is torch.float32, built as torch.int64"),
        (torch.zeros(D, dtype=torch.complex64), "order is torch.complex64, built as torch.int64"),
    ],
)
def test_a_buffer_of_another_kind_than_it_is_built_is_refused(buffer, told, tmp_path):
    model = with_part(Permute)
    model.layers[0].feed_forward.order = buffer
    with pytest.raises(CheckpointError, match=told):
        save_model(model, tmp_path / "saved")


def test_another_head_of_a_tied_model_is_not_lost(tmp_path):
    model = transformer(model_config(gqa(), tied_embeddings=True), torch.float32)
    model.head = nn.Linear(D, 23, bias=False)
    with pytest.raises(
        CheckpointError, match="head.weight differs from embed.weight, and would be"
    ):
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
class Noted(PartConfig):
    notes: dict = field(default_factory=dict, compare=False)


def test_a_field_that_is_not_compared_is_saved_at_its_default_only(tmp_path):
    PART[0] = lambda d_model: nn.Linear(d_model, d_model)
    for notes, name in (({}, "empty"), ({"a": np.zeros(3)}, "full")):
        layer = LayerConfig(attention=gqa(), feed_forward=Noted(notes=notes))
        model = Transformer(sized(layers=(layer,)))
        if notes:
            with pytest.raises(CheckpointError, match="notes = .*: compare=False, so it is not"):
                save_model(model, tmp_path / name)
        else:
            save_model(model, tmp_path / name)
            load_model(tmp_path / name, classes=[Noted], progress=False)


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
    with pytest.raises(ValueError, match="expected float32 at least and int64, both"):
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


def test_entries_of_floats_and_of_whole_numbers_are_kept_as_they_are():
    cache = EntryCache(1, 4, [2, 1])
    x, number = torch.tensor([[[0.5, 0.25]]]), torch.tensor([[[7]]])
    for _ in range(2):
        (floats, numbers), _ = cache.append(x, number)
    assert floats.equal(x.expand(1, 2, 2))
    assert numbers.equal(number.expand(1, 2, 1).to(numbers.dtype))


def test_an_attention_that_does_not_append_is_told_by_the_lengths():
    model = transformer(model_config(gqa()))
    cache = model.make_cache(1, 9)
    model.layers[1].attention.forward = lambda x_BTD, step, cache: x_BTD
    model(random_tokens(1, 3), cache)
    with pytest.raises(ValueError, match="the cache's layers differ in length"):
        model(random_tokens(1, 1), cache)


# --- arguments of generate and of losses


def test_what_hooks_see_while_a_model_generates_can_be_trained_with():
    model = agreeable(model_config(gqa(), mtp=1))
    seen = []

    def steer(module, arguments, output):
        with torch.enable_grad():
            x_BTD = output.detach().clone().requires_grad_()
            (gradient_BTD,) = torch.autograd.grad(x_BTD.square().sum(), x_BTD)
        seen.append(output)
        return output + 1e-3 * gradient_BTD

    hook = model.layers[0].register_forward_hook(steer)
    list(generate(model, [1, 2], 4))
    nn.Linear(D, 1, dtype=torch.float64)(seen[0]).sum().backward()
    hook.remove()


def test_a_model_that_makes_a_table_while_it_generates_can_be_trained():
    class Lazy(nn.Linear):
        table = None

        def forward(self, x_BTD):
            if self.table is None:
                self.table = torch.linspace(0, 1, D, dtype=x_BTD.dtype)
            return super().forward(x_BTD * self.table)

    model = with_part(lambda d_model: Lazy(d_model, d_model))
    list(generate(model, [1, 2], 4))
    model(random_tokens(1, 3)).sum().backward()


def test_counts_may_be_whole_numbers_of_any_library():
    model = agreeable(model_config(gqa(), mtp=1))
    expected = list(generate(model, [1, 2], 4, draft_tokens=2))
    for count in (np.int64(4), torch.tensor(4)):
        assert list(generate(model, [1, 2], count, draft_tokens=np.int64(2))) == expected
    assert generate_batch(model, (iter([1, 2]) for _ in range(2)), 4) == [expected] * 2


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
