"""A model behind the HTTP routes that people's clients already speak to; `jaxlm.serve.server` starts it."""

from jaxlm.serve.options import ServeOptions

__all__ = ["ServeOptions"]
