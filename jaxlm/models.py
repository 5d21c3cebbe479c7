"""The MODEL argument of a verb: a run folder, a Hugging Face folder (a model's or a PEFT adapter's), or a hub id."""

import collections
import dataclasses
import json
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxlm import config as configs
from jaxlm.data import Tokenizer, load_tokenizer
from jaxlm.devices import LoadOptions
from jaxlm.generate import SETTINGS, DecodeConfig, GenerationSettings
from jaxlm.hub import (
    ADAPTER,
    GENERATION,
    find,
    fingerprint_files,
    is_hugging_face,
    label_names,
    load_adapter,
    load_parameters,
    read_adapter,
    read_config,
    read_generation,
    read_json,
    stored_dtype,
)
from jaxlm.metrics import lower_is_better
from jaxlm.model import Detection, Model, Params, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh, mesh_of, stored_shardings
from jaxlm.report import command, warn
from jaxlm.tasks import TASKS, Task, TaskConfig, label_order
from jaxlm.train import Checkpoints, TuneConfig, Tuning, init_frozen

CARD = "task.json"  # in a run's folder

# The task that a head is for, where no run says which.
_OF_HEAD = {
    "sequence": "classification", "token": "tagging", "span": "extractive_qa", "choice": "multiple_choice",
    "embedding": "embedding",
}  # fmt: skip
# `problem_type` of a transformers config, which says what the outputs of a sequence head mean, by task.
_PROBLEM_TYPES = {
    "classification": "single_label_classification", "multilabel": "multi_label_classification", "regression": "regression",
    "reward": "regression",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Card:
    """What a run found out and its readers need: the names of its labels, and what its checkpoints are ranked by."""

    labels: tuple[str, ...] = ()
    metric: str = "loss"
    start_id: int | None = None
    """What a decoder that reads an encoder begins with."""
    base: str | None = None
    """Fingerprint of the model that a run with frozen parameters started from: its checkpoints do not hold these."""


def write_card(run: pathlib.Path, card: Card) -> None:
    (run / CARD).write_text(json.dumps(dataclasses.asdict(card), ensure_ascii=False), encoding="utf8")


def read_card(run: pathlib.Path) -> Card:
    """The card of a run's folder; an empty one where there is none."""
    file = run / CARD
    said = json.loads(file.read_text(encoding="utf8")) if file.is_file() else {}
    return Card(tuple(said.get("labels", ())), said.get("metric", "loss"), said.get("start_id"), said.get("base"))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with its parameters, and where it came from."""

    model: Model
    params: Params
    mesh: jax.sharding.Mesh
    name: str
    tokenizer_folder: pathlib.Path
    run: pathlib.Path | None = None
    """The folder of the run that trained it."""
    source: pathlib.Path | None = None
    """The Hugging Face folder that it was loaded from."""
    theirs: Mapping[str, Any] | None = None
    """That folder's `config.json`."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ValueError where the folder holds none, or one with more entries than the model has embeddings, special tokens
        aside that nothing needs (`fitted`)."""
        tokenizer = fitted(load_tokenizer(self.tokenizer_folder), self.model.config.vocab_size, self.name)
        check_vocabulary(tokenizer, self.model.config, self.name, self.source is not None)
        return tokenizer

    def stop_ids(self) -> list[int]:
        """Tokens that end a text beside the tokenizer's own: of a Hugging Face folder its list of them."""
        if self.source is None or self.theirs is None:
            return []
        found = read_generation(self.source).get("eos_token_id", self.theirs.get("eos_token_id"))
        return [] if found is None else found if isinstance(found, list) else [found]

    def generation(self) -> GenerationSettings:
        """The model's own settings for writing text: of its Hugging Face folder, or those that its run began with. ValueError for
        settings that cannot be read."""
        folder = self.source or self.run
        if folder is None or self.model.config.head.kind != "language_model":
            return GenerationSettings()
        there = (folder / GENERATION).is_file()
        where = GENERATION if there else "config.json"
        settings = GenerationSettings.read(read_generation(folder), where)
        settings.rules().check(self.model.config.V)
        return settings if self.run is None else settings.alone()

    def generation_json(self) -> dict[str, Any] | None:
        """A `generation_config.json` with these settings: the folder's own file as it is, else what its `config.json` says of them,
        of a run that answers texts how it searches for them; None where there are none."""
        folder = self.source or self.run
        if folder is None:
            return None
        if self.run is not None:
            task = configs.build(TaskConfig, configs.read_yaml(self.run / "config.yaml")[0].get("task", {}))
            if task.kind == "text_to_text":
                return self.generation().searched(task.decode)
        values = read_generation(folder)
        if self.source is None or not (folder / GENERATION).is_file():
            values = {name: value for name, value in values.items() if name in SETTINGS}
        return values or None

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes of a head over labels, where they are known."""
        if self.run is not None:
            return read_card(self.run).labels
        return label_names(self.theirs or {})

    def start(self) -> Params:
        """The parameters that its run started from. Raises ValueError for a model of no run."""
        if self.run is None:
            raise ValueError(f"{self.name} is of no run: what it started from is not known")
        tree = configs.read_yaml(self.run / "config.yaml")[0]
        ordered = bool(tree.get("task", {}).get("labels"))
        return start_parameters(tree["model"].get("init_from"), self.model, self.mesh, tree["seed"], self.labels, ordered)

    @property
    def reads(self) -> bool:
        """It is an encoder-decoder: it reads its prompt, and writes another text."""
        return self.model.config.architecture == "encoder_decoder"

    def for_writing(self, free: bool = False) -> "Trained":
        """Copy with the decoder's layers unstacked for decoding (`Model.apart`).

        With `free` the stacked layers are deleted one parameter at a time, so that memory never holds the model twice; this one
        is of no use afterwards.
        """
        if "decoder" not in self.model.config.stacks:
            return self
        with jax.set_mesh(self.mesh):
            stacked = not isinstance(self.params["transformer"]["decoder"]["layers"], tuple)
            if not free or not stacked or self.model.config.share_layers:
                return dataclasses.replace(self, params=jax.jit(self.model.apart)(self.params))
            return dataclasses.replace(self, params=self._unstacked())

    def _unstacked(self) -> Params:
        """`Model.apart` of the parameters, each of which is deleted as soon as its layers are made."""

        @jax.jit
        def layers_of(layers: Params) -> Any:
            return self.model.apart({"transformer": {"decoder": {"layers": layers}}})["transformer"]["decoder"]["layers"]

        transformer = self.params["transformer"]
        made: list[dict[Any, Any]] = [{} for _ in range(self.model.config.stacks["decoder"])]
        for path, leaf in flatten_dict(transformer["decoder"]["layers"]).items():
            for layer, own in zip(made, jax.block_until_ready(layers_of(unflatten_dict({path: leaf}))), strict=True):
                layer |= flatten_dict(own)
            leaf.delete()
        decoder = {**transformer["decoder"], "layers": tuple(map(unflatten_dict, made))}
        return {**self.params, "transformer": {**transformer, "decoder": decoder}}

    def task(self, kind: str | None = None, length: int | None = None, split_special_tokens: bool | None = None) -> Task:
        """The task that it was trained for, or `kind` of a Hugging Face model, as far as its head is one's.
        `split_special_tokens`: as `TextEncoder`'s; None: as in training.

        Raises ValueError for a `length` that is more than the model's positions."""
        head, architecture = self.model.config.head.kind, self.model.config.architecture
        positions = self.model.config.positions
        if length is not None and length > positions:
            raise ValueError(f"length {length} is more than the {positions} positions of {self.name}: give up to {positions}")
        if self.run is not None:
            tree = configs.read_yaml(self.run / "config.yaml")[0]
            config = configs.build(TaskConfig, tree.get("task", {}))
            length = length or tree["data"]["length"]
            outputs = self.model.config.head.labels
            if config.kind in ("classification", "multilabel", "tagging") and len(self.labels) != outputs:
                raise ValueError(f"{self.run / CARD} must name the {outputs} labels of the model, and names {len(self.labels)}")
        else:
            named = kind or self._task_of_head()
            if named not in TASKS:
                raise configs.unknown("task", named, TASKS)
            if TASKS[named].head["kind"] != head:
                raise ValueError(f"{self.name} has head {head}, not the head {TASKS[named].head['kind']} of task {named}")
            if named == "regression" and self.model.config.head.labels != 1:
                raise ValueError(f"{self.name} has {self.model.config.head.labels} outputs, and task regression has one")
            config = TaskConfig(kind=named)  # type: ignore[arg-type]
        if kind and kind != config.kind:
            raise ValueError(f"{self.name} was trained for task {config.kind}, not for {kind}")
        if config.pretraining:
            raise ValueError(f"{self.name} was pretrained ({config.kind}): fine-tune it for a task first")
        settings = self.generation()
        if self.run is None and config.kind == "text_to_text":
            room = settings.room(1, DecodeConfig().max_tokens)
            config = dataclasses.replace(config, decode=settings.decode({"max_tokens": room}))
        if split_special_tokens is not None:
            config = dataclasses.replace(config, split_special_tokens=split_special_tokens)
        task = TASKS[config.kind](
            config, self.tokenizer, min(length or positions, positions), labels=self.labels, architecture=architecture,
            start_id=start_id(self.run or self.source, self.tokenizer),
        )  # fmt: skip
        task.rules, task.ends = settings.rules(), frozenset(self.stop_ids())
        return task

    def _task_of_head(self) -> str:
        """The task of a Hugging Face model's head; for a sequence head its `problem_type`, where one is given, decides
        between softmax (classification), sigmoid (multilabel) and identity (regression), as in transformers."""
        head = self.model.config.head
        if self.model.config.architecture == "encoder_decoder" and head.kind == "language_model":
            return "text_to_text"
        if head.kind not in _OF_HEAD:
            raise ValueError(f"{self.name} has head {head.kind}, which is for no task over rows: fine-tune it first")
        if head.kind != "sequence":
            return _OF_HEAD[head.kind]
        problem = (self.theirs or {}).get("problem_type")
        by_problem = {value: task for task, value in _PROBLEM_TYPES.items() if task != "reward"}
        if problem is not None and problem not in by_problem:
            raise configs.unknown(f"{self.name}: problem_type", problem, by_problem)
        return by_problem[problem] if problem else "regression" if head.labels == 1 else "classification"

    def json(self) -> Mapping[str, Any]:
        """A `config.json` with the ids of special tokens: its own, or those of a run's tokenizer, and its label names."""
        if self.theirs is not None:
            return self.theirs
        tokenizer = self.tokenizer
        said: dict[str, Any] = {"eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.bos_id}
        if "pad" in tokenizer.special:
            said["pad_token_id"] = tokenizer.special["pad"]
        if self.model.config.architecture == "encoder_decoder":
            said["decoder_start_token_id"] = start_id(self.run, tokenizer)
        assert self.run is not None, "a model has a config.json or a run"
        kind = configs.read_yaml(self.run / "config.yaml")[0].get("task", {}).get("kind")
        if kind in _PROBLEM_TYPES:
            said["problem_type"] = _PROBLEM_TYPES[kind]
        if self.labels:
            said["id2label"] = {str(i): name for i, name in enumerate(self.labels)}
            said["label2id"] = {name: i for i, name in enumerate(self.labels)}
        return said


def start_id(folder: pathlib.Path | None, tokenizer: Tokenizer) -> int:
    """What the decoder of a model in a folder begins with, where it reads an encoder: as its run or its `config.json`
    says; without either the padding, as T5's does."""
    said: Any = None
    if folder is not None and is_hugging_face(folder):
        said = read_generation(folder).get("decoder_start_token_id", read_json(folder).get("decoder_start_token_id"))
    elif folder is not None:
        said = read_card(folder).start_id
    return int(said) if said is not None else tokenizer.special.get("pad", tokenizer.bos_id)


def held_dtype(params: Params) -> str:
    """The dtype that most parameters are held in."""
    sizes: collections.Counter[str] = collections.Counter()
    for leaf in jax.tree.leaves(params):
        sizes[leaf.dtype.name] += leaf.size
    return sizes.most_common(1)[0][0]


def one_device() -> jax.sharding.Mesh:
    return make_mesh(ParallelConfig(), jax.devices()[:1])


def load_model(argument: str, mesh: jax.sharding.Mesh | None = None, options: LoadOptions | None = None) -> Trained:
    """A run folder's checkpoint with the best score, or a Hugging Face model, each part read straight to its devices.

    It lies on `mesh`, or where `options` say: by default on one device. ValueError where there are too few.
    """
    options = LoadOptions() if options is None else options
    mesh = mesh_of(options.parallel) if mesh is None else mesh
    folder = locate(argument)
    if (folder / ADAPTER).is_file():
        trained = _adapted(folder, mesh)
        assert trained.source is not None, "an adapter is merged into the model of a Hugging Face folder"
        return _in_dtype(trained, stored_dtype(trained.source) if options.dtype == "auto" else options.dtype)
    if is_hugging_face(folder):
        held = stored_dtype(folder) if options.dtype == "auto" else options.dtype or "float32"
        model = Model(_computing(read_config(folder), held))
        params = load_parameters(folder, model, mesh, parameters=held)
        return Trained(model, params, mesh, folder.name, folder, source=folder, theirs=read_json(folder))
    model, params = _restore(folder, mesh)
    trained = Trained(model, params, mesh, folder.name, folder / "tokenizer", run=folder)
    return _in_dtype(trained, None if options.dtype == "auto" else options.dtype)


def _computing(config: TransformerConfig, held: str) -> TransformerConfig:
    """The config of a model whose parameters are held in dtype `held`; float16 is computed with in float32."""
    computed: Any = "bfloat16" if held == "bfloat16" else "float32"
    return dataclasses.replace(config, dtype=computed, param_dtype=computed)


def _in_dtype(trained: Trained, dtype: str | None) -> Trained:
    """Copy with parameters held in another dtype and computed with accordingly; None: unchanged. Deletes the old parameters."""
    model = trained.model if dtype is None else Model(_computing(trained.model.config, dtype))
    if dtype is None or (model.config == trained.model.config and held_dtype(trained.params) == dtype):
        return trained
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trained.params)
    cast = jax.jit(lambda params: jax.tree.map(lambda leaf: leaf.astype(dtype), params), out_shardings=shardings, donate_argnums=0)
    with warnings.catch_warnings():  # JAX tells of each buffer that is too large to be used again
        warnings.filterwarnings("ignore", message="Some donated buffers")
        return dataclasses.replace(trained, model=model, params=cast(trained.params))


class Tuned(NamedTuple):
    """What a run trained: the tree of its tuning, the model that it is of, and what that started from."""

    config: TuneConfig
    model: Any
    trained: Any
    base: str | None
    seed: int
    task: str
    labels: tuple[str, ...] = ()
    """Names of the run's labels."""
    ordered: bool = False
    """The user named the labels in their order."""
    fingerprint: str | None = None
    """Of `base`, as it was when the run began."""


def load_tuned(folder: pathlib.Path, mesh: jax.sharding.Mesh) -> Tuned:
    """The best checkpoint of a run as it was trained, adapters apart from what they adapt."""
    if not (folder / "checkpoints").is_dir():  # to look for checkpoints would make it
        raise _no_checkpoint(folder)
    tree = configs.read_yaml(folder / "config.yaml")[0]
    task = configs.build(TaskConfig, tree.get("task", {}))
    model: Any = Model(model_config(str(folder)))
    if task.kind == "replaced":
        model = Detection(model.config, task.generator)
    config = configs.build(TuneConfig, tree.get("tune", {}))
    tuning = Tuning(config, model)
    card, checkpoints = read_card(folder), best_checkpoints(folder)
    step = checkpoints.best()
    if step is None:
        raise _no_checkpoint(folder)
    trained = checkpoints.restore_params(step, tuning.shapes, stored_shardings(tuning.axes, tuning.shapes, mesh))
    base, ordered = tree["model"].get("init_from"), bool(task.labels)
    return Tuned(config, model, trained, base, tree["seed"], task.kind, card.labels, ordered, card.base)


def _no_checkpoint(folder: pathlib.Path) -> ValueError:
    return ValueError(f"{folder} has no checkpoint yet: train it first with: {command('jaxlm', 'train', folder / 'config.yaml')}")


def best_checkpoints(folder: pathlib.Path) -> Checkpoints:
    """The checkpoints of a run, ranked by the score that it named."""
    metric = read_card(folder).metric
    return Checkpoints(folder / "checkpoints", metric=metric, higher=not lower_is_better(metric))


def source_fingerprint(argument: str) -> str:
    """Fingerprint of the parameters that the MODEL argument means: of a Hugging Face folder its tensors, of an adapter its own
    and those of its base, of a run its best checkpoint and the base of that."""
    folder = locate(argument)
    if (folder / ADAPTER).is_file():
        base = read_adapter(folder)[2]
        own = fingerprint_files(folder, [*folder.glob("*.safetensors"), folder / ADAPTER])
        return own if base is None else f"{own} on {source_fingerprint(base)}"
    if is_hugging_face(folder):
        return fingerprint_files(folder, [*folder.glob("*.safetensors"), folder / "config.json"])
    step = best_checkpoints(folder).best()
    place = folder / "checkpoints" / str(step)
    item = place / "average" if (place / "average").is_dir() else place / "params"
    own = fingerprint_files(place, (file for file in item.rglob("*") if file.is_file()))
    base = read_card(folder).base
    return own if base is None else f"{own} on {base}"


def check_base(name: str, base: str | None, fingerprint: str | None) -> None:
    """Raises ValueError where the model `base`, of which the run `name` holds no copy, is not the one that it began with."""
    if base is not None and fingerprint is not None and source_fingerprint(base) != fingerprint:
        raise ValueError(
            f"{base} has changed since {name} began from it, which keeps no copy of what it froze: restore it, or train anew "
            "under another --name"
        )


def _merged(tuned: Tuned, mesh: jax.sharding.Mesh) -> Params:
    """All parameters of the model, adapters merged into what they adapt."""
    tuning, model = Tuning(tuned.config, tuned.model), tuned.model
    if not tuning.frozen_shapes:
        return tuned.trained
    check_base("the run", tuned.base, tuned.fingerprint)
    start = start_parameters(tuned.base, model, mesh, tuned.seed, tuned.labels, tuned.ordered)
    frozen = init_frozen(model, tuned.seed, mesh, tuning, start)
    return jax.jit(tuning.merge, out_shardings=stored_shardings(model.axes, model.shapes, mesh))(tuned.trained, frozen)


def _restore(folder: pathlib.Path, mesh: jax.sharding.Mesh) -> tuple[Model, Params]:
    """A run's model and its best parameters; of a pair of models the one that is kept."""
    tuned = load_tuned(folder, mesh)
    params = _merged(tuned, mesh)
    return (tuned.model.discriminator, params["discriminator"]) if tuned.task == "replaced" else (tuned.model, params)


def _adapter(folder: pathlib.Path) -> tuple[str | None, int | None, str]:
    """Head, number of labels and base model of a PEFT folder. ValueError where it names no base."""
    head, labels, base = read_adapter(folder)
    if base is None:
        raise ValueError(f"{folder} does not say which model it adapts (base_model_name_or_path in {ADAPTER})")
    return head, labels, base


def _adapted(folder: pathlib.Path, mesh: jax.sharding.Mesh) -> Trained:
    """A PEFT folder: the model that it stands on, with its adapters merged and its head."""
    head, labels, base = _adapter(folder)
    source = locate(base)
    if not is_hugging_face(source):
        raise ValueError(f"{folder} adapts {base}, which is no Hugging Face model")
    model = Model(read_config(source, head, labels))
    adapter = load_adapter(folder, model)
    tuning = Tuning(adapter.config, model)
    placed = jax.device_put(adapter.trained, stored_shardings(tuning.axes, tuning.shapes, mesh))
    params = _merged(Tuned(adapter.config, model, placed, base, 0, ""), mesh)
    theirs, own_head = read_json(source), read_config(source).head
    if (own_head.kind, own_head.labels) != (model.config.head.kind, model.config.head.labels):  # names of other outputs
        theirs = {key: value for key, value in theirs.items() if key not in ("id2label", "label2id")}
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))  # its chat template, say
    return Trained(model, params, mesh, folder.name, folder if own else source, source=source, theirs=theirs)


