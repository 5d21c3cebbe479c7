"""jaxlm generate --file: an answer for each line of a file."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from jaxlm.report.console import bar, say
from jaxlm.text_files import json_line

Line = dict[str, Any]
SLOTS = 16


def read_lines(file: str) -> list[Line]:
    """Prompts of a file: JSON lines with `prompt` or `messages`, or a text a line (.txt). ValueError with the place of a line
    that is neither."""
    path = pathlib.Path(file)
    if not path.is_file():
        raise ValueError(f"no file {file!r}")
    lines = list(enumerate(path.read_text(encoding="utf8", errors="replace").split("\n"), 1))
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise ValueError(f"{file} holds no line")
    if path.suffix == ".txt":
        return [{"prompt": line.removesuffix("\r")} for _, line in lines]
    return [_line(line, f"{file}:{number}") for number, line in lines]


def _line(text: str, where: str) -> Line:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON ({error}); a file of plain texts is named .txt") from None
    given = [name for name in ("prompt", "messages") if isinstance(line, dict) and name in line]
    if len(given) != 1:
        raise ValueError(f'{where}: expected an object with "prompt" or "messages", got {text[:60]}')
    if given == ["prompt"] and not isinstance(line["prompt"], str):
        raise ValueError(f"{where}: prompt must be a text, got {line['prompt']!r:.60}")
    if given == ["messages"]:
        from jaxlm.data import check_messages

        check_messages(line["messages"], where, training=False)
    return line


class Answers:
    """The file of answers: a line each, written as soon as it is there. What it holds already is kept and not done again."""

    def __init__(self, file: str, lines: Sequence[Line]):
        """ValueError where the file holds answers to other lines."""
        self._path, self._lines = pathlib.Path(file), lines
        there = self._path.read_bytes() if self._path.is_file() else b""
        self._whole = there.rfind(b"\n") + 1  # a line that was being written when the process ended is no answer
        self.done = {self._index(text, number) for number, text in enumerate(there[: self._whole].split(b"\n")[:-1], 1)}

    def _index(self, text: bytes, number: int) -> int:
        where = f"{self._path}:{number}"
        try:
            found = json.loads(text)
            index = found["index"]
            same = all(found[name] == value for name, value in self._lines[index].items() if index >= 0)
        except (ValueError, KeyError, IndexError, TypeError):
            raise ValueError(f"{where} is no answer to these prompts: give another file for --out") from None
        if not same:
            raise ValueError(f"{where} answers another prompt than line {index} of the file: give another file for --out")
        return index

    def __enter__(self) -> "Answers":
        self._file = self._path.open("ab")
        self._file.truncate(self._whole)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, index: int, text: str, tokens: int, ended: str) -> None:
        line = {**self._lines[index], "index": index, "text": text, "tokens": tokens, "ended": ended}
        self._file.write(json_line(line).encode())
        self._file.flush()
        self.done.add(index)


def generate_file(argument: str, file: str, out: str, sampling: Any, max_tokens: int, seed: int) -> int:
    """Answer every line of `file` in `out`. The seed of a line is `seed` plus its index, so that no line's text depends on which
    others are done with it."""
    lines = read_lines(file)
    answers = Answers(out, lines)
    left = [i for i in range(len(lines)) if i not in answers.done]
    if not left:
        say(f"{out}: all {len(lines):,} answers are there")
        return 0
    from jaxlm.models import load_model

    trained = load_model(argument).for_writing()
    seq2seq = trained.model.config.architecture == "encoder_decoder"
    run = _searched if seq2seq else _sampled
    with bar("generating", len(lines), "texts", start=len(answers.done)) as shown:
        start = run(trained, lines, left, sampling, max_tokens, seed)
        with answers:
            start(answers, shown.advance)
    missing = [i for i in left if i not in answers.done]
    if missing:  # what failed was logged when it did
        raise RuntimeError(f"{len(missing)} answers could not be written to {out}, that to line {missing[0]} (from 0) among them")
    say(f"{out}: {len(lines):,} answers")
    return 0


Start = Callable[[Answers, Callable[[int], None]], None]
"""Does the work; what can be wrong with the lines was seen before."""


def _sampled(trained: Any, lines: Sequence[Line], left: Sequence[int], sampling: Any, max_tokens: int, seed: int) -> Start:
    """By the engine of a decoder."""
    from jaxlm.generate.request import Event, Full, Request
    from jaxlm.generate.text import TextStream
    from jaxlm.serve.speaking import chat_of, open_engine, stop_ids, turns_of

    talks = any("messages" in line for line in lines)
    chat = chat_of(trained)[0] if talks else None
    if talks and chat is None:
        raise ValueError(f"the chat template of {trained.name} writes no question and its answer: give prompts, not messages")
    tokenizer, positions = trained.tokenizer, trained.model.config.positions
    ends, turn_ends = stop_ids(trained), stop_ids(trained, chat)
    requests = {}
    for i in left:
        talk = "messages" in lines[i]
        assert chat is not None or not talk, "seen above"
        ids = chat.prompt(lines[i]["messages"]) if chat and talk else [tokenizer.bos_id, *tokenizer.encode(lines[i]["prompt"])]
        room = positions - len(ids)
        if room < 1:
            raise ValueError(f"line {i} (from 0) has {len(ids)} tokens: the model reads at most {positions}, one new included")
        prompt = tuple(map(int, ids))
        requests[i] = Request(prompt, min(max_tokens, room), sampling, seed + i, turn_ends if talk else ends)
    most = max(len(request.prompt) + request.max_tokens for request in requests.values())
    engine = open_engine(trained, min(SLOTS, len(left)), most)

    def start(answers: Answers, advance: Callable[[int], None]) -> None:
        waiting = list(requests.items())[::-1]

        def teller(index: int) -> Callable[[Event], None]:
            talk = chat is not None and "messages" in lines[index]
            stream = TextStream(tokenizer, turns_of(chat) if chat and talk else (), trim=talk, prompt=requests[index].prompt)
            parts: list[str] = []
            count = 0

            def tell(event: Event) -> None:
                nonlocal count
                if event.ended == "error":
                    failed.append(f"line {index}: {event.reason}")
                    return
                parts.extend(stream.push(token.id) for token in event.tokens)
                count += len(event.tokens)
                if stream.stopped is not None and index in tickets:
                    engine.cancel(tickets.pop(index))
                if event.ended is not None:
                    parts.append(stream.flush())
                    answers.write(index, "".join(parts), count, "stop" if stream.stopped is not None else event.ended)
                    advance(1)

            return tell

        tickets: dict[int, Any] = {}
        failed: list[str] = []
        while waiting:
            while waiting:
                index, request = waiting[-1]
                try:
                    tickets[index] = engine.submit(request, teller(index))
                except Full:
                    break
                waiting.pop()
            engine.run()
            if failed:
                raise RuntimeError(f"the model failed, and {len(failed)} answers are missing; {failed[0]}")

    return start


def _searched(trained: Any, lines: Sequence[Line], left: Sequence[int], sampling: Any, max_tokens: int, seed: int) -> Start:
    """By batched search of an encoder-decoder, the likeliest token each time."""
    from jaxlm.generate import BatchGenerator, DecodeConfig

    if sampling.temperature != 0:
        raise ValueError(f"{trained.name} is an encoder-decoder, of which the likeliest texts are written: give --temperature 0")
    if any("messages" in line for line in lines):
        raise ValueError(f"{trained.name} is an encoder-decoder: it reads prompts, not messages")
    task = trained.task()
    if len(task.given) != 1:
        raise ValueError(f"{trained.name} reads {' and '.join(task.given)}: `jaxlm predict --file` takes them as columns")
    prompts = {i: task.prompts([{task.given[0]: lines[i]["prompt"]}])[0] for i in left}
    tokenizer = trained.tokenizer
    generator = BatchGenerator(trained.model, trained.mesh, tokenizer.vocab_size, pad_id=task.pad_id, start_id=task.start_id)
    stop, config = {*task.stop_ids, *trained.stop_ids()}, DecodeConfig(max_tokens)

    def start(answers: Answers, advance: Callable[[int], None]) -> None:
        order = sorted(left, key=lambda i: -len(prompts[i]))  # like lengths share a batch
        for begin in range(0, len(order), SLOTS):
            part = order[begin : begin + SLOTS]
            for i, ids in zip(
                part, generator(trained.params, [prompts[i] for i in part], config, stop, batch_size=SLOTS), strict=True
            ):
                answers.write(i, tokenizer.decode(ids).strip(), len(ids), "length" if len(ids) == max_tokens else "stop")
            advance(len(part))

    return start
