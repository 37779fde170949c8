"""Loading value adapters and marking words: MODEL and CLIP in, MODEL and CLIP that know a concept out."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..conceptsplit_core.adapters.gated import with_gate
from ..conceptsplit_core.adapters.low_rank import LowRankAdapter
from ..conceptsplit_core.errors import ConceptSplitError
from ..conceptsplit_core.hosts.comfy import files
from ..conceptsplit_core.hosts.comfy.clip import with_concepts
from ..conceptsplit_core.hosts.comfy.facts import concept_line
from ..conceptsplit_core.hosts.comfy.messages import collected
from ..conceptsplit_core.hosts.comfy.patch import LoadedAdapter, with_adapter
from ..conceptsplit_core.options import from_values
from ..conceptsplit_core.settings import GateConfig, LoaderConfig
from ..conceptsplit_core.text.concepts import Concept, marked_concepts
from .types import ValueAdapterType, field, loader_inputs, loader_outputs, out, schema, setting_fields, told


def _concept_fields() -> list[Any]:
    return [
        field(
            io.String,
            "concept_name",
            "What prompts call the concept: 'rex' is written <rex>. Leave empty for the name "
            "stored in the file. Change it when two files have the same name.",
            default="",
        ),
        *setting_fields(LoaderConfig, advanced=False),
        field(
            io.String,
            "class_word",
            "The plain word the concept stands for, such as 'dog'. Leave empty for the word "
            "stored in the file; only files of other tools lack one. 'dog; 0.4: dog in armour' has others from 0.4 "
            "of the steps on.",
            default="",
            optional=True,
            advanced=True,
        ),
        *setting_fields(LoaderConfig, advanced=True, folded=True),
        *setting_fields(GateConfig, folded=True),
    ]


def _apply(
    model: Any, clip: Any, adapter: LowRankAdapter, concept_name: str, class_word: str, given: dict[str, Any]
) -> io.NodeOutput:
    config = from_values(LoaderConfig, given)
    name = concept_name.strip().strip("<>") or adapter.info.concept
    word = class_word.strip() or adapter.info.class_word
    if not word:
        raise ConceptSplitError(
            f"The value adapter '{name}' stores no class word: write it into class_word, e.g. 'dog'."
        )
    concept = Concept(name, word)
    knowing = with_concepts(clip, [concept])
    gated = with_gate(adapter, from_values(GateConfig, given))
    loaded = LoadedAdapter(concept.name, gated, config.strength, config.start_percent, config.end_percent)
    return io.NodeOutput(with_adapter(model, loaded), knowing, ui=told([concept_line(concept, adapter.info)]))


class ConceptSplitLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitLoader",
            "Value Adapter Loader (ToVA)",
            description="Loads a concept trained by Train Value Adapter. Use it like a LoRA loader, once per concept, "
            "and write <concept name> where the concept belongs in the prompt. Unlike a LoRA it changes only the words "
            "that carry the concept, so several concepts do not mix.",
            search_aliases=[
                "tova",
                "value adapter",
                "concept",
                "lora loader",
                "identity",
                "subject",
                "character",
                "regional",
                "multi concept",
                "personalization",
                "conceptsplit",
            ],
            inputs=[
                *loader_inputs(),
                field(
                    io.Combo,
                    "adapter",
                    "A file in models/value_adapters. Files trained a moment ago appear after a refresh (R).",
                    options=files.adapter_names(),
                ),
                *_concept_fields(),
            ],
            outputs=loader_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, adapter: str = "", **_: Any) -> str:
        # A file trained again under the same name must be loaded again.
        return files.fingerprint(adapter, files.adapter_path)

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        adapter: str,
        concept_name: str = "",
        class_word: str = "",
        **given: Any,
    ) -> io.NodeOutput:
        return _apply(model, clip, files.load_named(adapter), concept_name, class_word, given)


class ConceptSplitApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitApply",
            "Apply Value Adapter",
            description="Adds a value adapter that another node made, for instance one fresh from training, without a "
            "file in between.",
            search_aliases=["tova", "value adapter", "identity", "subject", "conceptsplit"],
            inputs=[
                *loader_inputs(),
                field(ValueAdapterType, "value_adapter", "The concept, from Train Value Adapter."),
                *_concept_fields(),
            ],
            outputs=loader_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        value_adapter: LowRankAdapter,
        concept_name: str = "",
        class_word: str = "",
        **given: Any,
    ) -> io.NodeOutput:
        return _apply(model, clip, value_adapter, concept_name, class_word, given)


class ConceptSplitSave(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitSave",
            "Save Value Adapter",
            description="Writes a value adapter to models/value_adapters, at full or smaller rank.",
            search_aliases=["tova", "value adapter", "conceptsplit"],
            is_output_node=True,
            inputs=[
                field(ValueAdapterType, "value_adapter", "The concept to write."),
                field(
                    io.String,
                    "file_name",
                    "Name of the file in models/value_adapters; 'dogs/rex' makes a subfolder. An "
                    "existing file of that name is replaced.",
                    default="my_concept",
                ),
                field(
                    io.Int,
                    "reduce_rank",
                    "Store at this lower rank to make the file smaller; 0 keeps it. The "
                    "relative error is shown on the node: up to about 0.1 is rarely visible.",
                    default=0,
                    min=0,
                    max=1024,
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[out(ValueAdapterType, "VALUE_ADAPTER", "The adapter as it was written.")],
        )

    @classmethod
    def execute(cls, value_adapter: LowRankAdapter, file_name: str, reduce_rank: int = 0) -> io.NodeOutput:
        with collected() as lines:
            saved = files.save_reduced(value_adapter, file_name, reduce_rank)
        return io.NodeOutput(saved, ui=told(lines))


class ConceptSplitMarkWords(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitMarkWords",
            "Mark Concept Words",
            description="Marks plain words, such as 'cat, dog', so that KSampler (LODA) keeps them apart on any model, "
            "without trained concepts.",
            search_aliases=["loda", "attention", "regional", "multi concept", "conceptsplit"],
            inputs=[
                field(io.Clip, "clip", "The text encoder. Encode the prompt with the CLIP that leaves this node."),
                field(
                    io.String,
                    "words",
                    "The words to keep apart, separated by commas. Each is bound where it stands in "
                    "the prompt. Write 'name:word' to have a placeholder <name> too, for two of "
                    "one kind: 'a:dog, b:dog'.",
                    default="cat, dog",
                ),
            ],
            outputs=[out(io.Clip, "CLIP", "The text encoder that marks these words.")],
        )

    @classmethod
    def execute(cls, clip: Any, words: str) -> io.NodeOutput:
        return io.NodeOutput(with_concepts(clip, marked_concepts(words)))


NODES = [ConceptSplitLoader, ConceptSplitApply, ConceptSplitSave, ConceptSplitMarkWords]
