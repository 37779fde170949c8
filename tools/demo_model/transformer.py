"""The demo transformer: a small Flux on the demo model's latents, captions and text encoder, trained on flow matching.

Only the denoiser is new. Text encoder and autoencoder are those of the demo checkpoint and stay as they are, so a
picture of both models differs by its denoiser alone. Its velocities are learned from the demo UNet (`losses`), and its
matrices are moved by Muon. As for the UNet there is a grounding term, here on the columns of the joint softmax that
lead from pixels to the bound rows, in the blocks `GROUNDED`.

The committed one took five minutes on an H200: 8,997 steps of 256 pictures, each step played back (`graphed`) in 32
ms, where the same operations started one by one took 120. The rate fell in the last two fifths. The loss with
objects weighted was 0.25 at step 600, 0.17 at 1,800, 0.14 at 4,200 and 0.11 at the end. Of one patterned object in
words the detector finds 33 % right by the strict reading and 88 % by the lenient one; of the UNet's, after 21,800
steps, 81 and 94 %. What the strict reading misses is the outline in 58 % of pictures: it is wavy still. More
sampling steps or guidance do not change that beyond what seeds do. On two CPU cores 6,200 steps of 32 pictures, in
an hour, reached a loss of 0.17, and 2 and 44 %. What brought nothing there: the guided UNet as teacher (450 steps),
the UNet's features as further targets (110 steps). What the model shows of LoRAs is in docs/models.md.

    python -m tools.demo_model start --out FOLDER
    python -m tools.demo_model latents --out FOLDER --scenes 16000        (or in parts, see --part)
    python -m tools.demo_model transformer --name transformer --out FOLDER --device cuda --workers 14 --batch 256 \
        --rate 2e-3 --grounding 0.05 --steps 0 --minutes 4.85 --recorded
    python -m tools.demo_model transformer_samples --name transformer --out FOLDER
    python -m tools.demo_model transformer_export --name transformer --out FOLDER --machine "one NVIDIA H200"

On a CPU: torchrun --nproc-per-node 2 -m tools.demo_model transformer … --threads 1 --batch 16 --compiled, and a number
of --steps with --decay-from. To go on from the committed one: --begin and its file, with a --name of its own.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from conceptsplit_core.demo import checkpoint
from conceptsplit_core.hosts import diffusers as host

from .autoencoder import decoded
from .export import write_checkpoint
from .latents import LATENT_SIDE
from .pretraining import grounding_loss, muon, on_objects, train
from .report import PROMPTS
from .states import read, save_grid
from .unet import CrossMaps, Words, alphas_cumprod

CONFIG: dict[str, Any] = {
    "patch_size": 1,  # of what `packed` gives
    "in_channels": 32,
    "out_channels": 32,
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
TEXT_ROWS = 40
"""Rows of the text that the transformer reads: captions are shorter, and attention over their padding costs."""


PATCH = 2
"""Latent pixels on a side of what one token of the picture stands for."""
SIDE = LATENT_SIDE // PATCH


def packed(x: torch.Tensor) -> torch.Tensor:
    """Latents [B, 8, 16, 16] as tokens [B, 64, 32], in the order of Flux (channel, row, column within a patch)."""
    return F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)


def unpacked(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [B, 64, 32] as latents [B, 8, 16, 16]."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (SIDE, SIDE)), PATCH)


class _JointMaps:
    """A Flux attention processor; in the blocks `GROUNDED` it keeps the head-mean share of each bound row.

    The softmax is written out: for so few tokens that is faster on a CPU than fused kernels, and it is needed anyway.
    """

    def __init__(self, maps: CrossMaps, block: str) -> None:
        self.maps, self.block = maps, block

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        from diffusers.models.embeddings import apply_rotary_emb

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1))

        x, text = hidden_states, encoder_hidden_states
        query, key, value = attn.norm_q(heads(attn.to_q(x))), attn.norm_k(heads(attn.to_k(x))), heads(attn.to_v(x))
        if text is not None:
            query = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(text))), query], dim=1)
            key = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(text))), key], dim=1)
            value = torch.cat([heads(attn.add_v_proj(text)), value], dim=1)
        query, key = (apply_rotary_emb(side, image_rotary_emb, sequence_dim=1).transpose(1, 2) for side in (query, key))
        share = torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, dim=-1)
        rows = self.maps.rows  # of the first pictures of the batch
        if rows is not None and self.block in GROUNDED:
            pixels = share[: len(rows), :, -(SIDE**2) :].float().mean(dim=1)
            self.maps.maps[self.block] = pixels.gather(-1, rows[:, None, :].expand(-1, pixels.shape[1], -1))
        out = (share @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
        if text is None:
            return out
        words, out = out.split([text.shape[1], x.shape[1]], dim=1)
        return attn.to_out[0](out), attn.to_add_out(words)


class Transformer(torch.nn.Module):
    """The denoiser, which learns, and the demo checkpoint's text encoder, which does not."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        from diffusers import FluxTransformer2DModel

        self.denoiser: Any = FluxTransformer2DModel(**CONFIG)
        self.demo = host.load_model("demo")  # no module, and so no part of the state
        self.fixed = (self.demo.encoders[0].model, self.demo.unet)
        signal = alphas_cumprod().sqrt()
        noise = (1 - signal**2).sqrt()
        self.register_buffer("unet_levels", (noise / (signal + noise)).float(), persistent=False)
        self.unet_levels: torch.Tensor
        self.cross = CrossMaps()
        for name, module in self.denoiser.named_modules():
            if name.endswith(".attn"):
                module.set_processor(_JointMaps(self.cross, name.removesuffix(".attn")))
        side = torch.arange(SIDE, dtype=torch.float32)
        grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1).flatten(0, 1)
        self.places: torch.Tensor
        self.register_buffer("places", F.pad(grid, (1, 0)), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for part in self.fixed:
            part._apply(fn)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def encode(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [B, 77] to context [B, 77, 128] and pooled text [B, 128]."""
        out = self.fixed[0](input_ids=ids)
        return out.last_hidden_state, out.pooler_output

    @torch.no_grad()
    def taught(self, x: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The velocity that the demo UNet sees in x [B, 8, 16, 16] at noise levels sigma [B] that it knows.

        (1 − σ)·x₀ + σ·ε is what it was trained on, but for its length, at the step with that ratio of noise to signal.
        """
        levels = self.unet_levels
        above = torch.searchsorted(levels, sigma).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        step = above - 1 + ((sigma - low) / (high - low)).clamp(0, 1)
        level = sigma[:, None, None, None]
        noise = self.fixed[1](x / (level**2 + (1 - level) ** 2).sqrt(), step, context, return_dict=False)[0].float()
        return (noise - x) / (1 - level)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor) -> Any:
        """Velocity [B, 8, 16, 16] of x at the noise levels sigma [B] in 0..1."""
        context = context[:, :TEXT_ROWS]
        tokens = self.denoiser(
            packed(x), context, pooled, sigma, self.places,
            self.places.new_zeros(context.shape[1], 3), return_dict=False,
        )[0]  # fmt: skip
        return unpacked(tokens)


def noise_levels(batch: int, device: Any, generator: torch.Generator | None = None) -> torch.Tensor:
    """σ [batch]: half of them anywhere, half where only the words can tell an object's look."""
    sigma = torch.rand(batch, device=device, generator=generator)
    return torch.where(torch.arange(batch, device=device) % 2 == 0, 0.55 + 0.42 * sigma, sigma)


def losses(
    model: Transformer, b: dict[str, torch.Tensor], grounded: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean squared error of the velocity, the same with objects weighted, and the grounding term (or 0).

    The velocity is the demo UNet's where it knows the noise level: its mean over all pictures that fit says more than
    the one picture's ε − x₀, which is the target elsewhere. The grounding term looks at half of the batch.
    """
    x = b["x"]
    sigma = noise_levels(len(x), x.device)
    noise = torch.randn_like(x)
    level = sigma[:, None, None, None]
    half = len(x) // 2
    model.cross.rows = b["rows"][:half] if grounded else None
    model.cross.maps = {}
    with torch.autocast(x.device.type, torch.bfloat16):
        context, pooled = model.encode(b["ids"])
        noisy = (1 - level) * x + level * noise
        predicted = model(noisy, sigma, context, pooled).float()
        target = torch.where(level < model.unet_levels[-1], model.taught(noisy, sigma, context), noise - x)
    error = (predicted - target).square().mean(dim=1)
    ground = error.new_zeros(())
    if grounded:
        ground = grounding_loss(model.cross.maps, b["weight"][:half], b["mask"][:half])
    return error.mean(), on_objects(error, b["mask"]).mean(), ground


def train_transformer(
    out: Path,
    name: str,
    steps: int,
    device: str,
    compiled: bool = False,
    begin: Path | None = None,
    **options: Any,
) -> None:
    """Flow matching from seeded noise levels and noise.

    compiled: faster on a CPU.  begin: an exported transformer, whose weights a new training begins with.
    """

    def build(vocabulary: int) -> Transformer:
        model = Transformer(vocabulary) if begin is None else load(begin)[0].train()
        if compiled:
            for part in (model.denoiser, model.fixed[1]):
                part.compile(dynamic=False)
        return model

    # cuDNN's backward pass of attention fails on 333 tokens (torch 2.11, H200): illegal memory access, or NaN. Nor
    # should the denoiser be compiled there: the loss was 2.2 after 100 steps and then rose to 10⁶, where plain it fell
    # to 0.9 in these 100 (it was not run for longer).
    torch.backends.cuda.enable_cudnn_sdp(False)
    train(out, name, steps, build=build, losses=losses, optimisers=muon, device=device, **options)


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
        "patch": PATCH,
        "scaling_factor": state["scale"],
        "text_rows": TEXT_ROWS,
        "training": {k: state["step" if k == "steps" else k] for k in facts}
        | {"seconds": round(state["seconds"]), "machine": machine, "note": note},
    }
    write_checkpoint(target, tensors, checkpoint.TRANSFORMER_FORMAT, checkpoint.TRANSFORMER_VERSION, config)


def load(file: Path) -> tuple[Transformer, float]:
    """An exported transformer, and what the autoencoder's latents are multiplied by for it."""
    model = Transformer(Words().vocabulary).eval()
    held = checkpoint.load_transformer(file)
    model.denoiser.load_state_dict(held.state)
    return model, held.config["scaling_factor"]
