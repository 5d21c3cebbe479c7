"""`jaxlm generate --file` and `jaxlm chat` around a made-up engine, and `jaxlm serve` before it starts one."""

import dataclasses
import gc
import json
import threading
import time
import types

import jax
import numpy as np
import pytest
import tokenizers
from fake_engine import FakeEngine

from jaxlm import cli
from jaxlm.data import Chat, TokenizerConfig, framed, train_tokenizer
from jaxlm.generate import GenerationSettings

LINES = [{"prompt": f"text {i}", "id": f"row-{i}"} for i in range(5)] + [{"messages": [{"role": "user", "content": "Hi"}]}]


@pytest.fixture
def engine(monkeypatch):
    """What the verbs load: a decoder of bytes, and the engine that says each prompt again."""
    from jaxlm import models
    from jaxlm.serve import speaking

    tokenizer = framed(train_tokenizer(TokenizerConfig("bytes"), []), "auto", architecture="decoder")
    config = types.SimpleNamespace(architecture="decoder", positions=64)
    model = types.SimpleNamespace(config=config)
    trained = types.SimpleNamespace(
        model=model, tokenizer=tokenizer, name="parrot", stop_ids=list, reads=False, generation=GenerationSettings
    )
    made = FakeEngine(context=64)
    trained.for_writing = lambda **_: trained
    monkeypatch.setattr(models, "load_model", lambda argument, **options: trained)
    monkeypatch.setattr(speaking, "open_engine", lambda *_, **__: made)
    monkeypatch.setattr(speaking, "chat_of", lambda *_: (Chat(tokenizer), False))
    yield made
    made.close()


def write(path, lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), encoding="utf8")
    return path


def read(path):
    return sorted(map(json.loads, path.read_text(encoding="utf8").splitlines()), key=lambda line: line["index"])


def generate(file, out, *more):
    return cli.main(["generate", "model", "--file", str(file), "--out", str(out), "--max-tokens", "20", *more])


def test_each_line_of_a_file_has_an_answer(engine, tmp_path):
    file, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    assert generate(file, out, "--seed", "7", "--temperature", "0.5") == 0
    found = read(out)
    assert [line["text"] for line in found] == [*(f"text {i}" for i in range(5)), "User: Hi"]
    assert found[2] == {**LINES[2], "index": 2, "text": "text 2", "tokens": 6, "ended": "stop"}
    assert found[5]["messages"] == LINES[5]["messages"] and found[5]["ended"] == "stop"
    assert {r.seed - 7: r.sample.temperature for r in engine.seen} == dict.fromkeys(range(6), 0.5)


def test_answers_made_otherwise_are_not_continued(engine, tmp_path, capsys):
    """With another temperature, or by another model: the file stays as it is, whether it is whole or not."""
    file, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    assert generate(file, out, "--temperature", "0.5") == 0
    whole = out.read_bytes()
    half = b"".join(whole.splitlines(keepends=True)[:3])
    for held in (whole, half):
        out.write_bytes(held)
        assert generate(file, out, "--temperature", "0.7") == 1
        assert "temperature 0.5 → 0.7" in capsys.readouterr().err and out.read_bytes() == held
        assert cli.main(["generate", "another", "--file", str(file), "--out", str(out), "--max-tokens", "20"]) == 1
        assert "model model → another" in capsys.readouterr().err
    assert generate(file, out, "--temperature", "0.5") == 0
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_the_same_command_goes_on(engine, tmp_path, capsys):
    """Two answers and a half are there, as after a kill: the half one is done again, the whole ones are kept as they are."""
    file, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    kept = [{**LINES[i], "index": i, "text": "kept", "tokens": 1, "ended": "stop"} for i in (3, 0)]
    write(out, kept)
    with out.open("a") as half:
        half.write('{"index": 1, "te')
    assert generate(file, out) == 0
    assert [line["text"] for line in read(out)] == ["kept", "text 1", "text 2", "kept", "text 4", "User: Hi"]
    assert sorted(r.seed for r in engine.seen) == [1, 2, 4, 5]
    before = out.read_bytes()
    assert generate(file, out) == 0 and out.read_bytes() == before and "all 6 answers are there" in capsys.readouterr().out


def test_a_full_queue_is_waited_for(engine, tmp_path):
    engine.queue = 2
    file, out = write(tmp_path / "in.txt", [f"line {i}" for i in range(30)]), tmp_path / "out.jsonl"
    assert generate(file, out) == 0
    assert [line["text"] for line in read(out)] == [f"line {i}" for i in range(30)]


