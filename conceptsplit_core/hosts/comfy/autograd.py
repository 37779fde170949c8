"""What a gradient through the host's UNet needs, and what other packs' patches need on the way."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ...errors import ConceptSplitError

_FUSED = ("rms_rope_split_half",)
_NO_BACKWARD = "no autograd formula"
_BROKEN_GRADIENT = ("inplace operation", "in-place operation", "does not require grad", "Inference tensors")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Says in one sentence what autograd says of patches that it cannot pass."""
    try:
        yield
    except RuntimeError as error:
        if _NO_BACKWARD in str(error):
            raise ConceptSplitError(
                "LODA needs a gradient through the model, and this ComfyUI computes a part of it with a kernel that "
                "has none: set loda_steps to -1 (regions are then found without it) or to 0."
            ) from error
        if not any(part in str(error) for part in _BROKEN_GRADIENT):
            raise
        raise ConceptSplitError(
            "LODA needs a gradient through the model, and another node's patch of this model breaks it: remove that "
            "node, or set loda_steps to 0."
        ) from error


@contextmanager
def plain_kernels() -> Iterator[None]:
    """While it is on, the host computes with kernels that have a backward pass, as in its own training: those of
    comfy-kitchen (rotary embedding, fused norms) have none. Hosts without them have no such switch; one of them is
    called whatever the switch says (Anima's), and is exchanged for comfy-kitchen's own form of it in plain PyTorch."""
    before = getattr(comfy.model_management, "in_training", None)
    if before is None:
        yield
        return
    kitchen = importlib.import_module("comfy.quant_ops").ck
    eager = importlib.import_module(f"{kitchen.__name__}.backends.eager.rope")
    fused = {name: getattr(kitchen, name) for name in _FUSED if hasattr(kitchen, name) and hasattr(eager, name)}
    comfy.model_management.in_training = True
    try:
        for name in fused:
            setattr(kitchen, name, getattr(eager, name))
        yield
    finally:
        comfy.model_management.in_training = before
        for name, function in fused.items():
            setattr(kitchen, name, function)


def copied_activations() -> Any:
    """While it is on, what autograd saves of a forward pass is a copy, which no later write can change.

    torch's own `allow_mutation_on_saved_tensors` tells tensors apart by address and id: a wrong gradient where
    memory is used again within the pass. Weights are no activations, and are not copied.
    """
    keep = lambda tensor: tensor if tensor.is_leaf and not tensor.requires_grad else tensor.detach().clone()
    return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)


class CopyInference(TorchFunctionMode):
    """While it is on, inference tensors that meet a tensor with a gradient are copied first, so that autograd may
    save them. In-place functions are left alone: a copy would lose what they write."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not (name.endswith("_") and not name.endswith("__")):
            tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            if any(one.requires_grad for one in tensors) and any(one.is_inference() for one in tensors):
                args, kwargs = tree_map_only(Tensor, _ordinary, (args, kwargs))
        return func(*args, **kwargs)


def _ordinary(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


class FrozenControl:
    """A ControlNet whose residuals are constants for the gradient: its weights are the host's inference tensors."""

    def __init__(self, control: Any):
        self._control = control

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)

    def get_control(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            out = self._control.get_control(x.detach(), *args, **kwargs)
        if out is None:
            return None
        return {
            key: [None if tensor is None else tensor.detach().clone().as_subclass(Residual) for tensor in tensors]
            for key, tensors in out.items()
        }


class Residual(Tensor):
    """What a ControlNet adds. The host adds it in place (`h += residual`) to tensors that autograd still needs;
    with this on the right-hand side the same line makes a new tensor."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [arg.as_subclass(Tensor) if isinstance(arg, Residual) else arg for arg in args]
        if func in (Tensor.__iadd__, Tensor.add_) and len(plain) == 2:
            return torch.add(*plain)
        return func(*plain, **(kwargs or {}))
