"""Many prompts of mixed kinds in one server over HTTP: `python -m tests.host.soak`.

Boots each ComfyUI (hosts as in tests.host.run) with its own folders and sends it 200 prompts: training, loading,
applying, LODA on and off, words only, previews, the guider, interrupts, model unloading and bad inputs, in an order
drawn from a seed. Asked: two pictures, one with and one without LODA, are bit-equal whenever they are drawn again;
the model's weights are bit-equal and bare of hooks after every prompt; bad inputs answer in one sentence; memory stays
flat. Writes tests/host/results/soak-<version>.json.

Two kinds of memory are written down. *in use* is what the C library has handed out: a leak shows there. *rss* is
resident memory as the system reports it, with what the C library keeps for later. It rises in steps of 25 to 40 MiB
when a large tensor no longer fits into the room between small ones; nothing more is in use after such a step.

    python -m tests.host.soak                   200 prompts on every host
    python -m tests.host.soak --prompts 12      a short one; writes nothing
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .run import NO_HOST, REPO, find_hosts, run_module, version

RESULTS = Path(__file__).resolve().parent / "results"
WARM_UP = 0.25  # share of the prompts after which memory is measured
# What memory may grow by after the warm-up, per 100 prompts. The allocator's own noise was 1 to 4 MiB.
GROWTH_MIB, IN_USE_MIB = 8.0, 1.0

# A node that passes MODEL and CLIP on and reports what is on them. `nonce` makes the host run it, and all that follows
# it, again; otherwise the same prompt would come out of the host's cache.
PROBE = """
import ctypes, gc, hashlib, json
import torch

class MallocInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks",
                                                     "fsmblks", "uordblks", "fordblks", "keepcost")]

def in_use():
    # MiB that the C library has handed out; None where it does not tell.
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return None
    ask.restype = MallocInfo
    info = ask()
    return (info.uordblks + info.hblkhd) / 2**20

class SoakProbe:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",), "nonce": ("INT", {"default": 0, "max": 2**31})}}
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = ("MODEL", "CLIP"), "look", "test", True

    def look(self, model, clip, nonce):
        gc.collect()
        digest = hashlib.sha256()
        for key, value in sorted(model.model.state_dict().items()):
            digest.update(key.encode() + value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        modules = list(model.model.modules()) + list(clip.cond_stage_model.modules())
        told = {
            "weights": digest.hexdigest(),
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules),
            "replaced": sum("forward" in vars(m) for m in modules),
            "options": sorted(model.model_options.get("transformer_options", {})),
            "patches": len(model.patches),
            "gradients": sum(p.requires_grad or p.grad is not None for m in modules for p in m.parameters(False)),
            "in_use": in_use(),
            "runs": sum(type(o).__name__ in ("Run", "LodaSampler", "Capture") for o in gc.get_objects()),
        }
        return {"ui": {"told": [json.dumps(told)]}, "result": (model, clip)}

