"""Every option of every recipe is honoured, or refused in one line that names it.

Another value of the option changes the batches, a compiled program, or what the run does and writes. Options and their types are
read from the dataclasses: a new option is tried without being named here, and fails where nothing reads it.
"""

import dataclasses
import re
import typing

import pytest
from made_up import Writer, json_lines
from observing import Observed

from jaxlm import config as configs
from jaxlm.experiment import ExperimentConfig, load_config

SMALL = [
    "--model.positions", "256", "--model.layers", "2", "--model.width", "32", "--model.heads", "2", "--model.mlp-width", "32",
    "--data.length", "16", "--data.batch-size", "8", "--data.tokenizer.vocab-size", "280", "--train.steps", "4",
    "--train.eval-every", "1", "--train.log-every", "1", "--optim.warmup", "2",
]  # fmt: skip
SPECIAL = ["--data.tokenizer.special", "pad,cls,sep,mask,prefix,middle,suffix"]
TEXT = ["--data.sources.kind", "files", "--data.sources.path", "documents.jsonl", "--data.cache", "cache"]
BOTH, ENCODER = ["--model.architecture", "encoder_decoder"], ["--model.architecture", "encoder"]


def rows(kind: str) -> list[dict]:
    """Rows of a task, a bad one and one that comes twice among them."""
    w, made = Writer(3), []
    for i in range(240):
        text, pair = f"é[SEP]<|endoftext|> {w.sentence()}", f"é[SEP]<|endoftext|> {w.sentence()}"
        context = f"[SEP]<|endoftext|> {w.text(4)}"
        made.append({
            "text": text, "pair": pair, "label": ["a", "b", "c"][i % 3], "labels": ["a", "b"][: 1 + i % 2], "tokens": text.split(),
            "tags": ["B-x" if j % 3 == i % 3 else "O" for j in range(len(text.split()))], "question": pair, "context": context,
            "answers": [{"text": context.split()[1], "answer_start": context.index(context.split()[1])}],
            "choices": [w.rare(2), w.rare(2)], "source": text, "target": pair, "chosen": f"{text} yes {w.rare(2)}",
            "rejected": f"{text} no {w.rare(3)}", "prompt": w.rare(1), "id": str(i), "title": f"t{i % 10}",
            "messages": [{"role": "user", "content": f"é<|endoftext|>{w.rare(1)}"}, {"role": "assistant", "content": w.rare(1)}],
        })  # fmt: skip
        if kind == "regression":
            made[-1]["label"] = i / 7
        if kind == "multiple_choice":
            made[-1]["label"] = i % 2
    return [*made, dict.fromkeys(made[0], "")]


ROWS = ("classification", "multilabel", "regression", "tagging", "extractive_qa", "multiple_choice", "embedding", "reward")
RECIPES: dict[str, list[str]] = {
    "causal": TEXT,
    "fim": [*TEXT, *SPECIAL, "--task.corrupt.fim", "0.5"],
    "masked": [*TEXT, *SPECIAL, *ENCODER, "--task.kind", "masked"],
    "replaced": [*TEXT, *SPECIAL, *ENCODER, "--task.kind", "replaced"],
    **{kind: [*TEXT, *SPECIAL, *BOTH, "--data.tokenizer.sentinels", "40", "--task.kind", kind] for kind in ("span", "mixture")},
    "prefix": [*TEXT, *SPECIAL, "--task.kind", "prefix"],
    "denoising": [*TEXT, *SPECIAL, *BOTH, "--task.kind", "denoising"],
    **{kind: [*ENCODER, *SPECIAL, "--task.kind", kind, "--data.train", f"{kind}.jsonl"] for kind in ROWS},
    "reward": [*ENCODER, *SPECIAL, "--task.kind", "reward", "--data.train", "reward.jsonl", "--data.length", "64"],
    **{
        kind: ["--task.kind", kind, "--data.train", f"{kind}.jsonl", "--data.length", "64"]
        for kind in ("text_to_text", "preference", "chat")
    },
}  # fmt: skip
TRANSLATION = [*RECIPES["text_to_text"], *BOTH]
# Recipes in which options are read that others refuse: name → (flags, options that are tried).
VARIANTS: dict[str, tuple[list[str], str]] = {
    "rotary": ([*TEXT, "--model.position", "rotary", "--model.layer-pattern", "GL"], "model.rope. model.window"),
    **{
        scaling: (
            [*TEXT, "--model.position", "rotary", "--model.rope.scaling", scaling, "--model.rope.factor", "4",
             *([] if scaling == "linear" else ["--model.rope.original-positions", "1024"])],
            "model.rope.",
        )
        for scaling in ("linear", "dynamic", "llama3", "yarn")
    },
    "relative": ([*TEXT, "--model.position", "relative"], "model.relative"),
    "stages": ([*TEXT, "--parallel.stage", "2", "--model.layers", "4"], "model.microbatches model.rounds"),
    "context": ([*TEXT, "--parallel.context", "2"], "model.context"),
    "untied": ([*TEXT, "--model.vocab-size", "512"], "model.tie_embeddings model.logit"),
    "schedules": ([*TEXT, "--optim.schedule", "wsd"], "optim.final optim.decay_share optim.warmup optim.schedule"),
    **{
        name: ([*TEXT, "--optim.name", name], "optim.")
        for name in ("adam8bit", "adafactor", "lion", "muon", "soap", "schedule_free")
    },
    "constant": ([*TEXT, "--optim.schedule", "constant"], "optim."),
    "adapters": ([*TEXT, "--tune.train", "null", "--tune.lora.rank", "2"], "tune."),
    "decoded": ([*TRANSLATION, "--task.decode.beams", "2"], "task. train.z_loss train.loss_chunk model.logit"),
    "pairs": (
        [*RECIPES["masked"], "--task.corrupt.pairs", "next_sentence", "--model.head.pair", "true"],
        "task.corrupt. model.head.",
    ),
    "bytes": ([*TEXT, "--data.tokenizer.vocab-size", "4096", "--data.tokenizer.kind", "bytes"], "data.tokenizer."),
    "mixed": (
        ["--data.cache", "cache", "--data.sources", "[{kind: files, path: documents.jsonl}, {kind: files, path: others.jsonl}]"],
        "data.",
    ),
    **{
        f"experts {name}": ([*RECIPES[name], "--model.moe.experts", "4"], "model.moe.")
        for name in RECIPES if name not in ("fim", "mixture", "prefix", "denoising")
    },
}  # fmt: skip

