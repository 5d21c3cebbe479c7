"""Low-rank adapters of a matrix: their shapes, their start, and the matrix that they make.

Letters: r rank of an adapter; those of a kernel as in `layers.py`, "layers" the axis along which blocks are stacked.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

RANK = "r"


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """The axes of a kernel by what they do: `lead` ones number matrices (layers, experts), each of which maps `inputs` to
    `outputs`. Every kernel is declared in this order (`Linear`), and heads come with their width."""

    lead: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, axes: Sequence[str | None]) -> "MatrixAxes":
        """From a kernel's logical axes: ("layers", "D", "N", "H") maps D to (N, H); ("N", "H", "D") the other way."""
        letters = tuple(str(letter) for letter in axes)
        lead = 0
        while letters[lead] in ("layers", "E"):
            lead += 1
        split = lead + (2 if letters[lead] in ("N", "K") else 1)
        assert lead < split < len(letters), f"axes {axes} are not those of a kernel: inputs, then outputs"
        return cls(letters[:lead], letters[lead:split], letters[split:])

    @property
    def a(self) -> tuple[str, ...]:
        """Axes of the matrix that reduces the inputs to the rank."""
        return (*self.lead, *self.inputs, RANK)

    @property
    def b(self) -> tuple[str, ...]:
        """Axes of the matrix that leads from the rank to the outputs."""
        return (*self.lead, RANK, *self.outputs)

    @property
    def magnitude(self) -> tuple[str, ...]:
        """Axes of DoRA's lengths: one number an output."""
        return (*self.lead, *self.outputs)

    @property
    def summed(self) -> tuple[int, ...]:
        """Which axes of the kernel its inputs are."""
        return tuple(range(len(self.lead), len(self.lead) + len(self.inputs)))

    def product(self) -> str:
        """The equation of A · B, with X for "layers"."""
        a, b, w = (
            "".join("X" if letter == "layers" else letter for letter in axes)
            for axes in (self.a, self.b, (*self.lead, *self.inputs, *self.outputs))
        )
        return f"{a},{b}->{w}"


def start_adapter(key: jax.Array, w: jax.Array, axes: MatrixAxes, rank: int, dora: bool) -> dict[str, jax.Array]:
    """`lora_a`, `lora_b` and, of DoRA, `lora_magnitude` of a kernel, which they leave as it is.

    A from the uniform distribution within ±1/√inputs, B zero (Hu et al. 2022, "LoRA", §4.1; this distribution, He et al.'s
    with a = √5, is what their code and PEFT start from); lengths as they are (Liu et al. 2024, "DoRA", §4.1).
    """
    sizes = dict(zip((*axes.lead, *axes.inputs, *axes.outputs), w.shape, strict=True)) | {RANK: rank}
    bound = 1 / math.sqrt(math.prod(sizes[letter] for letter in axes.inputs))
    shape_a, shape_b = (tuple(sizes[letter] for letter in letters) for letters in (axes.a, axes.b))
    adapter = {
        "lora_a": jax.random.uniform(key, shape_a, jnp.float32, -bound, bound),
        "lora_b": jnp.zeros(shape_b, jnp.float32),
    }
    return {**adapter, "lora_magnitude": _lengths(w, axes)} if dora else adapter


def adapt(
    w: jax.Array, a: jax.Array, b: jax.Array, axes: MatrixAxes, scale: float, magnitude: jax.Array | None = None
) -> jax.Array:
    """V = W + scale · A · B (Hu et al. 2022, eq. 3); with `magnitude` m · V / ‖V‖, the norm over the inputs of each output
    (Liu et al. 2024, eq. 5), through which no gradient flows (§4.3)."""
    # In full precision, so that what is exported is what was trained.
    v = w + scale * jnp.einsum(axes.product(), a, b, precision=jax.lax.Precision.HIGHEST)
    if magnitude is None:
        return v
    return v * jnp.expand_dims(magnitude / jax.lax.stop_gradient(_lengths(v, axes)), axes.summed)


def _lengths(w: jax.Array, axes: MatrixAxes) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(w), axis=axes.summed))
