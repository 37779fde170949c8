"""Stopping a training and continuing it."""

import hashlib
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.settings import TrainConfig
from conceptsplit_core.train import checkpoint
from conceptsplit_core.train.checkpoint import differences, run_facts, training_files
from conceptsplit_core.train.data import Process, TrainData
from conceptsplit_core.train.identity import digest, weights_digest
from conceptsplit_core.train.loop import train
from conceptsplit_core.train.prompts import Prompt

# Helper modules of this folder, whatever import mode pytest runs in.
sys.path.insert(0, str(Path(__file__).parent))

from toy import ALPHAS, LAYER, data, new_adapter, overflowing, toy_denoise


class Stop(Exception):
    pass


def test_resume_gives_the_same_weights_as_no_interruption(tmp_path):
    config = TrainConfig(steps=20, batch_size=3, save_every=4)
    whole = new_adapter()
    expected = train(whole, data(), ALPHAS, toy_denoise(whole), config)

    part, path = new_adapter(), tmp_path / "state.safetensors"

    def stop_at_seven(event):
        if event.step == 7:
            raise Stop

    with pytest.raises(Stop):
        train(part, data(), ALPHAS, toy_denoise(part), config, stop_at_seven, path)
    assert not any(t.requires_grad for t in part.parameters())
    rest = new_adapter()
    steps = []
    result = train(
        rest, data(), ALPHAS, toy_denoise(rest), replace(config, resume=True), lambda e: steps.append(e.step), path
    )
    assert steps == list(range(8, 21)), "the seven steps done are not done again"
    assert result.losses == expected.losses
    for a, b in zip(rest.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_longer_run_continues_a_finished_one(tmp_path):
    path = tmp_path / "state.safetensors"
    one, two, whole = new_adapter(), new_adapter(), new_adapter()
    train(one, data(), ALPHAS, toy_denoise(one), TrainConfig(steps=5), None, path)
    train(two, data(), ALPHAS, toy_denoise(two), TrainConfig(steps=9, resume=True), None, path)
    train(whole, data(), ALPHAS, toy_denoise(whole), TrainConfig(steps=9))
    assert all(torch.equal(a, b) for a, b in zip(two.parameters(), whole.parameters(), strict=True))


IDENTITY = {"images": "p1", "masks": "", "size": "64", "model": "m1", "text encoder": "t1", "vae": "v1"}


def other(prompts=None, n=5, **identity):
    """The data of a training that differs in what is named."""
    given = data(n=n)
    return TrainData(given.latents, prompts or given.prompts, given.masks, {**IDENTITY, **identity})


def renamed():
    """The same prompts, for another class word."""
    return [Prompt(f"{prompt.text} cat", prompt.context, prompt.rows) for prompt in data().prompts]


def moved():
    """The same prompts with the class word one row further."""
    return [Prompt(prompt.text, prompt.context, tuple(row + 1 for row in prompt.rows)) for prompt in data().prompts]


@pytest.mark.parametrize(
    ("changed", "settings", "named"),
    [
        ({"images": "p2"}, {}, "a training with other pictures:"),
        ({"masks": "k1"}, {}, "a training with other masks:"),
        ({"size": "96"}, {}, "a training with pictures of another size:"),
        ({"model": "m2"}, {}, "a training with another model:"),
        ({"text encoder": "t2"}, {}, "a training with another text encoder:"),
        ({"vae": "v2"}, {}, "a training with another VAE:"),
        ({"captions": "c1"}, {}, "a training with other captions:"),
        ({"prompts": renamed()}, {}, "a training with other prompts:"),
        ({"prompts": moved()}, {}, "a training with other prompts:"),
        ({}, {"seed": 1}, "a training with seed 0 then and 1 now:"),
        ({}, {"learning_rate": 0.5}, "a training with learning_rate 0.001 then and 0.5 now:"),
        ({"model": "m2"}, {"seed": 1}, "a training with another model and seed 0 then and 1 now:"),
    ],
)
def test_b14_a_refused_resume_says_what_differs(tmp_path, changed, settings, named):
    """Also case 17: another model."""
    path = tmp_path / "rex.checkpoint"
    adapter = new_adapter()
    train(adapter, other(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=2), None, path)
    before = path.read_bytes()
    fresh = new_adapter()
    config = TrainConfig(steps=4, **settings)
    with pytest.raises(ConceptSplitError, match=named) as told:
        train(fresh, other(**changed), ALPHAS, toy_denoise(fresh), replace(config, resume=True), None, path)
    assert "\n" not in str(told.value) and path.read_bytes() == before


def test_captions_that_are_left_out_are_named(tmp_path):
    path = tmp_path / "rex.checkpoint"
    adapter, fresh = new_adapter(), new_adapter()
    train(adapter, other(captions="c1"), ALPHAS, toy_denoise(adapter), TrainConfig(steps=2), None, path)
    with pytest.raises(ConceptSplitError, match="a training with other captions:"):
        train(fresh, other(), ALPHAS, toy_denoise(fresh), TrainConfig(steps=4, resume=True), None, path)


def test_b14_another_rank_is_named(tmp_path):
    path = tmp_path / "rex.checkpoint"
    adapter = new_adapter()
    train(adapter, data(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=2), None, path)
    wide = new_adapter().with_info(alpha=1.0)
    with pytest.raises(ConceptSplitError, match=r"with alpha 2\.0 then and 1\.0 now"):
        train(wide, data(), ALPHAS, toy_denoise(wide), TrainConfig(steps=4, resume=True), None, path)


def test_another_kind_is_named(tmp_path):
    path = tmp_path / "rex.checkpoint"
    adapter = new_adapter()
    train(adapter, data(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=2), None, path)
    keys = new_adapter().with_info(kind="key")
    with pytest.raises(ConceptSplitError, match="with kind value then and key now"):
        train(keys, data(), ALPHAS, toy_denoise(keys), TrainConfig(steps=4, resume=True), None, path)


@pytest.mark.parametrize("continued", ["save_every", "sample_every", "gradient_checkpointing"])
def test_what_changes_nothing_may_differ(tmp_path, continued):
    path = tmp_path / "rex.checkpoint"
    adapter, fresh = new_adapter(), new_adapter()
    train(adapter, data(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=2), None, path)
    config = TrainConfig(steps=4, **{continued: 7 if continued.endswith("every") else True})
    assert len(train(fresh, data(), ALPHAS, toy_denoise(fresh), replace(config, resume=True), None, path).losses) == 4


def test_case_18_pictures_encoded_again_may_differ_in_the_last_bit(tmp_path):
    path = tmp_path / "rex.checkpoint"
    adapter = new_adapter()
    train(adapter, other(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=2), None, path)
    again = other()
    again.latents = torch.nextafter(again.latents, torch.tensor(9.0))
    fresh = new_adapter()
    result = train(fresh, again, ALPHAS, toy_denoise(fresh), TrainConfig(steps=4, resume=True), None, path)
    assert len(result.losses) == 4


def test_without_an_identity_the_latents_themselves_are_compared(tmp_path):
    path = tmp_path / "rex.checkpoint"
    adapter = new_adapter()
    train(adapter, data(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=2), None, path)
    with pytest.raises(ConceptSplitError, match="with other pictures:"):
        train(adapter, data(n=4), ALPHAS, toy_denoise(adapter), TrainConfig(steps=2, resume=True), None, path)


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    path = tmp_path / "rex.checkpoint"
    adapter = new_adapter()
    train(adapter, data(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=2), None, path)
    for content in (b"", b"xx", path.read_bytes()[:-40], b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(ConceptSplitError, match="not a readable training checkpoint"):
            train(new_adapter(), data(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=2, resume=True), None, path)


def test_b6_a_stop_hands_over_the_adapter_with_the_steps_it_was_trained_for():
    given = []

    def stop_at_three(event):
        if event.step == 3:
            raise Stop

    adapter, twin = new_adapter(), new_adapter()
    with pytest.raises(Stop):
        train(
            adapter, data(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=9), stop_at_three,
            on_stop=lambda result: given.append(result.trained()), stops=(Stop,),
        )  # fmt: skip
    train(twin, data(), ALPHAS, toy_denoise(twin), TrainConfig(steps=3))
    (stopped,) = given
    assert stopped.info.training["steps"] == 3
    assert all(torch.equal(a, b) for a, b in zip(stopped.parameters(), twin.parameters(), strict=True))
    assert not any(t.requires_grad for t in stopped.parameters())


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_stop_leaves_the_last_complete_step(tmp_path, done):
    path, adapter = tmp_path / "rex.checkpoint", new_adapter()
    inner, begun = toy_denoise(adapter), []

    def denoise(batch):
        begun.append(1)
        if len(begun) > done:
            raise Stop
        return inner(batch)

    with pytest.raises(Stop):
        train(adapter, data(), ALPHAS, denoise, TrainConfig(steps=9), None, path)
    assert path.exists() is (done > 0)
    resumed, whole = new_adapter(), new_adapter()
    result = train(resumed, data(), ALPHAS, toy_denoise(resumed), TrainConfig(steps=4, resume=True), None, path)
    train(whole, data(), ALPHAS, toy_denoise(whole), TrainConfig(steps=4))
    assert len(result.losses) == 4
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_b6_a_stop_before_anything_was_learned_hands_over_nothing():
    def stop(batch):
        raise Stop

    given = []
    with pytest.raises(Stop):
        train(new_adapter(), data(), ALPHAS, stop, TrainConfig(steps=9), on_stop=given.append, stops=(Stop,))
    assert not given


def test_b6_the_key_that_interrupts_is_a_stop_unless_others_are_named():
    def interrupt(event):
        if event.step == 2:
            raise KeyboardInterrupt

    given = []
    for stops in ({}, {"stops": (Stop,)}):
        adapter = new_adapter()
        with pytest.raises(KeyboardInterrupt):
            train(
                adapter,
                data(),
                ALPHAS,
                toy_denoise(adapter),
                TrainConfig(steps=9),
                interrupt,
                on_stop=given.append,
                **stops,
            )
    assert [len(result.losses) for result in given] == [2]


def test_b6_a_fault_is_no_stop():
    given = []
    with pytest.raises(ZeroDivisionError):
        adapter = new_adapter()
        broken = lambda event: 1 / (event.step - 2)
        train(adapter, data(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=9), broken, on_stop=given.append)
    assert not given


def test_b15_a_finished_adapter_is_kept_and_the_name_counts_up(tmp_path):
    path = tmp_path / "re.x.safetensors"
    fresh = training_files(path, resume=False)
    assert (fresh.adapter, fresh.state.name, fresh.notes) == (path, "re.x.checkpoint", ())
    path.touch()
    second = training_files(path, resume=False)
    assert (second.adapter.name, second.state.name) == ("re.x_2.safetensors", "re.x_2.checkpoint")
    assert second.notes == ("re.x.safetensors exists and is kept: this training is written to re.x_2.safetensors.",)
    (tmp_path / "re.x_2.safetensors").symlink_to(tmp_path / "nowhere")
    assert training_files(path, resume=False).adapter.name == "re.x_3.safetensors", "a dead link is a name in use"


def test_the_state_of_a_stopped_training_is_kept_and_resume_finds_it(tmp_path):
    """A training that was killed leaves a state and no adapter."""
    path, state = tmp_path / "re.x.safetensors", tmp_path / "re.x.checkpoint"
    state.write_bytes(b"hours of work")
    fresh = training_files(path, resume=False)
    assert (fresh.adapter.name, fresh.state.name) == ("re.x_2.safetensors", "re.x_2.checkpoint")
    assert fresh.notes == (
        "re.x.checkpoint holds a stopped training, which resume (terminal: --resume) goes on from: this one is written "
        "to re.x_2.safetensors.",
    )
    again = training_files(path, resume=True)
    assert (again.adapter, again.state, again.notes, again.replaces) == (path, state, (), False)


def test_an_adapter_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "rex.safetensors"
    path.touch()
    mine = training_files(path, resume=False)
    assert mine.adapter.name == "rex_2.safetensors" and mine.unless_taken() is mine
    mine.state.write_bytes(b"mine")
    mine.adapter.write_bytes(b"another's")
    other = mine.unless_taken()
    assert (other.adapter.name, other.state.read_bytes()) == ("rex_3.safetensors", b"mine") and not mine.state.exists()
    assert other.notes == (
        "rex_2.safetensors has been written by somebody else meanwhile and is kept: this training is written to "
        "rex_3.safetensors.",
    )
    other.adapter.write_bytes(b"written by its stop")
    resumed = training_files(path, resume=True)
    assert resumed.state == other.state and resumed.unless_taken() is resumed


def test_case_17_resume_takes_the_newest_state_and_says_when_there_is_none(tmp_path):
    path = tmp_path / "rex.safetensors"
    none = training_files(path, resume=True)
    assert none.adapter == path
    assert none.notes == (
        "There is no stopped training to resume (rex.checkpoint): this one starts from the beginning.",
    )
    for name in ("rex.safetensors", "rex_2.safetensors", "rex.checkpoint", "rex_2.checkpoint"):
        (tmp_path / name).touch()
    found = training_files(path, resume=True)
    assert (found.adapter.name, found.state.name, found.notes) == ("rex_2.safetensors", "rex_2.checkpoint", ())
    (tmp_path / "rex_2.checkpoint").unlink()
    assert training_files(path, resume=True).adapter == path
    (tmp_path / "rex.checkpoint").unlink()
    assert len(training_files(path, resume=True).notes) == 2


def test_loss_that_is_not_finite_stops_with_step_named_and_checkpoint_kept(tmp_path):
    path, adapter = tmp_path / "state.safetensors", new_adapter()
    inner, calls = toy_denoise(adapter), []

    def explode(batch):
        calls.append(1)
        return inner(batch) * (float("nan") if len(calls) == 6 else 1.0)

    with pytest.raises(ConceptSplitError, match="not finite at step 6"):
        train(adapter, data(), ALPHAS, explode, TrainConfig(steps=9, save_every=2), None, path)
    again = new_adapter()
    result = train(
        again, data(), ALPHAS, toy_denoise(again), TrainConfig(steps=9, save_every=2, resume=True), None, path
    )
    assert len(result.losses) == 9
    assert all(torch.isfinite(t).all() for t in again.parameters())


def test_a_damaged_checkpoint_is_refused_whole_and_left_as_it_is(tmp_path):
    """Each of these once ended in another exception, or went on from a state that was never saved."""
    import struct

    from safetensors.torch import load_file, save

    path = tmp_path / "x.checkpoint"
    config = TrainConfig(steps=3, batch_size=2)
    adapter = new_adapter()
    train(adapter, data(), ALPHAS, toy_denoise(adapter), config, checkpoint=path)
    good = path.read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    facts = json.loads(good[8 : 8 + size])["__metadata__"]

    def header(text):
        return struct.pack("<Q", len(text)) + text

    def changed(**tensors):
        kept = {**load_file(path), **tensors}
        return save({k: v.contiguous() for k, v in kept.items() if v is not None}, metadata=facts)

    stored = load_file(path)
    spoilt = stored["exp_avg_sq0"].clone()
    spoilt.view(-1)[0] = -1.0
    damaged = {
        "deep header": header(b"[" * 100_000),
        "no facts": header(b'{"__metadata__":null}'),
        "facts of another kind": header(b'{"__metadata__":[1]}'),
        "no losses": changed(losses=None),
        "losses of another kind": changed(losses=torch.ones(3, dtype=torch.int64)),
        "one loss less": changed(losses=stored["losses"][:2]),
        "half a moment": changed(exp_avg_sq0=None),
        "no step": changed(step1=None),
        "a step before the first": changed(step0=torch.tensor(0.0)),
        "a step after the last": changed(step0=torch.tensor(4.0)),
        "steps of another kind": changed(step1=torch.tensor(3)),
        "no run": save(stored, metadata={k: v for k, v in facts.items() if k != "run"}),
        "a run of another kind": save(stored, metadata={**facts, "run": "[1]"}),
        "another format": save(stored, metadata={**facts, "format": "conceptsplit"}),
        "a table of losses": changed(losses=stored["losses"][:, None]),
        "a loss that is not finite": changed(losses=stored["losses"] * torch.tensor([1.0, math.nan, 1.0])),
        "moment of another shape": changed(exp_avg0=torch.zeros(1)),
        "impossible moment": changed(exp_avg_sq0=spoilt),
        "not finite": changed(p1=torch.full_like(stored["p1"], float("nan"))),
        "another precision": changed(p0=stored["p0"].half()),
        "far too large": good + bytes(65 * 2**20),
    }
    config = TrainConfig(steps=5, batch_size=2, resume=True)
    for name, content in damaged.items():
        path.write_bytes(content)
        adapter = new_adapter()
        before = [t.clone() for t in adapter.parameters()]
        with pytest.raises(ConceptSplitError, match="not a readable training checkpoint") as told:
            train(
                adapter,
                data(),
                ALPHAS,
                toy_denoise(adapter),
                TrainConfig(steps=5, batch_size=2, resume=True),
                None,
                path,
            )
        assert "\n" not in str(told.value), name
        assert path.read_bytes() == content, name
        assert all(torch.equal(x, y) for x, y in zip(before, adapter.parameters(), strict=True)), name


def test_the_state_is_written_every_so_many_steps_and_leaves_nothing_beside_it(tmp_path):
    path, there = tmp_path / "x.checkpoint", []
    adapter = new_adapter()
    config = TrainConfig(steps=5, batch_size=2, save_every=3)
    train(adapter, data(), ALPHAS, toy_denoise(adapter), config, lambda event: there.append(path.exists()), path)
    assert there == [False, False, True, True, True]
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_without_resume_a_state_that_is_there_is_not_read(tmp_path):
    path = tmp_path / "x.checkpoint"
    losses = []
    for resume in (False, False, True):
        adapter = new_adapter()
        config = TrainConfig(steps=4, batch_size=2, resume=resume)
        result = train(adapter, data(), ALPHAS, toy_denoise(adapter), config, checkpoint=path)
        losses.append((len(result.losses), result.losses[0]))
    assert losses[0] == losses[1] == losses[2]
    adapter, seen = new_adapter(), []
    train(
        adapter,
        data(),
        ALPHAS,
        toy_denoise(adapter),
        TrainConfig(steps=6, batch_size=2, resume=False),
        seen.append,
        path,
    )
    assert [event.step for event in seen] == [1, 2, 3, 4, 5, 6]
    adapter = new_adapter()
    result = train(adapter, data(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=2, batch_size=2, resume=True))
    assert len(result.losses) == 2, "without a place for a state there is none to resume"


def test_a_state_is_as_large_as_its_tensors_and_losses_may_be(tmp_path, monkeypatch):
    """What is larger is not read at all, whatever it holds."""
    adapter, path = new_adapter(), tmp_path / "x.checkpoint"
    own = sum(parameter.nbytes for parameter in adapter.parameters())
    assert own == 2 * (6 + 4) * 4
    read = []
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(self.stat().st_size) or b"")
    path.touch()
    for size in (3 * own + 64 * 1024**2, 3 * own + 64 * 1024**2 + 1):
        os.truncate(path, size)
        with pytest.raises(ConceptSplitError, match="not a readable training checkpoint"):
            train(adapter, data(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=2, resume=True), None, path)
    assert read == [3 * own + 64 * 1024**2]


def test_a_state_that_cannot_be_read_says_why(tmp_path, monkeypatch):
    def broken(self):
        raise OSError(5, "Input/output error")

    path, adapter = tmp_path / "x.checkpoint", new_adapter()
    path.touch()
    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(ConceptSplitError, match=r"^Cannot read .*x\.checkpoint: Input/output error\.$"):
        train(adapter, data(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=2, resume=True), None, path)


def test_room_for_a_state_is_looked_for_once_and_only_where_one_will_be_written(tmp_path, monkeypatch):
    written, genuine = [], checkpoint.write_whole
    monkeypatch.setattr(
        checkpoint, "write_whole", lambda path, data: written.append((path.name, len(data))) or genuine(path, data)
    )
    adapter, path = new_adapter(), tmp_path / "x.checkpoint"
    config = TrainConfig(steps=3, batch_size=2, save_every=2)
    train(adapter, data(), ALPHAS, toy_denoise(adapter), config, None, path)
    names = [name for name, _ in written]
    assert names == ["x.checkpoint.probe", "x.checkpoint", "x.checkpoint"]
    assert written[0][1] == 3 * 2 * (6 + 4) * 4 + 4096 and not (tmp_path / "x.checkpoint.probe").exists()
    assert path.stat().st_size <= written[0][1], "a state of a few steps fits"
    written.clear()
    done = new_adapter()
    train(done, data(), ALPHAS, toy_denoise(done), replace(config, resume=True), None, path)
    assert not written, "nothing is left to do"
    other = new_adapter()
    train(other, data(), ALPHAS, toy_denoise(other), config, None, path, Process(1, 2))
    assert not written, "the first process writes for all"
    saved = new_adapter()
    train(saved, data(), ALPHAS, toy_denoise(saved), replace(config, steps=4), None, path)
    assert [name for name, _ in written] == ["x.checkpoint.probe", "x.checkpoint", "x.checkpoint"], "not once more"


def test_a_state_without_moments_is_continued_too(tmp_path):
    """Every step so far overflowed and moved nothing."""
    denoiser = overflowing(lambda step: step <= 3)
    path, part, rest, whole = tmp_path / "x.checkpoint", new_adapter(), new_adapter(), new_adapter()
    with pytest.raises(ConceptSplitError, match="ended after 2 steps"):
        train(part, data(), ALPHAS, denoiser(part), TrainConfig(steps=2), None, path)
    found = train(rest, data(), ALPHAS, denoiser(rest, 2), TrainConfig(steps=6, resume=True), None, path)
    wanted = train(whole, data(), ALPHAS, denoiser(whole), TrainConfig(steps=6))
    assert found.losses == wanted.losses
    assert all(torch.equal(a, b) for a, b in zip(rest.parameters(), whole.parameters(), strict=True))


def test_what_a_state_stores_of_its_training_is_read_by_every_later_version(tmp_path):
    """Other names would let a state of another training pass, or refuse those there are."""
    given, config, adapter = other(), TrainConfig(steps=2, seed=4, rank=3), new_adapter()
    facts = run_facts(adapter, given, config)
    assert facts.keys() == {"settings", "prompts", "layers", *IDENTITY} and facts["model"] == "m1"
    assert facts["settings"] == {**config.lasting, "rank": 2, "alpha": 2.0, "kind": "value"}
    assert facts["prompts"] == digest("p0", (2,), "p1", (3, 4)) and facts["layers"] == digest([(LAYER, (6, 4))])
    plain = data(masks=True)
    assert plain.identity == {"images": digest(plain.latents), "masks": digest(plain.masks)}
    path = tmp_path / "x.checkpoint"
    train(adapter, given, ALPHAS, toy_denoise(adapter), config, None, path)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    stored = header.pop("__metadata__")
    assert (stored["format"], stored["step"]) == ("conceptsplit.training", "2")
    assert json.loads(stored["run"]) == json.loads(json.dumps(facts))
    assert {name: one["dtype"] for name, one in header.items()} == {
        "losses": "F64", **{f"{kind}{i}": "F32" for kind in ("p", "step", "exp_avg", "exp_avg_sq") for i in (0, 1)},
    }  # fmt: skip
    assert differences({"layers": "y"}, {"layers": "x", "settings": {}, "new": 1}) == [
        "a model of another architecture", "another new",
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_up_to_five_differences_are_all_named(tmp_path, count):
    path, adapter = tmp_path / "x.checkpoint", new_adapter()
    train(adapter, data(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=2), checkpoint=path)
    changed = {"batch_size": 3, "seed": 9, "learning_rate": 0.5, "weight_decay": 0.3, "warmup": 5, "loss_scale": 2.0}
    settings = TrainConfig(steps=4, resume=True, **dict(list(changed.items())[:count]))
    with pytest.raises(ConceptSplitError) as raised:
        train(new_adapter(), data(), ALPHAS, toy_denoise(adapter), settings, checkpoint=path)
    named = str(raised.value).split(" belongs to a training with ")[1].split(": make them as they were")[0]
    before = TrainConfig()
    order = [name for name in before.lasting if name in list(changed)[:count]]
    said = [f"{name} {getattr(before, name)} then and {changed[name]} now" for name in order]
    if count > 5:
        said = [*said[:4], "2 settings more"]
    assert named == (", ".join(said[:-1]) + " and " + said[-1] if count > 1 else said[0])


@pytest.mark.parametrize(
    ("key", "named"),
    [("images", "other pictures"), ("size", "pictures of another size"), ("masks", "other masks"),
     ("prompts", "other prompts"), ("layers", "a model of another architecture"), ("model", "another model"),
     ("text encoder", "another text encoder"), ("vae", "another VAE"), ("captions", "other captions")],
)  # fmt: skip
def test_what_only_one_of_two_trainings_knows_differs(key, named):
    for stored, now in (({key: "a"}, {}), ({}, {key: "a"}), ({key: "a"}, {key: "b"})):
        assert differences(stored, {"settings": {}, **now}) == [named]
    assert differences({key: "a"}, {"settings": {}, key: "a"}) == []


def test_many_differences_are_counted():
    now = {"settings": {f"option{n}": 1 for n in range(7)}, "layers": "x"}
    assert differences({"settings": {}}, now)[:2] == ["a model of another architecture", "option0 None then and 1 now"]
    assert len(differences({}, now)) == 8 and differences(now, now) == []


def test_a_refusal_names_four_differences_and_counts_the_others(tmp_path):
    path, adapter = tmp_path / "x.checkpoint", new_adapter()
    train(adapter, data(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=2, batch_size=2), checkpoint=path)
    other = TrainConfig(steps=4, batch_size=3, seed=9, learning_rate=0.5, weight_decay=0.3, warmup=5, max_grad_norm=9.0,
                        background_weight=0.7, resume=True)  # fmt: skip
    with pytest.raises(ConceptSplitError, match=r"training with .* and (\d+) settings more: make") as raised:
        train(new_adapter(), data(), ALPHAS, toy_denoise(adapter), other, checkpoint=path)
    assert str(raised.value).count(" then and ") == 4
    assert raised.match(r"and 3 settings more")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((torch.zeros(2, 3),), (torch.zeros(3, 2),)),
        ((torch.zeros(1), torch.zeros(1)), (torch.zeros(2),)),
        (("a", "b"), ("ab",)),
        ((None,), ("",)),
        ((b"x",), ("x",)),
    ],
)
def test_digests_tell_shapes_and_parts_apart(one, other):
    assert digest(*one) != digest(*other) and digest(*one) == digest(*one) and len(digest(*one)) == 32