# Other values of options whose type alone does not tell a sensible one.
ALTERNATIVES: dict[str, list[str]] = {
    "name": ["another"], "runs": ["elsewhere"], "model.init_from": ["nowhere"], "model.head.pool": ["mean", "last"],
    "data.train": ["KIND-more.jsonl"], "data.validation": ["KIND-more.jsonl"], "data.sources.path": ["others.jsonl"],
    "data.cache": ["caches"], "data.sources.column": ["other"], "data.sources.weight": ["3"], "data.sources.split": ["test"],
    "data.rows.group": ["title"], "data.rows.limit": ["20"], "data.rows.max_bad": ["0"],
    "data.tokenizer.special": ["pad,mask"], "data.rows.header": ["text,label"], "data.tokenizer.sentinels": ["60"],
    "data.length": ["96"], "data.holdout.fraction": ["0.5"], "data.tokenizer.vocab_size": ["300"],
    "data.tokenizer.path": ["nowhere"], "data.tokenizer.kind": ["bytes", "characters"], "model.heads": ["4"], "data.epochs": ["1"],
    "data.sources.kind": ["embedded", "files"], "task.labels": ["[c, b, a, B-x, O]"], "task.template": ["say {source}"],
    "task.target_length": ["4"], "task.scores": ["summarisation", "answers"],
    "task.chat_template": ["{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"],
    "task.stride": ["1"], "task.answer_length": ["1"],
    "task.threshold": ["0.3"], "task.corrupt.pairs": ["sentence_order"], "task.decode.n_best": ["2"], "optim.decay": ["bias$"],
    "optim.groups": ["[{pattern: head|embed, learning_rate: 0.5}]"], "optim.average": ["0.9"], "optim.layer_decay": ["0.5"],
    "optim.warmup": ["3"], "tune.train": ["bias$"], "tune.lora.targets": ["mlp/up/kernel"], "tune.lora.rank": ["4"],
    "train.metric": ["bits_per_byte"], "train.sample_prompt": ["Once"], "train.patience": ["1"], "train.loss_chunk": ["2"],
    "model.qkv_bias": ["false"], "train.eval_rows": ["1"], "train.steps": ["3"], "train.keep": ["3"],
    "parallel.across": ["stage"], "model.norm_eps": ["1e-3"], "model.layer_pattern": ["GL"], "model.moe.experts": ["4", "2"],
    "model.moe.shared": ["1"], "model.moe.chosen": ["1"], "model.moe.router_z_loss": ["0.1"], "model.position_offset": ["2"],
    "model.token_types": ["2"], "model.decoder_layers": ["3"], "model.rope.local_theta": ["500"],
    "model.rope.original_positions": ["256"],
    "model.rope.beta_fast": ["2"], "model.rope.factor": ["8"], "model.rope.fraction": ["0.5"],
    "model.rope.beta_slow": ["0.5"], "model.rope.low_frequency": ["0.5"], "model.preset": ["gpt2-small"],
    "model.vocab_size": ["1024"], "model.attention_scale": ["0.5"], "model.window": ["8"], "model.kv_heads": ["1"],
    "model.embedding_width": ["16"], "model.head.activation": ["gelu", "relu"], "model.relative_distance": ["12"],
    "data.rows.encoding": ["latin-1"], "data.tokenizer.framing": ["none"], "task.positive": ["a"],
    "task.tokenize": ["char"], "hosts.coordinator": ["localhost:1"], "hosts.count": ["2"], "hosts.index": ["0"],
    "model.microbatches": ["4"],
    "model.kernel": ["chunked"], "model.context": ["gather"], "model.attention_softcap": ["5"], "model.logit_softcap": ["5"],
    "optim.learning_rate": ["0.5"], "train.sample_tokens": ["7"], "model.vocab_multiple": ["128"], "optim.eps": ["1e-3"],
    "data.rows.columns.text": ["other"], "data.rows.columns.label": ["title"], "data.rows.columns.id": ["title"],
}  # fmt: skip
# Options that no recipe here reads, with the reason.
NOWHERE = {
    "data.sources.split": "Hugging Face and TensorFlow data sets alone: tests/data/test_sources.py",
    "data.sources.subset": "Hugging Face data sets alone: tests/data/test_sources.py",
    "data.sources.streaming": "Hugging Face data sets alone: tests/data/test_streaming.py",
    "data.sources.weight": "mixtures alone, whose sources a flag cannot name: tests/data/test_pipeline.py",
    "data.rows.subset": "Hugging Face data sets alone: tests/data/test_rows.py",
    "data.rows.separator": "files of cells alone: tests/data/test_rows.py",
    "data.rows.under": "nested JSON alone: tests/data/test_rows.py",
    "data.tokenizer.path": "tokenizers of others alone: tests/data/test_tokenizer.py",
    "task.decode.n_best": "from Python alone, by BatchGenerator.ranked: tests/generate/test_batch.py",
    "model.head.labels": "a task sets it",
    "model.init_from": "needs a model: tests/tasks/test_tuning.py",
    "parallel.data": "the mesh has two devices: tests/parallel/test_mesh.py",
    **{f"hosts.{name}": "needs several processes: tests/parallel/test_hosts.py" for name in ("coordinator", "count", "index")},
}


