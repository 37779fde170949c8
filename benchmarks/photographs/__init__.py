"""The paper's table on photographs, for whoever has pretrained weights: `python -m benchmarks.photographs --help`.

protocol  concepts, prompts, arms
run       adapters learned and pictures drawn, each once
scores    CLIP and DINO on pictures and on each subject's own place
report    the table, the grid, and what cannot be concluded
"""
