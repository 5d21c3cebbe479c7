"""A model's own generation settings: read as transformers reads them, applied by every command that writes, overridden by flags,
kept by runs and exports."""

import dataclasses
import json
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from jaxlm import cli
from jaxlm.data import TokenizerConfig, train_tokenizer
from jaxlm.devices import LoadOptions, MeshOptions
from jaxlm.generate import BatchGenerator, DecodeConfig, GenerationSettings, Generator, LogitsRules, SampleConfig
from jaxlm.hub import save_adapter
from jaxlm.model import TransformerConfig
from jaxlm.models import held_dtype, load_model
from jaxlm.serve.asks import Asker, Limits
from jaxlm.train import LoraConfig, TuneConfig, Tuning
from jaxlm.verbs.decoding import Decoding, decoding_of
from jaxlm.verbs.writing import GenerateOptions

sys.path.append(str(pathlib.Path(__file__).parent.parent / "hub"))
from torch_models import BART, BASE, CASES, make


def read(**given) -> GenerationSettings:
    return GenerationSettings.read(given)


def test_settings_mean_what_transformers_means():
    quiet = read(num_beams=1, temperature=1.0, top_p=1.0, repetition_penalty=1.0, length_penalty=1.0, no_repeat_ngram_size=0)
    assert quiet.rules() == LogitsRules() and quiet.decode({}) == DecodeConfig()
    assert read().sampling({}).temperature == 0.8 and read().sampling({}, encoder_decoder=True).temperature == 0
    drawn = read(do_sample=True, temperature=0.6, top_p=0.9)
    assert drawn.sampling({}) == SampleConfig(0.6, top_k=50, top_p=0.9), "transformers' own top_k, where sampling is asked for"
    assert drawn.sampling({"temperature": 0.0, "top_k": 3}) == SampleConfig(0.0, top_k=3, top_p=0.9), "flags win"
    assert read(do_sample=False, temperature=0.6, top_p=0.9).sampling({}) == SampleConfig(0.0)
    assert read(num_beams=4).sampling({}).temperature == 0, "beams search"
    beams = read(num_beams=4, length_penalty=2, early_stopping=True, no_repeat_ngram_size=3, min_new_tokens=5, min_length=99)
    assert beams.decode({}) == DecodeConfig(64, 4, 2.0, early_stopping="true", no_repeat_ngram_size=3, min_tokens=5)
    assert beams.decode({"beams": 2}).beams == 2 and beams.rules().min_length == 0, "min_new_tokens goes first"
    assert read(max_length=20).room(8, 200) == 12 and read(max_length=20, max_new_tokens=7).room(8, 200) == 7
    assert read().room(8, 200) == 200
    rules = read(forced_eos_token_id=2, suppress_tokens=[3, 4], bad_words_ids=[[5], [6, 7]], forced_bos_token_id=0).rules()
    assert rules == LogitsRules(
        forced_bos_token_id=0, forced_eos_token_id=(2,), suppress_tokens=(3, 4), bad_words_ids=((5,), (6, 7))
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"generation settings name token 99: the model's table holds ids from 0 to 60"):
        read(suppress_tokens=[99]).rules().check(61)


def test_one_line_says_what_applies():
    settings = read(num_beams=4, temperature=0.5, guidance_scale=2.0, no_repeat_ngram_size=3)
    assert settings.told(flags={"num_beams"}, missing=("temperature",)) == (
        "generation_config.json: no_repeat_ngram_size 3; overridden: num_beams; not applied: temperature, guidance_scale"
    )
    assert read(eos_token_id=2, transformers_version="5", use_cache=True, pad_token_id=0).told() is None
    named = read(forced_decoder_ids=[[1, 2]], eta_cutoff=0.1, chat_format="chatml", epsilon_cutoff=0.0, num_beam_groups=1)
    assert named.told() == "generation_config.json: not applied: eta_cutoff, forced_decoder_ids, chat_format"
    older = GenerationSettings.read({"hidden_size": 8, "num_beam_groups": 2}, "config.json")
    assert older.told() == "config.json: not applied: num_beam_groups", "which says what the model is, too"


