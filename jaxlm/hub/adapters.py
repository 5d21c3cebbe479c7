"""LoRA and DoRA adapters in the folder format of PEFT: `adapter_config.json` and `adapter_model.safetensors`, both ways.

Of a torch Linear (out, in) that format holds `lora_A.weight` (r, in), `lora_B.weight` (out, r) and, of DoRA,
`lora_magnitude_vector` (out), behind `base_model.model.` and the module's name; modules of the head that are trained whole
stand under their own names. The order of inputs and outputs follows from the family's table, as that of a kernel does.

Letters: r rank of an adapter; the others as in `tensors.py`.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.config import unknown
from jaxlm.hub.convert import FAMILIES, family_for, table_of
from jaxlm.hub.family import Family
from jaxlm.hub.files import DTYPES, Tensors, _header, some
from jaxlm.hub.saving import copy_tokenizer
from jaxlm.hub.tensors import Part, Tensor, flatten, nest, resolve
from jaxlm.model import Model
from jaxlm.train.tune import Leaf, LoraConfig, TuneConfig, Tuning

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BEFORE = "base_model.model."
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"

# Options of PEFT that change what an adapter computes, with the values that mean the plain one.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the base model too
    **dict.fromkeys(
        ("layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora", "kasa_config",
         "velora_config", "monteclora_config", "target_parameters", "trainable_token_indices", "lora_bias"),
        (None, False, [], {}),
    ),
}  # fmt: skip


class Adapter(NamedTuple):
    """An adapter folder as it was read: the tuning that it is of, its trained tree, in NumPy arrays, and its base model."""

    config: TuneConfig
    trained: dict[str, Any]
    base_name: str | None


@dataclasses.dataclass(frozen=True)
class _Module:
    """A torch module with our kernels in it: one, or several in a fused matrix, of one layer."""

    name: str
    layer: int
    row: Tensor
    leaves: tuple[Leaf, ...]
    """One for each of the row's parts."""

    def sides(self, part: Part, leaf: Leaf) -> tuple[list[str], list[str]]:
        """The letters of its inputs and of its outputs, in torch's order."""
        inputs = [letter for letter in part.letters if letter in leaf.matrix.inputs]
        return inputs, [letter for letter in part.letters if letter in leaf.matrix.outputs]

    def rows(self, part: Part, outputs: list[str]) -> tuple[slice, ...]:
        """Where the outputs of a part stand among all, its letters apart."""
        lengths = dict(zip(part.axes, part.shape, strict=True))
        return tuple(part.place(letter, slice(0, lengths[letter])) for letter in outputs)

    @property
    def sizes(self) -> tuple[list[int], list[int]]:
        """Lengths of the inputs and of the outputs, of all parts together."""
        inputs, outputs = self.sides(self.row.parts[0], self.leaves[0])
        sizes = self.row.parts[0].sizes
        return [sizes[letter] for letter in inputs], [sizes[letter] for letter in outputs]


def _modules(rows: list[Tensor], tuning: Tuning) -> Iterator[_Module]:
    leaves = {leaf.path: leaf for leaf in tuning.leaves}
    for row in rows:
        if all(part.path.endswith("/kernel") for part in row.parts) and "E" not in row.parts[0].axes:
            for name, at in row.names():
                yield _Module(name.removesuffix(".weight"), at.get("X", 0), row, tuple(leaves[part.path] for part in row.parts))


def _rows(model: Model, family: str | None) -> tuple[Family, list[Tensor]]:
    if family is not None and family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    chosen = family_for(model.config)[0] if family is None else FAMILIES[family]
    shapes = {path: leaf.shape for path, leaf in flatten(model.shapes).items()}
    return chosen, resolve(table_of(chosen, model.config), shapes, flatten(model.axes))


# --- writing ----------------------------------------------------------------------------------


