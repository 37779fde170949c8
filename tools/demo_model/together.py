"""Several processes that train one model: each has its own pictures, and all take the mean of the gradients.

Started by `torchrun --nproc-per-node N -m tools.demo_model …`; without torchrun a training is alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Together:
    """This process's place among those of a training. Only place 0 writes and speaks."""

    place: int = 0
    count: int = 1

    def average(self, parameters: list[torch.nn.Parameter], done: bool) -> bool:
        """Each gradient becomes the mean over all processes; returns whether any of them is done."""
        if self.count == 1:
            return done
        gradients = [one.grad for one in parameters if one.grad is not None]
        flat = torch.cat([*(one.flatten() for one in gradients), torch.tensor([float(done)])])
        dist.all_reduce(flat)
        *means, ended = flat.split([*(one.numel() for one in gradients), 1])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient) / self.count)
        return bool(ended)

    def leave(self) -> None:
        """The others may end."""
        if self.count > 1:
            dist.barrier()
            dist.destroy_process_group()


def together() -> Together:
    """The processes that torchrun has started (on the CPU), or this one alone."""
    if "RANK" not in os.environ:
        return Together()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return Together(dist.get_rank(), dist.get_world_size())
