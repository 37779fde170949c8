"""Looks for LODA and AFG settings on tuning concepts and seeds, one setting at a time, then the best ones together.

One-at-a-time curves show how sensitive a result is to each setting, which a search for the maximum does not.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from conceptsplit_core.loda import LodaConfig

from . import methods, run
from .methods import Arm

FIRST_SEED = 100

LODA_SWEEP: dict[str, tuple[Any, ...]] = {
    "step_size": (0.02, 0.05, 0.1, 0.2),
    "steps": (2, 4, 8),
    "iterations": (1, 3, 6),
    "divergence": ("jsd", "symmetric_kl", "bhattacharyya", "kl"),
    "map_downscale": (1, 2),
    "threshold": (0.2, 0.45, 0.6),
    "smooth_sigma": (0.0, 1.0),
}
AFG_SWEEP: dict[str, tuple[Any, ...]] = {
    "afg_negative": (-1e8, -4.0, -1.0, 0.0),
    "afg_positive": (0.0, 1.0, 3.0),
    "afg_fraction": (0.1, 0.2, 0.3),
    "afg_end": (0.4, 0.7, 1.0),
}


def variants(loda: LodaConfig, strength: float) -> dict[str, Arm]:
    """Arms of a sweep: the plain ones, then each setting of `loda` changed alone, without AFG and with it."""
    base = replace(loda, afg=False)
    out = {"tova": Arm(strength=strength), "loda": Arm(loda=base, strength=strength)}
    for name, values in LODA_SWEEP.items():
        for value in values:
            changed = replace(base, **{name: value})
            if name == "divergence":
                changed = replace(changed, threshold=0.0)
            if changed != base:
                out[f"loda {name}={value}"] = Arm(loda=changed, strength=strength)
    with_afg = replace(loda, afg=True)
    out["loda_afg"] = Arm(loda=with_afg, strength=strength)
    out["afg"] = Arm(loda=replace(with_afg, step_size=0.0), strength=strength)
    for name, values in AFG_SWEEP.items():
        for value in values:
            changed = replace(with_afg, **{name: value})
            if changed != with_afg:
                out[f"loda_afg {name}={value}"] = Arm(loda=changed, strength=strength)
    return out


def main(
    bench: run.Bench,
    loda: LodaConfig,
    pairs: int,
    seeds: int,
    minutes: float,
    resume: bool,
    out: Path,
    strength: float,
    workers: int = 1,
) -> dict[str, Any]:
    """Runs the sweep and writes it; returns what was written."""
    began = time.perf_counter()
    sets = methods.concept_sets("tuning", 2, pairs)
    numbers = list(range(FIRST_SEED, FIRST_SEED + seeds))
    arms = variants(loda, strength)
    results = run.run(bench, arms, sets, numbers, resume, minutes, workers)
    done = {name: r for name, r in results.items() if r}
    data = {
        "model": bench.digest,
        "sampling": asdict(bench.sampling),
        "learning": asdict(bench.learning),
        "sets": ["+".join(s) for s in sets],
        "seeds": {"first": FIRST_SEED, "count": seeds},
        "start": asdict(loda),
        "settings": {name: asdict(arm) for name, arm in arms.items()},
        "arms": run.summary(done),
        "against_tova": run.comparisons(done, [(name, "tova") for name in done if name != "tova"]),
        "seconds": time.perf_counter() - began,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(run.table(data["arms"]))
    return data
