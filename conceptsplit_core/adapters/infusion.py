"""Infusion (Zeng et al., arXiv 2404.14007): a residual on the values of the concept's word, 27 KB a concept on SD1.5.

    v = W_v e + r      at the concept's own rows, r [d_v] learned for each value projection (paper, residual embedding)
    k = W_k e          of the class word, so that the attention maps stay the model's own

Here the concept lives on its class word, so keys and maps are the class word's without a second text. The paper also
takes the queries of a second, unadapted pass, at twice the cost; that part is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..method.tova import TokenMask
from ..network.hooks import Member, Scope
from ..network.site import Site
from .base import AdapterInfo, Added, compute_dtype, register
from .table import TableAdapter, TableKind


class Infusion(TableKind):
    """The kind; its adapter's own tensors are r [d_v]."""

    name = "infusion"
    label = "a residual on the values of the concept's word (Infusion)"
    scope: Scope = "rows"  # type: ignore[misc]
    part = "infusion.residual"
    rate = 5.0

    def changes(self, site: Site) -> bool:
        return site.name.endswith(".attn2.to_v")

    def create(self, shapes: Mapping[str, tuple[int, int]], info: AdapterInfo, seed: int) -> TableAdapter:
        """r = 0: it begins as the class word; `seed` draws nothing."""
        return TableAdapter(
            replace(info, rank=1, alpha=1.0), {site: torch.zeros(wide) for site, (_, wide) in shapes.items()}
        )

    def change(
        self, members: Sequence[Member], site: Site, layer: nn.Module, x: Tensor, out: Tensor, mask: TokenMask
    ) -> Added | None:
        acting = self.acting(members, site, mask)
        if not acting:
            return None
        dtype = compute_dtype(out.dtype)
        residuals = torch.stack([adapter.ready(site.name, out.device, dtype) * s for _, adapter, s in acting])
        places, _ = mask.work(out)
        return places, mask.worked[..., [i for i, _, _ in acting]].to(dtype) @ residuals


register(Infusion())
