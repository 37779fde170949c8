"""The diffusers host: layers, text, hooks, maps. Each test on tiny models of the real families' layout."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from tiny import REX, attentions, bound, every_family, inputs, layers_at, pipeline, stock_pipeline

from conceptsplit_core import ConceptSplitError
from conceptsplit_core.adapters.base import AdapterInfo
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.hosts.diffusers import configs, single_file
from conceptsplit_core.hosts.diffusers import network as host_network
from conceptsplit_core.method.attention import bound_attention
from conceptsplit_core.network.grid import level_sizes
from conceptsplit_core.text.binding import Concept

# --- layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "count"), [("sd15", 16), ("sd21", 16), ("sdxl", 70)])
def test_full_size_families_have_the_known_number_of_layers(family, count):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs.UNET_CONFIGS[family])
    network = host.network_map(SimpleNamespace(unet=unet, family=family))
    layers = network.value_shapes
    assert len(layers) == len(network.attention) == count
    assert host.family_of(unet) == network.family == family
    assert network.context_dim == unet.config.cross_attention_dim
    assert {d_ctx for d_ctx, _ in layers.values()} == {unet.config.cross_attention_dim}
    order = [name.split("_")[0] for name in layers]
    assert order == sorted(order, key=["down", "mid", "up"].index)
    assert {site.early for site in network.attention} == {True, False}
    assert [site.name for site in network.attention if site.early] == [n for n in attention_names(unet) if "down" in n]


def attention_names(unet):
    """Cross-attention layers in the order of diffusers' own walk through the UNet."""
    stages = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    names = {module: name for name, module in unet.named_modules()}
    return [
        names[block.attn2]
        for stage in stages
        for transformer in getattr(stage, "attentions", [])
        for block in transformer.transformer_blocks
    ]


@every_family
def test_layers_are_listed_in_the_order_in_which_they_run(load, family):
    model = load(family)
    cond, _ = bound(model)
    ran = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in attentions(model).items()
    ]
    with torch.no_grad():
        host.call_unet(model, *inputs(model), cond.context, cond.pooled)
    for hook in hooks:
        hook.remove()
    assert ran == [site.name for site in host.network_map(model).attention] == attention_names(model.unet)


@every_family
@pytest.mark.parametrize("size", [(16, 16), (13, 20)])
def test_downscales_are_the_sizes_the_unet_really_uses(load, family, size):
    model = load(family)
    cond, mask = bound(model)
    x, t = inputs(model, size=size)
    network = host.network_map(model)
    with host.patched(model) as patch, torch.no_grad(), patch.capturing(list(attentions(model)), mask) as maps:
        host.call_unet(model, x, t, cond.context, cond.pooled)
    sizes = level_sizes(size)
    for site in network.attention:
        h, w = sizes[site.downscale]
        assert maps[site.name].shape == (1, 2, h * w)


def test_what_a_module_reads_is_text_pixels_or_time(load):
    """Text: what cross-attention projects to keys and values, and nothing else."""
    sites = host.network_map(load("sdxl")).sites
    text = {name for name, site in sites.items() if site.reads == "text"}
    assert text == {f"{name}.to_{part}" for name in attention_names(load("sdxl").unet) for part in "kv"}
    time = {name for name, site in sites.items() if site.reads == "time"}
    assert {"time_embedding.linear_1", "add_embedding.linear_2", "down_blocks.0.resnets.0.time_emb_proj"} <= time
    assert all("emb" in name for name in time)
    for name in ("conv_in", "mid_block.resnets.0.conv1", "mid_block.attentions.0.proj_in"):
        assert sites[name].reads == "image"


def test_a_unet_without_cross_attention_is_refused():
    unet = torch.nn.Linear(2, 2)
    unet.config = SimpleNamespace(down_block_types=("DownBlock2D",))
    with pytest.raises(ConceptSplitError, match="This UNet has no UNet with cross-attention|no .*cross-attention"):
        host.network_map(SimpleNamespace(unet=unet, family="unknown"))


def test_fused_projections_are_refused_with_the_way_out(load):
    model = load()
    model.unet.fuse_qkv_projections()
    with pytest.raises(ConceptSplitError, match=r"are fused: call unfuse_qkv_projections\(\) first"):
        host.network_map(model)


# --- text -----------------------------------------------------------------------------------------------------


