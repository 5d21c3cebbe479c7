"""Logical axis → mesh axes: one table for stored arrays, one for computed ones, and how to apply them.

Logical axes are the letters of the shape alphabet (`jaxlm/model/transformer.py` has the legend); a
model names letters only, so what is split over which devices is decided here alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, tuple[str, ...]]

# Parameters and optimiser state. A letter that is not named is held whole by every device.
STORED: Rules = {"D": ("fsdp",), "W": ("fsdp",), "N": ("tensor",), "K": ("tensor",), "F": ("tensor",), "V": ("tensor",)}

# Activations. fsdp splits the batch as well: it is data parallelism that stores its parameters in parts.
COMPUTED: Rules = {"B": ("data", "fsdp"), "N": ("tensor",), "K": ("tensor",), "F": ("tensor",), "V": ("tensor",)}


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any, rules: Rules) -> PartitionSpec:
    """The partition of an array with these logical axes.

    A dimension that the mesh axes do not divide is held whole (one key/value head on two devices), and so is one
    whose mesh axes split a dimension before it (both sides of a square matrix).
    """
    assert len(axes) == len(shape), f"logical axes {axes} do not match the shape {shape}"
    sizes = dict(mesh.shape)
    parts: list[tuple[str, ...] | None] = []
    for letter, length in zip(axes, shape, strict=True):
        over = rules.get(letter, ()) if letter else ()
        ways = int(np.prod([sizes[axis] for axis in over])) if over else 1
        free = not any(part and set(part) & set(over) for part in parts)
        parts.append(over if ways > 1 and length % ways == 0 and free else None)
    return PartitionSpec(*parts)


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """Say inside jit how an activation lies, e.g. `constrain(x_BLD, "BLD")`; no effect without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh, COMPUTED))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(COMPUTED["B"]))


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch (host arrays) as global device arrays."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def stored_shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """Shardings of a parameter tree from its trees of logical axes (PartitionSpecs of letters) and shapes."""

    def place(shape: jax.ShapeDtypeStruct, letters: PartitionSpec) -> NamedSharding:
        return NamedSharding(mesh, spec(tuple(letters), shape.shape, mesh, STORED))

    return jax.tree.map(place, shapes, axes)
