"""Pictures and masks of every mode and depth, against what they show."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.train import reading
from conceptsplit_core.train.reading import open_mask, open_picture, read_masks

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
