"""Texts of concepts, changed after they are encoded."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..conceptsplit_core.hosts.comfy.carried import with_correction
from ..conceptsplit_core.options import from_values
from ..conceptsplit_core.settings import CorrectionConfig
from .types import field, out, schema, setting_fields


class ConceptSplitCorrectWords(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitCorrectWords",
            "Correct Concept Words (T2I-Zero)",
            description="Gathers the rows of a prompt's concepts anew from the rows most like them, against one object "
            "that dominates the others (T2I-Zero's correction by similarities). For SD1.5, SD2.x and SDXL. In tests it "
            "gained nothing: LODA is the way that does.",
            search_aliases=["t2i-zero", "multi concept", "text embedding", "conceptsplit"],
            inputs=[
                field(io.Conditioning, "conditioning", "A prompt with concepts, encoded by the last loader's CLIP."),
                *setting_fields(CorrectionConfig, correction=1.0),
            ],
            outputs=[out(io.Conditioning, "CONDITIONING", "The prompt with corrected words.")],
        )

    @classmethod
    def execute(cls, conditioning: Any, **given: Any) -> io.NodeOutput:
        return io.NodeOutput(with_correction(conditioning, from_values(CorrectionConfig, given)))


NODES = [ConceptSplitCorrectWords]
