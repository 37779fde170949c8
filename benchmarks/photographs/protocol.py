"""What is compared: concepts from folders of photographs, prompts, and the arms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.network.hooks import Scope
from conceptsplit_core.text.concepts import Concept, word_name
from conceptsplit_core.train.folder import picture_folder
from conceptsplit_core.train.identity import digest
from conceptsplit_core.train.reading import open_mask, open_picture

TEMPLATES = (
    "a photo of {}",
    "a photo of {} on the beach",
    "a photo of {} in the snow",
    "a photo of {} in a forest",
    "a photo of {} on a street in a city",
    "a photo of {} in front of a mountain",
    "a photo of {} on a wooden floor",
    "a photo of {} in a garden",
    "a painting of {}",
    "{} side by side on a sofa",
)
"""Ours. The authors' scorer takes a folder of pictures per prompt, and no public text names their prompts."""


@dataclass(frozen=True)
class Photographs:
    """A concept with its photographs, and a mask for each or none at all."""

    concept: Concept
    files: tuple[Path, ...]
    masks: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        return self.concept.name

    @cached_property
    def digest(self) -> str:
        """Of everything that is learned from: words, pictures and masks."""
        contents = (path.read_bytes() for path in (*self.files, *self.masks))
        return digest(self.concept.name, self.concept.class_word, *contents)


@dataclass(frozen=True)
class Arm:
    """One way to draw several concepts.

    kind: of its adapters; None draws the class words alone.
    scope: where they act; their kind's own place when None.
    loda: whether LODA and AFG act, with their default settings.
    """

    title: str
    kind: str | None
    scope: Scope | None = None
    loda: bool = False


ARMS = {
    "plain": Arm("plain words", None),
    "lora_merged": Arm("LoRAs, merged", "lora", "everywhere"),
    "lora_routed": Arm("LoRAs, routed, LODA, AFG", "lora", loda=True),
    "value": Arm("value adapters", "value"),
    "value_loda": Arm("value adapters, LODA, AFG", "value", loda=True),
}


def photographs(text: str) -> Photographs:
    """``[NAME=]FOLDER:WORD`` with all its files opened once; masks count where every picture has one beside it.

    Raises:
        ConceptSplitError: not of that form, no such folder, no picture in it, or a file that cannot be read.
    """
    found = re.fullmatch(r"(?:(?P<name>[^\W_][\w.\-]*)=)?(?P<folder>.+):(?P<word>[^:/\\]+)", text.strip())
    if found is None:
        raise ConceptSplitError(
            f"--concept {text} is not understood: write [NAME=]FOLDER:CLASS WORD, for instance rex=photos/rex:dog."
        )
    folder = picture_folder(found["folder"])
    masks = [folder.masks[file] for file in folder.pictures if file in folder.masks]
    for file in folder.pictures:
        open_picture(file)
    for file in masks:
        open_mask(file)
    name = found["name"] or word_name(Path(found["folder"]).name)
    concept = Concept(name, found["word"].strip())
    return Photographs(concept, folder.pictures, tuple(masks) if len(masks) == len(folder.pictures) else ())


def concept_sets(concepts: Sequence[Photographs], together: int) -> list[tuple[Photographs, ...]]:
    """All sets of `together` concepts.

    Raises:
        ConceptSplitError: two concepts of one name, or too few concepts.
    """
    names = [one.name for one in concepts]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise ConceptSplitError(f"Two concepts are named '{double}': write NAME= before one of the folders.")
    if len(concepts) < together:
        raise ConceptSplitError(
            f"There are {len(concepts)} concepts where {together} are drawn together: give --concept more often, or "
            f"--together {len(concepts)}."
        )
    return list(combinations(concepts, together))


def templates(file: Path | None) -> tuple[str, ...]:
    """The prompts of a text file, one a line with {} where the concepts go; the default ones without a file.

    Raises:
        ConceptSplitError: not readable, empty, or a line without exactly one {}.
    """
    if file is None:
        return TEMPLATES
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else "it is no text in UTF-8"
        raise ConceptSplitError(f"The prompts in {file} cannot be read: {reason}.") from None
    if not lines:
        raise ConceptSplitError(f"{file} holds no prompt: write one a line, such as 'a photo of {{}} on the beach'.")
    for line in lines:
        if line.count("{}") != 1:
            raise ConceptSplitError(f"The prompt '{line[:120]}' needs exactly one {{}} where the concepts go.")
    return tuple(dict.fromkeys(lines))


def prompt(template: str, concepts: Sequence[Photographs], placeholders: bool) -> str:
    """A template with the concepts listed in it, as `<rex>` or as class words: 'a dog, a cat and an owl'."""
    listed = []
    for one in concepts:
        word = one.concept.class_word
        article = "an" if word[:1].lower() in tuple("aeiou") else "a"
        listed.append(f"{article} {f'<{one.name}>' if placeholders else word}")
    last = listed.pop()
    return template.replace("{}", f"{', '.join(listed)} and {last}" if listed else last)