@pytest.mark.parametrize(
    "lines, says",
    [
        (['{"prompt": "a"}', "plain"], ["in.jsonl:2 is not JSON", ".txt"]),
        (['{"prompt": "a"}', "", "[1]"], ["in.jsonl:3", '"prompt" or "messages"']),
        (['{"text": "a"}'], ["in.jsonl:1"]),
        (['{"prompt": 3}'], ["prompt must be a text"]),
        (['{"prompt": "a", "messages": []}'], ["in.jsonl:1"]),
        (['{"messages": [{"role": "narrator", "content": "x"}]}'], ["in.jsonl:1", "user"]),
        ([], ["holds no line"]),
        ([json.dumps({"prompt": "x" * 80})], ["line 0", "81 tokens", "64"]),
    ],
)  # fmt: skip
def test_a_bad_line_is_told_before_anything_runs(engine, tmp_path, capsys, lines, says):
    out = tmp_path / "out.jsonl"
    assert generate(write(tmp_path / "in.jsonl", lines), out) == 1
    told = capsys.readouterr().err
    assert all(part in told for part in says) and told.count("\n") == 1
    assert not engine.seen and not out.exists()


def test_answers_to_other_prompts_are_not_mixed_in(engine, tmp_path, capsys):
    file, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    for line, says in (
        ({"prompt": "other", "id": "x", "index": 1}, "answers another prompt"),
        ({"a": 1}, "no answer"),
        ({"index": 99}, "no answer"),
    ):
        before = write(out, [line]).read_bytes()
        assert generate(file, out) == 1 and says in capsys.readouterr().err
        assert out.read_bytes() == before
    assert cli.main(["generate", "model", "--file", str(file)]) == 1 and "belong together" in capsys.readouterr().err


