"""Trains a denoiser of the demo models: UNet and text encoder together on noise prediction, or what `train` is given.

With `grounding` W there is a second term: W times the mean negative log share of each class word's and adjective's
cross-attention map on its own object (`grounding_loss`). Without it a model this small learns to draw long before its
maps say which word draws where. The committed checkpoint was trained with that term; its weight is in the file's
metadata, and the demo model's README has the comparison. The committed checkpoint was trained by two processes that
averaged their gradients (`together`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .graphed import Learn, Moves, Recorded, RecordedMoves
from .latents import Data
from .states import optimiser_state, read, restore_optimiser, save
from .together import together
from .unet import Model, alphas_cumprod


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


def on_objects(error: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean per picture of errors [B, h, w], those on objects weighted; mask [B, R, h, w] is that of the bound rows."""
    weight = 1.0 + OBJECT_WEIGHT * mask.amax(dim=1)
    return (error * weight).mean(dim=(1, 2)) / weight.mean(dim=(1, 2))


def _noise_levels(batch: int) -> torch.Tensor:
    """Timesteps int64 [batch]: half of them anywhere, half where only the words can tell an object's look."""
    t = torch.randint(0, 1000, (batch,))
    t[::2] = torch.randint(450, 950, (len(t[::2]),))
    return t


LIMIT = 1_000_000  # steps of a training that only the clock ends


