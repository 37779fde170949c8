"""The paper's table on tiny random models of the real classes; TA and IA worked out again by another way."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[1] / "diffusers_host"))

import tiny  # noqa: E402

from benchmarks.photographs import __main__ as command  # noqa: E402
from benchmarks.photographs import protocol, report, run, scores  # noqa: E402
from conceptsplit_core.errors import ConceptSplitError  # noqa: E402
from conceptsplit_core.hosts import diffusers as host  # noqa: E402
from conceptsplit_core.train import loop  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `model`, `clip`, `dino` (DINOv2) and `vit` with tiny random weights, `rex`, `tom` and `bo` with
    photographs, those of `tom` with masks."""
    root = tmp_path_factory.mktemp("photographs")
    tiny.save_folder("sd15", root / "model")
    torch.manual_seed(3)
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = tiny.tokenizer()
    clip = transformers.CLIPConfig(
        text_config={**text, "vocab_size": len(words), "bos_token_id": words.bos_token_id,
                     "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id},
        vision_config={**text, "image_size": 32, "patch_size": 8}, projection_dim=12,
    )  # fmt: skip
    transformers.CLIPModel(clip).save_pretrained(root / "clip")
    words.save_pretrained(root / "clip")
    dino = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14
    )
    transformers.Dinov2Model(dino).save_pretrained(root / "dino")
    vit = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8
    )
    transformers.ViTModel(vit, add_pooling_layer=False).save_pretrained(root / "vit")
    data = pytest.importorskip("skimage.data")
    cat, rocket, coffee = data.chelsea(), data.rocket(), data.coffee()
    for name, parts in {
        "rex": (rocket[:300, 200:500], rocket[100:, 150:420], rocket[:, ::-1]),
        "tom": (cat, cat[20:280, 90:400]),
        "bo": (coffee[:, :400],),
    }.items():
        (root / name).mkdir()
        for i, part in enumerate(parts):
            Image.fromarray(np.ascontiguousarray(part)).save(root / name / f"{i}.jpg")
            if name == "tom":
                mask = np.zeros(part.shape[:2], np.uint8)
                mask[part.shape[0] // 3 :, : part.shape[1] // 2] = 255
                Image.fromarray(mask).save(root / name / f"{i}_mask.png")
    return root


def options(home: Path, out: Path, *more: Any) -> list[str]:
    """A run of seconds: two concepts, two prompts, two seeds."""
    prompts = home / "prompts.txt"
    prompts.write_text("a photo of {}\n\na dark photo of {} on a table\n")
    given = (
        "--model", home / "model", "--clip", home / "clip", "--dino", home / "dino", "--out", out,
        "--concept", f"{home / 'rex'}:mug", "--concept", f"tommy={home / 'tom'}:cat", "--prompts", prompts,
        "--pictures", 2, "--seed", 41, "--size", 64, "--steps", 4, "--cfg", 3, "--train-steps", 3, "--rank", 2,
        "--learning-rate", 0.05, "--lora-learning-rate", 0.02,
        "--batch-size", 2, "--device", "cpu", *more,
    )  # fmt: skip
    return [str(one) for one in given]


@pytest.fixture(scope="module")
def done(home, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The folder of a finished run of all arms, and its report."""
    out = tmp_path_factory.mktemp("out") / "run"
    paper = home / "paper.json"
    paper.write_text(json.dumps({"a paper, its table": {"TA": 0.25, "IA (DINO)": 0.5}}))
    assert command.main(options(home, out, "--paper", paper)) == 0
    return out, json.loads((out / "report.json").read_text())


def prepared(picture: Image.Image, short: int, side: int, norm: tuple) -> Any:
    """Pixels [1, 3, side, side] without transformers: scaled to the short side, cropped around the centre."""
    scale = short / min(picture.size)
    w, h = (int(n * scale) if n != min(picture.size) else short for n in picture.size)
    small = picture.resize((w, h), Image.Resampling.BICUBIC)
    small = small.crop(((w - side) // 2, (h - side) // 2, (w - side) // 2 + side, (h - side) // 2 + side))
    values = (np.asarray(small, dtype=np.float64) / 255 - norm[0]) / norm[1]
    return torch.from_numpy(values).permute(2, 0, 1)[None].float()


OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Again:
    """TA and IA by another way than `scores`: CLIP's own forward pass, DINOv2's own pooler."""

    def __init__(self, home: Path):
        self.clip = transformers.CLIPModel.from_pretrained(home / "clip")
        self.dino = transformers.Dinov2Model.from_pretrained(home / "dino")
        self.words = tiny.tokenizer()

    @torch.no_grad()
    def seen(self, picture: Image.Image, by: str) -> Any:
        if by == "dino":  # 42 pixels of 48
            found = self.dino(pixel_values=prepared(picture, 48, 42, IMAGENET)).pooler_output[0]
            return found / found.norm()
        ids = torch.tensor([self.words("a").input_ids])
        return self.clip(input_ids=ids, pixel_values=prepared(picture, 32, 32, OPENAI)).image_embeds[0]

    @torch.no_grad()
    def ta(self, picture: Image.Image, text: str) -> float:
        ids = torch.tensor([self.words(text).input_ids])
        found = self.clip(input_ids=ids, pixel_values=prepared(picture, 32, 32, OPENAI))
        return float(found.logits_per_image / self.clip.logit_scale.exp())

    def ia(self, picture: Image.Image, folders: list[list[Image.Image]], by: str) -> float:
        """As the authors' scorer: the mean of the concepts' unit means, times the picture."""
        means = [torch.stack([self.seen(photo, by) for photo in photos]).mean(0) for photos in folders]
        return float(torch.stack([mean / mean.norm() for mean in means]).mean(0) @ self.seen(picture, by))


def pictures_of(folder: Path) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in sorted(folder.glob("*.jpg"))]


def test_ta_and_ia_are_those_of_the_authors_scorer(home, done):
    out, data = done
    again = Again(home)
    folders = [pictures_of(home / "rex"), pictures_of(home / "tom")]
    for arm in ("plain", "value_loda"):
        ta, clip, dino = [], [], []
        for text in ("a photo of a mug and a cat", "a dark photo of a mug and a cat on a table"):
            for seed in (41, 42):
                (file,) = (out / "pictures" / arm).glob(f"rex+tommy-*/{text}/{seed}.png")
                picture = Image.open(file).convert("RGB")
                ta.append(again.ta(picture, text))
                clip.append(again.ia(picture, folders, "clip"))
                dino.append(again.ia(picture, folders, "dino"))
        found = data["arms"][arm]
        assert found["ta"]["mean"] == pytest.approx(np.mean(ta), abs=2e-3)
        assert found["ia_clip"]["mean"] == pytest.approx(np.mean(clip), abs=2e-3)
        assert found["ia_dino"]["mean"] == pytest.approx(np.mean(dino), abs=2e-3)
    assert abs(data["arms"]["plain"]["ta"]["mean"] - data["arms"]["value_loda"]["ta"]["mean"]) > 1e-5


def test_a_subject_is_compared_with_its_masked_photographs_on_its_own_place(home, done):
    """`tommy` has masks: the lower left of each photograph, two thirds of its height and half of its width."""
    out, _ = done
    again = Again(home)
    (folder,) = (out / "pictures" / "value").iterdir()
    (file,) = folder.glob("a photo of a mug and a cat/42.png")
    kept = run.Kept(folder / "drawn.jsonl").values["a photo of {}", 42]
    cut = []
    for photo in pictures_of(home / "tom"):
        w, h = photo.size
        tall = h - h // 3
        side = max(tall, w // 2)
        top = h - side if side > tall else h // 3
        cut.append(photo.crop((0, top, side, top + side)))
    photos = {"rex": pictures_of(home / "rex"), "tommy": cut}
    (line,) = [
        value for (place,), value in run.Kept(next(out.glob("scores-*.jsonl"))).values.items()
        if place == file.relative_to(out).as_posix()
    ]  # fmt: skip
    assert kept["boxes"]["tommy"] is not None
    place = Image.open(file).convert("RGB").crop(kept["boxes"]["tommy"])
    for by in ("clip", "dino"):
        like = {name: again.ia(place, [own], by) for name, own in photos.items()}
        assert line["subjects"]["tommy"][by] == pytest.approx(like["tommy"], abs=5e-3)
        assert line["subjects"]["tommy"][f"other_{by}"] == pytest.approx(like["rex"], abs=5e-3)
    right = [one["dino"] > one["other_dino"] for one in line["subjects"].values() if one is not None]
    assert line["right"] == sum(right) / 2


def test_the_place_of_a_subject_in_its_map():
    maps = torch.full((1, 2, 8, 12), 0.01)
    maps[0, 0, 2:5, 1:3] = 9.0
    maps[0, 1, 3:6, 9:12] = 5.0
    (boxes,) = run.subject_boxes(maps, (80, 120))
    centres = [((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in boxes]
    assert np.allclose(centres, [(20, 35), (105, 45)], atol=11)
    assert all(right - left == bottom - top and 20 <= right - left <= 50 for left, top, right, bottom in boxes)
    assert run.subject_boxes(torch.stack([maps[0, 0], maps[0, 0] * 0])[None], (80, 120))[0][1] is None


def test_a_square_about_a_place_stays_inside_the_picture():
    place = torch.zeros(10, 20, dtype=torch.bool)
    place[1:3, 17:20] = True  # 30 x 20 pixels at the right
    assert run.square_about(place, (100, 200)) == (170, 5, 200, 35)
    place[:] = True
    assert run.square_about(place, (100, 200)) == (50, 0, 150, 100)
    assert run.square_about(torch.zeros(4, 4) > 0, (64, 64)) is None


def test_the_report_says_what_was_done_and_what_it_does_not_show(done):
    out, data = done
    assert list(data["arms"]) == ["plain", "lora_merged", "lora_routed", "value", "value_loda"]
    assert data["seeds"] == [41, 42] and data["sampling"]["size"] == [64, 64] and data["sampling"]["guidance"] == 3.0
    assert data["concepts"]["tommy"] == {"word": "cat", "photographs": 2, "masks": True}
    assert all(arm["pictures"] == 4 and arm["seconds"]["mean"] > 0 for arm in data["arms"].values())
    assert set(data["learning"]) == {"rex, lora", "rex, value", "tommy, lora", "tommy, value"}
    taught = data["learning"]["tommy, lora"]
    assert (taught["steps"], taught["learning_rate"], taught["images"], taught["seed"]) == (3, 0.02, 2, 0)
    assert data["learning"]["rex, value"]["learning_rate"] == 0.05
    said = " ".join(data["cannot_conclude"])
    assert "TA was read by a CLIP ViT of 2 layers, patch 8, 32², the authors' by CLIP ViT-L/14" in said
    assert "IA (DINO) was read by a dinov2 of 2 layers, patch 14, the authors' by DINO ViT-B/16" in said
    assert "its numbers by --paper" in said and "1 set of concepts" in said
    assert "a paper, its table: given by --paper" in said
    assert "2 prompts with 2 pictures each are few" in said
    table = (out / "table.md").read_text()
    assert "\n| a paper, its table | 0.25 | 0.5 | – | – | – | – | – |\n" in table
    assert table.count("\n| ") == 7 and "| LoRAs, merged | " in table and said.split(":")[0] in table
    with Image.open(out / "grid.jpg") as grid:
        assert grid.width == 8 + 5 * 232 and grid.height > 2 * 224
    assert len(list((out / "adapters").glob("*.safetensors"))) == 4 == len(list((out / "adapters").glob("*.loss.png")))
    assert not list((out / "adapters").glob("*.checkpoint"))


def test_arms_draw_from_the_same_noise_and_differ(done):
    out, _ = done
    drawn = {
        arm: np.asarray(Image.open(next((out / "pictures" / arm).glob("*/a photo of */41.png"))), dtype=int)
        for arm in protocol.ARMS
    }
    names = list(drawn)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert (drawn[one] != drawn[other]).any(), (one, other)


def test_the_plain_arm_is_the_product_s_own_picture(home, done):
    out, _ = done
    model = host.load_model(home / "model")
    text = host.encode_text(model, "a photo of a mug and a cat", [])
    own = host.sample(model, [text], seeds=[42], steps=4, guidance=3.0, size=(64, 64)).images[0]
    file = next((out / "pictures" / "plain").glob("*/a photo of a mug and a cat/42.png"))
    assert abs(np.asarray(Image.open(file)).astype(int) - own).max() <= 1  # a batch of two rounds otherwise


def test_the_same_command_draws_and_learns_nothing_twice(home, done, monkeypatch):
    out, data = done
    monkeypatch.setattr(run.host, "sample", None)
    monkeypatch.setattr(run, "train", None)
    monkeypatch.setattr(scores.Scorer, "score", None)
    assert command.main(options(home, out)) == 0
    assert json.loads((out / "report.json").read_text())["arms"] == data["arms"]


def test_concepts_alone(home, done, tmp_path):
    """One concept a picture, with the adapters that are there: nothing to be more like, nothing to keep apart."""
    out, _ = done
    shutil.copytree(out / "adapters", tmp_path / "run" / "adapters")
    more = ("--together", 1, "--arms", "plain,lora_routed", "--pictures", 1)
    assert command.main(options(home, tmp_path / "run", *more)) == 0
    data = json.loads((tmp_path / "run" / "report.json").read_text())
    assert sorted(path.name for path in (tmp_path / "run" / "adapters").iterdir()) == sorted(
        path.name for path in (out / "adapters").iterdir()
    )
    routed = data["arms"]["lora_routed"]
    assert routed["pictures"] == 4 and "right" not in routed and set(routed["concepts"]["rex"]) == {"clip", "dino"}
    assert "more like itself" not in (tmp_path / "run" / "table.md").read_text()
    (file,) = (tmp_path / "run" / "pictures" / "plain").glob("tommy-*/a photo of a cat/41.png")
    kept = run.Kept(next((tmp_path / "run").glob("scores-*.jsonl"))).values
    wanted = Again(home).ia(Image.open(file).convert("RGB"), [pictures_of(home / "tom")], "dino")
    assert kept[file.relative_to(tmp_path / "run").as_posix(),]["ia_dino"] == pytest.approx(wanted, abs=5e-3)


def test_a_stopped_run_goes_on(home, done, tmp_path, monkeypatch, capsys):
    """Stopped in the middle of learning, then between two pictures: the same pictures as without a stop."""
    data = done[1]
    genuine_sample, genuine_batch = host.sample, loop.make_batch
    steps: list[int] = []
    stops = [2]

    def one_step(adapter_data, levels, config, step, process):
        if step in stops:
            stops.remove(step)
            raise KeyboardInterrupt
        steps.append(step)
        return genuine_batch(adapter_data, levels, config, step, process)

    seen: list[Any] = []

    def two_calls(*given: Any, **more: Any) -> Any:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(more["seeds"])
        return genuine_sample(*given, **more)

    options_ = options(home, tmp_path / "run", "--arms", "value,plain", "--batch", 1)
    monkeypatch.setattr(loop, "make_batch", one_step)
    assert command.main(options_) == 130
    assert "Stopped. What is finished is kept" in capsys.readouterr().err and seen == []
    monkeypatch.setattr(run.host, "sample", two_calls)
    assert command.main(options_) == 130 and seen == [[41], [42]]
    monkeypatch.setattr(run.host, "sample", lambda *a, **k: seen.append(k["seeds"]) or genuine_sample(*a, **k))
    assert command.main(options_) == 0
    assert len(seen) == 6  # of two arms, prompts and seeds; the first run drew the first two plain ones
    assert steps == [0, 1, 2, 0, 1, 2]  # rex went on at its third step, tommy came after
    found = json.loads((tmp_path / "run" / "report.json").read_text())["arms"]["value"]
    assert found["ia_dino"]["mean"] == pytest.approx(data["arms"]["value"]["ia_dino"]["mean"], abs=1e-4)


def test_dino_of_the_first_kind_reads_too(home):
    dino = scores.Dino(home / "vit", torch.device("cpu"))
    picture = pictures_of(home / "rex")[0]
    model = transformers.ViTModel.from_pretrained(home / "vit", add_pooling_layer=False)
    with torch.no_grad():
        found = model(pixel_values=prepared(picture, 37, 32, IMAGENET)).last_hidden_state[0, 0]
    assert torch.allclose(dino.pictures([picture])[0], found / found.norm(), atol=5e-3)


def test_prompts_list_their_concepts(home):
    one, two = (protocol.photographs(f"{home / name}:{word}") for name, word in (("rex", "owl"), ("bo", "tea pot")))
    assert protocol.prompt("a photo of {} here", [one, two], False) == "a photo of an owl and a tea pot here"
    three = protocol.photographs(f"x={home / 'bo'}:mug")
    assert protocol.prompt("{}", [one, three, two], True) == "an <rex>, a <x> and a <bo>"
    assert protocol.prompt("{}", [two], False) == "a tea pot"
    sets = protocol.concept_sets([one, two, three], 2)
    assert [[c.name for c in group] for group in sets] == [["rex", "bo"], ["rex", "x"], ["bo", "x"]]
    assert len(set(protocol.TEMPLATES)) == 10 and all(line.count("{}") == 1 for line in protocol.TEMPLATES)


def test_a_long_or_odd_prompt_is_a_folder_all_the_same():
    assert run.file_name("a photo of a dog, a cat") == "a photo of a dog, a cat"
    first, second = run.file_name("a dog? /here"), run.file_name("a dog* /here")
    assert first.startswith("a dog_ _here ") and first != second and len(run.file_name("x" * 300)) == 87


def refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: Any) -> str:
    """The one sentence of a run that cannot begin."""
    capsys.readouterr()
    assert command.main(options(home, tmp_path / "run", *more)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("photographs: ") and line.endswith((".", "again.", ")"))
    return line


def test_bad_input_is_one_sentence(home, tmp_path, capsys, monkeypatch):
    say = lambda *more: refused(home, tmp_path, capsys, *more)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jpg").write_bytes(b"no picture")
    assert "--concept photos is not understood: write [NAME=]FOLDER:CLASS WORD" in say("--concept", "photos")
    assert "There is no folder" in say("--concept", f"{tmp_path / 'nowhere'}:dog")
    assert "holds no training picture" in say("--concept", f"{tmp_path / 'empty'}:dog")
    assert "'x.jpg' cannot be read as a picture" in say("--concept", f"{tmp_path / 'bad'}:dog")
    assert "Two concepts are named 'rex': write NAME=" in say("--concept", f"{home / 'rex'}:cat")
    assert "There are 2 concepts where 3 are drawn together" in say("--together", 3)
    assert "There is no arm 'merged': use some of plain, lora_merged" in say("--arms", "plain,merged")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo\n")
    assert "The prompt 'a photo' needs exactly one {}" in say("--prompts", prompts)
    prompts.write_text("\n")
    assert "holds no prompt" in say("--prompts", prompts)
    assert "cannot be read: No such file" in say("--prompts", tmp_path / "none.txt")
    assert "There is no model at" in say("--model", tmp_path / "none")
    assert "There is no CLIP model at" in say("--clip", home / "rex")
    assert "holds a model of the type 'clip', where DINO is of the type vit or dinov2." in say("--dino", home / "clip")
    assert "'clip_text_model', where CLIP is of the type clip." in say("--clip", home / "model" / "text_encoder")


def test_a_clip_whose_weights_are_not_all_there_is_refused(home, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    for file in (home / "clip").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    said = refused(home, tmp_path, capsys, "--clip", tmp_path)
    assert "lacks weights (first: visual_projection.weight): download it again." in said


def test_differences_that_chance_explains_are_not_conclusions():
    """The last arm is 0.2 better in TA in every picture, and in IA (DINO) as often better as worse."""
    subjects = {"rex": None, "tom": {"dino": 0.5, "clip": 0.25}}
    make = lambda ta, ia: {"ta": ta, "ia_dino": ia, "ia_clip": 0.5, "seconds": 2.0, "subjects": subjects}
    one = {"rex+tom": {i: make(0.1 + 0.01 * i, 0.4 + 0.1 * (i % 2)) for i in range(8)}}
    last = {"rex+tom": {i: make(0.3 + 0.01 * i, 0.5 - 0.1 * (i % 2)) for i in range(8)}}
    summed = report.summary({"plain": one, "value": last})
    behind = summed["plain"]["behind"]
    assert behind["ta"]["mean"] == pytest.approx(0.2) and behind["ta"]["lo"] > 0.19
    assert summed["plain"]["concepts"] == {"tom": {"dino": 0.5, "clip": 0.25}}
    said = report.open_questions(summed, 6, 10, 8, {"TA": ("CLIP", True)})
    (line,) = [line for line in said if line.startswith("plain words: not told apart from the last arm by ")]
    assert "IA (DINO) (" in line and "IA (CLIP) (+0.000, +0.000 to +0.000)" in line and "TA" not in line
    assert not any(line.startswith("TA ") for line in said)
    assert "plain words: 50% of the subjects have no place of their own." in said


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    kept = run.Kept(tmp_path / "x.jsonl")
    kept.add(("a {}", 3), {"file": "f"})
    with kept.path.open("a") as file:
        file.write('\n{"key": ["a {}", 4], "val')
    again = run.Kept(kept.path)
    again.add(("a {}", 5), {"file": "g"})
    assert run.Kept(kept.path).values == {("a {}", 3): {"file": "f"}, ("a {}", 5): {"file": "g"}}


def test_the_error_type_is_the_product_s():
    with pytest.raises(ConceptSplitError, match="write \\[NAME=\\]FOLDER:CLASS WORD"):
        protocol.photographs("nothing")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot be read"),
        ('["TA"]', "cannot be read"),
        ('{"ours": {"TA": "much"}}', "cannot be read"),
        ('{"ours": {"FID": 3}}', "'FID' of row 'ours' in .* is no column of the table: use TA, IA"),
    ],
)
def test_published_numbers_are_rows_of_the_tables_columns(tmp_path, text, told):
    assert report.published(None) == {}
    (tmp_path / "paper.json").write_text(text)
    with pytest.raises(ConceptSplitError, match=told):
        report.published(tmp_path / "paper.json")
