"""Which kinds of adapters come with this package: name, and the file of `adapters/` that registers it.

Free of torch, so that a training's options can list them. All of them can be trained.
"""

FILES = {
    "value": "low_rank",
    "key": "low_rank",
    "key_value": "low_rank",
    "lora": "low_rank",
    "tara": "low_rank",
    "lora_key_value": "low_rank",
    "perfusion": "gated",
    "infusion": "infusion",
    "para": "para",
}
