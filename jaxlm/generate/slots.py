"""The device's part of an engine: a fixed number of slots, each with a text at its own length, advanced together.

Letters: B slots · L tokens of a piece of a prompt · T new tokens of a burst · E tokens that end a text · M tokens with a bias ·
C likeliest tokens · V vocabulary · S places of the cache.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.generate.request import Request
from jaxlm.generate.sample import Knobs, SampleConfig, Seen, knobs, sample
from jaxlm.model import Cache, Model, Params, empty_cache, only

BURST = 32
"""Most tokens of a slot between two looks of the host."""
TOP = 20
"""Most likeliest tokens told with each one."""
STOPS = 8
"""Most tokens that end a text."""
BIASES = 300
"""Most tokens whose logits a request changes."""


@flax.struct.dataclass
class Row:
    """What a slot knows of its request."""

    knobs: Knobs
    key_B: jax.Array
    """Data of the random key that each token's own is folded from."""
    stop_BE: jax.Array
    """Filled up with −1."""
    limit_B: jax.Array
    """Most new tokens."""
    biased_BM: jax.Array
    """Tokens whose logits are changed, filled up with one that no table has."""
    bias_BM: jax.Array


@flax.struct.dataclass
class Slots:
    """All that lies on the device beside the parameters."""

    cache: Cache
    row: Row
    seen: Seen
    token_B: jax.Array
    """The last token of each text, which the cache does not hold yet."""
    new_B: jax.Array
    """How many new tokens each text has."""
    running_B: jax.Array


class Scores(NamedTuple):
    """The model's log-probabilities: of the token taken, and of the likeliest ones with their ids, best first."""

    own: jax.Array
    top: jax.Array
    id: jax.Array


class Burst(NamedTuple):
    """What a burst gave: in each slot's row `count` tokens, and whether it goes on."""

    tokens_BT: jax.Array
    count_B: jax.Array
    running_B: jax.Array
    new_B: jax.Array
    scores: Scores | None


def row_of(requests: Sequence[Request]) -> Row:
    """Rows of requests, in NumPy."""
    stop_BE = np.full((len(requests), STOPS), -1, np.int32)
    biased_BM = np.full((len(requests), BIASES), np.iinfo(np.int32).max, np.int32)
    bias_BM = np.zeros((len(requests), BIASES), np.float32)
    for i, request in enumerate(requests):
        stop_BE[i, : len(request.stop)] = sorted(request.stop)
        for j, (token, bias) in enumerate(request.bias):
            biased_BM[i, j], bias_BM[i, j] = token, bias
    key_B = np.stack([_key(request.seed) for request in requests])
    limit_B = np.array([request.max_tokens for request in requests], np.int32)
    row = (key_B, stop_BE, limit_B, biased_BM, bias_BM)
    return Row(knobs([request.sample for request in requests]), *row)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1024)
