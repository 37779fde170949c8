"""Public reports about other programs, tried in the terminal's host; docs/robustness/reports.md is the log."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from test_routed import call, merge, run, setting, sites_of
from tiny import REX

from conceptsplit_core import ConceptSplitError
from conceptsplit_core.hosts import diffusers as host


def parts(model, sites, ranks):
    """A, B by site, with the ranks given in turn."""
    g = torch.Generator().manual_seed(7)
    network, found = host.network_map(model), {}
    for i, site in enumerate(sites):
        tall, wide, *kernel = network.module(site).weight.shape
        r = ranks[i % len(ranks)]
        down = torch.randn(r, wide, *kernel, generator=g, dtype=torch.float64) * 0.3
        up = torch.randn(tall, r, *(1 for _ in kernel), generator=g, dtype=torch.float64) * 0.3
        found[site] = (down, up)
    return found


def product(pair):
    return torch.einsum("or,r...->o...", pair[1].flatten(1), pair[0])


@pytest.mark.parametrize(
    ("layout", "ranks", "alphas"),
    [
        ("unet.{}.lora_A.weight unet.{}.lora_B.weight", (2, 7), None),
        ("lora_unet_{_}.lora_down.weight lora_unet_{_}.lora_up.weight", (3,), (94.0, 123.0, 1.5)),
        ("unet.base_model.model.{}.lora_A.weight unet.base_model.model.{}.lora_B.weight", (3,), None),
    ],
    ids=["ranks of their own without alpha", "alphas of their own", "SimpleTuner's names"],
)
def test_scales_and_names_of_other_trainers(load, tmp_path, layout, ranks, alphas):
    model, text, pooled, mask = setting(load, "sd15")
    found = parts(model, sites_of("sd15"), ranks)
    state, dense = {}, {}
    for i, (site, pair) in enumerate(found.items()):
        names = layout.replace("{_}", site.replace(".", "_")).replace("{}", site).split()
        state |= dict(zip(names, pair, strict=True))
        scale = 1.0
        if alphas:
            alpha = alphas[i % len(alphas)]
            state[names[0].replace("lora_down.weight", "alpha")] = torch.tensor(alpha)
            scale = alpha / pair[0].shape[0]
        dense[site] = 0.02 * scale * product(pair)
    path = tmp_path / "anna.safetensors"
    save_file(state, path)
    adapter, report = host.read_lora(model, path, REX)
    assert not report.left_out
    routed = run(model, [(adapter, 0.02), (None, 0.0)], ["everywhere", None], mask, None, text, pooled)
    torch.testing.assert_close(routed, call(merge(model, dense, 1.0), text, pooled), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_lora_whose_training_has_diverged_is_refused(load, tmp_path, value):
    model = load()
    state = {}
    for site, (down, up) in parts(model, sites_of("sd15")[:3], (2,)).items():
        state |= {f"unet.{site}.lora.down.weight": down.float(), f"unet.{site}.lora.up.weight": up.float()}
    bad = sites_of("sd15")[1]
    state[f"unet.{bad}.lora.up.weight"].view(-1)[3] = value
    save_file(state, tmp_path / "anna.safetensors")
    with pytest.raises(ConceptSplitError, match=f"holds values that are not finite at {bad}"):
        host.read_lora(model, tmp_path / "anna.safetensors", REX)
