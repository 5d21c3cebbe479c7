"""The house: imports run one way, through rooms in their order and files in theirs."""

import ast
import pathlib

import pytest

import jaxlm

ROOT = pathlib.Path(jaxlm.__file__).parent

# A file imports only from rooms above its own and, inside a room, from files above it.
ROOMS = {
    "spellings": [],
    "config": [],
    "host": [],
    "devices": [],
    "text_files": [],
    "report": ["console", "record", "page", "scores"],
    "parallel": ["hosts", "mesh", "rules", "hlo"],
    "model": [
        "presets",
        "precision",
        "lora",
        "quantized",
        "config",
        "layers",
        "positions",
        "distance_bias",
        "mask",
        "cache",
        "dense",
        "chunked",
        "fused",
        "ring",
        "kernels",
        "attention",
        "moe",
        "pipeline",
        "transformer",
        "cross_entropy",
        "heads",
        "functions",
        "detection",
    ],
    "data": [
        "special",
        "steps",
        "tokenizer_files",
        "tokenizer",
        "columns",
        "sources",
        "splits",
        "cells",
        "dialogues",
        "records",
        "tables",
        "json_rows",
        "formats",
        "roles",
        "rows",
        "corpus",
        "spooling",
        "cache",
        "packing",
        "vocabulary",
        "causal",
        "masking",
        "denoising",
        "corrupt",
        "detokenizer",
        "chat",
        "post_processor",
        "text_encoding",
        "pipeline",
        "examples",
    ],
    "metrics": ["direction", "intervals", "classes", "confidence", "numbers", "ranking", "tags", "scripts", "answers", "texts"],
    "train": ["objectives", "tune", "adam8bit", "soap", "moments", "optim", "step", "checkpoint", "loop"],
    "hub": [
        "tensors",
        "files",
        "fingerprint",
        "tied",
        "model_card",
        "loading",
        "saving",
        "family",
        "encoders",
        "decoders",
        "seq2seq",
        "convert",
        "generation",
        "adapters",
    ],
    "generate": [
        "sample",
        "processors",
        "request",
        "text",
        "deep_stack",
        "constrain",
        "watermark",
        "decode",
        "speculative",
        "batch",
        "settings",
        "contrastive",
        "slots",
        "turns",
        "guiding",
        "seats",
        "engine",
    ],
    "tasks": ["task", "labelling", "reading", "writing", "comparing", "baseline", "page", "predictor"],
    "models": [],
    "serve": [
        "options",
        "errors",
        "fields",
        "protocol",
        "readers",
        "messages",
        "guided",
        "tokens",
        "speaking",
        "asks",
        "metrics",
        "choices",
        "answers",
        "rows",
        "service",
        "guard",
        "page",
        "app",
        "server",
    ],
    "experiment": ["unread", "config", "job", "pretraining", "finetuning", "run", "seeds"],
    "overview": [],
    "harness": ["likelihood", "suites", "files", "scores", "adapter"],
    "verbs": [
        "words",
        "training",
        "suites",
        "decoding",
        "labels",
        "batches",
        "writing",
        "chatting",
        "serving",
        "card_facts",
        "folders",
    ],
    "cli": [],
    "__main__": [],
}
FILES = sorted(ROOT.rglob("*.py"))


def place(parts: list[str]) -> tuple[int, int]:
    """(room, file) of a module path below jaxlm; a room's `__init__` is its last file."""
    rooms = list(ROOMS)
    room, files = rooms.index(parts[0]), ROOMS[parts[0]]
    return room, files.index(parts[1]) if len(parts) > 1 and parts[1] in files else len(files)


def imports(file: pathlib.Path) -> list[list[str]]:
    """Every jaxlm module that a file imports, deferred imports too, as paths below jaxlm."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            module = (node.module or "").split(".")
            if module == ["jaxlm"]:
                found += [[alias.name] for alias in node.names if alias.name != "__version__"]
            elif module[0] == "jaxlm":
                found.append(module[1:])
        elif isinstance(node, ast.Import):
            found += [alias.name.split(".")[1:] for alias in node.names if alias.name.startswith("jaxlm.")]
    return found


def test_every_file_has_its_place():
    known = {"__init__.py", *(f"{room}.py" for room, files in ROOMS.items() if not files)}
    known |= {f"{room}/{file}.py" for room, files in ROOMS.items() for file in [*files, "__init__"] if files}
    there = {str(file.relative_to(ROOT)) for file in FILES}
    assert there == known, "a new file needs its place in ROOMS above and in docs/architecture.md"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file):
    own = file.relative_to(ROOT).with_suffix("").parts
    if own == ("__init__",):
        assert not imports(file)
        return
    here = place([part for part in own if part != "__init__"])
    for module in imports(file):
        there = place(module)
        assert there < here, f"{'/'.join(own)} imports jaxlm.{'.'.join(module)}, which stands below it"
        same_room = module[0] == own[0]
        assert not same_room or len(module) > 1, f"{'/'.join(own)} imports its own room as a whole"


def test_docs_name_every_room():
    text = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf8")
    missing = [room for room in ROOMS if f"`{room}" not in text]
    assert not missing, f"docs/architecture.md does not name: {missing}"
