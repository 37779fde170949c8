"""A second model for the laboratory: the same demo model, trained on with a text encoder whose rows do not see each
other, to find out what depends on context that a class word's row carries.

The encoder's self-attention is taken out by setting its output projections to zero and keeping them there: a row is
then its word and its position, and the file stays an ordinary demo checkpoint that `--model` opens. UNet and encoder
train on together, with the demo's own objective and grounding term. `--mixing` is the control: the same further steps
with the encoder left as it is, which also shows what a better base model changes.

    python -m benchmarks.separation.plain_text --out out/plain-text --workers 2 --minutes 15
    python -m benchmarks.separation.plain_text --mixing --out out/further --workers 2 --minutes 15
    python -m benchmarks.separation --model out/plain-text/plain_text.safetensors --workers 2 ...

The first run draws the training scenes (some minutes) unless --latents names a folder with those of the same
autoencoder (the `latents` stage of tools.demo_model). Stopped at any time, the same command goes on from
its last state, which is kept every 150 s; when the steps are done it writes the checkpoint.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import torch

from conceptsplit_core.demo import checkpoint
from tools.demo_model.autoencoder import build_vae
from tools.demo_model.export import export
from tools.demo_model.latents import draw_latents
from tools.demo_model.pretraining import train_unet
from tools.demo_model.states import read, save
from tools.demo_model.unet import Model, Words

NAME = "state"


class PlainModel(Model):
    """The demo model with an encoder that mixes no context. Its state dict is the demo model's."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(vocabulary)
        for name, parameter in self.text_encoder.named_parameters():
            if ".self_attn.out_proj." in name:
                torch.nn.init.zeros_(parameter)
                parameter.requires_grad_(False)


def without_mixing(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A text encoder's weights with its self-attention's output at zero."""
    return {k: torch.zeros_like(v) if ".self_attn.out_proj." in k else v for k, v in state.items()}


def start(out: Path, source: Path, rate: float, grounding: float, seed: int, mixing: bool = False) -> None:
    """Writes the first training state and the autoencoder from a demo checkpoint, where they are not there yet."""
    parts = checkpoint.load(source)
    trained = parts.config["training"]["vae"]
    if not (out / "vae.safetensors").exists():
        vae = build_vae().state_dict()
        vae = {k: v.float() for k, v in parts.vae.items() if k in vae}
        save({"model": vae, "step": trained["steps"], "decoder_steps": trained["decoder_steps"]},
                         out / "vae.safetensors")  # fmt: skip
    if (out / f"{NAME}.safetensors").exists():
        return
    words = Words()
    model = (Model if mixing else PlainModel)(words.vocabulary)
    prefix = "text_model." if hasattr(model.text_encoder, "text_model") else ""
    model.unet.load_state_dict(parts.unet)
    encoder = parts.text_encoder if mixing else without_mixing(parts.text_encoder)
    model.text_encoder.load_state_dict({prefix + k: v for k, v in encoder.items()})
    # An optimiser that has seen nothing yet.
    moments = {f"{i}.step": torch.zeros(()) for i, _ in enumerate(model.parameters())}
    for i, parameter in enumerate(model.parameters()):
        moments |= {f"{i}.{name}": torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    state: dict[str, Any] = {
        "model": weights, "ema": {k: v.clone() for k, v in weights.items()}, "optimiser": moments, "step": 0,
        "seconds": 0.0, "grounding": grounding, "seed": seed, "batch": 0, "rate": rate,
        "scale": float(parts.config["scaling_factor"]),
    }  # fmt: skip
    save(state, out / f"{NAME}.safetensors")


def same_encoder(folder: Path, source: Path) -> bool:
    """Whether a folder's autoencoder encodes as the checkpoint's does (which is stored in half precision)."""
    theirs = read(folder / "vae.safetensors")["model"]
    ours = checkpoint.load(source).vae
    return all(
        torch.allclose(v.float(), theirs[k].float(), atol=2e-3, rtol=2e-3)
        for k, v in ours.items() if k.startswith("encoder.")
    )  # fmt: skip


def latents(out: Path, scenes: int, workers: int, seed: int) -> None:
    """Draws and encodes the training scenes in as many processes."""
    if workers <= 1:
        _draw(out, 0, 1, scenes, seed)
        return
    context = multiprocessing.get_context("spawn")
    drawing = [
        context.Process(target=_draw, args=(out, part, workers, scenes, seed), daemon=True) for part in range(workers)
    ]
    for process in drawing:
        process.start()
    for process in drawing:
        process.join()
    if any(process.exitcode for process in drawing):
        raise SystemExit("drawing the training scenes failed")


def _draw(out: Path, part: int, parts: int, count: int, seed: int) -> None:
    torch.set_num_threads(1)
    draw_latents(out, part, parts, count, seed)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.separation.plain_text", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", type=Path, default=checkpoint.DEMO_FILE, help="demo checkpoint to start from")
    parser.add_argument("--out", type=Path, default=Path("out/plain-text"))
    parser.add_argument(
        "--target", type=Path, help="file to write (OUT/plain_text.safetensors or OUT/further.safetensors)"
    )
    parser.add_argument("--mixing", action="store_true", help="leave the encoder as it is: the control")
    parser.add_argument("--latents", type=Path, help="folder with encoded scenes of the same autoencoder")
    parser.add_argument("--scenes", type=int, default=6000, help="scenes to draw without --latents")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rate", type=float, default=8e-4, help="constant for half the steps, then falling to 2 %%")
    parser.add_argument("--batch", type=int, default=32, help="pictures of one step")
    parser.add_argument("--grounding", type=float, default=0.02)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop training after this time; go on later")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that draw scenes, and threads of the training"
    )
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args(argv)
    began = time.time()
    torch.set_num_threads(args.workers)
    args.out.mkdir(parents=True, exist_ok=True)
    start(args.out, args.model, args.rate, args.grounding, args.seed, args.mixing)
    if args.latents is not None:
        if not same_encoder(args.latents, args.model):
            raise SystemExit(f"the scenes in {args.latents} were encoded by another autoencoder: leave --latents out")
        for path in args.latents.glob("latents-*.safetensors"):
            link = args.out / path.name
            if not link.exists():
                os.symlink(path.resolve(), link)
    elif len(list(args.out.glob("latents-*.safetensors"))) == 0:
        latents(args.out, args.scenes, args.workers, 1_000_000 + args.seed)
        print(f"{args.scenes} scenes drawn in {time.time() - began:.0f} s", flush=True)
    minutes = args.minutes - (time.time() - began) / 60
    train_unet(
        args.out, NAME, args.steps, decay_from=args.steps // 2, batch=args.batch, rate=args.rate,
        grounding=args.grounding, seed=args.seed, minutes=minutes, build=Model if args.mixing else PlainModel,
    )  # fmt: skip
    step = int(read(args.out / f"{NAME}.safetensors")["step"])
    target = args.target or args.out / ("further.safetensors" if args.mixing else "plain_text.safetensors")
    note = f"Trained {step} of {args.steps} further steps from {args.model.name}"
    if args.mixing:
        note += "."
    else:
        note += " with an encoder whose rows do not see each other: its self-attention's output projections are zero."
    export(args.out, NAME, target, note)
    print(f"{step} of {args.steps} steps, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