def _key(seed: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


class Decoder:
    """The three programs of an engine, compiled for `slots` texts of up to `context` tokens.

    On a CPU what a text becomes is the same to the bit whatever stands in the other slots (not tried elsewhere): each
    row of a program is computed by itself, of the cache only the blocks up to the longest text are read, and those
    behind a text's own end add nothing.
    """

    def __init__(self, model: Model, vocab_size: int, slots: int, context: int, chunk: int):
        self.model, self.vocab_size, self.slots, self.context, self.chunk = model, vocab_size, slots, context, chunk
        donate = functools.partial(jax.jit, donate_argnums=1)
        self.read = donate(self._read, static_argnames="scored")
        self.write = donate(self._write, static_argnames="scored")
        self.copy = jax.jit(self._copy, donate_argnums=0)
        self.split = jax.jit(model.apart)

    def empty(self) -> Slots:
        B, V = self.slots, self.model.config.V
        # Room for a whole piece behind the last token: what fills it up is written too.
        cache = empty_cache(self.model.config, B, self.context + self.chunk)
        seen = Seen(jnp.zeros((B, V), bool), jnp.zeros((B, V), jnp.int32))
        row = jax.tree.map(jnp.array, row_of([Request((0,), sample=SampleConfig(0))] * B))

        def zeros(dtype: Any = jnp.int32) -> jax.Array:  # each a buffer of its own: all are donated
            return jnp.zeros(B, dtype)

        return Slots(dataclasses.replace(cache, length=zeros()), row, seen, zeros(), zeros(), zeros(bool))

    def _read(
        self, params: Params, state: Slots, slot: jax.Array, row: Row, prompt_1V: jax.Array, tokens_1L: jax.Array,
        after_1L: jax.Array, start: jax.Array, length: jax.Array, whole: jax.Array, allowed_1V: jax.Array | None, *, scored: bool,
    ) -> tuple[Slots, jax.Array, Scores | None, Scores | None]:  # fmt: skip
        """`length` tokens of a prompt written into a slot behind `start` others; after the `whole` prompt the first new
        token. Returns also that token (1,), its scores, and those of the tokens `after_1L` each of the piece (L). The
        tokens of the whole prompt and its settings come with each piece."""
        own = dataclasses.replace(only(state.cache, slot[None]), length=start[None])
        last_1 = (length - 1)[None]
        logits_1LV, own = self.model.apply(params, {"tokens_BL": tokens_1L}, own, at_B=None if scored else last_1)
        logits_1V = jnp.take_along_axis(logits_1LV, last_1[:, None, None], axis=1)[:, 0] if scored else logits_1LV[:, 0]
        seen = Seen(prompt_1V, jnp.zeros_like(prompt_1V, jnp.int32))
        zero_1 = jnp.zeros(1, jnp.int32)
        token_1 = self._choose(logits_1V, row, zero_1, seen, allowed_1V)
        ended_1 = jnp.any(token_1[:, None] == row.stop_BE, axis=1) | (row.limit_B < 1)
        new_1 = (~ended_1).astype(jnp.int32)
        own = dataclasses.replace(own, length=(start + length)[None])
        running_1 = whole & ~ended_1 & (row.limit_B > 1)
        state = _put(state, Slots(own, row, seen.take(token_1), token_1, new_1, running_1))
        if not scored:
            return state, token_1, None, None
        of_prompt = self._scores(logits_1LV[0], after_1L[0])
        return state, token_1, self._scores(logits_1V, token_1), of_prompt

    def _write(
        self, params: Params, whole: Slots, slot_B: jax.Array | None, live_B: jax.Array, steps: jax.Array,
        allowed_BV: jax.Array | None, *, scored: bool,
    ) -> tuple[Slots, Burst]:  # fmt: skip
        """Up to `steps` more tokens of each running text in these slots (None: in all); those no longer `live` stop first."""
        B, state = live_B.shape[0], whole if slot_B is None else _get(whole, slot_B)
        state = state.replace(running_B=state.running_B & live_B)  # type: ignore[attr-defined]
        none_BT = jnp.zeros((B, BURST), jnp.int32)
        scores = None
        if scored:
            scores = Scores(
                jnp.zeros((B, BURST)), jnp.zeros((B, BURST, TOP)), jnp.zeros((B, BURST, TOP), jnp.int32)
            )  # fmt: skip
        Carry = tuple[jax.Array, Slots, Burst]
        begin = (jnp.int32(0), state, Burst(none_BT, jnp.zeros(B, jnp.int32), state.running_B, state.new_B, scores))

        def more(carry: Carry) -> jax.Array:
            return (carry[0] < steps) & jnp.any(carry[1].running_B)

        def advance(carry: Carry) -> Carry:
            i, state, burst = carry
            running_B = state.running_B
            # Texts that stand still are computed too; what they write behind their end is written over.
            logits_BLV, cache = self.model.apply(params, {"tokens_BL": state.token_B[:, None]}, state.cache)
            cache = dataclasses.replace(cache, length=state.cache.length + running_B.astype(jnp.int32))
            logits_BV = logits_BLV[:, 0]
            token_B = self._choose(logits_BV, state.row, state.new_B, state.seen, allowed_BV)
            ended_B = jnp.any(token_B[:, None] == state.row.stop_BE, axis=1)
            given_B = running_B & ~ended_B
            new_B = state.new_B + given_B.astype(jnp.int32)
            state = Slots(
                cache, state.row, self._see(state, token_B), jnp.where(running_B, token_B, state.token_B), new_B,
                given_B & (new_B < state.row.limit_B),
            )  # fmt: skip

            def write(all_: jax.Array, one: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice_in_dim(all_, one[:, None], i, axis=1)

            told = None if burst.scores is None else jax.tree.map(write, burst.scores, self._scores(logits_BV, token_B))
            count_B = burst.count_B + given_B.astype(jnp.int32)
            return i + 1, state, Burst(write(burst.tokens_BT, token_B), count_B, state.running_B, new_B, told)

        _, state, burst = jax.lax.while_loop(more, advance, begin)
        return _put(whole, state), burst

    def _see(self, state: Slots, token_B: jax.Array) -> Seen:
        """Tokens are counted only where some row has penalties: those tables are large."""
        return jax.lax.cond(state.row.knobs.penalise, lambda: state.seen.take(token_B), lambda: state.seen)

    def _choose(self, logits_BV: jax.Array, row: Row, new_B: jax.Array, seen: Seen, allowed_BV: jax.Array | None) -> jax.Array:
        """The next token of each row, drawn with a key that hangs on its request's seed and its place alone."""
        keys_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(row.key_B), new_B)
        row_B1 = jnp.arange(logits_BV.shape[0])[:, None]
        logits_BV = jax.lax.cond(
            jnp.any(row.bias_BM != 0),
            lambda: logits_BV.at[row_B1, row.biased_BM].add(row.bias_BM.astype(logits_BV.dtype), mode="drop"),
            lambda: logits_BV,
        )
        return sample(logits_BV, keys_B, row.knobs, self.vocab_size, seen, allowed_BV)

    def _scores(self, logits_BV: jax.Array, token_B: jax.Array) -> Scores:
        # Over the whole table, as the loss and `harness` have it; entries that only pad it are never shown.
        logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
        own_B = jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0]
        top_BC, id_BC = jax.lax.top_k(logp_BV[:, : self.vocab_size], min(TOP, self.vocab_size))
        more = [(0, 0), (0, TOP - top_BC.shape[1])]
        return Scores(own_B, jnp.pad(top_BC, more, constant_values=-jnp.inf), jnp.pad(id_BC.astype(jnp.int32), more))

    def _copy(self, state: Slots, source: jax.Array, target: jax.Array, length: jax.Array) -> Slots:
        """The first `length` tokens that one slot's cache holds, in another's too."""

        def change(x: jax.Array) -> jax.Array:
            one = jax.lax.dynamic_slice_in_dim(x, source, 1, axis=0)
            return jax.lax.dynamic_update_slice_in_dim(x, one, target, axis=0)

        # The length with them: what a slot that stands still writes must not fall on what was copied.
        cache = dataclasses.replace(state.cache.map(change), length=state.cache.length.at[target].set(length))
        return state.replace(cache=cache)  # type: ignore[attr-defined]


