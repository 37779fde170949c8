"""Sampling with LODA: a KSampler, a guider for SamplerCustomAdvanced, and the options of both."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_api.latest import io

import nodes as host_nodes

from ..conceptsplit_core.hosts.comfy.facts import run_lines
from ..conceptsplit_core.hosts.comfy.messages import collected
from ..conceptsplit_core.hosts.comfy.patch import AttentionMaps, with_loda, with_maps
from ..conceptsplit_core.options import from_values
from ..conceptsplit_core.settings import LodaConfig, SampleConfig
from .types import AttentionMapsType, LodaOptionsType, field, out, schema, setting_field, setting_fields, told

_MAPS_OUT = "What LODA saw and did, for Concept Attention Preview."


def _model_field() -> Any:
    return field(io.Model, "model", "The model, after all value adapter loaders.")


def _prompt_fields() -> list[Any]:
    return [
        field(io.Conditioning, "positive", "The prompt with the concepts, encoded by the last loader's CLIP."),
        field(io.Conditioning, "negative", "What the picture should not show."),
    ]


def _loda_fields() -> list[Any]:
    return [
        *setting_fields(LodaConfig, advanced=False),
        field(LodaOptionsType, "options", "The rest of the settings, from LODA Options.", optional=True),
        field(
            AttentionMapsType,
            "attention_maps",
            "From the sampler of an earlier stage of the same picture (hires fix, image-to-image): its regions are "
            "kept, and none are looked for.",
            optional=True,
        ),
    ]


def _prepared(
    model: Any, options: LodaConfig | None, earlier: AttentionMaps | None, given: dict[str, Any]
) -> tuple[Any, AttentionMaps]:
    """The model that samples as the LODA inputs ask, and where maps will be."""
    maps = AttentionMaps()
    return with_loda(model, from_values(LodaConfig, given, options), maps, earlier), maps


class ConceptSplitLodaOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitLodaOptions",
            "LODA Options",
            description="The settings of LODA and AFG that are rarely changed, for KSampler (LODA) and LODA Guider.",
            search_aliases=["loda", "afg", "attention", "conceptsplit"],
            inputs=setting_fields(LodaConfig, advanced=True),
            outputs=[out(LodaOptionsType, "LODA_OPTIONS", "Connect to the options of KSampler (LODA) or LODA Guider.")],
        )

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        return io.NodeOutput(from_values(LodaConfig, given))


class ConceptSplitKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitKSampler",
            "KSampler (LODA)",
            description="KSampler that first optimises the latent until the concepts of the prompt look at different "
            "places, and then keeps them there. Needs two or more concepts in the positive prompt; otherwise it is a "
            "plain KSampler and says so on the node.",
            search_aliases=[
                "loda",
                "afg",
                "attention",
                "regional",
                "multi concept",
                "attention couple",
                "conceptsplit",
            ],
            inputs=[
                _model_field(),
                *setting_fields(SampleConfig),
                field(
                    io.Combo,
                    "sampler_name",
                    "The sampling algorithm. Multistep samplers take the optimised steps as Euler steps.",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="euler",
                ),
                field(
                    io.Combo,
                    "scheduler",
                    "How noise is spread over the steps.",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="normal",
                ),
                *_prompt_fields(),
                field(io.Latent, "latent_image", "The latent to start from; its noise mask is respected."),
                field(
                    io.Float,
                    "denoise",
                    "How much of the latent is replaced (0 to 1); below 1 keeps part of the input picture.",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                ),
                *_loda_fields(),
            ],
            outputs=[
                out(io.Latent, "LATENT", "The sampled latent."),
                out(AttentionMapsType, "attention_maps", _MAPS_OUT),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Any,
        negative: Any,
        latent_image: Any,
        denoise: float,
        options: LodaConfig | None = None,
        attention_maps: AttentionMaps | None = None,
        **loda: Any,
    ) -> io.NodeOutput:
        model, maps = _prepared(model, options, attention_maps, loda)
        with collected() as warnings:
            (latent,) = host_nodes.common_ksampler(
                model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise
            )
        return io.NodeOutput(latent, maps, ui=told([*run_lines(maps.trace, positive), *warnings]))


class ConceptSplitGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitGuider",
            "LODA Guider",
            description="CFG guider with LODA, for SamplerCustomAdvanced: any sampler, any schedule.",
            search_aliases=["loda", "afg", "cfgguider", "conceptsplit"],
            inputs=[
                _model_field(),
                *_prompt_fields(),
                setting_field("cfg", SampleConfig),
                *_loda_fields(),
            ],
            outputs=[
                out(io.Guider, "GUIDER", "Connect to SamplerCustomAdvanced, or to its twin (LODA) for the maps."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        cfg: float,
        options: LodaConfig | None = None,
        attention_maps: AttentionMaps | None = None,
        **loda: Any,
    ) -> io.NodeOutput:
        guider = comfy.samplers.CFGGuider(_prepared(model, options, attention_maps, loda)[0])
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider)


class ConceptSplitSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitSampler",
            "SamplerCustomAdvanced (LODA)",
            description="SamplerCustomAdvanced that also hands on what LODA saw. Works with any guider.",
            search_aliases=["loda", "custom sampler", "attention maps", "conceptsplit"],
            inputs=[
                field(io.Noise, "noise", "The noise to start from."),
                field(io.Guider, "guider", "From LODA Guider."),
                field(io.Sampler, "sampler", "The sampler."),
                field(io.Sigmas, "sigmas", "The noise levels of the steps."),
                field(io.Latent, "latent_image", "The latent to start from; its noise mask is respected."),
            ],
            outputs=[
                out(io.Latent, "output", "The sampled latent."),
                out(io.Latent, "denoised_output", "The last step's guess of the finished latent."),
                out(AttentionMapsType, "attention_maps", _MAPS_OUT),
            ],
        )

    @classmethod
    def execute(cls, noise: Any, guider: Any, sampler: Any, sigmas: Any, latent_image: Any) -> io.NodeOutput:
        own, maps = with_maps(guider)
        node = host_nodes.NODE_CLASS_MAPPINGS["SamplerCustomAdvanced"]
        given = {"noise": noise, "guider": own, "sampler": sampler, "sigmas": sigmas, "latent_image": latent_image}
        sample = node.execute if hasattr(node, "define_schema") else getattr(node(), node.FUNCTION)
        with collected() as warnings:
            made = sample(**given)
        latents = made.result if hasattr(made, "result") else made
        positive = [(None, cond) for cond in getattr(guider, "original_conds", {}).get("positive", ())]
        return io.NodeOutput(*latents, maps, ui=told([*run_lines(maps.trace, positive), *warnings]))


NODES = [ConceptSplitKSampler, ConceptSplitGuider, ConceptSplitSampler, ConceptSplitLodaOptions]
