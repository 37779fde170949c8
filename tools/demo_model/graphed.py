"""A training step recorded once and played back as one CUDA graph: a small model's kernels end before the next begins.

Everything between a batch and the moved weights is recorded, forward pass to optimisers. The rate changes from step to
step, and a recording holds its numbers; so the optimisers move at rate 1, and of what they moved the rate's share is
kept. Both AdamW and Muon move by the rate times what does not depend on it. On an H200 the losses of 150 recorded steps
were those of the same steps started one by one, to the last digit but one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Learn = Callable[[dict[str, torch.Tensor], bool], tuple[torch.Tensor, bool]]
"""What is done with a batch: from it and whether it is the last, what it says of its losses and whether it was."""


class Moves:
    """The steps of several optimisers at one rate."""

    def __init__(self, optimisers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimisers = optimisers
        self.groups = [group for one in optimisers for group in one.param_groups]

    def at(self, rate: float) -> None:
        """The rate of the steps to come."""
        for group in self.groups:
            group["lr"] = rate

    def move(self) -> None:
        """One step of each optimiser."""
        for one in self.optimisers:
            one.step()


class RecordedMoves(Moves):
    """The same with the rate as a tensor, which a recording reads."""

    def __init__(self, optimisers: Sequence[torch.optim.Optimizer], device: torch.device | str) -> None:
        super().__init__(optimisers)
        self.now = torch.zeros((), device=device)
        self.parameters = [one for group in self.groups for one in group["params"]]
        super().at(1.0)
        for group in self.groups:
            group["capturable"] = True

    def at(self, rate: float) -> None:
        self.now.fill_(rate)

    @torch.no_grad()
    def move(self) -> None:
        before = [one.clone() for one in self.parameters]
        super().move()
        torch._foreach_sub_(self.parameters, before)
        torch._foreach_mul_(self.parameters, self.now)
        torch._foreach_add_(self.parameters, before)


class Recorded:
    """`learn`, played back from the fourth batch on; all have one shape. Random numbers are drawn anew each time.

    Right in one process: whether a batch was the last is then what is given.
    """

    def __init__(self, learn: Learn) -> None:
        self.learn, self.taken = learn, 0
        self.graph = torch.cuda.CUDAGraph()
        self.batch: dict[str, torch.Tensor] = {}
        self.said = torch.empty(0)

    def __call__(self, batch: dict[str, torch.Tensor], last: bool) -> tuple[torch.Tensor, bool]:
        """The first three are taken beside the others' stream, which sets up libraries and the optimisers' state."""
        self.taken += 1
        if self.taken <= 3:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                said, _ = self.learn(batch, last)
            torch.cuda.current_stream().wait_stream(stream)
            return said, last
        if self.taken == 4:
            self.batch = {name: one.clone() for name, one in batch.items()}
            with torch.cuda.graph(self.graph):
                self.said, _ = self.learn(self.batch, last)
        for name, held in self.batch.items():
            held.copy_(batch[name])
        self.graph.replay()
        return self.said, last
