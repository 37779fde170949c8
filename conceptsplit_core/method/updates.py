"""How LODA turns a gradient into a step: a registry of update rules.

Free of torch at import, because option lists are made from `UPDATE_RULES`: a rule uses tensor methods only. A new rule
is one registered function. It gives the step per unit of η; the caller multiplies by η_k and leaves images alone whose
loss is zero.

Letters: ∇L [B, C, H, W] (or [B, C, 1, H, W]), the gradient of each image's loss in the model's input coordinates, which
have unit variance; L [B], the losses; t, the threshold that L = ReLU(t − HM(D)) starts from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

UpdateRule = Callable[["Tensor", "Tensor", float], "Tensor"]
UPDATE_RULES: dict[str, UpdateRule] = {}


def update_rule(name: str) -> Callable[[UpdateRule], UpdateRule]:
    """Registers the decorated function of (∇L, L, t).

    Raises:
        ValueError: the name is taken.
    """
    if name in UPDATE_RULES:
        raise ValueError(f"there is an update rule '{name}' already")

    def register(rule: UpdateRule) -> UpdateRule:
        UPDATE_RULES[name] = rule
        return rule

    return register


def _centred(gradient: Tensor) -> Tensor:
    """∇L without its mean over the picture, per channel.

    Attention separates by what differs between places. The mean only shifts the picture's overall colour: on the demo
    model it drove backgrounds to black and white, and without it maps came as far apart.
    """
    return gradient - gradient.mean(dim=(-2, -1), keepdim=True)


def _reach(gradient: Tensor, loss: Tensor, threshold: float) -> Tensor:
    """√min(L / t, 1) in the gradient's shape: full steps while far away, smaller ones on arrival."""
    return (loss / threshold).clamp(max=1.0).sqrt().view(-1, *[1] * (gradient.ndim - 1)).to(gradient)


@update_rule("normalised")
def normalised(gradient: Tensor, loss: Tensor, threshold: float) -> Tensor:
    """√min(L / t, 1) · ∇L / RMS(∇L), ∇L without its mean: one η serves every model and resolution. Our own rule."""
    gradient = _centred(gradient)
    reach = _reach(gradient, loss, threshold)
    rms = gradient.flatten(1).pow(2).mean(dim=1).sqrt().view_as(reach)
    return (gradient / rms).masked_fill(rms == 0, 0.0) * reach


@update_rule("gradient")
def raw(gradient: Tensor, loss: Tensor, threshold: float) -> Tensor:
    """∇L as it is: x ← x − η_k ∇L with η = 20 (ConceptSplit, LODA, and its published code)."""
    return gradient


@update_rule("sign")
def sign(gradient: Tensor, loss: Tensor, threshold: float) -> Tensor:
    """√min(L / t, 1) · sign(∇L), ∇L without its mean: every cell moves by η.

    Source: the fast gradient sign method (arXiv 1412.6572), which JEDI (arXiv 2505.19166) uses to separate maps.
    """
    gradient = _centred(gradient)
    return gradient.sign() * _reach(gradient, loss, threshold)
