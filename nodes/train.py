"""Training a value adapter from a few pictures of one concept."""

from __future__ import annotations

import time
from typing import Any

import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from ..conceptsplit_core.hosts.comfy import files
from ..conceptsplit_core.hosts.comfy.facts import concept_line
from ..conceptsplit_core.hosts.comfy.messages import collected, tell
from ..conceptsplit_core.hosts.comfy.training import train_adapter
from ..conceptsplit_core.options import from_values
from ..conceptsplit_core.pictures import contact_sheet, loss_curve
from ..conceptsplit_core.settings import TrainConfig
from ..conceptsplit_core.text.concepts import Concept
from ..conceptsplit_core.train.captions import given_captions
from ..conceptsplit_core.train.loop import TrainEvent
from ..conceptsplit_core.train.prompts import DEFAULT_TEMPLATES
from .types import TrainOptionsType, ValueAdapterType, field, lists_of, out, schema, setting_fields, to_image, told

_PREVIEW_EVERY = 10  # steps between two pictures of the loss while training


class ConceptSplitTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitTrain",
            "Train Value Adapter (ToVA)",
            description="Teaches the model one concept from 3 to 10 pictures and saves it to models/value_adapters. "
            "Only the values of the class word change, so trained concepts can be combined without mixing.",
            search_aliases=[
                "tova",
                "dreambooth",
                "lora training",
                "identity",
                "subject",
                "character",
                "value adapter",
                "conceptsplit",
            ],
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
                    "1024 for SDXL and transformers).",
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
                    "Name of the file in models/value_adapters, or models/loras with routed. It counts up where there "
                    "is one: rex, rex_2.",
                    default="rex",
                ),
                *setting_fields(TrainConfig, advanced=False),
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
                field(TrainOptionsType, "options", "The rest of the settings, from Training Options.", optional=True),
                field(
                    io.String,
                    "captions",
                    "For Perfusion only: one ordinary caption per line; what they have in common is kept from the "
                    "concept. Leave empty for 300 of this pack's.",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                ),
                field(
                    io.String,
                    "beside",
                    "Class words of other things in the pictures, with commas between them: 'cat, red ball'. With "
                    "masks from attention they are kept out of what is learned, so that several concepts can be "
                    "learned from one picture, each by a node of its own.",
                    default="",
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
        mask: Any = None,
        templates: str = "",
        options: TrainConfig | None = None,
        captions: str = "",
        beside: str = "",
        **given: Any,
    ) -> io.NodeOutput:
        concept = Concept(concept_name.strip().strip("<>"), class_word.strip())
        config = from_values(TrainConfig, given, options)
        path = files.new_path(file_name, config.routed)  # a bad name is an error before an hour of training, not after
        shown = _Progress(concept.name, config.steps)
        with collected() as lines:
            result = train_adapter(
                model,
                clip,
                vae,
                images,
                mask,
                concept,
                templates.splitlines() or DEFAULT_TEMPLATES,
                config,
                path,
                shown.on_event,
                shown.on_sample,
                given_captions(captions.splitlines(), "captions") if captions.strip() else (),
                beside,
            )
        pictures = to_image(loss_curve(result.losses)), to_image(shown.sheet())
        lines = [concept_line(concept, result.adapter.info), *lines, shown.pace()]
        return io.NodeOutput(result.adapter, *pictures, ui=told(lines))


class _Progress:
    """The node's progress bar, with the loss or the sample pictures of the concept in the node while it trains."""

    def __init__(self, concept: str, steps: int):
        self.concept, self.steps = concept, steps
        self.bar = comfy.utils.ProgressBar(steps)
        self.losses: list[float] = []
        self.seconds = 0.0
        self.told = 0.0  # when the node's line was last sent
        self.samples: list[np.ndarray] = []
        self.labels: list[str] = []

    def on_event(self, event: TrainEvent) -> None:
        self.losses.append(event.loss)
        self.seconds += event.seconds
        if time.monotonic() - self.told > 0.5 or event.step == event.steps:
            self.told = time.monotonic()
            tell([self._line(event)], replace=True)
        preview = None
        if event.step % _PREVIEW_EVERY == 0 or event.step == event.steps:
            title = f"step {event.step} of {event.steps}, loss {event.loss:.4f}, {self._left(event.steps - event.step)}"
            preview = ("JPEG", Image.fromarray(loss_curve(self.losses, title=title)), 640)
        self.bar.update_absolute(event.step, event.steps, preview)

    def on_sample(self, step: int, picture: torch.Tensor) -> None:
        self.samples.append(picture[0].cpu().numpy())
        self.labels.append(f"step {step}")
        self.bar.update_absolute(step, self.steps, ("JPEG", Image.fromarray(self.sheet()), 1024))

    def pace(self) -> str:
        """What the training took, in one line."""
        count = len(self.losses)
        if not count:
            return "Nothing was left to train."
        quarter = max(count // 4, 1)  # single steps differ too much to compare
        early, late = (sum(part) / quarter for part in (self.losses[:quarter], self.losses[-quarter:]))
        pace = f"{count} steps of {self.seconds / count:.2g} s each"
        return f"{pace}; loss {early:.4f} in the first quarter, {late:.4f} in the last."

    def _line(self, event: TrainEvent) -> str:
        last = self.losses[-_PREVIEW_EVERY:]  # single steps jump
        pace = f"{self.seconds / len(self.losses):.2g} s a step, {self._left(event.steps - event.step)}"
        return f"Step {event.step} of {event.steps}: loss {sum(last) / len(last):.4f} (mean of {len(last)}), {pace}."

    def _left(self, steps: int) -> str:
        seconds = steps * self.seconds / len(self.losses)
        return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"

    def sheet(self) -> np.ndarray:
        """All samples so far; a white one that says so if there are none."""
        samples, labels = self.samples, self.labels
        if not samples:
            samples, labels = [np.full((64, 64, 3), 255, np.uint8)], ["sample_every is 0"]
        return contact_sheet(samples, labels, title=f"<{self.concept}>")


class ConceptSplitTrainOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitTrainOptions",
            "Training Options",
            description="The settings of Train Value Adapter that are rarely changed.",
            search_aliases=["tova", "value adapter", "conceptsplit"],
            inputs=setting_fields(TrainConfig, advanced=True),
            outputs=[out(TrainOptionsType, "TOVA_OPTIONS", "Connect to the options of Train Value Adapter.")],
        )

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        return io.NodeOutput(from_values(TrainConfig, given))


NODES = [ConceptSplitTrain, ConceptSplitTrainOptions]
