"""One checkpoint file: what it is, read from its header, and how diffusers is made to open it without a network."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...errors import ConceptSplitError
from ...files import refuse_others, user_path
from .configs import TEXT_CONFIGS, write_config
from .model import DiffusersModel, check_channels, text_encoder
from .schedule import refuse_denoiser, schedule, solved


@dataclass(frozen=True)
class CheckpointKind:
    """What a checkpoint file is: its family, what it predicts, and whether its last step is pure noise.

    old_text_encoder: the names of its text encoder are those of 2022, without `text_model.`; diffusers can't read them.
    """

    family: str
    prediction_type: str
    zero_terminal_snr: bool = False
    old_text_encoder: bool = False


def detect_file(path: Path) -> CheckpointKind:
    """What a checkpoint file is, from the names and shapes in its header, as ComfyUI tells it.

    SD 2.1 at 768 px (v-prediction) and SD 2.x base at 512 px (ε) have the same names and shapes. They differ in one
    bias of the last block, whose spread is larger in models trained with v-prediction. SDXL files say it with empty
    tensors named `v_pred` and `ztsnr`.

    Raises:
        ConceptSplitError: not readable, another kind of file, an EDM model, or a UNet with extra input channels.
    """
    if path.suffix.lower() != ".safetensors":
        raise ConceptSplitError(
            f"'{path.name}' is not a .safetensors file: pickled checkpoints can run code when opened and are refused."
        )
    unet = "model.diffusion_model."
    probe = unet + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    small = unet + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    last = unet + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    first = unet + "input_blocks.0.0.weight"
    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            width = next((file.get_slice(n).get_shape()[1] for n in (probe, small) if n in names), None)
            spread = float(file.get_tensor(last).float().std(correction=0)) if last in names else 0.0
            channels = file.get_slice(first).get_shape()[1] if first in names else 4
    except (SafetensorError, OSError) as problem:
        with path.open("rb") as file:
            refuse_others(file.read(256), f"'{path.name}'")
        raise ConceptSplitError(f"'{path.name}' is not a readable safetensors file: {problem}.") from None
    family = {768: "sd15", 1024: "sd21", 2048: "sdxl"}.get(width or 0)
    if family is None:
        raise ConceptSplitError(
            f"'{path.name}' is not a Stable Diffusion 1.x, 2.x or XL checkpoint: no cross-attention of width 768, "
            "1024 or 2048 was found in it."
        )
    check_channels(f"'{path.name}'", channels)
    if scaled := next(
        (n for n in sorted(names) if re.search(r"\.scale_(weight|input)$|scaled_fp8$|\.comfy_quant$", n)), None
    ):
        raise ConceptSplitError(
            f"'{path.name}' holds fp8 weights with a scale of their own ({scaled}), which the terminal does not read: "
            "use the fp16 or bf16 version here, or this one in ComfyUI."
        )
    if names & {"edm_mean", "edm_vpred.sigma_max"}:
        refuse_denoiser(f"'{path.name}'", "an EDM model")
    predicts = "v_prediction" if "v_pred" in names or (family == "sd21" and spread > 0.09) else "epsilon"
    old = any(name.startswith((_OLD_TEXT + "embeddings.", _OLD_TEXT + "encoder.")) for name in names)
    return CheckpointKind(family, predicts, "ztsnr" in names, old)


_OLD_TEXT = "cond_stage_model.transformer."


def _old_text_encoder(path: Path, dtype: torch.dtype) -> Any:
    """The text encoder of an SD 1.x file of 2022."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model: Any = CLIPTextModel(CLIPTextConfig(**TEXT_CONFIGS["clip"]))
    model.to(dtype)
    wanted = model.state_dict()
    with safe_open(str(path), framework="pt") as file:
        # transformers before 5.6 keeps the encoder one level down, under `text_model`.
        found = {name: _OLD_TEXT + name.removeprefix("text_model.") for name in wanted}
        lacking = sorted(set(found.values()) - set(file.keys()))
        if lacking:
            raise ConceptSplitError(f"'{path.name}' lacks {lacking[0]}, a part of its text encoder: download it again.")
        model.load_state_dict({name: file.get_tensor(other) for name, other in found.items()})
    return model


def load_file(path: Path, dtype: torch.dtype, tokenizer: str | os.PathLike[str] | None) -> DiffusersModel:
    """Opens a checkpoint file through diffusers.

    Args:
        tokenizer: folder with CLIP's vocabulary; `tokenizer` beside the file when None.

    Raises:
        ConceptSplitError: what `detect_file` refuses, no vocabulary, or a file that lacks a part.
    """
    kind = detect_file(path)
    family = kind.family
    words = _tokenizer_folder(path, tokenizer)
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    with tempfile.TemporaryDirectory(prefix="conceptsplit-") as temp, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_config(Path(temp), family, kind.prediction_type, words)
        pipeline = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
        options: dict[str, Any] = {} if family == "sdxl" else {"safety_checker": None}
        if kind.old_text_encoder:
            options["text_encoder"] = _old_text_encoder(path, dtype)
        try:
            loaded = pipeline.from_single_file(
                str(path), config=temp, local_files_only=True, torch_dtype=dtype, **options
            )
        except Exception as problem:  # a file that lacks a part raises diffusers' own kinds of error
            raise ConceptSplitError(
                f"'{path.name}' cannot be loaded as a {family} checkpoint: {first_line(problem)}"
            ) from None
    pairs = [(loaded.tokenizer, loaded.text_encoder)]
    if family == "sdxl":
        pairs.append((loaded.tokenizer_2, loaded.text_encoder_2))
    settings, alphas = solved(schedule(kind.prediction_type, kind.zero_terminal_snr))
    return DiffusersModel(
        unet=loaded.unet,
        vae=loaded.vae,
        encoders=tuple(text_encoder(t, m, family == "sdxl") for t, m in pairs),
        family=family,
        prediction_type=kind.prediction_type,
        alphas_cumprod=alphas,
        scheduler=settings,
        source=str(path),
    )


def first_line(problem: Exception) -> str:
    """What a library says of an error, or the error's kind where it says nothing."""
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)


def is_tokenizer(folder: Path) -> bool:
    """Whether CLIP's words lie there."""
    files = [folder / name for name in ("vocab.json", "merges.txt")]
    return (folder / "tokenizer.json").is_file() or all(file.is_file() for file in files)


def _tokenizer_folder(model: Path, given: str | os.PathLike[str] | None) -> Path:
    """Where CLIP's words lie: the folder the user named, or `tokenizer` beside the checkpoint, or a ComfyUI's.

    Raises:
        ConceptSplitError: nowhere.
    """
    hosts = [user_path(part) for part in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if part]
    # Not resolved: a pack that is linked into custom_nodes belongs to that ComfyUI.
    nodes = Path(os.path.abspath(__file__)).parents[4]
    if nodes.name == "custom_nodes":
        hosts.append(nodes.parent)
    usual = [model.parent / "tokenizer", *(host / "comfy" / "sd1_tokenizer" for host in hosts)]
    places = [user_path(given)] if given else usual
    for place in places:
        if is_tokenizer(place):
            return place
    raise ConceptSplitError(
        f"A single checkpoint file has no tokenizer, and '{places[0]}' holds no vocab.json and merges.txt: set "
        "COMFYUI_PATH to a ComfyUI, which ships CLIP's as comfy/sd1_tokenizer, or name a folder with them with "
        "--tokenizer."
    )
