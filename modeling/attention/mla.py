"""Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values made from one latent.

Per token a latent c (after its norm) and one rotary key r, shared by all heads, are kept; a head's
key is [W_UK c | r] and its value W_UV c. Two forms compute the same:

  expanded  make every head's keys and values from the latents, attend per head;
  absorbed  carry the query into the latent space, q W_UK, attend to the latents themselves, and
            carry the result out with W_UV: nothing is made per cached position.

Shapes: B batch, T new tokens, S positions so far, D model width, H heads, P head width without
position, R rotated width, M value width, C latent rank, Q query rank, W = C + R; p = P + R for a
head's whole query or key, m = P + M for its key without position and value, h = H * m.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from moe import Config, Count, Positive

from ..cache import LayerCache
from ..linear import plain_weight
from ..norm import RMSNorm
from ..rope import RopeConfig, rotate
from ..step import Step
from .caches import EntryCache
from .dot_product import attend


@dataclass(frozen=True, kw_only=True)
class MLAConfig(Config):
    """Multi-head latent attention."""

    num_heads: Count
    query_rank: Count | None  # None: queries are not compressed
    kv_rank: Count  # width of the latent that keys and values are made from
    nope_width: Count  # of a head's query and key: the part without position
    value_width: Count
    rope: RopeConfig  # its width is the other part of a head's query, and the one shared rotary key
    bias: bool = False  # on the two compressions and the output, nowhere else
    latent_norm_epsilon: Positive = 1e-6  # of the norms inside the attention

    @property
    def uncompressed_width(self) -> int:
        """Numbers that plain multi-head attention with these heads keeps of a token."""
        return self.num_heads * (self.nope_width + self.rope.width + self.value_width)

    def build(self, d_model: int) -> "MultiHeadLatentAttention":
        return MultiHeadLatentAttention(d_model, self)


class MultiHeadLatentAttention(nn.Module):
    """MLA with or without query compression; caches exactly (c, r): C + R numbers per token."""

    residual_outputs = ("o.weight",)

    def __init__(self, d_model: int, config: MLAConfig) -> None:
        super().__init__()
        self.config = config
        H, C, Q, R = config.num_heads, config.kv_rank, config.query_rank, config.rope.width
        P, M, bias = config.nope_width, config.value_width, config.bias
        if Q is None:
            self.q: nn.Module = nn.Linear(d_model, H * (P + R), bias=False)
        else:
            steps = OrderedDict[str, nn.Module](
                compress=nn.Linear(d_model, Q, bias=bias),
                norm=RMSNorm(Q, config.latent_norm_epsilon),
                expand=nn.Linear(Q, H * (P + R), bias=False),
            )
            self.q = nn.Sequential(steps)
        self.kv_compress = nn.Linear(d_model, C + R, bias=bias)
        self.kv_norm = RMSNorm(C, config.latent_norm_epsilon)
        self.kv_expand = nn.Linear(C, H * (P + M), bias=False)
        self.o = nn.Linear(H * M, d_model, bias=bias)
        self.scale = (P + R) ** -0.5 * config.rope.softmax_multiplier

    def make_cache(self, batch_size: int, max_length: int, rollback: int = 0) -> LayerCache:
        width = self.config.kv_rank + self.config.rope.width
        return EntryCache(batch_size, max_length, [width])

    def forward(self, x_BTD: Tensor, step: Step, cache: EntryCache | None) -> Tensor:
        c, rope = self.config, self.config.rope
        q_BTHp = rearrange(self.q(x_BTD), "B T (H p) -> B T H p", H=c.num_heads)
        q_BTHP, q_BTHR = q_BTHp.split([c.nope_width, rope.width], dim=-1)
        q_BTHR = rotate(q_BTHR, rope, step)
        latent_BTC, key_BTR = self.kv_compress(x_BTD).split([c.kv_rank, rope.width], dim=-1)
        key_BTR = rotate(key_BTR[:, :, None], rope, step).squeeze(2)
        kept_BSW = torch.cat([self.kv_norm(latent_BTC), key_BTR], dim=-1)
        keys_BS = None
        if cache is not None:
            (kept_BSW,), keys_BS = cache.append(kept_BSW, counts=step.counts)
        plain = plain_weight(self.kv_expand) is not None
        absorbing = plain and absorbing_pays(x_BTD.shape[1], kept_BSW.shape[1], c)
        form = self.attend_absorbed if absorbing else self.attend_expanded
        y_BTHM = form(q_BTHP, q_BTHR, kept_BSW, step, keys_BS)
        return self.o(y_BTHM.flatten(2).contiguous())  # torch multiplies other strides row by row

    def attend_expanded(
        self,
        q_BTHP: Tensor,
        q_BTHR: Tensor,
        kept_BSW: Tensor,
        step: Step,
        keys_BS: Tensor | None,
    ) -> Tensor:
        """Attend per head to keys and values made from the latents; (B, T, H, M)."""
        c = self.config
        latent_BSC, key_BSR = kept_BSW.split([c.kv_rank, c.rope.width], dim=-1)
        kv_BHSm = rearrange(
            self.kv_expand(latent_BSC.contiguous()), "B S (H m) -> B H S m", H=c.num_heads
        )
        k_BHSP, v_BHSM = kv_BHSm.split([c.nope_width, c.value_width], dim=-1)
        shared_BHSR = key_BSR[:, None].expand(-1, c.num_heads, -1, -1)
        q_BHTp = torch.cat([q_BTHP, q_BTHR], dim=-1).transpose(1, 2)
        k_BHSp = torch.cat([k_BHSP, shared_BHSR], dim=-1)
        y_BHTM = attend(q_BHTp, k_BHSp, v_BHSM, step, keys_BS, self.scale)
        return y_BHTM.transpose(1, 2)

    def attend_absorbed(
        self,
        q_BTHP: Tensor,
        q_BTHR: Tensor,
        kept_BSW: Tensor,
        step: Step,
        keys_BS: Tensor | None,
    ) -> Tensor:
        """Attend in the latent space, all heads to the same latents; (B, T, H, M).

        The heads are laid out as further query rows of one head, and the values are the whole
        kept entries (of the result only the latent part is used): one fast kernel, no copies.
        """
        c, weight_hC = self.config, plain_weight(self.kv_expand)
        assert weight_hC is not None, "kv_expand is more than its weight: call `attend_expanded`"
        weight_HmC = rearrange(weight_hC, "(H m) C -> H m C", H=c.num_heads)
        w_uk_HPC, w_uv_HMC = weight_HmC.split([c.nope_width, c.value_width], dim=1)
        # the products take the slices as they lie only in these orders; einsum copies them
        q_HtC = rearrange(q_BTHP, "B T H P -> H (B T) P") @ w_uk_HPC
        q_BTHC = rearrange(q_HtC, "H (B T) C -> B T H C", B=len(q_BTHP))
        q_BHTW = torch.cat([q_BTHC, q_BTHR], dim=-1).transpose(1, 2)
        kept_B1SW = kept_BSW[:, None]
        y_BHTW = attend(q_BHTW, kept_B1SW, kept_B1SW, step, keys_BS, self.scale)
        y_HCt = rearrange(y_BHTW[..., : c.kv_rank], "B H T C -> H C (B T)")
        return rearrange(w_uv_HMC @ y_HCt, "H M (B T) -> B T H M", B=len(q_BTHP))

    def extra_repr(self) -> str:
        c = self.config
        heads = f"{c.num_heads} heads of {c.nope_width} + {c.rope.width} rotary"
        return f"{heads}, values of {c.value_width}, rank {c.kv_rank}"


def absorbing_pays(num_new: int, num_positions: int, config: MLAConfig) -> bool:
    """The rule that picks the form: whichever multiplies less for T new tokens among S positions.

    Per head, expanding costs C (P + M) for each of the S latents and attending (P + R) + M for
    each pair; absorbing costs C (P + M) for each of the T queries and (C + R) + C for each pair.
    Decoding therefore absorbs, a long prefill expands. Absorbing takes `kv_expand` to be its
    weight: where it is anything more, it is called, and the form is the expanded one.
    """
    C, R = config.kv_rank, config.rope.width
    P, M = config.nope_width, config.value_width
    T, S = num_new, num_positions
    expanded = S * C * (P + M) + T * S * (P + R + M)
    absorbed = T * C * (P + M) + T * S * (C + R + C)
    return absorbed < expanded
