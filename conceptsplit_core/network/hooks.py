"""Adapters on living PyTorch modules, the same way in every host and for every kind: forward hooks.

A hook adds to a layer's *output*, so LoRA (merged or bypass), quantised and offloaded weights of that layer keep their
meaning, and its parameters are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..method.tova import Product, Rows, TokenMask, add_at
from .site import NetworkMap, Site, exchanged

# (places, what is added there): tokens [p] with [p, d], or batch rows [b] with [b, T, d] or [b, d, h, w].
Added = tuple[Rows, Tensor | Product]


Scope = Literal["rows", "values", "region", "image", "everywhere"]
"""Where a concept's adapter acts:
rows        at its own text rows, and at no pixel
values      at its own text rows, as pixels read them: where text rows attend to each other too, they read the same
            values as without the adapter
region      at its own text rows, and at the pixels of its region
image       at its own text rows, and at every pixel of both guidance branches
everywhere  at all text rows and pixels of both guidance branches, which is merging the weights"""


@dataclass(frozen=True)
class Member:
    """One adapter that acts in a forward pass, and how strongly."""

    adapter: Any
    strength: float


@dataclass(frozen=True)
class Group:
    """Adapters of one kind that act in the same place, and their channels of every mask.

    kind: an `adapters.Kind`.
    """

    kind: Any
    members: tuple[Member, ...]
    channels: tuple[int, ...]
    scope: Scope


@dataclass
class PassPlan:
    """What adapters do in one forward pass. Made for the pass, dropped after it.

    groups: the adapters that act.
    rows: the row mask of a text [B, L, d] as a layer reads it; None where it cannot be told.
    pixels: the mask of the pixels of a layer's output [B, T, d] or [B, d, h, w]; None where nobody acts.
    joint: the same for an output that holds text and pixels, by where the adapters act.
    values: takes what adapters of scope `values` add, for the attention that follows, and the layer's number of tokens;
        None where pixels alone attend to the text, so that the layer's output is theirs.
    in_place: whether all layers' outputs are written into, also where autograd records: those of a transformer are too
        large to copy for a few rows.
    kept: changes of earlier passes of the same run; None works each out anew, as training must.
    """

    groups: tuple[Group, ...] = ()
    rows: Callable[[Tensor], TokenMask | None] = lambda text: None
    pixels: Callable[[Tensor], TokenMask | None] = lambda out: None
    joint: Callable[[Tensor, Scope], TokenMask | None] = lambda out, scope: None
    values: Callable[[Site, Added, int], None] | None = None
    in_place: bool = False
    kept: KeptChanges | None = None
    _text: tuple[Tensor, Tensor, KeptText] | None = None

    def mask(self, scope: Scope, site: Site, x: Tensor, out: Tensor) -> TokenMask | None:
        """Which tokens of a layer belong to whom, for adapters of that scope."""
        if scope == "everywhere" or (scope == "image" and site.reads == "image"):
            return everything(out, self.channels)
        if site.reads == "text":
            return self.rows(x)
        if site.reads == "joint":
            return self.joint(out, scope)
        return self.pixels(out) if site.reads == "image" and scope == "region" else None

    @property
    def channels(self) -> int:
        return 1 + max(channel for group in self.groups for channel in group.channels)

    def change(self, group: Group, site: Site, layer: nn.Module, x: Tensor, out: Tensor) -> Added | None:
        mask = self.mask(group.scope, site, x, out)
        if mask is None:
            return None
        text = None if site.reads != "text" or mask.rows is not None else self._kept(x, mask)
        key = (site.name, group, out.device, out.dtype)
        if text is not None and key in text.found:
            return text.found[key]
        found = group.kind.change(group.members, site, layer, x, out, mask.select(group.channels))
        if text is not None and (found is None or isinstance(found[1], Tensor)):
            kept = None if found is None else (found[0], found[1].to(out.dtype))  # type: ignore[union-attr]
            if kept is None or not kept[1].requires_grad:
                text.found[key] = kept
            return kept
        return found

    def writes(self, site: Site, layer: nn.Module) -> bool:
        """Whether a layer's output is written into. Pixels are many; of a text other packs may keep what a layer gave,
        and what comes from an exchanged `forward` may be kept too."""
        return self.in_place or not (site.reads == "text" or torch.is_grad_enabled() or exchanged(layer))

    def _kept(self, x: Tensor, mask: TokenMask) -> KeptText | None:
        if self.kept is None or x.requires_grad or torch.compiler.is_compiling():
            return None
        if self._text is None or self._text[0] is not x or self._text[1] is not mask.weights:
            self._text = (x, mask.weights, self.kept.text(x, mask))
        return self._text[2]


def everything(out: Tensor, channels: int) -> TokenMask:
    """The mask under which each of `channels` concepts owns every token of a layer's output."""
    tokens = {2: (), 3: out.shape[1:2], 4: (out[0, 0].numel(),)}[out.ndim]  # an embedding has no tokens
    weights = torch.ones(out.shape[0], *tokens, channels, device=out.device)
    return TokenMask(weights, range(out.shape[0]))


