"""Opening a model for the diffusers host: the built-in demo model, a folder, or one checkpoint file.

Nothing here uses the network. A single checkpoint file holds weights only; the three configurations it may belong
to are written out below, and the tokenizer's vocabulary has to be on disk.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import ConceptSplitError

FAMILIES = ("sd15", "sd21", "sdxl", "demo")


@dataclass(frozen=True)
class TextEncoder:
    """One tokenizer with its CLIP text model; `layer` is the hidden state used as context, None the final one."""

    tokenizer: Any
    model: torch.nn.Module
    layer: int | None = None
    projected: bool = False
    length: int = 77


@dataclass
class DiffusersModel:
    """A diffusion model opened through diffusers, with what differs between families already looked up.

    `alphas_cumprod` [T] is ᾱ of the training schedule; latents are scaled so that x_t = √ᾱ·x0 + √(1-ᾱ)·ε.
    """

    unet: Any
    vae: Any
    encoders: tuple[TextEncoder, ...]
    family: str
    prediction_type: str
    alphas_cumprod: Tensor
    scheduler: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    templates: tuple[str, ...] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def pixel_factor(self) -> int:
        """Pixels per latent cell along one side."""
        config = self.vae.config
        channels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or (1,) * 4
        return 2 ** (len(channels) - 1)

    @property
    def default_size(self) -> int:
        """Side in pixels the model was trained at."""
        side = self.unet.config.sample_size or 64
        side = side if isinstance(side, int) else side[0]
        return int(side) * self.pixel_factor

    @property
    def added_conditions(self) -> bool:
        """Whether the UNet wants SDXL's pooled text and size embedding."""
        return getattr(self.unet.config, "addition_embed_type", None) == "text_time"


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
        tokenizer: folder with CLIP's vocab.json and merges.txt; only needed for single checkpoint files.
        demo_file: for ``demo`` another checkpoint of the demo model's format.

    Raises:
        ConceptSplitError: what is missing or not readable, in one sentence.
    """
    if str(source) == "demo":
        model = _load_demo(demo_file)
    else:
        path = Path(source).expanduser()
        if path.is_dir():
            model = _load_folder(path, dtype)
        elif path.is_file():
            model = _load_file(path, dtype, tokenizer)
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
    needed = [n for n in ("unet", "vae", "text_encoder", "tokenizer") if not (path / n).is_dir()]
    if needed:
        raise ConceptSplitError(f"The model folder '{path}' has no subfolder '{needed[0]}'.")

    import diffusers
    import transformers

    def part(library: Any, name: str, default: str) -> Any:
        entry = index.get(name) or [None, None]
        cls = getattr(library, entry[1] or default, None)
        if cls is None or not hasattr(cls, "from_pretrained"):
            raise ConceptSplitError(f"The model folder '{path}' asks for an unknown class '{entry[1]}' as its {name}.")
        options: dict[str, Any] = {"subfolder": name, "local_files_only": True}
        if "Tokenizer" not in cls.__name__:
            if library is diffusers:
                options["torch_dtype"] = dtype
            variant = _variant(path / name)
            if variant:
                options["variant"] = variant
        try:
            return cls.from_pretrained(str(path), **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as problem:
            reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
            raise ConceptSplitError(f"The {name} in '{path}' cannot be loaded: {reason}") from None

    unet = part(diffusers, "unet", "UNet2DConditionModel")
    vae = part(diffusers, "vae", "AutoencoderKL")
    encoders = []
    for suffix in ("", "_2"):
        if not (path / f"text_encoder{suffix}").is_dir():
            continue
        encoders.append(
            _text_encoder(
                part(transformers, f"tokenizer{suffix}", "CLIPTokenizer"),
                part(transformers, f"text_encoder{suffix}", "CLIPTextModel"),
                getattr(unet.config, "addition_embed_type", None) == "text_time",
            )
        )
    scheduler = _scheduler_settings(path)
    return DiffusersModel(
        unet=unet,
        vae=vae,
        encoders=tuple(encoders),
        family=family_of(unet),
        prediction_type=scheduler.get("prediction_type", "epsilon"),
        alphas_cumprod=_alphas(scheduler),
        scheduler=scheduler,
        source=str(path),
    )


def _variant(folder: Path) -> str | None:
    """'fp16' when a folder holds only half-precision weights."""
    names = [p.name for p in folder.glob("*.safetensors")] + [p.name for p in folder.glob("*.bin")]
    return "fp16" if names and all(".fp16." in name for name in names) else None


def _text_encoder(tokenizer: Any, model: Any, dual: bool) -> TextEncoder:
    return TextEncoder(
        tokenizer=tokenizer,
        model=model,
        layer=-2 if dual else None,
        projected="WithProjection" in type(model).__name__,
        length=int(getattr(model.config, "max_position_embeddings", 77)),
    )


def _scheduler_settings(path: Path) -> dict[str, Any]:
    """The parts of a folder's scheduler configuration that describe the training schedule."""
    file = path / "scheduler" / "scheduler_config.json"
    found: dict[str, Any] = {}
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as problem:
            raise ConceptSplitError(f"'{file}' cannot be read: {problem}.") from None
    wanted = (
        "beta_start",
        "beta_end",
        "beta_schedule",
        "num_train_timesteps",
        "prediction_type",
        "steps_offset",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    settings = _schedule()
    settings.update({k: found[k] for k in wanted if k in found})
    return settings


def _schedule(prediction_type: str = "epsilon") -> dict[str, Any]:
    """The schedule all Stable Diffusion models were trained with."""
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "steps_offset": 1,
    }


