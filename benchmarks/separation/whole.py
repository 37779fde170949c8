"""A LoRA of all that trainers change in a UNet: attention, feed-forward layers and convolutions (LoCon).

The product trains attention alone and reads such files of others; here one is learned by the product's loop, as a
kind that is registered from outside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from conceptsplit_core.adapters.base import AdapterInfo, Kind, register
from conceptsplit_core.adapters.factors import ConvPair
from conceptsplit_core.adapters.low_rank import LowRank, LowRankAdapter

_LINEAR = r"\.to_(q|k|v|out\.0)$|\.ff\.net\.(0\.proj|2)$"
_KERNELS = {r"\.conv[12]?$": 3, r"\.(proj_in|proj_out|conv_shortcut)$": 1}


def kernel(site: str) -> int:
    """Side of the kernel of a convolution of the demo UNet, by its name; 0 for a linear layer."""
    return next((side for pattern, side in _KERNELS.items() if re.search(pattern, site)), 0)


class WholeLora(LowRankAdapter):
    """Its A of a convolution is kept as a matrix [r, d_in · k · k]."""

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        return {site: (d_in // max(1, kernel(site)) ** 2, d_out) for site, (d_in, d_out) in super().layers.items()}

    def factor(self, site: str, device: torch.device, dtype: torch.dtype) -> Any:
        found = super().factor(site, device, dtype)
        if found is None or not (side := kernel(site)):
            return found
        return ConvPair(found[0].unflatten(1, (-1, side, side)), found[1][..., None, None], found[2])


@dataclass(frozen=True)
class _Whole:
    """As the low-rank kind that it holds, but what files of that kind may change does not bind it."""

    pairs: LowRank

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pairs, name)

    def create(self, shapes: Mapping[str, tuple[int, int]], info: AdapterInfo, seed: int) -> LowRankAdapter:
        wide = {site: (d_in * max(1, kernel(site)) ** 2, d_out) for site, (d_in, d_out) in shapes.items()}
        return WholeLora.create(wide, info, seed)

    def read(self, tensors: Mapping[str, Tensor], info: AdapterInfo) -> LowRankAdapter:
        made = self.pairs.read(tensors, info)
        return WholeLora(info, made.down, made.up)


_PATTERN = "|".join((_LINEAR, *_KERNELS))
register(
    cast(Kind, _Whole(LowRank("lora_whole", "LoRA of attention, feed-forward and convolutions", "region", _PATTERN)))
)
