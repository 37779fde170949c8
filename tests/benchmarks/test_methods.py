"""Arms on the demo model itself, with a handful of steps: what they change and what they must not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.separation import confusion, learning, methods, report, variants
from benchmarks.separation.learning import KINDS, Learning
from benchmarks.separation.methods import Arm, Sampling
from conceptsplit_core.demo.checkpoint import DEMO_FILE
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.settings import LodaConfig
from conceptsplit_core.text.binding import Concept, row_mask
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
    return {kind: {n: learning.learn(model, n, kind, LEARNING, cache) for n in NAMES} for kind in KINDS}


def drawn(model, arm, learned, seeds=(0, 1), **options):
    return methods.draw(model, arm, NAMES, seeds, learned.get(arm.kind, {}), SAMPLING, **options)[0]


def test_strength_zero_is_the_base_and_strength_one_is_not(model, learned):
    base = drawn(model, Arm(None, "plain"), learned)
    for kind in KINDS:
        assert np.array_equal(drawn(model, Arm(kind, strength=0.0), learned), base), kind
        assert not np.array_equal(drawn(model, Arm(kind), learned), base), kind
    assert np.array_equal(drawn(model, Arm(None, "plain"), learned), base)  # nothing is left behind


def test_hooks_of_the_laboratory_equal_the_product(model, learned):
    product = drawn(model, Arm("value"), learned)
    positive = [methods.conditioning(model, NAMES, seed, "bound") for seed in (0, 1)]
    mask = torch.stack([row_mask(c.bindings, list(NAMES), c.context.shape[1]) for c in positive])
    parts = [(learned["value"][n], 1.0) for n in NAMES]
    with learning.attached(model, KINDS["value"], parts, mask):
        out = host.sample(
            model, positive, seeds=[0, 1], concepts=list(NAMES), steps=SAMPLING.steps, guidance=SAMPLING.guidance
        )
    assert np.abs(out.images.astype(int) - product).max() <= 1


def test_unconditional_branch_changes_only_in_the_papers_code(model, learned):
    one = drawn(model, Arm("value"), learned)
    other = drawn(model, Arm("value", both_branches=True), learned)
    assert not np.array_equal(one, other)


def test_token_wise_adapters_leave_other_prompts_alone_and_lora_does_not(model, learned):
    texts = ["a ring on a grey background"] * 2
    base = drawn(model, Arm(None, "plain"), learned, texts=texts)
    for kind in ("value", "key", "key_value"):
        assert np.array_equal(drawn(model, Arm(kind), learned, texts=texts), base), kind
    assert not np.array_equal(drawn(model, Arm("lora"), learned, texts=texts), base)


def test_a_picture_does_not_depend_on_its_batch(model, learned):
    arm = methods.arms(LodaConfig(loda_steps=1, loda_iterations=1))["tova_loda_afg"]
    both, alone = drawn(model, arm, learned), drawn(model, arm, learned, seeds=(1,))
    assert np.abs(both[1].astype(int) - alone[0]).mean() < 1.0


def test_every_arm_draws(model, learned):
    for name, arm in methods.arms(LodaConfig(loda_steps=1, loda_iterations=1), SAMPLING.steps).items():
        images, facts = methods.draw(model, arm, NAMES, [3], learned.get(arm.kind, {}), SAMPLING)
        assert images.shape == (1, 128, 128, 3) and images.dtype == np.uint8, name
        if arm.loda is not None and arm.loda.loda_strength:
            assert facts[0]["jsd_before"] >= 0, name


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


def test_every_variant_changes_the_picture_and_leaves_nothing_behind(model, learned):
    loda = LodaConfig(loda_steps=1, loda_iterations=1, loda_strength=0.3, afg_region=0.5)
    base = drawn(model, Arm(loda=loda), learned)
    for name in variants.NAMES[1:]:
        assert not np.array_equal(drawn(model, Arm(loda=loda, variant=name), learned), base), name
    for option in ({"loda_rule": "sign"}, {"divergence": "iou"}, {"afg_rule": "overlapping"}):
        assert not np.array_equal(drawn(model, Arm(loda=replace(loda, **option)), learned), base), option
    assert np.array_equal(drawn(model, Arm(loda=loda), learned), base)


def test_start_and_end_of_an_adapter(model, learned):
    base, whole = drawn(model, Arm(None, "plain"), learned), drawn(model, Arm(), learned)
    assert np.array_equal(drawn(model, Arm(end=0.0), learned), base)
    late, early = drawn(model, Arm(start=0.5), learned), drawn(model, Arm(end=0.5), learned)
    assert not any(np.array_equal(one, other) for one in (late, early) for other in (base, whole))


def test_tara_masks_the_text_side_only(model, learned):
    adapter = learned["tara"]["bobo"]
    assert {name.rsplit("/", 1)[1] for name in adapter.layers} == {"to_q", "to_k", "to_v", "to_out"}
    assert any(".attn1/" in name for name in adapter.layers)
    kind = KINDS["tara"]
    modules = learning.projections(model, kind)
    rows = torch.randn(2, 77, 128)
    mask = torch.zeros(2, 77, 1)
    mask[:, 3] = 1
    with torch.no_grad(), learning.attached(model, kind, [(adapter, 1.0)], None) as state:
        state.mask = mask
        for name, module in modules.items():
            x = rows if module.in_features == 128 and ".attn2/to_" in name else torch.randn(2, 9, module.in_features)
            changed = (module(x) != F.linear(x, module.weight, module.bias)).any(dim=-1)
            if name.endswith((".attn2/to_k", ".attn2/to_v")):
                assert changed[:, 3].all() and not changed[:, :3].any() and not changed[:, 4:].any(), name
            elif adapter.up[name].any():
                assert changed.all(), name


def test_alignment_loss_reaches_the_keys_only(model):
    torch.manual_seed(0)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    info = learning.AdapterInfo("bobo", "circle", rank=2, alpha=2.0)
    adapter = learning.LowRankAdapter.create({f"{layer}/to_k": (128, 64), f"{layer}/to_v": (128, 64)}, info, 0)
    for tensor in adapter.up.values():
        tensor.normal_()
    for tensor in adapter.parameters():
        tensor.requires_grad_(True)
    mask = torch.zeros(1, 77, 1)
    mask[0, 2] = 1
    empty = torch.zeros(1)
    batch = TrainBatch(empty, empty, torch.randn(1, 77, 128), mask, {}, empty, None)
    loss = learning.key_change(adapter, batch)
    down, up = adapter.down[f"{layer}/to_k"], adapter.up[f"{layer}/to_k"]
    assert torch.allclose(loss, (batch.context[0, 2] @ down.t() @ up.t()).abs().mean())
    # The gradient of the sum of both losses, through a prediction that carries the second.
    prediction = torch.zeros(3, requires_grad=True)
    gradients = torch.autograd.grad(
        learning._WithLoss.apply(prediction, loss).sum(), [prediction, up, adapter.up[f"{layer}/to_v"]],
        allow_unused=True,
    )  # fmt: skip
    (alone,) = torch.autograd.grad(learning.key_change(adapter, batch), [up])
    assert torch.equal(gradients[0], torch.ones(3)) and torch.equal(gradients[1], alone) and gradients[2] is None


def test_perfusion_is_its_formula(model, learned):
    """h = W e − (sim/E) W i* + σ((sim/E − β)/τ) o*, against a direct computation; keys are locked to W i*."""
    adapter = learned["perfusion"]["bobo"]
    assert set(adapter.layers) - {"target"} == set(learning.projections(model, KINDS["value"]))
    target = adapter.down["target"][0]
    inverse = torch.linalg.inv(learning.second_moment(model))
    rows = torch.cat([torch.randn(1, 5, 128), target.expand(1, 1, 128)], dim=1)
    sim = (rows @ inverse @ target) / (target @ inverse @ target)
    gate = torch.sigmoid((sim - learning.BETA) / learning.TAU)[..., None]
    with torch.no_grad(), learning.attached(model, KINDS["perfusion"], [(adapter, 1.0)], None):
        for name, module in learning.projections(model, KINDS["perfusion"]).items():
            own = module.weight @ target
            new = own if name.endswith("to_k") else adapter.up[name][:, 0]
            plain = rows @ module.weight.t()
            assert torch.allclose(module(rows), plain - sim[..., None] * own + gate * new, atol=2e-3), name


def test_subject_masks_lie_in_the_picture(model):
    images, given = learning.pictures_of("bobo", LEARNING)
    found = learning.subject_masks(model, images, Concept("bobo", "circle"), noises=1)
    assert found.shape == given.shape and float(found.min()) >= 0 and float(found.max()) <= 1
    inside = (found * given).sum() / given.sum()
    outside = (found * (1 - given)).sum() / (1 - given).sum()
    assert inside > 1.5 * outside


def test_suppression_leaves_one_concept_a_pixel(model):
    """With it the loser's attention is nil where it loses, and every row's attention still sums to one."""
    names = ["bobo", "lumo"]
    cond = methods.conditioning(model, names, 0, "bound")
    mask = row_mask(cond.bindings, names, 77)[None]
    x = torch.randn(1, 8, 16, 16)

    def maps(inside):
        seen = {}

        def keep(attn, args, kwargs):
            seen["bias"] = kwargs.get("attention_mask")

        layer = next(iter(host.cross_attention_layers(model.unet).values()))
        with torch.no_grad(), inside:
            handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
            try:
                host.call_unet(model, torch.cat([x, x]), 500, cond.context.expand(2, -1, -1))
            finally:
                handle.remove()
        return seen["bias"]

    assert maps(variants.varied(model, "", mask)) is None
    bias = maps(variants.suppressing(model, mask))
    rows = [cond.bindings[i].rows[0] for i in range(2)]
    assert not bias[0].any()  # the unconditional half
    shut = bias[1][:, rows] < -10
    assert shut.sum(dim=1).max() == 1 and shut.any()
    others = [r for r in range(77) if r not in rows]
    assert not bias[1][:, others].any()
