"""The MODEL argument of a verb: a run folder, a Hugging Face folder, or a hub id."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from jaxlm import config as configs
from jaxlm.data import Tokenizer, load_tokenizer
from jaxlm.experiment import ExperimentConfig, with_vocabulary
from jaxlm.hub import family_of, find, is_hugging_face, load_folder, read_json, tensor_names
from jaxlm.model import Model, Params, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh, stored_shardings
from jaxlm.train import Checkpoints


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with its parameters, and where it came from."""

    model: Model
    params: Params
    mesh: jax.sharding.Mesh
    name: str
    tokenizer_folder: pathlib.Path
    source: pathlib.Path | None = None
    """The Hugging Face folder that it was loaded from."""
    theirs: Mapping[str, Any] | None = None
    """That folder's `config.json`."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ValueError where the folder holds none."""
        return load_tokenizer(self.tokenizer_folder)

    def stop_ids(self) -> list[int]:
        """Tokens that end a text beside the tokenizer's own: of a Hugging Face folder its list of them."""
        if self.source is None or self.theirs is None:
            return []
        file = self.source / "generation_config.json"
        said = json.loads(file.read_text(encoding="utf8")) if file.is_file() else {}
        found = said.get("eos_token_id", self.theirs.get("eos_token_id"))
        return [] if found is None else found if isinstance(found, list) else [found]

    def json(self) -> Mapping[str, Any]:
        """A `config.json` with the ids of special tokens: its own, or those of a run's tokenizer."""
        if self.theirs is not None:
            return self.theirs
        return {"eos_token_id": self.tokenizer.eos_id, "bos_token_id": self.tokenizer.bos_id}


def load_model(argument: str) -> Trained:
    """A run folder's checkpoint with the lowest held-out loss, or a Hugging Face model; on one device."""
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    folder = locate(argument)
    if is_hugging_face(folder):
        model, params, folder, theirs = load_folder(str(folder), mesh)
        return Trained(model, params, mesh, folder.name, folder, folder, theirs)
    model = Model(model_config(argument))
    checkpoints = Checkpoints(folder / "checkpoints")
    step = checkpoints.best()
    if step is None:
        raise ValueError(f"{argument} has no checkpoint yet: train it first with `jaxlm train {folder / 'config.yaml'}`")
    params = checkpoints.restore_params(step, model.shapes, stored_shardings(model.axes, model.shapes, mesh))
    return Trained(model, params, mesh, folder.name, folder / "tokenizer")


def model_config(argument: str) -> TransformerConfig:
    """The config of a model without its parameters; `argument` may also be a preset's name or a YAML file of a run."""
    if argument in TransformerConfig.PRESETS:
        return configs.build(TransformerConfig, {"preset": argument})
    if argument.endswith((".yaml", ".yml")):
        return configs.load(ExperimentConfig, argument).value.model
    folder = locate(argument, weights=False)
    if is_hugging_face(folder):
        theirs = read_json(folder)
        return family_of(theirs).config(theirs, tensor_names(folder))
    return with_vocabulary(configs.load(ExperimentConfig, folder / "config.yaml").value.model, load_tokenizer(folder / "tokenizer"))


def locate(argument: str, weights: bool = True) -> pathlib.Path:
    """The folder that a MODEL argument means, or ValueError with what there is; without `weights` a hub's are not fetched."""
    folder = pathlib.Path(argument)
    if (folder / "config.yaml").is_file() or is_hugging_face(folder):
        return folder
    runs = sorted(str(file.parent) for file in pathlib.Path("runs").glob("*/config.yaml"))
    hint = configs.nearest(argument, runs)
    there = f"here: {', '.join(runs)}" if runs else "`python train.py` makes one"
    there = f"did you mean {hint!r}? {there}" if hint else there
    if folder.is_dir():
        raise ValueError(f"no model at {argument!r}: the folder has neither config.yaml (a run) nor config.json (Hugging Face)")
    try:
        return find(argument, weights=weights)
    except ValueError as error:
        raise ValueError(
            f"no model at {argument!r}: give the folder of a run ({there}), a Hugging Face folder or a hub id; {error}"
        ) from None
