"""Single checkpoint files: what they are is read from their header, and they load without any network."""

from __future__ import annotations

import json

import ldm
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from conceptsplit_core import ConceptSplitError
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.hosts.diffusers import configs
from conceptsplit_core.hosts.diffusers.single_file import CheckpointKind, detect_file

# Parameters of the released models, in their order of publication.
SIZES = {
    "unet": {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684},
    "text": {"clip": 123_060_480, "open": 340_387_840, "bigg": 694_659_840},
    "vae": 83_653_863,
}


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_written_out_configurations_are_the_released_models():
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        for family, size in SIZES["unet"].items():
            assert count(UNet2DConditionModel.from_config(configs.UNET_CONFIGS[family])) == size
        for name, size in SIZES["text"].items():
            config = dict(configs.TEXT_CONFIGS[name])
            kind = CLIPTextModelWithProjection if "Projection" in config["architectures"][0] else CLIPTextModel
            assert count(kind(CLIPTextConfig(**config))) == size
        assert count(AutoencoderKL.from_config(configs.VAE_CONFIG)) == SIZES["vae"]


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A checkpoint file of SD1.5's layout with tiny widths, and the configurations to match."""
    pipe = tiny.pipeline("sd15", seed=4)
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")}
    monkeypatch.setitem(configs.UNET_CONFIGS, "sd15", config)
    vae = {k: v for k, v in pipe.vae.config.items() if not k.startswith("_")}
    monkeypatch.setattr(configs, "VAE_CONFIG", vae)
    text = json.loads(pipe.text_encoder.config.to_json_string())
    monkeypatch.setitem(configs.TEXT_CONFIGS, "clip", text)
    path = tmp_path / "model.safetensors"
    save_file(ldm.state_dict(pipe), path)
    pipe.tokenizer.save_pretrained(tmp_path / "words")
    return path, pipe


def test_a_checkpoint_file_is_the_pipeline_it_was_made_from(checkpoint, tmp_path, monkeypatch):
    import socket

    path, pipe = checkpoint

    def offline(*_args, **_options):
        raise AssertionError("loading used the network")

    monkeypatch.setattr(socket.socket, "connect", offline)
    model = host.load_model(path, tokenizer=tmp_path / "words")
    assert model.family == "sd15" and model.prediction_type == "epsilon"
    for mine, theirs in ((model.unet, pipe.unet), (model.vae, pipe.vae), (model.encoders[0].model, pipe.text_encoder)):
        expected = theirs.state_dict()
        assert set(mine.state_dict()) == set(expected)
        for key, value in mine.state_dict().items():
            torch.testing.assert_close(value, expected[key], atol=0, rtol=0)
    result = host.sample(model, [host.encode_text(model, "a photo of a dog")], seeds=[0], steps=2)
    assert torch.isfinite(result.latents).all()


def test_the_tokenizer_may_lie_beside_the_file(checkpoint, tmp_path):
    path, _ = checkpoint
    (tmp_path / "words").rename(tmp_path / "tokenizer")
    assert host.load_model(path).encoders[0].tokenizer.model_max_length == 77


def test_a_checkpoint_without_its_text_encoder_says_so(checkpoint, tmp_path):
    path, _ = checkpoint
    kept = {k: v for k, v in load_file(path).items() if not k.startswith("cond_stage_model")}
    save_file(kept, path)
    with pytest.raises(ConceptSplitError, match="cannot be loaded as a sd15 checkpoint") as caught:
        host.load_model(path, tokenizer=tmp_path / "words")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("width", "level", "spread", "expected"),
    [
        (768, 1, 0.0, ("sd15", "epsilon")),
        (1024, 1, 0.01, ("sd21", "epsilon")),
        (1024, 1, 0.5, ("sd21", "v_prediction")),
        (2048, 4, 0.0, ("sdxl", "epsilon")),
    ],
)
def test_family_and_prediction_type_are_read_from_the_file(tmp_path, width, level, spread, expected):
    prefix = "model.diffusion_model"
    tensors = {f"{prefix}.input_blocks.{level}.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, width)}
    if level == 1:
        bias = torch.tensor([-1.0, 1.0]).repeat(4) * spread
        tensors[f"{prefix}.output_blocks.11.1.transformer_blocks.0.norm1.bias"] = bias
    save_file(tensors, tmp_path / "x.safetensors")
    assert detect_file(tmp_path / "x.safetensors") == CheckpointKind(*expected)


SDXL = {"model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, 2048)}
FLAG = torch.zeros(1)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("v_pred",), CheckpointKind("sdxl", "v_prediction", False)),
        (("v_pred", "ztsnr"), CheckpointKind("sdxl", "v_prediction", True)),
        ((), CheckpointKind("sdxl", "epsilon", False)),
    ],
)
def test_case_3_sdxl_files_that_say_v_and_zero_terminal_snr(tmp_path, flags, expected):
    save_file({**SDXL, **{flag: FLAG.clone() for flag in flags}}, tmp_path / "x.safetensors")
    assert detect_file(tmp_path / "x.safetensors") == expected


