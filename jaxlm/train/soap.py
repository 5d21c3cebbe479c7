"""SOAP: Adam in the eigenbases of Shampoo's preconditioner (Vyas et al. 2024).

Letters: m inputs of a matrix, n its outputs, each over all its axes; i and j number the vectors of a basis.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.model.lora import MatrixAxes

Tree = Any

FREQUENCY = 10
"""Steps from one refreshing of the bases to the next: the paper's preconditioning frequency f."""
LONGEST = 10_000
"""A side longer than this is not rotated: the paper's one-sided version, and where both are, Adam."""


class SoapState(NamedTuple):
    """Per matrix: `mu`, the first moment as the parameter lies, and `nu`, Adam's second moment in the rotated basis, both of
    the parameter's shape; `left` (m, m) and `right` (n, n), means of G Gᵀ and Gᵀ G, and the columns that are their bases.

    Squares have as many axes as their parameter, (lead…, m, 1…, m), so that they are split over devices by its rules where
    these fit; one for a side that is not rotated is a single 0.
    """

    step: jax.Array
    mu: Tree
    nu: Tree
    left: Tree
    right: Tree
    left_basis: Tree
    right_basis: Tree


def scale_by_soap(b1: float, b2: float, eps: float, found: Tree) -> optax.GradientTransformation:
    """Gradient → direction of Adam's size (Vyas et al. 2024, "SOAP: Improving and Stabilizing Shampoo using Adam", alg. 3).

    `found` has the MatrixAxes of each leaf that is given. Moments are corrected for their start as Adam's are, and eps is
    added to the root. As in the authors' code the first step moves nothing: it finds the bases, by `eigh`, and in the bases
    of its own gradient every number off the diagonal would be rounding divided by rounding. Adam's steps are counted from
    the second one; at each FREQUENCY-th of them a step of power iteration and a QR decomposition (alg. 4) refresh the bases,
    whose vectors are sorted by their eigenvalues first, and `nu` with them. All in float32.
    """
    axes = dict(jax.tree.leaves_with_path(found))

    def init(params: Tree) -> SoapState:
        def moment() -> Tree:
            return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)

        def squares(side: int) -> Tree:
            def of(path: Any, p: Any) -> jax.Array:
                return jnp.zeros(_square_shapes(axes[path], p.shape)[side], jnp.float32)

            return jax.tree.map_with_path(of, params)

        return SoapState(jnp.zeros((), jnp.int32), moment(), moment(), squares(0), squares(1), squares(0), squares(1))

    def update(updates: Tree, state: SoapState, params: Tree | None = None) -> tuple[Tree, SoapState]:
        first = state.step == 0
        steps = jnp.maximum(state.step, 1).astype(jnp.float32)  # Adam's
        branch = jnp.where(first, 0, jnp.where(state.step % FREQUENCY == 0, 1, 2))

        def one(path: Any, g: jax.Array, mu: jax.Array, nu: jax.Array, *squares: jax.Array) -> tuple[jax.Array, ...]:
            *lead, m, n = flat = _matrix_shape(axes[path], g.shape)
            g_mn, mu_mn, nu_ij = (x.astype(jnp.float32).reshape(flat) for x in (g, mu, nu))
            # Of each side its squares, or None where it is not rotated.
            whole = [x.reshape(*lead, size, size) if size <= LONGEST else None for x, size in zip(squares, (m, n) * 2, strict=True)]
            grams, bases = whole[:2], whole[2:]

            mu_mn = jnp.where(first, mu_mn, b1 * mu_mn + (1 - b1) * g_mn)
            nu_ij = jnp.where(first, nu_ij, b2 * nu_ij + (1 - b2) * jnp.square(_turned(g_mn, bases)))
            step_ij = _turned(mu_mn, bases) / (1 - b1**steps) / (jnp.sqrt(nu_ij / (1 - b2**steps)) + eps)
            step_mn = jnp.where(first, 0.0, _turned(step_ij, [None if q is None else q.mT for q in bases]))

            products = (g_mn @ g_mn.mT, g_mn.mT @ g_mn)
            grams = [None if p is None else b2 * p + (1 - b2) * new for p, new in zip(grams, products, strict=True)]
            bases, nu_ij = jax.lax.switch(branch, (_start, _refresh, lambda _, *same: same), grams, bases, nu_ij)

            kept = (old if new is None else new.reshape(old.shape) for old, new in zip(squares, (*grams, *bases), strict=True))
            return (step_mn.astype(g.dtype).reshape(g.shape), mu_mn.reshape(g.shape), nu_ij.reshape(g.shape), *kept)

        with jax.default_matmul_precision("highest"):  # a basis of few bits is not orthogonal
            moved = jax.tree.map_with_path(one, updates, *state[1:])
        parts = jax.tree.transpose(jax.tree.structure(updates), jax.tree.structure((0,) * 7), moved)
        return parts[0], SoapState(state.step + 1, *parts[1:])

    return optax.GradientTransformation(init, update)


def _matrix_shape(axes: MatrixAxes, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(lead…, m, n)."""
    lead, outputs = len(axes.lead), len(axes.lead) + len(axes.inputs)
    return (*shape[:lead], math.prod(shape[lead:outputs]), math.prod(shape[outputs:]))


def _square_shapes(axes: MatrixAxes, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    *lead, m, n = _matrix_shape(axes, shape)
    between = (1,) * (len(shape) - len(lead) - 2)
    return [(*lead, size, *between, size) if size <= LONGEST else (1,) for size in (m, n)]


def _turned(x_mn: jax.Array, bases: list[Any]) -> jax.Array:
    """Q_Lᵀ X Q_R; with the transposed bases the way back."""
    left, right = bases
    x_in = x_mn if left is None else left.mT @ x_mn
    return x_in if right is None else x_in @ right


def _start(grams: list[Any], bases: list[Any], nu_ij: jax.Array) -> tuple[list[Any], jax.Array]:
    """Eigenvectors, those of the largest eigenvalues first, as power iteration wants them."""
    return [None if p is None else jnp.flip(_one_by_one(lambda x: jnp.linalg.eigh(x)[1], p), -1) for p in grams], nu_ij


def _refresh(grams: list[Any], bases: list[Any], nu_ij: jax.Array) -> tuple[list[Any], jax.Array]:
    """Algorithm 4, QR(P Q), of columns that are sorted by qᵀ P q: QR makes each orthogonal to those before it."""
    new = list(bases)
    for side, (p, q) in enumerate(zip(grams, bases, strict=True)):
        if p is not None:
            s = p @ q
            order = jnp.argsort(-jnp.sum(q * s, axis=-2), axis=-1)
            new[side] = _one_by_one(lambda x: jnp.linalg.qr(x)[0], jnp.take_along_axis(s, order[..., None, :], axis=-1))
            nu_ij = jnp.take_along_axis(nu_ij, order[..., :, None] if side == 0 else order[..., None, :], axis=side - 2)
    return new, nu_ij


def _one_by_one(decompose: Callable[[jax.Array], jax.Array], squares: jax.Array) -> jax.Array:
    """A decomposition of each matrix by itself: several at once jaxlib (0.10.2) shares on a CPU among the threads of a pool,
    and waits for them in threads of the same pool, which never ends once all of these wait (an emulated mesh)."""
    return jax.lax.map(decompose, squares.reshape(-1, *squares.shape[-2:])).reshape(squares.shape)
