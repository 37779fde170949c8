"""What the core knows of a network: its projections by name, and its attention from pixels to text.

Names are diffusers' (`down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v`), so that a file means the same in
every host. Modules are looked up when they are needed: hosts exchange them between runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConceptSplitError

Reads = Literal["text", "image", "joint", "time"]


@dataclass(frozen=True)
class Site:
    """One module that an adapter may change, or some columns of what it gives.

    name: the canonical name.  path: where the host has it, below the denoiser.
    reads: 'text' rows, 'image' tokens, both behind each other ('joint'), or the 'time' and size embedding, which has no
        tokens.
    columns: (first, count) of the output where several projections are fused in one module; None for all of it.
    values: whether it gives the values that an attention reads of a transformer's text rows.
    """

    name: str
    path: str
    reads: Reads
    columns: tuple[int, int] | None = None
    values: bool = False


@dataclass(frozen=True)
class AttentionSite:
    """One attention whose queries are pixels and whose keys are text rows, or text and pixels together.

    name: canonical name of the attention module; in a transformer, of the module that runs last before the attention.
    downscale: how many times smaller than the latent its grid of pixels is, per side.
    early: before the network's middle, so that a pass may end there.
    values: name of the text's value projection; None is `name`.to_v.
    """

    name: str
    path: str
    downscale: int
    early: bool
    values: str | None = None

    @property
    def q(self) -> str:
        return f"{self.name}.to_q"

    @property
    def k(self) -> str:
        return f"{self.name}.to_k"

    @property
    def v(self) -> str:
        return self.values or f"{self.name}.to_v"


def exchanged(module: nn.Module) -> bool:
    """Whether something has put another `forward` on this very module. One that only stands there again, as hosts leave
    it behind, is the module's own."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", own) is not type(module).forward


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
class TokenSequence:
    """How a transformer lays out its tokens: text first, then the picture row by row, then anything else (padding,
    reference pictures).

    patch: latent pixels of a token, per side.
    multiple: the text is padded to a multiple of so many rows.
    fill: the host fills the text up to so many rows before the model sees it.
    fill_before: whether these rows stand before the text.
    joint: whether attention reads text and picture together; else the text alone, in a cross-attention.
    references_first: whether reference pictures stand before the picture, so that nobody knows where it begins.
    """

    patch: int
    multiple: int = 1
    fill: int = 0
    fill_before: bool = False
    joint: bool = True
    references_first: bool = False

    def size(self, latent: tuple[int, int]) -> tuple[int, int]:
        """(h, w) in tokens of a latent's (h, w); the host pads what does not divide."""
        return -(-latent[0] // self.patch), -(-latent[1] // self.patch)

    def text(self, rows: int) -> int:
        """Tokens of a text of so many rows, padding included."""
        return -(-rows // self.multiple) * self.multiple

    def filled(self, mask: Tensor) -> Tensor:
        """A row mask [L, n] of the encoder's text, for the text that the model sees."""
        missing = max(0, self.fill - len(mask))
        return F.pad(mask, (0, 0, missing, 0) if self.fill_before else (0, 0, 0, missing))


@dataclass(frozen=True)
class NetworkMap:
    """All that a host tells the core about a denoiser.

    family: 'sd15', 'sd21', 'sdxl', 'demo', a transformer's name or 'unknown'.
    sites: every module that may be changed, by canonical name.
    attention: in the order of a forward pass.
    root: gives the denoiser as it is now.
    sequence: a transformer's; None for a UNet.
    readable: the attention sites whose maps show where concepts are; empty lets the settings choose.
    """

    family: str
    sites: Mapping[str, Site]
    attention: tuple[AttentionSite, ...]
    root: Callable[[], nn.Module]
    sequence: TokenSequence | None = None
    readable: tuple[str, ...] = ()

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
            if name not in self.sites:
                continue
            module: Any = self.module(name)
            columns = self.sites[name].columns
            for unit in ("features", "channels"):
                if hasattr(module, f"in_{unit}"):
                    out = columns[1] if columns else getattr(module, f"out_{unit}")
                    found[name] = (int(getattr(module, f"in_{unit}")), int(out))
        return found

    @property
    def value_shapes(self) -> dict[str, tuple[int, int]]:
        """(d_ctx, d_v) of every value projection of text."""
        return self.shapes(one.v for one in self.attention)

    @property
    def context_dim(self) -> int:
        """Width of the text rows."""
        return next(iter(self.value_shapes.values()))[0]