NODE_CLASS_MAPPINGS = {"SoakProbe": SoakProbe}
"""

Prompt = dict[str, Any]


class Graph:
    """A prompt in the making: demo checkpoint, probe, and what follows."""

    def __init__(self, nonce: int):
        self.prompt: Prompt = {}
        checkpoint = self.add("ConceptSplitDemoCheckpoint")
        self.model, self.clip, self.vae = ([checkpoint, i] for i in range(3))
        self.probe = self.add("SoakProbe", model=self.model, clip=self.clip, nonce=nonce)
        self.model, self.clip = [self.probe, 0], [self.probe, 1]

    def add(self, kind: str, **inputs: Any) -> str:
        key = str(len(self.prompt) + 1)
        self.prompt[key] = {"class_type": kind, "inputs": inputs}
        return key

    def load(self, adapter: str, name: str = "") -> None:
        key = self.add(
            "ConceptSplitLoader", model=self.model, clip=self.clip, adapter=adapter, concept_name=name, strength=1.0
        )
        self.model, self.clip = [key, 0], [key, 1]

    def train(self, name: str, steps: int = 3, **more: Any) -> str:
        pictures = self.add("ConceptSplitDemoImages", concept="bobo", count=2, seed=0)
        given = {
            "concept_name": "bobo", "class_word": [pictures, 1], "file_name": name, "steps": steps, "batch_size": 1,
            "learning_rate": 0.002, "rank": 4, "seed": 0, "templates": "a {}\na photo of a {}", "save_every": 2,
            "sample_every": 0,
        }  # fmt: skip
        inputs = {"model": self.model, "clip": self.clip, "vae": self.vae, "images": [pictures, 0], **given, **more}
        return self.add("ConceptSplitTrain", **self.optioned("ConceptSplitTrainOptions", TRAIN_OPTIONS, inputs))

    def optioned(self, kind: str, rare: set[str], inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a node, with those named in `rare` on its options node."""
        key = self.add(kind, **{name: value for name, value in inputs.items() if name in rare})
        return {**{name: value for name, value in inputs.items() if name not in rare}, "options": [key, 0]}

    def texts(self, text: str) -> tuple[list[Any], list[Any]]:
        return tuple([self.add("CLIPTextEncode", text=t, clip=self.clip), 0] for t in (text, ""))  # type: ignore[return-value]

    def sample(self, text: str, loda: dict[str, Any] | None = None, preview: bool = False, **more: Any) -> None:
        """A sampler, the decoder and a saved picture; with `preview` the attention sheets too."""
        positive, negative = self.texts(text)
        size = {"width": more.pop("width", 128), "height": 128, "batch_size": more.pop("batch", 1)}
        latent = [self.add("EmptyLatentImage", **size), 0]
        given = {
            "model": self.model, "positive": positive, "negative": negative, "latent_image": latent, "seed": 5,
            "steps": 6, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, **more,
        }  # fmt: skip
        if loda is None:
            key = self.add("KSampler", **given)
        else:
            loda = self.optioned("ConceptSplitLodaOptions", {"map_downscale"}, {**LODA, **loda})
            key = self.add("ConceptSplitKSampler", **given, **loda)
        picture = [self.add("VAEDecode", samples=[key, 0], vae=self.vae), 0]
        self.save(picture)
        if preview:
            sheets = self.add("ConceptSplitPreview", attention_maps=[key, 1], images=picture)
            self.save([sheets, 0])
            self.save([sheets, 1])

    def guided(self, text: str) -> None:
        positive, negative = self.texts(text)
        noise = self.add("RandomNoise", noise_seed=3)
        guider = self.add("ConceptSplitGuider", model=self.model, positive=positive, negative=negative, cfg=4.0, **LODA)
        sampler = self.add("KSamplerSelect", sampler_name="dpmpp_2m")
        sigmas = self.add("BasicScheduler", model=self.model, scheduler="karras", steps=6, denoise=1.0)
        latent = self.add("EmptyLatentImage", width=128, height=128, batch_size=1)
        inputs = {"noise": [noise, 0], "guider": [guider, 0], "sampler": [sampler, 0], "sigmas": [sigmas, 0]}
        key = self.add("SamplerCustomAdvanced", **inputs, latent_image=[latent, 0])
        self.save([self.add("VAEDecode", samples=[key, 0], vae=self.vae), 0])

    def save(self, picture: list[Any]) -> None:
        self.add("PreviewImage", images=picture)


TRAIN_OPTIONS = {"save_every", "resume", "gradient_checkpointing"}
LODA = {"loda_steps": 3, "loda_strength": 0.02, "afg": True, "loda_iterations": 2}
TWO, WORDS = "a <pixa> and a <nero>", "a red star and a blue heart"


def concepts(graph: Graph) -> Graph:
    graph.load("demo_pixa.safetensors")
    graph.load("demo_nero.safetensors")
    return graph


def marked(graph: Graph, words: str = "star, heart") -> Graph:
    graph.clip = [graph.add("ConceptSplitMarkWords", clip=graph.clip, words=words), 0]
    return graph


def stock(graph: Graph, rng: random.Random) -> None:
    graph.sample(WORDS, seed=rng.randrange(1000))


