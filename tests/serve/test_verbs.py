"""`jaxlm generate --file` and `jaxlm chat` around a made-up engine, and `jaxlm serve` before it starts one."""

import json
import threading
import types

import pytest
from fake_engine import FakeEngine

from jaxlm import cli
from jaxlm.data import Chat, TokenizerConfig, train_tokenizer

LINES = [{"prompt": f"text {i}", "id": f"row-{i}"} for i in range(5)] + [{"messages": [{"role": "user", "content": "Hi"}]}]


@pytest.fixture
def engine(monkeypatch):
    """What the verbs load: a decoder of bytes, and the engine that says each prompt again."""
    from jaxlm import models
    from jaxlm.serve import speaking

    tokenizer = train_tokenizer(TokenizerConfig("bytes"), [])
    config = types.SimpleNamespace(architecture="decoder", positions=64)
    model = types.SimpleNamespace(config=config)
    trained = types.SimpleNamespace(model=model, tokenizer=tokenizer, name="parrot", stop_ids=list)
    made = FakeEngine(context=64)
    monkeypatch.setattr(models, "load_model", lambda argument: trained)
    monkeypatch.setattr(speaking, "open_engine", lambda *_, **__: made)
    monkeypatch.setattr(speaking, "chat_of", lambda _: (Chat(tokenizer), False))
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
        (['{"prompt": "a"}', "plain"], ["in.jsonl:2", "no JSON", ".txt"]),
        (['{"prompt": "a"}', "", "[1]"], ["in.jsonl:3", '"prompt" or "messages"']),
        (['{"text": "a"}'], ["in.jsonl:1"]),
        (['{"prompt": 3}'], ["prompt must be a text"]),
        (['{"prompt": "a", "messages": []}'], ["in.jsonl:1"]),
        (['{"messages": [{"role": "usr", "content": "x"}]}'], ["in.jsonl:1", "user"]),
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

    engine.delay, engine.says = 0.02, tuple(b"ha")
    pressed = threading.Timer(0.25, signal.raise_signal, [signal.SIGINT])

    def hi():
        pressed.start()
        return "Hi"

    def at_the_prompt():
        raise KeyboardInterrupt

    talk(monkeypatch, [hi, at_the_prompt, "Yo"], "--max-tokens", "20")
    out = capsys.readouterr().out
    assert len(engine.cancelled) == 1 and "/exit ends" in out
    second = prompts(engine)[1]
    assert second.startswith("User: Hi\nAssistant: ha") and second.endswith("User: Yo\nAssistant:")


def test_a_conversation_that_is_too_long_says_so(engine, monkeypatch, capsys):
    talk(monkeypatch, ["x" * 100, "Hi"])
    out = capsys.readouterr().out
    assert "context of 64 is full" in out and prompts(engine) == ["User: Hi\nAssistant:"]


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
