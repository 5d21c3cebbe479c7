"""Generation: prefill the prompt, then decode token by token with a key/value cache."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.generate.sample import SampleConfig, sample
from jaxlm.model import Cache, Model, Params, empty_cache
from jaxlm.parallel import settle


class Generator:
    """Streams tokens from one model; compiled once for each power of two of the prompt's length.

    `vocab_size` is the tokenizer's: entries beyond it only pad the model's table.
    """

    def __init__(self, model: Model, mesh: jax.sharding.Mesh, vocab_size: int):
        self.model, self.mesh, self.vocab_size = model, mesh, vocab_size
        self._prefill = jax.jit(self._prefill_pure, static_argnames="config")
        self._decode = jax.jit(self._decode_pure, static_argnames="config", donate_argnums=1)

    def _prefill_pure(
        self, params: Params, tokens_BL: jax.Array, length: jax.Array, key: jax.Array, config: SampleConfig
    ) -> tuple[jax.Array, Cache]:
        """The first new token of a prompt of `length` tokens, padded on the right to a round size.

        The padding is harmless: no token before it sees it, and the cache is set back to `length`, so
        that its slots are written over.
        """
        cache = empty_cache(self.model.config, tokens_BL.shape[0])
        logits_BLV, cache = self.model.apply(params, {"tokens_BL": tokens_BL}, cache)
        logits_BV = jax.lax.dynamic_index_in_dim(logits_BLV, length - 1, axis=1, keepdims=False)
        return sample(logits_BV, key, config, self.vocab_size), cache.replace(length=length)

    def _decode_pure(
        self, params: Params, cache: Cache, token_B: jax.Array, key: jax.Array, config: SampleConfig
    ) -> tuple[jax.Array, Cache]:
        logits_BLV, cache = self.model.apply(params, {"tokens_BL": token_B[:, None]}, cache)
        return sample(logits_BLV[:, 0, :], key, config, self.vocab_size), cache

    def stream(
        self,
        params: Params,
        prompt: Sequence[int],
        max_tokens: int,
        config: SampleConfig,
        *,
        seed: int = 0,
        stop: int | None = None,
    ) -> Iterator[int]:
        """Yield up to `max_tokens` token ids after `prompt` (at least one id), ending before `stop`.

        The same seed gives the same tokens. Of a prompt longer than the model's context the last
        `positions` tokens count. When the context is full, its later half is read again and goes on
        being extended: every token is drawn with at least half a context before it.
        """
        if not len(prompt):
            raise ValueError("the prompt is empty: give at least one token (the end-of-text token starts a new text)")
        positions = self.model.config.positions
        text = [int(token) for token in prompt]
        run_key = jax.random.key(seed)
        cache: Cache | None = None
        token_B: jax.Array | None = None
        filled = 0
        with jax.set_mesh(self.mesh):
            for i in range(max_tokens):
                key = jax.random.fold_in(run_key, i)
                if cache is not None and filled < positions:
                    token_B, cache = self._decode(params, cache, token_B, key, config=config)
                    filled += 1
                else:
                    keep = text[-positions:] if cache is None else text[-max(1, positions // 2) :]
                    filled = len(keep)
                    token_B, cache = self._prefill(params, *self._padded(keep), key, config=config)
                settle(self.mesh, token_B)
                token = int(jax.device_get(token_B)[0])
                if token == stop:
                    return
                text.append(token)
                yield token

    def _padded(self, tokens: Sequence[int]) -> tuple[Any, Any]:
        size = min(self.model.config.positions, 1 << (len(tokens) - 1).bit_length())
        row = np.zeros((1, size), np.int32)
        row[0, : len(tokens)] = tokens
        return jnp.asarray(row), jnp.asarray(len(tokens), jnp.int32)