def test_settings_of_a_search_are_not_said_to_apply_to_texts_that_are_drawn():
    settings = read(do_sample=True, num_beams=4, top_k=7, guidance_scale=2.0)
    drawn = Decoding(settings.sampling({}), DecodeConfig(), LogitsRules(), settings, None, 64, frozenset())
    assert drawn.told() == "generation_config.json: do_sample true, top_k 7; not applied: num_beams, guidance_scale"
    searched = dataclasses.replace(drawn, sampling=SampleConfig(0.0), given=frozenset({"do_sample"}))
    assert searched.told() == "generation_config.json: overridden: do_sample; not applied: num_beams, guidance_scale"
    searched = dataclasses.replace(searched, decode=DecodeConfig(beams=4))
    assert searched.told() == "generation_config.json: num_beams 4; overridden: do_sample; not applied: guidance_scale"
    sampled = dataclasses.replace(drawn, decode=DecodeConfig(beams=4))
    assert sampled.told() == "generation_config.json: do_sample true, num_beams 4, top_k 7; not applied: guidance_scale"


@pytest.mark.parametrize(
    ("idle", "read_with"),
    [
        ({"top_k": 5, "temperature": 0.0}, {"temperature": 0.5}), ({"top_p": 0.5, "beams": 2}, {"beams": None}),
        ({"min_p": 0.1, "temperature": 0.0}, {"temperature": None}), ({"typical_p": 0.5, "temperature": 0.0}, {"temperature": 1.0}),
        ({"length_penalty": 2.0}, {"beams": 2}), ({"early_stopping": "true", "beams": 1}, {"beams": 2}),
        ({"presence_penalty": 0.5, "beams": 2}, {"beams": None}), ({"frequency_penalty": 0.5, "beams": 2}, {"beams": 1}),
        ({"min_tokens": 3, "regex": "a"}, {"regex": None}), ({"beams": 2, "regex": "a"}, {"regex": None}),
        ({"no_repeat_ngram_size": 3, "regex": "a"}, {"regex": None}),
    ],
)  # fmt: skip
def test_flags_that_do_nothing_in_the_way_of_writing_are_refused(idle, read_with):
    trained = types.SimpleNamespace(generation=read, model=types.SimpleNamespace(config=TransformerConfig()))
    name = next(iter(idle))
    with pytest.raises(ValueError, match=rf"^{name} {idle[name]} would do nothing here: it is read "):
        decoding_of(trained, GenerateOptions(**idle), 64)
    decoding_of(trained, GenerateOptions(**{**idle, **read_with}), 64)


def test_a_search_is_written_as_settings_that_read_as_it():
    config = DecodeConfig(33, 4, 2.0, early_stopping="true", no_repeat_ngram_size=3, repetition_penalty=1.5, min_tokens=2)
    source = read(num_beams=9, max_length=7, temperature=0.5, min_length=5, bad_words_ids=[[3, 4]], forced_eos_token_id=2)
    again = read(**json.loads(json.dumps(source.searched(config))))
    assert again.decode({"max_tokens": again.room(1, 0)}) == config and again.sampling({}).temperature == 0
    assert config.rules(again.rules()) == config.rules(source.alone().rules())
    assert read(**read().searched(DecodeConfig())).decode({}) == DecodeConfig()


@pytest.mark.parametrize(
    "given",
    [{"bad_words_ids": [3]}, {"stop_strings": [""]}, {"sequence_bias": [[3, 1.0]]}, {"exponential_decay_length_penalty": 5},
     {"num_beams": "many"}, {"early_stopping": "soon"}, {"suppress_tokens": [1.5]}, {"top_k": []}],
)  # fmt: skip
def test_a_setting_of_the_wrong_kind_is_one_line(given):
    name = list(given)[-1]
    with pytest.raises(ValueError, match=rf"^generation_config.json: {name} is .*"):
        read(**given)


