"""How concepts are learned and how several of them are drawn at once: the arms of the laboratory.

Every kind of adapter is a `ValueAdapter` of the core, trained by the core's loop on the same pictures, prompts,
timesteps and noise. Kinds differ in the projections they change (layer names get a suffix such as ``/to_k``) and in
whether the change is made at the concept's own text rows only or everywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from conceptsplit_core.adapters import AdapterInfo, ValueAdapter
from conceptsplit_core.demo import checkpoint, scenes
from conceptsplit_core.demo.scenes import CONCEPTS
from conceptsplit_core.hooks import ValueState, hook_values, remove_hooks
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.loda import LodaConfig
from conceptsplit_core.maps import distributions, harmonic_mean, pairwise
from conceptsplit_core.tokens import Concept, row_mask
from conceptsplit_core.training import TrainBatch, TrainConfig, train

from .confusion import backgrounds_for
from .metrics import Wanted

# --- kinds of adapters ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What an adapter changes: projections of every cross-attention layer, at bound rows only or at all."""

    projections: tuple[str, ...]
    token_wise: bool = True


KINDS = {
    "value": Kind(("to_v",)),
    "key": Kind(("to_k",)),
    "key_value": Kind(("to_k", "to_v")),
    "lora": Kind(("to_q", "to_k", "to_v", "to_out"), token_wise=False),
    "lora_key_value": Kind(("to_k", "to_v"), token_wise=False),
}


@dataclass(frozen=True)
class Learning:
    """How a concept is learned; the same for every kind."""

    images: int = 6
    image_seed: int = 3
    rank: int = 8
    steps: int = 250
    batch_size: int = 4
    learning_rate: float = 3e-3
    seed: int = 0


def projections(model: host.DiffusersModel, kind: Kind) -> dict[str, nn.Module]:
    """Name to linear layer of everything a kind changes."""
    found: dict[str, nn.Module] = {}
    for name, attn in host.cross_attention_layers(model.unet).items():
        for which in kind.projections:
            module = attn.to_out[0] if which == "to_out" else getattr(attn, which)
            found[f"{name}/{which}"] = module
    return found


@contextmanager
def attached(
    model: host.DiffusersModel,
    kind: Kind,
    parts: Sequence[tuple[ValueAdapter | None, float]],
    mask: Tensor | None,
    both_branches: bool = False,
) -> Iterator[ValueState]:
    """Hooks for adapters of any kind on the UNet.

    Args:
        parts: (adapter, strength) per channel of the mask.
        mask: [B, L, n] rows of the conditional branch. A pass of twice as many rows is a guided one, unconditional
            half first. With None the caller publishes `state.mask` itself.
        both_branches: bind the unconditional branch too, at the same rows (a defect of the paper's code).
    """
    modules = projections(model, kind)
    state = ValueState(adapters=tuple(a for a, _ in parts), strengths=tuple(s for _, s in parts))
    handles = []
    if kind.token_wise:
        handles += hook_values(modules, state)

        def publish(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if mask is None:
                return
            rows = args[0].shape[0]
            if rows == 2 * mask.shape[0]:
                state.mask = torch.cat([mask if both_branches else torch.zeros_like(mask), mask])
            else:
                state.mask = mask

        handles.append(model.unet.register_forward_pre_hook(publish, with_kwargs=True))
    else:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(_everywhere(name, parts)))
    try:
        yield state
    finally:
        remove_hooks(handles)
        state.clear()


