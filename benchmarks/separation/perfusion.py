"""What limits Perfusion: `python -m benchmarks.separation.perfusion`.

Perfusion adds one vector to a concept's values, wherever its class word is met. A value adapter adds a matrix times the
word's encoding, at the same rows. This trains both in other ways, gives Perfusion a vector for each training prompt's
encoding of the word (`perfusion_spanned`, of this laboratory alone), and puts what a value adapter has learned into
Perfusion's and Infusion's form, without any training of theirs. On tuning concepts and seeds; adapters are kept.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conceptsplit_core.adapters.base import AdapterInfo, Added, register
from conceptsplit_core.adapters.gated import Gated, GatedAdapter, openness
from conceptsplit_core.demo.looks import CONCEPTS
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.method.tova import TokenMask
from conceptsplit_core.network.hooks import Member
from conceptsplit_core.network.site import Site
from conceptsplit_core.text.concepts import Concept

from . import learning, methods, report, run, tune
from .learning import RECIPES, Learning, Recipe
from .methods import Arm

OUT = Path("benchmarks/results/separation_perfusion.json")
USUAL = Learning()
_MORE = "gated.more"


class SpannedAdapter(GatedAdapter):
    """Perfusion with a vector for each direction in which the class word's encodings differ.

    Attributes:
        own: per value projection [1 + n, d_v]: r, and what a direction adds.
        shared: besides Perfusion's `gated.more` [n, d_ctx], which a row's encoding is multiplied with.
    """

    @property
    def more(self) -> Tensor:
        return self.shared[_MORE]

    def prepared(self, own: Tensor) -> Tensor:
        return own[0]

    def lock(self, encodings: Tensor, moment: Tensor) -> None:
        """The directions of the encodings' differences under C⁻¹, of mean square 1 over the encodings and 0 at i*."""
        super().lock(encodings, moment)
        e = encodings.cpu().double()
        values, vectors = torch.linalg.eigh(moment.double())
        root = vectors @ (vectors / values.sqrt()).t()  # C^(-1/2)
        _, sizes, directions = torch.linalg.svd((e - e.mean(dim=0)) @ root, full_matrices=False)
        kept = self.more.shape[0]
        dual = (directions[:kept] @ root) * (math.sqrt(len(e)) / sizes[:kept, None].clamp(min=1e-9))
        dual -= (dual @ e.mean(dim=0))[:, None] * self.direction.cpu().double()
        self.shared[_MORE] = dual.to(self.more.dtype).to(self.more.device).contiguous()


class Spanned(Gated):
    """The kind: equation 3 with o* + Σ_j c_j(e) r_j at the values in place of o*."""

    name = "perfusion_spanned"
    label = "Perfusion with a vector per direction of its word's encodings"
    common = (*Gated.common, _MORE)
    axes = 2
    adapter = SpannedAdapter
    directions = 4

    def create(self, shapes: Mapping[str, tuple[int, int]], info: AdapterInfo, seed: int) -> SpannedAdapter:
        plain = super().create(shapes, info, seed)
        width = plain.target.shape[1]
        own = {site: torch.zeros(1 + self.directions, len(r)) for site, r in plain.own.items()}
        return SpannedAdapter(plain.info, own, {**plain.shared, _MORE: torch.zeros(self.directions, width)})

    def change(
        self, members: Sequence[Member], site: Site, layer: nn.Module, x: Tensor, out: Tensor, mask: TokenMask
    ) -> Added | None:
        given = super().change(members, site, layer, x, out, mask)
        if given is None or not self.changes(site):
            return given
        places, added = given
        _, e = mask.work(x)
        for i, adapter, strength in self.acting(members, site, mask):
            gate = openness([adapter.gate], e.float() @ adapter.direction.t().to(e.device))
            share = e.float() @ adapter.more.t().to(e.device)  # c(e)
            weight = gate * mask.worked[..., i : i + 1] * strength
            added = added + weight * (share @ adapter.own[site.name][1:].to(e.device))
        return places, added


register(Spanned())
RECIPES["perfusion_spanned"] = Recipe("perfusion_spanned")
RECIPES["perfusion_fast"] = Recipe("perfusion", rate=4.0)

LEARNED: dict[str, tuple[str, Learning]] = {
    "value": ("value", USUAL),
    "perfusion": ("perfusion", USUAL),
    "perfusion, four times the rate": ("perfusion_fast", USUAL),
    "perfusion, a vector for each training prompt": ("perfusion_spanned", USUAL),
}


