"""Adapter files in the host's model folder: what is refused, and that nothing outside the folder is touched."""

from __future__ import annotations

import json
import struct

import pytest
import torch

from .conftest import pack, run
from .helpers import make_adapter


@pytest.fixture
def sd(loaded):
    return loaded("tiny")


@pytest.fixture
def folder(base):
    return base / "models" / "value_adapters"


def load(sd, name):
    return run("ConceptSplitLoader", model=sd.model, clip=sd.clip, adapter=name, concept_name="")


def header(text):
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a model",
        struct.pack("<Q", 10**9) + b"{}",
        header(b"{"),
        header(json.dumps({"__metadata__": {"format": "conceptsplit.value_adapter", "format_version": "99"}}).encode()),
        b"\x80\x04\x95pickle",
    ],
    ids=["empty", "text", "huge header", "cut header", "newer version", "pickle"],
)
def test_broken_files(sd, folder, content):
    errors = pack("conceptsplit_core.errors")
    (folder / "broken.safetensors").write_bytes(content)
    with pytest.raises(errors.ConceptSplitError) as told:
        load(sd, "broken.safetensors")
    assert "broken.safetensors" in str(told.value) and "\n" not in str(told.value)


def test_truncated_and_foreign_files(sd, folder):
    from safetensors.torch import save_file

    errors = pack("conceptsplit_core.errors")
    files = pack("conceptsplit_core.hosts.comfy.files")
    files.save_named(make_adapter(sd.model), "whole")
    whole = (folder / "whole.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, folder / "lora.safetensors")
    for name in ("cut.safetensors", "lora.safetensors"):
        with pytest.raises(errors.ConceptSplitError, match=name.partition(".")[0]):
            load(sd, name)
    load(sd, "whole.safetensors")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "nowhere.safetensors", "", "\0"]
)
def test_names_that_lead_out(sd, base, name):
    errors = pack("conceptsplit_core.errors")
    (base / "models" / "x.safetensors").write_bytes(b"secret")
    with pytest.raises(errors.ConceptSplitError):
        load(sd, name)
    if name != "nowhere.safetensors":
        with pytest.raises(errors.ConceptSplitError):
            run("ConceptSplitSave", value_adapter=make_adapter(sd.model), file_name=name)
    assert (base / "models" / "x.safetensors").read_bytes() == b"secret"


def test_links_that_lead_out(sd, base, folder):
    errors = pack("conceptsplit_core.errors")
    files = pack("conceptsplit_core.hosts.comfy.files")
    outside = base / "outside"
    outside.mkdir()
    path = files.save_named(make_adapter(sd.model), "inside")
    (outside / "x.safetensors").write_bytes(path.read_bytes())
    (folder / "link.safetensors").symlink_to(outside / "x.safetensors")
    (folder / "linked").symlink_to(outside, target_is_directory=True)
    for name in ("link.safetensors", "linked/x.safetensors"):
        with pytest.raises(errors.ConceptSplitError, match="leads out"):
            load(sd, name)
    for name in ("link", "linked/new"):
        with pytest.raises(errors.ConceptSplitError, match="leads out"):
            run("ConceptSplitSave", value_adapter=make_adapter(sd.model), file_name=name)
    assert sorted(p.name for p in outside.iterdir()) == ["x.safetensors"]


def test_save_round_trip_and_smaller_rank(sd, folder, caplog):
    adapter = make_adapter(sd.model)
    (same,) = run("ConceptSplitSave", value_adapter=adapter, file_name="dogs/rex")
    assert same is adapter and (folder / "dogs" / "rex.safetensors").is_file()
    (small,) = run("ConceptSplitSave", value_adapter=adapter, file_name="dogs/small.safetensors", reduce_rank=2)
    assert small.rank_of(next(iter(small.down))) == 2
    assert (folder / "dogs" / "small.safetensors").stat().st_size < (folder / "dogs" / "rex.safetensors").stat().st_size
    import folder_paths

    assert {"dogs/rex.safetensors", "dogs/small.safetensors"} <= set(folder_paths.get_filename_list("value_adapters"))


def test_a_file_trained_again_is_loaded_again(sd, folder):
    import nodes

    files = pack("conceptsplit_core.hosts.comfy.files")
    files.save_named(make_adapter(sd.model, seed=1), "again")
    loader = nodes.NODE_CLASS_MAPPINGS["ConceptSplitLoader"]
    first = loader.fingerprint_inputs(adapter="again.safetensors")
    files.save_named(make_adapter(sd.model, seed=2), "again")
    assert loader.fingerprint_inputs(adapter="again.safetensors") != first


def test_every_input_has_a_tooltip_and_every_node_a_help_page():
    import nodes

    from .conftest import REPO

    ours = {key: node for key, node in nodes.NODE_CLASS_MAPPINGS.items() if key.startswith("ConceptSplit")}
    assert len(ours) == 20
    for key, node in ours.items():
        schema = node.GET_SCHEMA()
        assert schema.description and schema.display_name and schema.category.startswith("ConceptSplit")
        for given in (*schema.inputs, *schema.outputs):
            assert given.tooltip and len(given.tooltip) > 7, f"{key}.{given.id} has no tooltip"
        page = REPO / "web" / "docs" / f"{key}.md"
        assert page.is_file() and len(page.read_text()) > 200, f"{key} has no help page"
