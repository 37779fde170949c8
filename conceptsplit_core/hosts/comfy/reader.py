"""The attention maps of a run's concepts, from one forward pass of the conditional branch."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import torch
import torch.nn.functional as F
from torch import Tensor

from ...network.grid import aggregate, choose_layers, level_sizes
from ...settings import LodaConfig
from .autograd import CopyInference, FrozenControl
from .call import ROWS, Reading
from .run import Run


class MapReader:
    """Reads the maps of the bound concepts from one forward pass of the conditional branch.

    unreadable: whether layers have run and none of them has shown where a concept is: no pass will.
    """

    def __init__(self, guider: Any, run: Run, config: LodaConfig, bound: tuple[int, ...]):
        self.guider = guider
        self.run = run
        self.bound = bound
        factors = {site.name: site.downscale for site in run.network.attention}
        if run.network.readable:
            self.factor, layers = factors[run.network.readable[0]], list(run.network.readable)
        else:
            self.factor, layers = choose_layers(factors, config.map_downscale, config.map_part)
        self.layers = frozenset(layers)
        self.conds: list[dict[str, Any]] = []
        self.model: Any = None
        self.extra_args: dict[str, Any] = {}
        self.copying = False  # whether another pack's patch has been found to compute with inference tensors
        self._no_gradient = False  # whether a gradient pass has found no map with a gradient
        self._asked = self._read = False  # whether layers ran that should have given maps, and whether any did

    @property
    def unreadable(self) -> bool:
        return (self._asked and not self._read) or self._no_gradient

    def prepare(self, model: Any, x: Tensor, extra_args: dict[str, Any]) -> None:
        """Notes what a call of the sampler works with."""
        self.model, self.extra_args = model, extra_args
        self.conds = self._conditionings(x)

    def _conditionings(self, x: Tensor) -> list[dict[str, Any]]:
        """The positive conditionings that bind a concept, as copies that autograd may read."""
        layout = self.run.layout
        layout.latent = (x.shape[-2], x.shape[-1])
        kept = []
        for conds in self.guider.conds.values():
            layout.areas.update({cond.get("uuid"): _area(cond, layout.latent) for cond in conds})
        for cond in self.guider.conds.get("positive", []):
            if not bool(attended_rows(cond, self.run).any()):
                continue
            with torch.inference_mode(False):
                own = {
                    key: value._copy_with(value.cond.clone()) if _holds_tensor(value) else value
                    for key, value in cond["model_conds"].items()
                }
            own_cond = {**cond, "model_conds": own}
            if own_cond.get("control") is not None:
                own_cond["control"] = FrozenControl(own_cond["control"])
            kept.append(own_cond)
        return kept

    def __call__(self, x: Tensor, step: int, sigma: Tensor) -> Tensor:
        """Maps [B, n, h, w] of a latent x₀ + σ·ε, left after the last layer where nothing else stands between.

        Without a gradient a concept whose every conditioning begins later or is over is looked for all the same: its
        place is needed for the whole picture.

        Raises:
            TooLarge: a gradient pass that would not fit into memory.
        """
        run, inner = self.run, self.guider.inner_model
        with torch.inference_mode(False):
            level = sigma.detach().clone().reshape(1).expand(x.shape[0]).clone()
        x = _composed(self.model, x, level, self.extra_args)
        options = dict(self.extra_args.get("model_options", self.guider.model_options))
        options.pop("multigpu_clones", None)
        latent = run.layout.latent
        size = level_sizes(latent)[self.factor]
        # No conditioning may act at this noise level: then maps of zeros, whose loss has no gradient to follow.
        total = x.new_zeros(x.shape[0], len(self.bound), *size) + 0.0 * x.sum()
        weight = x.new_zeros(1, len(self.bound), 1, 1)
        run.gradient = torch.is_grad_enabled()
        asked = read = False

        def add(cond: dict[str, Any], wanted: Tensor) -> None:
            nonlocal total, weight, asked, read
            area = _area(cond, latent)
            seen = latent if area is None else area[2:]
            run.reading = Reading(self.layers, (x.shape[0], *seen))
            # One conditioning at a time: then the batch is x's, and its area is known.
            self._call(inner, cond, x, level, options)
            if run.reading.too_large is not None:
                raise run.reading.too_large
            found = run.reading.found
            asked, read = asked or run.reading.asked, read or bool(found)
            if not found:
                return  # outside its timestep range, or another pack has changed its text
            part = size if area is None else level_sizes(seen)[self.factor]
            maps = aggregate([found[name] for name in sorted(found)], part, seen)[:, list(self.bound)]
            total = total + _placed(maps, area, latent, size) * wanted
            weight = weight + wanted

        try:
            for cond in self.conds:
                add(cond, self._binds(cond).to(x))
            if not run.gradient:
                for cond in self.conds:
                    missing = self._binds(cond).to(x) * (weight == 0)
                    if cond.keys() & {"timestep_start", "timestep_end"} and bool(missing.any()):
                        add({**cond, "timestep_start": float("inf"), "timestep_end": 0.0}, missing)
            self._no_gradient = self._no_gradient or (run.gradient and asked and not read)
            self._asked, self._read = self._asked or asked, self._read or read
        finally:
            run.reading, run.gradient = None, False
        return total / weight.clamp(min=1.0)

    def _binds(self, cond: dict[str, Any]) -> Tensor:
        """Which of the bound concepts a conditioning holds, bool [1, n, 1, 1]."""
        return attended_rows(cond, self.run).any(dim=1)[:, list(self.bound), None, None]

    def _call(self, inner: Any, cond: dict[str, Any], x: Tensor, level: Tensor, options: dict[str, Any]) -> None:
        """One call of the model for its maps. Where another pack computes with tensors that it has made under the
        host's inference mode, which autograd refuses, the call is made again with copies of them."""
        if not self.copying:
            try:
                comfy.samplers.calc_cond_batch(inner, [[cond]], x, level, options)
                return
            except RuntimeError as error:
                if "Inference tensors cannot be saved" not in str(error):
                    raise
                self.copying = True
        with CopyInference():
            comfy.samplers.calc_cond_batch(inner, [[cond]], x, level, options)


