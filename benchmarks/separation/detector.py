"""Reads a picture of patterned shapes: where the objects are, which shape each has and what it wears.

Nothing here is learned. Objects are components that stand out from the background, shapes are compared with drawn
templates, textures with drawn patterns. What fits nothing is UNKNOWN, so that a blend of two shapes or of
two looks is not forced into one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product

import numpy as np
from scipy import ndimage

from conceptsplit_core.demo import rendering
from conceptsplit_core.demo.looks import CLASSES, COLOURS, SIZE, Look, SceneObject

UNKNOWN = "unknown"

BACKGROUND_DISTANCE = 40.0
"""RGB distance from which a pixel is no background. Looks stand 95 or more from theirs, less their jitter."""
MIN_AREA = 90
"""Smallest object in pixels; the smallest drawn one, a star of 38 px, has about 390."""
MAX_EDGE_ERROR = 1.3
"""Pixels by which an outline may be off the best template's, on average, for a shape not to be UNKNOWN. Drawings stay
below 0.6, after the autoencoder below 1.3; halves of two shapes joined start at 1.1."""
WHOLE_EDGE_ERROR = 0.7
"""Edge error up to which a component is surely one shape and no search for touching objects is made."""
SPLIT_EDGE_ERROR = 3.0
"""Largest edge error of a part for a component to be taken apart."""
MIN_PATTERN_CORRELATION = 0.70
"""Correlation with the best pattern below which a texture is UNKNOWN."""
MIN_EXPLAINED = 0.6
"""Least share of an object's colour contrast that the best pattern in its own two colours explains."""
PLAIN_DISTANCE = 55.0
"""Two colour clusters nearer than this are one colour."""
MAX_COLOUR_DISTANCE = 62.0
"""RGB distance from the nearest colour word beyond which a colour is UNKNOWN."""

_GRID = 40
"""Side of the sampled square in which textures are compared, at two pixels a sample."""
_STEP = 2.0
_SHAPE_SIDE = 32
_TILTS = (-12.0, -8.0, -4.0, 0.0, 4.0, 8.0, 12.0)
_NAMES = tuple(COLOURS)
_PALETTE = np.array([COLOURS[name] for name in _NAMES], np.float32)


@dataclass(frozen=True)
class Texture:
    """What an object wears as far as it can be told; `colours` ground first for dots, in no order otherwise."""

    pattern: str
    colours: tuple[str, ...]

    def is_look(self, look: Look) -> bool:
        """Whether this is the look; the two colours of stripes and checks have no order."""
        if self.pattern != look.pattern:
            return False
        if look.pattern == "dotted":
            return self.colours == look.colours
        return frozenset(self.colours) == frozenset(look.colours)


@dataclass(frozen=True)
class Found:
    """One object of a picture.

    shape: a class word or UNKNOWN; nearest_shape: the best template's class word in any case.
    edge_error: mean distance of the outline from the best template's, in pixels.
    texture: pattern and colours, each possibly UNKNOWN; correlation: with the best pattern of the bank (1 for plain).
    fidelity: per asked look, 1 − mean squared distance to the look drawn in its nominal colours, in units of a
        quarter of the squared distance of those colours; 0 at worst. What a picture all in the mean colour has is 0.
    colour_distance: per asked look, RGB distance between the object's colours and the look's, the pattern disregarded.
    colour_shares: share of the object's pixels by nearest colour word.
    """

    shape: str
    edge_error: float
    texture: Texture
    correlation: float
    area: int
    centre: tuple[float, float]
    fidelity: dict[Look, float] = field(default_factory=dict)
    colour_shares: dict[str, float] = field(default_factory=dict)
    nearest_shape: str = UNKNOWN
    colour_distance: dict[Look, float] = field(default_factory=dict)


# --- banks ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _shape_bank() -> tuple[tuple[str, ...], np.ndarray, np.ndarray, dict[str, float]]:
    """Class words, normalised masks [n, side²], outline lengths over the root of the area [n], and per class word the
    root of the area of a shape of diameter 1."""
    words, masks, outlines, sides = [], [], [], {}
    for word in CLASSES:
        for tilt in _TILTS:
            thing = SceneObject(
                class_word=word, look=Look("plain", ("red",)), centre=(64.0, 64.0), diameter=88.0,
                tilt=tilt, rgb=((255.0, 0.0, 0.0),),
            )  # fmt: skip
            _, mask = rendering.render((0.0, 0.0, 0.0), [thing])
            words.append(word)
            masks.append(_normalised(mask[0]))
            outlines.append(float(np.hypot(*np.gradient(mask[0])).sum() / mask[0].sum() ** 0.5))
            sides[word] = float(mask[0].sum() ** 0.5 / thing.diameter)
    return tuple(words), np.stack(masks), np.array(outlines), sides


