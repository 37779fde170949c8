"""Numbers for one picture, for an arm, and for the difference of two arms.

A picture is asked for n *wanted* things, each a class word and a look. Words used here:
an object *wears* look j if the detector names its texture j, or if its fidelity to j is at least WORN and the
highest among the wanted looks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import numpy as np

from conceptsplit_core.demo.looks import Look

from .detector import UNKNOWN, Found, Texture

WORN = 0.6
"""Fidelity from which a look counts as worn: drawn looks hardly fall below, other looks hardly reach it."""
BLENDED = 0.2
"""Share of an object's pixels that must be in colours of its own look and in colours only another wanted look has."""

METRICS = (
    "success", "concepts_right", "omission", "leak", "blend", "unique_binding", "fidelity", "fidelity_present",
    "odd_shape", "extra", "loose_success", "loose_right", "loose_omission", "loose_leak",
)  # fmt: skip
"""Per picture, each 0..1, means over the wanted things where there are several:

success: every wanted thing is there, wears its own look, no object of a wanted class wears another's look.
concepts_right: share of wanted things that are there in their own look.
omission: share of wanted things without an object of their class.
leak: share of wanted things whose class is seen in another wanted look.
blend: share of wanted things whose object mixes its own colours with another wanted look's.
unique_binding: share of looks worn by exactly one object, of the right class.
fidelity: to the own look, 0 if omitted; fidelity_present: over those present (absent from the record if none).
loose_…: success, concepts_right, omission and leak again for a generous reader, to whom every object has the shape it
    is nearest to and wears the wanted look whose colours it is nearest to, whatever the pattern. Tells mixing from
    clumsy drawing; `base` shows what chance gives.
odd_shape: some object's shape is UNKNOWN; extra: there are more objects than wanted.
"""


@dataclass(frozen=True)
class Wanted:
    """One thing a prompt asks for."""

    class_word: str
    look: Look


LOOSE_DISTANCE = 95.0
LOOSE_MARGIN = 25.0
"""RGB distance of colours up to which the generous reader takes an object to wear the nearest wanted look, and by how
much the others must be farther: half of one look and half of another is neither. One of a look's two colours alone may
be enough for this reader."""


@dataclass
class Judged:
    """One picture's metrics and its leak matrix: rows are classes, columns looks, in the order wanted."""

    values: dict[str, float]
    leaks: list[list[int]] = field(default_factory=list)


def _same_look(a: Look, b: Look) -> bool:
    if a.pattern != b.pattern:
        return False
    return a.colours == b.colours if a.pattern == "dotted" else frozenset(a.colours) == frozenset(b.colours)


def worn_look(thing: Found, wanted: Sequence[Wanted]) -> int | None:
    """Index of the wanted look an object wears, or None."""
    for j, want in enumerate(wanted):
        if thing.texture.is_look(want.look):
            return j
    values = [thing.fidelity.get(want.look, 0.0) for want in wanted]
    best = int(np.argmax(values))
    return best if values[best] >= WORN else None


def _assign(found: Sequence[Found], wanted: Sequence[Wanted]) -> list[int | None]:
    """For each wanted thing the index of its object: of its class, and among those the best dressed as a whole."""
    choices = [[k for k, thing in enumerate(found) if thing.shape == want.class_word] for want in wanted]
    best: list[int | None] = [None] * len(wanted)
    best_score = -1.0
    for order in permutations(range(len(wanted))):
        taken: set[int] = set()
        picked: list[int | None] = [None] * len(wanted)
        score = 0.0
        for i in order:
            free = [k for k in choices[i] if k not in taken]
            if free:
                value = lambda k, i=i: (
                    found[k].fidelity.get(wanted[i].look, 0.0) + found[k].texture.is_look(wanted[i].look)
                )
                k = max(free, key=value)
                taken.add(k)
                picked[i] = k
                score += 3.0 + value(k)
        if score > best_score:
            best, best_score = picked, score
    return best


