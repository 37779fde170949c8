"""The built-in demo checkpoint as the host's own MODEL, CLIP and VAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ...demo.checkpoint import TOKENIZER_DIR, DemoCheckpoint, load, taesd_state_dict
from ...errors import ConceptSplitError
from .model import adopt_parameters

HOST_VOCABULARY = 49408  # rows of the host's token embedding, whatever the tokenizer


class DemoLatent(comfy.latent_formats.LatentFormat):
    """Eight channels; the first three started as red, green and blue and still show them roughly."""

    latent_channels = 8

    def __init__(self, scale_factor: float = 1.0):
        self.scale_factor = scale_factor
        self.latent_rgb_factors = [[0.3 * (i == j) for j in range(3)] for i in range(self.latent_channels)]
        self.latent_rgb_factors_bias = [0.0, 0.0, 0.0]


class DemoConfig(comfy.supported_models_base.BASE):
    """What the host's loader would detect, told instead."""

    unet_config: ClassVar[dict[str, Any]] = {}
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    latent_format = DemoLatent
    memory_usage_factor = 1.0

    def __init__(self, config: dict[str, Any]):
        scheduler = config["scheduler"]
        if scheduler["beta_schedule"] != "scaled_linear" or scheduler["prediction_type"] != "epsilon":
            raise ConceptSplitError("The demo checkpoint is of a newer kind than this node pack: update the pack.")
        super().__init__(dict(config["unet_ldm"]))
        self.latent_format = DemoLatent(config["scaling_factor"])
        self.sampling_settings = {
            "beta_schedule": "linear",  # the host's name for what diffusers calls scaled_linear
            "linear_start": scheduler["beta_start"],
            "linear_end": scheduler["beta_end"],
            "timesteps": scheduler["num_train_timesteps"],
        }
        self.conceptsplit_demo = True
        self.set_inference_dtype(torch.float32, None)


def load_demo() -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of the demo checkpoint, in fp32: it is small, and exact everywhere.

    Raises:
        ConceptSplitError: the file is missing or of another version.
    """
    checkpoint = demo_checkpoint()
    return _model(checkpoint), text_encoder(checkpoint), autoencoder(checkpoint)


def demo_checkpoint() -> DemoCheckpoint:
    """What the demo checkpoint's file holds.

    Raises:
        ConceptSplitError: the file is missing or of another version.
    """
    try:
        return load()
    except (OSError, ValueError) as error:
        raise ConceptSplitError(
            f"The demo checkpoint cannot be read ({error}): install the node pack again."
        ) from error


def _model(checkpoint: DemoCheckpoint) -> comfy.model_patcher.ModelPatcher:
    config = DemoConfig(checkpoint.config)
    offload = comfy.model_management.unet_offload_device()
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.EPS, device=offload)
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    return loaded(model, {names[key]: value.float() for key, value in checkpoint.unet.items()})


def loaded(model: comfy.model_base.BaseModel, state: Mapping[str, Tensor]) -> comfy.model_patcher.ModelPatcher:
    """The MODEL whose denoiser has these weights, which autograd can pass through."""
    model.diffusion_model.load_state_dict(state)
    adopt_parameters(model.diffusion_model)
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def text_encoder(checkpoint: DemoCheckpoint, rows: int | None = None) -> comfy.sd.CLIP:
    """The text encoder; `rows` of a text at a time, instead of as many as it was trained with."""
    config = dict(checkpoint.config["text_encoder"])
    config["max_position_embeddings"] = rows = rows or config["max_position_embeddings"]

    class Tokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None):
            super().__init__(
                str(TOKENIZER_DIR),
                max_length=rows,
                embedding_directory=embedding_directory,
                embedding_size=config["hidden_size"],
                tokenizer_data=tokenizer_data or {},
            )

    class BothTokenizers(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None):
            super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=Tokenizer)

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None):
            super().__init__(
                device=device,
                max_length=rows,
                textmodel_json_config=dict(config),
                dtype=dtype,
                special_tokens={
                    "start": config["bos_token_id"],
                    "end": config["eos_token_id"],
                    "pad": config["pad_token_id"],
                },
                return_projected_pooled=False,
                model_options=model_options or {},
            )

    class TextModel(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None):
            super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=Encoder)

    target = comfy.supported_models_base.ClipTarget(BothTokenizers, TextModel)
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    state = {_text_key(key): value.float() for key, value in checkpoint.text_encoder.items()}
    embedding = "text_model.embeddings.token_embedding.weight"
    state[embedding] = _padded(state[embedding], HOST_VOCABULARY)
    places = "text_model.embeddings.position_embedding.weight"
    state[places] = state[places][:rows]
    state.pop("text_model.embeddings.position_ids", None)
    missing, unexpected = clip.load_sd(state)
    # The host projects the pooled text; neither CLIPTextModel nor this UNet knows of that.
    missing = [key for key in missing if "text_projection" not in key]
    if missing or unexpected:
        raise ConceptSplitError(f"The demo checkpoint's text encoder does not fit ({(missing + unexpected)[0]}).")
    encoder = clip.cond_stage_model.clip_l.transformer
    with torch.inference_mode(False), torch.no_grad():
        encoder.text_projection.weight = torch.nn.Parameter(torch.eye(config["hidden_size"]), requires_grad=False)
    adopt_parameters(clip.cond_stage_model)
    return clip


def _text_key(key: str) -> str:
    return key if key.startswith("text_model.") else f"text_model.{key}"


def _padded(weight: Tensor, rows: int) -> Tensor:
    """Token embeddings [v, d] with zero rows up to what the host allocates; no prompt reaches them."""
    return torch.cat([weight, weight.new_zeros(rows - weight.shape[0], weight.shape[1])])


def autoencoder(checkpoint: DemoCheckpoint) -> comfy.sd.VAE:
    state = {key: value.float() for key, value in taesd_state_dict(checkpoint.vae, checkpoint.config["vae"]).items()}
    return comfy.sd.VAE(sd=state, dtype=torch.float32)
