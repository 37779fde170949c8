"""What a user has: adapters of every kind, and their files."""

from .base import BASES, AdapterInfo, family
from .file import adapter_bytes, canonical_key, load_adapter, parse_adapter, save_adapter
from .value import ValueAdapter

__all__ = [
    "BASES",
    "AdapterInfo",
    "ValueAdapter",
    "adapter_bytes",
    "canonical_key",
    "family",
    "load_adapter",
    "parse_adapter",
    "save_adapter",
]
