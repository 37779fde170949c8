"""How a concept is learned: kinds of adapters, their hooks on the UNet, and training.

Every kind is a `LowRankAdapter` of the core, trained by the core's loop on the same pictures, prompts, timesteps and
noise. Kinds differ in the projections they change (layer names get a suffix such as ``/to_k``), in whether the change
is made at the concept's own text rows only or everywhere, and in what else the training looks at.

Two kinds follow other papers:

TARA (Token-Aware LoRA, arXiv 2508.08812, and its published training code): LoRA on q, k, v and out of every attention
layer. Only k and v of *cross*-attention see text rows, so only there is the delta kept to the concept's own row; the
deltas of q, of out and of self-attention act on all pixels of both branches and are summed over concepts, as its code
does. Its token alignment loss is the mean absolute difference between the concept row's new key and the class word's
old key. TARA learns a rare token before the class word; here, as in all arms, the concept lives on the class word
itself, so that loss is the mean absolute change of the key.

Perfusion (arXiv 2305.01644): the adapter is one value vector o* per layer. With i* the concept's mean encoding, C the
second moment of encodings, sim = i*ᵀ C⁻¹ e and E = i*ᵀ C⁻¹ i*, every text row e gives
h = W e − (sim / E) W i* + σ((sim / E − β) / τ) o*; for keys o* is fixed to W i*, so that the concept attends as its
class word does. For several concepts the part of e in the span of all i* is taken out and the gated o* are added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from conceptsplit_core.adapters.base import AdapterInfo
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.demo import checkpoint, scenes
from conceptsplit_core.demo.scenes import CONCEPTS
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.network.hooks import ValueState, hook_values, remove_hooks
from conceptsplit_core.settings import TrainConfig
from conceptsplit_core.text.binding import Concept
from conceptsplit_core.train.data import TrainBatch
from conceptsplit_core.train.loop import train


@dataclass(frozen=True)
class Kind:
    """What an adapter changes and how it learns.

    projections: of every cross-attention layer, with self_attention of those layers too.
    token_wise: the changes of keys and values in cross-attention are kept to the concept's own rows; projections that
        see pixels cannot be.
    align: weight of TARA's token alignment loss. masks: "given" or "attention", see `subject_masks`.
    gated: Perfusion's form instead of a low-rank pair. rate: factor on the learning rate.
    """

    projections: tuple[str, ...]
    token_wise: bool = True
    self_attention: bool = False
    align: float = 0.0
    masks: str = ""
    gated: bool = False
    rate: float = 1.0


ALL = ("to_q", "to_k", "to_v", "to_out")
KINDS = {
    "value": Kind(("to_v",)),
    "key": Kind(("to_k",)),
    "key_value": Kind(("to_k", "to_v")),
    "lora": Kind(ALL, token_wise=False, self_attention=True),
    "lora_key_value": Kind(("to_k", "to_v"), token_wise=False),
    "tara": Kind(ALL, self_attention=True, align=1.0),
    "perfusion": Kind(("to_k", "to_v"), token_wise=False, gated=True, rate=5.0),
    "value_masked": Kind(("to_v",), masks="given"),
    "value_attention_masked": Kind(("to_v",), masks="attention"),
}

BETA, TAU = 0.75, 0.1
"""Perfusion's gate."""
_TARGET = "target"
"""Pseudo-layer of a gated adapter's file that holds i*."""


