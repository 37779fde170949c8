"""`python -m benchmarks.photographs`: see --help."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

from conceptsplit_core import __version__
from conceptsplit_core.cli.arguments import Parser, add_model, add_settings, count, number
from conceptsplit_core.cli.arguments import size as size_of
from conceptsplit_core.cli.options import SAMPLERS
from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.settings import LodaConfig, SampleConfig, TrainConfig

DESCRIPTION = """\
Learns the concepts of folders of photographs, draws them together by several arms, and scores every picture by CLIP
(text alignment, TA) and DINO (image alignment, IA), and each subject on its own place.

Everything is kept under --out: stop with Ctrl+C at any time, and the same command goes on, drawing nothing twice."""
END = """\
example (weights are yours, nothing is downloaded):
  python -m benchmarks.photographs --model sd15.safetensors --tokenizer ComfyUI/comfy/sd1_tokenizer \\
      --concept photos/rex:dog --concept photos/tom:cat --concept photos/ted:"teddy bear" \\
      --clip weights/clip-vit-large-patch14 --dino weights/dino-vitb16 --out out/photographs

--out then holds table.md, report.json, grid.jpg, the adapters with their loss curves, and every picture in
pictures/ARM/CONCEPTS/PROMPT/SEED.png, as the authors' own scorer reads them.
"""
TRAINED = ("rank", "batch_size", "learning_rate", "gradient_checkpointing")


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="python -m benchmarks.photographs", description=DESCRIPTION, epilog=END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = made.add_argument_group("what is compared")
    what.add_argument(
        "--concept", action="append", required=True, metavar="[NAME=]FOLDER:WORD",
        help="photographs of one thing and its class word; once per concept. Masks count where every photograph has "
        "one beside it (rex_mask.png beside rex.jpg)",
    )  # fmt: skip
    what.add_argument("--clip", type=Path, required=True, metavar="FOLDER", help="CLIP in transformers' format")
    what.add_argument("--dino", type=Path, required=True, metavar="FOLDER", help="DINO (ViT) or DINOv2, likewise")
    what.add_argument("--together", type=count, default=2, metavar="N", help="concepts a picture (default: 2)")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line, {} where the concepts go")
    what.add_argument("--pictures", type=count, default=8, metavar="N", help="pictures a prompt (default: 8)")
    what.add_argument("--arms", default="", metavar="A,B", help="only these: plain, lora_merged, lora_routed, value, "
                      "value_loda (default: all)")  # fmt: skip
    what.add_argument("--paper", type=Path, metavar="FILE", help="published numbers to put below ours: JSON of rows, "
                      'such as {"ConceptSplit, Table 1": {"TA": 0.3, "IA (DINO)": 0.4}}')  # fmt: skip
    what.add_argument("--out", type=Path, default=Path("out/photographs"), help="(default: out/photographs)")
    add_model(made, None)
    learn = made.add_argument_group("how concepts are learned")
    learn.add_argument("--train-steps", type=count, default=TrainConfig.steps, metavar="N",
                       help=f"of every adapter (default: {TrainConfig.steps})")  # fmt: skip
    learn.add_argument("--lora-learning-rate", type=number, default=1e-4, metavar="X",
                       help="of the LoRAs (default: 0.0001)")  # fmt: skip
    add_settings(learn, TrainConfig, TRAINED)
    draw = made.add_argument_group("how pictures are drawn")
    add_settings(draw, SampleConfig, ("seed", "steps", "cfg"))
    draw.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="(default: ddim)")
    draw.add_argument("--size", type=size_of, metavar="N|WxH", help="in pixels (default: the model's own)")
    draw.add_argument("--batch", type=count, default=4, help="pictures at once (default: 4)")
    return made


def run(arguments: argparse.Namespace) -> None:
    """Learns, draws, scores and reports."""
    from conceptsplit_core.cli.common import choose_device, machine, open_model, say
    from conceptsplit_core.cli.train import train_config

    from . import protocol, report
    from .run import Bench, Sampling, configs, numbers
    from .scores import Clip, Dino, Scorer

    # Everything about the input that can be wrong is found before the large model is opened.
    arms = chosen_arms(arguments.arms)
    templates = protocol.templates(arguments.prompts)
    paper = report.published(arguments.paper)
    concepts = [protocol.photographs(text) for text in arguments.concept]
    sets = protocol.concept_sets(concepts, arguments.together)
    if not arguments.model:
        raise ConceptSplitError("There is no model: give --model, a folder in diffusers format or a checkpoint file.")
    # --steps and --seed are those of the pictures: other pictures of the same adapters need no other training.
    trained = replace(train_config(arguments), steps=arguments.train_steps, seed=TrainConfig.seed)
    device = choose_device(arguments.device)
    scorer = Scorer(Clip(arguments.clip, device), Dino(arguments.dino, device), concepts)
    model = open_model(arguments)
    for one in concepts:
        masks = ", with masks" if one.masks else ""
        say(f"<{one.name}> = '{one.concept.class_word}', {len(one.files)} photographs{masks}")
    size = arguments.size or (model.default_size, model.default_size)
    bench = Bench(
        model,
        configs(replace(trained, prediction_type=model.prediction_type), arguments.lora_learning_rate),
        Sampling(arguments.steps, arguments.cfg or 1.0, arguments.sampler, size, arguments.batch),
        arguments.out,
        say,
    )
    seeds = numbers(arguments.seed, arguments.pictures)
    found, rows = measured(bench, scorer, arms, sets, templates, seeds)
    summed = report.summary(found)
    unknown = report.open_questions(summed, len(sets), len(templates), len(seeds), scorer.published, paper)
    kinds = dict.fromkeys(arm.kind for arm in arms.values() if arm.kind)
    data = {
        "machine": machine(),
        "version": __version__,
        "model": {"name": Path(model.source).name, "family": model.family, "predicts": model.prediction_type},
        "scorers": {score: about for score, (about, _) in scorer.published.items()},
        "concepts": {
            one.name: {"word": one.concept.class_word, "photographs": len(one.files), "masks": bool(one.masks)}
            for one in concepts
        },
        "prompts": templates,
        "seeds": seeds,
        "sampling": asdict(bench.sampling),
        "loda": asdict(LodaConfig()),
        "learning": {
            f"{one.name}, {kind}": bench.learned(one, kind).info.training for one in concepts for kind in kinds
        },
        "arms": summed,
        "paper": paper,
        "cannot_conclude": unknown,
    }
    write(arguments.out, data, report.table(summed, paper), unknown)
    report.grid(rows, [arm.title for arm in arms.values()], arguments.out / "grid.jpg")
    say(f"{arguments.out}: table.md, report.json, grid.jpg")


def measured(
    bench: Any, scorer: Any, arms: dict[str, Any], sets: list[Any], templates: tuple[str, ...], seeds: list[int]
) -> tuple[Any, dict[str, list[Path]]]:
    """Every picture's values, drawn and scored where they are not yet; the first picture of each prompt by every arm,
    under the set and the prompt."""
    from .protocol import prompt
    from .run import Kept

    found: Any = {name: {} for name in arms}
    rows: dict[str, list[Path]] = {}
    known = Kept(bench.out / f"scores-{scorer.digest}.jsonl")
    for group in sets:
        key, names = "+".join(one.name for one in group), [one.name for one in group]
        for at, template in enumerate(templates):
            for name, arm in arms.items():
                kept = bench.draw(name, arm, group, template, seeds)
                for index, seed in enumerate(seeds):
                    made = kept.values[template, seed]
                    path = bench.folder(name, arm, group) / made["file"]
                    place = (path.relative_to(bench.out).as_posix(),)
                    if place not in known.values:
                        with Image.open(path) as picture:
                            text = prompt(template, group, False)
                            known.add(place, scorer.score(picture.convert("RGB"), text, names, made["boxes"]))
                    values = {**known.values[place], "seconds": made["seconds"]}
                    found[name].setdefault(key, {})[at * len(seeds) + index] = values
                    if index == 0:
                        rows.setdefault(f"{key}: {template}", []).append(path)
    return found, rows


def chosen_arms(text: str) -> dict[str, Any]:
    """The arms of --arms, in their own order; all without it.

    Raises:
        ConceptSplitError: an arm that does not exist.
    """
    from .protocol import ARMS

    names = [name.strip() for name in text.split(",") if name.strip()]
    if strange := next((name for name in names if name not in ARMS), None):
        raise ConceptSplitError(f"There is no arm '{strange}': use some of {', '.join(ARMS)}.")
    return {name: arm for name, arm in ARMS.items() if name in names or not names}


def write(out: Path, data: dict[str, Any], table: str, unknown: list[str]) -> None:
    """report.json, and table.md which is also printed."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    about = f"{data['model']['name']} ({data['model']['family']}), {', '.join(data['scorers'].values())}."
    notes = "\n".join(f"- {line}" for line in unknown)
    text = f"{about} Means and 95 % intervals over pictures.\n\n{table}\n\nWhat this does not show:\n\n{notes}\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)


def main(argv: list[str] | None = None) -> int:
    """Runs it; gives the exit code. Whatever the user can put right is one sentence on stderr."""
    arguments = parser().parse_args(argv)
    try:
        run(arguments)
    except ConceptSplitError as problem:
        print(f"photographs: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. What is finished is kept; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
