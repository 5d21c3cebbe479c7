"""One YAML file + dotted overrides → frozen dataclasses, with the origin of every value.

The file and the command line go through the same checks, so a mistake reads the same wherever it
was made: what was given, what is allowed, the nearest valid name. A dataclass may carry a class
attribute `PRESETS` (name → values); the key `preset` then lays its values under the ones given.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import pathlib
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import yaml

from jaxlm.spellings import advice, meant

T = TypeVar("T")


class Text(str):
    """A value typed on the command line: the field that it lands in decides how to read it."""


class Loaded(NamedTuple):
    """A built config and, for every dotted leaf, where its value came from."""

    value: Any
    origins: dict[str, str]


def nearest(given: object, allowed: Iterable[str]) -> str | None:
    """Nearest allowed name, or None: a unique completion of `given`, else the closest spelling, else the first name that starts
    with `given` and an underscore."""
    allowed = list(allowed)
    begun = [name for name in allowed if len(str(given)) > 2 and name.startswith(str(given))]
    if len(begun) == 1:
        return begun[0]
    close = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.6)
    return close[0] if close else next((name for name in allowed if given and name.startswith(f"{given}_")), None)


def unknown(what: str, given: object, allowed: Iterable[str]) -> ValueError:
    """The one-line error for a name that is not among the allowed ones."""
    allowed = list(allowed)
    hint = nearest(given, allowed)
    guess = f"did you mean {hint!r}? " if hint else ""
    return ValueError(f"unknown {what} {str(given)!r}: {guess}allowed: {', '.join(allowed)}")


# --- reading ---------------------------------------------------------------------------------


def parse_flags(args: Sequence[str]) -> dict[str, Text]:
    """`--a.b-c 1 --d=2 --e` → {"a.b_c": "1", "d": "2", "e": "true"}; raises ValueError on the rest."""
    flags: dict[str, Text] = {}
    queue = list(args)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--") or word == "--":
            raise ValueError(f"did not expect {word!r}: overrides look like --section.option VALUE")
        name, has_value, value = word[2:].partition("=")
        if not has_value:
            bare = not queue or queue[0].startswith("--")
            value = "true" if bare else queue.pop(0)
        flags[name.replace("-", "_")] = Text(value)
    return flags


def read_yaml(file: pathlib.Path) -> tuple[dict, dict[str, str]]:
    """A YAML file as a nested dict with underscored keys, and `file:line` for every dotted leaf."""
    if (file / "config.yaml").is_file():
        raise ValueError(f"{file} is the folder of a run: its config file is {file / 'config.yaml'}")
    if not file.is_file():
        there = {str(p): p.stem for p in sorted(file.parent.glob("*.yaml"))} if file.parent.is_dir() else {}
        stem = nearest(file.stem, there.values())  # the ending, which all have, makes nothing alike
        hint = next((name for name in there if there[name] == stem), None)
        guess = f": did you mean {hint!r}?" if hint else ":" if there else ""
        raise ValueError(f"no config file {str(file)!r}{guess}" + (f" there are: {', '.join(there)}" if there else ""))
    origins: dict[str, str] = {}

    def walk(node: yaml.Node, path: str) -> Any:
        if isinstance(node, yaml.MappingNode):
            found: dict[str, Any] = {}
            for key, value in node.value:
                name = str(key.value).replace("-", "_")
                if name in found:
                    raise ValueError(f"{file}:{key.start_mark.line + 1}: {join(path, name)} is given twice")
                found[name] = walk(value, join(path, name))
            return found
        if isinstance(node, yaml.SequenceNode):
            return [walk(value, join(path, str(i))) for i, value in enumerate(node.value)]
        origins[path] = f"{file}:{node.start_mark.line + 1}"
        return loader.construct_object(node)

    with file.open(encoding="utf8") as stream:
        loader = yaml.SafeLoader(stream)
        try:
            root = loader.get_single_node()
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
        tree = walk(root, "") if root is not None else {}
    if not isinstance(tree, dict):
        raise ValueError(f"{file} holds {tree!r}: expected `section: {{option: value}}`")
    return tree, origins


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def override(tree: dict, origins: dict[str, str], flags: Mapping[str, Text]) -> None:
    """Set each dotted flag in the nested dict, in place, and note that it came from the command line."""
    for dotted, value in flags.items():
        *parents, leaf = dotted.split(".")
        here: Any = tree
        for name in parents:
            if isinstance(here, list):
                if not name.isdigit() or int(name) >= len(here):
                    raise ValueError(f"--{dotted}: {name!r} is not an index below {len(here)}")
                here = here[int(name)]
            else:
                if isinstance(here.get(name), Text):
                    raise ValueError(f"--{dotted}: --{name.replace('_', '-')} is given as a whole beside it: give one of the two")
                if not isinstance(here.get(name), dict | list):
                    here[name] = {}
                here = here[name]
        if isinstance(here, list):
            raise ValueError(f"--{dotted}: give an index and an option, as in --{'.'.join(parents)}.0.{leaf}")
        here[leaf] = value
        origins[dotted] = f"--{dotted.replace('_', '-')}"


# --- building --------------------------------------------------------------------------------


def load(
    cls: type[T], file: pathlib.Path | str | None = None, flags: Mapping[str, Text] | None = None,
    complete: Callable[[dict, dict[str, str]], None] = lambda tree, origins: None,
) -> Loaded:  # fmt: skip
    """Build `cls` from a YAML file under overrides; every mistake is a one-line ValueError.

    `complete(tree, origins)` may fill in what follows from other values, before anything is built.
    """
    tree, origins = read_yaml(pathlib.Path(file)) if file else ({}, {})
    override(tree, origins, flags or {})
    _Builder(cls, origins).check_names(cls, tree, "")  # before anything is read or fetched that the values name
    complete(tree, origins)
    value = build(cls, tree, origins)
    return Loaded(value, {leaf: _origin(leaf, origins) for leaf in flatten(to_dict(value))})


def _origin(leaf: str, origins: Mapping[str, str]) -> str:
    """Origin of a leaf, or of the list that contains it. Names of lists may omit the index."""
    names = leaf.split(".")
    plain = ".".join(name for name in names if not name.isdigit())
    parents = (".".join(names[:i]) for i in range(len(names), 0, -1))
    return next((origins[name] for name in (*parents, plain) if name in origins), "default")


def build(cls: type[T], tree: Mapping[str, Any], origins: dict[str, str] | None = None) -> T:
    """Build a config dataclass from a nested dict (the inverse of `to_dict`)."""
    return _Builder(cls, {} if origins is None else origins).dataclass(cls, tree, "")


def build_parts(cls: type, tree: Mapping[str, Any], origins: dict[str, str], without: Collection[str]) -> dict[str, Any]:
    """The fields of a config dataclass, but for those `without`, which are not known: nothing is checked across them."""
    builder, hints = _Builder(cls, origins), fields_of(cls)
    return {
        field.name: builder.value(hints[field.name], tree[field.name], field.name) if field.name in tree else field.default
        for field in dataclasses.fields(cls)
        if field.name not in without
    }


class _Builder:
    def __init__(self, root: type, origins: dict[str, str]):
        self.root, self.origins = root, origins

    def where(self, path: str) -> str:
        origin = self.origins.get(path)
        return f" ({origin})" if origin and not origin.startswith("--") else ""

    def dataclass(self, cls: type, tree: Any, path: str) -> Any:
        if not isinstance(tree, Mapping):
            raise ValueError(f"{path} = {tree!r}{self.where(path)}: expected a section of options")
        hints = fields_of(cls)
        tree = {str(key).replace("-", "_"): value for key, value in tree.items()}
        for key in tree:
            if key not in hints:
                raise self.unknown_option(cls, path, key)
        tree = self.lay_preset(cls, tree, path)
        values = {key: self.value(hints[key], value, join(path, key)) for key, value in tree.items()}
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}" if path else str(error)) from None

    def check_names(self, cls: type, tree: Any, path: str) -> None:
        """Raise for the first key, at any depth, that is no option."""
        if not isinstance(tree, Mapping):
            return  # building says what is wrong with a value
        hints = fields_of(cls)
        for key, value in tree.items():
            name = str(key).replace("-", "_")
            if name not in hints:
                raise self.unknown_option(cls, path, name)
            kind, inner = hints[name], read(value)
            several = typing.get_origin(kind) is tuple
            kind = typing.get_args(kind)[0] if several else kind
            if dataclasses.is_dataclass(kind):
                for item in inner if several and isinstance(inner, list) else [inner]:
                    self.check_names(typing.cast(type, kind), item, join(path, name))

    def unknown_option(self, cls: type, path: str, key: str) -> ValueError:
        given = join(path, key)
        siblings = [join(path, name) for name in fields_of(cls)]
        everywhere = leaves_of(self.root)
        by_tail = [name for name in everywhere if name.rsplit(".", 1)[-1] == key]
        # What it means elsewhere, then where it belongs, and only then what it looks like.
        hint = meant(given, everywhere) or next(iter(by_tail), None) or nearest(given, siblings) or nearest(given, everywhere)
        flag = self.from_flag(given)

        def spell(name: str) -> str:
            option, has_value, value = name.partition("=")
            shown = f"--{option.replace('_', '-')}" if flag else option
            return f"{shown}{' ' if flag else ': '}{value}" if has_value else shown

        sentence = advice(given)
        guess = f"{sentence}; " if sentence else f"did you mean {spell(hint)!r}? " if hint else ""
        allowed = ", ".join(name.rsplit(".", 1)[-1] for name in siblings)
        return ValueError(
            f"unknown option {spell(given)}{self.where(given)}: {guess}allowed in {path or 'the top level'}: {allowed}"
        )

    def from_flag(self, path: str) -> bool:
        return any(origin.startswith("--") and (key == path or key.startswith(path + ".")) for key, origin in self.origins.items())

    def lay_preset(self, cls: type, tree: dict, path: str) -> dict:
        presets = getattr(cls, "PRESETS", None)
        if presets is None or tree.get("preset") is None:
            return tree
        name = self.value(fields_of(cls)["preset"], tree["preset"], join(path, "preset"))
        if name is None:  # `--model.preset null` takes a file's preset away
            return tree
        if name not in presets:
            raise unknown(f"{path}.preset", name, presets)
        for key in flatten(presets[name]):
            self.origins.setdefault(join(path, key), f"preset {name}")
        return lay(presets[name], tree)

    def value(self, kind: Any, given: Any, path: str) -> Any:
        """`given` as a value of the annotated type `kind`, or a ValueError that says what is allowed."""
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return self.dataclass(kind, read(given), path)
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if origin in (typing.Union, types.UnionType):
            if type(None) in args and (given is None or (isinstance(given, Text) and given.lower() in ("null", "none"))):
                return None
            inner = [arg for arg in args if arg is not type(None)]
            assert len(inner) == 1, f"{path}: only `X | None` unions are supported"
            return self.value(inner[0], given, path)
        if origin is Literal:
            chosen = str(given) if isinstance(given, Text) else given
            if chosen not in args:
                raise unknown(f"value of {path}{self.where(path)}:", given, [str(arg) for arg in args])
            return chosen
        if origin is tuple:
            return self.items(args[0], read(given), path)
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
        if kind is str and isinstance(given, str):
            return str(given)
        plain = read(given)
        if kind is bool and isinstance(plain, bool):
            return plain
        if kind in (int, float) and not isinstance(plain, bool):
            try:  # YAML 1.1 reads 3e-4 as a text, and 1e4 is a fine number of steps
                number = float(plain)
                if kind is float:
                    return number
                if number == int(number):
                    return plain if isinstance(plain, int) else int(number)
            except (TypeError, ValueError, OverflowError):
                pass
        raise ValueError(f"{path} = {given!r}{self.where(path)}: expected {wanted}")

    def items(self, kind: Any, given: Any, path: str) -> tuple:
        if isinstance(given, Mapping) and dataclasses.is_dataclass(kind):
            return (self.value(kind, given, path),)  # one section stands for a list of one
        if isinstance(given, str) or not isinstance(given, Sequence):
            given = [given]
        return tuple(self.value(kind, item, join(path, str(i))) for i, item in enumerate(given))


def read(given: Any) -> Any:
    """A command-line text as YAML reads it; any other value as it is."""
    if not isinstance(given, Text):
        return given
    try:
        return yaml.safe_load(str(given))
    except yaml.YAMLError:
        return str(given)


def lay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested dicts as one; where both give a value, `above` wins."""
    both = {key: lay(below[key], value) for key, value in above.items() if isinstance(value, Mapping) and key in below}
    return {**below, **above, **both}


