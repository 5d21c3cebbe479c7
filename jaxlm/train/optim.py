"""Schedules and the optimiser, both Optax's own."""

import dataclasses
import re
from typing import Any, Literal

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019) under a schedule, with clipping by global norm."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """What follows the warm-up; wsd: constant, then a linear decay at the end (Hu et al. 2024, "MiniCPM", §4)."""
    warmup: int = 100
    """Steps over which the rate rises from 0 to its peak."""
    final: float = 0.1
    """Rate at the last step as a share of the peak; constant ignores it."""
    decay_share: float = 0.2
    """Share of the steps that wsd decays over."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    decay: str = r"(kernel|table)$"
    """Regular expression: parameters whose path matches are decayed."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip: float | None = 1.0
    """Largest global norm of the gradient; empty: no clipping."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}: it must be positive")
        for name in ("beta1", "beta2", "final", "decay_share"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}: it must lie between 0 and 1")
        if self.warmup < 0 or self.weight_decay < 0:
            raise ValueError(f"warmup ({self.warmup}) and weight_decay ({self.weight_decay}) must not be negative")
        try:
            re.compile(self.decay)
        except re.error as error:
            raise ValueError(f"decay {self.decay!r} is not a regular expression: {error}") from None


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Step → learning rate over a run of `steps` steps."""
    peak, warmup = config.learning_rate, min(config.warmup, steps)
    after, end = max(1, steps - warmup), config.learning_rate * config.final
    rest = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, after, alpha=config.final),
        "linear": lambda: optax.linear_schedule(peak, end, after),
        "wsd": lambda: _stable_then_decay(peak, end, after, max(1, round(steps * config.decay_share))),
    }[config.schedule]()
    # The first step counts: it is taken at peak / (warmup + 1), not at 0.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, rest], [warmup]) if warmup else rest


def _stable_then_decay(peak: float, end: float, steps: int, decay: int) -> optax.Schedule:
    stable = max(0, steps - decay)
    return optax.join_schedules([optax.constant_schedule(peak), optax.linear_schedule(peak, end, decay)], [stable])


def parameter_paths(params: Any) -> Any:
    """A tree like `params` whose leaves are their paths, e.g. `transformer/layers/mlp/up/kernel`."""
    return jax.tree.map_with_path(lambda path, _: "/".join(str(key.key) for key in path), params)


def make_optimizer(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    def decayed(params: Any) -> Any:
        return jax.tree.map(lambda path: bool(re.search(config.decay, path)), parameter_paths(params))

    adamw = optax.adamw(schedule, config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay, mask=decayed)
    return adamw if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), adamw)
