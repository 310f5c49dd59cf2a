"""DeepSeekMoE-16B (DeepSeek V1), which transformers has no class for.

Our logits are held to `plain_logits` instead: its equations written out, one position and one head
after the other, on the tensors of a file by their published names.
"""

import json
import math

import pytest
import torch
from files import REMOVED, tensors_of, write_tensors
from layouts import fused
from published import (
    entries_of,
    modern,
    partners_of_the_first,
    relative_difference,
    with_frequencies,
)
from traps import check_refused, experts_of, read

from checkpoints import load_model
from moe import DenseConfig, MoEConfig

MODEL_TYPES = ("deepseek",)

V1 = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 102400,
}
PUBLISHED = {"DeepSeekMoE-16B": V1}
FIGURES = {"DeepSeekMoE-16B": (16.376, 2.83, 2.62)}

ATTENTION = {
    "input_layernorm.weight": [2048],
    "post_attention_layernorm.weight": [2048],
    "self_attn.q_proj.weight": [2048, 2048],
    "self_attn.k_proj.weight": [2048, 2048],
    "self_attn.v_proj.weight": [2048, 2048],
    "self_attn.o_proj.weight": [2048, 2048],
}
DENSE = {
    "mlp.gate_proj.weight": [10944, 2048],
    "mlp.up_proj.weight": [10944, 2048],
    "mlp.down_proj.weight": [2048, 10944],
}
SPARSE = {
    "mlp.gate.weight": [64, 2048],
    "mlp.shared_experts.gate_proj.weight": [2816, 2048],
    "mlp.shared_experts.up_proj.weight": [2816, 2048],
    "mlp.shared_experts.down_proj.weight": [2048, 2816],
    "mlp.experts.0.gate_proj.weight": [1408, 2048],
    "mlp.experts.0.up_proj.weight": [1408, 2048],
    "mlp.experts.0.down_proj.weight": [2048, 1408],
    "mlp.experts.63.gate_proj.weight": [1408, 2048],
    "mlp.experts.63.up_proj.weight": [1408, 2048],
    "mlp.experts.63.down_proj.weight": [2048, 1408],
}
NAMES = {
    "model.embed_tokens.weight": [102400, 2048],
    "model.norm.weight": [2048],
    "lm_head.weight": [102400, 2048],
    **{f"model.layers.0.{name}": shape for name, shape in (ATTENTION | DENSE).items()},
    **{f"model.layers.27.{name}": shape for name, shape in (ATTENTION | SPARSE).items()},
}

PEERS: dict[str, dict] = {}  # see test_logits_equal_those_written_out
VARIANTS = {
    "as published": {},
    "normalised": {"norm_topk_prob": True},
    "every second layer sparse, from layer 0": {"moe_layer_freq": 2, "first_k_dense_replace": 0},
    "every second layer sparse, from layer 2": {"moe_layer_freq": 2, "first_k_dense_replace": 1},
    "biases, tied": {"attention_bias": True, "tie_word_embeddings": True},
    "fewer keys than queries, another base": {"num_key_value_heads": 1, "rope_theta": 300.0},
    "one shared expert": {"n_shared_experts": 1},
}


def layouts(tensors):
    return {"experts fused": fused(tensors), "with frequencies": with_frequencies(tensors)}


class Written:
    """The tensors of a file as float64, by their names under a prefix."""

    def __init__(self, tensors, prefix=""):
        self.tensors, self.prefix = tensors, prefix

    def __call__(self, name):
        return self.tensors[self.prefix + name].double()

    def under(self, prefix):
        return Written(self.tensors, self.prefix + prefix)

    def linear(self, x, name):
        y = self(f"{name}.weight") @ x
        return y + self(f"{name}.bias") if f"{self.prefix}{name}.bias" in self.tensors else y

    def norm(self, x, name, config):
        return self(f"{name}.weight") * x / (x.square().mean() + config["rms_norm_eps"]).sqrt()

    def gated(self, x):
        gate = self("gate_proj.weight") @ x
        return self("down_proj.weight") @ (
            gate / (1 + (-gate).exp()) * (self("up_proj.weight") @ x)
        )


