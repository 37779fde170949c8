"""Every text encoder that the host builds from its own tokenizer files: bound rows are the rows of the word.

The encoders are the host's own classes, small and with random weights, and without the output of their attention: then
a row depends on its own token alone, and the rows that change when another word of as many tokens stands in a prompt
are, by experiment on the stock CLIP, the rows of the word.
"""

from __future__ import annotations

import functools
import gc
import importlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from .conftest import pack, run
from .helpers import encode
from .test_text import mark

QWEN = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 36, "num_attention_heads": 1,
        "num_key_value_heads": 1}  # fmt: skip
T5 = {"d_model": 64, "d_ff": 64, "d_kv": 64, "num_heads": 1, "num_layers": 2}
CLIP = {"num_hidden_layers": 3, "intermediate_size": 64}
OPTIONS = {
    **{f"{name}_model_config": QWEN for name in ("qwen3_4b", "qwen3_8b", "qwen3_2b", "qwen3_06b", "qwen25_7b",
                                                 "qwen25_3b", "qwen3vl_4b", "qwen3vl_8b")},
    "llama_model_config": QWEN,
    **{f"clip_{name}_model_config": CLIP for name in "lgh"},
    "gemma2_2b_model_config": {**QWEN, "num_hidden_layers": 3},
    **{f"{name}_model_config": T5 for name in ("umt5xxl", "t5xxl", "pile_t5xl", "clip_t5xxl", "clip_t5base",
                                               "clip_pile_t5xl")},
    "dtype": torch.float32,
}  # fmt: skip

# Family: (module of comfy, its tokenizer, what makes its model). As `comfy.sd` pairs them.
FAMILIES: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "sd15": ("sd1_clip", "SD1Tokenizer", lambda m: m.SD1ClipModel),
    "sd21": ("text_encoders.sd2_clip", "SD2Tokenizer", lambda m: m.SD2ClipModel),
    "sdxl": ("sdxl_clip", "SDXLTokenizer", lambda m: m.SDXLClipModel),
    "sdxl refiner": ("sdxl_clip", "SDXLTokenizer", lambda m: m.SDXLRefinerClipModel),
    "cascade": ("sdxl_clip", "StableCascadeTokenizer", lambda m: m.StableCascadeClipModel),
    "sd3": ("text_encoders.sd3_clip", "SD3Tokenizer", lambda m: m.sd3_clip()),
    "sd3 without T5": ("text_encoders.sd3_clip", "SD3Tokenizer", lambda m: m.sd3_clip(t5=False)),
    "sd3 T5 alone": ("text_encoders.sd3_clip", "SD3Tokenizer", lambda m: m.sd3_clip(clip_l=False, clip_g=False)),
    "flux": ("text_encoders.flux", "FluxTokenizer", lambda m: m.flux_clip()),
    "chroma": ("text_encoders.pixart_t5", "PixArtTokenizer", lambda m: m.pixart_te()),
    "mochi": ("text_encoders.genmo", "MochiT5Tokenizer", lambda m: m.mochi_te()),
    "ltxv": ("text_encoders.lt", "LTXVT5Tokenizer", lambda m: m.ltxv_te()),
    "aura": ("text_encoders.aura_t5", "AuraT5Tokenizer", lambda m: m.AuraT5Model),
    "z-image": ("text_encoders.z_image", "ZImageTokenizer", lambda m: m.te()),
    "klein": ("text_encoders.flux", "KleinTokenizer", lambda m: m.klein_te()),
    "klein 9b": ("text_encoders.flux", "KleinTokenizer8B", lambda m: m.klein_te(model_type="qwen3_8b")),
    "qwen-image": ("text_encoders.qwen_image", "QwenImageTokenizer", lambda m: m.te()),
    "hunyuan image": ("text_encoders.hunyuan_image", "HunyuanImageTokenizer", lambda m: m.te(byt5=False)),
    "kandinsky": ("text_encoders.kandinsky5", "Kandinsky5Tokenizer", lambda m: m.te()),
    "krea 2": ("text_encoders.krea2", "Krea2Tokenizer", lambda m: m.te()),
    "mage-flow": ("text_encoders.mage_flow", "MageFlowTokenizer", lambda m: m.te()),
    "joyimage": ("text_encoders.joyimage", "JoyImageTokenizer", lambda m: m.te()),
    "boogu": ("text_encoders.boogu", "BooguTokenizer", lambda m: m.te()),
    "ovis": ("text_encoders.ovis", "OvisTokenizer", lambda m: m.te()),
    "omnigen": ("text_encoders.omnigen2", "Omnigen2Tokenizer", lambda m: m.te()),
    "anima": ("text_encoders.anima", "AnimaTokenizer", lambda m: m.te()),
    "wan": ("text_encoders.wan", "WanT5Tokenizer", lambda m: m.te()),
    "lumina 2": ("text_encoders.lumina2", "LuminaTokenizer", lambda m: m.te()),
    "longcat": ("text_encoders.longcat_image", "LongCatImageTokenizer", lambda m: m.te()),
    "hunyuan video": ("text_encoders.hunyuan_video", "HunyuanVideoTokenizer", lambda m: m.hunyuan_video_clip()),
    "hidream": ("text_encoders.hidream", "HiDreamTokenizer", lambda m: m.hidream_clip()),
}
# Which tokens stand in the context, where that is not the first part.
CONTEXT = {"sd3": ["l", "t5xxl"], "sd3 T5 alone": ["t5xxl"], "flux": ["t5xxl"], "anima": ["t5xxl"]}
REFUSED = {"longcat": "LongCat-Image", "hunyuan video": "HunyuanVideo", "hidream": "HiDream"}


