"""A training step recorded once and played back as one CUDA graph: a small model's kernels end before the next begins.

Everything between a batch and the moved weights is recorded, forward pass to optimisers. The rate changes from step to
step, and a recording holds its numbers; so the optimisers move at rate 1, and of what they moved the rate's share is
kept. Both AdamW and Muon move by the rate times what does not depend on it. On an H200 the losses of 150 recorded steps
were those of the same steps started one by one, to the last digit but one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Learn = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""What is done with a batch, and what it says of its losses."""


class Rate:
    """The optimisers' rate, as a tensor that a recording reads."""

    def __init__(self, optimisers: Sequence[torch.optim.Optimizer], device: torch.device | str) -> None:
        self.optimisers = optimisers
        self.now = torch.zeros((), device=device)
        groups = [group for one in optimisers for group in one.param_groups]
        self.parameters = [one for group in groups for one in group["params"]]
        for group in groups:
            group |= {"lr": 1.0, "capturable": True}

    @torch.no_grad()
    def move(self) -> None:
        """One step of each optimiser."""
        before = [one.clone() for one in self.parameters]
        for one in self.optimisers:
            one.step()
        torch._foreach_sub_(self.parameters, before)
        torch._foreach_mul_(self.parameters, self.now)
        torch._foreach_add_(self.parameters, before)


class Recorded:
    """`learn`, played back from the fourth batch on; all have one shape. Random numbers are drawn anew each time."""

    def __init__(self, learn: Learn) -> None:
        self.learn, self.taken = learn, 0
        self.graph = torch.cuda.CUDAGraph()
        self.batch: dict[str, torch.Tensor] = {}
        self.said = torch.empty(0)

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The first three are taken beside the others' stream, which sets up libraries and the optimisers' state."""
        self.taken += 1
        if self.taken <= 3:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                said = self.learn(batch)
            torch.cuda.current_stream().wait_stream(stream)
            return said
        if self.taken == 4:
            self.batch = {name: one.clone() for name, one in batch.items()}
            with torch.cuda.graph(self.graph):
                self.said = self.learn(self.batch)
        for name, held in self.batch.items():
            held.copy_(batch[name])
        self.graph.replay()
        return self.said