def _normalised(mask: np.ndarray) -> np.ndarray:
    """A mask in its own coordinates: centred on its centroid, scaled by the root of its area; flat float32."""
    total = float(mask.sum())
    rows, columns = np.indices(mask.shape)
    cy, cx = float((rows * mask).sum()) / total, float((columns * mask).sum()) / total
    reach = 1.25 * total**0.5
    at = np.linspace(-reach, reach, _SHAPE_SIDE)
    grid = np.meshgrid(at + cy, at + cx, indexing="ij")
    return ndimage.map_coordinates(mask.astype(np.float32), grid, order=1).ravel()


def _paint(pattern: str, angle: np.ndarray, phase: np.ndarray, x: np.ndarray, y: np.ndarray, soft: float) -> np.ndarray:
    """Where the second colour lies, 0..1, as scenes draws it: blurred over `soft`.

    angle [n] in degrees; phase [n, 2], x and y [m] and `soft` in half diameters of the object: gives [n, m].
    """
    turn = np.deg2rad(angle.astype(np.float32))[:, None]
    phase = phase.astype(np.float32)
    across = np.cos(turn) * y - np.sin(turn) * x + phase[:, :1]
    along = np.cos(turn) * x + np.sin(turn) * y + phase[:, 1:]

    def wave(at: np.ndarray, period: float) -> np.ndarray:
        """1 in the second half of every period."""
        return np.clip((0.25 - np.abs((at / period) % 1.0 - 0.75)) * (period / soft) + 0.5, 0, 1)

    if pattern == "striped":
        return wave(across + 1, 2 * rendering.BAND)
    if pattern == "checked":
        a, b = wave(across + 1, 2 * rendering.CHECK), wave(along + 1, 2 * rendering.CHECK)
        return a + b - 2 * a * b
    step, half = rendering.DOT_STEP, rendering.DOT_STEP / 2
    distance = np.hypot((across + half) % step - half, (along + half) % step - half)
    return np.clip((rendering.DOT_RADIUS - distance) / soft + 0.5, 0, 1)


_ANGLES = tuple(base + off for base in (0.0, 45.0, 90.0, 135.0) for off in (-4.0, 0.0, 4.0))
"""Scenes draws patterns level; a model may not."""
_SIZES = (0.86, 0.93, 1.0, 1.08, 1.16)
"""Diameters tried, in units of what the object's area says: an area is easily off by a frayed edge."""
_PERIODS = {"striped": 2 * rendering.BAND, "checked": 2 * rendering.CHECK, "dotted": rendering.DOT_STEP}