def test_answers_that_cannot_be_written_are_missed(engine, tmp_path, monkeypatch, capsys):
    from jaxlm.verbs import batches

    def full(self, index, *_):
        if index == 3:
            raise OSError("no space left")
        done(self, index, *_)

    done = batches.Answers.write
    monkeypatch.setattr(batches.Answers, "write", full)
    assert generate(write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl") == 2
    assert "1 answers could not be written" in capsys.readouterr().err


def test_a_model_that_fails_is_told_and_the_rest_is_kept(engine, tmp_path, capsys):
    file, out = write(tmp_path / "in.jsonl", [{"prompt": "good"}, {"prompt": "ba\x01d"}]), tmp_path / "out.jsonl"
    assert generate(file, out) == 2 and "a made-up fault" in capsys.readouterr().err
    assert [line["text"] for line in read(out)] == ["good"]


def test_answers_to_rows_with_missing_numbers_are_continued(tmp_path):
    """A column of numbers of which one is missing comes from parquet as NaN, which is not equal to itself."""
    from jaxlm.verbs.batches import Answers

    out, lines = str(tmp_path / "out.jsonl"), [{"prompt": "a", "n": float("nan")}]
    with Answers(out, lines) as answers:
        answers.write(0, "b", 1, "stop")
    assert Answers(out, lines).done == {0}


@pytest.mark.slow
def test_an_encoder_decoder_answers_a_file_by_search(tmp_path, monkeypatch):
    """Each answer is what its text has alone, the likeliest token each time, by hand and without a cache."""
    from test_vectors import trained

    from jaxlm import models

    made = trained(tmp_path, "encoder_decoder", {"kind": "language_model"})
    params = jax.tree.map(np.asarray, made.params)  # generating frees the model's own
    monkeypatch.setattr(models, "load_model", lambda argument, **options: made)
    texts = [f"a text of {i}" + " words" * (i % 3) for i in range(20)]
    file, out = write(tmp_path / "in.jsonl", [{"prompt": text} for text in texts]), tmp_path / "out.jsonl"
    assert generate(file, out, "--temperature", "0") == 0
    found, tokenizer, apply = read(out), made.tokenizer, jax.jit(made.model.apply)
    assert len(found) == 20
    for i in (0, 7, 19):
        source = np.array([[*texts[i].encode(), tokenizer.eos_id]], np.int32)
        written = [tokenizer.special["pad"]]
        while len(written) < 21:
            row = np.full((1, 24), 0, np.int32)
            row[0, : len(written)] = written
            batch = {"encoder": {"tokens_BL": source}, "decoder": {"tokens_BL": row}}
            logits = np.asarray(apply(params, batch)[0])[0, len(written) - 1, : tokenizer.vocab_size]
            if int(np.argmax(logits)) == tokenizer.eos_id:
                break
            written.append(int(np.argmax(logits)))
        assert found[i]["text"] == tokenizer.decode(written[1:]) and found[i]["tokens"] == len(written) - 1


# --- jaxlm chat -----------------------------------------------------------------------------------


def talk(monkeypatch, turns, *flags):
    """Type some turns; one that is a function is called when it is its turn, and may raise."""
    left = iter(turns)

    def typed(prompt):
        turn = next(left, None)
        if turn is None:
            raise EOFError
        return turn() if callable(turn) else turn

    monkeypatch.setattr("builtins.input", typed)
    assert cli.main(["chat", "model", *flags]) == 0


def prompts(engine):
    return [bytes(i for i in request.prompt if i < 256).decode() for request in engine.seen]


def test_a_conversation_goes_on_and_begins_anew(engine, monkeypatch, capsys):
    talk(monkeypatch, ["Hi", "", "/help", "Yo", "/reset", "Hm", "/exit", "never"], "--system", "S", "--seed", "3")
    out = capsys.readouterr().out
    assert prompts(engine) == [
        "System: S\nUser: Hi\nAssistant:",
        "System: S\nUser: Hi\nAssistant: System: SUser: Yo\nAssistant:",
        "System: S\nUser: Hm\nAssistant:",
    ]
    assert "unknown command '/help'" in out and "a new conversation" in out and engine.seen[0].seed == 3


def test_ctrl_c_stops_the_answer_and_not_the_program(engine, monkeypatch, capsys):
    """The engine writes slowly; Ctrl-C comes while it does. What was written is kept as the answer."""
    import signal

    engine.delay, engine.says = 0.05, tuple(b"ha")

    def press():  # once it writes: on a busy machine that may take a while
        while not any(count > 2 for _, _, count in list(engine.running.values())):
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    def hi():
        threading.Thread(target=press).start()
        return "Hi"

    def at_the_prompt():
        raise KeyboardInterrupt

    gc.disable()  # an exception that a signal raises within a callback of the collector (Hypothesis has one) is lost
    try:
        talk(monkeypatch, [hi, at_the_prompt, "Yo"], "--max-tokens", "20")
    finally:
        gc.enable()
    out = capsys.readouterr().out
    assert len(engine.cancelled) == 1 and "/exit ends" in out
    second = prompts(engine)[1]
    assert second.startswith("User: Hi\nAssistant: ha") and second.endswith("User: Yo\nAssistant:")


def test_a_conversation_that_is_too_long_says_so(engine, monkeypatch, capsys):
    talk(monkeypatch, ["x" * 100, "Hi"])
    out = capsys.readouterr().out
    assert "context of 64 is full" in out and prompts(engine) == ["User: Hi\nAssistant:"]


@pytest.mark.parametrize("template", [True, False])
def test_a_models_own_template_is_used(tmp_path, template):
    """ChatML's turns end with its own token; only the plain template has stop strings, and its model's page goes on with texts."""
    import transformers
    from test_vectors import trained

    from jaxlm.serve.speaking import chat_of, stop_ids, turns_of

    made = trained(tmp_path, "decoder", {"kind": "language_model"})
    if template:
        rust = tokenizers.Tokenizer.from_str(made.tokenizer.definition())
        hf = transformers.PreTrainedTokenizerFast(
            tokenizer_object=rust, eos_token="<|endoftext|>", additional_special_tokens=["<|im_end|>"]
        )
        hf.chat_template = (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
            "{{ 'assistant: ' if add_generation_prompt }}"
        )
        hf.save_pretrained(tmp_path / "theirs")
        made = dataclasses.replace(made, tokenizer_folder=tmp_path / "theirs")
    chat, made_for_it = chat_of(made)
    assert made_for_it == template and bool(turns_of(chat)) != template
    assert len(stop_ids(made, chat)) == 1 + template
    if template:
        (end,) = stop_ids(made, chat) - {made.tokenizer.eos_id}
        assert chat.prompt([{"role": "user", "content": "a"}]).tolist() == [*b"user: a", end, *b"assistant: "]


# --- jaxlm serve ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, says",
    [
        (["serve"], "MODEL is missing"),
        (["serve", "m", "--host", "0.0.0.0"], "set an API key"),
        (["serve", "m", "--slot", "3"], "did you mean '--slots'"),
        (["serve", "m", "--port", "99999"], "from 0 to 65535"),
        (["serve", "m", "--host", "203.0.113.7", "--api-key", "k", "--port", "1"], "cannot listen on 203.0.113.7:1"),
    ],
)
def test_serve_refuses_in_one_line(words, says, capsys, monkeypatch):
    monkeypatch.delenv("JAXLM_API_KEY", raising=False)
    assert cli.main(words) == 1
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1
