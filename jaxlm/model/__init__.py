"""The Transformer: its config, its parameters and what it computes."""

from jaxlm.model.cache import Cache, empty_cache
from jaxlm.model.config import TransformerConfig
from jaxlm.model.functions import Model, Params
from jaxlm.model.heads import linear_cross_entropy

__all__ = ["Cache", "Model", "Params", "TransformerConfig", "empty_cache", "linear_cross_entropy"]
