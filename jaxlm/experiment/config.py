"""What one run is: its config, what follows from other values, and what must fit together."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from jaxlm import config as configs
from jaxlm.data import DataConfig
from jaxlm.experiment.unread import check_known, check_read
from jaxlm.hub import ADAPTER, is_hugging_face, read_config
from jaxlm.model import HeadConfig, TransformerConfig
from jaxlm.models import locate, model_config
from jaxlm.parallel import HostsConfig, ParallelConfig, batch_ways
from jaxlm.report import command, say
from jaxlm.tasks import TASKS, TaskConfig
from jaxlm.train import OptimConfig, TrainConfig, TuneConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig(TransformerConfig):
    """The model of a run: its sizes, and where its parameters come from."""

    init_from: str | None = None
    """A run's folder, a Hugging Face folder or a hub id to start from; its sizes need not be given."""

    def plain(self) -> TransformerConfig:
        """The model alone."""
        return TransformerConfig(**{name: getattr(self, name) for name in configs.fields_of(TransformerConfig)})


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """One run, whole: what `config.yaml` in its folder says."""

    name: str = "run"
    """The run's folder is runs/NAME; by default the name of the config file."""
    runs: str = "runs"
    """Folder of all runs."""
    seed: int = 0
    """Seeds the parameters, the order of the data and dropout."""
    seeds: int = 1
    """Runs with this many seeds, from seed on, each in its folder NAME-seedN; their scores are told with an interval."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    tune: TuneConfig = TuneConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    hosts: HostsConfig = HostsConfig()

    def __post_init__(self) -> None:
        if self.data.length > self.model.positions:
            raise ValueError(
                f"data.length {self.data.length} is longer than model.positions {self.model.positions}: "
                f"give data.length up to {self.model.positions}, or more positions"
            )
        if self.task.kind == "text_to_text" and self.task.target_length > self.model.positions:
            raise ValueError(
                f"task.target_length {self.task.target_length} is longer than model.positions {self.model.positions}: give no more"
            )
        if self.optim.name == "schedule_free" and self.model.param_dtype != "float32":
            raise ValueError(
                f"optim.name schedule_free finds its average in the parameters, in which the rounding of {self.model.param_dtype} "
                "would add up: give model.param_dtype float32 beside it"
            )
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"name is {self.name!r}: it must be the name of a folder, without a slash or a leading dot")
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}: it must be at least 1")
        if self.task.pretraining and self.data.train:
            raise ValueError(
                f"data.train {self.data.train!r} holds rows, which task {self.task.kind} does not read: "
                f"give --task.kind, one of {', '.join(TASKS)}; or unlabelled text in data.sources"
            )
        if not self.task.pretraining and not self.data.train:
            raise ValueError(f"task {self.task.kind} learns from rows: give --data.train FILE")
        architectures, head = _NEEDS[self.task.kind]
        if self.model.architecture not in architectures or self.model.head.kind != head:
            raise ValueError(
                f"the model is of architecture {self.model.architecture} with head {self.model.head.kind}: "
                f"task {self.task.kind} needs {' or '.join(architectures)} with head {head}"
            )
        if self.task.corrupt.pairs != "none" and not self.model.head.pair:
            raise ValueError(f"task.corrupt.pairs {self.task.corrupt.pairs} needs a head over pairs: add --model.head.pair true")

    @property
    def folder(self) -> pathlib.Path:
        return pathlib.Path(self.runs) / self.name


_TEXT, _LABELS = ("decoder", "encoder_decoder"), ("encoder", "decoder")
# Task → the architectures and the head that it is learned with.
_NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "causal": (("decoder",), "language_model"),
    "masked": (("encoder",), "masked_lm"),
    "replaced": (("encoder",), "detection"),
    "span": (("encoder_decoder",), "language_model"),
    "mixture": (("encoder_decoder",), "language_model"),
    "prefix": (_TEXT, "language_model"),
    "denoising": (("encoder_decoder",), "language_model"),
    **{name: (_LABELS, str(task.head["kind"])) for name, task in TASKS.items()},
    "text_to_text": (_TEXT, "language_model"),
    "chat": (("decoder",), "language_model"),
    "preference": (("decoder",), "language_model"),
}

# What may change between two starts of one run: how long, how often, on what; not what is learned from what.
CHANGEABLE = (
    "train.steps", "train.eval_every", "train.log_every", "train.keep", "train.sample_prompt", "train.sample_tokens",
    "train.patience", "train.eval_rows", "data.epochs", "data.cache", "data.prefetch", "parallel.data", "parallel.fsdp",
    "parallel.stage", "parallel.expert", "parallel.context", "parallel.tensor", "parallel.across", "hosts.coordinator",
    "hosts.count", "hosts.index", "seeds", "optim.zero1", "optim.offload", "model.context", "model.microbatches", "model.rounds",
)  # fmt: skip


def load_config(file: str | pathlib.Path, flags: Mapping[str, configs.Text]) -> configs.Loaded:
    """The config of a run; its name defaults to the file's. Raises ValueError for an option that this run would not read."""
    loaded, notes = check_read(configs.load(ExperimentConfig, file, flags, complete))
    for note in notes:
        say(f"# {note}")
    if loaded.origins["name"] == "default":
        named = dataclasses.replace(loaded.value, name=pathlib.Path(file).stem)
        return configs.Loaded(named, {**loaded.origins, "name": "the file's name"})
    return loaded


