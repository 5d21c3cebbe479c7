"""Hugging Face folders in and out, every family by one declaration."""

from jaxlm.hub.adapters import CONFIG as ADAPTER
from jaxlm.hub.adapters import Adapter, load_adapter, read_adapter, save_adapter
from jaxlm.hub.convert import (
    FAMILIES,
    family_for,
    family_of,
    is_hugging_face,
    label_names,
    load_folder,
    load_parameters,
    read_config,
    read_json,
    save_folder,
)
from jaxlm.hub.family import Family, Head
from jaxlm.hub.files import Tensors, find, stored_dtype, tensor_names
from jaxlm.hub.fingerprint import fingerprint_files
from jaxlm.hub.generation import GENERATION, read_generation, write_generation
from jaxlm.hub.loading import load
from jaxlm.hub.saving import save
from jaxlm.hub.tensors import Table

__all__ = [
    "ADAPTER", "FAMILIES", "GENERATION", "Adapter", "Family", "Head", "Table", "Tensors", "family_for", "family_of", "find",
    "fingerprint_files",
    "is_hugging_face", "label_names", "load", "load_adapter", "load_folder", "load_parameters", "read_adapter", "read_config",
    "read_generation", "read_json", "save", "save_adapter", "save_folder", "stored_dtype",
    "tensor_names", "write_generation",
]  # fmt: skip
