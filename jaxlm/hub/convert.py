"""A Hugging Face folder ↔ a model of ours: the registry of families, and the two directions."""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401, which makes np.dtype know bfloat16
import numpy as np

from jaxlm import __version__
from jaxlm.config import unknown
from jaxlm.hub.decoders import DECODERS
from jaxlm.hub.encoders import ENCODERS
from jaxlm.hub.family import Family, complete
from jaxlm.hub.files import DTYPES, Tensors, find, has_weights, tensor_names
from jaxlm.hub.loading import load
from jaxlm.hub.model_card import PIPELINE_TAGS, CardFacts, model_card
from jaxlm.hub.saving import Carried, save
from jaxlm.hub.seq2seq import SEQ2SEQ
from jaxlm.hub.tensors import Table
from jaxlm.hub.tied import read_copies
from jaxlm.model import Model, Params, TransformerConfig
from jaxlm.parallel import stored_shardings

FAMILIES: dict[str, Family] = {family.name: family for family in (*ENCODERS, *DECODERS, *SEQ2SEQ)}


def is_hugging_face(folder: pathlib.Path) -> bool:
    """Whether a folder holds a model of `transformers`, by its `config.json`."""
    return (folder / "config.json").is_file()


def read_json(folder: pathlib.Path) -> dict[str, Any]:
    """A folder's `config.json`, completed. Raises ValueError, in one line, for one that is not there, not valid, of a
    family that is not supported, or with a number that is none."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} has no config.json: not the folder of a Hugging Face model")

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}, which is no number")

    try:
        theirs = json.loads(file.read_text(encoding="utf8"), parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not isinstance(theirs, dict):
        raise ValueError(f"{file} holds {theirs!r}: expected an object with a model_type")
    family_of(theirs)
    return complete(theirs)


def label_names(theirs: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a head's outputs in their order, by the `id2label` of a `config.json`; empty without one.

    Raises ValueError where its ids are not 0, 1, … without a gap, or where two outputs have the same name.
    """
    named = {int(key): str(name) for key, name in (theirs.get("id2label") or {}).items()}
    if sorted(named) != list(range(len(named))):
        raise ValueError(
            f"config.json: id2label has the ids {', '.join(map(str, sorted(named)))}: expected 0 to {len(named) - 1}, one for each "
            "output of the head"
        )
    repeated = next((name for name, count in collections.Counter(named.values()).items() if count > 1), None)
    if repeated is not None:
        raise ValueError(f"config.json: id2label gives the name {repeated!r} to several outputs: give each a name of its own")
    return tuple(named[i] for i in range(len(named)))


def family_of(theirs: Mapping[str, Any]) -> Family:
    """The family of a `config.json`. Code that comes with a model is never run, so its `auto_map` plays no part."""
    name = str(theirs.get("model_type"))
    if name not in FAMILIES:
        raise unknown("model_type", name, FAMILIES)
    return FAMILIES[name]


def table_of(family: Family, config: TransformerConfig) -> Table:
    """The family's tensors, as `load` and `save` take them."""
    ignored = (*family.ignored, r"^lm_head\.weight$")  # a copy of a tied table
    return Table(
        family.table(config), prefix=family.prefix, ignored=ignored, renames=family.renames, copies=family.copies,
        write_copies=family.unties_copies and not config.tie_embeddings, absent=family.missing,
    )  # fmt: skip


class Loaded(NamedTuple):
    """A model from a Hugging Face folder: its parameters in their shardings, where it was, and its `config.json`."""

    model: Model
    params: Params
    folder: pathlib.Path
    theirs: dict[str, Any]


def load_folder(
    argument: str, mesh: jax.sharding.Mesh, *, head: str | None = None, labels: int | None = None, seed: int = 0,
    parameters: str = "float32", **changes: Any,
) -> Loaded:  # fmt: skip
    """The model in a Hugging Face folder or hub id.

    `head` and `labels` ask for another head than the file's own: what its files lack is then initialised anew from
    `seed`. `parameters` is the precision that they are held in (training wants float32), `changes` are further fields of
    the config, as `dtype`, that of the computation. Raises ValueError in one line for whatever does
    not fit.
    """
    folder = find(argument)
    model = Model(dataclasses.replace(read_config(folder, head, labels), **changes))
    params = load_parameters(folder, model, mesh, seed=seed, parameters=parameters)
    return Loaded(model, params, folder, read_json(folder))


def read_config(folder: pathlib.Path, head: str | None = None, labels: int | None = None) -> TransformerConfig:
    """Our config of the model in a folder, with another head on request."""
    theirs = read_json(folder)
    family = family_of(theirs)
    config = family.config(theirs, tensor_names(folder), head, labels)
    if config.head.kind in ("language_model", "masked_lm") and has_weights(folder):
        # Of T5's names alone say that the head may not be tied; its config always ties it where both tables are equal.
        tied = read_copies(Tensors(folder), table_of(family, config), theirs.get("tie_word_embeddings", config.tie_embeddings))
        config = dataclasses.replace(config, tie_embeddings=tied)
    if config.head.kind == "embedding":
        config = dataclasses.replace(config, head=dataclasses.replace(config.head, pool=_pooling(folder) or config.head.pool))
    return config


