"""The demo transformer: a small Flux on the demo model's latents, captions and text encoder, trained on flow matching.

Only the denoiser is new. Text encoder and autoencoder are those of the demo checkpoint and stay as they are, so a
picture of both models differs by its denoiser alone. As for the UNet there is a grounding term, here on the columns of
the joint softmax that lead from pixels to the bound rows, in the blocks `GROUNDED`.

No trained one is in the repository yet. A step of batch 256 took 75 ms on an H200 (16 processor cores making captions):

    python -m tools.demo_model start --out FOLDER
    python -m tools.demo_model latents --out FOLDER --scenes 24000        (or in parts, see --part)
    python -m tools.demo_model transformer --name transformer --out FOLDER --device cuda --workers 14 --batch 256 \
        --grounding 0.05 --steps 0 --minutes 10
    python -m tools.demo_model transformer_samples --name transformer --out FOLDER
    python -m tools.demo_model transformer_export --name transformer --out FOLDER --target FILE
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from conceptsplit_core.hosts import diffusers as host

from .autoencoder import decoded
from .export import write_checkpoint
from .latents import LATENT_SIDE
from .pretraining import grounding_loss, on_objects, train
from .report import PROMPTS
from .states import read, save_grid
from .unet import CrossMaps, Words

FORMAT = "conceptsplit-demo-transformer"
CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 3,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 128,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 24, 24],
}
GROUNDED = ("transformer_blocks.1", "single_transformer_blocks.0", "single_transformer_blocks.1")
GROUNDED_ROWS = 128
"""Pictures of a batch that the grounding term looks at: it needs the whole matrix of pixels and rows."""


class _JointMaps:
    """A Flux attention processor that also keeps the head-mean share of each bound row for each pixel."""

    def __init__(self, maps: CrossMaps, name: str) -> None:
        from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

        self.maps, self.name, self.plain = maps, name, FluxAttnProcessor()

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        if self.maps.rows is not None:
            self.maps.maps[self.name] = self._shares(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)  # type: ignore[arg-type]

    def _shares(self, attn: Any, x: torch.Tensor, text: torch.Tensor | None, rope: Any) -> torch.Tensor:
        """Softmax over text and pixels [g, pixels, R] of the first g pictures, as many as have `rows` [g, R]."""
        from diffusers.models.embeddings import apply_rotary_emb

        rows = self.maps.rows
        assert rows is not None
        x = x[: len(rows)]
        query, key = (
            norm(layer(x).unflatten(-1, (attn.heads, -1)))
            for norm, layer in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k))
        )
        if text is not None:
            text = text[: len(rows)]
            query = torch.cat([attn.norm_added_q(attn.add_q_proj(text).unflatten(-1, (attn.heads, -1))), query], dim=1)
            key = torch.cat([attn.norm_added_k(attn.add_k_proj(text).unflatten(-1, (attn.heads, -1))), key], dim=1)
        query, key = (apply_rotary_emb(side, rope, sequence_dim=1).transpose(1, 2) for side in (query, key))
        query = query[:, :, -(LATENT_SIDE**2) :]
        share = torch.softmax((query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).float(), dim=-1).mean(dim=1)
        return share.gather(-1, rows[:, None, :].expand(-1, share.shape[1], -1))


class Transformer(torch.nn.Module):
    """The denoiser, which learns, and the demo checkpoint's text encoder, which does not."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        from diffusers import FluxTransformer2DModel

        self.denoiser: Any = FluxTransformer2DModel(**CONFIG)
        self.text_encoder = [host.load_model("demo").encoders[0].model]  # in a list: no part of the state
        self.cross = CrossMaps()
        for name in GROUNDED:
            self.denoiser.get_submodule(f"{name}.attn").set_processor(_JointMaps(self.cross, name))
        side = torch.arange(LATENT_SIDE, dtype=torch.float32)
        grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1).flatten(0, 1)
        self.places: torch.Tensor
        self.register_buffer("places", F.pad(grid, (1, 0)), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.text_encoder[0]._apply(fn)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def encode(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [B, 77] to context [B, 77, 128] and pooled text [B, 128]."""
        out = self.text_encoder[0](input_ids=ids)
        return out.last_hidden_state, out.pooler_output

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor) -> Any:
        """Velocity [B, 8, 16, 16] of x at the noise levels sigma [B] in 0..1."""
        tokens = self.denoiser(
            x.flatten(2).transpose(1, 2), context, pooled, sigma, self.places,
            self.places.new_zeros(context.shape[1], 3), return_dict=False,
        )[0]  # fmt: skip
        return tokens.transpose(1, 2).unflatten(2, x.shape[-2:])


def noise_levels(batch: int, device: Any) -> torch.Tensor:
    """σ [batch]: half of them anywhere, half where only the words can tell an object's look."""
    sigma = torch.rand(batch, device=device)
    return torch.where(torch.arange(batch, device=device) % 2 == 0, 0.55 + 0.42 * sigma, sigma)


def losses(
    model: Transformer, b: dict[str, torch.Tensor], grounded: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean squared error of the velocity ε − x₀, the same with objects weighted, and the grounding term (or 0)."""
    x = b["x"]
    sigma = noise_levels(len(x), x.device)
    noise = torch.randn_like(x)
    level = sigma[:, None, None, None]
    model.cross.rows = b["rows"][:GROUNDED_ROWS] if grounded else None
    model.cross.maps = {}
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        context, pooled = model.encode(b["ids"])
        predicted = model((1 - level) * x + level * noise, sigma, context, pooled).float()
    error = (predicted - (noise - x)).square().mean(dim=1)
    ground = error.new_zeros(())
    if grounded:
        ground = grounding_loss(model.cross.maps, b["weight"][:GROUNDED_ROWS], b["mask"][:GROUNDED_ROWS])
    return error.mean(), on_objects(error, b["mask"]).mean(), ground


def train_transformer(out: Path, name: str, steps: int, device: str, **options: Any) -> None:
    """Flow matching from seeded noise levels and noise."""

    # cuDNN's backward pass of attention fails on 333 tokens (torch 2.11, H200): illegal memory access, or NaN. Nor is
    # the denoiser compiled: there the loss was 2.2 after 100 steps and then rose to 10⁶, where plain it fell to 0.9 in
    # these 100 (it was not run for longer).
    torch.backends.cuda.enable_cudnn_sdp(False)
    train(out, name, steps, build=Transformer, losses=losses, device=device, **options)


@torch.no_grad()
def sample(model: Transformer, words: Words, prompts: list[str], seed: int, steps: int, guidance: float) -> Any:
    """Euler steps of even length from σ = 1 to 0: latents [n, 8, 16, 16] in the denoiser's scale."""
    device, n = model.places.device, len(prompts)
    ids = torch.from_numpy(np.stack([words.ids(p) for p in [""] * n + list(prompts)])).to(device)
    context, pooled = model.encode(ids)
    model.cross.rows = None
    x = torch.randn(n, 8, LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(seed)).to(device)
    levels = torch.linspace(1.0, 0.0, steps + 1).tolist()
    for now, after in pairwise(levels):
        off, on = model(torch.cat([x, x]), torch.full((2 * n,), now, device=device), context, pooled).chunk(2)
        x = x + (after - now) * (off + guidance * (on - off))
    return x


def write_samples(out: Path, name: str, seed: int, per: int, guidance: float, device: str) -> None:
    """A sheet of `per` pictures for each prompt, two prompts per line."""
    words, state = Words(), read(out / f"{name}.safetensors")
    model = Transformer(words.vocabulary).to(device).eval()
    model.load_state_dict(state["ema"])
    latents = sample(model, words, [p for p in PROMPTS for _ in range(per)], seed, 20, guidance).cpu()
    save_grid(decoded(out, latents / state["scale"]), 2 * per, out / f"{name}-{state['step']:06d}-cfg{guidance:g}.png")


def export(out: Path, name: str, target: Path, machine: str, note: str) -> None:
    """EMA weights in half precision with the denoiser's configuration and how it was trained."""
    state = read(out / f"{name}.safetensors")
    tensors = {
        k.removeprefix("denoiser."): v.to(torch.float16).contiguous()
        for k, v in state["ema"].items()
        if k.startswith("denoiser.")
    }
    facts = ("steps", "batch", "seed", "rate", "grounding")
    config = {
        "transformer": CONFIG,
        "scaling_factor": state["scale"],
        "training": {k: state["step" if k == "steps" else k] for k in facts}
        | {"seconds": round(state["seconds"]), "machine": machine, "note": note},
    }
    write_checkpoint(target, tensors, FORMAT, 1, config)
