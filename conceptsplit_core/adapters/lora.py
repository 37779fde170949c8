"""Ordinary LoRA files, each on its own concept: what a file changes, as factors by module.

Files are read by the hosts' own readers; this module takes what they give, layer by layer, and knows their algebra:
LoRA and LoCon ΔW = (α/r) B A, also with a middle convolution, LoHa (B₁A₁) ∘ (B₂A₂), LoKr W₁ ⊗ W₂, and whole ΔW.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import ConceptSplitError
from ..method.tova import Pair
from ..network.site import NetworkMap
from .base import BASES, AdapterInfo, family
from .factors import ConvPair, Factor, Kronecker, Stacks, Whole, hadamard_pair, widths

_TEXT = (".attn2.to_k", ".attn2.to_v")


class LoraAdapter:
    """A LoRA file as an adapter: by canonical module name a pair of matrices or another factor.

    Attributes:
        info: what is known about it; its kind is 'lora'.
        factors: in the precision of the file, on the CPU.
    """

    def __init__(self, info: AdapterInfo, factors: Mapping[str, Pair | Factor]):
        if not factors:
            raise ConceptSplitError(
                f"The LoRA '{info.concept}' changes no layer of this model: it was made for another architecture."
            )
        self.info = info
        self.factors = dict(factors)
        self.stacks = Stacks()
        self._cache: dict[tuple[str, torch.device, torch.dtype], Pair | Factor] = {}

    @property
    def sites(self) -> tuple[str, ...]:
        """The modules it changes."""
        return tuple(self.factors)

    def with_info(self, **changes: Any) -> LoraAdapter:
        """The same factors under other facts, for instance another concept name."""
        return LoraAdapter(replace(self.info, **changes), self.factors)

    def factor(self, site: str, device: torch.device, dtype: torch.dtype) -> Pair | Factor | None:
        """What it does to a module, on `device` in `dtype`; copied once. None if it leaves the module alone."""
        found = self.factors.get(site)
        if found is None:
            return None
        key = (site, device, dtype)
        if key not in self._cache:
            with torch.inference_mode(False):
                if isinstance(found, tuple):
                    self._cache[key] = (found[0].to(device, dtype), found[1].to(device, dtype), found[2])
                else:
                    self._cache[key] = found.to(device, dtype)
        return self._cache[key]

    def keep(self, site: str, down: Tensor, up: Tensor) -> None:
        """Takes equal matrices of a module in the place of its own on their device and in their dtype."""
        held = self._cache.get(key := (site, down.device, down.dtype))
        if isinstance(held, tuple):
            self._cache[key] = (down, up, held[2])
            if held[0] is self.factors[site][0]:  # type: ignore[index]
                self.factors[site] = self._cache[key]

    def check_fits(self, shapes: Mapping[str, tuple[int, int]], base: str = "unknown") -> None:
        """Refuses a LoRA of another model.

        Args:
            shapes: (d_in, d_out) of each module.

        Raises:
            ConceptSplitError: a module of another shape.
        """
        # What reads text comes first, because its width names the family.
        for site in sorted(shapes, key=lambda site: not site.endswith(_TEXT)):
            if site not in self.factors:
                continue
            theirs, mine = shapes[site], widths(self.factors[site])
            if mine != theirs:
                made_for = family(mine[0]) if site.endswith(_TEXT) else "unknown"
                raise ConceptSplitError(
                    f"The LoRA '{self.info.concept}' maps {mine[0]} to {mine[1]} values at {site}, the model maps "
                    f"{theirs[0]} to {theirs[1]}: it was made for "
                    f"{'another model' if made_for == 'unknown' else BASES[made_for]} and the model is "
                    f"{BASES.get(base, base)}."
                )


def widened(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file with those of 8 bits as bfloat16, which holds them exactly and has products."""
    return {
        key: tensor.bfloat16() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
        for key, tensor in state.items()
    }


