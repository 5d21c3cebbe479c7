"""What a step makes of a gradient, by the optimiser's name: Optax's own where it has one, ours in `adam8bit` and `soap`.

Clipping, weight decay and the learning rate stand around it (`jaxlm/train/optim.py`).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from jaxlm.model.lora import MatrixAxes
from jaxlm.train.adam8bit import scale_by_adam_8bit
from jaxlm.train.soap import scale_by_soap
from jaxlm.train.tune import Tuning

Name = Literal["adamw", "adam8bit", "adafactor", "lion", "muon", "soap", "schedule_free"]
HALVED: tuple[Name, ...] = ("adamw", "lion", "muon")
"""Those whose first moment may have 16 bits."""
Tree = Any


@dataclasses.dataclass(frozen=True)
class Betas:
    """Decays of the moments, what is added to the root of the second, and the dtype that the first is kept in (by HALVED)."""

    first: float
    second: float
    eps: float
    dtype: str = "float32"


def make_moments(name: Name, betas: Betas, tuning: Tuning | None) -> optax.GradientTransformation:
    """gradient → direction of the step, of about the size of Adam's for all but lion, whose every number is ±1.

    adamw: Loshchilov and Hutter 2019. lion: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", alg. 2; a
    rate of a tenth of AdamW's is the custom. adafactor: Shazeer and Stern 2018, without momentum and with the rate as
    given; a matrix has a second moment for each row and column. muon: Jordan et al. 2024, the momentum of a layer's matrix
    made orthogonal, scaled to AdamW's size (Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4); all else by Adam.
    adam8bit: Dettmers et al. 2022. soap: Vyas et al. 2024, of a layer's matrix; all else by Adam. schedule_free: Adam without
    a first moment, whose place the interpolation takes that `make_optimizer` puts around it.
    """
    adam = optax.scale_by_adam(betas.first, betas.second, betas.eps, mu_dtype=betas.dtype)
    if name == "schedule_free":
        return optax.scale_by_rms(betas.second, betas.eps, eps_in_sqrt=False, bias_correction=True)
    if name == "lion":
        return optax.scale_by_lion(betas.first, betas.second, mu_dtype=betas.dtype)
    if name == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    if name == "adam8bit":
        return scale_by_adam_8bit(betas.first, betas.second, betas.eps)
    if name in ("muon", "soap"):
        assert tuning is not None, f"{name} is told by the tuning what each axis of a matrix is"
        found = matrices(tuning)
        own = _muon(betas, found) if name == "muon" else scale_by_soap(betas.first, betas.second, betas.eps, found)
        labels = _each(found, lambda matrix: "adam" if matrix is None else name)
        return optax.transforms.partition({name: own, "adam": adam}, labels)
    return adam


# --- matrices of the layers, and Muon ----------------------------------------------------------


def matrices(tuning: Tuning) -> Tree:
    """For each trained leaf the axes of the matrices that it holds, None for what is no map to or from the residual stream
    of a layer: embeddings, norms, biases, routers, heads, adapters."""

    def of(path: Any, letters: Any) -> MatrixAxes | None:
        names = [str(key.key) for key in path]
        mapped = "layers" in names and names[-1] == "kernel" and "router" not in names
        return MatrixAxes.of(tuple(letters)) if mapped else None

    return jax.tree.map_with_path(of, tuning.axes, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))


def _each(found: Tree, make: Callable[..., Any], *trees: Tree) -> Tree:
    return jax.tree.map(make, found, *trees, is_leaf=lambda x: x is None or isinstance(x, MatrixAxes))


def _muon(betas: Betas, found: Tree) -> optax.GradientTransformation:
    def numbers(matrix: MatrixAxes | None) -> Any:
        if matrix is None:
            return optax.MaskedNode()
        first = len(matrix.lead) + len(matrix.inputs)
        return optax.contrib.MuonDimensionNumbers(matrix.summed, tuple(range(first, first + len(matrix.outputs))))

    def sized(updates: Tree, params: Tree | None) -> Tree:
        def one(matrix: MatrixAxes | None, update: Any) -> Any:
            if matrix is None:
                return update
            inputs = math.prod(update.shape[axis] for axis in matrix.summed)
            outputs = math.prod(update.shape[len(matrix.lead) + len(matrix.inputs) :])
            return 0.2 * math.sqrt(max(inputs, outputs)) * update

        return _each(found, one, updates)

    orthogonal = optax.contrib.scale_by_muon(
        beta=betas.second, eps=betas.eps, mu_dtype=betas.dtype, weight_dimension_numbers=_each(found, numbers)
    )
    return optax.chain(orthogonal, optax.stateless(sized))
