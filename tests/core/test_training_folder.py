"""Which files of a folder are pictures of the concept, which are masks, and what is said about the others."""

import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.train import folder as module
from conceptsplit_core.train.folder import OURS, mask_files, picture_folder, written_by_us


def draw(path, value=90):
    Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(path)
    return path


def names(paths):
    return [path.name for path in paths]


def test_case_9_masks_beside_their_pictures_are_no_pictures(tmp_path):
    for name in ("x.png", "x-masklabel.png", "y.jpg", "y_mask.png", "z.png", "z.MASK.png", "mask-x.png", "y matte.png"):
        draw(tmp_path / name)
    found = picture_folder(tmp_path)
    assert names(found.pictures) == ["x.png", "y.jpg", "z.png"]
    assert found.left_out == "5 masks (used with --masks)"


def test_case_9_a_mask_without_its_picture_is_a_picture(tmp_path):
    """Someone may train a carnival mask."""
    for name in ("mask.png", "red_mask.png", "masked-ball.png"):
        draw(tmp_path / name)
    assert names(picture_folder(tmp_path).pictures) == ["mask.png", "masked-ball.png", "red_mask.png"]


def test_case_9_pictures_that_this_program_wrote_are_left_out(tmp_path):
    from conceptsplit_core.cli.common import write_picture

    draw(tmp_path / "a.png")
    write_picture(np.zeros((8, 8, 3), np.uint8), tmp_path / "rex.loss.png")
    write_picture(np.zeros((8, 8, 3), np.uint8), tmp_path / "sample.png", {"prompt": "a <rex>"})
    info = PngImagePlugin.PngInfo()
    info.add_text(OURS, "another program")
    Image.new("RGB", (8, 8)).save(tmp_path / "edited.png", pnginfo=info)
    found = picture_folder(tmp_path)
    assert names(found.pictures) == ["a.png", "edited.png"]
    assert found.left_out == "2 ConceptSplit pictures" and written_by_us(tmp_path / "sample.png")


def test_case_10_what_is_left_out_is_counted_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_opens", lambda ending: False)
    draw(tmp_path / "a.jpg")
    for name in ("b.heic", "c.HEIC", "d.heif", "e.avif", "f.gif", "a.txt", "b.caption", "notes.pdf"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "more").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = picture_folder(tmp_path)
    assert found.count == "1 picture"
    assert found.left_out == (
        "2 captions, 3 HEIC files (save them as JPEG, or install pillow-heif), "
        "1 AVIF file (save them as PNG or JPEG), 1 GIF file (save them as PNG or JPEG), 1 dead link, 1 subfolder, "
        "1 other file"
    )


def test_case_10_a_folder_of_nothing_usable_says_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_opens", lambda ending: False)
    for name in ("b.heic", "c.heic"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConceptSplitError, match=r"holds no training picture: .*\(it holds 2 HEIC files \(save them"):
        picture_folder(tmp_path)


