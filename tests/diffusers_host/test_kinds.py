"""Every kind that comes with the package: trained, saved, loaded and drawn with, by the same few lines."""

from __future__ import annotations

import pytest
import torch
from tiny import REX, TOM, attentions, bound, every_family, guided, inputs

from conceptsplit_core.adapters.base import KINDS
from conceptsplit_core.adapters.file import load_adapter, save_adapter
from conceptsplit_core.adapters.gated import with_gate
from conceptsplit_core.adapters.table import TableAdapter, TableKind
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.kinds import FILES
from conceptsplit_core.settings import GateConfig, TrainConfig
from conceptsplit_core.train.loop import train

TEMPLATES = ("a photo of a {}", "the bright {} on a table")
CAPTIONS = ["a cat on a table", "two dogs and a mug", "the bear", "a dark photo of a mug"]
every_kind = pytest.mark.parametrize("kind", FILES)


def trained(model, kind, steps=6, captions=CAPTIONS, checkpointing=False):
    """A concept after a few steps on three noise pictures, its losses, and what it was before."""
    pictures = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(9)) * 2 - 1
    data = host.training_data(model, pictures, REX, TEMPLATES)
    config = TrainConfig(
        steps=steps, batch_size=2, learning_rate=1e-2, rank=2, warmup=0, kind=kind,
        prediction_type=model.prediction_type,
    )  # fmt: skip
    adapter = host.new_adapter(model, REX, config.rank, 0.0, 3, kind=config.kind)
    host.begin(model, adapter, data, captions)
    before = adapter.detached()
    with host.training_denoiser(model, adapter, checkpointing) as denoise:
        result = train(adapter, data, model.alphas_cumprod, denoise, config)
    return result.trained(), result.losses, before


@every_kind
def test_it_learns_and_its_file_draws_the_same(load, tmp_path, kind):
    model = load(dtype=torch.float64)
    weights = {name: value.clone() for name, value in model.unet.state_dict().items()}
    adapter, losses, before = trained(model, kind)
    assert len(losses) == 6 and adapter.info.kind == kind and adapter.info.training["steps"] == 6
    assert all(torch.equal(value, weights[name]) for name, value in model.unet.state_dict().items())
    for old, new in zip(before.parameters(), adapter.parameters(), strict=True):
        assert not torch.equal(old, new) and torch.isfinite(new).all(), "no part may stay as it was"
    save_adapter(adapter, tmp_path / "rex.safetensors", torch.float32)
    back = load_adapter(tmp_path / "rex.safetensors")
    assert type(back) is type(adapter) and back.info == adapter.info
    cond = [host.encode_text(model, "a photo of a <rex>", [REX])]
    drawn = {
        name: host.sample(model, cond, seeds=[1], steps=2, size=(64, 64), adapters=adapters, concepts=["rex"]).latents
        for name, adapters in {
            "plain": {},
            "trained": {"rex": (adapter, 1.0)},
            "loaded": {"rex": (back, 1.0)},
            "off": {"rex": (back, 0.0)},
        }.items()
    }
    assert torch.equal(drawn["plain"], drawn["off"])
    assert torch.equal(drawn["trained"], drawn["loaded"])
    assert not torch.allclose(drawn["plain"], drawn["trained"], atol=1e-6)


@every_kind
def test_what_reads_text_changes_where_its_scope_says(load, kind):
    """Rows that are nobody's keep keys and values to the bit; Perfusion and merged LoRAs act at every row."""
    model = load()
    adapter, *_ = trained(model, kind)
    cond, mask = bound(model)  # <rex> and <tom>
    text, _, mask = guided(cond, host.encode_text(model, ""), mask)
    x, t = inputs(model, batch=2)
    seen = {}
    layers = {
        f"{name}.{part}": getattr(layer, part) for name, layer in attentions(model).items() for part in ("to_k", "to_v")
    }
    with torch.no_grad(), host.patched(model, [(adapter, 0.75), (None, 1.0)]) as patch:
        hooks = [
            layer.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
            for name, layer in layers.items()
        ]
        patch.publish(mask, latent=(16, 16))
        host.call_unet(model, x, t, text)
        for hook in hooks:
            hook.remove()
    own = mask[..., 0] > 0
    assert own.any() and not own.all()
    for name, layer in layers.items():
        with torch.no_grad():
            plain = layer(text)
        if name in adapter.sites:
            assert not torch.allclose(seen[name][own], plain[own], atol=1e-6), name
        else:
            assert torch.equal(seen[name], plain), name
        if KINDS[kind].scope != "everywhere":
            assert torch.equal(seen[name][~own], plain[~own]), name