def _alphas(settings: dict[str, Any]) -> Tensor:
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler(**settings, clip_sample=False)
    return scheduler.alphas_cumprod.clone()


def family_of(unet: Any) -> str:
    """'sd15', 'sd21' or 'sdxl' by the width of the text rows; 'unknown' for anything else."""
    width = unet.config.cross_attention_dim
    dual = getattr(unet.config, "addition_embed_type", None) == "text_time"
    if dual:
        return "sdxl" if width == 2048 else "unknown"
    return {768: "sd15", 1024: "sd21"}.get(width, "unknown")


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
            f"The demo model does not fit this version of diffusers: {str(problem).splitlines()[0]}"
        ) from None
    settings = {**_schedule(), **config["scheduler"]}
    return DiffusersModel(
        unet=unet,
        vae=vae,
        encoders=(_text_encoder(CLIPTokenizer.from_pretrained(str(checkpoint.TOKENIZER_DIR)), text, False),),
        family="demo",
        prediction_type=settings["prediction_type"],
        alphas_cumprod=_alphas(settings),
        scheduler=settings,
        source=str(file or "demo"),
        templates=DEMO_TEMPLATES,
    )


# --- single checkpoint files ----------------------------------------------------------------------------------


def detect_file(path: Path) -> tuple[str, str]:
    """Family and prediction type of a checkpoint file, from the names and shapes in its header.

    SD 2.1 at 768 px (v-prediction) and SD 2.x base at 512 px (ε) have the same names and shapes. They differ in one
    bias of the last block, whose spread is larger in models trained with v-prediction; ComfyUI tells them apart the
    same way.
    """
    if path.suffix.lower() != ".safetensors":
        raise ConceptSplitError(
            f"'{path.name}' is not a .safetensors file: pickled checkpoints can run code when opened and are refused."
        )
    probe = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    small = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    last = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            width = next((file.get_slice(n).get_shape()[1] for n in (probe, small) if n in names), None)
            spread = float(file.get_tensor(last).float().std(correction=0)) if last in names else 0.0
    except (SafetensorError, OSError) as problem:
        raise ConceptSplitError(f"'{path.name}' is not a readable safetensors file: {problem}.") from None
    family = {768: "sd15", 1024: "sd21", 2048: "sdxl"}.get(width or 0)
    if family is None:
        raise ConceptSplitError(
            f"'{path.name}' is not a Stable Diffusion 1.x, 2.x or XL checkpoint: no cross-attention of width 768, "
            "1024 or 2048 was found in it."
        )
    return family, "v_prediction" if family == "sd21" and spread > 0.09 else "epsilon"