def start_generation(argument: str | None) -> dict[str, Any]:
    """The settings for writing text that a run keeps of what it starts from, special tokens left out: those are its tokenizer's."""
    if argument is None:
        return {}
    return {name: value for name, value in read_generation(locate(argument, weights=False)).items() if name in SETTINGS}


def source_labels(argument: str | None, head: str) -> tuple[str, ...]:
    """Names of the labels of a model that a run starts from; empty where its head is not of the kind `head`."""
    if argument is None or head not in ("sequence", "token"):
        return ()
    folder = locate(argument, weights=False)
    if model_config(argument).head.kind != head:
        return ()
    if not is_hugging_face(folder):
        return read_card(folder).labels
    return label_names(read_json(folder))


def start_parameters(
    argument: str | None, model: Any, mesh: jax.sharding.Mesh, seed: int, labels: Sequence[str] = (), ordered: bool = False
) -> Params:
    """The parameters that a run begins with: a pretrained model's under a fresh head, or all of them fresh.

    `labels` are the names of the run's labels, `ordered` whether the user gave them: where the source's head has the same
    ones its outputs are put into their order, and where it has others the outputs start anew.
    """
    params = _start_parameters(argument, model, mesh, seed)
    source = source_labels(argument, model.config.head.kind) if labels else ()
    order = label_order(source, labels, ordered)
    if not source or order == list(range(len(source))):
        return params
    shardings = stored_shardings(model.axes, model.shapes, mesh)

    def outputs(params: Params) -> Params:
        def one(leaf: jax.Array, fresh: jax.Array, axes: Any) -> jax.Array:
            if "C" not in axes:
                return leaf
            return fresh.astype(leaf.dtype) if order is None else leaf.take(jnp.array(order), axis=tuple(axes).index("C"))

        return jax.tree.map(one, params["head"], model.init(jax.random.key(seed))["head"], model.axes["head"])

    return {**params, "head": jax.jit(outputs, out_shardings=shardings["head"])(params)}


