"""Ideas of other papers that the core does not have, made for one run at a time on the living model.

An idea enters the core only by winning here. Until then it is put in place for the length of a `with` block: by hooks,
by changed text rows, or by exchanging one function of the core's LODA module, which is put back in every case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.hosts.diffusers import sampling as host_sample
from conceptsplit_core.method import loda as loda_core
from conceptsplit_core.method.attention import attend
from conceptsplit_core.method.divergence import harmonic_mean
from conceptsplit_core.method.maps import distributions, gaussian_blur, normalise
from conceptsplit_core.network.hooks import remove_hooks
from conceptsplit_core.settings import LodaConfig

SHARPNESS = 20.0
"""Exponent on cosine similarity in `corrected`."""


def sign_update(gradient: Tensor, loss: Tensor, eta: float, config: LodaConfig) -> Tensor:
    """The core's normalised rule with the gradient's sign in place of its RMS scaling: every cell moves by η."""
    active = (loss > 0).view(-1, *[1] * (gradient.ndim - 1))
    gradient = gradient - gradient.mean(dim=(-2, -1), keepdim=True)
    reach = (loss / config.target).clamp(max=1.0).sqrt().view_as(active).to(gradient)
    return torch.where(active, eta * reach * gradient.sign(), torch.zeros_like(gradient))


def iou_loss(maps: Tensor, divergence: str, threshold: float, sigma: float) -> tuple[Tensor, Tensor]:
    """DisenDiff's overlap in place of a divergence: ReLU(t − HM(1 − Σ min(P, Q) / Σ max(P, Q))) over pairs.

    Same arguments and results as the core's `separation_loss`; `divergence` is not looked at.
    """
    p = distributions(maps, sigma)
    n = p.shape[1]
    values = torch.stack(
        [
            1.0 - torch.minimum(p[:, i], p[:, j]).sum(dim=(-2, -1)) / torch.maximum(p[:, i], p[:, j]).sum(dim=(-2, -1))
            for i in range(n)
            for j in range(i + 1, n)
        ],
        dim=1,
    )
    return F.relu(threshold - harmonic_mean(values)), values


IOU_THRESHOLD = 0.9
"""Two Gaussian blobs of σ = 1/8 of the picture 3 σ apart have this 1 − IoU, as the core's own thresholds have it."""


def overlapping_regions(maps: Tensor, fraction: float, sigma: float) -> Tensor:
    """AFG's regions as the paper's code has them: a pixel may belong to several concepts."""
    smooth = normalise(gaussian_blur(maps, sigma)).flatten(2)
    count = max(1, round(fraction * smooth.shape[-1]))
    claim = torch.zeros_like(smooth, dtype=torch.bool).scatter(-1, smooth.topk(count, dim=-1).indices, True)
    claim &= (maps.flatten(2).sum(dim=-1) > 0).unsqueeze(-1)
    return claim.reshape(maps.shape)


def corrected(cond: host.Conditioning) -> host.Conditioning:
    """T2I-Zero's correction by similarities, as we read it: a concept's row becomes the mean of the prompt's rows
    weighted by their cosine similarity to it, sharpened, so that what is peculiar to this context is evened out.

    Rows after the last bound one stay out of the mean: they are marks and padding.
    """
    rows = sorted({row for binding in cond.bindings for row in binding.rows})
    if not rows:
        return cond
    context = cond.context.clone()
    words = cond.context[0, 1 : rows[-1] + 1]
    near = F.normalize(cond.context[0, rows], dim=-1) @ F.normalize(words, dim=-1).t()
    weight = near.clamp(min=0) ** SHARPNESS
    context[0, rows] = (weight / weight.sum(dim=-1, keepdim=True)) @ words
    return replace(cond, context=context)


@contextmanager
def suppressing(model: host.DiffusersModel, mask: Tensor, sigma: float = 1.0, keep: float = 0.0) -> Iterator[None]:
    """T2I-Zero's cross-token non-maximum suppression: at each pixel only the concept with the strongest (smoothed)
    map keeps its attention, the rows of the others are shut out there, in every cross-attention of the conditional
    branch at every step.

    mask: [B, L, n] rows of the conditional branch; a pass of twice as many rows is a guided one, as in `attached`.
    keep: share of the attention that a suppressed row keeps.
    """

    def hook(attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        context = kwargs.get("encoder_hidden_states")
        if context is None or kwargs.get("attention_mask") is not None:
            return None
        own = mask if context.shape[0] == mask.shape[0] else torch.cat([torch.zeros_like(mask), mask])
        q, k = attn.to_q(hidden), attn.to_k(context)
        # Values that are the row masks themselves make attention return the maps.
        n, side = own.shape[-1], round(hidden.shape[1] ** 0.5)
        width = q.shape[-1] // attn.heads
        values = F.pad(own, (0, width - n)).repeat(1, 1, attn.heads)
        maps = attend(q, k, values, attn.heads, scale=attn.scale)
        maps = maps.unflatten(-1, (attn.heads, width)).mean(dim=-2)[..., :n].transpose(1, 2)
        smooth = gaussian_blur(maps.unflatten(-1, (side, side)), sigma).flatten(2)  # [B, n, Lq]
        loses = (smooth < smooth.amax(dim=1, keepdim=True)).to(own.dtype)
        shut = torch.log(torch.tensor(max(keep, 1e-9)))
        bias = torch.einsum("bnp,bln->bpl", loses, (own != 0).to(own.dtype)) * shut
        return args, {**kwargs, "attention_mask": bias.to(hidden.dtype)}

    layers: dict[str, nn.Module] = host.cross_attention_layers(model.unet)
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers.values()]
    try:
        yield
    finally:
        remove_hooks(handles)


EXCHANGED: dict[str, tuple[tuple[Any, str], Any]] = {
    "sign": ((loda_core, "_update"), sign_update),
    "iou": ((loda_core, "separation_loss"), iou_loss),
    "overlapping": ((host_sample, "find_regions"), overlapping_regions),
}
TEXT = ("similarities",)
NAMES = ("", *EXCHANGED, *TEXT, "suppression")


@contextmanager
def varied(model: host.DiffusersModel, name: str, mask: Tensor) -> Iterator[None]:
    """The variant `name` in place while the block runs; "" is none. mask: see `suppressing`."""
    if name not in NAMES:
        raise ValueError(f"unknown variant {name!r}; known: {', '.join(NAMES[1:])}")
    if name in EXCHANGED:
        function, other = EXCHANGED[name]
        was = getattr(*function)
        setattr(*function, other)
        try:
            yield
        finally:
            setattr(*function, was)
    elif name == "suppression":
        with suppressing(model, mask):
            yield
    else:
        yield


def texts(name: str, positive: Sequence[host.Conditioning]) -> list[host.Conditioning]:
    """The prompts as a variant encodes them."""
    return [corrected(cond) for cond in positive] if name == "similarities" else list(positive)
