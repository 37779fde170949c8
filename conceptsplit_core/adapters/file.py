"""Adapter files: one safetensors file per concept, in the names of diffusers, so that files travel."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from .. import __version__
from ..errors import ConceptSplitError
from ..files import read_header, write_whole
from ..network.families import named_values
from ..network.site import Site
from .base import FORMAT_VERSION, KINDS, AdapterInfo, family, kind_of
from .lora import peft_alpha, peft_facts
from .low_rank import LowRank, LowRankAdapter

FORMAT = "conceptsplit.value_adapter"
MAX_BYTES = 512 * 1024 * 1024
MAX_VALUE = 65504.0  # float16's largest; trained values stay below 10, a flipped exponent bit makes 1e38
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

# Every spelling of a low-rank pair's key that is in use: this project's and diffusers' own (`.lora_A.weight`), peft
# with an adapter name, down/up, and the paper's trainer, whose wrapped layers put `original_linear` into the name.
_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?:unet\.)?(?P<layer>(?:down_blocks|up_blocks|mid_block)\.[\w.]*?attn[12])"
    r"\.(?:processor\.)?(?P<projection>to_q|to_k|to_v|to_out)(?:\.0)?(?:_lora)?(?:\.original_linear)?"
    r"(?:\.(?:lora\.)?(?P<side>lora_A|lora_B|down|up|lora_down|lora_up)(?:\.[\w-]+)?\.weight|\.(?P<alpha>alpha))$"
)
_DOWN = ("lora_A", "down", "lora_down")
# A transformer's pairs have this project's own spelling alone: nobody else writes value adapters for them.
_TRANSFORMER_KEY = re.compile(r"^transformer\.(?P<layer>[\w.]+)\.(?P<side>lora_A|lora_B)\.weight$")


def canonical_key(key: str) -> tuple[str, str] | None:
    """(projection, 'lora_A', 'lora_B' or 'alpha') of a tensor name, or None when it is no part of a low-rank pair."""
    match = _TRANSFORMER_KEY.match(key)
    if match is not None:
        return (match["layer"], match["side"]) if named_values(match["layer"]) else None
    match = _KEY.match(key)
    if match is None:
        return None
    site = f"{match['layer']}.{match['projection']}" + (".0" if match["projection"] == "to_out" else "")
    return site, "alpha" if match["alpha"] else "lora_A" if match["side"] in _DOWN else "lora_B"


def save_adapter(adapter: Any, path: str | os.PathLike[str], dtype: torch.dtype | None = torch.float16) -> None:
    """Writes one safetensors file, whole or not at all.

    Args:
        dtype: storage precision; None keeps each tensor's own.

    Raises:
        ConceptSplitError: not finite or too large for half precision (the layer is named), or the file cannot be
            written.
    """
    write_whole(path, adapter_bytes(adapter, dtype))


def save_trained(adapter: Any, path: str | os.PathLike[str], dtype: torch.dtype | None = torch.float16) -> None:
    """`save_adapter`, but what was trained routed becomes a LoRA file, see `lora_bytes`."""
    routed = adapter.info.training.get("routed") is True
    write_whole(path, lora_bytes(adapter, dtype) if routed else adapter_bytes(adapter, dtype))


def adapter_bytes(adapter: Any, dtype: torch.dtype | None = torch.float16) -> bytes:
    """The file's content as `save_adapter` writes it."""
    part = "transformer" if any(named_values(site) for site in adapter.sites) else "unet"
    tensors = {f"{part}.{name}": tensor for name, tensor in _stored(adapter, dtype).items()}
    info = asdict(adapter.info) | {"format_version": FORMAT_VERSION}
    metadata = {"format": FORMAT, **{k: v if isinstance(v, str) else json.dumps(v) for k, v in info.items()}}
    return save_tensors(tensors, metadata=metadata)


def lora_bytes(adapter: LowRankAdapter, dtype: torch.dtype | None = torch.float16) -> bytes:
    """Low-rank pairs as a LoRA file in kohya's names, which every program reads; it says its class word."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in _stored(adapter, dtype).items():
        site, side = name.removesuffix(".weight").rsplit(".", 1)
        key = f"lora_unet_{site.replace('.', '_')}"
        tensors[f"{key}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = tensor
        tensors[f"{key}.alpha"] = torch.tensor(adapter.scale(site) * adapter.rank_of(site)).to(tensor.dtype)
    return save_tensors(tensors, {"modelspec.trigger_phrase": adapter.info.class_word})


def _stored(adapter: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """An adapter's tensors on the CPU as a file holds them.

    Raises:
        ConceptSplitError: not finite or too large for `dtype`; the layer is named.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in kind_of(adapter).tensors(adapter).items():
        stored = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if not largest(stored) <= MAX_VALUE:
            raise ConceptSplitError(
                f"The adapter '{adapter.info.concept}' holds values that are not finite or far too large in "
                f"{name}: train it again with a lower learning rate."
            )
        tensors[name] = stored
    return tensors