# --- describing ------------------------------------------------------------------------------


@functools.cache
def fields_of(cls: type) -> dict[str, Any]:
    """Field name → type of a config dataclass, in order of declaration."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def sections_of(cls: type, path: str = "") -> list[tuple[str, type]]:
    """Every config dataclass reachable from `cls`, with its dotted path."""
    found = [(path, cls)]
    for name, kind in fields_of(cls).items():
        inner = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
        if dataclasses.is_dataclass(inner):
            found += sections_of(typing.cast(type, inner), join(path, name))
    return found


def leaves_of(cls: type) -> list[str]:
    """The dotted name of every option below `cls`."""
    sections = sections_of(cls)
    branches = {path for path, _ in sections}
    return [leaf for path, section in sections for name in fields_of(section) if (leaf := join(path, name)) not in branches]


def to_dict(value: Any) -> Any:
    """A config as nested plain dicts, lists and scalars, ready for YAML or JSON."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}, "c": [2]} → {"a.b": 1, "c.0": 2}."""
    if isinstance(tree, Mapping) and tree:
        return {k: v for name, inner in tree.items() for k, v in flatten(inner, join(path, str(name))).items()}
    if isinstance(tree, list) and tree:
        return {k: v for i, inner in enumerate(tree) for k, v in flatten(inner, join(path, str(i))).items()}
    return {path: tree}


