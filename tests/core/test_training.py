import hashlib
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conceptsplit_core.adapters.base import KINDS, AdapterInfo
from conceptsplit_core.adapters.gated import covariance
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.method.subject import acting_areas
from conceptsplit_core.network.site import AttentionSite, NetworkMap, Site
from conceptsplit_core.settings import TrainConfig
from conceptsplit_core.text.concepts import Concept
from conceptsplit_core.train.adapter import begin, training_facts
from conceptsplit_core.train.adapter import new_adapter as start_adapter
from conceptsplit_core.train.captions import neutral_captions
from conceptsplit_core.train.data import Process, TrainData, image_order, make_batch
from conceptsplit_core.train.loop import TrainEvent, batch_loss, train
from conceptsplit_core.train.progress import ProgressBar
from conceptsplit_core.train.prompts import DEFAULT_TEMPLATES, MAX_TEMPLATE_BYTES, Prompt, expand_templates

# Helper modules of this folder, whatever import mode pytest runs in.
sys.path.insert(0, str(Path(__file__).parent))

from toy import ALPHAS, LAYER, data, new_adapter, overflowing, toy_denoise


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("masks", [False, True])
def test_training_lowers_the_loss_and_moves_the_adapter(prediction, masks):
    adapter = new_adapter()
    config = TrainConfig(steps=150, batch_size=4, learning_rate=3e-2, prediction_type=prediction)
    result = train(adapter, data(masks=masks), ALPHAS, toy_denoise(adapter), config)
    assert len(result.losses) == 150
    assert sum(result.losses[-30:]) < sum(result.losses[:30]) * 0.98
    assert adapter.up[LAYER].abs().max() > 0
    assert not any(t.requires_grad for t in adapter.parameters())


def test_every_batch_row_has_the_rows_of_its_own_prompt():
    seen = []
    adapter = new_adapter()
    train(adapter, data(), ALPHAS, toy_denoise(adapter, seen), TrainConfig(steps=6, batch_size=8))
    kinds = {tuple(row.nonzero().flatten().tolist()) for batch in seen for row in batch.mask[..., 0]}
    assert kinds == {(2,), (3, 4)}