def _start_parameters(argument: str | None, model: Any, mesh: jax.sharding.Mesh, seed: int) -> Params:
    if argument is None:
        shardings = stored_shardings(model.axes, model.shapes, mesh)
        return jax.jit(model.init, out_shardings=shardings)(jax.random.key(seed))
    folder = locate(argument)
    if is_hugging_face(folder):
        return load_parameters(folder, model, mesh, seed=seed)
    _, params = _restore(folder, mesh)

    def sizes(tree: Any) -> Any:  # not the dtypes: a run that holds bfloat16 may go on from one that holds float32, and back
        return jax.tree.map(lambda leaf: leaf.shape, tree)

    if sizes(params) == sizes(model.shapes):
        return params
    if sizes(params["transformer"]) != sizes(model.shapes["transformer"]):
        raise ValueError(f"the model of {argument} has other sizes than this run's: leave out the model's options but init_from")
    axes = {name: axes for name, axes in model.axes.items() if name != "transformer"}
    shapes = {name: shape for name, shape in model.shapes.items() if name != "transformer"}

    def rest() -> Params:
        return {name: leaf for name, leaf in model.init(jax.random.key(seed)).items() if name != "transformer"}

    return {**jax.jit(rest, out_shardings=stored_shardings(axes, shapes, mesh))(), "transformer": params["transformer"]}


