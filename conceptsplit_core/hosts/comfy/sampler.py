"""LODA, planning and AFG around the host's samplers.

The host's sampler function is wrapped, not replaced. Without routed adapters the latent is optimised before each of the
first K steps, the step itself is taken by the sampler where one step of it is exact on its own, by Euler where the
sampler keeps a history, and the sampler runs undisturbed from sigma K on. With routed adapters the first steps are
drawn in this way as a plan, and the sampler then runs undisturbed from the untouched noise.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrapperExecutor
from torch import Tensor

from ...errors import ConceptSplitError
from ...method.diffusion import PARAMETERISATIONS
from ...method.loda import LodaTrace
from ...method.timeline import Timeline
from ...settings import LodaConfig
from ...text.binding import prompt_order
from .autograd import copied_activations, plain_errors, plain_kernels
from .memory import TooLarge, out_of_memory
from .model import KEY, adopt_parameters, compute_dtype
from .reader import MapReader, attended_rows
from .run import Regions, Run, optimised, patch_of
from .steps import NEVER_ALONE, single_step

log = logging.getLogger("ConceptSplit")

_TOO_FEW = "LODA needs two concepts in the prompt and found %s"


def sample(executor: Any, guider: Any, *args: Any, **kwargs: Any) -> Tensor:
    """SAMPLER_SAMPLE: the same call with a sampler that runs our stages, or the call itself where there is no need."""
    run: Run | None = guider.model_options.get("transformer_options", {}).get(KEY)
    loda = patch_of(guider.model_patcher).loda
    if run is None:
        if loda is not None and loda.acts:
            log.warning("[ConceptSplit] %s: sampling without LODA.", _TOO_FEW % "none")
        return executor(guider, *args, **kwargs)
    config = loda or LodaConfig(loda_steps=0)
    rows = bound_rows(guider, run)
    bound = tuple(rows.any(dim=(0, 1)).nonzero().flatten().tolist())
    if loda is None and run.masks.keys() >= run.concepts.routed & set(bound):
        bound = tuple(channel for channel in bound if channel in run.masks)  # nobody needs the others' places
    stages = StagedSampler(executor.class_obj, guider, run, config, bound, prompt_order(rows[..., list(bound)]))
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
            "[ConceptSplit] LODA found none of the prompt's concepts in the model's attention and did nothing%s: "
            "another node changes the text, shows the model windows of the picture, or cuts off gradients.",
            f", so that each LoRA acts {'where no mask is drawn' if run.masks else 'in the whole picture'}"
            if run.concepts.routed
            else "",
        )
    return out


def fitted(mask: Tensor, x: Tensor) -> Tensor:
    """A mask [1 or b, H, W] at the size of a latent [B, C, h, w], for each of its images: [1 or B, h, w]. Too few masks
    are repeated and too many cut off, as the host does."""
    small = F.adaptive_avg_pool2d(mask.to(x.device)[:, None], (x.shape[-2], x.shape[-1]))[:, 0]
    return small if len(small) == 1 else comfy.utils.repeat_to_batch_size(small, x.shape[0])


def bound_rows(guider: Any, run: Run) -> Tensor:
    """Which rows are whose, of the positive conditionings one after the other: bool [1, L, n], L at least 1."""
    none = torch.zeros(1, 1, len(run.concepts.names), dtype=torch.bool)
    return torch.cat([none, *(attended_rows(cond, run).cpu() for cond in guider.conds.get("positive", []))], dim=1)


@contextmanager
def unguided(guider: Any) -> Iterator[None]:
    """Inside, the guider asks for no unconditional pass, if it guides as the host's own does."""
    if type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise:
        yield
        return
    scale, guider.cfg = guider.cfg, 1.0
    try:
        yield
    finally:
        guider.cfg = scale


