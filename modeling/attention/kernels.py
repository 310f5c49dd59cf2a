"""The forms in which attention is computed fast, each for the shapes where it was measured to be.

All compute softmax(scale * q k^T + causal mask) v, as `attend` describes.

Shapes: B batch, T new tokens, S keys to attend to, H heads, J key-value heads, G = H / J, P head
width, M value width, t queries and s keys of a block, z = s + 1, r = G * t query rows of a key
head, n pieces of L keys.
"""

from functools import partial

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from moe import is_traced

from ..products import FAST_PRODUCTS
from ..step import Step

BLOCK = 128  # queries whose scores exist at a time: of 32 to 256, the fastest at 512 and 2,048 keys
PIECE = 512  # keys that one product of a single query reads: of 128 to 1,024, the fastest


def mask_keys(step: Step, keys_BS: Tensor | None, window: int | None = None) -> Tensor:
    """True where a query may see a key, bool (B, 1, T, S).

    A query sees keys at its own position and earlier ones, with a window the last `window` of
    them, its own included. keys_BS: the positions of the keys, negative for an empty slot; None:
    the keys are the queries' own.
    """
    keys_BS = step.positions_BT if keys_BS is None else keys_BS
    query_B1T1, key_B11S = step.positions_BT[:, None, :, None], keys_BS[:, None, None]
    seen = (key_B11S >= 0) & (key_B11S <= query_B1T1)
    return seen if window is None else seen & (key_B11S > query_B1T1 - window)


def blocks_pay(q_BHTP: Tensor, k_BJSP: Tensor) -> bool:
    """The rule that picks the form: on a CPU, blocks where a head's keys meet BLOCK query rows.

    There torch's kernel computes 70 to 120 GFLOP/s where plain products reach 170 (two cores with
    AVX-512, bfloat16). For fewer rows the products spend their time on copies of the keys.
    """
    (H, T), J = q_BHTP.shape[1:3], k_BJSP.shape[1]
    return products_are_fast(q_BHTP) and not is_traced(q_BHTP) and H // J * T >= BLOCK


def products_are_fast(q_BHTP: Tensor) -> bool:
    """Whether a CPU computes, and it has instructions for products of this dtype.

    Without these, attention by products takes 11 to 17 times as long as by torch's kernel (two
    cores with AVX2, bfloat16).
    """
    return q_BHTP.device.type == "cpu" and q_BHTP.dtype in FAST_PRODUCTS


