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


def attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Plain multi-head attention with an optional additive logit bias [B, Lq, L]; q, k, v are [B, ·, H·d]."""
    qh, kh, vh = (rearrange(t, "b l (h d) -> b h l d", h=heads) for t in (q, k, v))
    attn_mask = None if bias is None else bias.to(q.dtype).unsqueeze(1)
    out = F.scaled_dot_product_attention(qh, kh, vh, attn_mask=attn_mask, scale=scale)
    return rearrange(out, "b h l d -> b l (h d)")
