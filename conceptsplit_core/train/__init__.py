"""Learning a concept: pictures and prompts in, the loop, its state, an adapter out.

folder, reading   which files of a folder are used, and how they are opened
images            checks of pictures and masks, one size for all
prompts, data     templates to prompts; what is learned from, and the batch of each step
adapter, captions the adapter a training starts from, and what some kinds look at before
loop, checkpoint  the steps, and the state that a stopped training continues from
identity          what must be the same for it to continue
progress          the bar on the console
"""

from ..settings import TrainConfig
from .adapter import begin, new_adapter, training_facts
from .data import Process, TrainBatch, TrainData
from .loop import TrainEvent, TrainResult, train
from .prompts import DEFAULT_TEMPLATES, Prompt, expand_templates

__all__ = [
    "DEFAULT_TEMPLATES",
    "Process",
    "Prompt",
    "TrainBatch",
    "TrainConfig",
    "TrainData",
    "TrainEvent",
    "TrainResult",
    "begin",
    "expand_templates",
    "new_adapter",
    "train",
    "training_facts",
]
