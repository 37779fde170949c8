"""Every input of every node arrives where it is used, at a value that is not the default."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch

from .conftest import OPTIONS_NODES, pack, run
from .helpers import encode, latent, make_adapter
from .test_fixtures import allows, declared, widgets

settings = pack("conceptsplit_core.settings")
core_options = pack("conceptsplit_core.options")
ConceptSplitError = pack("conceptsplit_core.errors").ConceptSplitError

# No two numbers of one node alike, so that exchanged inputs are seen too.
LODA_BASIC = {"loda_steps": 2, "loda_iterations": 4, "loda_strength": 0.125, "afg": False}
LODA_RARE = {
    "loda_rule": "gradient",
    "divergence": "bhattacharyya",
    "threshold": 0.75,
    "map_smoothing": 2.5,
    "map_downscale": "1",
    "map_part": "down",
    "afg_inside": 1.25,
    "afg_outside": 9.5,
    "afg_region": 0.375,
    "afg_smoothing": 0.5,
    "afg_end": 0.25,
    "plan_steps": 3,
    "afg_rule": "by_place",
    "area_rule": "top",
    "suppression": 0.6875,
    "encoder_reuse": 0.1875,
    "plan_guidance": False,
    "lora_guidance": 5.5,
}
LOADER = {"concept_name": "fido", "strength": 0.625, "class_word": "cat", "start_percent": 0.25, "end_percent": 0.75}
TRAIN_BASIC = {
    "steps": 7,
    "batch_size": 3,
    "learning_rate": 0.0625,
    "rank": 5,
    "seed": 2**64 - 3,
    "sample_every": 4,
}
TRAIN_RARE = {
    "alpha": 1.5,
    "weight_decay": 0.25,
    "warmup": 2,
    "max_grad_norm": 0.5,
    "background_weight": 0.75,
    "save_every": 6,
    "resume": True,
    "gradient_checkpointing": True,
    "kind": "lora",
    "mask_from": "attention",
    "routed": True,
    "separate": 0.1875,
}
GATE = {"gate_bias": 0.5, "gate_temperature": 0.375}
SAMPLING = {"seed": 12, "steps": 5, "cfg": 3.5, "sampler_name": "heun", "scheduler": "karras", "denoise": 0.875}
VALUES: dict[str, dict[str, Any]] = {
    "ConceptSplitDemoCheckpoint": {"model": "transformer"},  # its value is tried in test_demo
    "ConceptSplitDemoImages": {"concept": "pixa", "count": 3, "seed": 17},
    "ConceptSplitLoader": {"adapter": "settings/rex.safetensors", **LOADER, **GATE},
    "ConceptSplitApply": {**LOADER, **GATE},
    "ConceptSplitSave": {"file_name": "settings/smaller", "reduce_rank": 2},
    "ConceptSplitMarkWords": {"words": "a:circle, b:star"},
    "ConceptSplitTrain": {
        "concept_name": "fido", "class_word": "heart", "file_name": "settings/fido", **TRAIN_BASIC,
        "templates": "the {} there\none {}", "captions": "a star\na blue ring", "beside": "ring, cross",
    },
    "ConceptSplitTrainOptions": TRAIN_RARE,
    "ConceptSplitKSampler": {**SAMPLING, **LODA_BASIC},
    "ConceptSplitGuider": {"cfg": 3.5, **LODA_BASIC},
    "ConceptSplitLodaOptions": LODA_RARE,
    "ConceptSplitLoraLoader": {
        "lora": "demo_nero_lora.safetensors", "words": "grey cat", "strength_clip": 0.375,
        **{name: value for name, value in LOADER.items() if name != "class_word"},
    },
    "ConceptSplitRegion": {"concept_name": "fido"},
    "ConceptSplitMasks": {"concept_name": "fido", "kind": "soft"},
    "ConceptSplitCorrectWords": {"correction": 0.375, "correction_sharpness": 5.0},
    "ConceptSplitSampler": {},
    "ConceptSplitPreview": {},
    "ConceptSplitValues": {"values": "0.25, 3"},
    "ConceptSplitSheet": {},
    "ConceptSplitDemoPhoto": {},
}  # fmt: skip


def expected(config: Any, *values: dict[str, Any], **more: Any) -> Any:
    """The settings that a run should have received."""
    given = {name: value for part in values for name, value in part.items()}
    known = {each.name: type(each.default) for each in fields(config)}
    return config(**{name: known[name](value) for name, value in given.items()}, **more)


@pytest.fixture
def sd(loaded, base):
    """The small model, with an adapter file in the host's folder."""
    made = loaded("tiny")
    pack("conceptsplit_core.hosts.comfy.files").save_named(make_adapter(made.model), "settings/rex")
    return made


@pytest.fixture
def spy(monkeypatch):
    """Records the calls of a function of a module, which runs as ever."""

    def on(module: Any, name: str) -> list[tuple[tuple, dict]]:
        calls: list[tuple[tuple, dict]] = []
        real = getattr(module, name)

        def seen(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, seen)
        return calls

    return on


