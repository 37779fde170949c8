"""Our programs and the ones they are compared with, as small functions on the same model.

The paper's way is written here from its description: a full forward pass of the UNet per update, with the
probabilities of all cross-attention layers formed and stored, the divergence of one side, and the gradient of the
latent. Autograd prunes its backward pass to what the loss depends on, as it does in any such program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.hosts.diffusers import sampling as host_sample
from conceptsplit_core.method.loda import LodaTrace, separate
from conceptsplit_core.method.regions import regions as find_regions
from conceptsplit_core.network.grid import aggregate, choose_layers, level_sizes
from conceptsplit_core.network.hooks import KeptDeltas
from conceptsplit_core.settings import LodaConfig
from conceptsplit_core.train.data import TrainBatch
from conceptsplit_core.train.loop import batch_loss

from .models import Built, concept_row

# --- ours -----------------------------------------------------------------------------------------------------


def wanted_layers(built: Built, config: LodaConfig) -> tuple[list[str], tuple[int, int]]:
    """The layers whose maps LODA reads, and the maps' size, as `host.sample` chooses them."""
    chosen, layers = choose_layers(host.layer_factors(built.model.unet), config.map_downscale, config.map_part)
    return layers, level_sizes(built.grid)[chosen]


@contextmanager
def sampling(
    built: Built, adapters: Sequence[tuple[LowRankAdapter | None, float]], kept: KeptDeltas | None = None
) -> Iterator[host.Patch]:
    """The model as `host.sample` has it during a run; with `kept` of an earlier block, in a later step of that run."""
    with host.patched(built.model, adapters) as patch:
        patch.state.kept = KeptDeltas() if kept is None else kept
        yield patch


def map_reader(built: Built, patch: host.Patch, mask: Tensor, config: LodaConfig) -> Callable[[Tensor], Tensor]:
    """The conditional branch's maps [B, n, h, w] of a latent x₀ + σ·ε at σ = 1, as `host.sample` reads them."""
    layers, size = wanted_layers(built, config)
    batch = mask.shape[0]
    _, context, pooled = built.batch(batch)

    def maps_of(x: Tensor) -> Tensor:
        patch.state.mask = mask
        with patch.capturing(layers, mask) as maps:
            found = maps
            host.call_unet(built.model, x / 2**0.5, built.t, context, pooled)
        return aggregate(list(found.values()), size)

    return maps_of


def update(built: Built, patch: host.Patch, mask: Tensor, config: LodaConfig) -> LodaTrace:
    """One LODA update of mask.shape[0] pictures, with whatever adapters `patch` has."""
    trace = LodaTrace()
    x, _, _ = built.batch(mask.shape[0])
    separate(x, 1.0, 0, map_reader(built, patch, mask, config), config.for_schedule(50), trace)
    return trace


@torch.no_grad()
def cfg_call(built: Built, patch: host.Patch | None = None, mask: Tensor | None = None, batch: int = 1) -> Tensor:
    """One sampling step's UNet call: unconditional and conditional rows together. With `mask` the second half is
    bound."""
    x, context, pooled = built.batch(2 * batch)
    if patch is not None and mask is not None:
        patch.state.mask = torch.cat([torch.zeros_like(mask), mask])
    return host.call_unet(built.model, x, built.t, context, pooled)


@torch.no_grad()
def region_bias(built: Built, patch: host.Patch, mask: Tensor, config: LodaConfig) -> None:
    """AFG: reads the maps once and publishes every layer's bias for `cfg_call`."""
    found = map_reader(built, patch, mask, config)(built.batch(mask.shape[0])[0])
    areas = find_regions(found, config.afg_region, config.afg_smoothing)
    factors = host.layer_factors(built.model.unet)
    patch.bias = host_sample._biases(areas, mask, factors, level_sizes(built.grid), config, built.model.dtype, True)


def train_step(
    denoise: Callable[[TrainBatch], Tensor], parameters: Sequence[Tensor], batch: TrainBatch
) -> tuple[Tensor, ...]:
    """Forward and backward of one training step."""
    return torch.autograd.grad(batch_loss(denoise(batch), batch), list(parameters), allow_unused=True)


@contextmanager
def our_training(
    built: Built, adapter: LowRankAdapter, checkpointing: bool = False
) -> Iterator[tuple[Callable[[TrainBatch], Tensor], list[Tensor]]]:
    """`denoise` and what learns, for `train_step`."""
    parameters = adapter.parameters()
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        # Checkpointing in diffusers is a matter of training mode.
        built.model.unet.train(checkpointing)
        with host.training_denoiser(built.model, adapter, checkpointing) as denoise:
            yield denoise, parameters
    finally:
        built.model.unet.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)


# --- the paper's way ------------------------------------------------------------------------------------------


