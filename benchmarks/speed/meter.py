"""Counts what a program costs, the same on every machine: floating-point operations, operations started, peak memory.

They are read from the tensor operations as they are dispatched, so they also work on fake tensors, which have shapes
but no storage: a full-size SDXL is counted on a laptop. Weights are not counted as activations; `weight_bytes` does
that.
"""

from __future__ import annotations

import logging
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _added_product(out: Tensor, left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * left.numel() * right.shape[-1]


# What torch's own table leaves out: the fused attention of CPUs, counted by its formulas for the GPU's, and a product
# that is added in place.
EXTRA_OPERATORS: Mapping[Any, Callable[..., int]] = {
    aten.baddbmm_: _added_product,
    aten._scaled_dot_product_flash_attention_for_cpu: _flash_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
}


@dataclass
class Cost:
    """What one block of code did.

    flops: floating-point operations of matrix products, convolutions and attention (two per multiply-add).
    started: operations that make or change a tensor. Views are free; each of these is one launch or more on a GPU,
        whatever its size.
    peak: bytes alive at the worst moment, of tensors that the block itself made.
    """

    flops: int = 0
    started: int = 0
    peak: int = 0
    _live: int = 0

    def lap(self) -> Cost:
        """What was done since the last call; the next lap's peak counts from what is alive now."""
        done = Cost(self.flops, self.started, self.peak)
        self.flops, self.started, self.peak = 0, 0, self._live
        return done


class _Meter(TorchDispatchMode):
    """Adds up operations, and the storages that operators allocate until each is freed.

    Not FlopCounterMode itself, whose module hooks refuse `torch.autograd.grad`; its table of formulas is used.
    """

    def __init__(self, cost: Cost):
        super().__init__()
        self.cost = cost
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        count = EXTRA_OPERATORS.get(packet) or flop_registry.get(packet)
        if count is None and func is not torch.ops.prim.device.default:
            # Under inference mode composite operators (linear, matmul) arrive whole.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if count is not None:
            self.cost.flops += count(*args, **kwargs, out_val=out)
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = False
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given:
                    made = True
                    if storage._cdata not in self.known:
                        self._add(storage)
        # A comparison gives no tensor, and costs a launch and a wait.
        self.cost.started += made or func._schema.is_mutable or packet is aten.equal
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self.known.add(address)
        self.cost._live += size
        self.cost.peak = max(self.cost.peak, self.cost._live)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.cost._live -= size


class Answers(TorchDispatchMode):
    """Answers what fake tensors cannot: how many rows are bound, and which way a decision goes.

    Every yes-or-no read from a tensor is yes: a loss counts as not zero, a latent as finite. A whole number read is
    the number of concepts, a place that was looked up and every other number 1, and equal shapes are equal tensors.

    concepts: how many concepts are bound, one text row each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.concepts = 2
        self._places: set[int] = set()  # the storages of what was looked up, until each is freed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.nonzero.default:
            # 1-D: which text rows any concept uses, or which guidance branch; 2-D: the places of one concept.
            several = args[0].ndim == 1 and len(args[0]) > 2
            found = torch.empty(self.concepts if several else 1, args[0].ndim, dtype=torch.int64)
            storage = found.untyped_storage()
            self._places.add(storage._cdata)
            weakref.finalize(storage, self._places.discard, storage._cdata)
            return found
        if func is aten.equal.default:
            return args[0].shape == args[1].shape
        if func is aten._local_scalar_dense.default:
            kind = args[0].dtype
            if args[0].untyped_storage()._cdata in self._places:
                return 1
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else self.concepts
        return func(*args, **(kwargs or {}))


@contextmanager
def fake() -> Iterator[Answers]:
    """Inside, every tensor has a shape and no storage. Build the model inside too."""
    # A made-up number may read as a fault (two images whose maps are not finite), which costs a warning and no more.
    logging.disable(logging.WARNING)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Answers() as answers:
            yield answers
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def measured() -> Iterator[Cost]:
    """Counts the operations inside; on real tensors and on fake ones."""
    cost = Cost()
    with _Meter(cost):
        yield cost


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def in_turn(programs: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median processor seconds of each program, after one unmeasured run each; every second round runs backwards."""
    for program in programs:
        program()
    taken: list[list[float]] = [[] for _ in programs]
    for turn in range(rounds):
        order = range(len(programs))
        for which in order if turn % 2 == 0 else reversed(order):
            began = time.process_time()
            programs[which]()
            taken[which].append(time.process_time() - began)
    return [statistics.median(times) for times in taken]
