"""UNets with cross-attention: SD1.5, SD2.x, SDXL and their kin."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ...errors import ConceptSplitError
from ..site import AttentionSite, NetworkMap, Reads, Site

_STAGES = ("down_blocks", "mid_block", "up_blocks")
_TIME = ("time_emb", "add_embedding", "time_proj", "class_embedding")


def unet_map(
    paths: Mapping[str, str], levels: int, family: str, root: Callable[[], nn.Module], model: str = "This model"
) -> NetworkMap:
    """The map of a UNet.

    Args:
        paths: canonical (diffusers) name to the host's path, of every module with weights.
        levels: how many resolutions the UNet has.
        model: how messages call it.

    Raises:
        ConceptSplitError: there is no cross-attention.
    """
    layers = sorted({name.rpartition(".to_v")[0] for name in paths if name.endswith(".attn2.to_v")}, key=_run_order)
    if not layers:
        raise ConceptSplitError(
            f"{model} has no UNet with cross-attention: ConceptSplit works on SD1.5, SD2.x and SDXL checkpoints."
        )
    sites = {name: Site(name, path, reads(name)) for name, path in paths.items()}
    attention = tuple(
        AttentionSite(
            name,
            paths[f"{name}.to_v"].removesuffix(".to_v"),
            2 ** _level(name, levels),
            name.startswith("down_blocks."),
        )
        for name in layers
    )
    return NetworkMap(family, sites, attention, root)


def reads(name: str) -> Reads:
    """What runs through a module of that canonical name."""
    if name.endswith((".attn2.to_k", ".attn2.to_v")):
        return "text"
    return "time" if any(part in name for part in _TIME) else "image"


def _level(name: str, levels: int) -> int:
    stage, _, rest = name.partition(".")
    if stage == "mid_block":
        return levels - 1
    index = int(rest.partition(".")[0])
    return index if stage == "down_blocks" else levels - 1 - index


def _run_order(name: str) -> tuple[int, list[int]]:
    return _STAGES.index(name.partition(".")[0]), [int(part) for part in name.split(".") if part.isdigit()]