@dataclass(eq=False)
class KeptText:
    """A text by the rows that have an owner, and what each layer adds to it.

    mask: its row mask on the CPU; rows: its owned rows [p, d].
    """

    mask: Tensor
    rows: Tensor
    found: dict[Any, Added | None] = field(default_factory=dict)

    def holds(self, rows: Tensor, mask: TokenMask) -> bool:
        return (
            rows.shape == self.rows.shape
            and rows.dtype == self.rows.dtype
            and rows.device == self.rows.device
            and torch.equal(mask.on_cpu, self.mask)
            and torch.equal(rows, self.rows)
        )


class KeptChanges:
    """What layers that read text add, over the passes of one run: it follows from the text, its mask and the adapters,
    which most runs keep over all steps. A step is then left with one addition per layer.

    Texts are compared by content, once per pass, since a host makes a new tensor for each call.

    Args:
        texts: how many are kept, the last ones met: one or two in most runs, more where regions have prompts.
    """

    def __init__(self, texts: int = 8):
        self.limit = texts
        self.texts: list[KeptText] = []

    def text(self, context: Tensor, mask: TokenMask) -> KeptText:
        """The entry of this text [B, L, d] under this mask; a new one if it has not been met."""
        rows = context.flatten(0, 1)[mask.places]
        known = next((text for text in self.texts if text.holds(rows, mask)), None) or KeptText(
            mask.on_cpu.clone(), rows
        )
        self.texts = [known, *(text for text in self.texts if text is not known)][: self.limit]
        return known


class Hooks:
    """The hooks of one run on a network, put in and taken out in one place.

    `plan` is what the pass that is running shall do; None, between passes, does nothing.
    """

    def __init__(self) -> None:
        self.plan: PassPlan | None = None
        self._root: nn.Module | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def install(self, network: NetworkMap, groups: Sequence[Group]) -> None:
        """Registers one hook on each module that an adapter of `groups` changes, in the order of the groups. A second
        call for the same denoiser does nothing; for another one, as hosts exchange them, the hooks move."""
        root = network.root()
        if self._root is root:
            return
        self._clear()
        self._root = root
        by_site: dict[str, list[int]] = {}
        for index, group in enumerate(groups):
            for member in group.members:
                for name in member.adapter.sites:
                    if name in network.sites and index not in by_site.setdefault(name, []):
                        by_site[name].append(index)
        for name, indices in by_site.items():
            hook = self._hook(network.sites[name], tuple(indices))
            self._handles.append(network.module(name).register_forward_hook(hook))

    def _hook(self, site: Site, indices: tuple[int, ...]) -> Callable[..., Tensor | None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            plan = self.plan
            if plan is None or not plan.groups:
                return None
            x, out = inputs[0], output
            if site.columns is not None:
                out = out.narrow(-1, *site.columns)
            if out.ndim > 4:  # pictures as [B, frames, h, w, d]
                x, out = x.flatten(1, -2), out.view(out.shape[0], -1, out.shape[-1])
            new = out
            # All are asked before one is added: some read what the layer gives.
            groups = [plan.groups[index] for index in indices]
            for group, found in zip(groups, [plan.change(one, site, layer, x, out) for one in groups], strict=True):
                if found is None:
                    continue
                if group.scope == "values" and plan.values is not None:
                    plan.values(site, found, out.shape[1])
                else:
                    new = add_at(new, *found, in_place=plan.writes(site, layer))
            return new if new is not out else None

        return hook

    def remove(self) -> None:
        """Takes the hooks off again; harmless when they are gone already."""
        self.plan = None
        self._clear()

    def _clear(self) -> None:
        remove_hooks(self._handles)
        self._handles, self._root = [], None


@contextmanager
def learning(network: NetworkMap, kind: Any, adapter: Any, scope: Scope | None = None) -> Iterator[Callable[..., None]]:
    """`adapter` on the modules of a network while it learns.

    Gives a function that publishes the row mask [B, L, 1] of the passes to come, None for passes without the adapter,
    which pixels of a layer's output are the concept's, and the `joint` and `values` of a transformer, all as in
    `PassPlan`; all pixels by default. It stays published until the next: with checkpointing the backward pass runs the
    layers again. scope: where the adapter acts while it learns; its kind's place by default.
    """
    hooks = Hooks()
    groups = (Group(kind, (Member(adapter, 1.0),), (0,), scope or kind.scope),)

    def publish(mask: Tensor | None, pixels: Callable[[Tensor], TokenMask | None] | None = None, **joint: Any) -> None:
        if mask is None:
            hooks.plan = None
            return
        rows = TokenMask(mask)

        def of_text(text: Tensor) -> TokenMask | None:
            return rows if mask.shape[:2] == text.shape[:2] else None

        hooks.plan = PassPlan(groups, of_text, pixels or (lambda out: everything(out, 1)), **joint)

    try:
        hooks.install(network, groups)
        yield publish
    finally:
        hooks.remove()


@contextmanager
def silent(publish: Callable[..., None]) -> Iterator[None]:
    """What `learning` publishes to is without the adapter, for sampling between two steps."""
    publish(None)
    yield


def remove_hooks(handles: Iterable[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