def loosely(thing: Found, wanted: Sequence[Wanted]) -> Found:
    """The object as the generous reader sees it."""
    distances = {want.look: thing.colour_distance.get(want.look, np.inf) for want in wanted}
    look = min(distances, key=lambda k: distances[k])
    others = [value for other, value in distances.items() if other != look]
    clear = distances[look] <= LOOSE_DISTANCE and min(others, default=np.inf) >= distances[look] + LOOSE_MARGIN
    texture = Texture(look.pattern, look.colours) if clear else Texture(UNKNOWN, ())
    return replace(thing, shape=thing.nearest_shape, texture=texture, fidelity={})


def judge(found: Sequence[Found], wanted: Sequence[Wanted]) -> Judged:
    """Metrics of one picture from what `detect` found; its fidelities must cover the wanted looks."""
    judged = _judge(found, wanted)
    generous = _judge([loosely(thing, wanted) for thing in found], wanted).values
    judged.values |= {
        "loose_success": generous["success"],
        "loose_right": generous["concepts_right"],
        "loose_omission": generous["omission"],
        "loose_leak": generous["leak"],
    }
    return judged


def _judge(found: Sequence[Found], wanted: Sequence[Wanted]) -> Judged:
    n = len(wanted)
    own = _assign(found, wanted)
    worn = [worn_look(thing, wanted) for thing in found]
    same = [[_same_look(a.look, b.look) for b in wanted] for a in wanted]
    leaks = [[0] * n for _ in range(n)]
    right, blended, fidelity, present = [], [], [], []
    for i, want in enumerate(wanted):
        k = own[i]
        if k is None:
            right.append(0.0)
            fidelity.append(0.0)
            blended.append(0.0)
            continue
        thing = found[k]
        wears = worn[k]
        right.append(float(wears is not None and same[i][wears]))
        fidelity.append(thing.fidelity.get(want.look, 0.0))
        present.append(fidelity[-1])
        mine = sum(thing.colour_shares.get(c, 0.0) for c in want.look.colours)
        others = [
            sum(thing.colour_shares.get(c, 0.0) for c in set(other.look.colours) - set(want.look.colours))
            for j, other in enumerate(wanted)
            if j != i
        ]
        mixes = mine >= BLENDED and bool(others) and max(others) >= BLENDED
        blended.append(float(mixes and not right[-1]))
    # A leak is seen on any object of a wanted class, also on a surplus one.
    for k, thing in enumerate(found):
        j = worn[k]
        if j is None:
            continue
        rows = [i for i, want in enumerate(wanted) if want.class_word == thing.shape]
        if k in own:
            rows = [own.index(k)]
        if rows and not any(same[i][j] for i in rows):
            leaks[rows[0]][j] = 1
    unique = []
    for j, want in enumerate(wanted):
        wearers = [k for k in range(len(found)) if worn[k] is not None and same[j][worn[k]]]
        unique.append(float(len(wearers) == 1 and found[wearers[0]].shape == want.class_word))
    leak = float(np.mean([any(row) for row in leaks]))
    values = {
        "success": float(all(right) and leak == 0.0),
        "concepts_right": float(np.mean(right)),
        "omission": float(np.mean([k is None for k in own])),
        "leak": leak,
        "blend": float(np.mean(blended)),
        "unique_binding": float(np.mean(unique)),
        "fidelity": float(np.mean(fidelity)),
        "odd_shape": float(any(thing.shape == UNKNOWN for thing in found)),
        "extra": float(len(found) > n),
    }
    if present:
        values["fidelity_present"] = float(np.mean(present))
    return Judged(values, leaks)


# --- arms -----------------------------------------------------------------------------------------------------

Records = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Concept set to seed to one picture's values."""


