"""Arms on the demo model itself, with a handful of steps: what they change and what they must not."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.separation import confusion, learning, methods, report
from benchmarks.separation.learning import RECIPES, Learning
from benchmarks.separation.methods import Arm, Sampling
from conceptsplit_core.adapters import KINDS, AdapterInfo, LowRankAdapter
from conceptsplit_core.adapters.file import adapter_bytes, parse_adapter
from conceptsplit_core.demo.checkpoint import DEMO_FILE
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.network.hooks import learning as while_learning
from conceptsplit_core.settings import LodaConfig
from conceptsplit_core.train.data import TrainBatch

pytestmark = pytest.mark.skipif(not DEMO_FILE.exists(), reason="the demo model is not in this checkout")

NAMES = ("bobo", "lumo")
SAMPLING = Sampling(steps=3, guidance=4.0, batch=2)
LEARNING = Learning(images=2, steps=3, batch_size=2, learning_rate=0.05)


@pytest.fixture(scope="module")
def model():
    return host.load_model("demo")


@pytest.fixture(scope="module")
def learned(model, tmp_path_factory):
    cache = tmp_path_factory.mktemp("adapters")
    used = {recipe for arm in methods.arms(LodaConfig()).values() for recipe in arm.lessons(NAMES).values()}
    return {recipe: {n: learning.learn(model, n, recipe, LEARNING, cache) for n in NAMES} for recipe in sorted(used)}


def drawn(model, arm, learned, seeds=(0, 1), **options):
    return methods.draw(model, arm, NAMES, seeds, taught(arm, learned), SAMPLING, **options)[0]


def taught(arm, learned):
    return {name: learned[recipe][name] for name, recipe in arm.lessons(NAMES).items()}


def test_strength_zero_is_the_base_and_strength_one_is_not(model, learned):
    base = drawn(model, Arm(None, "plain"), learned)
    for recipe in learned:
        assert np.array_equal(drawn(model, Arm(recipe, strength=0.0), learned), base), recipe
        assert not np.array_equal(drawn(model, Arm(recipe), learned), base), recipe
    assert np.array_equal(drawn(model, Arm(None, "plain"), learned), base)  # nothing is left behind


def test_unconditional_branch_changes_only_in_the_papers_code(model, learned):
    one = drawn(model, Arm("value"), learned)
    other = drawn(model, Arm("value", both_branches=True), learned)
    assert not np.array_equal(one, other)


def test_token_wise_adapters_leave_other_prompts_alone_and_lora_does_not(model, learned):
    texts = ["a ring on a grey background"] * 2
    base = drawn(model, Arm(None, "plain"), learned, texts=texts)
    for kind in ("value", "key", "key_value"):
        assert np.array_equal(drawn(model, Arm(kind), learned, texts=texts), base), kind
    assert not np.array_equal(drawn(model, Arm("lora", scope="everywhere"), learned, texts=texts), base)


def test_a_picture_does_not_depend_on_its_batch(model, learned):
    arm = methods.arms(LodaConfig(loda_steps=1, loda_iterations=1))["tova_loda_afg"]
    both, alone = drawn(model, arm, learned), drawn(model, arm, learned, seeds=(1,))
    assert np.abs(both[1].astype(int) - alone[0]).mean() < 1.0


def test_every_arm_draws(model, learned):
    for name, arm in methods.arms(LodaConfig(loda_steps=1, loda_iterations=1), SAMPLING.steps).items():
        images, facts = methods.draw(model, arm, NAMES, [3], taught(arm, learned), SAMPLING)
        assert images.shape == (1, 128, 128, 3) and images.dtype == np.uint8, name
        if arm.loda is not None and arm.loda.loda_strength and arm.loda.loda_steps:
            assert facts[0]["jsd_before"] >= 0, name


def test_recipes_go_to_the_concepts_in_turn():
    names = ("bobo", "lumo", "nero")
    assert Arm("lora+value").lessons(names) == {"bobo": "lora", "lumo": "value", "nero": "lora"}
    assert Arm("tara").lessons(names[:2]) == {"bobo": "tara", "lumo": "tara"}
    assert Arm(None).lessons(names) == {}


def test_slices_follow_the_order_of_the_prompt():
    names = ("bobo", "lumo", "nero")
    found = methods.slices_of(names, [4, 7], (2, 10))
    text = methods.prompt_for(names, 7, "bound")
    assert text.index("<nero>") < text.index("<lumo>") < text.index("<bobo>")
    columns = {name: [[int(c) for c in row[0]] for row in masks] for name, masks in found.items()}
    first, middle, last = [1] * 3 + [0] * 7, [0] * 3 + [1] * 4 + [0] * 3, [0] * 7 + [1] * 3
    assert columns == {"bobo": [first, last], "lumo": [middle, middle], "nero": [last, first]}


def test_a_lora_of_convolutions_is_the_merged_one(model, learned):
    """The whole LoRA of one concept at strength 0.7, against weights to which its product was added by hand."""
    file = adapter_bytes(learned["lora_whole"]["bobo"], None)
    adapter, merged = parse_adapter(file, "bobo.safetensors"), copy.deepcopy(model.unet)
    kernels = set()
    for name, down in adapter.down.items():
        weight = merged.get_submodule(name).weight
        kernels.add(tuple(weight.shape[2:]))
        change = adapter.up[name] @ down * (0.7 * adapter.info.alpha / adapter.info.rank)
        weight.data += change.view_as(weight)
    assert kernels == {(), (1, 1), (3, 3)}
    arm = Arm("lora_whole", strength=0.7, scope="everywhere")
    ours = methods.draw(model, arm, ("bobo",), [5], {"bobo": adapter}, SAMPLING)[0]
    theirs = methods.draw(replace(model, unet=merged), Arm(None), ("bobo",), [5], {}, SAMPLING)[0]
    base = methods.draw(model, Arm(None), ("bobo",), [5], {}, SAMPLING)[0]
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert np.abs(ours.astype(int) - base).max() > 10


def test_learning_is_cached_and_tied_to_the_weights(model, tmp_path):
    one = learning.learn(model, "bobo", "value", LEARNING, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    stamp = file.stat().st_mtime_ns
    two = learning.learn(model, "bobo", "value", LEARNING, tmp_path)
    assert file.stat().st_mtime_ns == stamp
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    bias = model.unet.conv_out.bias
    before = learning.fingerprint(model)
    with torch.no_grad():
        bias.add_(1.0)
    try:
        assert learning.fingerprint(model) != before
    finally:
        with torch.no_grad():
            bias.sub_(1.0)


def test_vae_round_trip_keeps_the_picture(model):
    image = confusion.drawings(1, 1)[0].image
    again = report.vae_round_trip(model)(image[None])[0]
    assert again.shape == image.shape and np.abs(again.astype(int) - image).mean() < 20


def test_every_option_changes_the_picture(model, learned):
    loda = LodaConfig(loda_steps=1, loda_iterations=1, loda_strength=0.3, afg_region=0.5)
    base = drawn(model, Arm(loda=loda), learned)
    options = {"loda_rule": "sign", "divergence": "iou", "afg_rule": "overlapping", "suppression": 0.5}
    for name, value in options.items():
        other = drawn(model, Arm(loda=replace(loda, **{name: value})), learned)
        assert not np.array_equal(other, base), name
    assert not np.array_equal(drawn(model, Arm(loda=loda, corrected=True), learned), base)
    routed = drawn(model, Arm("lora", loda=loda), learned)
    assert not np.array_equal(routed, drawn(model, Arm("lora", loda=loda, scope="everywhere"), learned))
    assert np.array_equal(drawn(model, Arm(loda=loda), learned), base)  # nothing is left behind


def test_tara_and_lora_learn_at_other_tokens(model, learned):
    """While they learn: both act on all pixels; on text TARA acts at the class word's row, an ordinary LoRA at all."""
    network = host.network_map(model)
    rows, pixels = torch.randn(2, 77, 128), torch.randn(2, 9, 64)
    mask = torch.zeros(2, 77, 1)
    mask[:, 3] = 1
    for recipe in ("tara", "lora"):
        adapter = learned[recipe]["bobo"]
        assert {name.rsplit(".to_", 1)[1] for name in adapter.sites} == {"q", "k", "v", "out.0"}
        plain = {}
        changed = {}
        inputs = {name: rows if network.sites[name].reads == "text" else pixels for name in adapter.sites}
        inputs = {name: x for name, x in inputs.items() if network.module(name).in_features == x.shape[-1]}
        with torch.no_grad():
            plain = {name: network.module(name)(x) for name, x in inputs.items()}
            with while_learning(network, KINDS[recipe], adapter, RECIPES[recipe].scope) as publish:
                publish(mask)
                changed = {name: (network.module(name)(x) != plain[name]).any(dim=-1) for name, x in inputs.items()}
        assert any("attn1" in name for name in inputs) and any("attn2.to_k" in name for name in inputs)
        for name, where in changed.items():
            if network.sites[name].reads == "text" and recipe == "tara":
                assert where[:, 3].all() and where.sum() == 2, name
            elif adapter.up[name].any():
                assert where.all(), name


