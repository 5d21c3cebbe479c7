"""Contract: what a text, a pair or a conversation becomes in ids is the tokenizer's business, at every entry point.

Ids are caught where they enter the model and compared with those that transformers gives with the same folder. Models have no
parameters here and nothing is compiled.
"""

import json
import pathlib
import sys
import types

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import jaxlm.generate
from jaxlm import cli, overview
from jaxlm.data import TokenizerConfig, framed, load_tokenizer, train_tokenizer
from jaxlm.generate import GenerationSettings
from jaxlm.harness import Scorer
from jaxlm.hub.saving import copy_tokenizer
from jaxlm.model import HeadConfig, Model, TransformerConfig
from jaxlm.models import Trained, one_device
from jaxlm.tasks import TASKS, TaskConfig

sys.path.append(str(pathlib.Path(__file__).parent / "serve"))
from fake_engine import FakeEngine

CORPUS = ["the small red fox saw a big dog near the old river and then it ran home. " * 3, "User: what? Assistant: yes\n"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else "
    "' ' + m['content'] + eos_token }}{% endfor %}"
)
BYTES = pre_tokenizers.ByteLevel.alphabet()


def byte_level(special):
    rust = tokenizers.Tokenizer(models.BPE())
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    rust.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=BYTES, show_progress=False)
    )
    return rust


def sentence_piece():
    special = ["<unk>", "<s>", "</s>"]
    rust = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    rust.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=pieces, show_progress=False))
    definition = json.loads(rust.to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] in special]
    rust = tokenizers.Tokenizer.from_str(json.dumps(definition))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(steps)
    return rust


def around(rust, single, pair, *names):
    rust.post_processor = processors.TemplateProcessing(single, pair, [(name, rust.token_to_id(name)) for name in names])
    return rust


