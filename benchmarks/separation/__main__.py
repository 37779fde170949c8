"""`python -m benchmarks.separation`: see --help."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from conceptsplit_core.loda import LodaConfig

from . import methods, run, tune

DEFAULT_ARMS = (
    "base,described,lora_merged,tova,tok_key,tok_key_value,tova_loda,tova_afg,tova_loda_afg,"
    "tova_loda_symmetric_kl,tova_loda_bhattacharyya,tova_loda_kl,paper_code,tova_best_of_3,tova_more_steps"
)
QUICK_ARMS = "described,lora_merged,tova,tova_loda_afg"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.separation", description=run.__doc__)
    parser.add_argument("--quick", action="store_true", help="minutes on two cores: few arms, pairs and seeds")
    parser.add_argument("--tune", action="store_true", help="sweep LODA and AFG settings on tuning pairs and seeds")
    parser.add_argument("--pairs", type=int, help="concept sets to use (6; quick 2)")
    parser.add_argument("--seeds", type=int, help="seeds per set (32; quick 8)")
    parser.add_argument("--size", type=int, default=2, help="concepts per set")
    parser.add_argument("--same-class", action="store_true", help="sets whose concepts share a class word")
    parser.add_argument("--arms", help="names, comma separated; 'all' for every arm")
    parser.add_argument("--resume", action="store_true", help="keep what earlier runs measured under the same settings")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/separation.json"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further concept set after this")
    parser.add_argument("--steps", type=int, default=methods.Sampling.steps)
    parser.add_argument("--guidance", type=float, default=methods.Sampling.guidance)
    parser.add_argument("--strength", type=float, default=1.0, help="of all adapters")
    parser.add_argument("--loda", default="{}", help="LodaConfig fields to change, as JSON")
    parser.add_argument("--train-steps", type=int, default=methods.Learning.steps)
    parser.add_argument("--drawings", type=int, help="drawings for the detector's confusion matrix (400; quick 80)")
    parser.add_argument("--cache", type=Path, default=run.CACHE)
    parser.add_argument("--model", default="demo", help="another checkpoint file of the demo model's format")
    parser.add_argument("--threads", type=int, default=2, help="of this process; workers have one each")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    parser.add_argument("--single", type=int, help="seeds per concept drawn alone (16; quick 4; 0 for none)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    pairs = args.pairs or (2 if args.quick else 6)
    seeds = args.seeds or (8 if args.quick else 32)
    began = time.perf_counter()
    say = lambda text: print(f"{time.perf_counter() - began:6.0f} s  {text}", flush=True)
    bench = run.Bench(
        methods.open_model(args.model), methods.Sampling(args.steps, args.guidance),
        methods.Learning(steps=args.train_steps),
        args.cache, say,
    )  # fmt: skip
    loda = LodaConfig(**{"steps": max(1, args.steps // 5), **json.loads(args.loda)})
    if args.tune:
        tune.main(bench, loda, pairs, seeds, args.minutes, args.resume, args.out, args.strength, args.workers)
        return
    known = methods.arms(loda)
    wanted = args.arms or (QUICK_ARMS if args.quick else DEFAULT_ARMS)
    names = list(known) if wanted == "all" else wanted.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"unknown arm {unknown[0]!r}; known: {', '.join(known)}")
    chosen = {name: replace(known[name], strength=args.strength) for name in names}
    split = "all" if args.same_class else "reporting"
    sets = methods.concept_sets(split, args.size, pairs, args.same_class)
    numbers = list(range(methods.REPORT_FROM, methods.REPORT_FROM + seeds))
    extra: dict[str, Any] = {}
    alone = args.single if args.single is not None else (4 if args.quick else 16)
    plain = {n: a for n, a in chosen.items() if a.loda is None and a.best_of == 1 and a.more_steps == 1}
    results = run.run(bench, chosen, sets, numbers, args.resume, args.minutes, args.workers)
    if alone:
        each = [(name,) for name in dict.fromkeys(name for names in sets for name in names)]
        single = run.run(bench, plain, each, list(range(numbers[0], numbers[0] + alone)),
                         args.resume, args.minutes, args.workers)  # fmt: skip
        extra["single"] = run.summary(single)
        extra["drift"] = run.drift(bench, plain, sets[0], numbers[:8])
    drawings = args.drawings if args.drawings is not None else (80 if args.quick else 400)
    done = [s for s in sets if all("+".join(s) in results[name] for name in chosen)]
    if alone:
        extra["base_error"] = run.base_error(bench, 8 if args.quick else 32)
    extra["seconds"] = time.perf_counter() - began
    data = run.report(bench, chosen, done, numbers, results, drawings, extra)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    run.grid(bench, chosen, done[:6], args.out.with_suffix(".png"))
    shown = run.table(data["arms"])
    if "single" in extra:
        shown += "\n\nEach concept alone:\n\n" + run.table(extra["single"])
    args.out.with_suffix(".md").write_text(shown + "\n", encoding="utf-8")
    print(shown)
    for name, values in data["comparisons"].items():
        d, m = values["success"], values["mcnemar"]
        print(f"{name}: success {d['mean']:+.2f} ({d['lo']:+.2f} to {d['hi']:+.2f}), McNemar {m['only_first']}:"
              f"{m['only_second']} p = {m['p']:.2g}")  # fmt: skip


if __name__ == "__main__":
    main()
