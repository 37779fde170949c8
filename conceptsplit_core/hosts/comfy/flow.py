"""A transformer of the host as a training objective: the flow that it predicts, with the adapter that learns on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from ...adapters.base import TrainedAdapter, kind_of
from ...errors import ConceptSplitError
from ...network.hooks import learning, remove_hooks, silent
from ...network.tokens import CallTokens
from ...train.data import TrainBatch
from .autograd import plain_kernels
from .joint import JointAttention
from .memory import FirstBlock, TooLarge
from .model import network_map

GUIDANCE = 1.0
"""What a model that is distilled for guidance is told while it learns: the plain flow, as common trainers have it."""


@contextmanager
def flow_objective(
    model: Any, adapter: TrainedAdapter, sigmas: Tensor, gradient_checkpointing: bool = False
) -> Iterator[tuple[Callable[[TrainBatch], Tensor], Callable[[], AbstractContextManager[None]]]]:
    """The transformer of a loaded BaseModel as a function of a TrainBatch whose texts are all the same, with `adapter`
    on the values of its text rows. Gives the same two things as `objective.objective`.

    Args:
        sigmas: noise level of each place of the schedule [T].
    """
    network, denoiser = network_map(model), model.diffusion_model
    sequence = network.sequence
    assert sequence is not None
    levels = sigmas.to(next(denoiser.parameters()).device)
    blocks = {".".join(site.path.split(".")[:2]) for site in network.attention} if gradient_checkpointing else set()
    attention: JointAttention | None = None
    watch = FirstBlock(network, None, levels.device, _stop_training)
    watch.install()
    try:
        with (
            learning(network, kind_of(adapter), adapter) as publish,
            plain_kernels(),
            _copied_norms(denoiser),
            _checkpointed([denoiser.get_submodule(path) for path in blocks]),
        ):

            def denoise(batch: TrainBatch) -> Tensor:
                nonlocal attention
                comfy.model_management.throw_exception_if_processing_interrupted()
                if attention is not None:
                    attention.remove()
                latent = (batch.x_t.shape[-2], batch.x_t.shape[-1])
                rows = sequence.filled(batch.mask[0]).expand(len(batch.x_t), -1, -1)
                # Both stay until the next pass: with checkpointing the backward pass runs the blocks again.
                attention = JointAttention(network, rows, latent, differentiated=True)
                attention.values = sequence.joint
                attention.install()
                publish(
                    rows,
                    joint=CallTokens(rows, None, latent, sequence).joint,
                    values=attention.hold if sequence.joint else None,
                )
                x = framed(model, batch.x_t)
                sigma = levels[batch.timesteps]
                options = {"optimized_attention_override": attention.override(None)}
                clean = model.apply_model(x, sigma, transformer_options=options, **_conditions(model, batch, x))
                return ((x - clean.float()) / sigma.view(-1, *[1] * (x.ndim - 1))).view(batch.x_t.shape)

            yield denoise, partial(silent, publish)
    finally:
        watch.remove()
        if attention is not None:
            attention.remove()


def _stop_training(missing: TooLarge) -> None:
    raise ConceptSplitError(
        f"Training on this model needs more memory than is free ({missing}): switch gradient_checkpointing on, or take "
        "smaller pictures or a smaller batch_size."
    )


def framed(model: Any, latents: Tensor) -> Tensor:
    """Latents [N, C, h, w] as the model takes them, which for some is a video of one frame."""
    return latents.unsqueeze(2) if model.latent_format.latent_dimensions == 3 else latents


def distilled(model: Any) -> bool:
    """Whether guidance is a number that the model is told, as Flux.1 dev is."""
    return bool(getattr(getattr(model.diffusion_model, "params", None), "guidance_embed", False))


def _conditions(model: Any, batch: TrainBatch, x: Tensor) -> dict[str, Any]:
    """What the host's model reads of the batch's text, as its samplers give it.

    Raises:
        ConceptSplitError: it reads another picture too.
    """
    cond: dict[str, Any] = {
        "cross_attn": batch.context[:1],
        "guidance": GUIDANCE,
        "pooled_output": None,  # of encoders that have none
        **{key: value[0] for key, value in batch.extra.items()},
        "model_conds": {},
    }
    with torch.no_grad():
        encoded = comfy.samplers.encode_model_conds(model.extra_conds, [cond], x, x.device, "positive")
    found = {
        key: value.process_cond(batch_size=len(x), device=x.device, area=None).cond
        for key, value in encoded[0]["model_conds"].items()
    }
    if "c_concat" in found:
        raise ConceptSplitError(
            f"This model ({type(model).__name__}) reads another picture beside the noisy one (inpainting, edges or "
            "depth): train on the model it was made from; the adapter works on both."
        )
    return found


@contextmanager
def _copied_norms(denoiser: nn.Module) -> Iterator[None]:
    """While it is on, what a LayerNorm reads is a copy. Blocks of Flux add to the same tensor in place afterwards, and
    the backward pass would find another one than the forward pass has read; with checkpointing without a word."""
    copy = lambda module, inputs: (inputs[0].clone(), *inputs[1:])
    norms = [module for module in denoiser.modules() if isinstance(module, nn.LayerNorm)]
    handles = [module.register_forward_pre_hook(copy) for module in norms]
    try:
        yield
    finally:
        remove_hooks(handles)


@contextmanager
def _checkpointed(blocks: list[nn.Module]) -> Iterator[None]:
    """While it is on, blocks keep nothing but what they read, and are computed again in the backward pass."""
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = _again(block.forward)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            vars(block).pop("forward", None)
            if own is not None:
                block.forward = own


def _again(forward: Callable) -> Callable:
    # Copies inside, so that what the block writes in place is not what it will read again; of the options too, in which
    # the host notes the block's number.
    def computed(*args: Any, **kwargs: Any) -> Any:
        own = tree_map_only(Tensor, lambda tensor: tensor.clone(), (args, kwargs))
        return forward(*own[0], **own[1])

    return lambda *args, **kwargs: checkpoint(computed, *args, use_reentrant=False, **kwargs)
