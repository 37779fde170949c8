import math

import pytest
import torch

from conceptsplit_core.adapters.base import AdapterInfo
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.method.diffusion import targets
from conceptsplit_core.method.tova import value_delta
from conceptsplit_core.settings import TrainConfig
from conceptsplit_core.train.data import Process, Prompt, TrainData, expand_templates, image_order, make_batch
from conceptsplit_core.train.loop import batch_loss, train

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2"
ALPHAS = torch.cumprod(1 - torch.linspace(1e-3, 0.02, 50), 0)


def new_adapter(seed=0):
    return LowRankAdapter.create({LAYER: (6, 4)}, AdapterInfo("rex", "dog", rank=2, alpha=2.0), seed)


def data(n=5, masks=False, rows=((2,), (3, 4))):
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(n, 4, 5, 5, generator=g) * 0.1 + torch.tensor([1.0, -1.0, 0.5, 0.0]).view(1, 4, 1, 1)
    prompts = [Prompt(f"p{i}", torch.randn(8, 6, generator=g), r) for i, r in enumerate(rows)]
    return TrainData(latents, prompts, (torch.rand(n, 1, 5, 5, generator=g) > 0.5).float() if masks else None)


def toy_denoise(adapter, seen=None):
    """A linear 'UNet': attends to the mean text row's value; the adapter is its only way to learn."""
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(9)) * 0.1

    def denoise(batch):
        if seen is not None:
            seen.append(batch)
        value = batch.context @ base.t()
        added = value_delta(batch.context, batch.mask, [adapter.delta(LAYER, value.device, value.dtype)])
        value = value if added is None else value + added
        return batch.x_t * 0.5 + value.mean(dim=1)[:, :, None, None]

    return denoise


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


def test_targets_are_epsilon_or_v():
    x0, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    alpha = torch.tensor([0.9, 0.25])
    x_t, eps = targets(x0, noise, alpha, "epsilon")
    _, v = targets(x0, noise, alpha, "v_prediction")
    a, s = alpha.sqrt().view(-1, 1, 1, 1), (1 - alpha).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(eps, noise)
    torch.testing.assert_close(a * x_t - s * v, x0)
    torch.testing.assert_close(s * x_t + a * v, noise)


def test_every_batch_row_has_the_rows_of_its_own_prompt():
    seen = []
    adapter = new_adapter()
    train(adapter, data(), ALPHAS, toy_denoise(adapter, seen), TrainConfig(steps=6, batch_size=8))
    kinds = {tuple(row.nonzero().flatten().tolist()) for batch in seen for row in batch.mask[..., 0]}
    assert kinds == {(2,), (3, 4)}


def test_prompts_of_unequal_length_are_tiled_with_their_binding():
    g = torch.Generator().manual_seed(0)
    prompts = [Prompt("a", torch.randn(4, 6, generator=g), (1,)), Prompt("b", torch.randn(8, 6, generator=g), (6,))]
    batch = make_batch(TrainData(torch.randn(3, 4, 5, 5), prompts), ALPHAS, TrainConfig(batch_size=16), 0, Process())
    assert batch.context.shape[1] == 8
    assert {tuple(r.nonzero().flatten().tolist()) for r in batch.mask[..., 0]} == {(1, 5), (6,)}


