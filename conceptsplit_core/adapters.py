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
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from . import __version__
from .attention import Delta
from .errors import ConceptSplitError

FORMAT = "conceptsplit.value_adapter"
FORMAT_VERSION = 1
MAX_BYTES = 512 * 1024 * 1024
# Room for SDXL's 140 tensors thirty times over. JSON may take forty times its length in memory, so this bounds it.
MAX_HEADER_BYTES = 1024 * 1024
MAX_VALUE = 65504.0  # float16's largest; trained values stay below 10, a flipped exponent bit makes 1e38
BASES = {"sd15": "SD1.5", "sd21": "SD2.1", "sdxl": "SDXL", "demo": "the ConceptSplit demo model", "unknown": "unknown"}
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


@dataclass(frozen=True)
class AdapterInfo:
    """What a file says about its adapter. `rank` may differ per layer after truncation; this is the largest."""

    concept: str
    class_word: str
    base: str = "unknown"
    context_dim: int = 0
    rank: int = 0
    alpha: float = 0.0
    prediction_type: str = "epsilon"
    training: dict[str, Any] = field(default_factory=dict)
    library_version: str = __version__
    format_version: int = FORMAT_VERSION


class ValueAdapter:
    """A concept's low-rank value deltas.

    Attributes:
        info: what is known about it.
        down: A per layer, [r, d_ctx].
        up: B per layer, [d_v, r].
    """

    def __init__(self, info: AdapterInfo, down: Mapping[str, Tensor], up: Mapping[str, Tensor]):
        if set(down) != set(up) or not down:
            odd = sorted(set(down) ^ set(up))
            raise ConceptSplitError(
                f"The value adapter '{info.concept}' has no complete layer: "
                + (f"layer {odd[0]} lacks one of its two matrices." if odd else "it holds no attn2.to_v tensors.")
            )
        for layer in down:
            a, b = down[layer], up[layer]
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
                raise ConceptSplitError(
                    f"Layer {layer} of value adapter '{info.concept}' has shapes {list(a.shape)} and {list(b.shape)}, "
                    "which do not form a low-rank pair [r, d_ctx], [d_v, r]: the file is damaged or of another kind."
                )
        self.info = info
        self.down = dict(down)
        self.up = dict(up)
        self._cache: dict[tuple[str, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @classmethod
    def create(cls, layers: Mapping[str, tuple[int, int]], info: AdapterInfo, seed: int) -> ValueAdapter:
        """A fresh adapter for training: A Gaussian with std 1/r, B zero, in fp32 on the CPU.

        Args:
            layers: layer name to (d_ctx, d_v).
            info: `rank` and `alpha` are taken from here.
            seed: the same seed gives the same A on every machine.
        """
        if info.rank < 1:
            raise ConceptSplitError(f"Rank {info.rank} is not possible: use 1 or more, for instance 8.")
        generator = torch.Generator().manual_seed(seed)
        down = {
            layer: torch.randn(info.rank, layers[layer][0], generator=generator) / info.rank for layer in sorted(layers)
        }
        up = {layer: torch.zeros(layers[layer][1], info.rank) for layer in sorted(layers)}
        return cls(info, down, up)

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Layer name to (d_ctx, d_v)."""
        return {layer: (self.down[layer].shape[1], self.up[layer].shape[0]) for layer in self.down}

    def rank_of(self, layer: str) -> int:
        return self.down[layer].shape[0]

    def scale(self, layer: str) -> float:
        """α/r. After truncation the factor stays α / the rank it was trained with."""
        rank = self.info.rank or self.rank_of(layer)
        alpha = self.info.alpha or float(rank)
        return alpha / rank

    def parameters(self) -> list[Tensor]:
        """All A and B, in a fixed order (layers sorted, A before B)."""
        return [tensor for layer in sorted(self.down) for tensor in (self.down[layer], self.up[layer])]

    def delta(self, layer: str, device: torch.device, dtype: torch.dtype) -> Delta | None:
        """(A, B, α/r) of a layer on `device` in `dtype`, or None if the adapter does not have that layer.

        Copies are made once per device and dtype. Tensors that require a gradient are returned as they are, moved
        if they must be: a copy would take training's gradient away.
        """
        if layer not in self.down:
            return None
        down, up = self.down[layer], self.up[layer]
        if down.requires_grad or up.requires_grad or (down.device == device and down.dtype == dtype):
            return down.to(device), up.to(device), self.scale(layer)
        key = (layer, device, dtype)
        if key not in self._cache:
            # Outside inference mode, so that a copy first made while sampling can also serve a gradient pass.
            with torch.inference_mode(False):
                self._cache[key] = (down.to(device, dtype), up.to(device, dtype))
        return (*self._cache[key], self.scale(layer))

    def detached(self, dtype: torch.dtype | None = None) -> ValueAdapter:
        """A copy that shares nothing, on the CPU, without gradients; usable outside and inside inference mode."""
        with torch.inference_mode(False), torch.no_grad():
            copy = lambda t: t.detach().to("cpu", dtype or t.dtype, copy=True)
            return ValueAdapter(
                self.info, {k: copy(v) for k, v in self.down.items()}, {k: copy(v) for k, v in self.up.items()}
            )

    def to(self, device: torch.device | str) -> ValueAdapter:
        """The adapter with all its tensors on `device`; those already there are shared, not copied."""
        return ValueAdapter(
            self.info,
            {layer: tensor.to(device) for layer, tensor in self.down.items()},
            {layer: tensor.to(device) for layer, tensor in self.up.items()},
        )

    def with_info(self, **changes: Any) -> ValueAdapter:
        """The same tensors under other facts, for instance another concept name."""
        return ValueAdapter(replace(self.info, **changes), self.down, self.up)

    def nbytes(self, dtype: torch.dtype = torch.float16) -> int:
        """Size of all tensors if stored as `dtype`."""
        return sum(t.numel() for t in self.parameters()) * torch.empty((), dtype=dtype).element_size()

    def truncated(self, rank: int) -> tuple[ValueAdapter, float]:
        """The best approximation of lower rank, and its relative error ‖ΔW − ΔW_r‖ / ‖ΔW‖ over all layers.

        By SVD of B A, computed from the small factors (QR of both sides), so the full d_v × d_ctx matrix is never
        formed. Singular values are shared between the factors evenly, which keeps half precision safe.
        """
        if rank < 1:
            raise ConceptSplitError(f"Cannot truncate to rank {rank}: use 1 or more.")
        down: dict[str, Tensor] = {}
        up: dict[str, Tensor] = {}
        lost = total = 0.0
        for layer in self.down:
            a, b = self.down[layer].detach().double(), self.up[layer].detach().double()
            qa, ra = torch.linalg.qr(a.t())  # a = raᵀ qaᵀ
            qb, rb = torch.linalg.qr(b)
            u, s, vh = torch.linalg.svd(rb @ ra.t())
            keep = min(rank, s.numel())
            total += float((s**2).sum())
            lost += float((s[keep:] ** 2).sum())
            root = s[:keep].sqrt()
            up[layer] = (qb @ u[:, :keep] * root).to(self.up[layer].dtype).contiguous()
            down[layer] = (root[:, None] * vh[:keep] @ qa.t()).to(self.down[layer].dtype).contiguous()
        # scale() divides alpha by info.rank: keeping both keeps the factor the adapter was trained with.
        training = {**self.info.training, "truncated_to_rank": rank}
        error = (lost / total) ** 0.5 if total > 0 else 0.0
        return ValueAdapter(replace(self.info, training=training), down, up), error

    def check_fits(self, layers: Mapping[str, tuple[int, int]], base: str = "unknown") -> None:
        """Refuses an adapter that is not made for the model with these layers.

        Raises:
            ConceptSplitError: another base family (both named), no layer in common, or a shape that differs.
        """
        mine = self.info.base
        if "unknown" not in (mine, base) and mine != base:
            raise ConceptSplitError(
                f"Value adapter '{self.info.concept}' was made for {BASES.get(mine, mine)}, but the model is "
                f"{BASES.get(base, base)}: load a checkpoint of that family or train the concept on this one."
            )
        strange = sorted(set(self.down) - set(layers))
        if len(strange) == len(self.down):
            raise ConceptSplitError(
                f"No layer of value adapter '{self.info.concept}' exists in this model (first: {strange[0]}): it was "
                "made for another architecture."
            )
        if strange:
            raise ConceptSplitError(
                f"Layer {strange[0]} of value adapter '{self.info.concept}' does not exist in this model: it was made "
                "for another architecture."
            )
        for layer, shape in self.layers.items():
            if shape != tuple(layers[layer]):
                raise ConceptSplitError(
                    f"Layer {layer} of value adapter '{self.info.concept}' maps {shape[0]} to {shape[1]} values, the "
                    f"model's maps {layers[layer][0]} to {layers[layer][1]}: it was made for another model family."
                )


def family(context_dim: int, demo: bool = False) -> str:
    """Base family by the width of the text rows: 768 SD1.5, 1024 SD2.1, 2048 SDXL."""
    return "demo" if demo else {768: "sd15", 1024: "sd21", 2048: "sdxl"}.get(context_dim, "unknown")


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file so that it is either the old one or the new one, never half of either.

    Raises:
        ConceptSplitError: the folder cannot be written to or the disk is full; the old file is untouched.
    """
    target = Path(path)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private; an adapter is as readable as any other file the user writes.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise ConceptSplitError(
            f"Cannot write {target}: {error.strerror or error}; free space or choose another folder."
        ) from error
    finally:
        if temporary is not None:
            try:
                os.unlink(temporary)
            except OSError:
                pass


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


def read_header(data: bytes, name: str) -> dict[str, Any]:
    """The JSON header of a safetensors file, with its sizes checked before anything is allocated.

    Raises:
        ConceptSplitError: cut off, larger than a header can be, or not a JSON table.
    """
    if len(data) < 8:
        raise ConceptSplitError(f"{name} is not a safetensors file: it ends after {len(data)} bytes.")
    (size,) = struct.unpack("<Q", data[:8])
    if size > min(MAX_HEADER_BYTES, len(data) - 8):
        raise ConceptSplitError(
            f"{name} is not a readable safetensors file (its header claims {size} bytes): it is damaged or of another "
            "format; download or train it again."
        )
    try:
        header = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError) as error:
        raise ConceptSplitError(
            f"{name} is not a readable safetensors file (its header is not JSON): it is damaged or of another format; "
            "download or train it again."
        ) from error
    if not isinstance(header, dict):
        raise ConceptSplitError(f"{name} is not a readable safetensors file: its header is not a table of tensors.")
    return header


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