def plain_logits(tensors, config, tokens):
    """The logits of one sequence, in float64."""
    file = Written(tensors)
    xs = [file("model.embed_tokens.weight")[token] for token in tokens]
    for i in range(config["num_hidden_layers"]):
        layer = file.under(f"model.layers.{i}.")
        normed = [layer.norm(x, "input_layernorm", config) for x in xs]
        mixed = plain_attention(layer.under("self_attn."), config, normed)
        xs = [x + y for x, y in zip(xs, mixed, strict=True)]
        normed = [layer.norm(x, "post_attention_layernorm", config) for x in xs]
        from_one = i >= config["first_k_dense_replace"] and i % config["moe_layer_freq"] == 0
        feed_forward = plain_experts if from_one else lambda mlp, config, x: mlp.gated(x)
        xs = [
            x + feed_forward(layer.under("mlp."), config, y)
            for x, y in zip(xs, normed, strict=True)
        ]
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return torch.stack([file(f"{head}.weight") @ file.norm(x, "model.norm", config) for x in xs])


def plain_attention(attention, config, xs):
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads

    def split(name, turn=lambda x, position: x):
        rows = [attention.linear(x, name).split(width) for x in xs]
        return [[turn(x, position) for x in row] for position, row in enumerate(rows)]

    def turn(x, position):
        return turned(x, position, config["rope_theta"])

    queries, keys, values = split("q_proj", turn), split("k_proj", turn), split("v_proj")
    mixed = []
    for t in range(len(xs)):
        parts = []
        for head in range(heads):
            shared = head * kv_heads // heads
            scores = [float(queries[t][head] @ keys[s][shared]) for s in range(t + 1)]
            powers = [math.exp((score - max(scores)) / math.sqrt(width)) for score in scores]
            total = sum(powers)
            parts.append(sum(p / total * values[s][shared] for s, p in enumerate(powers)))
        mixed.append(attention.linear(torch.cat(parts), "o_proj"))
    return mixed


def turned(x, position, theta):
    """Dimension i and dimension i + half as one complex number, turned."""
    half = len(x) // 2
    steps = torch.arange(half, dtype=torch.float64)
    spin = torch.polar(torch.ones(half).double(), position * theta ** (-steps / half))
    z = torch.complex(x[:half], x[half:]) * spin
    return torch.cat([z.real, z.imag])


def plain_experts(mlp, config, x):
    scores = (mlp("gate.weight") @ x).softmax(dim=0)
    best = sorted(range(len(scores)), key=lambda e: -float(scores[e]))
    chosen = best[: config["num_experts_per_tok"]]
    total = sum(scores[e] for e in chosen) if config["norm_topk_prob"] else 1.0
    routed = sum(scores[e] / total * mlp.under(f"experts.{e}.").gated(x) for e in chosen)
    return routed + mlp.under("shared_experts.").gated(x)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_logits_equal_those_written_out(pristine, changes):
    path = pristine("deepseek", num_hidden_layers=3, **changes)
    model = load_model(path, progress=False)
    config = json.loads((path / "config.json").read_text())
    tokens_BT = torch.randint(320, (2, 13), generator=torch.Generator().manual_seed(7))
    tensors = tensors_of(path)
    expected_BTV = torch.stack(
        [plain_logits(tensors, config, tokens) for tokens in tokens_BT.tolist()]
    )
    cache = model.make_cache(2, 13)
    chunks = [model(chunk, cache=cache) for chunk in tokens_BT.split([4, 1, 8], dim=1)]
    ways = {"whole": model(tokens_BT), "chunks": torch.cat(chunks, dim=1)}
    found = {way: relative_difference(ours, expected_BTV) for way, ours in ways.items()}
    print("".join(f"{way} {difference:.1e}  " for way, difference in found.items()))
    assert max(found.values()) < 1e-4


def test_old_and_new_spelling_describe_the_same_model():
    assert read(modern(V1)) == read(V1)


