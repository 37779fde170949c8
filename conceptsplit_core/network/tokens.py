"""Which tokens of a layer belong to whom, during one call of the denoiser."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..method.regions import resize_areas
from ..method.tova import Rows, TokenMask, taken
from .grid import map_size
from .hooks import Scope
from .site import TokenSequence


def weights_of(rows: Tensor) -> Tensor:
    """A concept's weight in each text, [B, n] of a row mask [B, L, n]: of all its rows' weights, which may be negative,
    the one that is largest."""
    return rows.take_along_dim(rows.abs().argmax(dim=1, keepdim=True), dim=1).squeeze(1)


class CallTokens:
    """Pixels by each concept's area, in the batch rows where it acts; text rows as the row mask says.

    Args:
        rows: [b, L, n], whose text rows are whose in this call's batch.
        areas: [b, n, h, w] in 0…1 of each batch row; None where no area is known, and concepts own all pixels.
        latent: (h, w) that the call sees.
        sequence: a transformer's; None for a UNet, whose layers have grids of many sizes.
        unbound: [b, n], the weight with which concepts act on the pixels of a batch row whose text does not bind them:
            those of the unconditional branch. None is nowhere.
    """

    def __init__(
        self,
        rows: Tensor,
        areas: Tensor | None,
        latent: tuple[int, int],
        sequence: TokenSequence | None = None,
        unbound: Tensor | None = None,
    ):
        self.rows = rows
        self.bound = weights_of(rows)
        if unbound is not None:
            self.bound = torch.where(self.bound == 0, unbound.to(self.bound), self.bound)
            self.owners = range(len(rows))  # a look at the numbers would wait for the device
        self.areas = areas
        self.latent = latent
        self.sequence = sequence
        self._known: dict[tuple[object, ...], TokenMask | None] = {}

    @cached_property
    def owners(self) -> Rows:
        """Batch rows in which some concept may act."""
        found = self.bound.to("cpu").any(dim=1).nonzero().flatten()
        rows = range(int(found[0]), int(found[-1]) + 1) if len(found) else range(0)
        return rows if len(rows) == len(found) else found.to(self.bound.device)

    def pixels(self, out: Tensor) -> TokenMask | None:
        """The mask of a layer's output [B, T, d] or [B, d, h, w]; None where its grid is not the latent's."""
        grid = (out.shape[2], out.shape[3]) if out.ndim == 4 else None
        tokens = out.shape[1] if grid is None else grid[0] * grid[1]
        key = (out.shape[0], grid or tokens)
        if key not in self._known:
            weights = self._pixels(out.shape[0], tokens, grid)
            self._known[key] = None if weights is None else TokenMask(weights, self.owners)
        return self._known[key]

    def joint(self, out: Tensor, scope: Scope) -> TokenMask | None:
        """The same for an output that holds the text's tokens and then the picture's, where adapters of `scope` act."""
        if self.sequence is None:
            return None
        key = (out.shape[0], out.shape[1], scope)
        if key not in self._known:
            self._known[key] = self._joint(out, scope, self.sequence)
        return self._known[key]

    def _joint(self, out: Tensor, scope: Scope, sequence: TokenSequence) -> TokenMask | None:
        text = sequence.text(self.rows.shape[1])
        rest = out.shape[1] - text
        h, w = sequence.size(self.latent)
        if out.shape[0] != self.rows.shape[0] or rest < h * w:
            return None
        rows = F.pad(self.rows, (0, 0, 0, text - self.rows.shape[1]))
        if scope in ("rows", "values"):
            return TokenMask(F.pad(rows, (0, 0, 0, rest)))
        pixels = self._pixels(out.shape[0], rest, None)
        return None if pixels is None else TokenMask(torch.cat([taken(rows, self.owners), pixels], dim=1), self.owners)

    def _pixels(self, batch: int, tokens: int, grid: tuple[int, int] | None) -> Tensor | None:
        """Weights [p, tokens, n] of the batch rows `owners`."""
        if batch != self.bound.shape[0] or not len(self.owners):
            return None
        bound = taken(self.bound, self.owners)[:, None]
        size = grid
        if size is None:
            size = map_size(tokens, self.latent) if self.sequence is None else self.sequence.size(self.latent)
        if self.areas is None and self.sequence is None:
            return bound.expand(-1, tokens, -1)
        if size is None or size[0] * size[1] > tokens:
            return None
        weights = bound.expand(-1, size[0] * size[1], -1)
        if self.areas is not None:
            weights = weights * resize_areas(taken(self.areas, self.owners), size).flatten(2).transpose(1, 2)
        # What follows the picture in a transformer's sequence (padding, reference pictures) is nobody's.
        return F.pad(weights, (0, 0, 0, tokens - size[0] * size[1]))
