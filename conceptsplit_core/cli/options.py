"""All options and their help; those of a training or a run are generated from the settings. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..options import options
from ..settings import CorrectionConfig, GateConfig, LodaConfig, SampleConfig, TrainConfig
from .arguments import Parser, RowParser, add_model, add_settings, count, seed, size

SAMPLERS = ("ddim", "euler")
NO_SAMPLES = {"sample_every"}  # the terminal draws no pictures while it trains

OVERVIEW = """\
Draw several learned concepts in one picture without mixing them.

  train    learn one concept (this dog, that mug) from a few pictures, into a small value adapter file
  sample   draw a prompt with one or more concepts: "a <rex> and a <mug>"
  render   draw a table: each row a picture, here, on a Ray cluster or on running ComfyUI servers
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
    --precision bf16 --gradient-checkpointing --batch-size 1
  Two GPUs, same result as one with the same --batch-size:
    accelerate launch --num_processes 2 -m conceptsplit_core train ...

what to change when:
  too little likeness   more --steps, then a higher --rank
  nothing but likeness  fewer --steps, or a lower strength when sampling
  loss is NaN           a lower --learning-rate, or --precision bf16 instead of fp16
"""
SAMPLE_END = """\
examples:
  Two concepts in one picture:
    python -m conceptsplit_core sample --model sd15.safetensors \\
        --adapter rex.safetensors --adapter mug.safetensors:0.8 \\
        --prompt "a <rex> beside a <mug>" --seed 7 --batch 4 --maps --out rex-and-mug.png
  Two LoRAs, each on its own person:
    python -m conceptsplit_core sample --model sdxl.safetensors --lora anna.safetensors:"ohwx woman":0.9 \\
        --lora tom.safetensors:"sks man" --prompt "<anna> and <tom> at a bus stop" --out anna-and-tom.png
  Only separate two words of a plain model:
    python -m conceptsplit_core sample --model sd15.safetensors --words "cat,dog" --prompt "a cat and a dog"

<rex> is written as the class word that rex was trained with, and bound to it. Without a placeholder the class word
itself is bound, the n-th occurrence to the n-th adapter of that class.
"""
RENDER_END = """\
examples:
  Each row of a table with the columns prompt, seed and adapter, for instance:
    python -m conceptsplit_core render table.csv --model sd15.safetensors --steps 25 --out out/table
  The same on a Ray cluster, four models at once:
    python -m conceptsplit_core render table.csv --ray --workers 4
  A graph of ComfyUI (menu: Export (API)) on two running servers, with columns named after its inputs:
    python -m conceptsplit_core render table.csv --graph graph.json --server 127.0.0.1:8188 --server 10.0.0.7:8188

A column is an option of `sample` without its dashes; a cell goes before the option given here, an empty cell takes it.
Several adapters or LoRAs stand in one cell, separated by ;. The same command goes on where the last one ended.
docs/render.md has a table to try.
"""
INSPECT_END = """\
examples:
  python -m conceptsplit_core inspect rex.safetensors
  python -m conceptsplit_core inspect rex.safetensors --svd 4 --out rex-small.safetensors
  python -m conceptsplit_core inspect rex.safetensors --model sd15.safetensors