def _get(state: Slots, slot_B: jax.Array) -> Slots:
    """Some of the slots; their keys and values stay where they are."""
    some: Slots = jax.tree.map(lambda x: x[slot_B], state.replace(cache=None))  # type: ignore[attr-defined]
    return some.replace(cache=only(state.cache, slot_B))  # type: ignore[attr-defined]


def _put(state: Slots, some: Slots) -> Slots:
    """All slots, with `some` as they are now."""
    slot_B = some.cache.rows_B
    if slot_B is None:
        return some

    def put(all_: jax.Array, own: jax.Array) -> jax.Array:
        return all_.at[slot_B].set(own.astype(all_.dtype), unique_indices=True)

    cache = dataclasses.replace(some.cache, rows_B=None, length=put(state.cache.length, some.cache.length))
    rest: Slots = jax.tree.map(put, state.replace(cache=None), some.replace(cache=None))  # type: ignore[attr-defined]
    return rest.replace(cache=cache)  # type: ignore[attr-defined]


def pieces(length: int, start: int, chunk: int) -> list[tuple[int, int, int]]:
    """(from, tokens, size) of the pieces in which a prompt is read from `start`, a multiple of `chunk`: whole ones, and the
    rest in the smallest of a few sizes. They hang on the prompt alone, so that its text does."""
    assert start % chunk == 0 and start < length
    found = []
    for begin in range(start, length, chunk):
        tokens = min(chunk, length - begin)
        size = chunk
        while size >= 4 * 8 and size // 4 >= tokens:
            size //= 4
        found.append((begin, tokens, size))
    return found


def filled(tokens: Sequence[int], size: int) -> Any:
    row = np.zeros((1, size), np.int32)
    row[0, : len(tokens)] = tokens
    return row