@every_family
def test_text_is_encoded_as_the_stock_pipeline_does(load, folder, family):
    model = load(family)
    pipe = stock_pipeline(family, folder(family))
    cond = host.encode_text(model, "a photo of a dog")
    if family == "sdxl":
        rows, _, pooled, _ = pipe.encode_prompt("a photo of a dog", do_classifier_free_guidance=False)
        assert torch.equal(cond.pooled, pooled)
    else:
        rows, _ = pipe.encode_prompt("a photo of a dog", "cpu", 1, False)
        assert cond.pooled is None
    assert torch.equal(cond.context, rows)


def test_every_sub_token_of_a_class_word_is_bound(load):
    model = load()
    cond = host.encode_text(model, "a photo of a <z>", [Concept("z", "zilzi")])
    # "zilzi" is no word of the tiny vocabulary: five letters, five rows after start, a, photo, of, a.
    assert cond.bindings[0].rows == (5, 6, 7, 8, 9)
    assert cond.text == "a photo of a zilzi"


def test_a_long_prompt_takes_chunks_and_binds_in_the_second(load):
    model = load()
    text = "a photo of " + "the " * 80 + "<rex>"
    cond = host.encode_text(model, text, [REX])
    assert cond.context.shape[1] == 154
    # 83 tokens stand before it: 75 in the first chunk, 8 in the second, whose row 77 is its start token.
    assert cond.bindings[0].rows == (77 + 1 + 8,)


def test_a_word_split_by_a_chunk_border_is_bound_on_both_sides(load):
    model = load()
    cond = host.encode_text(model, "the " * 73 + "<z>", [Concept("z", "zilzi")])
    assert cond.bindings[0].rows == (74, 75, 78, 79, 80)


# --- value deltas ---------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("how", ["strength 0", "nothing bound", "no adapter", "zero up weights"])
def test_a_silent_adapter_is_bit_equal_to_the_base_model(load, adapter_for, family, how):
    model = load(family)
    cond, mask = bound(model)
    x, t = inputs(model)
    adapter = adapter_for(model)
    if how == "zero up weights":
        adapter = LowRankAdapter.create(host.network_map(model).value_shapes, adapter.info, 0)
    with torch.no_grad():
        plain = host.call_unet(model, x, t, cond.context, cond.pooled)
        chosen = (None if how == "no adapter" else adapter, 0.0 if how == "strength 0" else 1.0)
        with host.patched(model, [chosen, (None, 0.0)]) as patch:
            patch.publish(None if how == "nothing bound" else mask)
            assert torch.equal(host.call_unet(model, x, t, cond.context, cond.pooled), plain)


