"""lm-evaluation-harness: its own tasks over the same rows, its own model over the same torch weights."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from made_up import Writer

from jaxlm.harness import SUITES, Scorer, answer, read_pages, read_questions, read_through
from jaxlm.model import Model
from jaxlm.models import load_model

pytestmark = pytest.mark.parity
ROWS = 12


def raw_rows(w: Writer) -> dict[str, list[dict]]:
    """Rows as the data sets are published, with the marks and the odd spaces that the templates take away."""
    made = {name: [] for name in SUITES}
    for i in range(ROWS):
        made["hellaswag"].append({
            "activity_label": w.rare(2), "ctx_a": f"[header] {w.rare(2)} [title] {w.sentence()} ",
            "ctx_b": ["", "then SHE [x]"][i % 2],
            "endings": [f" {w.sentence()}  [step] {w.rare(1)}", w.rare(2), w.sentence(), w.rare(4)], "label": str(i % 4),
        })  # fmt: skip
        made["openbookqa"].append({
            "question_stem": w.rare(4), "choices": {"text": [w.rare(1 + k % 2) for k in range(4)], "label": list("ABCD")},
            "answerKey": " " * (i % 2) + "ABCD"[i % 4],
        })  # fmt: skip
        made["copa"].append({
            "premise": f"{w.sentence()} ", "question": ["cause", "effect"][i % 2], "choice1": w.sentence(), "choice2": w.sentence(),
            "label": i % 2,
        })  # fmt: skip
        made["winogrande"].append({
            "sentence": f"{w.rare(2)}, for _ is {w.rare(1)}. ", "option1": w.rare(1), "option2": w.rare(1),
            "answer": str(1 + i % 2),
        })  # fmt: skip
        made["wikitext"].append(
            {"page": f' = {w.rare(1)} = \n \n {w.rare(9)} , ( 1 @,@ 000 ) ; " {w.rare(2)} " he \'s ☃ . \n' * (1 + i % 3)}
        )
    return made


def write_tasks(folder: pathlib.Path, rows: dict[str, list[dict]], options: dict[str, str]) -> None:
    """The rows, and a task for each that takes them in place of the hub's: `options` is the rest of its YAML."""
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in some), encoding="utf8")
        task = f"""
            task: local_{name}
            dataset_path: json
            dataset_name: null
            dataset_kwargs: {{data_files: {{validation: {folder}/{name}.jsonl}}, cache_dir: {folder}/cache}}
            training_split: null
            validation_split: validation
            test_split: null
        """
        (folder / f"{name}.yaml").write_text(textwrap.dedent(task) + textwrap.dedent(options[name]))


def theirs(folder: pathlib.Path, names, model) -> dict:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = [f"local_{name}" for name in names]
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True)


def ours(name: str, file: pathlib.Path, scorer: Scorer):
    suite = SUITES[name]
    if suite.forms:
        return answer(suite, read_questions(suite, str(file)), scorer)
    return read_through(suite, read_pages(str(file)), scorer)


def assert_same(names, folder, trained) -> None:
    """The same requests in the same order, the same log-likelihoods, the same scores."""
    from jaxlm.harness.adapter import JaxLM

    given = theirs(folder, names, JaxLM(trained, batch_size=8))
    for name in names:
        found, samples = ours(name, folder / f"{name}.jsonl", Scorer(trained, batch_size=8)), given["samples"][f"local_{name}"]
        assert len(samples) == len(found.samples)
        for one, sample in zip(found.samples, samples, strict=True):
            if SUITES[name].forms:
                assert one["pairs"] == tuple(tuple(pair) for pair in each_arguments(sample)), name
                logprobs = [response[0][0] for response in sample["resps"]]
                np.testing.assert_allclose(one["logprobs"], logprobs, rtol=1e-5)
            else:
                np.testing.assert_allclose(one["logprob"], sample["resps"][0][0], rtol=1e-5)
        for score, interval in found.scores.items():
            np.testing.assert_allclose(interval.value, given["results"][f"local_{name}"][f"{score},none"], rtol=1e-5, err_msg=name)


def each_arguments(sample: dict) -> list[tuple[str, str]]:
    found = sample["arguments"]
    if isinstance(found, dict):
        return [(one["arg_0"], one["arg_1"]) for one in found.values()]
    return [tuple(one) for one in found]


@pytest.mark.slow
def test_published_rows_score_as_in_the_harness(tiny, tmp_path):
    """Its own templates, by `include` of its own YAML files, over rows in the form of the hub's data sets."""
    import lm_eval.tasks

    home = pathlib.Path(lm_eval.tasks.__file__).parent
    files = {"hellaswag": "hellaswag/hellaswag", "openbookqa": "openbookqa/openbookqa", "copa": "super_glue/copa/default",
             "winogrande": "winogrande/default", "wikitext": "wikitext/wikitext"}  # fmt: skip
    options = {
        name: f"include: {home}/{file}.yaml\n"
        + "".join(["metric_list:\n", *(f"  - metric: {score}\n" for score in SUITES[name].scores)])
        for name, file in files.items()
    }
    write_tasks(tmp_path, raw_rows(Writer(3)), options)
    assert_same(list(SUITES), tmp_path, tiny)