"""
DEMO_END = """\
Draws two ordinary LoRAs merged and each on its own concept, trains two concepts the built-in model has never seen,
composes them without and with LODA from the same seeds, and writes pictures, curves and report.json.
Needs no download and no GPU.
"""


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
    _render(sub("render", "Draw a table: each row a picture.", RENDER_END))
    _inspect(sub("inspect", "Show what is in a value adapter file.", INSPECT_END))
    _demo(sub("demo", "Train two concepts on the built-in model and compose them.", DEMO_END))
    return parser


def _train(parser: argparse.ArgumentParser) -> None:
    need = parser.add_argument_group("what to learn")
    need.add_argument(
        "--images",
        required=True,
        metavar="FOLDER",
        help="pictures of the one thing, 3 to 10: PNG, JPEG, WebP, BMP or TIFF, any size",
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
    add_model(parser)
    how = parser.add_argument_group("how to learn it")
    add_settings(how, TrainConfig, options(TrainConfig).keys() - NO_SAMPLES)
    how.add_argument(
        "--size",
        type=size,
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
        "--captions",
        metavar="FILE",
        help="with --kind perfusion: a text file with an ordinary caption per line; what they have in common is kept "
        "from the concept (default: 300 of this package's)",
    )
    how.add_argument(
        "--beside",
        default="",
        metavar="WORDS",
        help="class words of other things in the pictures, such as 'cat, red ball'; with --mask-from attention they "
        "are kept out of what is learned",
    )
    how.add_argument(
        "--store", choices=("fp16", "fp32"), default="fp16", help="precision of the adapter file (default: fp16)"
    )


def _loda_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("separation (LODA): the first steps move the latent until concepts part")
    group.add_argument(
        "--loda",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on as soon as two concepts are in the prompt; LoRAs are located by a plan all the same (default: on)",
    )
    afg = {name for name in options(LodaConfig) if name.startswith("afg")}
    add_settings(group, LodaConfig, options(LodaConfig).keys() - afg)
    fix = parser.add_argument_group("attention fixing guidance (AFG): keep what LODA separated")
    add_settings(fix, LodaConfig, afg)


def _drawing(parser: argparse.ArgumentParser, prompt_required: bool) -> None:
    """What `sample` draws one picture with; in `render` for all rows of a table."""
    what = parser.add_argument_group("what to draw")
    what.add_argument(
        "--prompt", required=prompt_required, metavar="TEXT", help="the picture in words; <rex> is a concept"
    )
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
        "--lora",
        action="append",
        default=[],
        metavar="[NAME=]FILE[:WORDS][:STRENGTH]",
        help="ordinary LoRA file for one concept, may be given several times; WORDS are those it was trained on, such "
        "as 'ohwx woman', unless the file says them; 'ohwx woman; 0.4: ohwx woman in armour' has others from 0.4 of "
        "the steps on. It acts at its words and in its own region only",
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
    add_model(parser)
    how = parser.add_argument_group("sampling")
    add_settings(how, SampleConfig, options(SampleConfig))
    how.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="(default: ddim)")
    how.add_argument("--batch", type=count, default=1, help="pictures, with this seed and the next ones (default: 1)")
    how.add_argument("--size", type=size, metavar="N|WxH", help="in pixels (default: the model's own)")
    _loda_options(parser)
    gate = parser.add_argument_group("gate of Perfusion adapters: how far they reach beyond their own word")
    add_settings(gate, GateConfig, options(GateConfig))
    text = parser.add_argument_group("correction by similarities (T2I-Zero): rows of concepts, gathered anew")
    add_settings(text, CorrectionConfig, options(CorrectionConfig))


def row_parser() -> RowParser:
    """Reads the cells of one row of `render`, written as options."""
    parser = RowParser(add_help=False, allow_abbrev=False)
    _drawing(parser, prompt_required=False)
    return parser


def _render(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="TABLE", help="CSV, TSV, JSON lines (.jsonl) or JSON (.json, a list of rows)")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="pictures, contact sheets and report.json; what is whole there is not drawn again (default: out/TABLE)",
    )
    where = parser.add_argument_group("where to draw")
    where.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="on a Ray cluster: that of ADDRESS (or of RAY_ADDRESS), else one that is started on this machine; a token "
        "is taken from RAY_AUTH_TOKEN or ~/.ray/auth_token",
    )
    where.add_argument(
        "--workers", type=count, metavar="N", help="models on the Ray cluster (default: one per GPU, without GPUs one)"
    )
    where.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="on a running ComfyUI, may be given several times (with --graph alone: 127.0.0.1:8188); its steps are "
        "shown where websocket-client is installed",
    )
    where.add_argument(
        "--graph",
        metavar="FILE.json",
        help="what the servers run, from ComfyUI's menu Export (API); columns are then named after inputs: 12.seed, "
        "KSampler.seed, a node's title or a name that only one node has",
    )
    _drawing(parser, prompt_required=False)


def _sample(parser: argparse.ArgumentParser) -> None:
    _drawing(parser, prompt_required=True)
    out = parser.add_argument_group("output")
    out.add_argument(
        "--out",
        metavar="FILE.png",
        help="with --batch, the seed is added to the name (default: sample.png, sample_2.png …)",
    )
    out.add_argument("--maps", action="store_true", help="also write where each concept looked before and after LODA")


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="value adapter")
    parser.add_argument(
        "--svd",
        type=count,
        metavar="RANK",
        help="show what truncating to this rank would cost, relative to the whole adapter",
    )
    parser.add_argument("--out", metavar="FILE", help="with --svd: write the truncated adapter")
    add_model(parser, default=None)


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="out/demo", metavar="FOLDER", help="(default: out/demo)")
    parser.add_argument(
        "--concepts",
        default="",
        metavar="A,B",
        help="two to four of the built-in concepts (default: the two that the report shows)",
    )
    parser.add_argument("--steps", type=count, metavar="N", help="training steps per concept (default: as tuned)")
    parser.add_argument("--seeds", type=count, default=6, metavar="N", help="pictures per arm (default: 6)")
    parser.add_argument("--first-seed", type=seed, default=1000, metavar="SEED", help="(default: 1000)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of one command; for tests."""
    return build_parser().parse_args(argv)
