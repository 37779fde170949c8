"""How several concepts are drawn at once: concept sets, prompts, and the arms of the laboratory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conceptsplit_core.demo.looks import CONCEPTS
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.method.divergence import DIVERGENCES, harmonic_mean, pairwise
from conceptsplit_core.method.maps import distributions
from conceptsplit_core.network.hooks import Scope
from conceptsplit_core.settings import CorrectionConfig, LodaConfig
from conceptsplit_core.text.concepts import Concept

from .confusion import backgrounds_for
from .metrics import Wanted

# --- concept sets and prompts ---------------------------------------------------------------------------------

TUNING = ("kiku", "tavi", "sumi", "lola", "runo", "dax")
REPORTING = ("bobo", "lumo", "nero", "pixa", "vento", "ozzy")
"""Settings are chosen on TUNING concepts and seeds below REPORT_FROM, numbers are reported on the others."""
REPORT_FROM = 10_000
GUIDANCES = (5, 7)
"""Beside the laboratory's own, at which LoRAs are drawn: those of usual models."""
LOOK_FROM = 0.3
"""Share of the schedule from which on "staged" words say the look."""


def concept_sets(
    split: str, size: int = 2, limit: int | None = None, same_class: bool = False
) -> list[tuple[str, ...]]:
    """Sets of concepts that show together on some background, in a fixed order that uses all concepts early."""
    names = {"tuning": TUNING, "reporting": REPORTING, "all": tuple(CONCEPTS)}[split]
    found = []
    for picked in combinations(names, size):
        classes = [CONCEPTS[name].class_word for name in picked]
        if (len(set(classes)) < size) == same_class and backgrounds_for(tuple(CONCEPTS[n].look for n in picked)):
            found.append(picked)
    order: list[tuple[str, ...]] = []
    while found:
        used = {name: sum(name in done for done in order) for name in names}
        found.sort(key=lambda s: (sum(used[name] ** 2 for name in s), s))
        order.append(found.pop(0))
    return order[:limit]


def described(name: str) -> str:
    """A concept with its article and all colours and the pattern in words."""
    concept = CONCEPTS[name]
    first, second = concept.colours
    article = "an" if first[0] in "aeiou" else "a"
    return f"{article} {first} and {second} {concept.pattern} {concept.class_word}"


