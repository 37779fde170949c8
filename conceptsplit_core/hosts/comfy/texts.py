"""Encoded texts, recognised by their rows wherever another pack has moved them.

Other packs join texts, repeat them, put several regional ones into one batch or hand the UNet every second row. What
such a pack does not change is the rows themselves: a row of a text encoder is as good as unique. So rows are known
here by a fingerprint, an exact integer sum over their bits, which does not depend on shapes or devices.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ...text.binding import Binding

RECENT = 32  # texts that nobody holds any more, some kilobytes each
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what networks compute in
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@cache
def _weights(width: int, device: torch.device) -> Tensor:
    """Odd numbers without a pattern, one per place of a row; int64 arithmetic wraps, the same everywhere."""
    return (
        torch.arange(1, width + 1, dtype=torch.int64, device=device) * 6364136223846793005 + 1442695040888963407
    ) | 1


def fingerprints(text: Tensor) -> Tensor:
    """The fingerprint of each row of `text` [B, L, d] in its own dtype: equal rows have equal ones, int64 [B, L]."""
    bits = text.detach().contiguous().view(_BITS[text.element_size()]).to(torch.int64)
    return (bits * _weights(text.shape[-1], text.device)).sum(dim=-1)


class TextIndex:
    """The texts of one run, by which each row of whatever text reaches a layer is recognised, on the layer's device.

    A text stands in a batch row if at least half of its distinct rows are there: half, because texts with the same
    beginning share its rows and still are different texts, while a pack may take every second one of doubled rows. Of
    several the one with the most rows there counts. If these are several with different owners, nothing is bound in
    that batch row, and `ambiguous` says so.

    Args:
        ranks: for each text the fingerprints [L] of its rows in the dtype that the network computes in, and its row
            mask [L, c]; texts of an earlier rank count before those of a later.
        values: how many channels of the masks, from the first on, decide whether owners differ.
    """

    def __init__(self, ranks: Sequence[Sequence[tuple[Tensor, Tensor]]], values: int):
        texts = [(rank, prints.cpu(), mask.cpu()) for rank, found in enumerate(ranks) for prints, mask in found]
        bound = [mask.ne(0).any(dim=-1) for _, _, mask in texts]
        known = _distinct([prints for _, prints, _ in texts])
        owned = _distinct([prints[rows] for (_, prints, _), rows in zip(texts, bound, strict=True)])
        member = torch.zeros(len(texts), len(known))
        owners = torch.zeros(len(texts), len(owned), texts[0][2].shape[-1] if texts else values)
        for at, ((_, prints, mask), rows) in enumerate(zip(texts, bound, strict=True)):
            member[at, torch.searchsorted(known, prints)] = 1.0
            owners[at, torch.searchsorted(owned, prints[rows])] = mask[rows]
        # Texts of one group have the same owners. Of these that with the most owned rows is taken, then the first.
        groups: dict[tuple[float, ...], int] = {}
        group = [groups.setdefault(tuple(one[:, :values].flatten().tolist()), len(groups)) for one in owners]
        order = sorted(range(len(texts)), key=lambda at: (-float(owners[at].sum()), at))
        worth = torch.zeros(len(texts), dtype=torch.int64)
        worth[order] = torch.arange(len(texts), 0, -1)
        rank = torch.tensor([rank for rank, _, _ in texts], dtype=torch.int64)
        self._tables = (
            known,
            member,
            member.sum(dim=-1),
            rank,
            torch.tensor(group, dtype=torch.int64),
            worth,
            owned,
            owners,
        )
        self._on: dict[torch.device, tuple[Tensor, ...]] = {}
        self._ambiguous: Tensor | None = None

    @property
    def ambiguous(self) -> bool:
        """Whether some text could be either of two. Waits for the device: read it once, at the end of a run."""
        return self._ambiguous is not None and bool(self._ambiguous)

    def mask(self, context: Tensor) -> Tensor:
        """The row mask [B, L, c] of a text [B, L, d]; rows of no known text are zero. Never waits for the device."""
        if context.device not in self._on:
            self._on[context.device] = tuple(table.to(context.device) for table in self._tables)
        known, member, size, rank, group, worth, owned, owners = self._on[context.device]
        prints = fingerprints(context)
        if not len(owned):
            return torch.zeros(*prints.shape, owners.shape[-1], device=prints.device)
        place, hit = _look_up(known, prints)
        there = torch.zeros(len(prints), len(known) + 1, device=prints.device)
        there.scatter_(1, place.where(hit, len(known)), 1.0)
        count = there[:, :-1] @ member.t()  # [B, texts]
        stands = 2 * count >= size
        # The first rank of which some text stands there, and of this rank the texts with the most rows.
        stands &= rank == rank.where(stands, len(size)).amin(dim=-1, keepdim=True)
        count = count.where(stands, -1.0)
        best = stands & (count == count.amax(dim=-1, keepdim=True))
        doubt = group.where(best, len(size)).amin(dim=-1) < group.where(best, -1).amax(dim=-1)
        self._ambiguous = doubt.any() if self._ambiguous is None else self._ambiguous | doubt.any()
        text = worth.where(best, 0).argmax(dim=-1, keepdim=True)
        place, hit = _look_up(owned, prints)
        hit = hit & (best.any(dim=-1) & ~doubt).unsqueeze(-1)
        return owners[text, place] * hit.unsqueeze(-1)


def _distinct(prints: list[Tensor]) -> Tensor:
    """All of these fingerprints once, sorted."""
    return torch.cat([torch.zeros(0, dtype=torch.int64), *prints]).unique()


def _look_up(known: Tensor, prints: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of `prints` stands in the sorted `known`, and whether it does."""
    place = torch.searchsorted(known, prints).clamp(max=len(known) - 1)
    return place, known[place] == prints


