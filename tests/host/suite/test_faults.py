"""Faults: interrupts and exceptions in every pass, killed processes, full disks, read-only folders, unloaded models.

After each the model is bit-equal and bare of hooks, the next run gives what it gave before, old files are whole, and
a training can be resumed. Counted per kind; `python -m tests.host.faults` runs more rounds and writes the counts to
tests/host/results.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import REPO, pack, run
from .helpers import apply, encode, hooks_on, make_adapter, same_weights, sample, sample_loda, weights
from .test_http import Program
from .test_training import PlainVAE, equal, train

LONG = bool(os.environ.get("CONCEPTSPLIT_LONG"))
RESULT = os.environ.get("CONCEPTSPLIT_FAULTS")
INJECTED: Counter[str] = Counter()

LODA = {"steps": 4, "loda_steps": 2, "loda_iterations": 2}


@pytest.fixture(scope="module", autouse=True)
def _counts():
    yield
    if RESULT:
        Path(RESULT).write_text(json.dumps(dict(sorted(INJECTED.items())), indent=1) + "\n")


@pytest.fixture(autouse=True)
def _heard_at_each_step():
    """As main.py does: the host hears the stop button when a step reports its progress. 0.3.64 hears it only there."""
    import comfy.model_management
    import comfy.utils

    hear = lambda *_, **__: comfy.model_management.throw_exception_if_processing_interrupted()
    comfy.utils.set_progress_bar_global_hook(hear)
    yield
    comfy.utils.set_progress_bar_global_hook(None)


@pytest.fixture
def sd(loaded):
    return loaded("tiny")


@pytest.fixture
def marked(sd):
    return sd.model, run("ConceptSplitMarkWords", clip=sd.clip, words="dog, cat")[0]


def two(clip):
    return encode(clip, "a photo of a dog and a cat"), encode(clip, "blurry")


# What a fault is ------------------------------------------------------------------------------------------------------


class Broken(RuntimeError):
    """Thrown on purpose."""


def stop_button() -> None:
    import comfy.model_management

    comfy.model_management.interrupt_current_processing(True)


def interrupted() -> None:
    import comfy.model_management

    stop_button()
    comfy.model_management.throw_exception_if_processing_interrupted()


def broken() -> None:
    raise Broken("broken on purpose")


def out_of_memory() -> None:
    import comfy.model_management

    raise comfy.model_management.OOM_EXCEPTION("out of memory on purpose")


FAULTS: dict[str, Callable[[], None]] = {
    "exception": broken,
    "out of memory": out_of_memory,
    "interrupt at once": interrupted,
    "interrupt heard later": stop_button,
}


def faulty() -> tuple[type[BaseException], ...]:
    import comfy.model_management as mm

    return Broken, mm.OOM_EXCEPTION, mm.InterruptProcessingException


@contextmanager
def passes(model: Any, where: str, act: Callable[[int, str], None]) -> Iterator[None]:
    """Calls `act(number, phase)` in every pass through the UNet of `model`, numbered from 1.

    where: 'start' before its first block, 'attention' within its first cross-attention, while our hooks are in force,
    'backward' when the gradient comes back to its first block.
    """
    unet = model.model.diffusion_model
    key = pack("conceptsplit_core.hosts.comfy.model").KEY
    state = {"phase": "", "number": 0}

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        run = kwargs.get("transformer_options", {}).get(key)
        if run is None:
            state["phase"] = "training step" if torch.is_grad_enabled() else "plain step"
        elif run.reading is not None:
            state["phase"] = "LODA update" if run.gradient else "AFG map reading"
        else:
            state["phase"] = "plain step" if run.regions is None else "step under AFG"

    def hit() -> None:
        state["number"] += 1
        act(state["number"], state["phase"])

    def on_output(module: Any, args: Any, output: Any) -> None:
        if torch.is_tensor(output) and output.requires_grad:
            output.register_hook(lambda gradient: hit())

    handles = [unet.register_forward_pre_hook(begin, with_kwargs=True)]
    if where == "start":
        handles.append(unet.input_blocks[1][0].register_forward_pre_hook(lambda *_: hit()))
    elif where == "attention":
        attention = unet.input_blocks[1][1].transformer_blocks[0].attn2
        handles.append(attention.to_q.register_forward_hook(lambda *_: hit()))
    else:
        # The last block that every gradient passes: with adapters only, what lies before the first has none.
        attention = unet.input_blocks[1][1].transformer_blocks[0].attn2
        handles.append(attention.to_out.register_forward_hook(on_output))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def phases_of(model: Any, where: str, work: Callable[[], Any]) -> list[str]:
    """The phase of every pass of one undisturbed run."""
    seen: list[str] = []
    with passes(model, where, lambda number, phase: seen.append(phase)):
        work()
    return seen


@contextmanager
def clean(model: Any) -> Iterator[None]:
    """Whatever happens inside: the model's weights, hooks, options and blocks are as they were."""
    import comfy.model_management as mm

    kept, hooks, options = weights(model), hooks_on(model), repr(sorted(model.model_options))
    yield
    mm.interrupt_current_processing(False)
    assert same_weights(kept, model) and hooks_on(model) == hooks == 0
    assert repr(sorted(model.model_options)) == options and not model.model_options["transformer_options"]
    assert not any("forward" in vars(module) for module in model.model.modules())


