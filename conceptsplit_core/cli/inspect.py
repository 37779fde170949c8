"""``inspect``: what a value adapter file says and holds."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from ..adapters.base import BASES, KINDS
from ..adapters.file import load_adapter, save_adapter
from ..adapters.low_rank import LowRankAdapter
from ..adapters.table import TableAdapter
from ..errors import ConceptSplitError
from ..files import check_place, user_path


def run(arguments: argparse.Namespace) -> None:
    """Prints to stdout; with --svd and --out also writes a truncated file."""
    if arguments.out and not arguments.svd:
        raise ConceptSplitError("--out writes a truncated adapter: say to which rank with --svd.")
    target = user_path(arguments.out) if arguments.out else None
    if target is not None:
        if target.suffix != ".safetensors":
            raise ConceptSplitError(f"--out {target} must end in .safetensors.")
        if os.path.lexists(target):
            raise ConceptSplitError(f"--out {target} exists and is kept: give a new name.")
        check_place(target)
    path = user_path(arguments.file)
    adapter: Any = load_adapter(path)
    info = adapter.info
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in adapter.parameters()})
    print(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB, {len(adapter.layers)} layers, {', '.join(dtypes)}")
    print(f"  concept     <{info.concept}>, class word {info.class_word or '(the file does not say)'}")
    print(f"  kind        {info.kind}, {KINDS[info.kind].label}")
    print(f"  made for    {BASES.get(info.base, info.base)}, text width {info.context_dim}, {info.prediction_type}")
    print(f"  rank        {info.rank}, alpha {info.alpha:g}")
    print(f"  written by  {info.library_version or '(another program)'}, format {info.format_version}")
    if info.training:
        print(f"  training    {json.dumps(info.training, ensure_ascii=False)}")
    total = _low_rank(adapter) if isinstance(adapter, LowRankAdapter) else _table(adapter)
    if total == 0:
        print("  This adapter changes nothing: its up weights are all zero.")
    if arguments.svd:
        smaller, error = adapter.truncated(arguments.svd)
        print(
            f"  truncated to rank {arguments.svd}: relative error {100 * error:.2f} %, "
            f"{smaller.nbytes() / 2**20:.2f} MiB in half precision"
        )
        if target is not None:
            save_adapter(smaller, target)
            print(f"  written to {target}")
    if arguments.model:
        from ..hosts.diffusers import network_map
        from .common import open_model

        model = open_model(arguments)
        network = network_map(model)
        adapter.check_fits(network.shapes(adapter.sites), network.family)
        print(f"  fits the model {arguments.model}")


def _low_rank(adapter: LowRankAdapter) -> float:
    """Prints each layer's pair; the norm of the whole change."""
    total = 0.0
    print(f"  {'layer':64} {'rank':>4} {'shape':>12} {'norm of delta':>14}")
    for layer, (wide, tall) in sorted(adapter.layers.items()):
        # ‖BA‖ by traces of the small r × r products: the full matrix is never formed.
        a, b = adapter.down[layer].double(), adapter.up[layer].double()
        norm = float(((a @ a.t()) * (b.t() @ b)).sum().clamp(min=0).sqrt()) * abs(adapter.scale(layer))
        total += norm**2
        print(f"  {layer:64} {adapter.rank_of(layer):4d} {f'{tall} × {wide}':>12} {norm:14.4f}")
    print(f"  {'all layers':64} {'':4} {'':12} {total**0.5:14.4f}")
    return total


def _table(adapter: TableAdapter) -> float:
    """Prints each module's tensor; the norm of all."""
    total = 0.0
    print(f"  {'layer':64} {'shape':>17} {'norm':>14}")
    for site, tensor in sorted(adapter.own.items()):
        norm = float(tensor.double().norm())
        total += norm**2
        print(f"  {site:64} {' × '.join(map(str, tensor.shape)):>17} {norm:14.4f}")
    return total
