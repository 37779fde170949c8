"""Pictures and masks of every mode and depth, against what they show."""

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.train import reading
from conceptsplit_core.train.reading import open_mask, open_picture, read_masks, read_pictures

MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ramp(height=12, width=20):
    """A lopsided grey picture: dark to light from left to right, with one dark row."""
    values = np.tile(np.linspace(0, 255, width), (height, 1))
    values[2] = 10
    return values.round().astype(np.uint8)


def opened(path):
    return np.asarray(open_picture(path)).astype(int)


# --- pictures -----------------------------------------------------------------------------------------------------


@MANY
@given(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "F", "I", "I;16"]))
def test_every_mode_is_read_as_it_looks(tmp_path, mode):
    grey = ramp()
    picture = Image.fromarray(grey)
    wanted = grey
    if mode == "1":
        picture = Image.fromarray(grey > 127)
        wanted = (grey > 127) * 255
    elif mode in ("F", "I", "I;16"):
        deep = {
            "F": grey.astype(np.float32) / 255,
            "I": grey.astype(np.int32) * 257,
            "I;16": grey.astype(np.uint16) * 257,
        }
        picture = Image.fromarray(deep[mode])
    elif mode == "LAB":
        from PIL import ImageCms

        rgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        picture = ImageCms.applyTransform(picture.convert("RGB"), ImageCms.buildTransform(rgb, lab, "RGB", "LAB"))
    else:
        picture = picture.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr") else picture.convert(mode)
    ending = "tif" if mode in ("CMYK", "YCbCr", "LAB", "F", "I") else "png"
    path = tmp_path / f"x.{ending}"
    picture.save(path)
    found = opened(path)
    assert found.shape == (*grey.shape, 3)
    assert np.abs(found - np.asarray(wanted, int)[..., None]).max() <= 4


def test_case_12_a_float_picture_with_highlights_is_clipped_at_one(tmp_path):
    values = np.tile(np.linspace(0.0, 1.7, 18, dtype=np.float32), (8, 1))
    Image.fromarray(values).save(tmp_path / "x.tiff")
    wanted = (values.clip(0, 1) * 255).round().astype(int)
    assert np.abs(opened(tmp_path / "x.tiff")[..., 0] - wanted).max() <= 1


@MANY
@given(
    st.floats(1.0, 5000.0),
    st.integers(1, 40),
    st.sampled_from([np.float32, np.uint8, np.uint16]),
    st.integers(0, 2**32 - 1),
)
def test_case_12_depth_is_told_from_what_is_typical(tmp_path, highlight, highlights, kind, seed):
    """Float pictures in 0…1 with any highlights; 8-bit and 16-bit values stored as floats: on black, too."""
    generator = np.random.default_rng(seed)
    shares = generator.uniform(0.05, 1.0, (12, 20)).astype(np.float32)
    shares[:, :6] = 0.0
    wanted = (shares * 255).round()
    top = {np.float32: 1.0, np.uint8: 255.0, np.uint16: 65535.0}[kind]
    shares[-1, -1] = 1.0  # what makes 8 and 16 bit known is their white
    wanted[-1, -1] = 255
    values = shares * top
    if kind is np.float32:
        places = generator.choice(np.arange(168), highlights, replace=False)
        rows, columns = places // 14, 6 + places % 14
        values[rows, columns] = highlight
        wanted[rows, columns] = 255
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "x.tiff")
    assert np.abs(opened(tmp_path / "x.tiff")[..., 0] - wanted).max() <= 1


# --- masks --------------------------------------------------------------------------------------------------------


def shape_of(seed, height=12, width=20):
    """A mask with a rectangle that is nowhere symmetric, never empty and never everything."""
    generator = np.random.default_rng(seed)
    top, left = generator.integers(0, height - 3), generator.integers(0, width - 4)
    mask = np.zeros((height, width), bool)
    mask[top : top + generator.integers(1, 4), left : left + generator.integers(1, 5)] = True
    return mask


def as_labels(mask, seed):
    return Image.fromarray(mask.astype(np.uint8))


def as_white(mask, seed):
    return Image.fromarray(mask.astype(np.uint8) * 255)


def as_bits(mask, seed):
    return Image.fromarray(mask)


def as_deep_labels(mask, seed):
    return Image.fromarray(mask.astype(np.uint16))


def as_deep_white(mask, seed):
    return Image.fromarray(mask.astype(np.uint16) * 65535)


