"""LODA, planning and AFG around the host's samplers.

The host's sampler function is wrapped, not replaced. Without routed adapters the latent is optimised before each of the
first K steps, the step itself is taken by the sampler where one step of it is exact on its own, by Euler where the
sampler keeps a history, and the sampler runs undisturbed from sigma K on. With routed adapters the first steps are
drawn in this way as a plan, and the sampler then runs undisturbed from the untouched noise.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
import torch.nn.functional as F
from comfy.k_diffusion import sampling as k_diffusion
from comfy.patcher_extension import WrapperExecutor
from torch import Tensor

from ...method.timeline import Timeline
from ...network.grid import aggregate, choose_layers, level_sizes
from ...settings import LodaConfig
from .autograd import CopyInference, FrozenControl, plain_errors
from .call import ROWS, Reading
from .model import KEY, adopt_parameters, compute_dtype
from .run import Regions, Run, patch_of

log = logging.getLogger("ConceptSplit")

_TOO_FEW = "LODA needs two concepts in the prompt and found %s"

# Samplers of which one step on its own equals that step within a run (tried on both supported hosts, see
# tests/host). The ancestral ones need one noise source over all segments, or every step draws the same noise.
PER_RUN = {"s_churn", "s_noise_end"}  # options that spread over a run's steps, so that single steps are not exact
ONE_STEP = {"sample_euler", "sample_heun", "sample_dpm_2", "sample_euler_cfg_pp"}
ONE_STEP_NOISE = {
    "sample_euler_ancestral",
    "sample_dpm_2_ancestral",
    "sample_dpmpp_2s_ancestral",
    "sample_lcm",
    "sample_ddpm",
    "sample_euler_ancestral_cfg_pp",
    "sample_dpmpp_2s_ancestral_cfg_pp",
}
# Given a single step these evaluate the model once, take no step and return the noise (both supported hosts).
NEVER_ALONE = {"sample_unipc", "sample_unipc_bh2"}


def sample(executor: Any, guider: Any, *args: Any, **kwargs: Any) -> Tensor:
    """SAMPLER_SAMPLE: the same call with a sampler that runs our stages, or the call itself where there is no need."""
    run: Run | None = guider.model_options.get("transformer_options", {}).get(KEY)
    loda = patch_of(guider.model_patcher).loda
    if run is None:
        if loda is not None and loda.acts:
            log.warning("[ConceptSplit] %s: sampling without LODA.", _TOO_FEW % "none")
        return executor(guider, *args, **kwargs)
    if loda is None and not run.concepts.routed:
        return executor(guider, *args, **kwargs)
    config = loda or LodaConfig(loda_steps=0)
    bound = bound_concepts(guider, run)
    stages = StagedSampler(executor.class_obj, guider, run, config, tuple(bound))
    reason = stages.unneeded()
    if reason is not None:
        if reason:
            log.warning("[ConceptSplit] %s: sampling without LODA.", reason)
        return executor(guider, *args, **kwargs)
    ours = copy.copy(executor.class_obj)
    ours.sampler_function = stages
    # The wrappers of other packs that come after this one stay in force.
    following = WrapperExecutor.new_class_executor(ours.sample, ours, executor.wrappers, executor.idx + 1)
    try:
        out = following.execute(guider, *args, **kwargs)
    finally:
        run.regions = None
    if stages.maps.unreadable:
        log.warning(
            "[ConceptSplit] LODA found none of the prompt's concepts in the model's attention and did nothing: another "
            "node changes the text, shows the model windows of the picture, or cuts off gradients."
        )
    return out


def bound_concepts(guider: Any, run: Run) -> list[int]:
    """Channels of the run's masks that some positive conditioning binds."""
    used = torch.zeros(len(run.concepts.names), dtype=torch.bool)
    for cond in guider.conds.get("positive", []):
        used |= attended_rows(cond, run).any(dim=(0, 1)).cpu()
    return used.nonzero().flatten().tolist()