@dataclass
class _Entry:
    text: weakref.ref[Tensor]
    prints: dict[torch.dtype, Tensor]
    bindings: tuple[Binding, ...]

    def in_dtype(self, dtype: torch.dtype) -> Tensor:
        text = self.text()  # as it is now: a node may have edited it
        return self.prints[dtype] if text is None else fingerprints(text.to(dtype))[0]


class BoundTexts:
    """The bound texts of one text encoder: those that somebody still holds, and of the others the last few.

    Equal texts may have different owners: somebody has written another placeholder for the same word. So texts that
    are in use come first, and of equal ones that nobody holds any more the last counts. These are kept at all because
    a node may join texts that the host then drops (`--cache-none`); no run depends on older ones.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def add(self, encoded: Tensor, bindings: tuple[Binding, ...]) -> None:
        """Remembers a text [1, L, d] that `bindings` belong to, without keeping it; nothing if there are none."""
        if not bindings or encoded.shape[0] != 1:
            return
        prints = {dtype: fingerprints(encoded.to(dtype))[0] for dtype in _DTYPES}
        self._entries.append(_Entry(weakref.ref(encoded), prints, bindings))
        recent = len(self._entries) - RECENT
        self._entries = [one for at, one in enumerate(self._entries) if at >= recent or one.text() is not None]

    def ranks(self, dtype: torch.dtype) -> list[list[tuple[Tensor, tuple[Binding, ...]]]]:
        """Fingerprints [L] in `dtype` and bindings of each text in use, and then of each that is not."""
        held = [one for one in self._entries if one.text() is not None]
        others = {tuple(one.prints[torch.float32].tolist()): one for one in self._entries if one.text() is None}
        return [[(one.in_dtype(dtype), one.bindings) for one in found] for found in (held, list(others.values()))]

    def concepts(self) -> set[str]:
        """Who owns rows of some text."""
        return {binding.concept for one in self._entries for binding in one.bindings}

    def joined(self, encoded: Tensor, start: int) -> tuple[tuple[Binding, ...], bool]:
        """Bindings of the texts that stand one behind the other in `encoded` [1, L, d] from row `start` on.

        Returns:
            The bindings by their rows in `encoded`, and whether some text could be either of two.
        """
        prints = fingerprints(encoded[:1].to(torch.float32))[0]
        found: list[Binding] = []
        unclear = False
        while start < len(prints):
            here: list[tuple[Tensor, tuple[Binding, ...]]] = []
            for texts in self.ranks(torch.float32):
                here = here or [one for one in texts if torch.equal(one[0], prints[start : start + len(one[0])])]
            longest = max((len(text) for text, _ in here), default=0)
            owners = {bindings for text, bindings in here if len(text) == longest}
            if len(owners) == 1:
                for one in owners.pop():
                    found.append(Binding(one.concept, tuple(row + start for row in one.rows), one.weight))
            elif owners:
                unclear = True
            start += max(1, longest)
        return tuple(found), unclear
