"""What every adapter says about itself, and what a kind of adapter has to do.

A new kind is one file that registers one `Kind`; hosts, training, files and the laboratory find it in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import ConceptSplitError
from ..method.tova import TokenMask
from ..network.families import TRANSFORMERS
from ..network.hooks import Added as Added
from ..network.hooks import Group, Member, Scope
from ..network.site import Site

FORMAT_VERSION = 2
BASES = {
    "sd15": "SD1.5",
    "sd21": "SD2.1",
    "sdxl": "SDXL",
    "demo": "the ConceptSplit demo model",
    "unknown": "unknown",
    **{base: label for family in TRANSFORMERS.values() for base, label in family.bases},
}


@dataclass(frozen=True)
class AdapterInfo:
    """What a file says about its adapter. `rank` may differ per layer after truncation; this is the largest."""

    concept: str
    class_word: str
    base: str = "unknown"
    context_dim: int = 0
    rank: int = 0
    alpha: float = 0.0
    prediction_type: str = "epsilon"
    training: dict[str, Any] = field(default_factory=dict)
    library_version: str = __version__
    format_version: int = FORMAT_VERSION
    kind: str = "value"


class Adapter(Protocol):
    """What hosts and hooks need of an adapter, whatever its kind."""

    info: AdapterInfo

    @property
    def sites(self) -> Sequence[str]:
        """Canonical names of the modules it changes."""
        ...

    def check_fits(self, shapes: Mapping[str, tuple[int, int]], base: str = "unknown") -> None:
        """Refuses an adapter that is not made for the model whose sites have these shapes."""
        ...


Self = TypeVar("Self", bound="TrainedAdapter")


class TrainedAdapter(Adapter, Protocol):
    """What the trainer needs of an adapter besides; `LowRankAdapter` and `TableAdapter` have it."""

    @property
    def layers(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each module's part, by which a stopped training is known again."""
        ...

    def parameters(self) -> list[Tensor]:
        """What learns, in a fixed order."""
        ...

    def moved(self) -> bool:
        """Whether it changes anything."""
        ...

    def to(self: Self, device: torch.device | str) -> Self: ...

    def detached(self: Self, dtype: torch.dtype | None = None) -> Self:
        """A copy on the CPU that shares nothing and has no gradients."""
        ...

    def with_info(self: Self, **changes: Any) -> Self: ...


class Kind(Protocol):
    """A kind of adapter; stateless."""

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> str: ...

    @property
    def scope(self) -> Scope: ...

    def changes(self, site: Site) -> bool:
        """Whether an adapter of this kind that is trained here has parameters for `site`."""
        ...

    def create(self, shapes: Mapping[str, tuple[int, int]], info: AdapterInfo, seed: int) -> Any:
        """An untrained adapter for sites of these shapes (d_in, d_out)."""
        ...

    @property
    def rate(self) -> float:
        """Factor on the learning rate of the settings, whose default suits low-rank pairs."""
        ...

    def begin(self, adapter: Any, encodings: Tensor, captions: Callable[[], Tensor]) -> None:
        """Completes an untrained adapter from what the text encoder says. Most kinds need nothing.

        Args:
            encodings: of the class word, [m, d_ctx], one of each training prompt.
            captions: gives the encodings of the words of many neutral captions, [k, d_ctx]; encoded when it is called.
        """
        ...

    def change(
        self, members: Sequence[Member], site: Site, layer: nn.Module, x: Tensor, out: Tensor, mask: TokenMask
    ) -> Added | None:
        """What `members` together add to a layer's output; None leaves the output as it is, to the bit.

        Args:
            x: what the layer read, [B, T, d_in] or [B, d_in, h, w].
            out: what it gave, [B, T, d_out] or [B, d_out, h', w'].
            mask: [B, T, n], channel i for member i; for a convolution T = h' · w'.
        """
        ...

    def tensors(self, adapter: Any) -> dict[str, Tensor]:
        """What a file stores, by name below `unet.`."""
        ...

    def read(self, tensors: Mapping[str, Tensor], info: AdapterInfo) -> Any:
        """The adapter behind `tensors`."""
        ...


KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> Kind:
    """Makes a kind known to files, hosts and training under its name."""
    KINDS[kind.name] = kind
    return kind


def kind_of(adapter: Any) -> Kind:
    """The kind of an adapter.

    Raises:
        ConceptSplitError: nobody has registered it.
    """
    name = adapter.info.kind
    if name not in KINDS:
        raise ConceptSplitError(
            f"The adapter '{adapter.info.concept}' is of kind '{name}', which this version does not know (it knows "
            f"{', '.join(KINDS)}): update the node pack."
        )
    return KINDS[name]


def grouped(acting: Mapping[int, tuple[Any, float, Scope | None]]) -> tuple[Group, ...]:
    """Adapters of one kind that act in the same place, together; those of strength 0 are left out.

    Args:
        acting: by channel of the masks (adapter, strength, where it acts); None is where its kind does.
    """
    together: dict[tuple[Kind, Scope], list[int]] = {}
    for channel, (adapter, strength, scope) in acting.items():
        if strength != 0.0:
            kind = kind_of(adapter)
            together.setdefault((kind, scope or kind.scope), []).append(channel)
    return tuple(
        Group(kind, tuple(Member(acting[c][0], float(acting[c][1])) for c in channels), tuple(channels), scope)
        for (kind, scope), channels in together.items()
    )


def check_family(info: AdapterInfo, base: str) -> None:
    """Refuses an adapter for a model of the family `base`.

    Raises:
        ConceptSplitError: it was made for another; both are named.
    """
    if "unknown" not in (info.base, base) and info.base != base:
        raise ConceptSplitError(
            f"The adapter '{info.concept}' was made for {BASES.get(info.base, info.base)}, but the model is "
            f"{BASES.get(base, base)}: load a checkpoint of that family or train the concept on this one."
        )


def family(context_dim: int, demo: bool = False) -> str:
    """Base family by the width of the text rows: 768 SD1.5, 1024 SD2.1, 2048 SDXL."""
    return "demo" if demo else {768: "sd15", 1024: "sd21", 2048: "sdxl"}.get(context_dim, "unknown")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp8 and integer storage computes in another precision; adapters then work in float32."""
    return dtype if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) else torch.float32
