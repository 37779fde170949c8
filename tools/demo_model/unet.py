"""UNet and text encoder of the demo model, with cross-attention maps on request, and captions as token ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from conceptsplit_core.demo import captions
from conceptsplit_core.demo.checkpoint import TOKENIZER_DIR

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 128,
    # diffusers reads this as the number of heads.
    "attention_head_dim": 4,
    "norm_num_groups": 32,
    "use_linear_projection": False,
}
UNET_LDM_CONFIG: dict[str, Any] = {
    "image_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 128,
    "num_heads": 4,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
}
LATENT_SIDE = 16
ROWS = 77


def text_config(vocabulary: int) -> dict[str, Any]:
    """CLIPTextConfig keywords; the last two ids are the start and the end token."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": ROWS,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 128,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def alphas_cumprod() -> torch.Tensor:
    """Share of signal variance per step, float64 [1000], as Stable Diffusion's scaled-linear schedule has it."""
    ends = [SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5]
    betas = torch.linspace(ends[0], ends[1], SCHEDULER["num_train_timesteps"], dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


class CrossMaps:
    """Attention processor that keeps the head-mean cross-attention of one call.

    `rows` [B, R] selects text rows; `maps[layer]` is [B, Lq, R], probabilities after the softmax over all rows.
    """

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None
        self.maps: dict[str, torch.Tensor] = {}

    def install(self, unet: Any) -> None:
        processors = dict(unet.attn_processors)
        for name in processors:
            if ".attn2." in name:
                processors[name] = _CrossProcessor(self, name.split(".attn2.")[0].replace(".transformer_blocks.0", ""))
        unet.set_attn_processor(processors)


class _CrossProcessor:
    def __init__(self, maps: CrossMaps, name: str) -> None:
        self.maps, self.name = maps, name

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        rows = self.maps.rows
        if rows is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            share = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
            picked = rows[:, None, :].expand(-1, q.shape[2], -1)
            self.maps.maps[self.name] = share.mean(1).gather(-1, picked)
            out = share @ v
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class Model(torch.nn.Module):
    """UNet and text encoder as one trainable thing."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        self.unet = UNet2DConditionModel(**UNET_CONFIG)
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**text_config(vocabulary)))
        self.cross = CrossMaps()
        self.cross.install(self.unet)

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, 77] to context [B, 77, 128]."""
        return self.text_encoder(input_ids=ids).last_hidden_state

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.unet(x, t, context, return_dict=False)[0]


class Words:
    """Captions to token ids without the tokenizer's cost: every lexicon word is one known id."""

    def __init__(self) -> None:
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER_DIR))
        self.vocabulary = len(tokenizer)
        self.start, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.id_of = {}
        for word in captions.lexicon():
            ids = tokenizer(word)["input_ids"]
            if len(ids) != 3:
                raise ValueError(f"{word!r} is not one token")
            self.id_of[word] = ids[1]

    def ids(self, caption: str) -> np.ndarray:
        """int64 [77]: start, words, end, padded with end."""
        out = np.full(ROWS, self.end, np.int64)
        out[0] = self.start
        words = captions.caption_words(caption)
        out[1 : 1 + len(words)] = [self.id_of[w] for w in words]
        return out