def expect(work: Callable[[], Any], late: bool = False) -> BaseException | None:
    """The error that ended `work`; only an interrupt that came too late to be heard may leave it without one."""
    try:
        work()
    except faulty() as error:
        return error
    assert late, "the fault did not reach the user"
    return None


# Sampling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["start", "attention", "backward"])
@pytest.mark.parametrize("fault", FAULTS if LONG else ["exception", "interrupt heard later"])
def test_a_fault_in_every_pass_of_a_loda_run(marked, where, fault):
    """The k-th call of the UNet fails, for every k of a run: LODA's updates, AFG's reading, steps with and without."""
    model, clip = marked
    conds = two(clip)
    work = lambda: sample_loda(model, *conds, **LODA)
    before, _ = work()
    phases = phases_of(model, where, work)
    if where == "backward":
        assert phases == ["LODA update"] * 4
    else:
        assert {*phases} == {"LODA update", "plain step", "AFG map reading", "step under AFG"} and len(phases) == 9
    for k, phase in enumerate(phases, 1):
        with clean(model), passes(model, where, lambda number, _, k=k: FAULTS[fault]() if number == k else None):
            # The host hears the stop button between steps: pressed in the last one, the run is over first.
            expect(work, late=fault == "interrupt heard later" and k == len(phases))
        INJECTED[f"sampling, {phase}, {where}: {fault}"] += 1
        if k % 3 == 0 or k == len(phases) or LONG:
            assert torch.equal(work()[0], before)
    assert torch.equal(work()[0], before)


def test_faults_with_adapters_and_a_batch(sd):
    model, clip = apply(sd.model, sd.clip, make_adapter(sd.model, "rex", "dog"))
    model, clip = apply(model, clip, make_adapter(sd.model, "tom", "cat", seed=9))
    conds = encode(clip, "a <rex> and a <tom>"), encode(clip, "")
    work = lambda: sample_loda(model, *conds, {"samples": torch.zeros(2, 4, 8, 8)}, **LODA)
    before, plain = work()[0], sample(sd.model, *conds)
    for k, phase in enumerate(phases_of(sd.model, "attention", work), 1):
        # The clones share the host's model: it is the one that must stay clean.
        with clean(sd.model), passes(sd.model, "attention", lambda number, _, k=k: broken() if number == k else None):
            assert isinstance(expect(work), Broken)
        INJECTED[f"sampling with adapters, {phase}, attention: exception"] += 1
    assert torch.equal(work()[0], before) and torch.equal(sample(sd.model, *conds), plain)


@pytest.mark.parametrize("when", ["before", "between", "after freeing"])
def test_model_unloaded_between(marked, when, sd):
    """The host may unload a model between any two nodes; what comes next is the same to the bit."""
    import comfy.model_management as mm

    model, clip = apply(marked[0], marked[1], make_adapter(marked[0]))
    conds = encode(clip, "a <rex> and a cat"), encode(clip, "")
    before, _ = sample_loda(model, *conds, **LODA)
    first, *_ = train(sd, file_name="faults/unloaded")
    for work, wanted in ((lambda: sample_loda(model, *conds, **LODA)[0], before), (None, first)):
        if when != "before":
            sample(sd.model, *conds)
        with torch.inference_mode():
            mm.unload_all_models() if when != "after freeing" else mm.free_memory(1e30, sd.model.load_device)
        INJECTED["model unloaded between"] += 1
        if work is not None:
            assert torch.equal(work(), wanted)
        else:
            assert equal(train(sd, file_name="faults/unloaded")[0], wanted)


# Training -------------------------------------------------------------------------------------------------------------