def as_floats(mask, seed):
    return Image.fromarray(mask.astype(np.float32))


def as_any_label(mask, seed):
    """One label of any number, as annotation tools write them."""
    return Image.fromarray(mask.astype(np.uint8) * np.uint8(1 + seed % 127))


def as_palette(mask, seed):
    """Label 1 of a palette in colours; index 0 may be of any colour but is the background."""
    picture = Image.fromarray(mask.astype(np.uint8), "P")
    colours = np.random.default_rng(seed).integers(1, 256, (256, 3))
    colours[:2, 0], colours[:2, 1] = (200, 40), (30, 160)  # no greys
    picture.putpalette(colours.astype(np.uint8).tobytes())
    return picture


def as_voc(mask, seed):
    """A data set's label: black background, dark red thing, and a pale border of index 255 that is neither."""
    index = mask.astype(np.uint8)
    index[0, :] = np.where(mask[0], 1, 255)
    picture = Image.fromarray(index, "P")
    palette = np.zeros((256, 3), np.uint8)
    palette[1], palette[255] = (128, 0, 0), (224, 224, 192)
    picture.putpalette(palette.tobytes())
    return picture


def as_grey_palette(mask, seed):
    return as_white(mask, seed).convert("P")


def as_red_on_black(mask, seed):
    return Image.fromarray(mask[..., None] * np.array([255, 0, 0], np.uint8))


def as_cutout(mask, seed):
    """A photograph with the thing's surroundings removed."""
    colours = np.random.default_rng(seed).integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
    return Image.fromarray(np.dstack([colours, mask.astype(np.uint8) * 255]), "RGBA")


def as_grey_cutout(mask, seed):
    return as_cutout(mask, seed).convert("LA")


def as_opaque(mask, seed):
    return as_white(mask, seed).convert("RGBA")


@MANY
@given(
    st.sampled_from(
        [as_labels, as_white, as_bits, as_deep_labels, as_deep_white, as_floats, as_any_label, as_palette, as_voc,
         as_grey_palette, as_red_on_black, as_cutout, as_grey_cutout, as_opaque]
    ),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_case_7_every_kind_of_mask_is_one_on_the_thing(tmp_path, kind, seed):
    mask = shape_of(seed)
    path = tmp_path / ("x.tiff" if kind is as_floats else "x.png")
    kind(mask, seed).save(path)
    found = np.asarray(open_mask(path))
    assert found.dtype == np.uint8 and np.array_equal(found, mask * np.uint8(255))


def test_soft_masks_keep_their_values(tmp_path):
    soft = ramp()
    Image.fromarray(soft).save(tmp_path / "x.png")
    assert np.array_equal(np.asarray(open_mask(tmp_path / "x.png")), soft)
    alpha = np.dstack([np.full((*soft.shape, 3), 77, np.uint8), soft])
    Image.fromarray(alpha, "RGBA").save(tmp_path / "y.png")
    assert np.array_equal(np.asarray(open_mask(tmp_path / "y.png")), soft)


def test_case_8_a_mask_without_a_strong_value_is_asked_about(tmp_path):
    faint = (ramp() * 0.3).astype(np.uint8)
    Image.fromarray(faint).save(tmp_path / "faint.png")
    with pytest.raises(ConceptSplitError, match=r"The mask 'faint\.png' is at most 0\.298 where the concept should be"):
        open_mask(tmp_path / "faint.png")
    labels = np.zeros((12, 20), np.uint8)
    labels[2:5, 3:9], labels[6:9, 10:12] = 1, 2
    Image.fromarray(labels).save(tmp_path / "labels.png")
    with pytest.raises(ConceptSplitError, match=r"'labels\.png' is at most 0\.00784"):
        open_mask(tmp_path / "labels.png")


def test_case_7_several_labels_of_a_palette_are_refused(tmp_path):
    labels = np.zeros((12, 20), np.uint8)
    labels[2:5, 3:9], labels[6:9, 10:12] = 1, 2
    picture = Image.fromarray(labels, "P")
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 759)
    picture.save(tmp_path / "x.png")
    with pytest.raises(ConceptSplitError, match=r"'x\.png' holds 2 labels: give a mask of the one thing"):
        open_mask(tmp_path / "x.png")


