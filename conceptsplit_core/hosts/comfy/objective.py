"""The host's UNet as a training objective: a function of a batch, with the adapter that learns on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...adapters.base import TrainedAdapter, kind_of
from ...network.hooks import learning, silent
from ...train.data import TrainBatch
from .model import compute_dtype, network_map


@contextmanager
def objective(
    model: Any, adapter: TrainedAdapter, gradient_checkpointing: bool = False, timesteps: Tensor | None = None
) -> Iterator[tuple[Callable[[TrainBatch], Tensor], Callable[[], AbstractContextManager[None]]]]:
    """The UNet of a loaded BaseModel as a function of a TrainBatch, with `adapter` on its value projections.

    Args:
        timesteps: what the UNet is told for each place of the schedule [T]; the place itself when None.

    Hooks and checkpointing live inside the `with` only. The second thing given is a context in which the adapter is
    silent, for sampling between two steps.
    """
    unet = model.diffusion_model
    dtype = compute_dtype(model)
    table = None if timesteps is None else timesteps.to(next(unet.parameters()).device)
    wrapped: list[Any] = []

    def attention(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
        # The host's faster kernels (sage, flash, sub-quadratic) do not all differentiate.
        return host_attention.attention_pytorch(*args, **kwargs)

    try:
        with learning(network_map(model), kind_of(adapter), adapter) as publish:
            if gradient_checkpointing:
                for module in unet.modules():
                    if isinstance(module, host_attention.BasicTransformerBlock):
                        module.forward = _checkpointed(module.forward)
                        wrapped.append(module)

            def denoise(batch: TrainBatch) -> Tensor:
                comfy.model_management.throw_exception_if_processing_interrupted()
                publish(batch.mask, batch.pixels())
                return unet(
                    batch.x_t.to(dtype),
                    batch.timesteps.float() if table is None else table[batch.timesteps],
                    context=batch.context.to(dtype),
                    y=batch.extra["y"].to(dtype) if "y" in batch.extra else None,
                    transformer_options={"optimized_attention_override": attention},
                ).float()

            yield denoise, partial(silent, publish)
    finally:
        for module in wrapped:
            del module.forward


def _checkpointed(forward: Callable) -> Callable:
    def run(x: Tensor, context: Tensor | None = None, transformer_options: dict[str, Any] | None = None) -> Tensor:
        # A copy of the options per block: the host writes the block's name into one shared dict, and the
        # recomputation would see the last block's everywhere.
        return checkpoint(forward, x, context, dict(transformer_options or {}), use_reentrant=False)

    return run
