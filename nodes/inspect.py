"""Pictures of what attention did."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..conceptsplit_core.hosts.comfy.patch import AttentionMaps
from ..conceptsplit_core.pictures import notice_sheet, separation_curve, trace_curve, trace_sheets
from .types import AttentionMapsType, field, out, schema, to_image

_NO_MAPS = (
    "LODA did not run, so there are no attention maps. It needs two or more concepts in the positive prompt and "
    "loda_steps above 0 or -1, and the picture must come from the same sampler."
)


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
        pictures = images.cpu().numpy()
        trace = attention_maps.trace
        if trace is None or (trace.after is None and trace.regions is None):
            sheets, curve = [notice_sheet(picture, _NO_MAPS) for picture in pictures], separation_curve((), ())
        else:
            sheets = trace_sheets(trace, pictures)
            curve = trace_curve(trace) if trace.losses else separation_curve((), ())
        return io.NodeOutput(torch.cat([to_image(sheet) for sheet in sheets]), to_image(curve))


NODES = [ConceptSplitPreview]
