"""Parameter rank reduction: PaRa (Chen et al., arXiv 2406.05641), 1.2 MB a concept on SD1.5 at rank 8.

    W′ = W − Q Qᵀ W,   Q R = B        B [d_out, r] is learned, Q [d_out, r] its orthonormal basis

What the weights can give is reduced to the space without the columns of Q. As a change of a layer's output out = W x
that is − Q Qᵀ out, which needs no weight. Where several concepts meet at one token, their changes are added.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import ConceptSplitError
from ..method.tova import TokenMask
from ..network.hooks import Member, Scope
from ..network.site import Site
from .base import AdapterInfo, Added, compute_dtype, register
from .factors import weighted_change
from .table import TableAdapter, TableKind


class ReducedAdapter(TableAdapter):
    """One concept's; its own tensors are Bᵀ [r, d_out]."""

    def prepared(self, own: Tensor) -> Tensor:
        """Qᵀ [r, d_out]."""
        return torch.linalg.qr(own.t()).Q.t()


class RankReduction(TableKind):
    """The kind of `ReducedAdapter`. It acts where a LoRA does, on the projections of attention that have no bias."""

    name = "para"
    label = "parameter rank reduction (PaRa), routed to the concept's rows and region"
    scope: Scope = "region"  # type: ignore[misc]
    part = "para.basis"
    axes = 2
    adapter = ReducedAdapter

    def changes(self, site: Site) -> bool:
        return re.search(r"\.attn[12]\.to_[qkv]$", site.name) is not None

    def create(self, shapes: Mapping[str, tuple[int, int]], info: AdapterInfo, seed: int) -> TableAdapter:
        """B Gaussian: a basis needs columns. So it begins without a random r of the output's directions."""
        narrow = min(shapes.items(), key=lambda one: one[1][1])
        if not 1 <= info.rank <= narrow[1][1]:
            raise ConceptSplitError(
                f"Rank {info.rank} is not possible: {narrow[0]} has {narrow[1][1]} outputs, so use 1 to "
                f"{narrow[1][1]}, for instance 8."
            )
        generator = torch.Generator().manual_seed(seed)
        draw = lambda wide: torch.randn(info.rank, wide, generator=generator)
        return ReducedAdapter(info, {site: draw(shapes[site][1]) for site in sorted(shapes)})

    def change(
        self, members: Sequence[Member], site: Site, layer: nn.Module, x: Tensor, out: Tensor, mask: TokenMask
    ) -> Added | None:
        acting = self.acting(members, site, mask)
        if not acting:
            return None
        bases = [(i, s, adapter.ready(site.name, out.device, compute_dtype(out.dtype))) for i, adapter, s in acting]
        places, given = mask.work(out)
        return places, weighted_change([(i, s, (q, q.t(), -1.0)) for i, s, q in bases], layer, given, mask)


register(RankReduction())
