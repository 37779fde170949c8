"""What a run has to say stands on its node, not in the console alone."""

from __future__ import annotations

import json

from .conftest import pack
from .helpers import apply, encode, make_adapter, sample


def test_a_warning_while_a_node_of_the_host_runs_is_sent_to_the_page_for_that_node(loaded, monkeypatch):
    from comfy_execution.utils import CurrentNodeContext
    from server import PromptServer

    tiny = loaded("tiny")
    model, clip = apply(tiny.model, tiny.clip, make_adapter(tiny.model, "rex", "dog"))
    sent = []
    server = PromptServer.instance
    monkeypatch.setattr(server, "client_id", "a page", raising=False)
    monkeypatch.setattr(server, "send_sync", lambda event, data, sid=None: sent.append((event, data, sid)))
    with CurrentNodeContext("prompt", "12:3", 0):
        sample(model, encode(clip, "a photo of a house"), encode(clip, ""), steps=1)
    ours = [one for one in sent if one[0] == "conceptsplit.said"]
    assert json.loads(json.dumps(ours)) == [
        [
            "conceptsplit.said",
            {
                "node": "12:3",
                "lines": [
                    "No prompt of this run mentions <rex>: its adapter has no effect. Write it into a prompt that is "
                    "encoded with the CLIP of its loader."
                ],
            },
            "a page",
        ]
    ]


def test_a_node_collects_each_warning_of_its_run_once_and_leaves_those_of_others(loaded):
    tiny = loaded("tiny")
    model, clip = apply(tiny.model, tiny.clip, make_adapter(tiny.model, "rex", "dog"))
    without = encode(clip, "a photo of a house")
    messages = pack("conceptsplit_core.hosts.comfy.messages")
    with messages.collected() as lines:
        for _ in range(2):
            sample(model, without, without, steps=1)
        with messages.collected() as inner:
            encode(clip, "<rex> on a hill")
    assert inner == []
    assert [line.split(":")[0] for line in lines] == ["No prompt of this run mentions <rex>"]