def resumable(sd: Any, name: str, wanted: Any, **options: Any) -> None:
    """A training that a fault ended, resumed, gives the adapter of an undisturbed one."""
    adapter, *_ = train(sd, file_name=name, resume=True, **options)
    assert equal(adapter, wanted)
    folder = Path(pack("conceptsplit_core.hosts.comfy.files").new_path(name)).parent
    assert not list(folder.glob(".*")) and not list(folder.glob("*.probe")), "temporary files stayed"


@pytest.mark.parametrize(
    "fault, checkpointing",
    [("exception", False), ("interrupt heard later", True)]
    if not LONG
    else [(fault, checkpointing) for fault in FAULTS for checkpointing in (False, True)],
)
@pytest.mark.parametrize("where", ["start", "attention", "backward"])
def test_a_fault_in_every_pass_of_a_training(sd, where, fault, checkpointing):
    options = {"steps": 3, "save_every": 1, "gradient_checkpointing": checkpointing}
    name = f"faults/{where} {fault} {checkpointing}"
    work = lambda: train(sd, file_name=name, **options)
    whole, *_ = work()
    phases = phases_of(sd.model, where, work)
    assert set(phases) == {"training step"} and len(phases) >= 3
    path = pack("conceptsplit_core.hosts.comfy.files").new_path(name).with_suffix(".checkpoint")
    for k in range(1, len(phases) + 1):
        path.unlink(missing_ok=True)
        with clean(sd.model), passes(sd.model, where, lambda number, _, k=k: FAULTS[fault]() if number == k else None):
            expect(work)
        INJECTED[f"training step, {where}: {fault}"] += 1
        resumable(sd, name, whole, **options)


class FaultyVAE(PlainVAE):
    """Fails while the k-th picture is encoded or decoded."""

    def __init__(self, act: Callable[[], None], at: int):
        self.act, self.at, self.calls = act, at, 0

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            self.act()

    def encode(self, pixels):
        self._count()
        return super().encode(pixels)

    def decode(self, latents):
        self._count()
        return latents[:, :3].movedim(1, -1).repeat_interleave(8, 1).repeat_interleave(8, 2)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_while_pictures_and_text_are_encoded(sd, fault):
    whole, *_ = train(sd, file_name="faults/encoding")
    for k in (1, 2, 3):
        vae = FaultyVAE(FAULTS[fault], k)
        with clean(sd.model):
            expect(lambda vae=vae: train(sd, vae=vae, file_name="faults/encoding"))
        assert vae.calls == k, "the stop button must be heard before the next picture"
        INJECTED[f"encoding pictures: {fault}"] += 1
    text = sd.clip.cond_stage_model
    for k in (1, 2):
        calls: list[int] = []
        texts = f"a {{}} and {fault} {k}\nthe {{}} and {fault} {k}"  # new ones: what was encoded before is remembered

        def fail(*_, k=k, calls=calls):
            calls.append(1)
            if len(calls) == k:
                FAULTS[fault]()

        handle = next(m for m in text.modules() if "CLIPTextModel" in type(m).__name__).register_forward_pre_hook(fail)
        try:
            with clean(sd.model):
                expect(lambda texts=texts: train(sd, templates=texts, file_name="faults/encoding"))
        finally:
            handle.remove()
        assert len(calls) == k
        INJECTED[f"encoding text: {fault}"] += 1
    assert equal(train(sd, file_name="faults/encoding")[0], whole)


@pytest.mark.parametrize("fault", ["exception", "interrupt at once"] if LONG else ["exception"])
def test_a_fault_while_a_sample_picture_is_drawn(sd, fault):
    """In the middle of a training the host samples and decodes: a fault there ends the training, resumably."""
    options = {"steps": 3, "sample_every": 2, "save_every": 0, "learning_rate": 1e-3}
    draw = lambda **more: train(sd, vae=FaultyVAE(lambda: None, 0), **{**options, **more})
    whole, *_ = draw(file_name="faults/drawn")
    total = phases_of(sd.model, "start", lambda: draw(file_name="faults/drawn"))
    drawing = [k for k, phase in enumerate(total, 1) if phase != "training step"]
    assert len(drawing) == 40, "two pictures of 20 steps"
    chosen = drawing if LONG else drawing[:1] + drawing[13:14] + drawing[-1:]
    for k in chosen:
        name = f"faults/drawn {fault} {k}"
        with (
            clean(sd.model),
            passes(sd.model, "start", lambda number, _, k=k: FAULTS[fault]() if number == k else None),
        ):
            expect(lambda name=name: draw(file_name=name))
        INJECTED[f"sample picture in training: {fault}"] += 1
        resumable(sd, name, whole, **{**options, "vae": FaultyVAE(lambda: None, 0)})
    with clean(sd.model):
        expect(lambda: train(sd, vae=FaultyVAE(FAULTS[fault], 4), file_name="faults/decoded", **options))
    INJECTED[f"sample picture in training: {fault}"] += 1
    resumable(sd, "faults/decoded", whole, **{**options, "vae": FaultyVAE(lambda: None, 0)})


