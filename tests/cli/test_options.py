"""Every option of the terminal arrives where it is used, at a value that is not the default; and cases of that kind."""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from conceptsplit_core import cli
from conceptsplit_core.cli import common, options
from conceptsplit_core.cli import sample as sample_command
from conceptsplit_core.cli import train as train_command
from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.files import check_place
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.options import options as all_options
from conceptsplit_core.settings import CorrectionConfig, GateConfig, LodaConfig, TrainConfig

ROOT = Path(__file__).parents[2]
LORA = ROOT / "conceptsplit_core" / "demo" / "loras" / "demo_nero_lora.safetensors"
ADAPTER = ROOT / "tests" / "fixtures" / "adapters" / "v1_demo_pixa.safetensors"


def actions(command: str) -> dict[str, argparse.Action]:
    parser = next(a for a in options.build_parser()._actions if a.choices).choices[command]
    return {action.dest: action for action in parser._actions if action.dest != "help"}


# Values that are not the default, no two numbers of one settings class alike.
LODA = {
    "loda_steps": 7,
    "loda_iterations": 5,
    "loda_strength": 0.125,
    "loda_rule": "gradient",
    "divergence": "bhattacharyya",
    "threshold": 0.75,
    "map_smoothing": 2.5,
    "map_downscale": 4,
    "map_part": "down",
    "afg": False,
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
    "lora_guidance": 4.25,
}
TRAIN = {
    "steps": 11,
    "batch_size": 3,
    "learning_rate": 0.0625,
    "rank": 5,
    "seed": 2**64 - 3,
    "alpha": 1.5,
    "weight_decay": 0.25,
    "warmup": 4,
    "max_grad_norm": 0.5,
    "background_weight": 0.75,
    "save_every": 6,
    "resume": True,
    "gradient_checkpointing": True,
    "kind": "lora",
    "mask_from": "attention",
    "routed": True,
    "separate": 0.375,
}
GATE = {"gate_bias": 0.625, "gate_temperature": 0.25}


def written(name: str, value: object) -> list[str]:
    """An option as a user types it."""
    dashed = name.replace("_", "-")
    return [f"--{dashed}" if value else f"--no-{dashed}"] if isinstance(value, bool) else [f"--{dashed}", str(value)]


def test_the_values_tried_are_all_options_and_none_is_a_default():
    for config, values in ((LodaConfig, LODA), (TrainConfig, TRAIN), (GateConfig, GATE)):
        fresh = config()
        assert values.keys() == all_options(config).keys() - options.NO_SAMPLES
        assert all(getattr(fresh, name) != value for name, value in values.items())
        numbers = [value for value in values.values() if not isinstance(value, (bool, str))]
        assert len(numbers) == len(set(numbers))


class Stop(Exception):
    """Ends a command where the test has seen enough."""


def received(monkeypatch, module, name, run) -> SimpleNamespace:
    """What the function `name` of `module` is called with by `run`, which goes no further."""
    seen = SimpleNamespace(args=(), kwargs={})

    def stop(*args, **kwargs):
        seen.args, seen.kwargs = args, kwargs
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stop)
        with pytest.raises(Stop):
            run()
    return seen


@pytest.mark.parametrize("name", LODA)
def test_each_loda_option_alone_reaches_the_config(name):
    arguments = options.parse(["sample", "--prompt", "a", *written(name, LODA[name])])
    assert sample_command.loda_config(arguments) == LodaConfig(**{name: LODA[name]})


@pytest.mark.parametrize("name", TRAIN)
def test_each_training_option_alone_reaches_the_config(name):
    arguments = options.parse(
        ["train", "--images", "x", "--class-word", "c", "--name", "n", *written(name, TRAIN[name])]
    )
    assert train_command.train_config(arguments) == TrainConfig(**{name: TRAIN[name]})


