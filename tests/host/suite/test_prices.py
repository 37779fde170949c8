"""A kind, a divergence, an update rule and an option that only this file knows, each drawn with by the host's nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from .conftest import pack, run
from .helpers import apply, changed_rows, dog_and_cat, encode, make_adapter, sample, sample_loda, watched
from .test_fixtures import declared

base = pack("conceptsplit_core.adapters.base")
method = pack("conceptsplit_core.method.divergence")
updates = pack("conceptsplit_core.method.updates")
settings = pack("conceptsplit_core.settings")
core_options = pack("conceptsplit_core.options")
ConceptSplitError = pack("conceptsplit_core.errors").ConceptSplitError


class Shift:
    """A vector per value projection."""

    def __init__(self, info: Any, vectors: Any) -> None:
        self.info, self.vectors = info, dict(vectors)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.vectors)

    def check_fits(self, shapes: Any, base: str = "unknown") -> None:
        if any(shapes[site][1] != len(vector) for site, vector in self.vectors.items()):
            raise ConceptSplitError(f"The shift '{self.info.concept}' does not fit.")


class ShiftKind:
    name, label, scope = "shift", "a constant at the concept's rows", "rows"

    def changes(self, site: Any) -> bool:
        return site.name.endswith(".attn2.to_v")

    def create(self, shapes: Any, info: Any, seed: int) -> Shift:
        g = torch.Generator().manual_seed(seed)
        return Shift(info, {site: torch.randn(d_out, generator=g) for site, (_, d_out) in shapes.items()})

    def change(self, members: Any, site: Any, layer: Any, x: Any, out: Any, mask: Any) -> Any:
        vectors = torch.stack([member.strength * member.adapter.vectors[site.name] for member in members])
        return mask.places, mask.worked.to(out) @ vectors.to(out)

    def tensors(self, adapter: Shift) -> dict[str, torch.Tensor]:
        return {f"{site}.shift": vector for site, vector in adapter.vectors.items()}

    def read(self, tensors: Any, info: Any) -> Shift:
        return Shift(info, {name.removesuffix(".shift"): vector for name, vector in tensors.items()})


@pytest.fixture
def sd(loaded):
    return loaded("tiny")


@pytest.fixture
def two(sd):
    return dog_and_cat(sd.clip)


def test_a_kind_is_one_class_and_one_line(sd):
    kind = base.register(ShiftKind())
    try:
        network = pack("conceptsplit_core.hosts.comfy.model").network_map(sd.model.model)
        info = base.AdapterInfo("rex", "dog", base=network.family, kind="shift")
        mine = kind.create(network.value_shapes, info, 4)
        pack("conceptsplit_core.hosts.comfy.files").save_named(mine, "prices/shift")
        model, clip = run(
            "ConceptSplitLoader", model=sd.model, clip=sd.clip, adapter="prices/shift.safetensors", strength=-0.75
        )
        other = make_adapter(sd.model, "tom", "cat", seed=8)
        model, clip = apply(model, clip, other, strength=0.5)
        conds = encode(clip, "a <tom> and a <rex>"), encode(clip, "blurry")
        with watched(sd.model) as stock:
            plain = sample(sd.model, *conds, steps=1)
        with watched(sd.model) as ours:
            drawn = sample(model, *conds, steps=1)
    finally:
        del base.KINDS["shift"]
    # a, tom, and, a, rex: the rows of the cat and of the dog
    assert changed_rows(ours, stock) == {0: {(0, 2), (0, 5)}}
    for call, before in zip(ours, stock, strict=True):
        rows = [i for i, kind_ in enumerate(call.kinds) if kind_ == 0]
        for name, value in call.values.items():
            stored = mine.vectors[f"{name}.to_v"].half().float()
            torch.testing.assert_close(
                value[rows, 5] - before.values[name][rows, 5],
                -0.75 * stored.expand(len(rows), -1),
                rtol=1e-3,
                atol=1e-3,
            )
    assert not torch.allclose(plain, drawn)


@pytest.fixture
def registered():
    @method.divergence("total_variation", threshold=0.73)
    def total_variation(p: Any, q: Any) -> Any:
        return 0.5 * (p - q).abs().sum(dim=(-2, -1))

    @updates.update_rule("upwards")
    def upwards(gradient: Any, loss: Any, threshold: float) -> Any:
        return -updates.UPDATE_RULES["normalised"](gradient, loss, threshold)

    yield
    del method.DIVERGENCES["total_variation"], updates.UPDATE_RULES["upwards"]


def test_a_divergence_and_an_update_rule_are_one_function_each(sd, two, registered):
    inputs = declared("ConceptSplitLodaOptions")
    assert "total_variation" in str(inputs["divergence"]) and "upwards" in str(inputs["loda_rule"])
    given = {"loda_steps": 1, "loda_iterations": 2, "loda_strength": 0.05, "afg": False}
    pictures, losses = {}, {}
    for name, more in {
        "usual": {},
        "mine": {"divergence": "total_variation"},
        "upwards": {"divergence": "total_variation", "loda_rule": "upwards"},
    }.items():
        pictures[name], maps = sample_loda(sd.model, *two, **given, **more)
        losses[name] = [float(loss) for _, loss in maps.trace.losses]
        if name == "mine":
            distributions = pack("conceptsplit_core.method.maps").distributions
            p = distributions(maps.trace.before, settings.LodaConfig().map_smoothing)
            by_hand = (p[:, 0] - p[:, 1]).abs().sum(dim=(-2, -1)) / 2
            torch.testing.assert_close(maps.trace.losses[0][1], 0.73 - by_hand)
    assert losses["mine"][1] < losses["mine"][0] < losses["upwards"][1]
    assert losses["upwards"][0] == losses["mine"][0]
    assert not torch.equal(pictures["mine"], pictures["usual"])
    assert not torch.equal(pictures["mine"], pictures["upwards"])


def test_an_option_is_one_field_and_its_use(sd, two):
    @core_options.extends(settings.LodaConfig)
    @dataclass(frozen=True)
    class Eased(settings.LodaConfig):
        ease: float = core_options.option(
            0.0, "ease", "Lowers by this share how far apart is enough.", high=0.9, step=0.05, advanced=True
        )

        @property
        def target(self) -> float:
            return super().target * (1 - self.ease)

    try:
        shown = pack("nodes.sample").ConceptSplitLodaOptions.define_schema().inputs[-1].as_dict()
        _, maps = sample_loda(sd.model, *two, loda_steps=1, ease=0.25)
        with pytest.raises(ConceptSplitError, match=r"ease is 1\.0, use 0 to 0\.9"):
            run("ConceptSplitLodaOptions", ease=1.0)
    finally:
        del core_options._EXTENDED[settings.LodaConfig]
    assert (shown["default"], shown["min"], shown["max"], shown["step"]) == (0.0, 0, 0.9, 0.05)
    assert shown["tooltip"] == "Ease. Lowers by this share how far apart is enough."
    (_, values), (_, loss) = maps.trace.divergences[0], maps.trace.losses[0]
    torch.testing.assert_close(loss, 0.75 * 0.45 - values[:, 0])
    assert maps.trace.settings["ease"] == 0.25
