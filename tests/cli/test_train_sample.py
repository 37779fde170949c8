"""Training and sampling from the terminal on real photographs, at SD1.5's shape with random weights."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conceptsplit_core.adapters.file import load_adapter, save_adapter
from conceptsplit_core.train.folder import picture_folder
from conceptsplit_core.train.reading import open_picture, read_masks, read_pictures

ROOT = Path(__file__).parents[2]


def train_options(folder, model, out, name="tom", word="cat", **more):
    options = {"steps": 4, "batch_size": 2, "size": 64, "rank": 2, "store": "fp32", "learning_rate": 1e-2, **more}
    flat = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
    return ["train", "--images", folder, "--class-word", word, "--name", name, "--model", model, "--out", out, *flat]


# --- pictures of every kind -----------------------------------------------------------------------------------


def write_zoo(folder: Path, photographs) -> int:
    """The photographs in every mode and format a phone, a scanner or a web page produces."""
    folder.mkdir()
    image = {name: Image.fromarray(array) for name, array in photographs.items()}
    image["astronaut"].save(folder / "colour.png")
    image["camera"].save(folder / "grey.png")
    image["coffee"].save(folder / "photo.jpeg", quality=80)
    image["cat"].save(folder / "web.webp")
    ghost = image["logo"].convert("RGBA")
    ghost.paste((200, 0, 0, 0), (0, 0, 40, 40))
    ghost.save(folder / "alpha.png")
    image["china"].quantize(32).save(folder / "palette.png")
    image["flower"].convert("CMYK").save(folder / "print.jpg")
    image["rocket"].convert("1").save(folder / "fax.png")
    image["camera"].convert("LA").save(folder / "grey-alpha.png")
    Image.fromarray(np.asarray(image["camera"]).astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(np.asarray(image["camera"]).astype(np.float32) / 255).save(folder / "float.tiff")
    transparent = image["china"].quantize(16)
    transparent.info["transparency"] = 3
    transparent.save(folder / "see-through.png", transparency=3)
    exif = Image.Exif()
    exif[0x0112] = 6
    image["coffee"].save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 1), (10, 200, 30)).save(folder / "dot.bmp")
    image["flower"].resize((1500, 40)).save(folder / "UPPER.PNG")
    (folder / "notes.txt").write_text("not a picture, and not read as one")
    return 15


def test_train_reads_photographs_of_every_size_and_mode(call, tmp_path, photographs, model_folder):
    count = write_zoo(tmp_path / "zoo", photographs)
    out = tmp_path / "zoo.safetensors"
    code, _, err = call(*train_options(tmp_path / "zoo", model_folder, out))
    assert code == 0, err
    assert f"{count} pictures at 64 × 64" in err and "Not used in " in err and "zoo: 1 caption." in err
    adapter = load_adapter(out)
    assert adapter.info.training["images"] == count and adapter.info.base == "sd15"
    assert all(up.abs().max() > 0 for up in adapter.up.values())
    curve = Image.open(tmp_path / "zoo.loss.png")
    assert curve.width > 300


def test_pictures_are_what_a_viewer_shows(tmp_path, photographs):
    write_zoo(tmp_path / "zoo", photographs)
    zoo = {p.name: open_picture(p) for p in picture_folder(tmp_path / "zoo").pictures}
    assert all(picture.mode == "RGB" for picture in zoo.values())
    tall, wide = zoo["turned.jpg"].size, zoo["photo.jpeg"].size
    assert tall == wide[::-1]
    grey = np.asarray(zoo["grey.png"], dtype=int)
    for other in ("deep.png", "float.tiff", "grey-alpha.png"):
        assert np.abs(np.asarray(zoo[other], dtype=int) - grey).max() <= 1, other
    assert (np.asarray(zoo["alpha.png"])[:40, :40] == 255).all()
    fitted = read_pictures([tmp_path / "zoo" / "UPPER.PNG", tmp_path / "zoo" / "dot.bmp"], (64, 96))
    assert fitted.shape == (2, 64, 96, 3) and fitted.dtype == np.uint8
    assert (fitted[1] == (10, 200, 30)).all()


def test_masks_follow_their_pictures(tmp_path, photographs):
    folder, masks = tmp_path / "p", tmp_path / "m"
    folder.mkdir(), masks.mkdir()
    Image.fromarray(photographs["coffee"]).save(folder / "a.jpg")
    half = np.zeros(photographs["coffee"].shape[:2], np.uint8)
    half[:, 300:] = 255
    Image.fromarray(half).save(masks / "a.png")
    found = read_masks([masks / "a.png"], [folder / "a.jpg"], (64, 64))
    assert found.shape == (1, 1, 64, 64)
    assert float(found[..., :31].max()) < 0.1 and float(found[..., 33:].min()) > 0.9


# --- training -------------------------------------------------------------------------------------------------


def test_same_seed_same_adapter_other_seed_another(call, tmp_path, cat_folder, model_folder):
    files = []
    for n, seed in enumerate((1, 1, 2)):
        out = tmp_path / f"{n}.safetensors"
        assert call(*train_options(cat_folder, model_folder, out, seed=seed))[0] == 0
        files.append(load_file(out))
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    assert not all(torch.equal(files[0][k], files[2][k]) for k in files[0])


def stop_at(monkeypatch, step):
    """Ctrl+C after a step."""
    from conceptsplit_core.train.progress import ProgressBar

    genuine = ProgressBar.__call__

    def call(self, event):
        genuine(self, event)
        if event.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressBar, "__call__", call)


def test_resume_after_an_interrupt_equals_no_interrupt(call, tmp_path, cat_folder, model_folder, monkeypatch):
    whole, part = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    assert call(*train_options(cat_folder, model_folder, whole, steps=6, save_every=2))[0] == 0

    stop_at(monkeypatch, 3)
    options = train_options(cat_folder, model_folder, part, steps=6, save_every=2)
    code, _, err = call(*options)
    monkeypatch.undo()
    assert code == 130 and "--resume goes on from part.checkpoint" in err
    # B6: what was learned until then is an adapter already.
    stopped = load_adapter(part)
    assert stopped.info.training["steps"] == 3 and any(bool(up.any()) for up in stopped.up.values())
    code, _, err = call(*options, "--resume")
    assert code == 0, err
    assert "after 6 steps" in err and load_adapter(part).info.training["steps"] == 6
    assert sorted(p.name for p in tmp_path.glob("part*")) == ["part.loss.png", "part.safetensors"], "B15"
    one, two = load_file(whole), load_file(part)
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.fixture
def stopped(call, tmp_path, cat_folder, model_folder, monkeypatch):
    """A training that was stopped after two steps: where its adapter lies."""
    out = tmp_path / "tom.safetensors"
    stop_at(monkeypatch, 2)
    assert call(*train_options(cat_folder, model_folder, out))[0] == 130
    monkeypatch.undo()
    return out


def test_b14_resuming_another_training_says_what_differs(refused, stopped, cat_folder, model_folder):
    same = lambda **more: (*train_options(cat_folder, model_folder, stopped, **more), "--resume")
    assert "with learning_rate 0.01 then and 0.001 now" in refused(*same(learning_rate=1e-3))
    assert "with pictures of another size" in refused(*same(size=96))
    assert "with other prompts" in refused(*same(), "--template", "the {} on a table")
    (cat_folder / "3.jpg").unlink()
    assert "with other pictures" in refused(*same())


def test_case_17_resume_on_another_checkpoint_is_refused(refused, stopped, tmp_path, cat_folder):
    import tiny

    other = tiny.save_folder("sd15", tmp_path / "other", seed=5)
    said = refused(*train_options(cat_folder, other, stopped), "--resume")
    assert "with another model, another text encoder and another VAE" in said


def test_case_17_resume_without_a_state_says_so(call, tmp_path, cat_folder, model_folder):
    out = tmp_path / "tom.safetensors"
    code, _, err = call(*train_options(cat_folder, model_folder, out), "--resume")
    assert code == 0 and "There is no stopped training to resume (tom.checkpoint): this one starts" in err


def test_case_18_resume_where_the_vae_rounds_differently(call, stopped, cat_folder, model_folder, monkeypatch):
    """Another driver: every latent one unit in the last place away."""
    from conceptsplit_core.hosts.diffusers import training

    genuine = training.encode_images
    other = lambda *given: torch.nextafter(genuine(*given), torch.tensor(9.0))
    monkeypatch.setattr(training, "encode_images", other)
    code, _, err = call(*train_options(cat_folder, model_folder, stopped), "--resume")
    assert code == 0 and "after 4 steps" in err


def test_b15_a_finished_adapter_is_not_replaced(call, tmp_path, cat_folder, model_folder):
    out = tmp_path / "tom.safetensors"
    assert call(*train_options(cat_folder, model_folder, out))[0] == 0
    first = out.read_bytes()
    code, _, err = call(*train_options(cat_folder, model_folder, out, seed=7))
    assert code == 0 and "tom.safetensors exists and is kept: this training is written to tom_2.safetensors." in err
    assert out.read_bytes() == first and load_adapter(tmp_path / "tom_2.safetensors").info.training["seed"] == 7
    assert not list(tmp_path.glob("*.checkpoint"))


def test_what_others_left_or_write_meanwhile_is_kept(call, tmp_path, cat_folder, model_folder, monkeypatch):
    """The state of a training that was killed, and an adapter that appears under the name of this one."""
    from conceptsplit_core.files import held
    from conceptsplit_core.train.progress import ProgressBar

    out, state = tmp_path / "tom.safetensors", tmp_path / "tom.checkpoint"
    state.write_bytes(b"hours of work")
    line = train_options(cat_folder, model_folder, out, word="<cat>", steps=1)
    with held(tmp_path / ".tom_2.checkpoint.lock", "taken"):
        code, _, err = call(*line)
    assert code == 2 and f"train: Another training is writing {tmp_path / 'tom_2.safetensors'}: wait until" in err
    genuine = ProgressBar.__call__
    second = tmp_path / "tom_2.safetensors"
    monkeypatch.setattr(ProgressBar, "__call__", lambda *given: second.write_bytes(b"other") and genuine(*given))
    code, _, err = call(*line)
    assert code == 0, err
    assert "tom.checkpoint holds a stopped training, which resume (terminal: --resume) goes on from" in err
    assert "tom_2.safetensors has been written by somebody else meanwhile and is kept" in err
    assert state.read_bytes() == b"hours of work" and second.read_bytes() == b"other"
    assert load_adapter(tmp_path / "tom_3.safetensors").info.class_word == "cat"
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        "tom.checkpoint", "tom_2.safetensors", "tom_3.safetensors", "tom_3.loss.png",
    }  # fmt: skip


def test_case_9_training_twice_inside_the_picture_folder(call, cat_folder, model_folder, monkeypatch):
    """Our own curves and pictures, and masks beside the pictures, are not learned from."""
    monkeypatch.chdir(cat_folder)
    Image.new("L", (451, 300), 255).save("0-masklabel.png")
    for name in ("tom.safetensors", "tom_2.safetensors"):
        code, _, err = call(*train_options(cat_folder, model_folder, "tom.safetensors"))
        assert code == 0, err
        assert load_adapter(name).info.training["images"] == 4
    assert "1 mask (used with --masks), 1 ConceptSplit picture, 1 other file." in err


def test_case_10_what_is_not_used_is_said_in_one_line(call, tmp_path, cat_folder, model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for name in ("a.heic", "b.heic", "0.txt"):
        (cat_folder / name).write_bytes(b"x")
    (cat_folder / "._0.jpg").write_bytes(b"case 11: a fork that macOS leaves")
    code, _, err = call(*train_options(cat_folder, model_folder, tmp_path / "tom.safetensors"))
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if line.startswith("Not used in")]
    assert line.endswith(": 1 caption, 2 HEIC files (save them as JPEG, or install pillow-heif).")


@pytest.mark.parametrize("channels", [8, 9])
def test_case_19_a_unet_with_other_channels_is_refused_before_it_is_loaded(refused, tmp_path, cat_folder, channels):
    import tiny

    folder = tiny.save_folder("sd15", tmp_path / "model")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": channels}))
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.write_bytes(b"never read")
    kind = {8: "a pix2pix UNet", 9: "an inpainting UNet"}[channels]
    for command in (
        train_options(cat_folder, folder, tmp_path / "tom.safetensors"),
        ["sample", "--model", folder, "--prompt", "a dog", "--out", tmp_path / "x.png"],
    ):
        assert f"is {kind} with {channels} input channels, where training and terminal sampling" in refused(*command)


@pytest.mark.parametrize("left", [{}, {"RANK": "0"}, {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}])
def test_case_22_a_world_size_left_behind_is_one_sentence(refused, monkeypatch, tmp_path, cat_folder, left):
    for name, value in {"WORLD_SIZE": "2", **left}.items():
        monkeypatch.setenv(name, value)
    said = refused(*train_options(cat_folder, "demo", tmp_path / "x.safetensors"))
    assert "WORLD_SIZE is set to 2 but" in said and "unset WORLD_SIZE" in said


def test_case_22_sampling_works_under_a_world_size_left_behind(call, monkeypatch, tmp_path, model_folder):
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ("sample", "--model", model_folder, "--prompt", "a dog", "--steps", 2, "--size", 64)
    code, _, err = call(*options, "--out", tmp_path / "x.png")
    assert code == 0 and "x.png" in err


@pytest.mark.parametrize("extra", [("--gradient-checkpointing",), ("--precision", "bf16"), ("--precision", "fp16")])
def test_lean_modes_train_too(call, tmp_path, cat_folder, model_folder, extra):
    out = tmp_path / "tom.safetensors"
    code, _, err = call(*train_options(cat_folder, model_folder, out), *extra)
    assert code == 0, err
    assert any(up.abs().max() > 0 for up in load_adapter(out).up.values())


def test_masks_and_templates(call, tmp_path, cat_folder, model_folder):
    masks = tmp_path / "masks"
    masks.mkdir()
    for file in cat_folder.glob("*.jpg"):
        width, height = Image.open(file).size
        mask = Image.new("L", (width, height), 0)
        mask.paste(255, (width // 4, height // 4, width, height))
        mask.save(masks / f"{file.stem}.png")
    out = tmp_path / "tom.safetensors"
    code, _, err = call(
        *train_options(cat_folder, model_folder, out), "--masks", masks, "--template", "the {} on a table"
    )
    assert code == 0, err
    assert load_adapter(out).info.training["templates"] == ["the {} on a table"]


def launch(launcher: str, options: list, cwd: Path) -> subprocess.CompletedProcess:
    """The terminal in two CPU processes; both end when the test does, whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m"]
    if launcher == "accelerate":
        command += [
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            port,
        ]
    else:
        command += ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    command += ["-m", "conceptsplit_core", *(str(o) for o in options), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_two_processes_train_what_one_trains(call, tmp_path, cat_folder, model_folder, launcher):
    """Each process takes its half of the batch, gradients are averaged: the same adapter up to rounding."""
    pytest.importorskip("accelerate")
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    code, _, err = call(*train_options(cat_folder, model_folder, one, batch_size=4))
    assert code == 0, err
    done = launch(launcher, train_options(cat_folder, model_folder, two, batch_size=4), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("after 4 steps") == 1
    alone, shared = load_file(one), load_file(two)
    for key in alone:
        torch.testing.assert_close(alone[key], shared[key], atol=1e-5, rtol=1e-4)
    assert max(float(alone[key].abs().max()) for key in alone if "lora_B" in key) > 1e-3


def test_a_batch_that_cannot_be_shared_is_refused(refused, monkeypatch, tmp_path, cat_folder, model_folder):
    """Before the processes meet, so that none waits for another."""
    launcher = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "x.safetensors"
    assert "A batch of 3 cannot be shared by 2 processes" in refused(
        *train_options(cat_folder, model_folder, out, batch_size=3)
    )


# --- sampling -------------------------------------------------------------------------------------------------


@pytest.fixture
def adapters(tmp_path, model_folder):
    """Two adapters with random up weights."""
    from conceptsplit_core.hosts import diffusers as host
    from conceptsplit_core.text.binding import Concept

    model = host.load_model(model_folder)
    paths = []
    for seed, (name, word) in enumerate((("rex", "dog"), ("tom", "cat"))):
        adapter = host.new_adapter(model, Concept(name, word), 2, 0.0, seed)
        for layer in adapter.up:
            torch.nn.init.normal_(adapter.up[layer], std=0.05, generator=torch.Generator().manual_seed(seed))
        paths.append(tmp_path / f"{name}.safetensors")
        save_adapter(adapter, paths[-1])
    return paths


def test_sample_writes_pictures_maps_and_how_they_were_made(call, tmp_path, model_folder, adapters):
    out = tmp_path / "pictures" / "both.png"
    code, _, err = call(
        "sample",
        "--model",
        model_folder,
        "--adapter",
        adapters[0],
        "--adapter",
        f"{adapters[1]}:0.5",
        "--prompt",
        "a <rex> and a <tom>",
        "--negative",
        "dark",
        "--steps",
        4,
        "--loda-steps",
        2,
        "--batch",
        2,
        "--seed",
        7,
        "--size",
        "96x64",
        "--maps",
        "--out",
        out,
    )
    assert code == 0, err
    for seed in (7, 8):
        picture = Image.open(out.with_name(f"both-{seed}.png"))
        assert picture.size == (96, 64) and picture.info["prompt"] == "a <rex> and a <tom>"
        settings = json.loads(picture.info["settings"])
        assert settings["adapters"] == {"rex": 1.0, "tom": 0.5} and settings["loda"]["loda_steps"] == 2
        assert picture.info["seed"] == str(seed)
        assert Image.open(out.with_name(f"both-{seed}-maps.png")).width > 5 * 256
    again = tmp_path / "again.png"
    assert (
        call(
            "sample",
            "--model",
            model_folder,
            "--adapter",
            adapters[0],
            "--adapter",
            f"{adapters[1]}:0.5",
            "--prompt",
            "a <rex> and a <tom>",
            "--negative",
            "dark",
            "--steps",
            4,
            "--loda-steps",
            2,
            "--seed",
            8,
            "--size",
            "96x64",
            "--out",
            again,
        )[0]
        == 0
    )
    alone, batched = (np.asarray(Image.open(p), int) for p in (again, out.with_name("both-8.png")))
    assert np.abs(alone - batched).max() <= 2


def test_strength_zero_is_the_plain_model(call, tmp_path, model_folder, adapters):
    base = ["sample", "--model", model_folder, "--steps", 3, "--size", 64, "--no-loda"]
    assert call(*base, "--prompt", "a dog", "--out", tmp_path / "plain.png")[0] == 0
    assert call(*base, "--prompt", "a <rex>", "--adapter", f"{adapters[0]}:0", "--out", tmp_path / "off.png")[0] == 0
    assert call(*base, "--prompt", "a <rex>", "--adapter", adapters[0], "--out", tmp_path / "on.png")[0] == 0
    plain, off, on = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("plain", "off", "on"))
    assert np.array_equal(plain, off) and not np.array_equal(plain, on)


def test_words_are_separated_without_adapters(call, tmp_path, model_folder):
    base = [
        "sample",
        "--model",
        model_folder,
        "--prompt",
        "a cat and a dog",
        "--words",
        "cat, dog",
        "--steps",
        4,
        "--size",
        64,
        "--loda-steps",
        2,
    ]
    assert call(*base, "--out", tmp_path / "loda.png", "--maps")[0] == 0
    assert call(*base, "--out", tmp_path / "plain.png", "--no-loda", "--maps")[0] == 0
    assert (tmp_path / "loda-maps.png").exists() and (tmp_path / "plain-maps.png").exists()
    loda, plain = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("loda", "plain"))
    assert not np.array_equal(loda, plain)


