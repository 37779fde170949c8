"""The programs that are compared, on the same model: ours through the host's public functions, and the peers.

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

from conceptsplit_core.adapters.lora import LoraAdapter
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.settings import LodaConfig
from conceptsplit_core.train.data import TrainBatch
from conceptsplit_core.train.loop import batch_loss

from .meter import Cost, measured
from .models import Built, concept_name, concept_row

# --- ours -----------------------------------------------------------------------------------------------------


def picture(
    built: Built,
    steps: int,
    loda: LodaConfig | None = None,
    adapters: Sequence[LowRankAdapter | LoraAdapter] = (),
    concepts: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> host.SampleResult:
    """A whole picture with guidance. Concepts without an adapter are bound all the same."""
    concepts = max(concepts, len(adapters))
    side = built.x.shape[-1] * built.model.pixel_factor
    return host.sample(
        built.model,
        [built.conditioning(concepts)],
        built.conditioning(),
        seeds=[0],
        concepts=[concept_name(i) for i in range(concepts)],
        adapters={concept_name(i): (adapter, 1.0) for i, adapter in enumerate(adapters)},
        steps=steps,
        size=(side, side),
        loda=loda,
        progress=progress,
    )


class _Enough(Exception):
    """Ends a counted picture before it is decoded: fake tensors have no pixels."""


def step_costs(built: Built, steps: int, loda: LodaConfig | None = None, **options: Any) -> list[Cost]:
    """What each step of `picture` costs, with the LODA updates made at its start."""
    found: list[Cost] = []

    def after_step(done: int, total: int) -> None:
        found.append(cost.lap())
        if done == total:
            raise _Enough

    with measured() as cost:
        try:
            picture(built, steps, loda, progress=after_step, **options)
        except _Enough:
            pass
    return found


def train_step(denoise: Callable[[TrainBatch], Tensor], parameters: Sequence[Tensor], batch: TrainBatch) -> None:
    """Forward and backward of one training step."""
    torch.autograd.grad(batch_loss(denoise(batch), batch), list(parameters), allow_unused=True)


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
    """Attention that forms the probabilities of cross-attention and keeps them, one store for all layers.

    Self-attention stays fused: the paper's file for this is missing, so the peer gets the benefit of the doubt.
    """

    def __init__(self, store: list[Tensor]):
        self.store = store

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        rows = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(rows), attn.to_v(rows)
        b, _, width = q.shape
        q, k, v = (t.view(b, -1, attn.heads, width // attn.heads).transpose(1, 2) for t in (q, k, v))
        if encoder_hidden_states is None:
            out = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        else:
            self.store.append((q @ k.transpose(-1, -2) * attn.scale).softmax(dim=-1))
            out = self.store[-1] @ v
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).reshape(b, -1, width)))


@contextmanager
def storing(built: Built) -> Iterator[list[Tensor]]:
    """All cross-attention probabilities [B, heads, pixels, rows] of each call, in the list; emptied by the caller."""
    store: list[Tensor] = []
    before = dict(built.model.unet.attn_processors)
    built.model.unet.set_attn_processor(StoringProcessor(store))
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
        size: (h, w) of the maps that are read.
        whole_backward: let the loss depend on the prediction too, so that the backward pass runs through the whole
            UNet, which autograd otherwise prunes.
    """
    store.clear()
    x = built.x.clone().requires_grad_(True)
    out = host.call_unet(built.model, x, built.t, built.context, built.pooled)
    maps = torch.stack([p.mean(dim=1) for p in store if p.shape[-2] == size[0] * size[1]]).mean(dim=0).float()
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