# Files ----------------------------------------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


WRITING = ["os.open", "os.fdopen", "os.fsync", "os.replace"]


@pytest.mark.parametrize("call", WRITING)
@pytest.mark.parametrize("kind", ["full disk", "interrupt"])
def test_a_fault_in_each_part_of_writing_an_adapter(sd, base, monkeypatch, call, kind):
    errors = pack("conceptsplit_core.errors")
    old, new = make_adapter(sd.model, seed=1), make_adapter(sd.model, seed=2)
    save = lambda adapter: run("ConceptSplitSave", value_adapter=adapter, file_name="faults/written")
    save(old)
    path = base / "models" / "value_adapters" / "faults" / "written.safetensors"
    kept, names = path.read_bytes(), sorted(p.name for p in path.parent.iterdir())
    module, _, name = call.partition(".")
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules[module], name, full if kind == "full disk" else lambda *_, **__: interrupted())
        with pytest.raises((errors.ConceptSplitError, *faulty())) as told:
            save(new)
    if kind == "full disk":
        assert "Cannot write" in str(told.value) and "\n" not in str(told.value)
    INJECTED[f"writing an adapter, {call}: {kind}"] += 1
    assert path.read_bytes() == kept
    # A file handle that was never handed over leaves its temporary file only where the unlink itself is impossible.
    assert sorted(p.name for p in path.parent.iterdir()) == names


