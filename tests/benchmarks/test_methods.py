"""Arms on the demo model itself, with a handful of steps: what they change and what they must not."""

import numpy as np
import pytest
import torch

from benchmarks.separation import methods, run
from benchmarks.separation.methods import Arm, Learning, Sampling
from conceptsplit_core.demo.checkpoint import DEMO_FILE
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.loda import LodaConfig
from conceptsplit_core.tokens import row_mask

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
    return {kind: {n: methods.learn(model, n, kind, LEARNING, cache) for n in NAMES} for kind in methods.KINDS}


def drawn(model, arm, learned, seeds=(0, 1), **options):
    return methods.draw(model, arm, NAMES, seeds, learned.get(arm.kind, {}), SAMPLING, **options)[0]


def test_strength_zero_is_the_base_and_strength_one_is_not(model, learned):
    base = drawn(model, Arm(None, "plain"), learned)
    for kind in methods.KINDS:
        assert np.array_equal(drawn(model, Arm(kind, strength=0.0), learned), base), kind
        assert not np.array_equal(drawn(model, Arm(kind), learned), base), kind
    assert np.array_equal(drawn(model, Arm(None, "plain"), learned), base)  # nothing is left behind


def test_hooks_of_the_laboratory_equal_the_product(model, learned):
    product = drawn(model, Arm("value"), learned)
    positive = [methods.conditioning(model, NAMES, seed, "bound") for seed in (0, 1)]
    mask = torch.stack([row_mask(c.bindings, list(NAMES), c.context.shape[1]) for c in positive])
    parts = [(learned["value"][n], 1.0) for n in NAMES]
    with methods.attached(model, methods.KINDS["value"], parts, mask):
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
    arm = methods.arms(LodaConfig(steps=1, iterations=1))["tova_loda_afg"]
    both, alone = drawn(model, arm, learned), drawn(model, arm, learned, seeds=(1,))
    assert np.abs(both[1].astype(int) - alone[0]).mean() < 1.0


def test_every_arm_draws(model, learned):
    for name, arm in methods.arms(LodaConfig(steps=1, iterations=1)).items():
        images, facts = methods.draw(model, arm, NAMES, [3], learned.get(arm.kind, {}), SAMPLING)
        assert images.shape == (1, 128, 128, 3) and images.dtype == np.uint8, name
        if arm.loda is not None and arm.loda.step_size:
            assert facts[0]["jsd_before"] >= 0, name


def test_learning_is_cached_and_tied_to_the_weights(model, tmp_path):
    one = methods.learn(model, "bobo", "value", LEARNING, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    stamp = file.stat().st_mtime_ns
    two = methods.learn(model, "bobo", "value", LEARNING, tmp_path)
    assert file.stat().st_mtime_ns == stamp
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    bias = model.unet.conv_out.bias
    before = methods.fingerprint(model)
    with torch.no_grad():
        bias.add_(1.0)
    try:
        assert methods.fingerprint(model) != before
    finally:
        with torch.no_grad():
            bias.sub_(1.0)


def test_vae_round_trip_keeps_the_picture(model):
    image = run.confusion.drawings(1, 1)[0].image
    again = run.vae_round_trip(model)(image[None])[0]
    assert again.shape == image.shape and np.abs(again.astype(int) - image).mean() < 20