def test_case_10_heic_needs_its_plugin(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(Image.EXTENSION, ".heic", "PNG")  # even if somebody else opens them
    draw(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"x")
    found = picture_folder(tmp_path)
    assert names(found.pictures) == ["a.png"] and found.left_out.startswith("1 HEIC file")


def test_case_11_hidden_files_are_skipped_without_a_word(tmp_path):
    draw(tmp_path / "0.jpg")
    (tmp_path / "._0.jpg").write_bytes(b"\0\5\x16\7 resource fork")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    found = picture_folder(tmp_path)
    assert names(found.pictures) == ["0.jpg"] and found.left_out == ""


@pytest.mark.parametrize("picture", ["NFC", "NFD"])
def test_case_14_masks_are_found_however_an_accent_is_stored(tmp_path, picture):
    mask = "NFD" if picture == "NFC" else "NFC"
    masks = tmp_path / "masks"
    masks.mkdir()
    photo = draw(tmp_path / (unicodedata.normalize(picture, "café") + ".png"))
    wanted = draw(masks / (unicodedata.normalize(mask, "café") + ".png"))
    assert mask_files(masks, [photo]) == [wanted]
    beside = draw(tmp_path / (unicodedata.normalize(mask, "café") + "-mask.png"))
    found = picture_folder(tmp_path)
    assert found.pictures == (photo,) and found.masks == {photo: beside}


def test_masks_may_lie_beside_their_pictures(tmp_path):
    """--masks with the folder of the pictures: no picture is its own mask."""
    photos = [draw(tmp_path / "a.png"), draw(tmp_path / "b.jpg")]
    draw(tmp_path / "a-masklabel.png")
    with pytest.raises(ConceptSplitError, match=r"no mask for 'b\.jpg'"):
        mask_files(tmp_path, photos)
    draw(tmp_path / "b_mask.png")
    assert names(mask_files(tmp_path, photos)) == ["a-masklabel.png", "b_mask.png"]


def test_no_such_folder(tmp_path):
    with pytest.raises(ConceptSplitError, match="no folder .*nowhere"):
        picture_folder(tmp_path / "nowhere")


def test_every_mask_goes_with_its_picture_and_other_endings_are_known(tmp_path):
    for name in ("a.png", "a_mask.png", "b.jpg", "b-masklabel.png"):
        draw(tmp_path / name)
    for ending in ("arw", "nef", "cr2", "cr3", "dng", "raw", "exr", "tga", "jp2", "psd", "svg"):
        (tmp_path / f"x.{ending}").write_bytes(b"x")
    found = picture_folder(tmp_path)
    assert {of.name: mask.name for of, mask in found.masks.items()} == {
        "a.png": "a_mask.png",
        "b.jpg": "b-masklabel.png",
    }
    for ending in ("ARW", "NEF", "CR2", "CR3", "DNG", "RAW", "EXR", "TGA", "JP2", "PSD", "SVG"):
        assert f"1 {ending} file (save them as PNG or JPEG)" in found.left_out


@pytest.mark.parametrize("ending", [".heic", ".heif", ".avif", ".jxl"])
def test_case_10_formats_of_plugins_are_pictures_where_they_open(tmp_path, monkeypatch, ending):
    (tmp_path / f"a{ending}").write_bytes(b"x")
    draw(tmp_path / "b.png")
    monkeypatch.setattr(module, "_opens", lambda ending: True)
    assert names(picture_folder(tmp_path).pictures) == [f"a{ending}", "b.png"]


def test_a_damaged_png_is_not_ours(tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG damaged")
    assert not written_by_us(tmp_path / "x.png")


# --- public reports, see docs/robustness/reports.md ------------------------------------------------------------


def test_captions_of_any_encoding_are_left_out(tmp_path):
    """fluxgym issue 142: an empty caption, and one that is not UTF-8, stop that trainer."""
    draw(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.caption").write_bytes("café".encode("latin-1"))
    assert picture_folder(tmp_path).left_out == "2 captions"


def test_pictures_in_kohyas_subfolders_are_pointed_at(tmp_path):
    """kohya_ss issue 2148: `img/40_rex dog/` given one level too high."""
    (tmp_path / "40_rex dog").mkdir()
    draw(tmp_path / "40_rex dog" / "a.png")
    with pytest.raises(ConceptSplitError, match=r"holds no training picture: .*\(it holds 1 subfolder\)"):
        picture_folder(tmp_path)
    assert names(picture_folder(tmp_path / "40_rex dog").pictures) == ["a.png"]


def test_masks_in_a_folder_of_their_own_named_like_the_pictures(tmp_path):
    """kohya_ss issue 2493, LoRA_Easy_Training_Scripts issue 331: a mask of the same name, of another format."""
    (tmp_path / "mask-img").mkdir()
    pictures = [draw(tmp_path / name) for name in ("a.png", "b.jpg")]
    for name in ("b.webp", "a.bmp", "c.png"):
        draw(tmp_path / "mask-img" / name)
    assert names(mask_files(tmp_path / "mask-img", pictures)) == ["a.bmp", "b.webp"]


def test_a_picture_without_its_mask_is_named(tmp_path):
    """OneTrainer issues 10 and 322: masked training over pictures of which one has no mask."""
    (tmp_path / "masks").mkdir()
    pictures = [draw(tmp_path / name) for name in ("a.png", "b.jpg")]
    draw(tmp_path / "masks" / "a.png")
    with pytest.raises(ConceptSplitError, match=r"There is no mask for 'b.jpg' in '.*masks': name it like the picture"):
        mask_files(tmp_path / "masks", pictures)
