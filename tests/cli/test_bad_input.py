"""Every mistake is one sentence on stderr and exit code 2; nothing is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# A file that says nothing about words.
UNNAMED = Path(__file__).parents[1] / "fixtures" / "adapters" / "diffusers.safetensors"
TRAIN = ("--class-word", "cat", "--name", "tom")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--images"),
        (("--images", "x", "--class-word", "cat"), "--name"),
        (("--images", "x", *TRAIN, "--steps", "0"), "'0' is not possible, use 1 to 1000000"),
        (("--images", "x", *TRAIN, "--steps", "many"), "'many' is not a whole number"),
        (("--images", "x", *TRAIN, "--learning-rate", "nan"), "'nan' is not possible, use 1e-07 to 1"),
        (("--images", "x", *TRAIN, "--size", "huge"), "'huge' is not a size"),
        (("--images", "x", *TRAIN, "--precision", "fp8"), "fp8"),
        (("--images", "x", "--class-word", "cat", "--name", "to m"), "cannot be written as a placeholder"),
        (("--images", "x", "--class-word", " ", "--name", "tom"), "no class word"),
        (("--images", "x", *TRAIN, "--out", "tom.ckpt"), "must end in .safetensors"),
        (("--images", "x", *TRAIN, "--template", "a photo"), "exactly one {}"),
        (("--images", "nowhere", *TRAIN), "no folder 'nowhere'"),
        (("--images", "x", *TRAIN, "--nonsense"), "nonsense"),
    ],
)
def test_train_options(refused, monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("train", *options)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_says_what_belongs_there(refused, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    assert "holds no training picture" in refused("train", "--images", tmp_path, *TRAIN)


@pytest.mark.parametrize("kind", ["text", "truncated", "empty", "nan"])
def test_an_unreadable_picture_is_named(refused, cat_folder, kind):
    bad = cat_folder / "bad.png"
    if kind == "text":
        bad.write_text("this is no picture")
    elif kind == "truncated":
        bad.write_bytes((cat_folder / "0.jpg").read_bytes()[:2000])
    elif kind == "empty":
        bad.write_bytes(b"")
    else:
        bad = cat_folder / "bad.tiff"
        Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(bad)
    assert f"'{bad.name}'" in refused("train", "--images", cat_folder, *TRAIN)


def test_a_decompression_bomb_is_refused(refused, cat_folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "too large a picture" in refused("train", "--images", cat_folder, *TRAIN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "nowhere"), "no model at 'nowhere'"),
        (("--device", "cuda:99"), "no device 'cuda:99'"),
        (("--device", "abacus"), "no device 'abacus'"),
        (("--masks", "nowhere"), "no folder 'nowhere'"),
        (("--template", "a {} as {}"), "exactly one {}"),
        (("--size", "60"), "use multiples of 8"),
        (("--rank", "0"), "--rank: '0' is not possible, use 1 to 1024"),
        (("--background-weight", "2", "--model", "nowhere"), "--background-weight: '2' is not possible, use 0 to 1"),
    ],
)
def test_train_settings(refused, cat_folder, model_folder, tmp_path, options, message):
    out = tmp_path / "tom.safetensors"
    base = ("--images", cat_folder, *TRAIN, "--model", model_folder, "--out", out, "--steps", 1)
    assert message in refused("train", *base, *options)
    assert not out.exists()


def test_masks_that_do_not_fit(refused, cat_folder, model_folder, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    base = ("--images", cat_folder, *TRAIN, "--model", model_folder, "--masks", masks, "--steps", 1, "--size", 64)
    assert "holds no mask" in refused("train", *base)
    Image.new("L", (451, 300), 255).save(masks / "0.png")
    assert "no mask for '1.jpg'" in refused("train", *base)
    for i in range(1, 4):
        Image.new("L", (50, 300), 255).save(masks / f"{i}.png")
    assert "make it the picture's shape" in refused("train", *base)
    for file in cat_folder.glob("*.jpg"):
        Image.new("L", Image.open(file).size, 0).save(masks / f"{file.stem}.png")
    assert "mask of training image 1 is empty" in refused("train", *base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--prompt"),
        (("--prompt", "a", "--adapter", "nowhere.safetensors"), "no file nowhere.safetensors"),
        (("--prompt", "a", "--adapter", "x.safetensors:much"), "'much'"),
        (("--prompt", "a", "--lora", "x.ckpt:dog"), "--lora x.ckpt:dog is not understood"),
        (("--prompt", "a", "--lora", "nowhere.safetensors:dog"), "Cannot read nowhere.safetensors"),
        (("--prompt", "a", "--lora", f"{UNNAMED}:"), "does not say which words it was trained on"),
        (("--prompt", "a", "--lora", f"x={UNNAMED}:dog", "--lora", f"x={UNNAMED}:dog"), "Two concepts are named 'x'"),
        (("--prompt", "a", "--cfg", "strong"), "not a number"),
        (("--prompt", "a", "--out", "picture.jpg"), "must end in .png"),
        (("--prompt", "a", "--loda-steps", "40"), "more than --steps 30"),
        (("--prompt", "a", "--divergence", "l2"), "'l2' is not possible, use jsd, "),
        (
            ("--prompt", "a", "--map-downscale", "3"),
            "--map-downscale: '3' is not possible, use 0, 1, 2, 4, 8, 16 or 32",
        ),
        (("--prompt", "a", "--afg-region", "0"), "--afg-region: '0' is not possible, use 0.001 to 1"),
        (("--prompt", "a", "--afg-end", "inf"), "--afg-end: 'inf' is not possible, use 0 to 1"),
        (("--prompt", "a", "--class-word", "rexdog"), "NAME=WORD"),
        (("--prompt", "a", "--class-word", "rex=dog"), "no --adapter provides"),
        (("--prompt", "a <rex>", "--words", "dog"), "<rex>"),
        (("--prompt", "a", "--size", "20x20"), "multiples of 8"),
    ],
)
def test_sample_options(refused, model_folder, monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("sample", "--model", model_folder, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"junk" * 100, (10**18).to_bytes(8, "little") + b"{}"])
def test_inspect_refuses_what_is_no_adapter(refused, tmp_path, content):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    assert "x.safetensors" in refused("inspect", file)


def test_inspect_out_needs_a_rank(refused, tmp_path):
    assert "--svd" in refused("inspect", tmp_path / "x.safetensors", "--out", "y.safetensors")


def test_a_full_gpu_is_a_sentence(refused, model_folder, monkeypatch):
    import torch

    from conceptsplit_core.hosts import diffusers as host

    def full(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore lines")

    monkeypatch.setattr(host, "sample", full)
    assert "not enough memory" in refused("sample", "--model", model_folder, "--prompt", "a dog")
