"""Tests on a real ComfyUI. `run.py` starts them; they are collected by each host's own Python only."""