@pytest.mark.parametrize("flags", [("edm_mean", "edm_std"), ("edm_vpred.sigma_max",)])
def test_case_3_edm_files_are_one_sentence(tmp_path, flags):
    save_file({**SDXL, **{flag: FLAG.clone() for flag in flags}}, tmp_path / "x.safetensors")
    with pytest.raises(ConceptSplitError, match=r"'x\.safetensors' is an EDM model: .*choose another model\."):
        host.load_model(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("channels", "kind"), [(8, "a pix2pix UNet"), (9, "an inpainting UNet")])
def test_case_19_files_with_other_channels_are_refused_before_they_are_loaded(tmp_path, channels, kind):
    first = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, channels, 3, 3)}
    save_file({**SDXL, **first}, tmp_path / "x.safetensors")
    with pytest.raises(ConceptSplitError, match=f"is {kind} with {channels} input channels"):
        host.load_model(tmp_path / "x.safetensors")


def test_case_3_a_file_with_the_flags_is_sampled_as_v_with_zero_terminal_snr(checkpoint, tmp_path):
    path, _ = checkpoint
    save_file({**load_file(path), "v_pred": FLAG.clone(), "ztsnr": FLAG.clone()}, path)
    model = host.load_model(path, tokenizer=tmp_path / "words")
    assert model.prediction_type == model.scheduler["prediction_type"] == "v_prediction"
    assert 0 < float(model.alphas_cumprod[-1]) < 1e-7 and float(model.alphas_cumprod[-2]) > 1e-7
    result = host.sample(model, [host.encode_text(model, "a photo of a dog")], seeds=[0], steps=2)
    assert torch.isfinite(result.latents).all()


@pytest.mark.parametrize("name", ["{}.scale_weight", "{}.scale_input"])
def test_case_6_weights_with_a_scale_of_their_own_are_one_sentence(checkpoint, tmp_path, name):
    """Read without it they are some thousand times too large."""
    path, _ = checkpoint
    layer = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    tensors = load_file(path)
    tensors[f"{layer}.weight"] = (tensors[f"{layer}.weight"] / 8e-5).to(torch.float8_e4m3fn)
    save_file({**tensors, name.format(layer): torch.tensor(8e-5)}, path)
    with pytest.raises(ConceptSplitError, match=r"'model\.safetensors' holds fp8 weights with a scale .*use the fp16"):
        host.load_model(path, tokenizer=tmp_path / "words")


def test_case_25_text_encoder_names_of_2022(checkpoint, tmp_path):
    path, pipe = checkpoint
    new, old = "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."
    tensors = {key.replace(new, old): value for key, value in load_file(path).items()}
    assert not any(new in key for key in tensors)
    save_file({**tensors, f"{old}embeddings.position_ids": torch.arange(77)[None]}, path)
    assert detect_file(path).old_text_encoder
    model = host.load_model(path, tokenizer=tmp_path / "words")
    expected = pipe.text_encoder.state_dict()
    for key, value in model.encoders[0].model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    save_file({key: value for key, value in tensors.items() if "layers.1.mlp.fc1.bias" not in key}, path)
    with pytest.raises(
        ConceptSplitError, match=r"lacks cond_stage_model\.transformer\.encoder\.layers\.1\.mlp\.fc1\.bias"
    ):
        host.load_model(path, tokenizer=tmp_path / "words")


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"<!DOCTYPE html><html><head><title>Log in</title>" + b" " * 300, "a web page: .*log in"),
        (b'\n\n<html lang="en">' + b" " * 300, "a web page"),
        (b'{"error":"Unauthorized","message":"The creator requires you to be logged in"}', "a site's error message"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265146304\n", "a pointer to the file"),
        (b"PK\x03\x04\x14\x00\x00\x00\x08\x00" + b" " * 300, "a pickle"),
    ],
)
def test_case_24_what_a_file_is_that_is_no_checkpoint(tmp_path, start, what):
    (tmp_path / "model.safetensors").write_bytes(start)
    with pytest.raises(ConceptSplitError, match=f"'model.safetensors' is not a safetensors file but {what}"):
        host.load_model(tmp_path / "model.safetensors")
