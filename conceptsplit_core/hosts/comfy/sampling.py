"""LODA around the host's samplers.

The host's sampler function is wrapped, not replaced: before each of the first K steps the latent is optimised, the
step itself is taken by the sampler where one step of it is exact on its own, by Euler where the sampler keeps a
history, and the sampler runs undisturbed from sigma K on.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
import torch.nn.functional as F
from comfy.k_diffusion import sampling as k_diffusion
from comfy.patcher_extension import WrapperExecutor
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ...errors import ConceptSplitError
from ...method.loda import LodaTrace, separate
from ...method.regions import regions
from ...network.grid import aggregate, choose_layers, level_sizes
from ...settings import LodaConfig
from .model import KEY, adopt_parameters, compute_dtype, downscales
from .patch import ROWS, Capture, FixedRegions, Run

log = logging.getLogger("ConceptSplit")

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


def sampler_wrapper(executor: Any, guider: Any, *args: Any, **kwargs: Any) -> Tensor:
    """SAMPLER_SAMPLE: the same call with a sampler that runs LODA first, or the call itself where there is no need."""
    sampler = executor.class_obj
    run: Run | None = guider.model_options.get("transformer_options", {}).get(KEY)
    config = _config_of(guider)
    if config is None or config.loda_steps == 0 or (config.loda_strength == 0 and not config.afg):
        return executor(guider, *args, **kwargs)
    bound = [] if run is None else bound_concepts(guider, run)
    if run is None or len(bound) < 2:
        log.warning(
            "[ConceptSplit] LODA needs two concepts in the prompt and found %s: sampling without it.",
            f"only <{run.names[bound[0]]}>" if run is not None and bound else "none",
        )
        return executor(guider, *args, **kwargs)
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        log.warning("[ConceptSplit] LODA does not know the sampler %s: sampling without it.", type(sampler).__name__)
        return executor(guider, *args, **kwargs)

    ours = copy.copy(sampler)
    loda = ours.sampler_function = LodaSampler(sampler.sampler_function, guider, run, config, tuple(bound))
    # The wrappers of other packs that come after this one stay in force.
    following = WrapperExecutor.new_class_executor(ours.sample, ours, executor.wrappers, executor.idx + 1)
    try:
        out = following.execute(guider, *args, **kwargs)
    finally:
        run.fixed = None
    if loda.blind:
        log.warning(
            "[ConceptSplit] LODA found none of the prompt's concepts in the model's attention and did nothing: another "
            "node changes the text, shows the model windows of the picture, or cuts off gradients."
        )
    return out


def _config_of(guider: Any) -> LodaConfig | None:
    patch = guider.model_patcher.get_attachment(KEY)
    return None if patch is None else patch.loda


def bound_concepts(guider: Any, run: Run) -> list[int]:
    """Channels of the run's masks that some positive conditioning binds."""
    used = torch.zeros(len(run.names), dtype=torch.bool)
    for cond in guider.conds.get("positive", []):
        used |= _attended(cond, run).any(dim=(0, 1)).cpu()
    return used.nonzero().flatten().tolist()


