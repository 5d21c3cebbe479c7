"""Contrastive search: of the likeliest tokens the one that says least of what the text has said, the whole loop on the device.

Letters: B texts · K candidates of a text · R rows of the model (B·K) · L length of a prompt · T new tokens · S = L + T places ·
D model width · V vocabulary · E tokens that end a text.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.generate.batch import among, rounded, search
from jaxlm.generate.sample import real
from jaxlm.model import Cache, Model, Params, empty_cache
from jaxlm.model.cache import level, repeat
from jaxlm.parallel import batch_sharding


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """How candidates are found and weighed."""

    top_k: int = 4
    """Candidates: this many most likely tokens."""
    penalty_alpha: float = 0.6
    """Weight of the degeneration penalty, 0 to 1; that of the probability is 1 − penalty_alpha. 0: greedy."""
    max_tokens: int = 64
    """Most new tokens of a text."""

    def __post_init__(self) -> None:
        for name in ("top_k", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.penalty_alpha <= 1:
            raise ValueError(f"penalty_alpha is {self.penalty_alpha}: it must be from 0 to 1")


class _State(NamedTuple):
    new: jax.Array
    """How many new tokens there are."""
    tokens_BT: jax.Array
    length_B: jax.Array
    """How many of them are the text's."""
    open_B: jax.Array
    hidden_BD: jax.Array
    """Of the last token, from which the next is foretold."""
    said_BSD: jax.Array
    """The hidden states of prompt and text, float32 and of length 1."""


class ContrastiveGenerator:
    """New tokens of prompts, by the rule of Su et al. 2022, "A Contrastive Framework for Neural Text Generation", eq. 5: of
    the k likeliest tokens v that with the largest (1 − α) · p(v) − α · max over the text's tokens j of cos(h_v, h_j).

    h are the last hidden states, those of the prompt included. Each candidate must be read before its state is known: the
    k of a text are rows of one call, and the chosen one need not be read again. `vocab_size` is the tokenizer's.
    """

    def __init__(self, model: Model, mesh: jax.sharding.Mesh, vocab_size: int):
        kind = (model.config.architecture, model.config.head.kind)
        if kind != ("decoder", "language_model"):
            raise ValueError(f"contrastive search needs architecture decoder with head language_model, not {' with '.join(kind)}")
        self.model, self.mesh, self.vocab_size = model, mesh, vocab_size
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._apart = jax.jit(model.apart)
        self._run = jax.jit(self._pure, static_argnames=("T", "K"), out_shardings=whole)

    def __call__(
        self, params: Params, prompts: Sequence[Sequence[int]], config: ContrastiveConfig, stop: Collection[int] = ()
    ) -> list[list[int]]:
        """The new tokens of each prompt, each ending before one of `stop` or after `max_tokens`; all prompts are one batch.

        ValueError: a prompt that is empty, or longer than learned positions allow.
        """
        if not len(prompts):
            return []
        T, there, longest = config.max_tokens, self.model.config.positions, max(len(prompt) for prompt in prompts)
        if not all(len(prompt) for prompt in prompts):
            raise ValueError("a prompt is empty: give at least one token (the end-of-text token starts a new text)")
        if self.model.config.position == "learned" and longest + T > there:
            raise ValueError(
                f"a prompt of {longest} tokens and max_tokens {T} need more than the {there} positions that were learned"
            )
        sharding = batch_sharding(self.mesh)
        ways = self.mesh.size // sharding.shard_shape((self.mesh.size,))[0]
        # Prompts end together, so that all rows go on at the same place; rows of length 0 fill up the batch.
        length_B = np.zeros(-(-len(prompts) // ways) * ways, np.int32)
        tokens_BL = np.zeros((len(length_B), max(8, rounded(longest))), np.int32)
        for row, prompt in enumerate(prompts):
            length_B[row], tokens_BL[row, -len(prompt) :] = len(prompt), prompt
        stop_E, K = np.array(sorted(stop), np.int32), min(config.top_k, self.vocab_size)
        with jax.set_mesh(self.mesh):
            batch = jax.device_put((tokens_BL, length_B), sharding)
            found = self._run(self._apart(params), *batch, stop_E, np.float32(config.penalty_alpha), T=T, K=K)
            texts_BT, length_B = jax.device_get(found)
        return [text_T[:length].tolist() for text_T, length, _ in zip(texts_BT, length_B, prompts, strict=False)]

    def _pure(
        self, params: Params, tokens_BL: jax.Array, length_B: jax.Array, stop_E: jax.Array, alpha: jax.Array, *, T: int, K: int
    ) -> tuple[jax.Array, jax.Array]:
        """(B, T) new tokens, and how many of them are the text's."""
        B, L = tokens_BL.shape
        start_B = L - length_B
        place_S = jnp.arange(L + T)

        def read(tokens_BL: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
            found: tuple[jax.Array, Cache] = self.model.apply(params, {"tokens_BL": tokens_BL}, cache, method="states")
            return found

        def advance(state: _State, cache: Cache) -> tuple[_State, Cache]:
            logits_BLV = self.model.apply(params, state.hidden_BD[:, None], method="logits")
            p_BK, token_BK = jax.lax.top_k(jax.nn.softmax(real(logits_BLV[:, 0], self.vocab_size), axis=-1), K)
            hidden_RLD, cache = read(token_BK.reshape(B * K, 1), cache)
            hidden_BKD = hidden_RLD.reshape(B, K, -1)
            one_BKD = _unit(hidden_BKD)
            cosine_BKS = jnp.einsum("BKD,BSD->BKS", one_BKD, state.said_BSD)
            place = L + state.new
            text_BS = (place_S[None, :] >= start_B[:, None]) & (place_S < place)[None, :]
            penalty_BK = jnp.max(jnp.where(text_BS[:, None, :], cosine_BKS, -1), axis=-1)
            best_B = jnp.argmax((1 - alpha) * p_BK - alpha * penalty_BK, axis=-1).astype(jnp.int32)

            def best(x: jax.Array) -> jax.Array:
                return jnp.take_along_axis(x, best_B.reshape(B, *(1,) * (x.ndim - 1)), axis=1)

            token_B1 = best(token_BK)
            open_B = state.open_B & ~among(token_B1[:, 0], stop_E)
            return _State(
                state.new + 1,
                jax.lax.dynamic_update_slice(state.tokens_BT, token_B1, (0, state.new)),
                state.length_B + open_B.astype(jnp.int32),
                open_B,
                best(hidden_BKD)[:, 0],
                jax.lax.dynamic_update_slice(state.said_BSD, best(one_BKD), (0, place, 0)),
            ), level(cache, best_B)

        cache = dataclasses.replace(empty_cache(self.model.config, B, L, piece=L), start_B=start_B)
        hidden_BLD, cache = read(tokens_BL, cache)
        said_BSD = jnp.pad(_unit(hidden_BLD), ((0, 0), (0, T), (0, 0)))
        none_BT, zero_B = jnp.zeros((B, T), jnp.int32), jnp.zeros(B, jnp.int32)
        begin = _State(jnp.int32(0), none_BT, zero_B, length_B > 0, hidden_BLD[:, -1], said_BSD)
        last = search(advance, begin, repeat(cache, K), T)
        return last.tokens_BT, last.length_B


def _unit(x: jax.Array) -> jax.Array:
    """Float32 vectors of length 1."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny))
