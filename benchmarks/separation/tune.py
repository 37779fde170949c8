"""Looks for LODA and AFG settings on tuning concepts and seeds, one setting at a time, then the best ones together.

One-at-a-time curves show how sensitive a result is to each setting, which a search for the maximum does not. Settings
are ranked by `score`, the mean of strict and generous success and of the shares of concepts that are right: with a few
dozen pictures a setting, success alone is too coarse to rank anything.

The best of forty settings is partly the luckiest one. So the first few are drawn again with seeds that ranked nothing,
what helps there is put together, and only what beats the start there is chosen.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from conceptsplit_core.settings import LodaConfig

from . import methods, report, run
from .methods import Arm
from .metrics import difference, interval

FIRST_SEED = 100
SCORED = ("success", "concepts_right", "loose_success", "loose_right")
DEFAULT_PAIRS, DEFAULT_SEEDS = 3, 16
FINAL_SEED, FINALISTS, FINAL_FACTOR = 1000, 6, 4
"""Of the second look: first seed, how many settings besides the start, seeds in multiples of the first look's."""

SWEEP: dict[str, tuple[Any, ...]] = {
    "loda_strength": (0.01, 0.02, 0.04, 0.08),
    "loda_steps": (0.1, 0.2, 0.3, 0.5),  # share of the schedule
    "loda_iterations": (1, 3, 6),
    "divergence": ("jsd", "symmetric_kl", "bhattacharyya", "kl"),
    "map_downscale": (1,),  # automatic is 2 on the demo model
    "threshold": (0.2, 0.6),  # automatic is 0.45 for JSD
    "map_smoothing": (0.0, 1.0, 2.0),
    "afg": (False, True),
    "afg_outside": (1e8, 8.0, 3.0, 1.0, 0.0),
    "afg_inside": (0.0, 1.0, 3.0),
    "afg_region": (0.1, 0.2, 0.3),
    "afg_end": (0.4, 0.7, 1.0),
}
STRENGTHS, GUIDANCES = (0.7, 1.3), (1.5, 2.0, 4.5, 6.0)

OF_0_1_0 = {
    "steps": "loda_steps", "iterations": "loda_iterations", "step_size": "loda_strength", "step_rule": "loda_rule",
    "smooth_sigma": "map_smoothing", "afg_positive": "afg_inside", "afg_negative": "afg_outside",
    "afg_fraction": "afg_region", "afg_sigma": "afg_smoothing",
}  # fmt: skip
"""Settings as result files of version 0.1.0 name them; what AFG takes outside is negative there."""


def chosen_settings(path: Path) -> dict[str, Any]:
    """Fields of LodaConfig that a tuning file has chosen."""
    chosen = json.loads(path.read_text(encoding="utf-8"))["chosen"]
    return {OF_0_1_0.get(k, k): abs(v) if k == "afg_negative" else v for k, v in chosen.items()}


def changed(loda: LodaConfig, field: str, value: Any, steps: int) -> LodaConfig:
    """`loda` with one field of the sweep set."""
    if field == "loda_steps":
        return replace(loda, loda_steps=max(1, round(value * steps)))
    if field == "divergence":
        return replace(loda, divergence=value, threshold=0.0)
    return replace(loda, **{field: value})


def variants(loda: LodaConfig, strength: float, steps: int) -> dict[str, Arm]:
    """Arms of the sweep by name; "start" is `loda` with AFG."""
    start = replace(loda, afg=True)
    out = {"tova": Arm(strength=strength), "afg": Arm(loda=replace(start, loda_strength=0.0), strength=strength)}
    out["start"] = Arm(loda=start, strength=strength)
    seen = {start}
    for field, values in SWEEP.items():
        for value in values:
            other = changed(start, field, value, steps)
            if other not in seen:
                seen.add(other)
                out[f"{field}={value}"] = Arm(loda=other, strength=strength)
    for value in STRENGTHS:
        out[f"tova strength={value}"] = Arm(strength=value * strength)
    for value in GUIDANCES:
        out[f"tova guidance={value}"] = Arm(strength=strength, guidance=value)
    return out


def scored(results: run.Results) -> run.Results:
    """The same records with `score` in each picture."""
    for records in results.values():
        for pictures in records.values():
            for values in pictures.values():
                values["score"] = sum(values[m] for m in SCORED) / len(SCORED)
    return results


def gains(results: run.Results, against: str) -> dict[str, dict[str, float]]:
    """Paired difference in score to one arm, with its interval."""
    return {name: difference(records, results[against], "score") for name, records in results.items() if records}


def worth(gain: dict[str, float]) -> bool:
    """Better by more than half the interval's half-width, about one standard error."""
    return gain["mean"] > (gain["hi"] - gain["lo"]) / 4 > 0


def together(loda: LodaConfig, gained: dict[str, dict[str, float]], strength: float, steps: int) -> dict[str, Arm]:
    """The settings that helped by themselves, added one by one, the most helpful first; one value a field."""
    best: dict[str, tuple[float, str]] = {}
    for name, gain in gained.items():
        field = name.partition("=")[0]
        if field in SWEEP and worth(gain) and gain["mean"] > best.get(field, (0.0, ""))[0]:
            best[field] = (gain["mean"], name)
    out: dict[str, Arm] = {}
    now = replace(loda, afg=True)
    order = sorted(best, key=lambda f: -best[f][0])
    for count, field in enumerate(order[:4]):
        value = next(v for v in SWEEP[field] if f"{field}={v}" == best[field][1])
        now = changed(now, field, value, steps)
        if count:
            out["together " + ", ".join(best[f][1] for f in order[: count + 1])] = Arm(loda=now, strength=strength)
    return out


