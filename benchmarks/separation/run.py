"""Runs arms on concept sets and seeds, keeps every picture's numbers, and writes the report.

What is measured is kept per (arm, concept set) under out/separation, named by everything it depends on, so a run that
was stopped goes on where it was (`--resume`), and more seeds or arms add to what is there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from conceptsplit_core.adapters import ValueAdapter
from conceptsplit_core.demo.scenes import BACKGROUNDS
from conceptsplit_core.hosts import diffusers as host

from . import confusion, methods
from .detector import background_of, detect
from .methods import Arm, Learning, Sampling
from .metrics import METRICS, difference, interval, judge, mcnemar, wanted_matrix

CACHE = Path("out/separation")
VERSION = 1
"""Raised when the detector or the metrics change, so that old records are not mixed with new ones."""

Say = Callable[[str], None]


@dataclass
class Bench:
    """A model with the lab's settings and what has been learned on it."""

    model: host.DiffusersModel
    sampling: Sampling = field(default_factory=Sampling)
    learning: Learning = field(default_factory=Learning)
    cache: Path = CACHE
    say: Say = print

    def __post_init__(self) -> None:
        self.digest = methods.fingerprint(self.model)
        self._learned: dict[tuple[str, str], ValueAdapter] = {}

    def learned(self, names: Sequence[str], kind: str) -> dict[str, ValueAdapter]:
        """Adapters of a kind for the concepts, trained when they are first asked for."""
        for name in names:
            if (name, kind) not in self._learned:
                began = time.perf_counter()
                folder = self.cache / "adapters"
                self._learned[name, kind] = methods.learn(self.model, name, kind, self.learning, folder)
                if time.perf_counter() - began > 1:
                    self.say(f"learned {name} ({kind}) in {time.perf_counter() - began:.0f} s")
        return {name: self._learned[name, kind] for name in names}


Key = tuple[str, ...]


def record_path(bench: Bench, arm: Arm, names: Key) -> Path:
    """Where the records of an arm on a concept set are kept."""
    facts = [VERSION, bench.digest, asdict(bench.sampling) | {"batch": 0}, asdict(bench.learning), asdict(arm), names]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return bench.cache / "records" / f"{digest}.json"


def measure_picture(image: np.ndarray, names: Key, seed: int) -> tuple[dict[str, float], list[list[int]]]:
    """All metrics of one picture, the distance of its background to the asked one included (0..1)."""
    wanted = methods.wanted_of(names)
    judged = judge(detect(image, tuple(w.look for w in wanted)), wanted)
    asked = np.array(BACKGROUNDS[methods.background_for(names, seed)], float)
    judged.values["background_error"] = float(np.linalg.norm(background_of(image) - asked) / 441.7)
    return judged.values, judged.leaks


def run_arm(
    bench: Bench, name: str, arm: Arm, names: Key, seeds: Sequence[int], resume: bool, samples: int = 4
) -> dict[int, dict[str, Any]]:
    """Records of one arm on one concept set, seed to values; draws only what is missing when resuming."""
    path = record_path(bench, arm, names)
    kept: dict[int, dict[str, Any]] = {}
    if resume and path.exists():
        kept = {int(k): v for k, v in json.loads(path.read_text())["records"].items()}
    missing = [seed for seed in seeds if seed not in kept]
    if missing and arm.kind:
        bench.learned(names, arm.kind)
    for at in range(0, len(missing), bench.sampling.batch):
        chunk = missing[at : at + bench.sampling.batch]
        learned = bench.learned(names, arm.kind) if arm.kind else {}
        began = time.perf_counter()
        images, facts = methods.draw(bench.model, arm, names, chunk, learned, bench.sampling)
        seconds = (time.perf_counter() - began) / len(chunk)
        for image, seed, fact in zip(images, chunk, facts, strict=True):
            values, leaks = measure_picture(image, names, seed)
            kept[seed] = {**values, **fact, "seconds": seconds, "leaks": leaks}
        if at == 0:
            _save_strip(images[:samples], path.with_suffix(".png"))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"arm": name, "settings": asdict(arm), "set": names, "records": kept}))
        part.replace(path)
    return {seed: kept[seed] for seed in seeds}


def _save_strip(images: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(list(images), axis=1)).save(path)


Results = dict[str, dict[str, dict[int, dict[str, Any]]]]
"""Arm to concept set to seed to values."""


def run(
    bench: Bench,
    arms: Mapping[str, Arm],
    sets: Sequence[Key],
    seeds: Sequence[int],
    resume: bool,
    minutes: float = math.inf,
) -> Results:
    """All arms on all sets, set by set, so that whatever is finished when time is up is balanced over arms."""
    results: Results = {name: {} for name in arms}
    began = time.perf_counter()
    for names in sets:
        if time.perf_counter() - began > 60 * minutes:
            bench.say(f"time is up before {' + '.join(names)}")
            break
        for name, arm in arms.items():
            records = run_arm(bench, name, arm, names, seeds, resume)
            results[name]["+".join(names)] = records
        shown = ", ".join(
            f"{name} {np.mean([r['success'] for r in results[name]['+'.join(names)].values()]):.0%}" for name in arms
        )
        bench.say(f"{' + '.join(names)}: success {shown}")
    return results