def save_adapter(
    folder: pathlib.Path | str, config: TuneConfig, trained: Any, model: Model, family: str | None = None, base_name: str = "",
    tokenizer: pathlib.Path | None = None,
) -> pathlib.Path:  # fmt: skip
    """Write the trained tree of a tuning with adapters as a folder that PEFT opens; returns it.

    `base_name` is the model that it stands on, a folder or a hub id; `tokenizer` the folder of the tokenizer that it was trained
    with. Adapters on parts of a fused matrix (GPT-2's c_attn)
    become one of as many times the rank. Raises ValueError for what that format cannot hold: adapters on experts, parts of
    modules, trained parameters outside the head.
    """
    folder = pathlib.Path(folder)
    if not config.lora.rank:
        raise ValueError("an adapter folder holds adapters: this tuning has none (lora.rank is 0); export the whole model instead")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} is there already and not empty: give a new folder, or remove it first")
    chosen, rows = _rows(model, family)
    tuning, values = Tuning(config, model), {path: _to_host(leaf) for path, leaf in flatten(trained).items()}
    # The bare model's modules are called without the prefix that they have under a head.
    bare = chosen.prefix if model.config.head.kind == "embedding" else ""

    tensors: dict[str, np.ndarray] = {}
    modules: list[str] = []
    ranks: dict[str, int] = {}  # how many times the rank a fused one has
    for module in _modules(rows, tuning):
        here = [(part, leaf) for part, leaf in zip(module.row.parts, module.leaves, strict=True) if module.layer in leaf.adapted]
        if here:
            name = module.name.removeprefix(bare)
            tensors |= {f"{BEFORE}{name}.{what}": value for what, value in _written(module, here, values, config.lora).items()}
            modules.append(name)
            ranks |= {name: len(here)} if len(here) > 1 else {}
    if left := [leaf.path for leaf in tuning.leaves if leaf.adapted and "E" in leaf.axes]:
        raise ValueError(f"PEFT's folders have no place for adapters of experts: leave {some(left)} out of lora.targets")
    whole = _whole(rows, tuning, values)
    kept = sorted({name.rpartition(".")[0].removeprefix(bare) for name in whole})
    tensors |= {BEFORE + name.removeprefix(bare): value for name, value in whole.items()}
    said = {
        "peft_type": "LORA", "task_type": _task_type(model), "base_model_name_or_path": base_name or None, "inference_mode": True,
        "r": config.lora.rank, "lora_alpha": _number(config.lora.alpha), "lora_dropout": 0.0, "bias": "none",
        "use_dora": config.lora.dora, "use_rslora": False, "init_lora_weights": True,
        "fan_in_fan_out": any(_inputs_first(module) for module in _modules(rows, tuning)),
        "target_modules": modules, "modules_to_save": kept or None,
        "rank_pattern": {name: config.lora.rank * parts for name, parts in ranks.items()},
        "alpha_pattern": {name: _number(config.lora.alpha * parts) for name, parts in ranks.items()},
    }  # fmt: skip
    if jax.process_index() == 0:
        _write(folder, said, tensors)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
    return folder


def _written(
    module: _Module, here: list[tuple[Part, Leaf]], values: Mapping[str, np.ndarray], lora: LoraConfig
) -> dict[str, np.ndarray]:
    """The tensors of one module. A fused one's A holds those of its parts one behind the other, its B each part's in the rows
    of its outputs and the columns of its A, and zeros elsewhere."""
    if lora.dora and len(here) < len(module.leaves):
        there = ", ".join(leaf.path for leaf in module.leaves)
        raise ValueError(f"{module.name} is one matrix, whose DoRA adapter needs all of {there} in lora.targets")
    inputs, outputs = module.sizes
    a = np.zeros((lora.rank * len(here), *inputs), np.float32)
    b = np.zeros((*outputs, lora.rank * len(here)), np.float32)
    m = np.zeros(outputs, np.float32)
    for i, (part, leaf) in enumerate(here):
        own, (ins, outs) = slice(i * lora.rank, (i + 1) * lora.rank), module.sides(part, leaf)
        place = module.rows(part, outs)
        at = leaf.adapted.index(module.layer)
        one = {name: values[f"{leaf.path}/{name}"][at] if leaf.stacked else values[f"{leaf.path}/{name}"] for name in _names(lora)}
        a[own] = _reorder(one["lora_a"], (*leaf.matrix.inputs, "r"), ("r", *ins))
        b[(*place, own)] = _reorder(one["lora_b"], ("r", *leaf.matrix.outputs), (*outs, "r"))
        if lora.dora:
            m[place] = _reorder(one["lora_magnitude"], leaf.matrix.outputs, outs)
    found = {A: a.reshape(len(a), -1), B: b.reshape(-1, b.shape[-1])}
    return {**found, MAGNITUDE: m.reshape(-1)} if lora.dora else found