def adamw(model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    return [_adamw(model.parameters(), rate)]


def muon(model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of a transformer's blocks, AdamW for everything else, at one rate (K. Jordan 2024)."""
    named = dict(model.named_parameters())
    matrices = {k: v for k, v in named.items() if "blocks." in k and v.ndim == 2}
    others = [v for k, v in named.items() if k not in matrices]
    blocks = torch.optim.Muon(matrices.values(), rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [blocks, _adamw(others, rate)]


def _adamw(parameters: Iterable[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


Losses = Callable[[Any, dict[str, torch.Tensor], bool], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""(model, batch of `Data`, whether to ground) to what is shown, what is trained, and the grounding term, all []."""


def train_unet(out: Path, name: str, steps: int, *, build: Callable[[int], Model] = Model, **options: Any) -> None:
    """`train` of the UNet and its text encoder; `build` makes the model from the size of the vocabulary."""

    def built(vocabulary: int) -> Model:
        model = build(vocabulary)
        model.unet.to(memory_format=torch.channels_last)
        return model

    signal = alphas_cumprod().float()
    train(
        out, name, steps, build=built, losses=lambda model, b, grounded: losses(model, b, grounded, signal), **options
    )


def train(
    out: Path,
    name: str,
    steps: int,
    *,
    build: Callable[[int], torch.nn.Module],
    losses: Losses,
    optimisers: Callable[[torch.nn.Module, float], list[torch.optim.Optimizer]] = adamw,
    decay_from: int,
    batch: int,
    rate: float,
    grounding: float,
    seed: int,
    minutes: float,
    device: str = "cpu",
    workers: int = 0,
    recorded: bool = False,
) -> None:
    """Both ends of the noise range and objects weighted, caption dropout 10 %, EMA.

    Resumes from OUT/NAME.safetensors. The rate is constant up to step `decay_from` and then falls to 2 % at `steps`.
    Every random draw depends on (seed, step) alone, so stopping and resuming changes nothing. Stops early after
    `minutes`; with 0 steps as many as fit into them, the last two fifths with a falling rate. `workers` processes make
    captions beside the training. Of several processes (`together`) each has `batch` pictures a step. A `recorded` step
    is played back (`graphed`): on a GPU, in one process.
    """
    data, team = Data(out), together()
    torch.manual_seed(seed)
    model = build(data.words.vocabulary).to(device)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    moving = {f"optimiser{i or ''}": one for i, one in enumerate(optimisers(model, rate))}
    path = out / f"{name}.safetensors"
    start, spent = 0, 0.0
    if path.exists():
        state = read(path)
        model.load_state_dict(state["model"])
        for key, one in moving.items():
            restore_optimiser(one, state[key])
        ema = {k: torch.empty_like(v).copy_(state["ema"][k]) for k, v in model.state_dict().items()}
        start, spent = int(state["step"]), float(state["seconds"])
    optimised = list(moving.values())
    moves = RecordedMoves(optimised, device) if recorded else Moves(optimised)

    def learn(here: dict[str, torch.Tensor], last: bool) -> tuple[torch.Tensor, bool]:
        error, loss, ground = losses(model, here, grounding > 0)
        model.zero_grad(set_to_none=True)
        (loss + grounding * ground).backward()
        last = team.average(list(model.parameters()), last)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        moves.move()
        return torch.stack([error.detach(), loss.detach(), ground.detach()]), last

    taken: Learn = Recorded(learn) if recorded else learn
    began = saved = time.time()
    sums, count = torch.zeros(3, device=device), 0
    paced: list[float] = []
    floats = [k for k, v in ema.items() if v.is_floating_point()]
    for step, drawn in data.batches(seed, range(start, steps or LIMIT), batch, workers, team.place):
        torch.manual_seed(seed * 1_000_003 + step + (team.place << 40))
        fall = 1.0 if step < decay_from else 0.02 + 0.98 * (steps - step) / max(steps - decay_from, 1)
        moves.at(rate * fall * min(1.0, (step + 1) / 200))
        here = {k: v.to(device) for k, v in drawn.items()}
        last = step == steps - 1 or time.time() - began > 60 * minutes
        said, last = taken(here, last)
        keep = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            now = model.state_dict()
            torch._foreach_lerp_([ema[k] for k in floats], [now[k] for k in floats], 1 - keep)
        sums += said
        count += 1
        if not steps and step in (start + 149, start + 299):  # by then the captions' scenes are known
            sums.tolist()  # waits until the device is ready
            paced = [*paced, time.time()]
            if len(paced) == 2:
                steps = step + int((began + 60 * minutes - paced[1]) / (paced[1] - paced[0]) * 150 * 0.98)
                decay_from = int(0.6 * steps)
                print(f"{name}: {steps} steps fit, the rate falls from {decay_from}", flush=True)
        if (step % 50 == 49 or last) and not team.place:
            plain, balanced, grounded = (sums / count).tolist()
            spoken = f"error {plain:.4f} balanced {balanced:.4f} ground {grounded:.4f}"
            print(f"{name} {step + 1} {spoken} {spent + time.time() - began:.0f}s", flush=True)
            sums, count = torch.zeros(3, device=device), 0
        if (time.time() - saved > 150 or last) and not team.place:
            saved = time.time()
            save(
                {
                    **{key: optimiser_state(one) for key, one in moving.items()},
                    "model": model.state_dict(),
                    "ema": ema,
                    "step": step + 1,
                    "seconds": spent + saved - began,
                    "grounding": grounding,
                    "seed": seed,
                    "batch": batch * team.count,
                    "rate": rate,
                    "scale": data.scale,
                },
                path,
            )
        if last:
            break
    team.leave()


def losses(
    model: Model, b: dict[str, torch.Tensor], grounded: bool, signal: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean squared error of the noise, the same weighted by noise level, and the grounding term (or 0), all [].

    `b` is a batch of `Data`, `signal` [1000] the share of signal variance per step.
    """
    t = _noise_levels(len(b["x"]))
    a = signal[t][:, None, None, None]
    noise = torch.randn_like(b["x"])
    noisy = a.sqrt() * b["x"] + (1 - a).sqrt() * noise
    model.cross.rows = b["rows"] if grounded else None
    model.cross.maps = {}
    predicted = model(noisy.contiguous(memory_format=torch.channels_last), t, model.encode(b["ids"]))
    error = on_objects((predicted - noise).square().mean(dim=1), b["mask"])
    snr = signal[t] / (1 - signal[t])
    # Min-SNR with gamma 5 at the clean end. At the noisy end the noise is nearly the input, so its error says
    # little about the picture it implies; without the second factor colours and places stay guesses there.
    balance = (snr.clamp(max=5.0) / snr) * (1 + 0.2 / snr).clamp(max=30.0)
    ground = grounding_loss(model.cross.maps, b["weight"], b["mask"]) if grounded else torch.zeros(())
    return error.mean(), (error * balance).mean(), ground
