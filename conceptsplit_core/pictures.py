"""Pictures where people would rather look: loss curves, attention overlays, contact sheets.

Images are uint8 arrays [h, w, 3]; maps are float arrays [h, w] of any scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .errors import ConceptSplitError
from .method.loda import LodaTrace

Picture = NDArray[np.uint8]

INK, PAPER, GRID, SOFT = (32, 34, 40), (250, 250, 248), (222, 222, 218), (150, 152, 158)
# One colour per concept, told apart by colour-blind eyes too (Okabe and Ito's set).
COLOURS = ((230, 97, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 190, 40), (86, 180, 233))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def as_picture(image: NDArray) -> Picture:
    """uint8 RGB from [h, w], [h, w, 1], [h, w, 3] or [h, w, 4], uint8 or float 0…1.

    Raises:
        ConceptSplitError: another shape.
    """
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise ConceptSplitError(f"A picture of shape {list(np.shape(image))} cannot be shown: use [h, w, 3].")
    if array.dtype != np.uint8:
        array = (np.nan_to_num(array.astype(np.float64)).clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else np.ascontiguousarray(array[..., :3])


def _value_axis(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], low: float, high: float) -> None:
    """Five lines over `box` = (left, top, right, bottom) with their values, `low` at the bottom and `high` on top."""
    left, top, right, bottom = box
    for part in range(5):
        value = low + (high - low) * part / 4
        y = bottom - (bottom - top) * (value - low) / (high - low)
        draw.line([(left, y), (right, y)], fill=GRID)
        draw.text((left - 6, y), f"{value:.3g}", fill=SOFT, font=_font(11), anchor="rm")


def loss_curve(losses: Sequence[float], size: tuple[int, int] = (640, 360), title: str = "training loss") -> Picture:
    """Loss over steps: every step as a faint line, and its running mean, which is what to look at.

    Diffusion losses jump with the drawn timestep, so single steps say little.
    """
    width, height = size
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    left, right, top, bottom = 62, width - 16, 34, height - 34
    draw.text((left, 8), title, fill=INK, font=_font(14))
    values = np.asarray([v for v in losses if np.isfinite(v)], dtype=np.float64)
    if values.size == 0:
        draw.text((left, height // 2), "no steps yet", fill=SOFT, font=_font(14))
        return np.asarray(picture)
    window = max(1, min(values.size // 10, 50))
    # Of as many steps as there are at first: one step's loss alone would make the line begin anywhere.
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, values.size + 1)
    mean = (total[ends] - total[np.maximum(ends - window, 0)]) / np.minimum(ends, window)
    low, high = float(values.min()), float(np.quantile(values, 0.98))
    high = high if high > low else low + max(abs(low), 1e-6) * 0.1

    def point(i: int, v: float) -> tuple[float, float]:
        x = left + (right - left) * (i / max(1, values.size - 1))
        y = bottom - (bottom - top) * (min(max(v, low), high) - low) / (high - low)
        return x, y

    _value_axis(draw, (left, top, right, bottom), low, high)
    for part in range(5):
        i = round((values.size - 1) * part / 4)
        draw.text((point(i, low)[0], bottom + 6), str(i + 1), fill=SOFT, font=_font(11), anchor="mt")
    if values.size > 1:
        draw.line([point(i, v) for i, v in enumerate(values)], fill=(196, 205, 214))
        draw.line([point(i, v) for i, v in enumerate(mean)], fill=COLOURS[1], width=2)
    else:
        x, y = point(0, values[0])
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=COLOURS[1])
    return np.asarray(picture)


def heat(values: NDArray, size: tuple[int, int]) -> NDArray[np.float64]:
    """A map scaled to 0…1 by its own maximum and resized (bicubic) to `size` = (width, height)."""
    array = np.nan_to_num(np.asarray(values, dtype=np.float64)).clip(0, None)
    array = array / max(float(array.max()), 1e-12)
    resized = Image.fromarray(array.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.float64).clip(0, 1)


def overlay(
    image: NDArray,
    values: NDArray,
    label: str = "",
    colour: tuple[int, int, int] = COLOURS[0],
    region: NDArray | None = None,
    side: int = 256,
) -> Picture:
    """One concept's attention map over the image, dimmed where it does not look; its AFG region is outlined."""
    base = Image.fromarray(as_picture(image))
    scale = max(1.0, side / max(base.size))
    size = (max(1, round(base.width * scale)), max(1, round(base.height * scale)))
    base = base.resize(size, Image.Resampling.BICUBIC)
    weight = heat(values, size)[..., None]
    grey = np.asarray(base.convert("L"), dtype=np.float64)[..., None].repeat(3, axis=-1)
    dim = 0.55 * grey + 60
    mixed = dim * (1 - weight) + (0.45 * np.asarray(base, dtype=np.float64) + 0.55 * np.array(colour)) * weight
    if region is not None and np.any(region):
        inside = np.asarray(Image.fromarray(np.asarray(region, dtype=np.uint8) * 255).resize(size, 0)) > 127
        edge = inside & ~(
            np.pad(inside, 2)[:-4, 2:-2]
            & np.pad(inside, 2)[4:, 2:-2]
            & np.pad(inside, 2)[2:-2, :-4]
            & np.pad(inside, 2)[2:-2, 4:]
        )
        mixed[edge] = (255, 255, 255)
    picture = Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
    if label:
        draw = ImageDraw.Draw(picture)
        box = draw.textbbox((6, 4), label, font=_font(14))
        draw.rectangle([box[0] - 4, box[1] - 3, box[2] + 4, box[3] + 3], fill=INK)
        draw.text((6, 4), label, fill=(255, 255, 255), font=_font(14))
    return np.asarray(picture)


