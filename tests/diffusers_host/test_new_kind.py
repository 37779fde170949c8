"""A kind of adapter that only this file knows: one class, one adapter, one line that registers it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from tiny import REX, TOM, attentions, bound, guided, inputs

from conceptsplit_core import ConceptSplitError
from conceptsplit_core.adapters.base import KINDS, AdapterInfo, kind_of, register
from conceptsplit_core.adapters.file import load_adapter, save_adapter
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.settings import LodaConfig


class Shift:
    """A vector per value projection, added at the concept's rows whatever the text says."""

    def __init__(self, info, vectors):
        self.info, self.vectors = info, dict(vectors)

    @property
    def sites(self):
        return tuple(self.vectors)

    def check_fits(self, shapes, base="unknown"):
        for site, vector in self.vectors.items():
            if shapes.get(site, (0, 0))[1] != len(vector):
                raise ConceptSplitError(f"The shift '{self.info.concept}' does not fit {site}.")


@dataclass(frozen=True)
class ShiftKind:
    name = "shift"
    label = "a constant at the concept's rows"
    scope = "rows"

    def changes(self, site):
        return site.name.endswith(".attn2.to_v")

    def create(self, shapes, info, seed):
        g = torch.Generator().manual_seed(seed)
        return Shift(info, {site: torch.randn(d_out, generator=g) for site, (_, d_out) in shapes.items()})

    def change(self, members, site, layer, x, out, mask):
        vectors = torch.stack([member.strength * member.adapter.vectors[site.name] for member in members])
        return mask.places, mask.worked.to(out) @ vectors.to(out)

    def tensors(self, adapter):
        return {f"{site}.shift": vector for site, vector in adapter.vectors.items()}

    def read(self, tensors, info):
        return Shift(info, {name.removesuffix(".shift"): vector for name, vector in tensors.items()})


@pytest.fixture
def kind():
    yield register(ShiftKind())
    del KINDS["shift"]


def shift(kind, model, name="rex", seed=0):
    info = AdapterInfo(name, "dog", base=model.family, kind="shift")
    return kind.create(host.network_map(model).value_shapes, info, seed)


def test_it_adds_what_it_says_at_its_own_rows(kind, load):
    model = load()
    cond, mask = bound(model)
    text, _, mask = guided(cond, host.encode_text(model, ""), mask)
    adapters = [(shift(kind, model), 0.5), (shift(kind, model, "tom", 1), -2.0)]
    x, t = inputs(model, batch=2)
    seen = {}
    with torch.no_grad(), host.patched(model, adapters) as patch:
        hooks = [
            layer.to_v.register_forward_hook(lambda _m, i, out, name=name: seen.update({name: (i[0], out)}))
            for name, layer in attentions(model).items()
        ]
        patch.publish(mask)
        host.call_unet(model, x, t, text)
        for hook in hooks:
            hook.remove()
    for name, (read, out) in seen.items():
        with torch.no_grad():
            plain = attentions(model)[name].to_v(read)
        added = torch.einsum("bln,nd->bld", mask, torch.stack([s * one.vectors[f"{name}.to_v"] for one, s in adapters]))
        torch.testing.assert_close(out, plain + added)
        assert torch.equal(out[mask.sum(-1) == 0], plain[mask.sum(-1) == 0])


def test_it_draws_with_another_kind_in_one_run_and_keeps_its_kind_in_its_file(kind, load, adapter_for, tmp_path):
    model = load(dtype=torch.float64)
    mine = shift(kind, model)
    save_adapter(mine, tmp_path / "rex.safetensors", torch.float64)
    back = load_adapter(tmp_path / "rex.safetensors")
    assert kind_of(back) is kind and back.info == replace(mine.info, rank=1, alpha=1.0)
    assert set(back.sites) == set(mine.sites)
    options = {"seeds": [1], "steps": 3, "concepts": ["rex", "tom"], "loda": LodaConfig(loda_steps=1)}
    conds = [host.encode_text(model, "a photo of a <rex> and a <tom>", [REX, TOM])]
    other = {"tom": (adapter_for(model, "tom", "cat", seed=7), 0.7)}
    pictures = [
        host.sample(model, conds, adapters=adapters, **options).latents
        for adapters in (
            other,
            {"rex": (mine, 1.0), **other},
            {"rex": (back, 1.0), **other},
            {"rex": (mine, 0.0), **other},
        )
    ]
    assert torch.equal(pictures[1], pictures[2])
    assert torch.equal(pictures[0], pictures[3])
    assert not torch.allclose(pictures[0], pictures[1])


def test_without_its_line_the_file_is_refused_by_name(load, tmp_path):
    kind = register(ShiftKind())
    save_adapter(shift(kind, load()), tmp_path / "rex.safetensors")
    del KINDS["shift"]
    with pytest.raises(ConceptSplitError, match="rex.safetensors is an adapter of kind 'shift'.*update the node pack"):
        load_adapter(tmp_path / "rex.safetensors")


def test_it_must_fit_the_model(kind, load):
    adapter = shift(kind, load("sd15"))
    with (
        pytest.raises(ConceptSplitError, match="The shift 'rex' does not fit"),
        host.patched(load("sdxl"), [(adapter, 1)]),
    ):
        pass