class StoringProcessor:
    """Attention that forms its probabilities and keeps those of cross-attention, one store for all layers.

    Self-attention stays fused unless `also_self`: the paper's file for this is missing, so the peer gets the benefit
    of the doubt.
    """

    def __init__(self, store: list[Tensor], also_self: bool = False):
        self.store, self.also_self = store, also_self

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        rows = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(rows), attn.to_v(rows)
        b, _, width = q.shape
        split = lambda t: t.view(b, -1, attn.heads, width // attn.heads).transpose(1, 2)
        if encoder_hidden_states is None and not self.also_self:  # self-attention
            out = F.scaled_dot_product_attention(split(q), split(k), split(v), scale=attn.scale)
        else:
            probabilities = (split(q) @ split(k).transpose(-1, -2) * attn.scale).softmax(dim=-1)
            if encoder_hidden_states is not None:
                self.store.append(probabilities)
            out = probabilities @ split(v)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).reshape(b, -1, width)))


@contextmanager
def storing(built: Built, also_self: bool = False) -> Iterator[list[Tensor]]:
    """All cross-attention probabilities [B, heads, pixels, rows] of each call, in the list; emptied by the caller."""
    store: list[Tensor] = []
    before = dict(built.model.unet.attn_processors)
    built.model.unet.set_attn_processor(StoringProcessor(store, also_self))
    try:
        yield store
    finally:
        built.model.unet.set_attn_processor(before)


def paper_update(
    built: Built, store: list[Tensor], concepts: int, size: tuple[int, int], whole_backward: bool = False
) -> Tensor:
    """One update of one picture the paper's way; gives the new latent.

    Args:
        store: of `storing`.
        whole_backward: let the loss depend on the prediction too, so that the backward pass runs through the whole
            UNet: the issue's wording of the peer, which autograd otherwise prunes.
    """
    store.clear()
    x = built.x.clone().requires_grad_(True)
    out = host.call_unet(built.model, x, built.t, built.context, built.pooled)
    pixels = size[0] * size[1]
    maps = torch.stack([p.mean(dim=1) for p in store if p.shape[-2] == pixels]).mean(dim=0).float()
    kernel = torch.ones(1, 1, 7, 7) / 49
    chosen = []
    for i in range(concepts):
        one = maps[:, :, concept_row(i)].view(-1, 1, *size)
        # Its own padding shrinks the map; on a small one nothing would be left. The cost is nil either way.
        one = F.conv2d(F.pad(one, (3, 3, 3, 3), mode="replicate"), kernel)
        chosen.append(one / one.sum())
    divergences = [(p * ((p + 1e-8).log() - (q + 1e-8).log())).sum() for p, q in combinations(chosen, 2)]
    loss = F.relu(10.0 - len(divergences) / sum(1 / (d + 1e-8) for d in divergences))
    if whole_backward:
        loss = loss + 0.0 * out.mean()
    (gradient,) = torch.autograd.grad(loss, x)
    return (x - 20 * gradient).detach()


# --- LoRA on to_v through peft and diffusers ------------------------------------------------------------------


def add_lora(unet: Any, rank: int) -> list[nn.Parameter]:
    """LoRA on every cross-attention's to_v, as diffusers' training scripts add it; gives its fp32 parameters."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=r".*attn2\.to_v")
    if isinstance(next(unet.parameters()), FakeTensor):
        # Fake parameters cannot be moved, and are in fp32 and on the only device there is.
        with mock.patch.object(nn.Module, "to", lambda module, *_, **__: module):
            unet.add_adapter(config, "bench")
    else:
        unet.add_adapter(config, "bench")
        cast_training_params(unet, dtype=torch.float32)
    return [p for p in unet.parameters() if p.requires_grad]


def remove_lora(unet: Any) -> None:
    unet.unload_lora()
    unet.requires_grad_(False)


def lora_denoise(built: Built) -> Callable[[TrainBatch], Tensor]:
    """The prediction of a UNet that carries a LoRA in its weights, for `train_step`."""

    def denoise(batch: TrainBatch) -> Tensor:
        return host.call_unet(built.model, batch.x_t, batch.timesteps, batch.context, batch.extra.get("pooled"))

    return denoise


@torch.no_grad()
def encode_each_step(vae: Any, encoders: Sequence[nn.Module], pixels: int, batch: int) -> None:
    """What such scripts do before each step's UNet call: the picture and the prompt through their encoders."""
    weight = next(vae.parameters())
    vae.encode(torch.randn(batch, 3, pixels, pixels, dtype=weight.dtype)).latent_dist.sample()
    ids = torch.ones(batch, 77, dtype=torch.int64)
    for encoder in encoders:
        encoder(ids, output_hidden_states=True)
