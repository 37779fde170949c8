"""Trains the demo model from nothing: `python -m conceptsplit_core.demo.train <stage> --out FOLDER`.

Stages in order: `tokenizer` (writes the tokenizer files), `vae` (picture autoencoder), `latents` (draws and encodes
the training scenes), `unet` (UNet and text encoder together), `decoder` (more steps for the picture decoder alone,
at any time after `vae`), `export` (one safetensors file); `samples` and `grounding` look at a state in between. Every
stage is seeded, `vae` and `unet` resume from their last state in OUT.

The UNet's objective is noise prediction, and with `--grounding W` a second term: W times the mean negative log share
of each class word's and adjective's cross-attention map on its own object (`grounding_loss`). Without it a model
this small learns to draw long before its maps say which word draws where. The committed checkpoint was trained with
that term; its weight stands in the file's metadata, and the README beside this file has the comparison.

Nothing of a host is imported at module level; diffusers and transformers are imported where models are built.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from ..method.divergence import jsd
from . import scenes

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


def _save_grid(pictures: np.ndarray, columns: int, path: Path) -> None:
    """Write uint8 [n, H, W, 3] as one PNG with `columns` pictures per row."""
    n, h, w, _ = pictures.shape
    rows = math.ceil(n / columns)
    sheet = np.full((rows * h, columns * w, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        r, c = divmod(i, columns)
        sheet[r * h : (r + 1) * h, c * w : (c + 1) * w] = picture
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)


def _save(state: dict[str, Any], path: Path) -> None:
    """Write a state as safetensors, beside the target first and then renamed: a kill never leaves half a file.

    Dicts of tensors become tensors named "key|name"; what is no tensor goes into the metadata.
    """
    tensors: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            tensors[key] = value.contiguous()
        elif isinstance(value, dict):
            tensors |= {f"{key}|{name}": tensor.contiguous() for name, tensor in value.items()}
        else:
            facts[key] = value
    part = path.with_suffix(".part")
    save_file(tensors, str(part), {"facts": json.dumps(facts)})
    part.replace(path)


def _read(path: Path) -> dict[str, Any]:
    """What `_save` has written."""
    with safe_open(str(path), framework="pt") as file:
        state: dict[str, Any] = json.loads(file.metadata()["facts"])
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            key, bar, inner = name.partition("|")
            if bar:
                state.setdefault(key, {})[inner] = file.get_tensor(name)
            else:
                state[key] = file.get_tensor(name)
    return state


def _optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Moments and step counts, named by the parameter's place."""
    held = optimiser.state_dict()["state"]
    return {f"{i}.{name}": tensor for i, moments in held.items() for name, tensor in moments.items()}


