"""What a training learns from the model's own attention: masks before the first step, and how far maps overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConceptSplitError
from ..method.attention import bound_attention
from ..method.diffusion import PARAMETERISATIONS
from ..method.subject import attention_masks, map_overlap
from ..network.grid import aggregate, choose_layers, level_sizes, map_size
from ..network.probe import Probe
from ..network.site import AttentionSite, NetworkMap
from ..settings import TrainConfig
from .data import TrainBatch, TrainData

LEVELS = (0.3, 0.5)
"""Shares of the noise schedule at which the model looks at a picture: objects are there, and fine detail is not."""
NOISES = 2
"""Draws of noise at each level."""
LARGEST = 64**2
"""Pixels of the largest maps that are read: attention among pixels takes the square of it."""


def with_masks(
    data: TrainData,
    network: NetworkMap,
    levels: Tensor,
    denoise: Callable[[TrainBatch], Tensor],
    config: TrainConfig,
) -> TrainData:
    """The data with masks where `config` wants them from attention (AttenCraft); else the data itself.

    Args:
        levels, denoise: as `train` takes them. Adapters stay silent.

    Raises:
        ConceptSplitError: masks are given too, or the class word's map is flat.
    """
    if config.mask_from != "attention":
        return data
    if data.masks is not None:
        raise ConceptSplitError(
            "Masks are given and mask_from is 'attention': leave the masks out, or set mask_from to 'given'."
        )
    with torch.inference_mode(False), torch.no_grad():
        masks = torch.stack(
            [_mask(data, index, network, levels, denoise, config) for index in range(len(data.latents))]
        )
    return replace(data, masks=masks)


@contextmanager
def separating(
    network: NetworkMap, data: TrainData, denoise: Callable[[TrainBatch], Tensor], config: TrainConfig
) -> Iterator[tuple[Callable[[TrainBatch], Tensor], Callable[[TrainBatch], Tensor] | None]]:
    """`denoise` and the `penalty` of `train`: config.separate times the overlap of the class word's map with those of
    the other things in the pictures (DisenDiff), as LODA reads maps; None where it is 0.

    Raises:
        ConceptSplitError: nothing stands beside the concept.
    """
    if config.separate == 0.0:
        yield denoise, None
        return
    if not data.prompts[0].others:
        raise ConceptSplitError(
            "separate keeps the concept apart from other things in the pictures: name them in beside, or set it to 0."
        )
    factor, layers = choose_layers({site.name: site.downscale for site in network.attention})
    things = torch.zeros(0)

    def read(site: AttentionSite, layer: nn.Module, query: Tensor, key: Tensor, text: Tensor) -> Tensor | None:
        if text.shape[:2] != things.shape[:2]:  # a pass of a sample picture between two steps
            return None
        return bound_attention(query, key, layer.heads, things)  # type: ignore[arg-type]

    def run(batch: TrainBatch) -> Tensor:
        nonlocal things
        assert batch.others is not None
        things = torch.cat([batch.mask, batch.others], dim=-1)
        return denoise(batch)

    def penalty(batch: TrainBatch) -> Tensor:
        size = level_sizes((batch.x_t.shape[-2], batch.x_t.shape[-1]))[factor]
        return config.separate * map_overlap(aggregate([probe.found[name] for name in layers], size))

    probe = Probe(layers, network, read, lambda: None)
    probe.install()
    try:
        yield run, penalty
    finally:
        probe.remove()


def _mask(
    data: TrainData,
    index: int,
    network: NetworkMap,
    levels: Tensor,
    denoise: Callable[[TrainBatch], Tensor],
    config: TrainConfig,
) -> Tensor:
    """The mask [1, h, w] of one picture."""
    cross, own, grid = look(data, index, network, levels, denoise, config)
    masks = attention_masks(cross, own)
    if not masks[0].any():
        raise ConceptSplitError(
            f'The model does not find "{data.prompts[0].text}" in training image {index + 1}: give masks, or another '
            "class word."
        )
    size = data.latents.shape[-2:]
    return F.interpolate(masks[:1].view(1, 1, *grid), size=size, mode="bilinear")[0]


def look(
    data: TrainData,
    index: int,
    network: NetworkMap,
    levels: Tensor,
    denoise: Callable[[TrainBatch], Tensor],
    config: TrainConfig,
    shares: Sequence[float] = LEVELS,
) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """`_attention` of the first prompt on one picture with noise of the levels at `shares` of the schedule.

    Words are those of the concept and of all that stands beside it.
    """
    places = torch.tensor([int(share * len(levels)) for share in shares]).repeat_interleave(NOISES)
    count = len(places)
    prompt, latent = data.prompts[0], data.latents[index : index + 1].float()
    device, size = latent.device, (latent.shape[-2], latent.shape[-1])
    noise = torch.randn(count, *latent.shape[1:], generator=torch.Generator().manual_seed(index)).to(device)
    level = levels.to("cpu", torch.float32)[places].to(device)
    x_t, _ = PARAMETERISATIONS[config.prediction_type].noised(latent.expand_as(noise), noise, level)
    many = lambda tensor: tensor.to(device).expand(count, *tensor.shape)
    rows = many(prompt.owners())
    batch = TrainBatch(
        x_t,
        places.to(device),
        many(prompt.context),
        rows[..., :1] * 0.0,
        {key: many(value) for key, value in prompt.extra.items()},
        x_t,
        None,
        area=torch.zeros_like(x_t[:, :1]),
    )
    return _attention(network, rows, size, lambda: denoise(batch))


def _attention(
    network: NetworkMap, rows: Tensor, latent: tuple[int, int], run: Callable[[], Any]
) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """What pixels look at in the pass that `run` makes: the maps of words [n, P], from each pixel to all [P, P] or None
    where the network has no attention among pixels alone, and the size (h, w) of both, P = h · w.

    Words are read where LODA reads them, since finer layers also see a word on what merely looks like it; pixels in the
    layers of the largest size that is not above `LARGEST`. Means over batch rows, heads and layers.
    """
    area = latent[0] * latent[1]
    factors = {site.name: site.downscale for site in network.attention}
    finest = next((one for one in sorted(set(factors.values())) if area <= LARGEST * one**2), max(factors.values()))
    factor, names = choose_layers(factors)
    cross = [site for site in network.attention if site.name in names]
    among = [_among_pixels(site) for site in network.attention if site.downscale == finest]
    among = [site for site in among if site.q in network.sites]
    both = replace(network, attention=(*network.attention, *among))

    def read(site: AttentionSite, layer: nn.Module, query: Tensor, key: Tensor, text: Tensor) -> Tensor:
        heads: int = layer.heads  # type: ignore[assignment]
        if site in cross:
            return bound_attention(query, key, heads, rows).mean(dim=0, keepdim=True)
        q, k = (side.float().unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1) for side in (query, key))
        total = q.new_zeros(q.shape[1], k.shape[1])
        for one, other in zip(q, k, strict=True):  # all heads at once would take gigabytes
            total += torch.softmax(one @ other.t() * one.shape[-1] ** -0.5, dim=-1)
        return total / len(q)

    probe = Probe([site.name for site in (*cross, *among)], both, read, lambda: None)
    probe.install()
    try:
        run()
    finally:
        probe.remove()
    sizes = level_sizes(latent)
    words = aggregate([probe.found[site.name] for site in cross], sizes[factor], latent)
    if not among:
        return words[0].flatten(1), None, sizes[factor]
    own = torch.stack([probe.found[site.name] for site in among]).mean(dim=0)
    size = map_size(len(own), latent)
    assert size is not None
    return F.interpolate(words, size=size, mode="bilinear")[0].flatten(1), own, size


def _among_pixels(site: AttentionSite) -> AttentionSite:
    """The attention among pixels that stands before one of pixels to text."""
    name, path = (text.replace("attn2", "attn1") for text in (site.name, site.path))
    return AttentionSite(name, path, site.downscale, site.early)
