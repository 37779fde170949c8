"""Encoder features that are reused, against a UNet whose way down and way up are run one by one here."""

from __future__ import annotations

import pytest
import torch
from tiny import REX, TOM, bound, every_family, inputs

from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.hosts.diffusers.network import encoder_stages
from conceptsplit_core.network.features import EncoderFeatures
from conceptsplit_core.settings import LodaConfig

TEXT = "a photo of a <rex> and a <tom>"


def down(unet, x, emb, text):
    """The way down and the middle: features and skips."""
    x = unet.conv_in(x)
    skips = [x]
    for block in unet.down_blocks:
        given = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        x, more = block(x, emb, **given)
        skips += more
    return unet.mid_block(x, emb, encoder_hidden_states=text), skips


def up(unet, x, skips, emb, text):
    skips = list(skips)
    for block in unet.up_blocks:
        count = len(block.resnets)
        given = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        x = block(x, tuple(skips[-count:]), emb, **given)
        del skips[-count:]
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


def embedding(unet, t, cond, size):
    emb = unet.time_embedding(unet.time_proj(t).float())
    if cond.pooled is not None:
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).expand(len(t), -1)
        given = {"text_embeds": cond.pooled.expand(len(t), -1), "time_ids": ids}
        emb = emb + unet.get_aug_embed(emb, None, given)
    return emb


@every_family
@torch.no_grad()
def test_a_reusing_call_is_the_way_up_over_the_features_of_an_earlier_one(load, family):
    model = load(family)
    cond, _ = bound(model)
    text = cond.context.expand(2, -1, -1)
    x, _ = inputs(model, 2, seed=1)
    other, _ = inputs(model, 2, seed=2)
    early, late = torch.tensor([700, 700]), torch.tensor([300, 300])
    kept = EncoderFeatures(encoder_stages(model.unet))
    plain = host.call_unet(model, x, early, text, cond.pooled, (128, 128))
    with kept.call(None, 0, False):
        first = host.call_unet(model, x, early, text, cond.pooled, (128, 128))
    assert torch.equal(first, plain)
    with kept.call(None, 1, True):
        reused = host.call_unet(model, other, late, text, cond.pooled, (128, 128))
    size = (128, 128)
    features, skips = down(model.unet, x, embedding(model.unet, early, cond, size), text)
    expected = up(model.unet, features, skips, embedding(model.unet, late, cond, size), text)
    torch.testing.assert_close(reused, expected)
    again = host.call_unet(model, x, early, text, cond.pooled, (128, 128))
    assert torch.equal(again, plain)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_picture_runs_the_way_down_in_full_steps_only(load, adapter_for, guidance):
    """Off it is bit-equal; on, down blocks run in full steps and in LODA's passes, up blocks in every step."""
    model = load("sd15")
    runs = {"down": 0, "up": 0}
    counted = lambda which: lambda *_: runs.__setitem__(which, runs[which] + 1)
    handles = [
        model.unet.down_blocks[0].resnets[0].register_forward_hook(counted("down")),
        model.unet.up_blocks[-1].resnets[-1].register_forward_hook(counted("up")),
    ]
    prompt = [host.encode_text(model, TEXT, [REX, TOM])]
    options = {
        "seeds": [3, 4],
        "steps": 12,
        "concepts": ["rex", "tom"],
        "guidance": guidance,
        "adapters": {"rex": (adapter_for(model), 1.0)},
    }

    def picture(**settings):
        runs.update(down=0, up=0)
        return host.sample(model, prompt, loda=LodaConfig(**settings), **options).latents

    still = {"loda_steps": 3, "loda_strength": 0.0, "afg_end": 0.5}
    plain = picture(**still)
    passes = runs["down"] - 12  # that read maps
    assert passes > 0 and runs["up"] == 12
    changed = picture(**still, encoder_reuse=0.5)
    assert runs == {"down": 6 + passes, "up": 12}
    assert not torch.equal(changed, plain) and bool(changed.isfinite().all())
    assert torch.equal(picture(**still), plain)
    for handle in handles:
        handle.remove()
    assert not any("forward" in vars(module) for module in model.unet.modules())
