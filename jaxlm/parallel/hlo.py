"""The collectives of a compiled program, with the bytes that they send: read from its optimised HLO text.

A program on a TPU writes some of them in forms of its own (asynchronous ones, a sum that is scattered as a fusion); those are
recognised. A collective in a loop counts as often as the loop runs: as the compiler's `known_trip_count` says or, where there is
none (TPU), the constant up to which the loop's condition counts.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "ragged-all-to-all", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    """Of its results on one device."""
    bytes: int
    """Size of its results on one device, per execution."""
    group: int
    """Devices per replica group."""
    times: int
    """How often it runs: the product of the trip counts of the loops around it, at least 1 each."""

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all runs, by ring algorithms (Chan et al. 2007, "Collective communication")."""
        n = self.group
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "all-gather": (n - 1) / n,
            "reduce-scatter": n - 1,  # its result is 1/n of what is summed
            "collective-permute": 1,
        }.get(self.kind, (n - 1) / n)
        return self.times * self.bytes * share


def sent_bytes(collectives: Sequence[Collective]) -> float:
    """Bytes that a device sends in one run of the program."""
    return sum(one.sent for one in collectives)


def collectives(hlo: str, devices: int) -> list[Collective]:
    """All collectives of a program's optimised HLO text, compiled for so many devices.

    Of a conditional every branch counts. A loop whose trip count is not a constant counts once.
    """
    computations = dict(_computations(hlo))
    called: dict[str, list[tuple[str, int]]] = {}
    for name, lines in computations.items():
        called[name] = [call for line in lines for call in _calls(line, computations)]
    times = dict.fromkeys(computations, 0)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.MULTILINE)
    assert entry is not None, "HLO text has an entry computation"

    def run(name: str, count: int) -> None:
        times[name] += count
        for callee, repeats in called[name]:
            if callee in computations:
                run(callee, count * repeats)

    run(entry[1], 1)
    fused = {
        name for lines in computations.values() for line in lines for name in re.findall(r" fusion\(.*calls=%?([\w.\-]+)", line)
    }
    found, chained = [], dict[str, Collective]()
    for name, lines in computations.items():
        if not times[name] or _is_scattered_sum(name):
            continue
        for line in lines:
            one, channel = _collective(line, computations, devices, times[name]), re.search(r"channel_id=(\d+)", line)
            if one is None:
                continue
            if name in fused and channel is not None:
                # A TPU's compiler starts, advances and ends one collective in several fusions, some of them in loops.
                known = chained.setdefault(channel[1], one)
                chained[channel[1]] = min(known, one, key=lambda collective: collective.times)
            else:
                found.append(one)
    return found + list(chained.values())


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    """(name, instructions) of each computation."""
    name, lines = "", list[str]()
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
            name, lines = header[1], []
        elif line.startswith("}"):
            yield name, lines
        elif line.startswith(" "):
            lines.append(line)


def _calls(line: str, computations: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """(computation, times) of each computation that an instruction runs."""
    if body := re.search(r"\bbody=%?([\w.\-]+)", line):
        yield body[1], _trip_count(line, computations)
        return
    if re.search(r" (reduce|all-reduce|reduce-scatter|sort|scatter|map|reduce-window|select-and-scatter)(-start)?\(", line):
        return  # what it applies holds no collective
    for group in re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line):
        yield group, 1
    for group in re.findall(r"(?:called_computations|branch_computations)=\{([^}]*)\}", line):
        for callee in re.findall(r"%?([\w.\-]+)", group):
            yield callee, 1


def _trip_count(line: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs; 1 if that is not known."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", line)
    text = "\n".join(computations.get(condition[1], ())) if condition else ""
    text += "\n".join("\n".join(computations.get(name, ())) for name in re.findall(r"calls=%?([\w.\-]+)", text))
    bounds = set(re.findall(r"[su]32\[\][^=]* constant\((\d+)\)", text))
    return int(bounds.pop()) if len(bounds) == 1 and "direction=LT" in text else 1


def _is_scattered_sum(computation: str) -> bool:
    """Whether this is the body of a TPU's fusion that sums and scatters: the fusion itself counts."""
    return computation.startswith("all-reduce-scatter")


def _collective(line: str, computations: dict[str, list[str]], devices: int, times: int) -> Collective | None:
    if match := re.search(r"= (.*?) fusion\(.*calls=%?(all-reduce-scatter[\w.\-]*)", line):
        inner = next((one for one in computations.get(match[2], ()) if " all-reduce" in one), "")
        return Collective("reduce-scatter", *_sizes(match[1]), _group(inner, devices), times)
    match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
    if match is None:
        return None
    result, kind, start = match.groups()
    if start and kind in ("all-gather", "collective-permute"):  # (operands, results, contexts)
        result = _elements(result)[1]
    return Collective(kind, *_sizes(result), _group(line, devices), times)


def _elements(shape: str) -> list[str]:
    """The elements of a tuple's shape."""
    depth, parts = 0, [""]
    for sign in shape[1:-1]:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def _sizes(text: str) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Shapes, and bytes of all of them."""
    arrays = [
        (kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text)
    ]  # fmt: skip
    return tuple(shape for _, shape in arrays), sum(math.ceil(_width(kind) * math.prod(shape)) for kind, shape in arrays)


def _width(kind: str) -> float:
    """Bytes of one number of this HLO type."""
    bits = re.search(r"\d+", kind)
    return 1 if kind == "pred" or bits is None else int(bits[0]) / 8


def _group(line: str, devices: int) -> int:
    """How many devices one of the groups of a collective holds."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(tiled[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):  # 'axis'=size, of which 'axis' or its part
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices
