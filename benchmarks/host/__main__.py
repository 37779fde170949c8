"""Ordinary LoRAs on the demo model in a real ComfyUI: merged, the core's LoRA hooks with masks, FreeFuse's nodes, ours.

    python -m benchmarks.host                               without FreeFuse
    python -m benchmarks.host --freefuse FOLDER             with it: the folder freefuse_comfyui of its checkout
    python -m benchmarks.host --model sdxl                  what a picture costs and which inputs are drawn at all, on a
                                                            model of SDXL's (or sd15: SD1.5's) shape (`shapes.py`)
    python -m benchmarks.host --transformer                 on the demo transformer instead of the demo UNet (`flow.py`)

The laboratory's concepts, prompts, seeds and detector; its LoRAs as kohya files. Every arm draws the same pictures from
the same noise, one at a time. What was drawn is kept under --cache and never drawn twice. Writes --out and the block
`host` of --page; for another model the block `host_MODEL`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.separation import learning, methods, report, run
from benchmarks.separation.methods import REPORT_FROM
from conceptsplit_core.adapters.file import lora_bytes
from conceptsplit_core.demo.checkpoint import TRANSFORMER_FILE, load_transformer
from conceptsplit_core.demo.looks import CONCEPTS
from tests.host.run import find_hosts, host_python, tools, version

from . import flow, shapes

ROOT = Path(__file__).resolve().parents[2]
INSIDE = Path(__file__).with_name("inside.py")
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "tables" / "separation.md"
ARMS = ("merged", "hooks_slices", "ours_slices", "hooks_our_regions", "ours", "ours_loda")
FREEFUSE = ("freefuse", "freefuse_mended")
PAIRS = (
    ("ours", "merged"), ("ours_loda", "merged"), ("ours_loda", "ours"), ("ours", "hooks_slices"),
    ("ours_slices", "hooks_slices"), ("ours", "hooks_our_regions"), ("ours", "freefuse"), ("ours", "freefuse_mended"),
    ("ours_loda", "freefuse_mended"),
)  # fmt: skip
COLUMNS = ("success", "loose_success", "omission", "leak", "loose_leak")
ROUND = 8
OTHERS = ("freefuse", "transformer")
"""Options that name what is not ours, by path."""


def task(names: Sequence[str], seed: int) -> dict[str, Any]:
    """A picture's job: the concepts in the order of its prompt."""
    order = list(names) if seed % 2 == 0 else list(reversed(names))
    words = [CONCEPTS[name].class_word for name in order]
    return {"names": order, "words": words, "text": methods.prompt_for(names, seed, "bound"), "seed": seed}


def jobs_of(
    arms: Sequence[str], sets: Sequence[Sequence[str]], seeds: Sequence[int], folder: Path
) -> list[dict[str, Any]]:
    """Round by round over all sets and arms; first one picture of each arm of which everything is counted."""
    jobs = []
    for at in range(0, len(seeds), ROUND):
        for names in sets:
            for arm in arms:
                tasks = [task(names, seed) for seed in seeds[at : at + ROUND]]
                out = folder / f"{arm}-{'+'.join(names)}-{seeds[at]}.npz"
                jobs.append({"arm": arm, "names": list(names), "tasks": tasks, "out": str(out), "meter": False})
    counts = [
        {"arm": arm, "names": list(sets[0]), "tasks": [task(sets[0], seeds[0])], "meter": True,
         "out": str(folder / f"{arm}-counted.npz")}
        for arm in arms
    ]  # fmt: skip
    return counts + jobs


