"""A training of milliseconds: one layer, five pictures of 5 × 5 cells, a linear "UNet"."""

import math

import torch

from conceptsplit_core.adapters.base import AdapterInfo
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.train.data import TrainData
from conceptsplit_core.train.prompts import Prompt

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
ALPHAS = torch.cumprod(1 - torch.linspace(1e-3, 0.02, 50), 0)


def new_adapter(seed=0):
    return LowRankAdapter.create({LAYER: (6, 4)}, AdapterInfo("rex", "dog", rank=2, alpha=2.0), seed)


def data(n=5, masks=False, rows=((2,), (3, 4))):
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(n, 4, 5, 5, generator=g) * 0.1 + torch.tensor([1.0, -1.0, 0.5, 0.0]).view(1, 4, 1, 1)
    prompts = [Prompt(f"p{i}", torch.randn(8, 6, generator=g), r) for i, r in enumerate(rows)]
    return TrainData(latents, prompts, (torch.rand(n, 1, 5, 5, generator=g) > 0.5).float() if masks else None)


def toy_denoise(adapter, seen=None):
    """A linear 'UNet': attends to the mean text row's value; the adapter is its only way to learn."""
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(9)) * 0.1

    def denoise(batch):
        if seen is not None:
            seen.append(batch)
        value = batch.context @ base.t()
        down, up, scale = adapter.factor(LAYER, value.device, value.dtype)
        value = value + batch.mask * scale * (batch.context @ down.t() @ up.t())
        return batch.x_t * 0.5 + value.mean(dim=1)[:, :, None, None]

    return denoise


def overflowing(when):
    """A denoiser whose gradient is infinite in the steps that `when` names, while its loss is finite.

    It takes the adapter, and how many steps another one has taken before it.
    """

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, bad):
            ctx.bad = bad
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return (grad * math.inf if ctx.bad else grad), None

    def make(adapter, done=0):
        inner, steps = toy_denoise(adapter), [1] * done

        def denoise(batch):
            steps.append(1)
            return Overflow.apply(inner(batch), when(len(steps)))

        return denoise

    return make
