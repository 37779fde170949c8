"""Words that change during a run, and corrected words, through the diffusers host."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import TOM

from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.hosts.diffusers import drawing
from conceptsplit_core.settings import CorrectionConfig, LodaConfig
from conceptsplit_core.text.concepts import Concept

REX = Concept("rex", "dog; 0.5: bright mug")
TEXT = "a photo of a <rex> and a <tom>"


@pytest.fixture
def told(monkeypatch):
    """What the UNet is told in each call: text and timestep."""
    calls = []
    real = drawing.call_unet

    def call(model, x, t, context, *rest):
        calls.append((context.clone(), int(t)))
        return real(model, x, t, context, *rest)

    monkeypatch.setattr(drawing, "call_unet", call)
    return calls


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_each_step_reads_the_words_of_its_stage(load, adapter_for, told, family, guidance):
    model = load(family)
    conds = [host.encode_text(model, TEXT, [REX, TOM]), host.encode_text(model, "a <tom>", [REX, TOM])]
    early = host.encode_text(model, "a photo of a dog and a cat")
    late = host.encode_text(model, "a photo of a bright mug and a cat")
    assert torch.equal(conds[0].context, early.context) and torch.equal(conds[0].at(0.5).context, late.context)
    (_, second) = conds[0].later[0]
    rows = {one.concept: one.rows for one in second.bindings}
    assert len(rows["rex"]) == 2 and min(rows["tom"]) > max(rows["rex"]) and conds[1].later == ()
    options = {"seeds": [3, 4], "steps": 6, "guidance": guidance, "concepts": ["rex", "tom"]}
    result = host.sample(model, conds, adapters={"rex": (adapter_for(model), 1.0)}, **options)
    assert len(told) == 6
    for step, (context, _) in enumerate(told):
        wanted = (early if step < 3 else late).context[0]
        assert torch.equal(context[-2], wanted), step
        assert torch.equal(context[-1], conds[1].context[0]), step
    alone = host.sample(model, [replace(conds[0], later=()), conds[1]], **options)
    assert not torch.equal(result.latents[0], alone.latents[0])


def test_a_late_stage_is_the_run_of_its_words_from_there(load, adapter_for):
    """With LODA and AFG: the second half from the same latent, under the same regions, is a plain run's."""
    model = load("sd15")
    adapters = {"rex": (adapter_for(model), 1.0)}
    options = {"seeds": [5], "steps": 4, "concepts": ["rex", "tom"], "adapters": adapters}
    cond = host.encode_text(model, TEXT, [REX, TOM])
    same = replace(cond, later=((0.5, replace(cond, later=())),))
    loda = LodaConfig(loda_steps=1, afg_region=0.4)
    plain = host.sample(model, [replace(cond, later=())], loda=loda, **options)
    equal = host.sample(model, [same], loda=loda, **options)
    assert torch.equal(equal.latents, plain.latents)
    staged = host.sample(model, [cond], loda=loda, **options)
    assert torch.equal(staged.trace.regions, plain.trace.regions)
    assert not torch.equal(staged.latents, plain.latents)


def test_afg_guides_the_rows_of_the_stage(load, monkeypatch):
    model = load("sd15")
    seen = []
    real = drawing.Drawing.bias

    def bias(self, regions):
        made = real(self, regions)
        seen.append({row for one in made.values() for row in one.abs().sum(dim=(0, 1)).nonzero().flatten().tolist()})
        return made

    monkeypatch.setattr(drawing.Drawing, "bias", bias)
    cond = host.encode_text(model, TEXT, [REX, TOM])
    host.sample(model, [cond], seeds=[5], steps=4, concepts=["rex", "tom"], loda=LodaConfig(loda_steps=1, afg_end=1.0))
    bound = [{row for one in part.bindings for row in one.rows} for part in (cond, cond.at(0.5))]
    assert seen == bound and bound[0] != bound[1]


def test_corrected_words_change_their_rows_alone_in_every_stage(load):
    model = load("sdxl")
    cond = host.encode_text(model, TEXT, [REX, TOM])
    out = host.with_correction(cond, CorrectionConfig(0.5, 3.0))
    for start in (0.0, 0.5):
        before, after = cond.at(start), out.at(start)
        moved = set((before.context != after.context).any(dim=-1)[0].nonzero().flatten().tolist())
        assert moved == {row for one in before.bindings for row in one.rows}
    assert host.with_correction(cond, CorrectionConfig()) is cond
    plain = host.encode_text(model, "a dog")
    assert host.with_correction(plain, CorrectionConfig(1.0)) is plain
