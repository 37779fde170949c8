"""`python -m benchmarks.separation`: see --help.

The full run, in this order (each goes on where it was stopped; with the model in conceptsplit_core/demo):

    python -m benchmarks.separation --tune --workers 2 --minutes 25
    python -m benchmarks.separation --workers 2 --minutes 60 --tuned benchmarks/results/separation_tuning.json
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from conceptsplit_core.settings import LodaConfig

from . import base, confusion, learning, methods, plan, report, run, tune

RESULTS = Path("benchmarks/results")
BY_SET = ("success", "loose_success", "fidelity")
DESCRIPTION = """Draws concepts together by every arm, reads the pictures, and writes the numbers.

What was measured is kept under --cache and never drawn twice: stop with Ctrl-C at any time and start the same command
again. The full plan stands in plan.py; --quick takes minutes."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.separation", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--quick", action="store_true", help="minutes on two cores: few arms, pairs and seeds")
    made.add_argument("--tune", action="store_true", help="look for LODA and AFG settings on tuning concepts and seeds")
    made.add_argument("--pairs", type=int, help="concept sets per group, instead of the plan's")
    made.add_argument("--seeds", type=int, help="seeds per set, instead of the plan's")
    made.add_argument("--arms", help="only the main group, with these arms, comma separated; 'all' for every arm")
    made.add_argument("--groups", help="only these groups of the plan, comma separated; name --out too")
    made.add_argument("--fresh", action="store_true", help="measure anew what is kept for these arms and sets")
    made.add_argument("--report-only", action="store_true", help="draw nothing; write the report of what is kept")
    made.add_argument("--out", type=Path, help="JSON file; its name with .jpg is the picture grid")
    made.add_argument("--page", type=Path, help="page whose tables are filled in (full run: docs/tables/separation.md)")
    made.add_argument("--section", help="put all tables into this one block of the page (for another model)")
    made.add_argument("--minutes", type=float, default=float("inf"), help="begin no further job after this time")
    made.add_argument("--steps", type=int, default=methods.Sampling.steps, help="DDIM steps")
    made.add_argument("--guidance", type=float, default=methods.Sampling.guidance)
    made.add_argument("--strength", type=float, default=1.0, help="of all adapters")
    made.add_argument("--loda", default="{}", help="LodaConfig fields to change, as JSON")
    made.add_argument("--tuned", type=Path, help="take LODA's settings from this tuning file")
    made.add_argument("--train-steps", type=int, default=learning.Learning.steps)
    made.add_argument("--learning-rate", type=float, default=learning.Learning.learning_rate)
    made.add_argument("--drawings", type=int, help="drawings for the detector's confusion matrix (400; quick 80)")
    made.add_argument("--cache", type=Path, default=run.CACHE)
    made.add_argument("--model", default="demo", help="another checkpoint file of the demo model's format")
    made.add_argument("--workers", type=int, default=1, help="processes that draw, one thread each")
    made.add_argument("--threads", type=int, default=1, help="of this process, when it draws itself")
    return made


def _end(*_: Any) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    signal.signal(signal.SIGTERM, _end)
    began = time.perf_counter()
    until = time.time() + 60 * args.minutes
    say = lambda text: print(f"{time.perf_counter() - began:6.0f} s  {text}", flush=True)
    changes: dict[str, Any] = {"loda_steps": max(1, round(args.steps / 5))}
    if args.tuned:
        changes |= tune.chosen_settings(args.tuned)
    loda = LodaConfig(**{**changes, **json.loads(args.loda)})
    bench = run.Bench(
        learning.open_model(args.model), methods.Sampling(args.steps, args.guidance),
        learning.Learning(steps=args.train_steps, learning_rate=args.learning_rate), args.cache, say,
    )  # fmt: skip
    try:
        if args.tune:
            out = args.out or RESULTS / "separation_tuning.json"
            page = args.page or (None if args.quick else Path("docs/tables/separation.md"))
            tune.main(bench, loda, args, until, out, page)
        else:
            measure(bench, loda, args, until)
    except KeyboardInterrupt:
        say("stopped; what was measured is kept, the same command goes on from here")
        sys.exit(130)