# Their tokenizer comes out of the model's file: (begin, end) ids of the real one.
IN_THE_FILE = {"wan": (-1, 1), "lumina 2": (2, 1)}


@functools.lru_cache(maxsize=2)
def small_tokenizer(begin: int, end: int) -> torch.Tensor:
    """A SentencePiece model, as bytes, that was trained on the tests' own sentences."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="this ComfyUI's Python has no sentencepiece")
    words = "dog cat mug black white red big photo park in a of and beside the runs look two cups , . like".split()
    lines = [" ".join(words[i:] + words[:i]) for i in range(len(words))] * 20
    lines += ['schnauzer golden retriever -like ( ) " : 1.2 2 0.7 3'] * 3
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=file, vocab_size=90, hard_vocab_limit=False, pad_id=0, eos_id=end,
        bos_id=begin, unk_id=3, character_coverage=1.0, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def build(family: str) -> Any:
    """The host's CLIP of a family; skips where this host has none, or where its tokenizer file is not here."""
    import comfy.sd
    import comfy.supported_models_base

    module, tokenizer, make = FAMILIES[family]
    try:
        found = importlib.import_module(f"comfy.{module}")
    except ModuleNotFoundError as error:
        pytest.skip(f"{family}: this ComfyUI has no comfy.{module} ({error})")
    if not hasattr(found, tokenizer):
        pytest.skip(f"{family}: this ComfyUI has no {tokenizer}")
    options = dict(OPTIONS)
    if family.startswith("sd3"):
        options["t5xxl_model_config"] = {**T5, "d_model": 4096}  # its rows stand behind CLIP's, as wide
    if family in ("hunyuan video", "hidream"):
        try:
            getattr(found, tokenizer)()  # before the model: Llama's is not a small one
        except (OSError, TypeError) as error:
            pytest.skip(f"{family}: its tokenizer file is not on this machine ({type(error).__name__})")
    target = comfy.supported_models_base.ClipTarget(getattr(found, tokenizer), make(found))
    data = {"spiece_model": small_tokenizer(*IN_THE_FILE[family])} if family in IN_THE_FILE else {}
    clip = comfy.sd.CLIP(target, tokenizer_data=data, model_options=options)
    generator = torch.Generator().manual_seed(5)
    for module_ in list(clip.cond_stage_model.modules()):
        if hasattr(module_, "visual"):
            del module_.visual  # never used, never filled
    for name, weight in clip.cond_stage_model.named_parameters():
        if name.endswith(("o_proj.weight", "SelfAttention.o.weight", "out_proj.weight", "out_proj.bias")):
            weight.data.zero_()
        elif weight.ndim < 2:
            weight.data.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            weight.data.normal_(generator=generator).mul_(0.5)
    return clip


