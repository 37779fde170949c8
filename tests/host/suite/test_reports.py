"""Public reports about other packs, tried on the real host; docs/robustness/reports.md is the log."""

from __future__ import annotations

import pytest
import torch

from .conftest import pack
from .helpers import encode, latent, sample
from .test_lora import DOWN, MID, load

ConceptSplitError = pack("conceptsplit_core.errors").ConceptSplitError
SITES = (f"{MID}.attn2.to_v", f"{MID}.attn1.to_q", f"{DOWN}.attn1.to_out.0")


@pytest.fixture(scope="module")
def sd(loaded):
    return loaded("tiny")


def parts(sd, ranks=(2, 7, 3)):
    g = torch.Generator().manual_seed(3)
    network = pack("conceptsplit_core.hosts.comfy.model").network_map(sd.model.model)
    found = {}
    for site, rank in zip(SITES, ranks, strict=True):
        tall, wide = network.module(site).weight.shape
        found[site] = (torch.randn(rank, wide, generator=g) * 0.2, torch.randn(tall, rank, generator=g) * 0.2)
    return found


def factors(model):
    return pack("conceptsplit_core.hosts.comfy.patch").patch_of(model).adapters[-1].adapter


@pytest.mark.parametrize(
    ("layout", "alphas"),
    [
        ("unet.{}.lora_A.weight unet.{}.lora_B.weight", None),
        ("unet.base_model.model.{}.lora_A.weight unet.base_model.model.{}.lora_B.weight", None),
        ("lora_unet_{_}.lora_down.weight lora_unet_{_}.lora_up.weight", (94.0, 123.0, 1.5)),
        ("unet.{p}_lora.down.weight unet.{p}_lora.up.weight", None),
    ],
    ids=["ranks of their own without alpha", "SimpleTuner's names", "alphas of their own", "processor names"],
)
def test_scales_and_names_of_other_trainers(sd, write, layout, alphas):
    state, wanted = {}, {}
    for i, (site, (down, up)) in enumerate(parts(sd).items()):
        block, _, last = site.removesuffix(".0").rpartition(".")
        text = layout.replace("{_}", site.replace(".", "_")).replace("{p}", f"{block}.processor.{last}")
        names = text.replace("{}", site).split()
        state |= {names[0]: down, names[1]: up}
        wanted[site] = up @ down
        if alphas:
            state[names[0].replace("lora_down.weight", "alpha")] = torch.tensor(alphas[i])
            wanted[site] = wanted[site] * (alphas[i] / len(down))
    model, _, info = load(sd, write(state, "names.safetensors"), "anna", "dog")
    assert "left out" not in info
    for site in SITES:
        a, b, scale = factors(model).factor(site, torch.device("cpu"), torch.float32)
        torch.testing.assert_close(scale * b @ a, wanted[site])


def test_a_lora_whose_training_has_diverged_is_refused(sd, write):
    state = {}
    for site, (down, up) in parts(sd).items():
        state |= {f"unet.{site}.lora_A.weight": down, f"unet.{site}.lora_B.weight": up}
    state[f"unet.{SITES[1]}.lora_B.weight"][0, 0] = float("nan")
    with pytest.raises(ConceptSplitError, match=f"holds values that are not finite at {SITES[1]}"):
        load(sd, write(state, "nan.safetensors"), "anna", "dog")


@pytest.mark.parametrize("masks", [1, 2, 4])
def test_every_picture_of_a_batch_gets_the_lora(sd, write, masks):
    """Also with fewer or more masks than pictures."""
    state = {}
    for site, (down, up) in parts(sd).items():
        state |= {f"unet.{site}.lora_A.weight": down, f"unet.{site}.lora_B.weight": up}
    mask = torch.zeros(masks, 64, 96)
    mask[:, :, :32] = 1
    model, clip, _ = load(sd, write(state, "batch.safetensors"), "anna", "dog", mask=mask)
    conds, image = (encode(clip, "a <anna> at sea"), encode(clip, "")), latent(96, 64, 3)
    plain, ours = sample(sd.model, *conds, image, steps=1), sample(model, *conds, image, steps=1)
    assert ((ours - plain).flatten(1).abs().amax(dim=1) > 1e-4).all()