def leaves(cls: type, path: str = "") -> typing.Iterator[tuple[str, typing.Any, typing.Any]]:
    """(dotted name, type, default) of every option, those of lists of sections among them."""
    for field in dataclasses.fields(cls):
        kind, name = configs.fields_of(cls)[field.name], configs.join(path, field.name)
        inner = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
        if dataclasses.is_dataclass(inner) and name != "optim.groups":
            yield from leaves(inner, name)
        else:
            yield name, kind, field.default


# Options that a recipe here reads and finds nothing for in its rows.
UNSEEN = ("data.rows.header", "data.rows.speakers")
OPTIONS = {name: (kind, default) for name, kind, default in leaves(ExperimentConfig) if name not in UNSEEN}


def alternatives(name: str, current: typing.Any) -> list[str]:
    """Other values of an option than the one it has."""
    if name in ALTERNATIVES:
        return [value for value in ALTERNATIVES[name] if value != str(current)]
    kind, _ = OPTIONS[name]
    args = [arg for arg in typing.get_args(kind) if arg is not type(None)]
    if typing.get_origin(kind) is typing.Literal:
        return [str(arg) for arg in args if arg != current]
    base = args[0] if args else kind
    if typing.get_origin(base) is typing.Literal:
        return [str(arg) for arg in typing.get_args(base) if arg != current]
    if base is bool:
        return [str(not current).lower()]
    if base is int:
        return [str(2 * current if current else 3)]
    if base is float:
        return [str(current / 2 if current else 0.25)]
    return ["another"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    w = Writer(1)
    for name in ("documents", "others"):
        made = [{"text": w.text(w.rng.randint(2, 8)), "other": w.text(3)} for _ in range(60)]
        (folder / f"{name}.jsonl").write_text(json_lines(made), encoding="utf8")
    for kind in (*ROWS, "text_to_text", "chat", "preference"):
        more = [row | {"other": f"{row['text']} too"} for row in rows(kind)]
        (folder / f"{kind}.jsonl").write_text(json_lines(more), encoding="utf8")
        (folder / f"{kind}-more.jsonl").write_text(json_lines(more[:30]), encoding="utf8")
    (folder / "run.yaml").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def dashed(name: str) -> str:
    return name.replace("_", "-")


def without(flag: str, flags: list[str]) -> list[str]:
    """The flags less one and its value."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [word for pair in pairs if pair[0] != flag for word in pair]


class Tried:
    """A recipe, what is seen of it, and which options change that."""

    def __init__(self, folder, flags):
        self.folder, self.flags = folder, [*SMALL, *flags]
        self.base = Observed(folder / "run.yaml", self.flags)
        self.seen = {"data": self.base.data()}

    def current(self, name):
        value = self.base.config
        for part in name.split("."):
            value = getattr(value[0] if isinstance(value, tuple) else value, part)
        return value

    def outcome(self, name: str, effects: bool = True, most: int = 1) -> str:
        """`honoured`, `refused`, or what is wrong, of up to `most` other values; without `effects` one that is accepted counts
        as honoured."""
        values = [value.replace("KIND", self.base.config.task.kind) for value in alternatives(name, self.current(name))]
        found = [self.one(name, value, effects) for value in values[:most]]
        return min(found, key=lambda outcome: "whr".index(outcome[0]))

    def one(self, name: str, value: str, effects: bool) -> str:
        first = name.split(".")[0]
        flags = [*without(f"--{dashed(name)}", self.flags), f"--{dashed(name)}", value]
        shared = first in ("model", "optim", "train", "tune", "parallel") and name not in ("model.architecture", "model.preset")
        try:
            if not effects:
                load_config(self.folder / "run.yaml", configs.parse_flags(flags))
                return "honoured"
            other = Observed(self.folder / "run.yaml", flags, self.base if shared else None)
            order = {"data": ("data", "loop"), "train": ("loop", "step", "data"), "model": ("step", "decoding")}
            for view in order.get(first, ("step",) if first in ("optim", "tune", "parallel") else ("data", "step", "loop")):
                if view not in self.seen:
                    self.seen[view] = getattr(self.base, view)()
                if getattr(other, view)() != self.seen[view]:
                    return "honoured"
        except ValueError as error:
            told = str(error)
            section, _, word = name.rpartition(".")
            parent = section.rpartition(".")[2]
            named = word in told or (section and section in told) or (word == "kind" and parent in told)
            return "refused" if "\n" not in told and named else f"wrong: refused by {told!r}"
        return f"wrong: {name} {value} changes nothing and is not refused"


def check(tried: Tried, names: list[str], effects: str = ".*", most: int = 1) -> None:
    """Each option is refused or honoured; whether it has an effect is looked at where its name matches `effects`."""
    outcomes = {name: tried.outcome(name, bool(re.fullmatch(effects, name)), most) for name in names}
    wrong = [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome.startswith("wrong")]
    assert not wrong, "\n".join(wrong)


# Options that mean the same to every recipe: their effects are looked at in some recipes alone, in more of them when slow.
SAME = r"(name|runs|seeds?|(hosts|tune|optim|parallel|model)\..*|data\.prefetch|train\.(steps|eval_every|patience|log_every|keep))"
WHOLE = ("causal", "classification")


def some_slow(names, fast):
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


FAST = ("causal", "masked", "classification", "text_to_text")


@pytest.mark.parametrize("recipe", some_slow(RECIPES, FAST))
def test_every_option_is_honoured_or_refused(recipe, place):
    check(Tried(place, RECIPES[recipe]), list(OPTIONS), ".*" if recipe == "causal" else rf"(?!{SAME}$).*")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", WHOLE)
def test_every_other_value_is_honoured_or_refused(recipe, place):
    """All choices of an option, and the options that mean the same everywhere."""
    check(Tried(place, RECIPES[recipe]), list(OPTIONS), most=9)


@pytest.mark.parametrize("variant", some_slow(VARIANTS, ("experts classification", "stages", "adafactor", "schedules", "yarn")))
def test_options_that_hang_on_others(variant, place):
    flags, prefixes = VARIANTS[variant]
    check(Tried(place, flags), [name for name in OPTIONS if name.startswith(tuple(prefixes.split()))])


def test_every_option_is_read_by_some_recipe(place):
    """None is refused everywhere, those apart that need more than a recipe here has."""
    runs = [*RECIPES.values(), *(flags for flags, _ in VARIANTS.values())]
    refused = set()
    for name in OPTIONS:
        value = alternatives(name, OPTIONS[name][1])[0].replace("KIND", "classification")
        for flags in runs:
            try:
                load_config(
                    place / "run.yaml",
                    configs.parse_flags([*without(f"--{dashed(name)}", [*SMALL, *flags]), f"--{dashed(name)}", value]),
                )
                break
            except ValueError:
                continue
        else:
            refused.add(name)
    assert refused == set(NOWHERE)
