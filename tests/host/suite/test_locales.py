"""Every node, input and tooltip has its words in every language, and the host hands them to the page."""

from __future__ import annotations

import json

import pytest

from .conftest import REPO

LANGUAGES = ("de", "es", "fr", "ja", "ko", "ru", "zh")
# The page's message format gives these signs a meaning.
SPECIAL = set("{}@|$")


def ours():
    import nodes

    return {name: node for name, node in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("ConceptSplit")}


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_missing(language):
    words = json.loads((REPO / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert words.keys() == ours().keys()
    for name, node in ours().items():
        types = node.INPUT_TYPES()
        inputs = {one for kind in ("required", "optional") for one in types.get(kind, {})}
        assert words[name]["inputs"].keys() == inputs, name
        said = [words[name]["display_name"], words[name]["description"]]
        said += [one[key] for one in words[name]["inputs"].values() for key in ("name", "tooltip")]
        assert all(said) and not SPECIAL & set("".join(said)), name
        assert all(one["name"] != one["tooltip"] for one in words[name]["inputs"].values())


def test_languages_differ_and_no_other_is_there():
    found = {path.parent.name: path.read_text(encoding="utf-8") for path in (REPO / "locales").glob("*/nodeDefs.json")}
    assert found.keys() == set(LANGUAGES)
    assert len(set(found.values())) == len(LANGUAGES)


def test_the_host_gives_them_to_the_page():
    from app.custom_node_manager import CustomNodeManager

    manager = CustomNodeManager()
    given = manager.build_translations()
    assert given["ja"]["nodeDefs"]["ConceptSplitRegion"]["display_name"] == "概念の領域"
    assert given["de"]["nodeDefs"]["ConceptSplitKSampler"]["inputs"]["loda_steps"]["name"] == "LODA-Schritte"
