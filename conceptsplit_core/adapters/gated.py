"""Key-locked rank-one adapters with a gate: Perfusion (arXiv 2305.01644), about 100 KB a concept on SD1.5.

With e a text row, i* the concept's mean encoding, C the second moment of encodings, W a key or value projection:

    sim = i*ᵀ C⁻¹ e / E,  E = i*ᵀ C⁻¹ i*                      (1 for the concept's own encoding)
    h = W e − sim · W i* + σ((sim − β) / τ) · o*              (its gated rank-one edit)

For values o* is what the adapter learns. For keys it is locked to W i*, so that the concept attends as its class word
does. For several concepts the part of e in the span of all i* is taken out, and the gated o* are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConceptSplitError
from ..method.tova import TokenMask
from ..network.hooks import Member, Scope
from ..network.site import Site
from .base import BASES, AdapterInfo, Added, register

BETA, TAU = 0.75, 0.1
"""The gate's bias and temperature: the paper moves them at run time along its Pareto front."""
_KEY, _VALUE = ".attn2.to_k", ".attn2.to_v"


class GatedAdapter:
    """One concept's.

    Attributes:
        target: i* [1, d_ctx].
        direction: C⁻¹ i* / E [1, d_ctx].
        up: o* per value projection [d_v]; this is what learns.
    """

    def __init__(self, info: AdapterInfo, target: Tensor, direction: Tensor, up: Mapping[str, Tensor]):
        if target.shape != direction.shape or target.ndim != 2 or target.shape[0] != 1 or not up:
            raise ConceptSplitError(
                f"The adapter '{info.concept}' has encodings of shapes {list(target.shape)} and "
                f"{list(direction.shape)} and {len(up)} values: the file is damaged or of another kind."
            )
        self.info = info
        self.target = target
        self.direction = direction
        self.up = dict(up)

    @property
    def sites(self) -> tuple[str, ...]:
        """The value projections, and the key projections beside them."""
        return tuple(site for value in self.up for site in (value.removesuffix(_VALUE) + _KEY, value))

    def parameters(self) -> list[Tensor]:
        return [self.up[site] for site in sorted(self.up)]

    def to(self, device: torch.device | str) -> GatedAdapter:
        """The adapter with all its tensors on `device`."""
        up = {site: value.to(device) for site, value in self.up.items()}
        return GatedAdapter(self.info, self.target.to(device), self.direction.to(device), up)

    def moved(self) -> bool:
        """Whether it changes anything."""
        return bool(self.direction.any())

    def lock(self, encodings: Tensor, moment: Tensor, layers: Mapping[str, nn.Module]) -> None:
        """Begins as the class word: i* is the mean of its encodings [m, d_ctx], o* = W i*.

        Args:
            moment: C, [d_ctx, d_ctx], the second moment of encodings of many prompts.
            layers: the value projections by site.
        """
        target = encodings.float().mean(dim=0, keepdim=True)
        inverse = torch.linalg.solve(moment, target.t()).t()
        self.target, self.direction = target, (inverse / (inverse @ target.t())).contiguous()
        with torch.no_grad():
            self.up = {site: layers[site].forward(target)[0].detach().clone() for site in self.up}

    def check_fits(self, shapes: Mapping[str, tuple[int, int]], base: str = "unknown") -> None:
        """Refuses an adapter of another family or of other shapes.

        Raises:
            ConceptSplitError: see above; both families are named, or the layer.
        """
        mine = self.info.base
        if "unknown" not in (mine, base) and mine != base:
            raise ConceptSplitError(
                f"The adapter '{self.info.concept}' was made for {BASES.get(mine, mine)}, but the model is "
                f"{BASES.get(base, base)}: load a checkpoint of that family or train the concept on this one."
            )
        for site, value in self.up.items():
            if shapes.get(site) != (self.target.shape[1], value.shape[0]):
                raise ConceptSplitError(
                    f"Layer {site} of adapter '{self.info.concept}' does not fit this model: it was made for another "
                    "architecture."
                )


class Gated:
    """The kind of `GatedAdapter`."""

    name = "perfusion"
    label = "gated rank-one edit with locked keys (Perfusion)"
    scope: Scope = "everywhere"

    def changes(self, site: Site) -> bool:
        return site.name.endswith(_VALUE)

    def create(self, shapes: Mapping[str, tuple[int, int]], info: AdapterInfo, seed: int) -> GatedAdapter:
        """One that does nothing until `GatedAdapter.lock` is told what its class word is; `seed` draws nothing."""
        width = next(iter(shapes.values()))[0]
        values = {site: torch.zeros(out) for site, (_, out) in shapes.items()}
        return GatedAdapter(info, torch.zeros(1, width), torch.zeros(1, width), values)

    def change(
        self, members: Sequence[Member], site: Site, layer: nn.Module, x: Tensor, out: Tensor, mask: TokenMask
    ) -> Added | None:
        value = site.name.removesuffix(_KEY) + _VALUE if site.name.endswith(_KEY) else site.name
        acting = [
            (i, m) for i, m in enumerate(members) if m.strength != 0 and value in m.adapter.up and m.adapter.moved()
        ]
        if not acting:
            return None
        adapters = [member.adapter for _, member in acting]
        put = lambda rows: torch.cat(rows).to(x.device, torch.float32)
        targets, directions = put([a.target for a in adapters]), put([a.direction for a in adapters])  # [n, d_ctx]
        places, e = (mask.rows, x[mask.rows]) if mask.rows is not None else (mask.places, x.flatten(0, 1)[mask.places])
        weights = mask.worked[..., [i for i, _ in acting]] * mask.weights.new_tensor([m.strength for _, m in acting])
        with torch.no_grad():
            sim = e.float() @ directions.t()  # [..., n]
            # Of e in the span of all i*, as a mix of them.
            within = sim @ torch.linalg.pinv(targets @ directions.t(), rtol=1e-3)
            gate = torch.sigmoid((sim - BETA) / TAU) * weights
            # `forward`, because a call would come back to the hook that we are in.
            own = layer.forward(targets.to(x.dtype)).float()  # W i* [n, d_out]
        new = own if site.name.endswith(_KEY) else torch.stack([a.up[value].to(own) for a in adapters])
        return places, gate @ new - (within * weights) @ own

    def tensors(self, adapter: GatedAdapter) -> dict[str, Tensor]:
        values = {f"{site}.gated.value": adapter.up[site] for site in sorted(adapter.up)}
        return {"gated.target": adapter.target, "gated.direction": adapter.direction, **values}

    def read(self, tensors: Mapping[str, Tensor], info: AdapterInfo) -> GatedAdapter:
        left: dict[str, Any] = dict(tensors)
        none = torch.zeros(0, 0)
        target, direction = left.pop("gated.target", none), left.pop("gated.direction", none)
        values = {name.removesuffix(".gated.value"): t for name, t in left.items() if name.endswith(".gated.value")}
        if len(values) < len(left):
            odd = next(name for name in left if not name.endswith(".gated.value"))
            raise ConceptSplitError(f"The file holds {odd[:100]!r}, which is no part of a Perfusion adapter.")
        return GatedAdapter(info, target, direction, values)


register(Gated())
