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
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.generate.request import BAD, BAD_LENGTH, BIASES, STOPS, TOP, Request
from jaxlm.generate.sample import Knobs, SampleConfig, Seen, knobs, sample
from jaxlm.model import Cache, Model, Params, empty_cache, only
from jaxlm.parallel.rules import COMPUTED, spec

BURST = 32
"""Most tokens of a slot between two looks of the host."""
NONE = np.iinfo(np.int32).max
"""Padding of lists of token ids: no vocabulary has it, so scattering to it is dropped."""


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
    least_B: jax.Array
    """New tokens before which none of `stop_BE` may come."""
    biased_BM: jax.Array
    """Tokens whose logits are changed, filled up with one that no table has."""
    bias_BM: jax.Array
    bad_BWH: jax.Array
    """Token sequences that must not occur, without their last token: right-aligned, filled up with −1."""
    worst_BW: jax.Array
    """The last token of each, filled up with `NONE`."""
    scored_B: jax.Array
    """Whether log-probabilities are asked for."""


@flax.struct.dataclass
class Slots:
    """All that lies on the device beside the parameters."""

    cache: Cache
    row: Row
    seen: Seen
    allowed_BV: jax.Array
    """False for tokens that must not come next."""
    recent_BH: jax.Array
    """The last new tokens, filled up with −1 at the front."""
    token_B: jax.Array
    """The last token of each text, which the cache does not hold yet."""
    new_B: jax.Array
    """How many new tokens each text has."""
    running_B: jax.Array


class Scores(NamedTuple):
    """The model's log-probabilities: of the token taken, with its rank from 1, and of the likeliest ones with their ids, best
    first. Zeros where no request asks for them."""

    own: jax.Array
    rank: jax.Array
    top: jax.Array
    id: jax.Array


class Burst(NamedTuple):
    """What a burst gave: in each slot's row `count` tokens, and whether it goes on."""

    tokens_BT: jax.Array
    count_B: jax.Array
    running_B: jax.Array
    new_B: jax.Array
    scores: Scores


def row_of(requests: Sequence[Request]) -> Row:
    """Rows of requests, in NumPy."""
    stop_BE = np.full((len(requests), STOPS), -1, np.int32)
    biased_BM = np.full((len(requests), BIASES), NONE, np.int32)
    bias_BM = np.zeros((len(requests), BIASES), np.float32)
    bad_BWH = np.full((len(requests), BAD, BAD_LENGTH - 1), -1, np.int32)
    worst_BW = np.full((len(requests), BAD), NONE, np.int32)
    for i, request in enumerate(requests):
        stop_BE[i, : len(request.stop)] = sorted(request.stop)
        for j, (token, bias) in enumerate(request.bias):
            biased_BM[i, j], bias_BM[i, j] = token, bias
        for j, (*before, last) in enumerate(request.bad):
            worst_BW[i, j] = last
            if before:
                bad_BWH[i, j, -len(before) :] = before
    key_B = np.stack([_key(request.seed) for request in requests])
    limit_B = np.array([request.max_tokens for request in requests], np.int32)
    least_B = np.array([request.min_tokens for request in requests], np.int32)
    scored_B = np.array([request.logprobs is not None for request in requests], bool)
    row = (key_B, stop_BE, limit_B, least_B, biased_BM, bias_BM, bad_BWH, worst_BW, scored_B)
    return Row(knobs([request.sample for request in requests]), *row)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1024)
