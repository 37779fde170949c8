"""Socket types and the few helpers that all node files share."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io

CATEGORY = "ConceptSplit"

ValueAdapterType = io.Custom("VALUE_ADAPTER")
AttentionMapsType = io.Custom("ATTENTION_MAPS")


def _supported(call: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Without what this host's version does not know yet, such as `advanced` or `search_aliases`."""
    known = inspect.signature(call).parameters
    return {key: value for key, value in given.items() if key in known}


def field(kind: Any, name: str, tooltip: str, **options: Any) -> Any:
    """An input of type `kind`; every input has a tooltip."""
    given = {"tooltip": tooltip, **options}
    return kind.Input(name, **_supported(kind.Input.__init__, given))


def out(kind: Any, name: str, tooltip: str) -> Any:
    """An output, shown under its name."""
    return kind.Output(display_name=name, tooltip=tooltip)


def schema(node_id: str, display_name: str, group: str = "", **options: Any) -> io.Schema:
    """A node's description; `group` is the submenu under our category."""
    category = f"{CATEGORY}/{group}" if group else CATEGORY
    return io.Schema(
        node_id=node_id, display_name=display_name, category=category, **_supported(io.Schema.__init__, options)
    )


def to_image(picture: np.ndarray) -> torch.Tensor:
    """uint8 [h, w, 3] as the host's IMAGE [1, h, w, 3] in 0…1."""
    return torch.from_numpy(picture.astype(np.float32) / 255.0).unsqueeze(0)
