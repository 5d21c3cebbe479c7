"""What tasks make of odd rows: long prompts, labels like numbers, contexts without an answer."""

import json
import subprocess
import types

import jax
import numpy as np
import pytest

from jaxlm.config import parse_flags
from jaxlm.data import TokenizerConfig, framed, train_tokenizer
from jaxlm.experiment import Run, load_config
from jaxlm.generate import DecodeConfig
from jaxlm.model import Model, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh
from jaxlm.tasks import TASKS, Predictor, TaskConfig
from jaxlm.tasks.comparing import answers

TOKENIZER = train_tokenizer(TokenizerConfig(kind="bytes", special=("pad", "cls", "sep")), [])
EOS = TOKENIZER.eos_id


def task_of(kind, length=16, architecture="encoder", **options):
    tokenizer = framed(TOKENIZER, "auto", architecture=architecture)
    return TASKS[kind](TaskConfig(kind=kind, **options), tokenizer, length, architecture=architecture)


def read(tokens):
    return TOKENIZER.decode(tokens)


# --- labels ----------------------------------------------------------------------------------


def test_labels_that_only_look_like_numbers_have_one_order():
    for given in (["nan", "1", "0"], ["0", "nan", "1"], ["1", "0", "nan"]):
        task = task_of("classification")
        task.learn([{"text": "a", "label": label} for label in given])
        assert task.labels == ("0", "1", "nan")


def test_a_number_means_the_number_of_a_choice_and_a_text_the_choice():
    def label(given, choices):
        row = {"question": "q", "choices": choices, "label": given}
        return int(task_of("multiple_choice").examples([row]).items[0]["labels"])

    assert [label(i, ["1", "2", "3"]) for i in range(3)] == [0, 1, 2]
    assert [label(text, ["1", "2", "3"]) for text in ("1", "2", "3")] == [0, 1, 2]
    assert [label(given, ["a", "b"]) for given in ("b", "1", 1)] == [1, 1, 1] and label(7, ["5", "7"]) == 1
    assert label("b", [" a", " b"]) == 1 and label(True, ["True", "False"]) == 0
    assert [label(letter, ["x", "y"]) for letter in "AB"] == [0, 1] and label("A", ["B", "A"]) == 1
    for wrong in ("c", "C", 2, "²", -1):
        with pytest.raises(ValueError, match="neither a choice nor the number of one"):
            label(wrong, ["a", "b"])


@pytest.mark.parametrize(
    ("labels", "metric"),
    [(("O", "B-X", "I-X"), "f1"), (("O", "I-X"), "f1"), (("O", "U-X", "B-X", "L-X"), "f1"), (("NN", "VB"), "accuracy")],
)
def test_the_schemes_of_span_tags_are_known_by_all_their_tags(labels, metric):
    """IOB1 without a B- was scored word by word; of BILOU the scores failed once the model was trained."""
    task = task_of("tagging")
    task.learn([{"tokens": ["a"], "tags": [label]} for label in labels])
    assert task.metric == metric


def test_a_tag_of_another_scheme_is_refused_before_training():
    with pytest.raises(ValueError, match=r"tag 'X' is no span's as other tags are: expected O"):
        task_of("tagging").learn([{"tokens": ["a", "b"], "tags": ["B-X", "X"]}])


@pytest.mark.parametrize("label", ["nan", "inf", float("inf"), "high"])
def test_what_is_no_finite_number_is_no_goal_of_a_regression(label):
    with pytest.raises(ValueError, match=r"rows.tsv:2: label .* is no finite number"):
        task_of("regression").examples([{"text": "a", "label": 1}, {"text": "b", "label": label}], ["rows.tsv:1", "rows.tsv:2"])


def test_a_class_that_all_rows_have_is_learned():
    task = task_of("multilabel", class_weights="balanced")
    task.learn([{"text": "a", "labels": ["x", "y"]}, {"text": "b", "labels": ["x"]}, {"text": "c", "labels": ["x"]}])
    assert task.class_weights == [pytest.approx(1 / 3), 2]


# --- answers ---------------------------------------------------------------------------------


def predict(context, begin, end, **options):
    task = task_of("extractive_qa", 64, **options)
    rows = [{"question": "q", "context": context, "answers": {"text": [], "answer_start": []}}]
    examples = task.examples(rows)
    outputs = [
        {f"{name}_BL": np.array([score(i) for i in range(len(item["tokens"]))], np.float32)
         for name, score in (("begin", begin), ("end", end))}
        for item in examples.items
    ]  # fmt: skip
    predictions = task.read(rows, examples, outputs)
    return predictions[0], task.scores(rows, predictions)