def attend_by_kernel(
    q_BHTP: Tensor,
    k_BJSP: Tensor,
    v_BJSM: Tensor,
    step: Step,
    keys_BS: Tensor | None,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """`attend` by torch's kernel, which never writes the (T, S) scores.

    It wants one width for keys and values: narrower values are padded with zeros. It is slow where
    heads share keys, so these become further query rows of one head, unless the mask is the plain
    triangle. A single query, which comes last, sees every key: there is no mask.
    """
    (B, H, T, P), J, M = q_BHTP.shape, k_BJSP.shape[1], v_BJSM.shape[3]
    v_BJSM = F.pad(v_BJSM, (0, P - M)) if M < P else v_BJSM
    attend_to = partial(F.scaled_dot_product_attention, scale=scale)
    if keys_BS is None and window is None:
        y_BHTM = attend_to(q_BHTP, k_BJSP, v_BJSM, is_causal=True, enable_gqa=H != J)
        return y_BHTM[..., :M]
    mask_B1rS = None
    if window is not None or step.positions_BT.numel() > 1:
        mask_B1rS = mask_keys(step, keys_BS, window).repeat(1, 1, H // J, 1)
    q_BJrP = q_BHTP.reshape(B, J, H // J * T, P)
    y_BJrM = attend_to(q_BJrP, k_BJSP, v_BJSM, attn_mask=mask_B1rS)
    return y_BJrM.reshape(B, H, T, max(P, M))[..., :M]


def attend_in_blocks(
    q_BHTP: Tensor,
    k_BJSP: Tensor,
    v_BJSM: Tensor,
    step: Step,
    keys_BS: Tensor | None,
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """`attend` by plain products, a block of queries at a time on the keys that it may see.

    Of the (T, S) scores, those of one block exist at a time, and outside a window none.
    """
    (B, H, T, _), (J, S) = q_BHTP.shape, k_BJSP.shape[1:3]
    k_bPS, v_bSM, blocks = k_BJSP.flatten(0, 1).mT, v_BJSM.flatten(0, 1), []
    size = max(1, T) if is_traced(q_BHTP) else BLOCK  # a traced loop has a fixed number of rounds
    for start in range(0, max(1, T), size):
        end, first, last = min(start + size, T), 0, S
        if keys_BS is None:  # the queries' own keys, which stand in order
            first, last = 0 if window is None else max(0, start + 1 - window), end
        seen_Bs = (step.positions_BT if keys_BS is None else keys_BS)[:, first:last]
        mask_B1ts = mask_keys(Step(step.positions_BT[:, start:end]), seen_Bs, window)
        q_brP = rearrange(q_BHTP[:, :, start:end], "B (J G) t P -> (B J) (G t) P", J=J)
        none = q_brP.new_zeros(())
        scores_brs = torch.baddbmm(none, q_brP, k_bPS[..., first:last], beta=0, alpha=scale)
        scores_BHts = scores_brs.view(B, H, end - start, last - first)
        scores_BHts = scores_BHts.masked_fill(~mask_B1ts, -torch.inf)
        if sinks_H is not None:
            sink_BHt1 = sinks_H[:, None, None].expand(B, H, end - start, 1)
            scores_BHtz = torch.cat([scores_BHts, sink_BHt1.to(scores_BHts.dtype)], dim=-1)
            weights_BHts = scores_BHtz.softmax(dim=-1)[..., :-1]
        else:
            weights_BHts = scores_BHts.softmax(dim=-1)
        y_brM = weights_BHts.reshape_as(scores_brs) @ v_bSM[:, first:last]
        blocks.append(y_brM.view(B, H, end - start, v_BJSM.shape[3]))
    return torch.cat(blocks, dim=2)


def pieces_pay(q_BHTP: Tensor, k_BJSP: Tensor, window: int | None) -> bool:
    """The rule for `attend_in_pieces`: one query on a CPU, in 16 bits, all heads to the same keys.

    torch's kernel would leave that to one core. From 8 pieces on, several take half the time.
    """
    (B, _, T, _), (J, S) = q_BHTP.shape, k_BJSP.shape[1:3]
    single = B == T == J == 1 and window is None
    narrow = q_BHTP.element_size() == 2
    return single and narrow and products_are_fast(q_BHTP) and S >= 8 * PIECE


def attend_in_pieces(q_BHTP: Tensor, k_BJSP: Tensor, v_BJSM: Tensor, scale: float) -> Tensor:
    """`attend` of a single query, which sees every key, by products over pieces of the keys."""
    q_HP, k_SP, v_SM = q_BHTP[0, :, 0], k_BJSP[0, 0], v_BJSM[0, 0]
    whole = len(k_SP) // PIECE * PIECE
    k_nLP, v_nLM = (x.unflatten(0, (-1, PIECE)) for x in (k_SP[:whole], v_SM[:whole]))
    scores_nHL = q_HP.expand(len(k_nLP), -1, -1) @ k_nLP.mT
    scores_HS = torch.cat([rearrange(scores_nHL, "n H L -> H (n L)"), q_HP @ k_SP[whole:].T], dim=1)
    weights_HS = (scale * scores_HS.float()).softmax(dim=-1).to(v_SM.dtype)
    weights_nHL = rearrange(weights_HS[:, :whole], "H (n L) -> n H L", L=PIECE)
    y_HM = (weights_nHL @ v_nLM).sum(dim=0) + weights_HS[:, whole:] @ v_SM[whole:]
    return y_HM[None, :, None]
