"""The demo command, shortened: everything it promises is written, and the report tells the truth about it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conceptsplit_core.adapters.file import load_adapter
from conceptsplit_core.cli import demo
from conceptsplit_core.demo import looks

ROOT = Path(__file__).resolve().parents[2]
PICTURES = (
    "two-loras",
    "training-pictures",
    "concepts-alone",
    "composed",
    "attention",
    "separation",
    "bobo.loss",
    "dax.loss",
)


def test_demo_writes_what_it_promises(call, tmp_path):
    out = tmp_path / "demo"
    code, _, err = call("demo", "--out", out, "--concepts", "bobo,dax", "--steps", 2, "--seeds", 1)
    assert code == 0, err
    for name in PICTURES:
        picture = np.asarray(Image.open(out / f"{name}.png"))
        assert picture.std() > 5, name
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["prompt"] == "a <bobo> and a <dax> on a grey background"
    assert report["seconds"]["all"] > 0 and "cores" in report["machine"]
    assert [row["seed"] for row in report["separation"]["per seed"]] == [1000]
    assert report["loda"]["forwards"] >= report["loda"]["backwards"] > 0
    assert report["settings"]["steps"] == 2
    text = json.dumps(report)
    assert str(tmp_path) not in text and "/home" not in text
    for name in ("bobo", "dax"):
        info = load_adapter(out / f"{name}.safetensors").info
        assert (info.concept, info.class_word, info.base) == (name, looks.CONCEPTS[name].class_word, "demo")


def test_case_38_the_demo_computes_on_one_thread_whatever_the_environment_says(tmp_path):
    """On a busy machine it takes the share of one thread, and its first output is the picture of two LoRAs."""
    resource = pytest.importorskip("resource")
    command = [
        sys.executable,
        "-m",
        "conceptsplit_core",
        "demo",
        "--out",
        str(tmp_path),
        "--steps",
        "1",
        "--seeds",
        "1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 1.1 * seconds, "threads that wait for each other in a spin use more than one processor"
    machine = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["machine"]
    assert ", 1 threads, " in machine
    written = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert written[0].name == "two-loras.png"


def test_demo_refuses_what_it_does_not_know(refused, tmp_path):
    assert "no built-in concept 'rex'" in refused("demo", "--out", tmp_path, "--concepts", "rex,bobo")
    assert "two to four different" in refused("demo", "--out", tmp_path, "--concepts", "bobo")
    assert "two to four different" in refused("demo", "--out", tmp_path, "--concepts", "bobo,bobo")


def test_the_joint_prompt_reads_as_english():
    assert demo.joint_prompt(("bobo", "lumo")) == "a <bobo> and a <lumo>"
    assert demo.joint_prompt(("bobo", "lumo", "dax"), "on grey") == "a <bobo>, a <lumo> and a <dax> on grey"