def loaded(graph: Graph, rng: random.Random) -> None:
    concepts(graph).sample(TWO, seed=rng.randrange(1000), batch=rng.choice([1, 2]))


def loda(graph: Graph, rng: random.Random) -> None:
    sampler = rng.choice(["euler", "dpmpp_2m", "uni_pc", "euler_ancestral", "ddim", "lcm"])
    scheduler = rng.choice(["normal", "karras", "beta"])
    cfg = rng.choice([1.0, 4.0])
    concepts(graph).sample(TWO, {}, True, sampler_name=sampler, scheduler=scheduler, cfg=cfg, seed=rng.randrange(1000))


SHAPES = [(batch, width) for batch in (1, 2) for width in (128, 192)]


def words_only(graph: Graph, rng: random.Random) -> None:
    batch, width = rng.choice(SHAPES)
    marked(graph).sample(WORDS, {"afg": rng.random() < 0.5}, True, batch=batch, width=width)


def switched_off(graph: Graph, rng: random.Random) -> None:
    concepts(graph).sample(TWO, {"loda_steps": 0}, seed=rng.randrange(1000))


def one_concept(graph: Graph, rng: random.Random) -> None:
    graph.load("demo_pixa.safetensors")
    graph.sample("a <pixa>", {}, seed=rng.randrange(1000))


def guider(graph: Graph, rng: random.Random) -> None:
    concepts(graph).guided(TWO)


def training(graph: Graph, rng: random.Random) -> None:
    """Trains, applies what was trained and draws with it."""
    key = graph.train("soak", seed=rng.randrange(1000), gradient_checkpointing=rng.random() < 0.3)
    applied = graph.add(
        "ConceptSplitApply", model=graph.model, clip=graph.clip, value_adapter=[key, 0], concept_name="", strength=1.0
    )
    graph.model, graph.clip = [applied, 0], [applied, 1]
    graph.sample("a <bobo>")


def no_maps(graph: Graph, rng: random.Random) -> None:
    """Without concepts: the preview says that there are no maps."""
    graph.sample(WORDS, {}, True, seed=rng.randrange(1000))


def trained_file(graph: Graph, rng: random.Random) -> None:
    graph.load("first.safetensors")
    graph.load("demo_nero.safetensors")
    graph.sample("a <bobo> and a <nero>", {}, seed=rng.randrange(1000))


def saved(graph: Graph, rng: random.Random) -> None:
    key = graph.train("soak", seed=1)
    graph.add("ConceptSplitSave", value_adapter=[key, 0], file_name="kept", reduce_rank=rng.choice([0, 2]))


GOOD: dict[str, Callable[[Graph, random.Random], None]] = {
    "stock KSampler": stock,
    "two concepts, KSampler": loaded,
    "two concepts, LODA and preview": loda,
    "words only, LODA and preview": words_only,
    "LODA switched off": switched_off,
    "one concept, LODA says so": one_concept,
    "preview without maps": no_maps,
    "guider": guider,
    "train, apply, sample": training,
    "file trained before": trained_file,
    "train and save": saved,
}


def bad_inputs() -> dict[str, tuple[Callable[[Graph], None], str]]:
    """What to build, and words of the one sentence that must answer."""

    def unknown_placeholder(g: Graph) -> None:
        concepts(g).sample("a <pixa> and a <nobody>", {})

    def twice(g: Graph) -> None:
        g.load("demo_pixa.safetensors")
        g.load("demo_pixa.safetensors")
        g.sample("a <pixa>")

    def broken_file(g: Graph) -> None:
        g.load("broken.safetensors")
        g.sample("a cat")

    def outside(g: Graph) -> None:
        g.train("../outside")

    def nan(g: Graph) -> None:
        g.train("soak", templates="no braces here")

    def no_word(g: Graph) -> None:
        g.train("soak", class_word=" ")

    def no_marks(g: Graph) -> None:
        marked(g, " , ").sample(WORDS)

    def no_such_level(g: Graph) -> None:
        marked(g).sample(WORDS, {"map_downscale": "8"})

    def other_resume(g: Graph) -> None:
        g.train("first", steps=4, seed=99, resume=True)

    return {
        "unknown placeholder": (unknown_placeholder, "nobody"),
        "a concept loaded twice": (twice, "loaded twice"),
        "broken adapter file": (broken_file, "broken.safetensors"),
        "file name outside the folder": (outside, "cannot be used"),
        "template without braces": (nan, "exactly one {}"),
        "empty class word": (no_word, "class word"),
        "no word to mark": (no_marks, "no word to mark"),
        "a level the model lacks": (no_such_level, "no cross-attention at 1/8"),
        "resuming another training": (other_resume, "belongs to a training with other images"),
    }


