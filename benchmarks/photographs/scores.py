"""What CLIP and DINO say of a picture: text alignment, image alignment, and each subject on its own place.

TA and IA are those of the authors' released scorer (KU-VGI/ConceptSplit, dino.py). Every embedding has length 1:

TA   cos(CLIP of the prompt in class words, CLIP of the picture)
IA   mean over the concepts of cos(mean of the concept's photographs, scaled to length 1, the picture); the authors'
     by DINO, here by CLIP as well

A picture is scaled to its short side (bicubic), cropped around its centre and normalised: for CLIP to its own side, for
DINO to 256 and 224.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.train.identity import digest, weights_digest
from conceptsplit_core.train.reading import open_mask, open_picture

from .protocol import Photographs
from .run import Box, square_about

VERSION = 1
"""Raised when the same pictures get other scores than before."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Means and deviations that the two were trained with."""


class Reader:
    """A network that turns a picture into an embedding; weights from a folder in transformers' format.

    Args:
        kinds: model types that it may be.

    Raises:
        ConceptSplitError: no such folder, another kind of model, or weights that are missing.
    """

    def __init__(self, what: str, folder: Path, kinds: Sequence[str], device: torch.device):
        from transformers import AutoConfig, AutoModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if not (folder / "config.json").is_file():
            raise ConceptSplitError(
                f"There is no {what} model at '{folder}': give a folder in transformers' format, with config.json and "
                "the weights."
            )
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as problem:
            raise ConceptSplitError(f"The {what} model in '{folder}' cannot be loaded: {_first(problem)}") from None
        if config.model_type not in kinds:
            raise ConceptSplitError(
                f"'{folder}' holds a model of the type '{config.model_type}', where {what} is of the type "
                f"{' or '.join(kinds)}."
            )
        # ViT alone would make itself a pooler that DINO's weights have no values for.
        more = {"add_pooling_layer": False} if config.model_type == "vit" else {}
        try:
            model, info = AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True, **more)
        except (OSError, ValueError, KeyError, RuntimeError) as problem:
            raise ConceptSplitError(f"The {what} model in '{folder}' cannot be loaded: {_first(problem)}") from None
        if info["missing_keys"]:
            raise ConceptSplitError(
                f"The {what} model in '{folder}' lacks weights (first: {min(info['missing_keys'])}): download it again."
            )
        self.model: Any = model.float().eval().to(device)
        self.device = device
        self.digest = weights_digest(self.model.state_dict().items())

    def prepare(self, pictures: Sequence[Image.Image], short: int, side: int, norm: tuple) -> Tensor:
        """Pixels [N, 3, side, side] by transformers' own preprocessing."""
        from transformers import CLIPImageProcessor

        ready = CLIPImageProcessor(
            size={"shortest_edge": short}, crop_size={"height": side, "width": side},
            resample=Image.Resampling.BICUBIC, image_mean=norm[0], image_std=norm[1],
        )  # fmt: skip
        return ready(images=list(pictures), return_tensors="pt")["pixel_values"].to(self.device)


class Clip(Reader):
    """CLIP, which reads pictures and texts."""

    def __init__(self, folder: Path, device: torch.device):
        from transformers import AutoTokenizer

        super().__init__("CLIP", folder, ("clip",), device)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as problem:
            raise ConceptSplitError(f"The CLIP model in '{folder}' has no tokenizer: {_first(problem)}") from None
        vision = self.model.config.vision_config
        self.about = f"CLIP ViT of {vision.num_hidden_layers} layers, patch {vision.patch_size}, {vision.image_size}²"
        self.published = (vision.num_hidden_layers, vision.patch_size, vision.image_size) == (24, 14, 224)

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embeddings [N, d] of length 1, on the CPU."""
        side = self.model.config.vision_config.image_size
        pooled = self.model.vision_model(pixel_values=self.prepare(pictures, side, side, CLIP)).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1).cpu()

    @torch.no_grad()
    def text(self, text: str) -> Tensor:
        """The embedding [d] of length 1 of a text, cut at what CLIP reads."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer([text], truncation=True, max_length=length, return_tensors="pt").to(self.device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        pooled = self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)[0].cpu()