class Unresolved(ValueError):  # noqa: N818 (a config without its model is no mistake of the config)
    """The model that a run starts from cannot be read: what follows from it is not known."""


def known_leaves(file: str | pathlib.Path, flags: Mapping[str, configs.Text]) -> tuple[dict[str, Any], dict[str, str]]:
    """Dotted leaf → value, and → origin, of all that a config says without the model that it starts from. ValueError as
    `load_config`, but for that model and what must fit it."""
    tree, origins = configs.read_yaml(pathlib.Path(file))
    configs.override(tree, origins, flags)
    origins.setdefault("name", "the file's name")
    tree.setdefault("name", pathlib.Path(file).stem)
    parts = configs.build_parts(ExperimentConfig, tree, origins, ("model",))
    leaves: dict[str, Any] = {}
    for name in configs.fields_of(ExperimentConfig):
        if name == "model":
            given = {leaf: configs.read(value) for leaf, value in configs.flatten(tree["model"], "model").items()}
            leaves |= {leaf: None if value == {} else value for leaf, value in given.items()}
        else:
            value = parts[name]
            leaves |= configs.flatten(configs.to_dict(value) if dataclasses.is_dataclass(value) else value, name)
    if "tokenizer" not in (tree.get("data") or {}):  # the model's own
        leaves = {name: value for name, value in leaves.items() if not name.startswith("data.tokenizer.")}
    return leaves, origins


def complete(tree: dict[str, Any], origins: dict[str, str]) -> None:
    """Fill in what follows: the head from the task; sizes and tokenizer from what the model starts from."""
    task, model, data = (tree.get(name) or {} for name in ("task", "model", "data"))
    if not all(isinstance(part, Mapping) for part in (task, model, data)):
        return  # building says what is wrong
    kind = str(task.get("kind", "causal"))
    if kind not in _NEEDS:
        return
    head = {**(TASKS[kind].head if kind in TASKS else {}), "kind": _NEEDS[kind][1]}
    source = model.get("init_from")
    source = None if source is None or str(source).lower() in ("null", "none", "") else str(source)
    if source is None:
        architecture = str(model.get("architecture") or _architecture(model))
        if architecture not in _NEEDS[kind][0]:
            return  # refused once it is built
        start = {"head": _head(head, architecture)}
        origin = f"task {kind}"
    elif configs.fields_of(ModelConfig).keys() <= model.keys():
        return  # a run's own config.yaml, which is whole
    else:
        check_known(configs.build_parts(ExperimentConfig, tree, origins, ("model",)), origins)
        try:
            start, folder = _start(source, head)
        except ValueError as error:
            raise Unresolved(f"model.init_from: {error}") from None
        origin = f"init_from {source}"
        if "tokenizer" not in data:
            tree["data"] = {**data, "tokenizer": {"kind": "huggingface", "path": str(folder)}}
            origins |= {"data.tokenizer.kind": origin, "data.tokenizer.path": origin}
    for leaf in configs.flatten(start):
        origins.setdefault(f"model.{leaf}", origin)
    tree["model"] = configs.lay(start, model)


def _architecture(model: Mapping[str, Any]) -> str:
    preset = TransformerConfig.PRESETS.get(str(model.get("preset")), {})
    return str(preset.get("architecture", "decoder"))


