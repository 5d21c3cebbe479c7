"""What a family of models is to Hugging Face: its config's keys, its tensors' names, its heads. A declaration, not code."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jaxlm.config import build, to_dict, unknown
from jaxlm.model import RotaryConfig, TransformerConfig

Json = Mapping[str, Any]
Tensors = dict[str, dict[str, str]]
"""Name of theirs → path of ours → pattern (`tensors.py` says how to read one)."""

# Choices of how to compute and train, which no family knows of.
OURS = frozenset((
    "preset", "vocab_multiple", "kernel", "context", "microbatches", "rounds",
    "init", "init_std", "unroll", "remat", "dtype", "param_dtype", "quantize", "moe.router_z_loss", "dropout",
    "head.pair",
))  # fmt: skip

SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")

GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_new": "geglu_tanh", "gelu_pytorch_tanh": "geglu_tanh"}
PLAIN = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu", "relu2": "relu2", "silu": "silu", "swish": "silu", "gelu_python": "gelu",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Head:
    """A head as a family writes it: the class of `transformers`, our `HeadConfig` fields, its tensors."""

    architecture: str
    fields: Json = dataclasses.field(default_factory=dict)
    tensors: Tensors = dataclasses.field(default_factory=dict)
    prefix: str = ""
    """Stands before the names of all tensors but the head's own."""
    carried: tuple[str, ...] = ()
    """Regular expressions of tensors that we read nothing from, and take over when a folder is written again."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type` of `transformers`.

    `fixed` are the fields of ours that all its models share; `keys` maps a field (dotted) to the key of theirs that
    holds the same value; `read(config, names of the tensors)` and `write(config)` translate the rest. `require` lists
    keys whose other values we do not compute, with the value that we do.
    """

    name: str
    prefix: str
    fixed: Json
    keys: Mapping[str, str]
    tensors: Tensors
    heads: Mapping[str, Head]
    read: Callable[[Json, Collection[str]], Json] = lambda theirs, names: {}
    write: Callable[[TransformerConfig], Json] = lambda config: {}
    adapt: Callable[[TransformerConfig, Tensors], Tensors] = lambda config, tensors: tensors
    """The base model's tensors, where their names depend on the config."""
    require: Json = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    cannot: Callable[[TransformerConfig], Collection[str]] = lambda config: ()
    """Fields that its `config.json` can say but its class in `transformers` cannot be."""
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Full name of a tensor that some files hold beside the one that it is tied to → full name of that one."""
    unties_copies: bool = True
    """Without tied embeddings its class in transformers takes the copies for tensors of their own, so files need them."""
    missing: tuple[str, ...] = ()
    """Regular expressions of tensors that its files lack though our parameters have a place for them."""
    activation: str = ""
    """The key of the non-linearity."""

    def config(
        self, theirs: Json, names: Collection[str] = (), head: str | None = None, labels: int | None = None
    ) -> TransformerConfig:
        """Our config of their `config.json`; `head` and `labels` ask for another head than the file names."""
        for key, allowed in self.require.items():
            if theirs.get(key, allowed) != allowed:
                raise ValueError(f"{self.name} config: {key} {theirs[key]!r} is not supported: only {allowed!r} is")
        kind = head or self.head_of(theirs, names)
        if kind not in self.heads:
            raise unknown(f"head of {self.name}", kind, self.heads)
        tree: dict[str, Any] = {}
        for field, value in self.fixed.items():
            _put(tree, field, value)
        for field, key in self.keys.items():
            if theirs.get(key) is not None:
                _put(tree, field, theirs[key])
        if self.activation:
            _put(tree, "activation", self._activation(theirs[self.activation]))
        for field, value in self.read(theirs, names).items():
            _put(tree, field, value)
        count = labels or theirs.get("num_labels") or len(theirs.get("id2label") or ()) or 2
        fields = {"kind": kind, **self.heads[kind].fields, **tree.pop("head", {})}
        if fields.get("activation", "") is None:
            fields["activation"] = tree["activation"]
        if kind in ("sequence", "token"):
            fields["labels"] = count
        return build(TransformerConfig, {**tree, "head": fields})

    def _activation(self, name: str) -> str:
        gated = str(self.fixed.get("activation", "")) in ("swiglu", "geglu", "geglu_tanh")
        table = GATED if gated else PLAIN
        if name not in table:
            raise unknown(f"{self.name} config: {self.activation}", name, table)
        return table[name]

    def head_of(self, theirs: Json, names: Collection[str] = ()) -> str:
        """Our kind of head for the class that a `config.json` names.

        Without one it is the first kind that the family has. Raises ValueError where the tensors `names` are those of another
        head: several kinds call theirs alike.
        """
        named = theirs.get("architectures") or ()
        classes = [named] if isinstance(named, str) else named
        found = [kind for name in classes for kind, head in self.heads.items() if head.architecture == name]
        if found:
            return found[0]
        if not classes:
            default, *others = self.heads
            fitting = [kind for kind in self.heads if any(name in names for name in self.heads[kind].tensors)]
            if fitting and default not in fitting:
                first, *more = (self.heads[kind].architecture for kind in others if kind in fitting)
                raise ValueError(
                    f'{self.name} config: architectures, which says what the head is for, is missing: add "architectures": '
                    f'["{first}"]' + (f", or {' or '.join(more)}" if more else "")
                )
            return default
        named = classes[0]
        # Classes that only older versions had, and BERT's with both its pretraining heads.
        if named.endswith(("LMHeadModel", "ForPreTraining")):
            return "masked_lm" if "masked_lm" in self.heads else "language_model"
        raise unknown(f"architecture of {self.name}", named, [head.architecture for head in self.heads.values()])

    def json(self, config: TransformerConfig) -> dict[str, Any]:
        """Their `config.json` of our config. Raises ValueError, naming the fields, where the family cannot say it."""
        theirs, lost = self.translate(config)
        if lost:
            raise ValueError(f"{self.name} models cannot have {', '.join(lost)}")
        return theirs

    def translate(self, config: TransformerConfig) -> tuple[dict[str, Any], list[str]]:
        """Their `config.json`, and the fields of ours that it does not say: those that, read again, differ."""
        lost = list(self.cannot(config))
        head = self.heads.get(config.head.kind)
        if head is None:
            lost.append(f"head.kind {config.head.kind}")
        spelled = {ours: name for name, ours in reversed((GATED if config.gated else PLAIN).items())}
        if self.activation and config.activation not in spelled:
            lost.append(f"activation {config.activation}")
        flat = _flat(config)
        # Without these, transformers would take the ids of the family's first checkpoint.
        theirs: dict[str, Any] = {"model_type": self.name, **dict.fromkeys(SPECIAL)}
        theirs |= {key: flat[field] for field, key in self.keys.items() if field in flat}
        if self.activation:
            theirs[self.activation] = spelled.get(config.activation)
        if head is not None:
            theirs["architectures"] = [head.architecture]
        if config.head.kind in ("sequence", "token"):
            theirs["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.head.labels)}
            theirs["label2id"] = {f"LABEL_{i}": i for i in range(config.head.labels)}
        theirs |= self.write(config)
        if head is None or theirs.get(self.activation, "") is None:
            return theirs, lost
        names = () if config.tie_embeddings else ("lm_head.weight",)
        try:
            again = _flat(self.config(complete(theirs), names, labels=config.head.labels))
        except ValueError as error:
            return theirs, [*lost, str(error)]
        lost += [f"{field} {flat[field]}" for field in flat if again.get(field) != flat[field] and field not in OURS]
        return theirs, lost

    def table(self, config: TransformerConfig) -> Tensors:
        """Every tensor that a model of this family may have, by its full name."""
        head = self.heads[config.head.kind]
        return {**{head.prefix + name: parts for name, parts in self.adapt(config, self.tensors).items()}, **head.tensors}


def complete(theirs: Json) -> dict[str, Any]:
    """A `config.json` of whatever version with every key that it leaves out, as `transformers` completes it: the
    defaults of a family are part of what the file means."""
    from transformers import CONFIG_MAPPING

    name = str(theirs.get("model_type"))
    try:
        return {"model_type": name, **CONFIG_MAPPING[name].from_dict(dict(theirs)).to_dict()}
    except Exception as error:  # validation of theirs raises several kinds
        raise ValueError(f"the config.json of this {name} model is not valid: {' '.join(str(error).split())[:200]}") from None


def _flat(config: TransformerConfig) -> dict[str, Any]:
    """Dotted field → value, with the defaults that depend on other fields filled in."""
    tree = to_dict(config)
    tree |= {"kv_heads": config.K, "head_width": config.H, "mlp_width": config.F, "embedding_width": config.W}
    tree |= {
        "decoder_layers": config.stacks.get("decoder"),
        "qkv_bias": config.bias if config.qkv_bias is None else config.qkv_bias,
    }
    tree["attention_scale"] = config.attention_scale or config.H**-0.5
    tree["rope"]["original_positions"] = config.rope.original_positions or config.positions
    # Without scaling, leaving it out means theta; with it, that layers which see a window are scaled too.
    tree["rope"]["local_theta"] = config.rope.local_theta or (config.rope.theta if config.rope.scaling == "none" else None)
    tree["layer_pattern"] = "".join("L" if local else "G" for local in config.local(max(config.stacks.values())))
    if config.head.kind not in ("sequence", "token"):
        tree["head"]["labels"] = None
    # What plays no part is not compared.
    if config.position != "rotary":
        tree["rope"] = None
    if config.position != "relative":
        tree["relative_buckets"] = tree["relative_distance"] = None
    if "L" not in tree["layer_pattern"]:
        tree["window"] = None
    if not config.moe.experts:
        tree["moe"] = None
    return dict(_leaves(tree))


def _leaves(tree: Json, path: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        here = f"{path}.{name}" if path else name
        found += _leaves(value, here) if isinstance(value, Mapping) else [(here, value)]
    return found


def _put(tree: dict[str, Any], field: str, value: Any) -> None:
    *parents, leaf = field.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = value


# --- rows of a table -----------------------------------------------------------------------------


def linear(theirs: str, ours: str, pattern: str, bias: str | None = None) -> Tensors:
    """A torch Linear: its weight (out, in) by `pattern`, its bias by the output's half of it or by `bias`."""
    output = bias or (pattern.partition(")")[0] + ")" if pattern.startswith("(") else pattern.split()[0])
    return {f"{theirs}.weight": {f"{ours}/kernel": pattern}, f"{theirs}.bias": {f"{ours}/bias": output}}