def lora_factor(
    up: Tensor, down: Tensor, alpha: float | None, middle: Tensor | None, convolution: bool
) -> Pair | Factor:
    """LoRA and LoCon.

    Args:
        up: B [d_out, r] or [d_out, r, 1, 1].  down: A [r, d_in] or [r, d_in, kh, kw].
        alpha: the file's α; None is r.
        middle: [r, r, kh, kw] of a LoCon in Tucker form.
        convolution: whether the module is one; files may write a 1 × 1 convolution as a matrix and the reverse.

    Raises:
        ConceptSplitError: the matrices do not fit each other.
    """
    rank = down.shape[0]
    if rank == 0 or up.shape[1] != rank:
        raise ConceptSplitError(
            f"two matrices of one layer have the ranks {up.shape[1]} and {rank}: it is damaged; download it again."
        )
    scale = 1.0 if alpha is None else alpha / rank
    if middle is not None:
        down = torch.einsum("mnhw,ni->mihw", middle.float(), down.flatten(1).float()).to(down.dtype)
    if not convolution:
        return down.flatten(1), up.flatten(1), scale
    if down.ndim == 2:
        down = down[..., None, None]
    return ConvPair(down, up.flatten(1)[..., None, None], scale)


def loha_factor(
    first: tuple[Tensor, Tensor, Tensor | None],
    second: tuple[Tensor, Tensor, Tensor | None],
    alpha: float | None,
    kernel: tuple[int, ...],
) -> Pair | Factor:
    """LoHa: each of the two as (B [d_out, r], A [r, d_in · kh · kw], Tucker core or None); kernel of a convolution."""
    (b1, a1, t1), (b2, a2, t2) = first, second
    scale = 1.0 if alpha is None else alpha / a1.shape[0]
    if t1 is None and not kernel and b1.shape[1] * b2.shape[1] <= min(b1.shape[0], a1.shape[1]) // 2:
        return hadamard_pair(b1, a1, b2, a2, scale)
    product = _rebuilt(b1, a1, t1) * _rebuilt(b2, a2, t2)
    return Whole(product.unflatten(1, (-1, *kernel)) if kernel and product.ndim == 2 else product, scale)


def lokr_factor(
    first: tuple[Tensor | None, Tensor | None, Tensor | None],
    second: tuple[Tensor | None, Tensor | None, Tensor | None],
    core: Tensor | None,
    alpha: float | None,
    kernel: tuple[int, ...],
) -> Factor:
    """LoKr: W₁ and W₂ each as (whole, B, A), the whole where it is there; kernel of a convolution."""
    ranks = [a.shape[0] for whole, _, a in (first, second) if whole is None and a is not None]
    scale = 1.0 if alpha is None or not ranks else alpha / ranks[-1]
    w1 = first[0] if first[0] is not None else _rebuilt(first[1], first[2], None)  # type: ignore[arg-type]
    w2 = second[0] if second[0] is not None else _rebuilt(second[1], second[2], core)  # type: ignore[arg-type]
    if not kernel:
        return Kronecker(w1, w2.flatten(1), scale)
    w2 = w2.reshape(len(w2), -1, *kernel)
    return Whole(torch.kron(w1[..., None, None].float(), w2.float().contiguous()).to(w2.dtype), scale)


def _rebuilt(b: Tensor, a: Tensor, core: Tensor | None) -> Tensor:
    """B A, or with a Tucker core [r, r, kh, kw] the whole convolution."""
    if core is None:
        return b @ a
    return torch.einsum("ijkl,jr,ip->prkl", core, a, b)


@dataclass
class LoraReport:
    """What becomes of a file's parts, for the node and the terminal.

    by_rows, by_region: how many modules are routed to the concept's text rows, and to its pixels; a module that reads
        both counts twice.
    text_encoder: how many modules of the text encoder it changes.
    left_out: what has no tokens or no place in this model, and what has no additive form, with the number of each.
    """

    by_rows: int = 0
    by_region: int = 0
    text_encoder: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def sentence(self) -> str:
        parts = [
            f"{self.by_rows} layers act at its words",
            f"{self.by_region} in its region",
            f"{self.text_encoder} of the text encoder at its words" if self.text_encoder else "",
            *(f"left out: {count} {what}" for what, count in sorted(self.left_out.items())),
        ]
        return "; ".join(part for part in parts if part)


