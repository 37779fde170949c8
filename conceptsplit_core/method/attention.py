"""Cross-attention with value deltas, logit bias and map capture, as pure functions.

Shapes: B batch rows, L text rows, Lq pixels (h·w), n concepts, H heads, d head width, r rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def bound_attention(
    q: Tensor, k: Tensor, heads: int, mask: Tensor, scale: float | None = None, logit_bias: Tensor | None = None
) -> Tensor:
    """Attention maps of the bound concepts: M_i = mean over heads and over rows_i of softmax(QKᵀ/√d)[:, rows_i].

    The softmax runs over all L rows in fp32 (fp64 stays fp64); only bound columns are kept.

    Args:
        q: [B, Lq, H·d];  k: [B, L, H·d];  mask: [B, L, n], nonzero where a row belongs to a concept.
        scale: logit scale, 1/√d when None.
        logit_bias: optional [B, Lq, L] that the real attention adds too.

    Returns:
        [B, n, Lq]; a concept without a row in that batch row has a map of zeros.
    """
    member = (mask != 0).to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    # Which columns does any concept of any batch row use? exp() only those: a few of 77.
    columns = member.sum(dim=(0, 2)).nonzero().flatten()
    weights = member[:, columns] / member.sum(dim=1, keepdim=True).clamp(min=1.0)  # [B, m, n]
    args = (q, k, heads, scale, columns, weights, logit_bias)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        # The logits of every head and row are by far the largest tensors here (SDXL: 6 MB a layer, 60 layers);
        # computing them twice costs less than a hundredth of the layer and keeps only q and k alive.
        return checkpoint(_bound_attention, *args, use_reentrant=False, preserve_rng_state=False)
    return _bound_attention(*args)


def _bound_attention(
    q: Tensor, k: Tensor, heads: int, scale: float | None, columns: Tensor, weights: Tensor, logit_bias: Tensor | None
) -> Tensor:
    qh = rearrange(q, "b q (h d) -> b h q d", h=heads).to(weights.dtype)
    kh = rearrange(k, "b l (h d) -> b h l d", h=heads).to(weights.dtype)
    logits = (qh * (qh.shape[-1] ** -0.5 if scale is None else scale)) @ kh.transpose(-1, -2)
    if logit_bias is not None:
        logits = logits + logit_bias.to(weights.dtype).unsqueeze(1)
    log_total = torch.logsumexp(logits, dim=-1, keepdim=True)
    kept = torch.exp(logits[..., columns] - log_total).mean(dim=1)  # [B, Lq, m]
    return (kept @ weights).transpose(1, 2)


def member_attention(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """The same maps where text and picture are attended to together, without a matrix of all pixels and keys: the
    values that fused attention averages are the rows' membership, so that its output is the attention they get.

    Args:
        q: [B, H, Lq, d];  k: [B, H, L, d], as the attention gets them;  mask: [B, L', n] of the first L' ≤ L keys.

    Returns:
        [B, n, Lq] in at least fp32, for n ≤ d.
    """
    member = (mask != 0).to(q.dtype)
    values = F.pad(member, (0, q.shape[-1] - mask.shape[-1], 0, k.shape[2] - mask.shape[1]))
    out = F.scaled_dot_product_attention(q, k, values.unsqueeze(1).expand(-1, q.shape[1], -1, -1))
    kept = out[..., : mask.shape[-1]].to(torch.promote_types(q.dtype, torch.float32)).mean(dim=1)
    return kept.transpose(1, 2) / member.sum(dim=1).clamp(min=1.0).unsqueeze(-1)


def with_logits(
    q: Tensor, k: Tensor, v: Tensor, logits: Tensor, first: int, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose plain attention has logits added where pixels meet the rows of concepts.

    A bias b_i(p) on the rows of concept i has rank n: it is n more dimensions of every head, so that no [Lq, L] matrix
    exists and kernels without a mask can serve. The caller cuts the outputs back to d.

    Args:
        q, k, v: [B, H, ·, d].
        logits: [B, n, p] for the queries first … first + p.
        mask: [B, L', n] of the first L' keys.
    """
    d, n = q.shape[-1], mask.shape[-1]
    more = -(-n // 8) * 8  # kernels want widths that 8 divides
    # Plain attention divides by √(d + more), and must divide what it was given by √d and the bias by nothing.
    q = F.pad(q * ((d + more) / d) ** 0.5, (0, more))
    k, v = F.pad(k, (0, more)), F.pad(v, (0, more))
    # −1e8 is beyond half precision, and −∞ times the other rows' 0 would be NaN.
    most = 0.5 * min(torch.finfo(t.dtype).max for t in (q, logits)) / (d + more) ** 0.5
    added = logits.transpose(1, 2).clamp(-most, most).to(q) * (d + more) ** 0.5
    q[:, :, first : first + logits.shape[-1], d : d + n] = added.unsqueeze(1)
    k[:, :, : mask.shape[1], d : d + n] = (mask != 0).to(k).unsqueeze(1)
    return q, k, v


def with_rows(v: Tensor, batch: Tensor, rows: Tensor, added: Tensor) -> Tensor:
    """Values with something added at some keys, as a new tensor.

    Args:
        v: [B, H, L, d].
        batch, rows: the keys' places, [p] each.
        added: [p, G·d]; with G < H, where one key head serves several query heads, each of the G is repeated in a row.
    """
    by_head = added.unflatten(-1, (-1, v.shape[-1]))
    by_head = by_head.repeat_interleave(v.shape[1] // by_head.shape[1], dim=1)
    new = v.clone()
    new[batch, :, rows] += by_head.to(v.dtype)
    return new


def attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Plain multi-head attention with an optional additive logit bias [B, Lq, L]; q, k, v are [B, ·, H·d]."""
    qh, kh, vh = (rearrange(t, "b l (h d) -> b h l d", h=heads) for t in (q, k, v))
    attn_mask = None if bias is None else bias.to(q.dtype).unsqueeze(1)
    out = F.scaled_dot_product_attention(qh, kh, vh, attn_mask=attn_mask, scale=scale)
    return rearrange(out, "b h l d -> b l (h d)")