def measure(bench: run.Bench, loda: LodaConfig, args: argparse.Namespace, until: float) -> dict[str, Any]:
    """Runs the plan and writes the report."""
    began = time.perf_counter()
    known = methods.arms(loda, args.steps)
    table = {name: replace(arm, strength=args.strength) for name, arm in known.items()}
    wanted = ",".join(table) if args.arms == "all" else args.arms
    groups = plan.resized(plan.QUICK if args.quick else plan.FULL, args.pairs, args.seeds, wanted)
    if args.groups:
        groups = tuple(group for group in groups if group.name in args.groups.split(","))
    unknown = [name for group in groups for name in group.arms if name not in table]
    if unknown or not groups:
        sys.exit(f"unknown arm {unknown[0]!r}; known: {', '.join(table)}" if unknown else "no such group in the plan")
    out = args.out or RESULTS / ("separation_quick.json" if args.quick else "separation.json")
    if args.quick and args.out is None:
        out = bench.cache / out.name
    extra_path = bench.cache / f"base-{bench.digest}-{args.steps}-{args.guidance:g}-{int(args.quick)}.json"
    if extra_path.exists():
        extra = json.loads(extra_path.read_text())
    else:
        bench.say("the base model's own errors and its grounding")
        extra = {
            "base_error": base.errors(bench, 8 if args.quick else 32),
            "grounding": base.grounding(bench, 8 if args.quick else 24),
        }
        extra_path.parent.mkdir(parents=True, exist_ok=True)
        extra_path.write_text(json.dumps(extra))
    bench.say(report.error_table(extra["base_error"]).replace("\n", "\n          "))
    found: dict[str, run.Results] = {}
    for group in groups:
        jobs = run.jobs_of(plan.arms_of(group, table), group.key_sets(), group.numbers())
        if args.fresh:
            run.forget(bench, jobs)
        if not args.report_only:
            bench.say(f"{group.title}: {len(group.arms)} arms, {len(group.key_sets())} sets, {group.seeds} seeds")
            run.carry_out(bench, jobs, args.workers, until)
        found[group.name] = run.collect(bench, plan.arms_of(group, table), group.key_sets(), group.numbers())
        if found[group.name]:
            bench.say("\n" + report.table(report.summary(found[group.name], rounds=200)))
    drawings = args.drawings if args.drawings is not None else (80 if args.quick else 400)
    data = whole(bench, args, groups, table, found, extra, drawings)
    data["seconds"] = time.perf_counter() - began
    report.write(out, data)
    for group in groups:
        if group.name == "main":
            arms = plan.arms_of(group, table)
            columns = {name: [(arm, names) for names in group.key_sets()[:4]] for name, arm in arms.items()}
            report.grid(bench, columns, out.with_suffix(".jpg"))
    if data["kinds"]:
        cells = lambda pair: [(table[pair[g.size > 1]], names) for g in groups for names in g.key_sets()]
        report.grid(
            bench, {row: cells(pair) for row, pair in plan.KINDS.items()}, out.with_suffix(".jpg"), 1, None, 300_000
        )
    page = args.page or (None if args.quick else Path("docs/tables/separation.md"))
    if page is not None:
        blocks = report.tables(data) if not args.section else {args.section: report.section(data)}
        if args.groups and not args.section:  # what is said of all groups stays
            blocks = {k: v for k, v in blocks.items() if k.startswith(("group_", "by_set_", "comparisons_", "kinds"))}
        missing = [name for name in report.fill(page, blocks) if not name.startswith("comparisons_")]
        if missing:
            bench.say(f"{page} has no place for {', '.join(missing)}")
    print(report.comparison_table(data["comparisons"]))
    bench.say(f"written to {out}")
    return data


def whole(
    bench: run.Bench,
    args: argparse.Namespace,
    groups: tuple[plan.Group, ...],
    table: dict[str, methods.Arm],
    found: dict[str, run.Results],
    extra: dict[str, Any],
    drawings: int,
) -> dict[str, Any]:
    """Everything that goes into the JSON file."""
    pairs = report.merged([found[g.name] for g in groups if not g.apart])
    used = {name: table[name] for group in groups for name in group.arms}
    drift: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    alone = [g for g in groups if g.size == 1 and found[g.name]]
    if alone and not args.report_only:
        arms = {name: table[name] for group in alone for name in group.arms}
        seeds = list(range(methods.REPORT_FROM, methods.REPORT_FROM + 8))
        drift = report.drift(bench, arms, methods.concept_sets("reporting", 2, 1)[0], seeds)
        if "kinds_alone" in found:
            kinds = report.kinds(bench, arms, plan.KINDS_OF, drift)
    return {
        "what_this_shows": "The mechanism on a small model of drawn shapes; nothing about photographic quality.",
        "machine": report.machine(),
        "model": report.described(bench),
        "learning": asdict(bench.learning),
        "sampling": asdict(bench.sampling),
        "split": {"tuning": methods.TUNING, "reporting": methods.REPORTING, "reported_seeds_from": methods.REPORT_FROM},
        "seeds": {"first": methods.REPORT_FROM, "count": max(g.seeds for g in groups)},
        "pictures": sum(len(p) for part in found.values() for r in part.values() for p in r.values()),
        "settings": {name: asdict(arm) for name, arm in used.items()},
        "recipes": {name: asdict(recipe) for name, recipe in learning.RECIPES.items()},
        **extra,
        "arms": report.summary(pairs),
        "comparisons": report.comparisons(pairs, plan.PAIRS),
        "groups": {
            g.name: {
                "title": g.title,
                "sets": ["+".join(names) for names in g.key_sets()],
                "seeds": g.seeds,
                "arms": report.summary(found[g.name]),
                "comparisons": report.comparisons(found[g.name], plan.PAIRS) if g.size > 1 else {},
                **({"by_set": report.by_set(found[g.name], BY_SET)} if g.size == 1 and found[g.name] else {}),
            }
            for g in groups
        },
        "drift": drift,
        "kinds": kinds,
        "detector": confusion.report(drawings, 1, report.vae_round_trip(bench.model)) if drawings else None,
    }


if __name__ == "__main__":
    main()