def test_masks_are_cropped_as_their_pictures_and_must_have_their_shape(tmp_path):
    photo = np.zeros((40, 60, 3), np.uint8)
    photo[:20, 30:] = 255
    Image.fromarray(photo).save(tmp_path / "a.png")
    Image.fromarray(photo[..., 0]).resize((30, 20)).save(tmp_path / "m.png")
    found = read_masks([tmp_path / "m.png"], [tmp_path / "a.png"], (40, 40))
    assert found.shape == (1, 1, 40, 40) and found.dtype == np.float32
    assert found[0, 0, :18, 23:].min() > 0.9 and found[0, 0, 22:].max() < 0.1 and found[0, 0, :, :18].max() < 0.1
    Image.new("L", (30, 24), 255).save(tmp_path / "n.png")
    with pytest.raises(ConceptSplitError, match=r"mask 'n\.png' is 30 × 24, its picture 60 × 40: make it"):
        read_masks([tmp_path / "n.png"], [tmp_path / "a.png"], (40, 40))


@pytest.mark.parametrize(("mode", "shown"), [("RGBa", (128, 228, 255)), ("La", (228, 228, 228))])
def test_colours_that_are_multiplied_by_their_alpha_lie_on_white(tmp_path, monkeypatch, mode, shown):
    """No format stores them; decoders may give them."""
    half = Image.new("RGBA" if mode == "RGBa" else "LA", (4, 3), (1, 201, 255, 128) if mode == "RGBa" else (201, 128))
    monkeypatch.setattr(reading, "_open", lambda path: half.convert(mode))
    assert np.abs(opened(tmp_path)[1, 2] - shown).max() <= 2


def test_a_file_that_is_no_picture_says_why_without_two_full_stops(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"text")
    with pytest.raises(
        ConceptSplitError, match=r"'x.png' cannot be read as a picture \(it is not a picture\): replace"
    ):
        open_picture(path)
    whole = tmp_path / "y.png"
    Image.fromarray(ramp()).save(whole)
    whole.write_bytes(whole.read_bytes()[:60])
    with pytest.raises(
        ConceptSplitError, match=r"'y.png' cannot be read as a picture \(.*[^.]\): replace or remove it\.$"
    ):
        open_picture(whole)


def test_sixteen_bits_and_labels_of_a_deep_mask(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.array([[0, 1], [1, 0]], np.uint16)).save(path)
    assert np.asarray(open_mask(path)).tolist() == [[0, 255], [255, 0]]
    Image.fromarray(np.array([[0, 65535], [32768, 256]], np.uint16)).save(path)
    assert np.asarray(open_mask(path)).tolist() == [[0, 255], [128, 1]]
    assert opened(path)[..., 0].tolist() == [[0, 255], [128, 1]]
    Image.fromarray(np.array([[0, 200], [128, 2]], np.int32)).save(tmp_path / "x.tif")
    assert opened(tmp_path / "x.tif")[..., 1].tolist() == [[0, 200], [128, 2]]


@pytest.mark.parametrize(
    ("colours", "ground"),
    [([(200, 0, 0), (0, 0, 0)], 1), ([(200, 0, 0), (0, 90, 0)], 0), ([(0, 0, 0), (0, 90, 0)], 0)],
    ids=["black is index 1", "nothing is black", "black is index 0"],
)
def test_the_ground_of_a_palette_is_black_or_its_first_colour(tmp_path, colours, ground):
    picture = Image.fromarray(np.array([[0, 1, 1], [0, 0, 1]], np.uint8), "P")
    picture.putpalette([value for colour in colours for value in colour])
    picture.save(tmp_path / "x.png")
    wanted = np.array([[0, 1, 1], [0, 0, 1]]) != ground
    assert np.array_equal(np.asarray(open_mask(tmp_path / "x.png")), wanted * 255)


def test_a_palette_of_greys_is_brightness(tmp_path):
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    picture.putpalette([0, 0, 0, 128, 128, 128, 255, 255, 255])
    picture.save(tmp_path / "x.png")
    assert np.asarray(open_mask(tmp_path / "x.png")).tolist() == [[0, 128, 255]]


