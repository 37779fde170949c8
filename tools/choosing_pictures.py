"""Draws the picture of docs/choosing_pictures.md: a folder of photographs, masks, what training sees, and loss curves.

    python -m tools.choosing_pictures

The photograph is scikit-image's cup of coffee, which its package carries. The first curve is the built-in small
model's, the second that of a UNet of SD1.5's size with random weights: no pretrained ones were at hand.
"""

from __future__ import annotations

import io
import struct
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageDraw

from conceptsplit_core import pictures
from conceptsplit_core.cli.common import to_tensor
from conceptsplit_core.demo.checkpoint import TOKENIZER_DIR
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.hosts.diffusers.configs import TEXT_CONFIGS, UNET_CONFIGS, VAE_CONFIG
from conceptsplit_core.hosts.diffusers.model import text_encoder
from conceptsplit_core.hosts.diffusers.schedule import schedule, solved
from conceptsplit_core.settings import TrainConfig
from conceptsplit_core.text.concepts import Concept
from conceptsplit_core.train.folder import mask_files, picture_folder
from conceptsplit_core.train.loop import train
from conceptsplit_core.train.prompts import DEFAULT_TEMPLATES
from conceptsplit_core.train.reading import open_mask, open_picture, read_masks, read_pictures

OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "choosing_pictures.jpg"
CUP = Concept("mokka", "cup")
SIZE = (128, 128)
ORIENTATION = 0x0112  # of Exif; 6: the stored picture has to be turned a quarter to the right
P3 = {
    b"rXYZ": (0.51512, 0.24120, -0.00105),
    b"gXYZ": (0.29198, 0.69225, 0.04189),
    b"bXYZ": (0.15710, 0.06657, 0.78407),
}
"""Display P3's primaries as an ICC profile has them, for white D50."""
CROPS = {
    "cup-1.jpg": (0, 0, 600, 400),
    "cup-2.png": (50, 0, 510, 400),
    "cup-3.webp": (130, 10, 600, 400),
    "cup-4.heic": (60, 0, 440, 400),
    "cup-5.jpg": (90, 0, 420, 390),
}


def display_p3() -> bytes:
    """A colour profile with Display P3's primaries, from Pillow's sRGB profile: phones photograph in it."""
    raw = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for entry in range(struct.unpack(">I", raw[128:132])[0]):
        tag, offset, _ = struct.unpack(">4sII", raw[132 + 12 * entry : 144 + 12 * entry])
        if tag in P3:
            raw[offset + 8 : offset + 20] = struct.pack(">3i", *(round(65536 * value) for value in P3[tag]))
    return bytes(raw)


def photograph() -> Image.Image:
    import skimage.data

    return Image.fromarray(skimage.data.coffee())


def cup_mask() -> Image.Image:
    """White on the cup with its saucer, drawn by hand."""
    mask = Image.new("L", (600, 400), 0)
    draw = ImageDraw.Draw(mask)
    draw.ellipse((76, 58, 480, 388), fill=255)
    draw.ellipse((172, 16, 410, 210), fill=255)
    return mask


def write_folder(folder: Path) -> None:
    """Photographs of one cup as they come: five formats and sizes, the last two stored lying, the last in Display P3.
    Beside each lies its mask.
    """
    import pillow_heif

    pillow_heif.register_heif_opener()
    photo, mask, wide = photograph(), cup_mask(), display_p3()
    for number, (name, box) in enumerate(CROPS.items()):
        crop, cover = photo.crop(box), mask.crop(box)
        if number == 2:
            crop, cover = (part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in (crop, cover))
        cover.save(folder / f"{Path(name).stem}_mask.png")
        more: dict[str, Any] = {} if name.endswith(".png") else {"quality": 95}
        if number >= 3:
            exif = Image.Exif()
            exif[ORIENTATION] = 6
            crop, more["exif"] = crop.transpose(Image.Transpose.ROTATE_90), exif.tobytes()
        if number == 4:
            target = ImageCms.ImageCmsProfile(io.BytesIO(wide))
            converted = ImageCms.profileToProfile(crop, ImageCms.createProfile("sRGB"), target)
            assert converted is not None
            crop, more["icc_profile"] = converted, wide
        crop.save(folder / name, **more)


