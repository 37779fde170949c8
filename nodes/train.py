"""Training a value adapter from a few pictures of one concept."""

from __future__ import annotations

from typing import Any

import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from ..conceptsplit_core.hosts.comfy import files
from ..conceptsplit_core.hosts.comfy.training import lists_of, train_adapter
from ..conceptsplit_core.pictures import contact_sheet, loss_curve
from ..conceptsplit_core.settings import TrainConfig
from ..conceptsplit_core.text.binding import Concept
from ..conceptsplit_core.train.loop import TrainEvent
from ..conceptsplit_core.train.prompts import DEFAULT_TEMPLATES
from .types import ValueAdapterType, field, out, schema, to_image

_DEFAULTS = TrainConfig()
_PREVIEW_EVERY = 10  # steps between two pictures of the loss while training


class ConceptSplitTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        d = _DEFAULTS
        return schema(
            "ConceptSplitTrain",
            "Train Value Adapter (ToVA)",
            description="Teaches the model one concept from 3 to 10 pictures and saves it to models/value_adapters. "
            "Only the values of the class word change, so trained concepts can be combined without mixing.",
            search_aliases=["tova", "dreambooth", "lora training", "value adapter", "conceptsplit"],
            is_output_node=True,
            # A list of pictures of any sizes is one training on all of them, not one training each.
            is_input_list=True,
            inputs=[
                field(
                    io.Model,
                    "model",
                    "The model to learn on; it stays as it is. The concept works on every model of the same family.",
                ),
                field(io.Clip, "clip", "The model's text encoder."),
                field(io.Vae, "vae", "The model's VAE."),
                field(
                    io.Image,
                    "images",
                    "3 to 10 pictures of the one concept, in different places and poses, as a batch or a list. A list "
                    "of several sizes is scaled and cropped to the model's own (512 pixels for SD1.5, 768 for SD2.1, "
                    "1024 for SDXL).",
                ),
                field(
                    io.String,
                    "concept_name",
                    "What prompts will call it: 'rex' is written <rex>. Letters, digits, '-', '_' and '.', no spaces.",
                    default="rex",
                ),
                field(
                    io.String,
                    "class_word",
                    "The plain word the model already knows for such a thing: 'dog', 'teapot', "
                    "'backpack'. The nearer to the pictures the better.",
                    default="dog",
                ),
                field(
                    io.String,
                    "file_name",
                    "Name of the file in models/value_adapters. It counts up where there is one: rex, rex_2.",
                    default="rex",
                ),
                field(
                    io.Int,
                    "steps",
                    "Training steps. 300 to 1000 are usual; raise it when the likeness is weak, lower "
                    "it when backgrounds of the pictures creep in.",
                    default=d.steps,
                    min=1,
                    max=100000,
                ),
                field(
                    io.Int,
                    "batch_size",
                    "Pictures per step. Raise it if memory allows for a calmer loss.",
                    default=d.batch_size,
                    min=1,
                    max=64,
                ),
                field(
                    io.Float,
                    "learning_rate",
                    "Size of a training step. Halve it when the loss climbs or pictures burn out.",
                    default=d.learning_rate,
                    min=0.0000001,
                    max=1.0,
                    step=0.0001,
                    round=False,
                ),
                field(
                    io.Int,
                    "rank",
                    "Capacity of the adapter and size of its file. 4 to 16 for one object; higher for fine textures.",
                    default=8,
                    min=1,
                    max=256,
                ),
                field(
                    io.Int,
                    "seed",
                    "Random seed of the whole training: the same seed gives the same adapter.",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                ),
                field(
                    io.Mask,
                    "mask",
                    "Optional: white on the concept, one mask for all pictures or one per picture. Use it when all "
                    "pictures share a background. Load Image's MASK of a cut-out is white on the background: invert "
                    "it.",
                    optional=True,
                ),
                field(
                    io.String,
                    "templates",
                    "One training prompt per line, {} where the class word goes.",
                    default="\n".join(DEFAULT_TEMPLATES),
                    multiline=True,
                    optional=True,
                    advanced=True,
                ),
                field(
                    io.Float,
                    "alpha",
                    "Scale of the adapter is alpha / rank; 0 means alpha = rank. Change it only to match other tools.",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=1.0,
                    optional=True,
                    advanced=True,
                ),
                field(
                    io.Float,
                    "background_weight",
                    "With a mask: how much errors outside it count (0 to 1). Raise it when the surroundings matter.",
                    default=d.background_weight,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                ),
                field(
                    io.Int,
                    "save_every",
                    "Steps between two checkpoints that resume can continue from; 0 keeps only the last.",
                    default=d.save_every,
                    min=0,
                    max=100000,
                    optional=True,
                    advanced=True,
                ),
                field(
                    io.Boolean,
                    "resume",
                    "Continue a training that was stopped. All other settings but the steps must be as they were.",
                    default=False,
                    optional=True,
                    advanced=True,
                ),
                field(
                    io.Boolean,
                    "gradient_checkpointing",
                    "Uses less memory and about a third more time. Switch it on when training runs out of memory.",
                    default=False,
                    optional=True,
                    advanced=True,
                ),
                field(
                    io.Int,
                    "sample_every",
                    "Steps between two sample pictures of the concept, all from the same noise; 0 draws none. They "
                    "show in the node while it trains: stop when the likeness is there.",
                    default=0,
                    min=0,
                    max=100000,
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[
                out(ValueAdapterType, "VALUE_ADAPTER", "The trained concept, for Apply Value Adapter."),
                out(io.Image, "loss_curve", "The training loss over the steps."),
                out(io.Image, "samples", "A sheet of pictures drawn while training, one per sample_every steps."),
            ],
        )

    @classmethod
    @lists_of("images", "mask")
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        images: Any,
        concept_name: str,
        class_word: str,
        file_name: str,
        steps: int,
        batch_size: int,
        learning_rate: float,
        rank: int,
        seed: int,
        mask: Any = None,
        templates: str = "",
        alpha: float = 0.0,
        background_weight: float = _DEFAULTS.background_weight,
        save_every: int = _DEFAULTS.save_every,
        resume: bool = False,
        gradient_checkpointing: bool = False,
        sample_every: int = 0,
    ) -> io.NodeOutput:
        concept = Concept(concept_name.strip().strip("<>"), class_word.strip())
        path = files.new_path(file_name)  # a bad name is an error before an hour of training, not after
        config = TrainConfig(
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            save_every=save_every,
            background_weight=background_weight,
        )
        bar = comfy.utils.ProgressBar(steps)
        losses: list[float] = []
        samples: list[np.ndarray] = []
        labels: list[str] = []

        def on_event(event: TrainEvent) -> None:
            losses.append(event.loss)
            preview = None
            if event.step % _PREVIEW_EVERY == 0 or event.step == event.steps:
                title = f"loss {event.loss:.4f}, step {event.step} of {event.steps}"
                preview = ("JPEG", Image.fromarray(loss_curve(losses, title=title)), 640)
            bar.update_absolute(event.step, event.steps, preview)

        def on_sample(step: int, picture: torch.Tensor) -> None:
            samples.append(picture[0].cpu().numpy())
            labels.append(f"step {step}")
            sheet = contact_sheet(samples, labels, title=f"<{concept.name}>")
            bar.update_absolute(step, steps, ("JPEG", Image.fromarray(sheet), 1024))

        result = train_adapter(
            model,
            clip,
            vae,
            images,
            mask,
            concept,
            templates.splitlines() or DEFAULT_TEMPLATES,
            rank,
            alpha,
            config,
            gradient_checkpointing,
            path,
            resume,
            on_event,
            sample_every,
            on_sample,
        )
        if not samples:
            samples.append(np.full((64, 64, 3), 255, np.uint8))
            labels.append("sample_every is 0")
        return io.NodeOutput(
            result.adapter,
            to_image(loss_curve(result.losses)),
            to_image(contact_sheet(samples, labels, title=f"<{concept.name}>")),
        )


NODES = [ConceptSplitTrain]
