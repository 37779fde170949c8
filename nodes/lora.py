"""Ordinary LoRA files, each on its own concept; regions in and out."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..conceptsplit_core.hosts.comfy import files
from ..conceptsplit_core.hosts.comfy.clip import with_concepts, with_text_lora
from ..conceptsplit_core.hosts.comfy.facts import concept_line
from ..conceptsplit_core.hosts.comfy.lora import concept_of, read_lora
from ..conceptsplit_core.hosts.comfy.patch import AttentionMaps, LoadedAdapter, with_adapter, with_masks
from ..conceptsplit_core.method.masks import MASKS, concept_masks
from ..conceptsplit_core.options import from_values
from ..conceptsplit_core.settings import LoaderConfig
from ..conceptsplit_core.text.concepts import concept_name as clean_name
from ..conceptsplit_core.text.concepts import meant
from .types import AttentionMapsType, field, loader_inputs, loader_outputs, mask_of, out, schema, setting_fields, told

_MASK = (
    "White where this concept belongs in the picture. Leave it open and the run finds the place by itself; two people "
    "of one kind are told apart best with masks."
)


class ConceptSplitLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitLoraLoader",
            "LoRA Concept Loader",
            description="Loads an ordinary LoRA for one concept of the picture, such as one of two people. It acts "
            "only at the concept's own words and in its own region, so two LoRAs do not blend into one person. Chain "
            "one per concept, write <concept name> in the prompt, and sample with any KSampler.",
            search_aliases=[
                "lora loader",
                "two loras",
                "multiple characters",
                "character",
                "regional lora",
                "identity",
                "subject",
                "multi concept",
                "attention couple",
                "conceptsplit",
            ],
            inputs=[
                *loader_inputs(),
                field(io.Combo, "lora", "A file in models/loras.", options=files.lora_names()),
                field(
                    io.String,
                    "concept_name",
                    "What prompts call the concept: 'anna' is written <anna>. Leave empty for the file's name.",
                    default="",
                ),
                field(
                    io.String,
                    "words",
                    "The words the LoRA was trained on, such as 'ohwx woman'; <name> in the prompt becomes these. "
                    "Leave empty to take them from the file, if it says so. 'ohwx woman; 0.4: ohwx woman in armour' "
                    "has others from 0.4 of the steps on.",
                    default="",
                ),
                *setting_fields(LoaderConfig, advanced=False),
                field(
                    io.Float,
                    "strength_clip",
                    "How much of the LoRA's text encoder part acts, at the concept's own words only.",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                ),
                field(io.Mask, "mask", _MASK, optional=True),
                *setting_fields(LoaderConfig, advanced=True, folded=True),
            ],
            outputs=[
                *loader_outputs(),
                out(io.String, "info", "Which parts of the file act where, and what is left out."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str = "", **_: Any) -> str:
        return files.fingerprint(lora, files.lora_path)

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        lora: str,
        concept_name: str = "",
        words: str = "",
        strength_clip: float = 1.0,
        mask: Any = None,
        **given: Any,
    ) -> io.NodeOutput:
        config = from_values(LoaderConfig, given)
        path = files.lora_path(lora)
        concept = concept_of(path, clean_name(concept_name), words)
        file = read_lora(path, model, clip, concept.name, concept.class_word)
        knowing = with_concepts(clip, [concept])
        if file.text_patches and strength_clip:
            knowing = with_text_lora(knowing, concept.name, file.text_patches, strength_clip)
        loaded = LoadedAdapter(
            concept.name, file.adapter, config.strength, config.start_percent, config.end_percent, mask=mask_of(mask)
        )
        info = f"<{concept.name}> = {concept.words}; {file.report.sentence()}"
        lines = [concept_line(concept, file.adapter.info), file.report.sentence() + "."]
        return io.NodeOutput(with_adapter(model, loaded), knowing, info, ui=told(lines))


class ConceptSplitRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitRegion",
            "Concept Region",
            description="Gives one concept its place in the picture by a mask, instead of the place that a run finds. "
            "For concepts of any loader and for words of Mark Concept Words.",
            search_aliases=["regional prompt", "attention couple", "mask", "area", "multi concept", "conceptsplit"],
            inputs=[
                field(io.Model, "model", "The model, after the loaders."),
                field(io.String, "concept_name", "The concept's name, as the prompt writes it, or the marked word."),
                field(io.Mask, "mask", _MASK),
            ],
            outputs=[out(io.Model, "MODEL", "The model that keeps the concept in its region.")],
        )

    @classmethod
    def execute(cls, model: Any, concept_name: str, mask: Any) -> io.NodeOutput:
        given = mask_of(mask)
        return io.NodeOutput(with_masks(model, {} if given is None else {clean_name(concept_name): given}))


class ConceptSplitMasks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitMasks",
            "Concept Masks",
            description="Where one concept is in the pictures of a run, as a MASK for detailers and inpainting.",
            search_aliases=["segment", "detailer", "inpaint", "mask", "conceptsplit"],
            inputs=[
                field(AttentionMapsType, "attention_maps", "From KSampler (LODA)."),
                field(io.Image, "images", "The decoded pictures of the same run; the masks get their size."),
                field(io.String, "concept_name", "Which concept; leave empty for the first.", default=""),
                field(
                    io.Combo,
                    "kind",
                    "area: every pixel to the concept that is strongest there. region: its strongest pixels, where AFG "
                    "holds it. soft: its attention map, from 0 to 1.",
                    options=list(MASKS),
                    default=MASKS[0],
                ),
            ],
            outputs=[out(io.Mask, "MASK", "White where the concept is, one mask per picture.")],
        )

    @classmethod
    def execute(cls, attention_maps: AttentionMaps, images: Any, concept_name: str, kind: str) -> io.NodeOutput:
        size = (images.shape[1], images.shape[2])
        trace = attention_maps.trace
        name = meant(concept_name, trace.concepts if trace else ()) or clean_name(concept_name)
        masks = concept_masks(trace, name, kind, size)
        return io.NodeOutput(masks.expand(images.shape[0], -1, -1) if len(masks) == 1 else masks)


NODES: list[type[io.ComfyNode]] = [ConceptSplitLoraLoader, ConceptSplitRegion, ConceptSplitMasks]