@every_family
def test_values_change_on_bound_rows_of_the_conditional_branch_only(load, adapter_for, family):
    model = load(family)
    cond, mask = bound(model)
    neg = host.encode_text(model, "")
    adapter = adapter_for(model)
    layers = attentions(model)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def run():
        # Watchers are registered inside `patched`, so they see what attention sees.
        watchers = [
            module.to_v.register_forward_hook(lambda _m, _i, out, name=name: seen[name].append(out.clone()))
            for name, module in layers.items()
        ]
        x, t = inputs(model, batch=2)
        pooled = None if cond.pooled is None else torch.cat([neg.pooled, cond.pooled])
        try:
            with torch.no_grad():
                return host.call_unet(model, x, t, torch.cat([neg.context, cond.context]), pooled)
        finally:
            for watcher in watchers:
                watcher.remove()

    plain = run()
    with host.patched(model, [(adapter, 1.0), (None, 0.0)]) as patch:
        patch.publish(torch.cat([torch.zeros_like(mask), mask]))
        changed = run()
    rows = set(next(b.rows for b in cond.bindings if b.concept == "rex"))
    for name, (before, after) in seen.items():
        differs = (before != after).any(dim=-1)
        assert not differs[0].any(), name
        assert set(differs[1].nonzero().flatten().tolist()) == rows, name
        down, up = adapter.down[f"{name}.to_v"], adapter.up[f"{name}.to_v"]
        expected = torch.einsum("lc,rc,vr->lv", cond.context[0, sorted(rows)], down, up)
        torch.testing.assert_close((after - before)[1, sorted(rows)], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(plain[0], changed[0])
    assert not torch.equal(plain[1], changed[1])


def test_sizes_that_sdxl_is_told_are_those_of_the_stock_pipeline(load, folder):
    """(height, width) of the picture, no crop, (height, width) of the target: where they differ."""
    model, told = load("sdxl"), {}
    pipe = stock_pipeline("sdxl", folder("sdxl"))

    def watch(name):
        return lambda _m, _a, kwargs: told.update({name: kwargs["added_cond_kwargs"]["time_ids"]})

    hooks = [
        unet.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, unet in (("ours", model.unet), ("theirs", pipe.unet))
    ]
    cond = host.encode_text(model, "a photo of a dog")
    x, t = inputs(model, size=(11, 19))
    with torch.no_grad():
        host.call_unet(model, x, t, cond.context, cond.pooled)
    pipe("a photo of a dog", num_inference_steps=1, guidance_scale=1.0, height=88, width=152, output_type="latent")
    for hook in hooks:
        hook.remove()
    assert told["theirs"].tolist() == [[88, 152, 0, 0, 88, 152]]
    assert torch.equal(told["ours"], told["theirs"])


@every_family
def test_the_model_is_the_same_bits_after_an_exception(load, adapter_for, family):
    model = load(family)
    cond, mask = bound(model)
    x, t = inputs(model)
    state = {k: v.clone() for k, v in model.unet.state_dict().items()}
    with torch.no_grad():
        plain = host.call_unet(model, x, t, cond.context, cond.pooled)
    adapters = [(adapter_for(model), 1.0), (None, 0.0)]
    with pytest.raises(RuntimeError, match="stop"), host.patched(model, adapters) as patch:
        patch.publish(mask)
        host.call_unet(model, x, t, cond.context, cond.pooled)
        raise RuntimeError("stop")
    for module in model.unet.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(torch.equal(v, state[k]) for k, v in model.unet.state_dict().items())
    with torch.no_grad():
        assert torch.equal(host.call_unet(model, x, t, cond.context, cond.pooled), plain)


def test_an_adapter_of_another_family_is_refused_with_both_names(load, adapter_for):
    adapter = adapter_for(load("sd15"))
    with pytest.raises(ConceptSplitError, match="SD1.5.*SDXL"), host.patched(load("sdxl"), [(adapter, 1.0)]):
        pass


def test_an_adapter_of_unknown_family_is_refused_by_its_shapes(load, adapter_for):
    adapter = adapter_for(load("sd15")).with_info(base="unknown")
    with pytest.raises(ConceptSplitError, match="maps 768 to"), host.patched(load("sd21"), [(adapter, 1.0)]):
        pass


# --- maps -----------------------------------------------------------------------------------------------------


def in_full(model, wanted, mask, *call):
    """Maps from a pass that nobody leaves, read by forward hooks of this test alone; and the pass's output."""
    got = {}
    network = host.network_map(model)
    hooks = []
    for name in wanted:
        for part in ("to_q", "to_k"):
            keep = lambda _m, _i, out, key=(name, part): got.update({key: out})
            hooks.append(network.module(f"{name}.{part}").register_forward_hook(keep))
    out = host.call_unet(model, *call)
    for hook in hooks:
        hook.remove()
    heads = {name: attentions(model)[name].heads for name in wanted}
    return {name: bound_attention(got[name, "to_q"], got[name, "to_k"], heads[name], mask) for name in wanted}, out


@every_family
def test_maps_are_the_attention_the_layer_really_pays(load, family):
    model = load(family)
    cond, mask = bound(model)
    x, t = inputs(model)
    name, attn = list(attentions(model).items())[3]
    grabbed = {}
    watcher = attn.register_forward_pre_hook(lambda _m, args, kwargs: grabbed.update(x=args[0]), with_kwargs=True)
    with torch.no_grad(), host.patched(model) as patch, patch.capturing([name], mask) as maps:
        host.call_unet(model, x, t, cond.context, cond.pooled)
    watcher.remove()
    q = attn.head_to_batch_dim(attn.to_q(grabbed["x"]))
    k = attn.head_to_batch_dim(attn.to_k(cond.context))
    scores = attn.get_attention_scores(q, k).unflatten(0, (1, attn.heads)).mean(1)
    for i, concept in enumerate(("rex", "tom")):
        rows = next(b.rows for b in cond.bindings if b.concept == concept)
        torch.testing.assert_close(maps[name][0, i], scores[0, :, list(rows)].mean(-1), atol=1e-6, rtol=1e-5)


@every_family
def test_leaving_after_the_last_map_is_exact_and_runs_less(load, family):
    model = load(family)
    cond, mask = bound(model)
    x, t = inputs(model, size=(12, 20))
    wanted = layers_at(model, 4)
    call = (x, t, cond.context, cond.pooled)
    ran = []
    tail = model.unet.conv_out.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        full, plain = in_full(model, wanted, mask, *call)
        assert ran == [1]
        with host.patched(model) as patch:
            with patch.capturing(wanted, mask) as short:
                host.call_unet(model, *call)
            assert ran == [1]
            assert torch.equal(host.call_unet(model, *call), plain), "nothing is left behind"
    tail.remove()
    assert set(short) == set(wanted)
    assert all(torch.equal(full[name], short[name]) for name in wanted)
    assert not any(module._forward_hooks for module in model.unet.modules())


def test_an_attention_bias_reaches_the_layer_as_it_reaches_the_map(load):
    model = load()
    cond, mask = bound(model)
    x, t = inputs(model, size=(16, 12))
    name, attn = next(iter(attentions(model).items()))
    rows = list(next(b.rows for b in cond.bindings if b.concept == "rex"))
    bias = torch.zeros(1, 16 * 12, 77)
    bias[:, :, rows] = -1e8
    with torch.no_grad(), host.patched(model) as patch:
        plain = host.call_unet(model, x, t, cond.context, cond.pooled)
        patch.bias = {name: bias}
        out = host.call_unet(model, x, t, cond.context, cond.pooled)
        assert not torch.equal(out, plain)
        with patch.capturing([name], mask) as maps:
            host.call_unet(model, x, t, cond.context, cond.pooled)
        assert maps[name][0, 0].max() == 0 and maps[name][0, 1].min() > 0
        # Forbidding a row is the same as changing it: nothing of it can be seen in that layer.
        other = attn.to_v.register_forward_hook(lambda _m, _i, v: v.index_fill(1, torch.tensor(rows), 7.0))
        assert torch.equal(host.call_unet(model, x, t, cond.context, cond.pooled), out)
        other.remove()


def test_heads_with_their_own_normalisation_are_read_as_they_attend():
    norm = torch.nn.LayerNorm(8)
    q, k, mask = torch.randn(1, 5, 16), torch.randn(1, 7, 16), torch.eye(7)[None, :, :2]
    normed = [norm(t.unflatten(-1, (2, 8))).flatten(-2) for t in (q, k)]
    expected = bound_attention(*normed, 2, mask)
    seen = bound_attention(host_network._head_norm(norm, q, 2), host_network._head_norm(norm, k, 2), 2, mask)
    torch.testing.assert_close(seen, expected)


# --- loading --------------------------------------------------------------------------------------------------


@every_family
def test_a_folder_is_recognised(load, family):
    model = load(family)
    assert model.family == family
    assert model.prediction_type == ("v_prediction" if family == "sd21" else "epsilon")
    assert model.added_conditions == (family == "sdxl")
    assert len(model.encoders) == (2 if family == "sdxl" else 1)
    assert model.default_size == 128
    assert not any(p.requires_grad for p in model.unet.parameters())


def test_half_precision_is_for_the_unet_and_the_vae_stays_wide(load):
    model = load(dtype=torch.float16)
    assert model.dtype == torch.float16
    assert next(model.vae.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "no model at"),
        (lambda p: p, "no model_index.json"),
        (lambda p: _write(p / "x.ckpt", b"junk"), "not a .safetensors"),
        (lambda p: _write(p / "x.safetensors", b"junk"), "not a readable safetensors"),
        (lambda p: _save(p / "x.safetensors", {"weight": torch.zeros(1)}), "not a Stable Diffusion"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(tmp_path, make, message):
    with pytest.raises(ConceptSplitError, match=message) as caught:
        host.load_model(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_part_missing_names_it(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder("sd15"), tmp_path / "model")
    shutil.rmtree(copy / "vae")
    with pytest.raises(ConceptSplitError, match="no subfolder 'vae'"):
        host.load_model(copy)
    (copy / "vae").mkdir()
    with pytest.raises(ConceptSplitError, match="vae in .* cannot be loaded"):
        host.load_model(copy)


@pytest.mark.parametrize(
    ("variant", "size", "safe"),
    [("fp16", "20KB", True), ("fp16", "10GB", True), ("non_ema", "20KB", True), ("fp16", "10GB", False)],
)
def test_case_23_a_folder_with_weights_of_one_variant(tmp_path, variant, size, safe):
    """In parts too, as the large models are published."""
    pipe = pipeline("sd15", seed=6)
    pipe.save_pretrained(tmp_path, variant=variant, max_shard_size=size, safe_serialization=safe)
    ending = "safetensors" if safe else "bin"
    names = [path.name for path in (tmp_path / "unet").glob(f"*.{ending}")]
    assert all(variant in name for name in names) and (len(names) > 2) == (size == "20KB"), names
    model = host.load_model(tmp_path)
    for mine, theirs in ((model.unet, pipe.unet), (model.encoders[0].model, pipe.text_encoder)):
        for key, value in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[key], value), key


def test_case_23_plain_weights_come_first(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder("sd15"), tmp_path / "model")
    other = pipeline("sd15", seed=6)
    other.save_pretrained(copy, variant="fp16")
    plain = host.load_model(folder("sd15")).unet.state_dict()
    for key, value in host.load_model(copy).unet.state_dict().items():
        assert torch.equal(value, plain[key])


def _without(path, start):
    """A weights file without the tensors whose names begin so."""
    from safetensors.torch import load_file, save_file

    kept = {key: value for key, value in load_file(path).items() if not key.startswith(start)}
    save_file(kept, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: [file.unlink() for file in (p / "tokenizer").glob("*[bz]*")] and None, "no words"),
        (lambda p: [file.unlink() for file in (p / "tokenizer").iterdir() if "config" not in file.name], "no words"),
        (
            lambda p: _without(
                p / "text_encoder" / "model.safetensors", ("text_model.encoder.layers.1", "encoder.layers.1")
            ),
            "lacks 16 of its",
        ),
        (lambda p: _without(p / "unet" / "diffusion_pytorch_model.safetensors", "mid_block"), r"lacks \d+ of its"),
        (lambda p: _without(p / "vae" / "diffusion_pytorch_model.safetensors", "encoder.mid"), r"lacks \d+ of its"),
        (lambda p: _index(p, unet=["diffusers", "UNet1DModel"]), "unet in .* cannot be loaded"),
        (lambda p: _other_unet(p), r"The unet in .* is a UNet2DModel: choose a model of SD 1\.x"),
        (lambda p: _index(p, vae=["diffusers", 5]), "unknown class '5' as its vae"),
        (
            lambda p: _write(p / "model_index.json", b"[1, 2]"),
            r"model_index\.json' is not a table of the model's parts",
        ),
        (lambda p: _write(p / "scheduler" / "scheduler_config.json", b"[]"), r"_config\.json' is not a table of set"),
        (
            lambda p: _write(p / "scheduler" / "scheduler_config.json", b'{"num_train_timesteps": "many"}'),
            "The scheduler of .* cannot be used: ",
        ),
        (
            lambda p: _write(p / "scheduler" / "scheduler_config.json", b'{"beta_schedule": "odd"}'),
            "cannot be used: odd",
        ),
    ],
)
def test_a_folder_that_lacks_parts_draws_no_nonsense(folder, tmp_path, change, said):
    import shutil

    copy = shutil.copytree(folder("sd15"), tmp_path / "model")
    change(copy)
    with pytest.raises(ConceptSplitError, match=said) as told:
        host.load_model(copy)
    assert "\n" not in str(told.value)


