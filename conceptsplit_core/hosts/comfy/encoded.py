"""Prompts that were encoded before are not encoded again.

The host's cache goes by a node's inputs and those of all nodes before it: changing one loader's strength makes every
text node after it run again, although the text and the text encoder are the same. Here the encoder's answer goes by
what it depends on: the token ids and weights, the encoder's weights and patches, its layer. Anything else (embeddings,
hooks, replaced objects) is encoded as always.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

LIMIT = 32  # encoded prompts kept per text encoder; SDXL: about 0.6 MB each
_STORE = "conceptsplit_encoded"


def remembered(clip: Any, tokens: Any, return_pooled: Any, encode: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`encode()`, or an equal answer it has given before; a new dict of the same tensors, as the host shares them.

    Args:
        clip: the CLIP; the answers hang on its model, so that they go when the model goes.
        encode: the host's own encoding, as a dict.
    """
    key = _key(clip, tokens, return_pooled)
    if key is None:
        return encode()
    store: OrderedDict[Hashable, dict[str, Any]] = clip.cond_stage_model.__dict__.setdefault(_STORE, OrderedDict())
    if key in store:
        store.move_to_end(key)
    else:
        store[key] = dict(encode())
        while len(store) > LIMIT:
            store.popitem(last=False)
    return dict(store[key])


def _key(clip: Any, tokens: Any, return_pooled: Any) -> Hashable | None:
    """What an encoding depends on; None where something is in play whose identity is not known."""
    patcher = clip.patcher
    hooked = any(getattr(patcher, name, None) for name in ("forced_hooks", "hook_patches"))
    options = getattr(patcher, "model_options", {})
    if hooked or clip.apply_hooks_to_conds or any(options.values()) or not isinstance(tokens, dict):
        return None
    # The host itself notes the compute precision here; modules put in another's place have no identity to go by.
    replaced = tuple(sorted(patcher.object_patches.items(), key=lambda item: item[0]))
    if not all(isinstance(value, torch.dtype | str | int | float | None) for _, value in replaced):
        return None
    parts = []
    for name, chunks in tokens.items():
        if not isinstance(chunks, list):
            return None
        rows = tuple(tuple(tuple(entry) for entry in chunk) for chunk in chunks)
        # Embeddings stand as tensors among the ids.
        if not all(isinstance(value, int | float) for chunk in rows for entry in chunk for value in entry):
            return None
        parts.append((name, rows))
    return type(clip), patcher.patches_uuid, replaced, clip.layer_idx, return_pooled, tuple(parts)
