"""Socket types and the few helpers that all node files share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io

from ..conceptsplit_core.errors import ConceptSplitError
from ..conceptsplit_core.options import defaults, options

CATEGORY = "ConceptSplit"

ValueAdapterType = io.Custom("VALUE_ADAPTER")
AttentionMapsType = io.Custom("ATTENTION_MAPS")
LodaOptionsType = io.Custom("LODA_OPTIONS")
TrainOptionsType = io.Custom("TOVA_OPTIONS")


def _supported(call: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Without what this host's version does not know yet, such as `advanced` or `search_aliases`."""
    known = inspect.signature(call).parameters
    return {key: value for key, value in given.items() if key in known}


def field(kind: Any, name: str, tooltip: str, **options: Any) -> Any:
    """An input of type `kind`; every input has a tooltip."""
    given = {"tooltip": tooltip, **options}
    return kind.Input(name, **_supported(kind.Input.__init__, given))


def setting_fields(config: Any, advanced: bool | None = None, folded: bool = False, **others: Any) -> list[Any]:
    """Inputs for the options of a settings class: all of them, or the basic or the advanced ones.

    Args:
        folded: the host hides advanced inputs until the node is unfolded.
        others: defaults of a node that is there for what is off elsewhere.
    """
    return [setting_field(name, config, folded, **others) for name in options(config, advanced)]


def setting_field(name: str, config: Any, folded: bool = False, **others: Any) -> Any:
    """The input of one option of a settings class.

    Advanced ones are optional, so that a graph saved before one was added still runs.
    """
    option, default = options(config)[name], {**defaults(config), **others}[name]
    tooltip = f"{option.label[:1].upper()}{option.label[1:]}. {option.text}"
    given: dict[str, Any] = {"optional": True, "advanced": folded} if option.advanced else {}
    if option.allowed:
        # Lists of the host hold text; `from_values` gives it back its type.
        return field(io.Combo, name, tooltip, options=[str(c) for c in option.allowed], default=str(default), **given)
    given["default"] = default
    if isinstance(default, bool):
        return field(io.Boolean, name, tooltip, **given)
    given |= {"min": option.low, "max": option.high, "step": option.step}
    if isinstance(default, int):
        return field(io.Int, name, tooltip, control_after_generate=option.drawn, **given)
    # The page rounds to the step where nothing else is said.
    return field(io.Float, name, tooltip, round=option.step / 1000, **given)


def out(kind: Any, name: str, tooltip: str) -> Any:
    """An output, shown under its name."""
    return kind.Output(display_name=name, tooltip=tooltip)


def schema(node_id: str, display_name: str, group: str = "", **options: Any) -> io.Schema:
    """A node's description; `group` is the submenu under our category."""
    category = f"{CATEGORY}/{group}" if group else CATEGORY
    return io.Schema(
        node_id=node_id, display_name=display_name, category=category, **_supported(io.Schema.__init__, options)
    )


def loader_inputs() -> list[Any]:
    """MODEL and CLIP as every loader of a concept takes them."""
    return [
        field(
            io.Model,
            "model",
            "The model to teach the concept to. Loaders chain: connect one loader's outputs to the next loader's "
            "inputs.",
        ),
        field(
            io.Clip,
            "clip",
            "The text encoder. Encode all prompts with the CLIP that leaves the last loader, or the concept is not "
            "found.",
        ),
    ]


def loader_outputs() -> list[Any]:
    """MODEL and CLIP as every loader of a concept gives them."""
    return [
        out(io.Model, "MODEL", "The model with this concept added."),
        out(io.Clip, "CLIP", "The text encoder that knows this concept; encode prompts with it."),
    ]


def told(lines: Sequence[str]) -> dict[str, list[str]]:
    """`ui` of a node's result: lines of text that stand on the node after it has run (web/js/said.js)."""
    return {"said": list(lines)}


def mask_of(mask: Any) -> torch.Tensor | None:
    """A MASK [1 or B, H, W] in 0…1 that outlives the host's inference mode; None stays None, as does an empty one."""
    if mask is None:
        return None
    with torch.inference_mode(False):
        values = mask.detach().float().clone()
    values = values[None] if values.ndim == 2 else values.reshape(-1, *values.shape[-2:])
    return values.clamp(0, 1) if bool((values > 0).any()) else None


def to_image(picture: np.ndarray) -> torch.Tensor:
    """uint8 [h, w, 3] as the host's IMAGE [1, h, w, 3] in 0…1."""
    return torch.from_numpy(picture.astype(np.float32) / 255.0).unsqueeze(0)


def lists_of(*names: str) -> Callable[[Callable], Callable]:
    """For a node that takes lists: `execute` gets lists for these inputs, and the one value of each other input.

    Raises:
        ConceptSplitError: several values for an input that takes one.
    """

    def single(name: str, value: Any) -> Any:
        if name in names or not isinstance(value, list):
            return value
        if len(value) != 1:
            raise ConceptSplitError(f"{name} has {len(value)} values: training takes one of everything but pictures.")
        return value[0]

    def wrap(execute: Callable) -> Callable:
        @functools.wraps(execute)
        def unwrapped(cls: Any, **given: Any) -> Any:
            return execute(cls, **{name: single(name, value) for name, value in given.items()})

        return unwrapped

    return wrap
