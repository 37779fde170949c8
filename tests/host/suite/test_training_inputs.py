"""What a training is given: lists of pictures, odd models, masks, files that exist."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from . import test_prompts
from .conftest import pack, run
from .helpers import apply, make_adapter
from .test_training import PlainVAE, adapters, equal, pictures, stop_after, train

executor = test_prompts.executor


@pytest.fixture
def sd(loaded):
    return loaded("tiny")


@pytest.fixture
def refuse():
    return pack("conceptsplit_core.errors").ConceptSplitError


def last_file(base, name):
    """The newest of NAME, NAME_2, …: tests share the folder."""
    return max(adapters(base).glob(f"{name}*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


def spied(monkeypatch, sd, **options):
    """(TrainData, levels, config, adapter) that the node hands to the core."""
    training = pack("conceptsplit_core.hosts.comfy.training")
    genuine, seen = training.train, []

    def spy(adapter, data, levels, denoise, config, *rest, **more):
        seen.append((data, levels, config, adapter))
        return genuine(adapter, data, levels, denoise, config, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", spy)
        train(sd, **options)
    return seen


def test_case_1_a_list_is_one_training_on_all(sd, monkeypatch, base):
    images = pictures(4)
    (whole,) = spied(monkeypatch, sd, images=images, file_name="test/batch")
    (listed,) = spied(monkeypatch, sd, images=[images[i : i + 1] for i in range(4)], file_name="test/list")
    assert torch.equal(whole[0].latents, listed[0].latents) and whole[3].info.training["images"] == 4
    assert equal(whole[3], listed[3])


def test_case_1_pictures_of_several_sizes(sd, monkeypatch, caplog):
    images = [torch.rand(1, 64, 96, 3), torch.rand(2, 80, 72, 3)]
    masks = [torch.ones(1, 64, 96), torch.ones(2, 80, 72)]
    masks[0][:, :, 60:] = 0.0
    with caplog.at_level(logging.WARNING, "ConceptSplit"):
        ((data, _, _, adapter),) = spied(monkeypatch, sd, images=images, mask=masks, file_name="test/sizes", steps=1)
    assert data.latents.shape == (3, 4, 16, 16) and data.masks.shape == (3, 1, 16, 16)
    facts = adapter.info.training
    assert (facts["images"], facts["width"], facts["height"]) == (3, 128, 128), "the demo model's own size"
    assert float(data.masks[0, :, :, :10].min()) > 0.9 and float(data.masks[0, :, :, 12:].max()) < 0.1
    said = [record.getMessage() for record in caplog.records if "sizes" in record.getMessage()]
    assert len(said) == 1 and "The 3 training images have 2 sizes: all are scaled and cropped" in said[0]


def test_case_1_the_node_asks_the_host_for_lists(sd, refuse):
    import nodes

    node = nodes.NODE_CLASS_MAPPINGS["ConceptSplitTrain"]
    assert node.INPUT_IS_LIST is True
    given = {
        "model": sd.model, "clip": sd.clip, "vae": PlainVAE(), "concept_name": "rex", "class_word": "dog",
        "file_name": "test/lists", "steps": 1, "batch_size": 1, "learning_rate": 1e-3, "rank": 2, "seed": 0,
        "templates": "a {}",
    }  # fmt: skip
    listed = {name: [value] for name, value in given.items()}
    adapter, *_ = run("ConceptSplitTrain", **listed, images=[pictures(1), pictures(1, seed=1)])
    assert adapter.info.training["images"] == 2 and adapter.info.rank == 2
    with pytest.raises(refuse, match="class_word has 2 values: training takes one of everything but pictures"):
        train(sd, class_word=["dog", "cat"])


@pytest.mark.parametrize("sampling", ["lcm", "x0"])
def test_case_2_discrete_denoisers_that_cannot_be_trained_on(sd, refuse, sampling):
    (model,) = run("ModelSamplingDiscrete", model=sd.model, sampling=sampling, zsnr=False)
    with pytest.raises(refuse, match="denoiser .* predicts neither noise, velocity nor flow"):
        train(sd, model=model)


@pytest.mark.parametrize("sampling", ["edm", "edm_playground_v2.5"])
def test_case_2_edm_denoisers_cannot_be_trained_on(sd, refuse, sampling):
    (model,) = run("ModelSamplingContinuousEDM", model=sd.model, sampling=sampling, sigma_max=120.0, sigma_min=0.002)
    with pytest.raises(refuse, match=r"denoiser \(ModelSamplingContinuousEDM, EDM\) predicts neither noise"):
        train(sd, model=model)


@pytest.mark.parametrize(
    ("node", "options", "name"),
    [
        (
            "ModelSamplingContinuousEDM",
            {"sampling": "v_prediction", "sigma_max": 120.0, "sigma_min": 0.002},
            "v_prediction",
        ),
        (
            "ModelSamplingContinuousV",
            {"sampling": "v_prediction", "sigma_max": 500.0, "sigma_min": 0.03},
            "v_prediction",
        ),
        ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": True}, "v_prediction"),
        ("ModelSamplingDiscrete", {"sampling": "eps", "zsnr": True}, "epsilon"),
        ("ModelSamplingSD3", {"shift": 3.0}, "flow"),
    ],
)
def test_case_2_the_unet_is_told_the_hosts_own_timestep(sd, monkeypatch, node, options, name):
    """At every level the pass of a training equals the pass of the host's sampling: x_t, timestep and target."""
    (model,) = run(node, model=sd.model, **options)
    sampling = model.get_model_object("model_sampling")
    told, unet = [], sd.model.model.diffusion_model
    genuine = unet.forward

    def forward(x, timesteps, *rest, **more):
        told.append((x.detach().clone(), timesteps.detach().clone()))
        return genuine(x, timesteps, *rest, **more)

    monkeypatch.setattr(unet, "forward", forward)
    ((data, levels, config, adapter),) = spied(monkeypatch, sd, model=model, steps=3, file_name="test/kinds")
    assert config.prediction_type == adapter.info.prediction_type == name
    core = pack("conceptsplit_core.train.data")
    for step, (x, timesteps) in enumerate(told):
        batch = core.make_batch(data, levels, config, step, core.Process())
        torch.testing.assert_close(x, batch.x_t)
        sigma = sampling.sigmas[batch.timesteps]
        torch.testing.assert_close(timesteps, sampling.timestep(sigma).float(), rtol=1e-5, atol=1e-5)
        if name != "flow":  # a shift is undone by the host's scheduler, not here
            torch.testing.assert_close(sampling.sigma(timesteps), sigma, rtol=1e-3, atol=1e-4)
    assert len(told) == 3