def prompt_for(names: Sequence[str], seed: int, style: str) -> str:
    """The prompt of one picture. The background and the order of the concepts go with the seed.

    style: "bound" has placeholders, "plain" class words, "described" all colours and patterns in words, "staged"
    placeholders for class words that become "described" ones at `LOOK_FROM`.
    """
    fitting = backgrounds_for(tuple(CONCEPTS[name].look for name in names))
    background = fitting[(seed // 2) % len(fitting)]
    phrases = []
    for name in ordered(names, seed):
        by_style = {"bound": f"a <{name}>", "plain": f"a {CONCEPTS[name].class_word}", "staged": f"<{name}>"}
        phrases.append(by_style.get(style) or described(name))
    listed = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return f"{listed} on a {background} background"


def ordered(names: Sequence[str], seed: int) -> list[str]:
    """The concepts in the order of `prompt_for`."""
    return list(names) if seed % 2 == 0 else list(reversed(names))


def background_for(names: Sequence[str], seed: int) -> str:
    """The background word in `prompt_for`."""
    fitting = backgrounds_for(tuple(CONCEPTS[name].look for name in names))
    return fitting[(seed // 2) % len(fitting)]


def wanted_of(names: Sequence[str]) -> tuple[Wanted, ...]:
    return tuple(Wanted(CONCEPTS[name].class_word, CONCEPTS[name].look) for name in names)


# --- arms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to draw several concepts.

    recipe: how its adapters are learned, one of `learning.RECIPES`, or None; several with "+" between them go to the
    concepts of a set in turn. style: of the prompt. scope: where the adapters act; their kind's own place when None.
    both_branches: the unconditional branch binds the concepts too, at the same rows (a defect of the paper's code).
    corrected: by similarities, as T2I-Zero does. slices: each concept is given a slice of the picture as its region,
    from left to right in the order of the prompt. best_of: candidates per picture, of which the one with the best
    separated maps is taken. more_steps: factor on the sampling steps. guidance: instead of the laboratory's.
    """

    recipe: str | None = "value"
    style: str = "bound"
    strength: float = 1.0
    loda: LodaConfig | None = None
    scope: Scope | None = None
    both_branches: bool = False
    corrected: bool = False
    slices: bool = False
    best_of: int = 1
    more_steps: float = 1.0
    guidance: float | None = None

    def lessons(self, names: Sequence[str]) -> dict[str, str]:
        """Concept to the recipe of its adapter; empty without adapters."""
        return dict(zip(names, cycle(self.recipe.split("+")), strict=False)) if self.recipe else {}

    @property
    def plain(self) -> bool:
        """Neither LODA nor more compute: what loaded adapters do by themselves."""
        return self.loda is None and self.best_of == 1 and self.more_steps == 1 and not (self.corrected or self.slices)

    @property
    def cost(self) -> float:
        """Rough work of a picture in plain pictures."""
        return self.best_of * self.more_steps * (1.3 if self.loda is not None else 1.0)


@dataclass(frozen=True)
class Sampling:
    """What all arms share."""

    steps: int = 16
    guidance: float = 3.0
    batch: int = 8


def paper(steps: int) -> LodaConfig:
    """The paper's settings. Its 10 of 50 steps are a fifth of the schedule, its 7-tap Gaussian has about σ 1.4."""
    return LodaConfig(
        loda_steps=max(1, round(steps / 5)), loda_iterations=10, loda_strength=20.0, loda_rule="gradient",
        divergence="kl", threshold=3.0, map_smoothing=1.4, afg=True, afg_inside=3.0, afg_outside=1e8, afg_region=0.1,
        afg_smoothing=1.5, afg_end=1.0, afg_rule="top",
    )  # fmt: skip


def arms(loda: LodaConfig, steps: int = Sampling.steps) -> dict[str, Arm]:
    """All arms by name; `loda` is the setting under test, `steps` those of the sampler."""
    off, on = replace(loda, afg=False), replace(loda, afg=True)
    planned = replace(on, loda_steps=0, plan_steps=max(1, round(0.3 * steps)))
    still = replace(off, loda_strength=0.0)
    table = {
        "base": Arm(None, "plain"),
        "described": Arm(None, "described"),
        "lora_merged": Arm("lora", scope="everywhere"),
        "lora_key_value": Arm("lora_key_value"),
        "tara": Arm("tara"),
        "perfusion": Arm("perfusion"),
        "tova": Arm(),
        "tok_key": Arm("key"),
        "tok_key_value": Arm("key_value"),
        "tova_loda": Arm(loda=off),
        "tova_afg": Arm(loda=replace(on, loda_strength=0.0)),
        "tova_loda_afg": Arm(loda=on),
        "tova_loda_afg_hard": Arm(loda=replace(on, afg_outside=1e8, afg_end=1.0)),
        # Ordinary LoRAs, each in its concept's region: a plan with LODA, or a longer one without.
        "lora_routed": Arm("lora", loda=on),
        "lora_routed_no_loda": Arm("lora", loda=planned),
        "lora_routed_plain_plan": Arm("lora", loda=replace(on, plan_guidance=False)),
        "lora_routed_no_loda_plain_plan": Arm("lora", loda=replace(planned, plan_guidance=False)),
        "lora_routed_undivided": Arm("lora", loda=replace(on, afg_rule="top", area_rule="argmax")),
        "lora_routed_more_updates": Arm("lora", loda=replace(on, loda_iterations=6)),
        "lora_routed_slices": Arm("lora", loda=replace(on, loda_steps=0), slices=True),
        # LoRAs that change feed-forward layers and convolutions besides, and a LoRA beside a value adapter.
        "lora_whole_merged": Arm("lora_whole", scope="everywhere"),
        "lora_whole_routed": Arm("lora_whole", loda=on),
        "lora_and_value": Arm("lora+value", loda=on),
        "lora_as_routed": Arm("lora_as_routed", loda=on),
        "lora_as_routed_masked": Arm("lora_as_routed_masked", loda=on),
        # More of LODA, for more concepts.
        "tova_loda_afg_longer": Arm(loda=replace(on, loda_steps=max(1, round(0.3 * steps)))),
        "tova_loda_afg_more_updates": Arm(loda=replace(on, loda_iterations=6)),
        "tova_loda_afg_larger": Arm(loda=replace(on, loda_strength=2 * on.loda_strength)),
        "tova_loda_afg_guided": Arm(loda=on, guidance=4.5),
        "base_loda_afg": Arm(None, "plain", loda=on),
        "described_loda_afg": Arm(None, "described", loda=on),
        "lora_merged_loda_afg": Arm("lora", scope="everywhere", loda=on),
        "tara_loda_afg": Arm("tara", loda=on),
        "perfusion_loda_afg": Arm("perfusion", loda=on),
        "tok_key_value_loda_afg": Arm("key_value", loda=on),
        # Every kind as the trainer makes it and a loader draws it: alone, and with others.
        "lora_routed_alone": Arm("lora"),
        "lora_kind": Arm("lora_kind"),
        "lora_kind_loda_afg": Arm("lora_kind", loda=on),
        "tara_kind": Arm("tara_kind"),
        "tara_kind_loda_afg": Arm("tara_kind", loda=on),
        "tok_key_loda_afg": Arm("key", loda=on),
        "lora_key_value_loda_afg": Arm("lora_key_value", loda=on),
        "infusion": Arm("infusion"),
        "infusion_loda_afg": Arm("infusion", loda=on),
        "para": Arm("para"),
        "para_loda_afg": Arm("para", loda=on),
        "paper_code": Arm(loda=paper(steps), both_branches=True),
        "paper_mended": Arm(loda=paper(steps)),
        "tova_best_of_3": Arm(best_of=3, loda=off),
        "tova_more_steps": Arm(more_steps=2.0),
        # Beyond the paper.
        "tova_loda_sign": Arm(loda=replace(off, loda_rule="sign")),
        "tova_loda_raw": Arm(loda=replace(off, loda_rule="gradient", loda_strength=20.0)),
        "tova_loda_afg_overlapping": Arm(loda=replace(on, afg_rule="overlapping")),
        "tova_loda_afg_undivided": Arm(loda=replace(on, afg_rule="top")),
        "tova_masked": Arm("value_masked"),
        "tova_masked_loda_afg": Arm("value_masked", loda=on),
        "tova_attention_masked": Arm("value_attention_masked"),
        "tova_attention_masked_loda_afg": Arm("value_attention_masked", loda=on),
        "tova_similarities": Arm(corrected=True),
        "tova_suppression": Arm(loda=replace(still, suppression=1.0)),
        "tova_loda_suppression": Arm(loda=replace(off, suppression=1.0)),
        "tova_loda_afg_reuse": Arm(loda=replace(on, encoder_reuse=0.4)),
        "described_in_stages": Arm(None, "staged"),
    }
    # LoRAs that guidance multiplies by 3 at most (the default), not at all, and without limit.
    alone = replace(off, loda_steps=0)
    table["lora_alone"] = Arm("lora", loda=alone)
    for kind, config in (("routed", on), ("alone", alone)):
        unguided, conditional = (replace(config, lora_guidance=most) for most in (1.0, 100.0))
        table[f"lora_{kind}_unguided"] = Arm("lora", loda=unguided)
        for guidance in GUIDANCES:
            at = f"_guidance_{guidance}"
            table[f"lora_merged{at}"] = replace(table["lora_merged"], guidance=guidance)
            for name, chosen in (("", config), ("_unguided", unguided), ("_conditional", conditional)):
                table[f"lora_{kind}{name}{at}"] = Arm("lora", loda=chosen, guidance=guidance)
    for divergence in DIVERGENCES:
        table[f"tova_loda_{divergence}"] = Arm(loda=replace(off, divergence=divergence, threshold=0.0))
    return table


def _concepts(names: Sequence[str], style: str = "bound") -> list[Concept]:
    if style == "staged":
        return [Concept(name, f"a {CONCEPTS[name].class_word}; {LOOK_FROM}: {described(name)}") for name in names]
    return [Concept(name, CONCEPTS[name].class_word) for name in names]


def slices_of(names: Sequence[str], seeds: Sequence[int], size: tuple[int, int]) -> dict[str, Tensor]:
    """Concept to its slice of each picture, [B, h, w] in 0…1: equal ones from left to right, in the prompt's order."""
    masks = {name: torch.zeros(len(seeds), *size) for name in names}
    for at, seed in enumerate(seeds):
        for place, name in enumerate(ordered(names, seed)):
            left, right = (round(size[1] * one / len(names)) for one in (place, place + 1))
            masks[name][at, :, left:right] = 1.0
    return masks


def conditioning(model: host.DiffusersModel, names: Sequence[str], seed: int, style: str) -> host.Conditioning:
    """The encoded prompt of one picture; described concepts are bound to their class words for LODA."""
    concepts = _concepts(names, style)
    if seed % 2 and style not in ("bound", "staged"):
        concepts.reverse()  # without placeholders the n-th word of a class goes to the n-th concept
    return host.encode_text(model, prompt_for(names, seed, style), concepts)


def draw(
    model: host.DiffusersModel,
    arm: Arm,
    names: Sequence[str],
    seeds: Sequence[int],
    learned: Mapping[str, Any],
    sampling: Sampling,
    texts: Sequence[str] | None = None,
) -> tuple[np.ndarray, list[dict[str, float]]]:
    """Pictures uint8 [B, H, W, 3] of one arm, one per seed, and what LODA did to each.

    `texts` replaces the prompts, one per seed; the concepts' adapters stay loaded.
    """
    positive = [conditioning(model, names, seed, arm.style) for seed in seeds]
    if texts is not None:
        positive = [host.encode_text(model, text, _concepts(names)) for text in texts]
    if arm.corrected:
        positive = [host.with_correction(cond, CorrectionConfig(1.0)) for cond in positive]
    if not arm.both_branches:
        return _drawn(model, arm, names, seeds, positive, "", learned, sampling)
    # A negative prompt binds the same rows in every picture: one call for each order of the words.
    order = [tuple((b.concept, b.rows) for b in cond.bindings) for cond in positive]
    drawn: dict[int, tuple[np.ndarray, dict[str, float]]] = {}
    for rows in dict.fromkeys(order):
        chosen = [i for i, own in enumerate(order) if own == rows]
        negative = replace(host.encode_text(model, ""), bindings=positive[chosen[0]].bindings)
        images, facts = _drawn(
            model, arm, names, [seeds[i] for i in chosen], [positive[i] for i in chosen], negative, learned, sampling
        )
        drawn |= dict(zip(chosen, zip(images, facts, strict=True), strict=True))
    return np.stack([drawn[i][0] for i in range(len(seeds))]), [drawn[i][1] for i in range(len(seeds))]


def _drawn(
    model: host.DiffusersModel,
    arm: Arm,
    names: Sequence[str],
    seeds: Sequence[int],
    positive: Sequence[host.Conditioning],
    negative: host.Conditioning | str,
    learned: Mapping[str, Any],
    sampling: Sampling,
) -> tuple[np.ndarray, list[dict[str, float]]]:
    loda = arm.loda
    if arm.best_of > 1 and loda is not None:
        # Looks at the maps as LODA would and moves nothing: every divergence is above this threshold.
        loda = replace(loda, threshold=1e-12, loda_iterations=1, afg=False, loda_strength=max(loda.loda_strength, 1e-3))
    options: dict[str, Any] = {
        "concepts": list(names), "steps": round(sampling.steps * arm.more_steps), "loda": loda,
        "guidance": sampling.guidance if arm.guidance is None else arm.guidance,
        "adapters": {name: (learned[name], arm.strength) for name in names} if arm.recipe else {},
        "scopes": dict.fromkeys(names, arm.scope) if arm.scope else None,
        "masks": slices_of(names, seeds, (model.default_size, model.default_size)) if arm.slices else None,
    }  # fmt: skip
    best: np.ndarray | None = None
    scores = np.full(len(seeds), -np.inf)
    facts: list[dict[str, float]] = [{} for _ in seeds]
    for candidate in range(arm.best_of):
        result = host.sample(model, positive, negative, seeds=[s + 1_000_003 * candidate for s in seeds], **options)
        trace = result.trace
        score = np.zeros(len(seeds))
        if trace is not None and trace.divergences:
            score = harmonic_mean(trace.divergences[-1][1]).numpy()
            first, last = _divergence(trace.before), _divergence(trace.after)
            for i, fact in enumerate(facts):
                fact |= {"jsd_before": float(first[i]), "jsd_after": float(last[i])}
        if best is None:
            best, scores = result.images, score
        else:
            better = score > scores
            best[better], scores[better] = result.images[better], score[better]
    assert best is not None
    return best, facts


def _divergence(maps: Tensor | None) -> np.ndarray:
    """JSD of maps [B, n, h, w] as LODA sees them by default, harmonic mean over pairs."""
    assert maps is not None
    return harmonic_mean(pairwise(distributions(maps, 1.0), "jsd")).numpy()
