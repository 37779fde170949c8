"""Concept Attention Preview: what it shows of runs that had no maps of their own for each picture."""

from __future__ import annotations

import pytest
import torch

from .conftest import run
from .helpers import dog_and_cat, latent, sample_loda


@pytest.fixture(scope="module")
def sd(loaded):
    return loaded("tiny")


@pytest.fixture
def prompts(sd):
    return dog_and_cat(sd.clip)


def test_regions_that_are_all_drawn_are_shown(sd, prompts):
    """No map is read then, and that is no fault of the prompt or of loda_steps."""
    model, mask = sd.model, torch.zeros(1, 64, 64)
    mask[:, :, :16] = 1.0
    for name, region in (("dog", mask), ("cat", 1.0 - mask)):
        (model,) = run("ConceptSplitRegion", model=model, concept_name=name, mask=region)
    _, maps = sample_loda(model, *prompts, latent())
    assert maps.trace.after is None and maps.trace.regions is not None
    (sheet, _) = run("ConceptSplitPreview", attention_maps=maps, images=torch.full((1, 64, 64, 3), 0.5))
    height, width = sheet.shape[1:3]
    tiles = sheet[0, height // 3 : -height // 8].split(width // 2, dim=1)
    warm = [(tile[..., 0] - tile[..., 2])[:, 16:-16] for tile in tiles[:2]]
    quarter = warm[0].shape[1] // 4
    assert warm[0][:, : quarter // 2].mean() > 0.2 and warm[0][:, 2 * quarter :].mean().abs() < 0.05, "dog on the left"
    assert warm[1][:, : quarter // 2].mean().abs() < 0.05 and warm[1][:, 2 * quarter :].mean() < -0.2, "cat elsewhere"


def test_maps_of_one_picture_and_several_made_of_it(sd, prompts):
    """A latent repeated between two stages: the second takes the regions of the first."""
    out, maps = sample_loda(sd.model, *prompts, latent())
    (latents,) = run("RepeatLatentBatch", samples={"samples": out}, amount=3)
    _, later = sample_loda(sd.model, *prompts, latents, denoise=0.6, attention_maps=maps)
    images = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    (sheets, _) = run("ConceptSplitPreview", attention_maps=later, images=images)
    assert len(sheets) == 3
    for sheet, image in zip(sheets, images, strict=True):
        assert torch.equal(sheet, run("ConceptSplitPreview", attention_maps=later, images=image[None])[0][0])