def test_demo_sampling_receives_every_option(monkeypatch, tmp_path):
    out = tmp_path / "new" / "a.png"
    line = [
        "sample", "--prompt", "a <rex> by a <ann> and a heart", "--lora", f"ann={LORA}:red triangle:0.375",
        "--negative", "dull", "--adapter", f"rex={ADAPTER}:0.625",
        "--class-word", "rex=star", "--words", "heart", "--steps", "13", "--cfg", "3.5", "--sampler", "euler",
        "--seed", "21", "--batch", "2", "--size", "96x64", "--out", str(out), "--maps", "--model", "demo",
        "--device", "cpu", "--precision", "bf16", "--prediction", "v_prediction", "--tokenizer", "x",
        "--correction", "0.375", "--correction-sharpness", "5",
    ]  # fmt: skip
    line += [part for name, value in {**LODA, **GATE}.items() for part in written(name, value)]
    spoken = {part[2:].replace("-", "_").removeprefix("no_") for part in line if part.startswith("--")}
    assert spoken >= set(actions("sample")) - {"loda"}, "an option that this test does not try"

    loading = received(monkeypatch, host.load, "load_model", lambda: cli.main(line))
    assert loading.args == ("demo",) and loading.kwargs == {
        "device": torch.device("cpu"), "dtype": torch.bfloat16, "prediction_type": "v_prediction", "tokenizer": "x",
    }  # fmt: skip
    line[line.index("--prediction") : line.index("--prediction") + 4] = []
    correcting = received(monkeypatch, host, "with_correction", lambda: cli.main(line))
    assert correcting.args[1] == CorrectionConfig(0.375, 5.0)
    sampling = received(monkeypatch, host, "sample", lambda: cli.main(line))
    (conditioning,), negative = sampling.args[1:]
    assert negative == "dull"
    assert {binding.concept for binding in conditioning.bindings} == {"rex", "ann", "heart"}
    assert "red triangle" in conditioning.text
    given = sampling.kwargs
    adapters = given.pop("adapters")
    assert {name: strength for name, (_, strength) in adapters.items()} == {"rex": 0.625, "ann": 0.375}
    assert adapters["ann"][0].info.kind == "lora"
    given.pop("progress")
    assert given == {
        "seeds": [21, 22], "concepts": ["rex", "ann", "heart"], "steps": 13, "guidance": 3.5, "size": (64, 96),
        "sampler": "euler", "loda": LodaConfig(**LODA), "watch": (0, 7),
    }  # fmt: skip
    assert not out.parent.exists(), "looking whether the place can be written leaves nothing"
    plain = received(monkeypatch, host, "sample", lambda: cli.main([*line, "--no-loda"]))
    assert plain.kwargs["loda"] == LodaConfig(**{**LODA, "loda_steps": 0}), "LoRAs are still located"
    assert sample_command.loda_config(options.parse(["sample", "--prompt", "a", "--no-loda"])) is None
    suppressed = options.parse(["sample", "--prompt", "a", "--no-loda", "--suppression", "0.5"])
    assert sample_command.loda_config(suppressed) == LodaConfig(loda_steps=0, afg=False, suppression=0.5)
    reuse = options.parse(["sample", "--prompt", "a", "--no-loda", "--encoder-reuse", "0.25", "--suppression", "0.5"])
    assert sample_command.loda_config(reuse) == LodaConfig(loda_steps=0, afg=False, encoder_reuse=0.25, suppression=0.5)
    held = options.parse(["sample", "--prompt", "a", "--no-loda", "--lora-guidance", "1.5"])
    assert sample_command.loda_config(held) == LodaConfig(loda_steps=0, afg=False, lora_guidance=1.5)