def load_parameters(
    folder: pathlib.Path, model: Model, mesh: jax.sharding.Mesh, *, seed: int = 0, parameters: str = "float32"
) -> Params:
    """The parameters of `model` from a folder's files; a head that those do not hold is initialised anew from `seed`."""
    theirs, tensors = read_json(folder), Tensors(folder)
    family, config = family_of(theirs), model.config
    tied = read_copies(tensors, table_of(family, config), config.tie_embeddings)
    if config.tie_embeddings and not tied:
        raise ValueError(f"{str(folder)!r} holds a head that is not tied to the embeddings: give model.tie_embeddings false")
    if (theirs.get("quantization_config") or {}) and any(stored.dtype not in DTYPES for stored in tensors.index.values()):
        method = theirs["quantization_config"].get("quant_method", "unknown method")
        raise ValueError(
            f"{str(folder)!r}: quantization_config ({method}): quantised tensors are not read: dequantise the model with "
            "transformers and save it anew"
        )
    shardings = stored_shardings(model.axes, model.shapes, mesh)
    held = family.config(theirs)
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    if (held.head.kind, held.outputs) != (config.head.kind, config.outputs):
        own = {name for kind in family.heads.values() for name in kind.tensors} - family.table(config).keys()
        optional, ignored = (r"head/.*",), tuple(name.replace(".", r"\.") for name in own)
    return load(
        tensors, table_of(family, config), model.shapes, model.axes, shardings, np.dtype(parameters),
        ignored=ignored, optional=optional, fresh=lambda: model.init(jax.random.key(seed)) if optional else None,
    )  # fmt: skip


# How sentence-transformers says which hidden state stands for a text.
_POOLS = {"cls_token": "first", "mean_tokens": "mean", "lasttoken": "last"}


def _pooling(folder: pathlib.Path) -> Any:
    """The pooling of an embedding model as sentence-transformers wrote it beside the weights, if it did."""
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return None
    said = json.loads(file.read_text(encoding="utf8"))
    on = [name.removeprefix("pooling_mode_") for name, value in said.items() if name.startswith("pooling_mode_") and value]
    if len(on) != 1 or on[0] not in _POOLS:
        raise ValueError(f"{file}: pooling {' and '.join(on) or 'none'} is not supported: one of {', '.join(_POOLS)} is")
    return _POOLS[on[0]]


def family_for(config: TransformerConfig) -> tuple[Family, dict[str, Any]]:
    """The first family that can say this config, and its `config.json`; or ValueError with why the nearest cannot."""
    reasons: list[tuple[int, str]] = []
    for family in FAMILIES.values():
        if family.fixed["architecture"] == config.architecture:
            theirs, lost = family.translate(config)
            if not lost:
                return family, theirs
            reasons.append((len(lost), f"{family.name} models cannot have {', '.join(lost)}"))
    raise ValueError(
        f"no Hugging Face family describes this {config.architecture}; the nearest: {min(reasons, key=lambda reason: reason[0])[1]}"
    )


def save_folder(
    folder: pathlib.Path, model: Model, params: Params, *, tokenizer: pathlib.Path | None = None,
    like: Mapping[str, Any] | None = None, family: str | None = None, dtype: str = "float32", title: str = "",
    max_shard_bytes: int = 5_000_000_000, source: pathlib.Path | None = None,
    generation: Mapping[str, Any] | None = None, facts: CardFacts | None = None,
) -> pathlib.Path:  # fmt: skip
    """Write the model as a Hugging Face folder in the form of transformers 5: config, tensors, tokenizer,
    generation config and model card. `like` is another `config.json`, from which the ids of special tokens, the
    names of labels and `problem_type` are taken; `source` the folder that the model was loaded from, if it was: what of
    it has no place among our parameters (an encoder's pooler) is taken over. `generation` are settings for writing text, with or
    without the ids of special tokens, which are else those of the config. `facts` is what its model card says beside its size."""
    if family is not None and family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    chosen, theirs = family_for(model.config) if family is None else (FAMILIES[family], FAMILIES[family].json(model.config))
    kept = {key: value for key, value in (like or {}).items() if key.endswith("_token_id")}
    named = like is not None and len(like.get("id2label") or ()) == model.config.head.labels and "id2label" in theirs
    if like is not None and named:
        kept |= {key: like[key] for key in ("id2label", "label2id") if key in like}
    if like is not None and model.config.head.kind == "sequence" and like.get("problem_type"):
        kept["problem_type"] = like["problem_type"]
    if "forced_eos_token_id" in theirs and "eos_token_id" in kept:
        kept.setdefault("forced_eos_token_id", kept["eos_token_id"])
    theirs |= {"dtype": dtype, "transformers_version": "5.0.0", **kept}
    generates = model.config.head.kind == "language_model"
    ids = {k: v for k, v in theirs.items() if k.endswith("_token_id")}
    settings = {**ids, **generation} if generation else {"_from_model_config": True, **ids}
    tag = pipeline_tag(model.config)
    card = model_card(title or folder.name, chosen.name, model.parameters(), dtype, tag, facts or CardFacts(), __version__)
    # Their layouts have no place for a head over pairs.
    params, axes = ({name: part for name, part in tree.items() if name != "pair"} for tree in (params, model.axes))
    return save(
        folder, table_of(chosen, model.config), params, axes,
        dtype=dtype, config=theirs, generation_config=settings if generates else None, tokenizer=tokenizer,
        card=card,
        max_shard_bytes=max_shard_bytes,
        carried=_carried(chosen, model.config, source),
    )  # fmt: skip


def _carried(family: Family, config: TransformerConfig, source: pathlib.Path | None) -> list[Carried]:
    patterns = family.heads[config.head.kind].carried
    if source is None or not patterns:
        return []
    stored = Tensors(source)
    found = [name for name in stored.index if any(re.search(pattern, name) for pattern in patterns)]
    return [Carried(family.prefix + name.removeprefix(family.prefix), name, stored) for name in found]


def pipeline_tag(config: TransformerConfig) -> str | None:
    """The hub's name for what a model of this config does."""
    if config.head.kind == "language_model":
        return "text-generation" if config.architecture == "decoder" else "text2text-generation"
    return PIPELINE_TAGS.get(config.head.kind)
