"""The committed checkpoint: its tokenizer, its shapes, and its autoencoder rewritten for the TAESD class."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conceptsplit_core.demo import captions, checkpoint, scenes
from tests.host.suite import velocity
from tools.demo_model import lexicon
from tools.demo_model.export import write_checkpoint

WEIGHTS = "13d9d021a845b8b5c6bab6d796611061671dc447923316899de21ffa099d92f0"


@pytest.fixture(scope="module")
def demo() -> checkpoint.DemoCheckpoint:
    return checkpoint.load()


def test_every_lexicon_word_is_one_token_and_other_words_survive_as_pieces():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(checkpoint.TOKENIZER_DIR))
    for word in captions.lexicon():
        assert len(tokenizer(word)["input_ids"]) == 3, word
    assert len(tokenizer("catfish")["input_ids"]) > 3
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == len(tokenizer) - 1
    padded = tokenizer("a red circle, a ring", padding="max_length")["input_ids"]
    assert len(padded) == 77 and padded[0] == tokenizer.bos_token_id and padded[7:] == [tokenizer.eos_token_id] * 70


def test_the_committed_tokenizer_is_the_one_the_lexicon_makes(tmp_path):
    lexicon.write_tokenizer(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (checkpoint.TOKENIZER_DIR / file.name).read_bytes(), file.name


def test_the_file_is_small_half_precision_and_finite(demo):
    assert checkpoint.DEMO_FILE.stat().st_size <= 20e6
    for part in (demo.unet, demo.text_encoder, demo.vae):
        assert part
        for name, tensor in part.items():
            assert tensor.dtype == torch.float16, name
            assert torch.isfinite(tensor).all(), name


def test_the_weights_are_those_that_every_measurement_was_made_with(demo):
    """The numbers, bit for bit, however the file keeps them: SHA-256 over names and bytes in the order of the names."""
    digest = hashlib.sha256()
    parts = {"unet": demo.unet, "text_encoder": demo.text_encoder, "vae": demo.vae}
    numbers = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    for name in sorted(numbers):
        digest.update(name.encode() + numbers[name].numpy().tobytes())
    assert len(numbers) == 390 and digest.hexdigest() == WEIGHTS


def test_every_half_precision_number_survives_the_split_in_two(tmp_path):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).reshape(2, 128, 256)
    planes = checkpoint.split({"vae.x": every, "unet.y.z": every[1, 3:5]})
    assert set(planes) == {"high.vae.x", "low.vae.x", "high.unet.y.z", "low.unet.y.z"}
    assert all(plane.dtype == torch.uint8 for plane in planes.values())
    write_checkpoint(tmp_path / "x.safetensors", planes, checkpoint.FORMAT, checkpoint.VERSION, {"size": 3})
    again = checkpoint.load(tmp_path / "x.safetensors")
    assert again.vae["x"].numpy().tobytes() == every.numpy().tobytes()
    assert again.unet["y.z"].numpy().tobytes() == every[1, 3:5].numpy().tobytes()
    assert again.text_encoder == {} and again.config == {"size": 3}
    with pytest.raises(ValueError, match=r"unet\.x is not in half precision"):
        checkpoint.split({"unet.x": torch.zeros(2)})


def test_the_file_loads_into_diffusers_and_transformers(demo):
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    unet = diffusers.UNet2DConditionModel(**demo.config["unet"])
    unet.load_state_dict(demo.unet)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**demo.config["text_encoder"]))
    prefix = "text_model." if hasattr(text, "text_model") else ""
    text.load_state_dict({prefix + k: v for k, v in demo.text_encoder.items()})
    vae = diffusers.AutoencoderTiny(**demo.config["vae"])
    vae.load_state_dict(demo.vae)
    side = demo.config["latent_size"]
    with torch.no_grad():
        context = text(input_ids=torch.zeros(1, 77, dtype=torch.long)).last_hidden_state
        noise = unet(torch.randn(1, demo.config["unet"]["in_channels"], side, side), 500, context).sample
    assert noise.shape == (1, 8, 16, 16) and torch.isfinite(noise).all()
    assert demo.config["lexicon"] == list(captions.lexicon())


def _conv(sd: dict[str, torch.Tensor], name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    return F.conv2d(x, sd[f"{name}.weight"], sd.get(f"{name}.bias"), stride=stride, padding=1)


def _block(sd: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    y = F.relu(_conv(sd, f"{name}.conv.0", x))
    return F.relu(_conv(sd, f"{name}.conv.4", F.relu(_conv(sd, f"{name}.conv.2", y))) + x)


def _taesd_encode(sd: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """TAESD's encoder as its class is written down: 64 wide, blocks 1, 3, 3, 3."""
    x, n = _conv(sd, "taesd_encoder.0", x * 0.5 + 0.5), 1
    for stage, blocks in enumerate((1, 3, 3, 3)):
        if stage:
            x, n = _conv(sd, f"taesd_encoder.{n}", x, stride=2), n + 1
        for _ in range(blocks):
            x, n = _block(sd, f"taesd_encoder.{n}", x), n + 1
    return _conv(sd, f"taesd_encoder.{n}", x) / sd["vae_scale"] + sd["vae_shift"]


