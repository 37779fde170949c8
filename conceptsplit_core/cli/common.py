"""What several commands share: opening a model quietly, choosing a device, reading and writing pictures."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from ..errors import ConceptSplitError

if TYPE_CHECKING:
    from ..hosts.diffusers.load import DiffusersModel

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def say(text: str) -> None:
    """A line for the user; only the first of several processes speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def bar(total: int, what: str) -> Any:
    """A progress bar on stderr; silent in every process but the first."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="step", dynamic_ncols=True, disable=os.environ.get("RANK", "0") != "0")


def choose_device(name: str) -> torch.device:
    """The device of this process: with several, each takes its own GPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConceptSplitError(f"There is no device '{name}' here: use --device cpu or auto.") from None
    return device


def open_model(arguments: argparse.Namespace) -> DiffusersModel:
    """The model of --model, without the libraries' own progress bars and advice."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)

    from ..hosts.diffusers.load import load_model

    return load_model(
        arguments.model,
        device=choose_device(arguments.device),
        dtype=PRECISION[arguments.precision],
        prediction_type=arguments.prediction,
        tokenizer=arguments.tokenizer,
    )


# --- pictures in ----------------------------------------------------------------------------------------------


def list_pictures(folder: str, what: str = "training picture") -> list[Path]:
    """Picture files of a folder, by name.

    Raises:
        ConceptSplitError: no such folder, or no picture in it.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConceptSplitError(f"There is no folder '{folder}': give the folder with the {what}s.")
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not found:
        raise ConceptSplitError(f"The folder '{folder}' holds no {what}: put PNG, JPEG, WebP, BMP or TIFF files there.")
    return found


def open_picture(path: Path) -> Image.Image:
    """A picture file as 8-bit RGB, upright, transparent parts on white.

    Raises:
        ConceptSplitError: not readable, naming the file.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            picture.load()
        return _to_rgb(picture, path.name)
    except ConceptSplitError:
        raise
    except Image.DecompressionBombError:
        raise ConceptSplitError(f"'{path.name}' is too large a picture to open: scale it down first.") from None
    except Exception as problem:  # decoders raise anything on a damaged file: struct.error, KeyError, TypeError …
        detail = " ".join(str(problem).split())[:200].rstrip(".") or type(problem).__name__
        reason = "it is not a picture" if isinstance(problem, UnidentifiedImageError) else detail
        raise ConceptSplitError(
            f"'{path.name}' cannot be read as a picture ({reason}): replace or remove it."
        ) from None


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode == "F" or picture.mode.startswith("I"):
        return _wide_to_rgb(picture, name)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        alpha = picture.convert("RGBA")
        white = Image.new("RGBA", alpha.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, alpha)
    return picture.convert("RGB")


def _wide_to_rgb(picture: Image.Image, name: str) -> Image.Image:
    """16-bit, 32-bit and float grey to 8-bit RGB; floats up to 1 are taken as shares, others as 8 or 16 bit."""
    values = np.asarray(picture, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ConceptSplitError(f"'{name}' holds values that are not finite: replace or remove it.")
    top = 1.0 if picture.mode == "F" and values.max() <= 1.0 else 255.0 if values.max() <= 255.0 else 65535.0
    grey = (values / top * 255.0).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scaled and centre-cropped to (height, width)."""
    return ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.LANCZOS)


def read_pictures(paths: list[Path], size: tuple[int, int]) -> torch.Tensor:
    """Pictures as [N, 3, H, W] in -1..1."""
    arrays = [np.asarray(fit(open_picture(path), size)) for path in paths]
    return to_tensor(np.stack(arrays))


def to_tensor(pictures: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float [N, 3, H, W] in -1..1."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def read_masks(folder: str, pictures: list[Path], size: tuple[int, int]) -> torch.Tensor:
    """Masks [N, 1, H, W] in 0..1 for `pictures`, matched by file name without its ending, cropped as they are."""
    by_name = {path.stem: path for path in list_pictures(folder, "mask")}
    masks = []
    for path in pictures:
        if path.stem not in by_name:
            raise ConceptSplitError(f"There is no mask for '{path.name}' in '{folder}': name it like the picture.")
        mask, picture = open_picture(by_name[path.stem]), open_picture(path)
        wide, tall = mask.width * picture.height, mask.height * picture.width
        if abs(wide - tall) > 0.02 * max(wide, tall):
            raise ConceptSplitError(
                f"The mask '{by_name[path.stem].name}' is {mask.width} × {mask.height}, its picture "
                f"{picture.width} × {picture.height}: make it the picture's shape."
            )
        masks.append(np.asarray(fit(mask, size).convert("L"), dtype=np.float32) / 255.0)
    return torch.from_numpy(np.stack(masks))[:, None]


# --- pictures out ---------------------------------------------------------------------------------------------


def write_picture(picture: NDArray[np.uint8], path: Path, facts: dict[str, str] | None = None) -> None:
    """Writes a PNG with `facts` as text chunks, making its folder."""
    info = PngImagePlugin.PngInfo()
    for key, value in (facts or {}).items():
        info.add_itxt(key, value)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, format="PNG", pnginfo=info)
    except OSError as problem:
        raise ConceptSplitError(f"Cannot write {path}: {problem.strerror or problem}.") from None


def machine() -> str:
    """The machine in a few words, for reports: no names, no paths."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
