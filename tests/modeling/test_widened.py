"""16-bit products in float32 are torch's own products, rounded once."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import agreeable, gqa, mla, model_config, random_tokens
from torch import nn
from torch.nn import functional as F

from modeling import compile_decoding, products, widen_products, widened
from modeling.widened import LEAST_ROWS, WidenedProducts, multiply_widened, widening_pays
from moe.testing import close, noise

dtypes = st.sampled_from([torch.bfloat16, torch.float16])


@pytest.fixture
def old_cpu(monkeypatch):
    """A CPU without instructions for 16 bits, and the shapes of the products that are widened."""
    seen = []

    def noted(*args):
        seen.append(tuple(args[0].shape))
        return multiply_widened(*args)

    monkeypatch.setattr(widened, "FAST_PRODUCTS", [torch.float32, torch.float64])
    monkeypatch.setattr(widened, "multiply_widened", noted)
    return seen


@given(
    rows=st.lists(st.integers(0, 9), max_size=3),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    bias=st.booleans(),
    piece=st.integers(1, 200),
    dtype=dtypes,
)
def test_a_widened_product_is_the_exact_one_rounded_once(rows, widths, bias, piece, dtype):
    O, I = widths  # noqa: E741
    x_I, weight_OI = noise(*rows, I).to(dtype), noise(O, I, seed=1).to(dtype)
    bias_O = noise(O, seed=2).to(dtype) if bias else None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(widened, "PIECE", piece)
        y_O = multiply_widened(x_I, weight_OI, bias_O)
    exact_O = F.linear(x_I.float(), weight_OI.float()).to(dtype)
    expected_O = exact_O if bias_O is None else exact_O + bias_O
    assert (y_O.shape, y_O.dtype) == (expected_O.shape, dtype)
    assert torch.allclose(y_O.float(), expected_O.float(), rtol=0.01, atol=0.01)


def test_it_pays_for_many_rows_without_instructions_for_their_dtype(old_cpu):
    weight_OI = torch.zeros(3, 5, dtype=torch.bfloat16)
    x_NI = torch.zeros(LEAST_ROWS, 5, dtype=torch.bfloat16)
    assert widening_pays(x_NI, weight_OI)
    assert widening_pays(x_NI.view(2, -1, 5), nn.Parameter(weight_OI))
    assert not widening_pays(x_NI[1:], weight_OI)
    assert not widening_pays(x_NI.float(), weight_OI.float())
    assert not widening_pays(x_NI.half(), weight_OI)
    assert not widening_pays(x_NI.to("meta"), weight_OI)
    assert not widening_pays(x_NI, object())


@pytest.mark.parametrize("attention", [mla, gqa])
def test_a_models_prompt_is_widened_and_its_text_stays(attention, old_cpu):
    model = agreeable(model_config(attention())).bfloat16()
    prompt_BT, token_BT = random_tokens(1, 30), random_tokens(1, 1)
    with torch.no_grad():
        exact, plain = copy.deepcopy(model).double()(prompt_BT), model(prompt_BT)
        assert not old_cpu
        widen_products(model)
        errors = [(logits - exact).norm() for logits in (model(prompt_BT), plain)]
        assert 0 < errors[0] < 1.3 * errors[1] < 0.1 * exact.norm()
        number = len(old_cpu)
        assert number > 4 * len(model.layers)
        assert (1, 30, model.config.d_model) in old_cpu  # attention and the head
        model(token_BT)
        assert len(old_cpu) == number
    model.requires_grad_(True)(prompt_BT).sum().backward()
    assert len(old_cpu) == number


def test_copies_and_compiled_models_are_widened_too(old_cpu):
    model = agreeable(model_config(gqa())).bfloat16()
    widen_products(model)
    compile_decoding(model)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        old_cpu.clear()
        with torch.no_grad():
            twin(random_tokens(1, 30))
        assert old_cpu


def test_a_cpu_with_instructions_is_left_alone(monkeypatch):
    monkeypatch.setattr(widened, "FAST_PRODUCTS", [torch.bfloat16])
    model = agreeable(model_config(gqa()))
    widen_products(model)
    assert model.call is nn.Module.__call__
    assert {torch.float32, torch.float64} <= set(products.list_fast_products())


def test_other_functions_and_matrices_of_other_kinds_run_as_they_are(old_cpu):
    x_NI = noise(20, 6).bfloat16()
    layer = nn.Linear(6, 4).bfloat16()
    with torch.no_grad(), WidenedProducts():
        close(x_NI.relu(), x_NI.clamp(min=0))
        layer(x_NI[:1])
    assert not old_cpu