def routed(factors: Mapping[str, Pair | Factor], network: NetworkMap, report: LoraReport) -> dict[str, Pair | Factor]:
    """The factors that can be routed in this network; counts them, and those that can't, in the report."""
    kept: dict[str, Pair | Factor] = {}
    for name, factor in factors.items():
        site = network.sites.get(name)
        if site is None:
            report.left_out["unknown to this model"] += 1
        elif site.reads == "time":
            report.left_out["that read neither text nor pixels"] += 1
        else:
            report.by_rows += site.reads != "image"
            report.by_region += site.reads != "text"
            kept[name] = factor
    return kept


def trained_words(metadata: Mapping[str, str]) -> list[str]:
    """Words that a file's metadata proposes as the ones it was trained on, the likeliest first; [] if it says none.

    Sources, in this order: a trigger phrase (modelspec), the most frequent tag of kohya's `ss_tag_frequency`, and the
    folder names of its datasets (`10_ohwx woman`).
    """
    found: list[str] = []
    for key in ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words", "trigger"):
        if text := str(metadata.get(key) or "").strip():
            found.append(text.split(",")[0].strip())
    table = _json(metadata.get("ss_tag_frequency"))
    counts: Counter[str] = Counter()
    for tags in table.values():
        if isinstance(tags, dict):
            said = {str(tag).strip(): n for tag, n in tags.items() if isinstance(n, int | float)}
            counts.update({tag: int(n) for tag, n in said.items() if math.isfinite(n)})
    found += [tag for tag, _ in counts.most_common(3) if tag]
    for folder in [*table, *_json(metadata.get("ss_dataset_dirs"))]:
        repeats, _, words = str(folder).partition("_")
        if repeats.isdigit() and words.strip():
            found.append(words.strip())
    return list(dict.fromkeys(found))


def _json(text: Any) -> dict[str, Any]:
    try:
        found = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def peft_facts(
    metadata: Mapping[str, Any], config: Mapping[str, Any] | None, name: str, part: str = "unet"
) -> dict[str, Any]:
    """PEFT's settings of one part of a model: from a file's header (`lora_adapter_metadata`, which diffusers writes),
    or from an `adapter_config.json` beside it.

    Raises:
        ConceptSplitError: the header's are no table.
    """
    text = metadata.get("lora_adapter_metadata")
    if not isinstance(text, str):
        return dict(config or {})
    said = _json(text)
    if not said and text.strip() != "{}":
        raise ConceptSplitError(f"{name} says lora_adapter_metadata = {text[:40]!r}, which is not possible.")
    own = {key: value for key, value in said.items() if key.startswith(f"{part}.") or "." not in key}
    return {**(config or {}), **{key.removeprefix(f"{part}."): value for key, value in own.items()}}


def peft_alpha(facts: Mapping[str, Any], module: str, rank: int) -> float | None:
    """α of a module of this rank, so that α / rank is PEFT's scale; None if it does not say.

    `alpha_pattern` holds regular expressions for the end of a module's name. `rank_pattern` needs no reading: the
    matrices have the rank.
    """
    patterns = facts.get("alpha_pattern")
    own = patterns.items() if isinstance(patterns, dict) else ()
    alpha = next((value for pattern, value in own if _is_end(pattern, module)), facts.get("lora_alpha"))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < 1e6:
        return None
    # Rank-stabilised LoRA scales by α/√r.
    return float(alpha) * rank**0.5 if facts.get("use_rslora") else float(alpha)


_PEFT = re.compile(
    r"(?P<wrapped>base_model\.model\.)?(?:(?P<part>unet|transformer|text_encoder(?:_2)?)\.)?"
    r"(?:base_model\.model\.)?(?P<module>.+)"
    r"\.(?:(?P<side>lora_[AB])(?:\.\w+)?\.weight|lora_magnitude_vector(?:\.\w+)*)"
)


