"""Encoded texts, recognised by their rows wherever another pack has moved them.

Other packs join texts, repeat them, put several regional ones into one batch or hand the UNet every second row. What
such a pack does not change is the rows themselves: a row of a text encoder is as good as unique. So rows are known
here by a fingerprint, an exact integer sum over their bits, which does not depend on shapes or devices.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from ...text.binding import Binding

LIMIT = 256  # bound texts remembered per text encoder, some kilobytes each
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what UNets compute in


@cache
def _weights(width: int) -> Tensor:
    """Odd numbers without a pattern, one per place of a row; int64 arithmetic wraps, the same everywhere."""
    return (torch.arange(1, width + 1, dtype=torch.int64) * 6364136223846793005 + 1442695040888963407) | 1


def row_prints(text: Tensor) -> list[list[int]]:
    """The fingerprint of each row of `text` [B, L, d] in its own dtype: equal rows have equal ones, [B][L]."""
    bits = text.detach().contiguous().view(_BITS[text.element_size()]).to(torch.int64)
    return (bits * _weights(text.shape[-1]).to(bits.device)).sum(dim=-1).tolist()


@dataclass(frozen=True)
class KnownText:
    """One text by its rows: their fingerprints in order, and the row masks of those that somebody owns."""

    prints: tuple[int, ...]
    owners: Mapping[int, tuple[float, ...]]
    distinct: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "distinct", frozenset(self.prints))


def known_text(prints: Sequence[int], mask: Tensor) -> KnownText:
    """A text from the fingerprints of its rows and its row mask [L, n]."""
    return KnownText(
        tuple(prints), {prints[row]: tuple(mask[row].tolist()) for row in mask.any(dim=-1).nonzero().flatten().tolist()}
    )


class Ambiguous(Exception):
    """Two texts have the same rows and different owners."""


def recognise(row: Sequence[int], texts: Iterable[KnownText], values: int) -> KnownText | None:
    """The text that stands in a batch row of these fingerprints; None if none does with at least half of its rows.

    Half, because texts with the same beginning share its rows and still are different texts, while a pack may take
    every second one of doubled rows.

    Args:
        values: how many channels of the row masks, from the first on, decide whether owners differ.

    Raises:
        Ambiguous: see there.
    """
    there = set(row)
    best: list[KnownText] = []
    most = 0
    for text in texts:
        count = len(there & text.distinct)
        if 2 * count >= len(text.distinct) and count >= most:
            best = [*best, text] if count == most else [text]
            most = count
    if not best:
        return None
    owners = [{key: mask[:values] for key, mask in text.owners.items() if any(mask[:values])} for text in best]
    if any(other != owners[0] for other in owners[1:]):
        raise Ambiguous
    return max(best, key=lambda text: sum(map(sum, text.owners.values())))


@dataclass
class _Entry:
    prints: dict[torch.dtype, tuple[int, ...]]
    text: weakref.ref[Tensor]


class TextBook:
    """The bound texts that one text encoder has encoded last, in every dtype that a UNet may see them in.

    Equal texts may have different owners: somebody has written another placeholder for the same word. Texts that are
    still in use come before those that nobody holds any more, and of these the last one counts.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[tuple[int, ...], tuple[Binding, ...]], _Entry] = OrderedDict()

    def add(self, encoded: Tensor, bindings: tuple[Binding, ...]) -> None:
        """Remembers a text [1, L, d] that `bindings` belong to, without keeping it; nothing if there are none."""
        if not bindings or encoded.shape[0] != 1:
            return
        prints = {dtype: tuple(row_prints(encoded.to(dtype))[0]) for dtype in _DTYPES}
        key = (prints[torch.float32], bindings)
        self._entries[key] = _Entry(prints, weakref.ref(encoded))
        self._entries.move_to_end(key)
        while len(self._entries) > LIMIT:
            self._entries.popitem(last=False)

    def texts(self, dtype: torch.dtype, in_use: bool) -> list[tuple[tuple[int, ...], tuple[Binding, ...]]]:
        """Fingerprints of the rows in `dtype`, and bindings, of each text that is in use, or of each that is not."""
        found = [
            (entry.prints[dtype], bindings)
            for (_, bindings), entry in self._entries.items()
            if dtype in entry.prints and (entry.text() is not None) == in_use
        ]
        return found if in_use else list(dict(found).items())

    def concepts(self) -> set[str]:
        """Who owns rows of some text."""
        return {binding.concept for _, bindings in self._entries for binding in bindings}

    def joined(self, encoded: Tensor, start: int) -> tuple[tuple[Binding, ...], bool]:
        """Bindings of the texts that stand one behind the other in `encoded` [1, L, d] from row `start` on.

        Returns:
            The bindings by their rows in `encoded`, and whether some text could be either of two.
        """
        prints = tuple(row_prints(encoded[:1].to(torch.float32))[0])
        shelves = [self.texts(torch.float32, in_use) for in_use in (True, False)]
        found: list[Binding] = []
        unclear = False
        while start < len(prints):
            here: list[tuple[tuple[int, ...], tuple[Binding, ...]]] = []
            for shelf in shelves:
                here = here or [one for one in shelf if prints[start : start + len(one[0])] == one[0]]
            longest = max((len(text) for text, _ in here), default=0)
            owners = {bindings for text, bindings in here if len(text) == longest}
            if len(owners) == 1:
                for binding in owners.pop():
                    found.append(Binding(binding.concept, tuple(row + start for row in binding.rows)))
            elif owners:
                unclear = True
            start += max(1, longest)
        return tuple(found), unclear