def test_demo_training_receives_every_option(monkeypatch, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (96, 64), (200, 30, 30)).save(folder / "one.png")
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.new("L", (96, 64), 255).save(masks / "one.png")
    out = tmp_path / "made.safetensors"
    (tmp_path / "captions.txt").write_text("a ring\n\n a blue star \n")
    line = [
        "train", "--images", str(folder), "--class-word", "star", "--name", "rex", "--masks", str(masks),
        "--out", str(out), "--size", "96x64", "--template", "the {} there", "--store", "fp32",
        "--captions", str(tmp_path / "captions.txt"), "--model", "demo",
        "--device", "cpu", "--precision", "fp16", "--prediction", "v_prediction", "--tokenizer", "x",
        "--beside", "ring, cross",
    ]  # fmt: skip
    line += [part for name, value in TRAIN.items() for part in written(name, value)]
    spoken = {part[2:].replace("-", "_") for part in line if part.startswith("--")}
    assert spoken >= set(actions("train")), "an option that this test does not try"
    loading = received(monkeypatch, host.load, "load_model", lambda: cli.main(line))
    assert loading.kwargs["dtype"] == torch.float16 and loading.kwargs["tokenizer"] == "x"

    line[line.index("--precision") : line.index("--precision") + 6] = []
    masked = received(monkeypatch, train_command, "train", lambda: cli.main([*line, "--mask-from", "given"]))
    assert masked.args[1].masks is not None
    line[line.index("--masks") : line.index("--masks") + 2] = []
    training = received(monkeypatch, train_command, "train", lambda: cli.main(line))
    adapter, data, _, _, config, _, state, *_ = training.args
    assert config == TrainConfig(**TRAIN, prediction_type="epsilon")
    assert config.resume is True and state.name == "made.checkpoint"
    assert (adapter.info.rank, adapter.info.alpha, adapter.info.kind) == (5, 1.5, "lora")
    assert [prompt.text for prompt in data.prompts] == ["the star and a ring and a cross there"]
    assert [len(prompt.others) for prompt in data.prompts] == [2]
    assert data.latents.shape == (1, 8, 8, 12)
    assert data.masks.shape == (1, 1, 8, 12) and not torch.equal(data.masks, masked.args[1].masks)
    assert training.kwargs["penalty"] is not None
    begun = received(monkeypatch, host, "begin", lambda: cli.main(line))
    assert begun.args[3] == ["a ring", "a blue star"]
    checkpointing = received(monkeypatch, host, "training_denoiser", lambda: cli.main(line))
    assert checkpointing.args[2] is True


# --- cases ----------------------------------------------------------------------------------------------------


def sampled(monkeypatch, *line) -> dict:
    return received(monkeypatch, host, "sample", lambda: cli.main(["sample", *line])).kwargs


def test_demo_case_15_guidance_zero_is_none(monkeypatch, capsys):
    assert sampled(monkeypatch, "--prompt", "a star", "--cfg", "0")["guidance"] == 1.0
    assert "--cfg 0 is taken as 1" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["--prompt", "--negative"])
def test_demo_case_16_weights_are_said_to_be_plain_text(monkeypatch, capsys, where):
    line = {"--prompt": "a star", where: "a (blue star:1.3) there"}
    sampled(monkeypatch, *(part for pair in line.items() for part in pair))
    assert "(blue star:1.3) are ComfyUI's: here they are read as plain text" in capsys.readouterr().err
    sampled(monkeypatch, "--prompt", "a star (the ratio is 2:3, nearly)")
    assert "plain text" not in capsys.readouterr().err


def test_demo_case_20_the_last_seed_and_the_one_after_it(call, tmp_path):
    out = tmp_path / "x.png"
    code, _, err = call(
        "sample", "--prompt", "a star", "--seed", 2**64 - 1, "--batch", 2, "--steps", 1, "--size", 64, "--out", out
    )
    assert code == 0, err
    assert {path.name for path in tmp_path.iterdir()} == {f"x-{2**64 - 1}.png", "x-0.png"}
    assert options.parse(["sample", "--prompt", "a", "--seed", str(2**64 + 5)]).seed == 5
    assert options.parse(["demo", "--first-seed", "-1"]).first_seed == 2**64 - 1


