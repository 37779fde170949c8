"""One graph over several values of a setting, and the sheet of what they gave."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io

from ..conceptsplit_core.errors import ConceptSplitError
from ..conceptsplit_core.pictures import contact_sheet
from .types import field, out, schema, to_image


def numbers(text: str) -> list[float]:
    """Numbers written with commas, spaces or line breaks between them.

    Raises:
        ConceptSplitError: none is there, or a part is no number.
    """
    found = []
    for part in text.replace(",", " ").split():
        try:
            found.append(float(part))
        except ValueError:
            found.append(math.nan)
        if not math.isfinite(found[-1]):
            raise ConceptSplitError(f"'{part}' is no number: write values such as 0, 0.5, 1.")
    if not found:
        raise ConceptSplitError("There are no values: write some with commas between them, such as 0, 0.5, 1.")
    return found


class ConceptSplitValues(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitValues",
            "Setting Values",
            description="Runs what comes after it once for each value, in one run of the graph.",
            search_aliases=["xy plot", "grid", "sweep", "list", "conceptsplit"],
            inputs=[
                field(io.String, "values", "Numbers with commas between them, in the order of the rows.",
                      default="0, 0.5, 1, 1.5"),
            ],
            outputs=[
                io.Float.Output(display_name="FLOAT", is_output_list=True,
                                tooltip="The values, for any setting with a point, such as strength or cfg."),
                io.Int.Output(display_name="INT", is_output_list=True,
                              tooltip="The values rounded, for any whole setting, such as steps or seed."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, values: str) -> io.NodeOutput:
        found = numbers(values)
        return io.NodeOutput(found, [round(value) for value in found])


class ConceptSplitSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitSheet",
            "Setting Sheet",
            description="One picture of all pictures that Setting Values led to: a row per value, labelled with it.",
            search_aliases=["xy plot", "grid", "contact sheet", "conceptsplit"],
            is_input_list=True,
            inputs=[
                field(io.Image, "images", "The decoded pictures; those of one value make one row."),
                field(io.Float, "values", "FLOAT of Setting Values.", default=0.0, force_input=True),
            ],
            outputs=[out(io.Image, "sheet", "One picture, each of its tiles with the value below it.")],
        )

    @classmethod
    def execute(cls, images: list[Any], values: list[float]) -> io.NodeOutput:
        if len(images) != len(values):
            raise ConceptSplitError(
                f"{len(images)} runs but {len(values)} values: connect FLOAT of the Setting Values that the pictures "
                "come from."
            )
        columns = max(len(batch) for batch in images)
        if any(len(batch) != columns for batch in images):
            raise ConceptSplitError("The values gave batches of different sizes, which cannot stand in rows.")
        pictures = [picture for batch in images for picture in batch.cpu().numpy()]
        labels = [f"{value:g}" for value in values for _ in range(columns)]
        return io.NodeOutput(to_image(contact_sheet(pictures, labels, columns)))


NODES = [ConceptSplitValues, ConceptSplitSheet]