def model_config(argument: str) -> TransformerConfig:
    """The config of a model without its parameters; `argument` may also be a preset's name or a YAML file of a run."""
    if argument in TransformerConfig.PRESETS:
        return configs.build(TransformerConfig, {"preset": argument})
    if argument.endswith((".yaml", ".yml")):
        return section(configs.read_yaml(pathlib.Path(argument))[0])
    folder = locate(argument, weights=False)
    if (folder / ADAPTER).is_file():
        head, outputs, base = _adapter(folder)
        return read_config(locate(base, weights=False), head, outputs)
    if is_hugging_face(folder):
        return read_config(folder)
    config = section(configs.read_yaml(folder / "config.yaml")[0])
    config = with_vocabulary(config, fitted(load_tokenizer(folder / "tokenizer"), config.vocab_size, folder.name))
    labels = read_card(folder).labels
    return with_labels(config, len(labels)) if labels else config


def section(tree: Mapping[str, Any]) -> TransformerConfig:
    """The model of a run's config, where init_from, if there is one, is already laid under it or names a model."""
    given = dict(tree.get("model") or {})
    source = given.pop("init_from", None)
    if source is not None and "width" not in given:
        given = configs.lay(configs.to_dict(model_config(str(source))), given)
    return configs.build(TransformerConfig, given)


