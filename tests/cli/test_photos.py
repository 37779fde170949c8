"""Photographs as phones and cameras leave them: JPEG, PNG, WebP, HEIC, lying on their side, in Display P3, with masks.

The pictures are crops of scikit-image's cup of coffee; what must come out of them is cut from its array here again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conceptsplit_core.adapters.file import load_adapter
from conceptsplit_core.pictures import COLOURS
from conceptsplit_core.train.folder import mask_files, picture_folder
from conceptsplit_core.train.reading import open_picture, read_masks, read_pictures
from tools import choosing_pictures

# Left, top, right, bottom in the photograph; the third is mirrored, the last two are stored lying.
PLACES = {
    "cup-1.jpg": (0, 0, 600, 400),
    "cup-2.png": (50, 0, 510, 400),
    "cup-3.webp": (130, 10, 600, 400),
    "cup-4.heic": (60, 0, 440, 400),
    "cup-5.jpg": (90, 0, 420, 390),
}


@pytest.fixture(scope="module")
def cup_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("skimage.data")
    pytest.importorskip("pillow_heif")
    folder = tmp_path_factory.mktemp("cup")
    choosing_pictures.write_folder(folder)
    return folder


def expected(name: str) -> np.ndarray:
    import skimage.data

    left, top, right, bottom = PLACES[name]
    crop = skimage.data.coffee()[top:bottom, left:right]
    return crop[:, ::-1] if name == "cup-3.webp" else crop


def test_every_format_is_read_upright_and_in_its_colours(cup_folder):
    found = picture_folder(cup_folder)
    assert [path.name for path in found.pictures] == list(PLACES)
    assert found.left_out == "5 masks (used with --masks)"
    for path in found.pictures:
        picture, wanted = np.asarray(open_picture(path)).astype(int), expected(path.name).astype(int)
        assert picture.shape == wanted.shape, path.name
        assert abs(picture - wanted).mean() < 4, path.name
        with Image.open(path) as stored:
            lying = np.asarray(stored.convert("RGB"))
        assert (lying.shape[0] < lying.shape[1]) == (path.name != "cup-4.heic"), "the HEIC reader turns by itself"
    # The last one's own numbers are those of another colour space.
    off = np.abs(np.rot90(lying, -1).astype(int) - wanted).mean()
    assert off > 6


def test_masks_lie_on_the_cup_whatever_its_picture_s_format(cup_folder):
    files = picture_folder(cup_folder).pictures
    masks = mask_files(cup_folder, files)
    assert [path.name for path in masks] == [f"cup-{n}_mask.png" for n in range(1, 6)]
    size = (48, 80)
    covers = read_masks(masks, files, size)[:, 0]
    seen = read_pictures(files, size).astype(int)
    assert seen.shape == (5, 48, 80, 3) and covers.shape == (5, 48, 80)
    for name, cover, picture in zip(PLACES, covers, seen, strict=True):
        # The same place by arithmetic: the largest part of the crop that has the wanted shape, then its mean colours.
        array = expected(name)
        h, w = array.shape[:2]
        wide, tall = min(w, h * 80 / 48), min(h, w * 48 / 80)
        box = ((w - wide) / 2, (h - tall) / 2, (w + wide) / 2, (h + tall) / 2)
        part = Image.fromarray(np.ascontiguousarray(array)).resize((80, 48), Image.Resampling.BOX, box)
        assert abs(picture - np.asarray(part).astype(int)).mean() < 8, name
        # And the mask by the ellipses of cup and saucer, asked at every cell's middle.
        x = PLACES[name][0] + box[0] + (np.arange(80) + 0.5) * wide / 80
        y = PLACES[name][1] + box[1] + (np.arange(48) + 0.5) * tall / 48
        if name == "cup-3.webp":
            x = PLACES[name][0] + PLACES[name][2] - x
        inside = np.zeros((48, 80), dtype=bool)
        for left, top, right, bottom in ((76, 58, 480, 388), (172, 16, 410, 210)):
            far = (2 * x - left - right) / (right - left), (2 * y - top - bottom) / (bottom - top)
            inside |= far[0][None] ** 2 + far[1][:, None] ** 2 < 1
        assert abs(cover - inside).mean() < 0.01 and 0.3 < inside.mean() < 0.99, name


def test_the_terminal_learns_a_cup_from_them(call, cup_folder, model_folder, tmp_path):
    out = tmp_path / "mokka.safetensors"
    command = [
        "train", "--images", cup_folder, "--masks", cup_folder, "--class-word", "cup", "--name", "mokka",
        "--model", model_folder, "--out", out, "--steps", 7, "--batch-size", 2, "--size", "96x64", "--rank", 2,
        "--background-weight", 0.3,
    ]  # fmt: skip
    code, _, err = call(*command)
    assert code == 0, err
    assert "Not used in" in err and ": 5 masks (used with --masks)." in err
    assert "5 pictures at 96 × 64, model family sd15, epsilon" in err and "after 7 steps" in err
    facts = load_adapter(out).info.training
    assert (facts["images"], facts["width"], facts["height"], facts["background_weight"]) == (5, 96, 64, 0.3)
    with Image.open(tmp_path / "mokka.loss.png") as drawn:
        curve = np.asarray(drawn.convert("RGB")).astype(int)
    line = (np.abs(curve - COLOURS[1]).sum(axis=-1) < 60).nonzero()[1]
    assert line.min() < 80 and line.max() > curve.shape[1] - 40, "the running mean goes from the first step to the last"


def test_heic_without_its_package_is_left_out_with_what_to_install(call, refused, tmp_path, model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    folder = tmp_path / "phone"
    folder.mkdir()
    for name in ("IMG_1.HEIC", "IMG_2.heic"):
        (folder / name).write_bytes(b"\0\0\0\x18ftypheic")
    command = ["train", "--images", folder, "--class-word", "cup", "--name", "mokka", "--model", model_folder]
    command += ["--out", tmp_path / "mokka.safetensors", "--steps", 1, "--size", 64, "--rank", 2]
    said = refused(*command)
    assert said.endswith("(it holds 2 HEIC files (save them as JPEG, or install pillow-heif)).")
    Image.new("RGB", (64, 64), (200, 30, 30)).save(folder / "x.webp")
    code, _, err = call(*command)
    assert code == 0 and ": 2 HEIC files (save them as JPEG, or install pillow-heif)." in err


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_a_colour_profile_is_followed_where_it_fits(tmp_path, mode):
    """Display P3's pure red is more than sRGB's; a neutral grey and a grey picture are the same in both."""
    path = tmp_path / "x.png"
    picture = Image.new("RGB", (8, 8), (180, 40, 30))
    picture.paste((90, 90, 90), (0, 0, 4, 8))
    kept = picture.quantize(4) if mode == "P" else picture.convert(mode)
    kept.save(path, icc_profile=choosing_pictures.display_p3())
    grey, red = (open_picture(path).getpixel((x, 4)) for x in (1, 6))
    stored = kept.convert("RGB").getpixel((6, 4))
    assert max(abs(value - 90) for value in grey) <= 1
    if mode == "L":
        assert red == stored
    else:
        # Linear light of the stored numbers, from P3's to sRGB's primaries.
        linear = [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in stored]
        to_srgb = [[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]]
        light = (np.array(to_srgb) @ linear).clip(0, 1)
        wanted = [v * 12.92 if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in light]
        assert np.allclose(red, np.array(wanted) * 255, atol=2) and red[0] > stored[0] + 5


@pytest.mark.parametrize("profile", [b"no profile at all", None])
def test_a_profile_that_cannot_be_read_changes_nothing(tmp_path, profile):
    path = tmp_path / "x.png"
    Image.new("RGB", (8, 8), (180, 40, 30)).save(path, **({"icc_profile": profile} if profile else {}))
    assert open_picture(path).getpixel((3, 3)) == (180, 40, 30)


def test_the_committed_picture_is_small_and_names_its_files():
    path = choosing_pictures.OUT
    assert path.stat().st_size <= 150 * 1024
    with Image.open(path) as sheet:
        assert sheet.width > 800 and sheet.height > sheet.width
    assert list(choosing_pictures.CROPS) == list(PLACES)
