"""What a model is, without loading it (`jaxlm show`), and how far two models differ (`jaxlm diff`)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data import SourceConfig, TextEncoder, documents
from jaxlm.model import Model, TransformerConfig
from jaxlm.models import Trained
from jaxlm.parallel import STORED, ParallelConfig, abstract_mesh, spec
from jaxlm.report import count

# --- show ------------------------------------------------------------------------------------------


def describe_model(config: TransformerConfig, length: int, parallel: ParallelConfig | None = None) -> list[str]:
    """Lines: the tree of modules with shapes, logical axes and parameters; then FLOPs and memory at `length` tokens. With the
    sizes of a mesh also how each parameter lies on it, and what one of its devices holds."""
    if config.vocab_size is None:
        raise ValueError("the vocabulary's size comes from the tokenizer: give --vocab-size, or show the run that it makes")
    model = Model(config)
    shapes, axes = model.shapes, model.axes
    lines = [", ".join(f"{name} of {layers} layer{'s' if layers > 1 else ''}" for name, layers in config.stacks.items())]
    mesh = None if parallel is None else abstract_mesh(parallel)
    lines += list(_tree(shapes, axes, "", mesh))
    total, matrices = model.parameters(), config.matmul_parameters()
    exact, rough = config.train_flops_per_token(length), 6.0 * total
    cache = 2 * config.stacks.get("decoder", 0) * config.K * config.H * 2 * length
    each = 2 * np.dtype(config.param_dtype).itemsize + 8  # bytes a parameter: itself, its gradient, two moments
    lines += [
        "",
        f"parameters            {total:,} ({count(total)}); {matrices:,} multiply every token",
        f"training FLOPs/token  {count(exact)} at {length:,} tokens (6 a matrix weight + attention); 6N says {count(rough)}",
        f"training memory       {size(each * total)}: {config.param_dtype} parameters, gradients and Adam's two moments, "
        "without activations",
        f"serving memory        {size(2 * total)} of bfloat16 parameters"
        + (f" + {size(cache)} of cache a text of {length:,} tokens" if cache else ""),
    ]
    if mesh is not None:
        held = sum(_held(leaf, letters, mesh) for leaf, letters in _leaves(shapes, axes))
        sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
        lines += [
            f"mesh                  {sizes}: {mesh.size:,} devices",
            f"on each device        {count(held)} parameters, {100 * held / total:.3g}%; {size(each * held)} of training memory",
        ]
    return lines


def _leaves(shapes: Mapping[str, Any], axes: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    letters = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    yield from zip(jax.tree.leaves(shapes), letters, strict=True)


def _held(leaf: Any, letters: Any, mesh: Any) -> int:
    """Numbers of a parameter that one device stores."""
    lies = jax.sharding.NamedSharding(mesh, spec(tuple(letters), leaf.shape, mesh, STORED))
    return int(np.prod(lies.shard_shape(leaf.shape)))


def _tree(shapes: Mapping[str, Any], axes: Mapping[str, Any], indent: str, mesh: Any) -> Iterator[str]:
    for name, below in shapes.items():
        if isinstance(below, Mapping):
            total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(below))
            yield f"{indent + name:<44}{count(total):>10}"
            yield from _tree(below, axes[name], indent + "  ", mesh)
        else:
            letters = " ".join("layers" if letter == "layers" else str(letter or "·") for letter in axes[name])
            shown = " × ".join(map(str, below.shape))
            lies = "" if mesh is None else f"  {_where(below, axes[name], mesh)}"
            yield f"{indent + name:<44}{count(int(np.prod(below.shape))):>10}  {shown}  ({letters}){lies}"


def _where(leaf: Any, letters: Any, mesh: Any) -> str:
    """How a parameter lies on a mesh: which mesh axes split which of its own."""
    parts = spec(tuple(letters), leaf.shape, mesh, STORED)
    split = [
        f"{letter} over {' × '.join((over,) if isinstance(over, str) else over)}"
        for letter, over in zip(letters, parts, strict=True)
        if over
    ]
    return ", ".join(split) or "whole on every device"


def size(value: float) -> str:
    """Bytes for a person: 512 B, 1.5 MiB, 140.2 GiB."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 1 << power:
            return f"{value / (1 << power):.1f} {unit}"
    return f"{value:.0f} B"