@pytest.mark.parametrize("channels", [8, 9])
def test_case_19_other_input_channels_are_refused_before_anything_is_encoded(sd, refuse, monkeypatch, channels):
    monkeypatch.setitem(sd.model.model.model_config.unet_config, "in_channels", channels)

    class Never(PlainVAE):
        def encode(self, pixels):
            raise AssertionError("the pictures were encoded")

    with pytest.raises(refuse, match=f"This model's UNet has {channels} input channels .inpainting has 9"):
        train(sd, vae=Never())


@pytest.mark.parametrize("high", [1 / 255, 0.3])
def test_case_8_a_mask_without_a_strong_value_is_asked_about(sd, refuse, high):
    mask = torch.zeros(1, 64, 64)
    mask[:, :20, :40] = high
    with pytest.raises(refuse, match="Mask 1 is at most .* where the concept should be 1"):
        train(sd, mask=mask)


def test_case_8_the_tooltip_says_which_way_round_a_mask_is():
    import nodes

    (_, options) = nodes.NODE_CLASS_MAPPINGS["ConceptSplitTrain"].INPUT_TYPES()["optional"]["mask"]
    assert "white on the concept" in options["tooltip"] and "invert" in options["tooltip"]


def test_b5_nan_from_the_vae_is_the_vaes_fault(sd, refuse):
    class NaN(PlainVAE):
        def encode(self, pixels):
            return super().encode(pixels) * float("nan")

    with pytest.raises(refuse, match="The VAE gave NaN or infinite values for training image 1.*--fp32-vae"):
        train(sd, vae=NaN())


def test_b6_a_stop_writes_the_adapter_with_the_steps_it_was_trained_for(sd, base):
    stop_after(sd, 3, steps=9, file_name="test/stopped", save_every=0)
    path = last_file(base, "stopped")
    stopped = pack("conceptsplit_core.adapters.file").load_adapter(path)
    twin, *_ = train(sd, steps=3, file_name="test/stopped-twin")
    assert stopped.info.training["steps"] == 3 and path.with_suffix(".checkpoint").is_file()
    for layer, up in twin.up.items():
        torch.testing.assert_close(stopped.up[layer].float(), up, atol=1e-3, rtol=1e-3)
    train(sd, steps=9, file_name="test/stopped", resume=True, save_every=0)
    assert last_file(base, "stopped") == path, "resumed, the stopped adapter's file is the finished one's"
    assert pack("conceptsplit_core.adapters.file").load_adapter(path).info.training["steps"] == 9


