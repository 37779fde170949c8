"""The model before anything is added to it: what it gets wrong on looks it knows, and whether its maps mean anything.

With no errors there would be nothing to remove, what the model cannot draw no adapter can give, and on maps that are
flat LODA has nothing to work with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.host.maps import scenes_of
from conceptsplit_core.demo import captions, looks, scenes
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.method.divergence import jsd
from conceptsplit_core.method.maps import distributions
from conceptsplit_core.network.grid import aggregate, choose_layers, level_sizes
from conceptsplit_core.text.binding import Concept, row_mask

from . import methods
from .detector import detect
from .metrics import METRICS, Wanted, interval, judge
from .run import Bench


def known_scenes(pictures: int, count: int, plain: bool = False) -> list[tuple[str, list[Wanted]]]:
    """Captions in full and what they ask for: looks of pretraining, `count` objects of different classes."""
    found = []
    seed = 60_000_000
    while len(found) < pictures:
        objects, background = scenes.scene_layout(seed, count)
        seed += 1
        patterned = [thing for thing in objects if thing.look.pattern != "plain"]
        if len({thing.class_word for thing in objects}) < count or (patterned if plain else len(patterned) < count):
            continue
        caption, _ = captions.describe(np.random.default_rng(seed), objects, background, "full")
        found.append((caption, [Wanted(thing.class_word, thing.look) for thing in objects]))
    return found


def errors(bench: Bench, pictures: int, counts: Sequence[int] = (1, 2, 3, 4)) -> dict[str, Any]:
    """How often the plain model fails at what it was trained for: looks it knows, named in full, 1 to 4 objects.

    "1 patterned" and "1 plain" tell whether the strict success of the metrics can be reached at all.
    """
    out = {}
    for plain in (False, True):
        for count in counts if not plain else counts[:2]:
            asked = known_scenes(pictures, count, plain)
            values = []
            for at in range(0, pictures, bench.sampling.batch):
                part = asked[at : at + bench.sampling.batch]
                result = host.sample(
                    bench.model, [host.encode_text(bench.model, text) for text, _ in part],
                    seeds=list(range(methods.REPORT_FROM + at, methods.REPORT_FROM + at + len(part))),
                    steps=bench.sampling.steps, guidance=bench.sampling.guidance,
                )  # fmt: skip
                for image, (_, things) in zip(result.images, part, strict=True):
                    values.append(judge(detect(image, tuple(t.look for t in things)), things).values)
            records = {"all": dict(enumerate(values))}
            name = f"{count} {'plain' if plain else 'patterned'}"
            out[name] = {m: interval(records, m) for m in METRICS if any(m in v for v in values)}
    return out


def pairs_of_classes(pictures: int) -> list[tuple[str, str]]:
    words = looks.CLASSES
    return [(words[i % len(words)], words[(i + 1 + i // len(words)) % len(words)]) for i in range(pictures)]


@torch.no_grad()
def grounding(bench: Bench, pictures: int) -> dict[str, Any]:
    """DESIGN's gate: a class word's share of its map on its own object (1 is a flat map), and how far two words' maps
    differ while a picture is drawn.

    share: per noise level and downscale factor, own and other object, means over scenes of two objects.
    jsd: per prompt style and step of the schedule's first half, quartiles over prompts, maps as LODA reads them.
    """
    model = bench.model
    factors = {site.name: site.downscale for site in host.network_map(model).attention}
    drawn = scenes_of(pictures, 30_000_000)
    names = ["one", "two"]
    conds = [
        host.encode_text(model, s.caption, [Concept(n, o.class_word) for n, o in zip(names, s.objects, strict=True)])
        for s in drawn
    ]
    mask = torch.stack([row_mask(c.bindings, names, c.context.shape[1]) for c in conds])
    context = torch.cat([c.context for c in conds])
    x = torch.from_numpy(np.stack([s.image for s in drawn])).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = host.encode_images(model, x)
    places = torch.from_numpy(np.stack([s.masks for s in drawn]))
    share: dict[str, Any] = {}
    for level in (300, 500, 700, 900):
        alpha = float(model.alphas_cumprod[level])
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(level))
        with host.patched(model) as patch, patch.capturing(list(factors), mask) as maps:
            found = maps  # the pass is left at the last map
            host.call_unet(model, alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise, level, context)
        for factor in sorted(set(factors.values())):
            size = level_sizes(tuple(latents.shape[-2:]))[factor]
            m = aggregate([v for k, v in found.items() if factors[k] == factor], size)
            small = F.adaptive_avg_pool2d(places, size)
            p = m / m.sum(dim=(-2, -1), keepdim=True)
            area = small.mean(dim=(-2, -1))
            own = ((p * small).sum(dim=(-2, -1)) / area).mean()
            other = ((p * small.flip(1)).sum(dim=(-2, -1)) / area.flip(1)).mean()
            share[f"level {level}, 1/{factor}"] = {"own": float(own), "other": float(other)}
    steps = bench.sampling.steps
    watch = [round(steps * part) for part in (0.0, 0.1, 0.2, 0.35, 0.5)]
    spread: dict[str, Any] = {}
    for style in ("class words", "colours"):
        rows: dict[int, list[float]] = {step: [] for step in watch}
        red, blue = ("red ", "blue ") if style == "colours" else ("", "")
        asked = [
            host.encode_text(model, f"a {red}{one} and a {blue}{two}", [Concept("one", one), Concept("two", two)])
            for one, two in pairs_of_classes(pictures)
        ]
        for at in range(0, pictures, bench.sampling.batch):
            part = asked[at : at + bench.sampling.batch]
            result = host.sample(
                model, part, seeds=list(range(at, at + len(part))), concepts=names, steps=steps,
                guidance=bench.sampling.guidance, watch=watch,
            )  # fmt: skip
            for step, m in result.watched.items():
                p = distributions(m, 0.0)
                rows[step] += jsd(p[:, 0], p[:, 1]).tolist()
        spread[style] = {
            f"step {step} of {steps}": [float(np.quantile(v, q)) for q in (0.25, 0.5, 0.75)] for step, v in rows.items()
        }
    chosen, layers = choose_layers(factors)
    return {"share": share, "jsd": spread, "read_at": f"1/{chosen}", "layers": len(layers), "scenes": pictures}
