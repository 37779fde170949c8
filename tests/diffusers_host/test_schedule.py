"""Which noise schedules are followed, and zero terminal SNR."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny import REX, TOM

from conceptsplit_core import ConceptSplitError
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.hosts.diffusers.drawing import scheduler
from conceptsplit_core.hosts.diffusers.schedule import schedule, solved
from conceptsplit_core.settings import LodaConfig


@pytest.fixture
def with_scheduler(folder, tmp_path):
    """A model folder with changes of its scheduler's configuration."""

    def make(family="sd21", **changes):
        copy = shutil.copytree(folder(family), tmp_path / "model")
        file = copy / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return copy

    return make


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "an EDM model, by its scheduler EDMEulerScheduler"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "an EDM model"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "an EDM model"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "a flow model"),
        ({"_class_name": "LCMScheduler"}, r"a latent consistency model \(LCM\)"),
    ],
)
def test_case_3_other_denoisers_are_one_sentence_before_anything_is_loaded(with_scheduler, changes, kind):
    path = with_scheduler(**changes)
    for weights in path.glob("*/*.safetensors"):
        weights.write_bytes(b"never read")
    with pytest.raises(ConceptSplitError, match=f"is {kind}.*: the terminal samples and trains models that") as told:
        host.load_model(path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_samplers_of_the_same_schedule_are_fine(with_scheduler, name):
    model = host.load_model(with_scheduler(_class_name=name))
    assert torch.equal(model.alphas_cumprod, solved(schedule("v_prediction"))[1])


@pytest.mark.parametrize("family", ["sd15", "sd21"])
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_case_4_zero_terminal_snr_gives_pictures(with_scheduler, family, sampler):
    """Version 0.1.0 divided by ᾱ = 0. With LODA, whose map pass needs σ at the first step."""
    model = host.load_model(with_scheduler(family, rescale_betas_zero_snr=True))
    prompt = host.encode_text(model, "a photo of a <rex> and a <tom>", [REX, TOM])
    result = host.sample(
        model, [prompt], seeds=[0, 1], concepts=["rex", "tom"], steps=4, sampler=sampler, guidance=2.0,
        loda=LodaConfig(loda_steps=2),
    )  # fmt: skip
    assert torch.isfinite(result.latents).all() and result.trace.forwards > 0


def test_zero_terminal_snr_is_diffusers_own_but_for_the_last_step():
    from diffusers import DDIMScheduler

    stock = DDIMScheduler(**schedule("v_prediction", True), clip_sample=False).alphas_cumprod
    settings, alphas = solved(schedule("v_prediction", True))
    assert float(stock[-1]) == 0.0 and 4e-8 < float(alphas[-1]) < 5e-8
    torch.testing.assert_close(alphas[:-1], stock[:-1], rtol=1e-6, atol=0)
    again = DDIMScheduler(**settings, clip_sample=False).alphas_cumprod
    torch.testing.assert_close(again, alphas, rtol=1e-3, atol=0)
    plain = schedule("epsilon")
    assert solved(plain)[0] is plain


def test_more_steps_than_the_schedule_has_are_one_sentence(load):
    model = load()
    prompt = host.encode_text(model, "a dog")
    with pytest.raises(
        ConceptSplitError, match=r"^1001 sampling steps are more than the model's 1000: use at most 1000"
    ):
        host.sample(model, [prompt], seeds=[0], steps=1001)
    assert (
        len(scheduler(model, "ddim", 1000).timesteps) == 1000 and len(scheduler(model, "euler", 1001).timesteps) == 1001
    )
