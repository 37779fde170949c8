"""All options and their help. Imports nothing heavy."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

DIVERGENCES = ("jsd", "symmetric_kl", "bhattacharyya", "kl")
STEP_RULES = ("normalised", "gradient")
MAP_PARTS = ("auto", "all", "down")
SAMPLERS = ("ddim", "euler")
PRECISIONS = ("fp32", "bf16", "fp16")

# The defaults shown in --help. A test holds them equal to LodaConfig and TrainConfig, which are not imported here
# because torch takes seconds.
LODA_DEFAULTS: dict[str, Any] = {
    "loda_steps": -1,
    "loda_iterations": 3,
    "loda_strength": 0.02,
    "loda_rule": "normalised",
    "divergence": "jsd",
    "threshold": 0.0,
    "map_smoothing": 1.0,
    "map_downscale": 0,
    "map_part": "auto",
    "afg": True,
    "afg_inside": 3.0,
    "afg_outside": 3.0,
    "afg_region": 0.1,
    "afg_smoothing": 1.5,
    "afg_end": 0.7,
}
TRAIN_DEFAULTS: dict[str, Any] = {
    "steps": 500,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "weight_decay": 1e-2,
    "warmup": 10,
    "seed": 0,
    "save_every": 100,
    "background_weight": 0.1,
}

OVERVIEW = """\
Draw several learned concepts in one picture without mixing them.

  train    learn one concept (this dog, that mug) from a few pictures, into a small value adapter file
  sample   draw a prompt with one or more concepts: "a <rex> and a <mug>"
  inspect  show what is in a value adapter file
  demo     do all of it on the built-in model, in a few minutes on a CPU
"""
OVERVIEW_END = """\
examples:
  python -m conceptsplit_core demo --out out/demo
  python -m conceptsplit_core train --images photos/rex --class-word dog --name rex --model sd15.safetensors
  python -m conceptsplit_core sample --model sd15.safetensors --adapter rex.safetensors --adapter mug.safetensors \\
      --prompt "a <rex> beside a <mug>" --out rex-and-mug.png

`python -m conceptsplit_core COMMAND --help` explains a command.
"""
TRAIN_END = """\
examples:
  Learn a dog from the pictures in a folder (4 to 6 are enough), on the model in sd15.safetensors:
    python -m conceptsplit_core train --images photos/rex --class-word dog --name rex --model sd15.safetensors \\
        --tokenizer ComfyUI/comfy/sd1_tokenizer --out rex.safetensors
  Continue after Ctrl+C (until then the adapter so far is in --out):
    the same command with --resume
  Less memory:
    --precision bf16 --checkpointing --batch 1
  Two GPUs, same result as one with the same --batch:
    accelerate launch --num_processes 2 -m conceptsplit_core train ...

what to change when:
  too little likeness   more --steps, then a higher --rank
  nothing but likeness  fewer --steps, or a lower strength when sampling
  loss is NaN           a lower --lr, or --precision bf16 instead of fp16
"""
SAMPLE_END = """\
examples:
  Two concepts in one picture:
    python -m conceptsplit_core sample --model sd15.safetensors \\
        --adapter rex.safetensors --adapter mug.safetensors:0.8 \\
        --prompt "a <rex> beside a <mug>" --seed 7 --batch 4 --maps --out rex-and-mug.png
  Only separate two words of a plain model:
    python -m conceptsplit_core sample --model sd15.safetensors --words "cat,dog" --prompt "a cat and a dog"

<rex> is written as the class word that rex was trained with, and bound to it. Without a placeholder the class word
itself is bound, the n-th occurrence to the n-th adapter of that class.
"""
INSPECT_END = """\
examples:
  python -m conceptsplit_core inspect rex.safetensors
  python -m conceptsplit_core inspect rex.safetensors --svd 4 --out rex-small.safetensors
  python -m conceptsplit_core inspect rex.safetensors --model sd15.safetensors
