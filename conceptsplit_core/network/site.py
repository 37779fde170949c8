"""What the core knows of a network: its projections by name, and its attention from pixels to text.

Names are diffusers' (`down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v`), so that a file means the same in
every host. Modules are looked up when they are needed: hosts exchange them between runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..errors import ConceptSplitError

Reads = Literal["text", "image", "time"]


@dataclass(frozen=True)
class Site:
    """One module that an adapter may change.

    name: the canonical name.  path: where the host has it, below the denoiser.
    reads: 'text' rows, 'image' tokens, or the 'time' and size embedding, which has no tokens.
    """

    name: str
    path: str
    reads: Reads


@dataclass(frozen=True)
class AttentionSite:
    """One attention whose queries are pixels and whose keys are text rows.

    name: canonical name of the attention module.
    downscale: how many times smaller than the latent its grid of pixels is, per side.
    early: before the network's middle, so that a pass may end there.
    """

    name: str
    path: str
    downscale: int
    early: bool

    @property
    def q(self) -> str:
        return f"{self.name}.to_q"

    @property
    def k(self) -> str:
        return f"{self.name}.to_k"

    @property
    def v(self) -> str:
        return f"{self.name}.to_v"


def find_module(root: nn.Module, path: str) -> nn.Module:
    """The module at `path`, also where another pack has put a part of it into a module of its own.

    Raises:
        ConceptSplitError: it is nowhere.
    """
    node: nn.Module = root
    for part in path.split("."):
        inner = getattr(node, part, None)
        if inner is None:
            inner = next((getattr(module, part) for module in node.modules() if hasattr(module, part)), None)
        if inner is None:
            raise ConceptSplitError(
                f"Another node has replaced a part of this model ({path} is not there): adapters and LODA need the "
                "model's own layers; remove that node."
            )
        node = inner
    return node


@dataclass(frozen=True)
class NetworkMap:
    """All that a host tells the core about a denoiser.

    family: 'sd15', 'sd21', 'sdxl', 'demo' or 'unknown'.
    sites: every module that may be changed, by canonical name.
    attention: in the order of a forward pass.
    root: gives the denoiser as it is now.
    """

    family: str
    sites: Mapping[str, Site]
    attention: tuple[AttentionSite, ...]
    root: Callable[[], nn.Module]

    def module(self, name: str) -> nn.Module:
        """The living module of a site or attention, looked up now."""
        site = self.sites.get(name)
        path = site.path if site is not None else next(one.path for one in self.attention if one.name == name)
        return find_module(self.root(), path)

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of those of `names` that are a Linear or a convolution here, read from the module, so
        that quantised storage does not matter."""
        found = {}
        for name in names:
            module: Any = self.module(name) if name in self.sites else None
            for unit in ("features", "channels"):
                if hasattr(module, f"in_{unit}"):
                    found[name] = (int(getattr(module, f"in_{unit}")), int(getattr(module, f"out_{unit}")))
        return found

    @property
    def value_shapes(self) -> dict[str, tuple[int, int]]:
        """(d_ctx, d_v) of every value projection of text."""
        return self.shapes(one.v for one in self.attention)

    @property
    def context_dim(self) -> int:
        """Width of the text rows."""
        return next(iter(self.value_shapes.values()))[0]
