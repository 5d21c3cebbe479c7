"""Schedules and the optimiser: clipping, moments, decay and rate, the last two by the names of parameters."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
import optax
from flax.traverse_util import unflatten_dict

from jaxlm.train.moments import HALVED, Betas, Name, make_moments
from jaxlm.train.tune import Tuning, check_regex, matching

Tree = Any

_SLOWEST_BFLOAT16 = 0.995
"""A decay nearer to 1 changes a number by less than half of a unit in bfloat16's last place, up to 2⁻⁸ of the number."""


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Parameters that are trained in their own way."""

    pattern: str = ".*"
    """Regular expression of their paths, in which a block may be named by its number (`layers.3/`)."""
    learning_rate: float = 1.0
    """What the learning rate is multiplied with."""
    weight_decay: float | None = None
    """Decoupled weight decay of every parameter of the group, matched by optim.decay or not; default: as for other parameters."""

    def __post_init__(self) -> None:
        check_regex("pattern", self.pattern)
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate is {self.learning_rate}: a multiplier must not be negative")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise ValueError(f"weight_decay is {self.weight_decay}: it must not be negative")
        if self.weight_decay and self.learning_rate == 0:
            raise ValueError(f"weight_decay {self.weight_decay} would do nothing with learning_rate 0, which it is multiplied with")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """An optimiser under a schedule, with clipping by global norm and decoupled weight decay."""

    name: Name = "adamw"
    """What makes a step of a gradient; adam8bit: AdamW with moments of a byte a number; schedule_free: AdamW whose average of
    all steps is evaluated and exported, best under a constant schedule."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """What follows the warm-up; wsd: constant, then a linear decay at the end (Hu et al. 2024, "MiniCPM", §4)."""
    warmup: float = 100
    """Steps over which the rate rises from 0 to its peak; below 1: that share of all steps. The last step is never one of
    them."""
    final: float = 0.1
    """Learning rate at the last step as a share of the peak; constant ignores it."""
    decay_share: float = 0.2
    """Share of all steps that wsd decays over, at most those after warm-up."""
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
    moments: Literal["float32", "bfloat16"] = "float32"
    """What adamw, lion and muon keep the first moment in; bfloat16 halves it."""
    clip: float | None = 1.0
    """Largest global norm of the gradient; empty: no clipping."""
    layer_decay: float = 1.0
    """Each block learns at this share of the rate of the block above it, the embeddings at that of the lowest one's; the head
    at the full rate (Clark et al. 2020, "ELECTRA", appendix B)."""
    groups: tuple[GroupConfig, ...] = ()
    """Parameters with a learning rate or weight decay of their own; the first group that matches a parameter counts."""
    average: float | None = None
    """Decay of the exponential moving average of the parameters, which is then evaluated and exported in their place (Polyak
    and Juditsky 1992); in the first steps it is less, (1 + step) / (10 + step). Empty: none."""
    zero1: bool = False
    """Split gradients and the optimiser's state over data too, where parameters are whole (Rajbhandari et al. 2020, "ZeRO",
    stages 1 and 2); what is sent stays the same where sums can be scattered."""
    offload: bool = False
    """Keep the optimiser's state in the host's memory between steps."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip", "layer_decay"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}: it must be positive")
        for name in ("beta1", "beta2", "final", "decay_share", "layer_decay", "average"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}: it must lie between 0 and 1")
        if self.warmup < 0 or self.weight_decay < 0:
            raise ValueError(f"warmup ({self.warmup}) and weight_decay ({self.weight_decay}) must not be negative")
        if self.moments != "float32" and self.name not in HALVED:
            raise ValueError(f"moments is {self.moments}, which {self.name} cannot keep: give float32, or {', '.join(HALVED)}")
        # Muon and lion decay their momentum by beta2, and Muon's other parameters are adamw's.
        decays = {"adamw": ("beta1",), "lion": ("beta2",), "muon": ("beta1", "beta2")}.get(self.name, ())
        for name in decays if self.moments == "bfloat16" else ():
            if 1 > getattr(self, name) > _SLOWEST_BFLOAT16:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but a moment in bfloat16 that decays so slowly never changes, as each "
                    f"step's change is rounded away: give moments float32, or {name} up to {_SLOWEST_BFLOAT16}"
                )
        if self.name == "schedule_free" and self.average is not None:
            raise ValueError(f"average is {self.average}, but schedule_free evaluates an average of its own: leave average empty")
        if self.name == "schedule_free" and self.beta1 == 0:
            raise ValueError("beta1 is 0, but schedule_free divides by it: it must be positive")
        check_regex("decay", self.decay)


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Step → learning rate over a run of `steps` steps, numbered from 0.

    Warm-up, which leaves room for the last step, rises from peak / (warmup + 1): the first step is not lost. Every schedule
    but `constant` falls from the peak, at the end of warm-up, to `final` × peak at the last step, `steps` − 1; the decay of
    wsd begins at the end of warm-up where `decay_share` of all steps would begin before. A run of one step is its last.
    """
    peak = config.learning_rate
    warmup = min(round(config.warmup * steps if config.warmup < 1 else config.warmup), steps - 1)
    after, end = steps - 1 - warmup, peak * config.final
    decay = min(max(1, round(steps * config.decay_share)), after)
    if config.schedule == "constant":
        fall = optax.constant_schedule(peak)
    elif after == 0:
        fall = optax.constant_schedule(end)
    elif config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, after, alpha=config.final)
    elif config.schedule == "linear":
        fall = optax.linear_schedule(peak, end, after)
    else:
        stable = after - decay
        fall = optax.join_schedules([optax.constant_schedule(peak), optax.linear_schedule(peak, end, decay)], [stable])
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, fall], [warmup]) if warmup else fall


def at_step(opt_state: Any, step: jax.Array) -> Any:
    """The state with every count of a schedule set to `step`, the run's own number of the step.

    A skipped update leaves the optimiser's state as it was, the counts in it too. The rate goes by the steps of the run
    all the same: it is the one that is logged, and its last one is the schedule's last.
    """
    kinds = (optax.ScaleByScheduleState, optax.contrib.ScheduleFreeState)

    def count(part: Any) -> Any:
        if isinstance(part, optax.ScaleByScheduleState):
            return part._replace(count=step)
        if isinstance(part, optax.contrib.ScheduleFreeState):  # whose weights go by the rate of the next step
            return part._replace(step_count=step + 1, base_optimizer_state=at_step(part.base_optimizer_state, step))
        return part

    return jax.tree.map(count, opt_state, is_leaf=lambda part: isinstance(part, kinds))


def parameter_paths(params: Any) -> Any:
    """A tree like `params` whose leaves are their paths, e.g. `transformer/layers/mlp/up/kernel`."""
    return jax.tree.map_with_path(lambda path, _: "/".join(str(key.key) for key in path), params)


def make_optimizer(config: OptimConfig, schedule: optax.Schedule, tuning: Tuning | None = None) -> optax.GradientTransformation:
    """The optimiser of a tree of parameters; `layer_decay` and `groups` need the `tuning` that says which layers its leaves hold.

    schedule_free (Defazio et al. 2024, "The Road Less Scheduled", alg. 1) goes around all of it: what the rest makes of the
    gradient at y, decay of y included, moves z; x is the average of all z, each weighed with the square of the largest rate
    so far; y = (1 - beta1) z + beta1 x are the parameters. A multiplier of `layer_decay` or `groups` is of the steps of z;
    the weights of the average are the schedule's, in which a factor that all steps have in common would cancel.

    Raises ValueError for a group that finds nothing.
    """
    betas = Betas(config.beta1, config.beta2, config.eps, config.moments)
    moments, rate = make_moments(config.name, betas, tuning), optax.scale_by_learning_rate(schedule)
    scale: list[optax.GradientTransformation] = []
    if tuning is None:
        assert config.layer_decay == 1 and not config.groups, "layer_decay and groups are by layer: make_optimizer needs a tuning"

        def decayed(params: Tree) -> Tree:
            return jax.tree.map(lambda path: bool(re.search(config.decay, path)), parameter_paths(params))

        decay = optax.add_decayed_weights(config.weight_decay, decayed)
    else:
        rates, decays = multipliers(config, tuning)
        decay = _decay(decays)
        scale = [] if all(np.all(value == 1) for value in jax.tree.leaves(rates)) else [_times(rates)]
    step = optax.chain(moments, decay, *scale, rate)
    clipped = step if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), step)
    return optax.contrib.schedule_free(clipped, schedule, config.beta1) if config.name == "schedule_free" else clipped


def multipliers(config: OptimConfig, tuning: Tuning) -> tuple[Tree, Tree]:
    """The factor of the learning rate and the weight decay of each trained leaf: a number, or, if its layers differ, an array
    that broadcasts along its first axis. Raises ValueError for a group that matches no parameter."""
    used: set[int] = set()

    def group(path: str, name: str) -> GroupConfig:
        number = next((i for i, group in enumerate(config.groups) if matching(group.pattern, path, [name])), None)
        if number is None:
            return GroupConfig()
        used.add(number)
        return config.groups[number]

    def rate(path: str, name: str) -> float:
        above = layers_above(name, tuning.stacks) if config.layer_decay != 1 else 0
        return group(path, name).learning_rate * config.layer_decay**above

    def decay(path: str, name: str) -> float:
        own = group(path, name).weight_decay
        return (config.weight_decay if matching(config.decay, path, [name]) else 0.0) if own is None else own

    def tree(of: Callable[[str, str], float]) -> Tree:
        leaves = {}
        for path, names in tuning.names.items():
            values = [of(path, name) for name in names]
            leaves[path] = values[0] if len(set(values)) == 1 else np.asarray(values, np.float32)
        return jax.tree.map(_along_first, unflatten_dict(leaves, sep="/"), tuning.shapes)

    found = tree(rate), tree(decay)
    for unused in [group for i, group in enumerate(config.groups) if i not in used]:
        raise ValueError(f"optim.groups: pattern {unused.pattern!r} finds no trained parameter that no group before it has")
    return found


def layers_above(name: str, stacks: Mapping[str, int]) -> int:
    """How many layers stand above a parameter: 0 of the head and of the last norm, 1 of the last block, one more than there
    are blocks of the embeddings and all else below the first one. Each stack of two counts its own blocks; embeddings that
    both read those of the longer one."""
    for stack, blocks in stacks.items():
        if match := re.match(rf"{re.escape(stack)}/layers(?:\.(\d+))?/", name):
            return blocks - int(match[1] or 0)
        if name.startswith(f"{stack}/"):
            return 0 if name.startswith(f"{stack}/final_norm/") else blocks + 1
    return 0 if name.startswith("head/") else max(stacks.values(), default=0) + 1


def _along_first(value: Any, shape: jax.ShapeDtypeStruct) -> Any:
    return value if isinstance(value, float) else value.reshape(-1, *(1,) * (len(shape.shape) - 1))


def _times(rates: Tree) -> optax.GradientTransformation:
    """Each update times its own factor."""
    return optax.stateless(lambda updates, params: jax.tree.map(lambda update, by: update * by, updates, rates))


def _decay(decays: Tree) -> optax.GradientTransformation:
    """Decoupled weight decay, for each leaf by its own. It is masked, so that its state has the form of Optax's own."""
    mask = jax.tree.map(lambda decay: bool(np.any(decay)), decays)
    masked = jax.tree.map(lambda decay, here: decay if here else optax.MaskedNode(), decays, mask)

    def add(updates: Tree, params: Tree | None) -> Tree:
        return jax.tree.map(lambda update, p, decay: update + decay * p, updates, params, masked)

    return optax.masked(optax.stateless(add), mask)