class Soak:
    """One server and what was seen of it."""

    def __init__(self, prompts: int, seed: int, minutes: float = 1e9):
        from .suite.test_http import Program

        self.prompts, self.rng = prompts, random.Random(seed)
        self.end = time.monotonic() + 60 * minutes
        self.folder = Path(tempfile.mkdtemp(prefix="conceptsplit-soak-"))
        nodes = self.folder / "base" / "custom_nodes"
        nodes.mkdir(parents=True)
        (nodes / "soak_probe.py").write_text(PROBE)
        self.program = Program(self.folder / "base", "--cache-classic")
        self.sent, self.nonce = 0, 0
        self.kinds: Counter[str] = Counter()
        self.memory: list[float] = []
        self.in_use: list[float] = []
        self.faults: list[str] = []
        self.wanted: dict[str, Any] = {}

    def close(self) -> None:
        self.program.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def graph(self) -> Graph:
        self.nonce += 1
        return Graph(self.nonce)

    def queue(self, graph: Graph) -> str:
        answer = self.program.post("/prompt", {"prompt": graph.prompt})
        assert not answer["node_errors"], answer["node_errors"]
        return answer["prompt_id"]

    def wait(self, prompt_id: str) -> dict[str, Any]:
        end = time.monotonic() + 600
        while time.monotonic() < end:
            history = json.loads(self.program.get(f"/history/{prompt_id}"))
            if prompt_id in history:
                return history[prompt_id]
            assert self.program.process.poll() is None, self.program.tail()
            time.sleep(0.05)
        raise AssertionError(f"a prompt did not end:\n{self.program.tail()}")

    def told(self, kind: str, what: str) -> None:
        self.faults.append(f"prompt {self.sent} ({kind}): {what}")
        print(self.faults[-1], flush=True)

    def look(self, kind: str, graph: Graph, entry: dict[str, Any]) -> None:
        """Counts a prompt that has ended, checks what the probe saw before it ran, and measures memory."""
        self.sent += 1
        self.kinds[kind] += 1
        seen = entry["outputs"].get(graph.probe, {}).get("told")
        if not seen:
            self.told(kind, "the probe did not run")
        else:
            found = json.loads(seen[0])
            if (in_use := found.pop("in_use")) is not None:
                self.in_use.append(in_use)
            # The runs of the prompt before may still be held by the host's cache; more would be a leak.
            if found.pop("runs") > 4:
                self.told(kind, "more than one run of the sampler is still in memory")
            if found != self.wanted.setdefault("probe", found):
                self.told(kind, f"the model is not as it was: {found}")
            if found["hooks"] or found["replaced"] or found["options"] or found["patches"] or found["gradients"]:
                self.told(kind, f"something stayed on the model: {found}")
        self.memory.append(resident(self.program.process.pid))
        if self.sent % 20 == 0:
            print(f"{self.sent}/{self.prompts}: {self.memory[-1]:.0f} MiB", flush=True)

    def good(self, kind: str, graph: Graph, prompt_id: str) -> dict[str, Any]:
        entry = self.wait(prompt_id)
        if entry["status"]["status_str"] != "success":
            self.told(kind, f"failed: {error_of(entry)}")
        self.look(kind, graph, entry)
        return entry

    def pictures(self, entry: dict[str, Any]) -> list[bytes]:
        """Pixels of every picture of a prompt, in the order of its nodes."""
        import io

        import numpy as np
        from PIL import Image

        found = []
        for _, out in sorted(entry["outputs"].items(), key=lambda item: int(item[0])):
            for image in out.get("images", []):
                query = f"filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
                found.append(np.asarray(Image.open(io.BytesIO(self.program.get(f"/view?{query}")))).tobytes())
        return found

    def reference(self) -> None:
        """The same two pictures, and one of a trained file, drawn again."""
        for name in ("reference, stock", "reference, LODA", "reference, trained file"):
            graph = self.graph()
            if name == "reference, stock":
                graph.sample(WORDS)
            elif name == "reference, LODA":
                concepts(graph).sample(TWO, {}, True)
            else:
                graph.load("first.safetensors")
                graph.sample("a <bobo>")
            entry = self.good(name, graph, self.queue(graph))
            found = self.pictures(entry)
            if not found or found != self.wanted.setdefault(name, found):
                self.told(name, "another picture than at the start")

    def stopped(self, kind: str) -> None:
        """The stop button in the middle of a run."""
        graph = self.graph()
        if kind == "interrupt, training":
            graph.train("stopped", 100000)
        else:
            concepts(graph).sample(TWO, {"loda_steps": 100, "loda_iterations": 50}, steps=1000)
        prompt_id = self.queue(graph)
        while not json.loads(self.program.get("/queue"))["queue_running"]:
            time.sleep(0.02)
        # At any moment of loading, encoding, the first steps; pressed again until heard, as a user does.
        time.sleep(self.rng.uniform(0.0, 1.5))
        began = time.monotonic()
        while not json.loads(self.program.get(f"/history/{prompt_id}")):
            self.program.post("/interrupt", {})
            time.sleep(0.3)
            if time.monotonic() - began > 60:
                self.told(kind, "the stop button was not heard")
                break
        entry = self.wait(prompt_id)
        if not any(message[0] == "execution_interrupted" for message in entry["status"]["messages"]):
            self.told(kind, f"was not interrupted: {entry['status']['status_str']}")
        if graph.probe not in entry["outputs"]:  # stopped before the probe: nothing to look at
            self.sent += 1
            self.kinds[kind] += 1
            self.memory.append(resident(self.program.process.pid))
        else:
            self.look(kind, graph, entry)

    def bad(self, name: str) -> None:
        build, words = bad_inputs()[name]
        graph = self.graph()
        build(graph)
        entry = self.wait(self.queue(graph))
        said = error_of(entry)
        if words not in said:
            self.told(name, f"answered {said!r}")
        self.look(f"bad input: {name}", graph, entry)

    def two_at_once(self) -> None:
        graphs = [self.graph(), self.graph()]
        concepts(graphs[0]).sample(TWO, {}, seed=self.rng.randrange(1000))
        marked(graphs[1]).sample(WORDS, {}, seed=self.rng.randrange(1000))
        for graph, prompt_id in [(graph, self.queue(graph)) for graph in graphs]:
            self.good("two queued at once", graph, prompt_id)

    def run(self) -> None:
        first = self.graph()
        first.train("first")
        self.good("train", first, self.queue(first))
        (self.folder / "base" / "models" / "value_adapters" / "broken.safetensors").write_bytes(b"\x10" * 500)
        self.program.get("/object_info")  # the page's refresh: new files are listed
        self.reference()
        # PyTorch prepares and keeps its kernels for each new shape: all of them now, or one that happens to come late
        # would look like growth.
        for batch, width in SHAPES if self.prompts >= 20 else []:  # a short run measures no growth
            graph = self.graph()
            marked(graph).sample(WORDS, {}, True, batch=batch, width=width)
            self.good("every shape once", graph, self.queue(graph))
        actions: list[str] = []
        last = self.prompts - 3
        while self.sent < last and time.monotonic() < self.end:
            if not actions:  # every kind once before any comes again
                # Bad inputs come two at a time, or they would be most of all.
                bad = self.rng.sample(list(bad_inputs()), 3)
                actions = [*GOOD, *bad, "interrupt, training", "interrupt, sampling", "two", "unload", "reference"]
                self.rng.shuffle(actions)
            action = actions.pop()
            if action in GOOD:
                graph = self.graph()
                GOOD[action](graph, self.rng)
                self.good(action, graph, self.queue(graph))
            elif action in bad_inputs():
                self.bad(action)
            elif action.startswith("interrupt"):
                self.stopped(action)
            elif action == "two" and self.sent + 2 <= last:
                self.two_at_once()
            elif action == "unload":
                self.program.post("/free", {"unload_models": True, "free_memory": self.rng.random() < 0.5})
            elif action == "reference" and self.sent + 3 <= last:
                self.reference()
        self.reference()

    def report(self) -> dict[str, Any]:
        for what, values, limit in (("memory", self.memory, GROWTH_MIB), ("memory in use", self.in_use, IN_USE_MIB)):
            per_100 = 100 * slope(tail(values))
            if len(tail(values)) >= 60 and per_100 > limit:
                self.faults.append(f"{what} grows by {per_100:.1f} MiB per 100 prompts")
        return {
            "prompts": self.sent,
            "prompts_asked_for": self.prompts,
            "kinds": dict(sorted(self.kinds.items())),
            "bad_inputs": sum(n for kind, n in self.kinds.items() if kind.startswith("bad input")),
            "interrupts": sum(n for kind, n in self.kinds.items() if kind.startswith("interrupt")),
            "rss_mib": figures(self.memory),
            "in_use_mib": figures(self.in_use),
            "faults": self.faults,
        }