def read(path: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    with np.load(path) as file:
        return file["images"], json.loads(str(file["facts"]))


def records(
    jobs: Sequence[Mapping[str, Any]], arms: Sequence[str], measure: Callable[..., Any] = run.measure_picture
) -> tuple[run.Results, dict[str, Any]]:
    """What the detector reads in the pictures that every arm has, and what an arm takes."""
    found: run.Results = {arm: {} for arm in arms}
    costs: dict[str, Any] = {arm: {} for arm in arms}
    for job in jobs:
        if not Path(job["out"]).exists():
            continue
        images, facts = read(Path(job["out"]))
        if job["meter"]:
            costs[job["arm"]] |= {k: facts[0][k] for k in ("gflop", "started", "peak_mib")}
            continue
        names = tuple(job["names"])
        kept = found[job["arm"]].setdefault("+".join(names), {})
        for image, fact in zip(images, facts, strict=True):
            values, leaks = measure(image, names, fact["seed"])
            kept[fact["seed"]] = {**values, **fact, "leaks": leaks}
    for key in {key for sets in found.values() for key in sets}:
        common = set.intersection(*({*found[arm].get(key, {})} for arm in arms))
        for arm in arms:
            found[arm][key] = {seed: found[arm].get(key, {})[seed] for seed in sorted(common)}
    for arm in arms:
        pictures = [one for kept in found[arm].values() for one in kept.values()]
        for fact in ("seconds", "calls", "rows") if pictures else ():
            costs[arm][fact] = float(np.median([one[fact] for one in pictures]))
    return {arm: {key: kept for key, kept in sets.items() if kept} for arm, sets in found.items()}, costs


def table(data: Mapping[str, Any]) -> str:
    lines = [
        f"ComfyUI {data['host']}, {', '.join(data['sets'])}, seeds from {data['first_seed']}, one picture at a time; "
        f"{data['machine']['processor']}, one thread, torch {data['machine']['torch']}.\n",
        "| arm | pictures | " + " | ".join(c.replace("_", " ") for c in COLUMNS)
        + " | UNet calls (rows) | work | s | peak MiB |",
        "|---" * (len(COLUMNS) + 6) + "|",
    ]  # fmt: skip
    first = data["costs"]["merged"]["gflop"]
    for arm, row in data["arms"].items():
        cost = data["costs"][arm]
        cells = [report._cell(row[c]) for c in COLUMNS]
        lines.append(
            f"| {arm} | {row['pictures']} | {' | '.join(cells)} | {cost['calls']:.0f} ({cost['rows']:.0f}) | "
            f"{cost['gflop'] / first:.2f} | {cost['seconds']:.2f} | {cost['peak_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n\n" + report.comparison_table(data["comparisons"])


def newest_host() -> tuple[Path, Path]:
    """The newest ComfyUI that is found, and its Python."""
    hosts = [(one, python) for one in find_hosts() if (python := host_python(one)) is not None]
    if not hosts:
        sys.exit("No ComfyUI was found: set COMFYUI_PATH to its folder.")
    return max(hosts, key=lambda one: [int(part) for part in version(one[0]).split(".") if part.isdigit()])


def draw_in(host: Path, python: Path, script: Path, jobs: Mapping[str, Any], file: Path) -> None:
    """Runs a script in a ComfyUI's own Python, with these jobs in a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(jobs), encoding="utf-8")
    environment = dict(os.environ, CONCEPTSPLIT_HOST=str(host), PYTHONDONTWRITEBYTECODE="1")
    paths = [str(ROOT), *map(str, tools(python)), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    subprocess.run([str(python), str(script), str(file)], cwd=ROOT, env=environment, check=True)


def draw_missing(
    host: Path, python: Path, jobs: Sequence[Mapping[str, Any]], loras: Path, args: argparse.Namespace
) -> None:
    """The jobs that have no pictures yet, until the time is over."""
    todo = [job for job in jobs if not Path(job["out"]).exists()]
    if todo:
        given = {"jobs": todo, "loras": str(loras.resolve()), "until": time.time() + 60 * args.minutes}
        given |= {name: str(path.resolve()) if (path := getattr(args, name)) else "" for name in OTHERS}
        draw_in(host, python, INSIDE, given, args.cache / "jobs.json")


def on_shapes(family: str, args: argparse.Namespace) -> None:
    host, python = newest_host()
    arms = args.arms.split(",") if args.arms else [*shapes.ARMS, *(shapes.FREEFUSE if args.freefuse else ())]
    drawn = args.cache / f"{family}_{args.width}.json"
    jobs = shapes.jobs(family, arms, args.steps, args.rounds, args.freefuse, drawn, args.width)
    draw_in(host, python, shapes.INSIDE, jobs, args.cache / "jobs.json")
    data = {"host": version(host), "machine": report.machine(), **shapes.described(family, jobs)}
    data |= json.loads(drawn.read_text(encoding="utf-8"))
    name = f"host_{family}" if args.width == shapes.WIDTH else f"host_{family}_{args.width}"
    report.write(args.out or RESULTS / f"{name}.json", data)
    print(shapes.table(data))
    report.fill(args.page, {name: shapes.table(data)})


def on_transformer(args: argparse.Namespace) -> None:
    host, python = newest_host()
    arms = args.arms.split(",") if args.arms else list(flow.ARMS)
    sets = methods.concept_sets("reporting", 2, args.pairs)
    seeds = range(REPORT_FROM, REPORT_FROM + args.seeds)
    names = list(dict.fromkeys(name for one in sets for name in one))
    loras, folder = args.cache / "loras", args.cache.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    flow.write_loras(args.transformer, names, loras)
    jobs = [job for job in jobs_of(arms, sets, seeds, folder) if not job["meter"]]
    alone = [job for job in jobs_of([flow.SAID], [(name,) for name in names], seeds, folder) if not job["meter"]]
    alone = flow.said(alone)
    known = flow.known_jobs(folder)
    draw_missing(host, python, [*known, *alone, *jobs], loras, args)
    maps = args.cache / "maps.json"
    if not maps.exists():
        asked = {**flow.MAPS, "transformer": str(args.transformer.resolve()), "out": str(maps.resolve())}
        draw_in(host, python, flow.INSIDE_MAPS, asked, args.cache / "maps_jobs.json")
    results, _ = records(jobs, arms, flow.measure)
    described, _ = records(alone, [flow.SAID], flow.measure)
    data = {
        "what_this_shows": "The mechanism on a small transformer of drawn shapes; nothing about photographic quality.",
        "host": version(host),
        "machine": report.machine(),
        "training": load_transformer(args.transformer).config["training"],
        "sets": ["+".join(names) for names in sets],
        "first_seed": REPORT_FROM,
        "arms": flow.summary(results),
        "known": flow.known_rates(known),
        "alone": flow.summary(described)[flow.SAID],
        "comparisons": flow.comparisons(results),
        "maps": json.loads(maps.read_text(encoding="utf-8")),
        "map_scenes": flow.MAPS["scenes"],
    }
    report.write(args.out or RESULTS / "host_transformer.json", data)
    if args.out is None:
        flow.sheet(jobs).save(ROOT / "docs" / "images" / "transformer.jpg", quality=88)
    print(flow.table(data))
    report.fill(args.page, {"host_transformer": flow.table(data)})


def on_demo(args: argparse.Namespace) -> None:
    arms = args.arms.split(",") if args.arms else [*ARMS, *(FREEFUSE if args.freefuse else ())]
    sets = methods.concept_sets("tuning" if args.tune else "reporting", 2, args.pairs)
    first = 100 if args.tune else REPORT_FROM
    seeds = range(first, first + args.seeds)
    host, python = newest_host()
    bench = run.Bench(learning.open_model("demo"), cache=args.adapters)
    loras = args.cache / "loras"
    loras.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(name for names in sets for name in names):
        (loras / f"{name}.safetensors").write_bytes(lora_bytes(bench.learned({name: "lora"})[name]))
    jobs = jobs_of(arms, sets, seeds, args.cache.resolve())
    draw_missing(host, python, jobs, loras, args)
    results, costs = records(jobs, arms)
    data = {
        "what_this_shows": "The mechanism on a small model of drawn shapes; nothing about photographic quality.",
        "host": version(host),
        "machine": report.machine(),
        "sets": ["+".join(names) for names in sets],
        "first_seed": first,
        "arms": report.summary(results),
        "costs": costs,
        "comparisons": report.comparisons(results, PAIRS),
    }
    out = args.out or RESULTS / "separation_host.json"
    report.write(out, data)
    print(table(data))
    report.fill(args.page, {"host": table(data)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--freefuse", type=Path, help="folder freefuse_comfyui of FreeFuse's checkout")
    parser.add_argument("--model", choices=("demo", *shapes.LABELS), default="demo")
    parser.add_argument(
        "--transformer", type=Path, nargs="?", const=TRANSFORMER_FILE, help="a demo transformer, or the committed one"
    )
    parser.add_argument("--arms", help="comma separated, instead of the usual")
    parser.add_argument("--cache", type=Path, default=Path("out/host"))
    parser.add_argument("--out", type=Path, help="instead of the usual file of benchmarks/results")
    parser.add_argument("--page", type=Path, default=PAGE)
    demo = parser.add_argument_group("the demo model")
    demo.add_argument("--pairs", type=int, default=4)
    demo.add_argument("--seeds", type=int, default=24, help="of each pair")
    demo.add_argument("--tune", action="store_true", help="a pair and seeds that nothing is reported of")
    demo.add_argument("--minutes", type=float, default=1e6, help="draw nothing more after this time")
    demo.add_argument("--adapters", type=Path, default=run.CACHE, help="cache of the laboratory")
    others = parser.add_argument_group("other models")
    others.add_argument("--steps", type=int, default=10, help="of a picture whose cost is measured")
    others.add_argument("--width", type=int, default=shapes.WIDTH, help="channels at the top, 320 in the real ones")
    others.add_argument("--rounds", type=int, default=3, help="of timed pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.transformer:
        on_transformer(args)
    elif args.model == "demo":
        on_demo(args)
    else:
        on_shapes(args.model, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