def test_where_no_span_can_be_the_answer_is_empty_and_its_scores_are_finite():
    """All likely begins stand behind all likely ends; a context that the tokenizer makes nothing of."""
    found, _ = predict("a" * 20, lambda i: i, lambda i: i)
    assert found["answer"] == "a" and found["score"] > 0
    for found, scores in (predict("a" * 50, lambda i: i, lambda i: -i), predict("", lambda i: i, lambda i: i)):
        assert found["answer"] == "" and all(np.isfinite([found["score"], found["no_answer"]])) and found["no_answer"] > 0
        assert scores["exact"] == 100


# --- preferences -----------------------------------------------------------------------------


def test_what_both_answers_begin_with_is_the_prompt_up_to_the_space_before_a_word():
    assert answers({"chosen": "Q: why? A: good", "rejected": "Q: why? A: bad"}) == ("Q: why? A:", " good", " bad")
    assert answers({"chosen": "A:\ngood", "rejected": "A:\ngoat"}) == ("A:\n", "good", "goat")
    assert answers({"chosen": "a b", "rejected": "a b c"}) == ("a", " b", " b c")
    assert answers({"chosen": "yes", "rejected": "no"}) == ("", "yes", "no")
    assert answers({"prompt": "x", "chosen": "x y", "rejected": "x z"}) == ("x", "x y", "x z")


def pair(prompt, chosen, rejected, length=16):
    task = task_of("preference", length, "decoder")
    item = task.examples([{"prompt": prompt, "chosen": chosen, "rejected": rejected}]).items[0]
    found = []
    for name in ("chosen", "rejected"):
        row, learned = item[name], item[name]["weights"] > 0
        np.testing.assert_array_equal(row["tokens"][1:], row["targets"][:-1])
        assert len(row["tokens"]) <= length and learned[-1]
        found.append((row["tokens"][: len(learned) - learned.sum() + 1].tolist(), row["targets"][learned].tolist()))
    assert found[0][0] == found[1][0], "both answers stand behind one prompt"
    return read(found[0][0]), read(found[0][1]), read(found[1][1]), found[0][1][-1] == EOS, task.text_encoder.truncated


def test_preferred_and_rejected_answers_stand_behind_the_same_prompt():
    assert pair("ask", "good", "no") == ("ask", "good", "no", True, 0)
    assert pair("ask", "g" * 12, "no") == ("ask", "g" * 12, "no", True, 0), "there is room for an answer of more than half a row"
    assert pair("ask", "g" * 13, "no") == ("ask", "g" * 13, "no", False, 1)
    assert pair("p" * 30 + "?", "good", "no") == ("p" * 11 + "?", "good", "no", True, 1), "for the longer answer"
    assert pair("p" * 30 + "?", "g" * 20, "no") == ("p" * 8 + "?", "g" * 8, "no", False, 1)


def test_a_reward_reads_the_end_of_a_long_text():
    task = task_of("reward")
    item = task.examples([{"prompt": "p" * 30, "chosen": " good", "rejected": " bad"}]).items[0]
    assert [read(item[name]["tokens"]) for name in ("chosen", "rejected")] == ["p" * (16 - 2 - 5) + " good", "p" * 10 + " bad"]
    cls, sep = TOKENIZER.special["cls"], TOKENIZER.special["sep"]
    for name in ("chosen", "rejected"):
        assert (item[name]["tokens"][0], item[name]["tokens"][-1], len(item[name]["tokens"])) == (cls, sep, 16)
    assert task.text_encoder.truncated == 2
    alone = task.examples([{"text": "p" * 30 + " good"}]).items[0]
    np.testing.assert_array_equal(alone["tokens"], item["chosen"]["tokens"])
    assert read(task.examples([{"text": "short"}]).items[0]["tokens"]) == "short"


@pytest.mark.parametrize("kind", ["preference", "reward", "embedding"])
def test_conversations_that_do_not_belong_together_are_told_with_their_place(kind):
    talk = [{"role": "user", "content": "hi"}]
    rows = [{"text": "a", "pair": "b", "chosen": "c", "rejected": rejected} for rejected in ("d", talk)]
    rows = rows if kind == "embedding" else [{name: row[name] for name in ("chosen", "rejected")} for row in rows]
    told = (
        "x.jsonl:2: rejected is a list of messages, not a text"
        if kind == "embedding"
        else "x.jsonl:2 has no prompt and two answers"
    )
    with pytest.raises(ValueError, match=f"^{told}"):
        task_of(kind, architecture="decoder").examples(rows, ["x.jsonl:1", "x.jsonl:2"])