def random_sd15(seed: int = 0) -> host.DiffusersModel:
    """A model of SD1.5's shape and size with random weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    unet: Any = UNet2DConditionModel(**UNET_CONFIGS["sd15"])
    vae: Any = AutoencoderKL(**VAE_CONFIG)
    encoder = text_encoder(
        CLIPTokenizer.from_pretrained(str(TOKENIZER_DIR)), CLIPTextModel(CLIPTextConfig(**TEXT_CONFIGS["clip"])), False
    )
    settings, alphas = solved(schedule())
    for part in (unet, vae, encoder.model):
        part.eval().requires_grad_(False)
    return host.DiffusersModel(
        unet, vae, (encoder,), "sd15", settings["prediction_type"], alphas, settings, "SD1.5's shape"
    )


def losses(model: host.DiffusersModel, folder: Path, size: tuple[int, int], **settings: Any) -> list[float]:
    """The losses of a training on the folder with its masks."""
    files = picture_folder(folder).pictures
    masks = torch.from_numpy(read_masks(mask_files(folder, files), files, size))
    templates = model.templates or DEFAULT_TEMPLATES
    data = host.training_data(model, to_tensor(read_pictures(files, size)), CUP, templates, masks)
    config = replace(TrainConfig(prediction_type=model.prediction_type), **settings)
    adapter = host.new_adapter(model, CUP, config.rank, config.alpha, config.seed)
    with host.training_denoiser(model, adapter) as denoise:
        return train(adapter, data, model.alphas_cumprod, denoise, config).losses


def sheet(folder: Path, curves: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Rows: the files as they are stored, their masks, what training sees, and the curves."""
    files = picture_folder(folder).pictures
    covers = mask_files(folder, files)
    stored = []
    for file in files:
        with Image.open(file) as opened:
            stored.append(np.asarray(opened.convert("RGB")))
    seen, weights = read_pictures(files, SIZE), read_masks(covers, files, SIZE)[:, 0]
    shown = [
        np.where(weight[..., None] > 0.5, picture, (0.35 * picture + 150).clip(0, 255)).astype(np.uint8)
        for picture, weight in zip(seen, weights, strict=True)
    ]
    tiles = [
        (stored, [file.name for file in files], "The folder, as its files are stored"),
        ([np.asarray(open_mask(cover)) for cover in covers], [cover.name for cover in covers], "Their masks"),
        (shown, None, "What training sees: upright, in sRGB, cropped to a square; what is pale counts a tenth"),
    ]
    rows = [pictures.contact_sheet(part, labels, len(files), 168, title) for part, labels, title in tiles]
    rows.append(np.concatenate(curves, axis=1))
    width = max(row.shape[1] for row in rows)
    paper = pictures.PAPER
    padded = [
        np.concatenate([row, np.full((row.shape[0], width - row.shape[1], 3), paper, np.uint8)], axis=1) for row in rows
    ]
    return np.concatenate(padded)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_folder(folder)
        for file in picture_folder(folder).pictures:
            print(file.name, open_picture(file).size)
        small = losses(host.load_model("demo"), folder, SIZE, steps=500)
        large = losses(random_sd15(), folder, (64, 64), steps=30, batch_size=1)
        curves = [
            pictures.loss_curve(small, (444, 260), "training loss, the built-in model"),
            pictures.loss_curve(large, (444, 260), "training loss, SD1.5's size, random weights"),
        ]
        print(f"built-in {np.mean(small[:100]):.4f} to {np.mean(small[-100:]):.4f}, random {np.mean(large):.4f}")
        Image.fromarray(sheet(folder, curves)).save(OUT, quality=82, optimize=True)
    print(f"{OUT.name}: {OUT.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