class LodaSampler:
    """A sampler function that optimises the latent in its first steps.

    Args (of a call): as every k-diffusion sampler; x is x₀ + σ·ε, [B, C, H, W].
    """

    def __init__(self, base: Callable, guider: Any, run: Run, config: LodaConfig, bound: tuple[int, ...]):
        self.base = base
        self.guider = guider
        self.run = run
        self.config = config
        self.bound = bound
        self.__name__ = getattr(base, "__name__", "sampler")
        factors = downscales(guider.inner_model)
        self.factor, layers = choose_layers(factors, config.map_downscale, config.map_part)
        self.layers = frozenset(layers)
        self.adopting = self.copying = False  # what other packs' patches have been found to need
        self.dark = False  # whether a gradient pass has found no map with a gradient
        self.asked = self.read = False  # whether layers ran that should have given maps, and whether any did
        self.trace = LodaTrace(concepts=tuple(run.names[i] for i in bound), settings=asdict(config))

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
        total = len(sigmas) - 1
        self.config = self.config.for_schedule(total)
        self.trace.settings = asdict(self.config)
        count = self.config.loda_steps
        if self.run.patch.maps is not None:
            self.run.patch.maps.trace = self.trace
        adopt_parameters(self.guider.inner_model)
        conds = self._optimised_conds(x)
        one_step, options = self._one_step(x, extra_args, options)
        mask = extra_args.get("denoise_mask")
        for k in range(count):
            # Clones: some samplers write into the sigmas they are given.
            segment = sigmas[k : k + 2].clone()
            if not self.blind:
                maps = partial(self._maps, model, conds, extra_args, segment[0])
                x = self._separate(x, segment[0], k, maps, mask)
            # A copy: CFG++ samplers put their own functions into what they are given.
            own = dict(extra_args)
            x = one_step(model, x, segment, extra_args=own, callback=_shifted(callback, k), disable=True)
        held = self.config.held(total)
        if self.config.afg and count < held and not self.blind:
            # A little above the level of the step that is free again: samplers may pass it on with a rounding error.
            until = 0.0 if held >= total else 1.0001 * float(sigmas[held])
            self._fix_regions(model, x, sigmas[count], conds, extra_args, until)
        if count == total:
            return x
        rest, told = sigmas[count:].clone(), _shifted(callback, count)
        if total - count == 1 and getattr(self.base, "__name__", "") in NEVER_ALONE:
            return one_step(model, x, rest, extra_args=extra_args, callback=told, disable=disable)
        return self.base(model, x, rest, extra_args=extra_args, callback=told, disable=disable, **options)

    def _separate(self, x: Tensor, sigma: Tensor, k: int, maps: Callable[[Tensor], Tensor], mask: Any) -> Tensor:
        """The updates at the start of step k. Where another pack writes into features in place (FreeU_V2) that the
        gradient still needs, they are done again in a way that copies these before, which takes longer."""
        work = partial(
            separate,
            x,
            sigma,
            k,
            maps,
            self.config,
            self.trace,
            mask,
            comfy.model_management.throw_exception_if_processing_interrupted,
            loss_scale=1024.0 if compute_dtype(self.guider.inner_model) == torch.float16 else 1.0,
        )
        with _told_plainly():
            if not self.copying:
                done = len(self.trace.losses), len(self.trace.divergences)
                try:
                    return work()
                except RuntimeError as error:
                    if "inplace operation" not in str(error):
                        raise
                    self.copying = True
                    del self.trace.losses[done[0] :], self.trace.divergences[done[1] :]
            with torch.autograd.graph.allow_mutation_on_saved_tensors():
                return work()

    @property
    def blind(self) -> bool:
        """Whether layers have run and none of them has shown where a concept is: no pass will."""
        return (self.asked and not self.read) or self.dark

    def _one_step(
        self, x: Tensor, extra_args: dict[str, Any], options: dict[str, Any]
    ) -> tuple[Callable, dict[str, Any]]:
        """The function that takes the first K steps, and the base sampler's options."""
        name = getattr(self.base, "__name__", "")
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

    def _optimised_conds(self, x: Tensor) -> list[dict[str, Any]]:
        """The positive conditionings that bind a concept, as copies that autograd may read."""
        self.run.latent = (x.shape[-2], x.shape[-1])
        kept = []
        for conds in self.guider.conds.values():
            self.run.areas.update({cond.get("uuid"): _area(cond, self.run.latent) for cond in conds})
        for cond in self.guider.conds.get("positive", []):
            if not bool(_attended(cond, self.run).any()):
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

    def _maps(
        self, model: Any, conds: list[dict[str, Any]], extra_args: dict[str, Any], sigma: Tensor, x: Tensor
    ) -> Tensor:
        """Maps [B, n, h, w] of the bound concepts: one forward of the conditional branch, left after the last layer."""
        run, inner = self.run, self.guider.inner_model
        with torch.inference_mode(False):
            level = sigma.detach().clone().reshape(1).expand(x.shape[0]).clone()
        x = _composed(model, x, level, extra_args)
        options = dict(extra_args.get("model_options", self.guider.model_options))
        options.pop("multigpu_clones", None)
        size = level_sizes(run.latent)[self.factor]
        # No conditioning may act at this noise level: then maps of zeros, whose loss has no gradient to follow.
        total = x.new_zeros(x.shape[0], len(self.bound), *size) + 0.0 * x.sum()
        weight = x.new_zeros(1, len(self.bound), 1, 1)
        run.gradient = torch.is_grad_enabled()
        asked = read = False
        try:
            for cond in conds:
                area = _area(cond, run.latent)
                seen = run.latent if area is None else area[2:]
                run.capture = Capture(self.layers, (x.shape[0], *seen))
                # One conditioning at a time: then the batch is x's, and its area is known.
                self._call(inner, cond, x, level, options)
                found = run.capture.found
                asked, read = asked or run.capture.asked, read or bool(found)
                if not found:
                    continue  # outside its timestep range, or another pack has changed its text
                part = size if area is None else level_sizes(seen)[self.factor]
                maps = aggregate([found[name] for name in sorted(found)], part, seen)[:, list(self.bound)]
                has = _attended(cond, run).any(dim=1)[:, list(self.bound)].to(maps)[..., None, None]
                total = total + _placed(maps, area, run.latent, size)
                weight = weight + has
            self.dark = self.dark or (run.gradient and asked and not read)
            self.asked, self.read = self.asked or asked, self.read or read
        finally:
            run.capture, run.gradient = None, False
        return total / weight.clamp(min=1.0)

    def _call(self, inner: Any, cond: dict[str, Any], x: Tensor, level: Tensor, options: dict[str, Any]) -> None:
        """One call of the model for its maps. Where another pack computes with tensors that it has made under the
        host's inference mode, which autograd refuses, the call is made again with copies of them."""
        if not self.adopting:
            try:
                comfy.samplers.calc_cond_batch(inner, [[cond]], x, level, options)
                return
            except RuntimeError as error:
                if "Inference tensors cannot be saved" not in str(error):
                    raise
                self.adopting = True
                self.run.capture = Capture(self.layers, self.run.capture.shape) if self.run.capture else None
        with Adopting():
            comfy.samplers.calc_cond_batch(inner, [[cond]], x, level, options)

    def _fix_regions(
        self,
        model: Any,
        x: Tensor,
        sigma: Tensor,
        conds: list[dict[str, Any]],
        extra_args: dict[str, Any],
        until: float,
    ) -> None:
        """AFG: takes the maps once, at the first step that is not optimised, and fixes each concept's region down to
        the noise level `until`."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        with torch.inference_mode(False), torch.no_grad():
            maps = self._maps(model, conds, extra_args, sigma, x.detach().clone())
            found = regions(maps.float(), self.config.afg_region, self.config.afg_smoothing, self.config.afg_rule)
            self.trace.after = maps.detach().to("cpu", torch.float32)
            self.trace.regions = found.cpu()
            # Channels of the run's masks, most of which may be unbound: no region, no bias.
            whole = found.new_zeros(found.shape[0], len(self.run.names), *found.shape[-2:])
            whole[:, list(self.bound)] = found
        self.run.fixed = FixedRegions(whole, until, self.config)


_BROKEN_GRADIENT = ("inplace operation", "in-place operation", "does not require grad", "Inference tensors")


@contextmanager
def _told_plainly() -> Iterator[None]:
    """Says in one sentence what autograd says of patches that it cannot pass."""
    try:
        yield
    except RuntimeError as error:
        if not any(part in str(error) for part in _BROKEN_GRADIENT):
            raise
        raise ConceptSplitError(
            "LODA needs a gradient through the model, and another node's patch of this model breaks it: remove that "
            "node, or set loda_steps to 0."
        ) from error


class Adopting(TorchFunctionMode):
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


def _attended(cond: dict[str, Any], run: Run) -> Tensor:
    """Which rows of a conditioning's text LODA reads, bool [1, L, n]; L is 1 where it has no text."""
    rows = cond["model_conds"].get(ROWS)
    if rows is None:
        return torch.zeros(1, 1, len(run.names), dtype=torch.bool)
    return rows.cond[..., len(run.names) :] != 0


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