def _key(seed: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


class Decoder:
    """The programs of an engine, compiled for `slots` texts of up to `context` tokens: none depends on what a request asks for,
    except that the scores of a prompt's tokens have a program of their own.

    On a CPU what a text becomes is the same to the bit whatever stands in the other slots (not tried elsewhere): each
    row of a program is computed by itself, of the cache only the blocks up to the longest text are read, and those
    behind a text's own end add nothing.
    """

    def __init__(self, model: Model, vocab_size: int, slots: int, context: int, chunk: int, mesh: jax.sharding.Mesh):
        self.model, self.vocab_size, self.slots, self.context, self.chunk = model, vocab_size, slots, context, chunk
        self._free = row_of([Request((0,), sample=SampleConfig(0))] * slots)
        with jax.set_mesh(mesh):
            # Each program leaves the state in the one layout that all take: in another one it would be compiled again.
            state = _layout(jax.eval_shape(self._empty, self._free), mesh)
        self.read = jax.jit(self._read, donate_argnums=1, static_argnames="scored", out_shardings=(state, None, None, None))
        self.write = jax.jit(self._write, donate_argnums=1, out_shardings=(state, None))
        self.copy = jax.jit(self._copy, donate_argnums=0, out_shardings=state)
        self.allow = jax.jit(self._allow, donate_argnums=0, out_shardings=state)
        self.split = jax.jit(model.apart)
        self._begin = jax.jit(self._empty, out_shardings=state)

    def empty(self) -> Slots:
        """The state of slots without a text."""
        return self._begin(self._free)

    def _empty(self, row: Row) -> Slots:
        B, V = self.slots, self.model.config.V
        # Room for a whole piece behind the last token: what fills it up is written too.
        cache = empty_cache(self.model.config, B, self.context + self.chunk)
        seen = Seen(jnp.zeros((B, V), bool), jnp.zeros((B, V), jnp.int32))
        allowed_BV, recent_BH = jnp.ones((B, V), bool), jnp.full((B, BAD_LENGTH - 1), -1, jnp.int32)
        zeros_B = jnp.zeros(B, jnp.int32)
        cache = dataclasses.replace(cache, length=zeros_B)
        return Slots(cache, row, seen, allowed_BV, recent_BH, zeros_B, zeros_B, zeros_B > 0)

    def _read(
        self, params: Params, state: Slots, slot: jax.Array, row: Row, prompt_1V: jax.Array, allowed_1V: jax.Array,
        tokens_1L: jax.Array, after_1L: jax.Array, start: jax.Array, length: jax.Array, whole: jax.Array, *, scored: bool,
    ) -> tuple[Slots, jax.Array, Scores, Scores | None]:  # fmt: skip
        """Prefill `length` prompt tokens of a slot at offset `start`; sample the first new token if they end the `whole` prompt.

        Returns also that token (1,), its scores, and, if `scored`, the scores (L) of the tokens `after_1L` each prompt token.
        The tokens of the whole prompt, the tokens allowed and the settings come with each chunk.
        """
        own = dataclasses.replace(only(state.cache, slot[None]), length=start[None])
        last_1 = (length - 1)[None]
        logits_1LV, own = self.model.apply(params, {"tokens_BL": tokens_1L}, own, at_B=None if scored else last_1)
        logits_1V = jnp.take_along_axis(logits_1LV, last_1[:, None, None], axis=1)[:, 0] if scored else logits_1LV[:, 0]
        seen = Seen(prompt_1V, jnp.zeros_like(prompt_1V, jnp.int32))
        zero_1, recent_1H = jnp.zeros(1, jnp.int32), jnp.full((1, BAD_LENGTH - 1), -1, jnp.int32)
        own = dataclasses.replace(own, length=(start + length)[None])
        first = Slots(own, row, seen, allowed_1V, recent_1H, zero_1, zero_1, zero_1 > 0)
        token_1 = self._choose(logits_1V, first)
        ended_1 = _ends(token_1, row) | (row.limit_B < 1)
        running_1 = whole & ~ended_1 & (row.limit_B > 1)
        first = self._took(first, token_1, jnp.ones(1, bool)).replace(  # type: ignore[attr-defined]
            new_B=(~ended_1).astype(jnp.int32), running_B=running_1
        )
        scores = self._scores_if_asked(logits_1V, token_1, row.scored_B)
        return _put(state, first), token_1, scores, self._scores(logits_1LV[0], after_1L[0]) if scored else None

    def _write(
        self, params: Params, whole: Slots, slot_B: jax.Array | None, live_B: jax.Array, turn_B: jax.Array, steps: jax.Array,
    ) -> tuple[Slots, Burst]:  # fmt: skip
        """Decode up to `steps` more tokens of each running text in these slots (None: in all) whose `turn_B` it is; the others
        wait. Those no longer `live_B` stop first."""
        B, state = live_B.shape[0], whole if slot_B is None else _get(whole, slot_B)
        going_B = state.running_B & live_B
        state = state.replace(running_B=going_B & turn_B)  # type: ignore[attr-defined]
        none_BT = jnp.zeros((B, BURST), jnp.int32)
        scores = Scores(jnp.zeros((B, BURST)), none_BT, jnp.zeros((B, BURST, TOP)), jnp.zeros((B, BURST, TOP), jnp.int32))
        Carry = tuple[jax.Array, Slots, Burst]
        begin = (jnp.int32(0), state, Burst(none_BT, jnp.zeros(B, jnp.int32), state.running_B, state.new_B, scores))

        def more(carry: Carry) -> jax.Array:
            return (carry[0] < steps) & jnp.any(carry[1].running_B)

        def advance(carry: Carry) -> Carry:
            i, state, burst = carry
            running_B = state.running_B
            # Texts that stand still are computed too; what they write behind their end is written over.
            logits_BLV, cache = self.model.apply(params, {"tokens_BL": state.token_B[:, None]}, state.cache)
            logits_BV = logits_BLV[:, 0]
            token_B = self._choose(logits_BV, state)
            ended_B = _ends(token_B, state.row)
            given_B = running_B & ~ended_B
            new_B = state.new_B + given_B.astype(jnp.int32)
            cache = dataclasses.replace(cache, length=state.cache.length + running_B.astype(jnp.int32))
            state = self._took(state.replace(cache=cache), token_B, running_B)  # type: ignore[attr-defined]
            state = state.replace(new_B=new_B, running_B=given_B & (new_B < state.row.limit_B))  # type: ignore[attr-defined]

            def write(all_: jax.Array, one: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice_in_dim(all_, one[:, None], i, axis=1)

            told = jax.tree.map(write, burst.scores, self._scores_if_asked(logits_BV, token_B, state.row.scored_B & running_B))
            count_B = burst.count_B + given_B.astype(jnp.int32)
            return i + 1, state, Burst(write(burst.tokens_BT, token_B), count_B, state.running_B, new_B, told)

        _, state, burst = jax.lax.while_loop(more, advance, begin)
        state = state.replace(running_B=jnp.where(turn_B, state.running_B, going_B))
        return _put(whole, state), burst

    def _took(self, state: Slots, token_B: jax.Array, running_B: jax.Array) -> Slots:
        """The state after one more token of each running text."""
        seen, row_B = state.seen, jnp.arange(token_B.shape[0])

        def count() -> Seen:
            return Seen(seen.prompt_BV, seen.counts_BV.at[row_B, token_B].add(running_B.astype(jnp.int32)))

        shifted_BH = jnp.concatenate([state.recent_BH[:, 1:], token_B[:, None]], axis=1)
        return state.replace(  # type: ignore[attr-defined]
            # Counted only where some row has penalties: the tables are large.
            seen=jax.lax.cond(state.row.knobs.penalise, count, lambda: seen),
            recent_BH=jnp.where(running_B[:, None], shifted_BH, state.recent_BH),
            token_B=jnp.where(running_B & (token_B >= 0), token_B, state.token_B),
        )

    def _choose(self, logits_BV: jax.Array, state: Slots) -> jax.Array:
        """The next token of each row, sampled with a key that depends on its request's seed and position alone; −1 where
        `allowed_BV`, `least_B` and `worst_BW` together leave no token."""
        row = state.row
        keys_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(row.key_B), state.new_B)
        row_B1 = jnp.arange(logits_BV.shape[0])[:, None]
        logits_BV = jax.lax.cond(
            jnp.any(row.bias_BM != 0),
            lambda: logits_BV.at[row_B1, row.biased_BM].add(row.bias_BM.astype(logits_BV.dtype), mode="drop"),
            lambda: logits_BV,
        )
        early_B = state.new_B < row.least_B

        def restricted() -> tuple[jax.Array, jax.Array]:
            stop_BE = jnp.where(early_B[:, None] & (row.stop_BE >= 0), row.stop_BE, NONE)
            same_BW = jnp.all((row.bad_BWH < 0) | (row.bad_BWH == state.recent_BH[:, None, :]), axis=-1)
            allowed_BV = state.allowed_BV.at[row_B1, stop_BE].set(False, mode="drop")
            allowed_BV = allowed_BV.at[row_B1, jnp.where(same_BW, row.worst_BW, NONE)].set(False, mode="drop")
            return allowed_BV, jnp.any(allowed_BV[:, : self.vocab_size], axis=1)

        some = jnp.any(early_B) | jnp.any(row.worst_BW != NONE)
        # Otherwise the host has seen to it that a token is left.
        allowed_BV, any_B = jax.lax.cond(some, restricted, lambda: (state.allowed_BV, jnp.ones_like(early_B)))
        token_B = sample(logits_BV, keys_B, row.knobs, self.vocab_size, state.seen, allowed_BV)
        return jnp.where(any_B, token_B, -1)

    def _scores_if_asked(self, logits_BV: jax.Array, token_B: jax.Array, asked_B: jax.Array) -> Scores:
        B = token_B.shape[0]
        none = Scores(jnp.zeros(B), jnp.zeros(B, jnp.int32), jnp.zeros((B, TOP)), jnp.zeros((B, TOP), jnp.int32))
        return jax.lax.cond(jnp.any(asked_B), lambda: self._scores(logits_BV, token_B), lambda: none)

    def _scores(self, logits_BV: jax.Array, token_B: jax.Array) -> Scores:
        # Over the whole table, as the loss and `harness` have it; entries that only pad it are never shown.
        logp_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32), axis=-1)
        own_B = jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0]
        rank_B = 1 + jnp.sum(logp_BV[:, : self.vocab_size] > own_B[:, None], axis=-1, dtype=jnp.int32)
        top_BC, id_BC = jax.lax.top_k(logp_BV[:, : self.vocab_size], min(TOP, self.vocab_size))
        more = [(0, 0), (0, TOP - top_BC.shape[1])]
        return Scores(own_B, rank_B, jnp.pad(top_BC, more, constant_values=-jnp.inf), jnp.pad(id_BC.astype(jnp.int32), more))

    def _allow(self, state: Slots, slot: jax.Array, allowed_V: jax.Array) -> Slots:
        """Set the tokens that may come next in a slot."""
        return state.replace(allowed_BV=state.allowed_BV.at[slot].set(allowed_V))  # type: ignore[attr-defined]

    def _copy(self, state: Slots, source: jax.Array, target: jax.Array, length: jax.Array) -> Slots:
        """The first `length` tokens that one slot's cache holds, in another's too."""

        def change(x: jax.Array) -> jax.Array:
            one = jax.lax.dynamic_slice_in_dim(x, source, 1, axis=0)
            return jax.lax.dynamic_update_slice_in_dim(x, one, target, axis=0)

        # The length with them: what a slot that stands still writes must not fall on what was copied.
        cache = dataclasses.replace(state.cache.map(change), length=state.cache.length.at[target].set(length))
        return state.replace(cache=cache)  # type: ignore[attr-defined]