def test_trap_04_halves_are_rotated_together():
    rope = read(V1).layers[0].attention.rope
    assert (rope.width, rope.theta, rope.yarn) == (128, 1e4, None)
    assert partners_of_the_first(rope) == {0, 64}


def test_trap_17_the_weights_are_softmax_probabilities_over_all_experts():
    logits_NE = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    routing = experts_of(V1).router.route(logits_NE)
    expected_NK = logits_NE.softmax(dim=1).gather(1, routing.experts_NK)
    torch.testing.assert_close(routing.weights_NK, expected_NK)


def test_trap_18_weights_are_normalised_where_the_file_says_so(tmp_path):
    assert not experts_of(V1).router.normalize
    moe = experts_of(V1, norm_topk_prob=True)
    assert (moe.router.normalize, moe.router.normalize_epsilon) == (True, 1e-20)
    check_refused(tmp_path, "norm_topk_prob is missing", V1, norm_topk_prob=REMOVED)


def test_trap_20_no_scaling_factor_is_known(tmp_path):
    assert experts_of(V1).router.scale == 1.0
    assert read(V1, routed_scaling_factor=1.0) == read(V1)
    check_refused(tmp_path, "routed_scaling_factor = 16.0", V1, routed_scaling_factor=16.0)


def test_trap_22_the_router_multiplies_in_the_precision_of_the_weights():
    assert experts_of(V1).router.router_precision == "weights"


@pytest.mark.parametrize("count", [2, 1, 0, None])
def test_trap_27_shared_experts_are_one_of_their_summed_width(count):
    moe = experts_of(V1, n_shared_experts=count)
    assert (moe.shared_width, moe.shared_gate) == ((count or 0) * 1408, False)


def test_trap_29_the_rows_of_gate_come_first(tiny):
    path = tiny("deepseek")
    stacked = fused(tensors_of(path))
    write_tensors(path, stacked)
    experts = load_model(path, progress=False).layers[1].feed_forward.experts
    gate_EFD, up_EFD = stacked["model.layers.1.mlp.experts.gate_up_proj"].split(26, dim=1)
    assert experts.gate.equal(gate_EFD)
    assert experts.up.equal(up_EFD)


@pytest.mark.parametrize("bias", [True, False, REMOVED])
def test_trap_46_attention_bias_means_all_four_projections(bias):
    config = read(V1, attention_bias=bias, num_hidden_layers=1)
    biases = {e.published for e in entries_of(config) if e.published.endswith("bias")}
    expected = {f"model.layers.0.self_attn.{kind}_proj.bias" for kind in "qkvo"}
    assert biases == (expected if bias is True else set())


@pytest.mark.parametrize(
    ("first", "step", "sparse"),
    [
        (1, 1, [1, 2, 3, 4, 5]),
        (0, 1, [0, 1, 2, 3, 4, 5]),
        (1, 2, [2, 4]),
        (0, 3, [0, 3]),
        (5, 2, []),
    ],
)
def test_sparse_layers_are_multiples_of_the_step_behind_the_first_ones(first, step, sparse):
    config = read(V1, num_hidden_layers=6, first_k_dense_replace=first, moe_layer_freq=step)
    kinds = [layer.feed_forward for layer in config.layers]
    assert [i for i, kind in enumerate(kinds) if isinstance(kind, MoEConfig)] == sparse
    assert {kind.width for kind in kinds if isinstance(kind, DenseConfig)} <= {10944}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scoring_func", "sigmoid"),
        ("kv_lora_rank", 512),
        ("sliding_window", 4096),
        ("hidden_act", "gelu"),
        ("use_qk_norm", True),
        ("moe_layer_freq", 0),
    ],
)
def test_what_a_v1_cannot_be_is_refused_by_name(tmp_path, key, value):
    check_refused(tmp_path, f"{key} = {value!r}", V1, **{key: value})


@pytest.mark.parametrize("kind", ["linear", "dynamic", "longrope"])
def test_other_kinds_of_rope_are_refused_by_name(tmp_path, kind):
    scaling = {"type": kind, "factor": 2.0}
    check_refused(tmp_path, f"rope_scaling.type = '{kind}'", V1, rope_scaling=scaling)
