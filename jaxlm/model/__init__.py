"""The Transformer: its config, its parameters and what it computes."""

from jaxlm.model.cache import Cache, empty_cache, only
from jaxlm.model.config import HeadConfig, MoeConfig, RotaryConfig, TransformerConfig
from jaxlm.model.cross_entropy import linear_cross_entropy
from jaxlm.model.detection import Detection
from jaxlm.model.functions import Model, Params

__all__ = [
    "Cache", "Detection", "HeadConfig", "Model", "MoeConfig", "Params", "RotaryConfig", "TransformerConfig", "empty_cache",
    "linear_cross_entropy", "only",
]  # fmt: skip
