"""jaxlm generate --file: an answer for each line of a file."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxlm import text_files
from jaxlm.config import diff, flatten, to_dict
from jaxlm.report.console import bar, say
from jaxlm.verbs.decoding import Decoding, SamplingOptions, decoding_of, report_spelled

Line = dict[str, Any]
SLOTS = 16
MAX_TOKENS = 200
"""New tokens of a text where neither a flag nor the model says how many."""


def read_lines(file: str) -> list[Line]:
    """Prompts of a file: rows with `prompt` or `messages` in any format that training reads, or a text a line (.txt), of which
    every line is one. ValueError with the place of a row that is neither."""
    from jaxlm.data.formats import FORMATS, read_files
    from jaxlm.data.json_rows import read_jsonl
    from jaxlm.data.records import Bad, ReadOptions
    from jaxlm.data.sources import format_of

    path = pathlib.Path(file)
    if not path.is_file():
        raise ValueError(f"no file {file!r}")
    if format_of(path) == ".txt":
        texts = list(text_files.read_lines(path))
        bad = next((f"{file}:{number} {why}" for number, text in texts if (why := text_files.undecodable(text))), None)
        if bad:
            raise ValueError(bad)
        lines: list[Line] = [{"prompt": text} for _, text in texts]
    else:
        options = ReadOptions(all_columns=True)
        if format_of(path) in FORMATS:
            records = read_files(file, options, lambda names, where: list(names))[1]
        else:
            records = ((path.name + place, record) for place, record in read_jsonl(path, options, lambda names, where: list(names)))
        lines = []
        for place, record in records:
            if isinstance(record, Bad):
                if record.startswith("is not an object"):
                    record = Bad('is not an object with "prompt" or "messages"')
                hint = "; a file of plain texts is named .txt" if record.startswith("is not") else ""
                raise ValueError(f"{place} {record}{hint}")
            lines.append(_line(record, place))
    if not lines:
        raise ValueError(f"{file} holds no line")
    return lines


def _line(record: Mapping[str, Any], where: str) -> Line:
    line = json.loads(text_files.json_line(record))  # as it will be written, and compared with what is written
    given = [name for name in ("prompt", "messages") if line.get(name) is not None]
    if len(given) != 1:
        raise ValueError(
            f'{where}: expected an object with "prompt" or "messages", got {json.dumps(line, ensure_ascii=False)[:60]}'
        )
    if given == ["prompt"] and not isinstance(line["prompt"], str):
        raise ValueError(f"{where}: prompt must be a text, got {line['prompt']!r:.60}")
    if given == ["messages"]:
        from jaxlm.data import check_messages
        from jaxlm.data.roles import conversation

        try:
            line["messages"] = conversation(line["messages"], {})
        except ValueError as error:
            raise ValueError(f"{where}: messages {error}") from None
        check_messages(line["messages"], where, training=False)
    return line


class Answers:
    """The file of answers: a line each, written as soon as it is there. What it holds already is kept and not done again."""

    def __init__(self, file: str, lines: Sequence[Line], made_by: Mapping[str, Any] | None = None):
        """`made_by`: the model and the options, which are kept beside the file. ValueError where the file holds answers to other
        lines, or by another model or with other options."""
        self._path, self._lines = pathlib.Path(file), lines
        self._made_by = json.loads(json.dumps(made_by or {}))
        self._beside = self._path.with_name(f"{self._path.name}.options.json")
        there = self._path.read_bytes() if self._path.is_file() else b""
        self._whole = there.rfind(b"\n") + 1  # a line that was being written when the process ended is no answer
        self.done = {self._index(text, number) for number, text in enumerate(there[: self._whole].split(b"\n")[:-1], 1)}

        if self.done and self._beside.is_file():
            changed = diff(json.loads(self._beside.read_text(encoding="utf8")), self._made_by)
            if changed:
                shown = ", ".join(f"{name} {old} → {new}" for name, (old, new) in changed.items())
                raise ValueError(f"{file} holds answers made otherwise ({shown}): give another file for --out")

    def _index(self, text: bytes, number: int) -> int:
        where = f"{self._path}:{number}"
        try:
            found = json.loads(text)
            index = found["index"]
            same = all(  # as JSON: NaN is not equal to itself
                text_files.json_line(found[name]) == text_files.json_line(value)
                for name, value in self._lines[index].items() if index >= 0
            )  # fmt: skip
        except (ValueError, KeyError, IndexError, TypeError):
            raise ValueError(f"{where} is no answer to these prompts: give another file for --out") from None
        if not same:
            raise ValueError(f"{where} answers another prompt than line {index} of the file: give another file for --out")
        return index

    def __enter__(self) -> "Answers":
        self._file = self._path.open("ab")
        self._file.truncate(self._whole)
        self._beside.write_text(json.dumps(self._made_by, ensure_ascii=False), encoding="utf8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, index: int, text: str, tokens: int, ended: str) -> None:
        line = {**self._lines[index], "index": index, "text": text, "tokens": tokens, "ended": ended}
        self._file.write(text_files.json_line(line).encode())
        self._file.flush()
        self.done.add(index)


def _made_by(argument: str, options: SamplingOptions) -> dict[str, Any]:
    """What answers depend on beside their lines: the model, of a folder a fingerprint of its files, and the options."""
    from jaxlm.models import source_fingerprint

    given = {name: value for name, value in flatten(to_dict(options)).items() if not name.startswith("parallel")}
    return {"model": source_fingerprint(argument) if pathlib.Path(argument).is_dir() else argument, **given}


def generate_file(argument: str, file: str, out: str, options: SamplingOptions) -> int:
    """Answer every line of `file` in `out`. The seed of a line is the seed plus its index, so that no line's text depends on which
    others are done with it."""
    lines = read_lines(file)
    answers = Answers(out, lines, _made_by(argument, options))
    left = [i for i in range(len(lines)) if i not in answers.done]
    if not left:
        say(f"{out}: all {len(lines):,} answers are there")
        return 0
    from jaxlm.models import load_model

    trained = load_model(argument, options=options).for_writing(free=True)
    decoding = decoding_of(trained, options, MAX_TOKENS)
    if line := decoding.told():
        say(line)
    with bar("generating", len(lines), "texts", start=len(answers.done)) as shown:
        # The engine fills a slot as soon as it is free; what it cannot do is done in batches.
        if trained.reads or decoding.beams or decoding.rules:
            start = _batched(trained, lines, left, decoding, options.seed, options.split_special_tokens)
        else:
            start = _sampled(trained, lines, left, decoding, options.seed, options.split_special_tokens)
        with answers:
            start(answers, shown.advance)
    missing = [i for i in left if i not in answers.done]
    if missing:  # what failed was logged when it did
        raise RuntimeError(f"{len(missing)} answers could not be written to {out}, that to line {missing[0]} (from 0) among them")
    say(f"{out}: {len(lines):,} answers")
    return 0


Start = Callable[[Answers, Callable[[int], None]], None]
"""Does the work; what can be wrong with the lines was seen before."""


def _sampled(trained: Any, lines: Sequence[Line], left: Sequence[int], decoding: Decoding, seed: int, split: bool) -> Start:
    """By the engine of a decoder."""
    from jaxlm.generate.request import Event, Full, Request
    from jaxlm.generate.text import TextStream
    from jaxlm.serve.speaking import open_engine, stop_ids, turns_of

    prompts = _Prompts(trained, lines, decoding, split)
    chat, tokenizer = prompts.chat, trained.tokenizer
    ends, turn_ends = stop_ids(trained), stop_ids(trained, chat)
    requests = {}
    for i in left:
        prompt, room = prompts(i)
        requests[i] = Request(prompt, room, decoding.sampling, seed + i, turn_ends if "messages" in lines[i] else ends)
    report_spelled(prompts.spelled, split)
    most = max(len(request.prompt) + request.max_tokens for request in requests.values())
    engine = open_engine(trained, min(SLOTS, len(left)), most)

    def start(answers: Answers, advance: Callable[[int], None]) -> None:
        waiting = list(requests.items())[::-1]

        def teller(index: int) -> Callable[[Event], None]:
            talk = chat is not None and "messages" in lines[index]
            stop = (*(turns_of(chat) if chat and talk else ()), *decoding.stop_strings)
            stream = TextStream(tokenizer, stop, trim=talk, prompt=requests[index].prompt, keep_stop=not talk)
            parts: list[str] = []
            count = 0

            def tell(event: Event) -> None:
                nonlocal count
                if event.ended == "error":
                    failed.append(f"line {index}: {event.reason}")
                    return
                for token in event.tokens:
                    count += stream.stopped is None
                    parts.append(stream.push(token.id))
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


def _batched(trained: Any, lines: Sequence[Line], left: Sequence[int], decoding: Decoding, seed: int, split: bool) -> Start:
    """In batches, each done before the next begins."""
    batched = Batched(trained, decoding, lines, seed, left, split=split)
    report_spelled(batched.spelled, split)

    def start(answers: Answers, advance: Callable[[int], None]) -> None:
        for i, answer in batched.write(left):
            answers.write(i, *answer)
            advance(1)

    return start


class _Prompts:
    """The prompts of a decoder, texts and conversations. ValueError for conversations where the model has no template."""

    def __init__(self, trained: Any, lines: Sequence[Line], decoding: Decoding, split: bool):
        from jaxlm.data import TextEncoder
        from jaxlm.serve.speaking import chat_of

        self._lines, self._decoding, self._positions = lines, decoding, trained.model.config.positions
        self._encoder = TextEncoder(trained.tokenizer, split_special_tokens=split)
        self.chat = chat_of(trained, split)[0] if any("messages" in line for line in lines) else None
        if self.chat is None and any("messages" in line for line in lines):
            raise ValueError(f"the chat template of {trained.name} writes no question and its answer: give prompts, not messages")

    @property
    def spelled(self) -> int:
        """Lines so far that spell a special token."""
        return self._encoder.spelled + (self.chat.spelled if self.chat is not None else 0)

    def __call__(self, index: int) -> tuple[tuple[int, ...], int]:
        """The ids of a line, and how many tokens may follow them."""
        line, positions = self._lines[index], self._positions
        if self.chat is not None and "messages" in line:
            ids = self.chat.prompt(line["messages"]).tolist()
        else:
            ids = self._encoder.ids(line["prompt"])
        room = positions - len(ids)
        if room < 1:
            raise ValueError(f"line {index} (from 0) has {len(ids)} tokens: the model reads at most {positions}, one new included")
        return tuple(ids), min(self._decoding.room(len(ids)), room)


class Answer(NamedTuple):
    """What was written for a line."""

    text: str
    tokens: int
    ended: str


class Batched:
    """Texts written in batches: those of an encoder-decoder, and of a decoder with beams or constraints on tokens."""

    def __init__(
        self, trained: Any, decoding: Decoding, lines: Sequence[Line], seed: int, left: Sequence[int] | None = None, *,
        split: bool = False,
    ):  # fmt: skip
        """`left`: indices of the lines to answer, by default all. ValueError for a line that the model cannot answer."""
        from jaxlm.generate import BatchGenerator
        from jaxlm.serve.speaking import stop_ids

        self._trained, self._decoding, self._lines, self._seed = trained, decoding, lines, seed
        tokenizer, left = trained.tokenizer, range(len(lines)) if left is None else left
        pad, start, self._chat = tokenizer.special.get("pad", tokenizer.eos_id), None, None
        if trained.reads:
            if any("messages" in line for line in lines):
                raise ValueError(f"{trained.name} is an encoder-decoder: it reads prompts, not messages")
            task = trained.task(split_special_tokens=split or None)
            if len(task.given) != 1:
                raise ValueError(f"{trained.name} reads {' and '.join(task.given)}: `jaxlm predict --file` takes them as columns")
            read = task.prompts([{task.given[0]: lines[i]["prompt"]} for i in left])
            room, config = decoding.room(1), trained.model.config
            if decoding.max_tokens is None and config.position == "learned":  # asked for, more than there are is an error
                room = min(room, config.positions)
            self._prompts = {i: (tuple(ids), room) for i, ids in zip(left, read, strict=True)}
            self.spelled: int = task.spelled
            pad, start, self._stop = task.pad_id, task.start_id, task.stop_ids | frozenset(trained.stop_ids())
        else:
            prompts = _Prompts(trained, lines, decoding, split)
            self._chat, self._prompts = prompts.chat, {i: prompts(i) for i in left}
            self.spelled = prompts.spelled
            self._stop = stop_ids(trained, self._chat)
        self._generator = BatchGenerator(trained.model, trained.mesh, tokenizer.vocab_size, pad_id=pad, start_id=start)

    def write(self, indices: Sequence[int]) -> Iterator[tuple[int, Answer]]:
        """Index and answer of each line, as they are there: lines of like length, which share a batch, together."""
        groups: dict[int, list[int]] = {}
        for i in indices:
            groups.setdefault(self._prompts[i][1], []).append(i)
        for room, group in sorted(groups.items()):
            config = dataclasses.replace(self._decoding.decode, max_tokens=room)
            order = sorted(group, key=lambda i: -len(self._prompts[i][0]))
            for begin in range(0, len(order), SLOTS):
                part = order[begin : begin + SLOTS]
                written = self._generator(
                    self._trained.params, [self._prompts[i][0] for i in part], config, self._stop, batch_size=SLOTS,
                    rules=self._decoding.rules, sampling=self._decoding.sampling, seeds=[self._seed + i for i in part],
                )  # fmt: skip
                for i, ids in zip(part, written, strict=True):
                    yield i, self._answer(i, ids, room)

    def _answer(self, index: int, ids: list[int], room: int) -> Answer:
        from jaxlm.generate.text import TextStream
        from jaxlm.serve.speaking import turns_of

        tokenizer, ended = self._trained.tokenizer, "length" if len(ids) == room else "stop"
        stops = self._decoding.stop_strings
        if self._trained.reads and not stops:
            return Answer(tokenizer.decode(ids), len(ids), ended)
        talk, before = "messages" in self._lines[index], () if self._trained.reads else self._prompts[index][0]
        if self._chat is not None and talk:
            stops = (*turns_of(self._chat), *stops)
        stream = TextStream(tokenizer, stops, trim=talk, prompt=before, keep_stop=not talk)
        parts, count = [], 0
        for token in ids:
            parts.append(stream.push(token))
            count += 1
            if stream.stopped is not None:
                break
        return Answer("".join(parts) + stream.flush(), count, ended if stream.stopped is None else "stop")
