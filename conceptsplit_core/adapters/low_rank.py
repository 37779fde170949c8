"""Low-rank adapters: for every projection a pair A [r, d_in], B [d_out, r], so that it adds s · (α/r) · B A x.

A *value adapter* has pairs on the cross-attention's value projections alone and acts only at its concept's own text
rows (paper, ToVA). The other kinds of this file change other projections in the same way, or act at other tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConceptSplitError
from ..method.tova import Pair, TokenMask
from ..network.site import Site
from .base import AdapterInfo, Added, Member, Scope, check_family, compute_dtype, register
from .factors import Factor, Stacks, weighted_change


class LowRankAdapter:
    """A concept's low-rank pairs, by the canonical name of the projection they change.

    Attributes:
        info: what is known about it.
        down: A per projection, [r, d_in].
        up: B per projection, [d_out, r].
    """

    def __init__(self, info: AdapterInfo, down: Mapping[str, Tensor], up: Mapping[str, Tensor]):
        if set(down) != set(up) or not down:
            odd = sorted(set(down) ^ set(up))
            raise ConceptSplitError(
                f"The adapter '{info.concept}' has no complete layer: "
                + (f"layer {odd[0]} lacks one of its two matrices." if odd else "it holds no tensors of a projection.")
            )
        for layer in down:
            a, b = down[layer], up[layer]
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
                raise ConceptSplitError(
                    f"Layer {layer} of adapter '{info.concept}' has shapes {list(a.shape)} and {list(b.shape)}, "
                    "which do not form a low-rank pair [r, d_in], [d_out, r]: the file is damaged or of another kind."
                )
        self.info = info
        self.down = dict(down)
        self.up = dict(up)
        self.stacks = Stacks()
        self._cache: dict[tuple[str, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @classmethod
    def create(cls, layers: Mapping[str, tuple[int, int]], info: AdapterInfo, seed: int) -> LowRankAdapter:
        """A fresh adapter for training: A Gaussian with std 1/r, B zero, in fp32 on the CPU.

        Args:
            layers: projection to (d_in, d_out).
            info: `rank` and `alpha` are taken from here.
            seed: the same seed gives the same A on every machine.
        """
        if info.rank < 1:
            raise ConceptSplitError(f"Rank {info.rank} is not possible: use 1 or more, for instance 8.")
        generator = torch.Generator().manual_seed(seed)
        down = {
            layer: torch.randn(info.rank, layers[layer][0], generator=generator) / info.rank for layer in sorted(layers)
        }
        up = {layer: torch.zeros(layers[layer][1], info.rank) for layer in sorted(layers)}
        return cls(info, down, up)

    @property
    def sites(self) -> tuple[str, ...]:
        """The projections it changes."""
        return tuple(self.down)

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Projection to (d_in, d_out)."""
        return {layer: (self.down[layer].shape[1], self.up[layer].shape[0]) for layer in self.down}

    def rank_of(self, layer: str) -> int:
        return self.down[layer].shape[0]

    def scale(self, layer: str) -> float:
        """α/r. After truncation the factor stays α / the rank it was trained with."""
        rank = self.info.rank or self.rank_of(layer)
        alpha = self.info.alpha or float(rank)
        return alpha / rank

    def parameters(self) -> list[Tensor]:
        """All A and B, in a fixed order (layers sorted, A before B)."""
        return [tensor for layer in sorted(self.down) for tensor in (self.down[layer], self.up[layer])]

    def moved(self) -> bool:
        """Whether it changes anything."""
        return any(bool(up.any()) for up in self.up.values())

    def factor(self, site: str, device: torch.device, dtype: torch.dtype) -> Pair | None:
        """(A, B, α/r) of a projection on `device` in `dtype`, or None if the adapter does not change it.

        Copies are made once per device and dtype. Tensors that require a gradient are returned as they are, moved
        if they must be: a copy would take training's gradient away.
        """
        if site not in self.down:
            return None
        down, up = self.down[site], self.up[site]
        if (
            down.requires_grad
            or up.requires_grad
            or (down.device == up.device == device and down.dtype == up.dtype == dtype)
        ):
            return down.to(device), up.to(device), self.scale(site)
        key = (site, device, dtype)
        if key not in self._cache:
            # Outside inference mode, so that a copy first made while sampling can also serve a gradient pass.
            with torch.inference_mode(False):
                self._cache[key] = (down.to(device, dtype), up.to(device, dtype))
        return (*self._cache[key], self.scale(site))

    def keep(self, site: str, down: Tensor, up: Tensor) -> None:
        """Takes equal matrices of a projection in the place of its own copies on their device and in their dtype."""
        if (key := (site, down.device, down.dtype)) in self._cache:
            self._cache[key] = (down, up)

    def detached(self, dtype: torch.dtype | None = None) -> LowRankAdapter:
        """A copy that shares nothing, on the CPU, without gradients; usable outside and inside inference mode."""
        with torch.inference_mode(False), torch.no_grad():
            copy = lambda t: t.detach().to("cpu", dtype or t.dtype, copy=True)
            return type(self)(
                self.info, {k: copy(v) for k, v in self.down.items()}, {k: copy(v) for k, v in self.up.items()}
            )

    def to(self, device: torch.device | str) -> LowRankAdapter:
        """The adapter with all its tensors on `device`; those already there are shared, not copied."""
        return type(self)(
            self.info,
            {layer: tensor.to(device) for layer, tensor in self.down.items()},
            {layer: tensor.to(device) for layer, tensor in self.up.items()},
        )

    def with_info(self, **changes: Any) -> LowRankAdapter:
        """The same tensors under other facts, for instance another concept name."""
        return type(self)(replace(self.info, **changes), self.down, self.up)

    def nbytes(self, dtype: torch.dtype = torch.float16) -> int:
        """Size of all tensors if stored as `dtype`."""
        return sum(t.numel() for t in self.parameters()) * torch.empty((), dtype=dtype).element_size()

    def truncated(self, rank: int) -> tuple[LowRankAdapter, float]:
        """The best approximation of lower rank, and its relative error ‖ΔW − ΔW_r‖ / ‖ΔW‖ over all layers.

        By SVD of B A, computed from the small factors (QR of both sides), so the full d_v × d_ctx matrix is never
        formed. Singular values are shared between the factors evenly, which keeps half precision safe.
        """
        if rank < 1:
            raise ConceptSplitError(f"Cannot truncate to rank {rank}: use 1 or more.")
        down: dict[str, Tensor] = {}
        up: dict[str, Tensor] = {}
        lost = total = 0.0
        for layer in self.down:
            a, b = self.down[layer].detach().double(), self.up[layer].detach().double()
            qa, ra = torch.linalg.qr(a.t())  # a = raᵀ qaᵀ
            qb, rb = torch.linalg.qr(b)
            u, s, vh = torch.linalg.svd(rb @ ra.t())
            keep = min(rank, s.numel())
            total += float((s**2).sum())
            lost += float((s[keep:] ** 2).sum())
            root = s[:keep].sqrt()
            up[layer] = (qb @ u[:, :keep] * root).to(self.up[layer].dtype).contiguous()
            down[layer] = (root[:, None] * vh[:keep] @ qa.t()).to(self.down[layer].dtype).contiguous()
        # scale() divides alpha by info.rank: keeping both keeps the factor the adapter was trained with.
        training = {**self.info.training, "truncated_to_rank": rank}
        error = (lost / total) ** 0.5 if total > 0 else 0.0
        return LowRankAdapter(replace(self.info, training=training), down, up), error

    def check_fits(self, layers: Mapping[str, tuple[int, int]], base: str = "unknown") -> None:
        """Refuses an adapter that is not made for the model with these layers.

        Raises:
            ConceptSplitError: another base family (both named), no layer in common, or a shape that differs.
        """
        check_family(self.info, base)
        strange = sorted(set(self.down) - set(layers))
        if len(strange) == len(self.down):
            raise ConceptSplitError(
                f"No layer of adapter '{self.info.concept}' exists in this model (first: {strange[0]}): it was "
                "made for another architecture."
            )
        if strange:
            raise ConceptSplitError(
                f"Layer {strange[0]} of adapter '{self.info.concept}' does not exist in this model: it was made "
                "for another architecture."
            )
        for layer, shape in self.layers.items():
            if shape != tuple(layers[layer]):
                raise ConceptSplitError(
                    f"Layer {layer} of adapter '{self.info.concept}' maps {shape[0]} to {shape[1]} values, the "
                    f"model's maps {layers[layer][0]} to {layers[layer][1]}: it was made for another model family."
                )