def test_b15_a_file_is_kept_and_the_state_goes_when_training_ends(sd, base, caplog):
    train(sd, file_name="test/kept", steps=2)
    first = (adapters(base) / "kept.safetensors").read_bytes()
    with caplog.at_level(logging.WARNING, "ConceptSplit"):
        train(sd, file_name="test/kept", steps=2, seed=8)
    assert (adapters(base) / "kept.safetensors").read_bytes() == first
    assert (adapters(base) / "kept_2.safetensors").is_file()
    assert "kept.safetensors exists and is kept: this training is written to kept_2.safetensors." in caplog.text
    assert not list(adapters(base).glob("kept*.checkpoint"))


def test_b16_the_console_shows_a_bar_with_the_loss(sd, capsys):
    train(sd, steps=3, file_name="test/bar")
    shown = capsys.readouterr().err
    assert "training <rex>: 100%" in shown and "3/3" in shown and "step/s, loss " in shown


def test_b14_and_case_17_a_refused_resume_says_what_differs(sd, refuse, loaded):
    """Pictures, masks, settings, and another checkpoint or the same one with a LoRA."""
    from .checkpoints import tiny

    options = {"steps": 6, "file_name": "test/named"}
    stop_after(sd, 2, **options)
    again = lambda **more: train(sd, **options, resume=True, **more)
    mask = torch.zeros(1, 64, 64)
    mask[:, 9:33, :20] = 1.0
    with torch.inference_mode():
        other = tiny(pack("conceptsplit_core.hosts.comfy.demo"))
        next(iter(other.model.diffusion_model.parameters())).add_(0.5)
    for more, named in (
        ({"images": pictures(seed=9)}, "with other pictures:"),
        ({"mask": mask}, "with other masks:"),
        ({"learning_rate": 0.5}, "with learning_rate 0.001 then and 0.5 now:"),
        ({"templates": "a {}"}, "with other prompts:"),
        ({"model": other}, "with another model:"),
    ):
        with pytest.raises(refuse, match=named):
            again(**more)
    again()


def test_case_17_a_lora_is_another_model(sd, refuse, base):
    from .test_values import lora_file

    lora_file(base, sd.model)
    lora = {"lora_name": "test.safetensors", "strength_clip": 0.0}
    options = {"steps": 6, "file_name": "test/lora"}
    full, _ = run("LoraLoader", model=sd.model, clip=sd.clip, strength_model=1.0, **lora)
    half, _ = run("LoraLoader", model=sd.model, clip=sd.clip, strength_model=0.5, **lora)
    stop_after(sd, 2, model=full, **options)
    for model in (sd.model, half):
        with pytest.raises(refuse, match="with another model:"):
            train(sd, model=model, resume=True, **options)
    fresh, _ = run("LoraLoader", model=sd.model, clip=sd.clip, strength_model=1.0, **lora)
    train(sd, model=fresh, resume=True, **options)


def test_case_18_resume_where_the_vae_rounds_differently(sd):
    class Other(PlainVAE):
        def encode(self, pixels):
            return torch.nextafter(super().encode(pixels), torch.tensor(9.0))

    options = {"steps": 6, "file_name": "test/rounds"}
    stop_after(sd, 2, **options)
    train(sd, vae=Other(), resume=True, **options)


def test_case_17_resume_without_a_state_says_so(sd, caplog):
    with caplog.at_level(logging.WARNING, "ConceptSplit"):
        train(sd, file_name="test/never", resume=True, steps=1)
    assert (
        "There is no stopped training to resume (never.checkpoint): this one starts from the beginning." in caplog.text
    )


def test_alpha_is_stored_and_acts(sd, base):
    adapter, *_ = train(sd, rank=4, alpha=2.0, file_name="test/alpha")
    stored = pack("conceptsplit_core.adapters.file").load_adapter(last_file(base, "alpha"))
    assert (stored.info.alpha, stored.info.rank) == (2.0, 4) == (adapter.info.alpha, adapter.info.rank)
    assert {adapter.scale(layer) for layer in adapter.layers} == {0.5}