def test_alignment_loss_reaches_the_keys_only(model):
    torch.manual_seed(0)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    info = AdapterInfo("bobo", "circle", rank=2, alpha=6.0, kind="tara")
    adapter = LowRankAdapter.create({f"{layer}.to_k": (128, 64), f"{layer}.to_v": (128, 64)}, info, 0)
    for tensor in adapter.up.values():
        tensor.normal_()
    for tensor in adapter.parameters():
        tensor.requires_grad_(True)
    mask = torch.zeros(1, 77, 1)
    mask[0, 2] = 1
    empty = torch.zeros(1)
    batch = TrainBatch(empty, empty, torch.randn(1, 77, 128), mask, {}, empty, None)
    loss = learning.key_change(adapter, batch)
    down, up = adapter.down[f"{layer}.to_k"], adapter.up[f"{layer}.to_k"]
    assert torch.allclose(loss, 3 * (batch.context[0, 2] @ down.t() @ up.t()).abs().mean())
    # The gradient of the sum of both losses.
    prediction = torch.zeros(3, requires_grad=True)
    gradients = torch.autograd.grad(
        prediction.sum() + loss, [prediction, up, adapter.up[f"{layer}.to_v"]],
        allow_unused=True,
    )  # fmt: skip
    (alone,) = torch.autograd.grad(learning.key_change(adapter, batch), [up])
    assert torch.equal(gradients[0], torch.ones(3)) and torch.equal(gradients[1], alone) and gradients[2] is None