# --- on the device ---------------------------------------------------------------------------

OPTIONS = {"vocab_size": 260, "layers": 1, "width": 16, "heads": 2, "positions": 16}


def predictor(task, **options):
    """A predictor, its parameters, and the calls of the model while it is traced."""
    model, calls = Model(TransformerConfig(**{**OPTIONS, **options})), []

    def apply(params, batch, **more):
        calls.append(more["method"])
        return model.apply(params, batch, **more)

    spied = types.SimpleNamespace(config=model.config, axes=model.axes, shapes=model.shapes, apply=apply)
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    shown = spied if task.config.kind == "preference" else model
    return Predictor(task, shown, mesh, 4, chunk=8), model.init(jax.random.key(0)), calls


def test_losses_and_rewards_share_one_computation_of_each_answer():
    task = task_of("preference", architecture="decoder")
    examples = task.examples([{"prompt": "ask", "chosen": "good", "rejected": "no"}])
    task.refer(examples, [{"chosen_B": np.float32(-1), "rejected_B": np.float32(-2)}])
    made, params, calls = predictor(task)
    passed = made.run(params, examples.items)
    assert calls == ["log_likelihood"] * 2
    (rewards,) = task.read([{}], examples, passed.outputs)
    assert rewards["chosen"] == pytest.approx(passed.means["chosen_reward"])
    assert rewards["chosen"] - rewards["rejected"] == pytest.approx(passed.means["margin"], rel=1e-5)


@pytest.mark.parametrize("kind", ["text_to_text", "chat"])
def test_what_is_written_fits_the_learned_positions(kind):
    """However long the prompt is and whatever `max_tokens` says: the beginning of the prompt goes."""
    task = task_of(kind, architecture="decoder", target_length=8, decode=DecodeConfig(max_tokens=64))
    texts = ["a", "long " * 20]
    rows = [{"source": text} if kind == "text_to_text" else {"messages": [{"role": "user", "content": text}]} for text in texts]
    made, params, _ = predictor(task)
    prompts, decode = made._fitting(task.prompts(rows), task.config.decode)
    for prompt, whole in zip(prompts, task.prompts(rows), strict=True):
        assert prompt == whole[-len(prompt) :] and len(prompt) + decode.max_tokens - 1 <= 16 and len(prompt) == min(9, len(whole))
    found = made.predict(params, rows)
    assert len(found) == 2 and all(len(prediction["text"].encode()) <= 3 * 8 for prediction in found)
    free, *_ = predictor(task, position="rotary")
    assert free._fitting(task.prompts(rows), task.config.decode) == (task.prompts(rows), task.config.decode)


def test_prompts_and_chats_that_are_cut_are_counted():
    task = task_of("text_to_text", architecture="decoder", target_length=8)
    task.examples([{"source": "a", "target": "b"}, {"source": "a" * 30, "target": "b"}])
    assert task.text_encoder.truncated == 1
    task = task_of("chat", 64, "decoder")
    talks = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}] for text in ("yes", "yes " * 30)]
    task.examples([{"messages": talk} for talk in talks])
    assert task.text_encoder.truncated == 1


def test_the_command_that_a_run_suggests_executes_nothing_of_its_rows(tmp_path):
    """The first held-out text is shell code; pasted into bash it is a text, in every command that the run names."""
    rows = [{"text": f"$(touch {tmp_path}/a) `touch {tmp_path}/b` it's; touch {tmp_path}/c", "label": str(i % 2)} for i in range(8)]
    for name in ("train", "held"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    words = [
        "--task.kind", "classification", "--data.train", f"{tmp_path}/train.jsonl", "--data.validation", f"{tmp_path}/held.jsonl",
        "--runs", f"{tmp_path}/my runs; touch {tmp_path}/d", "--model.architecture", "encoder", "--data.tokenizer.kind", "bytes",
    ]  # fmt: skip
    (tmp_path / "plain.yaml").write_text("{}")
    commands = Run(load_config(tmp_path / "plain.yaml", parse_flags(words)).value).next_commands(1)
    assert "touch" in commands[0] and len(commands) >= 5
    script = 'jaxlm() { printf \'%s\\n\' "$@"; }; tensorboard() { jaxlm "$@"; }\n' + "\n".join(commands)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert not {file.name for file in tmp_path.iterdir()} & set("abcd"), "something of a row or a name was executed"
    assert rows[0]["text"][:60] in done.stdout.splitlines()