def tiff(values, photometric):
    """Grey numbers without a sign as a TIFF of one strip; photometric 0 counts from white on."""
    height, width = values.shape
    strip = 8 + 2 + 9 * 12 + 4  # behind the head, the tags' number, nine tags, and the place of no further table
    tags = [(256, width), (257, height), (258, 8 * values.itemsize), (259, 1), (262, photometric), (273, strip),
            (277, 1), (278, height), (279, values.nbytes)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + entries + struct.pack("<I", 0) + values.astype(values.dtype.newbyteorder("<")).tobytes()


@pytest.mark.parametrize(("dtype", "from_white"), [(np.uint16, False), (np.uint16, True), (np.uint32, False)])
def test_deep_tiffs_count_from_black_or_from_white(tmp_path, dtype, from_white):
    most = np.iinfo(dtype).max
    shares = np.array([[0, 64, 128], [191, 230, 255]]) / 255.0
    values = (shares * most).round().astype(dtype)
    path = tmp_path / "deep.tif"
    path.write_bytes(tiff(most - values if from_white else values, 0 if from_white else 1))
    assert np.asarray(open_picture(path))[..., 1].tolist() == [[0, 64, 128], [191, 230, 255]]
    assert np.asarray(open_mask(path)).tolist() == [[0, 64, 128], [191, 230, 255]]


@pytest.mark.parametrize(
    ("values", "wanted"), [((255, 128), (255, 128)), ((256, 25600), (1, 100)), ((65535, 51529), (255, 201))]
)
def test_whole_numbers_are_8_or_16_bits_deep(tmp_path, values, wanted):
    Image.fromarray(np.tile(np.array(values, np.int32), (8, 4))).save(tmp_path / "x.tif")
    assert opened(tmp_path / "x.tif")[0, :2, 1].tolist() == list(wanted)


@pytest.mark.parametrize("mode", ["P", "1", "RGB", "RGBA"])
def test_a_colour_profile_holds_for_every_mode(tmp_path, mode):
    """sRGB's own profile changes no colour."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = Image.fromarray(ramp()).convert("RGB").convert(mode)
    picture.save(tmp_path / "x.png", icc_profile=profile)
    assert np.abs(opened(tmp_path / "x.png") - np.asarray(picture.convert("RGB"), int)).max() <= 1


def red_and_blue_exchanged():
    """sRGB's profile with the primaries of red and blue under each other's names."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "RGBX"])
def test_a_profile_says_which_colours_are_meant(tmp_path, mode):
    colours = np.array([[[250, 10, 60], [0, 120, 200], [5, 90, 10]]], np.uint8)
    picture = Image.fromarray(colours)
    picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
    path = tmp_path / ("x.tif" if mode == "RGBX" else "x.png")
    picture.save(path, icc_profile=red_and_blue_exchanged())
    assert np.abs(opened(path) - np.asarray(picture.convert("RGB"), int)[..., ::-1]).max() <= 2


def test_a_profile_that_is_damaged_or_of_another_kind_is_left_out(tmp_path):
    from PIL import ImageCms

    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (b"nothing", lab):
        Image.fromarray(ramp()).convert("RGB").save(tmp_path / "x.png", icc_profile=profile)
        assert np.array_equal(opened(tmp_path / "x.png"), np.repeat(ramp()[..., None], 3, axis=2))


def test_a_picture_stands_upright_and_one_that_is_too_large_is_refused(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    grey = ramp()
    for name, read in (("x.png", opened), ("m.png", lambda path: np.asarray(open_mask(path)))):
        Image.fromarray(grey).save(tmp_path / name, exif=exif)
        found = read(tmp_path / name)
        assert np.array_equal(found if found.ndim == 2 else found[..., 0], np.rot90(grey, -1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ConceptSplitError, match=r"^'x\.png' is too large a picture to open: scale it down first\.$"):
        open_picture(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (ValueError("odd\n  tile. size..."), "odd tile. size"),
        (KeyError(), "KeyError"),
        (OSError("..."), "OSError"),
        (RuntimeError("x" * 199 + "yz"), "x" * 199 + "y"),
    ],
)
def test_whatever_a_decoder_raises_is_quoted_in_one_line(tmp_path, monkeypatch, problem, said):
    def fail(picture):
        raise problem

    Image.fromarray(ramp()).save(tmp_path / "x.png")
    monkeypatch.setattr(reading.ImageOps, "exif_transpose", fail)
    with pytest.raises(ConceptSplitError) as told:
        open_picture(tmp_path / "x.png")
    assert str(told.value) == f"'x.png' cannot be read as a picture ({said}): replace or remove it."


def test_transparent_parts_lie_on_white_in_pictures_and_on_black_in_masks(tmp_path):
    colours = np.array([[[200, 40, 90, 255], [200, 40, 90, 0], [200, 40, 90, 51]]], np.uint8)
    Image.fromarray(colours).save(tmp_path / "x.png")
    shown = np.array([[200, 40, 90], [255, 255, 255], [244, 212, 222]])
    assert np.abs(opened(tmp_path / "x.png")[0] - shown).max() <= 1
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "p.png", transparency=0)
    assert opened(tmp_path / "p.png")[0].tolist() == [[255, 255, 255], [0, 0, 0], [0, 0, 255]]
    # A cut-out whose alpha is the same everywhere says nothing by it: what it holds counts, as far as it is there.
    half = np.dstack([np.full((2, 3, 3), [[[255] * 3, [0] * 3, [255] * 3]]), np.full((2, 3), 204)]).astype(np.uint8)
    Image.fromarray(half).save(tmp_path / "m.png")
    assert np.asarray(open_mask(tmp_path / "m.png")).tolist() == [[204, 0, 204]] * 2
    Image.new("RGBA", (3, 2), (255, 90, 10, 0)).save(tmp_path / "m.png")
    assert not np.asarray(open_mask(tmp_path / "m.png")).any(), "nothing of it is there"


def test_a_mask_of_floats_is_shares_and_values_from_half_white_on_are_strong(tmp_path):
    Image.fromarray(np.array([[0.0, 0.25, 1.0]], np.float32)).save(tmp_path / "x.tiff")
    assert np.asarray(open_mask(tmp_path / "x.tiff")).tolist() == [[0, 64, 255]]
    for level, wanted in ((127, 255), (128, 128), (1, 255)):
        Image.fromarray(np.array([[0, level, level]], np.uint8)).save(tmp_path / "x.png")
        assert np.asarray(open_mask(tmp_path / "x.png")).tolist() == [[0, wanted, wanted]]
    Image.new("L", (3, 2)).save(tmp_path / "x.png")
    assert not np.asarray(open_mask(tmp_path / "x.png")).any(), "an empty one is reported later"
    Image.fromarray(np.array([[0.0, np.nan]], np.float32)).save(tmp_path / "n.tiff")
    with pytest.raises(ConceptSplitError, match=r"^'n\.tiff' holds values that are not finite"):
        open_mask(tmp_path / "n.tiff")


def test_of_a_palette_of_many_the_border_is_no_label(tmp_path):
    """Index 255 is void beside one thing; alone it is the thing."""
    for index, wanted in (([0, 7, 255], [0, 255, 0]), ([0, 255, 255], [0, 255, 255]), ([9, 9, 7], [0, 0, 255])):
        picture = Image.fromarray(np.array([index], np.uint8), "P")
        table = np.full((256, 3), 1, np.uint8)
        table[[0, 9]], table[7], table[255] = 0, (9, 200, 9), (200, 100, 0)
        picture.putpalette(table.tobytes())
        picture.save(tmp_path / "x.png")
        assert np.asarray(open_mask(tmp_path / "x.png")).tolist() == [wanted]


def test_pictures_of_a_list_are_cropped_to_one_size(tmp_path):
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, :10], wide[:, 30:] = (255, 0, 0), (0, 0, 255)  # beside the middle
    wide[:10, 10:30, 1] = 200
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(wide[:, 10:30]).save(tmp_path / "b.png")
    found = read_pictures([tmp_path / "a.png", tmp_path / "b.png"], (20, 20))
    assert found.shape == (2, 20, 20, 3) and found.dtype == np.uint8
    assert np.array_equal(found[1], wide[:, 10:30]) and np.array_equal(found[0], found[1])
    assert read_pictures([tmp_path / "a.png"], (10, 24)).shape == (1, 10, 24, 3)


def test_a_mask_that_only_the_crop_empties_is_told_as_such(tmp_path):
    """A thing at the left edge of a wide picture, and training at a square."""
    draw = np.zeros((30, 110), np.uint8)
    draw[4:20, 3:25] = 255
    Image.fromarray(draw).save(tmp_path / "a_mask.png")
    Image.new("RGB", (110, 30)).save(tmp_path / "a.jpg")
    files = ([tmp_path / "a_mask.png"], [tmp_path / "a.jpg"])
    with pytest.raises(
        ConceptSplitError, match=r"^The mask 'a_mask\.png' marks nothing in what is left .* 16 x 24 pix"
    ):
        read_masks(*files, (24, 16))
    assert read_masks(*files, (16, 56)).max() > 0.9
    Image.fromarray(draw * 0).save(tmp_path / "a_mask.png")
    assert read_masks(*files, (24, 16)).max() == 0, "an empty one is told where all are looked at"
