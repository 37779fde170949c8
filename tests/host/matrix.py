"""Every sampler and scheduler the host lists, with LODA off and on: `python -m tests.host.matrix`.

Runs with each ComfyUI's own Python (hosts as in tests.host.run) on a small model with random weights, writes
tests/host/results/matrix-<version>.json, and the table docs/tables/samplers.md from all results there.

    python -m tests.host.matrix                 all hosts, then the table
    python -m tests.host.matrix --resume        goes on where a run was stopped
    python -m tests.host.matrix --table         the table only

Combinations: every sampler with every scheduler; and each of `OPTIONS` for every sampler with one scheduler and for
every scheduler with one sampler. What is asked of each stands in `examine`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .run import NO_HOST, REPO, find_hosts, run_module, version

RESULTS = Path(__file__).resolve().parent / "results"
TABLE = REPO / "docs" / "tables" / "samplers.md"
SCHEDULER, SAMPLER = "normal", "euler"  # which the options are tried with

STEPS = 4
BASE: dict[str, Any] = {"steps": STEPS, "cfg": 7.0, "loda_steps": 2}
# What differs from BASE; `mask` and `batch` shape the latent.
OPTIONS: dict[str, dict[str, Any]] = {
    "mask": {"mask": True},
    "denoise 0.5": {"denoise": 0.5},
    "batch 3": {"batch": 3},
    "CFG 1": {"cfg": 1.0},
    "all steps but one": {"loda_steps": STEPS - 1},
    "all steps": {"loda_steps": STEPS},
}


@dataclass(frozen=True)
class Case:
    sampler: str
    scheduler: str
    option: str = ""

    @property
    def name(self) -> str:
        return " / ".join(part for part in (self.sampler, self.scheduler, self.option) if part)


@dataclass
class Outcome:
    """What a case gave. `faults` is empty when everything asked of it was true."""

    faults: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def cases() -> Iterator[Case]:
    """All combinations of the host this runs in; those that say most first, so that a run cut short has them."""
    import comfy.samplers

    samplers, schedulers = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS
    others = [name for name in schedulers if name != SCHEDULER]
    for option in ("", *OPTIONS):
        for sampler in samplers:
            yield Case(sampler, SCHEDULER, option)
        for scheduler in others:
            yield Case(SAMPLER, scheduler, option)
    for sampler in samplers:
        for scheduler in others:
            if sampler != SAMPLER:
                yield Case(sampler, scheduler)


def examine(model: Any, clip: Any, case: Case) -> Outcome:
    """Runs one case and says what was not as it must be.

    Asked: the stock sampler and LODA give finite latents; LODA with 0 steps is bit-equal to the stock KSampler; the
    same seed gives the same latent; LODA evaluated its loss and changed something; where a mask keeps the picture,
    LODA keeps it as the stock run does; the model is bit-equal and bare of hooks afterwards. With one scheduler also:
    where the text already separates, no update is made, the latent's standard deviation is between a quarter and
    twice the stock run's (noise that was left in, or a run that ended early, shows here), and samplers that take their
    own steps are bit-equal to the stock run.

    Args:
        model, clip: with the words dog and cat marked.
    """
    import torch

    from .suite.helpers import encode, hooks_on, latent, same_weights, sample, sample_loda, weights

    outcome = Outcome()
    told = outcome.faults.append
    settings = {**BASE, **OPTIONS.get(case.option, {})}
    batch, masked, loda_steps = settings.pop("batch", 1), settings.pop("mask", False), settings.pop("loda_steps")
    settings |= {"sampler_name": case.sampler, "scheduler": case.scheduler}
    conds = encode(clip, "a photo of a dog and a cat"), encode(clip, "blurry")
    image = latent(batch=batch)
    if masked or "denoise" in settings:
        noise = torch.Generator().manual_seed(1)
        image = {"samples": torch.randn(batch, 4, 8, 8, generator=noise)}
    if masked:
        image["noise_mask"] = torch.zeros(1, 1, 64, 64)
        image["noise_mask"][..., 32:] = 1.0
    kept, hooks = weights(model), hooks_on(model)

    stock = sample(model, *conds, image, **settings)
    off, _ = sample_loda(model, *conds, image, loda_steps=0, **settings)
    first, maps = sample_loda(model, *conds, image, loda_steps=loda_steps, **settings)
    second, _ = sample_loda(model, *conds, image, loda_steps=loda_steps, **settings)
    if not torch.isfinite(stock).all():
        told("the stock KSampler itself gives values that are not finite")
    if not torch.equal(off, stock):
        told("LODA with 0 steps differs from the stock KSampler")
    if not torch.isfinite(first).all():
        told("LODA gives values that are not finite")
    if not torch.equal(first, second):
        told("the same seed gives another latent")
    if first.shape != stock.shape:
        told(f"the latent's shape is {list(first.shape)}, not {list(stock.shape)}")
    elif torch.equal(first, stock):
        told("LODA changed nothing")
    if maps.trace is None or maps.trace.backwards == 0:
        told("LODA made no update")
    if case.scheduler == SCHEDULER:
        # A threshold next to nothing: the loss is zero everywhere, no update is made.
        nothing = {"threshold": 1e-12, "afg": False, "loda_steps": loda_steps}
        if case.sampler.endswith("_cfg_pp"):
            # CFG++ is made for scales of 1 to 2: far above, its second-order samplers double the latent's size.
            settings = {**settings, "cfg": min(settings["cfg"], 1.5)}
        plain = sample(model, *conds, image, **settings) if case.sampler.endswith("_cfg_pp") else stock
        idle, quiet = sample_loda(model, *conds, image, **nothing, **settings)
        if quiet.trace is None or quiet.trace.backwards:
            told("LODA made an update where there was nothing to gain")
        apart = float((idle - plain).abs().max())
        outcome.facts["exact"] = apart == 0.0
        if apart > 0.0 and steps_alone(case.sampler):
            told(f"without an update the latent differs from the stock run's by {apart:.3g}")
        outcome.facts["size"] = ratio = round(float(idle.std() / plain.std()), 3)
        # The model with random weights does not remove the noise that SDE samplers add at each of their own steps:
        # with two Euler steps in their place the latent is smaller, down to 0.41 times.
        if not 0.25 < ratio < 2.0:
            told(f"without an update the latent's standard deviation is {ratio:.2f} times the stock run's")
    if masked:
        drift, stock_drift = (float((out[..., :4] - image["samples"][..., :4]).abs().max()) for out in (first, stock))
        outcome.facts["kept to"] = float(f"{drift:.2g}")
        if drift > 2.0 * stock_drift + 1e-5:
            told(f"the kept part moved by {drift:.3g}, in the stock run by {stock_drift:.3g}")
    if not same_weights(kept, model):
        told("the model's weights changed")
    if hooks_on(model) != hooks:
        told("hooks stayed on the model")
    return outcome


def steps_alone(sampler: str) -> bool:
    """Whether LODA lets this sampler take the optimised steps itself; the others' are Euler steps."""
    import comfy.samplers

    from .suite.conftest import pack

    sampling = pack("conceptsplit_core.hosts.comfy.steps")
    function = comfy.samplers.sampler_object(sampler).sampler_function
    return getattr(function, "__name__", "") in sampling.ONE_STEP | sampling.ONE_STEP_NOISE


