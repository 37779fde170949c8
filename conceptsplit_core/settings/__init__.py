"""Every option once: its name, default, range and words. Free of torch, so that help starts at once.

A field of one of these classes is an option. Its name is the node's input and, with dashes, the terminal's option.
Node inputs, terminal options and the tables of the help pages and the README are generated from the fields, in their
order. Saved graphs hold values by position: a new field goes to the end of its class.

sampling  how a picture is drawn: LODA, AFG and the sampler
training  how a concept is learned
loading   what a loader, or a node behind the text, makes of a concept
"""

from .loading import CorrectionConfig, GateConfig, LoaderConfig
from .sampling import AUTO, SEEDS, LodaConfig, SampleConfig, seeds
from .training import PREDICTION_TYPES, TrainConfig

__all__ = [
    "AUTO",
    "PREDICTION_TYPES",
    "SEEDS",
    "CorrectionConfig",
    "GateConfig",
    "LoaderConfig",
    "LodaConfig",
    "SampleConfig",
    "TrainConfig",
    "seeds",
]