def contact_sheet(
    images: Sequence[NDArray], labels: Sequence[str] | None = None, columns: int = 0, side: int = 192, title: str = ""
) -> Picture:
    """Images side by side, each fitted into `side` pixels, with a line of text below and a title above.

    Raises:
        ConceptSplitError: no image, or labels that do not match.
    """
    if not len(images):
        raise ConceptSplitError("A contact sheet needs at least one image.")
    if labels is not None and len(labels) != len(images):
        raise ConceptSplitError(f"{len(images)} images but {len(labels)} labels: give one label per image.")
    columns = columns or min(len(images), max(1, round(len(images) ** 0.5 * 1.3)))
    rows = -(-len(images) // columns)
    gap, text, head = 8, 20 if labels else 0, 30 if title else 0
    sheet = Image.new("RGB", (gap + columns * (side + gap), head + gap + rows * (side + text + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((gap, 8), title, fill=INK, font=_font(15))
    for i, image in enumerate(images):
        tile = Image.fromarray(as_picture(image))
        scale = side / max(tile.size)
        # Small pictures grow by nearest neighbour: what the model drew, not what a filter made of it.
        grown = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
        tile = tile.resize((max(1, round(tile.width * scale)), max(1, round(tile.height * scale))), grown)
        x = gap + (i % columns) * (side + gap)
        y = head + gap + (i // columns) * (side + text + gap)
        sheet.paste(tile, (x + (side - tile.width) // 2, y + (side - tile.height) // 2))
        if labels:
            draw.text((x + side // 2, y + side + 3), labels[i][:32], fill=INK, font=_font(12), anchor="mt")
    return np.asarray(sheet)


def notice_sheet(image: NDArray, text: str, side: int = 256) -> Picture:
    """A sheet with the image and, where the maps would be, a sentence that says why there are none."""
    note = Image.new("RGB", (side, side), PAPER)
    draw, font, lines = ImageDraw.Draw(note), _font(15), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= side - 16:
            lines[-1] = longer
        else:
            lines.append(word)
    draw.multiline_text((8, 8), "\n".join(lines), fill=INK, font=font)
    return contact_sheet([image, np.asarray(note)], None, 2, side)


def concept_overlays(
    image: NDArray, maps: NDArray, names: Sequence[str], regions: NDArray | None = None, side: int = 256
) -> list[Picture]:
    """One overlay per concept, each in its own colour. maps [n, h, w]; regions bool [n, h, w] or None."""
    if len(names) != len(maps):
        raise ConceptSplitError(f"{len(maps)} maps but {len(names)} names: maps and concepts are of different runs.")
    return [
        overlay(image, maps[i], names[i], COLOURS[i % len(COLOURS)], None if regions is None else regions[i], side)
        for i in range(len(names))
    ]


def separation_curve(steps: Sequence[int], series: Sequence[tuple[str, Sequence[float]]]) -> Picture:
    """Values per evaluation of a run, one coloured line each, for instance the LODA loss of every image."""
    width, height = 640, 360
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    left, right, top, bottom = 62, width - 16, 48, height - 34
    values = [v for _, line in series for v in line if np.isfinite(v)]
    draw.text((left, 8), "separation loss at each LODA evaluation", fill=INK, font=_font(14))
    if not values:
        draw.text((left, height // 2), "LODA did not run", fill=SOFT, font=_font(14))
        return np.asarray(picture)
    high = max(max(values), 1e-6)
    count = max(len(line) for _, line in series)
    _value_axis(draw, (left, top, right, bottom), 0.0, high)
    x_of = lambda i: left + (right - left) * i / max(1, count - 1)
    for i in range(count):
        if i == 0 or (i < len(steps) and steps[i] != steps[i - 1]):
            draw.line([(x_of(i), top), (x_of(i), bottom)], fill=GRID)
            draw.text((x_of(i), bottom + 6), str(steps[i] + 1), fill=SOFT, font=_font(11), anchor="mt")
    for n, (name, line) in enumerate(series):
        colour = COLOURS[n % len(COLOURS)]
        points = [(x_of(i), bottom - (bottom - top) * v / high) for i, v in enumerate(line) if np.isfinite(v)]
        if len(points) > 1:
            draw.line(points, fill=colour, width=2)
        for x, y in points:
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colour)
        draw.text((left + 90 * n, 28), name, fill=colour, font=_font(12))
    return np.asarray(picture)


def trace_sheets(trace: LodaTrace, images: NDArray, side: int = 256) -> list[Picture]:
    """One sheet per image [N, h, w, C] of a run: each concept's map before LODA, where it ran, and the map that its
    region, outlined, was taken from; or the regions alone, where the user has drawn all of them. What a run knows of
    one image is shown on each.

    Raises:
        ConceptSplitError: another number of images than the run had.
    """
    found, kind = (trace.regions, "region") if trace.after is None else (trace.after, "after")
    if found is None:
        raise ConceptSplitError("There are no attention maps to show: the run read none.")
    if len(found) not in (1, len(images)):
        raise ConceptSplitError(
            f"{len(images)} pictures but attention maps of {len(found)}: decode the latent of the same sampler."
        )
    of_image = lambda maps, i: maps[i % len(maps)].numpy()
    sheets = []
    for i, image in enumerate(images):
        region = None if trace.regions is None else of_image(trace.regions, i)
        tiles = []
        if trace.before is not None:
            before = [f"{name}: before" for name in trace.concepts]
            tiles += concept_overlays(image, of_image(trace.before, i), before, None, side)
        alone = trace.before is None and kind == "after"
        labels = [name if alone else f"{name}: {kind}" for name in trace.concepts]
        tiles += concept_overlays(image, of_image(found, i), labels, region, side)
        sheets.append(contact_sheet(tiles, None, len(trace.concepts), side))
    return sheets


def trace_curve(trace: LodaTrace, labels: Sequence[str] | None = None) -> Picture:
    """The separation loss of a run at every evaluation, one line per image: all of them, or the first with a label."""
    steps = [step for step, _ in trace.losses]
    if labels is None:
        labels = [f"image {i + 1}" for i in range(len(trace.losses[0][1]) if trace.losses else 0)]
    return separation_curve(
        steps, [(label, [float(loss[i]) for _, loss in trace.losses]) for i, label in enumerate(labels)]
    )
