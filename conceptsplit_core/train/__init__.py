"""Learning a concept: data, loop, checkpoints."""

from ..settings import TrainConfig
from .data import DEFAULT_TEMPLATES, Process, Prompt, TrainBatch, TrainData, expand_templates, training_facts
from .loop import TrainEvent, TrainResult, train

__all__ = [
    "DEFAULT_TEMPLATES",
    "Process",
    "Prompt",
    "TrainBatch",
    "TrainConfig",
    "TrainData",
    "TrainEvent",
    "TrainResult",
    "expand_templates",
    "train",
    "training_facts",
]
