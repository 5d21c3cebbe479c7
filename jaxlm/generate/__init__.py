"""Generation from a model and its parameters."""

from jaxlm.generate.batch import BatchGenerator, DecodeConfig, Scored
from jaxlm.generate.constrain import Constraint, Grammar
from jaxlm.generate.contrastive import ContrastiveConfig, ContrastiveGenerator
from jaxlm.generate.decode import Generator
from jaxlm.generate.sample import Knobs, SampleConfig, Seen, knobs, sample, seen_of
from jaxlm.generate.speculative import Speculator, Stats
from jaxlm.generate.watermark import Detection, Watermark, detect

__all__ = [
    "BatchGenerator",
    "Constraint",
    "ContrastiveConfig",
    "ContrastiveGenerator",
    "DecodeConfig",
    "Detection",
    "Generator",
    "Grammar",
    "Knobs",
    "SampleConfig",
    "Scored",
    "Seen",
    "Speculator",
    "Stats",
    "Watermark",
    "detect",
    "knobs",
    "sample",
    "seen_of",
]
