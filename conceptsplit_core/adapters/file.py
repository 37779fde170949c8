"""Value adapters: parameters, deltas, names and files.

A value adapter is, for every cross-attention layer, a low-rank pair A [r, d_ctx], B [d_v, r] on the value
projection (paper, token-wise value adaptation): A_C(c) = s · (α/r) · B A c.

Layers are named as diffusers names them, without a suffix, for instance
``down_blocks.0.attentions.0.transformer_blocks.0.attn2``, so that a file means the same in every host.
"""

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
from .base import FORMAT_VERSION, AdapterInfo, family
from .value import ValueAdapter

FORMAT = "conceptsplit.value_adapter"
MAX_BYTES = 512 * 1024 * 1024
MAX_VALUE = 65504.0  # float16's largest; trained values stay below 10, a flipped exponent bit makes 1e38
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

# Every spelling of a value adapter's keys that is in use: this project's and diffusers' own
# (`.lora_A.weight`), peft with an adapter name, kohya-like down/up, and the paper's trainer, whose wrapped layers
# put `original_linear` into the name.
_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?:unet\.)?(?P<layer>(?:down_blocks|up_blocks|mid_block)\.[\w.]*?attn2)"
    r"\.(?:processor\.)?to_v(?:_lora)?(?:\.original_linear)?"
    r"\.(?:lora\.)?(?P<side>lora_A|lora_B|down|up|lora_down|lora_up)(?:\.[\w-]+)?\.weight$"
)


def canonical_key(key: str) -> tuple[str, str] | None:
    """(layer, 'down' or 'up') of a tensor name, or None when it is not part of a value adapter."""
    match = _KEY.match(key)
    if match is None:
        return None
    side = "down" if match["side"] in ("lora_A", "down", "lora_down") else "up"
    return match["layer"], side


def save_adapter(
    adapter: ValueAdapter, path: str | os.PathLike[str], dtype: torch.dtype | None = torch.float16
) -> None:
    """Writes one safetensors file, whole or not at all.

    Args:
        dtype: storage precision; None keeps each tensor's own.

    Raises:
        ConceptSplitError: not finite or too large for half precision (the layer is named), or the file cannot be
            written.
    """
    write_whole(path, adapter_bytes(adapter, dtype))


def adapter_bytes(adapter: ValueAdapter, dtype: torch.dtype | None = torch.float16) -> bytes:
    """The file's content as `save_adapter` writes it."""
    tensors: dict[str, Tensor] = {}
    for layer in sorted(adapter.down):
        for side, tensor in (("lora_A", adapter.down[layer]), ("lora_B", adapter.up[layer])):
            stored = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
            if not largest(stored) <= MAX_VALUE:
                raise ConceptSplitError(
                    f"Value adapter '{adapter.info.concept}' holds values that are not finite or far too large in "
                    f"{layer}: train it again with a lower learning rate."
                )
            tensors[f"unet.{layer}.to_v.{side}.weight"] = stored
    info = asdict(adapter.info)
    metadata = {"format": FORMAT, **{k: v if isinstance(v, str) else json.dumps(v) for k, v in info.items()}}
    return save_tensors(tensors, metadata=metadata)


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


def load_adapter(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> ValueAdapter:
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
    return parse_adapter(data, name)


def parse_adapter(data: bytes, name: str = "the file") -> ValueAdapter:
    """`load_adapter` for bytes in memory; `name` is how messages call them."""
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

    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        parsed = canonical_key(key)
        if parsed is None:
            raise ConceptSplitError(
                f"{name} contains {key[:100]!r}, which is not a value projection (attn2.to_v) of a UNet: it is "
                "another kind of adapter; load it with the node made for it."
            )
        if tensor.dtype not in _DTYPES:
            raise ConceptSplitError(f"{name} stores {key[:100]!r} as {tensor.dtype}; value adapters are float16 to 64.")
        if not (reach := largest(tensor)) <= MAX_VALUE:
            raise ConceptSplitError(
                f"{name} holds values that are not finite or far too large ({reach:.3g}) in {key[:100]!r}: it is "
                "damaged; download or train it again."
            )
        layer, side = parsed
        table = down if side == "down" else up
        if layer in table:
            raise ConceptSplitError(f"{name} holds layer {layer} twice under different names: the file is damaged.")
        table[layer] = tensor
    if not down:
        raise ConceptSplitError(f"{name} holds no value adapter (no attn2.to_v tensors): choose an adapter file.")

    first = next(iter(down.values()))
    context_dim = found.get("context_dim") or (first.shape[1] if first.ndim == 2 else 0)
    rank = found.get("rank") or max((t.shape[0] for t in down.values() if t.ndim == 2), default=0)
    stem = re.sub(r"[^\w.\-]", "_", Path(name).stem).strip("_.-") or "concept"
    info = AdapterInfo(
        concept=found.get("concept") or stem,
        class_word=found.get("class_word", ""),
        base=found.get("base") or family(context_dim),
        context_dim=context_dim,
        rank=rank,
        # A file that does not say otherwise was trained with alpha = rank, as peft and the paper's trainer do.
        alpha=float(found.get("alpha") or rank),
        prediction_type=found.get("prediction_type", "epsilon"),
        training=found.get("training", {}),
        library_version=found.get("library_version", ""),
        format_version=version,
    )
    if not 0 < info.rank <= 65536 or not abs(info.alpha) < 1e6:
        raise ConceptSplitError(f"{name} says rank {info.rank} and alpha {info.alpha}, which is not possible.")
    return ValueAdapter(info, down, up)
