"""Ways to tune: which numbers are trained, which are frozen, and how the two make the model's parameters.

There is one mechanism. Each parameter of the model is trained, or frozen, or frozen under an adapter; where blocks are
stacked, each layer of it by itself. `split` takes the parameters apart, `merge` puts them together, and the step
differentiates through it, so that gradients and optimiser state exist for what is trained alone.
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec

from jaxlm.config import nearest
from jaxlm.model.lora import MatrixAxes, adapt, start_adapter
from jaxlm.model.quantized import Base, hold, release

Tree = Any
Flat = dict[str, Any]
"""Path, as `transformer/encoder/layers/mlp/up/kernel`, → leaf."""

MATRICES = r"(attention/\w+|mlp/(shared/)?(up|gate|down))/kernel$"
"""The matrices of the blocks, by their paths: of attention and MLPs, not of routers."""


def check_regex(name: str, pattern: str) -> None:
    """Raise ValueError, in one line, for what is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} {pattern!r} is not a regular expression: {error}") from None


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen matrices (Hu et al. 2022, "LoRA")."""

    rank: int = 0
    """Rank of the adapters; 0: none."""
    alpha: float = 16.0
    """An adapter's product is scaled with alpha / rank."""
    targets: str = MATRICES
    """Regular expression of the paths of the kernels that get one."""
    dora: bool = False
    """Lengths of the columns are trained apart from their directions (Liu et al. 2024, "DoRA")."""

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha <= 0:
            raise ValueError(f"rank ({self.rank}) must not be negative, and alpha ({self.alpha}) must be positive")
        if self.dora and not self.rank:
            raise ValueError("dora needs adapters: give a rank above 0")
        check_regex("targets", self.targets)


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """What of the model is trained. A parameter of a block goes by two names, `layers/mlp/up/kernel` and, in each layer,
    `layers.3/mlp/up/kernel`: a regular expression that finds either finds it."""

    train: str | None = ".*"
    """Regular expression of the paths of what is trained itself: "bias$|^head/" is BitFit (Ben Zaken et al. 2022),
    "layers\\.(10|11)/|^head/" the last two of twelve layers; empty: the adapters alone."""
    lora: LoraConfig = LoraConfig()
    base: Base = "float32"
    """How frozen matrices of the blocks are held; int8 or nf4 under adapters is QLoRA (Dettmers et al. 2023)."""

    def __post_init__(self) -> None:
        if self.train is not None:
            check_regex("train", self.train)
        if self.train is None and not self.lora.rank:
            raise ValueError("nothing is trained: give train, or a lora.rank above 0")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How one parameter of the model is made. Layers are counted along its first axis; one that is not stacked has one."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    trained: tuple[int, ...]
    """Layers that are trained themselves."""
    adapted: tuple[int, ...]
    """Layers that have an adapter; none of them is trained itself."""
    base: Base | None
    """How its frozen layers are held; None: as they are."""

    @property
    def stacked(self) -> bool:
        return self.axes[:1] == ("layers",)

    @property
    def layers(self) -> int:
        return self.shape[0] if self.stacked else 1

    @property
    def frozen(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.layers) if layer not in self.trained)

    @functools.cached_property
    def matrix(self) -> MatrixAxes:
        """Its axes, of a kernel."""
        return MatrixAxes.of(self.axes)

    @property
    def by_layer(self) -> bool:
        """A layer's kernel can be made where it is used: all layers are frozen, and all adapted or none."""
        new = bool(self.adapted) or self.base not in (None, "float32")
        return new and self.stacked and not self.trained and len(self.adapted) in (0, self.layers)

    def named(self, layers: Sequence[int]) -> tuple[str, ...]:
        """Its path in each of these layers."""
        return layer_paths(self.path, self.stacked, layers)


def layer_paths(path: str, stacked: bool, layers: Sequence[int]) -> tuple[str, ...]:
    """`…/layers/…` as it is called in each of these layers, `…/layers.3/…`."""
    return tuple(re.sub(r"(^|/)layers/", rf"\1layers.{layer}/", path, count=1) if stacked else path for layer in layers)


