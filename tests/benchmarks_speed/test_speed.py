"""The speed benchmark counts what it says it counts, and its peers compute what they should."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks.speed import __main__ as program
from benchmarks.speed import counted, models, programs
from benchmarks.speed import size as sizes
from benchmarks.speed.meter import KINDS, REST, fake, measured, seconds_by_kind, weight_bytes
from benchmarks.speed.rows import Row, read_rows, table, write_json
from conceptsplit_core.adapters.file import load_adapter
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.network.grid import aggregate
from conceptsplit_core.settings import LodaConfig

WIDTH, CELLS = 32, 16


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return models.build("sd15", torch.float32, WIDTH, CELLS)


def test_flops_of_known_layers():
    linear, conv = nn.Linear(8, 16, bias=False), nn.Conv2d(3, 5, 3, padding=1)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), measured() as cost:
            linear(torch.randn(4, 8))
            conv(torch.randn(2, 3, 7, 7))
        assert cost.flops == 2 * 4 * 8 * 16 + 2 * 2 * 7 * 7 * 5 * 3 * 9


def test_fused_attention_counts_both_products_and_its_backward():
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (10, 7, 7))
    with measured() as cost:
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    product = 2 * 2 * 3 * 10 * 7 * 8
    assert cost.flops == (2 + 5) * product


def test_peak_is_the_worst_moment_and_views_are_free():
    with measured() as cost:
        a = torch.zeros(1000)
        b = a + 1
        c = b[:10]
        del a, b
        d = torch.zeros(500)
    assert cost.peak == 8000
    assert cost.kept == 4000 + 2000
    del c, d


def test_kinds_of_operators_add_up_to_the_whole():
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    x = torch.randn(1, 3, 8, 8)
    conv, linear = nn.Conv2d(3, 4, 3), nn.Linear(8, 8)
    with measured() as cost:
        torch.nn.functional.scaled_dot_product_attention(linear(q), k, v).sum().backward()
        conv(x).sum().backward()
    assert set(cost.kinds) == set(KINDS) and all(cost.kinds.values())
    assert sum(cost.kinds.values()) == cost.flops


def test_views_start_nothing_and_changes_in_place_do():
    x, y = torch.zeros(4, 4), torch.zeros(4, 4)
    with measured() as cost:
        x.view(16)[3:].unsqueeze(0).transpose(0, 1)
        assert cost.started == 0
        x.add_(1)
        x + y
        torch.equal(x, y)
    assert cost.started == 3


def test_time_goes_to_the_kind_of_operator_that_takes_it():
    x, conv, linear = torch.randn(1, 8, 64, 64), nn.Conv2d(8, 64, 3), nn.Linear(4, 4)
    q = torch.randn(1, 2, 256, 32, requires_grad=True)
    attention = lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    by_conv, by_linear, by_attention = seconds_by_kind((lambda: conv(x), lambda: linear(x[0, 0, :4, :4]), attention), 3)
    assert by_conv["convolutions"] > by_conv[REST] >= 0 == by_conv["attention"] == by_conv["linear layers"]
    assert by_linear["linear layers"] > 0 == by_linear["convolutions"]
    assert by_attention["attention"] > 0 == by_attention["convolutions"]


def test_a_later_step_adds_one_operation_per_layer(small):
    """The rest, finding rows and comparing the text, is once per step whatever the number of layers."""
    adapters = [(models.adapter(small.model, f"c{i}", 4), 1.0) for i in range(4)]
    mask = models.row_mask(4)
    steps = []
    with measured() as plain:
        programs.cfg_call(small)
    with programs.sampling(small, adapters) as patch:
        for _ in range(3):
            with measured() as cost:
                found = programs.cfg_call(small, patch, mask)
            steps.append((cost.started, found))
    assert torch.equal(steps[0][1], steps[1][1]) and torch.equal(steps[1][1], steps[2][1])
    layers = len(host.cross_attention_layers(small.model.unet))
    first, *later = (started - plain.started for started, _ in steps)
    assert first > 6 * layers and layers <= later[0] == later[1] <= layers + 25


def test_tensors_kept_for_the_backward_pass_count():
    x = torch.randn(100, requires_grad=True)
    with measured() as cost:
        y = x.exp().exp()
        del y
        assert cost._live == 0
        y = x.exp().exp().sum()
        cost.mark()
        del y
    assert cost.marked >= 800


def _costs():
    built = models.build("sd15", torch.float32, WIDTH, CELLS)
    adapters = [(models.adapter(built.model, f"c{i}", 4), 1.0) for i in range(2)]
    mask = models.row_mask(2)
    config = LodaConfig(loda_iterations=1, threshold=0.69)
    with host.patched(built.model, adapters) as patch:
        with measured() as plain:
            programs.cfg_call(built)
        with measured() as update:
            programs.update(built, patch, mask, config)
    return plain.flops, plain.peak, update.flops, update.peak, weight_bytes(built.model.unet)


def test_fake_tensors_give_the_counts_of_real_ones():
    real = _costs()
    with fake():
        assert _costs() == real


def test_leaving_early_changes_neither_maps_nor_gradient(small):
    config, mask = LodaConfig(), models.row_mask(2)
    layers, size = programs.wanted_layers(small, config)
    found = []
    for leave in (True, False):
        x = small.x.clone().requires_grad_(True)
        with host.patched(small.model, [(None, 0.0)] * 2) as patch:
            patch.state.mask = mask
            with patch.capturing(layers, mask, leave) as maps:
                read = maps
                host.call_unet(small.model, x, small.t, small.context)
        result = aggregate([read[name] for name in layers], size)
        (gradient,) = torch.autograd.grad((result[:, 0] * result[:, 1]).sum() * 1e4, x)
        found.append((result.detach(), gradient))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].abs().max() > 0


def test_maps_on_the_way_down_are_the_same_layers_for_less(small):
    mask = models.row_mask(2)
    costs = {}
    for part in ("all", "down"):
        config = LodaConfig(loda_iterations=1, map_part=part, threshold=0.69)
        layers, _ = programs.wanted_layers(small, config)
        assert part == "all" or all(name.startswith("down_blocks.") for name in layers)
        with host.patched(small.model, [(None, 0.0)] * 2) as patch, measured() as costs[part]:
            trace = programs.update(small, patch, mask, config)
        assert (trace.forwards, trace.backwards) == (1, 1)
    assert costs["down"].flops < 0.8 * costs["all"].flops


def test_the_default_is_the_way_down_on_sdxl_alone(small):
    assert list(counted.parts(small)) == ["all", "down"]
    with fake():
        xl = models.build("sdxl", torch.float32, WIDTH, CELLS)
        assert counted.default_part(xl) == "down"
        assert [told.endswith("(default)") for told in counted.parts(xl).values()] == [True, False]


def test_apart_costs_one_partial_forward(small):
    mask = models.row_mask(2)
    with host.patched(small.model, [(None, 0.0)] * 2) as patch:
        with measured() as apart:
            trace = programs.update(small, patch, mask, LodaConfig(threshold=1e-30))
        with measured() as forward, torch.no_grad():
            programs.map_reader(small, patch, mask, LodaConfig())(small.x)
    assert (trace.forwards, trace.backwards) == (1, 0)
    # The rest is the smoothing of the maps for the loss.
    assert forward.flops <= apart.flops < 1.0001 * forward.flops


def test_the_peer_sees_the_same_maps_and_the_same_picture(small):
    stock = programs.cfg_call(small)
    config, mask = LodaConfig(), models.row_mask(2)
    _, size = programs.wanted_layers(small, config)
    with host.patched(small.model, [(None, 0.0)] * 2) as patch, torch.no_grad():
        ours = programs.map_reader(small, patch, mask, config)(small.x * 2**0.5)
    with programs.storing(small) as store:
        assert torch.allclose(programs.cfg_call(small), stock, atol=1e-4)
        assert len(store) == len(host.layer_shapes(small.model.unet))
        store.clear()
        with torch.no_grad():
            host.call_unet(small.model, small.x, small.t, small.context)
        pixels = size[0] * size[1]
        theirs = torch.stack([p.mean(dim=1) for p in store if p.shape[-2] == pixels]).mean(dim=0)
        theirs = theirs[..., [models.concept_row(i) for i in range(2)]].movedim(-1, 1).unflatten(-1, size)
        moved = programs.paper_update(small, store, 2, size)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert moved.shape == small.x.shape and not torch.equal(moved, small.x)
    assert torch.equal(programs.cfg_call(small), stock)


def test_lora_peer_starts_at_the_plain_model_and_leaves_nothing(small):
    pytest.importorskip("peft")
    names = list(small.model.unet.state_dict())
    stock = programs.cfg_call(small)
    parameters = programs.add_lora(small.model.unet, 4)
    try:
        assert len(parameters) == 2 * 16
        batch = models.train_batch(small, 1)
        gradients = programs.train_step(programs.lora_denoise(small), parameters, batch)
        assert sum(bool(g.any()) for g in gradients if g is not None) == 16
    finally:
        programs.remove_lora(small.model.unet)
    assert list(small.model.unet.state_dict()) == names
    assert torch.equal(programs.cfg_call(small), stock)


def test_a_smaller_adapter_file_is_judged_by_what_it_keeps(monkeypatch):
    monkeypatch.setattr(sizes, "RANKS", (8, 1))
    model = host.load_model("demo")
    path = sorted(sizes.ADAPTERS.glob("*.safetensors"))[0]
    rows = list(sizes.adapter_rows(model, load_adapter(path), len(path.read_bytes()), 4, 1))
    whole, one, eighth, best = rows
    assert "rank 8, float16" in whole.what and "keeps 100.0 %" in whole.note and "SVD error 0.000" in whole.note
    assert 0.95 < whole.ratio < 1.05 and eighth.what.endswith("float8") and eighth.ratio < whole.ratio
    assert one.ratio < 0.4 and "SVD error 0.000" not in one.note
    assert best.what.startswith("smallest usable") and best.ours <= whole.ours


def test_rows_say_whether_their_goal_is_met(tmp_path):
    def row(ours, peer, goal):
        return Row("w", "m", ours, peer, "s", "p", "timed", 1.0, goal)

    assert row(1.0, 1.0, "<= 1.0").met and not row(1.1, 1.0, "<= 1.0").met
    assert row(3.0, 2.0, ">= 1.5").met and not row(2.9, 2.0, ">= 1.5").met
    assert row(1.0, 1.0, None).met is None
    assert row(None, None, "<= 1.0").met is False
    rows = [row(0.5, 1.0, "<= 0.4").to_dict()]
    write_json({"timed": rows}, tmp_path / "speed.json", {"quick": True})
    assert read_rows(tmp_path / "speed.json") == {"timed": rows}
    assert "| 0.500 | 1.00 | ≤ 0.4 | **no** |" in table(rows)


def test_the_page_keeps_its_words(tmp_path):
    page = tmp_path / "speed.md"
    rows = [Row("w", "m", 1.0, 2.0, "s", "p", "timed").to_dict()]
    program.write_page({"timed": rows}, page)
    page.write_text(page.read_text() + "\nWritten by hand.\n")
    once = page.read_text()
    program.write_page({"timed": rows}, page)
    assert page.read_text() == once
    program.write_page({"timed": []}, page)
    assert "| w |" not in page.read_text() and "Written by hand." in page.read_text()


def test_the_committed_file_is_whole():
    content = json.loads(program.RESULTS.read_text(encoding="utf-8"))
    assert {"machine", "torch", "rows"} <= content.keys()
    for row in content["rows"]:
        assert {"what", "model", "ours", "peer", "ratio", "unit", "predicted", "goal", "met"} <= row.keys()
    assert "/work" not in json.dumps(content) and "/root" not in json.dumps(content)
