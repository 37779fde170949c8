"""ComfyUI as a host. Only the modules of this package import `comfy`.

model     layer names, model family, inference tensors
clip      a CLIP that knows its concepts; bindings carried in conditionings
patch     adapters on a MODEL; what happens in each call of the UNet (value rows, map capture, AFG bias)
sampling  LODA around the host's samplers
training  the host's UNet as a training objective
demo      the built-in demo checkpoint as MODEL, CLIP, VAE
"""
