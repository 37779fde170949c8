"""The tokenizers of a CLIP: how its text is laid out, and what ids a text becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import ConceptSplitError
from ...text.concepts import shown
from ...text.layout import SpecialTokens, TextLayout, layout_of


def text_layout(clip: Any, tokens: Any) -> TextLayout:
    """How the text encoder lays out its rows, without the text models it has been loaded without."""
    classes = [base.__name__ for base in type(clip.tokenizer).__mro__ if base is not object]
    layout = layout_of(classes, list(tokens) if isinstance(tokens, dict) else [])
    models = vars(clip.cond_stage_model)
    models = {**models, **models.get("_modules", {})}
    return layout.without(
        {part for part in layout.parts if any(models.get(name, 0) is None for name in (f"clip_{part}", part))}
    )


def token_ids(stock: Callable, part: str, options: Mapping[str, Any], text: str) -> list[list[int]]:
    """Token ids of `text` for one encoder, chunk by chunk. An embedding's vector takes one row and is no word: -1.

    Raises:
        ConceptSplitError: what the host's tokenizer dies of, such as "embedding:" without a name.
    """
    try:
        chunks = stock(text, **options)[part]
    except (IndexError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")
        raise ConceptSplitError(
            f'The text encoder cannot read the prompt "{shown(text)}" ({reason}): change what is odd in it.'
        ) from error
    return [[entry[0] if isinstance(entry[0], int) else -1 for entry in chunk] for chunk in chunks]


def tokenizer_of(clip: Any, part: str) -> Any:
    """The host's tokenizer of one part ('l', 't5xxl', 'qwen3_4b' …), or None."""
    for name in (f"clip_{part}", part, getattr(clip.tokenizer, "clip", None)):
        inner = getattr(clip.tokenizer, name, None) if name else None
        if inner is not None and hasattr(inner, "end_token"):
            return inner
    return None


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """The ids that frame a chunk; CLIP's own when the tokenizer does not say."""
    if tokenizer is None:
        return SpecialTokens()
    return SpecialTokens(
        getattr(tokenizer, "start_token", None), tokenizer.end_token, getattr(tokenizer, "pad_token", None)
    )