def attempt(model: Any, clip: Any, case: Case) -> Outcome:
    """`examine`, with an exception as a fault: one sentence of ours is an answer, but not to a combination we offer."""
    try:
        return examine(model, clip, case)
    except Exception as error:
        return Outcome([f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]])


def small_model() -> tuple[Any, Any]:
    """The MODEL with random weights, and a CLIP that marks dog and cat."""
    import torch

    from .suite import checkpoints
    from .suite.conftest import pack, run

    with torch.inference_mode():
        model = checkpoints.tiny(pack("conceptsplit_core.hosts.comfy.demo"))
        clip = checkpoints.clip("sd15", 2)
    return model, run("ConceptSplitMarkWords", clip=clip, words="dog, cat")[0]


def measure(progress: Path, resume: bool, minutes: float) -> int:
    """Inside a host: all cases; each is written to `progress` as it is done."""
    import torch

    from .suite.conftest import BASE as folder
    from .suite.conftest import HOST

    end = time.monotonic() + 60 * minutes
    done: dict[str, Any] = {}
    if resume and progress.is_file():
        done = {entry["case"]: entry for line in progress.read_text().splitlines() for entry in [json.loads(line)]}
    try:
        import comfy.samplers
        import comfy.utils

        comfy.utils.PROGRESS_BAR_ENABLED = False
        model, clip = small_model()
        todo = list(cases())
        progress.parent.mkdir(parents=True, exist_ok=True)
        with progress.open("a" if resume else "w") as lines:
            for number, case in enumerate(todo, 1):
                if case.name in done:
                    continue
                if time.monotonic() > end:
                    break
                began = time.process_time()
                outcome = attempt(model, clip, case)
                entry = {"case": case.name, "faults": outcome.faults, **outcome.facts}
                entry["seconds"] = round(time.process_time() - began, 2)
                done[case.name] = entry
                lines.write(json.dumps(entry) + "\n")
                lines.flush()
                if outcome.faults or number % 50 == 0:
                    print(f"{number}/{len(todo)} {case.name}: {'; '.join(outcome.faults) or 'ok'}", flush=True)
        tried = [case for case in todo if case.name in done]
        entries = [done[case.name] for case in tried]
        report = {
            "host": version(HOST),
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU only",
            "asked": " ".join((examine.__doc__ or "").partition("Asked: ")[2].partition("\n\n")[0].split()),
            "settings": {**BASE, "options": OPTIONS, "size": "64 x 64 pixels", "model": "random weights, 2 levels"},
            "samplers": list(comfy.samplers.KSampler.SAMPLERS),
            "schedulers": list(comfy.samplers.KSampler.SCHEDULERS),
            "steps_alone": [name for name in comfy.samplers.KSampler.SAMPLERS if steps_alone(name)],
            "combinations": len(entries),
            "not_tried": len(todo) - len(entries),
            "sampling_runs": sum(5 if case.scheduler == SCHEDULER else 4 for case in tried),
            "failed": [entry for entry in entries if entry["faults"]],
            "cases": {entry["case"]: {k: v for k, v in entry.items() if k != "case"} for entry in entries},
        }
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"matrix-{version(HOST)}.json"
        path.write_text(_compact(report))
        print(f"{len(entries)} combinations, {len(report['failed'])} failed; wrote {path.relative_to(REPO)}")
        return 1 if report["failed"] else 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compact(report: dict[str, Any]) -> str:
    """JSON with one line per case."""
    rest = json.dumps({key: value for key, value in report.items() if key != "cases"}, indent=1)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in report["cases"].items())
    return rest[: rest.rindex("\n}")] + f',\n "cases": {{\n{lines}\n }}\n}}\n'