def _columns(records: Records, metric: str) -> list[np.ndarray]:
    """Values per concept set, seeds in order; NaN where a picture has no such value."""
    sets = [records[name] for name in sorted(records)]
    return [np.array([pictures[seed].get(metric, np.nan) for seed in sorted(pictures)]) for pictures in sets]


def _draws(sizes: Sequence[int], rounds: int, over_sets: bool, seed: int) -> list[list[tuple[int, np.ndarray]]]:
    """Resampled (set, picture indices) per round; the same for every arm with the same sets and seeds."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(rounds):
        sets = rng.integers(0, len(sizes), len(sizes)) if over_sets else np.arange(len(sizes))
        drawn.append([(int(s), rng.integers(0, sizes[s], sizes[s])) for s in sets])
    return drawn


def _mean(columns: Sequence[np.ndarray]) -> float:
    joined = np.concatenate(columns)
    joined = joined[~np.isnan(joined)]
    return float(joined.mean()) if len(joined) else math.nan


def interval(
    records: Records, metric: str, rounds: int = 1000, over_sets: bool = False, seed: int = 0
) -> dict[str, float]:
    """Mean of a metric and its 95 % bootstrap interval.

    Seeds are resampled within each concept set: what another draw of noise would give. `over_sets` resamples the
    sets too: what other concepts would give, which is wide when sets are few.
    """
    columns = _columns(records, metric)
    means = [
        _mean([columns[s][picked] for s, picked in draw])
        for draw in _draws([len(c) for c in columns], rounds, over_sets, seed)
    ]
    return {"mean": _mean(columns), **_ends(means)}


def difference(
    one: Records, other: Records, metric: str, rounds: int = 1000, over_sets: bool = False, seed: int = 0
) -> dict[str, float]:
    """Mean of `one` − `other` over the pictures both have, paired by concept set and seed, and its interval."""
    both = {name: sorted(set(one[name]) & set(other[name])) for name in sorted(set(one) & set(other))}
    a = [np.array([one[name][s].get(metric, np.nan) for s in seeds]) for name, seeds in both.items()]
    b = [np.array([other[name][s].get(metric, np.nan) for s in seeds]) for name, seeds in both.items()]
    columns = [x - y for x, y in zip(a, b, strict=True)]
    means = [
        _mean([columns[s][picked] for s, picked in draw])
        for draw in _draws([len(c) for c in columns], rounds, over_sets, seed)
    ]
    return {"mean": _mean(columns), **_ends(means)}


def _ends(means: Sequence[float]) -> dict[str, float]:
    kept = np.array([m for m in means if not math.isnan(m)])
    if not len(kept):
        return {"lo": math.nan, "hi": math.nan}
    return {"lo": float(np.quantile(kept, 0.025)), "hi": float(np.quantile(kept, 0.975))}


def mcnemar(one: Records, other: Records, metric: str = "success") -> dict[str, Any]:
    """Exact two-sided McNemar test on a 0/1 metric, paired: pictures only one arm gets right, and the p value."""
    only_one = only_other = 0
    for name in set(one) & set(other):
        for seed in set(one[name]) & set(other[name]):
            a, b = one[name][seed][metric] >= 0.5, other[name][seed][metric] >= 0.5
            only_one += a and not b
            only_other += b and not a
    return {"only_first": only_one, "only_second": only_other, "p": binomial_p(only_one, only_other)}


def binomial_p(one: int, other: int) -> float:
    """Two-sided p of `one` against `other` heads with a fair coin."""
    n, low = one + other, min(one, other)
    return min(1.0, 2.0 * sum(math.comb(n, k) for k in range(low + 1)) / 2**n)


def wanted_matrix(records: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, list[list[float]]]:
    """Per concept set the mean leak matrix: how often class i was seen in look j."""
    return {
        name: np.mean([r["leaks"] for r in pictures.values() if "leaks" in r], axis=0).round(4).tolist()
        for name, pictures in records.items()
        if any("leaks" in r for r in pictures.values())
    }
