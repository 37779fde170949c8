"""From records to the JSON file, the tables of docs/tables/separation.md, and the picture grid."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from conceptsplit_core.demo.looks import CLASSES, CONCEPTS
from conceptsplit_core.hosts import diffusers as host

from . import methods
from .methods import Arm
from .metrics import METRICS, difference, interval, mcnemar, wanted_matrix
from .run import Bench, Key, Results, strip_path

SHOWN = (*METRICS, "background_error", "jsd_before", "jsd_after", "seconds")
WIDE = ("success", "leak", "omission", "fidelity", "loose_success", "loose_leak")
COMPARED = ("success", "leak", "omission", "fidelity", "concepts_right", "loose_success", "loose_right", "loose_leak",
            "loose_omission")  # fmt: skip


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
            if metric in WIDE:
                wide = interval(records, metric, rounds, over_sets=True)
                table[metric] |= {"lo_sets": wide["lo"], "hi_sets": wide["hi"]}
        table["leak_matrix"] = wanted_matrix(records)
        out[name] = table
    return out


def by_set(results: Results, metrics: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Means of some metrics per concept set and arm."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for name, records in results.items():
        for key, pictures in records.items():
            means = {m: float(np.mean([values[m] for values in pictures.values()])) for m in metrics}
            out.setdefault(key, {})[name] = means
    return out


def comparisons(results: Results, pairs: Sequence[tuple[str, str]], rounds: int = 1000) -> dict[str, Any]:
    """Paired differences and McNemar tests of named arms, on the pictures both have."""
    out = {}
    for one, other in pairs:
        a, b = results.get(one, {}), results.get(other, {})
        pictures = sum(len(set(a[key]) & set(b[key])) for key in set(a) & set(b))
        if pictures:
            out[f"{one} - {other}"] = {
                "pictures": pictures,
                **{m: difference(a, b, m, rounds) for m in COMPARED},
                "mcnemar": mcnemar(a, b),
                "mcnemar_loose": mcnemar(a, b, "loose_success"),
            }  # fmt: skip
    return out


def merged(parts: Sequence[Results]) -> Results:
    """One arm's records of several groups together."""
    out: Results = {}
    for part in parts:
        for name, records in part.items():
            for key, pictures in records.items():
                out.setdefault(name, {}).setdefault(key, {}).update(pictures)
    return out


def drift(bench: Bench, arms: Mapping[str, Arm], names: Key, seeds: Sequence[int]) -> dict[str, dict[str, float]]:
    """What loaded adapters do to a prompt that names none of their concepts: mean |difference| to the base, 0..1.

    `other_class` draws a class that no loaded concept has.
    """
    free = next(w for w in CLASSES if w not in [CONCEPTS[n].class_word for n in names])
    texts = {"other_class": [f"a {free} on a {methods.background_for(names, s)} background" for s in seeds]}
    base = Arm(None, "plain")
    out: dict[str, dict[str, float]] = {}
    for what, lines in texts.items():
        plain, _ = methods.draw(bench.model, base, names, seeds, {}, bench.sampling, lines)
        for name, arm in arms.items():
            if arm.recipe and arm.plain:
                learned = bench.learned(names, arm.recipe)
                images, _ = methods.draw(bench.model, arm, names, seeds, learned, bench.sampling, lines)
                values = np.abs(images.astype(float) - plain).mean(axis=(1, 2, 3)) / 255
                out.setdefault(name, {})[what] = float(values.mean())
    return out


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        name = found[1] if found else name
    return {"cores": os.cpu_count(), "processor": name, "system": platform.system(), "torch": torch.__version__}


def described(bench: Bench) -> dict[str, Any]:
    return {
        "source": Path(bench.model.source).name,
        "weights": bench.digest,
        "family": bench.model.family,
        "unet_parameters": sum(p.numel() for p in bench.model.unet.parameters()),
    }


