"""Trains the demo model from nothing: `python -m tools.demo_model STAGE --out FOLDER`.

Stages in order: `tokenizer` (writes the tokenizer files), `vae` (picture autoencoder), `latents` (draws and encodes
the training scenes), `unet` (UNet and text encoder together), `decoder` (more steps for the picture decoder alone,
at any time after `vae`), `export` (one safetensors file), `loras` (two LoRA files for the exported model, into FOLDER);
`samples` and `grounding` look at a state in between. The demo transformer, on the autoencoder and text encoder of the
demo checkpoint: `start`, `latents`, `transformer`, `transformer_samples`, `transformer_export`. Every stage is seeded,
and `vae`, `unet` and `transformer` resume from their last state in FOLDER. `latents` may be split over processes
by hand (`--part 0 --parts 2` and `--part 1 --parts 2`); everything else runs in one process.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from conceptsplit_core.demo import checkpoint

from . import autoencoder, export, latents, lexicon, loras, pretraining, report, transformer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = (
        "tokenizer",
        "vae",
        "latents",
        "unet",
        "decoder",
        "samples",
        "grounding",
        "export",
        "loras",
        "start",
        "transformer",
        "transformer_samples",
        "transformer_export",
    )
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--out", type=Path, required=True, help="folder for states and pictures")
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
    parser.add_argument("--per", type=int, default=4, help="pictures per prompt of the samples stage")
    parser.add_argument("--guidance", type=float, default=5.0, help="guidance of the samples stage")
    parser.add_argument("--target", type=Path, help="file to export to, instead of the committed one")
    parser.add_argument("--device", default="cpu", help="of the transformer's stages")
    parser.add_argument("--workers", type=int, default=0, help="processes that make captions beside the training")
    parser.add_argument(
        "--begin", type=Path, help="an exported transformer that the transformer's training begins with"
    )
    parser.add_argument("--compiled", action="store_true", help="compile the transformer's training")
    parser.add_argument("--recorded", action="store_true", help="play the transformer's step back as a CUDA graph")
    parser.add_argument("--machine", default="2 CPU cores, no GPU", help="for the exported file")
    parser.add_argument("--note", default="")
    args = parser.parse_args(argv)
    if args.recorded and not args.device.startswith("cuda"):
        parser.error("--recorded plays CUDA graphs back: it needs --device cuda")
    torch.set_num_threads(args.threads)
    chosen = ("decay_from", "batch", "rate", "grounding", "seed", "minutes", "workers")
    training = {name: getattr(args, name) for name in chosen}
    flow = {name: getattr(args, name) for name in ("device", "compiled", "begin", "recorded")}
    args.out.mkdir(parents=True, exist_ok=True)
    match args.stage:
        case "tokenizer":
            print(lexicon.write_tokenizer(checkpoint.TOKENIZER_DIR), "tokens")
        case "loras":
            loras.write_loras(args.out)
        case "vae":
            autoencoder.train_vae(args.out, args.steps, args.batch, args.seed)
        case "decoder":
            autoencoder.polish_decoder(args.out, args.steps, args.batch, args.seed)
        case "latents":
            latents.draw_latents(args.out, args.part, args.parts, args.scenes, args.seed)
        case "unet":
            pretraining.train_unet(args.out, args.name, args.steps, device=args.device, **training)
        case "start":
            autoencoder.start_from_demo(args.out)
        case "transformer":
            transformer.train_transformer(args.out, args.name, args.steps, **flow, **training)
        case "transformer_samples":
            transformer.write_samples(args.out, args.name, args.seed, args.per, args.guidance, args.device)
        case "transformer_export":
            target = args.target or checkpoint.TRANSFORMER_FILE
            transformer.export(args.out, args.name, target, args.machine, args.note)
        case "samples":
            report.write_samples(args.out, args.name, args.seed, args.per, args.guidance)
        case "grounding":
            print(json.dumps(report.grounding_report(args.out, args.name), indent=1))
        case "export":
            export.export(args.out, args.name, args.target or checkpoint.DEMO_FILE, args.note)


if __name__ == "__main__":
    main()
