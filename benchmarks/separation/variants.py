"""Ideas of other papers that the core does not have, made for one run at a time on the living model.

Other losses, update rules and region rules are entries of the core's registries. What is left here is put in place for
the length of a `with` block, by hooks, or changes the prompt's rows.
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
from conceptsplit_core.method.attention import attend
from conceptsplit_core.method.maps import gaussian_blur
from conceptsplit_core.method.regions import suppression_bias
from conceptsplit_core.network.hooks import remove_hooks

SHARPNESS = 20.0
"""Exponent on cosine similarity in `corrected`."""


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
        smooth = gaussian_blur(maps.unflatten(-1, (side, side)), sigma)
        bias = suppression_bias(smooth, own, keep)
        return args, {**kwargs, "attention_mask": bias.to(hidden.dtype)}

    layers: dict[str, nn.Module] = host.cross_attention_layers(model.unet)
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers.values()]
    try:
        yield
    finally:
        remove_hooks(handles)


NAMES = ("", "similarities", "suppression")


@contextmanager
def varied(model: host.DiffusersModel, name: str, mask: Tensor) -> Iterator[None]:
    """The variant `name` in place while the block runs; "" is none. mask: see `suppressing`."""
    if name not in NAMES:
        raise ValueError(f"unknown variant {name!r}; known: {', '.join(NAMES[1:])}")
    if name == "suppression":
        with suppressing(model, mask):
            yield
    else:
        yield


def texts(name: str, positive: Sequence[host.Conditioning]) -> list[host.Conditioning]:
    """The prompts as a variant encodes them."""
    return [corrected(cond) for cond in positive] if name == "similarities" else list(positive)