def with_labels(config: TransformerConfig, labels: int) -> TransformerConfig:
    return dataclasses.replace(config, head=dataclasses.replace(config.head, labels=labels))


def with_vocabulary(config: TransformerConfig, tokenizer: Tokenizer, source: str | None = None) -> TransformerConfig:
    """Fill in the vocabulary size from the tokenizer, or check the one given, or that of the model `source`, against it."""
    if config.vocab_size is None:
        multiple = config.vocab_multiple
        return dataclasses.replace(config, vocab_size=-(-tokenizer.vocab_size // multiple) * multiple)
    check_vocabulary(tokenizer, config, source or "", foreign=source is not None)
    return config


_WARNED: set[str] = set()


def fitted(tokenizer: Tokenizer, rows: int | None, name: str = "") -> Tokenizer:
    """The tokenizer for an embedding table of `rows` (None: not known yet), said where it loses special tokens to fit it:
    `Tokenizer.within`."""
    if rows is None or tokenizer.vocab_size <= rows:
        return tokenizer
    fits = tokenizer.within(rows)
    if fits is not tokenizer and (told := f"{name} fitted") not in _WARNED:
        _WARNED.add(told)
        warn(
            f"{name}: the embedding table of {rows:,} rows has none for the last {tokenizer.vocab_size - rows:,} special "
            "tokens of the tokenizer: a text that spells one is read as ordinary text"
        )
    return fits


def check_vocabulary(tokenizer: Tokenizer, config: TransformerConfig, name: str = "", foreign: bool = False) -> None:
    """Refuse a tokenizer with ids that the model's embedding table has no row for, which would give nan.

    Of a `foreign` model also report a table that is larger than any padding of it explains: up to 2%, or up to the next
    multiple of a power of two.
    """
    assert config.vocab_size is not None, "a model that exists has a table"
    size, rows = tokenizer.vocab_size, config.vocab_size
    if size > rows:
        advice = "resize the table with transformers (resize_token_embeddings) and train it" if name else "leave vocab_size empty"
        raise ValueError(
            f"{name or 'model.vocab_size'}: the tokenizer has {size:,} entries, and the embedding table of the model {rows:,}: "
            f"take the tokenizer that the model was trained with, or {advice}"
        )
    padded = any(rows == -(-size // multiple) * multiple for multiple in (8, 16, 32, 64, 128, 256, 512, 1024))
    if foreign and name not in _WARNED and rows - size > 0.02 * rows and not padded:
        _WARNED.add(name)
        warn(f"{name}: the tokenizer has {size:,} entries, and the embedding table of the model {rows:,}: is it its own?")


def locate(argument: str, weights: bool = True) -> pathlib.Path:
    """The folder that a MODEL argument means, or ValueError with what there is; without `weights` a hub's are not fetched."""
    folder = pathlib.Path(argument)
    if (folder / "config.yaml").is_file() or (folder / ADAPTER).is_file() or is_hugging_face(folder):
        return folder
    runs = sorted(str(file.parent) for file in pathlib.Path("runs").glob("*/config.yaml"))
    hint = configs.nearest(argument, runs)
    there = f"here: {', '.join(runs)}" if runs else "`python train.py` makes one"
    there = f"did you mean {hint!r}? {there}" if hint else there
    if folder.is_dir():
        inside = sorted(str(file.parent) for file in folder.glob("*/config.yaml"))
        there = f"it holds {', '.join(inside)}" if inside else there
        raise ValueError(
            f"no model at {argument!r}: the folder has neither config.yaml (a run; {there}) nor config.json (Hugging Face)"
        )
    try:
        return find(argument, weights=weights)
    except ValueError as error:
        raise ValueError(
            f"no model at {argument!r}: give the folder of a run ({there}), a Hugging Face folder or a hub id; {error}"
        ) from None
