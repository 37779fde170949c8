"""Two LoRAs on two concepts in a real ComfyUI: ours beside what else does it there."""