def _head(head: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The head of a task on a model of ours: an encoder's as BERT's, a decoder's as GPT-2's.

    It has every field, so that none is left of a preset's head of another kind.
    """
    return {**configs.to_dict(HeadConfig()), **_own_fields(head, architecture)}


def _own_fields(head: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Fields of a task's head that are not the defaults of `HeadConfig`."""
    if head["kind"] in ("sequence", "choice") and architecture == "decoder":
        return {"pool": "last", "dense": False, "bias": False, **head}
    if head["kind"] == "embedding":
        return {"pool": "mean" if architecture == "encoder" else "last", "dense": False, **head}
    if head["kind"] in ("masked_lm", "detection"):
        return {"activation": "gelu", "norm": head["kind"] == "masked_lm", **head}
    if head["kind"] in ("token", "span"):
        return {"dense": False, **head}
    return {**head}


def _start(source: str, head: Mapping[str, Any]) -> tuple[dict[str, Any], pathlib.Path]:
    """The model section that starting from `source` means, and the folder of its tokenizer."""
    folder = locate(source, weights=False)
    if (folder / ADAPTER).is_file():
        raise ValueError(f"{source} is an adapter: write the whole model first with: {command('jaxlm', 'export', source, 'DIR')}")
    if is_hugging_face(folder):
        config = read_config(folder, str(head["kind"]), head.get("labels"))
        tokenizer = folder
    else:
        config = model_config(source)
        if config.head.kind != head["kind"]:
            config = dataclasses.replace(config, head=configs.build(HeadConfig, _head(head, config.architecture)))
        tokenizer = folder / "tokenizer"
    return {name: value for name, value in configs.to_dict(config).items() if name not in ("preset", "init_from")}, tokenizer


def check_fits(config: ExperimentConfig, model: TransformerConfig, mesh: jax.sharding.Mesh) -> None:
    """Refuse sizes that the mesh does not divide, with what would be allowed."""
    sizes = dict(mesh.shape)
    ways = batch_ways(mesh)
    rows = ways * config.train.accumulate
    if config.data.batch_size % rows:
        near = max(rows, round(config.data.batch_size / rows) * rows)
        raise ValueError(
            f"data.batch_size {config.data.batch_size} does not divide over {ways} device(s) (data × fsdp) "
            f"in {config.train.accumulate} part(s) (train.accumulate): give a multiple of {rows}, such as {near}"
        )
    for axis, name, size in (
        ("tensor", "model.heads", model.heads),
        ("tensor", "model.mlp_width", model.F),
        ("tensor", "model.vocab_size", model.V),
        ("fsdp", "model.width", model.width),
        ("expert", "model.moe.experts", model.moe.experts or 1),
        ("context", "data.length", config.data.length),
    ):
        if size % sizes[axis]:
            fits = [n for n in range(1, sizes[axis] + 1) if size % n == 0]
            raise ValueError(
                f"parallel.{axis} {sizes[axis]} does not divide {name} {size}: parallel.{axis} may be {', '.join(map(str, fits))}"
            )
    _check_stages(model, sizes["stage"], config.data.batch_size // config.train.accumulate, ways)


def _check_stages(model: TransformerConfig, stages: int, rows: int, ways: int) -> None:
    """Refuse a pipeline in which devices would stand idle, or whose microbatches do not divide the `rows` of a step into rows
    for each of the `ways` devices that share a batch."""
    if stages == 1:
        for name, given in (("microbatches", model.microbatches is not None), ("rounds", model.rounds != 1)):
            if given:
                raise ValueError(
                    f"model.{name} {getattr(model, name)} is for a pipeline: give parallel.stage above 1, or leave it out"
                )
        return
    if model.share_layers:
        raise ValueError(f"parallel.stage {stages} splits the layers, but model.share_layers gives all of them the same: give 1")
    shallow = min(model.stacks, key=lambda name: model.stacks[name])
    if stages * model.rounds > model.stacks[shallow]:
        raise ValueError(
            f"parallel.stage {stages} × model.rounds {model.rounds} is more than the {model.stacks[shallow]} layer(s) of the "
            f"{shallow}: some stages would have none; give a product of at most that"
        )
    parts = model.microbatches or stages
    if rows % (parts * ways) or (parts < stages and model.rounds > 1):
        fits = [n for n in range(1, rows + 1) if rows % (n * ways) == 0 and (model.rounds == 1 or n >= stages)]
        what = f"model.microbatches {parts}" if model.microbatches else f"parallel.stage {stages} (as many microbatches)"
        allowed = f"give --model.microbatches one of {', '.join(map(str, fits))}" if fits else "give a larger data.batch_size"
        why = f"is too few for model.rounds {model.rounds} of"
        if rows % (parts * ways):
            why = "does not divide" + (f", on {ways} devices (data × fsdp × expert)," if ways > 1 else "")
        raise ValueError(f"{what} {why} the {rows} row(s) of a step (data.batch_size / train.accumulate): {allowed}")
