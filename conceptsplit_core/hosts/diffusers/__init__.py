"""diffusers as a host: the core on diffusers models.

load      a model from a folder or a single file
network   its layers, hooks, and one call of its UNet
text      prompts encoded, with the rows that each concept owns
pictures  pictures to latents and back
lora      ordinary LoRA files
drawing   the passes of a run    sampling  a run    training  learning
"""

from .drawing import SAMPLERS
from .load import load_model
from .lora import read_lora
from .model import DiffusersModel, family_of
from .network import call_unet, network_map, patched
from .pictures import decode_latents, encode_images
from .sampling import SampleResult, noise, sample
from .text import Conditioning, empty_conditioning, encode_text, with_correction
from .training import begin, new_adapter, training_data, training_denoiser

__all__ = [
    "SAMPLERS",
    "Conditioning",
    "DiffusersModel",
    "SampleResult",
    "begin",
    "call_unet",
    "decode_latents",
    "empty_conditioning",
    "encode_images",
    "encode_text",
    "family_of",
    "load_model",
    "network_map",
    "new_adapter",
    "noise",
    "patched",
    "read_lora",
    "sample",
    "training_data",
    "training_denoiser",
    "with_correction",
]
