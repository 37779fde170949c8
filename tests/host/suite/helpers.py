"""What the host tests share: adapters with visible effect, prompts, runs, and a look inside them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .conftest import pack, run, run_with_options

PROMPT = "a photo of a <rex> and a cat"


def make_adapter(
    model: Any, name: str = "rex", word: str = "dog", seed: int = 0, size: float = 0.3, **info: Any
) -> Any:
    """A value adapter with random matrices that fits `model`."""
    adapters = pack("conceptsplit_core.adapters")
    host = pack("conceptsplit_core.hosts.comfy.model")
    network = host.network_map(model.model)
    shapes = network.value_shapes
    with torch.inference_mode(False):
        facts = adapters.AdapterInfo(
            name, word, info.get("base", network.family), next(iter(shapes.values()))[0], 4, 4.0
        )
        adapter = adapters.LowRankAdapter.create(shapes, facts, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        for layer, tensor in adapter.up.items():
            adapter.up[layer] = torch.randn(tensor.shape, generator=generator) * size
    return adapter


def apply(model: Any, clip: Any, adapter: Any, **options: Any) -> tuple[Any, Any]:
    return run(
        "ConceptSplitApply",
        **{
            "model": model,
            "clip": clip,
            "value_adapter": adapter,
            "concept_name": "",
            "strength": 1.0,
            **options,
        },
    )


def encode(clip: Any, text: str) -> Any:
    return run("CLIPTextEncode", clip=clip, text=text)[0]


def dog_and_cat(clip: Any) -> tuple[Any, Any]:
    """A prompt of two marked words, and an empty one."""
    (marked,) = run("ConceptSplitMarkWords", clip=clip, words="dog, cat")
    return encode(marked, "a dog and a cat"), encode(marked, "")


def latent(width: int = 64, height: int = 64, batch: int = 1) -> Any:
    return run("EmptyLatentImage", width=width, height=height, batch_size=batch)[0]


def controlled(positive: Any, negative: Any, strength: float = 0.5) -> tuple[Any, Any]:
    """Both conditionings with a ControlNet of random weights for the tiny UNet."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    from .checkpoints import _scaled

    with torch.inference_mode():
        net = comfy.cldm.cldm.ControlNet(
            image_size=16,
            in_channels=4,
            model_channels=64,
            hint_channels=3,
            channel_mult=[1, 2],
            num_res_blocks=[1, 1],
            transformer_depth=[1, 1],
            transformer_depth_middle=1,
            context_dim=768,
            num_heads=4,
            num_head_channels=-1,
            use_spatial_transformer=True,
            legacy=False,
            operations=comfy.ops.disable_weight_init,
        )
        net.load_state_dict(_scaled(net.state_dict(), 4))
        control = comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"), manual_cast_dtype=None)
    return run(
        "ControlNetApplyAdvanced",
        positive=positive,
        negative=negative,
        control_net=control,
        image=torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2)),
        strength=strength,
        start_percent=0.0,
        end_percent=1.0,
    )


def sample(model: Any, positive: Any, negative: Any, image: Any = None, **options: Any) -> Tensor:
    """The stock KSampler; [B, 4, h, w]."""
    given = {
        "seed": 7,
        "steps": 3,
        "cfg": 5.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
        **options,
    }
    (out,) = run("KSampler", model=model, positive=positive, negative=negative, latent_image=image or latent(), **given)
    return out["samples"]


def sample_loda(model: Any, positive: Any, negative: Any, image: Any = None, **options: Any) -> tuple[Tensor, Any]:
    """KSampler (LODA); samples and attention maps."""
    given = {
        "seed": 7,
        "steps": 3,
        "cfg": 5.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
        "loda_steps": 2,
        "loda_strength": 0.2,
        "afg": True,
        "afg_end": 1.0,  # of three steps two are LODA's
        "loda_iterations": 1,
        **options,
    }
    out, maps = run_with_options(
        "ConceptSplitKSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=image or latent(),
        **given,
    )
    return out["samples"], maps


@dataclass
class Call:
    """One call of the UNet: which conditionings ran, at what noise, and what each to_v gave."""

    kinds: list[int]
    sigma: float
    values: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def watched(model: Any, modules: str = "to_v") -> Iterator[list[Call]]:
    """Records every UNet call: outputs of all attn2 projections *after* our hooks, by canonical layer."""
    unet = model.model.diffusion_model
    network = pack("conceptsplit_core.hosts.comfy.model").network_map(model.model)
    layers = {site.name: network.module(site.name) for site in network.attention}
    calls: list[Call] = []

    def start(module: Any, args: Any, kwargs: Any) -> None:
        options = kwargs["transformer_options"]
        calls.append(Call(list(options.get("cond_or_uncond", [0])), float(options["sigmas"][0])))
        # Registered now, so that these hooks run after the ones our wrapper has registered for this call.
        for name, attn2 in layers.items():
            handles.append(getattr(attn2, modules).register_forward_hook(record(name)))

    def stop(module: Any, args: Any, output: Any) -> None:
        while handles:
            handles.pop().remove()

    def record(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            calls[-1].values[name] = output.detach().clone()

        return hook

    handles: list[Any] = []
    outer = [
        unet.register_forward_pre_hook(start, with_kwargs=True),
        unet.register_forward_hook(stop, always_call=True),
    ]
    try:
        yield calls
    finally:
        for handle in (*outer, *handles):
            handle.remove()


def changed_rows(calls: list[Call], others: list[Call]) -> dict[int, set[tuple[int, int]]]:
    """Kind (0 positive, 1 negative) to the (row of the chunk's batch, text row) places that differ anywhere."""
    found: dict[int, set[tuple[int, int]]] = {}
    for call, other in zip(calls, others, strict=True):
        assert call.kinds == other.kinds
        for name, value in call.values.items():
            before = other.values[name]
            assert value.shape == before.shape
            share = value.shape[0] // len(call.kinds)
            for place in (value != before).any(dim=-1).nonzero().tolist():
                found.setdefault(call.kinds[place[0] // share], set()).add((place[0] % share, place[1]))
    return found


def weights(model: Any) -> dict[str, Tensor]:
    """Copies of a MODEL's own weights: a clone with a merged LoRA may have been the last to be loaded."""
    import comfy.model_management

    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
    return {key: value.clone() for key, value in model.model.state_dict().items()}


def same_weights(before: dict[str, Tensor], model: Any) -> bool:
    after = model.model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())


def hooks_on(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())


@contextmanager
def messages(caplog: Any) -> Iterator[list[str]]:
    """Warnings of the pack while inside."""
    caplog.clear()
    found: list[str] = []
    with caplog.at_level(logging.WARNING):
        yield found
    found += [record.getMessage() for record in caplog.records if record.name == "ConceptSplit"]