def _load_file(path: Path, dtype: torch.dtype, tokenizer: str | os.PathLike[str] | None) -> DiffusersModel:
    family, prediction = detect_file(path)
    words = _tokenizer_folder(path, tokenizer)
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    with tempfile.TemporaryDirectory(prefix="conceptsplit-") as temp, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_config(Path(temp), family, prediction, words)
        pipeline = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
        options: dict[str, Any] = {} if family == "sdxl" else {"safety_checker": None}
        try:
            loaded = pipeline.from_single_file(
                str(path), config=temp, local_files_only=True, torch_dtype=dtype, **options
            )
        except Exception as problem:  # a file that lacks a part raises diffusers' own kinds of error
            reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
            raise ConceptSplitError(f"'{path.name}' cannot be loaded as a {family} checkpoint: {reason}") from None
    pairs = [(loaded.tokenizer, loaded.text_encoder)]
    if family == "sdxl":
        pairs.append((loaded.tokenizer_2, loaded.text_encoder_2))
    settings = _schedule(prediction)
    return DiffusersModel(
        unet=loaded.unet,
        vae=loaded.vae,
        encoders=tuple(_text_encoder(t, m, family == "sdxl") for t, m in pairs),
        family=family,
        prediction_type=prediction,
        alphas_cumprod=_alphas(settings),
        scheduler=settings,
        source=str(path),
    )


def _tokenizer_folder(model: Path, given: str | os.PathLike[str] | None) -> Path:
    """Where CLIP's vocabulary lies: the folder the user named, or `tokenizer` beside the checkpoint."""
    places = [Path(given).expanduser()] if given else [model.parent / "tokenizer"]
    for place in places:
        if (place / "tokenizer.json").is_file() or (
            (place / "vocab.json").is_file() and (place / "merges.txt").is_file()
        ):
            return place
    raise ConceptSplitError(
        f"A single checkpoint file has no tokenizer, and '{places[0]}' holds no vocab.json and merges.txt: name a "
        "folder with CLIP's (ComfyUI ships one as comfy/sd1_tokenizer) with --tokenizer."
    )


def write_config(folder: Path, family: str, prediction_type: str, tokenizer: Path) -> None:
    """Writes a weightless diffusers folder for `family`: what a hub repository would supply beside the weights."""
    dual = family == "sdxl"
    parts: dict[str, list[str | None]] = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if dual:
        parts["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        parts["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
    else:
        parts["safety_checker"] = [None, None]
        parts["feature_extractor"] = [None, None]
    name = "StableDiffusionXLPipeline" if dual else "StableDiffusionPipeline"
    extra = {"force_zeros_for_empty_prompt": True} if dual else {"requires_safety_checker": False}
    _write(folder / "model_index.json", {"_class_name": name, **extra, **parts})
    _write(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": "DDIMScheduler", **_schedule(prediction_type), "clip_sample": False, "set_alpha_to_one": False},
    )
    _write(folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", **UNET_CONFIGS[family]})
    _write(
        folder / "vae" / "config.json",
        {
            "_class_name": "AutoencoderKL",
            **VAE_CONFIG,
            "sample_size": 1024 if dual else 512,
            "scaling_factor": 0.13025 if dual else 0.18215,
        },
    )
    _write(folder / "text_encoder" / "config.json", TEXT_CONFIGS["open" if family == "sd21" else "clip"])
    if dual:
        _write(folder / "text_encoder_2" / "config.json", TEXT_CONFIGS["bigg"])
    for suffix in ("", "_2") if dual else ("",):
        target = folder / f"tokenizer{suffix}"
        target.mkdir(parents=True)
        for file in ("vocab.json", "merges.txt", "tokenizer.json"):
            if (tokenizer / file).is_file():
                (target / file).write_bytes((tokenizer / file).read_bytes())
        # OpenCLIP's encoders were trained with id 0, the exclamation mark, as padding.
        pad = "!" if family == "sd21" or suffix else "<|endoftext|>"
        _write(
            target / "tokenizer_config.json",
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": 77,
                "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>",
                "pad_token": pad,
            },
        )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


_UNET_COMMON: dict[str, Any] = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
}
_FOUR: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
UNET_CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {**_UNET_COMMON, **_FOUR, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        **_UNET_COMMON,
        **_FOUR,
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        **_UNET_COMMON,
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE_CONFIG: dict[str, Any] = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
_TEXT_COMMON: dict[str, Any] = {
    "model_type": "clip_text_model",
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "pad_token_id": 1,
    "vocab_size": 49408,
}
# eos_token_id 2 is what the released configurations say: transformers then pools at the highest id, which is right
# for CLIP's vocabulary whatever the padding.
TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {
        **_TEXT_COMMON,
        "architectures": ["CLIPTextModel"],
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
    },
    "open": {
        **_TEXT_COMMON,
        "architectures": ["CLIPTextModel"],
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "projection_dim": 512,
    },
    "bigg": {
        **_TEXT_COMMON,
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
    },
}