def _everywhere(name: str, parts: Sequence[tuple[ValueAdapter | None, float]]) -> Any:
    """A LoRA: the delta at every row of every branch. Summing deltas is merging the weights."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for adapter, strength in parts:
            delta = None if adapter is None else adapter.delta(name, output.device, output.dtype)
            if delta is not None:
                down, up, scale = delta
                output = output + (inputs[0] @ down.t() @ up.t()) * (scale * strength)
        return output

    return hook


def pictures_of(name: str, learning: Learning) -> Tensor:
    """Training pictures of a concept, [n, 3, H, W] in -1..1."""
    drawn = np.stack(scenes.draw_concept(name, learning.images, learning.image_seed))
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def learn(model: host.DiffusersModel, name: str, kind_name: str, learning: Learning, cache: Path) -> ValueAdapter:
    """The adapter of one concept, from the cache if it was learned before on this very model."""
    kind = KINDS[kind_name]
    key = hashlib.sha256(
        json.dumps([fingerprint(model, pictures=False), name, kind_name, asdict(kind), asdict(learning)]).encode()
    ).hexdigest()[:12]
    path = cache / f"{kind_name}-{name}-{key}.safetensors"
    if path.exists():
        return _read(path)
    concept = Concept(name, CONCEPTS[name].class_word)
    shapes = {n: (m.in_features, m.out_features) for n, m in projections(model, kind).items()}
    info = AdapterInfo(
        name, concept.class_word, base=model.family, context_dim=next(iter(shapes.values()))[0],
        rank=learning.rank, alpha=float(learning.rank),
    )  # fmt: skip
    adapter = ValueAdapter.create(shapes, info, learning.seed)
    data = host.training_data(model, pictures_of(name, learning), concept, model.templates or ("a {}",))
    config = TrainConfig(
        steps=learning.steps, batch_size=learning.batch_size, learning_rate=learning.learning_rate, seed=learning.seed,
        prediction_type=model.prediction_type,
    )  # fmt: skip
    with attached(model, kind, [(adapter, 1.0)], None) as state:

        def denoise(batch: TrainBatch) -> Tensor:
            state.mask = batch.mask
            return host.call_unet(model, batch.x_t, batch.timesteps, batch.context)

        result = train(adapter, data, model.alphas_cumprod, denoise, config)
    tensors = {f"{n}|down": t.contiguous() for n, t in adapter.down.items()}
    tensors |= {f"{n}|up": t.contiguous() for n, t in adapter.up.items()}
    tail = float(np.mean(result.losses[-50:]))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, str(part), {"info": json.dumps(asdict(info)), "loss": str(tail), "seconds": str(result.seconds)})
    part.replace(path)
    return adapter


def _read(path: Path) -> ValueAdapter:
    with safe_open(str(path), framework="pt") as file:
        info = AdapterInfo(**json.loads(file.metadata()["info"]))
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a mapping)
    sides = {side: {k.split("|")[0]: v for k, v in tensors.items() if k.endswith(side)} for side in ("down", "up")}
    return ValueAdapter(info, sides["down"], sides["up"])


def open_model(source: str) -> host.DiffusersModel:
    """The built-in demo model ("demo"), or another checkpoint file of its format: a variant trained otherwise."""
    if source == "demo":
        return host.load_model("demo")
    built_in = checkpoint.load
    checkpoint.load = lambda path=source: built_in(path)  # the host knows only the built-in file
    try:
        model = host.load_model("demo")
    finally:
        checkpoint.load = built_in
    model.source = source
    return model


def fingerprint(model: host.DiffusersModel, pictures: bool = True) -> str:
    """Twelve hex digits that name a model's weights; without `pictures` those of the decoder do not count."""
    digest = hashlib.sha256()
    encoders = [encoder.model for encoder in model.encoders]
    for part in (model.unet, model.vae if pictures else model.vae.encoder, *encoders):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


# --- concept sets and prompts ---------------------------------------------------------------------------------

TUNING = ("kiku", "tavi", "sumi", "lola", "runo", "dax")
REPORTING = ("bobo", "lumo", "nero", "pixa", "vento", "ozzy")
"""Settings are chosen on TUNING concepts and seeds below REPORT_FROM, numbers are reported on the others."""
REPORT_FROM = 10_000


