"""Generation for many prompts at once: greedy or beam search, the whole loop on the device.

Letters: B texts · G beams of a text · R rows of the model (B·G) · L length of a prompt · F forced tokens · T new tokens ·
N texts asked for ·
V vocabulary · E tokens that end a text · C candidates.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.generate.processors import NO_RULES, History, LogitsRules, process
from jaxlm.generate.sample import Knobs, SampleConfig, keep, knobs, sample
from jaxlm.model import Cache, Model, Params, empty_cache
from jaxlm.model.cache import grow, reorder, spread
from jaxlm.parallel import batch_sharding

# --- the search: pure functions over a step of any model ---------------------------------------

Step = Callable[[jax.Array, Cache], tuple[jax.Array, Cache]]
"""Last tokens (R,), cache → log-probabilities (R, V) of the next ones (for `greedy` any scores do), cache."""

Processor = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Scores (R, V), the new tokens (R, T), how many they are → scores that the next token is chosen by."""


class Prefilled(NamedTuple):
    """Where a search begins: what the prompts have said."""

    scores_BV: jax.Array
    """Of the first token to be chosen."""
    cache: Cache
    given_BT: jax.Array
    """Room for the new tokens; the first `given` of them are there."""
    given: int
    open_B: jax.Array
    """False: a row that only fills up the batch."""


class Found(NamedTuple):
    """The new tokens of the N best texts of each prompt, best first, and how many they are, without what ended them."""

    tokens_BNT: jax.Array
    length_BN: jax.Array
    score_BN: jax.Array
    """Log-probability / tokens^penalty, counting what ended them; −inf: there is no such text."""


class Searching(Protocol):
    """What a search knows after some tokens."""

    @property
    def new(self) -> jax.Array:
        """How many new tokens there are."""

    @property
    def open_B(self) -> jax.Array:  # noqa: N802
        """Which texts may go on."""


State = TypeVar("State", bound=Searching)


def search(advance: Callable[[State, Cache], tuple[State, Cache]], state: State, cache: Cache, T: int, chunk: int = 32) -> State:
    """`advance` until no text is open or T tokens are there. The cache grows meanwhile, by `chunk` tokens and then ever
    twice as many: what it costs follows how long the texts become, not how long they might."""
    begin = cache.size
    room = chunk
    while True:
        size = begin + min(room, T)

        def more(carry: tuple[State, Cache], size: int = size) -> jax.Array:
            state, cache = carry
            return (state.new < T) & jnp.any(state.open_B) & (cache.length < size)

        state, cache = jax.lax.while_loop(more, lambda carry: advance(*carry), (state, grow(cache, size)))
        if room >= T:
            return state
        room *= 2


class _Greedy(NamedTuple):
    new: jax.Array
    """How many new tokens there are."""
    token_B: jax.Array
    """The last of them."""
    tokens_BT: jax.Array
    length_B: jax.Array
    total_B: jax.Array
    """The sum of the scores."""
    open_B: jax.Array


def greedy(
    step: Step, start: Prefilled, stop_E: jax.Array, penalty: jax.Array, *,
    processor: Processor = lambda scores, tokens, new: scores,
    pick: Callable[[jax.Array, jax.Array], jax.Array] = lambda scores, new: jnp.argmax(scores, axis=-1),
) -> Found:  # fmt: skip
    """The most likely token each time, until every text has ended or fills its T tokens.

    `pick` chooses the token (B,) from the processed scores and the number of new tokens; the step's own scores are summed up.
    """
    T = start.given_BT.shape[1]

    def choose(state: _Greedy, scores_BV: jax.Array) -> _Greedy:
        token_B = pick(processor(scores_BV, state.tokens_BT, state.new), state.new).astype(jnp.int32)
        own_B = jnp.take_along_axis(scores_BV, token_B[:, None], axis=-1)[:, 0].astype(jnp.float32)
        total_B = state.total_B + jnp.where(state.open_B, own_B, 0)
        open_B = state.open_B & ~among(token_B, stop_E)
        tokens_BT = jax.lax.dynamic_update_slice(state.tokens_BT, token_B[:, None], (0, state.new))
        return _Greedy(state.new + 1, token_B, tokens_BT, state.length_B + open_B.astype(jnp.int32), total_B, open_B)

    def advance(state: _Greedy, cache: Cache) -> tuple[_Greedy, Cache]:
        scores_BV, cache = step(state.token_B, cache)
        return choose(state, scores_BV), cache

    B = start.open_B.shape[0]
    given_B, zero_B = jnp.full(B, start.given, jnp.int32), jnp.zeros(B, jnp.float32)
    begin = _Greedy(jnp.int32(start.given), start.given_BT[:, 0], start.given_BT, given_B, zero_B, start.open_B)
    last = search(advance, choose(begin, start.scores_BV), start.cache, T)
    counted_B = jnp.minimum(last.length_B + 1, T).astype(jnp.float32)
    return Found(last.tokens_BT[:, None], last.length_B[:, None], (last.total_B / counted_B**penalty)[:, None])