@lru_cache(maxsize=1)
def _places() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Angles [n] and phases [n, 2] of each pattern that are worth telling apart."""
    out = {}
    for pattern, period in _PERIODS.items():
        steps = np.arange(8) * period / 8
        lattice = _ANGLES[:3]
        rows = {
            "striped": product(_ANGLES, steps, (0.0,)),
            "dotted": product(lattice, steps, steps),
            # Half a period along is half a period across.
            "checked": product(lattice, steps, steps[:4]),
        }[pattern]
        table = np.array(list(rows), np.float32)
        out[pattern] = (table[:, 0], table[:, 1:])
    return out


# --- segmentation ---------------------------------------------------------------------------------------------


def _components(image: np.ndarray) -> list[np.ndarray]:
    """Masks of objects, bool [SIZE, SIZE] each, largest first."""
    background = background_of(image)
    stands_out = np.linalg.norm(image.astype(np.float32) - background, axis=2) > BACKGROUND_DISTANCE
    # The autoencoder frays edges where a pattern meets them: the majority of a pixel's surroundings decides.
    stands_out = ndimage.gaussian_filter(stands_out.astype(np.float32), 1.0) > 0.5
    labels, _ = ndimage.label(stands_out)
    found = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[box] == index
        if int(mask.sum()) < MIN_AREA:
            continue
        for part in _split(np.pad(mask, 1)):
            whole = np.zeros(labels.shape, bool)
            whole[box] = part[1:-1, 1:-1]
            if int(whole.sum()) >= MIN_AREA:
                found.append(whole)
    return sorted(found, key=lambda m: -int(m.sum()))


def _disc(radius: float) -> np.ndarray:
    reach = int(radius)
    return np.hypot(*(np.indices((2 * reach + 1, 2 * reach + 1)) - reach)) <= radius


_DISCS = tuple(_disc(radius) for radius in (1.5, 2.3, 3.3, 4.3, 5.3))


def _split(mask: np.ndarray) -> list[np.ndarray]:
    """Parts of a component that hang together by a neck: drawn squares and diamonds may touch their neighbours.

    A component that is one shape stays whole, and it is taken apart only if every part then is a shape.
    """
    whole = _shape(mask)[1]
    if whole <= WHOLE_EDGE_ERROR:
        return [mask]
    for disc in _DISCS:
        cores, count = ndimage.label(ndimage.binary_erosion(mask, disc))
        sizes = ndimage.sum_labels(mask, cores, range(1, count + 1)) if count else np.zeros(0)
        kept = [i + 1 for i, size in enumerate(sizes) if size >= MIN_AREA / 4]
        if len(kept) < 2:
            continue
        # Every pixel goes to its nearest core.
        only = np.where(np.isin(cores, kept), cores, 0)
        nearest = ndimage.distance_transform_edt(only == 0, return_distances=False, return_indices=True)
        owner = only[tuple(nearest)]
        parts = [mask & (owner == k) for k in kept]
        # Ragged parts fit worse than clean ones, but far better than what they were cut from.
        if max(_shape(part)[1] for part in parts) <= min(SPLIT_EDGE_ERROR, 0.6 * whole):
            return parts
    return [mask]


def _fill_specks(mask: np.ndarray, largest: int = 14) -> np.ndarray:
    """The mask without pinholes; a ring's hole stays."""
    holes, count = ndimage.label(~mask)
    if not count:
        return mask
    sizes = np.bincount(holes.ravel())
    small = np.flatnonzero(sizes <= largest)
    return mask | np.isin(holes, small[small > 0])


# --- shape and texture ----------------------------------------------------------------------------------------


def _shape(mask: np.ndarray) -> tuple[str, float]:
    """Class word of the best template and the edge error.

    Overlap alone would ask less of a large disc than of a thin ring: the same fray along the outline costs a ring
    most. What an overlap lacks is therefore read as an outline that is so many pixels off.
    """
    words, bank, outlines, _ = _shape_bank()
    mine = _normalised(_fill_specks(mask).astype(np.float32))
    both = np.minimum(bank, mine).sum(axis=1)
    overlaps = both / (bank.sum(axis=1) + mine.sum() - both)
    best = int(overlaps.argmax())
    error = float((1 - overlaps[best]) * float(mask.sum()) ** 0.5 / outlines[best])
    return words[best], error


def _colour_word(rgb: np.ndarray) -> str:
    distance = np.linalg.norm(_PALETTE - rgb, axis=1)
    best = int(distance.argmin())
    return _NAMES[best] if distance[best] <= MAX_COLOUR_DISTANCE else UNKNOWN


