"""Diffusion transformers: what a family says of itself, and the map that follows from it.

A new family is one file that registers one `Transformer`, and its text encoder's layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from ..site import AttentionSite, NetworkMap, Reads, Site, TokenSequence

Columns = tuple[int, int]


@dataclass(frozen=True)
class Transformer:
    """A family of transformers, by the names that the host gives their modules.

    name: how maps call it.
    bases: (name, label) of the kinds of model that it is made of: how files call them, and how users do.
    classes: names of the host's denoiser classes.
    reads: what modules read, by patterns of their names, the first that matches; the others read the time or size
        embedding, or cannot be changed by an adapter.
    attention: the modules that make the text's values, of which each block has one, and how files call these values:
        diffusers' names, {} for the block's number. It runs before the block's attention of text and picture, and after
        every other attention.
    values: from such a module's path, the (first, count) columns that are the values; None where all are.
    readable: shares (first, last) of the way through the network between which attention shows where concepts are.
    sequence: how a denoiser lays out its tokens.
    base: which of `bases` a denoiser is; None where the family has one, of its own name.
    """

    name: str
    bases: tuple[tuple[str, str], ...]
    classes: tuple[str, ...]
    reads: tuple[tuple[str, Reads], ...]
    attention: tuple[tuple[str, str], ...]
    values: Callable[[nn.Module, str], Columns | None]
    readable: tuple[float, float]
    sequence: Callable[[nn.Module], TokenSequence]
    base: Callable[[nn.Module], str] | None = None

    def reads_of(self, name: str) -> Reads:
        return next((what for pattern, what in self.reads if re.search(pattern, name)), "time")

    def values_name(self, path: str) -> str | None:
        """How files call the values that the module at `path` makes; None for any other module."""
        for module, name in self.attention:
            if (number := _numbered(module, path)) is not None:
                return name.format(number)
        return None


TRANSFORMERS: dict[str, Transformer] = {}


def register(family: Transformer) -> Transformer:
    """Makes a family known by its denoisers' classes."""
    TRANSFORMERS.update(dict.fromkeys(family.classes, family))
    return family


def named_values(name: str) -> bool:
    """Whether some family's files call the values of a block's text rows so."""
    names = {name for family in TRANSFORMERS.values() for _, name in family.attention}
    return any(_numbered(template, name) is not None for template in names)


def _numbered(template: str, name: str) -> str | None:
    """The number that stands for {} in a name; None where it has another form."""
    found = re.fullmatch(re.escape(template).replace(r"\{\}", r"(\d+)"), name)
    return None if found is None else found[1]


def transformer_map(
    family: Transformer, root: Callable[[], nn.Module], fused: Iterable[tuple[str, Columns]] = ()
) -> NetworkMap:
    """The map of a transformer; its modules keep the host's names.

    Args:
        fused: (module, columns) of the parts of fused projections that LoRA files may change.
    """
    denoiser = root()
    sites = {
        name: Site(name, name, family.reads_of(name))
        for name, module in denoiser.named_modules()
        if hasattr(module, "weight") and (hasattr(module, "in_features") or hasattr(module, "in_channels"))
    }
    sequence = family.sequence(denoiser)
    values = {path: name for path in sites if (name := family.values_name(path)) is not None}
    blocks = list(values)
    attention = tuple(AttentionSite(path, path, sequence.patch, False, name) for path, name in values.items())
    for path, columns in fused:
        if path in sites:
            sites[part_name(path, columns)] = Site(part_name(path, columns), path, sites[path].reads, columns)
    for path, name in values.items():
        sites[name] = Site(name, path, sites[path].reads, family.values(denoiser, path), values=True)
    base = family.name if family.base is None else family.base(denoiser)
    start, stop = (int(share * len(blocks)) for share in family.readable)
    return NetworkMap(base, sites, attention, root, sequence, tuple(blocks[start : max(stop, start + 1)]))


def part_name(path: str, columns: Columns) -> str:
    """The name of some columns of a module's output: `double_blocks.0.txt_attn.qkv[6144:9216]`."""
    return f"{path}[{columns[0]}:{sum(columns)}]"


def last_of_three(denoiser: nn.Module, path: str) -> Columns:
    """The values of a module that gives queries, keys and values of equal width."""
    width = int(denoiser.get_submodule(path).out_features) // 3  # type: ignore[arg-type]
    return 2 * width, width