class _Beams(NamedTuple):
    new: jax.Array
    """How many new tokens there are."""
    tokens_BGT: jax.Array
    score_BG: jax.Array
    """Log-probability of each text that may go on, best first."""
    parent_BG: jax.Array
    """The row that each of them goes on from."""
    ended_BGT: jax.Array
    """The best texts that have ended, best first."""
    ended_length_BG: jax.Array
    ended_score_BG: jax.Array
    """Their log-probability / tokens^penalty, counting what ended them; −inf: none yet."""
    open_B: jax.Array


def beam_search(
    step: Step, start: Prefilled, stop_E: jax.Array, penalty: jax.Array, beams: int, best: int = 1, *,
    early_stopping: "EarlyStopping" = "false", processor: Processor = lambda scores, tokens, new: scores,
    noise: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] = lambda scores, new: (scores, scores),
) -> Found:  # fmt: skip
    """The `best` texts, by log-probability / tokens^penalty, of those in which `beams` beams end.

    Of the best (1 + E) · G continuations those that end a text are kept if they are among the first G, and the best G of
    the others go on. A text is closed once it has G ended beams and the best one that could go on scores, as it stands,
    no higher than the worst of them: the rule of `transformers` with `early_stopping` False; see `DecodeConfig.early_stopping`.

    `noise` maps the processed scores and the number of new tokens to the scores (R, V) that are summed up and those by which
    continuations are ranked: with Gumbel noise added to these, continuations are sampled without replacement in proportion to the
    exponentials of their sums (Kool et al. 2019), as `transformers` does with both num_beams and do_sample.
    """
    (B, T), G, V = start.given_BT.shape, beams, start.scores_BV.shape[1]
    C = max(2, 1 + stop_E.shape[0]) * G
    own = min(V, C)
    assert C <= G * own, f"a vocabulary of {V} has no continuation left beside {stop_E.shape[0]} tokens that end a text"

    def choose(state: _Beams, scores_RV: jax.Array) -> _Beams:
        scores_RV = processor(scores_RV, state.tokens_BGT.reshape(B * G, T), state.new)
        scores_RV, ranked_RV = noise(scores_RV, state.new)
        # The best of each beam first, then of all of them: shorter rows to sort.
        rank_RC, token_RC = jax.lax.top_k(ranked_RV, own)
        best_RC = jnp.take_along_axis(scores_RV, token_RC, axis=1)
        rank_BC, total_BC = ((state.score_BG[:, :, None] + x.reshape(B, G, own)).reshape(B, -1) for x in (rank_RC, best_RC))
        _, place_BC = jax.lax.top_k(rank_BC, C)
        total_BC = _rows(total_BC, place_BC)
        parent_BC, token_BC = place_BC // own, _rows(token_RC.reshape(B, -1), place_BC)
        tokens_BCT = jax.lax.dynamic_update_slice(
            _rows(state.tokens_BGT, parent_BC), token_BC[:, :, None], (0, 0, state.new)
        )  # fmt: skip
        new, stops_BC = state.new + 1, among(token_BC, stop_E)
        ends_BC = stops_BC | (new == T)

        counted = new.astype(jnp.float32) ** penalty
        taken_BC = ends_BC & state.open_B[:, None] & (jnp.arange(C) < G)[None, :]
        ended_BC = jnp.where(taken_BC, total_BC / counted, -jnp.inf)
        ended_score_BG, kept_BG = jax.lax.top_k(jnp.concatenate([state.ended_score_BG, ended_BC], axis=1), G)
        ended_BGT = _rows(jnp.concatenate([state.ended_BGT, tokens_BCT], axis=1), kept_BG)
        ended_length_BG = _rows(jnp.concatenate([state.ended_length_BG, new - stops_BC.astype(jnp.int32)], axis=1), kept_BG)

        score_BG, going_BG = jax.lax.top_k(jnp.where(ends_BC, -jnp.inf, total_BC), G)
        # A longer text may score more where the penalty favours length.
        longest = jnp.where(penalty > 0, jnp.float32(T) ** penalty, counted) if early_stopping == "never" else counted
        open_B = state.open_B & (score_BG[:, 0] / longest > ended_score_BG[:, -1])
        if early_stopping == "true":
            open_B &= ~jnp.all(jnp.isfinite(ended_score_BG), axis=-1)
        going = (_rows(tokens_BCT, going_BG), score_BG, _rows(parent_BC, going_BG))
        return _Beams(new, *going, ended_BGT, ended_length_BG, ended_score_BG, open_B)

    def advance(state: _Beams, cache: Cache) -> tuple[_Beams, Cache]:
        token_BG = jax.lax.dynamic_index_in_dim(state.tokens_BGT, state.new - 1, axis=2, keepdims=False)
        scores_RV, cache = step(token_BG.reshape(-1), reorder(cache, state.parent_BG))
        return choose(state, scores_RV), cache

    tokens_BGT = jnp.broadcast_to(start.given_BT[:, None], (B, G, T))
    none_BG, zero_BG = jnp.full((B, G), -jnp.inf, jnp.float32), jnp.zeros((B, G), jnp.int32)
    # All beams say the same as yet: the first one counts alone.
    score_BG = jnp.where(jnp.arange(G)[None, :] == 0, 0, none_BG)
    begin = _Beams(jnp.int32(start.given), tokens_BGT, score_BG, zero_BG, tokens_BGT, zero_BG, none_BG, start.open_B)
    first = choose(begin, jnp.repeat(start.scores_BV, G, axis=0))
    last = search(advance, first, spread(start.cache, G), T)
    return Found(last.ended_BGT[:, :best], last.ended_length_BG[:, :best], last.ended_score_BG[:, :best])


