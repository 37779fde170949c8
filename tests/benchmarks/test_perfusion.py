"""What the measuring of Perfusion's limits puts into which form, against sums of its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.separation import learning, perfusion
from conceptsplit_core.adapters import KINDS
from conceptsplit_core.demo.checkpoint import DEMO_FILE
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.method.tova import TokenMask
from conceptsplit_core.network.hooks import Member
from conceptsplit_core.text.concepts import Concept

pytestmark = pytest.mark.skipif(not DEMO_FILE.exists(), reason="the demo model is not in this checkout")
CIRCLE = Concept("kiku", "circle")


@pytest.fixture(scope="module")
def model():
    return learning.open_model("demo")


def random(tensors, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {site: torch.randn(one.shape, generator=generator) for site, one in tensors.items()}


def added(network, adapter, site, rows):
    """What the adapter's kind adds to a layer's output of these rows [m, d]."""
    x, layer = rows[None], network.module(site)
    with torch.no_grad():
        out = layer(x)
        mask = TokenMask(torch.ones(1, len(rows), 1))
        kind, member = KINDS[adapter.info.kind], Member(adapter, 1.0)
        _, change = kind.change((member,), network.sites[site], layer, x, out, mask)
    return change.reshape(out.shape)[0]


def test_the_constant_share_of_a_change():
    same, opposite = torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[3.0, 0.0], [-3.0, 0.0]])
    assert perfusion.constant_share({"a": same}) == 1.0 and perfusion.constant_share({"a": opposite}) == 0.0
    assert perfusion.constant_share({"a": same, "b": opposite}) == pytest.approx(10 / 28)
    one = SimpleNamespace(sites=["v"], down={"v": torch.eye(2)}, up={"v": 2 * torch.eye(2)}, scale=lambda _: 0.5)
    assert torch.equal(perfusion.changes(one, same)["v"], same)


def test_a_value_adapters_change_in_other_forms_is_its_mean_at_the_class_word(model):
    value = host.new_adapter(model, CIRCLE, 2, 2.0, 0)
    value.up = random(value.up)
    rows, network = perfusion.encodings(model, "kiku"), host.network_map(model)
    site = sorted(value.sites)[1]
    wanted = (rows @ value.down[site].t() @ value.up[site].t()).mean(dim=0)
    infusion, gated = (put(model, "kiku", value) for put in perfusion.HELD.values())
    assert infusion.info.kind == "infusion" and gated.info.kind == "perfusion"
    torch.testing.assert_close(infusion.own[site], wanted)
    torch.testing.assert_close(added(network, gated, site, gated.target)[0], wanted, atol=1e-3, rtol=1e-3)


def test_each_training_prompts_word_can_have_a_vector_of_its_own(model):
    rows, network = perfusion.encodings(model, "kiku"), host.network_map(model)
    plain, spanned = (host.new_adapter(model, CIRCLE, 1, 1.0, 0, kind=k) for k in ("perfusion", "perfusion_spanned"))
    moment = torch.cov(torch.randn(rows.shape[1], 400, generator=torch.Generator().manual_seed(4))).double()
    for adapter in (plain, spanned):
        adapter.lock(rows, moment)
    spanned.own = random(spanned.own)
    plain.own = {site: own[0].clone() for site, own in spanned.own.items()}
    shares = rows @ spanned.more.t()  # [prompts, directions]
    torch.testing.assert_close(spanned.target @ spanned.more.t(), torch.zeros(1, 4), atol=1e-3, rtol=0)
    assert torch.linalg.matrix_rank(torch.cat([torch.ones(len(rows), 1), shares], dim=1), tol=1e-3) == len(rows) == 5
    site = sorted(spanned.own)[0]
    sim = rows @ plain.direction[0]
    gate = torch.sigmoid((sim - 0.75) / 0.1)[:, None]
    wanted = added(network, plain, site, rows) + gate * (shares @ spanned.own[site][1:])
    torch.testing.assert_close(added(network, spanned, site, rows), wanted, atol=1e-3, rtol=1e-3)