READY = """
    output_type: multiple_choice
    doc_to_text: "{{query}}"
    doc_to_target: gold
    doc_to_choice: choices
    metric_list:
      - metric: acc
      - metric: acc_norm
      - metric: acc_bytes
"""
FILLED = """
    output_type: multiple_choice
    doc_to_text: gold
    doc_to_target: continuation
    doc_to_choice: context_options
    metric_list:
      - metric: acc
"""


@pytest.mark.slow
@pytest.mark.realdata
def test_real_rows_score_as_in_the_harness(tiny, tmp_path, data):
    """Forty of each set that is here, as the files hold them."""
    folder = data / "mc-openbookqa-copa-winogrande"
    files = {"openbookqa": "openbook_qa", "copa": "copa", "winogrande": "winogrande"}
    rows = {
        name: [json.loads(line) for line in (folder / f"{file}.jsonl").read_text(encoding="utf8").splitlines()[:40]]
        for name, file in files.items()
    }
    text = read_questions(SUITES["hellaswag"], str(data / "mc-hellaswag-val" / "hellaswag_val_1000.txt"), 40).questions
    rows["hellaswag"] = [{"query": one.pairs[0][0], "choices": list(one.choices), "gold": one.gold} for one in text]
    rows["wikitext"] = [{"page": page} for page in read_pages(str(data / "lm-wikitext2-valid-test" / "test.txt"), 3)]
    import lm_eval.tasks

    home = pathlib.Path(lm_eval.tasks.__file__).parent
    options = {**dict.fromkeys(rows, READY), "winogrande": FILLED, "wikitext": f"include: {home}/wikitext/wikitext.yaml\n"}
    write_tasks(tmp_path, rows, options)
    longer = Model(dataclasses.replace(tiny.model.config, positions=512))  # bytes are many tokens; its positions are rotary
    assert_same(list(rows), tmp_path, dataclasses.replace(tiny, model=longer))


@pytest.mark.slow
def test_the_adapter_answers_as_the_harness_with_torch(both):
    """Log-likelihoods, whole texts and greedy texts, of contexts short and long, with strings that end them."""
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from jaxlm.harness.adapter import JaxLM

    name, model, folder = both
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    torch_lm = HFLM(pretrained=model, tokenizer=hf, batch_size=3, device="cpu", max_length=32)
    lm = JaxLM(str(folder), batch_size=3)

    def asked(kind, *arguments):
        return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]

    pairs = [("The value of a name", " is an object."), ("It ends ", "here"), ("", "Nothing before"), ("x" * 60, " y z")]
    expected, found = (each.loglikelihood(asked("loglikelihood", *pairs)) for each in (torch_lm, lm))
    np.testing.assert_allclose([one[0] for one in found], [one[0] for one in expected], rtol=1e-5, atol=1e-4)
    assert [one[1] for one in found] == [one[1] for one in expected]

    texts = [("Names refer to objects. Names are introduced by name binding operations.",), ("a b",)]
    if name == "gpt2":  # with a tokenizer that adds a beginning itself, its HFLM scores that too, as a token of the text
        expected, found = (each.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)) for each in (torch_lm, lm))
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    cut = {"until": ["e", "\n"], "max_gen_toks": 6}
    whole = {"until": [], "max_gen_toks": 6, "do_sample": False}
    for options in (whole, cut):
        prompts = [(context, options) for context in ("The value", "A name", "x" * 90)]
        expected, found = (each.generate_until(asked("generate_until", *prompts)) for each in (torch_lm, lm))
        assert found == expected
        assert any(found)


def test_texts_end_before_what_ends_them_and_draws_are_refused(tiny):
    from lm_eval.api.instance import Instance

    from jaxlm.harness.adapter import JaxLM, before

    assert before("one\n\ntwo. three", [".", "\n\n"]) == "one" and before("one", ["x"]) == "one" == before("one", [])
    drawn = Instance(request_type="generate_until", doc={}, arguments=("x", {"do_sample": True, "temperature": 0.7}), idx=0)
    with pytest.raises(ValueError, match=r"draws at temperature 0\.7: the model jaxlm writes greedily"):
        JaxLM(tiny).generate_until([drawn])
    with pytest.raises(ValueError, match="batch_size is 'auto'"):
        JaxLM(tiny, batch_size="auto")


@pytest.mark.slow
def test_its_command_runs_without_torch(tiny_folder, tmp_path):
    """`python -m jaxlm.harness.adapter`, in a process that cannot import torch; the same accuracy as ours."""
    w = Writer(5)
    rows = [{"query": w.rare(3), "choices": [w.rare(2), w.rare(3)], "gold": i % 2} for i in range(6)]
    write_tasks(tmp_path, {"copa": rows}, {"copa": READY})
    script = """
        import runpy, sys
        class NoTorch:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "torch":
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, NoTorch())
        import importlib.util
        there = importlib.util.find_spec
        importlib.util.find_spec = lambda name, package=None: None if name.startswith("torch") else there(name, package)
        sys.argv[0] = "adapter"
        runpy.run_module("jaxlm.harness.adapter", run_name="__main__")
    """
    words = ["--model", "jaxlm", "--model_args", f"pretrained={tiny_folder}", "--tasks", "local_copa",
             "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "local_copa" in done.stdout and "acc_norm" in done.stdout
    (written,) = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(written.read_text())["results"]["local_copa"]
    found = ours("copa", tmp_path / "copa.jsonl", Scorer(load_model(str(tiny_folder)))).scores
    assert {name: interval.value for name, interval in found.items()} == {name: scores[f"{name},none"] for name in found}