def concept_sets(
    split: str, size: int = 2, limit: int | None = None, same_class: bool = False
) -> list[tuple[str, ...]]:
    """Sets of concepts that show together on some background, in a fixed order that uses all concepts early."""
    names = {"tuning": TUNING, "reporting": REPORTING, "all": tuple(CONCEPTS)}[split]
    found = []
    for picked in combinations(names, size):
        classes = [CONCEPTS[name].class_word for name in picked]
        if (len(set(classes)) < size) == same_class and backgrounds_for(tuple(CONCEPTS[n].look for n in picked)):
            found.append(picked)
    order: list[tuple[str, ...]] = []
    while found:
        used = {name: sum(name in done for done in order) for name in names}
        found.sort(key=lambda s: (sum(used[name] ** 2 for name in s), s))
        order.append(found.pop(0))
    return order[:limit]


def prompt_for(names: Sequence[str], seed: int, style: str) -> str:
    """The prompt of one picture. The background and the order of the concepts go with the seed.

    style: "bound" has placeholders, "plain" class words, "described" all colours and patterns in words.
    """
    fitting = backgrounds_for(tuple(CONCEPTS[name].look for name in names))
    background = fitting[(seed // 2) % len(fitting)]
    ordered = list(names) if seed % 2 == 0 else list(reversed(names))
    phrases = []
    for name in ordered:
        concept = CONCEPTS[name]
        if style == "bound":
            phrases.append(f"a <{name}>")
        elif style == "plain":
            phrases.append(f"a {concept.class_word}")
        else:
            first, second = concept.colours
            article = "an" if first[0] in "aeiou" else "a"
            phrases.append(f"{article} {first} and {second} {concept.pattern} {concept.class_word}")
    listed = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return f"{listed} on a {background} background"


def background_for(names: Sequence[str], seed: int) -> str:
    """The background word in `prompt_for`."""
    fitting = backgrounds_for(tuple(CONCEPTS[name].look for name in names))
    return fitting[(seed // 2) % len(fitting)]


def wanted_of(names: Sequence[str]) -> tuple[Wanted, ...]:
    return tuple(Wanted(CONCEPTS[name].class_word, CONCEPTS[name].look) for name in names)


# --- arms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to draw several concepts.

    kind: of the adapters, or None. style: of the prompt. both_branches: see `attached`. best_of: candidates per
    picture, of which the one with the best separated maps is taken. more_steps: factor on the sampling steps.
    """

    kind: str | None = "value"
    style: str = "bound"
    strength: float = 1.0
    loda: LodaConfig | None = None
    both_branches: bool = False
    best_of: int = 1
    more_steps: float = 1.0


@dataclass(frozen=True)
class Sampling:
    """What all arms share."""

    steps: int = 16
    guidance: float = 3.0
    batch: int = 16


PAPER = LodaConfig(
    steps=3, iterations=10, step_size=20.0, step_rule="gradient", divergence="kl", threshold=3.0, smooth_sigma=1.4,
    afg=True, afg_positive=3.0, afg_negative=-1e8, afg_fraction=0.1, afg_sigma=1.5,
)  # fmt: skip
"""The paper's settings; its 10 of 50 steps are 3 of 16, its 7-tap Gaussian has about this σ."""


def arms(loda: LodaConfig) -> dict[str, Arm]:
    """All arms by name; `loda` is the setting under test."""
    off = replace(loda, afg=False)
    table = {
        "base": Arm(None, "plain"),
        "described": Arm(None, "described"),
        "lora_merged": Arm("lora"),
        "lora_key_value": Arm("lora_key_value"),
        "tova": Arm(),
        "tok_key": Arm("key"),
        "tok_key_value": Arm("key_value"),
        "tova_loda": Arm(loda=off),
        "tova_afg": Arm(loda=replace(loda, step_size=0.0, afg=True)),
        "tova_loda_afg": Arm(loda=replace(loda, afg=True)),
        "lora_merged_loda_afg": Arm("lora", loda=replace(loda, afg=True)),
        "tok_key_value_loda_afg": Arm("key_value", loda=replace(loda, afg=True)),
        "described_loda_afg": Arm(None, "described", loda=replace(loda, afg=True)),
        "paper_code": Arm(loda=PAPER, both_branches=True),
        "tova_best_of_3": Arm(best_of=3, loda=off),
        "tova_more_steps": Arm(more_steps=2.0),
    }
    for divergence in ("jsd", "symmetric_kl", "bhattacharyya", "kl"):
        table[f"tova_loda_{divergence}"] = Arm(loda=replace(off, divergence=divergence, threshold=0.0))
    return table


def _concepts(names: Sequence[str]) -> list[Concept]:
    return [Concept(name, CONCEPTS[name].class_word) for name in names]


def conditioning(model: host.DiffusersModel, names: Sequence[str], seed: int, style: str) -> host.Conditioning:
    """The encoded prompt of one picture; described concepts are bound to their class words for LODA."""
    concepts = _concepts(names)
    if seed % 2 and style != "bound":
        concepts.reverse()  # without placeholders the n-th word of a class goes to the n-th concept
    return host.encode_text(model, prompt_for(names, seed, style), concepts)


def draw(
    model: host.DiffusersModel,
    arm: Arm,
    names: Sequence[str],
    seeds: Sequence[int],
    learned: Mapping[str, ValueAdapter],
    sampling: Sampling,
    texts: Sequence[str] | None = None,
) -> tuple[np.ndarray, list[dict[str, float]]]:
    """Pictures uint8 [B, H, W, 3] of one arm, one per seed, and what LODA did to each.

    `texts` replaces the prompts, one per seed; the concepts' adapters stay loaded.
    """
    positive = [conditioning(model, names, seed, arm.style) for seed in seeds]
    if texts is not None:
        positive = [host.encode_text(model, text, _concepts(names)) for text in texts]
    kind = KINDS[arm.kind] if arm.kind else None
    parts = [(learned[name], arm.strength) for name in names] if kind else []
    context: Any = nullcontext()
    adapters: dict[str, tuple[ValueAdapter, float]] = {}
    if kind is not None and kind.projections == ("to_v",) and not arm.both_branches:
        # The product's own path.
        adapters = {name: (as_product(learned[name]), arm.strength) for name in names}
    elif kind is not None:
        mask = torch.stack([row_mask(c.bindings, list(names), c.context.shape[1]) for c in positive])
        context = attached(model, kind, parts, mask, arm.both_branches)
    loda = arm.loda
    if arm.best_of > 1 and loda is not None:
        # Looks at the maps as LODA would and moves nothing: every divergence is above this threshold.
        loda = replace(loda, threshold=1e-12, iterations=1, afg=False, step_size=max(loda.step_size, 1e-3))
    options: dict[str, Any] = {
        "concepts": list(names), "adapters": adapters, "steps": round(sampling.steps * arm.more_steps),
        "guidance": sampling.guidance, "loda": loda,
    }  # fmt: skip
    best: np.ndarray | None = None
    scores = np.full(len(seeds), -np.inf)
    facts: list[dict[str, float]] = [{} for _ in seeds]
    with context:
        for candidate in range(arm.best_of):
            result = host.sample(model, positive, seeds=[s + 1_000_003 * candidate for s in seeds], **options)
            trace = result.trace
            score = np.zeros(len(seeds))
            if trace is not None and trace.divergences:
                values = harmonic_mean(trace.divergences[-1][1]).numpy()
                score = values
                first, last = _divergence(trace.before), _divergence(trace.after)
                for i, fact in enumerate(facts):
                    fact |= {"jsd_before": float(first[i]), "jsd_after": float(last[i])}
            if best is None:
                best, scores = result.images, score
            else:
                better = score > scores
                best[better], scores[better] = result.images[better], score[better]
    assert best is not None
    return best, facts


def _divergence(maps: Tensor | None) -> np.ndarray:
    """JSD of maps [B, n, h, w] as LODA sees them by default, harmonic mean over pairs."""
    assert maps is not None
    return harmonic_mean(pairwise(distributions(maps, 1.0), "jsd")).numpy()


def as_product(adapter: ValueAdapter) -> ValueAdapter:
    """A value adapter of this laboratory under the product's layer names."""
    return ValueAdapter(
        adapter.info,
        {k.removesuffix("/to_v"): v for k, v in adapter.down.items()},
        {k.removesuffix("/to_v"): v for k, v in adapter.up.items()},
    )
