"""Checks of pictures and masks that come as tensors, and one size for lists of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.train.images import (
    NATIVE_SIZES,
    TRANSFORMER_SIZE,
    check_images,
    check_masks,
    check_strength,
    fit,
    one_size,
    same_shape,
)


def picture(height, width, seed=0, count=1):
    levels = torch.randint(0, 256, (count, height, width, 3), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 255.0


def left_half(height, width):
    mask = torch.zeros(1, height, width)
    mask[:, :, : width // 2] = 1.0
    return mask


def test_case_1_pictures_of_one_size_are_one_batch_as_they_are():
    images = [picture(48, 64, 1), picture(48, 64, 2, count=2)]
    batch, masks, note = one_size(images, [], 512)
    assert torch.equal(batch, torch.cat(images)) and masks is None and note == ()
    assert one_size([images[0]], [], 512)[0] is images[0]


def test_case_1_pictures_of_several_sizes_are_cropped_to_the_models_own():
    images = [picture(48, 64, 1), picture(100, 40, 2)]
    batch, masks, note = one_size(images, [], 32)
    assert batch.shape == (2, 32, 32, 3) and masks is None
    for given, found in zip(images, batch, strict=True):
        array = (given[0].numpy() * 255).round().astype(np.uint8)
        wanted = np.asarray(fit(Image.fromarray(array), (32, 32)))
        assert np.array_equal((found.numpy() * 255).round().astype(np.uint8), wanted)
    assert note == (
        "The 2 training images have 2 sizes: all are scaled and cropped around their centre to 32 x 32 pixels.",
    )


def test_case_1_masks_go_with_their_pictures():
    images = [picture(64, 64, 1), picture(32, 96, 2)]
    _, masks, _ = one_size(images, [left_half(64, 64), left_half(32, 96)], 32)
    assert masks.shape == (2, 32, 32)
    for mask in masks:
        assert float(mask[:, :14].min()) > 0.9 and float(mask[:, 18:].max()) < 0.1
    # A square picture's mask cannot be a wide picture's.
    with pytest.raises(ConceptSplitError, match=r"Mask 1 is 64 x 64 pixels, its image 96 x 32: give it the shape"):
        one_size(images, [left_half(64, 64)], 32)
    with pytest.raises(ConceptSplitError, match="There are 3 masks for 2 images"):
        one_size(images, [left_half(64, 64)] * 3, 32)


def test_case_1_masks_of_several_sizes_for_pictures_of_one():
    images = [picture(64, 80, 1), picture(64, 80, 2)]
    batch, masks, note = one_size(images, [left_half(64, 80), left_half(32, 40)], 512)
    assert batch.shape == (2, 64, 80, 3) and masks.shape == (2, 64, 80) and note == ()
    assert torch.equal(masks[0], left_half(64, 80)[0])


def test_a_list_with_something_else_in_it_is_refused():
    with pytest.raises(ConceptSplitError, match="no training image"):
        one_size([picture(48, 64), None], [], 32)
    with pytest.raises(ConceptSplitError, match=r"Training image 3 holds values from 0 to 2"):
        one_size([picture(48, 64, count=2), picture(64, 48).clamp(max=0.0) + torch.tensor([0.0, 1.0, 2.0])], [], 32)


@pytest.mark.parametrize("high", [1 / 255, 0.3, 0.49])
def test_case_8_a_mask_without_a_strong_value_is_asked_about(high):
    with pytest.raises(ConceptSplitError, match=r"Mask 2 is at most .* where the concept should be 1: a map of labels"):
        check_masks(torch.stack([left_half(16, 24)[0], left_half(16, 24)[0] * high]), 2, (2, 3), (16, 24))


def test_masks_come_out_at_the_latents_size():
    found = check_masks(left_half(16, 24), 3, (2, 3), (16, 24))
    assert found.shape == (3, 1, 2, 3)
    assert torch.equal(found[2, 0], torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.5, 0.0]]))
    assert check_masks(torch.zeros(1, 5, 5), 1, (2, 3), (16, 24)).sum() == 0, "reported as empty later"


@pytest.mark.parametrize(
    ("mask", "of", "same"),
    [((512, 768), (512, 768), True), ((256, 384), (512, 768), True), ((500, 768), (512, 768), False),
     ((505, 768), (512, 768), True), ((8, 13), (512, 768), True), ((8, 10), (512, 768), False)],
)  # fmt: skip
def test_a_masks_aspect_may_be_two_hundredths_off(mask, of, same):
    assert same_shape(mask, of) is same


def test_grey_and_alpha_become_colour():
    grey = torch.rand(2, 16, 24, 1)
    assert torch.equal(check_images(grey), grey.expand(-1, -1, -1, 3))
    both = torch.rand(2, 16, 24, 2)
    assert torch.equal(check_images(both), both[..., :1].expand(-1, -1, -1, 3))
    alpha = torch.rand(1, 16, 24, 4)
    assert torch.equal(check_images(alpha), alpha[..., :3])


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(16, 24, 3),
        torch.rand(1, 16, 24, 5),
        torch.zeros(1, 16, 24, 3, dtype=torch.uint8),
        torch.zeros(1, 16, 24, 3, dtype=torch.complex64),
    ],
    ids=["no batch", "five channels", "whole numbers", "complex"],
)
def test_what_is_no_batch_of_pictures_is_refused(images):
    kind = str(images.dtype).removeprefix("torch.")
    with pytest.raises(ConceptSplitError, match=rf"are \[.*\] values of type {kind}, not pictures \[count"):
        check_images(images)


@pytest.mark.parametrize("images", [None, "a.png", torch.rand(0, 16, 24, 3), torch.rand(1, 16, 0, 3)])
def test_no_picture_is_one_sentence(images):
    with pytest.raises(ConceptSplitError, match="There is no training image: connect"):
        check_images(images)


@pytest.mark.parametrize("size", [(15, 64), (64, 15), (16, 2049), (2049, 16)])
def test_sizes_that_cannot_train_are_refused(size):
    with pytest.raises(
        ConceptSplitError, match=rf"are {size[1]} x {size[0]} pixels: resize them to between 16 and 2048"
    ):
        check_images(torch.zeros(1, *size, 3))
    assert check_images(torch.zeros(1, 16, 2048, 3)).shape == (1, 16, 2048, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_names_its_picture_or_mask(bad):
    images, masks = picture(16, 24, count=3), left_half(16, 24).repeat(3, 1, 1)
    images[1, 3, 4, 0] = masks[1, 3, 4] = bad
    with pytest.raises(ConceptSplitError, match="Training image 6 holds values that are not finite"):
        check_images(images, 5)
    with pytest.raises(ConceptSplitError, match="Mask 2 holds values that are not finite"):
        check_masks(masks, 3, (2, 3), (16, 24))


def test_a_little_beyond_the_range_is_clipped_and_more_is_refused():
    overshot = torch.full((1, 16, 24, 3), 0.5)
    overshot[0, 0, 0, 0], overshot[0, 0, 1, 1] = -0.5, 1.5
    found = check_images(overshot)
    assert (float(found.min()), float(found.max())) == (0.0, 1.0)
    for far in (-0.51, 1.51):
        with pytest.raises(ConceptSplitError, match="where 0 to 1 is needed"):
            check_images(torch.cat([overshot, torch.full_like(overshot, far)]))
    high = check_masks(left_half(16, 24) * 1.4, 1, (2, 3), (16, 24))
    assert high.flatten().tolist() == [1, 0.5, 0, 1, 0.5, 0]


@pytest.mark.parametrize("shape", [(16, 24), (1, 16, 24), (1, 1, 16, 24), (1, 16, 24, 1)])
def test_masks_with_and_without_a_batch_and_channels(shape):
    found = check_masks(left_half(16, 24).view(shape), 2, (2, 3), (16, 24))
    assert found.shape == (2, 1, 2, 3) and found[1, 0, 1].tolist() == [1, 0.5, 0]


@pytest.mark.parametrize("shape", [(16,), (2, 3, 16, 24), (0, 16, 24), (1, 1, 1, 16, 24)])
def test_what_is_no_mask_is_refused(shape):
    with pytest.raises(ConceptSplitError, match=r"The mask has shape \[.*\], which is not \[count, height, width\]"):
        check_masks(torch.zeros(shape), 1, (2, 3))
    with pytest.raises(ConceptSplitError, match="not .count, height, width"):
        check_masks(torch.zeros(1, 16, 24, dtype=torch.complex64), 1, (2, 3))


def test_masks_must_have_their_pictures_shape_and_number():
    assert check_masks(None, 2, (2, 3)) is None
    with pytest.raises(ConceptSplitError, match="The mask is 24 x 16 pixels, the images 24 x 24: give it the shape"):
        check_masks(left_half(16, 24), 1, (3, 3), (24, 24))
    with pytest.raises(ConceptSplitError, match="There are 2 masks for 3 images"):
        check_masks(left_half(16, 24).repeat(2, 1, 1), 3, (2, 3), (16, 24))
    assert check_masks(left_half(16, 24), 1, (3, 3)).shape == (1, 1, 3, 3), "nobody says what shape"


def test_one_mask_serves_pictures_of_several_batches():
    images = [picture(48, 64, 1), picture(48, 64, 2)]
    batch, masks, _ = one_size(images, [left_half(48, 64)], 32)
    assert len(batch) == 2 and torch.equal(masks, left_half(48, 64))
    alone = one_size(images[:1], [left_half(48, 64)], 32)
    assert alone[0] is images[0] and torch.equal(alone[1], left_half(48, 64))
    assert NATIVE_SIZES == {"sd15": 512, "sd21": 768, "sdxl": 1024, "demo": 128} and TRANSFORMER_SIZE == 1024


def test_the_aspect_is_compared_along_both_sides():
    """Far off in one of the two products only."""
    assert not same_shape((300, 100), (100, 300)) and not same_shape((100, 300), (300, 100))
    assert same_shape((1000, 300), (10, 3)) and not same_shape((1000, 330), (1000, 300))


def test_a_mask_is_strong_from_one_half_on_and_an_empty_one_is_reported_later():
    for high in (0.5, 0.75):
        check_strength(left_half(4, 6) * high, "Mask 3")
    check_strength(torch.zeros(4, 6), "Mask 3")
    check_strength(np.zeros((4, 6)), "Mask 3")
    with pytest.raises(ConceptSplitError, match=r"^Mask 3 is at most 0\.499 where"):
        check_strength(np.full((4, 6), 0.499), "Mask 3")


def test_an_empty_mask_may_have_any_shape_and_others_the_pictures():
    """What is empty is named as empty, once the pictures are encoded."""
    masks = torch.zeros(2, 5, 19)
    assert check_masks(masks, 2, (2, 3), (16, 24)).shape == (2, 1, 2, 3)
    masks[1, 0, 0] = 1.0
    with pytest.raises(ConceptSplitError, match="The mask is 19 x 5 pixels, the images 24 x 16"):
        check_masks(masks, 2, (2, 3), (16, 24))


def test_masks_of_a_list_are_checked_one_by_one():
    images = [picture(48, 64, 1), picture(64, 48, 2)]
    covers = [left_half(48, 64), left_half(64, 48)]
    for spoil, said in (
        (lambda cover: cover * 0.3, "Mask 2 is at most 0.3 where"),
        (lambda cover: cover * 3.0, "Mask 2 holds values from 0 to 3 where 0 to 1"),
        (lambda cover: cover / 0, "Mask 2 holds values that are not finite"),
        (lambda cover: cover[:, :30], "Mask 2 is 48 x 30 pixels, its image 48 x 64"),
        (lambda cover: cover[None, None, None], "The mask has shape .1, 1, 1, 1, 64, 48."),
    ):
        with pytest.raises(ConceptSplitError, match=said):
            one_size(images, [covers[0], spoil(covers[1])], 32)
    batch, masks, note = one_size(images, [covers[0][0], covers[1] * 1.4], 32)
    assert batch.shape == (2, 32, 32, 3) and masks.shape == (2, 32, 32) and float(masks.max()) == 1.0
    assert "have 2 sizes" in note[0]


def test_one_mask_for_pictures_of_several_sizes_needs_the_shape_of_all():
    images = [picture(48, 64, 1), picture(96, 128, 2), picture(24, 32, 3)]
    batch, masks, note = one_size(images, [left_half(48, 64)], 20)
    assert batch.shape == (3, 20, 20, 3) and masks.shape == (1, 20, 20) and "have 3 sizes" in note[0]
    assert float(masks[0, :, :9].min()) > 0.9 and float(masks[0, :, 11:].max()) < 0.1
    assert one_size([], [], 20) == (None, None, ())
    with pytest.raises(ConceptSplitError, match="Mask 1 is 64 x 48 pixels, its image 48 x 64"):
        one_size([*images, picture(64, 48, 4)], [left_half(48, 64)], 20)


def test_pictures_of_several_batches_and_one_size_keep_their_masks_sizes_apart():
    """Masks of two sizes for pictures of one: the pictures stay as they are, the masks are fitted to them."""
    images = [picture(40, 60, 1, count=2), picture(40, 60, 2)]
    covers = [left_half(40, 60), left_half(20, 30), left_half(80, 120)]
    batch, masks, note = one_size(images, covers, 512)
    assert note == () and torch.equal(batch, torch.cat(images)) and masks.shape == (3, 40, 60)
    for cover in masks:
        assert float(cover[:, :27].min()) > 0.9 and float(cover[:, 33:].max()) < 0.1


def test_a_mask_of_a_list_that_only_the_crop_empties_is_told_as_such():
    wide, mask = torch.full((1, 32, 128, 3), 0.5), torch.zeros(1, 32, 128)
    mask[:, :, 100:] = 1
    with pytest.raises(
        ConceptSplitError, match=r"^Mask 2 marks nothing in what is left of its picture, .* 32 x 32 pix"
    ):
        one_size([torch.rand(1, 64, 64, 3), wide], [torch.ones(1, 64, 64), mask], 32)