def table(reports: list[dict[str, Any]]) -> str:
    """docs/tables/samplers.md."""
    parts = [
        "# Samplers and schedulers: all combinations",
        "",
        "[What it means](../samplers.md). Every sampler with every scheduler that the host lists, LODA off and on, on "
        "a small model with random weights. Made by `python -m tests.host.matrix`; numbers are in "
        "`tests/host/results/matrix-*.json`.",
        "",
        "Asked of every combination: " + reports[0]["asked"],
        "",
        "**Own steps**: *yes* means that the sampler takes the optimised steps itself, and that without an update its "
        "picture is bit-equal to the stock KSampler's. *Euler* means that the optimised steps are Euler steps (CFG++ "
        "samplers: CFG++ ones, ancestral samplers: ancestral ones), because the sampler needs its history or the whole "
        "schedule; from the first step that is not optimised it runs as itself. **Schedulers** counts those that "
        "passed of those tried. The other "
        f"columns were tried with scheduler `{SCHEDULER}`: "
        + ", ".join(f"*{name}*" for name in OPTIONS)
        + f"; unless named, CFG is {BASE['cfg']:g}, the batch 1, and {BASE['loda_steps']} of {BASE['steps']} steps are "
        "optimised.",
    ]
    for report in reports:
        found = report["cases"]
        say = lambda name, found=found: ("ok" if not found[name]["faults"] else "**fails**") if name in found else "–"
        failed = len(report["failed"])
        parts += [
            "",
            f"## ComfyUI {report['host']}",
            "",
            f"{len(report['samplers'])} samplers, {len(report['schedulers'])} schedulers, {report['combinations']} "
            f"combinations, {report['sampling_runs']} sampling runs, {failed} failed"
            + (f"; {report['not_tried']} combinations not tried yet (–)" if report["not_tried"] else "")
            + f". torch {report['torch']}, "
            f"{report['machine']}.",
            "",
            "| sampler | own steps | schedulers | " + " | ".join(OPTIONS) + " |",
            "|---|---|---|" + "---|" * len(OPTIONS),
        ]
        for sampler in report["samplers"]:
            tried = [found[key] for name in report["schedulers"] if (key := f"{sampler} / {name}") in found]
            passed = sum(not entry["faults"] for entry in tried)
            row = [
                f"`{sampler}`",
                "yes" if sampler in report["steps_alone"] else "Euler",
                f"{passed} of {len(tried)}" if tried else "–",
                *(say(f"{sampler} / {SCHEDULER} / {option}") for option in OPTIONS),
            ]
            parts.append("| " + " | ".join(row) + " |")
        parts += [
            "",
            f"| scheduler (with `{SAMPLER}`) | " + " | ".join(OPTIONS) + " |",
            "|---|" + "---|" * len(OPTIONS),
        ]
        for name in report["schedulers"]:
            row = [f"`{name}`", *(say(f"{SAMPLER} / {name} / {option}") for option in OPTIONS)]
            parts.append("| " + " | ".join(row) + " |")
        if failed:
            parts += ["", "Failed:", ""]
            parts += [f"- {entry['case']}: {'; '.join(entry['faults'])}" for entry in report["failed"]]
    return "\n".join(parts) + "\n"


def write_table() -> None:
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("matrix-*.json"), reverse=True)]
    if not reports:
        raise SystemExit(f"There is no result in {RESULTS.relative_to(REPO)}: run python -m tests.host.matrix first.")
    TABLE.write_text(table(reports))
    print(f"wrote {TABLE.relative_to(REPO)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="go on where a run was stopped")
    parser.add_argument("--table", action="store_true", help="only write docs/tables/samplers.md from the results")
    parser.add_argument("--minutes", type=float, default=1e9, help="end earlier; the result says what was not tried")
    parser.add_argument("--inside", type=Path, metavar="PROGRESS", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside is not None:
        return measure(chosen.inside, chosen.resume, chosen.minutes)
    failed = 0
    if not chosen.table:
        hosts = find_hosts()
        if not hosts:
            print("No ComfyUI found: set COMFYUI_PATH to a ComfyUI folder.")
            return NO_HOST
        for host in hosts:
            progress = REPO / ".cache" / f"matrix-{version(host)}.jsonl"
            given = ["--inside", str(progress), "--minutes", str(chosen.minutes)]
            given += ["--resume"] if chosen.resume else []
            failed += run_module(host, "tests.host.matrix", given) != 0
    write_table()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