@pytest.fixture(scope="module", params=list(FAMILIES))
def encoder(request):
    """A family and its CLIP."""
    yield request.param, build(request.param)
    gc.collect()


PROMPTS = [
    "a photo of a {} and a mug",
    "{}",
    "(a {}), a big mug",
    "a (red {}:1.3) beside a (mug:0.7)",
    "in a park, " * 30 + "the {} runs",
]


def _rows(conditioning: Any) -> torch.Tensor:
    """A conditioning's rows [1, L, d]; of Anima the ids that the model makes its rows of, [1, L, 1]."""
    text, options = conditioning[0]
    return options["t5xxl_ids"][None, :, None].float() if "t5xxl_ids" in options else text


def test_bound_rows_are_the_rows_of_the_word(encoder):
    family, clip = encoder
    if family in REFUSED:
        error = pack("conceptsplit_core.errors").ConceptSplitError
        with pytest.raises(error, match=f"behind the {REFUSED[family]} text encoder"):
            mark(clip, "rex:dog")
        return
    for word, swapped in (("dog", "cat"), ("black dog", "white cat")):
        ours = mark(clip, f"rex:{word}, cup:mug")
        for prompt in PROMPTS:
            bound = encode(ours, prompt.format("<rex>"))
            stock, other = (_rows(encode(clip, prompt.format(one))) for one in (word, swapped))
            if not stock.isfinite().all():
                assert "(" in prompt, "only weights may give NaN, in OmniGen of 0.3.64"
                continue
            assert torch.equal(_rows(bound), stock), "the text encodes exactly as stock"
            assert stock.shape == other.shape, "both must be as many tokens for this test to say anything"
            wanted = (stock != other).any(dim=-1)[0].nonzero().flatten().tolist()
            assert len(wanted) in (len(word.split()), 2 * len(word.split())), prompt
            found = {binding.concept: list(binding.rows) for binding in bound[0][1]["conceptsplit"].bindings}
            assert found["rex"] == wanted, prompt
            assert ("cup" in found) == ("mug" in prompt)


def test_words_of_several_tokens(encoder):
    """What the tokenizer makes of the bound rows' ids again."""
    family, clip = encoder
    if family in REFUSED:
        pytest.skip(f"{family} is refused")
    for word in ("schnauzer", "golden retriever", "mug"):
        for text in ("look, a <rex>, two cups", "<rex>-like", '"<rex>"', "(<rex>:1.2)"):
            bound = encode(mark(clip, f"rex:{word}"), text)
            tokens = clip.tokenize(text.replace("<rex>", word))
            keys = CONTEXT.get(family, [next(iter(tokens))])
            ids = [(key, entry[0]) for key in keys for chunk in tokens[key] for entry in chunk]
            crop = len(ids) - _rows(bound).shape[1]
            rows = [row + crop for row in bound[0][1]["conceptsplit"].bindings[0].rows]
            for key in {ids[row][0] for row in rows}:
                inner = pack("conceptsplit_core.hosts.comfy.tokenizers").tokenizer_of(clip, key).tokenizer
                decode = getattr(inner, "decode", None) or inner.tokenizer.decode
                found = decode([ids[row][1] for row in rows if ids[row][0] == key]).strip().lower()
                # Qwen's tokenizer has '"s' and '(s' as one token: the row is the word's too.
                assert found.strip('"(') == word, (family, text, key)


def test_a_prompt_with_a_picture_is_refused_in_one_sentence():
    clip = build("qwen-image")
    error = pack("conceptsplit_core.errors").ConceptSplitError
    with pytest.raises(error, match="holds a picture.*Qwen-Image"):
        mark(clip, "rex:dog").tokenize("a <rex>", images=[torch.zeros(1, 56, 56, 3)])


def test_texts_of_sd3_that_place_a_concept_differently_are_refused():
    clip = mark(build("sd3 without T5"), "rex:dog")
    error = pack("conceptsplit_core.errors").ConceptSplitError
    texts = {"clip_l": "a <rex>", "clip_g": "the big <rex>", "t5xxl": "", "empty_padding": "empty_prompt"}
    with pytest.raises(error, match="place a concept at different words"):
        run("CLIPTextEncodeSD3", clip=clip, **texts)
