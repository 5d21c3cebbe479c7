"""Log-likelihoods of texts under a decoder, as lm-evaluation-harness (Gao et al.) defines them.

Letters: B rows · L tokens of a row.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.data import Example, TextEncoder, Tokenizer, in_order
from jaxlm.models import Trained
from jaxlm.parallel import batch_sharding, batch_ways, place_batch, settle, stored_shardings
from jaxlm.report.console import bar


class Likelihood(NamedTuple):
    """Of a continuation: its log-probability in nats, and whether each of its tokens is the likeliest at its place."""

    logprob: float
    greedy: bool


class Scorer:
    """Scores texts under one model, compiled once for each of a few lengths.

    As lm-evaluation-harness does with Hugging Face models, a context is encoded as `tokenizer(text)` does: special tokens that
    texts spell are read as such, and it begins with the special tokens that the tokenizer puts before a text, such as `<s>`;
    `bos` says otherwise. A context without tokens is the tokenizer's begin token.
    """

    truncated: int
    """Continuations that were scored after less than their whole context so far, for the model has no more positions."""

    def __init__(
        self, trained: Trained, *, length: int | None = None, batch_size: int = 32, bos: bool | None = None, chunk: int = 128
    ):
        model, mesh = trained.model, trained.mesh
        kind = (model.config.architecture, model.config.head.kind)
        if kind != ("decoder", "language_model"):
            raise ValueError(
                f"continuations are scored by architecture decoder with head language_model, not by {kind[0]} with {kind[1]}"
            )
        if length is not None and length < 1:
            raise ValueError(f"length is {length}: it must be at least 1")
        self.trained, self.tokenizer, self.truncated, self.batch_size = trained, trained.tokenizer, 0, batch_size
        if length is not None and length > model.config.positions:
            raise ValueError(f"length {length} is more than the model's {model.config.positions} positions: give no more")
        self.length = length or model.config.positions
        self.encoder = TextEncoder(self.tokenizer)
        self.begin = self.encoder.prefix if bos is None else [self.tokenizer.bos_id] * bos

        def step(params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            logp_BL, first_BL = model.apply(params, batch, chunk=chunk, method="scores")
            scored_BL = batch["weights_BL"] > 0
            return jnp.sum(jnp.where(scored_BL, logp_BL, 0.0), axis=1), jnp.all(first_BL | ~scored_BL, axis=1)

        shardings = (stored_shardings(model.axes, model.shapes, mesh), batch_sharding(mesh))
        self._step = jax.jit(step, in_shardings=shardings, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Of each (context, continuation), in their order.

        Spaces that end a context begin the continuation; the tokens of both together less as many as the context has are
        the continuation's. One that is longer than the model's positions is scored window by window, as whole texts are.
        ValueError: a continuation without tokens.
        """
        moved = [(context.rstrip(), context[len(context.rstrip()) :] + continuation) for context, continuation in pairs]
        wholes = self.encoder.bare(["".join(pair) for pair in moved])
        contexts = self.encoder.bare([context for context, _ in moved])
        given = []
        for (context, continuation), whole, known in zip(pairs, wholes, contexts, strict=True):
            begin = [] if known[:1].tolist() == self.begin[:1] else self.begin  # where the context spells it itself
            before = [*begin, *known] or [self.tokenizer.bos_id]
            scored = len(whole) - len(known)
            if scored <= 0:
                raise ValueError(f"the continuation {continuation!r:.60} adds no token to its context {context[-40:]!r}")
            self.truncated += len(before) + scored > self.length + 1
            given.append((np.concatenate([before, whole[len(known) :]]), scored))
        return self._scored("scoring", given)

    def texts(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """Of each whole text the log-probability in nats and how many tokens it has, after the beginning of text.

        Each token is predicted once, in windows of `length` tokens. The last one is filled up with tokens before its own, so
        that it has a full context too.
        """
        encoded = self.encoder.bare(texts)
        found = self._scored("reading", [(np.concatenate([[self.tokenizer.bos_id], ids]), len(ids)) for ids in encoded])
        return [(one.logprob, len(ids)) for one, ids in zip(found, encoded, strict=True)]

    def _scored(self, title: str, given: Sequence[tuple[np.ndarray, int]]) -> list[Likelihood]:
        """Of each row of ids the likelihood of its last so many."""
        rows = [list(self._windows(ids, scored)) for ids, scored in given]
        found = iter(self._run(title, list(itertools.chain.from_iterable(rows))))
        parts = [list(itertools.islice(found, len(windows))) for windows in rows]
        return [Likelihood(sum(part.logprob for part in some), all(part.greedy for part in some)) for some in parts]

    def _windows(self, ids: np.ndarray, scored: int) -> Iterator[Example]:
        for start in range(len(ids) - scored, len(ids), self.length):
            stop = min(start + self.length, len(ids))
            yield self._example(ids[:stop], stop - start)

    def _example(self, ids: np.ndarray, scored: int) -> Example:
        """The last tokens that the model reads, of which the last `scored` count."""
        row = ids[-(self.length + 1) :].astype(np.int32)
        places = len(row) - 1
        return {"tokens": row[:-1], "targets": row[1:], "weights": (np.arange(places) >= places - scored).astype(np.float32)}

    def _run(self, title: str, examples: Sequence[Example]) -> list[Likelihood]:
        found: dict[int, Likelihood] = {}
        if not examples:
            return []
        mesh, ways = self.trained.mesh, batch_ways(self.trained.mesh)
        rows = -(-min(self.batch_size, 1 << (len(examples) - 1).bit_length()) // ways) * ways

        def keep(numbers: np.ndarray, given: Any) -> None:
            for number, logprob, greedy in zip(numbers, *jax.device_get(given), strict=False):
                found[int(number)] = Likelihood(float(logprob), bool(greedy))
            shown.advance(len(numbers))

        ahead: tuple[np.ndarray, Any] | None = None
        with jax.set_mesh(mesh), bar(title, len(examples), "windows") as shown:
            for numbers, batch in in_order(examples, rows, 0, self.length):
                given = settle(mesh, self._step(self.trained.params, place_batch(batch, mesh, whole=True)))
                if ahead is not None:  # the next batch is under way while the last one is read
                    keep(*ahead)
                ahead = numbers, given
            assert ahead is not None, "there are examples"
            keep(*ahead)
        return [found[i] for i in range(len(examples))]


def beginning(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that a tokenizer puts before a text: Llama's `<s>`, nothing for GPT-2."""
    return TextEncoder(tokenizer).prefix
