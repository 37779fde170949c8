"""Which pixels belong to which concept: a registry of region rules.

Free of torch at import, because option lists are made from `REGION_RULES`: a rule uses tensor methods only. A new rule
is one registered function.

Letters: P [B, n, h, w], each concept's smoothed map as a distribution over pixels, all zero for a concept that has no
map in that image; f, the share of the pixels a concept may have, for rules that look at it. A rule gives bool
[B, n, h, w] and gives nothing to a concept whose P is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .divergence import jsd

if TYPE_CHECKING:
    from torch import Tensor

RegionRule = Callable[["Tensor", float], "Tensor"]
REGION_RULES: dict[str, RegionRule] = {}

SAME_MAP = 0.01
"""Two maps of a smaller JSD (nats) are one map: the concepts share their words, or words that mean the same."""
ROUNDS = 10
"""Of k-means; a map of 16² cells has settled after four or five."""


def region_rule(name: str) -> Callable[[RegionRule], RegionRule]:
    """Registers the decorated function of (P, f).

    Raises:
        ValueError: the name is taken.
    """
    if name in REGION_RULES:
        raise ValueError(f"there is a region rule '{name}' already")

    def register(rule: RegionRule) -> RegionRule:
        REGION_RULES[name] = rule
        return rule

    return register


def _strongest(p: Tensor) -> Tensor:
    """Where each concept's P is the largest of all; the first one's where two are equal. Nothing where all are zero."""
    order = p.new_tensor(range(p.shape[1])).view(1, -1, *[1] * (p.ndim - 2))
    return (p.argmax(dim=1, keepdim=True) == order) & (p > 0)


@region_rule("top")
def top(p: Tensor, fraction: float) -> Tensor:
    """Each concept's strongest f of the pixels; where two concepts claim a pixel, the one with the larger P keeps it.

    Source: ConceptSplit (arXiv 2510.04668), AFG; disjointness is ours.
    """
    return _strongest(p.where(overlapping(p, fraction), 0.0))


@region_rule("overlapping")
def overlapping(p: Tensor, fraction: float) -> Tensor:
    """Each concept's strongest f of the pixels; a pixel may belong to several concepts.

    Source: ConceptSplit, AFG, as its published code calls it.
    """
    flat = p.flatten(2)
    count = max(1, round(fraction * flat.shape[-1]))
    claim = flat.new_zeros(flat.shape).scatter(-1, flat.topk(count, dim=-1).indices, 1.0)
    return ((claim > 0) & (flat > 0)).view_as(p)


@region_rule("argmax")
def argmax(p: Tensor, fraction: float) -> Tensor:
    """Every pixel belongs to the concept whose P is largest there; no background, f is not looked at.

    Source: ours, after FreeFuse (arXiv 2510.23515), which balances the areas and leaves a background.
    """
    return _strongest(p)


@region_rule("by_place")
def by_place(p: Tensor, fraction: float) -> Tensor:
    """As `argmax`, but concepts that share one map divide its part of the picture by place.

    Two dogs have one map with two places where it is strong. Its clusters go to the concepts in reading order, in the
    order in which the concepts are bound. Source: ours.
    """
    return _by_place(p)[0]


@region_rule("top_by_place")
def top_by_place(p: Tensor, fraction: float) -> Tensor:
    """As `top`, but concepts that share one map have their strongest pixels in their own parts of `by_place`.

    Source: ours. Two concepts of one class would else have the same strongest pixels, and the first would get them.
    """
    parts, shared = _by_place(p)
    return top(p.where(parts | ~shared, 0.0), fraction)


def _by_place(p: Tensor) -> tuple[Tensor, Tensor]:
    """The partition of `by_place`, bool [B, n, h, w], and which concepts share a map, bool [B, n, 1, 1]."""
    out = p.new_zeros(p.shape) > 0
    shares = out[..., :1, :1].clone()
    for found, sharing, image in zip(out, shares, p, strict=True):
        groups = _sharing(image)
        common = image.new_zeros(len(groups), *image.shape[1:])
        for one, members in zip(common, groups, strict=True):
            one += image[members].mean(dim=0)
        for area, one, members in zip(_strongest(common[None])[0], common, groups, strict=True):
            found[members] = _split(area, one, len(members)) if len(members) > 1 else area[None]
            sharing[members] = len(members) > 1
    return out, shares


def _sharing(p: Tensor) -> list[list[int]]:
    """Groups of concepts of one image [n, h, w] that share one map; one without a map is alone."""
    groups: list[list[int]] = []
    there = p.flatten(1).any(dim=1).tolist()
    for i in range(len(p)):
        for group in groups:
            if there[i] and float(jsd(p[i], p[group[0]])) < SAME_MAP:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def _split(area: Tensor, p: Tensor, parts: int) -> Tensor:
    """An area [h, w] in as many parts as concepts share the map p [h, w], in reading order: bool [parts, h, w].

    k-means of the cells, weighted by how far the map exceeds its mean, from three starts: slices along x, slices along
    y, and cells far from one another. The closest clusters count. Of an empty area every part is empty.
    """
    if not bool(area.any()):
        return area.new_zeros(parts, *area.shape)
    places = area.nonzero().double().cpu()  # [m, 2], rows (y, x)
    weight = p[area].double().cpu()
    weight = (weight - p.double().mean().cpu()).clamp(min=0.0)
    # Fewer peaks than concepts: the place itself is divided.
    weight = weight if int(weight.count_nonzero()) >= parts else weight.new_ones(weight.shape)
    best, clusters = None, places[:1]
    for start in _starts(places, weight, parts):
        centres = start
        for _ in range(ROUNDS):
            distance = (places[:, None] - centres).pow(2).sum(dim=-1)  # [m, parts]
            nearest = (distance == distance.amin(dim=1, keepdim=True)).double() * weight[:, None]
            mass = nearest.sum(dim=0)[:, None]
            centres = ((nearest.T @ places) / mass.clamp(min=1e-30)).where(mass > 0, centres)
        spread = float(((places[:, None] - centres).pow(2).sum(dim=-1).amin(dim=1) * weight).sum())
        if best is None or spread < best * (1 - 1e-9):
            best, clusters = spread, centres
    clusters = clusters[_reading_order(clusters)]
    owner = (places[:, None] - clusters).pow(2).sum(dim=-1).argmin(dim=1).to(area.device)
    out = area.new_zeros(parts, *area.shape)
    for part in range(parts):
        out[part][area] = owner == part
    return out


def _reading_order(centres: Tensor) -> Tensor:
    """Order of places [k, 2], (y, x) each: those about on a line (slope below ½) from left to right, an upper
    line before a lower one."""
    below, right = (centres[:, None] - centres).unbind(dim=-1)
    before = (right < 0).where(below.abs() < 0.5 * right.abs(), below < 0)
    return before.sum(dim=1).argsort(descending=True, stable=True)


def _starts(places: Tensor, weight: Tensor, parts: int) -> list[Tensor]:
    """Three sets of first centres [parts, 2] for k-means over places [m, 2]."""
    found = []
    for axis in (1, 0):
        order = places[:, axis].argsort(stable=True)
        reached = weight[order].cumsum(dim=0) / weight.sum()
        found.append(places[order[[int((reached < (part + 0.5) / parts).sum()) for part in range(parts)]]])
    far = [int(weight.argmax())]
    while len(far) < parts:
        distance = (places[:, None] - places[far]).pow(2).sum(dim=-1).amin(dim=1)
        far.append(int((weight * distance).argmax()))
    return [*found, places[far]]
