"""What the registry, citations and public CI read: complete but for what only the owner knows, and that is listed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from conceptsplit_core import __version__
from tests.run import STAGES

ROOT = Path(__file__).resolve().parents[2]


def project() -> dict:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_registry_s_fields_are_there_and_as_it_wants_them():
    facts = project()
    name, comfy = facts["project"]["name"], facts["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9]*([._-][a-z0-9]+)*", name) and len(name) < 100 and "comfyui" not in name
    assert re.fullmatch(r"\d+\.\d+\.\d+", facts["project"]["version"])
    assert (ROOT / facts["project"]["license"]["file"]).is_file()
    assert facts["project"]["description"] and facts["project"]["requires-python"].startswith(">=")
    assert "Operating System :: OS Independent" in facts["project"]["classifiers"]
    assert facts["project"]["dependencies"] == [], "the pack needs nothing that ComfyUI does not ship"
    assert set(comfy) == {"PublisherId", "DisplayName", "Icon", "requires-comfyui"} and comfy["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    with Image.open(ROOT / "docs" / "images" / "icon.png") as icon:
        assert icon.size[0] == icon.size[1] <= 400


def test_what_only_the_owner_knows_is_on_the_list():
    """Each empty value and each line marked OWNER is named by docs/publishing.md, until it is filled in."""
    page = read("docs/publishing.md")
    facts = project()
    empty = [key for key, value in facts["tool"]["comfy"].items() if value == ""]
    marked = re.findall(r'^# "?([\w -]+?)"? = "OWNER"', read("pyproject.toml"), re.MULTILINE)
    assert set(empty) <= {"PublisherId", "Icon"} and bool(empty or marked) == ("OWNER" in read("pyproject.toml"))
    for key in empty:
        assert f"`{key}`" in page, key
    if marked:
        assert "Repository" in marked and "`[project.urls]`" in page
    if "OWNER" in read("CITATION.cff"):
        assert "`repository-code` in `CITATION.cff`" in page
    assert f"`{facts['project']['name']}` (`name`" in page


def test_one_version_everywhere():
    version = project()["project"]["version"]
    assert version == __version__
    assert f"\nversion: {version}\n" in read("CITATION.cff")
    newest, *older = re.findall(r"^## \[(\S+)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert newest == version and version not in older


def test_public_ci_runs_the_stages_of_make_test_on_the_promised_versions():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    stages = {shlex.split(line)[-1] for line in commands if "tests/run.py --only" in line}
    assert stages == set(STAGES)
    targets = set(re.findall(r"^(\w+):", read("Makefile"), re.MULTILINE))
    assert {line.split()[-1] for line in commands if line.startswith("make")} == {"setup"} <= targets
    hosts = jobs["host"]["strategy"]["matrix"]["comfyui"]
    assert "tested on " + " and ".join(tag.removeprefix("v") for tag in hosts) in read("README.md")
    facts = project()
    assert facts["tool"]["comfy"]["requires-comfyui"] == f">={hosts[0].removeprefix('v')}"
    oldest = jobs["core"]["strategy"]["matrix"]["python"][0]
    assert facts["project"]["requires-python"] == f">={oldest}"
    assert jobs["host"]["env"]["COMFYUI_PATH"].endswith("/ComfyUI")
    checkouts = [
        step.get("with", {}) for step in jobs["host"]["steps"] if step.get("uses", "").startswith("actions/ch")
    ]
    assert [one["path"] for one in checkouts] == ["pack", "ComfyUI"] and checkouts[1]["ref"] == "${{ matrix.comfyui }}"
