"""The speed benchmark counts what it says it counts, and its peers compute what they should."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks.speed import __main__ as program
from benchmarks.speed import counted, models, programs
from benchmarks.speed import loras as lora_rows
from benchmarks.speed import size as sizes
from benchmarks.speed.meter import fake, in_turn, measured
from benchmarks.speed.rows import Row, read_rows, table, write_json
from conceptsplit_core.adapters.file import load_adapter
from conceptsplit_core.hosts import diffusers as host
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


def test_a_product_that_is_added_in_place_counts_as_one():
    out = torch.zeros(2, 5, 7)
    with measured() as cost:
        out.baddbmm_(torch.ones(2, 5, 3), torch.ones(2, 3, 7))
    assert cost.flops == 2 * 2 * 5 * 3 * 7


def test_fused_attention_counts_both_products_and_its_backward():
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (10, 7, 7))
    with measured() as cost:
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    product = 2 * 2 * 3 * 10 * 7 * 8
    assert cost.flops == (2 + 5) * product


def test_peak_is_the_worst_moment_of_a_lap_and_views_are_free():
    with measured() as cost:
        a = torch.zeros(1000)
        b = a + 1
        c = b[:10]
        del a, b
        first = cost.lap()
        d = torch.zeros(500)
    assert first.peak == 8000
    assert cost.peak == 4000 + 2000
    del c, d


def test_views_start_nothing_and_changes_in_place_do():
    x, y = torch.zeros(4, 4), torch.zeros(4, 4)
    with measured() as cost:
        x.view(16)[3:].unsqueeze(0).transpose(0, 1)
        assert cost.started == 0
        x.add_(1)
        x + y
        torch.equal(x, y)
    assert cost.started == 3


def _costs():
    built = models.build("sd15", torch.float32, WIDTH, CELLS)
    # Random weights give all words one map, which the default divides by place; a trained model does not need that.
    steps = [*programs.step_costs(built, 2), *counted.short_run(built, LodaConfig(afg_rule="top"))]
    return [step.flops for step in steps], [step.peak for step in steps]


def test_fake_tensors_give_the_counts_of_real_ones():
    flops, peaks = _costs()
    with fake():
        fake_flops, fake_peaks = _costs()
    assert fake_flops == flops
    # The scheduler's single numbers are not tensors in both cases.
    assert fake_peaks == pytest.approx(peaks, abs=256)


def test_a_picture_added_up_from_its_steps_is_that_picture(small, monkeypatch):
    """The default's settings, 10 steps: the kinds of steps are 2 with LODA, 1, 4 and 3."""
    monkeypatch.setattr(counted, "STEPS", 10)
    adapters = [models.adapter(small, counted.RANK, i) for i in range(2)]
    whole = programs.step_costs(small, 10, LodaConfig(), adapters=adapters)
    assert len(whole) == 10
    assert counted.picture_flops(small, LodaConfig()) == sum(step.flops for step in whole)


def test_a_default_step_makes_three_updates(small):
    one, two, default = (
        counted.short_run(small, config)[1].flops
        for config in (LodaConfig(loda_iterations=1), LodaConfig(loda_iterations=2), LodaConfig())
    )
    assert default - one == 2 * (two - one) > 0


@pytest.mark.parametrize("count", [1, 3])
def test_a_picture_with_routed_loras_added_up_from_its_steps_is_that_picture(small, monkeypatch, count):
    """Without LODA: a plan of 3 of 10 steps, where there is more than one LoRA."""
    monkeypatch.setattr(lora_rows, "STEPS", 10)
    loras = [models.lora(small, 4, i) for i in range(count)]
    whole = programs.step_costs(small, 10, LodaConfig(loda_steps=0), adapters=loras)
    assert len(whole) == (10 if count == 1 else 13)
    flops, step = lora_rows.pictures(small, loras, False)
    assert list(flops.values()) == [sum(step.flops for step in whole)]
    assert step.flops == whole[-5].flops


def test_loda_in_the_plan_of_loras_is_added_up_too(small, monkeypatch):
    monkeypatch.setattr(lora_rows, "STEPS", 10)
    loras = [models.lora(small, 4, i) for i in range(2)]
    whole = programs.step_costs(small, 10, LodaConfig(), adapters=loras)
    assert lora_rows.pictures(small, loras, True)[0]["2 LoRAs, LODA in the plan"] == sum(step.flops for step in whole)