def test_requests_of_an_engine_hold_what_they_can():
    """What a request leaves out is the model's own; what an engine cannot do is named."""
    tokenizer = train_tokenizer(TokenizerConfig("bytes"), [])
    settings = read(
        do_sample=True, temperature=0.6, repetition_penalty=1.2, suppress_tokens=[7], bad_words_ids=[[8, 9], [tokenizer.eos_id]],
        min_new_tokens=3, max_new_tokens=20, no_repeat_ngram_size=2, num_beams=4,
    )  # fmt: skip
    asker = Asker(tokenizer, None, [], Limits(64, 64, 4, 4), settings=settings)
    (one,) = asker.completion({"prompt": "ab"}).requests
    assert one.sample == SampleConfig(0.6, top_k=50, top_p=1.0, min_p=0.0, repetition_penalty=1.2)
    assert one.bad == ((7,), (8, 9)) and one.min_tokens == 3, "what ends a text is no bad word"
    (other,) = asker.completion({"prompt": "ab", "temperature": 0, "top_k": 5, "min_tokens": 0, "repetition_penalty": 1}).requests
    assert other.sample == SampleConfig(0.0, top_k=5, top_p=1.0, min_p=0.0) and other.min_tokens == 0
    assert set(asker.left_out) == {"no_repeat_ngram_size", "num_beams"}
    stopping = Asker(tokenizer, None, [], Limits(64, 64, 4, 4), settings=read(stop_strings=["\n", "END"]))
    assert stopping.completion({"prompt": "ab"}).stop == ("\n", "END")
    assert stopping.completion({"prompt": "ab", "stop": "x"}).stop == ("x",)
    assert stopping.completion({"prompt": "ab", "stop": []}).stop == ()


# --- commands against transformers ------------------------------------------------------------


def folder_of(name: str, tmp_path: pathlib.Path, settings: dict, legacy: bool = False):
    """A small torch model of many opinions in a folder, with a tokenizer whose words are "w0" to "w60"."""
    import torch
    import transformers

    theirs = make(*CASES["gpt2"]) if name == "gpt2" else make("BartForConditionalGeneration", {**BART, "decoder_layers": 2})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            if parameter.ndim > 1 and "shared" not in parameter_name:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    ids = {"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0, **({"decoder_start_token_id": 2} if name == "bart" else {})}
    for key, value in ids.items():
        setattr(theirs.config, key, value)
    if hasattr(theirs.config, "forced_eos_token_id"):
        theirs.config.forced_eos_token_id = None
    theirs.generation_config = transformers.GenerationConfig(**ids, **settings)
    words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w2", pad_token="w1", bos_token="w0", unk_token="w3"
    )
    folder = tmp_path / name
    theirs.save_pretrained(folder)
    fast.save_pretrained(folder)
    return theirs, fast, folder


def written(theirs, fast, text: str, **options) -> str:
    ids = fast(text, return_tensors="pt", return_token_type_ids=False)
    out = theirs.generate(**ids, **options)[0]
    new = out[1:] if theirs.config.is_encoder_decoder else out[ids["input_ids"].shape[1] :]
    return fast.decode([token for token in new.tolist() if token not in (0, 1, 2)])


PROMPTS = ["w5 w9 w12 w33", "w40 w41 w5 w6"]
BEAMS = {"num_beams": 3, "no_repeat_ngram_size": 2, "length_penalty": 0.5, "early_stopping": True, "max_new_tokens": 10,
         "min_new_tokens": 4, "repetition_penalty": 1.2, "suppress_tokens": [20, 21]}  # fmt: skip