def test_the_values_tried_are_all_inputs_and_none_is_a_default(sd):
    import nodes

    ours = {name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("ConceptSplit")}
    assert ours == VALUES.keys(), "a node that this file does not try"
    for node, values in VALUES.items():
        drawn = {name: (type_, options) for name, type_, options in widgets(node) if name != "control_after_generate"}
        assert drawn.keys() == values.keys(), f"{node}: an input that this file does not try"
        for name, (type_, options) in drawn.items():
            assert values[name] != options.get("default"), (node, name)
            assert allows(type_, options, values[name]), (node, name)
        for name, (_, options, _) in declared(node).items():
            assert options.get("tooltip", "").endswith("."), f"{node}.{name} has no tooltip"
        numbers = [value for value in values.values() if type(value) in (int, float)]
        assert len(numbers) == len(set(numbers)), node


def test_the_options_of_a_node_are_all_settings_of_its_class():
    for node, config in (("ConceptSplitKSampler", settings.LodaConfig), ("ConceptSplitTrain", settings.TrainConfig)):
        here = {name for name, *_ in widgets(node)} | {name for name, *_ in widgets(OPTIONS_NODES[node])}
        assert core_options.options(config).keys() <= here


def test_sampler_with_options(spy, sd):
    import nodes

    pack_nodes = pack("nodes.sample")
    (clip,) = run("ConceptSplitMarkWords", clip=sd.clip, words="dog, cat")
    positive, negative, image = encode(clip, "a dog and a cat"), encode(clip, ""), latent(64, 96)
    sampled, patched = spy(nodes, "common_ksampler"), spy(pack_nodes, "with_loda")
    (options,) = run("ConceptSplitLodaOptions", **LODA_RARE)
    _, maps = run(
        "ConceptSplitKSampler", model=sd.model, positive=positive, negative=negative, latent_image=image,
        options=options, **SAMPLING, **LODA_BASIC,
    )  # fmt: skip
    wanted = expected(settings.LodaConfig, LODA_RARE, LODA_BASIC)
    assert patched[0][0][1] == wanted
    assert maps.trace.settings == asdict(wanted), "what the run went by"
    assert sampled[0][0][1:] == (*(SAMPLING[n] for n in ("seed", "steps", "cfg", "sampler_name", "scheduler")),
                                 positive, negative, image)  # fmt: skip
    assert sampled[0][1] == {"denoise": SAMPLING["denoise"]}


def test_guider_with_options(spy, sd):
    patched = spy(pack("nodes.sample"), "with_loda")
    positive, negative = encode(sd.clip, "a dog"), encode(sd.clip, "dull")
    (options,) = run("ConceptSplitLodaOptions", **LODA_RARE)
    (guider,) = run(
        "ConceptSplitGuider", model=sd.model, positive=positive, negative=negative, options=options, cfg=3.5,
        **LODA_BASIC,
    )  # fmt: skip
    assert patched[0][0][1] == expected(settings.LodaConfig, LODA_RARE, LODA_BASIC)
    assert guider.cfg == 3.5
    for name, cond in (("positive", positive), ("negative", negative)):
        assert torch.equal(guider.original_conds[name][0]["cross_attn"], cond[0][0])


def test_basic_settings_alone_leave_the_rest_at_its_defaults(spy, sd):
    patched = spy(pack("nodes.sample"), "with_loda")
    cond = encode(sd.clip, "a dog")
    run("ConceptSplitGuider", model=sd.model, positive=cond, negative=cond, cfg=2.0, **LODA_BASIC)
    assert patched[0][0][1] == expected(settings.LodaConfig, LODA_BASIC)


def test_lora_loader(spy, sd):
    added, texts = spy(pack("nodes.lora"), "with_adapter"), spy(pack("nodes.lora"), "with_text_lora")
    model, clip, _ = run("ConceptSplitDemoCheckpoint")[0], *run("ConceptSplitDemoCheckpoint")[1:]
    mask = torch.zeros(1, 24, 40)
    mask[..., :16] = 0.5
    _, knowing, info = run(
        "ConceptSplitLoraLoader", model=model, clip=clip, mask=mask, **VALUES["ConceptSplitLoraLoader"]
    )
    loaded = added[0][0][1]
    assert (loaded.name, loaded.strength, loaded.start, loaded.end) == ("fido", 0.625, 0.25, 0.75)
    assert torch.equal(loaded.mask, mask) and "<fido> = 'grey cat'" in info
    assert torch.equal(encode(knowing, "a <fido>")[0][0], encode(clip, "a grey cat")[0][0])
    assert not texts, "this file has no part for the text encoder; test_lora_files.py tries strength_clip"