def test_a_digest_is_that_of_shape_and_single_precision_values_bytes_and_text():
    """Version after version, or no stopped training could be continued by the next."""
    total = hashlib.sha256(b"(2, 1)" + np.array([0.5, -3], np.float32).tobytes() + b"\0\xffx\0'y'\0None\0(1, 2)\0")
    parts = (torch.tensor([[0.5], [-3.0]], dtype=torch.float64), b"\xffx", "y", None, (1, 2))
    assert digest(*parts) == total.hexdigest()[:32]
    half = np.array([0.1, 7.0], np.float16).tobytes() + b"b(1, 1)" + np.array([2], np.float16).tobytes()
    weights = [("a", torch.tensor([0.1, 7.0])), ("b", torch.tensor([[2.0]]))]
    assert weights_digest(weights) == hashlib.sha256(b"a(2,)" + half).hexdigest()[:32]


def test_weights_are_told_by_name_shape_and_values_but_not_by_precision():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 50, generator=g).half()
    own = weights_digest([("a", weight)])
    assert own == weights_digest([("a", weight.float())]) and len(own) == 32
    assert own != weights_digest([("b", weight)]) and own != weights_digest([("a", weight.t())])
    late = weight.clone()
    late.view(-1)[31 * 59] += 1  # every 31st of 2,000 values is looked at
    assert own != weights_digest([("a", late)])
    between = weight.clone()
    between.view(-1)[31 * 59 + 1] += 1
    assert own == weights_digest([("a", between)])
    small = torch.arange(5.0)
    assert weights_digest([("b", small)]) != weights_digest([("b", small + torch.tensor([0.0, 1, 0, 0, 0]))])
    assert weights_digest([("b", small)]) == weights_digest([("b", small.double().requires_grad_())])
