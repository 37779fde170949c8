"""Picture files for the terminal's folder reader: odd but whole ones must be read right, damaged ones or one sentence.

    python -m tests.fuzz.images --count 100000 --seed 0 --out tests/fuzz/results/images.json

Whole files: every mode and format of the table below, turned by EXIF, animated, with odd metadata; each has a picture
that a reader must come to, made with numpy. Damaged files: those with flipped bits, cut off, with bytes put in or
out, or with two files mixed. Watched as in tests/fuzz/files.py.
"""

from __future__ import annotations

import io
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.train.images import fit
from conceptsplit_core.train.reading import open_picture

from . import watch

SECONDS = 60.0  # of processor time; a damaged header may ask for the largest picture that Pillow opens
GOOD = ("picture", "sentence")
EXIF_TURN = 0x0112


def source(width: int = 23, height: int = 17) -> np.ndarray:
    """A picture without symmetry, uint8 [h, w, 3]; smooth, so that lossy formats stay near it."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([40 + 160 * x / width, 200 - 150 * y / height, 60 + 100 * x * y / (width * height)], -1).astype(
        "u1"
    )


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def grey_of(colours: np.ndarray) -> np.ndarray:
    """Luma as pictures are made grey, uint8 [h, w, 3]."""
    luma = colours.astype(float) @ [0.299, 0.587, 0.114]
    return np.repeat(luma.round().astype("u1")[..., None], 3, axis=-1)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255.0
    return (colours * share + 255 * (1 - share)).round().astype("u1")


def whole_files() -> dict[str, tuple[bytes, np.ndarray, float]]:
    """Name (with its ending) to the file, what it shows, and by how many grey levels a lossy format may differ."""
    colours = source()
    picture = Image.fromarray(colours)
    grey = grey_of(colours)
    alpha = np.linspace(0, 255, colours.shape[0] * colours.shape[1]).reshape(colours.shape[:2]).astype("u1")
    ghost = Image.fromarray(np.dstack([colours, alpha]))
    found: dict[str, tuple[bytes, np.ndarray, float]] = {
        "plain.png": (encoded(picture, "PNG"), colours, 0),
        "interlaced-name.PNG": (encoded(picture, "PNG", compress_level=0), colours, 0),
        "photo.jpg": (encoded(picture, "JPEG", quality=95), colours, 8),
        "progressive.jpeg": (encoded(picture, "JPEG", quality=95, progressive=True), colours, 8),
        "grey.jpg": (encoded(picture.convert("L"), "JPEG", quality=95), grey, 8),
        "print.jpg": (encoded(picture.convert("CMYK"), "JPEG", quality=95), colours, 8),
        "plain.webp": (encoded(picture, "WEBP", lossless=True), colours, 0),
        "lossy.webp": (encoded(picture, "WEBP", quality=95), colours, 12),
        "plain.bmp": (encoded(picture, "BMP"), colours, 0),
        "plain.tif": (encoded(picture, "TIFF"), colours, 0),
        "packed.tiff": (encoded(picture, "TIFF", compression="tiff_lzw"), colours, 0),
        "print.tif": (encoded(picture.convert("CMYK"), "TIFF"), colours, 2),
        "gif-in-disguise.png": (encoded(picture.quantize(256), "GIF"), colours, 24),
        "grey.png": (encoded(picture.convert("L"), "PNG"), grey, 1),
        "alpha.png": (encoded(ghost, "PNG"), on_white(colours, alpha), 1),
        "alpha.webp": (encoded(ghost, "WEBP", lossless=True, exact=True), on_white(colours, alpha), 1),
        "alpha.tiff": (encoded(ghost, "TIFF"), on_white(colours, alpha), 1),
        "grey-alpha.png": (encoded(ghost.convert("LA"), "PNG"), on_white(grey, alpha), 1),
        "palette.png": (encoded(picture.quantize(256), "PNG"), colours, 24),
        "one-pixel.png": (encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"), np.array([[[9, 8, 7]]], "u1"), 0),
        "line.png": (encoded(picture.crop((0, 0, 23, 1)), "PNG"), colours[:1], 0),
    }
    bits = np.repeat(np.where(alpha > 127, 255, 0).astype("u1")[..., None], 3, axis=-1)
    found["fax.png"] = (encoded(Image.fromarray(bits[..., 0]).convert("1"), "PNG"), bits, 0)
    found["fax.tif"] = (encoded(Image.fromarray(bits[..., 0]).convert("1"), "TIFF", compression="group4"), bits, 0)
    deep = Image.fromarray(grey[..., 0].astype("u2") * 257)
    found["deep.png"] = (encoded(deep, "PNG"), grey, 1)
    found["deep.tiff"] = (encoded(deep, "TIFF"), grey, 1)
    found["float.tiff"] = (encoded(Image.fromarray(grey[..., 0].astype("f4") / 255), "TIFF"), grey, 1)
    for turn, array in {
        1: colours, 2: colours[:, ::-1], 3: colours[::-1, ::-1], 4: colours[::-1],
        5: colours.transpose(1, 0, 2), 6: np.rot90(colours, 1), 7: colours[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(colours, 3), 9: colours, 0: colours, 60000: colours,
    }.items():  # fmt: skip
        exif = Image.Exif()
        exif[EXIF_TURN] = turn
        stored = Image.fromarray(np.ascontiguousarray(array))
        # A viewer turns what is stored by the tag: turning it the other way first must give the picture back.
        found[f"turned-{turn}.png"] = (encoded(stored, "PNG", exif=exif), colours, 0)
    film = [picture, Image.fromarray(255 - colours)]
    found["film.png"] = (encoded(film[0], "PNG", save_all=True, append_images=film[1:]), colours, 0)
    found["film.webp"] = (encoded(film[0], "WEBP", save_all=True, append_images=film[1:], lossless=True), colours, 0)
    found["pages.tif"] = (encoded(film[0], "TIFF", save_all=True, append_images=film[1:]), colours, 0)
    see_through = picture.quantize(16)
    shown = np.asarray(see_through.convert("RGB")).copy()
    index = int(np.asarray(see_through)[0, 0])
    shown[np.asarray(see_through) == index] = 255
    found["see-through.png"] = (encoded(see_through, "PNG", transparency=index), shown, 0)
    keyed = colours.copy()
    keyed[(colours == colours[3, 4]).all(-1)] = 255
    key = tuple(int(v) for v in colours[3, 4])
    found["colour-key.png"] = (encoded(picture, "PNG", transparency=key), keyed, 0)
    return found


def read(path: Path) -> str:
    """'picture' or 'sentence'; anything else is described."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a decoder's notes on metadata
            picture = open_picture(path)
            array = np.asarray(fit(picture, (16, 16)))
    except ConceptSplitError as error:
        return watch.sentence_problem(str(error)) or "sentence"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    right = picture.mode == "RGB" and array.shape == (16, 16, 3) and array.dtype == np.uint8
    return "picture" if right else f"{picture.mode} {array.shape} {array.dtype}"