def dump(value: Any) -> str:
    """A config as YAML; `load` on it gives the same config again."""
    return yaml.safe_dump(to_dict(value), sort_keys=False, allow_unicode=True)


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted leaf → (old, new) for every value that differs between two nested dicts."""
    before, after = flatten(old), flatten(new)
    return {k: (before.get(k), after.get(k)) for k in {**before, **after} if before.get(k) != after.get(k)}


def describe(cls: type) -> list[tuple[str, str, str, str]]:
    """(dotted name, type, default, sentence) of every option: the sentence is the field's docstring."""
    rows = []
    for path, section in sections_of(cls):
        docs = _field_docs(section)
        for field in dataclasses.fields(section):
            kind = fields_of(section)[field.name]
            name = join(path, field.name)
            if any(name == other for other, _ in sections_of(cls)):
                continue
            default = "" if field.default is dataclasses.MISSING else json.dumps(field.default, default=str)
            rows.append((name, _spell(kind), default, docs.get(field.name, "")))
    return rows


def _spell(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "|".join(str(arg) for arg in typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join("None" if arg is type(None) else _spell(arg) for arg in typing.get_args(kind))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def _field_docs(cls: type) -> dict[str, str]:
    """The string literal below each annotated field: Python drops it, so it is read from the source."""
    inherited = {name: text for base in cls.__bases__ if dataclasses.is_dataclass(base) for name, text in _field_docs(base).items()}
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = inherited
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            docs[typing.cast(ast.Name, field.target).id] = " ".join(str(text.value.value).split())
    return docs
