"""From records to the JSON file, the tables of docs/tables/separation.md, and the picture grid."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from conceptsplit_core.adapters import KINDS, AdapterInfo, adapter_bytes
from conceptsplit_core.demo.looks import CLASSES, CONCEPTS
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.hosts.diffusers.configs import UNET_CONFIGS
from conceptsplit_core.network.site import Site

from . import learning, methods, plan
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


def drift(bench: Bench, arms: Mapping[str, Arm], names: Key, seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """What loaded adapters do to a prompt that names none of their concepts: mean |difference| to the base, 0..1, and
    its interval over seeds.

    `other_class` draws a class that no loaded concept has.
    """
    free = next(w for w in CLASSES if w not in [CONCEPTS[n].class_word for n in names])
    texts = {"other_class": [f"a {free} on a {methods.background_for(names, s)} background" for s in seeds]}
    base = Arm(None, "plain")
    out: dict[str, dict[str, Any]] = {}
    for what, lines in texts.items():
        plain, _ = methods.draw(bench.model, base, names, seeds, {}, bench.sampling, lines)
        for name, arm in arms.items():
            if arm.recipe and arm.plain:
                learned = bench.learned(arm.lessons(names))
                images, _ = methods.draw(bench.model, arm, names, seeds, learned, bench.sampling, lines)
                values = np.abs(images.astype(float) - plain).mean(axis=(1, 2, 3)) / 255
                records = {"+".join(names): {seed: {what: float(v)} for seed, v in zip(seeds, values, strict=True)}}
                out.setdefault(name, {})[what] = interval(records, what)
    return out


def kinds(bench: Bench, arms: Mapping[str, Arm], names: Sequence[str], drifts: Mapping[str, Any]) -> dict[str, Any]:
    """What the table of kinds says besides success, by row: bytes of a file in half precision, on this model and on
    SD1.5; processor seconds of learning one concept, mean and range over `names`; drift.
    """
    shapes = sd15_shapes()
    out = {}
    for row, (alone, _) in plan.KINDS.items():
        learned = list(bench.learned(arms[alone].lessons(names)).values())
        kind = learned[0].info.kind
        changed = {site: shape for site, shape in shapes.items() if KINDS[kind].changes(Site(site, "", "text"))}
        rank = bench.learning.rank
        info = AdapterInfo(names[0], CONCEPTS[names[0]].class_word, "sd15", 768, rank, float(rank), kind=kind)
        seconds = [one.info.training[learning.SECONDS] for one in learned]
        out[row] = {
            "bytes": len(adapter_bytes(learned[0])),
            "bytes_sd15": len(adapter_bytes(KINDS[kind].create(changed, info, 0))),
            "seconds": {"mean": float(np.mean(seconds)), "lo": min(seconds), "hi": max(seconds)},
            "drift": drifts[alone]["other_class"],
        }
    return out


def sd15_shapes() -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of every linear layer of SD1.5's UNet."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET_CONFIGS["sd15"])
    layers = ((name, layer) for name, layer in unet.named_modules() if isinstance(layer, torch.nn.Linear))
    return {name: (layer.in_features, layer.out_features) for name, layer in layers}


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
        rows = [f"| {name} | {100 * row['other_class']['mean']:.1f} |" for name, row in data["drift"].items()]
        out["drift"] = "\n".join(
            ["| arm | mean change of another class's picture, % of full scale |", "|---|---|", *rows]
        )
    if data.get("kinds"):
        out["kinds"] = f"{out['facts']}\n\n{kinds_table(data)}"
    if data.get("detector"):
        lines = ["| drawings | pictures | shape right | texture right | count right |", "|---|---|---|---|---|"]
        for name, row in data["detector"].items():
            cells = " | ".join(f"{100 * row[k]:.1f} %" for k in ("shape_right", "texture_right", "count_right"))
            lines.append(f"| {name.replace('_', ' ')} | {row['pictures']} | {cells} |")
        out["detector"] = "\n".join(lines)
    return out


def kinds_table(data: Mapping[str, Any]) -> str:
    """A row per kind; success as strict / lenient."""
    size = lambda count: f"{count / 1e6:.1f} MB" if count >= 999_500 else f"{count / 1e3:.0f} KB"
    lines = [
        "| kind | file, SD1.5 | file, here | training, s | alone | pairs | three | drift |",
        "|---" * 8 + "|",
    ]
    for row, (alone, together) in plan.KINDS.items():
        facts = data["kinds"][row]
        cells = [size(facts["bytes_sd15"]), size(facts["bytes"]), _cell(facts["seconds"], 1.0)]
        for group, arm in (("kinds_alone", alone), ("kinds_pairs", together), ("kinds_three", together)):
            found = data["groups"].get(group, {"arms": {}})["arms"].get(arm)
            cells.append(f"{_cell(found['success'])} / {_cell(found['loose_success'])}" if found else "–")
        drifts = facts["drift"]
        cells.append(f"{100 * drifts['mean']:.1f} ({100 * drifts['lo']:.1f}–{100 * drifts['hi']:.1f})")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def section(data: Mapping[str, Any]) -> str:
    """All of a run in one block."""
    blocks = tables(data)
    shown = [blocks["facts"], blocks.get("base_error", ""), blocks.get("grounding", "")]
    for name, group in data["groups"].items():
        shown += [f"{group['title']}: {blocks[f'group_{name}']}"]
    return "\n\n".join([part for part in (*shown, blocks.get("comparisons", "")) if part])


def write(path: Path, data: Mapping[str, Any]) -> None:
    """A results file, in a folder that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


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
    bench: Bench,
    columns: Mapping[str, Sequence[tuple[Arm, Key]]],
    path: Path,
    per: int = 2,
    seed: int | None = None,
    most: int = 600_000,
) -> None:
    """One picture of at most about `most` bytes: `per` seeds of each arm and concept set of a column below each other,
    the same noise along a row.
    """
    side, left, top = 128, 96, 26
    first = methods.REPORT_FROM if seed is None else seed
    rows = per * max(len(cells) for cells in columns.values())
    sheet = Image.new("RGB", (left + len(columns) * side, top + rows * side), "white")
    pen = ImageDraw.Draw(sheet)
    for c, (title, cells) in enumerate(columns.items()):
        pen.text((left + c * side + 3, 6), title, fill="black")
        for s, (arm, names) in enumerate(cells):
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
        if path.stat().st_size <= most:
            return