def _two_colours(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Two cluster centres of [n, 3] pixels and the share of the second; equal centres when there is one colour.

    Starts from the two ends of the axis of largest spread. The centres are medians of the outer part of each
    cluster, because samples on an edge between two colours belong to neither, and they can be most of a cluster.
    """
    middle = pixels.mean(axis=0)
    spread = pixels - middle
    _, vectors = np.linalg.eigh(spread.T @ spread)
    along = spread @ vectors[:, -1]
    cut = (np.quantile(along, 0.04) + np.quantile(along, 0.96)) / 2
    for _ in range(6):
        side = along > cut
        if side.all() or not side.any():
            return middle, middle, 0.0
        new = (along[side].mean() + along[~side].mean()) / 2
        if abs(new - cut) < 0.5:
            break
        cut = new
    centres = []
    for part in (~side, side):
        depth = np.abs(along[part] - cut)
        centres.append(np.median(pixels[part][depth >= 0.7 * np.quantile(depth, 0.9)], axis=0))
    return centres[0], centres[1], float(side.mean())


@dataclass(frozen=True)
class _Samples:
    """The inside of one object, resampled: colours [m, 3] and offsets from its middle in pixels [m]."""

    colours: np.ndarray
    x: np.ndarray
    y: np.ndarray


def _samples(image: np.ndarray, mask: np.ndarray) -> _Samples:
    inner = ndimage.binary_erosion(mask, iterations=2)
    if int(inner.sum()) < 60:
        inner = mask
    rows, columns = np.nonzero(inner)
    cy, cx = (int(rows.min()) + int(rows.max())) // 2, (int(columns.min()) + int(columns.max())) // 2
    half = _GRID  # in pixels: a grid of GRID samples, two pixels each
    weight = np.zeros((2 * half, 2 * half), np.float32)
    colour = np.zeros((2 * half, 2 * half, 3), np.float32)
    r, c = rows - cy + half, columns - cx + half
    fits = (r >= 0) & (r < 2 * half) & (c >= 0) & (c < 2 * half)
    weight[r[fits], c[fits]] = 1
    colour[r[fits], c[fits]] = image[rows[fits], columns[fits]]
    weight = weight.reshape(_GRID, 2, _GRID, 2).sum(axis=(1, 3)).ravel()
    colour = colour.reshape(_GRID, 2, _GRID, 2, 3).sum(axis=(1, 3)).reshape(-1, 3)
    at = np.flatnonzero(weight >= 2)
    offset = (np.arange(_GRID) - (_GRID - 1) / 2) * _STEP
    return _Samples(colour[at] / weight[at, None], offset[at % _GRID], offset[at // _GRID])


def _correlations(signal: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Correlation of a signal [m] with templates [n, m]; 0 where a template is constant."""
    centred = signal - signal.mean()
    size = np.linalg.norm(centred)
    mean = templates.mean(axis=1)
    spread = np.sqrt(np.maximum((templates**2).mean(axis=1) - mean**2, 0) * templates.shape[1])
    # A template that is nearly all one colour inside a small shape would explain a single odd pixel.
    usable = (mean > 0.12) & (mean < 0.88)
    return np.where(usable, (templates @ centred) / np.maximum(spread * size, 1e-6), 0.0)


def _best_fit(samples: _Samples, signal: np.ndarray, radius: float) -> dict[str, tuple[float, np.ndarray]]:
    """Per pattern: the best signed correlation and what was painted, [m].

    All places in a few sizes around `radius` pixels, then finer steps around the best. Keys: striped, checked, dotted
    (second colour is the dots) and dotted- (second colour is the ground).
    """
    best: dict[str, tuple[float, np.ndarray]] = {}
    for pattern, (angles, phases) in _places().items():
        found = []
        for size in _SIZES:
            r = radius * size
            painted = _paint(pattern, angles, phases, samples.x / r, samples.y / r, _STEP / r)
            found.append(_correlations(signal, painted))
        table = np.stack(found)
        for name in ("dotted", "dotted-") if pattern == "dotted" else (pattern,):
            value = -table if name == "dotted-" else table if name == "dotted" else np.abs(table)
            which, top = np.unravel_index(int(value.argmax()), value.shape)
            sign = -1.0 if name == "dotted-" or (name != "dotted" and table[which, top] < 0) else 1.0
            r, angle, phase = radius * _SIZES[int(which)], angles[top], phases[top]
            for reach in (0.5, 0.25):
                steps = _STRIPE_STEPS if pattern == "striped" else _LATTICE_STEPS
                near = phase + reach * steps[:, 1:] * _PERIODS[pattern] / 8
                turned = angle + 2 * reach * steps[:, 0]
                painted = _paint(pattern, turned, near, samples.x / r, samples.y / r, _STEP / r)
                fits = sign * _correlations(signal, painted)
                at = int(fits.argmax())
                angle, phase = turned[at], near[at]
            shown = painted[at]
            best[name] = (float(fits[at]), shown if sign > 0 else 1 - shown)
    return best


_STRIPE_STEPS = np.array(list(product((-2, 0, 2), (-1, 0, 1), (0,))), np.float32)
_LATTICE_STEPS = np.array(list(product((-2, 0, 2), (-1, 0, 1), (-1, 0, 1))), np.float32)


def _describe(samples: _Samples, radius: float, looks: tuple[Look, ...]) -> tuple[Texture, float, dict[Look, float]]:
    """Texture, correlation, and fidelity to each asked look of an object of `radius` pixels."""
    first, second, share = _two_colours(samples.colours)
    axis = second - first
    apart = float(np.linalg.norm(axis))
    two = apart >= PLAIN_DISTANCE and 0.08 <= share <= 0.92
    if two:
        signal = np.clip((samples.colours - first) @ axis / apart**2, -0.2, 1.2)
        fits = _best_fit(samples, signal, radius)
        name = max(fits, key=lambda key: fits[key][0])
        correlation = fits[name][0]
        words = (_colour_word(first), _colour_word(second))
        if name == "dotted-":
            words = (words[1], words[0])
        # The painted pattern in the object's own two colours must explain it: four colours on one object are not two.
        t = np.clip(fits[name][1], 0, 1)[:, None]
        wrong = float(((samples.colours - (first * (1 - t) + second * t)) ** 2).sum(axis=1).mean())
        explained = 1.0 - wrong / (apart**2 / 4)
        fits_well = correlation >= MIN_PATTERN_CORRELATION and explained >= MIN_EXPLAINED
        pattern = name.rstrip("-") if fits_well else UNKNOWN
        texture = Texture(pattern, words)
    else:
        fits, correlation = {}, 1.0
        middle = np.median(samples.colours, axis=0)
        rest = float(np.linalg.norm(samples.colours - middle, axis=1).mean())
        texture = Texture("plain" if rest < PLAIN_DISTANCE else UNKNOWN, (_colour_word(middle),))
    return texture, correlation, {look: _fidelity(samples, look, fits) for look in looks}


def _fidelity(samples: _Samples, look: Look, fits: dict[str, tuple[float, np.ndarray]]) -> float:
    colours = [np.asarray(COLOURS[c], np.float32) for c in look.colours]
    if look.pattern == "plain":
        wrong = float(((samples.colours - colours[0]) ** 2).sum(axis=1).mean())
        return max(0.0, 1.0 - wrong / (110.0**2 / 4))
    painted = [fits[name][1] for name in fits if name.rstrip("-") == look.pattern]
    if not painted:
        return 0.0
    ground, other = colours
    scale = float(((other - ground) ** 2).sum()) / 4
    values = []
    # `fits` paints the object's own second cluster; which of the look's colours that is, both ways tell.
    for paint, flip in product(painted, (False, True)):
        if look.pattern == "dotted" and flip != (paint is fits["dotted-"][1]):
            continue
        t = (1 - paint if flip else paint)[:, None]
        wrong = float(((samples.colours - (ground * (1 - t) + other * t)) ** 2).sum(axis=1).mean())
        values.append(1.0 - wrong / scale)
    return max(0.0, *values)


def _colour_distance(samples: _Samples, look: Look) -> float:
    """How far pixels are from the look's nearest colour, and the look's colours from the nearest pixels; the mean."""
    colours = np.array([COLOURS[c] for c in look.colours], np.float32)
    distance = np.linalg.norm(samples.colours[:, None] - colours, axis=2)
    return float((distance.min(axis=1).mean() + np.quantile(distance, 0.15, axis=0).mean()) / 2)


def detect(image: np.ndarray, looks: tuple[Look, ...] = ()) -> list[Found]:
    """All objects of a picture, uint8 [SIZE, SIZE, 3], largest first; `looks` are those to measure fidelity to."""
    if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"a uint8 picture of {SIZE} pixels square is needed, got {image.dtype} {image.shape}")
    found = []
    for mask in _components(image):
        nearest_shape, edge_error = _shape(mask)
        shape = nearest_shape if edge_error <= MAX_EDGE_ERROR else UNKNOWN
        samples = _samples(image, mask)
        radius = float(mask.sum() ** 0.5) / _shape_bank()[3][nearest_shape] / 2
        texture, correlation, fidelity = _describe(samples, radius, looks)
        nearest = np.linalg.norm(samples.colours[:, None] - _PALETTE, axis=2).argmin(axis=1)
        counts = np.bincount(nearest, minlength=len(_NAMES)) / len(nearest)
        rows, columns = np.nonzero(mask)
        found.append(Found(
            shape, edge_error, texture, correlation, int(mask.sum()), (float(columns.mean()), float(rows.mean())),
            fidelity, {_NAMES[i]: float(v) for i, v in enumerate(counts) if v >= 0.02}, nearest_shape,
            {look: _colour_distance(samples, look) for look in looks},
        ))  # fmt: skip
    return found


def background_of(image: np.ndarray) -> np.ndarray:
    """The background's colour, float [3]: the median of the two outermost pixel rows."""
    edges = (image[:2], image[-2:], image[:, :2], image[:, -2:])
    return np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)