def among(ids: jax.Array, some_E: jax.Array) -> jax.Array:
    """Which of `ids` are some of those."""
    return jnp.any(ids[..., None] == some_E.reshape((1,) * ids.ndim + (-1,)), axis=-1)


def _rows(x: jax.Array, index_BC: jax.Array) -> jax.Array:
    """x[b, index[b, c], …]."""
    return jnp.take_along_axis(x, index_BC.reshape(index_BC.shape + (1,) * (x.ndim - 2)), axis=1)


# --- a model and its prompts ---------------------------------------------------------------------


EarlyStopping = Literal["false", "true", "never"]


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How the most likely text is searched for."""

    max_tokens: int = 64
    """Most new tokens of a text."""
    beams: int = 1
    """Texts kept at each step; 1: greedy, the most likely token each time."""
    length_penalty: float = 1.0
    """Beams are compared by log-probability / tokens^length_penalty: the larger, the longer the texts."""
    n_best: int = 1
    """Texts of each prompt that `BatchGenerator.ranked` returns; at most as many as beams."""
    early_stopping: EarlyStopping = "false"
    """When beam search ends, as Hugging Face's option: true: with as many ended texts as beams; false: once the best open text
    scores no higher; never: once no longer text can."""
    no_repeat_ngram_size: int = 0
    """No n-gram of this many tokens occurs twice in prompt and text (for an encoder-decoder: in the text); 0: off."""
    repetition_penalty: float = 1.0
    """Divides positive scores of tokens that occurred and multiplies negative ones (Keskar et al. 2019); 1: off."""
    min_tokens: int = 0
    """Least new tokens before a text may end."""

    def __post_init__(self) -> None:
        for name in ("no_repeat_ngram_size", "min_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}: it must be from 0.01 to 100")
        for name in ("max_tokens", "beams", "n_best"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.n_best > self.beams:
            raise ValueError(f"n_best is {self.n_best}: it must be at most beams, which is {self.beams}")

    def rules(self, others: LogitsRules) -> LogitsRules:
        """`others` with the rules that stand here."""
        ngram, least = self.no_repeat_ngram_size or others.no_repeat_ngram_size, self.min_tokens or others.min_new_tokens
        return dataclasses.replace(others, no_repeat_ngram_size=ngram, min_new_tokens=least)


class Scored(NamedTuple):
    """The new tokens of a text, without what ended it."""

    tokens: list[int]
    score: float
    """logprob / tokens^length_penalty, by which texts are ranked; what ended the text counts as a token."""
    logprob: float
    """Of the tokens and what ended them, in nats; forced tokens are certain."""


class BatchGenerator:
    """The likeliest new tokens of many prompts; those of like length share a batch, and its compilation.

    `vocab_size` is the tokenizer's: entries beyond it only pad the model's table. `pad_id` fills up rows, and nothing sees
    it. Of an encoder-decoder prompts are the encoder's texts, and `start_id` is what its decoder begins with. `banned`
    tokens are never chosen (the padding of Marian's published models).
    """

    def __init__(
        self, model: Model, mesh: jax.sharding.Mesh, vocab_size: int, *,
        pad_id: int, start_id: int | None = None, banned: Collection[int] = (),
    ):  # fmt: skip
        kind = (model.config.architecture, model.config.head.kind)
        if kind[0] == "encoder" or kind[1] != "language_model":
            raise ValueError(
                f"text is generated by a decoder or encoder_decoder with head language_model, not by {' with '.join(kind)}"
            )
        self.reads = kind[0] == "encoder_decoder"
        if self.reads and start_id is None:
            raise ValueError("start_id is missing: the decoder of an encoder_decoder begins with a token")
        self.model, self.mesh, self.pad_id, self.start_id = model, mesh, pad_id, start_id
        ids_V = np.arange(model.config.V)
        self._allowed_V = (ids_V < vocab_size) & ~np.isin(ids_V, list(banned))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._apart = jax.jit(model.apart)
        static = ("T", "G", "N", "scored", "rules", "penalty_of_repetition", "early_stopping")
        self._run = jax.jit(self._pure, static_argnames=static, out_shardings=whole)

    def __call__(
        self, params: Params, prompts: Sequence[Sequence[int]], config: DecodeConfig, stop: Collection[int], *,
        batch_size: int = 32, advance: Callable[[int], None] = lambda n: None, forced: Sequence[int] = (),
        rules: LogitsRules = NO_RULES, sampling: SampleConfig | None = None, seeds: Sequence[int] = (),
    ) -> list[list[int]]:  # fmt: skip
        """The new tokens of each prompt, in the prompts' order, each ending before one of `stop` or after `max_tokens`.

        `forced` are the first new tokens, given instead of chosen (the language code of mBART); they are part of the
        result. `rules` constrain the tokens beside those of `config`. With `sampling` above temperature 0 tokens are drawn, each
        prompt's by its own of `seeds`, with beams continuations of all of them (see `beam_search`). `advance` gets how many prompts
        each batch held. ValueError: a prompt that is empty or longer than learned positions allow; typical_p with beams; penalties
        beside the one for repetition, with `sampling`.
        """
        drawn = sampling is not None and sampling.temperature > 0
        if sampling is not None and (sampling.presence_penalty or sampling.frequency_penalty):
            raise ValueError("presence_penalty and frequency_penalty are not for texts written in batches: give repetition_penalty")
        if drawn and sampling is not None and sampling.typical_p is not None and config.beams > 1:
            raise ValueError(f"typical_p is not for beams, which are {config.beams}: give top_p or min_p")
        draws = (sampling, seeds) if drawn else None
        found = self._found(params, prompts, config, stop, batch_size, advance, forced, rules, draws, scored=False)
        return [texts[0].tokens for texts in found]

    def ranked(
        self, params: Params, prompts: Sequence[Sequence[int]], config: DecodeConfig, stop: Collection[int], *,
        batch_size: int = 32, advance: Callable[[int], None] = lambda n: None, forced: Sequence[int] = (),
        rules: LogitsRules = NO_RULES,
    ) -> list[list[Scored]]:  # fmt: skip
        """The `config.n_best` texts of each prompt with their scores, best first; otherwise as a call."""
        return self._found(params, prompts, config, stop, batch_size, advance, forced, rules, None, scored=True)

    def _found(
        self, params: Params, prompts: Sequence[Sequence[int]], config: DecodeConfig, stop: Collection[int],
        batch_size: int, advance: Callable[[int], None], forced: Sequence[int], rules: LogitsRules,
        draws: tuple[SampleConfig | None, Sequence[int]] | None, scored: bool,
    ) -> list[list[Scored]]:  # fmt: skip
        self._check(prompts, config.max_tokens, len(forced))
        rules = config.rules(rules)
        rules.check(self.model.config.V)
        sharding, T, penalty = batch_sharding(self.mesh), config.max_tokens, config.length_penalty
        ways = self.mesh.size // sharding.shard_shape((self.mesh.size,))[0]
        rows = -(-min(batch_size, rounded(len(prompts))) // ways) * ways
        forced_F, stop_E = np.array(forced, np.int32), np.array(sorted(stop), np.int32)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        sizes = {"T": T, "G": config.beams, "N": config.n_best if scored else 1, "scored": scored, "rules": rules,
                 "penalty_of_repetition": config.repetition_penalty, "early_stopping": config.early_stopping}  # fmt: skip
        texts: list[list[Scored]] = [[] for _ in prompts]
        with jax.set_mesh(self.mesh):
            params = self._apart(params)
            for start in range(0, len(order), rows):
                part = order[start : start + rows]
                batch = jax.device_put(self._batch([prompts[i] for i in part], rows, forced), sharding)
                drawn = None if draws is None else self._draws(draws[0], [draws[1][i] for i in part], rows)
                found = self._run(params, *batch, forced_F, stop_E, np.float32(penalty), drawn, **sizes)
                for i, tokens_NT, length_N, score_N in zip(part, *jax.device_get(found), strict=False):
                    for tokens_T, length, score in zip(tokens_NT, length_N.tolist(), score_N.tolist(), strict=True):
                        logprob = score * min(length + 1, T) ** penalty
                        texts[i].append(Scored(tokens_T[:length].tolist(), score, logprob))
                advance(len(part))
        return texts

    @staticmethod
    def _draws(config: SampleConfig | None, seeds: Sequence[int], rows: int) -> tuple[Knobs, jax.Array]:
        """How each row is drawn, and the keys (B,) that those of its tokens are folded from."""
        assert config is not None
        # The penalty for repetition is applied with the rules, as in a search.
        plain = dataclasses.replace(config, repetition_penalty=1.0)
        return knobs([plain] * rows), jax.vmap(jax.random.key)(np.array([*seeds, *[0] * (rows - len(seeds))], np.uint32))

    def _check(self, prompts: Sequence[Sequence[int]], new: int, forced: int) -> None:
        if forced >= new:
            raise ValueError(f"max_tokens is {new}: it must be more than the {forced} forced tokens")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {i} is empty: give at least one token")
            places, there = max(len(prompt), new) if self.reads else len(prompt) + new - 1, self.model.config.positions
            if self.model.config.position == "learned" and places > there:
                raise ValueError(
                    f"prompt {i} of {len(prompt)} tokens and max_tokens {new} need {places} positions: the model learned {there}"
                )

    def _batch(self, prompts: Sequence[Sequence[int]], rows: int, forced: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(B, L) tokens and (B,) lengths; the longest prompt comes first. A decoder's prompts end together, so that all
        rows go on at the same place. Rows of length 0 fill up the batch."""
        texts = [[*prompt] if self.reads else [*prompt, *forced] for prompt in prompts]
        length_B = np.array([len(text) for text in texts] + [0] * (rows - len(texts)), np.int32)
        tokens_BL = np.full((rows, max(8, rounded(len(texts[0])))), self.pad_id, np.int32)
        for text, row_L in zip(texts, tokens_BL, strict=False):
            row_L[slice(len(text)) if self.reads else slice(-len(text), None)] = text
        return tokens_BL, length_B

    def _pure(
        self, params: Params, tokens_BL: jax.Array, length_B: jax.Array, forced_F: jax.Array, stop_E: jax.Array, penalty: jax.Array,
        drawn: tuple[Knobs, jax.Array] | None, *, T: int, G: int, N: int, scored: bool, rules: LogitsRules,
        penalty_of_repetition: float, early_stopping: EarlyStopping,
    ) -> Found:  # fmt: skip
        (B, L), F = tokens_BL.shape, forced_F.shape[0]
        batch: dict[str, Any] = {"tokens_BL": tokens_BL}
        if self.reads:
            batch["segments_BL"] = (jnp.arange(L)[None, :] < length_B[:, None]).astype(jnp.int32)
            begin_F = jnp.concatenate([jnp.array([self.start_id], jnp.int32), forced_F])
            batch = {"encoder": batch, "decoder": {"tokens_BL": jnp.broadcast_to(begin_F[None, :], (B, 1 + F))}}
            cache = empty_cache(self.model.config, B, 1 + F, piece=1 + F)
        else:
            cache = dataclasses.replace(empty_cache(self.model.config, B, L, piece=L), start_B=L - length_B)

        def scores(batch: dict[str, Any], cache: Cache) -> tuple[jax.Array, Cache]:
            logits_RLV, cache = self.model.apply(params, batch, cache, last=True)
            # Log-probabilities are over the whole table, as the loss has them.
            scores_RV = jax.nn.log_softmax(logits_RLV[:, 0], axis=-1) if G > 1 or scored else logits_RLV[:, 0]
            return jnp.where(self._allowed_V[None, :], scores_RV, -jnp.inf), cache

        # Of the decoder: a prompt's tokens before the forced ones, or the start token.
        prompt_B = jnp.ones(B, jnp.int32) if self.reads else length_B - F
        before_BL = jnp.full((B, 1), self.start_id or 0, jnp.int32) if self.reads else _before(tokens_BL, length_B, F)
        source_BS = None
        if rules.reads_source:
            source_BS = jnp.where(batch["encoder"]["segments_BL"] > 0, tokens_BL, -1) if self.reads else before_BL

        def processor(scores_RV: jax.Array, tokens_RT: jax.Array, new: jax.Array) -> jax.Array:
            if not rules and penalty_of_repetition == 1:
                return scores_RV
            beams = scores_RV.shape[0] // B
            text_RT = jnp.where(jnp.arange(T)[None, :] < new, tokens_RT, -1)
            tokens_RH = jnp.concatenate([jnp.repeat(before_BL, beams, axis=0), text_RT], axis=1)
            history = History(
                tokens_RH, before_BL.shape[1] + new, jnp.repeat(prompt_B, beams) + new, new, T,
                None if source_BS is None else jnp.repeat(source_BS, beams, axis=0),
            )  # fmt: skip
            return process(scores_RV, rules, history, stop_E, penalty_of_repetition)

        given_BT = jnp.broadcast_to(jnp.pad(forced_F, (0, T - F))[None, :], (B, T))
        start = Prefilled(*scores(batch, cache), given_BT, F, length_B > 0)
        step: Step = lambda token_R, cache: scores({"tokens_BL": token_R[:, None]}, cache)  # noqa: E731
        if G > 1:
            options: dict[str, Any] = {"early_stopping": early_stopping, "processor": processor}
            if drawn is not None:
                options["noise"] = functools.partial(_noise, *drawn, stop_E.shape[0] + 1)
            return beam_search(step, start, stop_E, penalty, G, N, **options)
        if drawn is not None:
            knobs, keys_B = drawn

            def pick(scores_BV: jax.Array, new: jax.Array) -> jax.Array:
                return sample(scores_BV, jax.vmap(jax.random.fold_in, (0, None))(keys_B, new), knobs, scores_BV.shape[1])

            return greedy(step, start, stop_E, penalty, processor=processor, pick=pick)
        return greedy(step, start, stop_E, penalty, processor=processor)


def _noise(knobs: Knobs, keys_B: jax.Array, least: int, scores_RV: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities (R, V) of beams after temperature and filters, of which each row keeps `least` tokens, without and with
    Gumbel noise by the keys of their texts."""
    B, (R, V) = keys_B.shape[0], scores_RV.shape
    settings: Knobs = jax.tree.map(lambda x: jnp.repeat(x, R // B), knobs)
    kept_RV = jnp.isfinite(keep(scores_RV, settings)) | (scores_RV >= jax.lax.top_k(scores_RV, min(least, V))[0][:, -1:])
    scores_RV = jnp.where(kept_RV, scores_RV / settings.temperature_B[:, None], -jnp.inf)
    noise_BGV = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, new), (R // B, V)))(keys_B)
    return scores_RV, scores_RV + noise_BGV.reshape(R, V)


def _before(tokens_BL: jax.Array, length_B: jax.Array, F: int) -> jax.Array:
    """(B, L − F): prompts that end together, −1 before them and without the F forced tokens at their ends."""
    L = tokens_BL.shape[1]
    return jnp.where(jnp.arange(L)[None, :] >= L - length_B[:, None], tokens_BL, -1)[:, : L - F]


def rounded(length: int) -> int:
    """The next power of two: few sizes, so few compilations."""
    return 1 << max(0, length - 1).bit_length()
