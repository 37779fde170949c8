"""Masks from attention (AttenCraft) and the areas in which a routed LoRA learns, against references in numpy."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conceptsplit_core.adapters.base import KINDS, AdapterInfo
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.method.subject import WHOLE, acting_areas, attention_masks, map_overlap
from conceptsplit_core.network.grid import choose_layers
from conceptsplit_core.network.site import AttentionSite, NetworkMap, Site
from conceptsplit_core.settings import TrainConfig
from conceptsplit_core.text.concepts import Concept
from conceptsplit_core.train import subject
from conceptsplit_core.train.data import Process, TrainData, make_batch
from conceptsplit_core.train.loop import train
from conceptsplit_core.train.prompts import EncodedText, Prompt, encode_templates, others_beside
from conceptsplit_core.train.subject import LEVELS, NOISES, separating, with_masks

sys.path.insert(0, str(Path(__file__).parent))

from toy import ALPHAS, LAYER, data, new_adapter, toy_denoise


def stretched(x):
    return (x - x.min()) / (x.max() - x.min())


def test_attention_masks_are_attencrafts_equation_spread_twice_and_cut():
    random = np.random.default_rng(4)
    cross, own = random.random((3, 12)) ** 3, random.random((12, 12)) ** 2
    among = own / own.sum(axis=1, keepdims=True)
    whole = np.stack([stretched(np.linalg.matrix_power(among, 2) @ stretched(m**2)) for m in cross])
    alone = np.stack([stretched(m**2) for m in cross])
    for wanted, given in ((whole, torch.tensor(own)), (alone, None)):
        found = attention_masks(torch.tensor(cross), given).numpy()
        strongest = wanted.argmax(axis=0)
        for thing in range(3):
            np.testing.assert_array_equal(found[thing], (strongest == thing) & (wanted[thing] >= 0.35))
        assert len(set(strongest)) > 1 and (wanted[1] < 0.35).any()
        alone_there = attention_masks(torch.tensor(cross[1:2]), given).numpy()[0]
        np.testing.assert_array_equal(alone_there, wanted[1] >= 0.35)


def test_a_flat_map_is_no_mask():
    assert not attention_masks(torch.full((2, 9), 0.25), torch.rand(9, 9)).any()


def test_a_routed_lora_acts_on_its_subject_and_its_side_of_a_line():
    masks = torch.zeros(4, 1, 5, 7)
    masks[0, 0, 1:3, 2] = 0.8
    masks[1, 0, 4, 5:] = 1.0
    masks[2, 0, 2, 3] = masks[2, 0, 0, 0] = 0.6
    masks[2, 0, 4, 4] = 0.2  # less than half of the strongest
    masks[2, 0, 3, 6] = 0.4  # more than half of its own picture's strongest, not of another's
    masks[3, 0, 0, 0] = 1.0
    draws = torch.tensor([[0.1, 0.5, 0.9], [0.7, 0.0, 0.5], [0.35, 0.3, 0.26], [0.2, 0.4, 0.24]])
    found = acting_areas(masks, draws)
    assert found.shape == masks.shape and WHOLE == 0.25
    for image in range(3):
        turn, share = 2 * math.pi * float(draws[image, 0]), float(draws[image, 1])
        along = lambda y, x, turn=turn: x * math.cos(turn) + y * math.sin(turn)
        cells = [(y, x) for y in range(5) for x in range(7)]
        strongest = float(masks[image].max())
        subject = [cell for cell in cells if float(masks[image, 0][cell]) >= strongest / 2]
        edge, end = (max(along(*cell) for cell in some) for some in (subject, cells))
        for cell in cells:
            inside = cell in subject or along(*cell) <= edge + share * (end - edge) + 1e-6
            assert float(found[image, 0][cell]) == inside, (image, cell)
    assert 0 < found[0].mean() < 1 and found[3].all()


def test_what_lies_just_on_the_line_is_on_this_side_and_half_as_strong_is_the_subject():
    """A line across x, at the subject's own edge and half way from it to the picture's."""
    masks = torch.zeros(3, 1, 4, 6, dtype=torch.float64)
    masks[:, 0, 1, 2], masks[:, 0, 0, 3] = 1.0, 0.5
    masks[0, 0, 0, 3] = 0.49
    found = acting_areas(masks, torch.tensor([[0.0, 0.0, 0.9], [0.0, 0.0, 0.25], [0.0, 0.5, 0.9]]))
    wanted = torch.zeros(3, 4, 6, dtype=torch.float64)
    for image, last in enumerate((2, 3, 4)):  # a draw of just `WHOLE` takes no whole picture
        wanted[image, :, : last + 1] = 1
    assert torch.equal(found[:, 0], wanted)


def lora():
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2"
    info = AdapterInfo("rex", "dog", rank=2, alpha=2.0, kind="lora")
    return LowRankAdapter.create({f"{layer}.to_v": (6, 4), f"{layer}.to_q": (4, 4)}, info, 0)


def test_a_routed_batch_has_areas_and_the_noise_of_any_other():
    given = data(masks=True)
    config = TrainConfig(batch_size=6, routed=True, seed=5)
    routed = make_batch(given, ALPHAS, config, 2, Process())
    plain = make_batch(given, ALPHAS, TrainConfig(batch_size=6, seed=5), 2, Process())
    for name in ("x_t", "timesteps", "context", "mask", "target", "weight"):
        assert torch.equal(getattr(routed, name), getattr(plain, name)), name
    assert plain.area is None and plain.pixels() is None
    inside = (plain.weight > 0.5).float()
    assert (routed.area >= inside).all() and (routed.area.mean(dim=(1, 2, 3)) < 1).any()
    again = make_batch(given, ALPHAS, config, 3, Process())
    assert not torch.equal(routed.area, again.area)
    halves = [make_batch(given, ALPHAS, config, 2, Process(rank, 2)).area for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), routed.area)


def test_a_layer_that_learns_changes_inside_its_area_alone():
    """At the latent's own size and at half of it, where a cell is as much the subject's as it is covered."""
    batch = make_batch(data(masks=True), ALPHAS, TrainConfig(batch_size=2, routed=True), 0, Process())
    weights = batch.pixels()(torch.zeros(2, 25, 4)).weights
    assert torch.equal(weights[..., 0], batch.area.flatten(1))
    small = batch.pixels()(torch.zeros(2, 9, 4)).weights[..., 0].view(2, 3, 3)
    for y, x in ((0, 0), (1, 2), (2, 1)):
        rows, columns = (slice(at * 5 // 3, -(-(at + 1) * 5 // 3)) for at in (y, x))
        torch.testing.assert_close(small[:, y, x], batch.area[:, 0, rows, columns].mean(dim=(1, 2)))


def test_a_kind_whose_file_is_no_lora_is_not_trained_routed():
    """It acts in a region too, and would only fail when it is saved, after its last step."""
    adapter = KINDS["para"].create({"down.attn1.to_q": (6, 5)}, replace(lora().info, kind="para", rank=2), 0)
    with pytest.raises(ConceptSplitError, match="Only a LoRA can be trained routed, and this is a parameter rank red"):
        train(adapter, data(masks=True), ALPHAS, toy_denoise(lora()), TrainConfig(steps=2, routed=True))


@pytest.mark.parametrize("masks", [False, True])
def test_routed_training_says_what_it_lacks(masks):
    adapter = new_adapter() if masks else lora()
    told = "Only a LoRA can be trained routed, and this is a value adapter" if masks else "give masks, or set mask_from"
    with pytest.raises(ConceptSplitError, match=told):
        train(adapter, data(masks=masks), ALPHAS, toy_denoise(adapter), TrainConfig(steps=2, routed=True))


def test_maps_are_read_up_to_64_by_64_pixels():
    assert subject.LARGEST == 64 * 64


def test_masks_come_from_one_place():
    given = data(masks=True)
    assert with_masks(given, None, ALPHAS, None, TrainConfig()) is given
    with pytest.raises(ConceptSplitError, match="leave the masks out"):
        with_masks(given, None, ALPHAS, None, TrainConfig(mask_from="attention"))


# --- a network of four attentions, at three sizes ---------------------------------------------------------------

LATENT, CONTEXT = (9, 6), 6
GRIDS = {"fine": (1, (9, 6)), "twin": (1, (9, 6)), "middle": (2, (5, 3)), "coarse": (4, (3, 2))}


class Attention(nn.Module):
    def __init__(self, wide):
        super().__init__()
        self.heads = 2
        self.to_q, self.to_k = nn.Linear(4, 6), nn.Linear(wide, 6)


def attentions(among=True):
    """The network, and a denoiser that runs it and notes its batches."""
    torch.manual_seed(7)
    root = nn.ModuleDict({name: nn.ModuleDict({"attn1": Attention(4), "attn2": Attention(CONTEXT)}) for name in GRIDS})
    for parameter in root.parameters():
        parameter.requires_grad_(False).mul_(4.0)
    kinds = ("attn1", "attn2") if among else ("attn2",)
    paths = [f"{name}.{kind}.{side}" for name in GRIDS for kind in kinds for side in ("to_q", "to_k")]
    sites = {path: Site(path, path, "text" if path.endswith("2.to_k") else "image") for path in paths}
    found = tuple(AttentionSite(f"{name}.attn2", f"{name}.attn2", GRIDS[name][0], False) for name in GRIDS)
    seen = []

    def denoise(batch):
        seen.append(batch)
        for name, (_, grid) in GRIDS.items():
            pixels = F.adaptive_avg_pool2d(batch.x_t, grid).flatten(2).mT
            for kind, read in (("attn1", pixels), ("attn2", batch.context)):
                root[name][kind].to_q(pixels)
                root[name][kind].to_k(read)
        return batch.x_t

    return NetworkMap("unknown", sites, found, lambda: root), denoise, seen


def looked_at(root, name, kind, x, read):
    """Mean of softmax(QKᵀ/√d) over heads, in numpy; [B, Lq, L]."""
    pixels = F.adaptive_avg_pool2d(x, GRIDS[name][1]).flatten(2).mT
    module = root[name][kind]
    read = pixels if read is None else read
    q, k = (side.unflatten(-1, (2, 3)).double().numpy() for side in (module.to_q(pixels), module.to_k(read)))
    share = np.exp(np.einsum("bqhd,blhd->bhql", q, k) / np.sqrt(3))
    return (share / share.sum(-1, keepdims=True)).mean(1)


def two_things():
    """Two pictures, and a prompt of a concept of two rows and another thing of one."""
    g = torch.Generator().manual_seed(5)
    prompt = Prompt("a dog, a cat", torch.randn(8, CONTEXT, generator=g), (2, 3), {"y": torch.arange(3.0)}, ((6,),))
    return TrainData(torch.randn(2, 4, *LATENT, generator=g), [prompt])


@pytest.mark.parametrize(
    ("largest", "read", "among"),
    [(64**2, ("fine", "twin"), True), (64**2, ("fine", "twin"), False), (54, ("fine", "twin"), True),
     (14, ("middle",), True), (13, ("coarse",), True), (0, ("coarse",), True)],
)  # fmt: skip
def test_masks_are_words_where_loda_reads_them_spread_by_the_finest_pixels(monkeypatch, largest, read, among):
    """Against numpy: noise of the picture's own seed at two levels, means over noises, heads and layers."""
    monkeypatch.setattr(subject, "LARGEST", largest)
    network, denoise, seen = attentions(among)
    given, root = two_things(), network.root()
    masks = with_masks(given, network, ALPHAS, denoise, TrainConfig(mask_from="attention")).masks
    assert masks.shape == (2, 1, *LATENT) and given.masks is None and len(seen) == 2
    assert (LEVELS, NOISES) == ((0.3, 0.5), 2) and choose_layers(
        {name: factor for name, (factor, _) in GRIDS.items()}
    ) == (4, ["coarse"])
    count = 2 * NOISES
    for index, batch in enumerate(seen):
        places = [int(share * 50) for share in LEVELS for _ in range(NOISES)]
        level = torch.tensor([float(ALPHAS[place]) for place in places]).view(-1, 1, 1, 1)
        noise = torch.randn(count, 4, *LATENT, generator=torch.Generator().manual_seed(index))
        x = level**0.5 * given.latents[index] + (1 - level) ** 0.5 * noise
        torch.testing.assert_close(batch.x_t, x)
        assert batch.timesteps.tolist() == places and batch.area.shape == (count, 1, *LATENT)
        assert not batch.mask.any() and not batch.area.any(), "adapters stay silent"
        assert torch.equal(batch.extra["y"], torch.arange(3.0).expand(count, 3)) and batch.mask.shape[2] == 1
        text = given.prompts[0].context.expand(count, -1, -1)
        word = looked_at(root, "coarse", "attn2", x, text).mean(0)
        words = torch.tensor(
            np.stack([word[:, rows].mean(-1) for rows in ([2, 3], [6])]).reshape(2, *GRIDS["coarse"][1])
        )
        grid = GRIDS[read[0]][1] if among else GRIDS["coarse"][1]
        cross = F.interpolate(words[None], grid, mode="bilinear", align_corners=False)[0].flatten(1)
        own = torch.tensor(np.mean([looked_at(root, name, "attn1", x, None).mean(0) for name in read], axis=0))
        wanted = attention_masks(cross, own if among else None)[0].view(1, 1, *grid)
        wanted = F.interpolate(wanted, LATENT, mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(masks[index], wanted.float(), atol=2e-3, rtol=1e-3)
        assert 0 < masks[index].mean() < 1
    assert not any(module._forward_hooks for module in root.modules())
    one = make_batch(given, ALPHAS, TrainConfig(batch_size=1), 0, Process())
    assert torch.equal(one.extra["y"], torch.arange(3.0)[None])


def test_a_word_that_the_model_does_not_find_is_named_with_its_picture():
    network, denoise, _ = attentions()
    for name in GRIDS:
        network.root()[name]["attn2"].to_q.weight.zero_()
    with pytest.raises(ConceptSplitError, match='does not find "a dog, a cat" in training image 1: give masks, or'):
        with_masks(two_things(), network, ALPHAS, denoise, TrainConfig(mask_from="attention"))


def test_separating_reads_the_maps_of_the_steps_own_batch():
    network, denoise, _ = attentions()
    given, root = two_things(), network.root()
    config = TrainConfig(batch_size=2, separate=0.625)
    batch = make_batch(given, ALPHAS, config, 1, Process())
    with separating(network, given, denoise, config) as (run, penalty):
        assert torch.equal(run(batch), batch.x_t)
        found = float(penalty(batch))
        # A sample picture between two steps has another text.
        denoise(replace(batch, context=torch.zeros(1, 4, CONTEXT), x_t=batch.x_t[:1] * 9))
        assert float(penalty(batch)) == found
    share = looked_at(root, "coarse", "attn2", batch.x_t, batch.context)
    maps = np.stack([share[..., [2, 3]].mean(-1), share[..., 6]], axis=1).reshape(2, 2, 3, 2)
    assert found == pytest.approx(0.625 * float(map_overlap(torch.tensor(maps))), rel=1e-4)
    assert not any(module._forward_hooks for module in root.modules())


def test_what_stands_beside_a_concept_is_in_its_prompts():
    others = others_beside(Concept("rex", "dog"), " cat, , Old owl ")
    assert [(other.name, other.class_word) for other in others] == [("rex.beside1", "cat"), ("rex.beside2", "Old owl")]
    assert len({other.name for other in others} | {"rex"}) == 3
    seen = []

    def encode(text):
        seen.append(text)
        names = ["rex", *(other.name for other in others)]
        from conceptsplit_core.text.binding import Binding

        return EncodedText("read", torch.zeros(8, 6), [Binding(n, (2 * i + 1,)) for i, n in enumerate(names)])

    prompts = encode_templates(encode, Concept("rex", "dog"), ["the {} there", "{}"], others)
    one, two = (f"<{other.name}>" for other in others)
    assert seen == [f"the <rex> and a {one} and an {two} there", f"<rex> and a {one} and an {two}"]
    assert [(prompt.rows, prompt.others) for prompt in prompts] == [((1,), ((3,), (5,)))] * 2
    assert encode_templates(encode, Concept("rex", "dog"), ["{}"])[0].others == ()
    assert seen[-1] == "<rex>"


def gaussian(maps):
    """Maps [B, n, h, w] smoothed by a Gaussian of σ = 1 cut off at 3, the borders repeated."""
    weights = np.exp(-0.5 * np.arange(-3, 4) ** 2)
    for axis in (-2, -1):
        places = np.arange(maps.shape[axis])
        near = [np.take(maps, (places + d).clip(0, len(places) - 1), axis) for d in range(-3, 4)]
        maps = sum(w * m for w, m in zip(weights / weights.sum(), near, strict=True))
    return maps


def test_the_overlap_of_maps_is_their_iou():
    random = np.random.default_rng(8)
    maps = random.random((2, 3, 4, 5)) ** 2
    maps /= maps.sum(axis=(-2, -1), keepdims=True)
    values = [
        np.minimum(maps[image, 0], maps[image, other]).sum() / np.maximum(maps[image, 0], maps[image, other]).sum()
        for image in range(2)
        for other in (1, 2)
    ]
    assert float(map_overlap(torch.tensor(maps), sigma=0.0)) == pytest.approx(np.mean(values), rel=1e-5)
    wide = gaussian(maps)
    p = wide / wide.sum(axis=(-2, -1), keepdims=True)
    smooth = [
        np.minimum(p[image, 0], p[image, other]).sum() / np.maximum(p[image, 0], p[image, other]).sum()
        for image in range(2)
        for other in (1, 2)
    ]
    assert float(map_overlap(torch.tensor(maps))) == pytest.approx(np.mean(smooth), rel=1e-5), "smoothed by one pixel"
    same, apart = torch.ones(1, 2, 6, 6), torch.zeros(1, 2, 6, 6)
    apart[0, 0, 0], apart[0, 1, 5] = 1.0, 1.0
    assert float(map_overlap(same)) == pytest.approx(1.0) and float(map_overlap(apart)) < 0.05
    free = torch.tensor(maps, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: map_overlap(m, 1.0), (free,), eps=1e-7, atol=1e-5)


def test_a_penalty_is_part_of_the_loss():
    adapter, other = new_adapter(), new_adapter()
    seen = []

    def penalty(batch):
        seen.append(batch)
        return 3.0 * sum(up.pow(2).sum() for up in adapter.up.values()) + 7.0

    config = TrainConfig(steps=3, batch_size=2, learning_rate=1e-2)
    with_it = train(adapter, data(), ALPHAS, toy_denoise(adapter), config, penalty=penalty)
    without = train(other, data(), ALPHAS, toy_denoise(other), config)
    assert len(seen) == 3 and with_it.losses[0] == pytest.approx(without.losses[0] + 7.0, rel=1e-6)
    assert not torch.equal(adapter.up[LAYER], other.up[LAYER])


def test_separating_needs_something_beside():
    with (
        pytest.raises(ConceptSplitError, match="name them in beside"),
        separating(None, data(), None, TrainConfig(separate=0.5)),
    ):
        pass
    with separating(None, data(), "denoise", TrainConfig()) as (run, penalty):
        assert run == "denoise" and penalty is None


def test_rows_of_others_are_no_rows_of_the_concept():
    g = torch.Generator().manual_seed(0)
    prompts = [
        Prompt("a", torch.randn(4, 6, generator=g), (1,), {}, ((2,), (0, 3))),
        Prompt("b", torch.randn(8, 6, generator=g), (6,), {}, ((1,), (4,))),
    ]
    batch = make_batch(TrainData(torch.randn(3, 4, 5, 5), prompts), ALPHAS, TrainConfig(batch_size=16), 0, Process())
    assert {tuple(r.nonzero().flatten().tolist()) for r in batch.mask[..., 0]} == {(1, 5), (6,)}
    pairs = {tuple(tuple(row.nonzero().flatten().tolist()) for row in rows.t()) for rows in batch.others}
    assert pairs == {((2, 6), (0, 3, 4, 7)), ((1,), (4,))}
    assert make_batch(data(), ALPHAS, TrainConfig(), 0, Process()).others is None