def largest(tensor: Tensor) -> float:
    """The largest magnitude in a floating-point tensor, NaN where one is; needs no memory of the tensor's size."""
    if tensor.numel() == 0:
        return 0.0
    low, high = (float(end) for end in tensor.detach().aminmax())
    return max(-low, high) if low == low else low


def _info(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Fields of AdapterInfo found in a file's metadata, each of its own type; strange ones are refused."""
    known = {f.name: f for f in fields(AdapterInfo)}
    kinds: dict[str, tuple[type, ...]] = {
        "rank": (int,),
        "context_dim": (int,),
        "format_version": (int,),
        "alpha": (int, float),
        "training": (dict,),
    }
    found: dict[str, Any] = {}
    for key, text in metadata.items():
        if key not in known or not isinstance(text, str):
            continue
        if key not in kinds:
            found[key] = text
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        # A number of 400 digits is an int to JSON and too large for every use.
        huge = isinstance(value, (int, float)) and not abs(value) < 2**53
        if not isinstance(value, kinds[key]) or isinstance(value, bool) or huge:
            raise ConceptSplitError(f"{name} says {key} = {text[:40]!r}, which is not possible: the file is damaged.")
        found[key] = value
    return found


def load_adapter(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> Any:
    """Reads a value adapter from a safetensors file of this project, of diffusers or of the paper's trainer.

    Sizes are checked before anything is allocated; tensors that are not value projections are an error, because a
    file that would be applied in part only is not what it says it is.

    Raises:
        ConceptSplitError: unreadable, too large, another format, a newer version, or broken shapes or values.
    """
    source = Path(path)
    name = source.name
    try:
        if not source.is_file():
            raise ConceptSplitError(f"There is no file {source}: check the name, or train the adapter first.")
        size = source.stat().st_size
        if size > max_bytes:
            raise ConceptSplitError(
                f"{name} is {size / 2**20:.0f} MiB, more than a value adapter can be ({max_bytes / 2**20:.0f} MiB): it "
                "is probably a checkpoint; choose an adapter file."
            )
        data = source.read_bytes()
    except OSError as error:
        raise ConceptSplitError(f"Cannot read {source}: {error.strerror or error}.") from error
    return parse_adapter(data, name, config_beside(source))


def config_beside(source: Path) -> dict[str, Any] | None:
    """What peft has written beside a file that bears peft's own name."""
    beside = source.with_name("adapter_config.json")
    if source.stem != "adapter_model" and not source.stem.startswith("pytorch_lora"):
        return None
    try:
        found = json.loads(beside.read_bytes()[: 2**20])
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def parse_adapter(data: bytes, name: str = "the file", config: Mapping[str, Any] | None = None) -> Any:
    """`load_adapter` for bytes in memory.

    Args:
        name: how messages call them.
        config: what an `adapter_config.json` of peft says.
    """
    header = read_header(data, name)
    metadata = header.get("__metadata__") or {}
    if not isinstance(metadata, dict):
        raise ConceptSplitError(f"{name} has unreadable metadata: the file is damaged.")
    if metadata.get("format", FORMAT) not in (FORMAT, "pt"):
        raise ConceptSplitError(
            f"{name} is a {str(metadata.get('format'))[:60]!r} file, not a value adapter: choose an adapter file."
        )
    found = _info(metadata, name)
    version = found.get("format_version", FORMAT_VERSION)
    if not 1 <= version <= FORMAT_VERSION:
        raise ConceptSplitError(
            f"{name} is written in format version {version}; this ConceptSplit {__version__} reads up to "
            f"{FORMAT_VERSION}: update the node pack."
        )
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ConceptSplitError(
            f"{name} is not a readable safetensors file ({str(error).splitlines()[0][:100]}): it is damaged or of "
            "another format; download or train it again."
        ) from error

    kind = found.get("kind", "value")
    if kind not in KINDS:
        raise ConceptSplitError(
            f"{name} is an adapter of kind {kind[:60]!r}; this ConceptSplit {__version__} knows {', '.join(KINDS)}: "
            "update the node pack."
        )
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ConceptSplitError(f"{name} stores {key[:100]!r} as {tensor.dtype}; adapters are float16 to float64.")
        if not (reach := largest(tensor)) <= MAX_VALUE:
            raise ConceptSplitError(
                f"{name} holds values that are not finite or far too large ({reach:.3g}) in {key[:100]!r}: it is "
                "damaged; download or train it again."
            )
    pairs, alphas = _pairs(tensors, kind, name) if isinstance(KINDS[kind], LowRank) else (tensors, {})
    pairs = {key.removeprefix("unet."): tensor for key, tensor in pairs.items()}

    transformer = any(key.startswith("transformer.") for key in tensors)
    first = next((t for key, t in pairs.items() if key.endswith(".lora_A.weight")), None)
    context_dim = found.get("context_dim") or (first.shape[1] if first is not None and first.ndim == 2 else 0)
    rank = found.get("rank") or max(_ranks(pairs).values(), default=1)
    facts = {} if found.get("alpha") else peft_facts(metadata, config, name)
    stem = re.sub(r"[^\w.\-]", "_", Path(name).stem).strip("_.-") or "concept"
    info = AdapterInfo(
        concept=found.get("concept") or stem,
        class_word=found.get("class_word", ""),
        base=found.get("base") or ("unknown" if transformer else family(context_dim)),
        context_dim=context_dim,
        rank=rank,
        # A file that does not say otherwise was trained with alpha = rank, as the paper's trainer does.
        alpha=float(found.get("alpha") or peft_alpha(facts, "", rank) or rank),
        prediction_type=found.get("prediction_type", "epsilon"),
        training=found.get("training", {}),
        library_version=found.get("library_version", ""),
        format_version=version,
        kind=kind,
    )
    if not 0 < info.rank <= 65536 or not abs(info.alpha) < 1e6:
        raise ConceptSplitError(f"{name} says rank {info.rank} and alpha {info.alpha}, which is not possible.")
    for site, own_rank in _ranks(pairs).items():
        own = peft_alpha(facts, site, own_rank)
        if own is not None and site not in alphas and own / own_rank != info.alpha / info.rank:
            alphas[site] = torch.tensor(own)
    for site, alpha in alphas.items():
        up = pairs.get(f"{site}.lora_B.weight")
        if alpha.numel() != 1:
            raise ConceptSplitError(f"{name} holds {alpha.numel()} values of alpha for {site}, not one: it is damaged.")
        if up is None or up.ndim != 2:
            continue
        # Scales of single layers go into B, in a precision that they do not leave, so that one α/r holds for all.
        up = up.float() * (float(alpha) / max(1, up.shape[1]) * info.rank / info.alpha)
        if not (reach := largest(up)) <= MAX_VALUE:
            raise ConceptSplitError(
                f"{name} scales {site} by alpha to values far too large ({reach:.3g}): it is damaged."
            )
        pairs[f"{site}.lora_B.weight"] = up
    return KINDS[kind].read(pairs, info)


def _ranks(pairs: Mapping[str, Tensor]) -> dict[str, int]:
    """Ranks of low-rank pairs by site."""
    end = ".lora_A.weight"
    return {key.removesuffix(end): t.shape[0] for key, t in pairs.items() if key.endswith(end) and t.ndim == 2}


def _pairs(tensors: Mapping[str, Tensor], kind: str, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Low-rank pairs under this project's own names, and the scales of single layers.

    Raises:
        ConceptSplitError: a tensor that `kind` has no place for, or one that is there twice.
    """
    pairs: dict[str, Tensor] = {}
    alphas: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        parsed = canonical_key(key)
        values = parsed is not None and named_values(parsed[0])
        if parsed is None or not KINDS[kind].changes(Site(parsed[0], "", "text", values=values)):
            lora = re.search(r"lora|hada_|lokr_|dora", key) is not None
            raise ConceptSplitError(
                f"{name} contains {key[:100]!r}, which is not a value projection (attn2.to_v) of a UNet: it is "
                + (
                    "a LoRA; load it with LoRA Concept Loader (terminal: --lora)."
                    if lora
                    else "another kind of file; load it with the node made for it."
                )
            )
        site, side = parsed
        table, place = (alphas, site) if side == "alpha" else (pairs, f"{site}.{side}.weight")
        if place in table:
            raise ConceptSplitError(f"{name} holds layer {site} twice under different names: the file is damaged.")
        table[place] = tensor
    if not pairs:
        raise ConceptSplitError(f"{name} holds no value adapter (no attn2.to_v tensors): choose an adapter file.")
    return pairs, alphas
