"""ComfyUI as a host. Only the modules of this package import `comfy`.

model     a MODEL as a network map; tensors that autograd may use
clip      a CLIP that knows its concepts
carried   what its tokens and conditionings carry    tokenizers  how it lays out a text
texts     encoded texts, recognised by their rows where another pack has moved them
run       the state of one sampling run
call      one call of the UNet: row masks, regions, maps
afg       AFG in the host's attention
reader    attention maps from a pass of the conditional branch
steps     single steps of the host's samplers
sampler   the stages of a timeline around the host's samplers
autograd  what a gradient through the host's UNet needs
patch     all of it on a MODEL
lora      LoRA files as the host reads them
training  a training, from pictures to a file
encoding  what it encodes once    identity  what it was trained on    objective  the UNet as a function of a batch
files     adapter and LoRA files where the host keeps models
demo      the built-in demo checkpoint as MODEL, CLIP, VAE
"""
