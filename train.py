"""The main job: `python train.py [CONFIG] [--section.option VALUE …]` is `jaxlm train`, by default on configs/tiny.yaml."""

import pathlib
import sys

from jaxlm.cli import main

words = sys.argv[1:]
if not words or words[0].startswith("--"):
    words = [str(pathlib.Path(__file__).resolve().parent / "configs" / "tiny.yaml"), *words]
raise SystemExit(main(["train", *words]))