def read_whole(folder: Path) -> dict[str, str]:
    """Whole files that are not read as what they show, with how far off they are."""
    wrong = {}
    for name, (data, shown, tolerance) in whole_files().items():
        path = folder / name
        path.write_bytes(data)
        try:
            array = np.asarray(open_picture(path)).astype(int)
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
            continue
        if array.shape != shown.shape:
            wrong[name] = f"shape {array.shape}, not {shown.shape}"
        elif (off := np.abs(array - shown.astype(int)).max()) > tolerance:
            wrong[name] = f"off by {off} levels"
    return wrong


def damage(data: bytes, other: bytes, rng: random.Random) -> tuple[str, bytes]:
    kind = rng.choice(["bits", "bytes", "truncation", "addition", "head", "splice", "zeros"])
    mutable = bytearray(data)
    # Headers and tables stand at the start of most formats, so half of the damage goes there.
    end = len(data) if rng.random() < 0.5 else min(len(data), 120)
    if kind == "bits":
        for _ in range(rng.randint(1, 6)):
            mutable[rng.randrange(end)] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        at = rng.randrange(end)
        mutable[at : at + rng.randint(1, 8)] = rng.randbytes(rng.randint(0, 8))
    elif kind == "truncation":
        return kind, data[: rng.randrange(len(data))]
    elif kind == "addition":
        return kind, data + rng.randbytes(rng.randint(1, 200))
    elif kind == "head":
        # Numbers in the header become extreme: widths of 2³¹, lengths of 0, offsets beyond the file.
        at, size = rng.randrange(end), rng.choice([2, 4])
        mutable[at : at + size] = rng.choice([b"\xff", b"\0", b"\x7f", b"\x80"]) * size
    elif kind == "splice":
        return kind, data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]
    else:
        at = rng.randrange(len(data))
        mutable[at : at + rng.randint(1, 100)] = bytes(rng.randint(1, 100))
    return kind, bytes(mutable)


def fuzz(count: int, seed: int) -> tuple[watch.Tally, dict[str, Any]]:
    rng = random.Random(seed)
    tally = watch.Tally()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    Image.init()  # decoders are imported now, not while files are watched
    try:
        wrong = read_whole(folder)
        files = {name: data for name, (data, *_) in whole_files().items()}
        names = list(files)
        for name in names:
            tally.count("whole", wrong.get(name, "picture"), GOOD, 0, 0.0)
        for n in range(count):
            name = rng.choice(names)
            kind, data = damage(files[name], files[rng.choice(names)], rng)
            path = folder / f"x{Path(name).suffix}"
            path.write_bytes(data)
            start = time.process_time()
            with watch.guarded(folder):
                what = read(path)
            took = time.process_time() - start
            path.unlink()
            if what in GOOD and took > SECONDS:
                what = f"{took:.1f} s"
            tally.count(kind, what, GOOD, n, took)
            if what not in GOOD:
                tally.bad[-1] += f" ({name})"
    finally:
        shutil.rmtree(folder)
    return tally, {"seed": seed, "whole_files": len(names)}


if __name__ == "__main__":
    sys.exit(watch.run(__doc__, "pictures", 100_000, fuzz))
