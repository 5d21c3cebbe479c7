"""Generation from a model and its parameters."""

from jaxlm.generate.batch import BatchGenerator, DecodeConfig, Scored
from jaxlm.generate.constrain import Constraint, Grammar
from jaxlm.generate.contrastive import ContrastiveConfig, ContrastiveGenerator
from jaxlm.generate.decode import Generator
from jaxlm.generate.processors import NO_RULES, LogitsRules
from jaxlm.generate.sample import Knobs, SampleConfig, Seen, knobs, sample, seen_of
from jaxlm.generate.settings import NO_SETTINGS, SETTINGS, GenerationSettings
from jaxlm.generate.speculative import Speculator, Stats
from jaxlm.generate.watermark import Detection, Watermark, detect

__all__ = [
    "NO_RULES",
    "NO_SETTINGS",
    "SETTINGS",
    "BatchGenerator",
    "Constraint",
    "ContrastiveConfig",
    "ContrastiveGenerator",
    "DecodeConfig",
    "Detection",
    "GenerationSettings",
    "Generator",
    "Grammar",
    "Knobs",
    "LogitsRules",
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