def vae_round_trip(model: host.DiffusersModel) -> Callable[[np.ndarray], np.ndarray]:
    """Pictures through the model's autoencoder and back."""

    def passed(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        return host.decode_latents(model, host.encode_images(model, x))

    return passed


# --- tables and pictures --------------------------------------------------------------------------------------

COLUMNS = ("success", "concepts_right", "omission", "leak", "blend", "fidelity", "loose_success", "loose_omission",
           "loose_leak")  # fmt: skip


def _cell(value: Mapping[str, float] | None, scale: float = 100.0) -> str:
    if value is None:
        return "–"
    return f"{scale * value['mean']:.0f} ({scale * value['lo']:.0f}–{scale * value['hi']:.0f})"


def table(summed: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> str:
    """The summary as a Markdown table, percentages with their intervals over seeds."""
    lines = [
        "| arm | pictures | " + " | ".join(c.replace("_", " ") for c in columns) + " | JSD | s |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for name, row in summed.items():
        cells = [_cell(row.get(c)) for c in columns]
        apart = f"{row['jsd_before']['mean']:.2f} → {row['jsd_after']['mean']:.2f}" if "jsd_after" in row else "–"
        lines.append(
            f"| {name} | {row['pictures']} | " + " | ".join(cells) + f" | {apart} | {row['seconds']['mean']:.2f} |"
        )
    return "\n".join(lines)


def comparison_table(compared: Mapping[str, Any]) -> str:
    """Differences in percentage points with intervals, and McNemar's counts and p."""
    lines = [
        "| difference | pictures | success | leak | omission | fidelity | McNemar | loose success | McNemar, loose |",
        "|---" * 9 + "|",
    ]
    test = lambda m: f"{m['only_first']}:{m['only_second']}, p {m['p']:.2g}"

    def signed(value: Mapping[str, float]) -> str:
        return f"{100 * value['mean']:+.0f} ({100 * value['lo']:+.0f} to {100 * value['hi']:+.0f})"

    for name, row in compared.items():
        cells = [signed(row[m]) for m in ("success", "leak", "omission", "fidelity")]
        lines.append(
            f"| {name.replace(' - ', ' − ')} | {row['pictures']} | "
            + " | ".join(cells)
            + f" | {test(row['mcnemar'])} | {signed(row['loose_success'])} | {test(row['mcnemar_loose'])} |"
        )
    return "\n".join(lines)


def error_table(errors: Mapping[str, Any]) -> str:
    columns = ("success", "concepts_right", "omission", "leak", "odd_shape", "extra", "fidelity", "loose_success",
               "loose_leak")  # fmt: skip
    lines = [
        "| objects | " + " | ".join(c.replace("_", " ") for c in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in errors.items():
        lines.append(f"| {name} | " + " | ".join(_cell(row.get(c)) for c in columns) + " |")
    return "\n".join(lines)


def by_set_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Strict and generous success per concept set, a column per arm."""
    arms = list(next(iter(found.values())))
    lines = ["| concept | " + " | ".join(arms) + " |", "|---" * (len(arms) + 1) + "|"]
    for key, row in found.items():
        cells = [f"{100 * row[arm]['success']:.0f} / {100 * row[arm]['loose_success']:.0f}" for arm in arms]
        lines.append(f"| {looks_of(key)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def looks_of(key: str) -> str:
    """The concepts of a set in words."""
    shown = []
    for name in key.split("+"):
        concept = CONCEPTS[name]
        shown.append(f"{name}, {' and '.join(concept.colours)} {concept.pattern} {concept.class_word}")
    return "; ".join(shown)


def grounding_table(found: Mapping[str, Any]) -> str:
    lines = ["| noise level, map size | own object | other object |", "|---|---|---|"]
    lines += [f"| {name} | {row['own']:.1f} | {row['other']:.1f} |" for name, row in found["share"].items()]
    lines += ["", "| JSD of two class words (quartiles) | " + " | ".join(next(iter(found["jsd"].values()))) + " |"]
    lines += ["|---" * (len(next(iter(found["jsd"].values()))) + 1) + "|"]
    for style, row in found["jsd"].items():
        cells = [" ".join(f"{v:.3f}" for v in values) for values in row.values()]
        lines.append(f"| prompts with {style} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(data: Mapping[str, Any]) -> dict[str, str]:
    """Markdown per marker of docs/tables/separation.md, from the JSON file's content."""
    out = {}
    model, seeds = data["model"], data["seeds"]
    out["facts"] = (
        f"Model weights `{model['weights']}` ({model['source']}), {data['sampling']['steps']} DDIM steps, guidance "
        f"{data['sampling']['guidance']:g}; adapters of rank {data['learning']['rank']}, "
        f"{data['learning']['steps']} steps of batch {data['learning']['batch_size']} at rate "
        f"{data['learning']['learning_rate']:g} on {data['learning']['images']} pictures. Seeds from {seeds['first']}. "
        f"{data['machine']['processor']}, {data['machine']['cores']} cores, torch {data['machine']['torch']}; "
        f"{data['pictures']} pictures."
    )
    if data.get("base_error"):
        out["base_error"] = error_table(data["base_error"])
    if data.get("grounding"):
        out["grounding"] = grounding_table(data["grounding"])
    for name, group in data.get("groups", {}).items():
        note = f"{', '.join(group['sets'])}; up to {group['seeds']} seeds each."
        out[f"group_{name}"] = f"{note}\n\n{table(group['arms'])}" if group["arms"] else "Not measured yet."
        if "by_set" in group:
            out[f"by_set_{name}"] = by_set_table(group["by_set"])
        if group.get("comparisons"):
            out[f"comparisons_{name}"] = comparison_table(group["comparisons"])
    if data.get("comparisons"):
        out["comparisons"] = comparison_table(data["comparisons"])
    if data.get("drift"):
        rows = [f"| {name} | {100 * row['other_class']:.1f} |" for name, row in data["drift"].items()]
        out["drift"] = "\n".join(
            ["| arm | mean change of another class's picture, % of full scale |", "|---|---|", *rows]
        )
    if data.get("detector"):
        lines = ["| drawings | pictures | shape right | texture right | count right |", "|---|---|---|---|---|"]
        for name, row in data["detector"].items():
            cells = " | ".join(f"{100 * row[k]:.1f} %" for k in ("shape_right", "texture_right", "count_right"))
            lines.append(f"| {name.replace('_', ' ')} | {row['pictures']} | {cells} |")
        out["detector"] = "\n".join(lines)
    return out


def section(data: Mapping[str, Any]) -> str:
    """All of a run in one block."""
    blocks = tables(data)
    shown = [blocks["facts"], blocks.get("base_error", ""), blocks.get("grounding", "")]
    for name, group in data["groups"].items():
        shown += [f"{group['title']}: {blocks[f'group_{name}']}"]
    return "\n\n".join([part for part in (*shown, blocks.get("comparisons", "")) if part])


def fill(page: Path, blocks: Mapping[str, str]) -> list[str]:
    """Puts blocks between `<!-- NAME -->` and `<!-- /NAME -->` of a page; gives the names it has no place for."""
    if not page.exists():
        return list(blocks)
    text = page.read_text(encoding="utf-8")
    missing = []
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
        if not pattern.search(text):
            missing.append(name)
        text = pattern.sub(lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text)
    page.write_text(text, encoding="utf-8")
    return missing


def grid(
    bench: Bench, arms: Mapping[str, Arm], sets: Sequence[Key], path: Path, per: int = 2, seed: int | None = None
) -> None:
    """One picture: a column per arm, `per` seeds of each concept set as rows, the same noise along a row."""
    side, left, top = 128, 96, 26
    first = methods.REPORT_FROM if seed is None else seed
    rows = len(sets) * per
    sheet = Image.new("RGB", (left + len(arms) * side, top + rows * side), "white")
    pen = ImageDraw.Draw(sheet)
    for c, (name, arm) in enumerate(arms.items()):
        pen.text((left + c * side + 3, 6), name, fill="black")
        for s, names in enumerate(sets):
            strip = strip_path(bench, arm, names, first)
            picture = Image.open(strip) if strip.exists() else None
            for k in range(per):
                at = top + (s * per + k) * side
                if picture is not None and picture.width >= (k + 1) * side:
                    sheet.paste(picture.crop((k * side, 0, (k + 1) * side, side)), (left + c * side, at))
                if c == 0:
                    pen.text((3, at + 40), "\n".join([*names, f"seed {first + k}"]), fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        sheet.save(path, optimize=True)
        return
    for quality in (90, 80, 70, 60, 50):
        sheet.save(path, quality=quality)
        if path.stat().st_size <= 600_000:
            return