def peft_state(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    name: str,
    known: Collection[str] = (),
) -> dict[str, Tensor]:
    """The tensors of a file for a reader that knows neither PEFT's settings nor its wrapping: α as a tensor per module,
    `base_model.model.` and the adapter's name gone from the names, the magnitudes of DoRA under kohya's name.

    Args:
        known: how the reader names modules; a name that does not say whose module it is becomes one of these.
    """
    found: dict[str, Tensor] = {}
    facts = cache(lambda part: peft_facts(metadata, config, name, part))
    for key, tensor in state.items():
        match = _PEFT.fullmatch(key)
        if match is None:
            found[key] = tensor
            continue
        bare = match["module"]
        guesses = (bare, f"transformer.{bare}", f"unet.{bare}")
        unknown = f"unet.{bare}" if match["wrapped"] else bare
        module = f"{match['part']}.{bare}" if match["part"] else next((one for one in guesses if one in known), unknown)
        part = match["part"] or ("transformer" if f"transformer.{bare}" in known else "unet")
        if match["side"] is None:
            found[f"{module}.dora_scale"] = tensor
            continue
        found[f"{module}.{match['side']}.weight"] = tensor
        alpha = peft_alpha(facts(part), bare, tensor.shape[0])
        if match["side"] == "lora_A" and alpha is not None and f"{module}.alpha" not in state:
            found[f"{module}.alpha"] = torch.tensor(alpha)
    return found


def _is_end(pattern: str, module: str) -> bool:
    if module == pattern or module.endswith(f".{pattern}"):
        return True
    # A repeated group may take for ever to fail.
    if len(pattern) > 300 or re.search(r"\)[*+{?]", pattern):
        return False
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except re.error:
        return False


def lora_adapter(
    name: str,
    words: str,
    factors: Mapping[str, Pair | Factor],
    network: NetworkMap,
    unsupported: Sequence[str] = (),
    text_encoder: int = 0,
) -> tuple[LoraAdapter, LoraReport]:
    """A LoRA for `network` under a concept's name.

    Args:
        words: what prompts call it to the model, "ohwx woman".
        factors: by canonical module name, as the host's reader gives them.
        unsupported: one entry for each module whose change has no additive form, naming that form.
        text_encoder: how many modules of the text encoder the file changes.

    Raises:
        ConceptSplitError: nothing is left, or a module of another shape.
    """
    report = LoraReport(text_encoder=text_encoder)
    report.left_out.update(f"in a form that cannot be routed ({form})" for form in unsupported)
    kept = routed(factors, network, report)
    for site, factor in kept.items():
        _check_kernel(name, site, factor, tuple(getattr(network.module(site), "kernel_size", ())))
        held = factor if isinstance(factor, tuple) else vars(factor).values()
        if not all(bool(torch.isfinite(one).all()) for one in held if isinstance(one, Tensor)):
            raise ConceptSplitError(
                f"The LoRA '{name}' holds values that are not finite at {site}: its training has diverged; take an "
                "earlier version of it or train it again."
            )
    ranks = [one[0].shape[0] for one in kept.values() if isinstance(one, tuple)]
    info = AdapterInfo(
        name,
        words,
        network.family,
        network.context_dim,
        max(ranks, default=1),
        float(max(ranks, default=1)),
        kind="lora",
    )
    adapter = LoraAdapter(info, kept)
    adapter.check_fits(network.shapes(kept), network.family)
    return adapter, report


def _check_kernel(name: str, site: str, factor: Pair | Factor, theirs: tuple[int, ...]) -> None:
    weight = factor.down if isinstance(factor, ConvPair) else factor.weight if isinstance(factor, Whole) else None
    mine = () if weight is None else tuple(weight.shape[2:])
    if mine and mine != theirs:
        raise ConceptSplitError(
            f"The LoRA '{name}' convolves with {mine[0]} × {mine[1]} at {site}, the model with {theirs[0]} × "
            f"{theirs[1]}: it was made for another model."
        )
