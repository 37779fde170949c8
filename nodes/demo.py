"""The built-in demo model and pictures to train on, so that every workflow runs without a download."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io

from ..conceptsplit_core.demo.looks import CONCEPTS
from ..conceptsplit_core.demo.photograph import photograph, place
from ..conceptsplit_core.demo.scenes import draw_concept
from ..conceptsplit_core.hosts.comfy.demo import load_demo
from ..conceptsplit_core.hosts.comfy.demo_transformer import load_demo_transformer
from .types import field, out, schema, to_image

LOADERS = {"UNet": load_demo, "transformer": load_demo_transformer}


class ConceptSplitDemoCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitDemoCheckpoint",
            "Demo Checkpoint Loader",
            "demo",
            description="A small model of drawn shapes that comes with ConceptSplit, to try every node in seconds, on "
            "a CPU. Use 128 x 128 pictures and prompts such as 'a photo of a circle and a square'.",
            search_aliases=["conceptsplit", "checkpoint"],
            inputs=[
                field(
                    io.Combo,
                    "model",
                    "UNet: of SD1.5's kind. transformer: of Flux's kind, with the same text encoder and VAE.",
                    options=list(LOADERS),
                    default=next(iter(LOADERS)),
                    optional=True,  # graphs of version 0.2.0 do not have it
                ),
            ],
            outputs=[
                out(io.Model, "MODEL", "The demo model."),
                out(io.Clip, "CLIP", "Its text encoder."),
                out(io.Vae, "VAE", "Its VAE."),
            ],
        )

    @classmethod
    def execute(cls, model: str = next(iter(LOADERS))) -> io.NodeOutput:
        return io.NodeOutput(*LOADERS[model]())


class ConceptSplitDemoImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = list(CONCEPTS)
        return schema(
            "ConceptSplitDemoImages",
            "Demo Concept Images",
            "demo",
            description="Draws training pictures of a concept that the demo model has never seen.",
            search_aliases=["conceptsplit", "training images"],
            inputs=[
                field(
                    io.Combo,
                    "concept",
                    "Which concept to draw; its class word is "
                    + ", ".join(f"{CONCEPTS[name].class_word} for {name}" for name in names)
                    + ".",
                    options=names,
                    default=names[0],
                ),
                field(io.Int, "count", "How many pictures. 4 to 6 are enough.", default=5, min=1, max=64),
                field(
                    io.Int,
                    "seed",
                    "Random seed of places, sizes and backgrounds.",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,
                ),
            ],
            outputs=[
                out(io.Image, "images", "128 x 128 pictures, for Train Value Adapter."),
                out(io.String, "class_word", "The class word to train with."),
            ],
        )

    @classmethod
    def execute(cls, concept: str, count: int, seed: int) -> io.NodeOutput:
        pictures = np.stack(draw_concept(concept, count, seed)).astype(np.float32) / 255.0
        return io.NodeOutput(torch.from_numpy(pictures), CONCEPTS[concept].class_word)


class ConceptSplitDemoPhoto(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitDemoPhoto",
            "Demo Photograph",
            "demo",
            description="A rocket before its start, at night: a photograph to put concepts into, with a place painted "
            "on it. Load Image gives the same two of a picture of yours.",
            search_aliases=["conceptsplit", "photo", "image"],
            inputs=[],
            outputs=[
                out(io.Image, "IMAGE", "The photograph, 384 x 256, by SpaceX, in the public domain."),
                out(io.Mask, "MASK", "A place painted on it: free sky beside the rocket's tip."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        mask = torch.from_numpy(place().astype(np.float32) / 255.0)
        return io.NodeOutput(to_image(photograph()), mask.unsqueeze(0))


NODES = [ConceptSplitDemoCheckpoint, ConceptSplitDemoImages, ConceptSplitDemoPhoto]
