"""The picture autoencoder: TAESD-shaped, 32 wide, 8 latent channels."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conceptsplit_core.demo import checkpoint, looks, scenes

from .states import optimiser_state, read, restore_optimiser, save, save_grid, to_images, to_tensor

VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": [32, 32, 32, 32],
    "decoder_block_out_channels": [32, 32, 32, 32],
    # The encoder's first stage has no block: at full size it is a linear filter, and half the cost is saved.
    "num_encoder_blocks": [0, 1, 1, 2],
    "num_decoder_blocks": [2, 1, 1, 1],
    "latent_channels": 8,
}


def build_vae() -> torch.nn.Module:
    """An AutoencoderTiny that starts as "shrink eight times, enlarge eight times" in its first three channels.

    From a random start the first minutes go into finding brightness, then colour; from this one they go into
    edges and patterns. The other channels start at He's scale, the residual branches near zero.
    """
    from diffusers import AutoencoderTiny

    model = AutoencoderTiny(**VAE_CONFIG)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if name.endswith("conv.4"):
                module.weight.data.mul_(0.2)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    plain = [m for m in (*model.encoder.layers, *model.decoder.layers) if isinstance(m, torch.nn.Conv2d)]
    first_decoder = len([m for m in model.encoder.layers if isinstance(m, torch.nn.Conv2d)])
    for conv in plain:
        for channel in range(3):
            conv.weight.data[channel] = 0
            if conv.stride[0] == 2:
                # Output (i) covers inputs 2i-1..2i+1; the middle and the right one are its own two pixels.
                conv.weight.data[channel, channel, 1:, 1:] = 0.25
            else:
                conv.weight.data[channel, channel, 1, 1] = 1.0
    to_latent, from_latent = plain[first_decoder - 1], plain[first_decoder]
    # Colours 0..1 become latents -1.5..1.5 and back.
    to_latent.weight.data[:3] *= 3.0
    to_latent.bias.data[:3] = -1.5
    from_latent.weight.data[:3] /= 3.0
    from_latent.bias.data[:3] = 0.5
    return model


def start_from_demo(out: Path) -> None:
    """Writes the demo checkpoint's autoencoder as OUT/vae.safetensors, where there is none yet."""
    path = out / "vae.safetensors"
    if not path.exists():
        parts = checkpoint.load()
        trained = parts.config["training"]["vae"]
        vae = {k: v.float() for k, v in parts.vae.items() if k in build_vae().state_dict()}
        save({"model": vae, "step": trained["steps"], "decoder_steps": trained["decoder_steps"]}, path)


@torch.no_grad()
def decoded(out: Path, latents: torch.Tensor) -> np.ndarray:
    """Pictures uint8 [n, H, W, 3] of latents [n, 8, h, w] in the autoencoder's scale."""
    vae = build_vae()
    vae.load_state_dict(read(out / "vae.safetensors")["model"])
    return to_images(torch.cat([vae.decoder(z) for z in latents.split(8)]))


def _crops(rng: np.random.Generator, drawn: list[scenes.Scene], n: int, side: int) -> np.ndarray:
    """n square crops, uint8 [n, side, side, 3]; three of four are centred near an object."""
    out = np.empty((n, side, side, 3), np.uint8)
    for i in range(n):
        scene = drawn[rng.integers(len(drawn))]
        corner = rng.integers(0, looks.SIZE - side + 1, 2)
        if rng.random() < 0.75:
            thing = scene.objects[rng.integers(len(scene.objects))]
            middle = np.asarray(thing.centre) + rng.uniform(-16, 16, 2) - side / 2
            corner = np.clip(middle, 0, looks.SIZE - side).astype(int)
        out[i] = scene.image[corner[1] : corner[1] + side, corner[0] : corner[0] + side]
    return out