def test_latents_are_in_the_unets_scale(loaded, monkeypatch):
    model, clip = loaded("sd15").model, loaded("sd15").clip
    sd = SimpleNamespace(model=model, clip=clip, vae=PlainVAE())
    images = pictures(2)
    ((data, *_),) = spied(monkeypatch, sd, images=images, file_name="test/scale", steps=1)
    latents = PlainVAE().encode(images)
    wanted = sd.model.model.process_latent_in(latents)
    assert not torch.allclose(wanted, latents), "a model whose latent scale is not 1"
    torch.testing.assert_close(data.latents, wanted)


def test_sample_pictures_are_drawn_towards_the_concept(sd, monkeypatch):
    import comfy.sample

    seen = []

    def sample(model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, **more):
        seen.append((positive, negative))
        return latent

    class Drawing(PlainVAE):
        def decode(self, latent):
            return torch.zeros(1, 64, 64, 3)

    monkeypatch.setattr(comfy.sample, "sample", sample)
    train(sd, vae=Drawing(), steps=2, sample_every=1, file_name="test/drawn")
    with torch.inference_mode():
        clip = sd.clip
        word, empty = (
            clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0] for text in ("a photo of a dog", "")
        )
    assert len(seen) == 2
    for positive, negative in seen:
        torch.testing.assert_close(positive[0][0], word)
        torch.testing.assert_close(negative[0][0], empty)


def test_sample_pictures_show_what_is_learned_alone(sd):
    """Also on a MODEL that carries this concept already, another one, and a region of it."""

    class Drawing(PlainVAE):
        def decode(self, latent):
            return latent[:, :3].movedim(1, -1).repeat_interleave(8, 1).repeat_interleave(8, 2)

    given = {"vae": Drawing(), "steps": 3, "sample_every": 2}
    before, _, plain = train(sd, file_name="test/once", **given)
    model, clip = sd.model, sd.clip
    for name, seed in (("rex", 1), ("anna", 2)):
        adapter = make_adapter(sd.model, seed=seed)
        model, clip = apply(model, clip, adapter, concept_name=name)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :24] = 1
    (model,) = run("ConceptSplitRegion", model=model, concept_name="rex", mask=mask)
    after, _, again = train(sd, model=model, clip=clip, file_name="test/again", **given)
    assert equal(before, after) and torch.equal(plain, again) and plain.std() > 0.01


def test_recomputation_sees_the_blocks_own_options(sd, monkeypatch):
    """With gradient_checkpointing every block runs twice, each time told its own place."""
    from comfy.ldm.modules.attention import BasicTransformerBlock

    seen = {}
    genuine = BasicTransformerBlock.forward

    def forward(self, x, context=None, transformer_options=None, **more):
        told = dict(transformer_options or {})
        seen.setdefault(id(self), []).append((told.get("block"), told.get("block_index")))
        return genuine(self, x, context, transformer_options=transformer_options, **more)

    monkeypatch.setattr(BasicTransformerBlock, "forward", forward)
    train(sd, steps=1, batch_size=1, gradient_checkpointing=True, file_name="test/recomputed")
    assert len(seen) >= 2 and all(len(passes) == 2 for passes in seen.values())
    assert all(first == second for first, second in seen.values())
    assert len({passes[0] for passes in seen.values()}) == len(seen), "no two blocks are told the same place"


def test_case_1_a_list_through_the_hosts_executor(base, executor):
    """RebatchImages makes a list of four pictures of one batch: one training, not four that overwrite each other."""
    graph = {
        1: ("ConceptSplitDemoCheckpoint", {}),
        2: ("ConceptSplitDemoImages", {"concept": "bobo", "count": 4, "seed": 0}),
        3: ("RebatchImages", {"images": ["2", 0], "batch_size": 1}),
        4: (
            "ConceptSplitTrain",
            {
                "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": ["3", 0], "concept_name": "bobo",
                "class_word": ["2", 1], "file_name": "test/executed", "steps": 2, "batch_size": 2, "sample_every": 0,
                "learning_rate": 0.001, "rank": 2, "seed": 0, "templates": "a {}",
            },
        ),
    }  # fmt: skip
    test_prompts.execute(executor, graph)
    (path,) = adapters(base).glob("executed*.safetensors")
    assert pack("conceptsplit_core.adapters.file").load_adapter(path).info.training["images"] == 4
