"""ConceptSplit for ComfyUI: several personal concepts in one picture, without mixing (ToVA, LODA).

ComfyUI loads this file. Everything else lives in `nodes` (thin) and `conceptsplit_core` (the method).
"""

WEB_DIRECTORY = "./web"

# Only inside a ComfyUI is there something to register: tests and tools import the same folder without one.
if __package__:
    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
else:
    __all__ = ["WEB_DIRECTORY"]
