"""Adapters that are one tensor per module: what files, devices and the trainer need of them, written once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..errors import ConceptSplitError
from ..method.tova import TokenMask
from ..network.hooks import Member, Scope
from ..network.site import Site
from .base import AdapterInfo, check_family

Self = TypeVar("Self", bound="TableAdapter")


class TableAdapter:
    """One concept's tensors, by the canonical name of the module they belong to.

    Attributes:
        own: what learns: a tensor per module, whose last axis is as long as the module's output is wide.
        shared: what does not learn and belongs to all modules, by name.
    """

    def __init__(self, info: AdapterInfo, own: Mapping[str, Tensor], shared: Mapping[str, Tensor] | None = None):
        if not own:
            raise ConceptSplitError(f"The adapter '{info.concept}' holds no tensor of a module: the file is damaged.")
        self.info = info
        self.own = dict(own)
        self.shared = dict(shared or {})
        self._ready: dict[tuple[str, torch.device, torch.dtype], tuple[Tensor, int, Tensor]] = {}

    @property
    def sites(self) -> tuple[str, ...]:
        """The modules it changes."""
        return tuple(self.own)

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        return {site: tuple(tensor.shape) for site, tensor in self.own.items()}

    def parameters(self) -> list[Tensor]:
        return [self.own[site] for site in sorted(self.own)]

    def moved(self) -> bool:
        """Whether it changes anything."""
        return any(bool(tensor.any()) for tensor in self.own.values())

    def nbytes(self, dtype: torch.dtype = torch.float16) -> int:
        """Size of all tensors if stored as `dtype`."""
        count = sum(tensor.numel() for tensor in (*self.own.values(), *self.shared.values()))
        return count * torch.empty((), dtype=dtype).element_size()

    def to(self: Self, device: torch.device | str) -> Self:
        """The adapter with all its tensors on `device`."""
        return self._copy(lambda tensor: tensor.to(device))

    def detached(self: Self, dtype: torch.dtype | None = None) -> Self:
        """A copy that shares nothing, on the CPU, without gradients; usable outside and inside inference mode."""
        with torch.inference_mode(False), torch.no_grad():
            return self._copy(lambda tensor: tensor.detach().to("cpu", dtype or tensor.dtype, copy=True))

    def with_info(self: Self, **changes: Any) -> Self:
        """The same tensors under other facts, for instance another concept name."""
        return type(self)(replace(self.info, **changes), self.own, self.shared)

    def _copy(self: Self, moved: Any) -> Self:
        own, shared = ({name: moved(one) for name, one in table.items()} for table in (self.own, self.shared))
        return type(self)(self.info, own, shared)

    def truncated(self, rank: int) -> Any:
        raise ConceptSplitError(
            f"The adapter '{self.info.concept}' has no low-rank pairs to reduce: save it as it is, with reduce_rank 0."
        )

    def ready(self, site: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A module's tensor as `prepared` makes it, on `device` in `dtype`. Made once, and anew while it learns."""
        own = self.own[site]
        if own.requires_grad:
            return self.prepared(own.to(device)).to(dtype)
        key = (site, device, dtype)
        known = self._ready.get(key)
        version = 0 if own.is_inference() else own._version
        if known is None or known[0] is not own or known[1] != version:
            with torch.inference_mode(False), torch.no_grad():
                made = self.prepared(own.to(device, torch.promote_types(own.dtype, torch.float32))).to(dtype)
            known = self._ready[key] = (own, version, made)
        return known[2]

    def prepared(self, own: Tensor) -> Tensor:
        """What the equation takes in place of the stored tensor; in single precision or better."""
        return own

    def fits(self, own: Tensor, read: int, given: int) -> bool:
        """Whether a module's tensor is one for a module that reads and gives so many values."""
        return own.shape[-1] == given

    def check_fits(self, shapes: Mapping[str, tuple[int, int]], base: str = "unknown") -> None:
        """Refuses an adapter of another family or of other shapes.

        Raises:
            ConceptSplitError: see above; both families are named, or the layer.
        """
        check_family(self.info, base)
        for site, tensor in self.own.items():
            if site not in shapes or not self.fits(tensor, *shapes[site]):
                raise ConceptSplitError(
                    f"Layer {site} of adapter '{self.info.concept}' does not fit this model: it was made for another "
                    "architecture."
                )


class TableKind:
    """What is alike for all kinds whose adapters are a `TableAdapter`; a kind adds `changes`, `create` and `change`.

    part: how a file calls a module's tensor, behind the module's name.  axes: how many axes it has.
    common: names of the shared tensors.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    scope: ClassVar[Scope]
    part: ClassVar[str]
    axes: ClassVar[int] = 1
    common: ClassVar[tuple[str, ...]] = ()
    adapter: ClassVar[type[TableAdapter]] = TableAdapter
    rate: ClassVar[float] = 1.0

    def begin(self, adapter: Any, encodings: Tensor, captions: Callable[[], Tensor]) -> None:
        """Nothing, for most kinds."""

    def tensors(self, adapter: TableAdapter) -> dict[str, Tensor]:
        own = {f"{site}.{self.part}": adapter.own[site] for site in sorted(adapter.own)}
        return {**{name: adapter.shared[name] for name in self.common}, **own}

    def read(self, tensors: Mapping[str, Tensor], info: AdapterInfo) -> TableAdapter:
        """The adapter behind `tensors`.

        Raises:
            ConceptSplitError: a tensor is missing, has another form, or is no part of such an adapter.
        """
        own, shared, end = {}, {}, f".{self.part}"
        for name, tensor in tensors.items():
            if name in self.common:
                shared[name] = tensor
            elif name.endswith(end) and tensor.ndim == self.axes and tensor.numel():
                own[name.removesuffix(end)] = tensor
            else:
                raise ConceptSplitError(
                    f"The file holds {name[:100]!r} of shape {list(tensor.shape)}, which is no part of an adapter of "
                    f"kind '{self.name}': it is damaged or of another kind."
                )
        if missing := [name for name in self.common if name not in shared]:
            raise ConceptSplitError(
                f"The file of the adapter '{info.concept}' lacks {missing[0]!r}, which an adapter of kind "
                f"'{self.name}' has: it is damaged."
            )
        return self.adapter(info, own, shared)

    @staticmethod
    def acting(members: Sequence[Member], site: Site, mask: TokenMask) -> list[tuple[int, Any, float]]:
        """(channel, adapter, strength) of those that do something at this module."""
        return [
            (i, member.adapter, member.strength)
            for i, member in enumerate(members)
            if member.strength != 0.0 and mask.bound[i] and site.name in member.adapter.sites
        ]
