"""Generation from a model and its parameters."""

from jaxlm.generate.batch import BatchGenerator, DecodeConfig
from jaxlm.generate.decode import Generator
from jaxlm.generate.sample import Knobs, SampleConfig, Seen, knobs, sample, seen_of

__all__ = [
    "BatchGenerator",
    "DecodeConfig",
    "Generator",
    "Knobs",
    "SampleConfig",
    "Seen",
    "knobs",
    "sample",
    "seen_of",
]
