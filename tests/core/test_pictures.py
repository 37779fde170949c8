import numpy as np
import pytest
import torch

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.method.loda import LodaTrace
from conceptsplit_core.pictures import (
    COLOURS,
    as_picture,
    concept_overlays,
    contact_sheet,
    loss_curve,
    overlay,
    separation_curve,
    trace_curve,
    trace_sheets,
)


def test_loss_curve_shows_falling_losses_lower_at_the_end():
    picture = loss_curve(list(np.linspace(1.0, 0.1, 200)))
    blue = (picture == np.array(COLOURS[1], dtype=np.uint8)).all(-1)
    left, right = blue[:, 70:120].nonzero()[0].mean(), blue[:, -60:-20].nonzero()[0].mean()
    assert left < right, "rows count downwards"


def test_the_running_mean_begins_with_the_steps_there_are():
    """The first loss of 500 is 0.1, all others 0.9: after 25 steps their mean is 0.868, near the top."""
    picture = loss_curve([0.1] + [0.9] * 499).astype(int)
    blue = (picture[..., 2] - picture[..., 0] > 60) & (picture[..., 1] > 80)
    column = 62 + round((640 - 16 - 62) * 24 / 499)
    rows = blue[:, column].nonzero()[0]
    height = (326 - rows.mean()) / (326 - 34)
    assert abs(height - (0.868 - 0.1) / 0.8) < 0.03


@pytest.mark.parametrize("losses", [[], [1.0], [0.5, 0.5], [float("nan"), 1.0, float("inf")], [0.0] * 5])
def test_loss_curve_of_odd_inputs(losses):
    assert loss_curve(losses).shape == (360, 640, 3)


def test_overlay_is_warm_where_the_map_is_high():
    image = np.full((32, 32, 3), 128, np.uint8)
    values = np.zeros((8, 8))
    values[:4, :4] = 1
    out = overlay(image, values, colour=COLOURS[0], side=64).astype(int)
    inside, outside = out[8:24, 8:24].mean((0, 1)), out[48:, 48:].mean((0, 1))
    assert inside[0] - inside[2] > 50
    assert abs(outside[0] - outside[2]) < 5


def test_region_is_outlined():
    image, region = np.zeros((32, 32, 3), np.uint8), np.zeros((8, 8), bool)
    region[2:4, 2:4] = True
    with_region, without = (overlay(image, np.ones((8, 8)), region=r, side=64) for r in (region, None))
    assert (with_region != without).any()
    assert (with_region == without)[40:].all()


def test_contact_sheet_places_every_image():
    tiles = [np.full((16, 16, 3), c, np.uint8) for c in (10, 90, 170)]
    sheet = contact_sheet(tiles, ["a", "b", "c"], columns=2, side=32)
    for c in (10, 90, 170):
        assert (sheet == c).all(-1).sum() >= 32 * 32
    with pytest.raises(ConceptSplitError):
        contact_sheet([])
    with pytest.raises(ConceptSplitError):
        contact_sheet(tiles, ["a"])


def test_pictures_of_any_mode():
    for shape in ((4, 5), (4, 5, 1), (4, 5, 3), (4, 5, 4)):
        assert as_picture(np.zeros(shape)).shape == (4, 5, 3)
    assert as_picture(np.full((2, 2), np.nan)).max() == 0
    with pytest.raises(ConceptSplitError):
        as_picture(np.zeros((0, 4, 3)))


def test_one_overlay_per_concept_and_names_must_match():
    maps = np.random.default_rng(0).random((2, 4, 4))
    assert len(concept_overlays(np.zeros((8, 8, 3), np.uint8), maps, ["a", "b"])) == 2
    with pytest.raises(ConceptSplitError, match="2 maps but 1 names"):
        concept_overlays(np.zeros((8, 8, 3), np.uint8), maps, ["a"])


def rows_of(picture, colour, columns):
    """Mean row of a line's colour in a slice of columns; rows count downwards."""
    return float((picture == np.array(colour, np.uint8)).all(-1)[44:330, columns].nonzero()[0].mean())


def test_separation_curve_falls_as_the_loss_does_and_each_image_has_its_line():
    picture = separation_curve([0, 0, 1], [("image 1", [0.4, 0.3, 0.02]), ("image 2", [0.1, float("nan"), 0.35])])
    first, last = slice(60, 100), slice(590, 626)
    assert rows_of(picture, COLOURS[0], first) + 50 < rows_of(picture, COLOURS[0], last)
    assert rows_of(picture, COLOURS[1], first) > rows_of(picture, COLOURS[1], last) + 50
    curve = LodaTrace(losses=[(0, torch.tensor([0.4, 0.1])), (0, torch.tensor([0.3, float("nan")])),
                              (1, torch.tensor([0.02, 0.35]))])  # fmt: skip
    assert np.array_equal(trace_curve(curve), picture)
    assert (separation_curve([], []) != picture).any()


