"""Write the data sets of some configs as rows that `data.train` reads, into runs/data/.

    python benchmarks/prepare.py --data FOLDER

`FOLDER` holds the sets under the names that configs/ use; it defaults to $JAXLM_DATA, else ../shared/data.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Iterable

ROLES = ("user", "assistant")


def dialogues(file: pathlib.Path) -> Iterable[dict]:
    """XDailyDialog: turns divided by __eou__; the speakers take turns, the second one is the assistant."""
    for line in file.read_text(encoding="utf8").splitlines():
        turns = [turn.strip() for turn in line.split("\t")[0].split("__eou__") if turn.strip()]
        turns = turns[: len(turns) // 2 * 2]
        if turns:
            yield {"messages": [{"role": ROLES[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def moderation(file: pathlib.Path) -> Iterable[dict]:
    """OpenAI's moderation set: the categories that are marked; a text of which one is unknown counts as without it."""
    for line in file.read_text(encoding="utf8").splitlines():
        row = json.loads(line)
        yield {"text": row.pop("prompt"), "labels": [name for name, value in row.items() if value == 1]}


def write(rows: Iterable[dict], target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    target.write_text("".join(lines), encoding="utf8")
    print(f"{target}: {len(lines):,} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path(os.environ.get("JAXLM_DATA", "../shared/data")))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/data"))
    options = parser.parse_args()
    talk = options.data / "dialogue-xdailydialog"
    for name, file in (("train", "en_1k_part.txt"), ("dev", "en_dev.txt"), ("test", "en_test.txt")):
        write(dialogues(talk / file), options.out / f"xdailydialog-{name}.jsonl")
    write(moderation(options.data / "ref-moderation-openai" / "samples-1595.jsonl"), options.out / "moderation.jsonl")


if __name__ == "__main__":
    main()