def test_every_image_is_seen_once_per_epoch():
    order = image_order(5, 15, 0, 3)
    assert [sorted(order[i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert order[:5] != order[5:10] or order[5:10] != order[10:]
    assert image_order(5, 4, 7, 3) == order[7:11]


def test_masks_weigh_the_error():
    d = data(masks=True)
    batch = make_batch(d, ALPHAS, TrainConfig(batch_size=2, background_weight=0.0), 0, Process())
    inside = d.masks[image_order(5, 2, 0, 0)]
    assert torch.equal(batch.weight, inside)
    quarter = make_batch(d, ALPHAS, TrainConfig(batch_size=2, background_weight=0.25), 0, Process())
    assert torch.equal(quarter.weight, torch.where(inside > 0, 1.0, 0.25))
    wrong = batch.target + (batch.weight == 0).float() * 5
    assert batch_loss(wrong, batch) == 0
    assert batch_loss(batch.target + (batch.weight > 0).float(), batch) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_loss_is_the_weighted_mean_of_each_picture_and_of_all_pictures_alike(dtype):
    """One picture's mask is small and another's large: both count the same."""
    g = np.random.default_rng(3)
    found, target = g.normal(size=(2, 3, 4, 4, 5)).astype(np.float16)
    weight = np.full((3, 1, 4, 5), 0.2)
    weight[0, 0, 1, 2] = weight[1, 0, 1:, 1:] = 1.0
    batch = make_batch(data(masks=True), ALPHAS, TrainConfig(batch_size=3), 0, Process())
    batch = replace(batch, target=torch.tensor(target, dtype=dtype), weight=torch.tensor(weight, dtype=torch.float32))
    error = (found.astype(np.float64) - target.astype(np.float64)) ** 2
    each = [(error[i] * weight[i]).sum() / (4 * weight[i].sum()) for i in range(3)]
    value = batch_loss(torch.tensor(found, dtype=dtype), batch)
    assert float(value) == pytest.approx(sum(each) / 3, rel=1e-5) and value.dtype == torch.float32
    plain = batch_loss(torch.tensor(found, dtype=dtype), replace(batch, weight=None))
    assert float(plain) == pytest.approx(error.mean(), rel=1e-5)


def seeded(*parts):
    """The generator of a step's random numbers: a digest of what it depends on."""
    number = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(number % 2**63)


@pytest.mark.parametrize("world", [1, 3])
def test_random_numbers_of_a_step_follow_from_seed_and_step_alone(world):
    """Version after version, or a training that was stopped would continue as another: pictures by seed and epoch,
    then prompts, places and noise in this order by seed and step, areas by themselves."""
    given, config = data(masks=True), TrainConfig(batch_size=6, seed=11, routed=True, background_weight=0.5)
    parts = [make_batch(given, ALPHAS, config, 4, Process(rank, world)) for rank in range(world)]
    assert {len(part.x_t) for part in parts} == {6 // world}
    orders = [torch.randperm(5, generator=seeded(11, 1, epoch)).tolist() for epoch in range(6)]
    images = [orders[draw // 5][draw % 5] for draw in range(24, 30)]
    generator = seeded(11, 2, 4)
    prompts = torch.randint(2, (6,), generator=generator).tolist()
    places = torch.randint(50, (6,), generator=generator)
    noise = torch.randn(6, 4, 5, 5, generator=generator)
    whole = lambda name: torch.cat([getattr(part, name) for part in parts])
    assert torch.equal(whole("timesteps"), places) and torch.equal(whole("target"), noise)
    level = ALPHAS[places].view(-1, 1, 1, 1)
    torch.testing.assert_close(whole("x_t"), level.sqrt() * given.latents[images] + (1 - level).sqrt() * noise)
    assert torch.equal(whole("context"), torch.stack([given.prompts[p].context for p in prompts]))
    assert torch.equal(whole("weight"), 0.5 + 0.5 * given.masks[images])
    draws = torch.rand(6, 3, generator=seeded(11, 3, 4))
    assert torch.equal(whole("area"), acting_areas(given.masks[images], draws))
    one = replace(given, one_text=True)
    alike = make_batch(one, ALPHAS, config, 4, Process())
    assert torch.equal(alike.context, given.prompts[prompts[0]].context.expand(6, -1, -1))
    assert torch.equal(alike.timesteps, places) and torch.equal(alike.target, noise)


def test_contexts_of_four_and_six_rows_meet_at_twelve():
    g = torch.Generator().manual_seed(0)
    prompts = [Prompt("a", torch.randn(4, 6, generator=g), (1,)), Prompt("b", torch.randn(6, 6, generator=g), (0, 4))]
    batch = make_batch(TrainData(torch.randn(3, 4, 5, 5), prompts), ALPHAS, TrainConfig(batch_size=9), 2, Process())
    rows = {tuple(row.nonzero().flatten().tolist()) for row in batch.mask[..., 0]}
    assert batch.context.shape == (9, 12, 6) and rows == {(1, 5, 9), (0, 4, 6, 10)}


def test_rows_that_the_model_makes_of_a_context_have_its_own_count():
    """Anima's and others' text rows are not those of the context."""
    prompt = Prompt("a", torch.zeros(4, 6), (5, 7), others=((1,), (0, 8)), length=9)
    wanted = torch.zeros(9, 3)
    wanted[[5, 7], 0] = wanted[1, 1] = wanted[[0, 8], 2] = 1
    assert torch.equal(prompt.owners(), wanted)
    assert Prompt("a", torch.zeros(4, 6), (3,)).owners().tolist() == [[0], [0], [0], [1]]


def test_two_processes_equal_one_with_the_whole_batch():
    """Both halves run here in lockstep, with a reduce that averages what the two hand in."""
    import threading

    config = TrainConfig(steps=6, batch_size=4)
    whole = new_adapter()
    one = train(whole, data(), ALPHAS, toy_denoise(whole), config)

    slots, barrier = [None, None], threading.Barrier(2)

    def reducer(rank):
        def reduce(tensor):
            slots[rank] = tensor.clone()
            barrier.wait()
            mean = (slots[0] + slots[1]) / 2
            barrier.wait()
            tensor.copy_(mean)

        return reduce

    parts, results = [new_adapter(), new_adapter()], [None, None]

    def run(rank):
        results[rank] = train(
            parts[rank], data(), ALPHAS, toy_denoise(parts[rank]), config, process=Process(rank, 2, reducer(rank))
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    for a, b, c in zip(parts[0].parameters(), parts[1].parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(results[0].losses), torch.tensor(one.losses), rtol=1e-5, atol=1e-6)


def test_a_batch_that_does_not_divide_is_told():
    with pytest.raises(ConceptSplitError, match="batch of 3 cannot be shared by 2"):
        train(
            new_adapter(), data(), ALPHAS, toy_denoise(new_adapter()), TrainConfig(batch_size=3), process=Process(0, 2)
        )


def test_an_adapter_that_reaches_no_layer_is_an_error():
    with pytest.raises(ConceptSplitError, match="reached no layer"):
        train(new_adapter(), data(), ALPHAS, lambda batch: batch.x_t * 0.5, TrainConfig(steps=2))


def test_works_inside_inference_mode():
    outside, inside = new_adapter(), new_adapter()
    train(outside, data(), ALPHAS, toy_denoise(outside), TrainConfig(steps=3))
    with torch.inference_mode():
        train(inside, data(), ALPHAS, toy_denoise(inside), TrainConfig(steps=3))
    assert all(torch.equal(a, b) for a, b in zip(outside.parameters(), inside.parameters(), strict=True))


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"prediction_type": "x0"},
        {"save_every": -1},
        {"background_weight": 2.0},
    ],
)
def test_settings_out_of_range(bad):
    with pytest.raises(ConceptSplitError, match="Training setting out of range"):
        TrainConfig(**bad)


def test_data_that_cannot_train_is_one_sentence():
    prompt = Prompt("a dog", torch.zeros(8, 6), (2,))
    nan = torch.zeros(2, 4, 5, 5)
    nan[1, 0, 0, 0] = float("nan")
    for make, message in (
        (lambda: TrainData(torch.zeros(0, 4, 5, 5), [prompt]), "no training image"),
        (lambda: TrainData(nan, [prompt]), "image 2"),
        (lambda: TrainData(torch.zeros(1, 4, 5, 5), []), "no training prompt"),
        (lambda: TrainData(torch.zeros(1, 4, 5, 5), [Prompt("a cat", torch.zeros(8, 6), ())]), "class word"),
        (lambda: TrainData(torch.zeros(2, 4, 5, 5), [prompt], torch.ones(1, 1, 5, 5)), "one mask per image"),
        (lambda: TrainData(torch.zeros(2, 4, 5, 5), [prompt], torch.zeros(2, 1, 5, 5)), "image 1 is empty"),
        (lambda: expand_templates(["a photo"], "dog"), "exactly one"),
        (lambda: expand_templates(["a {}"], " "), "class word is missing"),
        (lambda: expand_templates([" "], "dog"), "no prompt template"),
    ):
        with pytest.raises(ConceptSplitError, match=message):
            make()
    assert expand_templates(["a {}", "", " the {} "], "dog") == ["a dog", "the dog"]


def test_settings_that_are_not_finite_are_refused():
    for bad in ({"weight_decay": math.inf}, {"loss_scale": math.inf}, {"max_grad_norm": math.nan}):
        with pytest.raises(ConceptSplitError, match="out of range"):
            TrainConfig(**bad)


def test_templates_that_no_file_could_hold_are_refused_before_training():
    with pytest.raises(ConceptSplitError, match="use at most 100000"):
        expand_templates(["a photo of a {} " + "very " * 50_000], "dog")


# --- what the settings do -----------------------------------------------------------------------------------------


def trained(config, denoise=toy_denoise, given=None):
    adapter = new_adapter()
    result = train(adapter, given or data(), ALPHAS, denoise(adapter), config)
    return adapter, result


def test_gradients_are_clipped_to_the_norm(monkeypatch):
    seen = []
    genuine = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        return genuine(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    norms = {}
    for limit in (0.0, 0.005):
        seen.clear()
        trained(TrainConfig(steps=4, max_grad_norm=limit))
        norms[limit] = list(seen)
    assert min(norms[0.0]) > 0.01, "the toy's gradients are larger than the limit"
    assert norms[0.005] == pytest.approx([0.005] * 4, rel=1e-3)


def test_weight_decay_makes_a_smaller():
    free, _ = trained(TrainConfig(steps=20, weight_decay=0.0, learning_rate=1e-2, warmup=0))
    decayed, _ = trained(TrainConfig(steps=20, weight_decay=0.5, learning_rate=1e-2, warmup=0))
    # AdamW: every step shrinks the weights by lr × decay, whatever the gradient is.
    assert float(decayed.down[LAYER].norm()) < 0.95 * float(free.down[LAYER].norm())


def test_warmup_rises_linearly(monkeypatch):
    rates = []
    genuine = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return genuine(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    for warmup, wanted in ((4, [0.02, 0.04, 0.06, 0.08, 0.08, 0.08]), (0, [0.08] * 2), (1, [0.08] * 2)):
        rates.clear()
        trained(TrainConfig(steps=len(wanted), learning_rate=0.08, warmup=warmup))
        assert rates == pytest.approx(wanted)
    rates.clear()
    kind = KINDS["value"]
    monkeypatch.setitem(KINDS, "value", replace(kind, rate=0.25))
    trained(TrainConfig(steps=2, learning_rate=0.08, warmup=2))
    assert rates == pytest.approx([0.01, 0.02]), "a kind may learn at a rate of its own"


def test_timesteps_are_drawn_from_the_whole_schedule():
    config = TrainConfig(batch_size=4)
    drawn = torch.cat([make_batch(data(), ALPHAS, config, step, Process()).timesteps for step in range(200)])
    count = torch.bincount(drawn, minlength=len(ALPHAS))
    assert len(count) == len(ALPHAS) and int(count.min()) >= 3 and int(count.max()) <= 40, "800 draws of 50"


def test_overflows_are_skipped_and_only_ten_in_a_row_stop():
    adapter, result = trained(TrainConfig(steps=40), overflowing(lambda step: step % 2 == 0))
    assert len(result.losses) == 40 and bool(torch.isfinite(adapter.up[LAYER]).all())
    trained(TrainConfig(steps=14), overflowing(lambda step: 2 <= step <= 10))
    with pytest.raises(ConceptSplitError, match="not finite in 10 steps up to step 11"):
        trained(TrainConfig(steps=14), overflowing(lambda step: step >= 2))


@pytest.mark.parametrize("steps", [1, 4])
def test_an_adapter_that_moved_nowhere_is_no_result(steps):
    with pytest.raises(ConceptSplitError, match=f"ended after {steps} steps with an adapter that changes nothing"):
        trained(TrainConfig(steps=steps), overflowing(lambda step: True))


def test_a_loss_that_is_not_finite_says_what_is_kept(tmp_path):
    def exploding(adapter):
        inner, steps = toy_denoise(adapter), []

        def denoise(batch):
            steps.append(1)
            return inner(batch) * (math.inf if len(steps) == 6 else 1.0)

        return denoise

    told = {}
    for name, path, save_every in (
        ("kept", tmp_path / "x.checkpoint", 2),
        ("unsaved", tmp_path / "y", 0),
        ("none", None, 2),
    ):
        adapter = new_adapter()
        config = TrainConfig(steps=9, save_every=save_every, learning_rate=0.0125)
        with pytest.raises(ConceptSplitError) as raised:
            train(adapter, data(), ALPHAS, exploding(adapter), config, None, path)
        told[name] = str(raised.value)
    start, end = "The training loss is not finite at step 6", ": lower the learning rate (now 0.0125) or use float32"
    assert told["kept"].startswith(f"{start}; the state of step 4 is kept in x.checkpoint{end}")
    assert told["unsaved"].startswith(start + end) and told["none"].startswith(start + end)


def test_the_loss_scale_changes_no_step():
    plain, _ = trained(TrainConfig(steps=4, loss_scale=1.0))
    scaled, _ = trained(TrainConfig(steps=4, loss_scale=1024.0))
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_b5_nan_latents_are_the_vaes_fault():
    latents = torch.zeros(3, 4, 5, 5)
    latents[2, 1, 2, 3] = math.nan
    with pytest.raises(ConceptSplitError, match="The VAE gave NaN or infinite values for training image 3.*--fp32-vae"):
        TrainData(latents, data().prompts)


def test_tiling_binds_the_word_in_every_copy_and_masks_are_clipped():
    """Contexts of 2 and 6 rows: three copies of the shorter."""
    g = torch.Generator().manual_seed(0)
    prompts = [Prompt("a", torch.randn(2, 6, generator=g), (1,)), Prompt("b", torch.randn(6, 6, generator=g), (0, 4))]
    masks = torch.rand(3, 1, 5, 5, generator=g) * 4 - 1
    made = TrainData(torch.randn(3, 4, 5, 5), prompts, masks)
    batch = make_batch(made, ALPHAS, TrainConfig(batch_size=9, background_weight=0.5), 2, Process())
    assert {tuple(r.nonzero().flatten().tolist()) for r in batch.mask[..., 0]} == {(1, 3, 5), (0, 4)}
    for row, context in zip(batch.mask[..., 0], batch.context, strict=True):
        if row[1]:
            assert torch.equal(context, prompts[0].context.repeat(3, 1))
    order = image_order(3, 9, 18, 0)
    torch.testing.assert_close(batch.weight, 0.5 + 0.5 * masks[order].clamp(0, 1))


def test_what_no_gradient_reaches_stays_as_it_was():
    """A layer of the adapter that this model never calls; the other learns."""
    other = LAYER.replace("mid_block", "up_blocks.1")
    info = new_adapter().info
    adapter = LowRankAdapter.create({LAYER: (6, 4), other: (6, 4)}, info, 0)
    before = adapter.down[other].clone()
    train(adapter, data(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=3, batch_size=2, weight_decay=0.0))
    assert torch.equal(adapter.down[other], before) and not adapter.up[other].any() and adapter.up[LAYER].any()


def test_a_step_is_timed_and_said_once(tmp_path):
    adapter, events = new_adapter(), []
    result = train(adapter, data(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=3, batch_size=2), events.append)
    assert [(e.step, e.steps, e.loss) for e in events] == [(i + 1, 3, result.losses[i]) for i in range(3)]
    assert all(e.seconds >= 0 for e in events) and sum(e.seconds for e in events) <= result.seconds < 60
    assert all(e.adapter is adapter for e in events)


def test_the_bar_follows_the_window_and_can_be_switched_off(monkeypatch, capsys):
    import tqdm

    asked, genuine = [], tqdm.tqdm
    monkeypatch.setattr(tqdm, "tqdm", lambda **options: asked.append(options) or genuine(**options))
    bar = ProgressBar(7, "rex", disable=True)
    bar(TrainEvent(3, 7, 0.5, 0.1, new_adapter()))
    bar.close()
    assert asked[0] == {"total": 7, "desc": "training <rex>", "unit": "step", "dynamic_ncols": True, "disable": True}
    assert capsys.readouterr().err == ""


def test_the_bar_shows_the_steps_and_the_mean_of_the_last_losses(capsys):
    bar = ProgressBar(60, "rex")
    for step in range(1, 53):
        bar(TrainEvent(step, 60, 100.0 if step == 2 else 0.25, 0.1, new_adapter()))
    bar(TrainEvent(54, 60, 0.75, 0.1, new_adapter()))
    assert bar._bar.n == 54 and bar._bar.unit == "step" and bar._bar.postfix == "loss 0.2600"
    assert not capsys.readouterr().err.endswith("\n")
    bar.close()
    shown = capsys.readouterr().err
    assert "training <rex>" in shown and shown.endswith("\n"), "what is printed next begins a line of its own"


def test_templates_may_be_long_and_are_quoted_in_part():
    most = "{}" + "x" * (MAX_TEMPLATE_BYTES - 2)
    assert len(expand_templates([most, " "], "dog")[0]) == MAX_TEMPLATE_BYTES + 1
    with pytest.raises(ConceptSplitError, match=f"are {MAX_TEMPLATE_BYTES + 1} bytes of text: use at most"):
        expand_templates([most, "x"], "dog")
    with pytest.raises(ConceptSplitError, match="are 100001 bytes"):
        expand_templates([most[:-1] + "é"], "dog")
    assert expand_templates(["a {} \ud800"], " dog ") == ["a dog \ud800"]
    with pytest.raises(ConceptSplitError, match='Template "{} and {}" needs exactly one {}'):
        expand_templates(["a {}", "{} and {}"], "dog")
    with pytest.raises(ConceptSplitError, match='Template "' + "y" * 120 + '" needs exactly one {}'):
        expand_templates(["y" * 130], "dog")
    with pytest.raises(ConceptSplitError, match='Template "two lines" needs exactly one {}'):
        expand_templates(["a {}", "two \n lines"], "dog")
    assert len(DEFAULT_TEMPLATES) == 10 and all("photo of" in t or "rendering" in t for t in DEFAULT_TEMPLATES)
    assert expand_templates(DEFAULT_TEMPLATES, "dog")[2] == "a cropped photo of the dog"
    assert all(re.fullmatch(r"[a-z -]+ \{\}", template) for template in DEFAULT_TEMPLATES)


def test_what_a_file_says_about_its_training():
    config = TrainConfig(steps=7, batch_size=3, seed=5)
    facts = training_facts(config, 4, ("a {}",), (48, 64))
    assert {k: facts[k] for k in ("steps", "images", "templates", "width", "height", "batch_size", "seed")} == {
        "steps": 7, "images": 4, "templates": ["a {}"], "width": 64, "height": 48, "batch_size": 3, "seed": 5,
    }  # fmt: skip
    assert "width" not in training_facts(config, 4, ("a {}",))
    layer = torch.nn.Linear(6, 4)
    sites = {name: Site(name, "layer", "text") for name in (LAYER, LAYER.replace("to_v", "to_k"))}
    attention = AttentionSite(LAYER.removesuffix(".to_v"), "", 4, False)
    network = NetworkMap("sd15", sites, (attention,), lambda: Root(layer))
    concept = Concept("rex", "dog")
    adapter = start_adapter(network, concept, "v_prediction", 2, 0.0, 3, facts)
    info = adapter.info
    assert (info.concept, info.class_word, info.base, info.context_dim) == ("rex", "dog", "sd15", 6)
    assert (info.rank, info.alpha, info.prediction_type, info.kind) == (2, 2.0, "v_prediction", "value")
    assert info.training == facts and info.training is not facts and adapter.sites == (LAYER,)
    wide = start_adapter(network, concept, "epsilon", 3, 1.5, 3, kind="key_value")
    assert (wide.info.alpha, wide.info.kind, wide.info.training) == (1.5, "key_value", {})
    assert set(wide.sites) == set(sites)
    again = start_adapter(network, concept, "epsilon", 2, 0.0, 3)
    assert torch.equal(again.down[LAYER], adapter.down[LAYER])
    staged = Concept("rex", "dog; 0.4: wolf")
    with pytest.raises(ConceptSplitError, match="on one class word, and 'rex' is given 'dog', from 0.4 on 'wolf'"):
        start_adapter(network, staged, "epsilon", 2, 0.0, 3)


@pytest.mark.parametrize("captions", [(), ("old trees", "a red car by the sea")])
def test_a_kind_begins_with_the_words_rows_and_those_of_captions(captions):
    """Each word of a caption is a row of its own; perfusion's C and i* are of these."""
    vectors = lambda n, seed: torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    asked = []

    def encode(concept, templates):
        asked.append(concept.class_word)
        count = len(concept.class_word.split())
        assert templates == ["{}"] and concept.name == "caption"
        return [Prompt("", vectors(count + 3, len(asked)), tuple(range(1, count + 1)))]

    prompts = [Prompt("a", vectors(5, 91), (1, 2)), Prompt("b", vectors(4, 92), (3,))]
    info = AdapterInfo("rex", "dog", base="sd15", kind="perfusion")
    adapter = KINDS["perfusion"].create({LAYER: (6, 4)}, info, 0)
    begin(adapter, prompts, encode, captions)
    assert asked == list(captions or neutral_captions("sd15"))
    rows = torch.cat([vectors(len(text.split()) + 3, n)[1 : len(text.split()) + 1] for n, text in enumerate(asked, 1)])
    target = (prompts[0].context[1:3].mean(0) + prompts[1].context[3]) / 2
    torch.testing.assert_close(adapter.target[0], target)
    v = torch.linalg.solve(covariance(rows), target.double())
    torch.testing.assert_close(adapter.direction[0], (v / (v @ target.double())).float(), rtol=1e-4, atol=1e-5)


class Root(torch.nn.Module):
    """A network whose every path is one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