def _other_unet(folder):
    import shutil

    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    made = UNet2DModel(block_out_channels=(4, 8), norm_num_groups=2, in_channels=4, layers_per_block=1, **blocks)
    shutil.rmtree(folder / "unet")
    made.save_pretrained(folder / "unet")
    _index(folder, unet=["diffusers", "UNet2DModel"])


def _index(folder, **changes):
    import json

    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_tokenizer_of_a_single_file_is_a_comfyuis(tmp_path, monkeypatch):
    """COMFYUI_PATH may name several; a pack in custom_nodes belongs to the ComfyUI around it."""
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    path = _save(tmp_path / "model.safetensors", {key: torch.zeros(8, 768)})
    asked = []
    monkeypatch.setattr(single_file, "write_config", lambda *given: asked.append(given[3]) or 1 / 0)
    hosts = {name: tmp_path / name / "comfy" / "sd1_tokenizer" for name in ("empty", "named", "around", "mine")}
    for name, words in hosts.items():
        words.mkdir(parents=True)
        for file in ("vocab.json", "merges.txt")[: 1 if name == "empty" else 2]:
            (words / file).touch()
    monkeypatch.setenv("COMFYUI_PATH", os.pathsep.join(str(tmp_path / name) for name in ("nowhere", "empty", "named")))
    monkeypatch.setattr(
        single_file, "__file__", str(tmp_path / "around" / "custom_nodes" / "pack" / "core" / "a" / "b" / "c.py")
    )
    for wanted, given in ((hosts["named"], None), (hosts["mine"], hosts["mine"])):
        with pytest.raises(ZeroDivisionError):
            host.load_model(path, tokenizer=given)
        assert asked.pop() == wanted
    monkeypatch.delenv("COMFYUI_PATH")
    with pytest.raises(ZeroDivisionError):
        host.load_model(path)
    assert asked.pop() == hosts["around"]
    monkeypatch.undo()
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    for given in ("~nobodyx/words", tmp_path / "none"):
        with pytest.raises(ConceptSplitError, match="(words|none)' holds no vocab.json and merges.txt: set"):
            host.load_model(path, tokenizer=given)
    with pytest.raises(ConceptSplitError, match="no model at '~nobodyx/a'"):
        host.load_model("~nobodyx/a")