def answers(folder, tmp_path, *flags: str) -> list[str]:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf8")
    out = tmp_path / "answers.jsonl"
    out.unlink(missing_ok=True)
    assert cli.main(["generate", str(folder), "--file", str(tmp_path / "prompts.txt"), "--out", str(out), *flags]) == 0
    lines = [json.loads(line) for line in out.read_text(encoding="utf8").splitlines()]
    return [" ".join(line["text"].split()) for line in sorted(lines, key=lambda line: line["index"])]


@pytest.mark.parity
def test_a_decoders_settings_reach_its_texts(tmp_path, capsys):
    """`generate`, with a prompt and with a file, gives transformers' texts by the folder's own settings; flags override them, and
    without the file the texts are others."""
    theirs, fast, folder = folder_of("gpt2", tmp_path, BEAMS)
    expected = [written(theirs, fast, text) for text in PROMPTS]
    assert answers(folder, tmp_path) == expected
    told = capsys.readouterr().out.splitlines()[0]
    assert told.startswith("generation_config.json: ") and "num_beams 3" in told and "suppress_tokens (20, 21)" in told
    assert cli.main(["generate", str(folder), "--prompt", PROMPTS[0]]) == 0
    shown = capsys.readouterr()
    assert " ".join(shown.out.split()) == f"{PROMPTS[0]} {expected[0]}".strip() and "num_beams 3" in shown.err
    greedy = [written(theirs, fast, text, num_beams=1, no_repeat_ngram_size=0, early_stopping=False) for text in PROMPTS]
    assert greedy != expected
    assert answers(folder, tmp_path, "--beams", "1", "--no-repeat-ngram-size", "0", "--temperature", "0") == greedy
    plain = answers(folder, tmp_path, "--generation-config", "none", "--temperature", "0", "--max-tokens", "10")
    assert plain not in (expected, greedy)
    # A stop string ends a text, and is its end; the tokens behind it were computed for nothing in a batch.
    words = greedy[0].split()
    end = next(i for i, word in enumerate(words) if i > 1 and len(word) == 3 and word not in words[:i])
    stop = words[end]
    file = folder / "generation_config.json"
    saved = json.loads(file.read_text())
    changed = {"num_beams": 1, "no_repeat_ngram_size": 0, "early_stopping": False, "stop_strings": [stop]}
    file.write_text(json.dumps(saved | changed))
    stopped = [" ".join(text.partition(stop)[:2]).replace("  ", " ").strip() for text in greedy]
    assert stopped[0].split() == words[: end + 1] and end + 1 < len(words)
    assert answers(folder, tmp_path, "--temperature", "0") == stopped
    capsys.readouterr()
    assert cli.main(["generate", str(folder), "--prompt", PROMPTS[0], "--temperature", "0"]) == 0
    shown = capsys.readouterr()
    assert " ".join(shown.out.split()) == f"{PROMPTS[0]} {stopped[0]}" and f"stop_strings ('{stop}',)" in shown.err
    file.write_text(json.dumps(saved))
    capsys.readouterr()
    assert cli.main(["generate", str(folder), "--prompt", "w5", "--penalty-alpha", "0.5", "--top-k", "2", "--max-tokens", "2"]) == 0
    told = capsys.readouterr().err
    assert "overridden: max_new_tokens; not applied: " in told and "suppress_tokens" in told, "contrastive search has none of them"


