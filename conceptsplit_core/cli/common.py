"""What several commands share: the processes of a launch, opening a model quietly, devices, writing pictures."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from .. import __version__
from ..errors import ConceptSplitError
from ..files import OURS, PROGRAM, write_whole

if TYPE_CHECKING:
    from ..hosts.diffusers.model import DiffusersModel

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Launch:
    """This process's number among `world`, and its number on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0


def launched() -> Launch:
    """What `accelerate launch` or torchrun says about this process; one process alone without them.

    Raises:
        ConceptSplitError: WORLD_SIZE left behind by another launcher, without what belongs to it.
    """
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    numbers = [os.environ.get(name, "") for name in names]
    if numbers[0] in ("", "1"):
        return Launch()
    missing = [name for name, text in zip(names, numbers, strict=True) if not text.isdecimal()]
    missing += [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        wrong = f" but {missing[0]} is not set as a launcher does it"
        raise ConceptSplitError(
            f"WORLD_SIZE is set to {numbers[0][:20]}{', which is no number' if 'WORLD_SIZE' in missing else wrong}: "
            "unset WORLD_SIZE to train in one process, or start with `accelerate launch` or torchrun."
        )
    world, rank, local = map(int, numbers)
    return Launch(rank, world, local)


def _launched_or_alone() -> Launch:
    """`launched` for commands that work alone whatever another launcher left behind."""
    try:
        return launched()
    except ConceptSplitError:
        return Launch()


def silent() -> bool:
    """Whether this process leaves speaking to the first of several."""
    return _launched_or_alone().rank != 0


def say(text: str) -> None:
    """A line for the user."""
    if not silent():
        print(text, file=sys.stderr, flush=True)


def bar(total: int, what: str, unit: str = "step") -> Any:
    """A progress bar on stderr."""
    from tqdm import tqdm

    # With miniters, what is said beside the bar is shown without a step too.
    return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, miniters=0, disable=silent())


def choose_device(name: str) -> torch.device:
    """The device of this process: with several, each takes its own GPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", _launched_or_alone().local_rank % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConceptSplitError(f"There is no device '{name}' here: use --device cpu or auto.") from None
    return device


def open_model(arguments: argparse.Namespace) -> DiffusersModel:
    """The model of --model, without the libraries' own progress bars and advice."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)

    from ..hosts.diffusers.load import load_model

    return load_model(
        arguments.model,
        device=choose_device(arguments.device),
        dtype=PRECISION[arguments.precision],
        prediction_type=arguments.prediction,
        tokenizer=arguments.tokenizer,
    )


def to_tensor(pictures: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float [N, 3, H, W] in -1..1."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def encode_picture(picture: NDArray[np.uint8], facts: dict[str, str] | None = None) -> bytes:
    """A PNG with `facts` as text chunks; it says that it is ours and no training picture."""
    info = PngImagePlugin.PngInfo()
    for key, value in {OURS: f"{PROGRAM} {__version__}", **(facts or {})}.items():
        info.add_itxt(key, value)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def write_picture(picture: NDArray[np.uint8], path: Path, facts: dict[str, str] | None = None) -> None:
    """Writes `encode_picture`, whole or not at all, making its folder."""
    write_whole(path, encode_picture(picture, facts))


def machine() -> str:
    """The machine in a few words, for reports: no names, no paths."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