def encodings(model: host.DiffusersModel, name: str) -> Tensor:
    """Of the concept's class word in each training prompt, [m, d_ctx]."""
    concept = Concept(name, CONCEPTS[name].class_word)
    prompts = host.training.encode_prompts(model, concept, model.templates or ("a {}",))
    return torch.stack([prompt.context[list(prompt.rows)].mean(dim=0) for prompt in prompts])


def changes(adapter: Any, rows: Tensor) -> dict[str, Tensor]:
    """What a value adapter adds to the values of these rows [m, d_ctx], by module [m, d_v]."""
    pairs = ((site, adapter.down[site], adapter.up[site]) for site in adapter.sites)
    return {site: adapter.scale(site) * rows @ down.t() @ up.t() for site, down, up in pairs}


def constant_share(given: Mapping[str, Tensor]) -> float:
    """How much of `changes` is the same for all rows, as a share of its square."""
    whole = sum(float(one.square().sum()) for one in given.values())
    return 1.0 - sum(float((one - one.mean(dim=0)).square().sum()) for one in given.values()) / whole


def as_infusion(model: host.DiffusersModel, name: str, adapter: Any) -> Any:
    """A value adapter's mean change over the training prompts, as Infusion adds it."""
    made = host.new_adapter(model, Concept(name, CONCEPTS[name].class_word), 1, 1.0, 0, kind="infusion")
    made.own = {site: one.mean(dim=0) for site, one in changes(adapter, encodings(model, name)).items()}
    return made


def as_perfusion(model: host.DiffusersModel, name: str, adapter: Any) -> Any:
    """The same as Perfusion adds it: its edit changes the values of i* by just as much."""
    concept, rows = Concept(name, CONCEPTS[name].class_word), encodings(model, name)
    made: Any = host.new_adapter(model, concept, 1, 1.0, 0, kind="perfusion")
    data = host.training_data(model, learning.pictures_of(name, USUAL)[0][:1], concept, model.templates or ("a {}",))
    host.begin(model, made, data)
    network = host.network_map(model)
    gate = openness([made.gate], torch.ones(1))
    for site, one in changes(adapter, rows).items():
        with torch.no_grad():
            plain = network.module(site)(made.target)[0]  # W i*
        made.own[site] = (one.mean(dim=0) + plain) / gate - plain
    return made


HELD: dict[str, Callable[[host.DiffusersModel, str, Any], Any]] = {
    "value's change, held constant (as infusion)": as_infusion,
    "value's change, as perfusion can say it": as_perfusion,
}


def pictures(bench: run.Bench, recipe: str, learned: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """Records of each concept alone."""
    out: dict[str, Any] = {}
    for name, adapter in learned.items():
        began = time.process_time()
        images, _ = methods.draw(bench.model, Arm(recipe), [name], seeds, {name: adapter}, bench.sampling)
        spent = (time.process_time() - began) / len(seeds)
        judged = zip(images, seeds, strict=True)
        out[name] = {seed: run.measure_picture(image, (name,), seed)[0] | {"seconds": spent} for image, seed in judged}
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--cases", nargs="+", default=list(LEARNED), choices=LEARNED, help="value among them")
    run.add_options(parser, OUT)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.perf_counter()
    model = learning.open_model(args.model)
    names = methods.TUNING[: args.concepts]
    seeds = list(range(tune.FIRST_SEED, tune.FIRST_SEED + args.seeds))
    found: run.Results = {}
    shares: dict[str, float] = {}
    for case in args.cases:
        recipe, how = LEARNED[case]
        bench = run.Bench(model, learning=how, cache=args.cache)
        learned = bench.learned(dict.fromkeys(names, recipe))
        found[case] = pictures(bench, recipe, learned, seeds)
        if case == "value":
            shares = {name: constant_share(changes(learned[name], encodings(model, name))) for name in names}
            for held, put in HELD.items():
                found[held] = pictures(bench, recipe, {n: put(model, n, learned[n]) for n in names}, seeds)
        data = {
            "machine": report.machine(),
            "model": report.described(bench),
            "sampling": asdict(bench.sampling),
            "concepts": list(names),
            "seeds": {"first": tune.FIRST_SEED, "count": args.seeds},
            "learning": {done: {"recipe": asdict(RECIPES[LEARNED[done][0]]), **asdict(LEARNED[done][1])}
                         for done in found if done in LEARNED},
            "constant_share": shares,
            "arms": report.summary(found, 300),
            "seconds": time.perf_counter() - began,
        }  # fmt: skip
        report.write(args.out, data)
        print(f"{time.perf_counter() - began:6.0f} s", report.table(data["arms"]), sep="\n", flush=True)
    if args.out == OUT:
        report.fill(Path("docs/tables/separation.md"), {"perfusion": report.table(data["arms"])})


if __name__ == "__main__":
    main()