# --- diff ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far the outputs of two models lie apart on the same tokens."""

    tokens: int
    largest: float
    """Largest absolute difference of a logit or score."""
    kl: tuple[float, float] | None
    """Mean over the places and largest KL(A ‖ B), in nats; None where the outputs are no distribution."""
    agreement: float | None
    """Share of places for which both think the same the most likely."""

    def lines(self) -> list[str]:
        found = [f"tokens compared                {self.tokens:,}", f"largest difference of outputs  {self.largest:.3g}"]
        if self.kl is not None and self.agreement is not None:
            found.append(f"KL(A ‖ B), nats                {self.kl[0]:.3g} in the mean, {self.kl[1]:.3g} at most")
            found.append(f"same most likely class         {100 * self.agreement:.2f}%")
        return found


def compare(a: Trained, b: Trained, text: str | None, tokens: int) -> Difference:
    """The first `tokens` tokens of a text (by default of the English that Python carries) through both models.

    Raises ValueError where they cannot be compared: other kinds, vocabularies or tokenizers.
    """
    for what, of in (("architecture", lambda c: c.architecture), ("head", lambda c: c.head.kind), ("vocabulary", lambda c: c.V)):
        one, two = of(a.model.config), of(b.model.config)
        if one != two:
            raise ValueError(f"{a.name} and {b.name} differ in their {what}, {one} and {two}: their outputs cannot be compared")
    tokenizer = a.tokenizer
    if (b.tokenizer_folder / "tokenizer.json").is_file() and b.tokenizer.definition() != tokenizer.definition():
        raise ValueError(f"{a.name} and {b.name} have different tokenizers: the same text is not the same tokens")
    words = text if text is not None else "\n\n".join(_head(documents(SourceConfig("embedded")), 8 * tokens))
    ids = TextEncoder(tokenizer, tokens).ids(words)
    length = min(a.model.config.positions, b.model.config.positions, 256)
    # Whole rows, so that both models compile once; the last tokens of a long text that fill no row are left out.
    length = min(length, len(ids))
    rows = np.asarray(ids[: len(ids) // length * length], np.int32).reshape(-1, length)
    first, second = (_outputs(side, rows) for side in (a, b))
    distribution = a.model.config.head.kind in ("language_model", "masked_lm", "sequence", "token")
    largest, kls, same = 0.0, [], []
    for one, two in zip(first, second, strict=True):
        largest = float(np.maximum(largest, np.abs(one - two).max()))  # which keeps a NaN, as max does not
        if distribution:
            log_p, log_q = (np.asarray(jax.nn.log_softmax(scores, axis=-1)) for scores in (one, two))
            kls.append((np.exp(log_p) * (log_p - log_q)).sum(-1).ravel())
            same.append((one.argmax(-1) == two.argmax(-1)).ravel())
    if not distribution:
        return Difference(rows.size, largest, None, None)
    kl = np.concatenate(kls)
    return Difference(rows.size, largest, (float(kl.mean()), float(kl.max())), float(np.concatenate(same).mean()))


def _head(texts: Iterator[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _outputs(side: Trained, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Logits or scores of each row, one by one."""

    def forward(params: Any, tokens_BL: jax.Array) -> jax.Array:
        batch: dict[str, Any] = {"tokens_BL": tokens_BL}
        if side.model.config.architecture == "encoder_decoder":
            batch = {"encoder": batch, "decoder": batch}
        out = side.model.apply(params, batch)
        return jnp.asarray(out[0] if isinstance(out, tuple) else out, jnp.float32)

    run = jax.jit(forward)
    for row in rows:
        with jax.set_mesh(side.mesh):  # not around the yield: two of these take turns
            output = np.asarray(run(side.params, row[None]))
        yield output
