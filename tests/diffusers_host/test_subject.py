"""Where the concept is in training pictures, LoRAs that are trained routed, and several concepts from one picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import REX, every_family

from benchmarks.separation.masks import unseen
from conceptsplit_core.adapters import load_adapter
from conceptsplit_core.adapters.file import save_trained
from conceptsplit_core.adapters.lora import trained_words
from conceptsplit_core.demo import looks, scenes
from conceptsplit_core.demo.checkpoint import DEMO_FILE
from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.files import read_header
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.hosts.diffusers.lora import read_lora
from conceptsplit_core.network.grid import choose_layers
from conceptsplit_core.settings import TrainConfig
from conceptsplit_core.text.concepts import Concept
from conceptsplit_core.train import subject
from conceptsplit_core.train.data import Process, make_batch
from conceptsplit_core.train.loop import train
from conceptsplit_core.train.subject import separating, with_masks

TEMPLATES = ("a photo of a {}", "the bright {} on a table")
needs_demo = pytest.mark.skipif(not DEMO_FILE.exists(), reason="the demo model is not in this checkout")


def pictures(count=2, size=(128, 96), seed=9):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def found(model, data, adapter=None, **options):
    config = TrainConfig(mask_from="attention", prediction_type=model.prediction_type, **options)
    adapter = adapter or host.new_adapter(model, REX, 2, 0.0, 0)
    with host.training_denoiser(model, adapter) as denoise:
        return with_masks(data, host.network_map(model), model.alphas_cumprod, denoise, config)


def enlarged(maps, size):
    """Maps [n, h, w] as [n, H·W]: straight lines between the middles of pixels, one side after the other."""
    for axis, wanted in ((1, size[0]), (2, size[1])):
        here = maps.shape[axis]
        middles = (np.arange(wanted) + 0.5) * here / wanted - 0.5
        maps = np.apply_along_axis(lambda line, at=middles: np.interp(at, np.arange(len(line)), line), axis, maps)
    return maps.reshape(len(maps), -1)


def attention_of(model, data, index, things):
    """From the layers' own inputs by numpy: words' maps [n, P] where LODA reads them, enlarged to what the finest
    layers see, and what pixels of the finest layers look at [P, P].
    """
    sites = host.network_map(model).attention
    least = min(site.downscale for site in sites)
    finest = [site.name for site in sites if site.downscale == least]
    factor, coarse = choose_layers({site.name: site.downscale for site in sites})
    assert factor > least, "words are read elsewhere than pixels"
    seen, hooks = {}, []
    for name in [*coarse, *(name.replace("attn2", "attn1") for name in finest)]:
        keep = lambda m, args, kwargs, name=name: seen.__setitem__(name, (args[0], kwargs["encoder_hidden_states"]))
        hooks.append(model.unet.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True))
    x0, prompt = data.latents[index], data.prompts[0]
    noises = torch.randn(4, *x0.shape, generator=torch.Generator().manual_seed(index))
    places = [int(share * len(model.alphas_cumprod)) for share in (0.3, 0.3, 0.5, 0.5)]
    noised = []
    for place, noise in zip(places, noises, strict=True):
        alpha = float(model.alphas_cumprod[place])
        noised.append(alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise)
    pooled = prompt.extra["pooled"].expand(4, -1) if "pooled" in prompt.extra else None
    with torch.no_grad():
        context = prompt.context.expand(4, -1, -1)
        host.call_unet(model, torch.stack(noised), torch.tensor(places), context, pooled)
    for hook in hooks:
        hook.remove()
    cross, own = [], []
    for name, (hidden, context) in seen.items():
        module = model.unet.get_submodule(name)
        with torch.no_grad():
            q, k = (
                side.unflatten(-1, (module.heads, -1)).double().numpy()
                for side in (module.to_q(hidden), module.to_k(hidden if context is None else context))
            )
        share = np.exp(np.einsum("bqhd,blhd->bhql", q, k) / np.sqrt(q.shape[-1]))
        share = (share / share.sum(-1, keepdims=True)).mean((0, 1))
        if "attn1" in name:
            own.append(share)
        else:
            cross.append(np.stack([share[:, list(rows)].mean(-1) for rows in things]))
    h, w = data.latents.shape[-2:]
    words = np.mean(cross, 0).reshape(-1, h // factor, w // factor)
    return enlarged(words, (h // least, w // least)), np.mean(own, 0)


@every_family
def test_masks_are_made_of_words_where_loda_reads_them_and_of_what_fine_pixels_look_at(load, family, monkeypatch):
    """The equation itself is a test of the core; on random weights powers would be noise."""
    model, given = load(family), []
    real = subject.attention_masks
    monkeypatch.setattr(subject, "attention_masks", lambda *maps: given.append(maps) or real(*maps))
    data = host.training_data(model, pictures(), REX, TEMPLATES, beside="cat" if family == "sd15" else "")
    made = found(model, data)
    assert data.masks is None and made.masks.shape == (2, 1, 16, 12) and len(given) == 2
    prompt = data.prompts[0]
    assert len(prompt.others) == (family == "sd15")
    for index, maps in enumerate(given):
        for one, other in zip(maps, attention_of(model, data, index, [prompt.rows, *prompt.others]), strict=True):
            wanted = torch.tensor(other).float()
            torch.testing.assert_close(one, wanted, atol=1e-7, rtol=1e-4)
            assert float(wanted.max() / wanted.min()) > 1.2, "not flat"
    assert not any(module._forward_hooks for module in model.unet.modules())


def test_masks_do_not_see_an_adapter_that_has_learned(load, adapter_for):
    model = load()
    data = host.training_data(model, pictures(), REX, TEMPLATES)
    learned = host.new_adapter(model, REX, 2, 0.0, 0, kind="lora")
    learned.up = {site: torch.ones_like(up) for site, up in learned.up.items()}
    for adapter in (adapter_for(model), learned):
        assert torch.equal(found(model, data).masks, found(model, data, adapter).masks)


def routed_config(model, **options):
    return TrainConfig(
        **{"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "warmup": 0, "seed": 3, "routed": True,
           "prediction_type": model.prediction_type, **options}
    )  # fmt: skip


def routed(model, images=2, masks=True):
    covers = torch.zeros(images, 1, 128, 96)
    covers[:, :, 32:80, 16:56] = 1
    data = host.training_data(model, pictures(images), REX, TEMPLATES, covers if masks else None)
    return data, host.new_adapter(model, REX, 2, 1.0, 0, {"routed": True}, kind="lora")


def test_the_gradient_of_routed_training_is_that_of_finite_differences(load):
    model = load(dtype=torch.float64)
    data, adapter = routed(model)
    g = torch.Generator().manual_seed(1)
    adapter.down = {k: v.double() for k, v in adapter.down.items()}
    adapter.up = {k: torch.randn(v.shape, generator=g, dtype=torch.float64) * 0.05 for k, v in adapter.up.items()}
    config = routed_config(model)
    batch = make_batch(data, model.alphas_cumprod, config, 1, Process())
    assert 0 < batch.area.mean() < 1
    with host.training_denoiser(model, adapter) as denoise:
        # In double throughout: the product's loss is in single precision.
        loss = lambda: (denoise(batch).double() - batch.target.double()).pow(2).mean()
        for name in sorted(adapter.up)[::17]:
            up = adapter.up[name].requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(), up)
            up.requires_grad_(False)
            step = torch.zeros_like(up)
            step[1, 0] = 1e-2
            adapter.up[name] = up + step
            more = loss()
            adapter.up[name] = up - step
            less = loss()
            adapter.up[name] = up
            torch.testing.assert_close((more - less) / 2e-2, gradient[1, 0], rtol=2e-2, atol=1e-6)


def test_what_lies_outside_an_area_is_the_plain_layers_to_the_bit(load):
    model = load()
    data, adapter = routed(model)
    adapter.up = {k: torch.ones_like(v) for k, v in adapter.up.items()}
    batch = make_batch(data, model.alphas_cumprod, routed_config(model), 1, Process())
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    outputs = []
    keep = model.unet.get_submodule(layer)
    with torch.no_grad(), host.training_denoiser(model, adapter) as denoise:
        handle = keep.register_forward_hook(lambda m, i, out: outputs.append((i[0], out)))
        denoise(batch)
        handle.remove()
    (x, out) = outputs[0]
    plain = keep(x).detach()
    different = (out != plain).any(-1)
    assert torch.equal(different, batch.area.flatten(1) > 0)
    assert 0 < different.float().mean() < 1


def test_routed_training_makes_a_lora_file_that_is_drawn_as_it_was_learned(load, tmp_path):
    model = load()
    data, adapter = routed(model)
    config = routed_config(model)
    with host.training_denoiser(model, adapter) as denoise:
        result = train(adapter, data, model.alphas_cumprod, denoise, config)
    other = host.new_adapter(model, REX, 2, 1.0, 0, kind="lora")
    with host.training_denoiser(model, other) as denoise:
        train(other, data, model.alphas_cumprod, denoise, replace(config, routed=False))
    assert any(not torch.equal(adapter.up[site], other.up[site]) for site in adapter.up)
    path = tmp_path / "rex.safetensors"
    save_trained(result.trained(), path, dtype=None)
    assert trained_words(read_header(path.read_bytes(), path.name)["__metadata__"]) == ["dog"]
    read, report = read_lora(model, path, REX)
    assert set(read.sites) == set(adapter.sites) and not report.left_out
    assert report.by_rows == 2 * len(host.network_map(model).attention)

    def drawn(adapters, text):
        cond = host.encode_text(model, text, [REX])
        return host.sample(
            model, [cond], seeds=[4], concepts=["rex"], adapters=adapters, steps=2, size=(128, 96)
        ).latents

    own = drawn({"rex": (adapter, 1.0)}, "a <rex>")
    torch.testing.assert_close(drawn({"rex": (read, 1.0)}, "a <rex>"), own)
    plain = drawn({}, "a table")
    assert not torch.equal(own, drawn({}, "a <rex>"))
    assert torch.equal(drawn({"rex": (read, 1.0)}, "a table"), plain), "a prompt that does not name it"
    with pytest.raises(ConceptSplitError, match="load it with LoRA Concept Loader"):
        load_adapter(path)


def test_a_value_adapter_is_saved_as_before(load, tmp_path, adapter_for):
    save_trained(adapter_for(load()), tmp_path / "rex.safetensors")
    assert load_adapter(tmp_path / "rex.safetensors").info.kind == "value"


def overlap(found, given):
    """Intersection over union of what is at least half of the strongest, and what the drawing covers."""
    one = found >= 0.5 * found.amax((-2, -1), keepdim=True)
    other = F.adaptive_avg_pool2d(given, found.shape[-2:]) >= 0.5
    return (one & other).sum((1, 2, 3)) / (one | other).sum((1, 2, 3))


def tensors(drawn):
    images = torch.from_numpy(np.stack([scene.image for scene in drawn])).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.from_numpy(np.stack([scene.masks for scene in drawn]))


@needs_demo
def test_masks_of_the_demo_model_lie_on_the_subject():
    model = host.load_model("demo")
    images, given = tensors(scenes.draw_concept_scenes("lumo", 3, 5))
    concept = Concept("lumo", looks.CONCEPTS["lumo"].class_word)
    made = found(model, host.training_data(model, images, concept, model.templates), None)
    assert (overlap(made.masks, given[:, :1]) > 0.6).all()


@needs_demo
def test_found_masks_split_pictures_of_several_things():
    """On scenes on which nothing was chosen: a mask covers its thing and leaves the others alone."""
    model, right, kept = host.load_model("demo"), [], []
    for seed in range(8100, 8112):
        images, given = tensors([unseen(seed)])
        there = F.adaptive_avg_pool2d(given, (16, 16))[0]
        words = [thing.class_word for thing in unseen(seed).objects]
        for own, word in enumerate(words):
            concept, beside = Concept("it", word), ", ".join(w for w in words if w != word)
            data = host.training_data(model, images, concept, model.templates, beside=beside)
            mask = found(model, data, host.new_adapter(model, concept, 2, 0.0, 0)).masks[0, 0]
            covered = [float((mask * thing).sum() / thing.sum()) for thing in there]
            other = max(share for at, share in enumerate(covered) if at != own)
            right.append(covered[own] >= 0.8 and other < 0.05)
            kept.append((word, covered))
    assert len(right) == 30 and sum(right) >= 27, [one for one, fits in zip(kept, right, strict=True) if not fits]


@pytest.fixture(scope="module")
def scene():
    """One picture of two things whose looks the demo model has never seen, and where they are in it."""
    both = [(looks.CONCEPTS[name].class_word, looks.CONCEPTS[name].look) for name in ("bobo", "lumo")]
    return tensors([scenes.compose_scene(both, 4)])


def learned_beside(model, images, name, other, kind, **options):
    """(adapter, data): one concept of a picture that shows another beside it; the masks are found."""
    concept, word = (Concept(name, looks.CONCEPTS[name].class_word), looks.CONCEPTS[other].class_word)
    data = host.training_data(model, images, concept, model.templates, beside=word)
    adapter = host.new_adapter(model, concept, 8, 8.0, 0, kind=kind)
    config = TrainConfig(
        **{"steps": 30, "batch_size": 4, "learning_rate": 3e-3, "mask_from": "attention", "background_weight": 0.0,
           **options}
    )  # fmt: skip
    network = host.network_map(model)
    with host.training_denoiser(model, adapter) as denoise:
        data = with_masks(data, network, model.alphas_cumprod, denoise, config)
        with separating(network, data, denoise, config) as (run, penalty):
            result = train(adapter, data, model.alphas_cumprod, run, config, penalty=penalty)
    return adapter, data, result


@needs_demo
def test_separate_lowers_the_overlap_of_maps(scene):
    model = host.load_model("demo")
    losses = {}
    for separate in (0.0, 1.0):
        _, _, result = learned_beside(model, scene[0], "bobo", "lumo", "lora", separate=separate)
        losses[separate] = result.losses
    added = [with_it - plain for with_it, plain in zip(losses[1.0], losses[0.0], strict=True)]
    assert 0 < added[0] < 1, "an IoU"
    assert sum(added[-8:]) < 0.8 * sum(added[:8])
