"""A model's description refuses every value that no model can have, by field and value."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
from tiny import YARN, gqa, mla, model_config, rope

from modeling import (
    GQAConfig,
    LayerConfig,
    MLAConfig,
    ModelConfig,
    QKNormConfig,
    RopeConfig,
    YarnConfig,
)
from moe import ConfigError, DenseConfig

INFINITY, NAN = float("inf"), float("nan")
WHOLE = [0, -1, 1.5, True, "4", None]
POSITIVE = [0.0, -1.0, INFINITY, NAN, "1", None, True]
FLAG = [0, 1, None, "false"]
QK_NORM, LAYER = QKNormConfig(epsilon=1e-6), model_config(mla()).layers[0]

WRONG = [
    (YARN, "factor", [0.9, *POSITIVE]),
    (YARN, "original_length", WHOLE),
    (YARN, "beta_fast", [*POSITIVE, 0.5]),  # below beta_slow
    (YARN, "beta_slow", [*POSITIVE, 17.0]),  # above beta_fast
    (YARN, "truncate", [0, None, "false"]),
    (rope(), "width", [*WHOLE, 1, 3]),
    (rope(), "theta", [1.0, *POSITIVE]),
    (rope(), "layout", ["", "neox", None]),
    (rope(), "amplitude", POSITIVE),
    (rope(), "softmax_multiplier", POSITIVE),
    (gqa(), "num_heads", WHOLE),
    (gqa(), "kv_heads", [*WHOLE, 4, 12]),
    (gqa(), "head_width", WHOLE),
    (gqa(), "scale", [value for value in POSITIVE if value is not None]),
    (gqa(), "qkv_bias", FLAG),
    (gqa(), "output_bias", FLAG),
    (gqa(), "window", [value for value in WHOLE if value is not None]),
    (gqa(), "sinks", FLAG),
    (QK_NORM, "over", ["", "x", "heads", None]),
    (QK_NORM, "after_rope", FLAG),
    (QK_NORM, "epsilon", POSITIVE),
    (LAYER, "norm_before", FLAG),
    (LAYER, "norm_after", FLAG),
    (LAYER, "residual_multiplier", POSITIVE),
    (mla(), "num_heads", WHOLE),
    (mla(), "query_rank", [0, -1, 1.5, True, "4"]),
    (mla(), "kv_rank", WHOLE),
    (mla(), "nope_width", WHOLE),
    (mla(), "value_width", WHOLE),
    (mla(), "bias", [1, None, "false"]),
    (mla(), "latent_norm_epsilon", POSITIVE),
    (DenseConfig(width=4), "width", WHOLE),
    (model_config(mla()), "vocab_size", WHOLE),
    (model_config(mla()), "d_model", WHOLE),
    (model_config(mla()), "max_length", WHOLE),
    (model_config(mla()), "layers", [(), None]),
    (model_config(mla()), "tied_embeddings", [0, None, "false"]),
    (model_config(mla()), "norm_epsilon", POSITIVE),
    (model_config(mla()), "embedding_multiplier", POSITIVE),
    (model_config(mla()), "logits_multiplier", POSITIVE),
]
CASES = [(config, field, value) for config, field, values in WRONG for value in values]
CASE_NAMES = [f"{type(config).__name__} {field} {value!r}" for config, field, value in CASES]


@pytest.mark.parametrize(("config", "field", "value"), CASES, ids=CASE_NAMES)
def test_a_wrong_value_is_refused_by_field_value_and_rule(config, field, value):
    with pytest.raises(ConfigError) as caught:
        replace(config, **{field: value})
    named = "beta_fast" if field == "beta_slow" and value == 17.0 else field
    shown = YARN.beta_fast if named != field else value
    text = str(caught.value)
    assert named in text
    assert repr(shown) in text
    assert any(word in text for word in ("must", "needs"))
    assert isinstance(caught.value, ValueError)


def test_more_dimensions_cannot_be_rotated_than_a_head_has():
    with pytest.raises(ConfigError, match=r"GQAConfig.head_width = 7: must be >= the 8 rotated"):
        gqa(rope=rope(width=8))


def test_key_value_heads_must_divide_the_heads():
    with pytest.raises(ConfigError, match=r"kv_heads = 4: must divide num_heads = 6"):
        gqa(kv_heads=4)


CONFIGS = [YARN, rope(), QK_NORM, gqa(), mla(), DenseConfig(width=4), LAYER, model_config(mla())]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_configs_are_frozen_and_keyword_only(config):
    first = fields(config)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(config, first, getattr(config, first))
    with pytest.raises(TypeError):
        type(config)(getattr(config, first))
    assert hash(config) == hash(replace(config))


def test_what_defines_the_architecture_has_no_default():
    for kind in (
        YarnConfig,
        RopeConfig,
        QKNormConfig,
        GQAConfig,
        MLAConfig,
        DenseConfig,
        LayerConfig,
        ModelConfig,
    ):
        with pytest.raises(TypeError, match="missing"):
            kind()


def test_what_a_plain_layer_does_not_have_is_off_by_default():
    attention, layer, model = gqa(), model_config(gqa()).layers[0], model_config(gqa())
    assert not any((attention.qkv_bias, attention.output_bias, attention.sinks))
    assert attention.scale is attention.window is attention.qk_norm is None
    assert (QK_NORM.over, QK_NORM.after_rope) == ("head", False)
    assert (layer.norm_before, layer.norm_after) == (True, False)
    multipliers = layer.residual_multiplier, model.embedding_multiplier, model.logits_multiplier
    assert multipliers == (1.0, 1.0, 1.0)


def test_equal_descriptions_are_equal_whatever_file_they_were_read_from():
    config = model_config(mla())
    assert replace(config, published={"model_type": "x"}) == config
    assert replace(config, d_model=12) != config
