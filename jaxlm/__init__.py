"""jaxlm: pretrain, fine-tune, apply and study Transformer language models in JAX."""

__version__ = "0.1.0"