def test_a_checkpoint_file_without_a_tokenizer_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    path = _save(tmp_path / "model.safetensors", {key: torch.zeros(8, 768)})
    assert single_file.detect_file(path) == single_file.CheckpointKind("sd15", "epsilon")
    with pytest.raises(ConceptSplitError, match="no vocab.json and merges.txt: set COMFYUI_PATH to .* --tokenizer"):
        host.load_model(path)


def _write(path, data):
    path.write_bytes(data)
    return path


def _save(path, tensors):
    from safetensors.torch import save_file

    save_file(tensors, path)
    return path


# --- files that travel ----------------------------------------------------------------------------------------


class OriginalLinear(torch.nn.Module):
    """As the paper's trainer does: the layer that peft wrapped becomes a child named `original_linear`."""

    def __init__(self, wrapped):
        super().__init__()
        self.original_linear = wrapped


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("name", ["default", "default_0"])
def test_a_file_of_the_papers_trainer_loads(load, tmp_path, wrapped, name):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from conceptsplit_core.adapters.file import load_adapter

    model = load()
    shapes = host.network_map(model).value_shapes
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["attn2.to_v"])
    model.unet.add_adapter(config, adapter_name=name)
    if wrapped:
        for attn in attentions(model).values():
            attn.to_v = OriginalLinear(attn.to_v)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(model.unet, adapter_name=name))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state, weight_name="paper.safetensors")
    adapter = load_adapter(tmp_path / "paper.safetensors")
    assert adapter.layers == shapes
    assert adapter.info.rank == 4 and adapter.scale(next(iter(shapes))) == 1.0
    adapter.check_fits(shapes, "sd15")


