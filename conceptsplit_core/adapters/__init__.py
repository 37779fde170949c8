"""What a user has: adapters of every kind, and their files."""

from importlib import import_module

from ..kinds import FILES
from .base import BASES, KINDS, Adapter, AdapterInfo, Kind, Member, TrainedAdapter, family, kind_of, register
from .file import adapter_bytes, canonical_key, load_adapter, parse_adapter, save_adapter
from .gated import GatedAdapter
from .low_rank import LowRankAdapter
from .table import TableAdapter, TableKind

for _file in dict.fromkeys(FILES.values()):
    import_module(f".{_file}", __name__)  # registers its kinds

__all__ = [
    "BASES",
    "KINDS",
    "Adapter",
    "AdapterInfo",
    "GatedAdapter",
    "Kind",
    "LowRankAdapter",
    "Member",
    "TableAdapter",
    "TableKind",
    "TrainedAdapter",
    "adapter_bytes",
    "canonical_key",
    "family",
    "kind_of",
    "load_adapter",
    "parse_adapter",
    "register",
    "save_adapter",
]
