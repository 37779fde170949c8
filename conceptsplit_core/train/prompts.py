"""Training prompts from templates: each with the rows that belong to the class word."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ConceptSplitError
from ..text.binding import Binding, Concept

MAX_TEMPLATE_BYTES = 100_000  # they are stored in the adapter file's header, which has a limit

DEFAULT_TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a dark photo of the {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a photo of the {}",
    "a good photo of a {}",
)


@dataclass(frozen=True)
class Prompt:
    """One encoded training prompt: context [L, d_ctx], the class word's rows, and what else the UNet wants.

    extra: tensors without a batch axis, such as SDXL's pooled text and size ids.
    others: the rows of each other thing that the pictures show.
    length: how many text rows the model sees, where it makes other ones of the context's; 0 is L.
    """

    text: str
    context: Tensor
    rows: tuple[int, ...]
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    others: tuple[tuple[int, ...], ...] = ()
    length: int = 0

    def owners(self) -> Tensor:
        """Which rows are the class word's and each other thing's, [L, 1 + m] of 0 and 1."""
        things = (self.rows, *self.others)
        found = torch.zeros(self.length or len(self.context), len(things))
        for thing, own in enumerate(things):
            found[list(own), thing] = 1.0
        return found


@dataclass(frozen=True)
class EncodedText:
    """What a host's text encoder makes of one text: the words as they were read, context [L, d_ctx], all bindings."""

    text: str
    context: Tensor
    bindings: Sequence[Binding]
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    length: int = 0


def expand_templates(templates: Sequence[str], class_word: str) -> list[str]:
    """Prompts from templates with {} for the class word.

    Raises:
        ConceptSplitError: no class word, no template, or a template without exactly one {}.
    """
    if not class_word.strip():
        raise ConceptSplitError("The class word is missing: give the plain word for the concept, such as 'dog'.")
    kept = [line.strip() for line in templates if line.strip()]
    if not kept:
        raise ConceptSplitError("There is no prompt template: write at least one line, such as 'a photo of a {}'.")
    if (size := sum(len(line.encode("utf-8", "replace")) for line in kept)) > MAX_TEMPLATE_BYTES:
        raise ConceptSplitError(f"The prompt templates are {size} bytes of text: use at most {MAX_TEMPLATE_BYTES}.")
    for line in kept:
        if line.count("{}") != 1:
            shown = " ".join(line.split())[:120]
            raise ConceptSplitError(f'Template "{shown}" needs exactly one {{}} where the class word goes.')
    return [line.replace("{}", class_word.strip()) for line in kept]


def others_beside(concept: Concept, words: str) -> list[Concept]:
    """Other things in the pictures of a concept, from their class words with commas between them."""
    found = [word.strip() for word in words.split(",") if word.strip()]
    return [Concept(f"{concept.name}.beside{number}", word) for number, word in enumerate(found, 1)]


def encode_templates(
    encode: Callable[[str], EncodedText], concept: Concept, templates: Sequence[str], others: Sequence[Concept] = ()
) -> list[Prompt]:
    """Each template with the concept, and all other things beside it, in place of {}, encoded once by the host.

    The placeholder `<name>` is encoded, not the class word: a template may contain the word a second time.

    Args:
        encode: the host's, which knows the concept and the others.
    """
    things = [f"{'an' if other.class_word[:1].lower() in 'aeiou' else 'a'} <{other.name}>" for other in others]
    listed = " and ".join([f"<{concept.name}>", *things])
    prompts = []
    for text in expand_templates(templates, listed):
        encoded = encode(text)
        rows = {binding.concept: tuple(binding.rows) for binding in encoded.bindings}
        own = rows.get(concept.name, ())
        beside = tuple(rows[other.name] for other in others)
        prompts.append(Prompt(encoded.text, encoded.context, own, encoded.extra, beside, encoded.length))
    return prompts
