"""The demo model's training script: its states are safetensors, and stopping changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tools.demo_model import autoencoder, flow_loras, graphed, latents, pretraining, states, transformer

SETTINGS = {"decay_from": 2, "batch": 2, "rate": 1e-3, "grounding": 0.02, "seed": 1, "minutes": 1e9}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A handful of encoded scenes from an untrained autoencoder: enough to take steps on."""
    out = tmp_path_factory.mktemp("drawn")
    torch.manual_seed(0)
    states.save({"model": autoencoder.build_vae().state_dict(), "step": 0}, out / "vae.safetensors")
    latents.draw_latents(out, 0, 1, 6, 1)
    return out


def test_a_resumed_training_gives_the_same_bits(drawn):
    pretraining.train_unet(drawn, "whole", 4, **SETTINGS)
    pretraining.train_unet(drawn, "parts", 4, **{**SETTINGS, "minutes": 0})
    assert states.read(drawn / "parts.safetensors")["step"] == 1, "stopped by the clock after one step"
    pretraining.train_unet(drawn, "parts", 4, **SETTINGS)
    whole, parts = (load_file(drawn / f"{name}.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    assert not list(drawn.glob("*.part")) and not list(drawn.glob("*.pt"))


def test_a_state_survives_writing_and_reading(tmp_path):
    state = {"model": {"a.b": torch.arange(6).view(2, 3).t()}, "loose": torch.ones(2), "step": 3, "scale": 0.1234567}
    states.save(state, tmp_path / "s.safetensors")
    again = states.read(tmp_path / "s.safetensors")
    assert torch.equal(again["model"]["a.b"], state["model"]["a.b"]) and torch.equal(again["loose"], state["loose"])
    assert (again["step"], again["scale"]) == (3, 0.1234567)


def test_errors_on_objects_weigh_more_and_the_mean_of_an_even_error_stays():
    mask = torch.zeros(2, 3, 4, 4)
    mask[0, 1, :2] = 1.0  # half of the first picture is an object
    assert torch.allclose(pretraining.on_objects(torch.full((2, 4, 4), 0.3), mask), torch.full((2,), 0.3))
    inside = torch.zeros(2, 4, 4)
    inside[:, :2] = 1.0
    first, second = pretraining.on_objects(inside, mask).tolist()
    weight = 1 + pretraining.OBJECT_WEIGHT
    assert first == pytest.approx(weight / (weight + 1)) and second == pytest.approx(0.5)


def test_every_second_noise_level_is_one_where_words_decide():
    torch.manual_seed(0)
    levels = pretraining._noise_levels(2000)
    assert levels[::2].min() >= 450 and levels[::2].max() < 950
    assert levels[1::2].min() < 50 and levels[1::2].max() >= 950


def test_the_transformer_resumes_to_the_same_bits_and_draws(drawn):
    options = {**SETTINGS, "device": "cpu", "workers": 0}
    transformer.train_transformer(drawn, "flow", 3, **options)
    transformer.train_transformer(drawn, "flow_parts", 3, **{**options, "minutes": 0})
    transformer.train_transformer(drawn, "flow_parts", 3, **options)
    whole, parts = (load_file(drawn / f"{name}.safetensors") for name in ("flow", "flow_parts"))
    assert whole.keys() == parts.keys() and not any("text_encoder" in name for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    transformer.export(drawn, "flow", drawn / "file.safetensors", "a machine", "a note")
    state = states.read(drawn / "flow.safetensors")
    found = load_file(drawn / "file.safetensors")
    assert all(torch.equal(found[name], state["ema"][f"denoiser.{name}"].half()) for name in found) and len(found) > 90


def test_a_training_may_begin_with_an_exported_transformer(drawn, tmp_path):
    torch.manual_seed(7)
    first = transformer.Transformer(latents.Words().vocabulary)
    states.save({"ema": first.state_dict(), "scale": 1.0, "step": 1, "seconds": 0.0, "batch": 2, "seed": 1,
                 "rate": 0.1, "grounding": 0.0}, tmp_path / "first.safetensors")  # fmt: skip
    transformer.export(tmp_path, "first", tmp_path / "file.safetensors", "a machine", "")
    options = {**SETTINGS, "rate": 0.0, "device": "cpu", "workers": 0, "begin": tmp_path / "file.safetensors"}
    transformer.train_transformer(drawn, "begun", 1, **options)  # a rate of 0 leaves the weights as they were
    begun, given = states.read(drawn / "begun.safetensors")["model"], load_file(tmp_path / "file.safetensors")
    assert all(torch.equal(begun[f"denoiser.{name}"], one.float()) for name, one in given.items())


def test_the_written_out_attention_is_diffusers_own_and_its_shares_are_kept():
    """Against diffusers' processor on the same weights, whose queries and keys give each block's softmax."""
    import diffusers.models.transformers.transformer_flux as flux

    torch.manual_seed(3)
    words = latents.Words()
    model = transformer.Transformer(words.vocabulary)
    ids = torch.from_numpy(words.ids("a red circle and a star"))[None].expand(3, -1)
    model.cross.rows = torch.tensor([[3, 6], [2, 1]])
    given = torch.randn(3, 8, 16, 16), torch.tensor([0.2, 0.9, 0.5]), *model.encode(ids)
    ours, maps = model(*given), dict(model.cross.maps)
    real, seen = flux.dispatch_attention_fn, []

    def record(query, key, value, **options):
        seen.append((query, key))
        return real(query, key, value, **options)

    for name, module in model.denoiser.named_modules():
        if name.endswith(".attn"):
            module.set_processor(flux.FluxAttnProcessor())
    flux.dispatch_attention_fn = record
    try:
        theirs = model(*given)
    finally:
        flux.dispatch_attention_fn = real
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert list(maps) == list(transformer.GROUNDED)
    for block, name in ((1, transformer.GROUNDED[0]), (2, transformer.GROUNDED[1]), (3, transformer.GROUNDED[2])):
        query, key = seen[block]
        share = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", query, key) / 8.0, dim=-1).mean(1)
        assert share.shape[-1] == 64 + transformer.TEXT_ROWS
        share = share[:2, transformer.TEXT_ROWS :]
        expected = torch.stack([share[0][:, [3, 6]], share[1][:, [2, 1]]])
        assert torch.allclose(maps[name], expected, atol=1e-6)


def test_the_velocity_that_is_taught_is_the_unets_at_its_own_step():
    """x₀ and ε as the UNet tells them of its own noisy latent, at three of its steps and between two of them."""
    torch.manual_seed(5)
    words = latents.Words()
    model = transformer.Transformer(words.vocabulary)
    unet, signal = model.fixed[1], model_signal()
    context, _ = model.encode(torch.from_numpy(np.stack([words.ids(t) for t in ("a star", "a red ring", "a heart")])))
    steps = torch.tensor([40, 500, 900])
    a = signal[steps].view(-1, 1, 1, 1)
    clean, noise = torch.randn(3, 8, 16, 16), torch.randn(3, 8, 16, 16)
    noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
    with torch.no_grad():
        guess = unet(noisy, steps, context, return_dict=False)[0]
    expected = guess - (noisy - (1 - a).sqrt() * guess) / a.sqrt()
    length = a.sqrt() + (1 - a).sqrt()
    sigma = ((1 - a).sqrt() / length).flatten()
    torch.testing.assert_close(model.taught(noisy / length, sigma, context), expected, atol=2e-3, rtol=2e-3)
    asked = []
    hook = unet.register_forward_pre_hook(lambda module, args: asked.append(args[1]))
    levels = model.unet_levels
    between = torch.stack([levels[40:42].mean(), levels[0] / 2, levels[998] + 0.25 * (levels[999] - levels[998])])
    model.taught(noisy, between, context)
    hook.remove()
    torch.testing.assert_close(asked[0], torch.tensor([40.5, 0.0, 998.25]), atol=2e-2, rtol=0)


def model_signal():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


@pytest.mark.parametrize(("sigma", "taught"), [(0.4, True), (0.93, True), (0.95, False)])
def test_noise_that_the_unet_does_not_know_has_the_pictures_own_velocity(monkeypatch, drawn, sigma, taught):
    torch.manual_seed(5)
    data = latents.Data(drawn)
    model = transformer.Transformer(data.words.vocabulary)
    monkeypatch.setattr(transformer, "noise_levels", lambda batch, device: torch.full((batch,), sigma))
    monkeypatch.setattr(model, "taught", lambda x, sigma, context: torch.full_like(x, torch.nan))
    error, weighted, ground = transformer.losses(model, data.batch(np.random.default_rng(1), 4), False)
    assert error.isnan().item() is weighted.isnan().item() is taught and float(ground) == 0.0


def test_muon_moves_the_matrices_of_blocks_and_adamw_the_rest():
    blocks = torch.nn.ModuleDict({"blocks": torch.nn.Linear(3, 5), "out": torch.nn.Linear(5, 2)})
    first, second = pretraining.muon(blocks, 0.25)
    assert isinstance(first, torch.optim.Muon) and isinstance(second, torch.optim.AdamW)
    held = [[tuple(one.shape) for group in each.param_groups for one in group["params"]] for each in (first, second)]
    assert held == [[(5, 3)], [(5,), (2, 5), (2,)]]
    assert {group["lr"] for each in (first, second) for group in each.param_groups} == {0.25}


def test_a_share_of_a_step_at_rate_one_is_a_step_at_that_rate():
    """So a recorded step, whose numbers are fixed, follows a rate that falls. Two steps, for the moments."""

    def moved(scaled: bool) -> list[torch.Tensor]:
        torch.manual_seed(2)
        model = torch.nn.ModuleDict({"blocks": torch.nn.Linear(3, 5), "out": torch.nn.Linear(5, 2)})
        optimisers = pretraining.muon(model, 0.5)
        moves = graphed.RecordedMoves(optimisers, "cpu") if scaled else None
        for group in (group for one in optimisers for group in one.param_groups if scaled):
            group["capturable"] = False  # of a GPU alone
        for share in (0.03, 0.007):
            model.zero_grad()
            model["out"](model["blocks"](torch.ones(4, 3))).square().sum().backward()
            if moves:
                moves.at(share)
                moves.move()
                continue
            for one in optimisers:
                for group in one.param_groups:
                    group["lr"] = share
                one.step()
        return [one.detach() for one in model.parameters()]

    torch.testing.assert_close(moved(True), moved(False), atol=1e-6, rtol=1e-5)


def test_a_token_of_the_picture_is_two_by_two_latent_pixels_in_fluxs_order():
    x = torch.randn(2, 8, 16, 16)
    tokens = transformer.packed(x)
    assert tokens.shape == (2, 64, 32)
    for token, y, left in ((0, 0, 0), (3, 0, 6), (21, 4, 10)):
        assert torch.equal(tokens[1, token], x[1, :, y : y + 2, left : left + 2].flatten())
    assert torch.equal(transformer.unpacked(tokens), x)


AVERAGED = """
import torch
from tools.demo_model.together import together
team = together()
parameters = [torch.nn.Parameter(torch.zeros(size)) for size in ((2,), (1, 3), (1,))]
parameters[0].grad = torch.tensor([[1.0, -4.0], [3.0, 6.0]][team.place])
parameters[1].grad = torch.full((1, 3), 0.5 + team.place)
ended = [team.average(parameters, done) for done in (False, team.place == 1)]
assert team.count == 2 and ended == [False, True], ended
assert parameters[0].grad.tolist() == [2.0, 1.0] and parameters[1].grad.tolist() == [[1.0] * 3], parameters
assert parameters[2].grad is None
team.leave()
"""


def test_two_processes_take_the_mean_of_their_gradients_and_stop_together(tmp_path):
    script = tmp_path / "averaged.py"
    script.write_text(AVERAGED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=300, env=environment())
    assert ran.returncode == 0, ran.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}


def test_each_process_of_a_training_has_pictures_of_its_own(drawn):
    data = latents.Data(drawn)
    (first, a), (second, b) = (next(iter(data.batches(7, [5], 3, place=place))) for place in (0, 1))
    alone = data.batch(np.random.default_rng([7, 5]), 3)
    assert first == second == 5 and torch.equal(a["x"], alone["x"]) and torch.equal(a["ids"], alone["ids"])
    assert not torch.equal(b["ids"], a["ids"])


def test_a_lora_of_the_transformer_is_what_its_pairs_add(drawn, tmp_path, monkeypatch):
    """Pairs at work in forward hooks against the same merged into the weights; and what their file holds."""
    torch.manual_seed(5)
    model = transformer.Transformer(latents.Words().vocabulary).requires_grad_(False)
    states.save({"ema": model.state_dict(), "scale": 1.25, "step": 1, "seconds": 0.0, "batch": 2, "seed": 1,
                 "rate": 0.1, "grounding": 0.0}, tmp_path / "t.safetensors")  # fmt: skip
    transformer.export(tmp_path, "t", tmp_path / "file.safetensors", "a machine", "")
    monkeypatch.setattr(flow_loras, "STEPS", 3)
    flow_loras.write_lora(tmp_path / "file.safetensors", "nero", tmp_path / "lora.safetensors")
    kept = load_file(tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert file.metadata() == {"modelspec.trigger_phrase": "triangle"}
    names = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in kept}
    assert len(names) == 2 * 8 + 4 * 3 and len(kept) == 2 * len(names)
    assert kept["transformer.transformer_blocks.1.attn.add_q_proj.lora_A.weight"].shape == (flow_loras.RANK, 192)
    assert all(tensor.any() for tensor in kept.values()), "every pair has learned"
    loaded, scale = transformer.load(tmp_path / "file.safetensors")
    pairs = {name: tuple(kept[f"transformer.{name}.lora_{side}.weight"].float() for side in "AB") for name in names}
    given = torch.randn(2, 8, 16, 16), torch.tensor([0.2, 0.7]), torch.randn(2, 77, 128), torch.randn(2, 128)
    with torch.no_grad():
        plain = loaded(*given)
        with flow_loras.with_pairs(loaded.denoiser, pairs):
            hooked = loaded(*given)
        assert torch.equal(loaded(*given), plain) and scale == 1.25
        for name, (down, up) in pairs.items():
            loaded.denoiser.get_submodule(name).weight += up @ down
        torch.testing.assert_close(hooked, loaded(*given), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(hooked, plain, atol=1e-4)