def norm(theirs: str, ours: str, axes: str = "D") -> Tensors:
    return {f"{theirs}.weight": {f"{ours}/scale": axes}, f"{theirs}.bias": {f"{ours}/bias": axes}}


def table(theirs: str, ours: str, axes: str = "V W") -> Tensors:
    return {f"{theirs}.weight": {f"{ours}/table": axes}}


def attention(theirs: str, ours: str, query: str, key: str, value: str, out: str) -> Tensors:
    """Four torch Linears, each at `theirs` + its own name."""
    return {
        **linear(theirs + query, f"{ours}/query", "(N H) D"),
        **linear(theirs + key, f"{ours}/key", "(K H) D"),
        **linear(theirs + value, f"{ours}/value", "(K H) D"),
        **linear(theirs + out, f"{ours}/out", "D (N H)"),
    }


# --- rotary positions, in the forms of config.json of transformers 4 and 5 --------------------------

_ROPE = {
    "factor": "factor", "original_positions": "original_max_position_embeddings", "low_frequency": "low_freq_factor",
    "high_frequency": "high_freq_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow", "magnitude": "attention_factor",
}  # fmt: skip
_USED = {
    "none": (), "linear": ("factor",), "dynamic": ("factor",),
    "llama3": ("factor", "original_positions", "low_frequency", "high_frequency"),
    "yarn": ("factor", "original_positions", "beta_fast", "beta_slow", "magnitude"),
}  # fmt: skip


