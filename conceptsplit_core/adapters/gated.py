"""Key-locked rank-one adapters with a gate: Perfusion (Tewel et al., arXiv 2305.01644), 31 KB a concept on SD1.5.

Letters: e, a text row [d_ctx]; W, a key or value projection; i*, the concept's encoding, the mean over prompts of its
class word's; C, the uncentred covariance of text encodings; o*, what the edited W gives for i*.

    (1)  C = E[e eᵀ], over the words of neutral captions                                    `covariance`
    (2)  sim(e) = i*ᵀ C⁻¹ e / E,  E = i*ᵀ C⁻¹ i*          (1 at i*; linear in e)              `GatedAdapter.lock`
    (3)  h = W e − sim(e) · W i* + σ((sim(e) − β) / τ) · o*      (the gated rank-one edit)   `Gated.change`
    (4)  keys: o* = W i*, so that the concept attends as its class word does (key locking)   `Gated.change`
    (5)  values: o* = W i* + r, with r learned from 0 on                                     `Gated.change`
    (6)  several concepts: Σ_j sim_j W i*_j becomes W of the part of e in the span of all i*_j, under C⁻¹; the gated
         o*_j are added                                                                      `Gated.change`

Only (2) needs C, so a file keeps the vector C⁻¹ i* / E in place of it. β and τ may change at run time: with a higher β
or a lower τ the concept acts at fewer rows, which costs likeness and saves the rest of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ConceptSplitError
from ..method.tova import TokenMask
from ..network.hooks import Member, Scope
from ..network.site import Site
from ..settings import GateConfig
from .base import AdapterInfo, Added, register
from .table import TableAdapter, TableKind

Self = TypeVar("Self", bound="GatedAdapter")
RIDGE = 1e-3
"""Share of its mean diagonal that is added to C, so that a few hundred captions can be inverted."""
_KEY, _VALUE = ".attn2.to_k", ".attn2.to_v"
_TARGET, _DIRECTION = "gated.target", "gated.direction"


def covariance(rows: Tensor) -> Tensor:
    """C of (1) with a little ridge, [d, d], from encodings [k, d] of words."""
    e = rows.cpu().double()  # not every GPU has double precision
    moment = e.t() @ e / len(e)
    return moment + RIDGE * moment.diagonal().mean() * torch.eye(e.shape[1], dtype=e.dtype)


class GatedAdapter(TableAdapter):
    """One concept's.

    Attributes:
        own: r per value projection [d_v].
        target: i* [1, d_ctx].
        direction: C⁻¹ i* / E [1, d_ctx].
        gate: β and τ.
    """

    def __init__(self, info: AdapterInfo, own: Mapping[str, Tensor], shared: Mapping[str, Tensor]):
        super().__init__(info, own, shared)
        self.gate = GateConfig()
        target, direction = self.target, self.direction
        if target.shape != direction.shape or target.ndim != 2 or target.shape[0] != 1:
            raise ConceptSplitError(
                f"The adapter '{info.concept}' has encodings of shapes {list(target.shape)} and "
                f"{list(direction.shape)}: the file is damaged or of another kind."
            )

    @property
    def target(self) -> Tensor:
        return self.shared[_TARGET]

    @property
    def direction(self) -> Tensor:
        return self.shared[_DIRECTION]

    @property
    def sites(self) -> tuple[str, ...]:
        """The value projections, and the key projections beside them."""
        return tuple(site for value in self.own for site in (value.removesuffix(_VALUE) + _KEY, value))

    def moved(self) -> bool:
        """Whether it is locked to an encoding; from then on its keys are edited."""
        return bool(self.direction.any())

    def fits(self, own: Tensor, read: int, given: int) -> bool:
        return super().fits(own, read, given) and read == self.target.shape[1]

    def gated(self: Self, gate: GateConfig) -> Self:
        """The same concept with another β and τ."""
        other = type(self)(self.info, self.own, self.shared)
        other.gate = gate
        return other

    def _copy(self, moved: Any) -> GatedAdapter:
        return super()._copy(moved).gated(self.gate)

    def with_info(self, **changes: Any) -> GatedAdapter:
        return super().with_info(**changes).gated(self.gate)

    def lock(self, encodings: Tensor, moment: Tensor) -> None:
        """Begins as the class word: i* is the mean of its encodings [m, d_ctx], under C [d_ctx, d_ctx]."""
        target = encodings.cpu().double().mean(dim=0, keepdim=True)
        inverse = torch.linalg.solve(moment.to(target), target.t()).t()
        found = {_TARGET: target, _DIRECTION: inverse / (inverse @ target.t())}
        like = lambda one, old: one.to(old.dtype).to(old.device).contiguous()
        self.shared = {**self.shared, **{name: like(one, self.shared[name]) for name, one in found.items()}}


def openness(gates: Sequence[GateConfig], sim: Tensor) -> Tensor:
    """How far each of n gates is open (3) for rows of these similarities [..., n]."""
    beta, tau = (sim.new_tensor([getattr(gate, name) for gate in gates]) for name in ("gate_bias", "gate_temperature"))
    return torch.sigmoid((sim - beta) / tau)


def with_gate(adapter: Any, gate: GateConfig) -> Any:
    """A Perfusion adapter with this β and τ; any other as it is."""
    return adapter.gated(gate) if isinstance(adapter, GatedAdapter) else adapter


class Gated(TableKind):
    """The kind of `GatedAdapter`."""

    name = "perfusion"
    label = "gated rank-one edit with locked keys (Perfusion)"
    scope: Scope = "everywhere"  # type: ignore[misc]
    part = "gated.residual"
    common = (_TARGET, _DIRECTION)
    adapter = GatedAdapter
    rate = 5.0

    def changes(self, site: Site) -> bool:
        return site.name.endswith(_VALUE)

    def create(self, shapes: Mapping[str, tuple[int, int]], info: AdapterInfo, seed: int) -> GatedAdapter:
        """One that does nothing until `GatedAdapter.lock` is told what its class word is; `seed` draws nothing."""
        width = next(iter(shapes.values()))[0]
        values = {site: torch.zeros(out) for site, (_, out) in shapes.items()}
        nothing = {name: torch.zeros(1, width) for name in self.common}
        return GatedAdapter(replace(info, rank=1, alpha=1.0), values, nothing)

    def begin(self, adapter: GatedAdapter, encodings: Tensor, captions: Callable[[], Tensor]) -> None:
        adapter.lock(encodings, covariance(captions()))

    def change(
        self, members: Sequence[Member], site: Site, layer: nn.Module, x: Tensor, out: Tensor, mask: TokenMask
    ) -> Added | None:
        acting = self.acting(members, site, mask)
        if not acting:
            return None
        adapters = [adapter for _, adapter, _ in acting]
        put = lambda rows: torch.cat(rows).to(x.device, torch.float32)
        targets, directions = put([a.target for a in adapters]), put([a.direction for a in adapters])  # [n, d_ctx]
        places, e = mask.work(x)
        weights = mask.worked[..., [i for i, _, _ in acting]] * targets.new_tensor([s for _, _, s in acting])
        with torch.no_grad():
            sim = e.float() @ directions.t()  # (2), [..., n]
            within = sim
            if len(acting) > 1:  # (6): of e in the span of all i*, as a mix of them
                within = sim @ torch.linalg.pinv(targets @ directions.t(), rtol=1e-3)
            gate = openness([a.gate for a in adapters], sim) * weights
            # `forward`, because a call would come back to the hook that we are in.
            own = layer.forward(targets.to(x.dtype)).float()  # W i* [n, d_out]
        new = own  # (4)
        if site.name.endswith(_VALUE):
            new = own + torch.stack([a.ready(site.name, own.device, torch.float32) for a in adapters])  # (5)
        return places, gate @ new - (within * weights) @ own  # (3)


register(Gated())