def test_a_lora_changes_every_projection_of_the_transformers(small):
    lora = models.lora(small, 4)
    layers = [(n, m) for n, m in small.model.unet.named_modules() if ".attentions." in n and hasattr(m, "weight")]
    wanted = {n: m.weight.shape[:2] for n, m in layers if m.weight.ndim > 1}
    assert set(lora.factors) == set(wanted)
    assert models.lora_bytes(lora) == 4 * 4 * sum(sum(shape) for shape in wanted.values())


def test_the_peer_draws_the_same_picture_and_moves_the_latent(small):
    stock = programs.picture(small, 2).latents
    with programs.storing(small) as store:
        assert torch.allclose(programs.picture(small, 2).latents, stock, atol=1e-4)
        assert len(store) == 2 * 16
        assert all(torch.allclose(p.sum(dim=-1), torch.ones(())) for p in store)
        moved, whole = (programs.paper_update(small, store, 2, (4, 4), backward) for backward in (False, True))
    assert moved.shape == small.x.shape and not torch.equal(moved, small.x)
    assert torch.allclose(moved, whole, atol=1e-5)
    assert torch.equal(programs.picture(small, 2).latents, stock)


def test_lora_peer_starts_at_the_plain_model_and_leaves_nothing(small):
    pytest.importorskip("peft")
    names = list(small.model.unet.state_dict())
    stock = programs.picture(small, 1).latents
    parameters = programs.add_lora(small.model.unet, 4)
    try:
        assert len(parameters) == 2 * 16
        assert torch.equal(programs.picture(small, 1).latents, stock)
    finally:
        programs.remove_lora(small.model.unet)
    assert list(small.model.unet.state_dict()) == names
    assert torch.equal(programs.picture(small, 1).latents, stock)


def test_a_smaller_adapter_file_is_judged_by_what_it_keeps(monkeypatch):
    monkeypatch.setattr(sizes, "RANKS", (8, 1))
    path = sorted(sizes.ADAPTERS.glob("*.safetensors"))[0]
    whole, one = sizes.adapter_rows(host.load_model("demo"), load_adapter(path), path.stat().st_size, 4, 1)
    assert "rank 8, float16" in whole.what and "keeps 100.0 %" in whole.note and "SVD error 0.000" in whole.note
    assert 0.95 < whole.ours / whole.peer < 1.05
    assert one.ours / one.peer < 0.4 and "SVD error 0.000" not in one.note


def test_programs_run_in_turn_after_an_unmeasured_run():
    order = []
    taken = in_turn((lambda: order.append("a"), lambda: order.append("b")), 2)
    assert order == ["a", "b", "a", "b", "b", "a"] and len(taken) == 2


def test_rows_survive_their_file_and_reach_the_table(tmp_path):
    rows = [Row("w", "m", 0.123456, 2.0, "s", "p", "timed").to_dict()]
    assert (rows[0]["ours"], rows[0]["ratio"]) == (0.12346, 0.0617)
    write_json({"timed": rows}, tmp_path / "speed.json")
    assert read_rows(tmp_path / "speed.json") == {"timed": rows}
    assert "| w | m | 0.123 | 2 | s | p | 0.062 |" in table(rows) and rows[0]["machine"] in table(rows)
    assert "Machine" not in table([Row("w", "m", 1.0, 2.0, "MB", "p", "counted").to_dict()])


def test_the_committed_file_is_whole_and_the_page_is_made_from_it():
    content = json.loads(program.RESULTS.read_text(encoding="utf-8"))
    assert all(("machine" in row) == (row["how"] == "timed") for row in content["rows"])
    # ComfyUI is not on every machine that measures.
    assert {"counted", "timed", "size"} <= {row["part"] for row in content["rows"]} <= set(program.TITLES)
    assert {row["model"] for row in content["rows"] if row["part"] == "counted"} == set(models.LABELS.values())
    assert "/work" not in json.dumps(content) and "/root" not in json.dumps(content)
    assert program.PAGE.read_text(encoding="utf-8") == program.page(read_rows(program.RESULTS))
