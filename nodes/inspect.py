"""Pictures of what attention did."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..conceptsplit_core.errors import ConceptSplitError
from ..conceptsplit_core.hosts.comfy.patch import AttentionMaps
from ..conceptsplit_core.pictures import trace_curve, trace_sheets
from .types import AttentionMapsType, field, out, schema, to_image


class ConceptSplitPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitPreview",
            "Concept Attention Preview",
            description="Shows where each concept looked before and after LODA, the region it was given, and how the "
            "separation loss went.",
            search_aliases=["attention maps", "loda", "heatmap", "conceptsplit"],
            inputs=[
                field(AttentionMapsType, "attention_maps", "From KSampler (LODA) or LODA Guider."),
                field(io.Image, "images", "The decoded pictures of the same run."),
            ],
            outputs=[
                out(
                    io.Image,
                    "overlays",
                    "One sheet per picture: each concept's map before LODA, after it, and its region.",
                ),
                out(io.Image, "loss_curve", "The separation loss at every evaluation, one line per picture."),
            ],
        )

    @classmethod
    def execute(cls, attention_maps: AttentionMaps, images: Any) -> io.NodeOutput:
        trace = attention_maps.trace
        if trace is None or trace.before is None:
            raise ConceptSplitError(
                "There are no attention maps: LODA did not run. Use two or more concepts in the positive prompt, "
                "loda_steps above 0, and decode the latent of the same sampler."
            )
        sheets = [to_image(sheet) for sheet in trace_sheets(trace, images.cpu().numpy())]
        return io.NodeOutput(torch.cat(sheets), to_image(trace_curve(trace)))


NODES = [ConceptSplitPreview]