@pytest.mark.parametrize("page", ["cp1251", "ascii", "cp437"])
def test_case_21_inspect_prints_under_any_code_page(page):
    done = subprocess.run(
        [sys.executable, "-m", "conceptsplit_core", "inspect", str(ADAPTER)],
        cwd=ROOT, capture_output=True, timeout=120, env={**os.environ, "PYTHONIOENCODING": page, "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"<pixa>" in done.stdout and b"? " in done.stdout.replace(b"\xd7", b"?")


@pytest.mark.parametrize("world", ["2", "many"])
def test_case_22_what_another_launcher_left_is_one_sentence(refused, monkeypatch, cat_folder, tmp_path, world):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.delenv("RANK", raising=False)
    said = refused(
        "train", "--images", cat_folder, "--class-word", "cat", "--name", "tom", "--out", tmp_path / "x.safetensors"
    )
    wrong = {"2": " but RANK is not set as a launcher does it:", "many": ", which is no number:"}[world]
    assert f"WORLD_SIZE is set to {world}{wrong} unset WORLD_SIZE" in said


def test_case_27_a_file_name_may_have_an_equals_sign(monkeypatch, tmp_path):
    odd = tmp_path / "name_lr=1e-4.safetensors"
    shutil.copy(ADAPTER, odd)
    parse = sample_command.parse_adapter_option
    assert parse(f"{odd}:0.8") == (None, odd, 0.8)
    assert parse(str(odd)) == (None, odd, 1.0)
    assert parse(f"rex={odd}:-0.5") == ("rex", odd, -0.5)
    monkeypatch.chdir(tmp_path)
    assert parse(f"{odd.name}:0.8") == (None, Path(odd.name), 0.8)
    concepts, adapters = sample_command.load_concepts([f"{odd.name}:0.8"], [], "")
    assert concepts[0].name == "pixa" and adapters["pixa"][1] == 0.8


@pytest.mark.parametrize("name", ["रेक्स", "<rex>", "cafe\u0301", " re-x.2"])
def test_what_can_be_a_name_is_one_before_the_equals_sign(name):
    wanted = {"cafe\u0301": "caf\u00e9"}.get(name, name.strip(" <>"))
    assert sample_command.parse_adapter_option(f"{name}=a/b=c.safetensors:0.5") == (
        wanted,
        Path("a/b=c.safetensors"),
        0.5,
    )
    found = sample_command.parse_lora_option(f"{name}=b.safetensors:a=b:0.5")
    assert found == (wanted, Path("b.safetensors"), "a=b", 0.5)
    assert sample_command.parse_adapter_option("a b=c.safetensors")[:2] == (None, Path("a b=c.safetensors"))


@pytest.mark.parametrize("called", ["pixa", "<pixa>", "PIXA", " <Pixa> "])
def test_class_words_find_their_adapter_as_placeholders_do(called):
    concepts, _ = sample_command.load_concepts(
        [str(ADAPTER), f"Rex={ADAPTER}", f"rex={ADAPTER}"], [f"{called}=ring"], ""
    )
    assert (concepts[0].name, concepts[0].class_word) == ("pixa", "ring")
    concepts, _ = sample_command.load_concepts([f"Rex={ADAPTER}", f"rex={ADAPTER}"], ["<rex>=ring"], "")
    assert [concept.class_word == "ring" for concept in concepts] == [False, True]
    with pytest.raises(ConceptSplitError, match=r"--class-word names 'REX', which no --adapter provides\."):
        sample_command.load_concepts([f"Rex={ADAPTER}", f"rex={ADAPTER}"], ["REX=ring"], "")


def test_pictures_without_a_name_count_up_and_inputs_are_no_output(refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def named(*line):
        found = sample_command.targets(options.parse(["sample", "--prompt", "a", *line]))
        return [path.name for _, *pair in found for path in pair]

    for name in ("sample.png", "sample_2-maps.png", "sample_3-8.png"):
        Path(name).touch()
    assert named() == ["sample_2.png", "sample_2-maps.png"] and named("--maps") == ["sample_3.png", "sample_3-maps.png"]
    assert named("--batch", "2", "--seed", "7")[0] == "sample-7.png" and named("--out", "sample.png")[0] == "sample.png"
    Path("sample-8.png").touch()
    assert named("--batch", "2", "--seed", "7")[::2] == ["sample_2-7.png", "sample_2-8.png"]
    shutil.copy(ADAPTER, "a.png")
    before = Path("a.png").read_bytes()
    said = refused("sample", "--prompt", "a <pixa>", "--adapter", "a.png", "--out", tmp_path / "a.png")
    assert "a.png is a file that this picture is made of: give another name." in said
    assert Path("a.png").read_bytes() == before


def test_what_inspect_and_demo_would_replace_is_refused(refused, monkeypatch, tmp_path):
    mine, text = tmp_path / "mine.safetensors", tmp_path / "thesis.txt"
    shutil.copy(ADAPTER, mine)
    text.write_text("of years")
    assert "mine.safetensors exists and is kept: give a new name." in refused(
        "inspect", mine, "--svd", 1, "--out", mine
    )
    assert "thesis.txt must end in .safetensors." in refused("inspect", mine, "--svd", 1, "--out", text)
    assert mine.read_bytes() == ADAPTER.read_bytes() and text.read_text() == "of years"
    (tmp_path / "report.json").write_text('{"patients": 30}')
    assert "is not a report of ConceptSplit demo and would be replaced" in refused("demo", "--out", tmp_path)
    assert (tmp_path / "report.json").read_text() == '{"patients": 30}'


def test_a_strength_out_of_range_is_named(refused):
    assert "strength is 40.0, use -4 to 4" in refused("sample", "--prompt", "a", "--adapter", f"{ADAPTER}:40")


@pytest.mark.parametrize("kind", ["a file for a folder", "a folder of that name", "maps of one picture", "no right"])
def test_case_29_a_place_that_cannot_be_written_is_refused_before_sampling(refused, monkeypatch, tmp_path, kind):
    monkeypatch.setattr(common, "open_model", lambda *_: pytest.fail("the model was opened"))
    monkeypatch.setattr(sample_command, "open_model", lambda *_: pytest.fail("the model was opened"))
    extra: list[str] = []
    out = tmp_path / "a.png"
    if kind == "a file for a folder":
        (tmp_path / "file").write_text("x")
        out = tmp_path / "file" / "deeper" / "a.png"
    elif kind == "a folder of that name":
        out.mkdir()
    elif kind == "maps of one picture":
        (tmp_path / "a-8-maps.png").mkdir()
        extra = ["--batch", "2", "--seed", "7", "--maps"]
    else:
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        tmp_path.chmod(0o500)
    before = sorted(tmp_path.rglob("*"))
    assert "Cannot write" in refused("sample", "--prompt", "a star", "--out", out, *extra)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_picture_is_no_obstacle_and_stays_until_the_new_one_is_there(tmp_path):
    there = tmp_path / "a.png"
    there.write_bytes(b"old")
    check_place(there)
    assert there.read_bytes() == b"old"


def test_output_that_is_no_text_file_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert cli.main([]) == 2


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.safetensors", (None, "a.safetensors", "", 1.0)),
        ("a.safetensors:ohwx woman", (None, "a.safetensors", "ohwx woman", 1.0)),
        ("a.safetensors:ohwx woman:0.8", (None, "a.safetensors", "ohwx woman", 0.8)),
        ("a.safetensors:.5", (None, "a.safetensors", "", 0.5)),
        ("a.safetensors:dog; 0.4: old dog", (None, "a.safetensors", "dog; 0.4: old dog", 1.0)),
        ("a.safetensors:dog; 0.4: old dog:0.8", (None, "a.safetensors", "dog; 0.4: old dog", 0.8)),
        ("anna=C:\\x\\b.SafeTensors:it: a dog:-2", ("anna", "C:\\x\\b.SafeTensors", "it: a dog", -2.0)),
    ],
)
def test_a_lora_option_is_file_words_and_strength(text, wanted):
    name, path, words, strength = sample_command.parse_lora_option(text)
    assert (name, str(path), words, strength) == wanted


def test_demo_loras_take_their_words_from_the_files(call, tmp_path):
    other = LORA.with_name("demo_pixa_lora.safetensors")
    code, _, err = call(
        "sample", "--lora", f"nero={LORA}:0.75", "--lora", f"pixa={other}", "--prompt", "a <pixa> and a <nero>",
        "--steps", 2, "--seed", 5, "--maps", "--out", tmp_path / "a.png",
    )  # fmt: skip
    assert code == 0, err
    assert f"<nero> = 'triangle' from {LORA.name}: 14 layers act at its words; 42 in its region." in err
    assert "<pixa> = 'star'" in err and (tmp_path / "a-maps.png").is_file()
    settings = Image.open(tmp_path / "a.png").text["settings"]
    assert '"adapters": {"nero": 0.75, "pixa": 1.0}' in settings