def attended_rows(cond: dict[str, Any], run: Run) -> Tensor:
    """Which rows of a conditioning's text LODA reads, bool [1, L, n]; L is 1 where it has no text."""
    rows = cond["model_conds"].get(ROWS)
    if rows is None:
        return torch.zeros(1, 1, len(run.concepts.names), dtype=torch.bool)
    return rows.cond[..., len(run.concepts.names) :] != 0


def _holds_tensor(value: Any) -> bool:
    return hasattr(value, "_copy_with") and torch.is_tensor(getattr(value, "cond", None))


def _area(cond: dict[str, Any], latent: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """(y, x, height, width) of a conditioning's area in the latent, clipped as the host does; None for the whole."""
    if "area" not in cond:
        return None
    sides = len(cond["area"]) // 2  # sizes, then places; of a video's latent the frames come first
    (height, width), (y, x) = cond["area"][sides - 2 : sides], cond["area"][-2:]
    return y, x, min(latent[0] - y, height), min(latent[1] - x, width)


def _placed(
    maps: Tensor, area: tuple[int, int, int, int] | None, latent: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Maps of an area at their place in maps of the whole latent, zero elsewhere."""
    if area is None:
        return maps
    y, x, height, width = area
    top, left = min(size[0] - 1, y * size[0] // latent[0]), min(size[1] - 1, x * size[1] // latent[1])
    h = max(1, min(size[0] - top, round(height * size[0] / latent[0])))
    w = max(1, min(size[1] - left, round(width * size[1] / latent[1])))
    fitted = F.interpolate(maps, size=(h, w), mode="area")
    return F.pad(fitted, (left, size[1] - left - w, top, size[0] - top - h))


def _composed(model: Any, x: Tensor, sigma: Tensor, extra_args: dict[str, Any]) -> Tensor:
    """x as the host's inpainting shows it to the UNet: the kept part is the noised original."""
    mask = extra_args.get("denoise_mask")
    if mask is None:
        return x
    changer = extra_args.get("model_options", {}).get("denoise_mask_function")
    with torch.no_grad():
        if changer is not None:
            mask = changer(sigma, mask, extra_options={"model": model.inner_model, "sigmas": model.sigmas})
        kept = model.inner_model.inner_model.scale_latent_inpaint(
            x=x.detach(), sigma=sigma, noise=model.noise, latent_image=model.latent_image, denoise_mask=mask
        )
    with torch.inference_mode(False):
        mask, kept = mask.clone(), kept.clone()
    return x * mask + kept * (1.0 - mask)
