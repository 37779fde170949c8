"""Real photographs through the host's own loaders into training: what arrives, and what the loaders do not do.

The photographs are those of scikit-image in the project's own environment, read as files: a host's Python lacks it.
docs/choosing_pictures.md says what these tests find.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from . import checkpoints
from .conftest import REPO, run
from .test_training import PlainVAE
from .test_training_inputs import spied

CROPS = {
    "1.jpg": (0, 0, 600, 400),
    "2.png": (50, 0, 510, 400),
    "3.webp": (130, 10, 600, 400),
    "4.jpg": (90, 0, 420, 390),
}
ORIENTATION = 0x0112


@pytest.fixture
def sd(loaded):
    return loaded("tiny")


@pytest.fixture(scope="module")
def coffee() -> Image.Image:
    found = next(REPO.glob(".venv/lib/python*/site-packages/skimage/data/coffee.png"), None)
    if found is None:
        pytest.skip("scikit-image's photographs are not here: make setup installs them")
    return Image.open(found).convert("RGB")


@pytest.fixture(scope="module")
def cup(coffee, base):
    """A folder of the host's input: four crops in three formats, the last stored lying with its Exif orientation."""
    folder = base / "input" / "cup"
    folder.mkdir(exist_ok=True)
    for name, box in CROPS.items():
        crop, more = coffee.crop(box), {} if name.endswith(".png") else {"quality": 95}
        if name == "4.jpg":
            exif = Image.Exif()
            exif[ORIENTATION] = 6
            crop, more["exif"] = crop.transpose(Image.Transpose.ROTATE_90), exif
        crop.save(folder / name, **more)
    return folder


def off(image: torch.Tensor, wanted: Image.Image) -> float:
    """Mean difference of a picture [1, H, W, 3] to what it should be, in 255ths."""
    assert tuple(image.shape) == (1, wanted.height, wanted.width, 3)
    return float(np.abs(image[0].float().cpu().numpy() * 255 - np.asarray(wanted).astype(float)).mean())


def test_photographs_of_three_formats_are_learned_as_one_concept(sd, cup, coffee, monkeypatch, caplog):
    images = [run("LoadImage", image=f"cup/{name}")[0] for name in CROPS]
    for image, box in zip(images, CROPS.values(), strict=True):
        assert off(image, coffee.crop(box)) < 4, "Load Image turns a lying photograph upright"
    masks = []
    for image in images:
        masks.append(torch.zeros(image.shape[:3]))
        masks[-1][:, : image.shape[1] // 2] = 1.0
    with caplog.at_level(logging.WARNING, "ConceptSplit"):
        ((data, _, config, adapter),) = spied(
            monkeypatch, sd, images=images, mask=masks, vae=PlainVAE(), concept_name="mokka", class_word="cup",
            file_name="test/mokka", steps=5,
        )  # fmt: skip
    assert data.latents.shape == (4, 4, 16, 16) and config.steps == 5
    assert any("The 4 training images have 4 sizes" in record.getMessage() for record in caplog.records)
    assert float(data.masks[..., :6, :].min()) > 0.9 and float(data.masks[..., 10:, :].max()) < 0.1
    # The latents of PlainVAE are the picture shrunk: the cropped photograph itself, worked out here by Pillow.
    side = 390
    middle = coffee.crop(CROPS["3.webp"]).crop((40, 0, 40 + side, side)).resize((16, 16), Image.Resampling.BOX)
    wanted = torch.from_numpy(np.asarray(middle).astype(np.float32) / 127.5 - 1).movedim(-1, 0)
    assert float((data.latents[2, :3] - wanted).abs().mean()) < 0.06
    assert adapter.info.class_word == "cup" and any(bool(up.any()) for up in adapter.up.values())


def test_photographs_train_a_unet_of_sd15s_shape(cup, monkeypatch):
    """860 million random weights, through the host's own loader; small crops, for a CPU's sake."""
    with torch.inference_mode():
        model, clip, vae = checkpoints.load("sd15 whole")
    whole = SimpleNamespace(model=model, clip=clip, vae=vae)
    images = [run("LoadImage", image=f"cup/{name}")[0][:, 60:252, 100:292] for name in CROPS]
    ((data, _, config, adapter),) = spied(
        monkeypatch, whole, images=images, vae=vae, concept_name="mokka", class_word="cup",
        file_name="test/mokka15", steps=2, batch_size=1,
    )  # fmt: skip
    assert data.latents.shape == (4, 4, 24, 24) and data.latents.isfinite().all() and config.steps == 2
    assert sum(one.numel() for one in model.model.diffusion_model.parameters()) == 859_520_964
    assert adapter.info.base == "sd15" and len(adapter.up) == 16 and adapter.info.context_dim == 768
    assert all(bool(up.any()) and up.isfinite().all() for up in adapter.up.values())


def test_the_folder_loader_of_the_host_leaves_a_lying_photograph_lying(cup, coffee):
    """Why the page on pictures says to save them upright."""
    import nodes

    lying = coffee.crop(CROPS["4.jpg"]).transpose(Image.Transpose.ROTATE_90)
    if "LoadImageDataSetFromFolder" in nodes.NODE_CLASS_MAPPINGS:
        (images,) = run("LoadImageDataSetFromFolder", folder="cup")
        assert len(images) == 4
    else:
        only = cup.parent / "lying"
        only.mkdir(exist_ok=True)
        (only / "4.jpg").write_bytes((cup / "4.jpg").read_bytes())
        images = [run("LoadImageSetFromFolderNode", folder="lying", resize_method="None")[0]]
    assert any(image.shape[1:3] == (lying.height, lying.width) and off(image, lying) < 4 for image in images)


def heic_of(coffee, path):
    """The smallest true start of a HEIC file where nothing can write one, else the picture itself."""
    try:
        import pillow_heif
    except ImportError:
        path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
        return False
    pillow_heif.from_pillow(coffee.crop(CROPS["4.jpg"])).save(path, quality=90)
    return True


def test_a_heic_photograph_opens_or_one_sentence_says_what_to_install(coffee, base):
    """With pillow-heif in the host's Python (here: by PYTHONPATH) it is a picture; without, Pillow's reader says so.

    0.33.0's Load Image has a reader of its own before Pillow's, so the whole file is asked there only.
    """
    path = base / "input" / "IMG_7.heic"
    if heic_of(coffee, path):
        (image, _) = run("LoadImage", image=path.name)
        assert off(image, coffee.crop(CROPS["4.jpg"])) < 6
        return
    with pytest.raises(UnidentifiedImageError) as raised:
        Image.open(path)
    assert str(raised.value) == (
        "IMG_7.heic is a HEIC photograph, and this Python has nothing that opens it: save it as JPEG, or install the "
        "package pillow-heif into the Python of ComfyUI and start it again."
    )
    assert type(raised.value).__module__ == "builtins", "the host shows the sentence alone"
    # Other pictures, and damaged ones, are opened and refused as ever.
    path.with_suffix(".png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(8))
    with pytest.raises(UnidentifiedImageError, match="cannot identify image file"):
        Image.open(path.with_suffix(".png"))