def test_perfusion_begins_as_its_word_and_depends_on_the_captions(load):
    model = load()
    one, _, before = trained(model, "perfusion", steps=1)
    assert not any(value.any() for value in before.own.values())
    other, *_ = trained(model, "perfusion", steps=1, captions=CAPTIONS[:2])
    ours, *_ = trained(model, "perfusion", steps=1, captions=())
    assert torch.equal(one.target, other.target) and not torch.allclose(one.direction, other.direction)
    assert not torch.allclose(one.direction, ours.direction)
    torch.testing.assert_close((one.direction * one.target).sum(), torch.tensor(1.0))
    encodings = [
        host.encode_text(model, template.replace("{}", "<rex>"), [REX]) for template in TEMPLATES
    ]  # "dog" is one token
    mean = torch.stack([cond.context[0, cond.bindings[0].rows[0]] for cond in encodings]).mean(dim=0)
    torch.testing.assert_close(one.target[0], mean)


papers = pytest.mark.parametrize("kind", ["perfusion", "infusion", "para"])


@papers
def test_computing_activations_again_learns_the_same(load, kind):
    one, *_ = trained(load(), kind, steps=2)
    two, *_ = trained(load(), kind, steps=2, checkpointing=True)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@papers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision_train_and_draw(load, kind, dtype):
    model = load(dtype=dtype)
    adapter, losses, _ = trained(model, kind, steps=2)
    assert all(torch.isfinite(torch.tensor(losses))) and all(p.dtype == torch.float32 for p in adapter.parameters())
    cond = [host.encode_text(model, "a photo of a <rex>", [REX])]
    draw = lambda strength: (
        host.sample(model, cond, seeds=[1], steps=2, size=(64, 64), adapters={"rex": (adapter, strength)}).latents
    )
    assert torch.isfinite(draw(1.0)).all() and not torch.equal(draw(1.0), draw(0.0))


@every_family
@papers
def test_the_papers_kinds_train_on_every_family(load, family, kind):
    adapter, losses, _ = trained(load(family), kind, steps=2)
    assert adapter.info.base == family and all(torch.isfinite(torch.tensor(losses)))
    assert all(tensor.any() for tensor in adapter.parameters())


def test_the_gate_of_a_loaded_concept_is_its_own(load):
    """β and τ of the loader reach the run; the defaults are those of the file's kind."""
    model = load()
    adapter, *_ = trained(model, "perfusion")
    cond = [host.encode_text(model, "a photo of a <rex>", [REX])]
    draw = lambda gate: (
        host.sample(
            model, cond, seeds=[1], steps=2, size=(64, 64), adapters={"rex": (with_gate(adapter, gate), 1.0)}
        ).latents
    )
    assert torch.equal(draw(GateConfig()), draw(GateConfig(0.75, 0.1)))
    assert not torch.allclose(draw(GateConfig()), draw(GateConfig(0.25, 0.1)), atol=1e-5)
    assert not torch.allclose(draw(GateConfig()), draw(GateConfig(0.75, 0.5)), atol=1e-5)


def test_several_concepts_of_several_kinds_draw_together(load):
    model = load()
    one, *_ = trained(model, "infusion")
    two = trained(model, "para")[0].with_info(concept="tom", class_word="cat")
    cond = [host.encode_text(model, "a photo of a <rex> and a <tom>", [REX, TOM])]
    masks = {"tom": torch.zeros(1, 64, 64).index_fill(2, torch.arange(32), 1.0)}
    draw = lambda a, b: (
        host.sample(
            model, cond, seeds=[1], steps=2, size=(64, 64), adapters={"rex": (one, a), "tom": (two, b)}, masks=masks
        ).latents
    )
    both = draw(1.0, 1.0)
    assert torch.isfinite(both).all()
    for other in (draw(1.0, 0.0), draw(0.0, 1.0)):
        assert not torch.allclose(both, other, atol=1e-6)


class Shift(TableKind):
    """A kind that only this test knows: a vector per value projection, added at the concept's rows."""

    name, label, scope, part = "shift", "a vector at the concept's rows", "rows", "shift.vector"

    def changes(self, site):
        return site.name.endswith(".attn2.to_v")

    def create(self, shapes, info, seed):
        return TableAdapter(info, {site: torch.zeros(wide) for site, (_, wide) in shapes.items()})

    def change(self, members, site, layer, x, out, mask):
        (one,) = members
        return mask.work(out)[0], mask.worked * one.strength * one.adapter.ready(site.name, out.device, out.dtype)


def test_a_kind_of_ones_own_is_trained_by_the_same_trainer(load, tmp_path):
    KINDS["shift"] = Shift()
    try:
        model = load()
        data = host.training_data(model, torch.zeros(1, 3, 64, 64), REX, TEMPLATES)
        mine = host.new_adapter(model, REX, 1, 0.0, 0, kind="shift")
        host.begin(model, mine, data)
        config = TrainConfig(steps=2, learning_rate=1e-2, prediction_type=model.prediction_type)
        with host.training_denoiser(model, mine) as denoise:
            result = train(mine, data, model.alphas_cumprod, denoise, config)
        assert mine.moved() and len(result.losses) == 2
        save_adapter(result.trained(), tmp_path / "rex.safetensors")
        assert isinstance(load_adapter(tmp_path / "rex.safetensors"), TableAdapter)
    finally:
        del KINDS["shift"]