"""
DEMO_END = """\
Trains two concepts the built-in model has never seen, composes them without and with LODA from the same seeds, and
writes pictures, curves and report.json. Needs no download and no GPU.
"""


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one sentence."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.split()[-1]
        print(f"{command}: {message[:1].upper()}{message[1:]} (see --help).", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    def sub(name: str, text: str, end: str) -> Parser:
        made: Parser = commands.add_parser(
            name, help=text, description=text, epilog=end, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        return made

    parser = Parser(
        prog="python -m conceptsplit_core",
        description=OVERVIEW,
        epilog=OVERVIEW_END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    _train(sub("train", "Learn one concept from pictures, into a value adapter file.", TRAIN_END))
    _sample(sub("sample", "Draw a prompt with one or more concepts.", SAMPLE_END))
    _inspect(sub("inspect", "Show what is in a value adapter file.", INSPECT_END))
    _demo(sub("demo", "Train two concepts on the built-in model and compose them.", DEMO_END))
    return parser


def _count(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is too small, use 1 or more")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a usable number")
    return value


def _size(text: str) -> tuple[int, int]:
    """'512' or '768x512' (width x height) to (height, width)."""
    parts = text.lower().replace("×", "x").split("x")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 8 or max(numbers) > 8192:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, use for instance 512 or 768x512")
    return (numbers[-1], numbers[0])


def _model_options(parser: argparse.ArgumentParser, default: str | None = "demo") -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=default,
        metavar="WHERE",
        help="'demo' (the built-in small model), a folder in diffusers format, or a .safetensors checkpoint of SD 1.x, "
        f"2.x or XL (default: {default or 'none'})",
    )
    group.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="folder with CLIP's vocab.json and merges.txt; needed for single checkpoint files only. ComfyUI has one: "
        "comfy/sd1_tokenizer",
    )
    group.add_argument(
        "--prediction",
        choices=("epsilon", "v_prediction"),
        help="what the model predicts; only when it was detected wrongly",
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of the model's weights; bf16 halves memory on recent GPUs (default: fp32)",
    )
    group.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda, cuda:1, mps (default: auto, a GPU if there is one)",
    )


def _train(parser: argparse.ArgumentParser) -> None:
    d = TRAIN_DEFAULTS
    need = parser.add_argument_group("what to learn")
    need.add_argument(
        "--images",
        required=True,
        metavar="FOLDER",
        help="pictures of the one thing, 3 to 20: PNG, JPEG, WebP, BMP or TIFF, any size",
    )
    need.add_argument(
        "--class-word",
        required=True,
        metavar="WORD",
        help="what the model would call it: dog, mug, backpack. One or a few plain words",
    )
    need.add_argument("--name", required=True, help="what prompts will call it: rex is written as <rex>")
    need.add_argument(
        "--masks",
        metavar="FOLDER",
        help="one mask per picture with the same file name, white where the thing is; the background then counts less",
    )
    need.add_argument("--out", metavar="FILE", help="adapter to write (default: NAME.safetensors)")
    _model_options(parser)
    how = parser.add_argument_group("how to learn it")
    how.add_argument(
        "--steps",
        type=_count,
        default=d["steps"],
        help=f"optimiser steps, 300 to 1000 is usual (default: {d['steps']})",
    )
    how.add_argument(
        "--rank",
        type=_count,
        default=8,
        help="size of the adapter per layer; 4 for a colour, 16 or more for fine detail (default: 8)",
    )
    how.add_argument("--alpha", type=_number, default=0.0, help="scale alpha/rank of the adapter; 0 means rank")
    how.add_argument(
        "--lr",
        type=_number,
        default=d["learning_rate"],
        metavar="RATE",
        help=f"learning rate of AdamW (default: {d['learning_rate']:g})",
    )
    how.add_argument(
        "--weight-decay",
        type=_number,
        default=d["weight_decay"],
        metavar="W",
        help=f"of AdamW (default: {d['weight_decay']:g})",
    )
    how.add_argument(
        "--warmup",
        type=_whole,
        default=d["warmup"],
        metavar="STEPS",
        help=f"steps until the full learning rate (default: {d['warmup']})",
    )
    how.add_argument(
        "--batch",
        type=_count,
        default=d["batch_size"],
        help=f"pictures per step, over all processes together (default: {d['batch_size']})",
    )
    how.add_argument("--seed", type=_whole, default=d["seed"], help=f"same seed, same adapter (default: {d['seed']})")
    how.add_argument(
        "--size",
        type=_size,
        metavar="N|WxH",
        help="pictures are scaled and cropped to this, in pixels (default: the model's own)",
    )
    how.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="training prompt with {} for the class word; may be given several times (default: a set of "
        "plain ones such as 'a photo of a {}')",
    )
    how.add_argument(
        "--background-weight",
        type=_number,
        default=d["background_weight"],
        metavar="W",
        help=f"with --masks: how much the background counts, 0 to 1 (default: {d['background_weight']})",
    )
    how.add_argument(
        "--checkpointing",
        action="store_true",
        help="recompute instead of remember: far less memory, about a third slower",
    )
    safe = parser.add_argument_group("stopping and going on")
    safe.add_argument(
        "--save-every",
        type=_whole,
        default=d["save_every"],
        metavar="STEPS",
        help=f"steps between resumable states, 0: at the end only (default: {d['save_every']})",
    )
    safe.add_argument(
        "--resume",
        action="store_true",
        help="go on from the state beside --out; the result is the same as without a stop",
    )
    safe.add_argument(
        "--store", choices=("fp16", "fp32"), default="fp16", help="precision of the adapter file (default: fp16)"
    )


def _loda_options(parser: argparse.ArgumentParser) -> None:
    d = LODA_DEFAULTS
    group = parser.add_argument_group("separation (LODA): the first steps move the latent until concepts part")
    group.add_argument(
        "--loda",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on as soon as two concepts are in the prompt (default: on)",
    )
    group.add_argument(
        "--loda-steps",
        type=_whole,
        metavar="N",
        help="sampling steps to optimise (default: the first fifth of --steps)",
    )
    group.add_argument(
        "--loda-iterations",
        type=_count,
        default=d["loda_iterations"],
        metavar="N",
        help=f"updates per step at most; more separates harder and costs time (default: {d['loda_iterations']})",
    )
    group.add_argument(
        "--loda-strength",
        type=_number,
        default=d["loda_strength"],
        metavar="X",
        help="size of an update in standard deviations of the latent; higher separates harder, too high "
        f"spoils the picture (default: {d['loda_strength']})",
    )
    group.add_argument(
        "--loda-rule",
        choices=STEP_RULES,
        default=d["loda_rule"],
        help="normalised: --loda-strength means the same on every model; gradient: the paper's, --loda-strength "
        f"about 20 (default: {d['loda_rule']})",
    )
    group.add_argument(
        "--divergence",
        choices=DIVERGENCES,
        default=d["divergence"],
        help=f"how overlap is measured (default: {d['divergence']})",
    )
    group.add_argument(
        "--threshold",
        type=_number,
        default=d["threshold"],
        metavar="X",
        help="divergence that is far enough apart; 0: the divergence's own (default: 0)",
    )
    group.add_argument(
        "--map-smoothing",
        type=_number,
        default=d["map_smoothing"],
        metavar="SIGMA",
        help=f"smoothing of the maps in map pixels (default: {d['map_smoothing']})",
    )
    group.add_argument(
        "--map-downscale",
        type=_whole,
        default=d["map_downscale"],
        metavar="N",
        help="use attention at 1/N of the latent's size; 0 chooses (default: 0)",
    )
    group.add_argument(
        "--map-part",
        choices=MAP_PARTS,
        default=d["map_part"],
        help="down reads only the layers on the way down: about half the cost and memory of an update (a third on "
        f"SDXL); auto does so on SDXL alone (default: {d['map_part']})",
    )
    fix = parser.add_argument_group("attention fixing guidance (AFG): keep what LODA separated")
    fix.add_argument(
        "--afg",
        action=argparse.BooleanOptionalAction,
        default=d["afg"],
        help=f"(default: {'on' if d['afg'] else 'off'})",
    )
    fix.add_argument(
        "--afg-inside",
        type=_number,
        default=d["afg_inside"],
        metavar="X",
        help=f"logits added to a concept inside its region (default: {d['afg_inside']:g})",
    )
    fix.add_argument(
        "--afg-outside",
        type=_number,
        default=d["afg_outside"],
        metavar="X",
        help=f"taken outside; 1e8 forbids, as in the paper (default: {d['afg_outside']:g})",
    )
    fix.add_argument(
        "--afg-region",
        type=_number,
        default=d["afg_region"],
        metavar="SHARE",
        help=f"share of the picture that is one concept's region (default: {d['afg_region']})",
    )
    fix.add_argument(
        "--afg-smoothing",
        type=_number,
        default=d["afg_smoothing"],
        metavar="SIGMA",
        help=f"smoothing before regions are taken, in map pixels (default: {d['afg_smoothing']})",
    )
    fix.add_argument(
        "--afg-end",
        type=_number,
        default=d["afg_end"],
        metavar="SHARE",
        help=f"share of the steps after which AFG lets go; 1: never (default: {d['afg_end']:g})",
    )


def _sample(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to draw")
    what.add_argument("--prompt", required=True, metavar="TEXT", help="the picture in words; <rex> is a concept")
    what.add_argument("--negative", default="", metavar="TEXT", help="what it should not be")
    what.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]FILE[:STRENGTH]",
        help="value adapter, may be given several times; strength 1 is as trained, 0 is off. NAME= gives "
        "it another name in this prompt",
    )
    what.add_argument(
        "--class-word",
        action="append",
        default=[],
        metavar="NAME=WORD",
        help="class word of an adapter whose file does not say it, such as one of the paper's trainer",
    )
    what.add_argument(
        "--words", default="", metavar="A,B", help="words of the prompt to separate as well, without any adapter"
    )
    _model_options(parser)
    how = parser.add_argument_group("sampling")
    how.add_argument("--steps", type=_count, default=30, help="sampling steps (default: 30)")
    how.add_argument(
        "--cfg", type=_number, default=7.5, metavar="SCALE", help="classifier-free guidance; 1 is none (default: 7.5)"
    )
    how.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="(default: ddim)")
    how.add_argument("--seed", type=_whole, default=0, help="of the first picture, the next have the next (default: 0)")
    how.add_argument("--batch", type=_count, default=1, help="number of pictures (default: 1)")
    how.add_argument("--size", type=_size, metavar="N|WxH", help="in pixels (default: the model's own)")
    _loda_options(parser)
    out = parser.add_argument_group("output")
    out.add_argument(
        "--out",
        default="sample.png",
        metavar="FILE.png",
        help="with --batch, the seed is added to the name (default: sample.png)",
    )
    out.add_argument("--maps", action="store_true", help="also write where each concept looked before and after LODA")


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="value adapter")
    parser.add_argument(
        "--svd",
        type=_count,
        metavar="RANK",
        help="show what truncating to this rank would cost, relative to the whole adapter",
    )
    parser.add_argument("--out", metavar="FILE", help="with --svd: write the truncated adapter")
    _model_options(parser, default=None)


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="out/demo", metavar="FOLDER", help="(default: out/demo)")
    parser.add_argument(
        "--concepts",
        default="",
        metavar="A,B",
        help="two to four of the built-in concepts (default: the two that the report shows)",
    )
    parser.add_argument("--steps", type=_count, metavar="N", help="training steps per concept (default: as tuned)")
    parser.add_argument("--seeds", type=_count, default=6, metavar="N", help="pictures per arm (default: 6)")
    parser.add_argument("--first-seed", type=_whole, default=1000, metavar="SEED", help="(default: 1000)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of one command; for tests."""
    return build_parser().parse_args(argv)