def test_a_plan_without_loda_shows_its_maps_alone():
    """Each tile is warm where its own concept is: rex left, tom right."""
    maps = torch.full((1, 2, 6, 10), 1e-4)
    maps[0, 0, :, :3] = maps[0, 1, :, 7:] = 1.0
    trace = LodaTrace(concepts=("rex", "tom"), after=maps, regions=maps > 0.5)
    (sheet,) = trace_sheets(trace, np.full((1, 60, 100, 3), 0.5, np.float32))
    both = trace_sheets(LodaTrace(concepts=("rex", "tom"), before=maps, after=maps), np.full((1, 60, 100, 3), 0.5))[0]
    assert sheet.shape[0] < both.shape[0] and sheet.shape[1] == both.shape[1], "one row of tiles instead of two"


def warm(sheet):
    """Red beyond blue, for each quarter of a sheet of two by two tiles."""
    difference = sheet[..., 0].astype(int) - sheet[..., 2]
    h, w = difference.shape[0] // 2, difference.shape[1] // 2
    return [[difference[i * h : (i + 1) * h, j * w : (j + 1) * w] for j in (0, 1)] for i in (0, 1)]


def test_before_and_after_are_each_in_their_own_tile():
    """Two pictures; of the second rex is above before LODA and below after it."""
    before, after = torch.full((2, 2, 6, 6), 1e-4), torch.full((2, 2, 6, 6), 1e-4)
    before[1, 0, :2], after[1, 0, 4:] = 1.0, 1.0
    trace = LodaTrace(concepts=("rex", "tom"), before=before, after=after)
    tiles = warm(trace_sheets(trace, np.full((2, 60, 60, 3), 0.5), side=96)[1])
    for row, above in ((0, True), (1, False)):
        tile = tiles[row][0][12:-12, 12:-12]
        top, bottom = tile[: len(tile) // 3].mean(), tile[-len(tile) // 3 :].mean()
        assert bool(top > bottom + 20) is above and abs(top - bottom) > 20
    with pytest.raises(ConceptSplitError, match="1 pictures but attention maps of 2: decode the latent of the same"):
        trace_sheets(trace, np.full((1, 60, 60, 3), 0.5))
    with pytest.raises(ConceptSplitError, match="no attention maps to show: the run read none"):
        trace_sheets(LodaTrace(), np.zeros((1, 6, 6, 3)))


def test_regions_that_the_user_has_drawn_are_shown_where_no_map_was_read():
    """rex has the left third and tom the lowest sixth of both pictures, of which the run was told once."""
    drawn = torch.zeros(1, 2, 6, 6, dtype=torch.bool)
    drawn[0, 0, :, :2] = drawn[0, 1, 5:] = True
    sheets = trace_sheets(LodaTrace(concepts=("rex", "tom"), regions=drawn), np.full((2, 60, 60, 3), 0.5), side=96)
    assert len(sheets) == 2 and np.array_equal(*sheets)
    difference = sheets[1][..., 0].astype(int) - sheets[1][..., 2]
    rex, tom = difference[8:104, 8:104][30:], difference[8:104, 112:208]
    assert rex[:, 4:20].mean() > 50 and abs(rex[:, 50:-4].mean()) < 20
    assert tom[-10:-2].mean() < -50 and abs(tom[30:60].mean()) < 20


def test_maps_of_one_picture_are_shown_on_every_picture_made_of_it():
    maps = torch.full((1, 2, 6, 6), 1e-4)
    maps[0, 0, :, :2] = maps[0, 1, 4:] = 1.0
    trace = LodaTrace(concepts=("rex", "tom"), before=maps.flip(-1), after=maps, regions=maps > 0.5)
    images = np.stack([np.full((60, 60, 3), grey) for grey in (0.3, 0.6, 0.9)])
    sheets = trace_sheets(trace, images, side=96)
    for sheet, image in zip(sheets, images, strict=True):
        assert np.array_equal(sheet, trace_sheets(trace, image[None], side=96)[0])
    assert len(sheets) == 3 and not np.array_equal(sheets[0], sheets[1])
