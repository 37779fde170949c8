"""Kinds of arguments that commands share: numbers and sizes, the options of a settings class, those of a model.

Imports nothing heavy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from ..errors import ConceptSplitError
from ..options import Option, defaults, options, shown
from ..settings import SEEDS

PRECISIONS = ("fp32", "bf16", "fp16")
PREDICTIONS = ("epsilon", "v_prediction")  # what the terminal samples


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one sentence."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.split()[-1]
        print(f"{command}: {message[:1].upper()}{message[1:]} (see --help).", file=sys.stderr)
        raise SystemExit(2)


class RowParser(argparse.ArgumentParser):
    """argparse for one row of a table: a mistake is that row's."""

    def error(self, message: str) -> NoReturn:
        raise ConceptSplitError(f"{message.removeprefix('argument --')}.")


def count(text: str) -> int:
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is too small, use 1 or more")
    return value


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def seed(text: str) -> int:
    """Wrapped around as ComfyUI's seeds are."""
    return whole(text) % SEEDS


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _reader(name: str, option: Option, default: Any) -> Callable[[str], Any]:
    """Reads the text of one option and refuses what is out of its range."""
    kinds: dict[type, Callable[[str], Any]] = {int: whole, float: number, str: str}
    reads = seed if option.high == SEEDS - 1 else kinds[type(default)]

    def read(text: str) -> Any:
        value = reads(text)
        if option.fault(name, value):
            raise argparse.ArgumentTypeError(f"{text!r} is not possible, use {option.range}")
        return value

    return read


def add_settings(parser: Any, config: Any, names: Collection[str]) -> None:
    """Options of the terminal for fields of a settings class; --afg-end for afg_end."""
    start = defaults(config)
    for name, option in options(config).items():
        if name not in names:
            continue
        default = start[name]
        limits = "" if isinstance(default, (bool, str)) else f"{option.range}; "
        about = f"{option.text} ({limits}default: {shown(default)})".replace("%", "%%")
        how: dict[str, Any] = {"default": default, "help": about}
        if isinstance(default, bool):
            how["action"] = argparse.BooleanOptionalAction
        else:
            how["type"] = _reader(name, option, default)
            how["metavar"] = "|".join(map(str, option.allowed)) or ("N" if isinstance(default, int) else "X")
        parser.add_argument(f"--{name.replace('_', '-')}", **how)


def size(text: str) -> tuple[int, int]:
    """'512' or '768x512' (width x height) to (height, width)."""
    parts = text.lower().replace("×", "x").split("x")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 8 or max(numbers) > 8192:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, use for instance 512 or 768x512")
    return (numbers[-1], numbers[0])


def add_model(parser: argparse.ArgumentParser, default: str | None = "demo") -> None:
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
        help="folder with CLIP's vocab.json and merges.txt, for single checkpoint files (default: comfy/sd1_tokenizer "
        "of the ComfyUI in COMFYUI_PATH, or of the one that this pack is installed in)",
    )
    group.add_argument(
        "--prediction",
        choices=PREDICTIONS,
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
