"""A LoRA trained routed from the terminal, on found masks, and drawn by --lora."""

from __future__ import annotations

import numpy as np
from PIL import Image

from conceptsplit_core.demo import looks, scenes


def test_demo_a_routed_lora_is_trained_and_drawn(call, tmp_path):
    both = [(looks.CONCEPTS[name].class_word, looks.CONCEPTS[name].look) for name in ("kiku", "dax")]
    (tmp_path / "pictures").mkdir()
    Image.fromarray(scenes.compose_scene(both, 2).image).save(tmp_path / "pictures" / "both.png")
    out = tmp_path / "kiku.safetensors"
    line = ["train", "--images", tmp_path / "pictures", "--class-word", "circle", "--name", "kiku", "--out", out]
    line += ["--beside", "diamond", "--steps", 3, "--batch-size", 2, "--learning-rate", 0.03, "--warmup", 0]
    code, _, err = call(*line, "--kind", "lora", "--routed")
    assert code != 0 and "give masks, or set mask_from to 'attention'" in err and not out.exists()
    code, _, err = call(*line, "--kind", "lora", "--routed", "--mask-from", "attention", "--separate", 0.25)
    assert code == 0, err
    drawn = []
    for strength, most in ((1, 3), (0, 3), (1, 1)):
        target = tmp_path / f"{strength}-{most}.png"
        line = ["--lora", f"kiku={out}:{strength}", "--lora-guidance", most, "--cfg", 6.5, "--steps", 2]
        code, _, err = call("sample", "--prompt", "a <kiku>", *line, "--out", target)
        assert code == 0, err
        drawn.append(np.asarray(Image.open(target)).astype(int))
    for other in drawn[1:]:
        assert np.abs(drawn[0] - other).max() > 2
