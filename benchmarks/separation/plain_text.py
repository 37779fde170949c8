"""A second model for the laboratory: the same demo model, trained on with a text encoder whose rows do not see each
other, to find out what depends on context that a class word's row carries.

The encoder's self-attention is taken out by setting its output projections to zero and keeping them there: a row is
then its word and its position, and the file stays an ordinary demo checkpoint that `--model` opens. UNet and encoder
train on together, with the demo's own objective and grounding term. `--mixing` is the control: the same further steps
with the encoder left as it is, which also shows what a better base model changes.

    python -m benchmarks.separation.plain_text --out out/plain-text --workers 2 --minutes 15
    python -m benchmarks.separation.plain_text --mixing --out out/further --workers 2 --minutes 15
    python -m benchmarks.separation --model out/plain-text/plain_text.safetensors --workers 2 ...

The first run draws the training scenes (some minutes). Stopped at any time, the same command goes on from its last
state, which is kept every 150 s; when the steps are done it writes the checkpoint.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path

import torch

from conceptsplit_core.demo import checkpoint
from tools.demo_model.autoencoder import start_from_demo
from tools.demo_model.export import export
from tools.demo_model.latents import draw_latents
from tools.demo_model.pretraining import train_unet
from tools.demo_model.states import read, save
from tools.demo_model.unet import Model, Words

NAME = "state"
RATE, GROUNDING, SEED = 8e-4, 0.02, 7
MIXING = ".self_attn.out_proj."


class PlainModel(Model):
    """The demo model with an encoder that mixes no context. Its state dict is the demo model's."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(vocabulary)
        for name, parameter in self.text_encoder.named_parameters():
            if MIXING in name:
                torch.nn.init.zeros_(parameter)
                parameter.requires_grad_(False)


def start(out: Path, mixing: bool) -> None:
    """Writes the first training state and the autoencoder from the demo checkpoint, where they are not there yet."""
    start_from_demo(out)
    if (out / f"{NAME}.safetensors").exists():
        return
    parts = checkpoint.load()
    model = (Model if mixing else PlainModel)(Words().vocabulary)
    prefix = "text_model." if hasattr(model.text_encoder, "text_model") else ""
    model.unet.load_state_dict(parts.unet)
    encoder = {prefix + k: v for k, v in parts.text_encoder.items()}
    if not mixing:
        encoder |= {k: torch.zeros_like(v) for k, v in encoder.items() if MIXING in k}
    model.text_encoder.load_state_dict(encoder)
    # An optimiser that has seen nothing yet.
    moments = {f"{i}.step": torch.zeros(()) for i, _ in enumerate(model.parameters())}
    for i, parameter in enumerate(model.parameters()):
        moments |= {f"{i}.{name}": torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    state = {
        "model": weights, "ema": {k: v.clone() for k, v in weights.items()}, "optimiser": moments, "step": 0,
        "seconds": 0.0, "grounding": GROUNDING, "seed": SEED, "batch": 0, "rate": RATE,
        "scale": float(parts.config["scaling_factor"]),
    }  # fmt: skip
    save(state, out / f"{NAME}.safetensors")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.separation.plain_text", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out/plain-text"))
    parser.add_argument("--mixing", action="store_true", help="leave the encoder as it is: the control")
    parser.add_argument("--scenes", type=int, default=6000, help="scenes to draw")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=32, help="pictures of one step")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop training after this time; go on later")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw scenes, threads of the training")
    args = parser.parse_args(argv)
    began = time.time()
    torch.set_num_threads(args.workers)
    args.out.mkdir(parents=True, exist_ok=True)
    start(args.out, args.mixing)
    if not list(args.out.glob("latents-*.safetensors")):
        parts = [(args.out, part, args.workers, args.scenes, 1_000_000 + SEED) for part in range(args.workers)]
        with multiprocessing.get_context("spawn").Pool(args.workers, torch.set_num_threads, (1,)) as pool:
            pool.starmap(draw_latents, parts)
        print(f"{args.scenes} scenes drawn in {time.time() - began:.0f} s", flush=True)
    train_unet(
        args.out, NAME, args.steps, decay_from=args.steps // 2, batch=args.batch, rate=RATE, grounding=GROUNDING,
        seed=SEED, minutes=args.minutes - (time.time() - began) / 60, build=Model if args.mixing else PlainModel,
    )  # fmt: skip
    step = int(read(args.out / f"{NAME}.safetensors")["step"])
    how = "" if args.mixing else ", with an encoder whose rows do not see each other"
    note = f"Trained {step} of {args.steps} further steps from {checkpoint.DEMO_FILE.name}{how}."
    export(args.out, NAME, args.out / ("further.safetensors" if args.mixing else "plain_text.safetensors"), note)
    print(f"{step} of {args.steps} steps, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