class StagedSampler:
    """A sampler function that runs the stages of a `Timeline`.

    Args (of a call): as every k-diffusion sampler; x is x₀ + σ·ε, [B, C, H, W].
    """

    def __init__(self, sampler: Any, guider: Any, run: Run, config: LodaConfig, bound: tuple[int, ...]):
        self.sampler = sampler
        self.base: Any = getattr(sampler, "sampler_function", None)  # unknown samplers have none, and run as they are
        self.guider = guider
        self.run = run
        self.config = config
        self.bound = bound
        self.maps = MapReader(guider, run, config, bound)
        self.in_place = False  # whether another pack's patch has been found to write into what a gradient needs
        self.__name__ = getattr(self.base, "__name__", "sampler")

    def unneeded(self) -> str | None:
        """Why the sampler may run as it is: a sentence for the user, or "" where they will expect it; None if not."""
        config, names = self.config, self.run.concepts.names
        routed = self.run.concepts.routed
        if not routed and not config.acts:
            return ""
        if len(self.bound) < 2:
            if self.run.patch.loda is None or (routed and config.loda_steps == 0):
                return ""
            found = f"only <{names[self.bound[0]]}>" if self.bound else "none"
            return _TOO_FEW % found
        if not isinstance(self.sampler, comfy.samplers.KSAMPLER):
            return f"LODA does not know the sampler {type(self.sampler).__name__}"
        return None

    def __call__(
        self,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable | None = None,
        disable: bool | None = None,
        **options: Any,
    ) -> Tensor:
        extra_args = extra_args or {}
        run, total = self.run, len(sigmas) - 1
        self.maps.prepare(model, x, extra_args)
        given = {self.bound.index(i): mask for i, mask in self._masks().items() if i in self.bound}
        names = tuple(run.concepts.names[i] for i in self.bound)
        timeline = Timeline(self.config, total, names, self.maps, run.concepts.routed, given)
        if run.patch.maps is not None:
            run.patch.maps.traces.append(timeline.trace)
        if timeline.optimised_steps:
            adopt_parameters(self.guider.inner_model)
        if timeline.routed or timeline.located:
            if not timeline.located:
                self._plan(timeline, model, x, sigmas, extra_args, callback, options)
            self._regions(timeline, sigmas, 0)
            return self.base(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options)
        count = timeline.optimised_steps
        one_step, options = self._one_step(x, extra_args, options)
        for k in range(count):
            x = self._step(timeline, k, one_step, model, x, sigmas, extra_args, _shifted(callback, k))
        if timeline.afg_acts(count) and not self.maps.unreadable:
            comfy.model_management.throw_exception_if_processing_interrupted()
            timeline.locate(x, count, sigmas[count])
            self._regions(timeline, sigmas, count)
        if count == total:
            return x
        rest, callback = sigmas[count:].clone(), _shifted(callback, count)
        if total - count == 1 and self.__name__ in NEVER_ALONE:
            return one_step(model, x, rest, extra_args=extra_args, callback=callback, disable=disable)
        return self.base(model, x, rest, extra_args=extra_args, callback=callback, disable=disable, **options)

    def _masks(self) -> dict[int, Tensor]:
        """Regions that the user has drawn, by channel."""
        run = self.run
        found = {}
        for channel, (name, one) in enumerate(zip(run.concepts.names, run.concepts.loaded, strict=True)):
            mask = one.mask if one is not None and one.mask is not None else run.patch.masks.get(name)
            if mask is not None:
                found[channel] = mask
        return found

    def _plan(
        self,
        timeline: Timeline,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable | None,
        options: dict[str, Any],
    ) -> None:
        """Draws the first steps on the base model and reads where the concepts are; x itself stays as it is."""
        # Progress stands at the first step while the plan is drawn, and the preview shows it.
        still = None if callback is None else (lambda info: callback({**info, "i": 0}))
        one_step, _ = self._one_step(x, extra_args, options)
        self.run.planning = True
        try:
            for k in range(timeline.plan_steps):
                x = self._step(timeline, k, one_step, model, x, sigmas, extra_args, still)
            comfy.model_management.throw_exception_if_processing_interrupted()
            timeline.locate(x, timeline.plan_steps, sigmas[timeline.plan_steps])
        finally:
            self.run.planning = False

    def _step(
        self,
        timeline: Timeline,
        k: int,
        one_step: Callable,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable | None,
    ) -> Tensor:
        # Clones: some samplers write into the sigmas they are given, CFG++ ones put functions into the arguments.
        segment = sigmas[k : k + 2].clone()
        if not self.maps.unreadable:
            x = self._begin(timeline, k, x, segment[0], extra_args.get("denoise_mask"))
        return one_step(model, x, segment, extra_args=dict(extra_args), callback=callback, disable=True)

    def _begin(self, timeline: Timeline, k: int, x: Tensor, sigma: Tensor, mask: Tensor | None) -> Tensor:
        """The updates at the start of step k. Where another pack writes into features in place (FreeU_V2) that the
        gradient still needs, they are done again in a way that copies these before, which takes longer."""
        half = compute_dtype(self.guider.inner_model) == torch.float16
        work = partial(
            timeline.begin,
            k,
            x,
            sigma,
            denoise_mask=mask,
            check=comfy.model_management.throw_exception_if_processing_interrupted,
            loss_scale=1024.0 if half else 1.0,
        )
        with plain_errors():
            if not self.in_place:
                before = copy.copy(timeline.trace)
                before.losses, before.divergences = [*before.losses], [*before.divergences]
                try:
                    return work()
                except RuntimeError as error:
                    if "inplace operation" not in str(error):
                        raise
                    self.in_place = True
                    vars(timeline.trace).update(vars(before))
            with torch.autograd.graph.allow_mutation_on_saved_tensors():
                return work()

    def _regions(self, timeline: Timeline, sigmas: Tensor, first: int) -> None:
        """Puts what the timeline has found into force, AFG from step `first` on."""
        run, held = self.run, timeline.config.held(timeline.total)
        # A little above the level of the step that is free again: samplers may pass it on with a rounding error.
        until = 0.0 if held >= timeline.total else 1.0001 * float(sigmas[held])
        run.regions = Regions(
            timeline.config,
            self._all_channels(timeline.afg) if timeline.afg_acts(first) else None,
            until,
            self._all_channels(timeline.areas),
        )

    def _all_channels(self, found: Tensor | None) -> Tensor | None:
        """[B, bound, h, w] with the run's other channels, which are unbound, as zeros."""
        if found is None:
            return None
        whole = found.new_zeros(found.shape[0], len(self.run.concepts.names), *found.shape[-2:])
        whole[:, list(self.bound)] = found
        return whole

    def _one_step(
        self, x: Tensor, extra_args: dict[str, Any], options: dict[str, Any]
    ) -> tuple[Callable, dict[str, Any]]:
        """The function that takes the first K steps, and the base sampler's options."""
        name = self.__name__
        # CFG++ puts guidance into another place of the step; plain Euler at its low scale would hardly guide.
        euler = k_diffusion.sample_euler_cfg_pp if name.endswith("_cfg_pp") else k_diffusion.sample_euler
        if any(options.get(key) for key in PER_RUN):
            return euler, options
        if name in ONE_STEP:
            return lambda *a, **k: self.base(*a, **k, **options), options
        if name in ONE_STEP_NOISE and "noise_sampler" in inspect.signature(self.base).parameters:
            shared = k_diffusion.default_noise_sampler(x, seed=extra_args.get("seed"))
            options = {"noise_sampler": shared, **options}
            return lambda *a, **k: self.base(*a, **k, **options), options
        if "ancestral" in name and "noise_sampler" in inspect.signature(self.base).parameters:
            # Multistep with noise at every step: without it in the first ones pictures would come out flatter.
            noisy = k_diffusion.sample_euler_ancestral
            if name.endswith("_cfg_pp"):
                noisy = k_diffusion.sample_euler_ancestral_cfg_pp
            shared = k_diffusion.default_noise_sampler(x, seed=extra_args.get("seed"))
            options = {"noise_sampler": shared, **options}
            return partial(noisy, noise_sampler=options["noise_sampler"]), options
        return euler, options


