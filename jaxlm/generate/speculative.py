"""Speculative decoding: a cheap guess at the next tokens, checked by the model all at once. The text is distributed as if
the model had drawn it token by token; greedy, it is the same text.

Letters: B rows (one) · L tokens of a call · K drafted tokens · J = K + 1 places that are checked · V the tokenizer's tokens.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.generate.decode import Generator
from jaxlm.generate.sample import Knobs, SampleConfig, Seen, adjust, keep, knobs, seen_of
from jaxlm.model import Cache, Model, Params, empty_cache
from jaxlm.parallel import settle


@dataclasses.dataclass
class Stats:
    """What drafting was good for: of `drafted` tokens in `rounds` rounds the model took `accepted`."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


def probabilities(logits_JV: jax.Array, knobs: Knobs, seen: Seen | None) -> jax.Array:
    """What each place is drawn from, in float32: `knobs` and `seen` have a row for each."""
    logits_JV = logits_JV.astype(jnp.float32)
    return jax.nn.softmax(keep(logits_JV if seen is None else adjust(logits_JV, knobs, seen), knobs), axis=-1)


def check(p_JV: jax.Array, q_KV: jax.Array, drafts_K: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many drafts are taken, and the token behind them.

    Modified rejection sampling (Leviathan et al. 2023, algorithm 1; Chen et al. 2023): a draft that was drawn from q is
    taken with probability min(1, p / q), and in place of the first that is not a token is drawn from max(0, p − q),
    normalised; behind K taken ones from p. Then each token is distributed as p, whatever q is.
    """
    accept_key, draw_key = jax.random.split(key)
    drafted_K1 = drafts_K[:, None]
    q_K, p_K = (jnp.take_along_axis(x, drafted_K1, axis=1)[:, 0] for x in (q_KV, p_JV[:-1]))
    taken_K = jax.random.uniform(accept_key, q_K.shape) * q_K < p_K
    count = jnp.sum(jnp.cumprod(taken_K.astype(jnp.int32)))
    p_V, q_V = p_JV[count], jnp.pad(q_KV, ((0, 1), (0, 0)))[count]
    rest_V = jnp.maximum(p_V - q_V, 0)
    rest_V = jnp.where(jnp.sum(rest_V) > 0, rest_V, p_V)  # p = q but for rounding
    return count, jax.random.categorical(draw_key, jnp.log(rest_V)).astype(jnp.int32)


def look_up(text: Sequence[int], drafts: int, longest: int = 3) -> list[int] | None:
    """What came after the last tokens of the text when they stood in it before (prompt lookup; Saxena 2023); None: never.

    The longest match of up to `longest` tokens counts, of those the latest. Where what came after reaches the end of the
    text, it goes on from its own beginning, as a text that repeats itself does.
    """
    tokens_S = np.asarray(text, np.int64)
    at = np.arange(len(tokens_S) - 1)
    found: np.ndarray | None = None
    for back in range(min(longest, len(tokens_S) - 1)):
        at = at[at >= back]
        at = at[tokens_S[at - back] == tokens_S[-1 - back]]
        if not len(at):
            break
        found = at
    if found is None:
        return None
    behind_S = tokens_S[found[-1] + 1 :]
    return behind_S[np.arange(drafts) % len(behind_S)].tolist()


class Speculator:
    """`Generator`, with `drafts` tokens guessed and checked in each round: by a smaller model of the same tokenizer, or where
    `draft` is None by looking up what came after the same tokens before.

    A round is one program and one look at the device. Where the context has no room for a whole round, or nothing is
    found to look up, or the text is longer than the draft's context, tokens are drawn one by one.
    """

    def __init__(self, model: Model, mesh: jax.sharding.Mesh, vocab_size: int, drafts: int = 4, draft: Model | None = None):
        if drafts < 1:
            raise ValueError(f"drafted tokens are {drafts}: there must be at least 1")
        self.model, self.mesh, self.vocab_size, self.drafts = model, mesh, vocab_size, drafts
        self._one = Generator(model, mesh, vocab_size)
        self._small = None if draft is None else Generator(draft, mesh, vocab_size)
        self._read = jax.jit(self._read_pure, static_argnames="size")
        self._round = jax.jit(self._round_pure, donate_argnums=(1, 4, 7))
        self._check = jax.jit(self._check_pure, donate_argnums=(1, 6))

    # --- on the device ----------------------------------------------------------------------

    def _read_pure(self, params: Params, tokens_BL: jax.Array, size: int) -> Cache:
        """The draft's cache of a prompt; its length is set when it is used."""
        assert self._small is not None
        model = self._small.model
        return model.apply(params, {"tokens_BL": tokens_BL}, empty_cache(model.config, 1, size), last=True)[1]

    def _round_pure(
        self, params: Params, cache: Cache, pair_BL: jax.Array, small_params: Params, small: Cache, key: jax.Array, knobs: Knobs,
        seen: Seen | None,
    ) -> tuple[jax.Array, jax.Array, Cache, Cache, Seen | None]:  # fmt: skip
        """The draft writes, the model checks. `pair_BL`: the last two tokens of the text, of which `cache` lacks one; the
        draft may lack both, as it never read the last token it guessed."""
        draft_key, key = jax.random.split(key)
        drafts_K, q_KV, small = self._draft(
            small_params, dataclasses.replace(small, length=cache.length - 1), pair_BL, draft_key, knobs, seen
        )
        tokens_J, count, cache, seen = self._check_pure(params, cache, pair_BL[:, 1:], drafts_K, key, knobs, seen, q_KV)
        return tokens_J, count, cache, small, seen

    def _draft(
        self, params: Params, cache: Cache, pair_BL: jax.Array, key: jax.Array, knobs: Knobs, seen: Seen | None
    ) -> tuple[jax.Array, jax.Array, Cache]:
        assert self._small is not None
        apply = self._small.model.apply

        def step(carry: tuple[jax.Array, Cache, Seen | None], key: jax.Array) -> tuple[Any, Any]:
            tokens_BL, cache, seen = carry
            logits_BLV, cache = apply(params, {"tokens_BL": tokens_BL}, cache, last=True)
            q_BV = probabilities(logits_BLV[:, -1, : self.vocab_size], knobs, seen)
            token_B = jax.random.categorical(key, jnp.log(q_BV)).astype(jnp.int32)
            return (token_B[:, None], cache, None if seen is None else seen.take(token_B)), (token_B[0], q_BV[0])

        keys_K = jax.random.split(key, self.drafts)
        carry, one = step((pair_BL, cache, seen), keys_K[0])  # reads two tokens, the others one
        (_, cache, _), rest = jax.lax.scan(step, carry, keys_K[1:])
        drafts_K, q_KV = jax.tree.map(lambda x, more: jnp.concatenate([x[None], more]), one, rest)
        return drafts_K, q_KV, cache

    def _check_pure(
        self, params: Params, cache: Cache, last_BL: jax.Array, drafts_K: jax.Array, key: jax.Array, knobs: Knobs,
        seen: Seen | None, q_KV: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, Cache, Seen | None]:  # fmt: skip
        """New tokens (the first `count` of J), and the cache without what was not taken. Drafts without `q_KV` are certain."""
        length, K = cache.length, drafts_K.shape[0]
        logits_BLV, cache = self.model.apply(params, {"tokens_BL": jnp.concatenate([last_BL, drafts_K[None, :]], axis=1)}, cache)
        certain_KV = jax.nn.one_hot(drafts_K, self.vocab_size, dtype=jnp.int32)
        if seen is not None:  # at each place the drafts before it count as text
            before_JV = jnp.pad(jnp.cumsum(certain_KV, axis=0), ((1, 0), (0, 0)))
            seen = Seen(jnp.repeat(seen.prompt_BV, K + 1, axis=0), seen.counts_BV + before_JV)
        rows = jax.tree.map(lambda x: jnp.repeat(x, K + 1), knobs)
        p_JV = probabilities(logits_BLV[0, :, : self.vocab_size], rows, seen)
        count, token = check(p_JV, certain_KV.astype(jnp.float32) if q_KV is None else q_KV, drafts_K, key)
        tokens_J = jnp.pad(drafts_K, (0, 1)).at[count].set(token)
        if seen is not None:
            seen = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, count), seen).take(token[None])
        return tokens_J, count + 1, dataclasses.replace(cache, length=length + count + 1), seen

    # --- on the host ------------------------------------------------------------------------

    def stream(
        self, params: Params, prompt: Sequence[int], max_tokens: int, config: SampleConfig, *,
        draft_params: Params | None = None, seed: int = 0, stop: Collection[int] = (), stats: Stats | None = None,
    ) -> Iterator[int]:  # fmt: skip
        """As `Generator.stream`; `stats` is kept up to date. The same seed gives the same tokens, but other ones than without
        drafts."""
        if not len(prompt):
            raise ValueError("the prompt is empty: give at least one token (the end-of-text token starts a new text)")
        assert (draft_params is None) == (self._small is None), "a draft has parameters"
        stats, one, small, K = Stats() if stats is None else stats, self._one, self._small, self.drafts
        with jax.set_mesh(self.mesh):
            params = one.apart(params)
            draft_params = draft_params if small is None else small.apart(draft_params)
        text, run_key, row = [int(token) for token in prompt], jax.random.key(seed), knobs([config])
        end, positions = len(text) + max_tokens, self.model.config.positions
        size = one.round(end + K)
        room = size if small is None else min(size, small.round(end + K))
        seen: Seen | None = seen_of([text], self.vocab_size) if config.penalised else None
        cache: Cache | None = None
        small_cache: Cache | None = None
        filled = 0
        while len(text) < end:
            guess = look_up(text, K) if small is None and filled + K < room else None
            with jax.set_mesh(self.mesh):  # not around the yield: who takes one token and goes on must not find it set
                key, last = jax.random.fold_in(run_key, len(text)), np.array([text[-2:]], np.int32)
                if cache is None or filled >= positions:
                    kept = text[-positions:] if cache is None else text[-max(1, positions // 2) :]
                    filled, count = len(kept), 1
                    tokens, cache, seen = one.prefill(params, *one.padded(kept), key[None], row, seen, size=size)
                    if small is not None and filled + K < room:
                        small_cache = self._read(draft_params, small.padded(kept)[0], size=room)
                elif small is not None and filled + K < room:
                    tokens, count, cache, small_cache, seen = self._round(
                        params, cache, last, draft_params, small_cache, key, row, seen
                    )  # fmt: skip
                elif guess is not None:
                    drafts_K = np.array(guess, np.int32)
                    tokens, count, cache, seen = self._check(params, cache, last[:, -1:], drafts_K, key, row, seen)
                else:
                    tokens, cache, seen = one.decode(params, cache, last[0, -1:], key[None], row, seen)
                    filled, count = filled + 1, 1
                settle(self.mesh, tokens)
            found, many = jax.device_get((tokens, count))
            if len(found) > 1:
                filled, stats.rounds = filled + int(many), stats.rounds + 1
                stats.drafted, stats.accepted = stats.drafted + K, stats.accepted + int(many) - 1
            for token in found[: min(int(many), end - len(text))].tolist():
                if token in stop:
                    return
                text.append(token)
                yield token