def _ends(token_B: jax.Array, row: Row) -> jax.Array:
    """Whether a token ends its text: one of its stop tokens, or −1, none."""
    return jnp.any(token_B[:, None] == row.stop_BE, axis=1) | (token_B < 0)


def _layout(state: Slots, mesh: jax.sharding.Mesh) -> Slots:
    """How a state of these shapes lies on the devices: heads and rows of the cache are split, the rest is held whole."""
    whole = NamedSharding(mesh, PartitionSpec())
    layout: Slots = jax.tree.map(lambda _: whole, state)
    split: Any = jax.tree.map(lambda x: NamedSharding(mesh, spec("BKSH", x.shape, mesh, COMPUTED)), state.cache.layers)
    return layout.replace(cache=layout.cache.replace(layers=split))  # type: ignore[attr-defined]


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


def pieces(length: int, start: int, chunk: int, *, whole: bool = False) -> list[tuple[int, int, int]]:
    """(from, tokens, size) of the pieces in which a prompt is read from `start`, a multiple of `chunk`: whole ones, and the
    rest in the smallest of a few sizes (`whole`: in a whole one too). They hang on the prompt alone, so that its text does."""
    assert start % chunk == 0 and start < length
    found = []
    for begin in range(start, length, chunk):
        tokens = min(chunk, length - begin)
        size = chunk
        while not whole and size >= 4 * 8 and size // 4 >= tokens:
            size //= 4
        found.append((begin, tokens, size))
    return found


def filled(tokens: Sequence[int], size: int) -> Any:
    row = np.zeros((1, size), np.int32)
    row[0, : len(tokens)] = tokens
    return row