@pytest.mark.parametrize("node", ["ConceptSplitLoader", "ConceptSplitApply"])
def test_loaders(spy, sd, node):
    added = spy(pack("nodes.load"), "with_adapter")
    source = {"adapter": VALUES["ConceptSplitLoader"]["adapter"]}
    if node == "ConceptSplitApply":
        source = {"value_adapter": make_adapter(sd.model, seed=5)}
    _, clip = run(node, model=sd.model, clip=sd.clip, **source, **LOADER)
    loaded = added[0][0][1]
    assert (loaded.name, loaded.strength, loaded.start, loaded.end) == ("fido", 0.625, 0.25, 0.75)
    if node == "ConceptSplitApply":
        assert loaded.adapter is source["value_adapter"]
    assert torch.equal(encode(clip, "a <fido>")[0][0], encode(sd.clip, "a cat")[0][0])
    with pytest.raises(ConceptSplitError, match="start_percent .* lies after end_percent .* would never act"):
        run(node, model=sd.model, clip=sd.clip, **source, start_percent=0.75, end_percent=0.25)


def test_saving(sd, base):
    (made,) = run("ConceptSplitSave", value_adapter=make_adapter(sd.model), **VALUES["ConceptSplitSave"])
    assert {made.rank_of(layer) for layer in made.layers} == {2}
    assert (base / "models" / "value_adapters" / "settings" / "smaller.safetensors").is_file()


def test_marking_and_demo_pictures(sd):
    (clip,) = run("ConceptSplitMarkWords", clip=sd.clip, **VALUES["ConceptSplitMarkWords"])
    assert torch.equal(encode(clip, "<b> by <a>")[0][0], encode(sd.clip, "star by circle")[0][0])
    images, word = run("ConceptSplitDemoImages", **VALUES["ConceptSplitDemoImages"])
    scenes = pack("conceptsplit_core.demo.scenes")
    assert word == scenes.CONCEPTS["pixa"].class_word
    wanted = np.stack(scenes.draw_concept("pixa", 3, 17))
    assert np.array_equal((images.numpy() * 255).round().astype(np.uint8), wanted)


def test_training_with_options(spy, base):
    host = pack("conceptsplit_core.hosts.comfy.training")
    model, clip, vae = run("ConceptSplitDemoCheckpoint")
    given = {
        **VALUES["ConceptSplitTrain"], "model": model, "clip": clip, "vae": vae, "images": torch.rand(2, 64, 96, 3),
    }  # fmt: skip
    (stopped,) = run("ConceptSplitTrainOptions", **{**TRAIN_RARE, "resume": False})
    (options,) = run("ConceptSplitTrainOptions", **TRAIN_RARE)
    run("ConceptSplitTrain", **{**given, "steps": 2, "sample_every": 0}, options=stopped)
    trained, built, drawn = spy(host, "train"), spy(host, "objective"), spy(host, "draw")
    adapter, _, samples = run("ConceptSplitTrain", **given, options=options)

    ((_, data, _, _, config, _, checkpoint), named) = trained[0]
    assert named["penalty"] is not None
    assert config == expected(settings.TrainConfig, TRAIN_BASIC, TRAIN_RARE)
    assert config.resume is True and checkpoint.name == "fido_2.checkpoint", (
        "the first training has ended, so its name is taken"
    )
    assert [prompt.text for prompt in data.prompts] == [
        "the heart and a ring and a cross there",
        "one heart and a ring and a cross",
    ]
    assert data.latents.shape[-2:] == (8, 12) and data.masks.shape == (2, 1, 8, 12) and 0 < data.masks.mean() < 1
    assert built[0][0][2] is True, "gradient checkpointing"
    assert len(drawn) == 2, "samples at step 4 and at the end"
    assert samples.std() > 0
    assert (adapter.info.concept, adapter.info.class_word) == ("fido", "heart")
    assert (adapter.info.rank, adapter.info.alpha, adapter.info.kind) == (5, 1.5, "lora")
    assert all(adapter.scale(layer) == 0.3 for layer in adapter.layers), "alpha / rank"
    assert (base / "models" / "loras" / "settings" / "fido.safetensors").is_file()


@dataclass(frozen=True)
class Small:
    depth: int = core_options.option(3, "depth", "How deep.", "Raise it for fun.", low=-2, high=8)
    kind: int = core_options.option(4, "kind", "Which.", choices=(4, 9), advanced=True)


def test_the_price_of_an_option_is_one_field():
    inputs = pack("nodes.types").setting_fields(Small)
    depth, kind = (field.as_dict() for field in inputs)
    assert [field.id for field in inputs] == ["depth", "kind"]
    assert (depth["default"], depth["min"], depth["max"]) == (3, -2, 8)
    assert depth["tooltip"] == "Depth. How deep. Raise it for fun."
    assert kind["options"] == ["4", "9"] and inputs[1].optional and not inputs[0].optional
    assert core_options.from_values(Small, {"depth": 5, "kind": "9"}) == Small(5, 9)


def test_b7_errors_of_nodes_begin_with_no_path():
    """The host writes the full name of an exception's type before its sentence."""
    import execution

    assert execution.full_type_name(ConceptSplitError) == "ConceptSplitError"
