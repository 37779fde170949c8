"""Which files of a folder are pictures of the concept, which are masks, and what is said about the others."""

import io
import sys
import types
import unicodedata

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.files import OURS, written_by_us
from conceptsplit_core.train import folder as module
from conceptsplit_core.train import heic
from conceptsplit_core.train.folder import mask_files, picture_folder


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
    (tmp_path / "linked.heic").symlink_to(tmp_path / "b.heic")
    (tmp_path / "linked").symlink_to(tmp_path / "more")
    found = picture_folder(tmp_path)
    assert found.count == "1 picture"
    assert found.left_out == (
        "2 captions, 4 HEIC files (save them as JPEG, or install pillow-heif), "
        "1 AVIF file (save them as PNG or JPEG), 1 GIF file (save them as PNG or JPEG), 1 dead link, 2 subfolders, "
        "1 other file"
    )
    (tmp_path / "linked.jpeg").symlink_to(tmp_path / "a.jpg")
    assert names(picture_folder(tmp_path).pictures) == ["a.jpg", "linked.jpeg"]
    assert picture_folder(tmp_path).count == "2 pictures"


@pytest.mark.parametrize("ending", ["png", "jpg", "jpeg", "jfif", "webp", "bmp", "tif", "tiff", "PNG", "JpG"])
def test_every_usual_ending_is_a_picture_and_may_be_a_mask(tmp_path, ending):
    photo, cover = tmp_path / f"a.{ending}", tmp_path / "masks" / f"a_Masks.{ending}"
    cover.parent.mkdir()
    for path in (photo, cover):
        Image.new("RGB", (8, 6)).save(path, "PNG")
    assert names(picture_folder(tmp_path).pictures) == [photo.name]
    assert mask_files(tmp_path / "masks", [photo]) == [cover]


@pytest.mark.parametrize(
    "name",
    [
        "{}_masklabel",
        "{}-mask",
        "{} masks",
        "{}.matte",
        "{}-segmentation",
        "{}_SEG",
        "{}-._mask",
        "mask-{}",
        "Masks_{}",
    ],
)
def test_every_usual_name_of_a_mask_is_known(tmp_path, name):
    photo, cover = draw(tmp_path / "my.red-dog.png"), draw(tmp_path / (name.format("my.red-dog") + ".png"))
    found = picture_folder(tmp_path)
    assert found.pictures == (photo,) and found.masks == {photo: cover}
    assert mask_files(tmp_path, [photo]) == [cover]


def test_pictures_of_one_name_share_their_mask_and_a_folder_of_the_user_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in ("a.png", "a.jpg", "a-mask.png", "b.png"):
        draw(tmp_path / name)
    found = picture_folder("~")
    assert names(found.pictures) == ["a.jpg", "a.png", "b.png"]
    assert {of.name: cover.name for of, cover in found.masks.items()} == {"a.jpg": "a-mask.png", "a.png": "a-mask.png"}
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "x.txt").touch()
    with pytest.raises(ConceptSplitError, match=r"none' holds no mask: put PNG"):
        mask_files(tmp_path / "none", [])
    with pytest.raises(ConceptSplitError, match=r"no folder '.*nowhere': give the folder with the masks"):
        mask_files(tmp_path / "nowhere", [])
    with pytest.raises(ConceptSplitError, match=r"WebP, BMP or TIFF files there\.$"):
        (tmp_path / "empty").mkdir()
        picture_folder(tmp_path / "empty")


# --- HEIC -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pillow(monkeypatch):
    """Pillow's tables as before anybody registered HEIC, which are put back."""
    Image.init()
    monkeypatch.setattr(Image, "OPEN", {name: one for name, one in Image.OPEN.items() if name != heic.FORMAT})
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != heic.FORMAT])
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))