@pytest.mark.parametrize("call", WRITING)
def test_a_fault_while_a_training_saves(sd, base, monkeypatch, call):
    """At the first checkpoint, at the second, and when only the finished adapter fails to be written."""
    errors = pack("conceptsplit_core.errors")
    module, _, name = call.partition(".")
    genuine = getattr(sys.modules[module], name)
    options = {"steps": 4, "save_every": 1}
    whole, *_ = train(sd, file_name="faults/saved", **options)
    folder = base / "models" / "value_adapters" / "faults"
    old = (folder / "saved.safetensors").read_bytes()
    for good in (1, 2, 5):  # writings that succeed first: the probe, checkpoints; 5 leaves the adapter file only
        calls = 0

        def failing(*args, good=good, **kwargs):
            nonlocal calls
            # open and fdopen are the host's and torch's too: only our folder counts.
            calls += 1
            return genuine(*args, **kwargs) if calls <= good else full()

        (folder / "saved.checkpoint").unlink(missing_ok=True)
        with monkeypatch.context() as patched, clean(sd.model):
            patched.setattr(sys.modules[module], name, failing)
            with pytest.raises(errors.ConceptSplitError, match="Cannot write"):
                train(sd, file_name="faults/saved", **options)
        assert calls > good
        INJECTED[f"saving while training, {call}: full disk"] += 1
        assert (folder / "saved.safetensors").read_bytes() == old
        resumable(sd, "faults/saved", whole, **options)
        old = (folder / "saved.safetensors").read_bytes()


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """A file system of its own at `folder`; gives a function that remounts it ('ro', 'rw')."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    remount = lambda mode: subprocess.run(["mount", "-o", f"remount,{mode}", str(folder)], check=True)
    try:
        yield remount
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: the write itself fails half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def can_mount() -> bool:
    """Whether this machine lets us make a small disk; root in a container may not."""
    import tempfile

    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode == 0
        if made:
            subprocess.run(["umount", folder], check=True)
    return made


DISKS = ["file size limit", *(["full disk", "read-only disk"] if can_mount() else [])]


@pytest.mark.parametrize("disk", DISKS)
def test_no_room(sd, base, disk):
    """Old files survive, nothing half is left, training says so before its first step and runs once there is room."""
    errors = pack("conceptsplit_core.errors")
    folder = base / "models" / "value_adapters" / f"room {disk}"
    old, new = make_adapter(sd.model, seed=1), make_adapter(sd.model, seed=2)
    size = pack("conceptsplit_core.adapters").adapter_bytes(old)
    name = f"room {disk}/rex"

    @contextmanager
    def no_room() -> Iterator[None]:
        if disk == "file size limit":
            with file_limit(len(size) // 2):
                yield
        elif disk == "full disk":
            filler = folder / "filler"
            with filler.open("wb") as stream:
                try:
                    while True:
                        os.write(stream.fileno(), bytes(4096))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
            try:
                yield
            finally:
                filler.unlink()
        else:
            remount("ro")
            try:
                yield
            finally:
                remount("rw")

    def attempts() -> None:
        run("ConceptSplitSave", value_adapter=old, file_name=name)
        kept = (folder / "rex.safetensors").read_bytes()
        with no_room():
            names = sorted(p.name for p in folder.iterdir())
            with pytest.raises(errors.ConceptSplitError, match="Cannot write") as told:
                run("ConceptSplitSave", value_adapter=new, file_name=name)
            assert "\n" not in str(told.value)
            steps: list[str] = []
            counted = passes(sd.model, "start", lambda _, phase: steps.append(phase))
            with counted, pytest.raises(errors.ConceptSplitError, match="Cannot write"):
                train(sd, file_name=name)
            assert not steps, "told before the first step"
            assert sorted(p.name for p in folder.iterdir()) == names
            assert (folder / "rex.safetensors").read_bytes() == kept
        INJECTED[f"{disk}: adapter"] += 1
        INJECTED[f"{disk}: before training"] += 1
        whole, *_ = train(sd, file_name=name)
        # The room goes while it trains: after the second step.
        kept = (folder / "rex.safetensors").read_bytes()
        with clean(sd.model):
            entered = no_room()

            def lose(number: int, _: str) -> None:
                if number == 3:
                    entered.__enter__()

            try:
                with passes(sd.model, "start", lose), pytest.raises(errors.ConceptSplitError, match="Cannot write"):
                    train(sd, file_name=name, save_every=1)
            finally:
                entered.__exit__(None, None, None)
        INJECTED[f"{disk}: while training"] += 1
        assert (folder / "rex.safetensors").read_bytes() == kept
        resumable(sd, name, whole)

    if disk == "file size limit":
        attempts()
    else:
        with small_disk(folder, 8 * len(size) + 2**20) as remount:
            attempts()


def test_a_file_in_place_of_a_folder(sd, base):
    errors = pack("conceptsplit_core.errors")
    (base / "models" / "value_adapters" / "taken").write_bytes(b"a file")
    for work in (
        lambda: run("ConceptSplitSave", value_adapter=make_adapter(sd.model), file_name="taken/rex"),
        lambda: train(sd, file_name="taken/rex"),
    ):
        with clean(sd.model), pytest.raises(errors.ConceptSplitError, match="Cannot write") as told:
            work()
        assert "\n" not in str(told.value)
        INJECTED["a file in place of a folder"] += 1
    assert (base / "models" / "value_adapters" / "taken").read_bytes() == b"a file"


@pytest.mark.parametrize(
    "kind, rounds",
    [("adapter", 300 if LONG else 15), ("training", 300 if LONG else 15), ("rivals", 200 if LONG else 15)],
)
def test_killed_while_writing(tmp_path, kind, rounds):
    """kill -9 at random moments; see killed.py."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), kind, str(tmp_path), "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert not told["faults"] and done.returncode == 0
    if kind == "rivals":
        INJECTED["two processes writing one name: writings"] += told["rounds"]
        assert told["versions seen"] > 1
    else:
        INJECTED[f"kill -9, {kind}"] += told["rounds"]
        INJECTED[f"kill -9, {kind}: of these inside a write"] += told["inside a write"]
        assert told["inside a write"] or not LONG


# The whole program ----------------------------------------------------------------------------------------------------


def training_prompt(name: str, steps: int, **more: Any) -> dict[str, Any]:
    """The training workflow, small, without the pictures after it."""
    prompt = json.loads((REPO / "tests" / "workflows_api" / "Train a concept.json").read_text())
    (key,) = [key for key, node in prompt.items() if node["class_type"] == "ConceptSplitTrain"]
    basic = {"seed": more.pop("seed")} if "seed" in more else {}
    prompt[key]["inputs"] |= {"file_name": name, "steps": steps, "batch_size": 1, "options": ["options", 0], **basic}
    prompt["options"] = {"class_type": "ConceptSplitTrainOptions", "inputs": {"save_every": 1, **more}}
    needed = {key, *(link[0] for link in prompt[key]["inputs"].values() if isinstance(link, list))}
    return {k: node for k, node in prompt.items() if k in needed}