def train_vae(out: Path, steps: int, batch: int, seed: int) -> None:
    """L1 on pixels, their differences and their hue, a little L2; resumes from OUT/vae.safetensors.

    A little noise on the latent keeps the decoder calm off the data.
    """
    torch.manual_seed(seed)
    path = out / "vae.safetensors"
    drawn = [scenes.draw_scene(10_000_000 + seed + i) for i in range(3000)]
    model = build_vae().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.0, fused=True)
    start = 0
    if path.exists():
        state = read(path)
        model.load_state_dict(state["model"])
        restore_optimiser(optimiser, state["optimiser"])
        start = int(state["step"])
    began = time.time()
    for step in range(start, steps):
        rng = np.random.default_rng([seed, step])
        torch.manual_seed(seed * 1_000_003 + step)
        share = step / steps
        rate = 2e-3 * min(1.0, (step + 1) / 100) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        x = to_tensor(_crops(rng, drawn, batch, 64)).contiguous(memory_format=torch.channels_last)
        z = model.encoder(x)
        y = model.decoder(z + 0.05 * torch.randn_like(z))
        wrong = y - x
        pixel = wrong.abs().mean()
        colour = (wrong - wrong.mean(dim=1, keepdim=True)).abs().mean() + wrong.square().mean()
        edge = (y.diff(dim=2) - x.diff(dim=2)).abs().mean() + (y.diff(dim=3) - x.diff(dim=3)).abs().mean()
        # Every channel near zero mean and unit spread, so that one scalar scale serves the diffusion model.
        spread, middle = torch.std_mean(z, dim=(0, 2, 3))
        balance = spread.add(1e-3).log().square().mean() + middle.square().mean()
        loss = pixel + colour + 0.5 * edge + 0.02 * balance
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 50 == 0 or step == steps - 1:
            print(
                f"vae {step} loss {loss.item():.4f} pixel {pixel.item():.4f} "
                f"z {spread.min().item():.2f}..{spread.max().item():.2f} {time.time() - began:.0f}s",
                flush=True,
            )
        if step % 100 == 99 or step == steps - 1:
            save({"model": model.state_dict(), "optimiser": optimiser_state(optimiser), "step": step + 1}, path)
            print(f"vae {step + 1} {_vae_report(model, out)}", flush=True)


@torch.no_grad()
def _vae_report(model: Any, out: Path) -> str:
    """Error on twelve unseen pictures, and a sheet of them above their reconstructions."""
    test = np.stack([scenes.draw_scene(20_000_000 + i).image for i in range(12)])
    again = to_images(model.decoder(model.encoder(to_tensor(test))))
    both = np.concatenate([np.concatenate([test[i : i + 6], again[i : i + 6]]) for i in (0, 6)])
    save_grid(both, 6, out / "vae.png")
    error = np.abs(test.astype(float) - again)
    return f"test L1 {error.mean():.2f}/255 PSNR {10 * math.log10(255**2 / np.square(error).mean()):.1f} dB"


def polish_decoder(out: Path, steps: int, batch: int, seed: int) -> None:
    """More steps for the decoder alone, which may go on after latents are drawn: the encoder stays as it is.

    Short, so it saves only at its end; an interrupted polish starts over.
    """
    torch.manual_seed(seed)
    state = read(out / "vae.safetensors")
    model = build_vae().to(memory_format=torch.channels_last)
    model.load_state_dict(state["model"])
    drawn = [scenes.draw_scene(11_000_000 + seed + i) for i in range(1500)]
    optimiser = torch.optim.AdamW(model.decoder.parameters(), 8e-4, weight_decay=0.0, fused=True)
    for step in range(steps):
        rng = np.random.default_rng([seed, step, 2])
        for group in optimiser.param_groups:
            group["lr"] = 8e-4 * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * (1 - step / steps))
        x = to_tensor(_crops(rng, drawn, batch, 64)).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            z = model.encoder(x)
        wrong = model.decoder(z + 0.05 * torch.randn_like(z)) - x
        edge = wrong.diff(dim=2).abs().mean() + wrong.diff(dim=3).abs().mean()
        loss = wrong.abs().mean() + wrong.square().mean() + 0.5 * edge
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
        optimiser.step()
        if step % 50 == 49:
            print(f"decoder {step + 1} loss {loss.item():.4f} pixel {wrong.abs().mean().item():.4f}", flush=True)
    save({**state, "model": model.state_dict(), "decoder_steps": steps}, out / "vae.safetensors")
    print(_vae_report(model, out))