def read_rope(theirs: Json, partial: bool = False) -> dict[str, Any]:
    """Our `rope` fields, from `rope_parameters` or from the older `rope_theta`, `rope_scaling` and `rotary_pct`.

    `partial`: whether the family's class in transformers can rotate a part of each head; the others ignore
    `partial_rotary_factor`, so any value but 1 is refused for them.
    """
    given = dict(theirs.get("rope_parameters") or theirs.get("rope_scaling") or {})
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = "none" if kind == "default" else kind
    if kind not in _USED:
        raise unknown("rope_type", kind, ["default", *_USED][:1] + [name for name in _USED if name != "none"])
    if kind == "yarn" and (given.get("mscale") or given.get("truncate") is False):
        raise ValueError("rope_parameters: mscale and truncate of yarn are not supported: give attention_factor")
    fraction = given.get("partial_rotary_factor") or theirs.get("partial_rotary_factor") or theirs.get("rotary_pct") or 1.0
    if fraction != 1 and not partial:
        raise ValueError(f"partial_rotary_factor {fraction} is not supported: this family rotates whole heads")
    theta = given.get("rope_theta") or theirs.get("rope_theta") or theirs.get("rotary_emb_base") or 10_000.0
    fields = {"theta": float(theta), "fraction": float(fraction), "scaling": kind}
    fields |= {ours: given[_ROPE[ours]] for ours in _USED[kind] if given.get(_ROPE[ours]) is not None}
    return {"rope": fields}


def write_rope(config: TransformerConfig, always: bool = False) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 writes them; `always` with the fraction, for a family whose default is not 1."""
    rope = config.rope
    given: dict[str, Any] = {"rope_type": "default" if rope.scaling == "none" else rope.scaling, "rope_theta": rope.theta}
    if rope.fraction != 1 or always:
        given["partial_rotary_factor"] = rope.fraction
    for ours in _USED[rope.scaling]:
        value = getattr(rope, ours)
        if ours == "original_positions":
            value = value or config.positions
        optional = ours in ("beta_fast", "beta_slow", "magnitude")
        if not (optional and value == getattr(RotaryConfig, ours)):  # what is left out means the same to both
            given[_ROPE[ours]] = value
    return {"rope_parameters": given}


# --- kinds of layer -------------------------------------------------------------------------------

_KINDS = {"full_attention": "G", "sliding_attention": "L"}


def read_layers(theirs: Json, default: str) -> dict[str, Any]:
    """Our `layer_pattern`, from `layer_types` or the family's default, as short as it repeats."""
    types = theirs.get("layer_types")
    for kind in types or ():
        if kind not in _KINDS:
            raise unknown("layer_types", kind, _KINDS)
    pattern = "".join(_KINDS[kind] for kind in types) if types else default
    for length in range(1, len(pattern)):
        if all(pattern[i] == pattern[i % length] for i in range(len(pattern))):
            pattern = pattern[:length]
            break
    return {"layer_pattern": pattern}


def write_layers(config: TransformerConfig) -> list[str]:
    return ["sliding_attention" if local else "full_attention" for local in config.local(config.layers)]
