"""How well a single concept is drawn, by how it was learned: `python -m benchmarks.separation.capacity`.

A value adapter can only change what a text row gives, so it may draw its concept less well than a LoRA that changes
everything. This looks for what limits it: rank, training, learning rate, strength, guidance, or the value projection
itself. On tuning concepts and seeds. Goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from . import learning, methods, report, run, tune
from .learning import Learning
from .methods import Arm

OUT = Path("benchmarks/results/separation_capacity.json")
USUAL = Learning()
CASES: dict[str, tuple[Learning, Arm]] = {
    "lora": (USUAL, Arm("lora")),
    "described in words": (USUAL, Arm(None, "described")),
    "tova": (USUAL, Arm()),
    "tova, 500 steps": (replace(USUAL, steps=500), Arm()),
    "tova, 1000 steps": (replace(USUAL, steps=1000), Arm()),
    "tova, rate 0.001": (replace(USUAL, learning_rate=1e-3), Arm()),
    "tova, rate 0.01": (replace(USUAL, learning_rate=1e-2), Arm()),
    "tova, rank 2": (replace(USUAL, rank=2), Arm()),
    "tova, rank 32": (replace(USUAL, rank=32), Arm()),
    "tova, 24 pictures": (replace(USUAL, images=24), Arm()),
    "tova, middle noise levels": (replace(USUAL, levels=(450, 950)), Arm()),
    "tova, subject weighted": (USUAL, Arm("value_masked")),
    "tova, strength 1.3": (USUAL, Arm(strength=1.3)),
    "tova, guidance 4.5": (USUAL, Arm(guidance=4.5)),
    "token-wise keys and values": (USUAL, Arm("key_value")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further job after this time")
    run.add_options(parser, OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    until = time.time() + 60 * args.minutes
    say = lambda text: print(f"{time.perf_counter() - began:6.0f} s  {text}", flush=True)
    model = learning.open_model(args.model)
    sets = [(name,) for name in methods.TUNING[: args.concepts]]
    seeds = list(range(tune.FIRST_SEED, tune.FIRST_SEED + args.seeds))
    found: run.Results = {}
    bench = run.Bench(model, cache=args.cache, say=say)
    for learned in dict.fromkeys(case[0] for case in CASES.values()):
        bench = run.Bench(model, learning=learned, cache=args.cache, say=say)
        arms = {name: arm for name, (how, arm) in CASES.items() if how == learned}
        if time.time() < until:  # learning is not begun either
            run.carry_out(bench, run.jobs_of(arms, sets, seeds), args.workers, until)
        found |= run.collect(bench, arms, sets, seeds)
    found = {name: found[name] for name in CASES if found[name]}
    summary = report.summary(found, 300)
    shown = report.table(summary)
    data = {
        "machine": report.machine(),
        "model": report.described(bench),
        "sampling": asdict(bench.sampling),
        "sets": ["+".join(s) for s in sets],
        "seeds": {"first": tune.FIRST_SEED, "count": args.seeds},
        "learning": {name: asdict(CASES[name][0]) for name in found},
        "settings": {name: asdict(CASES[name][1]) for name in found},
        "arms": summary,
        "seconds": time.perf_counter() - began,
    }
    report.write(args.out, data)
    if args.out == OUT:
        facts = f"Model weights `{bench.digest}`, {', '.join(data['sets'])} alone, {args.seeds} seeds each."
        report.fill(Path("docs/tables/separation.md"), {"capacity": f"{facts}\n\n{shown}"})
    print(shown)
    say(f"written to {args.out}")


if __name__ == "__main__":
    main()