class Dino(Reader):
    """DINO (ViT) or DINOv2: the class token after the last norm."""

    def __init__(self, folder: Path, device: torch.device):
        super().__init__("DINO", folder, ("vit", "dinov2"), device)
        config = self.model.config
        self.about = f"{config.model_type} of {config.num_hidden_layers} layers, patch {config.patch_size}"
        shape = (config.model_type, config.num_hidden_layers, config.hidden_size, config.patch_size)
        self.published = shape == ("vit", 12, 768, 16)

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embeddings [N, d] of length 1, on the CPU."""
        side = min(224, self.model.config.image_size)
        pixels = self.prepare(pictures, round(side * 256 / 224), side, IMAGENET)
        return F.normalize(self.model(pixel_values=pixels).last_hidden_state[:, 0], dim=-1).cpu()


class Scorer:
    """CLIP and DINO with what they see in the concepts' photographs."""

    def __init__(self, clip: Clip, dino: Dino, concepts: Sequence[Photographs]):
        self.readers: dict[str, Clip | Dino] = {"clip": clip, "dino": dino}
        self.clip = clip
        self.digest = digest(VERSION, clip.digest, dino.digest, *(one.digest for one in concepts))[:12]
        self.whole: dict[tuple[str, str], Tensor] = {}
        self.subject: dict[tuple[str, str], Tensor] = {}
        for one in concepts:
            photos = [open_picture(file) for file in one.files]
            own = [_cut(p, _marked(mask)) for p, mask in zip(photos, one.masks, strict=True)] if one.masks else photos
            for by, reader in self.readers.items():
                self.whole[one.name, by] = _centre(reader.pictures(photos))
                self.subject[one.name, by] = _centre(reader.pictures(own))

    @property
    def published(self) -> dict[str, tuple[str, bool]]:
        """For each score its network in words, and whether it is of the shape that the authors' scorer uses."""
        return {
            name: (reader.about, reader.published)
            for name, reader in (("TA", self.readers["clip"]), ("IA (DINO)", self.readers["dino"]))
        }

    def score(
        self, picture: Image.Image, text: str, names: Sequence[str], boxes: dict[str, Box | None]
    ) -> dict[str, Any]:
        """Scores of one picture.

        Returns:
            ta, ia_clip, ia_dino; own_clip and own_dino, means over the subjects that have a place; right, the share of
            all subjects whose place is more like their own photographs than like any other concept's of the picture,
            by DINO; subjects, the same for each: `clip`, `dino`, `other_clip`, `other_dino`, None without a place.
        """
        seen = {by: reader.pictures([picture])[0] for by, reader in self.readers.items()}
        values: dict[str, Any] = {"ta": float(seen["clip"] @ self.clip.text(text))}
        for by, embedding in seen.items():
            values[f"ia_{by}"] = float(np.mean([float(embedding @ self.whole[name, by]) for name in names]))
        subjects: dict[str, dict[str, float] | None] = {}
        for name in names:
            box = boxes[name]
            subjects[name] = None if box is None else self._subject(picture.crop(tuple(box)), name, names)
        placed = [one for one in subjects.values() if one is not None]
        for by in self.readers if placed else ():
            values[f"own_{by}"] = float(np.mean([one[by] for one in placed]))
        if len(names) > 1:
            values["right"] = sum(one["dino"] > one["other_dino"] for one in placed) / len(names)
        return {**values, "subjects": subjects}

    def _subject(self, place: Image.Image, name: str, names: Sequence[str]) -> dict[str, float]:
        found: dict[str, float] = {}
        for by, reader in self.readers.items():
            embedding = reader.pictures([place])[0]
            like = {other: float(embedding @ self.subject[other, by]) for other in names}
            found[by] = like.pop(name)
            if like:
                found[f"other_{by}"] = max(like.values())
        return found


def _first(problem: Exception) -> str:
    """The first line of what a library says, which can be a page."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]


def _centre(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings.mean(dim=0), dim=-1)


def _marked(mask: Path) -> Tensor:
    return torch.from_numpy(np.asarray(open_mask(mask)) > 127)


def _cut(photo: Image.Image, place: Tensor) -> Image.Image:
    """The square about the masked place of a photograph; the whole of it where the mask is empty."""
    box = square_about(place, (photo.height, photo.width))
    return photo if box is None else photo.crop(box)