def tail(values: list[float]) -> list[float]:
    """What was measured after the warm-up."""
    return values[max(1, round(WARM_UP * len(values))) :]


def figures(values: list[float]) -> dict[str, Any]:
    """One kind of memory over the prompts, in MiB."""
    kept = tail(values)
    if not kept:
        return {}
    return {
        "after_warm_up": round(kept[0], 1),
        "last": round(kept[-1], 1),
        "highest": round(max(kept), 1),
        "slope_per_100_prompts": round(100 * slope(kept), 2),
        "every_10th": [round(value, 1) for value in values[::10]],
    }


def slope(values: list[float]) -> float:
    """Least squares, per entry."""
    n = len(values)
    middle, mean = (n - 1) / 2, sum(values) / n
    spread = sum((i - middle) ** 2 for i in range(n))
    return sum((i - middle) * (v - mean) for i, v in enumerate(values)) / spread if spread else 0.0


def resident(pid: int) -> float:
    """MiB of memory that a process holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def error_of(entry: dict[str, Any]) -> str:
    """The message that the page would show."""
    for kind, message in entry["status"]["messages"]:
        if kind == "execution_error":
            return str(message["exception_message"]).strip()
    return ""


def measure(prompts: int, seed: int, minutes: float, out: Path | None) -> int:
    """Inside a host."""
    import torch

    from .suite.conftest import BASE, HOST

    began = time.perf_counter()
    try:
        soak = Soak(prompts, seed, minutes)
        try:
            soak.run()
            report = soak.report()
        finally:
            soak.close()
    finally:
        shutil.rmtree(BASE, ignore_errors=True)
    seconds = round(time.perf_counter() - began)
    report = {"host": version(HOST), "torch": torch.__version__, "seed": seed, "seconds": seconds, **report}
    print(json.dumps({key: value for key, value in report.items() if key != "kinds"}))
    if out is not None:
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["faults"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="end earlier; the result says how far it came")
    parser.add_argument("--inside", metavar="RESULT", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside is not None:
        return measure(chosen.prompts, chosen.seed, chosen.minutes, Path(chosen.inside) if chosen.inside else None)
    hosts = find_hosts()
    if not hosts:
        print("No ComfyUI found: set COMFYUI_PATH to a ComfyUI folder.")
        return NO_HOST
    failed = 0
    for host in hosts:
        out = str(RESULTS / f"soak-{version(host)}.json") if chosen.prompts >= 200 else ""
        given = ["--prompts", str(chosen.prompts), "--seed", str(chosen.seed), "--minutes", str(chosen.minutes)]
        given += ["--inside", out]
        failed += run_module(host, "tests.host.soak", given) != 0
        if out:
            print(f"wrote {Path(out).relative_to(REPO)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