def hugging_face(name):
    """A tokenizer of transformers, and the architecture of the models that have its kind."""
    fast = transformers.PreTrainedTokenizerFast
    llama_names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if name in ("gpt2", "gpt2-bos", "qwen"):
        rust = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        if name == "gpt2-bos":
            around(rust, "<|endoftext|> $A", "<|endoftext|> $A <|endoftext|> $B", "<|endoftext|>")
        if name == "qwen":
            made = fast(tokenizer_object=rust, eos_token="<|im_end|>", pad_token="<|endoftext|>")
            made.chat_template = CHATML
            return made, "decoder"
        return fast(tokenizer_object=rust, bos_token="<|endoftext|>", eos_token="<|endoftext|>"), "decoder"
    if name.startswith("llama"):
        rust = sentence_piece()
        if name != "llama-bare":
            end = " </s>" if name == "llama-eos" else ""
            around(rust, f"<s> $A{end}", f"<s> $A{end} <s> $B{end}", "<s>", "</s>")
        made = fast(tokenizer_object=rust, **llama_names)
        if name == "llama-chat":
            made.chat_template = INST
        if name == "llama-chatml":  # a template that writes no <s>
            made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
            made.chat_template = CHATML
        return made, "decoder"
    if name.startswith("bert"):
        rust = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        rust.normalizer, rust.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        rust.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False))
        rust.decoder = decoders.WordPiece()
        if name == "bert":
            around(rust, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", "[CLS]", "[SEP]")
        names = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
        return fast(tokenizer_object=rust, **names), "encoder"
    if name == "roberta":
        rust = byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
        rust.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
        names = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
        return fast(tokenizer_object=rust, **{f"{role}_token": text for role, text in names.items()}), "encoder"
    if name == "bart":
        rust = byte_level(["<s>", "<pad>", "</s>"])
        rust.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
        return fast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", pad_token="<pad>"), "encoder_decoder"
    rust = tokenizers.Tokenizer(models.Unigram())
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    rust.train_from_iterator(CORPUS, trainer)
    if name == "t5":
        around(rust, "$A </s>", "$A </s> $B </s>", "</s>")
    return fast(tokenizer_object=rust, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"), "encoder_decoder"


OWN = {
    "own-bytes": (TokenizerConfig("bytes"), "decoder"), "own-bpe": (TokenizerConfig(vocab_size=300), "decoder"),
    "own-characters": (TokenizerConfig("characters"), "decoder"),
    "own-encoder": (TokenizerConfig(vocab_size=300, special=("pad", "cls", "sep", "mask")), "encoder"),
    "own-plain-encoder": (TokenizerConfig("bytes", special=("mask",)), "encoder"),
    "own-seq2seq": (TokenizerConfig(vocab_size=300, sentinels=2), "encoder_decoder"),
}  # fmt: skip
DECODERS = ["gpt2", "gpt2-bos", "qwen", "llama", "llama-bare", "llama-eos", "llama-chat", "llama-chatml",
            "own-bytes", "own-bpe", "own-characters"]  # fmt: skip
ENCODERS = ["bert", "bert-bare", "roberta", "own-encoder", "own-plain-encoder"]
SEQ2SEQ = ["t5", "t5-bare", "bart", "own-seq2seq"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Function: name → a folder with that tokenizer's files, made once."""
    root = tmp_path_factory.mktemp("folders")

    def folder(name):
        if not (root / name).exists():
            if name in OWN:
                config, architecture = OWN[name]
                framed(train_tokenizer(config, CORPUS), "auto", architecture=architecture).save(root / name)
            else:
                hugging_face(name)[0].save_pretrained(root / name)
        return root / name

    return folder


def architecture_of(name):
    return OWN[name][1] if name in OWN else hugging_face(name)[1]


def open_both(folder):
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


def trained(folder, architecture, head="language_model", **more):
    config = TransformerConfig(
        architecture=architecture, vocab_size=400, positions=128, layers=1, width=16, heads=2, head=HeadConfig(kind=head, **more)
    )
    theirs = {"id2label": {"0": "bad", "1": "good"}} if head == "sequence" else {}
    return Trained(Model(config), {}, one_device(), "model", folder, theirs=theirs)


def texts_for(hf):
    """Plain ones, spaces, another script, one that spells special tokens, none at all."""
    eos = hf.eos_token or hf.sep_token
    return ["the small fox", "  saw a  dog ", "é🎉 river", f"the{eos} old{eos}", ""]


def expected(hf, tokenizer, text, pair=None):
    """transformers' ids; of nothing at all the begin token, which `generate` of transformers begins with."""
    ids = hf(text)["input_ids"] if pair is None else hf(text, pair)["input_ids"]
    return ids or [tokenizer.bos_id]


@pytest.fixture
def caught(monkeypatch):
    """Function: `caught(trained)` puts the model behind the commands; it returns the list of the prompts that reach it."""
    prompts = []

    class Engine(FakeEngine):
        def submit(self, request, tell):
            prompts.append(list(request.prompt))
            return super().submit(request, tell)

    engine = Engine(context=128, fails=False)

    def stream(self, params, prompt, *args, **options):
        prompts.append(list(prompt))
        return iter(())

    def put(made):
        from jaxlm import models
        from jaxlm.serve import speaking

        monkeypatch.setattr(Trained, "for_writing", lambda self, **_: self)
        monkeypatch.setattr(Trained, "generation", lambda self: GenerationSettings())
        monkeypatch.setattr(models, "load_model", lambda *_, **__: made)
        monkeypatch.setattr(speaking, "open_engine", lambda *_, **__: engine)
        monkeypatch.setattr(jaxlm.generate.Generator, "stream", stream)
        return prompts

    put.engine = engine
    yield put
    engine.close()


# --- decoders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_prompts(folders, caught, tmp_path, name):
    """generate, generate --file, /v1/completions, /v1/embeddings."""
    from jaxlm.serve.asks import Asker, Limits
    from jaxlm.serve.rows import vectors_of

    tokenizer, hf = open_both(folders(name))
    made = trained(folders(name), "decoder")
    prompts = caught(made)
    texts = texts_for(hf)
    wanted = [expected(hf, tokenizer, text) for text in texts]
    for text in texts:
        assert cli.main(["generate", "model", "--prompt", text, "--max-tokens", "1"]) == 0
    assert prompts == wanted

    prompts.clear()
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    words = ["--file", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--max-tokens", "1"]
    assert cli.main(["generate", "model", *words]) == 0
    assert sorted(prompts) == sorted(wanted)

    asker = Asker(tokenizer, None, [], Limits(128, 128, 1, 16))
    asked = asker.completion({"prompt": texts, "max_tokens": 1})
    assert [list(request.prompt) for request in asked.requests] == wanted
    items = vectors_of(made).examples([{"text": text} for text in texts]).items
    assert [item["tokens"].tolist() for item in items] == wanted


@pytest.mark.parametrize("name", DECODERS)
def test_split_special_tokens_reads_them_as_text(folders, caught, tmp_path, capsys, name):
    tokenizer, hf = open_both(folders(name))
    prompts = caught(trained(folders(name), "decoder"))
    text = texts_for(hf)[3]
    assert cli.main(["generate", "model", "--prompt", text, "--split-special-tokens", "true"]) == 0
    wanted = hf(text, split_special_tokens=True)["input_ids"]
    (ids,) = prompts
    assert ids == wanted or (name in ("own-characters",) and tokenizer.eos_id not in ids[1:])
    (tmp_path / "in.txt").write_text(f"{text}\nthe fox\n")
    for flag, says in (("false", "1 texts spell a special token, which is read as that token"), ("true", "as ordinary text")):
        out = str(tmp_path / f"{flag}.jsonl")
        words = ["--file", str(tmp_path / "in.txt"), "--out", out, "--max-tokens", "1", "--split-special-tokens", flag]
        assert cli.main(["generate", "model", *words]) == 0 and says in " ".join(capsys.readouterr().out.split())


TALK = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "saw"}, {"role": "user", "content": " a dog\n"}]


@pytest.mark.parametrize("name", ["qwen", "llama-chat", "llama-chatml"])
def test_conversations(folders, caught, tmp_path, name):
    """chat, generate --file, /v1/chat/completions, rows of task chat; one of them spells the end of a turn."""
    from jaxlm.serve.asks import Asker, Limits
    from jaxlm.serve.speaking import chat_of
    from jaxlm.verbs.chatting import ChatOptions, Conversation
    from jaxlm.verbs.decoding import decoding_of

    tokenizer, hf = open_both(folders(name))
    made = trained(folders(name), "decoder")
    prompts = caught(made)
    talks = [TALK, [{"role": "user", "content": f"x{hf.eos_token}y"}]]
    wanted = [hf.apply_chat_template(talk, add_generation_prompt=True)["input_ids"] for talk in talks]

    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    words = ["--file", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--max-tokens", "1"]
    assert cli.main(["generate", "model", *words]) == 0
    assert sorted(prompts) == sorted(wanted)

    asker = Asker(tokenizer, chat_of(made)[0], [], Limits(128, 128, 1, 16))
    for talk, ids in zip(talks, wanted, strict=True):
        (request,) = asker.conversation({"messages": talk, "max_tokens": 1}).requests
        assert list(request.prompt) == ids

    prompts.clear()
    options = ChatOptions(max_tokens=1)
    conversation = Conversation(made, caught.engine, options, decoding_of(made, options, 1))
    conversation.messages = TALK[:2]
    conversation.answer(TALK[2]["content"], lambda text: None)
    assert prompts == wanted[:1]

    whole = [*TALK, {"role": "assistant", "content": f"yes{hf.eos_token} no"}]
    task = TASKS["chat"](TaskConfig(kind="chat"), tokenizer, 128, architecture="decoder")
    (item,) = task.examples([{"messages": whole}]).items
    n = int((item["segments"] > 0).sum())
    assert [item["tokens"][0], *item["targets"][:n]] == hf.apply_chat_template(whole)["input_ids"]
    assert task.prompts([{"messages": TALK}]) == wanted[:1]
    assert task.spelled == 1


@pytest.mark.parametrize("name", DECODERS)
def test_rows_that_a_decoder_learns_to_continue(folders, name):
    """The prompt is `tokenizer(text)`; the target follows without the tokenizer's special tokens, and ends as `append_eos` says."""
    tokenizer, hf = open_both(folders(name))
    bare = hf(" ran home", add_special_tokens=False)["input_ids"]
    for append in (True, False):
        end = [tokenizer.eos_id] * append
        config = TaskConfig(kind="text_to_text", template="{source}", append_eos=append, target_length=32)
        task = TASKS["text_to_text"](config, tokenizer, 128, architecture="decoder")
        for text in texts_for(hf):
            (item,) = task.examples([{"source": text, "target": " ran home"}]).items
            before = expected(hf, tokenizer, text)
            assert [*item["tokens"][:1], *item["targets"]] == [*before, *bare, *end]
            assert task.prompts([{"source": text}]) == [before]
            np.testing.assert_array_equal(item["weights"], [*[0] * (len(before) - 1), *[1] * (len(bare) + append)])
        config = TaskConfig(kind="preference", append_eos=append)
        task = TASKS["preference"](config, tokenizer, 128, architecture="decoder")
        for text in texts_for(hf):
            (item,) = task.examples([{"prompt": text, "chosen": " ran home", "rejected": " no"}]).items
            assert [*item["chosen"]["tokens"][:1], *item["chosen"]["targets"]] == [*expected(hf, tokenizer, text), *bare, *end]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("name", [name for name in DECODERS if name != "own-characters"])
def test_a_completions_text_tokens_and_offsets_agree(folders, name, echo):
    """The text is transformers', decoded behind its prompt; each token is the part of the text at its offset, the first one too."""
    from jaxlm.generate.request import Event, Token
    from jaxlm.serve.answers import CompletionAnswer
    from jaxlm.serve.asks import Asker, Limits
    from jaxlm.serve.choices import _Text
    from jaxlm.serve.tokens import TokenTexts

    tokenizer, hf = open_both(folders(name))
    asker = Asker(tokenizer, None, [], Limits(128, 128, 1, 16))
    new = hf(" saw a big dog", add_special_tokens=False)["input_ids"]
    for prompt in ("the small", "ran", ""):
        ask = asker.completion({"prompt": prompt, "max_tokens": 32, "logprobs": 1, "echo": echo})
        ids, text = list(ask.requests[0].prompt), _Text(0, tokenizer, ask)
        pieces = [text.take(Event(prompt=tuple(Token(i, -1.0, ((i, -1.0),)) for i in ids)))] if echo else []
        pieces += [text.take(Event(tokens=(Token(i, -1.0, ((i, -1.0),)),))) for i in new]
        pieces.append(text.take(Event(ended="length")))
        whole, tokens = "".join(piece.text for piece in pieces), [token for piece in pieces for token in piece.tokens]
        behind = hf.decode([*ids, *new], skip_special_tokens=True)[len(hf.decode(ids, skip_special_tokens=True)) :]
        assert whole == (prompt if echo else "") + behind
        told = CompletionAnswer("model", ask, TokenTexts(tokenizer)).logprobs(tokens)
        if hf.eos_token_id in ids[1:]:  # written after the prompt by its tokenizer: a token without text
            continue
        assert "".join(told["tokens"]) == whole
        lengths = [len(token) for token in told["tokens"]]
        assert told["text_offset"] == np.cumsum([0, *lengths])[:-1].tolist()
        assert [list(top) for top in told["top_logprobs"]] == [[token] for token in told["tokens"]]


@pytest.mark.parametrize("name", DECODERS)
def test_suites_and_diff(folders, monkeypatch, name):
    """Contexts and continuations as lm-evaluation-harness encodes them for a model of transformers; both sides of `diff`."""
    tokenizer, hf = open_both(folders(name))
    made = trained(folders(name), "decoder")
    rows = []

    def run(self, title, examples):
        rows.extend(examples)
        return [types.SimpleNamespace(logprob=0.0, greedy=True)] * len(examples)

    monkeypatch.setattr(Scorer, "_run", run)
    scorer = Scorer(made)
    pairs = [("the small fox", " saw a dog"), ("the fox ", "ran"), (texts_for(hf)[3], " ran"), ("", "the dog")]
    scorer.continuations(pairs)
    for (context, continuation), row in zip(pairs, rows, strict=True):
        context, moved = context.rstrip(), context[len(context.rstrip()) :]
        without = {"add_special_tokens": False} if name == "llama-eos" else {}  # an end within a text is left out
        whole = hf(context + moved + continuation, **without)["input_ids"]
        before = hf(context, **without)["input_ids"]
        if name == "llama-eos":
            whole, before = [1, *whole], [1, *before]
        ids = [*(before or [tokenizer.bos_id]), *whole[len(before) :]]
        assert [row["tokens"][0], *row["targets"]] == ids
        assert row["weights"].sum() == len(whole) - len(before)

    rows.clear()
    monkeypatch.setattr(overview, "_outputs", lambda side, ids: (rows.append(ids), [np.zeros((len(ids), 4))])[1])
    overview.compare(made, made, "the small fox", 64)
    assert [ids.ravel().tolist() for ids in rows] == [hf("the small fox")["input_ids"]] * 2


# --- models over labels, and encoder-decoders ------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS + DECODERS)
def test_rows_of_labels(folders, name):
    """Texts and pairs of predict, /classify and fine-tuning: classes, numbers, vectors, rewards, choices, spans, tags."""
    tokenizer, hf = open_both(folders(name))
    architecture = architecture_of(name)
    texts, pair = texts_for(hf), "saw a dog"

    def items(kind, rows, **more):
        config = TaskConfig(kind=kind, labels=("bad", "good") if kind in ("classification", "tagging") else ())
        return TASKS[kind](config, tokenizer, 128, architecture=architecture, **more).examples(rows).items

    def types_of(text):
        return hf(text, pair, return_token_type_ids=True)["token_type_ids"]

    singles = [expected(hf, tokenizer, text) for text in texts]
    pairs = [expected(hf, tokenizer, text, pair) for text in texts]
    made = trained(folders(name), architecture, "sequence", labels=2).task()
    for task in (made, TASKS["regression"](TaskConfig(kind="regression"), tokenizer, 128, architecture=architecture)):
        found = task.examples([{"text": text} for text in texts]).items
        assert [item["tokens"].tolist() for item in found] == singles
        found = task.examples([{"text": text, "pair": pair} for text in texts]).items
        assert [item["tokens"].tolist() for item in found] == pairs
        if name.startswith("bert") or name in ("own-encoder", "own-plain-encoder"):
            assert [item["types"].tolist() for item in found] == [types_of(text) for text in texts]
    found = items("embedding", [{"text": text, "pair": pair} for text in texts])
    assert [item["anchor"]["tokens"].tolist() for item in found] == singles
    assert found[0]["positive"]["tokens"].tolist() == hf(pair)["input_ids"]
    found = items("reward", [{"prompt": text, "chosen": " ran", "rejected": " saw"} for text in texts])
    assert [item["chosen"]["tokens"].tolist() for item in found] == [hf(text + " ran")["input_ids"] for text in texts]
    (item,) = items("multiple_choice", [{"question": "the fox", "choices": ["ran", "saw a dog"], "label": 0}])
    longest = hf("the fox", "saw a dog")["input_ids"]
    assert item["tokens"][1].tolist() == longest and longest != hf("the fox", "ran")["input_ids"]
    assert item["tokens"][0][: len(hf("the fox", "ran")["input_ids"])].tolist() == hf("the fox", "ran")["input_ids"]
    answers = {"text": ["dog"], "answer_start": [6]}
    (item,) = items("extractive_qa", [{"question": "the fox", "context": pair, "answers": answers}])
    assert item["tokens"].tolist() == hf("the fox", pair)["input_ids"]


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_sources_and_targets_of_an_encoder_decoder(folders, caught, monkeypatch, tmp_path, name):
    """generate, generate --file and fine-tuning."""
    tokenizer, hf = open_both(folders(name))
    caught(trained(folders(name), "encoder_decoder"))
    read = []

    def write(self, params, prompts, *args, **options):
        read.extend(map(list, prompts))
        return [[] for _ in prompts]

    monkeypatch.setattr(jaxlm.generate.BatchGenerator, "__call__", write)
    texts = texts_for(hf)
    wanted = [expected(hf, tokenizer, text) for text in texts]
    for text in texts:
        assert cli.main(["generate", "model", "--prompt", text, "--temperature", "0"]) == 0
    assert read == wanted
    read.clear()
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    words = ["--file", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--temperature", "0"]
    assert cli.main(["generate", "model", *words]) == 0
    assert sorted(read) == sorted(wanted)
    task = TASKS["text_to_text"](TaskConfig(kind="text_to_text"), tokenizer, 128, architecture="encoder_decoder", start_id=0)
    for text, ids in zip(texts, wanted, strict=True):
        (item,) = task.examples([{"source": text, "target": "ran home"}]).items
        assert item["encoder"]["tokens"].tolist() == ids
        target = hf("ran home")["input_ids"]
        assert item["decoder"]["targets"].tolist() == target + [tokenizer.eos_id] * (target[-1] != tokenizer.eos_id)
        assert item["decoder"]["tokens"].tolist() == [0, *item["decoder"]["targets"][:-1]]


# --- folders that are exported ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["own-bytes", "own-bpe", "own-encoder", "gpt2", "roberta", "bert", "llama"])
def test_an_exported_tagger_reads_words_in_transformers_as_it_did_in_training(folders, tmp_path, name):
    """The space before each word was not in the files."""
    tokenizer = load_tokenizer(folders(name))
    task = TASKS["tagging"](TaskConfig(kind="tagging", labels=("O", "X")), tokenizer, 64, architecture=architecture_of(name))
    words = ["the", "small", "fox,", "x"]
    (item,) = task.examples([{"tokens": words, "tags": ["O", "X", "O", "O"]}]).items
    task.saved_tokenizer.save(tmp_path / "run")
    (tmp_path / "exported").mkdir()
    copy_tokenizer(tmp_path / "run", tmp_path / "exported")
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert item["tokens"].tolist() == hf(words, is_split_into_words=True)["input_ids"]
    again = TASKS["tagging"](task.config, load_tokenizer(tmp_path / "exported"), 64, architecture=architecture_of(name))
    assert again.examples([{"tokens": words}]).items[0]["tokens"].tolist() == item["tokens"].tolist()


@pytest.mark.parametrize("name", ["own-bytes", "own-bpe", "own-characters", "llama", "qwen"])
def test_an_exported_chat_has_the_template_that_it_was_trained_with(folders, tmp_path, name):
    """Its folder held none, so transformers could not render a conversation."""
    template = None if name != "llama" else CHATML.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
    tokenizer = load_tokenizer(folders(name))
    task = TASKS["chat"](TaskConfig(kind="chat", chat_template=template), tokenizer, 128, architecture="decoder")
    task.saved_tokenizer.save(tmp_path / "run")
    (tmp_path / "exported").mkdir()
    copy_tokenizer(tmp_path / "run", tmp_path / "exported")
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert task.prompts([{"messages": TALK}]) == [hf.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]]
    again = TASKS["chat"](TaskConfig(kind="chat"), load_tokenizer(tmp_path / "exported"), 128, architecture="decoder")
    assert again.prompts([{"messages": TALK}]) == task.prompts([{"messages": TALK}])