@dataclass(frozen=True)
class Learning:
    """How a concept is learned; the same for every kind.

    levels: half the timesteps are drawn from this range instead of from all of them.
    """

    images: int = 6
    image_seed: int = 3
    rank: int = 8
    steps: int = 250
    batch_size: int = 4
    learning_rate: float = 3e-3
    seed: int = 0
    levels: tuple[int, int] | None = None

    def facts(self) -> dict[str, Any]:
        """What names a cached adapter: without `levels` as long as none are set."""
        return {k: v for k, v in asdict(self).items() if k != "levels" or v is not None}

    def timesteps(self, count: int) -> Tensor:
        """Timesteps of a schedule of `count`, to be drawn from evenly."""
        every = torch.arange(count)
        if self.levels is None:
            return every
        low, high = self.levels
        return torch.cat([every, low + every * (high - low) // count])


def projections(model: host.DiffusersModel, kind: Kind) -> dict[str, nn.Module]:
    """Name to linear layer of everything a kind changes."""
    layers = dict(host.cross_attention_layers(model.unet))
    if kind.self_attention:
        layers |= {name: module for name, module in model.unet.named_modules() if name.endswith(".attn1")}
    found: dict[str, nn.Module] = {}
    for name, attn in layers.items():
        for which in kind.projections:
            found[f"{name}/{which}"] = attn.to_out[0] if which == "to_out" else getattr(attn, which)
    return found


def _sees_text(name: str) -> bool:
    return name.endswith((".attn2/to_k", ".attn2/to_v"))


@contextmanager
def attached(
    model: host.DiffusersModel,
    kind: Kind,
    parts: Sequence[tuple[LowRankAdapter | None, float]],
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
    own = {name: module for name, module in modules.items() if kind.token_wise and _sees_text(name)}
    if own:
        handles += hook_values(own, state)

        def publish(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if mask is None:
                return
            rows = args[0].shape[0]
            if rows == 2 * mask.shape[0]:
                state.mask = torch.cat([mask if both_branches else torch.zeros_like(mask), mask])
            else:
                state.mask = mask

        handles.append(model.unet.register_forward_pre_hook(publish, with_kwargs=True))
    for name, module in modules.items():
        if kind.gated:
            handles.append(module.register_forward_hook(_gated(name, parts)))
        elif name not in own:
            handles.append(module.register_forward_hook(_everywhere(name, parts)))
    try:
        yield state
    finally:
        remove_hooks(handles)
        state.clear()


def _everywhere(name: str, parts: Sequence[tuple[LowRankAdapter | None, float]]) -> Any:
    """A LoRA: the delta at every row of every branch. Summing deltas is merging the weights."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for adapter, strength in parts:
            delta = None if adapter is None or strength == 0 else adapter.delta(name, output.device, output.dtype)
            if delta is not None:
                down, up, scale = delta
                output = output + (inputs[0] @ down.t() @ up.t()) * (scale * strength)
        return output

    return hook


class GatedAdapter(LowRankAdapter):
    """Perfusion's: `up` of a value layer is o* [d_v, 1] and learns; `down` is C⁻¹ i* [1, d_ctx] and does not."""

    def parameters(self) -> list[Tensor]:
        return [self.up[layer] for layer in sorted(self.up) if layer != _TARGET]


def _gated(name: str, parts: Sequence[tuple[LowRankAdapter | None, float]]) -> Any:
    used = [(adapter, strength) for adapter, strength in parts if adapter is not None and strength != 0]

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not used:
            return output
        targets = torch.cat([a.down[_TARGET] for a, _ in used])  # i* [n, d]
        directions = torch.cat([next(v for k, v in a.down.items() if k != _TARGET) for a, _ in used])  # C⁻¹ i*
        strength = output.new_tensor([s for _, s in used])
        with torch.no_grad():
            gram = targets @ directions.t()
            sims = inputs[0] @ directions.t()  # [B, L, n]
            within = sims @ torch.linalg.pinv(gram, rtol=1e-3)  # of e in the span of all i*, as a mix of them
            gates = torch.sigmoid((sims / gram.diagonal() - BETA) / TAU) * strength
            base = F.linear(targets, module.weight)  # W i*
        new = base if name.endswith("/to_k") else torch.cat([a.up[name] for a, _ in used], dim=1).t()
        return output - (within * strength) @ base + gates @ new

    return hook


def _gated_adapter(model: host.DiffusersModel, kind: Kind, info: AdapterInfo, rows: Tensor) -> GatedAdapter:
    """A fresh one, which starts as the class word's own value. rows: encodings of the class word [n, d]."""
    target = rows.mean(dim=0, keepdim=True)
    direction = torch.linalg.solve(second_moment(model), target.t()).t().contiguous()
    down, up = {_TARGET: target}, {_TARGET: torch.ones(1, 1)}
    for name, module in projections(model, kind).items():
        if name.endswith("/to_v"):
            down[name], up[name] = direction.clone(), F.linear(target, module.weight).detach().t().contiguous()
    return GatedAdapter(info, down, up)


@torch.no_grad()
def second_moment(model: host.DiffusersModel, captions: int = 300) -> Tensor:
    """Mean of e eᵀ over the words of pretraining captions, [d, d], with a little ridge."""
    rows = []
    for seed in range(captions):
        objects, background = scenes.scene_layout(40_000_000 + seed)
        caption, _ = scenes.describe(np.random.default_rng(seed), objects, background)
        words = len(scenes.caption_words(caption))
        rows.append(host.encode_text(model, caption).context[0, 1 : 1 + words].float())
    e = torch.cat(rows)
    moment = e.t() @ e / len(e)
    return moment + 1e-3 * moment.diagonal().mean() * torch.eye(len(moment))


class _WithLoss(torch.autograd.Function):
    """A prediction that carries a second loss: its gradient is added when the first one's arrives."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, extra: Tensor) -> Tensor:
        return prediction.view_as(prediction)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], gradients[0].new_ones(())


def key_change(adapter: LowRankAdapter, batch: TrainBatch) -> Tensor:
    """TARA's token alignment loss where the concept's token is the class word: mean |new key − old key| there."""
    rows = batch.context[batch.mask[..., 0] > 0]
    changes = []
    for name in adapter.down:
        if name.endswith(".attn2/to_k"):
            down, up = adapter.down[name], adapter.up[name]
            changes.append((rows @ down.t() @ up.t() * adapter.scale(name)).abs().mean())
    return torch.stack(changes).mean()


def pictures_of(name: str, learning: Learning) -> tuple[Tensor, Tensor]:
    """Training pictures of a concept, [n, 3, H, W] in -1..1, and where it is in them, [n, 1, H, W]."""
    drawn = scenes.draw_concept_scenes(name, learning.images, learning.image_seed)
    images = np.stack([scene.image for scene in drawn])
    masks = np.stack([scene.masks[:1] for scene in drawn])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0, torch.from_numpy(masks)


@torch.no_grad()
def subject_masks(model: host.DiffusersModel, images: Tensor, concept: Concept, noises: int = 4) -> Tensor:
    """Masks from the model's own attention, [n, 1, H, W] in 0..1 (AttenCraft: norm(self⁴ · norm(cross²))).

    cross is the class word's map, self the pixel-to-pixel attention, both at full latent size, means over layers,
    heads and `noises` draws at noise level 300; self⁴ is a matrix power, cross² element by element, norm min-max.
    """
    latents = host.encode_images(model, images)
    cond = host.encode_text(model, f"a <{concept.name}>", [concept])
    rows = list(cond.bindings[0].rows)
    context = cond.context.expand(len(latents), -1, -1)
    full = {name for name, factor in host.layer_factors(model.unet).items() if factor == 1}
    layers = {name: module for name, module in model.unet.named_modules() if name in full}
    layers |= {name: module for name, module in model.unet.named_modules() if name.replace(".attn1", ".attn2") in full}
    seen: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    handles = []
    for name, attn in layers.items():
        for which in ("to_q", "to_k"):

            def keep(module: nn.Module, inputs: Any, output: Tensor, name: str = name, which: str = which) -> None:
                seen[name][which] = output

            handles.append(getattr(attn, which).register_forward_hook(keep))
    cross, own = torch.zeros(()), torch.zeros(())
    alpha = float(model.alphas_cumprod[300])
    try:
        for draw in range(noises):
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(draw))
            host.call_unet(model, alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise, 300, context)
            for name, attn in layers.items():
                q, k = (seen[name][s].unflatten(-1, (attn.heads, -1)).transpose(1, 2) for s in ("to_q", "to_k"))
                share = torch.softmax(q @ k.transpose(-1, -2) * attn.scale, dim=-1).mean(dim=1)
                if name in full:
                    cross = cross + share[..., rows].mean(dim=-1)
                else:
                    own = own + share
    finally:
        remove_hooks(handles)

    def norm(x: Tensor) -> Tensor:
        low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
        return (x - low) / (high - low).clamp(min=1e-8)

    own = own / own.sum(dim=-1, keepdim=True)
    mask = norm((torch.linalg.matrix_power(own, 4) @ norm(cross**2)[..., None])[..., 0])
    mask = mask.view(len(images), 1, *latents.shape[-2:])
    return F.interpolate(mask, size=images.shape[-2:], mode="nearest")


def learn(
    model: host.DiffusersModel, name: str, kind_name: str, learning: Learning, cache: Path,
    on_event: Any = None,
) -> LowRankAdapter:  # fmt: skip
    """The adapter of one concept, from the cache if it was learned before on this very model.

    on_event: called with the core's TrainEvent after each step; may raise to stop.
    """
    kind = KINDS[kind_name]
    key = hashlib.sha256(
        json.dumps([fingerprint(model, pictures=False), name, kind_name, asdict(kind), learning.facts()]).encode()
    ).hexdigest()[:12]
    path = cache / f"{kind_name}-{name}-{key}.safetensors"
    if path.exists():
        return _read(path)
    concept = Concept(name, CONCEPTS[name].class_word)
    shapes = {n: (m.in_features, m.out_features) for n, m in projections(model, kind).items()}
    info = AdapterInfo(
        name, concept.class_word, base=model.family, context_dim=model.unet.config.cross_attention_dim,
        rank=1 if kind.gated else learning.rank, alpha=1.0 if kind.gated else float(learning.rank),
    )  # fmt: skip
    images, masks = pictures_of(name, learning)
    given = {"": None, "given": masks}.get(kind.masks)
    if kind.masks == "attention":
        given = subject_masks(model, images, concept)
    data = host.training_data(model, images, concept, model.templates or ("a {}",), given)
    if kind.gated:
        rows = torch.stack([prompt.context[list(prompt.rows)].mean(dim=0) for prompt in data.prompts]).float()
        adapter: LowRankAdapter = _gated_adapter(model, kind, info, rows)
    else:
        adapter = LowRankAdapter.create(shapes, info, learning.seed)
    config = TrainConfig(
        steps=learning.steps, batch_size=learning.batch_size, learning_rate=learning.learning_rate * kind.rate,
        seed=learning.seed, prediction_type=model.prediction_type,
    )  # fmt: skip
    levels = learning.timesteps(len(model.alphas_cumprod))
    with attached(model, kind, [(adapter, 1.0)], None) as state:

        def denoise(batch: TrainBatch) -> Tensor:
            state.mask = batch.mask
            out = host.call_unet(model, batch.x_t, levels[batch.timesteps], batch.context)
            return _WithLoss.apply(out, kind.align * key_change(adapter, batch)) if kind.align else out

        result = train(adapter, data, model.alphas_cumprod[levels], denoise, config, on_event=on_event)
    tensors = {f"{n}|down": t.contiguous() for n, t in adapter.down.items()}
    tensors |= {f"{n}|up": t.contiguous() for n, t in adapter.up.items()}
    tail = float(np.mean(result.losses[-50:]))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, str(part), {"info": json.dumps(asdict(info)), "loss": str(tail), "seconds": str(result.seconds)})
    part.replace(path)
    return adapter


def _read(path: Path) -> LowRankAdapter:
    with safe_open(str(path), framework="pt") as file:
        info = AdapterInfo(**json.loads(file.metadata()["info"]))
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a mapping)
    sides = {side: {k.split("|")[0]: v for k, v in tensors.items() if k.endswith(side)} for side in ("down", "up")}
    return LowRankAdapter(info, sides["down"], sides["up"])


def open_model(source: str) -> host.DiffusersModel:
    """The built-in demo model ("demo"), or another checkpoint file of its format: a variant trained otherwise."""
    built_in = checkpoint.load
    if source != "demo":
        checkpoint.load = lambda path=source: built_in(path)  # the host knows only the built-in file
    try:
        model = host.load_model("demo")
    finally:
        checkpoint.load = built_in
    model.source = source
    # A tenth faster on a CPU, with the same sums.
    for part in (model.unet, model.vae):
        part.to(memory_format=torch.channels_last)
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


def as_product(adapter: LowRankAdapter) -> LowRankAdapter:
    """A value adapter of this laboratory under the product's layer names."""
    return LowRankAdapter(
        adapter.info,
        {k.removesuffix("/to_v"): v for k, v in adapter.down.items()},
        {k.removesuffix("/to_v"): v for k, v in adapter.up.items()},
    )