def _restore_optimiser(optimiser: torch.optim.Optimizer, state: dict[str, torch.Tensor]) -> None:
    """Put `_optimiser_state` back; each moment gets its parameter's memory format, which the fused step relies on."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    held: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        place, _, what = name.partition(".")
        like = parameters[int(place)]
        shaped = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape and tensor.dim() else tensor.clone()
        held.setdefault(int(place), {})[what] = shaped
    optimiser.load_state_dict({"state": held, "param_groups": optimiser.state_dict()["param_groups"]})


def _to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, H, W, 3] to float [n, 3, H, W] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def _to_images(x: torch.Tensor) -> np.ndarray:
    """Float [n, 3, H, W] in -1..1 to uint8 [n, H, W, 3]."""
    return x.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()


# --- picture autoencoder --------------------------------------------------------------------------------------


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


def _crops(rng: np.random.Generator, drawn: list[scenes.Scene], n: int, side: int) -> np.ndarray:
    """n square crops, uint8 [n, side, side, 3]; three of four are centred near an object."""
    out = np.empty((n, side, side, 3), np.uint8)
    for i in range(n):
        scene = drawn[rng.integers(len(drawn))]
        corner = rng.integers(0, scenes.SIZE - side + 1, 2)
        if rng.random() < 0.75:
            thing = scene.objects[rng.integers(len(scene.objects))]
            middle = np.asarray(thing.centre) + rng.uniform(-16, 16, 2) - side / 2
            corner = np.clip(middle, 0, scenes.SIZE - side).astype(int)
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
        state = _read(path)
        model.load_state_dict(state["model"])
        _restore_optimiser(optimiser, state["optimiser"])
        start = int(state["step"])
    began = time.time()
    for step in range(start, steps):
        rng = np.random.default_rng([seed, step])
        torch.manual_seed(seed * 1_000_003 + step)
        share = step / steps
        rate = 2e-3 * min(1.0, (step + 1) / 100) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        x = _to_tensor(_crops(rng, drawn, batch, 64)).contiguous(memory_format=torch.channels_last)
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
            _save({"model": model.state_dict(), "optimiser": _optimiser_state(optimiser), "step": step + 1}, path)
            print(f"vae {step + 1} {_vae_report(model, out)}", flush=True)


@torch.no_grad()
def _vae_report(model: Any, out: Path) -> str:
    """Error on twelve unseen pictures, and a sheet of them above their reconstructions."""
    test = np.stack([scenes.draw_scene(20_000_000 + i).image for i in range(12)])
    again = _to_images(model.decoder(model.encoder(_to_tensor(test))))
    both = np.concatenate([np.concatenate([test[i : i + 6], again[i : i + 6]]) for i in (0, 6)])
    _save_grid(both, 6, out / "vae.png")
    error = np.abs(test.astype(float) - again)
    return f"test L1 {error.mean():.2f}/255 PSNR {10 * math.log10(255**2 / np.square(error).mean()):.1f} dB"


def polish_decoder(out: Path, steps: int, batch: int, seed: int) -> None:
    """More steps for the decoder alone, which may go on after latents are drawn: the encoder stays as it is.

    Short, so it saves only at its end; an interrupted polish starts over.
    """
    torch.manual_seed(seed)
    state = _read(out / "vae.safetensors")
    model = build_vae().to(memory_format=torch.channels_last)
    model.load_state_dict(state["model"])
    drawn = [scenes.draw_scene(11_000_000 + seed + i) for i in range(1500)]
    optimiser = torch.optim.AdamW(model.decoder.parameters(), 8e-4, weight_decay=0.0, fused=True)
    for step in range(steps):
        rng = np.random.default_rng([seed, step, 2])
        for group in optimiser.param_groups:
            group["lr"] = 8e-4 * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * (1 - step / steps))
        x = _to_tensor(_crops(rng, drawn, batch, 64)).contiguous(memory_format=torch.channels_last)
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
    _save({**state, "model": model.state_dict(), "decoder_steps": steps}, out / "vae.safetensors")
    print(_vae_report(model, out))


# --- text-to-latent model -------------------------------------------------------------------------------------

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
MAX_BOUND = 12
"""Rows per caption that the grounding term may look at: up to four objects, class word and some adjectives."""


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

        from .checkpoint import TOKENIZER_DIR

        tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER_DIR))
        self.vocabulary = len(tokenizer)
        self.start, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.id_of = {}
        for word in scenes.lexicon():
            ids = tokenizer(word)["input_ids"]
            if len(ids) != 3:
                raise ValueError(f"{word!r} is not one token")
            self.id_of[word] = ids[1]

    def ids(self, caption: str) -> np.ndarray:
        """int64 [77]: start, words, end, padded with end."""
        out = np.full(ROWS, self.end, np.int64)
        out[0] = self.start
        words = scenes.caption_words(caption)
        out[1 : 1 + len(words)] = [self.id_of[w] for w in words]
        return out


def draw_latents(out: Path, part: int, parts: int, count: int, seed: int) -> None:
    """Draw and encode scenes part, part + parts, ...: latents, masks on the latent grid, and scene seeds."""
    vae = build_vae()
    vae.load_state_dict(_read(out / "vae.safetensors")["model"])
    vae.to(memory_format=torch.channels_last)
    seeds = list(range(seed + part, seed + count, parts))
    latents = torch.empty(len(seeds), 8, LATENT_SIDE, LATENT_SIDE, dtype=torch.float16)
    masks = torch.zeros(len(seeds), 4, LATENT_SIDE, LATENT_SIDE, dtype=torch.float16)
    for at in range(0, len(seeds), 32):
        drawn = [scenes.draw_scene(s) for s in seeds[at : at + 32]]
        with torch.no_grad():
            x = _to_tensor(np.stack([s.image for s in drawn])).contiguous(memory_format=torch.channels_last)
            latents[at : at + len(drawn)] = vae.encoder(x).half()
        for i, scene in enumerate(drawn):
            small = F.avg_pool2d(torch.from_numpy(scene.masks)[None], scenes.SIZE // LATENT_SIDE)[0]
            masks[at + i, : len(small)] = small.half()
    _save({"latents": latents, "masks": masks, "seeds": torch.tensor(seeds)}, out / f"latents-{part}.safetensors")


class Data:
    """Latents in memory; a caption is made anew each time from the scene's objects."""

    def __init__(self, out: Path) -> None:
        parts = [_read(p) for p in sorted(out.glob("latents-*.safetensors"))]
        seeds = torch.cat([p["seeds"] for p in parts])
        order = seeds.argsort()
        self.latents = torch.cat([p["latents"] for p in parts])[order]
        self.masks = torch.cat([p["masks"] for p in parts])[order]
        self.seeds = seeds[order].tolist()
        self.scale = 1.0 / float(self.latents[:2000].float().std())
        self.layouts = [scenes.scene_layout(s) for s in self.seeds]
        self.words = Words()

    def batch(self, rng: np.random.Generator, n: int, dropout: float = 0.1) -> dict[str, torch.Tensor]:
        """n samples: x [n, 8, 16, 16], ids [n, 77], rows [n, R], weight [n, R], mask [n, R, 16, 16]."""
        picked = rng.integers(0, len(self.seeds), n)
        ids = np.empty((n, ROWS), np.int64)
        rows = np.zeros((n, MAX_BOUND), np.int64)
        weight = np.zeros((n, MAX_BOUND), np.float32)
        owner = np.zeros((n, MAX_BOUND), np.int64)
        for i, index in enumerate(picked):
            objects, background = self.layouts[index]
            if rng.random() < dropout:
                ids[i] = self.words.ids("")
                continue
            # One caption in ten names nothing but class words, as prompts of users and of concepts do.
            detail = "class" if rng.random() < 0.1 else None
            caption, words = scenes.describe(rng, objects, background, detail)
            ids[i] = self.words.ids(caption)
            bound = [(w.class_word + 1, 1.0, k) for k, w in enumerate(words)]
            bound += [(a + 1, 0.5, k) for k, w in enumerate(words) for a in w.adjectives]
            for slot, (row, share, k) in enumerate(bound[:MAX_BOUND]):
                rows[i, slot], weight[i, slot], owner[i, slot] = row, share, k
        index = torch.from_numpy(picked)
        owners = torch.from_numpy(owner)[:, :, None, None].expand(-1, -1, LATENT_SIDE, LATENT_SIDE)
        return {
            "x": self.latents[index].float() * self.scale,
            "ids": torch.from_numpy(ids),
            "rows": torch.from_numpy(rows),
            "weight": torch.from_numpy(weight),
            "mask": self.masks[index].float().gather(1, owners),
        }


