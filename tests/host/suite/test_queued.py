"""Prompts as the page queues them: bypassed loaders, and a model from before its loader."""

from __future__ import annotations

import pytest

from .conftest import pack

TEXT = "a <PIXA>, <anna:0.5> and <nobody>"


@pytest.fixture
def queue(monkeypatch):
    """Queues a prompt with one text, and gives the prompt afterwards and what the page was told."""
    from server import PromptServer

    sent = []
    monkeypatch.setattr(
        PromptServer.instance, "send_sync", lambda event, data, sid=None: sent.append((event, data, sid))
    )

    def queue(workflow, prompt=(), text=TEXT):
        nodes = {"5": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": text}}, **dict(prompt)}
        body = {"prompt": nodes, "client_id": "me", "extra_data": {"extra_pnginfo": {"workflow": workflow}}}
        before = repr(body)
        sent.clear()
        after = PromptServer.instance.trigger_on_prompt(body)
        assert repr(body) == before, "what the caller holds stays"
        return after["prompt"], list(sent)

    return queue


@pytest.fixture
def queued(queue):
    """The text alone, and what the page was told."""

    def text_of(*args, **given):
        prompt, sent = queue(*args, **given)
        return prompt["5"]["inputs"]["text"], sent

    return text_of


def adapter(mode, name="", word="", file="demo_pixa.safetensors"):
    values = [file, name, 0.7, word, 0.0, 1.0, 0.75, 0.1]
    return {"type": "ConceptSplitLoader", "mode": mode, "widgets_values": values}


def lora(mode, name, words):
    values = ["demo_nero_lora.safetensors", name, words, 0.7, 1.0, 0.0, 1.0]
    return {"type": "ConceptSplitLoraLoader", "mode": mode, "widgets_values": values}


def line(name, words):
    return f"<{name}> is not loaded (its loader is bypassed), so it is read as its words: {words}."


def test_words_come_from_the_loaders_own_fields_and_else_from_its_file(queued):
    text, sent = queued({"nodes": [adapter(4), lora(4, "Anna", "")]})
    assert text == "a star, triangle and <nobody>"
    lines = {"5": [line("PIXA", "star"), line("anna", "triangle")]}
    assert sent == [("conceptsplit.queued", {"nodes": lines}, "me")]
    text, _ = queued({"nodes": [adapter(4, "anna", "red dog; 0.4: wolf"), lora(0, "bob", "man")]})
    assert text == "a <PIXA>, red dog and <nobody>"


def words_of(mode, words):
    return {"type": "ConceptSplitMarkWords", "mode": mode, "widgets_values": [words]}


def test_marked_words_are_read_as_words_where_their_node_is_bypassed(queued):
    """Also where no loader is in the graph at all."""
    graph = {"nodes": [words_of(4, "anna:red wolf; 0.4: wolf, nobody:dog, cat")]}
    text, sent = queued(graph, text="<Anna> and <nobody>, a <cat:0.5> and <tom>")
    assert text == "red wolf and dog, a cat and <tom>"
    lines = [line("Anna", "red wolf"), line("nobody", "dog"), line("cat", "cat")]
    assert sent == [("conceptsplit.queued", {"nodes": {"5": lines}}, "me")]
    assert queued({"nodes": [words_of(0, "anna:wolf")]})[0] == TEXT
    assert queued({"nodes": [words_of(4, " , ")]})[0] == TEXT


def test_a_muted_loader_is_left_out_as_well(queued):
    assert queued({"nodes": [adapter(2), words_of(2, "anna:wolf")]})[0] == "a star, wolf and <nobody>"


def test_only_prompts_are_read_as_words(queue):
    """Fields of this pack that name a concept keep the name."""
    kinds = ("ConceptSplitTrain", "ConceptSplitRegion", "ConceptSplitMasks")
    prompt = {kind: node(kind, concept_name="<pixa>") for kind in kinds}
    prompt["other"] = node("NodeOfAnotherPack", concept_name="<pixa>")
    after, _ = queue({"nodes": [adapter(4)]}, prompt)
    assert after["5"]["inputs"]["text"] == "a star, <anna:0.5> and <nobody>"
    assert [after[key]["inputs"]["concept_name"] for key in (*kinds, "other")] == [*["<pixa>"] * 3, "star"]


def promoted(mode, **properties):
    """A subgraph of two loaders whose fields all stand on its own node, which says other things than they do, and a
    subgraph around it with one of these fields; a mask is a field of nobody."""

    def inputs(*links):
        fields = ("lora", "concept_name", "words")
        return [{"name": "mask", "link": 9}] + [
            {"name": name, "link": link, "widget": {"name": name}} for name, link in zip(fields, links, strict=True)
        ]

    def port(name, *links):
        return {"name": name, "linkIds": list(links)}

    inner = {
        "id": "inner",
        "inputs": [
            port("mask", 9), port("second", 5), port("file", 1, 4), port("words", 3), port("second words", 6),
            port("first", 2),
        ],
        "nodes": [
            {**lora(mode, "pixa", "stale"), "inputs": inputs(1, 2, 3)},
            {**lora(4, "stale", "older"), "inputs": inputs(4, 5, 6)},
        ],
    }  # fmt: skip
    values = ["anna", "demo_pixa_lora.safetensors", "red cat", "", "Pixa"]
    node = {"type": "inner", "mode": 0, "widgets_values": values, "properties": properties}
    outer = {
        "id": "outer",
        "inputs": [port("words outside", 7)],
        "nodes": [{**node, "inputs": [{"name": "words", "link": 7, "widget": {"name": "words"}}]}],
    }
    wrapped = {"type": "outer", "mode": 0, "widgets_values": ["blue dog"]}
    return {"definitions": {"subgraphs": [inner, outer]}}, node, wrapped


@pytest.mark.parametrize("mode", [0, 4])
def test_fields_on_a_subgraphs_own_node_count_and_not_what_the_nodes_inside_keep(queued, mode):
    graph, node, wrapped = promoted(mode)
    first = "red cat" if mode else "<PIXA>"
    assert queued({"nodes": [node], **graph})[0] == f"a {first}, star and <nobody>"
    first = "blue dog" if mode else "<PIXA>"
    assert queued({"nodes": [wrapped], **graph})[0] == f"a {first}, star and <nobody>"


def test_fields_that_a_page_has_listed_count_in_the_order_of_the_list(queued):
    """Also those of a node inside, which have no value here, and with fields that were left out."""
    listed = [["-1", "first"], ["3", "seed"], ["-1", "second"], ["-1", "words"]]
    graph, node, _ = promoted(4, proxyWidgets=listed)
    node["widgets_values"] = ["PIXA", None, "anna", "wolf"]
    assert queued({"nodes": [node], **graph})[0] == "a wolf, older and <nobody>"
    del node["widgets_values"]
    assert queued({"nodes": [node], **graph})[0] == "a stale, <anna:0.5> and <nobody>"


def test_loaders_inside_a_bypassed_subgraph_are_bypassed(queued):
    inner = {"nodes": [{"type": "there", "mode": 0}]}
    there = {"nodes": [adapter(0), lora(4, "anna", "ohwx woman")]}
    graph = {"definitions": {"subgraphs": [{"id": "here", **inner}, {"id": "there", **there}]}}
    on = {"0": {"class_type": "ConceptSplitLoader", "inputs": {"adapter": "demo_pixa.safetensors"}}}
    text, _ = queued({"nodes": [{"type": "here", "mode": 0}], **graph}, on)
    assert text == "a <PIXA>, ohwx woman and <nobody>"
    assert queued({"nodes": [{"type": "here", "mode": 4}], **graph})[0] == "a star, ohwx woman and <nobody>"


@pytest.mark.parametrize(
    "kind, inputs",
    [
        ("ConceptSplitLoader", {"adapter": "demo_pixa.safetensors", "concept_name": ""}),
        ("ConceptSplitLoraLoader", {"lora": "demo_nero_lora.safetensors", "concept_name": "<pixa>", "words": "cat"}),
        ("ConceptSplitMarkWords", {"words": "cat, pixa:dog"}),
    ],
)
def test_a_name_that_another_loader_has_is_left_to_it(queued, kind, inputs):
    text, sent = queued({"nodes": [adapter(4)]}, {"7": {"class_type": kind, "inputs": inputs}})
    assert text == TEXT and sent == [("conceptsplit.queued", {"nodes": {}}, "me")]


@pytest.mark.parametrize(
    "kind, inputs",
    [
        ("ConceptSplitApply", {"value_adapter": ["3", 0], "concept_name": ""}),
        ("ConceptSplitMarkWords", {"words": ["3", 0]}),
        ("ConceptSplitLoader", {"adapter": "demo_nero.safetensors", "concept_name": ["3", 0]}),
        ("ConceptSplitLoader", {"adapter": "gone.safetensors", "concept_name": ""}),
    ],
)
def test_nothing_is_replaced_where_a_loaded_name_only_shows_in_the_run(queued, kind, inputs):
    assert queued({"nodes": [adapter(4)]}, {"7": {"class_type": kind, "inputs": inputs}})[0] == TEXT


def test_other_prompts_pass_as_they_are(queued):
    assert queued({"nodes": [adapter(4, file="gone.safetensors")]})[0] == TEXT
    for broken in ({"7": 3}, {"7": {"class_type": "ConceptSplitLoader"}}, {"7": node("ConceptSplitLoader")}):
        assert queued({"nodes": [adapter(4)]}, broken)[0] == TEXT
    assert queued({"nodes": [{"type": "ConceptSplitLoader", "mode": 4, "widgets_values": [3, None]}]})[0] == TEXT
    for workflow in ({}, None, {"nodes": [{"type": "LoraLoader", "mode": 4, "widgets_values": ["pixa"]}]}):
        assert queued(workflow) == (TEXT, [])


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


@pytest.mark.parametrize("sampler, text", [("ConceptSplitKSampler", "positive"), ("BasicGuider", "conditioning")])
@pytest.mark.parametrize(
    "model, missing",
    [(["1", 0], "<pixa> and <Bob>"), (["2", 0], "<Bob>"), (["3", 0], None), (["10", 0], None)],
)
def test_case_b4_a_prompt_from_after_a_loader_and_a_model_from_before_it(queued, sampler, text, model, missing):
    """Of two loaders; the texts are combined, and the model may come through a node of another pack."""
    prompt = {
        "1": node("ConceptSplitDemoCheckpoint"),
        "2": node("ConceptSplitLoader", model=["1", 0], clip=["1", 1], adapter="demo_pixa.safetensors"),
        "3": node(
            "ConceptSplitLoraLoader", model=["2", 0], clip=["2", 1], lora="demo_nero_lora.safetensors",
            concept_name="Bob", words="cat",
        ),
        "5": node("CLIPTextEncode", clip=["3", 1], text="a star"),
        "6": node("CLIPTextEncode", clip=["1", 1], text="a park"),
        "7": node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["5", 0]),
        "8": node(sampler, model=model, **{text: ["7", 0]}),
        "9": node("KSampler", model=["1", 0], positive=["6", 0]),
        "10": node("NodeOfAnotherPack", pipe=["3", 0]),
    }  # fmt: skip
    line = (
        f"The prompt comes from after the loader of {missing} and the model from before it, so that only the words "
        "act: connect the MODEL of the last loader."
    )
    _, ((_, data, _),) = queued(None, prompt)
    assert data == {"nodes": {"8": [line]} if missing else {}}


