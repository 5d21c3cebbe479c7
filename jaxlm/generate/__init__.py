"""Generation from a model and its parameters."""

from jaxlm.generate.batch import BatchGenerator, DecodeConfig
from jaxlm.generate.decode import Generator
from jaxlm.generate.sample import SampleConfig, sample

__all__ = ["BatchGenerator", "DecodeConfig", "Generator", "SampleConfig", "sample"]
