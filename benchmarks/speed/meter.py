"""Counts what a program costs, the same on every machine: floating-point operations and peak memory.

Both are read from the tensor operations as they are dispatched, so they also work on fake tensors, which have shapes
but no storage: a full-size SDXL is counted on a laptop. Weights are not counted as activations; `weight_bytes` does
that.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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


# The fused attention of CPUs, which torch's own table leaves out; counted by torch's formulas for the GPU's.
EXTRA_OPERATORS: Mapping[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _flash_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
}


@dataclass
class Cost:
    """What one block of code did.

    flops: floating-point operations of matrix products, convolutions and attention (two per multiply-add).
    peak: bytes alive at the worst moment, of tensors that the block itself made.
    kept: bytes still alive at the block's end, counted the same way.
    marked: bytes alive when `mark` was called (at the end of a forward pass: what is kept for the backward).
    operators: how often each operator ran.
    started: operations that make or change a tensor. Views are free; each of these is one launch or more on a GPU,
        whatever its size.
    kinds: flops of each kind of operator: attention, convolutions, linear layers.
    """

    flops: int = 0
    peak: int = 0
    kept: int = 0
    marked: int = 0
    started: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)

    _live: int = 0

    def mark(self) -> None:
        self.marked = self._live

    def restart_peak(self) -> int:
        """The peak since the last call, in bytes; the next one counts from what is alive now."""
        peak, self.peak = self.peak, self._live
        return peak


KINDS = ("attention", "convolutions", "linear layers")
REST = "everything else"


def _formula(packet: Any) -> Callable[..., int] | None:
    """How an operator's floating-point operations are counted; None where they are not."""
    return EXTRA_OPERATORS.get(packet) or flop_registry.get(packet)


def _kind(operator: str) -> str:
    return KINDS[0] if "attention" in operator else KINDS[1] if "convolution" in operator else KINDS[2]


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
        count = _formula(packet)
        if count is None and func is not torch.ops.prim.device.default:
            # Under inference mode composite operators (linear, matmul) arrive whole.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self.cost.operators[packet.__name__] += 1
        if count is not None:
            flops = count(*args, **kwargs, out_val=out)
            self.cost.flops += flops
            self.cost.kinds[_kind(packet.__name__)] += flops
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


class _Clock(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        kind = _kind(packet.__name__) if _formula(packet) else REST
        began = time.process_time()
        out = func(*args, **(kwargs or {}))
        self.seconds[kind] += time.process_time() - began
        return out


def seconds_by_kind(programs: Sequence[Callable[[], object]], rounds: int) -> list[dict[str, float]]:
    """Median processor seconds that each program spends in each kind of operator, outside inference mode. They run in
    turn, as in `in_turn`."""
    clocks: list[list[Counter[str]]] = [[] for _ in programs]

    def clocked(which: int) -> Callable[[], None]:
        def run() -> None:
            with _Clock() as clock:
                programs[which]()
            clocks[which].append(clock.seconds)

        return run

    in_turn([clocked(which) for which in range(len(programs))], rounds)
    # The first run of each is in_turn's unmeasured one.
    return [{kind: statistics.median(one[kind] for one in taken[1:]) for kind in (*KINDS, REST)} for taken in clocks]


class Answers(TorchDispatchMode):
    """Answers what fake tensors cannot: how many rows are bound, and which way a decision goes.

    rows: text rows per concept over the whole batch.
    concepts: how many concepts are bound.
    decide: what every yes-or-no read from a tensor is: with True a loss counts as not zero and a gradient as finite,
        with False the maps count as apart already. Every other number read is 1, and equal shapes are equal tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.concepts, self.decide = 1, 2, True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.nonzero.default:
            # 1-D: which text rows any concept uses; 2-D: the places of one concept.
            count = self.rows * self.concepts if args[0].ndim == 1 else self.rows
            return torch.empty(count, args[0].ndim, dtype=torch.int64)
        if func is aten.equal.default:
            return args[0].shape == args[1].shape
        if func is aten._local_scalar_dense.default:
            kind = args[0].dtype
            return self.decide if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        return func(*args, **(kwargs or {}))


@contextmanager
def fake() -> Iterator[Answers]:
    """Inside, every tensor has a shape and no storage. Build the model inside too."""
    with FakeTensorMode(allow_non_fake_inputs=True), Answers() as answers:
        yield answers


@contextmanager
def measured() -> Iterator[Cost]:
    """Counts the operations inside; on real tensors and on fake ones."""
    cost = Cost()
    with _Meter(cost):
        yield cost
    cost.kept = cost._live


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def in_turn(programs: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median processor seconds of each program, after one unmeasured run each; every second round runs backwards.

    A program may time itself: then it gives a float.
    """
    for program in programs:
        program()
    taken: list[list[float]] = [[] for _ in programs]
    for turn in range(rounds):
        order = range(len(programs))
        for which in order if turn % 2 == 0 else reversed(order):
            began = time.process_time()
            told = programs[which]()
            taken[which].append(told if isinstance(told, float) else time.process_time() - began)
    return [statistics.median(times) for times in taken]


def alternate(ours: Callable[[], object], peer: Callable[[], object], rounds: int) -> tuple[float, float]:
    """`in_turn` of two programs."""
    mine, theirs = in_turn((ours, peer), rounds)
    return mine, theirs