def _taesd_decode(sd: dict[str, torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    z = (z - sd["vae_shift"]) * sd["vae_scale"]
    x, n = F.relu(_conv(sd, "taesd_decoder.1", torch.tanh(z / 3) * 3)), 3
    for stage, blocks in enumerate((3, 3, 3, 1)):
        for _ in range(blocks):
            x, n = _block(sd, f"taesd_decoder.{n}", x), n + 1
        if stage < 3:
            x = F.interpolate(x, scale_factor=2)
            n += 1
        x, n = _conv(sd, f"taesd_decoder.{n}", x), n + 1
    return x.sub(0.5).mul(2)


def test_the_rewritten_autoencoder_agrees_with_the_original(demo):
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderTiny(**demo.config["vae"])
    vae.load_state_dict(demo.vae)
    wide = {k: v.float() for k, v in checkpoint.taesd_state_dict(demo.vae, demo.config["vae"]).items()}
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        z = vae.encode(x).latents
        assert torch.allclose(_taesd_encode(wide, x), z, atol=1e-4)
        assert torch.allclose(_taesd_decode(wide, z), vae.decode(z).sample, atol=1e-4)


def test_the_autoencoder_keeps_pictures(demo):
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderTiny(**demo.config["vae"])
    vae.load_state_dict(demo.vae)
    images = np.stack([scenes.draw_scene(770 + i).image for i in range(6)])
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        again = vae.decode(vae.encode(x).latents).sample
    # 0.04 of the range -1..1 are 5 grey levels of 255.
    assert (again - x).abs().mean() < 0.04


def test_another_file_is_refused_with_a_sentence(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"unet.x": torch.zeros(1)}, str(path), {"format": "pt"})
    with pytest.raises(ValueError, match="not a conceptsplit-demo file"):
        checkpoint.load(path)
    save_file({"unet.x": torch.zeros(1)}, str(path), {"format": checkpoint.FORMAT, "version": "9"})
    with pytest.raises(ValueError, match="version 9"):
        checkpoint.load(path)


def test_the_transformer_is_small_and_finite_and_gives_in_diffusers_what_it_must_give_in_a_host():
    """tests/host/suite/test_demo.py holds the host's own Flux to the same numbers."""
    assert checkpoint.TRANSFORMER_FILE.stat().st_size <= 12e6
    held = checkpoint.load_transformer()
    assert all(one.dtype == torch.float16 and bool(one.isfinite().all()) for one in held.state.values())
    assert held.config["scaling_factor"] == pytest.approx(checkpoint.load().config["scaling_factor"], rel=0.05)
    pytest.importorskip("diffusers")
    expected = json.loads(velocity.EXPECTED.read_text(encoding="utf-8"))
    assert velocity.in_diffusers() == pytest.approx(expected, abs=1e-4) and max(map(abs, expected)) > 0.5


def test_a_file_of_another_kind_or_version_is_no_transformer(tmp_path):
    with pytest.raises(ValueError, match=r"demo\.safetensors is not a conceptsplit-demo-transformer file"):
        checkpoint.load_transformer(checkpoint.DEMO_FILE)
    write_checkpoint(tmp_path / "x.safetensors", {"a": torch.ones(2)}, checkpoint.TRANSFORMER_FORMAT, 7, {"patch": 2})
    with pytest.raises(ValueError, match=r"x\.safetensors has version 7, this library reads version 1"):
        checkpoint.load_transformer(tmp_path / "x.safetensors")