@pytest.mark.parity
def test_an_encoder_decoders_settings_reach_its_texts_and_its_export(tmp_path, capsys):
    """BART's forced first token, bad words and beams, in `generate` and `predict`; a written folder has the same settings."""
    forced = {**BEAMS, "forced_bos_token_id": 30, "bad_words_ids": [[11], [30, 17]], "forced_eos_token_id": 2}
    theirs, fast, folder = folder_of("bart", tmp_path, forced)
    expected = [written(theirs, fast, text) for text in PROMPTS]
    assert all(text.startswith("w30") for text in expected)
    assert answers(folder, tmp_path) == expected
    for text, own in zip(PROMPTS, expected, strict=True):
        capsys.readouterr()
        assert cli.main(["predict", str(folder), "--text", text]) == 0
        told, *lines = capsys.readouterr().out.splitlines()
        assert "forced_bos_token_id 30" in told and [" ".join(line.split()) for line in lines] == [own]
    assert cli.main(["export", str(folder), str(tmp_path / "out"), "--dtype", "auto"]) == 0
    before, after = (json.loads((place / "generation_config.json").read_text()) for place in (folder, tmp_path / "out"))
    assert after == {name: value for name, value in before.items() if value is not None}
    # Older folders hold the settings in config.json.
    file = folder / "config.json"
    (folder / "generation_config.json").unlink()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"no_repeat_ngram_size": 2, "num_beams": 3}))
    assert load_model(str(folder)).generation().decode({}).beams == 3
    assert cli.main(["export", str(folder), str(tmp_path / "older")]) == 0
    assert json.loads((tmp_path / "older" / "generation_config.json").read_text())["no_repeat_ngram_size"] == 2


# --- precision and devices --------------------------------------------------------------------


@pytest.mark.parity
def test_a_model_is_read_in_its_own_precision_onto_any_mesh(tmp_path):
    """bfloat16 and float16 files are held as they are, each parameter once, an adapter as its base model; eight devices give the
    tokens and labels of one."""
    theirs, _, folder = folder_of("gpt2", tmp_path, {})
    base, tune = load_model(str(folder)), TuneConfig(None, LoraConfig(2, 4.0))
    trained, _ = Tuning(tune, base.model).split(base.params, jax.random.key(0))
    adapter = save_adapter(tmp_path / "adapter", tune, trained, base.model, "gpt2", str(folder))
    for dtype, kind in (("bfloat16", theirs.bfloat16), ("float16", theirs.half)):
        kind().save_pretrained(folder)
        for asked, held in (("auto", dtype), (None, "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")):
            loaded = load_model(str(folder), options=LoadOptions(asked))
            assert held_dtype(loaded.params) == held and len({leaf.dtype for leaf in jax.tree.leaves(loaded.params)}) == 1
        adapted = load_model(str(adapter), options=LoadOptions("auto"))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(adapted.params)} == {dtype}
        assert adapted.model.config.dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
    one = load_model(str(folder), options=LoadOptions("auto"))
    eight = load_model(str(folder), options=LoadOptions("auto", MeshOptions(data=2, fsdp=2, tensor=2)))
    largest = max(jax.tree.leaves(eight.params), key=lambda leaf: leaf.size)
    assert len(largest.sharding.device_set) == 8 and largest.addressable_shards[0].data.size <= largest.size // 2
    prompts = [[5, 9, 12], [40, 41]]
    texts = [
        (
            BatchGenerator(m.model, m.mesh, 61, pad_id=1)(m.params, prompts, DecodeConfig(6), [2]),
            list(Generator(m.model, m.mesh, 61).stream(m.params, prompts[0], 6, SampleConfig(0))),
        )
        for m in (one, eight)
    ]
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="tensor 16 needs 16 devices: there are 8"):
        load_model(str(folder), options=LoadOptions(None, MeshOptions(tensor=16)))
    np.testing.assert_equal(dataclasses.asdict(MeshOptions())["data"], 1)


