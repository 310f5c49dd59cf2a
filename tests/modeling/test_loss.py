"""Training losses: which token a position answers for, which tokens count, how depths add up."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_tokens

from modeling import mtp_loss, next_token_loss
from moe.testing import noise

V, D = 9, 6


def plain_loss(states_BTD, head_VD, tokens_BT, ahead, mask_BT=None, documents_BT=None) -> float:
    """One position after the other: minus the log-probability of the token `ahead` of it."""
    losses = []
    for b, tokens_T in enumerate(tokens_BT.tolist()):
        for i in range(min(states_BTD.shape[1], len(tokens_T) - ahead)):
            documents = [0, 0] if documents_BT is None else documents_BT[b, i::ahead][:2]
            if (mask_BT is None or mask_BT[b, i + ahead]) and documents[0] == documents[1]:
                logits = (head_VD @ states_BTD[b, i]).tolist()
                total = math.log(sum(math.exp(logit) for logit in logits))
                losses.append(total - logits[tokens_T[i + ahead]])
    return sum(losses) / len(losses)


@given(
    batch=st.integers(1, 3),
    length=st.integers(5, 8),
    ahead=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_position_i_answers_for_the_token_so_far_ahead(batch, length, ahead, seed):
    tokens_BT, head_VD = random_tokens(batch, length, V, seed), noise(V, D, seed=seed)
    for positions in (length, length - ahead + 1, length - ahead):
        states_BTD = noise(batch, positions, D, seed=seed + 1)
        actual = next_token_loss(states_BTD, head_VD, tokens_BT, ahead).item()
        assert actual == pytest.approx(plain_loss(states_BTD, head_VD, tokens_BT, ahead), rel=1e-9)


@given(ahead=st.integers(1, 3), seed=st.integers(0, 99))
def test_only_masked_targets_count(ahead, seed):
    tokens_BT, head_VD, states_BTD = random_tokens(2, 8, V, seed), noise(V, D), noise(2, 8, D)
    mask_BT = noise(2, 8, seed=seed) > 0
    mask_BT[0, 5] = True
    actual = next_token_loss(states_BTD, head_VD, tokens_BT, ahead, mask_BT).item()
    expected = plain_loss(states_BTD, head_VD, tokens_BT, ahead, mask_BT)
    assert actual == pytest.approx(expected, rel=1e-9)


@given(ahead=st.integers(1, 3), ends=st.sets(st.integers(1, 7), max_size=3), masked=st.booleans())
def test_no_position_answers_for_a_token_of_another_document(ahead, ends, masked):
    tokens_BT, head_VD, states_BTD = random_tokens(2, 9, V), noise(V, D), noise(2, 9, D)
    cut_T = torch.tensor([sum(i >= end for end in ends) for i in range(9)])
    documents_BT = torch.stack([cut_T, torch.zeros(9, dtype=torch.int64)])
    mask_BT = noise(2, 9) > -0.5 if masked else None
    asked = head_VD, tokens_BT, ahead, mask_BT, documents_BT
    expected = plain_loss(states_BTD, *asked)
    assert next_token_loss(states_BTD, *asked).item() == pytest.approx(expected, rel=1e-9)


def test_without_any_target_the_loss_is_zero_and_so_is_its_gradient():
    tokens_BT, states_BTD = random_tokens(1, 4, V), noise(1, 4, D).requires_grad_(True)
    loss = next_token_loss(
        states_BTD, noise(V, D), tokens_BT, 1, documents_BT=torch.arange(4)[None]
    )
    loss.backward()
    assert loss.item() == 0
    assert not states_BTD.grad.any()


def test_a_uniform_guess_costs_the_logarithm_of_the_vocabulary():
    loss = next_token_loss(noise(2, 5, D), torch.zeros(V, D).double(), random_tokens(2, 5, V))
    assert loss.item() == pytest.approx(math.log(V), rel=1e-12)


def test_the_gradient_is_softmax_minus_target():
    tokens_BT, head_VD = random_tokens(1, 4, V), noise(V, D)
    states_BTD = noise(1, 4, D).requires_grad_(True)
    next_token_loss(states_BTD, head_VD, tokens_BT).backward()
    for i in range(3):
        error_V = (head_VD @ states_BTD[0, i].detach()).softmax(dim=-1)
        error_V[tokens_BT[0, i + 1]] -= 1
        torch.testing.assert_close(states_BTD.grad[0, i], error_V @ head_VD / 3)
    assert not states_BTD.grad[0, 3].any()  # its target lies behind the last token


@pytest.mark.parametrize("weights", [[0.3], [0.3, 0.1], [0.5, 0.0, 2.0]])
@pytest.mark.parametrize("masked", [True, False])
def test_depths_add_up_by_their_weights(weights, masked):
    tokens_BT, head_VD = random_tokens(2, 8, V), noise(V, D)
    mask_BT = noise(2, 8) > -0.5 if masked else None
    depths = [noise(2, 8 - k, D, seed=k) for k in range(1, len(weights) + 1)]
    expected = sum(
        weight * plain_loss(states_BTD, head_VD, tokens_BT, 1 + k, mask_BT)
        for k, (weight, states_BTD) in enumerate(zip(weights, depths, strict=True), start=1)
    )
    heads = [head_VD] * len(weights)
    actual = mtp_loss(depths, heads, tokens_BT, weights, mask_BT).item()
    assert actual == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("weights", [[], [0.3], [0.3, 0.2, 0.1]])
def test_another_number_of_weights_than_depths_is_refused(weights):
    depths = [noise(1, 7, D), noise(1, 6, D)]
    with pytest.raises(ValueError, match=f"{len(weights)} depth weights for 2 MTP depths"):
        mtp_loss(depths, [noise(V, D)] * 2, random_tokens(1, 8, V), weights)
