"""What a user has: adapters of every kind, and their files."""

from .base import BASES, KINDS, Adapter, AdapterInfo, Kind, Member, family, kind_of, register
from .file import adapter_bytes, canonical_key, load_adapter, parse_adapter, save_adapter
from .gated import GatedAdapter
from .low_rank import LowRankAdapter

__all__ = [
    "BASES",
    "KINDS",
    "Adapter",
    "AdapterInfo",
    "GatedAdapter",
    "Kind",
    "LowRankAdapter",
    "Member",
    "adapter_bytes",
    "canonical_key",
    "family",
    "kind_of",
    "load_adapter",
    "parse_adapter",
    "register",
    "save_adapter",
]
