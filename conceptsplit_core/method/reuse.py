"""Faster Diffusion (arXiv 2312.09608): which steps compute a UNet's way down, and which take its features from before.

From step to step the features of the encoder and of the middle change little and those of the decoder much. The paper
chooses its full steps by hand, many of them early. Here the early steps, in which the picture is laid out, are all
full, and the full ones among the others are spread evenly. Its noise against lost texture is left out.
"""

from __future__ import annotations

from functools import cache


@cache
def reusing_steps(total: int, first: int, share: float) -> frozenset[int]:
    """Steps (0-based) of a run of `total` that take the features of the last full step before them.

    Args:
        first: the first step after which features may be reused; it is a full one itself.
        share: of all steps, how many reuse; as many as there are behind `first`, at most.
    """
    free = total - first
    count = min(round(share * total), free - 1)
    if count < 1:
        return frozenset()
    full = {first + k * free // (free - count) for k in range(free - count)}
    return frozenset(range(first, total)) - full