@pytest.mark.parity
def test_labels_on_a_mesh_are_those_of_one_device(tmp_path):
    """`predict` of a classifier on eight devices, fewer rows than copies among them; bfloat16 within its own rounding."""
    import transformers

    theirs = make("BertForSequenceClassification", {**BASE, "num_labels": 3, "num_hidden_layers": 1})
    theirs.config.id2label = {0: "good", 1: "bad", 2: "so so"}
    folder = tmp_path / "bert"
    theirs.save_pretrained(folder)
    words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "w3", "pad_token": "w1", "sep_token": "w2", "cls_token": "w0"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    (tmp_path / "rows.txt").write_text("w5 w9 w12\nw40\nw6 w7\n", encoding="utf8")

    def predicted(*flags: str) -> list[dict]:
        out = tmp_path / "out.jsonl"
        assert cli.main(["predict", str(folder), "--file", str(tmp_path / "rows.txt"), "--out", str(out), *flags]) == 0
        return [json.loads(line)["prediction"] for line in out.read_text(encoding="utf8").splitlines()]

    one = predicted()
    assert {p["label"] for p in one} <= {"good", "bad", "so so"}
    for flags, close in (
        (["--parallel.data", "2", "--parallel.fsdp", "2", "--parallel.tensor", "2"], 1e-5), (["--dtype", "bfloat16"], 0.03),
    ):  # fmt: skip
        other = predicted(*flags)
        assert [p["label"] for p in other] == [p["label"] for p in one], flags
        np.testing.assert_allclose([p["probability"] for p in other], [p["probability"] for p in one], atol=close)


def test_layers_are_unstacked_one_parameter_at_a_time():
    """The same arrays as all at once; never more is held than the model and one of its parameters."""
    from jaxlm.model import Model, TransformerConfig
    from jaxlm.models import Trained, one_device

    model = Model(TransformerConfig(vocab_size=40, positions=16, layers=3, width=16, heads=2))

    def trained() -> Trained:
        return Trained(model, jax.jit(model.init)(jax.random.key(0)), one_device(), "", pathlib.Path())

    given = trained()
    stacked = jax.tree.leaves(given.params["transformer"]["decoder"]["layers"])
    held = []

    class Counted(Model):
        def apart(self, params):
            held.append(sum(not leaf.is_deleted() for leaf in stacked))
            return super().apart(params)

    freed = dataclasses.replace(given, model=Counted(model.config)).for_writing(free=True)
    jax.tree.map(np.testing.assert_array_equal, freed.params, trained().for_writing().params)
    assert all(leaf.is_deleted() for leaf in stacked)
    assert held == list(range(len(stacked), 0, -1)), "each is deleted before the next one's layers are made"


@pytest.mark.slow
@pytest.mark.parity
def test_a_run_keeps_the_constraints_of_the_model_that_it_starts_from(tmp_path, capsys, monkeypatch):
    """Fine-tuned for one step, BART still begins with its forced token, in the run's own predictions, in `predict` and once
    exported; lengths and beams are the run's."""
    monkeypatch.chdir(tmp_path)
    _, _, folder = folder_of("bart", tmp_path, {"forced_bos_token_id": 30, "suppress_tokens": [7], "num_beams": 4, "min_length": 9})
    rows = [{"source": f"w5 w{i}", "target": f"w12 w{i}"} for i in range(30, 50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    (tmp_path / "mine.yaml").write_text(
        f"task: {{kind: text_to_text, target_length: 8, decode: {{max_tokens: 4}}}}\nmodel: {{init_from: {folder}}}\n"
        "data: {train: rows.jsonl, length: 16, batch_size: 8}\ntrain: {steps: 1}\n"
    )
    assert cli.main(["train", "mine.yaml"]) == 0
    lines = (tmp_path / "runs" / "mine" / "predictions.jsonl").read_text(encoding="utf8").splitlines()
    predicted = [json.loads(line)["prediction"]["text"] for line in lines]
    assert predicted and all(text.split()[0] == "w30" for text in predicted)
    capsys.readouterr()
    assert cli.main(["predict", "runs/mine", "--text", "w5 w9"]) == 0
    told, line = capsys.readouterr().out.splitlines()
    assert "forced_bos_token_id 30" in told and "num_beams" not in told and line.split()[0] == "w30"
    assert cli.main(["export", "runs/mine", "out"]) == 0
    written_settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written_settings["forced_bos_token_id"] == 30 and written_settings["suppress_tokens"] == [7]
    assert written_settings["eos_token_id"] == 2
    assert (written_settings["num_beams"], written_settings["max_new_tokens"]) == (1, 4) and "min_length" not in written_settings