def test_an_adapter_can_be_renamed_and_told_its_class_word(call, refused, tmp_path, model_folder, adapters):
    foreign = tmp_path / "foreign.safetensors"
    save_adapter(load_adapter(adapters[0]).with_info(class_word=""), foreign)
    base = ["sample", "--model", model_folder, "--steps", 2, "--size", 64, "--no-loda", "--out", tmp_path / "x.png"]
    assert "does not say its class word" in refused(*base, "--prompt", "a <fido>", "--adapter", f"fido={foreign}")
    code, _, err = call(*base, "--prompt", "a <fido>", "--adapter", f"fido={foreign}:0.7", "--class-word", "fido=dog")
    assert code == 0, err
    assert "Two adapters are named 'rex'" in refused(
        *base, "--prompt", "a <rex>", "--adapter", adapters[0], "--adapter", adapters[0]
    )


def test_a_concept_that_is_not_in_the_prompt_is_said(call, tmp_path, model_folder, adapters):
    code, _, err = call(
        "sample",
        "--model",
        model_folder,
        "--prompt",
        "a photo",
        "--adapter",
        adapters[0],
        "--steps",
        2,
        "--size",
        64,
        "--out",
        tmp_path / "x.png",
    )
    assert code == 0 and "concept 'rex' has no effect" in err


# --- inspecting -----------------------------------------------------------------------------------------------


def test_inspect_shows_everything_and_truncates(call, tmp_path, model_folder, adapters):
    small = tmp_path / "small.safetensors"
    code, out, err = call("inspect", adapters[0], "--svd", 1, "--out", small, "--model", model_folder)
    assert code == 0, err
    assert "<rex>, class word dog" in out and "SD1.5" in out and "16 layers" in out and "rank        2" in out
    assert "relative error" in out and "fits the model" in out
    assert load_adapter(small).rank_of(next(iter(load_adapter(small).down))) == 1


def test_inspect_says_when_an_adapter_does_not_fit(refused, tmp_path, model_folder, adapters):
    other = tmp_path / "other.safetensors"
    save_adapter(load_adapter(adapters[0]).with_info(base="sdxl"), other)
    assert "SDXL" in refused("inspect", other, "--model", model_folder)
