"""Runs arms on concept sets and seeds, keeps every picture's numbers, and writes the report.

What is measured is kept per (arm, concept set) under out/separation, named by everything it depends on, so a run that
was stopped goes on where it was (`--resume`), and more seeds or arms add to what is there.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from conceptsplit_core.adapters import ValueAdapter
from conceptsplit_core.demo.scenes import BACKGROUNDS, CLASSES, CONCEPTS, describe, scene_layout
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.loda import LodaConfig

from . import confusion, methods
from .detector import background_of, detect
from .methods import Arm, Learning, Sampling
from .metrics import METRICS, Wanted, difference, interval, judge, mcnemar, wanted_matrix

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
    workers: int = 1,
) -> Results:
    """All arms on all sets, set by set, so that whatever is finished when time is up is balanced over arms.

    Args:
        minutes: no further concept set is started after this time.
        workers: processes of one thread each; on a few cores they draw faster than one process of several threads.
    """
    began = time.perf_counter()
    if workers > 1:
        _run_in_workers(bench, arms, sets, seeds, resume, minutes, workers)
        minutes, resume = math.inf, True  # what follows only collects
        sets = [names for names in sets if all(_complete(bench, arm, names, seeds) for arm in arms.values())]
    results: Results = {name: {} for name in arms}
    for names in sets:
        if time.perf_counter() - began > 60 * minutes:
            bench.say(f"time is up before {' + '.join(names)}")
            break
        for name, arm in arms.items():
            results[name]["+".join(names)] = run_arm(bench, name, arm, names, seeds, resume)
        shown = ", ".join(
            f"{name} {np.mean([r['success'] for r in results[name]['+'.join(names)].values()]):.0%}" for name in arms
        )
        bench.say(f"{' + '.join(names)}: success {shown}")
    return results


def _complete(bench: Bench, arm: Arm, names: Key, seeds: Sequence[int]) -> bool:
    path = record_path(bench, arm, names)
    return path.exists() and {str(s) for s in seeds} <= set(json.loads(path.read_text())["records"])


def _run_in_workers(
    bench: Bench, arms: Mapping[str, Arm], sets: Sequence[Key], seeds: Sequence[int], resume: bool, minutes: float,
    workers: int,
) -> None:  # fmt: skip
    until = time.time() + 60 * minutes
    if not resume:
        for names in sets:
            for arm in arms.values():
                record_path(bench, arm, names).unlink(missing_ok=True)
    settings = (bench.model.source, bench.digest, bench.sampling, bench.learning, bench.cache)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=settings) as pool:
        # Adapters first, each by one worker only.
        kinds = sorted({arm.kind for arm in arms.values() if arm.kind})
        concepts = list(dict.fromkeys(name for names in sets for name in names))
        for line in pool.map(_learn_job, [(name, kind) for kind in kinds for name in concepts]):
            if line:
                bench.say(line)
        # Set by set, the slow arms first, so that no worker ends alone with a long one.
        order = sorted(arms, key=lambda n: -(arms[n].best_of + arms[n].more_steps + 2 * (arms[n].loda is not None)))
        jobs = [(name, arms[name], names, tuple(seeds), until) for names in sets for name in order]
        jobs = [job for job in jobs if not _complete(bench, job[1], job[2], seeds)]
        for at, line in enumerate(pool.map(_draw_job, jobs), start=1):
            if line:
                bench.say(f"{at}/{len(jobs)} {line}")


_worker: Bench | None = None


def _start_worker(source: str, digest: str, sampling: Sampling, learning: Learning, cache: Path) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = Bench(methods.open_model(source), sampling, learning, cache, say=lambda text: None)
    if _worker.digest != digest:
        raise RuntimeError("the model's file changed during the run: start again")


def _learn_job(job: tuple[str, str]) -> str:
    assert _worker is not None
    began = time.perf_counter()
    _worker.learned([job[0]], job[1])
    seconds = time.perf_counter() - began
    return f"learned {job[0]} ({job[1]}) in {seconds:.0f} s" if seconds > 1 else ""


def _draw_job(job: tuple[str, Arm, Key, tuple[int, ...], float]) -> str:
    """Draws one arm on one set unless time is up."""
    assert _worker is not None
    name, arm, names, seeds, until = job
    if time.time() > until:
        return ""
    done = run_arm(_worker, name, arm, names, seeds, resume=True)
    return f"{'+'.join(names)} {name}: success {np.mean([r['success'] for r in done.values()]):.0%}"


def drift(bench: Bench, arms: Mapping[str, Arm], names: Key, seeds: Sequence[int]) -> dict[str, dict[str, float]]:
    """What loaded adapters do to a prompt that names none of their concepts: mean |difference| to the base, 0..1.

    `other_class` draws a class that no loaded concept has.
    """
    free = next(w for w in CLASSES if w not in [CONCEPTS[n].class_word for n in names])
    texts = {"other_class": [f"a {free} on a {methods.background_for(names, s)} background" for s in seeds]}
    base = methods.arms(LodaConfig())["base"]
    out: dict[str, dict[str, float]] = {}
    for what, lines in texts.items():
        plain, _ = methods.draw(bench.model, base, names, seeds, {}, bench.sampling, lines)
        for name, arm in arms.items():
            if arm.kind and arm.loda is None and arm.best_of == 1 and arm.more_steps == 1:
                learned = bench.learned(names, arm.kind)
                images, _ = methods.draw(bench.model, arm, names, seeds, learned, bench.sampling, lines)
                values = np.abs(images.astype(float) - plain).mean(axis=(1, 2, 3)) / 255
                out.setdefault(name, {})[what] = float(values.mean())
    return out


def base_error(bench: Bench, pictures: int, counts: Sequence[int] = (1, 2, 3, 4)) -> dict[str, Any]:
    """How often the plain model fails at what it was trained for: looks it knows, named in full, 1 to 4 objects.

    Without such errors there would be nothing to separate; what is missing here no adapter can give.
    """
    out = {}
    for count in counts:
        prompts, wanted = [], []
        seed = 60_000_000
        while len(prompts) < pictures:
            objects, background = scene_layout(seed, count)
            seed += 1
            if len({thing.class_word for thing in objects}) == count:
                caption, _ = describe(np.random.default_rng(seed), objects, background, "full")
                prompts.append(caption)
                wanted.append([Wanted(thing.class_word, thing.look) for thing in objects])
        values = []
        for at in range(0, pictures, bench.sampling.batch):
            texts, asked = prompts[at : at + bench.sampling.batch], wanted[at : at + bench.sampling.batch]
            result = host.sample(
                bench.model, [host.encode_text(bench.model, text) for text in texts],
                seeds=list(range(methods.REPORT_FROM + at, methods.REPORT_FROM + at + len(texts))),
                steps=bench.sampling.steps, guidance=bench.sampling.guidance,
            )  # fmt: skip
            for image, things in zip(result.images, asked, strict=True):
                values.append(judge(detect(image, tuple(t.look for t in things)), things).values)
        records = {"all": dict(enumerate(values))}
        out[f"{count} objects"] = {m: interval(records, m) for m in METRICS if m in values[0]}
    return out


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
            if metric in ("success", "leak", "omission", "fidelity", "loose_success", "loose_leak"):
                wide = interval(records, metric, rounds, over_sets=True)
                table[metric] |= {"lo_sets": wide["lo"], "hi_sets": wide["hi"]}
        table["leak_matrix"] = wanted_matrix(records)
        out[name] = table
    return out


COMPARED = ("success", "leak", "omission", "fidelity", "concepts_right", "loose_success", "loose_right", "loose_leak",
            "loose_omission")  # fmt: skip


def comparisons(results: Results, pairs: Sequence[tuple[str, str]], rounds: int = 1000) -> dict[str, Any]:
    """Paired differences and McNemar tests of named arms."""
    out = {}
    for one, other in pairs:
        if results.get(one) and results.get(other):
            out[f"{one} - {other}"] = {
                **{m: difference(results[one], results[other], m, rounds) for m in COMPARED},
                "mcnemar": mcnemar(results[one], results[other]),
                "mcnemar_loose": mcnemar(results[one], results[other], "loose_success"),
            }  # fmt: skip
    return out


def table(summed: Mapping[str, Any]) -> str:
    """The summary as a Markdown table, percentages with their intervals over seeds."""
    columns = ("success", "concepts_right", "omission", "leak", "blend", "fidelity", "odd_shape",
               "loose_success", "loose_omission", "loose_leak")  # fmt: skip
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
        "model": {"source": Path(bench.model.source).name, "weights": bench.digest, "family": bench.model.family,
                  **described},
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