def test_our_file_loads_in_diffusers_as_a_lora(load, folder, adapter_for, tmp_path):
    """Bound to every row, a value adapter is a LoRA on to_v; diffusers must agree on what the file says."""
    from conceptsplit_core.adapters.file import load_adapter, save_adapter

    model = load()
    adapter = adapter_for(model)
    save_adapter(adapter, tmp_path / "rex.safetensors", torch.float32)
    again = load_adapter(tmp_path / "rex.safetensors")
    assert again.info.concept == "rex" and again.info.class_word == "dog" and again.layers == adapter.layers
    cond, _ = bound(model)
    x, t = inputs(model)
    with torch.no_grad(), host.patched(model, [(again, 1.0)]) as patch:
        patch.publish(torch.ones(1, 77, 1))
        ours = host.call_unet(model, x, t, cond.context)
    pipe = stock_pipeline("sd15", folder("sd15"))
    pipe.load_lora_weights(tmp_path / "rex.safetensors")
    with torch.no_grad():
        theirs = pipe.unet(x, t, cond.context, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@every_family
def test_an_adapter_file_round_trips_through_the_model(load, adapter_for, tmp_path, family):
    from conceptsplit_core.adapters.file import load_adapter, save_adapter

    model = load(family)
    adapter = adapter_for(model)
    save_adapter(adapter, tmp_path / "rex.safetensors", torch.float32)
    again = load_adapter(tmp_path / "rex.safetensors")
    cond, mask = bound(model)
    x, t = inputs(model)
    outs = []
    for chosen in (adapter, again):
        with torch.no_grad(), host.patched(model, [(chosen, 1.0), (None, 0.0)]) as patch:
            patch.publish(mask)
            outs.append(host.call_unet(model, x, t, cond.context, cond.pooled))
    assert torch.equal(*outs)
    assert isinstance(again.info, AdapterInfo) and again.info.base == family
