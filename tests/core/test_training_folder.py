"""Which files of a folder are pictures of the concept, which are masks, and what is said about the others."""

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


def test_case_10_formats_with_a_plugin_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_opens", lambda ending: ending == ".heic")
    (tmp_path / "b.heic").write_bytes(b"x")
    assert names(picture_folder(tmp_path).pictures) == ["b.heic"]


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
