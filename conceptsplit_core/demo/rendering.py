"""Objects to pixels: drawn at three times the final resolution, so that edges are anti-aliased."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .looks import CLASSES, SIZE, SceneObject

BAND, CHECK, DOT_STEP, DOT_RADIUS = 0.4, 0.5, 0.62, 0.2
"""Height of a stripe, side of a check, distance and radius of dots, all in half diameters of the object.

A pattern belongs to its object as the hole belongs to a ring: five bands, four by four checks, three by three dots,
always at the same place on it. With a phase, an angle and a size of its own, a pattern word foretells no single
pixel before the pattern can be seen anyway, and a model of this size did not learn to heed it.
"""


def _inside(class_word: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Membership of points in the unit shape; u right and v down, both about -1..1."""
    if class_word == "circle":
        return u * u + v * v <= 0.92**2
    if class_word == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.8
    if class_word == "triangle":
        return (v <= 0.72) & (v >= -0.95 + 1.75 * np.abs(u))
    if class_word == "cross":
        a, b = np.abs(u), np.abs(v)
        return ((a <= 0.33) & (b <= 0.95)) | ((b <= 0.33) & (a <= 0.95))
    if class_word == "ring":
        r = u * u + v * v
        return (r <= 0.97**2) & (r >= 0.46**2)
    if class_word == "diamond":
        return np.abs(u) / 0.8 + np.abs(v) <= 1.0
    if class_word == "heart":
        x, y = 1.22 * u, -1.2 * v + 0.12
        w = x * x + y * y - 1.0
        return w * w * w - x * x * y * y * y <= 0.0
    if class_word == "star":
        # Five-fold symmetry: fold the angle into one tenth, then one straight edge decides.
        angle = np.arctan2(u, -v)
        radius = np.hypot(u, v)
        sector = 2 * np.pi / 5
        folded = np.abs((angle + sector / 2) % sector - sector / 2)
        inner = 0.5
        px, py = radius * np.sin(folded), radius * np.cos(folded)
        qx, qy = inner * np.sin(sector / 2), inner * np.cos(sector / 2)
        return px * (1.0 - qy) + (py - 1.0) * qx <= 0.0
    raise ValueError(f"unknown class word {class_word!r}; known: {', '.join(CLASSES)}")


def _second_colour(pattern: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where the second colour lies; u right and v down from the object's centre, in half diameters."""
    if pattern == "striped":
        return np.floor((v + 1) / BAND) % 2 >= 1
    if pattern == "checked":
        return (np.floor((u + 1) / CHECK) + np.floor((v + 1) / CHECK)) % 2 >= 1
    if pattern == "dotted":
        half = DOT_STEP / 2
        return np.hypot((u + half) % DOT_STEP - half, (v + half) % DOT_STEP - half) <= DOT_RADIUS
    raise ValueError(f"pattern {pattern!r} has no second colour")


def render(background: tuple[float, float, float], objects: Sequence[SceneObject]) -> tuple[np.ndarray, np.ndarray]:
    """Draw objects in order onto a plain background.

    Gives the picture, uint8 [SIZE, SIZE, 3], and the visible share per object, float32 [n, SIZE, SIZE].
    """
    factor = 3
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = background
    masks = np.zeros((len(objects), SIZE, SIZE), np.float32)
    for index, thing in enumerate(objects):
        cx, cy = thing.centre
        reach = int(np.ceil(thing.diameter / 2 * 1.1)) + 1
        x0, x1 = max(int(cx) - reach, 0), min(int(cx) + reach + 1, SIZE)
        y0, y1 = max(int(cy) - reach, 0), min(int(cy) + reach + 1, SIZE)
        xs = (np.arange((x1 - x0) * factor, dtype=np.float32) + 0.5) / factor + x0 - cx
        ys = (np.arange((y1 - y0) * factor, dtype=np.float32) + 0.5) / factor + y0 - cy
        x, y = np.meshgrid(xs, ys)
        a = np.deg2rad(thing.tilt)
        scale = 2.0 / thing.diameter
        u = (np.cos(a) * x + np.sin(a) * y) * scale
        v = (-np.sin(a) * x + np.cos(a) * y) * scale
        inside = _inside(thing.class_word, u, v).astype(np.float32)
        colour = np.broadcast_to(np.asarray(thing.rgb[0], np.float32), (*inside.shape, 3))
        if thing.look.pattern != "plain":
            second = _second_colour(thing.look.pattern, x * scale, y * scale)
            colour = np.where(second[..., None], np.asarray(thing.rgb[1], np.float32), colour)

        def shrink(field: np.ndarray) -> np.ndarray:
            return field.reshape(y1 - y0, factor, x1 - x0, factor, -1).mean(axis=(1, 3))  # noqa: B023

        alpha = shrink(inside)
        paint = shrink(colour * inside[..., None])
        image[y0:y1, x0:x1] = image[y0:y1, x0:x1] * (1 - alpha) + paint
        masks[:index, y0:y1, x0:x1] *= 1 - alpha[..., 0]
        masks[index, y0:y1, x0:x1] = alpha[..., 0]
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), masks