def grounding_loss(maps: dict[str, torch.Tensor], weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over layers and bound rows of -log(share of the row's map on its object) + a floor on its strength.

    The floor asks that the object's pixels give the row a fifth of the attention each row of a short caption would
    like to have; without it a map may be well placed and too faint to carry a value.
    """
    total = weight.new_zeros(())
    for found in maps.values():
        side = int(found.shape[1] ** 0.5)
        small = F.avg_pool2d(mask, mask.shape[-1] // side).flatten(2).transpose(1, 2)  # [B, Lq, R]
        own = (found * small).sum(1)
        placed = -torch.log(own / (found.sum(1) + 1e-8) + 1e-3)
        strength = own / (small.sum(1) + 1e-4)
        faint = F.relu(1 - strength / 0.1)
        total = total + (weight * (placed + 0.5 * faint)).sum() / weight.sum().clamp_min(1.0)
    return total / len(maps)


OBJECT_WEIGHT = 4.0
"""By how much an error on an object counts more than one on the background, which is most of a picture."""


def _on_objects(error: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean per picture of errors [B, h, w], those on objects weighted; mask [B, R, h, w] is that of the bound rows."""
    weight = 1.0 + OBJECT_WEIGHT * mask.amax(dim=1)
    return (error * weight).mean(dim=(1, 2)) / weight.mean(dim=(1, 2))


def _noise_levels(batch: int) -> torch.Tensor:
    """Timesteps int64 [batch]: half of them anywhere, half where only the words can tell an object's look."""
    t = torch.randint(0, 1000, (batch,))
    t[::2] = torch.randint(450, 950, (len(t[::2]),))
    return t


def _average_gradients(parameters: list[torch.nn.Parameter], last: bool, world: int) -> bool:
    """Replace gradients by their mean over the processes; true when any process says that this step is the last."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.reshape(-1) for p in parameters] + [torch.tensor([float(last)])])  # type: ignore[union-attr]
    torch.distributed.all_reduce(flat)
    flat /= world
    at = 0
    for parameter in parameters:
        parameter.grad.copy_(flat[at : at + parameter.numel()].view(parameter.shape))  # type: ignore[union-attr]
        at += parameter.numel()
    return bool(flat[-1] > 0)


def train_unet(
    rank: int,
    world: int,
    out: Path,
    name: str,
    steps: int,
    decay_from: int,
    batch: int,
    rate: float,
    grounding: float,
    seed: int,
    minutes: float,
) -> None:
    """Noise prediction, both ends of the noise range and objects weighted, caption dropout 10 %, EMA.

    Resumes from OUT/NAME.safetensors.
    The rate is constant up to step `decay_from` and then falls to 2 % at `steps`. Every random draw depends on
    (seed, step, rank) alone, so stopping and resuming changes nothing. Stops early after `minutes`.
    With `world` processes each one takes `batch` samples and gradients are averaged: one thread per process is
    steadier on a busy machine than several threads that wait for each other inside every operation.
    """
    if world > 1:
        torch.set_num_threads(1)
        meeting = (out / f"{name}.meeting").resolve()
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    data = Data(out)
    torch.manual_seed(seed)
    model = Model(data.words.vocabulary)
    model.unet.to(memory_format=torch.channels_last)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    path = out / f"{name}.safetensors"
    start, spent = 0, 0.0
    if path.exists():
        state = _read(path)
        model.load_state_dict(state["model"])
        _restore_optimiser(optimiser, state["optimiser"])
        ema = {k: torch.empty_like(v).copy_(state["ema"][k]) for k, v in model.state_dict().items()}
        start, spent = int(state["step"]), float(state["seconds"])
    signal = alphas_cumprod().float()
    began = saved = time.time()
    log = (out / f"{name}.log").open("a", encoding="utf-8") if rank == 0 else None
    parameters = list(model.parameters())
    sums = np.zeros(4)
    for step in range(start, steps):
        rng = np.random.default_rng([seed, step, rank] if rank else [seed, step])
        torch.manual_seed(seed * 1_000_003 + step + rank * 500_000_003)
        fall = 1.0 if step < decay_from else 0.02 + 0.98 * (steps - step) / max(steps - decay_from, 1)
        for group in optimiser.param_groups:
            group["lr"] = rate * fall * min(1.0, (step + 1) / 200)
        b = data.batch(rng, batch)
        t = _noise_levels(batch)
        a = signal[t][:, None, None, None]
        noise = torch.randn_like(b["x"])
        noisy = a.sqrt() * b["x"] + (1 - a).sqrt() * noise
        model.cross.rows = b["rows"] if grounding > 0 else None
        model.cross.maps = {}
        predicted = model(noisy.contiguous(memory_format=torch.channels_last), t, model.encode(b["ids"]))
        error = _on_objects((predicted - noise).square().mean(dim=1), b["mask"])
        snr = signal[t] / (1 - signal[t])
        # Min-SNR with gamma 5 at the clean end. At the noisy end the noise is nearly the input, so its error says
        # little about the picture it implies; without the second factor colours and places stay guesses there.
        balance = (snr.clamp(max=5.0) / snr) * (1 + 0.2 / snr).clamp(max=30.0)
        loss = (error * balance).mean()
        ground = grounding_loss(model.cross.maps, b["weight"], b["mask"]) if grounding > 0 else torch.zeros(())
        optimiser.zero_grad(set_to_none=True)
        (loss + grounding * ground).backward()
        last = step == steps - 1 or time.time() - began > 60 * minutes
        if world > 1:
            last = _average_gradients(parameters, last, world)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        keep = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            now = model.state_dict()
            floats = [k for k, v in now.items() if v.is_floating_point()]
            torch._foreach_lerp_([ema[k] for k in floats], [now[k] for k in floats], 1 - keep)
        sums += (error.mean().item(), loss.item(), ground.item(), 1)
        if log is not None and (step % 50 == 49 or last):
            means = sums / sums[3]
            line = {
                "step": step + 1,
                "eps": round(means[0], 4),
                "loss": round(means[1], 4),
                "ground": round(means[2], 4),
                "seconds": round(spent + time.time() - began),
            }
            print(json.dumps(line), file=log, flush=True)
            sums[:] = 0
        if rank == 0 and (time.time() - saved > 150 or last):
            saved = time.time()
            _save(
                {
                    "model": model.state_dict(),
                    "optimiser": _optimiser_state(optimiser),
                    "ema": ema,
                    "step": step + 1,
                    "seconds": spent + saved - began,
                    "grounding": grounding,
                    "seed": seed,
                    "batch": batch * world,
                    "rate": rate,
                    "scale": data.scale,
                },
                path,
            )
        if last:
            break
    if log is not None:
        log.close()
    if world > 1:
        torch.distributed.destroy_process_group()


# --- looking at what was learned ------------------------------------------------------------------------------

PROMPTS = (
    "a red circle and a blue striped square",
    "a circle",
    "a star",
    "a green heart on a white background",
    "a yellow and blue dotted star",
    "a pink ring and a green triangle on a grey background",
    "a circle and a square",
    "a red heart on the left and a blue star on the right",
    "a photo of a square",
    "a purple and white checked diamond and a plain orange cross",
    "a triangle, a ring and a heart",
    "a red circle, a green square and a blue star on a white background",
    "a black and white striped cross",
    "a star and a heart",
    "a brown circle above a cyan square",
    "a circle, a square, a triangle and a star",
)


@torch.no_grad()
def sample(
    model: Model,
    words: Words,
    prompts: list[str],
    seed: int,
    steps: int = 20,
    guidance: float = 5.0,
    bound: list[list[int]] | None = None,
) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """DDIM (eta 0) latents [n, 8, 16, 16] in the UNet's scale; with `bound` rows also the maps per step."""
    signal = alphas_cumprod().float()
    n = len(prompts)
    context = model.encode(torch.from_numpy(np.stack([words.ids(p) for p in [""] * n + list(prompts)])))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, LATENT_SIDE, LATENT_SIDE, generator=generator)
    times = torch.linspace(999, 0, steps + 1).round().long()
    seen = []
    for i in range(steps):
        t, after = times[i], times[i + 1]
        model.cross.maps = {}
        model.cross.rows = None if bound is None else torch.tensor([[0] * len(r) for r in bound] + bound)
        both = model(torch.cat([x, x]), t.expand(2 * n), context)
        if bound is not None:
            seen.append({k: v[n:] for k, v in model.cross.maps.items()})
        off, on = both.chunk(2)
        eps = off + guidance * (on - off)
        a, b = signal[t], signal[after] if i < steps - 1 else torch.tensor(1.0)
        clean = (x - (1 - a).sqrt() * eps) / a.sqrt()
        x = b.sqrt() * clean + (1 - b).sqrt() * eps
    return x, seen


def load_model(out: Path, name: str, ema: bool = True) -> tuple[Model, Words, dict[str, Any]]:
    words = Words()
    model = Model(words.vocabulary)
    state = _read(out / f"{name}.safetensors")
    model.load_state_dict(state["ema" if ema else "model"])
    return model.eval(), words, state


def write_samples(
    out: Path, name: str, seed: int, per: int, guidance: float, prompts: tuple[str, ...] = PROMPTS
) -> None:
    """A sheet of `per` pictures for each prompt, two prompts per line."""
    model, words, state = load_model(out, name)
    vae = build_vae()
    vae.load_state_dict(_read(out / "vae.safetensors")["model"])
    repeated = [p for p in prompts for _ in range(per)]
    latents, _ = sample(model, words, repeated, seed, guidance=guidance)
    with torch.no_grad():
        pictures = torch.cat([vae.decoder(z) for z in (latents / state["scale"]).split(8)])
    _save_grid(_to_images(pictures), 2 * per, out / f"{name}-{state['step']:06d}-cfg{guidance:g}.png")


@torch.no_grad()
def grounding_report(out: Path, name: str, scenes_per_time: int = 64) -> dict[str, Any]:
    """How far cross-attention maps know where their objects are.

    `share[t][layer]` for noise levels t: the class words' mean (share of the map on its own object / the object's
    area), the same on the other object, and the adjectives' on their own. 1 is a flat map. `jsd`: in the first fifth
    of 20 guided DDIM steps, the divergence of two class words' maps, aggregated per resolution: quartiles over
    prompts and seeds per step.
    """
    model, words, state = load_model(out, name)
    vae = build_vae()
    vae.load_state_dict(_read(out / "vae.safetensors")["model"])
    drawn: list[scenes.Scene] = []
    seed = 30_000_000
    while len(drawn) < scenes_per_time:
        scene = scenes.draw_scene(seed, 2)
        seed += 1
        if scene.objects[0].class_word != scene.objects[1].class_word and all(w.adjectives for w in scene.words):
            drawn.append(scene)
    x = torch.cat([vae.encoder(_to_tensor(s.image[None])) for s in drawn]) * state["scale"]
    mask = F.avg_pool2d(torch.from_numpy(np.stack([s.masks for s in drawn])), scenes.SIZE // LATENT_SIDE)
    context = model.encode(torch.from_numpy(np.stack([words.ids(s.caption) for s in drawn])))
    rows = torch.tensor(
        [
            [
                s.words[0].class_word + 1,
                s.words[1].class_word + 1,
                s.words[0].adjectives[0] + 1,
                s.words[1].adjectives[0] + 1,
            ]
            for s in drawn
        ]
    )
    signal = alphas_cumprod().float()
    report: dict[str, Any] = {"step": int(state["step"]), "share": {}, "jsd": {}}
    for t in (100, 300, 500, 700, 900):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
        model.cross.maps, model.cross.rows = {}, rows
        model(signal[t].sqrt() * x + (1 - signal[t]).sqrt() * noise, torch.full((len(x),), t), context)
        layers: dict[str, Any] = {}
        sums: dict[str, torch.Tensor] = {}
        for layer, found in model.cross.maps.items():
            side = int(found.shape[1] ** 0.5)
            sums[f"all {side}x{side}"] = sums.get(f"all {side}x{side}", 0) + found
            sums[layer] = found
        for layer, found in sums.items():
            side = int(found.shape[1] ** 0.5)
            small = F.avg_pool2d(mask, LATENT_SIDE // side).flatten(2).transpose(1, 2)
            area = small.mean(1)  # [n, 2]
            p = found / found.sum(1, keepdim=True)
            own = (p[..., :2] * small).sum(1) / area
            other = (p[..., :2] * small.flip(-1)).sum(1) / area.flip(-1)
            adjective = (p[..., 2:] * small).sum(1) / area
            strength = (found[..., :2] * small).sum(1) / small.sum(1)
            layers[layer] = {
                k: round(v.mean().item(), 3)
                for k, v in {"own": own, "other": other, "adjective": adjective, "attention": strength}.items()
            }
        report["share"][t] = layers
    pairs = [
        ("circle", "square"),
        ("star", "heart"),
        ("triangle", "ring"),
        ("cross", "diamond"),
        ("heart", "circle"),
        ("square", "star"),
        ("ring", "cross"),
        ("diamond", "triangle"),
    ]
    prompts = [f"a {a} and a {b}" for a, b in pairs for _ in range(4)]
    for label, texts, bound in (
        ("class words", prompts, [[2, 5]] * len(prompts)),
        ("with colours", [f"a red {a} and a blue {b}" for a, b in pairs for _ in range(4)], [[3, 7]] * len(prompts)),
    ):
        _, seen = sample(model, words, texts, seed=5, bound=bound)
        result: dict[str, Any] = {}
        for i in (0, 1, 2, 3, 6, 10):
            sums = {}
            for layer, found in seen[i].items():
                side = int(found.shape[1] ** 0.5)
                sums[f"all {side}x{side}"] = sums.get(f"all {side}x{side}", 0) + found
                sums[layer] = found
            for layer, found in sums.items():
                p = found / found.sum(1, keepdim=True)
                d = jsd(p[..., :1], p[..., 1:])  # over pixels; the last axis is one wide
                result.setdefault(layer, {})[i] = [
                    round(v, 4) for v in torch.quantile(d, torch.tensor([0.25, 0.5, 0.75])).tolist()
                ]
        report["jsd"][label] = result
    (out / f"{name}-{state['step']:06d}-grounding.json").write_text(json.dumps(report, indent=1))
    return report


# --- the file -------------------------------------------------------------------------------------------------


def export(out: Path, name: str, target: Path, note: str) -> None:
    """Write EMA weights, the autoencoder and all configs as one half-precision safetensors file."""
    from . import checkpoint

    words = Words()
    state = _read(out / f"{name}.safetensors")
    vae = _read(out / "vae.safetensors")
    # Some versions of transformers keep the encoder one level down; the file does not.
    tensors = {
        k.replace("text_encoder.text_model.", "text_encoder."): v
        for k, v in state["ema"].items()
        if v.is_floating_point()
    }
    tensors |= {f"vae.{k}": v for k, v in vae["model"].items()}
    tensors = {k: v.detach().to(torch.float16).contiguous() for k, v in tensors.items()}
    config = {
        "unet": UNET_CONFIG,
        "unet_ldm": UNET_LDM_CONFIG,
        "text_encoder": text_config(words.vocabulary),
        "vae": {**VAE_CONFIG, "scaling_factor": state["scale"]},
        "scheduler": SCHEDULER,
        "scaling_factor": state["scale"],
        "image_size": scenes.SIZE,
        "latent_size": LATENT_SIDE,
        "lexicon": list(scenes.lexicon()),
        "training": {
            "vae": {
                "steps": int(vae["step"]),
                "decoder_steps": int(vae.get("decoder_steps", 0)),
                "batch": 16,
                "seed": 1,
            },
            "unet": {
                "steps": int(state["step"]),
                "batch": int(state["batch"]),
                "seed": int(state["seed"]),
                "rate": float(state["rate"]),
                "seconds": round(float(state["seconds"])),
                "grounding_weight": float(state["grounding"]),
            },
            "data": "conceptsplit_core/demo/scenes.py",
            "machine": "2 CPU cores, no GPU",
            "note": note,
        },
    }
    metadata = {"format": checkpoint.FORMAT, "version": str(checkpoint.VERSION), "config": json.dumps(config)}
    part = target.with_suffix(".part")
    save_file(tensors, str(part), metadata)
    part.replace(target)
    print(f"{target} {target.stat().st_size / 1e6:.2f} MB, {sum(v.numel() for v in tensors.values())} numbers")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m conceptsplit_core.demo.train", description=__doc__)
    stages = ("tokenizer", "vae", "latents", "unet", "decoder", "samples", "grounding", "export")
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--out", type=Path, required=True, help="folder for states, logs and pictures")
    parser.add_argument("--name", default="unet", help="name of the UNet run in that folder")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--decay-from", type=int, default=1 << 30, help="step at which the rate begins to fall")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--grounding", type=float, default=0.0, help="weight of the grounding term")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this time even if steps remain")
    parser.add_argument("--scenes", type=int, default=16000)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="processes of the unet stage, one thread each is best")
    parser.add_argument("--per", type=int, default=4, help="pictures per prompt of the samples stage")
    parser.add_argument("--guidance", type=float, default=5.0, help="guidance of the samples stage")
    parser.add_argument("--target", type=Path, help="file to export to")
    parser.add_argument("--note", default="")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage == "tokenizer":
        from . import checkpoint, lexicon

        print(lexicon.write_tokenizer(checkpoint.TOKENIZER_DIR), "tokens")
    elif args.stage == "vae":
        train_vae(args.out, args.steps, args.batch, args.seed)
    elif args.stage == "decoder":
        polish_decoder(args.out, args.steps, args.batch, args.seed)
    elif args.stage == "latents":
        draw_latents(args.out, args.part, args.parts, args.scenes, args.seed)
    elif args.stage == "unet":
        (args.out / f"{args.name}.meeting").unlink(missing_ok=True)
        run = (
            args.workers,
            args.out,
            args.name,
            args.steps,
            args.decay_from,
            args.batch,
            args.rate,
            args.grounding,
            args.seed,
            args.minutes,
        )
        if args.workers > 1:
            torch.multiprocessing.spawn(train_unet, run, nprocs=args.workers)
        else:
            train_unet(0, *run)
    elif args.stage == "samples":
        write_samples(args.out, args.name, args.seed, args.per, args.guidance)
    elif args.stage == "grounding":
        print(json.dumps(grounding_report(args.out, args.name), indent=1))
    else:
        from . import checkpoint

        export(args.out, args.name, args.target or checkpoint.DEMO_FILE, args.note)


if __name__ == "__main__":
    main()