def matching(pattern: str, path: str, names: Sequence[str]) -> tuple[int, ...]:
    """Which of a parameter's layers a regular expression finds, by its path or by its name in that layer."""
    return tuple(i for i, name in enumerate(names) if re.search(pattern, path) or re.search(pattern, name))


class Tuning:
    """How the numbers that are trained and those that are frozen make the model's parameters.

    `model` is anything with trees `shapes` and `axes`. Trees of what is trained are like the model's, of fewer leaves; a
    leaf of which some layers are trained holds these alone; adapters stand in place of their kernel, as `kernel/lora_a`.
    Where all is trained, the trained tree is the model's and the frozen one empty. Raises ValueError, in one line, for an
    expression that finds nothing, and for what is asked to be both.
    """

    def __init__(self, config: TuneConfig, model: Any):
        self.config = config
        shapes, axes = flatten_dict(model.shapes, sep="/"), flatten_dict(model.axes, sep="/")
        self.leaves = [self._leaf(path, shape.shape, tuple(axes[path])) for path, shape in shapes.items()]
        self.narrow = any(shape.dtype != jnp.float32 for shape in shapes.values())
        """Parameters are held in fewer bits than float32."""
        self._check()
        self.full = all(not leaf.frozen for leaf in self.leaves)
        """Everything is trained, nothing frozen."""
        self.shapes: Tree
        """Of what is trained, as the optimiser sees it; `axes` are its logical axes."""
        self.shapes, self.frozen_shapes = jax.eval_shape(self.split, model.shapes, jax.random.key(0))
        self.frozen_axes: Tree
        self.axes, self.frozen_axes = (model.axes, {}) if self.full else self._axes()
        self.trained_parameters = sum(leaf.size for leaf in jax.tree.leaves(self.shapes))
        self.total = sum(leaf.size for leaf in shapes.values())
        """The parameters of the model, without adapters."""

    def _leaf(self, path: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Leaf:
        c, bare = self.config, Leaf(path, shape, axes, (), (), None)
        names = bare.named(range(bare.layers))
        trained = () if c.train is None else matching(c.train, path, names)
        kernel = path.rsplit("/", 1)[-1] == "kernel"
        adapted = matching(c.lora.targets, path, names) if c.lora.rank and kernel else ()
        base = c.base if re.search(MATRICES, path) and len(trained) < len(names) else None
        return Leaf(path, shape, axes, trained, adapted, base)

    def _check(self) -> None:
        c = self.config
        if self.narrow and (c.lora.rank or c.base != "float32"):
            raise ValueError("tune.lora and tune.base take float32 parameters: give model.param_dtype float32 beside them")
        both = next((leaf.path for leaf in self.leaves if leaf.trained and leaf.adapted), None)
        if both is not None:
            raise ValueError(
                f"tune.train {c.train!r} trains {both}, which tune.lora.targets gives an adapter: with adapters let tune.train be "
                "what is trained beside them, such as '^head/', or empty"
            )
        if c.train is not None and not any(leaf.trained for leaf in self.leaves):
            raise self._nothing("tune.train", c.train, self.leaves)
        if c.lora.rank and not any(leaf.adapted for leaf in self.leaves):
            kernels = [leaf for leaf in self.leaves if leaf.path.endswith("kernel")]
            raise self._nothing("tune.lora.targets", c.lora.targets, kernels)
        if c.base != "float32" and not any(leaf.base for leaf in self.leaves):
            raise ValueError(f"tune.base {c.base} is how frozen matrices are held, but tune.train {c.train!r} freezes none")
        for leaf in self.leaves:
            if leaf.base == "nf4" and leaf.shape[-1] % 2:
                raise ValueError(
                    f"tune.base nf4 packs two numbers into a byte, but the last axis of {leaf.path} is {leaf.shape[-1]}: give int8"
                )

    def _nothing(self, what: str, pattern: str, leaves: Sequence[Leaf]) -> ValueError:
        paths = [leaf.path for leaf in leaves]
        paths += [name for leaf in leaves if leaf.stacked for name in leaf.named(range(leaf.layers))]
        words = [path.split("/") for path in paths]
        pieces = {"/".join(w[i:j]) for w in words for i in range(len(w)) for j in range(i + 1, len(w) + 1)}
        # The first alternative, as it would be without the signs of a regular expression.
        first = re.sub(r"\((?:\?:)?([^|)]*)[^)]*\)", r"\1", pattern).split("|")[0]
        hint = nearest(re.sub(r"[\\^$*+?]", "", first).strip("/"), sorted(pieces))
        near = [path for path in paths if hint is None or hint in path]
        guess = f"did you mean {hint!r}? " if hint else ""
        return ValueError(f"{what} {pattern!r} finds no parameter: {guess}there are {', '.join(near[:3])} and others")

    def _axes(self) -> tuple[Tree, Tree]:
        trained: Flat = {}
        frozen: Flat = {}
        for leaf in self.leaves:
            own = PartitionSpec(*leaf.axes)
            if leaf.trained:
                trained[leaf.path] = own
            if leaf.frozen:
                frozen |= {f"{leaf.path}/{part}" if part else leaf.path: own for part in _parts(leaf.base)}
            if leaf.adapted:
                places = {"lora_a": leaf.matrix.a, "lora_b": leaf.matrix.b}
                places |= {"lora_magnitude": leaf.matrix.magnitude} if self.config.lora.dora else {}
                trained |= {f"{leaf.path}/{name}": PartitionSpec(*axes) for name, axes in places.items()}
        return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")

    @functools.cached_property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Path of each trained leaf → its name in each layer along its first axis, or its path where it has none."""
        names: dict[str, tuple[str, ...]] = {}
        for leaf in self.leaves:
            if leaf.trained:
                names[leaf.path] = leaf.named(leaf.trained)
            for part in ("lora_a", "lora_b", "lora_magnitude")[: 3 if self.config.lora.dora else 2] if leaf.adapted else ():
                names[f"{leaf.path}/{part}"] = tuple(f"{name}/{part}" for name in leaf.named(leaf.adapted))
        return names

    @functools.cached_property
    def stacks(self) -> dict[str, int]:
        """Path of each stack of blocks → how many it has; blocks that share their parameters count as one."""
        found = ((re.match(r"(.*?)(^|/)layers/", leaf.path), leaf.layers) for leaf in self.leaves)
        return {match[1]: layers for match, layers in found if match}

    def split(self, params: Tree, key: jax.Array) -> tuple[Tree, Tree]:
        """The model's parameters → (trained, frozen), with fresh adapters drawn from `key`; a pure function, for jit."""
        if self.full:
            return params, {}
        lora, flat = self.config.lora, flatten_dict(params, sep="/")
        trained: Flat = {}
        frozen: Flat = {}
        for leaf in self.leaves:
            w = flat[leaf.path]
            if leaf.trained:
                trained[leaf.path] = _pick(w, leaf.trained, leaf)
            if leaf.frozen:
                rest = _pick(w, leaf.frozen, leaf)
                held = rest if leaf.base is None else hold(rest, leaf.matrix, leaf.base)
                frozen[leaf.path] = held
            if leaf.adapted:
                # From what the adapter will stand beside: the rounded matrix, where it is held rounded.
                beside = _pick(self._released(held, leaf), leaf.adapted, leaf)
                # By its path, so that what other parameters get does not change it.
                own = jax.random.fold_in(key, zlib.crc32(leaf.path.encode()) & 0x7FFFFFFF)
                trained[leaf.path] = start_adapter(own, beside, leaf.matrix, lora.rank, lora.dora)
        return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")

    def merge(self, trained: Tree, frozen: Tree) -> Tree:
        """The model's parameters; a pure function, for jit. The inverse of `split`, but for rounding of what is held rounded."""
        return self.join(*self.parts(trained, frozen))

    def parts(self, trained: Tree, frozen: Tree, dtype: Any = jnp.float32, by_layer: bool = False) -> tuple[Tree, Tree]:
        """What of the model's parameters moves as the trained numbers do, and what stands still; `join` makes the whole.

        A step computes them once and differentiates with respect to the first alone. Matrices that were not there before,
        adapted or held in another precision, are given in `dtype`, that of the computation; with `by_layer` those of stacked
        layers are left in the parts that `quantized.compose` makes a kernel of, so that the model makes one layer's at a time.
        """
        if self.full:
            return trained, {}
        below, held = _at(trained), _at(frozen)
        moving: Flat = {}
        still: Flat = {}
        for leaf in self.leaves:
            if not leaf.frozen:
                moving[leaf.path] = below(leaf.path)
                continue
            if by_layer and leaf.by_layer:
                kept = held(leaf.path)
                parts = kept if isinstance(kept, Mapping) else {"values": kept}
                still |= {f"{leaf.path}/{name}": part for name, part in parts.items()}
                if leaf.adapted:
                    adapter = dict(below(leaf.path))
                    adapter["lora_b"] = adapter["lora_b"] * (self.config.lora.alpha / self.config.lora.rank)
                    moving |= {f"{leaf.path}/{name}": part for name, part in adapter.items()}
                continue
            w = self._released(held(leaf.path), leaf)
            if leaf.adapted:
                w = self._adapted(w, below(leaf.path), leaf)
            elif leaf.trained:
                w = _weave((below(leaf.path), leaf.trained), (w, leaf.frozen))
            new = leaf.adapted or leaf.base not in (None, "float32")
            (moving if leaf.trained or leaf.adapted else still)[leaf.path] = w.astype(dtype) if new else w
        return moving, still

    def join(self, moving: Tree, still: Tree) -> Tree:
        """The model's parameters from their two parts."""
        return moving if self.full else unflatten_dict({**moving, **still}, sep="/")

    def _released(self, held: Any, leaf: Leaf) -> jax.Array:
        return held if leaf.base is None else release(held)

    def _adapted(self, w: jax.Array, adapter: Mapping[str, jax.Array], leaf: Leaf) -> jax.Array:
        scale = self.config.lora.alpha / self.config.lora.rank
        own = _pick(w, leaf.adapted, leaf)
        v = adapt(own, adapter["lora_a"], adapter["lora_b"], leaf.matrix, scale, adapter.get("lora_magnitude"))
        rest = tuple(layer for layer in leaf.frozen if layer not in leaf.adapted)
        return _weave((v, leaf.adapted), (_pick(w, rest, leaf), rest)) if rest else v


def _parts(base: Base | None) -> tuple[str, ...]:
    """Names of the arrays that hold a frozen matrix, the empty one for the array itself."""
    return ("values", "scale") if base in ("int8", "nf4") else ("",)


def _at(tree: Tree) -> Any:
    def find(path: str) -> Any:
        return functools.reduce(lambda node, name: node[name], path.split("/"), tree)

    return find


def _pick(x: jax.Array, layers: Sequence[int], leaf: Leaf) -> jax.Array:
    return x if len(layers) == leaf.layers else jnp.take(x, np.asarray(layers), axis=0)


def _weave(*parts: tuple[jax.Array, Sequence[int]]) -> jax.Array:
    """One array of all layers from several, each with the layers that it holds in order."""
    source = {layer: (part, i) for part, (_, layers) in enumerate(parts) for i, layer in enumerate(layers)}
    runs: list[list[int]] = []  # part, first, last + 1
    for layer in range(len(source)):
        part, i = source[layer]
        if runs and runs[-1][0] == part and runs[-1][2] == i:
            runs[-1][2] += 1
        else:
            runs.append([part, i, i + 1])
    with jax.numpy_dtype_promotion("standard"):  # a float32 average of some layers among others held in bfloat16
        return jnp.concatenate([parts[part][0][start:stop] for part, start, stop in runs])