def test_values_of_a_saved_workflow_stand_in_the_order_of_the_inputs():
    import nodes

    for kind, names in pack("conceptsplit_core.hosts.comfy.queued")._LOADERS.items():
        types = nodes.NODE_CLASS_MAPPINGS[kind].INPUT_TYPES()
        both = {**types["required"], **types.get("optional", {})}
        fields = [name for name, spec in both.items() if spec[0] not in ("MODEL", "CLIP", "MASK")]
        assert tuple(fields[: len(names)]) == names


@pytest.mark.parametrize(
    "file, shown", [("rex.png", True), ("rex.preview.JPG", True), ("rex.txt", False), (None, False)]
)
def test_the_address_of_the_picture_beside_a_file(base, file, shown):
    files = pack("conceptsplit_core.hosts.comfy.files")
    folder = base / "models" / "value_adapters" / "pictured dogs"
    folder.mkdir(exist_ok=True)
    (folder / "rex.safetensors").write_bytes(b"")
    beside = [folder / file] if file else []
    for one in beside:
        one.write_bytes(b"x")
    try:
        wanted = "/experiment/models/preview/value_adapters/0/pictured%20dogs/rex.safetensors" if shown else None
        assert files.picture_of("pictured dogs/rex.safetensors") == wanted
        assert files.picture_of("../rex.safetensors") is None
    finally:
        for one in (*beside, folder / "rex.safetensors"):
            one.unlink()


