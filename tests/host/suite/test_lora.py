"""Ordinary LoRA files, each on its own concept: against the host's own merge, inside and outside regions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from .conftest import pack, run
from .helpers import encode, latent, sample

MID = "mid_block.attentions.0.transformer_blocks.0"
DOWN = "down_blocks.1.attentions.0.transformer_blocks.0"


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Weight shapes by canonical name, of attention, feed-forward, projections and convolutions in two blocks."""
    network = pack("conceptsplit_core.hosts.comfy.model").network_map(model.model)
    names = [f"{block}.attn{n}.to_{p}" for block in (DOWN, MID) for n in (1, 2) for p in ("q", "k", "v", "out.0")]
    names += [f"{DOWN}.ff.net.0.proj", f"{DOWN}.ff.net.2", f"{DOWN.partition('.transformer')[0]}.proj_in"]
    names += [
        "down_blocks.1.resnets.0.conv1",
        "down_blocks.0.downsamplers.0.conv",
        "down_blocks.1.resnets.0.conv_shortcut",
    ]
    return {name: tuple(network.module(name).weight.shape) for name in names}


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator) * 0.2


def kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def plain(shape: tuple[int, ...], g: torch.Generator, rank: int = 3) -> tuple[Tensor, Tensor]:
    tail = (1, 1) if len(shape) == 4 else ()
    return randn(g, rank, *shape[1:]), randn(g, shape[0], rank, *tail)


def lora(model: Any, g: torch.Generator) -> dict[str, Tensor]:
    """kohya with alpha, convolutions included (LoCon)."""
    state = {}
    for name, shape in shapes(model).items():
        down, up = plain(shape, g)
        state |= {f"{kohya(name)}.lora_down.weight": down, f"{kohya(name)}.lora_up.weight": up}
        state[f"{kohya(name)}.alpha"] = torch.tensor(1.5)
    return state


def diffusers_names(model: Any, g: torch.Generator) -> dict[str, Tensor]:
    state = {}
    for name, shape in shapes(model).items():
        if len(shape) == 2:
            down, up = plain(shape, g)
            state |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    return state


def tucker(model: Any, g: torch.Generator) -> dict[str, Tensor]:
    """A LoCon whose convolution is in Tucker form."""
    name, shape = next((n, s) for n, s in shapes(model).items() if len(s) == 4 and s[2] == 3)
    key = kohya(name)
    return {
        f"{key}.lora_down.weight": randn(g, 3, shape[1], 1, 1),
        f"{key}.lora_mid.weight": randn(g, 3, 3, 3, 3),
        f"{key}.lora_up.weight": randn(g, shape[0], 3, 1, 1),
        f"{key}.alpha": torch.tensor(2.0),
    }


def loha(model: Any, g: torch.Generator) -> dict[str, Tensor]:
    state = {}
    for name, shape in shapes(model).items():
        width = int(torch.tensor(shape[1:]).prod())
        for n in (1, 2):
            state[f"{kohya(name)}.hada_w{n}_a"] = randn(g, shape[0], 2)
            state[f"{kohya(name)}.hada_w{n}_b"] = randn(g, 2, width)
        state[f"{kohya(name)}.alpha"] = torch.tensor(3.0)
    return state


def lokr(model: Any, g: torch.Generator) -> dict[str, Tensor]:
    state = {}
    for name, shape in shapes(model).items():
        if len(shape) == 4 and shape[2] == 1:
            continue
        state[f"{kohya(name)}.lokr_w1"] = randn(g, 4, 2)
        if len(shape) == 2:
            state[f"{kohya(name)}.lokr_w2_a"] = randn(g, shape[0] // 4, 3)
            state[f"{kohya(name)}.lokr_w2_b"] = randn(g, 3, shape[1] // 2)
        else:
            state[f"{kohya(name)}.lokr_w2"] = randn(g, shape[0] // 4, shape[1] // 2, *shape[2:])
        state[f"{kohya(name)}.alpha"] = torch.tensor(2.0)
    return state


LAYOUTS: list[Callable[[Any, torch.Generator], dict[str, Tensor]]] = [lora, diffusers_names, tucker, loha, lokr]


@pytest.fixture
def write(base: Path):
    def write(state: dict[str, Tensor], name: str = "x.safetensors", **metadata: str) -> str:
        folder = base / "models" / "loras"
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in state.items()}, str(folder / name), metadata or None)
        return name

    return write


@pytest.fixture(scope="module")
def sd(loaded):
    return loaded("tiny")


def load(sd: Any, name: str, concept: str = "anna", words: str = "dog", **options: Any) -> tuple[Any, Any, str]:
    given = {"model": sd.model, "clip": sd.clip, "lora": name, "concept_name": concept, "words": words}
    return run("ConceptSplitLoraLoader", **{**given, "strength": 1.0, "strength_clip": 1.0, **options})


def scoped(model: Any, scope: str) -> Any:
    """The same model with its adapters acting in another place."""
    from dataclasses import replace

    patch = pack("conceptsplit_core.hosts.comfy.patch")
    known = patch.patch_of(model)
    return patch._patched(model, replace(known, adapters=tuple(replace(a, scope=scope) for a in known.adapters)))


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=2e-3 * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_routed_everywhere_equals_the_hosts_merge(sd, write, layout):
    name = write(layout(sd.model, torch.Generator().manual_seed(5)))
    model, clip, info = load(sd, name, strength=0.7)
    conds = encode(clip, "a <anna> at sea"), encode(clip, "blurry")
    options = {"steps": 2, "cfg": 4.0, "image": latent(72, 40)}
    base = sample(sd.model, *conds, **options)
    merged, _ = run("LoraLoader", model=sd.model, clip=sd.clip, lora_name=name, strength_model=0.7, strength_clip=0.0)
    wanted = sample(merged, *conds, **options)
    assert not close(base, wanted), "this LoRA changes the picture"
    assert close(sample(scoped(model, "everywhere"), *conds, **options), wanted)
    assert "left out" not in info and "in its region" in info


def test_the_demos_files_are_listed_and_new_files_still_go_to_the_users_folder(base):
    import folder_paths

    files = pack("conceptsplit_core.hosts.comfy.files")
    files.register_folders()  # a second time, as a reload of the pack does
    folders = folder_paths.get_folder_paths("loras")
    assert Path(folders[0]) == base / "models" / "loras" and len(folders) == len(set(folders))
    assert {"demo_pixa_lora.safetensors", "demo_nero_lora.safetensors"} <= set(files.lora_names())
    assert files.lora_path("demo_nero_lora.safetensors").parent == files.DEMO / "loras"
    own = base / "models" / "loras" / "demo_nero_lora.safetensors"
    own.parent.mkdir(exist_ok=True)
    own.write_bytes(b"the user's own")
    assert files.lora_path(own.name) == own
    own.unlink()
