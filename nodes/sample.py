"""Sampling with LODA: a KSampler, and a guider for SamplerCustomAdvanced."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_api.latest import io

import nodes as host_nodes

from ..conceptsplit_core.hosts.comfy.patch import AttentionMaps, with_loda
from ..conceptsplit_core.method.divergence import DIVERGENCES
from ..conceptsplit_core.settings import AUTO, MAP_PARTS, STEP_RULES, LodaConfig
from .types import AttentionMapsType, field, out, schema

_DEFAULTS = LodaConfig()


def _model_field() -> Any:
    return field(io.Model, "model", "The model, after all value adapter loaders.")


def _prompt_fields() -> list[Any]:
    return [
        field(io.Conditioning, "positive", "The prompt with the concepts, encoded by the last loader's CLIP."),
        field(io.Conditioning, "negative", "What the picture should not show."),
    ]


def _cfg_field() -> Any:
    return field(
        io.Float,
        "cfg",
        "Classifier-free guidance scale: how strictly the prompt is followed. Usual are 5 to 8.",
        default=7.0,
        min=0.0,
        max=100.0,
        step=0.1,
        round=0.01,
    )


def _loda_fields() -> list[Any]:
    d = _DEFAULTS
    return [
        field(
            io.Int,
            "loda_steps",
            "Sampling steps at whose start the latent is optimised until the concepts look at "
            "different places; -1 is the first fifth of the steps, 0 switches LODA off. Raise it when concepts still "
            "blend, lower it for speed.",
            default=d.loda_steps,
            min=AUTO,
            max=100,
        ),
        field(
            io.Float,
            "loda_strength",
            "Size of one optimisation update, in standard deviations of the latent. Raise it "
            "when concepts still blend, lower it when pictures look overworked.",
            default=d.loda_strength,
            min=0.0,
            max=2.0,
            step=0.01,
            round=0.0001,
        ),
        field(
            io.Boolean,
            "afg",
            "Attention fixing guidance: after the optimised steps each concept keeps the region it "
            "has found for most of the run. Switch it off when regions come out too rigid.",
            default=d.afg,
        ),
        field(
            io.Int,
            "loda_iterations",
            "Updates per optimised step, at most; fewer are made once the concepts are apart. "
            "Each costs about one extra model call.",
            default=d.loda_iterations,
            min=1,
            max=50,
            optional=True,
            advanced=True,
        ),
        field(
            io.Combo,
            "divergence",
            "How overlap is measured. jsd treats all concepts alike; kl is the paper's and depends on word order.",
            options=list(DIVERGENCES),
            default=d.divergence,
            optional=True,
            advanced=True,
        ),
        field(
            io.Float,
            "threshold",
            "How far apart is enough, in the divergence's own unit; 0 chooses. Raise it for "
            "stricter separation (jsd ends at 0.69).",
            default=d.threshold,
            min=0.0,
            max=50.0,
            step=0.01,
            round=0.0001,
            optional=True,
            advanced=True,
        ),
        field(
            io.Combo,
            "loda_rule",
            "normalised: the strength means the same on every model. gradient: the paper's rule, "
            "the strength multiplies the raw gradient (20 in the paper).",
            options=list(STEP_RULES),
            default=d.loda_rule,
            optional=True,
            advanced=True,
        ),
        field(
            io.Combo,
            "map_downscale",
            "Read attention maps at this fraction of the latent's size; 0 chooses (about a "
            "quarter). Change it when the preview shows maps that do not follow the objects.",
            options=["0", "1", "2", "4", "8"],
            default=str(d.map_downscale),
            optional=True,
            advanced=True,
        ),
        field(
            io.Float,
            "map_smoothing",
            "Gaussian smoothing of the maps before they are compared, in map pixels (sigma).",
            default=d.map_smoothing,
            min=0.0,
            max=8.0,
            step=0.1,
            round=0.001,
            optional=True,
            advanced=True,
        ),
        field(
            io.Float,
            "afg_inside",
            "Added to the attention logits of a concept inside its region. Raise it when a concept is too weak there.",
            default=d.afg_inside,
            min=0.0,
            max=20.0,
            step=0.1,
            round=0.001,
            optional=True,
            advanced=True,
        ),
        field(
            io.Float,
            "afg_outside",
            "Taken from the attention logits of a concept outside its region. Raise it when concepts "
            "leak late; 1e8 forbids all attention there, as the paper does.",
            default=d.afg_outside,
            min=0.0,
            max=1e8,
            step=1.0,
            round=0.001,
            optional=True,
            advanced=True,
        ),
        field(
            io.Float,
            "afg_region",
            "Share of the picture (0 to 1) that becomes a concept's region. Raise it for large objects.",
            default=d.afg_region,
            min=0.01,
            max=1.0,
            step=0.01,
            round=0.001,
            optional=True,
            advanced=True,
        ),
        field(
            io.Float,
            "afg_end",
            "Share of the steps (0 to 1) after which regions are released; 1 keeps them to the end. "
            "Lower it when borders of objects look hard.",
            default=d.afg_end,
            min=0.0,
            max=1.0,
            step=0.01,
            round=0.001,
            optional=True,
            advanced=True,
        ),
        field(
            io.Combo,
            "map_part",
            "all: read maps from all layers of that size, as the paper does. down: only from those on "
            "the way down, at half the cost (a third on SDXL). auto: down on SDXL, else all.",
            options=list(MAP_PARTS),
            default=d.map_part,
            optional=True,
            advanced=True,
        ),
    ]


def _config(loda_steps: int, loda_strength: float, afg: bool, options: dict[str, Any]) -> LodaConfig:
    d = _DEFAULTS
    return LodaConfig(
        loda_steps=loda_steps,
        loda_strength=loda_strength,
        afg=afg,
        loda_iterations=options.get("loda_iterations", d.loda_iterations),
        divergence=options.get("divergence", d.divergence),
        threshold=options.get("threshold", d.threshold),
        loda_rule=options.get("loda_rule", d.loda_rule),
        map_downscale=int(options.get("map_downscale", d.map_downscale)),
        map_part=options.get("map_part", d.map_part),
        map_smoothing=options.get("map_smoothing", d.map_smoothing),
        afg_inside=options.get("afg_inside", d.afg_inside),
        afg_outside=options.get("afg_outside", d.afg_outside),
        afg_region=options.get("afg_region", d.afg_region),
        afg_end=options.get("afg_end", d.afg_end),
    )


def _prepared(
    model: Any, loda_steps: int, loda_strength: float, afg: bool, options: dict[str, Any]
) -> tuple[Any, AttentionMaps]:
    """The model that samples as the LODA inputs ask, the model itself if they ask for none, and where maps will be."""
    config = _config(loda_steps, loda_strength, afg, options)
    maps = AttentionMaps()
    return with_loda(model, config, maps) if config.loda_steps else model, maps


_MAPS_OUT = "What LODA saw and did, for Concept Attention Preview."


class ConceptSplitKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConceptSplitKSampler",
            "KSampler (LODA)",
            description="KSampler that first optimises the latent until the concepts of the prompt look at different "
            "places, and then keeps them there. Needs two or more concepts in the positive prompt; otherwise it is a "
            "plain KSampler and says so in the console.",
            search_aliases=["loda", "afg", "attention", "conceptsplit"],
            inputs=[
                _model_field(),
                field(
                    io.Int,
                    "seed",
                    "The random seed of the noise.",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                ),
                field(io.Int, "steps", "Sampling steps in all. Usual are 20 to 50.", default=30, min=1, max=10000),
                _cfg_field(),
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
        loda_steps: int,
        loda_strength: float,
        afg: bool,
        **options: Any,
    ) -> io.NodeOutput:
        model, maps = _prepared(model, loda_steps, loda_strength, afg, options)
        (latent,) = host_nodes.common_ksampler(
            model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise
        )
        return io.NodeOutput(latent, maps)


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
                _cfg_field(),
                *_loda_fields(),
            ],
            outputs=[
                out(io.Guider, "GUIDER", "Connect to SamplerCustomAdvanced."),
                out(AttentionMapsType, "attention_maps", _MAPS_OUT + " Filled when the sampler has run."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        cfg: float,
        loda_steps: int,
        loda_strength: float,
        afg: bool,
        **options: Any,
    ) -> io.NodeOutput:
        model, maps = _prepared(model, loda_steps, loda_strength, afg, options)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider, maps)


NODES = [ConceptSplitKSampler, ConceptSplitGuider]
