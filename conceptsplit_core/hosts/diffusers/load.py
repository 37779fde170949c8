"""Opening a model for the diffusers host: the built-in demo model, a folder, or one checkpoint file.

Nothing here uses the network.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ...errors import ConceptSplitError
from ...files import user_path
from .model import DiffusersModel, check_channels, family_of, text_encoder
from .schedule import folder_schedule, schedule, solved
from .single_file import first_line, is_tokenizer, load_file


def load_model(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    prediction_type: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    demo_file: str | os.PathLike[str] | None = None,
) -> DiffusersModel:
    """Opens `source`: the word ``demo``, a folder in diffusers format, or a .safetensors checkpoint.

    Args:
        prediction_type: "epsilon" or "v_prediction" to overrule what was detected.
        tokenizer: folder with CLIP's vocab.json and merges.txt, for single checkpoint files; None looks beside the
            file and in a ComfyUI.
        demo_file: for ``demo`` another checkpoint of the demo model's format.

    Raises:
        ConceptSplitError: what is missing or not readable, in one sentence.
    """
    if str(source) == "demo":
        model = _load_demo(demo_file)
    else:
        path = user_path(source)
        if path.is_dir():
            model = _load_folder(path, dtype)
        elif path.is_file():
            model = load_file(path, dtype, tokenizer)
        else:
            raise ConceptSplitError(
                f"There is no model at '{source}': give 'demo', a folder in diffusers format, or a .safetensors file."
            )
    if prediction_type is not None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ConceptSplitError(f"Prediction type {prediction_type!r} is unknown: use 'epsilon' or 'v_prediction'.")
        model.prediction_type = prediction_type
    if model.prediction_type not in ("epsilon", "v_prediction"):
        raise ConceptSplitError(
            f"The model at '{source}' predicts {model.prediction_type!r}: only 'epsilon' and 'v_prediction' models "
            "are supported."
        )
    model.scheduler["prediction_type"] = model.prediction_type
    # SDXL's VAE overflows in half precision; a VAE runs once per picture, so fp32 costs little anywhere.
    wanted = [(model.unet, dtype), (model.vae, torch.float32 if dtype == torch.float16 else dtype)]
    wanted += [(encoder.model, dtype) for encoder in model.encoders]
    for module, kind in wanted:
        module.eval().requires_grad_(False).to(device)
        if next(module.parameters()).dtype != kind:
            module.to(kind)
    return model


# --- folders --------------------------------------------------------------------------------------------------


def _load_folder(path: Path, dtype: torch.dtype) -> DiffusersModel:
    index_path = path / "model_index.json"
    if not index_path.is_file():
        raise ConceptSplitError(f"'{path}' is not a model folder in diffusers format: it has no model_index.json.")
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as problem:
        raise ConceptSplitError(f"'{index_path}' cannot be read: {problem}.") from None
    if not isinstance(index, dict):
        raise ConceptSplitError(f"'{index_path}' is not a table of the model's parts: download the model again.")
    needed = [n for n in ("unet", "vae", "text_encoder", "tokenizer") if not (path / n).is_dir()]
    if needed:
        raise ConceptSplitError(f"The model folder '{path}' has no subfolder '{needed[0]}'.")

    # Both before any weight is read.
    latent_channels = _number(path / "vae" / "config.json", "latent_channels")
    check_channels(f"The model folder '{path}'", _number(path / "unet" / "config.json", "in_channels"), latent_channels)
    described = folder_schedule(path)
    try:
        settings, alphas = solved(described)
    except Exception as problem:  # a value of another type, or one that no schedule can have
        raise ConceptSplitError(f"The scheduler of '{path}' cannot be used: {first_line(problem)}") from None

    import diffusers
    import transformers

    def part(library: Any, name: str, default: str) -> Any:
        entry = index.get(name) or [None, None]
        asked = entry[1] or default if isinstance(entry, list) and len(entry) == 2 else entry
        cls = getattr(library, asked, None) if isinstance(asked, str) else None
        if cls is None or not hasattr(cls, "from_pretrained"):
            raise ConceptSplitError(f"The model folder '{path}' asks for an unknown class '{asked}' as its {name}.")
        options: dict[str, Any] = {"subfolder": name, "local_files_only": True}
        weights = "Tokenizer" not in cls.__name__
        if weights:
            options["output_loading_info"] = True
            if library is diffusers:
                options["torch_dtype"] = dtype
            variant = _variant(path / name)
            if variant:
                options["variant"] = variant
        elif not is_tokenizer(path / name):
            raise ConceptSplitError(
                f"The {name} in '{path}' has no words: download its vocab.json and merges.txt, or tokenizer.json."
            )
        try:
            made = cls.from_pretrained(str(path), **options)
        except Exception as problem:  # libraries raise their own kinds of error on a part that does not fit its class
            raise ConceptSplitError(f"The {name} in '{path}' cannot be loaded: {first_line(problem)}") from None
        if not weights:
            return made
        made, told = made
        # Positions are counted anew; files have them or not.
        if missing := sorted(key for key in told["missing_keys"] if not key.endswith("position_ids")):
            raise ConceptSplitError(
                f"The {name} in '{path}' lacks {len(missing)} of its tensors, such as {missing[0]}: download it again."
            )
        return made

    unet = part(diffusers, "unet", "UNet2DConditionModel")
    supported: Any = diffusers.UNet2DConditionModel
    if not isinstance(unet, supported):
        raise ConceptSplitError(
            f"The unet in '{path}' is a {type(unet).__name__}: choose a model of SD 1.x, 2.x or XL, which has a "
            "UNet2DConditionModel."
        )
    vae = part(diffusers, "vae", "AutoencoderKL")
    encoders = []
    for suffix in ("", "_2"):
        if not (path / f"text_encoder{suffix}").is_dir():
            continue
        encoders.append(
            text_encoder(
                part(transformers, f"tokenizer{suffix}", "CLIPTokenizer"),
                part(transformers, f"text_encoder{suffix}", "CLIPTextModel"),
                getattr(unet.config, "addition_embed_type", None) == "text_time",
            )
        )
    return DiffusersModel(
        unet=unet,
        vae=vae,
        encoders=tuple(encoders),
        family=family_of(unet),
        prediction_type=settings["prediction_type"],
        alphas_cumprod=alphas,
        scheduler=settings,
        source=str(path),
    )


def _number(config: Path, key: str) -> int:
    """A number of a part's configuration; 4, diffusers' own default, where it cannot be read: loading says why."""
    try:
        return int(json.loads(config.read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, TypeError, KeyError):
        return 4


def _variant(folder: Path) -> str | None:
    """The variant to open of a folder without plain weights, such as 'fp16'; files may be in parts."""
    names = [p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin")]
    found = {match[1] if (match := _VARIANT.search(name)) else None for name in names}
    return None if not found or None in found else "fp16" if "fp16" in found else min(filter(None, found))


# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
_VARIANT = re.compile(r"\.(\w+)(?:-\d{5}-of-\d{5})?\.\w+$")


# --- the demo model -------------------------------------------------------------------------------------------


# The demo model was trained on captions with and without such prefixes.
DEMO_TEMPLATES = ("a {}", "a photo of a {}", "the {}", "a picture of a {}", "a drawing of a {}")


def _load_demo(file: str | os.PathLike[str] | None = None) -> DiffusersModel:
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from ...demo import checkpoint

    try:
        parts = checkpoint.load(Path(file) if file else checkpoint.DEMO_FILE)
    except (OSError, ValueError, KeyError, SafetensorError) as problem:
        raise ConceptSplitError(f"The demo model cannot be loaded: {problem}.") from None
    config = parts.config
    unet: Any = UNet2DConditionModel(**config["unet"])
    vae: Any = AutoencoderTiny(**config["vae"])
    text = CLIPTextModel(CLIPTextConfig(**config["text_encoder"]))
    # transformers before 5.6 keeps the encoder one level down, under `text_model`.
    prefix = "text_model." if hasattr(text, "text_model") else ""
    try:
        unet.load_state_dict(parts.unet)
        vae.load_state_dict(parts.vae)
        text.load_state_dict({prefix + k: v for k, v in parts.text_encoder.items()})
    except RuntimeError as problem:
        raise ConceptSplitError(
            f"The demo model does not fit this version of diffusers: {first_line(problem)}"
        ) from None
    settings, alphas = solved({**schedule(), **config["scheduler"]})
    return DiffusersModel(
        unet=unet,
        vae=vae,
        encoders=(text_encoder(CLIPTokenizer.from_pretrained(str(checkpoint.TOKENIZER_DIR)), text, False),),
        family="demo",
        prediction_type=settings["prediction_type"],
        alphas_cumprod=alphas,
        scheduler=settings,
        source=str(file or "demo"),
        templates=DEMO_TEMPLATES,
    )