def test_every_image_is_seen_once_per_epoch():
    order = image_order(5, 15, 0, 3)
    assert [sorted(order[i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert order[:5] != order[5:10] or order[5:10] != order[10:]
    assert image_order(5, 4, 7, 3) == order[7:11]


def test_masks_weigh_the_error():
    d = data(masks=True)
    batch = make_batch(d, ALPHAS, TrainConfig(batch_size=2, background_weight=0.0), 0, Process())
    wrong = batch.target + (batch.weight == 0).float() * 5
    assert batch_loss(wrong, batch) == 0
    assert batch_loss(batch.target + (batch.weight > 0).float(), batch) > 0.99


class Stop(Exception):
    pass


def test_resume_gives_the_same_weights_as_no_interruption(tmp_path):
    config = TrainConfig(steps=20, batch_size=3, save_every=4)
    whole = new_adapter()
    expected = train(whole, data(), ALPHAS, toy_denoise(whole), config)

    part, path = new_adapter(), tmp_path / "state.safetensors"

    def stop_at_seven(event):
        if event.step == 7:
            raise Stop

    with pytest.raises(Stop):
        train(part, data(), ALPHAS, toy_denoise(part), config, stop_at_seven, path)
    assert not any(t.requires_grad for t in part.parameters())
    rest = new_adapter()
    steps = []
    result = train(rest, data(), ALPHAS, toy_denoise(rest), config, lambda e: steps.append(e.step), path, resume=True)
    assert steps == list(range(8, 21)), "the seven steps done are not done again"
    assert result.losses == expected.losses
    for a, b in zip(rest.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_longer_run_continues_a_finished_one(tmp_path):
    path = tmp_path / "state.safetensors"
    one, two, whole = new_adapter(), new_adapter(), new_adapter()
    train(one, data(), ALPHAS, toy_denoise(one), TrainConfig(steps=5), None, path)
    train(two, data(), ALPHAS, toy_denoise(two), TrainConfig(steps=9), None, path, resume=True)
    train(whole, data(), ALPHAS, toy_denoise(whole), TrainConfig(steps=9))
    assert all(torch.equal(a, b) for a, b in zip(two.parameters(), whole.parameters(), strict=True))


def test_resume_refuses_another_training_and_broken_files(tmp_path):
    path = tmp_path / "state.safetensors"
    adapter = new_adapter()
    train(adapter, data(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=2), None, path)
    for config, images in ((TrainConfig(steps=2, seed=1), data()), (TrainConfig(steps=2), data(n=4))):
        with pytest.raises(ConceptSplitError, match="other images, prompts or settings"):
            train(new_adapter(), images, ALPHAS, toy_denoise(adapter), config, None, path, resume=True)
    for content in (b"", b"xx", path.read_bytes()[:-40], b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(ConceptSplitError, match="not a readable training checkpoint"):
            train(new_adapter(), data(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=2), None, path, resume=True)


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


def test_loss_that_is_not_finite_stops_with_step_named_and_checkpoint_kept(tmp_path):
    path, adapter = tmp_path / "state.safetensors", new_adapter()
    inner, calls = toy_denoise(adapter), []

    def explode(batch):
        calls.append(1)
        return inner(batch) * (float("nan") if len(calls) == 6 else 1.0)

    with pytest.raises(ConceptSplitError, match="not finite at step 6"):
        train(adapter, data(), ALPHAS, explode, TrainConfig(steps=9, save_every=2), None, path)
    again = new_adapter()
    result = train(
        again, data(), ALPHAS, toy_denoise(again), TrainConfig(steps=9, save_every=2), None, path, resume=True
    )
    assert len(result.losses) == 9
    assert all(torch.isfinite(t).all() for t in again.parameters())


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


def test_a_damaged_checkpoint_is_refused_whole_and_left_as_it_is(tmp_path):
    """Each of these once ended in another exception, or went on from a state that was never saved."""
    import json
    import struct

    from safetensors.torch import load_file, save

    path = tmp_path / "x.checkpoint"
    config = TrainConfig(steps=3, batch_size=2)
    adapter = new_adapter()
    train(adapter, data(), ALPHAS, toy_denoise(adapter), config, checkpoint=path)
    good = path.read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    facts = json.loads(good[8 : 8 + size])["__metadata__"]

    def header(text):
        return struct.pack("<Q", len(text)) + text

    def changed(**tensors):
        kept = {**load_file(path), **tensors}
        return save({k: v.contiguous() for k, v in kept.items() if v is not None}, metadata=facts)

    stored = load_file(path)
    spoilt = stored["exp_avg_sq0"].clone()
    spoilt.view(-1)[0] = -1.0
    damaged = {
        "deep header": header(b"[" * 100_000),
        "no facts": header(b'{"__metadata__":null}'),
        "facts of another kind": header(b'{"__metadata__":[1]}'),
        "no losses": changed(losses=None),
        "losses of another kind": changed(losses=torch.ones(3, dtype=torch.int64)),
        "one loss less": changed(losses=stored["losses"][:2]),
        "half a moment": changed(exp_avg_sq0=None),
        "no step": changed(step1=None),
        "moment of another shape": changed(exp_avg0=torch.zeros(1)),
        "impossible moment": changed(exp_avg_sq0=spoilt),
        "not finite": changed(p1=torch.full_like(stored["p1"], float("nan"))),
        "another precision": changed(p0=stored["p0"].half()),
        "far too large": good + bytes(65 * 2**20),
    }
    for name, content in damaged.items():
        path.write_bytes(content)
        adapter = new_adapter()
        before = [t.clone() for t in adapter.parameters()]
        with pytest.raises(ConceptSplitError, match="not a readable training checkpoint") as told:
            train(adapter, data(), ALPHAS, toy_denoise(adapter), TrainConfig(steps=5, batch_size=2), None, path, True)
        assert "\n" not in str(told.value), name
        assert path.read_bytes() == content, name
        assert all(torch.equal(x, y) for x, y in zip(before, adapter.parameters(), strict=True)), name


def test_settings_that_are_not_finite_are_refused():
    for bad in ({"weight_decay": math.inf}, {"loss_scale": math.inf}, {"max_grad_norm": math.nan}):
        with pytest.raises(ConceptSplitError, match="out of range"):
            TrainConfig(**bad)


def test_templates_that_no_file_could_hold_are_refused_before_training():
    with pytest.raises(ConceptSplitError, match="use at most 100000"):
        expand_templates(["a photo of a {} " + "very " * 50_000], "dog")