@pytest.mark.parametrize("linked", ["folder", "subfolder"])
def test_the_picture_beside_a_lora_behind_a_link(base, tmp_path, monkeypatch, linked):
    """People keep LoRAs on another disk; the host serves pictures by the names inside its folder."""
    import folder_paths

    real = tmp_path / "disk" / "people"
    real.mkdir(parents=True)
    for name in ("anna.safetensors", "anna.preview.png"):
        (real / name).write_bytes(b"x")
    loras = tmp_path / "loras"
    if linked == "folder":
        loras.symlink_to(tmp_path / "disk", target_is_directory=True)
    else:
        loras.mkdir()
        (loras / "people").symlink_to(real, target_is_directory=True)
    known = folder_paths.folder_names_and_paths["loras"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([known[0][-1], str(loras)], known[1]))
    picture_of = pack("conceptsplit_core.hosts.comfy.files").picture_of
    assert picture_of("people/anna.safetensors", True) == "/experiment/models/preview/loras/1/people/anna.safetensors"
    assert picture_of("people/anna.safetensors") is None


def test_common_searches_find_our_nodes():
    import nodes

    def found(words):
        for name, node in nodes.NODE_CLASS_MAPPINGS.items():
            if name.startswith("ConceptSplit"):
                schema = node.GET_SCHEMA()
                known = [schema.display_name, *(getattr(schema, "search_aliases", None) or ())]
                if any(words in one.lower() for one in known):
                    yield name

    if not hasattr(nodes.NODE_CLASS_MAPPINGS["ConceptSplitLoader"].GET_SCHEMA(), "search_aliases"):
        pytest.skip("this ComfyUI has no search aliases")
    for words in ("identity", "subject", "character", "regional", "multi concept", "lora"):
        assert {"ConceptSplitLoader", "ConceptSplitLoraLoader"} & set(found(words)), words
    assert "ConceptSplitRegion" in found("regional") and "ConceptSplitTrain" in found("dreambooth")