def loading_prompt(name: str, seed: int) -> dict[str, Any]:
    """Loads a file and draws one picture with it."""
    prompt = json.loads((REPO / "tests" / "workflows_api" / "Train a concept.json").read_text())
    kinds = {node["class_type"]: key for key, node in prompt.items() if node["class_type"] != "SaveImage"}
    (saved,) = (key for key, node in prompt.items() if node["inputs"].get("images") == [kinds["VAEDecode"], 0])
    prompt[kinds["ConceptSplitApply"]] = {
        "class_type": "ConceptSplitLoader",
        "inputs": {
            "model": ["1", 0],
            "clip": ["1", 1],
            "adapter": f"{name}.safetensors",
            "concept_name": "",
            "strength": 1.0,
        },
    }
    prompt[kinds["EmptyLatentImage"]]["inputs"]["batch_size"] = 1
    prompt[kinds["KSampler"]]["inputs"] |= {"seed": seed, "steps": 4}
    left = ("ConceptSplitDemoImages", "ConceptSplitTrain", "PreviewImage")
    return {key: node for key, node in prompt.items() if key == saved or node["class_type"] not in (*left, "SaveImage")}


def picture(program: Program, entry: dict[str, Any]) -> bytes:
    """Pixels of the one picture a prompt saved."""
    import io

    import numpy as np
    from PIL import Image

    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    (image,) = [image for out in entry["outputs"].values() for image in out.get("images", ())]
    query = f"filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
    return np.asarray(Image.open(io.BytesIO(program.get(f"/view?{query}")))).tobytes()


def wait_for(program: Program, prompt_id: str) -> dict[str, Any]:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        history = json.loads(program.get(f"/history/{prompt_id}"))
        if prompt_id in history:
            return history[prompt_id]
        time.sleep(0.1)
    raise AssertionError(f"prompt {prompt_id} did not end:\n{program.tail()}")


def test_two_prompts_at_once_a_killed_server_and_a_restart(tmp_path):
    """Over HTTP: prompts queued together do not meet; a server killed while training is started again, what was
    trained before loads to the same picture, and the killed training resumes to the adapter of an undisturbed one."""
    adapters = pack("conceptsplit_core.adapters")
    program = Program(tmp_path / "base")
    folder = tmp_path / "base" / "models" / "value_adapters"
    try:
        assert program.run(training_prompt("whole", 5))["status"]["status_str"] == "success"
        first = picture(program, program.run(loading_prompt("whole", 1)))
        queued = [program.post("/prompt", {"prompt": loading_prompt("whole", seed)}) for seed in (2, 3, 4)]
        together = [picture(program, wait_for(program, one["prompt_id"])) for one in queued]
        assert len({first, *together}) == 4
        INJECTED["prompts queued at once"] += 3
        # Two trainings of one name, queued together: one after the other, and each has a file.
        queued = [program.post("/prompt", {"prompt": training_prompt("twice", 3, seed=seed)}) for seed in (1, 2)]
        assert all(wait_for(program, one["prompt_id"])["status"]["status_str"] == "success" for one in queued)
        seeds = [adapters.load_adapter(folder / f"{n}.safetensors").info.training["seed"] for n in ("twice", "twice_2")]
        assert seeds == [1, 2]
        INJECTED["trainings of one name queued at once"] += 2

        program.post("/prompt", {"prompt": training_prompt("cut", 100000)})
        end = time.monotonic() + 120
        while not (folder / "cut.checkpoint").is_file() and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.5)
        program.kill()
        INJECTED["server killed while training"] += 1
        assert not (folder / "cut.safetensors").exists()
        header = (folder / "cut.checkpoint").read_bytes()
        size = int.from_bytes(header[:8], "little")
        done = int(json.loads(header[8 : 8 + size])["__metadata__"]["step"])
        assert done >= 1

        program.start()
        INJECTED["server restarted between train and load"] += 1
        # A new process has nothing cached: these are drawn again, one by one.
        assert [picture(program, program.run(loading_prompt("whole", seed))) for seed in (1, 2, 3, 4)] == [
            first,
            *together,
        ]
        for name, resume in (("cut", True), ("undisturbed", False)):
            entry = program.run(training_prompt(name, done + 2, resume=resume))
            assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
        cut, undisturbed = (adapters.load_adapter(folder / f"{name}.safetensors") for name in ("cut", "undisturbed"))
        assert equal(cut, undisturbed)
    finally:
        program.stop()