@pytest.mark.parametrize("brand", ["heic", "heix", "heim", "heis", "hevc", "hevx"])
def test_a_photograph_of_a_phone_is_named_where_nothing_opens_it(tmp_path, monkeypatch, pillow, brand):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "IMG 1.HEIC"
    path.write_bytes(b"\0\0\0\x18ftyp" + brand.encode() + b"\0" * 40)
    with pytest.raises(UnidentifiedImageError) as plain:
        Image.open(path)
    assert not isinstance(plain.value, ConceptSplitError)
    for _ in range(2):
        heic.register_or_explain()
    assert Image.ID.count(heic.FORMAT) == 1
    for given in (path, str(path), io.BytesIO(path.read_bytes())):
        named = "The picture" if isinstance(given, io.BytesIO) else "IMG 1.HEIC"
        with pytest.raises(
            heic.HeicError, match=rf"^{named} is a HEIC photograph, and this Python has nothing that opens it"
        ):
            Image.open(given)
    for other in (b"\0\0\0\x18ftypavif" + b"\0" * 40, b"\0\0\0\x18free" + brand.encode() + b"\0" * 40):
        path.write_bytes(other)
        with pytest.raises(UnidentifiedImageError) as plain:
            Image.open(path)
        assert not isinstance(plain.value, ConceptSplitError)
    with pytest.raises(heic.HeicError, match="^a b.heic is a HEIC"):
        heic._explain(io.BytesIO(), b"/photos/a b.heic")


@pytest.mark.parametrize("ending", [".heic", ".heif"])
def test_with_pillow_heif_photographs_of_phones_are_pictures(tmp_path, monkeypatch, pillow, ending):
    calls = []
    plugin = types.SimpleNamespace(
        register_heif_opener=lambda: calls.append(1) or Image.EXTENSION.update({ending: "PNG"})
    )
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    draw(tmp_path / "b.png").rename(tmp_path / f"b{ending}")
    assert names(picture_folder(tmp_path).pictures) == [f"b{ending}"] and calls
    heic.register_or_explain()
    assert heic.FORMAT not in Image.OPEN, "the plugin's own reader is left in its place"


def test_formats_without_a_plugin_are_no_pictures(tmp_path, pillow):
    draw(tmp_path / "a.png")
    draw(tmp_path / "c.png").rename(tmp_path / "c.jxl")
    Image.EXTENSION.pop(".jxl", None)
    assert picture_folder(tmp_path).left_out == "1 JXL file (save them as PNG or JPEG)"
    Image.EXTENSION[".jxl"] = "PNG"
    assert names(picture_folder(tmp_path).pictures) == ["a.png", "c.jxl"]


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


@pytest.mark.parametrize(
    ("picture", "mask"),
    [
        ("IMG_0.PNG", "IMG_0.PNG_mask.png"),
        ("IMG_0.PNG", "img_0_mask.png"),
        ("IMG_1.jpg", "IMG_1.jpg.mask.png"),
        ("IMG_1.jpg", "img_1.JPEG-mask.webp"),
        ("IMG_1.jpg", "IMG_1mask.png"),
        ("IMG_1.jpg", "IMG_1_mask (1).png"),
        ("IMG_1.jpg", "IMG_1_Masks(12).png"),
        ("IMG_1 (1).jpg", "IMG_1_mask (1).png"),
        ("STRASSE.jpg", "straße_mask.png"),
        ("IMG_1.jpg", "IMG_1-masklabel.png"),
    ],
)
def test_masks_under_the_names_that_programs_give_are_no_pictures(tmp_path, picture, mask):
    photo, cover = draw(tmp_path / "a.png").rename(tmp_path / picture), draw(tmp_path / mask)
    other = draw(tmp_path / "other_mask (1).png")
    found = picture_folder(tmp_path)
    assert found.pictures == (photo, other) and found.masks == {photo: cover}
    assert mask_files(tmp_path, [photo]) == [cover]


def test_a_mask_belongs_to_the_picture_of_its_very_name(tmp_path):
    photos = [draw(tmp_path / name) for name in ("IMG_1 (1).png", "IMG_1.jpg", "IMG_1.png", "Img_1.png")]
    covers = [draw(tmp_path / f"{path.name}_mask.png") for path in photos]
    found = picture_folder(tmp_path)
    assert found.masks == dict(zip(photos, covers, strict=True)) and mask_files(tmp_path, photos) == covers
    masks = tmp_path / "masks"
    masks.mkdir()
    for cover in [draw(masks / "A.png"), draw(masks / "a.png")]:
        assert mask_files(masks, [tmp_path / cover.name]) == [cover]


def test_onetrainers_conditioning_pictures_are_neither_pictures_nor_masks(tmp_path):
    photo, cover = draw(tmp_path / "IMG_1.png"), draw(tmp_path / "IMG_1-masklabel.png")
    draw(tmp_path / "IMG_1-condlabel.png")
    found = picture_folder(tmp_path)
    assert found.pictures == (photo,) and found.masks == {photo: cover} and mask_files(tmp_path, [photo]) == [cover]
    assert found.left_out == "1 conditioning picture, 1 mask (used with --masks)"
