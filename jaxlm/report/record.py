"""What happened in a run, as rows: `metrics.jsonl` is the one source, TensorBoard a copy of its numbers.

Everything drawn afterwards (curves.png, samples.md, report.html) is made from these rows alone.
"""

import json
import math
import pathlib
from typing import Any

from jaxlm.text_files import json_line, read_lines, well_formed, write_json_lines


class Record:
    """Appends rows to `folder/metrics.jsonl` and their numbers to `folder/tensorboard/`.

    A row is `{"kind": …, "step": …, …}`. Opening a record at step n drops later rows, which an
    interrupted run may have written after its last checkpoint. With `writes` false it only remembers: of several processes
    one writes.
    """

    def __init__(self, folder: pathlib.Path, step: int = 0, writes: bool = True):
        from tensorboardX import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.writes = writes
        self.file = folder / "metrics.jsonl"
        self.rows = [row for row in read_rows(self.file) if row["step"] <= step]
        if not writes:
            return
        partial = self.file.with_suffix(".tmp")
        write_json_lines(partial, map(_finite, self.rows))
        partial.replace(self.file)
        self.stream = self.file.open("a", encoding="utf8", newline="\n")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, flush_secs=10)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add one row; numbers also go to TensorBoard as `kind/name`, texts as text."""
        row = {"kind": kind, "step": step, **values}
        self.rows.append(row)
        if not self.writes:
            return
        self.stream.write(json_line(_finite(row)))
        self.stream.flush()
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self.board.add_scalar(f"{kind}/{name}", value, step)
            elif isinstance(value, str):
                self.board.add_text(f"{kind}/{name}", well_formed(value), step)

    def evaluated(self, step: int) -> bool:
        """Whether the evaluation of a step is among the rows."""
        return any(row["kind"] == "eval" and row["step"] == step for row in self.rows)

    def close(self) -> None:
        if not self.writes:
            return
        self.stream.close()
        self.board.close()


def read_rows(file: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a line that a crash cut off is left out, and nothing else."""
    rows = []
    if file.exists():
        for _, line in read_lines(file):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """The row with null for each number that is not finite, which JSON does not have."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