def _whole(rows: list[Tensor], tuning: Tuning, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that are trained themselves: whole modules of the head."""
    trained = {leaf.path for leaf in tuning.leaves if leaf.trained}
    if outside := sorted(path for path in trained if not path.startswith("head/")):
        raise ValueError(
            f"an adapter folder holds adapters and modules of the head, but tune.train also trained {some(outside)}: "
            "export the whole model instead"
        )
    found = {row.name: row for row in rows if any(part.path in trained for part in row.parts)}
    for name in found:
        module = name.rpartition(".")[0]
        own = [row for row in rows if row.name.rpartition(".")[0] == module]
        if lost := [part.path for row in own for part in row.parts if part.path not in trained]:
            raise ValueError(f"an adapter folder holds whole modules: beside {name} tune.train must train {some(lost)}")
        if f"{module}.weight" not in {row.name for row in own}:
            raise ValueError(f"an adapter folder holds modules, and {name} is a tensor of none of its own: do not train it")
    return {name: row.write({}, lambda path, index: values[path][index], np.float32) for name, row in found.items()}


def _write(folder: pathlib.Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, partial / WEIGHTS, {"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


# --- reading ----------------------------------------------------------------------------------

# The kind of head behind each of PEFT's task types.
TASKS = {
    "SEQ_CLS": "sequence", "TOKEN_CLS": "token", "QUESTION_ANS": "span", "FEATURE_EXTRACTION": "embedding",
    "CAUSAL_LM": "language_model", "SEQ_2_SEQ_LM": "language_model",
}  # fmt: skip


def _task_type(model: Model) -> str | None:
    """PEFT's name for what a model is for; None where it has none."""
    names = {kind: name for name, kind in reversed(TASKS.items())}
    if model.config.architecture == "encoder_decoder" and model.config.head.kind == "language_model":
        return "SEQ_2_SEQ_LM"
    return names.get(model.config.head.kind)


def read_adapter(folder: pathlib.Path) -> tuple[str | None, int | None, str | None]:
    """What an adapter folder says of its model: kind of head, number of labels, the model that it stands on; None where it
    does not."""
    said, index = _read_config(folder), _Stored(folder).index
    kind = TASKS.get(str(said.get("task_type")))
    whole = [entry.shape for name, entry in index.items() if ".lora_" not in name and len(entry.shape) == 2]
    labels = min(int(shape[0]) for shape in whole) if kind in ("sequence", "token") and whole else None
    return kind, labels, said.get("base_model_name_or_path")


def load_adapter(folder: pathlib.Path | str, model: Model, family: str | None = None) -> Adapter:
    """The adapter in a folder that PEFT (or `save_adapter`) wrote, as a trained tree for `Tuning(adapter.config, model)`.

    An adapter on a fused matrix becomes one on each of its parts. Where ranks or scales differ between modules, all take the
    largest rank, filled with zeros, and the differences of scale go into B. Raises one ValueError for what has no place.
    """
    folder = pathlib.Path(folder)
    said, stored = _read_config(folder), _Stored(folder)
    chosen, rows = _rows(model, family)
    taken: set[str] = set()

    def read(name: str) -> np.ndarray | None:
        """By its full name; a base model's lack the prefix."""
        spelled = next((s for s in (name, BEFORE + name.removeprefix(BEFORE + chosen.prefix)) if s in stored.index), None)
        taken.update([] if spelled is None else [spelled])
        return None if spelled is None else stored.whole(spelled)

    everything = Tuning(TuneConfig(), model)
    found: dict[str, dict[int, _Low]] = collections.defaultdict(dict)  # path → layer → its adapter
    for module in _modules(rows, everything):
        before = f"{BEFORE}{module.name}."
        a, b, m = read(before + A), read(before + B), read(before + MAGNITUDE)
        if a is not None and b is not None:
            for leaf, low in _parts(module, a, b, m, _scaling(said, module.name, len(a)), bool(said.get("use_dora"))):
                found[leaf.path][module.layer] = low
    whole: dict[str, np.ndarray] = {}
    for row in rows:
        value = None if row.spread else read(BEFORE + row.name)
        if value is None:
            continue
        if value.shape != row.shape:
            raise ValueError(f"{row.name} is {value.shape} in {str(folder)!r}, but {row.shape} in the model")
        for part in row.parts:
            index = tuple(slice(0, size) for size in part.shape)
            whole[part.path] = part.read(row.name, index, functools.partial(_slices, value))
    if left := [name for name in stored.index if name not in taken]:
        raise ValueError(f"the adapter in {str(folder)!r} does not fit this model: it has no place for {some(sorted(left))}")
    if not found:
        raise ValueError(f"{str(folder)!r} holds no adapter of this model")
    return _assembled(found, whole, model, said)


class _Low(NamedTuple):
    """One layer's adapter of a kernel, in our order of axes, and what its product is scaled with."""

    a: np.ndarray
    b: np.ndarray
    m: np.ndarray | None
    scale: float


def _parts(
    module: _Module, a: np.ndarray, b: np.ndarray, m: np.ndarray | None, scale: float, dora: bool
) -> Iterator[tuple[Leaf, _Low]]:
    inputs, outputs = module.sizes
    rank = len(a)
    if a.shape != (rank, math.prod(inputs)) or b.shape != (math.prod(outputs), rank) or dora != (m is not None):
        raise ValueError(
            f"the adapter of {module.name} does not fit: A is {a.shape}, B {b.shape}, with {'no' if m is None else 'a'} magnitude "
            f"vector; the module has {math.prod(inputs)} inputs and {math.prod(outputs)} outputs, and use_dora is {dora}"
        )
    for part, leaf in zip(module.row.parts, module.leaves, strict=True):
        ins, outs = module.sides(part, leaf)
        place = module.rows(part, outs)
        own_a, own_b = a.reshape(rank, *inputs), b.reshape(*outputs, rank)[place]
        if len(module.leaves) > 1:  # what is another part's alone
            used = np.any(own_b != 0, axis=tuple(range(len(outs))))
            own_a, own_b = own_a[used], own_b[..., used]
        own_a = _reorder(own_a, ("r", *ins), (*leaf.matrix.inputs, "r"))
        own_b = _reorder(own_b, (*outs, "r"), ("r", *leaf.matrix.outputs))
        own_m = None if m is None else _reorder(m.reshape(outputs)[place], outs, leaf.matrix.outputs)
        yield leaf, _Low(own_a, own_b, own_m, scale)


def _assembled(
    found: Mapping[str, Mapping[int, _Low]], whole: Mapping[str, np.ndarray], model: Model, said: Mapping[str, Any]
) -> Adapter:
    lows = [low for layers in found.values() for low in layers.values()]
    rank, scale, dora = max(1, *(len(low.b) for low in lows)), lows[0].scale, lows[0].m is not None
    lora = LoraConfig(rank, scale * rank, dora=dora)
    train = f"^({'|'.join(sorted(whole))})$" if whole else None
    default = {leaf.path: leaf.adapted for leaf in Tuning(TuneConfig(None, lora), model).leaves if leaf.adapted}
    if {path: tuple(sorted(layers)) for path, layers in found.items()} != default:
        layers_of = {leaf.path: leaf.layers for leaf in Tuning(TuneConfig(), model).leaves}
        lora = dataclasses.replace(lora, targets=_targets(found, layers_of))
    config = TuneConfig(train, lora)
    flat: dict[str, Any] = dict(whole)
    for leaf in Tuning(config, model).leaves:
        own = [_fitted(found[leaf.path][layer], rank, scale) for layer in leaf.adapted]
        for name in _names(lora) if own else ():
            arrays = [low[name] for low in own]
            flat[f"{leaf.path}/{name}"] = np.stack(arrays) if leaf.stacked else arrays[0]
    return Adapter(config, nest(flat), said.get("base_model_name_or_path"))


def _fitted(low: _Low, rank: int, scale: float) -> dict[str, Any]:
    """One layer's adapter by our names, brought to this rank and scale."""
    more = rank - len(low.b)
    b = low.b if low.scale == scale else low.b * np.float32(low.scale / scale)
    return {
        "lora_a": np.pad(low.a, [*[(0, 0)] * (low.a.ndim - 1), (0, more)]),
        "lora_b": np.pad(b, [(0, more), *[(0, 0)] * (b.ndim - 1)]),
        "lora_magnitude": low.m,
    }


def _targets(found: Mapping[str, Mapping[int, Any]], layers_of: Mapping[str, int]) -> str:
    """A regular expression of exactly these kernels, in these layers."""
    names = []
    for path, layers in sorted(found.items()):
        some_layers = "|".join(map(str, sorted(layers)))
        names.append(path if len(layers) == layers_of[path] else path.replace("layers/", rf"layers\.({some_layers})/", 1))
    return f"^({'|'.join(names)})$"


class _Stored(Tensors):
    """The tensors of an adapter folder."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.index = folder, _header(folder / WEIGHTS)

    def whole(self, name: str) -> np.ndarray:
        entry = self.index[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{name} is {entry.dtype}, expected one of {', '.join(DTYPES)}")
        return self.read(name, tuple(slice(0, size) for size in entry.shape)).astype(np.float32)


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} has no {CONFIG}: not the folder of an adapter")
    try:
        said = json.loads(file.read_text(encoding="utf8"))
        assert isinstance(said, dict)
    except (ValueError, AssertionError):
        raise ValueError(f"{file} is not a JSON object") from None
    for key, plain in PLAIN.items():
        if key in said and said[key] not in plain:
            shown = " or ".join(repr(value) for value in plain)
            raise ValueError(f"{file}: {key} {said[key]!r} is not supported: {shown} is")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{str(folder)!r} holds no {WEIGHTS}: weights in other forms, which may run code, are not read here")
    return said


def _scaling(said: Mapping[str, Any], module: str, rank: int) -> float:
    """What PEFT scales the module's product with; patterns are regular expressions of the ends of names, the first counts."""
    patterns = said.get("alpha_pattern") or {}
    alpha = next((patterns[p] for p in patterns if re.match(rf"(.*\.)?({p})$", module)), said["lora_alpha"])
    return alpha / math.sqrt(rank) if said.get("use_rslora") else alpha / rank


# --- both ways --------------------------------------------------------------------------------


def _names(lora: LoraConfig) -> tuple[str, ...]:
    return ("lora_a", "lora_b", "lora_magnitude")[: 3 if lora.dora else 2]


def _reorder(x: np.ndarray, axes: Any, wanted: Any) -> np.ndarray:
    return x.transpose([tuple(axes).index(letter) for letter in wanted])


def _inputs_first(module: _Module) -> bool:
    """Whether the matrix lies (in, out), as GPT-2's do."""
    return module.row.parts[0].groups[0][0] in module.leaves[0].matrix.inputs


def _slices(value: np.ndarray, name: str, slices: Any) -> np.ndarray:
    return value[slices]


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _to_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf, np.float32)