class MapReader:
    """Reads the maps of the bound concepts from one forward pass of the conditional branch.

    unreadable: whether layers have run and none of them has shown where a concept is: no pass will.
    """

    def __init__(self, guider: Any, run: Run, config: LodaConfig, bound: tuple[int, ...]):
        self.guider = guider
        self.run = run
        self.bound = bound
        factors = {site.name: site.downscale for site in run.network.attention}
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
            if "gligen" in own_cond:
                adopt_parameters(own_cond["gligen"][1].model)
            kept.append(own_cond)
        return kept

    def __call__(self, x: Tensor, step: int, sigma: Tensor) -> Tensor:
        """Maps [B, n, h, w] of a latent x₀ + σ·ε, left after the last layer where nothing else stands between."""
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
        try:
            for cond in self.conds:
                area = _area(cond, latent)
                seen = latent if area is None else area[2:]
                run.reading = Reading(self.layers, (x.shape[0], *seen))
                # One conditioning at a time: then the batch is x's, and its area is known.
                self._call(inner, cond, x, level, options)
                found = run.reading.found
                asked, read = asked or run.reading.asked, read or bool(found)
                if not found:
                    continue  # outside its timestep range, or another pack has changed its text
                part = size if area is None else level_sizes(seen)[self.factor]
                maps = aggregate([found[name] for name in sorted(found)], part, seen)[:, list(self.bound)]
                has = attended_rows(cond, run).any(dim=1)[:, list(self.bound)].to(maps)[..., None, None]
                total = total + _placed(maps, area, latent, size)
                weight = weight + has
            self._no_gradient = self._no_gradient or (run.gradient and asked and not read)
            self._asked, self._read = self._asked or asked, self._read or read
        finally:
            run.reading, run.gradient = None, False
        return total / weight.clamp(min=1.0)

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
    height, width, y, x = cond["area"]
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


def _shifted(callback: Callable | None, offset: int) -> Callable | None:
    """The host's step callback for a segment that starts at step `offset` of the run."""
    if callback is None or offset == 0:
        return callback
    return lambda info: callback({**info, "i": info["i"] + offset})
