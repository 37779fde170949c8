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

    name: how files and maps call it.  label: how users do.
    classes: names of the host's denoiser classes.
    reads: what modules read, by patterns of their names, the first that matches; the others read the time or size
        embedding, or cannot be changed by an adapter.
    attention: pattern of the modules that make the text's values, of which each block has one. It runs before the
        block's attention of text and picture, and after every other attention.
    values: from such a module's path, the (first, count) columns that are the values; None where all are.
    readable: shares (first, last) of the way through the network between which attention shows where concepts are.
    sequence: how a denoiser lays out its tokens.
    """

    name: str
    label: str
    classes: tuple[str, ...]
    reads: tuple[tuple[str, Reads], ...]
    attention: str
    values: Callable[[nn.Module, str], Columns | None]
    readable: tuple[float, float]
    sequence: Callable[[nn.Module], TokenSequence]

    def reads_of(self, name: str) -> Reads:
        return next((what for pattern, what in self.reads if re.search(pattern, name)), "time")


TRANSFORMERS: dict[str, Transformer] = {}


def register(family: Transformer) -> Transformer:
    """Makes a family known by its denoisers' classes."""
    TRANSFORMERS.update(dict.fromkeys(family.classes, family))
    return family


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
    blocks = [name for name in sites if re.search(family.attention, name)]
    values = {name: family.values(denoiser, name) for name in blocks}
    attention = tuple(
        AttentionSite(name, name, sequence.patch, False, part_name(name, values[name])) for name in blocks
    )
    for path, columns in [*fused, *values.items()]:
        if path in sites and columns is not None:
            sites[part_name(path, columns)] = Site(part_name(path, columns), path, sites[path].reads, columns)
    start, stop = (int(share * len(blocks)) for share in family.readable)
    return NetworkMap(family.name, sites, attention, root, sequence, tuple(blocks[start : max(stop, start + 1)]))


def part_name(path: str, columns: Columns | None) -> str:
    """The name of some columns of a module's output: `double_blocks.0.txt_attn.qkv[6144:9216]`."""
    return path if columns is None else f"{path}[{columns[0]}:{sum(columns)}]"


def last_of_three(denoiser: nn.Module, path: str) -> Columns:
    """The values of a module that gives queries, keys and values of equal width."""
    width = int(denoiser.get_submodule(path).out_features) // 3  # type: ignore[arg-type]
    return 2 * width, width