@dataclass(frozen=True)
class LowRank:
    """Kinds whose change is a weighted sum of low-rank pairs; they differ in where they act.

    trained: what of a UNet has parameters when an adapter of this kind is trained here, as a pattern of canonical
        names. Of a transformer a kind of scope `values` has those of all values of text rows.
    """

    name: str
    label: str
    scope: Scope
    trained: str
    rate: float = 1.0

    def changes(self, site: Site) -> bool:
        return re.search(self.trained, site.name) is not None or (site.values and self.scope == "values")

    def create(self, shapes: Mapping[str, tuple[int, int]], info: AdapterInfo, seed: int) -> LowRankAdapter:
        return LowRankAdapter.create(shapes, info, seed)

    def begin(self, adapter: LowRankAdapter, encodings: Tensor, captions: Callable[[], Tensor]) -> None:
        """Nothing: B is zero."""

    def change(
        self, members: Sequence[Member], site: Site, layer: nn.Module, x: Tensor, out: Tensor, mask: TokenMask
    ) -> Added | None:
        factors: list[tuple[int, float, Pair | Factor]] = []
        paired: list[Any] = []  # the adapters whose factor is a pair
        for i, member in enumerate(members):
            if member.strength == 0.0 or not mask.bound[i]:
                continue
            factor = member.adapter.factor(site.name, out.device, compute_dtype(out.dtype))
            if factor is not None:
                factors.append((i, member.strength, factor))
                if isinstance(factor, tuple):
                    paired.append(member.adapter)
        if not factors:
            return None

        # Of a text only the tokens with an owner are multiplied: a handful of 77 rows of a prompt.
        places, tokens = mask.work(x)
        stack = lambda pairs: paired[0].stacks.of(site.name, pairs, paired)
        return places, weighted_change(factors, layer, tokens, mask, stack)

    def tensors(self, adapter: LowRankAdapter) -> dict[str, Tensor]:
        sides = (("lora_A", adapter.down), ("lora_B", adapter.up))
        return {f"{site}.{side}.weight": table[site] for site in sorted(adapter.down) for side, table in sides}

    def read(self, tensors: Mapping[str, Tensor], info: AdapterInfo) -> LowRankAdapter:
        table = {
            side: {name.removesuffix(f".{side}.weight"): t for name, t in tensors.items() if f".{side}." in name}
            for side in ("lora_A", "lora_B")
        }
        return LowRankAdapter(info, table["lora_A"], table["lora_B"])


_ATTENTION = r"\.attn[12]\.to_(q|k|v|out\.0)$"

VALUE = register(LowRank("value", "value adapter (ToVA)", "values", r"\.attn2\.to_v$"))
register(LowRank("key", "keys at the concept's rows", "rows", r"\.attn2\.to_k$"))
register(LowRank("key_value", "keys and values at the concept's rows", "rows", r"\.attn2\.to_[kv]$"))
register(LowRank("lora", "LoRA, routed to the concept's rows and region", "region", _ATTENTION))
register(LowRank("tara", "LoRA whose text side is kept to the concept's rows (TARA)", "image", _ATTENTION))
register(LowRank("lora_key_value", "LoRA on keys and values of all rows", "everywhere", r"\.attn2\.to_[kv]$"))