class StagedSampler:
    """A sampler function that runs the stages of a `Timeline`.

    Args (of a call): as every k-diffusion sampler; x is x₀ + σ·ε, [B, C, H, W].
    """

    def __init__(self, sampler: Any, guider: Any, run: Run, config: LodaConfig, bound: tuple[int, ...], order: Tensor):
        self.sampler = sampler
        self.base: Any = getattr(sampler, "sampler_function", None)  # unknown samplers have none, and run as they are
        self.guider = guider
        self.run = run
        self.config = config
        # Without updates a transformer's maps at the first step are of noise: they are read from a plan instead.
        self.plans = bool(run.concepts.routed) or (config.acts and not optimised(config, run.model))
        self.bound = bound
        self.order = order
        self.maps = MapReader(guider, run, config, bound)
        self.too_large = False  # whether a gradient has needed more memory than there is
        self.in_place = False  # whether another pack's patch has been found to write into what a gradient needs
        self.__name__ = getattr(self.base, "__name__", "sampler")

    def unneeded(self) -> str | None:
        """Why the sampler may run as it is: a sentence for the user, or "" where they will expect it; None if not."""
        config, names = self.config, self.run.concepts.names
        routed = self.run.concepts.routed
        earlier = self.run.patch.earlier
        # An earlier stage without regions is no fault where this one would look for none either.
        known = earlier is not None and (earlier.trace is not None or len(self.bound) > 1)
        located = bool(self.bound) and (known or self.run.masks.keys() >= set(self.bound))
        if not located and not routed and not config.acts:
            return ""
        if not located and len(self.bound) < 2:
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
        if total < 1:  # the second half of a schedule that was split at its end
            return self.base(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options)
        self.maps.prepare(model, x, extra_args)
        given = {self.bound.index(i): fitted(mask, x) for i, mask in run.masks.items() if i in self.bound}
        names = tuple(run.concepts.names[i] for i in self.bound)
        earlier = None if run.patch.earlier is None else run.patch.earlier.trace or LodaTrace()
        if earlier is not None and earlier.regions is not None and len(earlier.regions) not in (1, x.shape[0]):
            raise ConceptSplitError(
                f"The attention_maps given are of {len(earlier.regions)} pictures and the latent holds {x.shape[0]}: "
                "connect those of the same pictures."
            )
        config = self.config if optimised(self.config, run.model) else replace(self.config, loda_steps=0)
        timeline = Timeline(config, total, names, self.maps, self.plans, given, earlier, self.order)
        if run.patch.maps is not None:
            run.patch.maps.traces.append(timeline.trace)
        if timeline.optimised_steps:
            adopt_parameters(self.guider.inner_model)
        if timeline.routed or timeline.located:
            if not timeline.located:
                self._plan(timeline, model, x, sigmas, extra_args, callback, options)
            self._regions(timeline, x, sigmas, 0)
            return self.base(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options)
        count = timeline.optimised_steps
        one_step, options = single_step(self.base, self.__name__, x, extra_args, options)
        for k in range(count):
            x = self._step(timeline, k, one_step, model, x, sigmas, extra_args, _shifted(callback, k))
        if timeline.afg_acts(count) and not self.maps.unreadable:
            comfy.model_management.throw_exception_if_processing_interrupted()
            timeline.locate(x, count, sigmas[count])
            self._regions(timeline, x, sigmas, count)
        if count == total:
            return x
        rest, callback = sigmas[count:].clone(), _shifted(callback, count)
        if total - count == 1 and self.__name__ in NEVER_ALONE:
            return one_step(model, x, rest, extra_args=extra_args, callback=callback, disable=disable)
        return self.base(model, x, rest, extra_args=extra_args, callback=callback, disable=disable, **options)

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
        one_step, _ = single_step(self.base, self.__name__, x, extra_args, options)
        self.run.planning = True
        try:
            with nullcontext() if self.config.plan_guidance else unguided(self.guider):
                for k in range(timeline.plan_steps):
                    x = self._step(timeline, k, one_step, model, x, sigmas, extra_args, still)
            comfy.model_management.throw_exception_if_processing_interrupted()
            timeline.locate(x, timeline.plan_steps, sigmas[timeline.plan_steps])
            if self.maps.unreadable:
                timeline.forget()
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
        if not (self.maps.unreadable or self.too_large):
            try:
                x = self._begin(timeline, k, x, segment[0], extra_args.get("denoise_mask"))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                self.too_large = True
                comfy.model_management.soft_empty_cache()
                log.warning(
                    "[ConceptSplit] LODA's gradient needs more memory than is free%s: the picture is drawn without it, "
                    "and regions are found all the same; draw it smaller, or set loda_steps to 0.",
                    f" ({error})" if isinstance(error, TooLarge) else "",
                )
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
            unit=PARAMETERISATIONS["epsilon" if self.run.network.sequence is None else "flow"].unit,
        )
        with plain_errors(), plain_kernels():
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
            with copied_activations():
                return work()

    def _regions(self, timeline: Timeline, x: Tensor, sigmas: Tensor, first: int) -> None:
        """Puts what the timeline has found into force, AFG from step `first` on."""
        run, held = self.run, timeline.config.held(timeline.total)
        # A little above the level of the step that is free again: samplers may pass it on with a rounding error.
        until = 0.0 if held >= timeline.total else 1.0001 * float(sigmas[held])
        run.regions = Regions(
            timeline.config,
            self._all_channels(timeline.afg, x) if timeline.afg_acts(first) else None,
            until,
            self._all_channels(timeline.areas, x),
        )

    def _all_channels(self, found: Tensor | None, x: Tensor) -> Tensor | None:
        """[B, bound, h, w] with the run's other channels, which are unbound, as zeros; on the device of x."""
        if found is None:
            return None
        whole = found.new_zeros(found.shape[0], len(self.run.concepts.names), *found.shape[-2:])
        whole[:, list(self.bound)] = found
        return whole.to(x.device)


def _shifted(callback: Callable | None, offset: int) -> Callable | None:
    """The host's step callback for a segment that starts at step `offset` of the run."""
    if callback is None or offset == 0:
        return callback
    return lambda info: callback({**info, "i": info["i"] + offset})
