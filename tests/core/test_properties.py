"""What holds for every input, looked for with hypothesis: bindings, divergences, adapters, settings, files."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conceptsplit_core.adapters.base import AdapterInfo
from conceptsplit_core.adapters.file import adapter_bytes, canonical_key, parse_adapter
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.method.divergence import DIVERGENCES, EPS, pairwise
from conceptsplit_core.method.loda import step_sizes
from conceptsplit_core.method.maps import distributions, gaussian_blur, normalise, separation_loss
from conceptsplit_core.method.partition import REGION_RULES
from conceptsplit_core.method.regions import region_bias, regions, resize_regions
from conceptsplit_core.settings import LodaConfig, TrainConfig
from conceptsplit_core.text.binding import Concept, bind, row_mask
from conceptsplit_core.text.concepts import placeholders
from conceptsplit_core.text.layout import SpecialTokens, content
from conceptsplit_core.train.prompts import expand_templates

# A busy machine is not a failure, and the same examples are drawn on every machine.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


def one_sentence(error):
    text = str(error)
    assert text.strip() and "\n" not in text and "\r" not in text and len(text) < 600, text


# --- tokens ---------------------------------------------------------------------------------------------------

START, END = 1, 2
SPECIAL = SpecialTokens(START, END, END)


def words_of(text):
    """A tokenizer without context: every word, every other sign is a token; long words are two."""
    ids = []
    for word in re.findall(r"\w+|[^\w\s]", text):
        parts = [word] if len(word) < 6 else [word[:5] + "+", word[5:]]
        ids += [10 + int.from_bytes(part.encode("utf-8", "replace"), "big") for part in parts]
    return ids


def tokenize(text, room=9):
    ids = words_of(text)
    chunks = [ids[at : at + room] for at in range(0, max(len(ids), 1), room)]
    return [[START, *chunk, END, *[END] * (room - len(chunk))] for chunk in chunks]


names = st.sampled_from(["rex", "tom", "Ärger", "b-1", "x.y_z", "犬", "9"])
class_words = st.sampled_from(["dog", "cat", "polar bear", "schnauzer", "犬", "tea-pot"])
prompt_text = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from(["dog", "cat", "polar", "bear", "polar bear", "schnauzer", "犬", "tea-pot", "<rex>", "<tom>",
                         "<Ärger>", "<b-1>", "<x.y_z>", "<犬>", "<9>", "<3", "(", ":1.2)", ",", "\n", "🐶"]),
        max_size=30,
    ).map(" ".join),
)  # fmt: skip


@settings(max_examples=300)
@given(prompt_text, st.lists(st.tuples(names, class_words), max_size=4, unique_by=lambda pair: pair[0]))
def test_every_text_is_bound_right_or_refused_in_one_sentence(text, pairs):
    concepts = [Concept(*pair) for pair in pairs]
    known = {concept.name: concept for concept in concepts}
    try:
        bound = bind(text, concepts, tokenize, special=SPECIAL)
    except ConceptSplitError as error:
        one_sentence(error)
        broken = any("\ud800" <= sign <= "\udfff" for sign in text)
        unknown = any(name not in known for name in placeholders(text))
        assert broken or unknown or "does not stand as the word" in str(error)
        return
    flat = [token for chunk in tokenize(bound.text) for token in chunk]
    rows = [row for binding in bound.bindings for row in binding.rows]
    assert len(rows) == len(set(rows)), "no row belongs to two concepts"
    for binding in bound.bindings:
        word = words_of(known[binding.concept].class_word)
        times = max(1, placeholders(text).count(binding.concept))
        found = [flat[row] for row in binding.rows]
        # In this tokenizer a word is one with letters and digits that touch it, as its placeholder may.
        plain = re.escape(known[binding.concept].class_word)
        assert found == word * times or re.search(rf"\w{plain}|{plain}\w", bound.text)
    assert {binding.concept for binding in bound.bindings} >= set(placeholders(text))
    assert len(bound.bindings) + len(bound.warnings) == len(concepts), "bound, or warned of"
    mask = row_mask(bound.bindings, list(known), len(flat))
    assert mask.sum() == len(rows) and mask.shape == (len(flat), len(concepts))


@settings(max_examples=200)
@given(st.lists(st.integers(3, 6), max_size=40), st.integers(3, 9))
def test_content_is_the_same_wherever_chunks_are_cut(ids, room):
    chunks = [[START, *part, END, *[END] * (room - len(part))] for part in
              (ids[at : at + room] for at in range(0, max(len(ids), 1), room))]  # fmt: skip
    found, rows = content(chunks, SPECIAL)
    flat = [token for chunk in chunks for token in chunk]
    assert found == ids
    assert [flat[row] for row in rows] == ids and rows == sorted(set(rows))


@settings(max_examples=200)
@given(st.text(max_size=30), st.text(max_size=30))
def test_a_concept_is_one_that_a_prompt_can_name_or_refused(name, word):
    try:
        concept = Concept(name, word)
    except ConceptSplitError as error:
        one_sentence(error)
        return
    assert placeholders(f"a <{concept.name}>, <{concept.name}>") == [concept.name] * 2


@settings(max_examples=200)
@given(st.lists(st.text(alphabet="a {}\n\r<>é", max_size=20), max_size=6), st.text(max_size=10))
def test_templates_hold_the_word_once_each_or_are_refused(templates, word):
    try:
        prompts = expand_templates(templates, word)
    except ConceptSplitError as error:
        one_sentence(error)
        return
    assert prompts and all(word.strip() in prompt for prompt in prompts)


# --- maps and divergences -------------------------------------------------------------------------------------


@st.composite
def maps(draw):
    """Attention maps [B, n, h, w]: flat, sharp, equal, empty, of every small size."""
    shape = (draw(st.integers(1, 2)), draw(st.integers(2, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    found = torch.rand(shape, dtype=torch.float64, generator=generator)
    found = found ** draw(st.sampled_from([0.0, 1.0, 8.0, 60.0]))
    if draw(st.booleans()):
        found[:, draw(st.integers(0, shape[1] - 1))] = draw(st.sampled_from([0.0, 1e-30, 1.0]))
    if draw(st.booleans()):
        found[:, 1] = found[:, 0]
    return found * draw(st.sampled_from([1.0, 1e-6, 1e3]))


@settings(max_examples=200)
@given(maps(), st.floats(0, 4), st.sampled_from(list(DIVERGENCES)))
def test_divergences_are_symmetric_not_negative_and_zero_for_equals(found, sigma, name):
    p = distributions(found, sigma)
    torch.testing.assert_close(p.sum(dim=(-2, -1)), torch.ones(p.shape[:2], dtype=p.dtype))
    values = pairwise(p, name)
    # What stands in the logarithms is at least EPS a pixel, which alone the Bhattacharyya sum does not weigh by a map.
    near = 1e-9 + EPS * p[0, 0].numel() * (name == "bhattacharyya")
    assert torch.isfinite(values).all() and (values >= -near).all()
    assert (pairwise(torch.cat([p[:, :1], p[:, :1]], 1), name).abs() < near).all()
    if name != "kl":  # the paper's code, one way round
        there, back = (DIVERGENCES[name].function(p[:, i], p[:, 1 - i]) for i in (0, 1))
        torch.testing.assert_close(there, back, atol=1e-10, rtol=1e-9)
    if name == "jsd":
        assert (values <= math.log(2) + 1e-9).all()


@settings(max_examples=150)
@given(maps(), st.floats(0, 4), st.floats(0.01, 20), st.sampled_from(list(DIVERGENCES)))
def test_loss_and_gradient_are_finite_and_each_images_own(found, sigma, threshold, name):
    leaf = found.float().requires_grad_(True)
    loss, values = separation_loss(leaf, name, threshold, sigma)
    assert (loss >= 0).all() and torch.isfinite(loss).all() and torch.isfinite(values).all()
    (gradient,) = torch.autograd.grad(loss[0], leaf)
    assert torch.isfinite(gradient).all()
    assert not gradient[1:].any(), "another image's maps do not matter"


@settings(max_examples=150)
@given(maps(), st.floats(0, 8), st.floats(0.5, 3))
def test_blur_keeps_sizes_constants_and_bounds_and_adds_up(found, sigma, factor):
    blurred = gaussian_blur(found, sigma)
    assert blurred.shape == found.shape
    assert blurred.min() >= found.min() - 1e-9 * found.abs().max() and blurred.max() <= found.max() * (1 + 1e-9)
    torch.testing.assert_close(gaussian_blur(found * factor + 1, sigma), blurred * factor + 1)
    torch.testing.assert_close(gaussian_blur(found.transpose(-2, -1), sigma), blurred.transpose(-2, -1))


@settings(max_examples=150)
@given(
    maps(), st.sampled_from(list(REGION_RULES)), st.floats(0.01, 1), st.floats(0, 3), st.integers(1, 12),
    st.integers(1, 12),
)  # fmt: skip
def test_regions_are_disjoint_of_the_share_asked_and_stay_so_at_every_size(found, rule, fraction, sigma, h, w):
    region = regions(found, fraction, sigma, rule)
    pixels = found.shape[-2] * found.shape[-1]
    if rule != "overlapping":
        assert (region.sum(dim=1) <= 1).all(), "a pixel belongs to one concept at most"
    if rule in ("top", "top_by_place", "overlapping"):
        assert (region.flatten(2).sum(-1) <= max(1, round(fraction * pixels))).all()
    else:
        bound = found.flatten(1).sum(-1) > 0
        assert (region.sum(dim=1) == bound.view(-1, 1, 1)).all(), "a partition leaves no pixel over"
    assert not region[found.flatten(2).sum(-1) == 0].any(), "a concept that is not bound has no region"
    fitted = resize_regions(region, (h, w))
    assert tuple(fitted.shape[-2:]) == (h, w)
    assert rule == "overlapping" or (fitted.sum(dim=1) <= 1).all()
    mask = torch.zeros(found.shape[0], 5, found.shape[1])
    mask[:, 2, 0] = 1.0
    bias = region_bias(region, mask, (h, w), 3.0, -1e8)
    assert torch.isfinite(bias).all() and not bias[..., [0, 1, 3, 4]].any()
    assert set(bias.unique().tolist()) <= {0.0, 3.0, -1e8}


@settings(max_examples=100)
@given(maps())
def test_normalising_twice_changes_nothing(found):
    once = normalise(found)
    torch.testing.assert_close(normalise(once), once, atol=1e-6, rtol=1e-5)


# --- adapters -------------------------------------------------------------------------------------------------

safe_text = st.text(st.characters(codec="utf-8"), max_size=12)
plain_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | safe_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(safe_text, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def adapters(draw, sharp=False):
    """Value adapters of one to four layers; values from tiny to large, `sharp` ones of falling singular values."""
    count, rank = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    block = draw(st.sampled_from(["down_blocks.1", "mid_block", "up_blocks.2"]))
    layers = {
        f"{block}.attentions.{i}.transformer_blocks.0.attn2.to_v": (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
        for i in range(count)
    }
    info = AdapterInfo(
        draw(st.sampled_from(["rex", "犬", "a-b.c"])),
        draw(safe_text),
        draw(st.sampled_from(["sd15", "sd21", "sdxl", "demo", "unknown"])),
        draw(st.integers(1, 4096)),
        rank,
        draw(st.floats(0.125, 128)),
        draw(st.sampled_from(["epsilon", "v_prediction"])),
        draw(st.dictionaries(safe_text, plain_json, max_size=3)),
    )
    adapter = LowRankAdapter.create(layers, info, draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 1e-4, 1.0, 30.0]))
    for n, layer in enumerate(sorted(layers)):
        up = torch.randn(adapter.up[layer].shape, generator=torch.Generator().manual_seed(n)) * scale
        adapter.up[layer] = up * (0.3 ** torch.arange(up.shape[1]) if sharp else 1.0)
    return adapter


@settings(max_examples=200)
@given(adapters(), st.sampled_from([None, torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_a_written_adapter_reads_back_as_it_was(adapter, dtype):
    back = parse_adapter(adapter_bytes(adapter, dtype), "x.safetensors")
    assert back.info == adapter.info
    assert back.layers == adapter.layers
    for layer in adapter.down:
        assert back.scale(layer) == adapter.scale(layer)
        for mine, theirs in ((adapter.down, back.down), (adapter.up, back.up)):
            assert torch.equal(theirs[layer], mine[layer].to(dtype or mine[layer].dtype))


@settings(max_examples=100)
@given(adapters(sharp=True))
def test_truncation_loses_less_the_more_rank_is_kept(adapter):
    def full(one, layer):
        return one.scale(layer) * one.up[layer].double() @ one.down[layer].double()

    whole = {layer: full(adapter, layer) for layer in adapter.down}
    norm = math.sqrt(sum(float(delta.pow(2).sum()) for delta in whole.values()))
    told = []
    for rank in range(1, adapter.info.rank + 2):
        small, error = adapter.truncated(rank)
        assert all(small.rank_of(layer) <= rank for layer in small.down)
        lost = math.sqrt(sum(float((whole[layer] - full(small, layer)).pow(2).sum()) for layer in whole))
        assert error == pytest.approx(lost / norm if norm else 0.0, abs=2e-6), "the error told is the error made"
        told.append(error)
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(told))
    assert told[-1] == pytest.approx(0, abs=1e-6)


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"


@settings(max_examples=300)
@given(st.text(max_size=60) | st.from_regex(r"(unet\.)?(down_blocks|mid_block)[\w.]{0,30}attn2\.to_v\.[\w.]{0,30}"))
def test_any_tensor_name_is_a_layers_side_or_nothing(key):
    parsed = canonical_key(key)
    if parsed is not None:
        layer, side = parsed
        assert (
            side in ("lora_A", "lora_B", "alpha")
            and layer.endswith("attn2.to_v")
            and layer.removesuffix(".to_v") in key
        )
        assert side == "alpha" or canonical_key(f"unet.{layer}.{side}.weight") == parsed


@st.composite
def safetensors_like(draw):
    """Bytes with a readable header of any content, from plausible to absurd."""
    entry = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F16", "F32", "F64", "BF16", "I8", "BOOL", "", None, 3]),
            "shape": st.lists(st.integers(-2, 6), max_size=3) | plain_json,
            "data_offsets": st.lists(st.integers(-4, 200), min_size=2, max_size=2) | plain_json,
        },
    )
    sides = st.sampled_from(["lora_A", "lora_B", "original_linear.lora_A", "lora.down", "x"])
    header = draw(st.dictionaries(safe_text | sides.map(lambda s: f"unet.{LAYER}.{s}.weight"), entry, max_size=4))
    facts = st.sampled_from(["rank", "alpha", "format", "format_version", "training", "concept", "base", "context_dim"])
    if draw(st.booleans()):
        header["__metadata__"] = draw(
            st.dictionaries(facts, safe_text | plain_json.map(json.dumps) | plain_json, max_size=4) | plain_json
        )
    raw = json.dumps(header).encode()
    size = draw(st.sampled_from([len(raw)] * 6 + [0, 1, len(raw) - 1, 2**63, 2**64 - 1]))
    return struct.pack("<Q", size) + raw + draw(st.binary(max_size=200))


@settings(max_examples=400)
@given(st.binary(max_size=300) | safetensors_like())
def test_any_bytes_are_an_adapter_or_one_sentence(data):
    try:
        adapter = parse_adapter(data, "x.safetensors")
    except ConceptSplitError as error:
        one_sentence(error)
        return
    for layer in adapter.layers:
        assert math.isfinite(adapter.scale(layer))
        assert torch.isfinite(adapter.down[layer]).all() and torch.isfinite(adapter.up[layer]).all()


@settings(max_examples=300)
@given(st.integers(0, 2**32), st.integers(0, 13))
def test_damaged_files_of_every_released_spelling_are_an_adapter_or_one_sentence(seed, which):
    files = sorted((Path(__file__).parents[1] / "fixtures" / "adapters").glob("*.safetensors"))
    data = bytearray(files[which % len(files)].read_bytes())
    rng = random.Random(seed)
    header_end = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(header_end)] ^= 1 << rng.randrange(8)
    try:
        adapter = parse_adapter(bytes(data), "x.safetensors")
    except ConceptSplitError as error:
        one_sentence(error)
        return
    assert all(math.isfinite(adapter.scale(layer)) for layer in adapter.layers)


# --- settings -------------------------------------------------------------------------------------------------

any_float = st.floats() | st.sampled_from([0.0, -1e8, 3.0, 0.1, 1.0, 1e-9, 1e300])


@settings(max_examples=300)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "loda_steps": st.sampled_from([-2, 0, 1, 7, 60]),
            "loda_iterations": st.integers(-2, 9),
            "loda_strength": any_float,
            "loda_rule": st.sampled_from(["normalised", "gradient", "", "x"]),
            "divergence": st.sampled_from([*DIVERGENCES, "", "x"]),
            "threshold": any_float,
            "map_smoothing": any_float,
            "map_downscale": st.integers(-1, 64),
            "map_part": st.sampled_from(["all", "down", "up"]),
            "afg_inside": any_float,
            "afg_outside": any_float,
            "afg_region": any_float,
            "afg_smoothing": any_float,
            "afg_end": any_float,
        },
    )
)
def test_loda_settings_work_or_are_refused(given_settings):
    try:
        config = LodaConfig(**given_settings)
    except ConceptSplitError as error:
        one_sentence(error)
        return
    if config.loda_steps < 0:  # a share of the schedule
        config = config.for_schedule(20)
    sizes = step_sizes(config)
    assert len(sizes) == config.loda_steps and all(math.isfinite(size) and size >= 0 for size in sizes)
    assert all(later <= earlier for earlier, later in itertools.pairwise(sizes))
    assert 0 < config.target < math.inf
    found = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    loss, values = separation_loss(found, config.divergence, config.target, config.map_smoothing)
    assert torch.isfinite(values).all() and not loss.isnan().any()
    bias = region_bias(
        regions(found, config.afg_region, config.afg_smoothing),
        torch.ones(1, 3, 2),
        (4, 4),
        config.afg_inside,
        config.afg_outside,
    )
    assert not bias.isnan().any()


@settings(max_examples=300)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "steps": st.integers(-2, 10**9),
            "batch_size": st.integers(-2, 99),
            "learning_rate": any_float,
            "weight_decay": any_float,
            "warmup": st.integers(-2, 99),
            "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample", ""]),
            "save_every": st.integers(-2, 99),
            "max_grad_norm": any_float,
            "background_weight": any_float,
            "loss_scale": any_float,
        },
    )
)
def test_training_settings_are_finite_or_refused(given_settings):
    try:
        config = TrainConfig(**given_settings)
    except ConceptSplitError as error:
        one_sentence(error)
        return
    assert all(math.isfinite(value) for value in vars(config).values() if isinstance(value, float))