def sensitivity(results: run.Results, gained: dict[str, dict[str, float]]) -> str:
    lines = ["| setting | success | concepts right | loose success | loose leak | JSD after | score − start |",
             "|---" * 7 + "|"]  # fmt: skip
    for name, records in results.items():
        if not records:
            continue
        cell = lambda m, records=records: report._cell(interval(records, m, 200))
        gain = gained[name]
        apart = interval(records, "jsd_after", 20)["mean"]
        shown = "–" if math.isnan(apart) else f"{apart:.2f}"
        lines.append(
            f"| {name} | {cell('success')} | {cell('concepts_right')} | {cell('loose_success')} | {cell('loose_leak')} "
            f"| {shown} | {100 * gain['mean']:+.0f} ({100 * gain['lo']:+.0f} to {100 * gain['hi']:+.0f}) |"
        )
    return "\n".join(lines)


def main(
    bench: run.Bench, loda: LodaConfig, args: argparse.Namespace, until: float, out: Path, page: Path | None
) -> dict[str, Any]:
    """Runs the sweep and writes it; returns what was written."""
    began = time.perf_counter()
    pairs = args.pairs or (1 if args.quick else DEFAULT_PAIRS)
    seeds = args.seeds or (4 if args.quick else DEFAULT_SEEDS)
    sets = methods.concept_sets("tuning", 2, pairs)
    numbers = list(range(FIRST_SEED, FIRST_SEED + seeds))
    steps = bench.sampling.steps
    arms = variants(loda, args.strength, steps)
    if args.fresh:
        run.forget(bench, run.jobs_of(arms, sets, numbers))
    # Two fifths of the time are kept for the combinations and the second look.
    left = until - time.time()
    run.carry_out(bench, run.jobs_of(arms, sets, numbers), args.workers, time.time() + 0.6 * left)
    results = scored(run.collect(bench, arms, sets, numbers))
    more = together(loda, gains(results, "start"), args.strength, steps) if results["start"] else {}
    if more:
        run.carry_out(bench, run.jobs_of(more, sets, numbers), args.workers, until)
        arms |= more
        results = scored(run.collect(bench, arms, sets, numbers))
    gained = gains(results, "start") if results["start"] else {}
    settings = [name for name in gained if arms[name].loda is not None]
    finalists = ["start", *sorted((s for s in settings if s != "start"), key=lambda s: -gained[s]["mean"])[:FINALISTS]]
    final_arms = {name: arms[name] for name in finalists} if gained else {}
    final_numbers = list(range(FINAL_SEED, FINAL_SEED + FINAL_FACTOR * seeds))
    if args.fresh:
        run.forget(bench, run.jobs_of(final_arms, sets, final_numbers))
    run.carry_out(bench, run.jobs_of(final_arms, sets, final_numbers), args.workers, until)
    finals = scored(run.collect(bench, final_arms, sets, final_numbers))
    if finals.get("start"):
        # What holds up is put together once more.
        more = together(loda, gains(finals, "start"), args.strength, steps)
        final_arms |= {name: arm for name, arm in more.items() if arm not in final_arms.values()}
        run.carry_out(bench, run.jobs_of(final_arms, sets, final_numbers), args.workers, until)
        finals = scored(run.collect(bench, final_arms, sets, final_numbers))
        arms |= final_arms
    final_gained = gains(finals, "start") if finals.get("start") else {}
    best = max(final_gained, key=lambda name: final_gained[name]["mean"], default="start")
    if best not in final_gained or not worth(final_gained[best]):
        best = "start"
    chosen = arms[best].loda
    assert chosen is not None
    default = asdict(LodaConfig())
    data = {
        "machine": report.machine(),
        "model": report.described(bench),
        "sampling": asdict(bench.sampling),
        "learning": asdict(bench.learning),
        "sets": ["+".join(s) for s in sets],
        "seeds": {"first": FIRST_SEED, "count": seeds},
        "start": asdict(loda),
        "scored": SCORED,
        "best": best,
        "chosen": {k: v for k, v in asdict(chosen).items() if v != default[k]} | {"loda_steps": chosen.loda_steps},
        "chosen_share_of_schedule": chosen.loda_steps / steps,
        "settings": {name: asdict(arm) for name, arm in arms.items()},
        "arms": report.summary(results, 300),
        "score_against_start": gained,
        "finals": {
            "seeds": {"first": FINAL_SEED, "count": len(final_numbers)},
            "arms": report.summary(finals, 300),
            "score_against_start": final_gained,
        },
        "seconds": time.perf_counter() - began,
    }
    report.write(out, data)
    shown = sensitivity(results, gained)
    if final_gained:
        shown += (
            f"\n\nThe first {FINALISTS} again and together, with {len(final_numbers)} seeds from {FINAL_SEED} each. "
            f"Chosen: {best}.\n\n{sensitivity(finals, final_gained)}"
        )
    print(shown)
    bench.say(f"best: {best}; chosen {data['chosen']}; written to {out}")
    if page is not None:
        facts = (
            f"Model weights `{bench.digest}`, {', '.join(data['sets'])}, {seeds} seeds from {FIRST_SEED} each, "
            f"{steps} steps, guidance {bench.sampling.guidance:g}."
        )
        report.fill(page, {"tuning": f"{facts}\n\n{shown}"})
    return data