# --- reports --------------------------------------------------------------------------------------------------

SHOWN = (*METRICS, "background_error", "jsd_before", "jsd_after", "seconds")


def summary(results: Results, rounds: int = 1000) -> dict[str, Any]:
    """Per arm: every metric with its interval, over seeds and over concept sets; the mean leak matrix entries."""
    out: dict[str, Any] = {}
    for name, records in results.items():
        if not records:
            continue
        table: dict[str, Any] = {"pictures": sum(len(r) for r in records.values()), "sets": len(records)}
        for metric in SHOWN:
            if not any(metric in values for r in records.values() for values in r.values()):
                continue
            table[metric] = interval(records, metric, rounds)
            if metric in ("success", "leak", "omission", "fidelity"):
                wide = interval(records, metric, rounds, over_sets=True)
                table[metric] |= {"lo_sets": wide["lo"], "hi_sets": wide["hi"]}
        table["leak_matrix"] = wanted_matrix(records)
        out[name] = table
    return out


def comparisons(results: Results, pairs: Sequence[tuple[str, str]], rounds: int = 1000) -> dict[str, Any]:
    """Paired differences and McNemar tests of named arms."""
    out = {}
    for one, other in pairs:
        if results.get(one) and results.get(other):
            out[f"{one} - {other}"] = {
                **{m: difference(results[one], results[other], m, rounds) for m in ("success", "leak", "omission",
                                                                                   "fidelity", "concepts_right")},
                "mcnemar": mcnemar(results[one], results[other]),
            }  # fmt: skip
    return out


def table(summed: Mapping[str, Any]) -> str:
    """The summary as a Markdown table, percentages with their intervals over seeds."""
    columns = ("success", "concepts_right", "omission", "leak", "blend", "unique_binding", "fidelity", "odd_shape")
    lines = [
        "| arm | pictures | " + " | ".join(c.replace("_", " ") for c in columns) + " | s/picture |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for name, row in summed.items():
        cells = [f"{100 * row[c]['mean']:.0f} ({100 * row[c]['lo']:.0f}–{100 * row[c]['hi']:.0f})" for c in columns]
        lines.append(f"| {name} | {row['pictures']} | " + " | ".join(cells) + f" | {row['seconds']['mean']:.2f} |")
    return "\n".join(lines)


def grid(bench: Bench, arms: Mapping[str, Arm], sets: Sequence[Key], path: Path, per: int = 2) -> None:
    """One picture: a row per arm, `per` seeds of each concept set per column, the same noise down a column."""
    side, left, top = 128, 170, 30
    columns = len(sets) * per
    sheet = Image.new("RGB", (left + columns * side, top + len(arms) * side), "white")
    pen = ImageDraw.Draw(sheet)
    for c, names in enumerate(sets):
        pen.text((left + c * per * side + 4, 8), " + ".join(names), fill="black")
        for r, (name, arm) in enumerate(arms.items()):
            strip = record_path(bench, arm, names).with_suffix(".png")
            if strip.exists():
                picture = Image.open(strip)
                sheet.paste(picture.crop((0, 0, per * side, side)), (left + c * per * side, top + r * side))
            if c == 0:
                pen.text((4, top + r * side + side // 2), name, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def vae_round_trip(model: host.DiffusersModel) -> Callable[[np.ndarray], np.ndarray]:
    """Pictures through the model's autoencoder and back."""

    def passed(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        return host.decode_latents(model, host.encode_images(model, x))

    return passed


def report(
    bench: Bench,
    arms: Mapping[str, Arm],
    sets: Sequence[Key],
    seeds: Sequence[int],
    results: Results,
    drawings: int,
    extra: Mapping[str, Any] | None = None,
    rounds: int = 1000,
) -> dict[str, Any]:
    """Everything that goes into the JSON file."""
    described = {"unet_parameters": sum(p.numel() for p in bench.model.unet.parameters())}
    return {
        "what_this_shows": "The mechanism on a small model of drawn shapes; nothing about photographic quality.",
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__,
                    "threads": torch.get_num_threads()},
        "model": {"source": bench.model.source, "weights": bench.digest, "family": bench.model.family, **described},
        "learning": asdict(bench.learning),
        "sampling": asdict(bench.sampling),
        "split": {"tuning": methods.TUNING, "reporting": methods.REPORTING, "reported_seeds_from": methods.REPORT_FROM},
        "sets": ["+".join(s) for s in sets],
        "seeds": {"first": min(seeds), "count": len(seeds)},
        "detector": confusion.report(drawings, 1, vae_round_trip(bench.model)) if drawings else None,
        "settings": {name: asdict(arm) for name, arm in arms.items()},
        "arms": summary(results, rounds),
        "comparisons": comparisons(results, [
            ("tova", "lora_merged"), ("tova_loda", "tova"), ("tova_afg", "tova"), ("tova_loda_afg", "tova"),
            ("tova_loda_afg", "lora_merged"), ("tova_loda_afg", "paper_code"), ("tova", "tok_key"),
            ("tova", "tok_key_value"), ("tova_best_of_3", "tova"), ("tova_more_steps", "tova"),
            ("described_loda_afg", "described"),
        ], rounds),
        **(extra or {}),
    }  # fmt: skip
