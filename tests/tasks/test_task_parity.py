"""Tasks against torch: the same rows, encoded by each side's own code, give the same losses and the same parameters."""

import dataclasses
import importlib.util
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data import ExampleBatches, load_tokenizer
from jaxlm.hub import load_folder
from jaxlm.parallel import ParallelConfig, make_mesh, place_batch
from jaxlm.tasks import TASKS, Predictor, TaskConfig
from jaxlm.train import (
    OptimConfig,
    TuneConfig,
    Tuning,
    init_state,
    make_optimizer,
    make_schedule,
    make_train_step,
    objectives,
)

pytestmark = pytest.mark.parity

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZE, STEPS, LENGTH = 4, 5, 16
RATE, SEED = 1e-3, 7
IGNORED = -100


@pytest.fixture(scope="module")
def script():
    """benchmarks/torch_finetune.py: examples, their order and the optimiser in plain torch and transformers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import torch_finetune

        yield torch_finetune


@pytest.fixture(scope="module")
def cases():
    """tests/hub/torch_models.py."""
    spec = importlib.util.spec_from_file_location("torch_models", ROOT / "tests" / "hub" / "torch_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(ParallelConfig(), jax.devices()[:1])


# --- rows and tokenizers ---------------------------------------------------------------------

STEMS = ["red", "cat", "house", "walk", "see", "old", "good", "bad"]
PIECES = ["##s", "##ing", "##ed"]
OTHERS = ["user", "assistant", "system", ":", "?", ".", "the"]
# The special tokens in the order of their ids, and what stands around a text and a pair of texts.
KINDS = {
    "bert": ({"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
             "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "roberta": ({"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"}, "<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "t5": ({"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}, "$A </s>", "$A </s> $B </s>"),
    "gpt2": ({"eos": "<end>", "pad": "<pad>", "unk": "<unk>"}, None, None),
    "llama": ({"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}, "<s> $A", "<s> $A <s> $B"),
}  # fmt: skip


def tokenizers_of(kind, folder):
    """The same tokenizer twice, ours and that of transformers: words in pieces, framed as the family does."""
    import tokenizers
    import transformers

    special, single, pair = KINDS[kind]
    ids = {name: i for i, name in enumerate([*special.values(), *STEMS, *PIECES, *OTHERS])}
    rust = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token=special["unk"]))
    rust.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    if single is not None:
        framing = [(name, ids[name]) for name in special.values()]
        rust.post_processor = tokenizers.processors.TemplateProcessing(single, pair, framing)
    names = {f"{role}_token": name for role, name in special.items()}
    inputs = ["input_ids", *["token_type_ids"] * (kind == "bert"), "attention_mask"]
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=rust, model_input_names=inputs, **names)
    hf.save_pretrained(str(folder))
    return load_tokenizer(folder), hf


def sentence(rng, least=1, most=6):
    return " ".join(rng.choice(STEMS) + rng.choice(["", "s", "ing", "ed"]) for _ in range(rng.randint(least, most)))


def texts(n=10):
    """Rows of a text, a second one and a label; a few are longer than a row."""
    rng = random.Random(0)
    made = [{"text": sentence(rng), "pair": sentence(rng), "label": rng.choice(["good", "bad", "so"])} for _ in range(n - 2)]
    return [*made, *({"text": sentence(rng, 18, 20), "pair": sentence(rng, 5, 20), "label": "bad"} for _ in range(2))]


# --- both sides ------------------------------------------------------------------------------


@dataclasses.dataclass
class Both:
    """A model of torch, and the same one here."""

    torch: object
    model: object
    params: object
    folder: pathlib.Path
    mesh: object

    def reread(self, name):
        """Torch's parameters as they are now, in our tree."""
        self.torch.save_pretrained(self.folder / name)
        return load_folder(str(self.folder / name), self.mesh).params


def both(cases, mesh, folder, architecture, case, **more):
    theirs = cases.make(architecture, {**cases.CASES[case][1]}, **more)
    theirs.save_pretrained(folder / "start")
    model, params, *_ = load_folder(str(folder / "start"), mesh)
    return Both(theirs, model, params, folder, mesh)


def task_of(kind, ours, tokenizer, rows, length=LENGTH, **options):
    architecture = ours.model.config.architecture
    start = getattr(ours.torch.config, "decoder_start_token_id", None)
    task = TASKS[kind](TaskConfig(kind=kind, **options), tokenizer, length, architecture=architecture, start_id=start)
    task.learn(rows)
    return task, task.examples(rows)


def follow(ours, task, examples, torch_loss, script, still=None, order=None, free=()):
    """Five steps on both sides from the same parameters: equal losses, and then equal parameters.

    `torch_loss` gives torch's mean loss of some examples, by their numbers. `still` are parameters that are none in torch,
    `order` are the examples from which the script makes its own batches, which must be these, `free` see `same_parameters`.
    """
    import torch

    config = OptimConfig(
        learning_rate=RATE, schedule="linear", warmup=script.WARMUP, final=0.0, weight_decay=script.WEIGHT_DECAY,
        beta1=script.BETAS[0], beta2=script.BETAS[1], eps=script.EPSILON, clip=script.CLIP,
    )  # fmt: skip
    total = 8  # a run of eight steps: the first one warms up
    tuning = Tuning(TuneConfig(train=".*" if still is None else rf"^(?!{still}$)"), ours.model)
    schedule = make_schedule(config, total)
    optimizer = make_optimizer(config, schedule, tuning)
    state = init_state(ours.model, optimizer, 0, ours.mesh, tuning, jax.tree.map(jnp.copy, ours.params))
    step = make_train_step(ours.model, task.objective(LENGTH), optimizer, schedule, ours.mesh, seed=0, tuning=tuning)
    theirs, rate = script.make_optimizer(ours.torch, RATE, total)

    # Each row takes along which one it is, counted from 1; rows that only fill up a batch have 0.
    items = [{**item, "number": np.int32(i)} for i, item in enumerate(examples.items, 1)]
    batches = ExampleBatches(items, SIZE, seed=SEED, epochs=None, pad_id=task.pad_id)
    short = False
    for i in range(STEPS):
        batch = batches.batch(i)
        chosen = [int(n) - 1 for n in batch["number_B"] if n]
        short |= len(chosen) < SIZE
        if order is not None:
            epoch, place = divmod(i, batches.per_epoch)
            assert chosen == script.epoch_batches(order, SIZE, SEED, epoch)[place].tolist()
        state, sums = step(state, place_batch(batch, ours.mesh))
        loss = torch_loss(chosen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.torch.parameters(), script.CLIP)
        theirs.step()
        rate.step()
        theirs.zero_grad()
        np.testing.assert_allclose(float(sums["loss"]), loss.item(), atol=1e-4, err_msg=f"step {i}")
    assert short, "no batch was filled up with rows that count nothing"
    before, after = ours.params, ours.reread("after")
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), before, after)
    assert max(jax.tree.leaves(moved)) > 2 * RATE, "nothing was learned"
    same_parameters(tuning.merge(state.params, state.frozen), after, free)


def same_parameters(found, expected, free=()):
    """All of them, but for those that the loss does not depend on: a number added to all scores leaves their softmax as it
    is, so the gradients of what adds it (to the keys of a head, always) are rounding, which Adam makes steps of."""
    expected = dict(jax.tree.leaves_with_path(expected))
    names = {path: "/".join(key.key for key in path) for path in expected}
    for path, mine in jax.tree.leaves_with_path(found):
        if not names[path].endswith(("attention/key/bias", *free)):
            np.testing.assert_allclose(mine, expected[path], atol=1e-4, err_msg=names[path])


# --- labels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [False, True])
def test_bert_classifies_texts_and_pairs_as_torchs_script(paired, cases, mesh, script, tmp_path):
    """The rows that transformers makes, in the order that the script has, token types of pairs and all."""
    rows = [{key: row[key] for key in ("text", "label", *["pair"] * paired)} for row in texts()]
    tokenizer, hf = tokenizers_of("bert", tmp_path / "tokenizer")
    ours = both(cases, mesh, tmp_path, "BertForSequenceClassification", "bert", num_labels=3)
    task, examples = task_of("classification", ours, tokenizer, rows)
    records = [([row["text"], *[row["pair"]] * paired] if paired else [row["text"]], row["label"]) for row in rows]
    encoded = script.encode_texts(hf, records, LENGTH, ["bad", "good", "so"])
    for item, other in zip(examples.items, encoded, strict=True):
        assert item["tokens"].tolist() == other["input_ids"] and item["labels"] == other["labels"]
        assert item.get("types", np.zeros(len(item["tokens"]), int)).tolist() == other["token_type_ids"]
    assert paired == any(any(other["token_type_ids"]) for other in encoded)

    def loss(chosen):
        return ours.torch(**script.collate([encoded[i] for i in chosen], hf.pad_token_id)).loss

    follow(ours, task, examples, loss, script, order=encoded)


def test_roberta_classifies_with_label_smoothing_as_torch(cases, mesh, script, tmp_path):
    import torch

    rows = [{"text": row["text"], "pair": row["pair"], "label": row["label"]} for row in texts()]
    tokenizer, hf = tokenizers_of("roberta", tmp_path / "tokenizer")
    ours = both(cases, mesh, tmp_path, "RobertaForSequenceClassification", "roberta", num_labels=3)
    task, examples = task_of("classification", ours, tokenizer, rows, label_smoothing=0.1)
    labels = [["bad", "good", "so"].index(row["label"]) for row in rows]
    measure = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

    def loss(chosen):
        given = hf([rows[i]["text"] for i in chosen], [rows[i]["pair"] for i in chosen], **PADDED)
        out = ours.torch(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
        return measure(out.logits, torch.tensor([labels[i] for i in chosen]))

    follow(ours, task, examples, loss, script)


PADDED = {"truncation": True, "max_length": LENGTH, "padding": True, "return_tensors": "pt"}


def test_gpt2_classifies_by_the_last_token_of_padded_rows_as_torch(cases, mesh, script, tmp_path):
    """A decoder's tokenizer adds no special tokens, so the class is read off the last token of the text itself."""
    import torch

    rows = texts()
    tokenizer, hf = tokenizers_of("gpt2", tmp_path / "tokenizer")
    ours = both(cases, mesh, tmp_path, "GPT2ForSequenceClassification", "gpt2", num_labels=3, pad_token_id=hf.pad_token_id)
    rows = [{"text": row["text"], "label": row["label"]} for row in rows]
    task, examples = task_of("classification", ours, tokenizer, rows)
    labels = [["bad", "good", "so"].index(row["label"]) for row in rows]
    ids = [hf(row["text"], truncation=True, max_length=LENGTH)["input_ids"] for row in rows]
    assert len({len(x) for x in ids}) > 3

    def loss(chosen):
        padded = hf.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
        return ours.torch(**padded, labels=torch.tensor([labels[i] for i in chosen])).loss

    follow(ours, task, examples, loss, script)


@pytest.mark.parametrize("kind", ["regression", "multilabel"])
def test_numbers_and_several_classes_are_learned_as_torchs_own_losses(kind, cases, mesh, script, tmp_path):
    import torch

    rng, names = random.Random(1), ["a", "b", "c"]
    values = [{"label": rng.gauss(0, 1)} if kind == "regression" else {"labels": rng.sample(names, i % 4)} for i in range(10)]
    rows = [{"text": row["text"], **value} for row, value in zip(texts(), values, strict=True)]
    problem = {"regression": "regression", "multilabel": "multi_label_classification"}[kind]
    tokenizer, hf = tokenizers_of("bert", tmp_path / "tokenizer")
    size = 1 if kind == "regression" else 3
    ours = both(cases, mesh, tmp_path, "BertForSequenceClassification", "bert", num_labels=size, problem_type=problem)
    task, examples = task_of(kind, ours, tokenizer, rows)
    goals = [[row["label"]] if kind == "regression" else [float(name in row["labels"]) for name in names] for row in rows]

    def loss(chosen):
        labels = torch.tensor([goals[i] for i in chosen])
        return ours.torch(**hf([rows[i]["text"] for i in chosen], **PADDED), labels=labels[:, 0] if size == 1 else labels).loss

    follow(ours, task, examples, loss, script)


def test_bert_tags_the_first_piece_of_each_word_as_torchs_script(cases, mesh, script, tmp_path):
    rng = random.Random(2)
    sentences = [[(word, rng.choice(["O", "B-X", "I-X"])) for word in row["text"].split()] for row in texts()]
    rows = [{"tokens": [word for word, _ in pairs], "tags": [tag for _, tag in pairs]} for pairs in sentences]
    tokenizer, hf = tokenizers_of("bert", tmp_path / "tokenizer")
    ours = both(cases, mesh, tmp_path, "BertForTokenClassification", "bert", num_labels=3)
    task, examples = task_of("tagging", ours, tokenizer, rows)
    encoded = script.encode_words(hf, sentences, LENGTH, script.tags(sentences))
    ignored = [[label == IGNORED for label in other["labels"]] for other in encoded]
    assert any(any(row[1:-1]) for row in ignored), "no word has a second piece"
    for item, skipped in zip(examples.items, ignored, strict=True):
        assert [weight == 0 for weight in item["weights"]] == skipped

    def loss(chosen):
        return ours.torch(**script.collate([encoded[i] for i in chosen], hf.pad_token_id)).loss

    follow(ours, task, examples, loss, script, order=encoded)


# --- reading ---------------------------------------------------------------------------------


def test_bert_finds_answers_in_windows_as_torchs_script(cases, mesh, script, tmp_path):
    """Windows and their answers are the script's; its logits are masked as ours, to [CLS] and the context."""
    import torch

    rng, rows = random.Random(3), []
    for i in range(6):
        context = sentence(rng, 3, 16 if i % 2 else 4)
        word = rng.choice(context.split())
        answers = {"text": [word], "answer_start": [context.index(word)]}
        rows.append({"question": f"{sentence(rng, 1, 2)} ?", "context": context, "answers": answers})
    tokenizer, hf = tokenizers_of("bert", tmp_path / "tokenizer")
    ours = both(cases, mesh, tmp_path, "BertForQuestionAnswering", "bert")
    task, examples = task_of("extractive_qa", ours, tokenizer, rows, length=24, stride=4)
    records = [{**row, "answers": [{key: row["answers"][key][0] for key in row["answers"]}]} for row in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "STRIDE", 4)
        encoded = script.encode_questions(hf, records, 24, [])
    assert len(encoded) > len(rows) and len(examples) == len(encoded)
    for item, other in zip(examples.items, encoded, strict=True):
        assert item["tokens"].tolist() == other["input_ids"] and item["types"].tolist() == other["token_type_ids"]
        assert [item["begin"], item["end"]] == other["ends"]
        allowed = [i == 0 or offsets is not None for i, offsets in enumerate(other["offsets"])]
        assert item["allowed"].astype(bool).tolist() == allowed
    assert any(other["ends"] == [0, 0] for other in encoded) and any(other["ends"] != [0, 0] for other in encoded)

    def loss(chosen):
        batch = script.collate([encoded[i] for i in chosen], hf.pad_token_id)
        ends = batch.pop("start_positions"), batch.pop("end_positions")
        out = ours.torch(**batch)
        hidden = torch.full(batch["input_ids"].shape, -torch.inf)
        for row, i in zip(hidden, chosen, strict=True):
            row[[place for place, offsets in enumerate(encoded[i]["offsets"]) if offsets is not None or place == 0]] = 0
        sides = zip((out.start_logits, out.end_logits), ends, strict=True)
        return sum(torch.nn.functional.cross_entropy(logits + hidden, gold) for logits, gold in sides) / 2

    # The last norm's bias, too, moves the scores of all tokens alike.
    follow(ours, task, examples, loss, script, order=encoded, free=["head/out/bias", "mlp_norm/bias"])


def test_bert_chooses_as_torch(cases, mesh, script, tmp_path):
    """Rows of two to four choices, which torch takes one row at a time."""
    import torch

    rng, rows = random.Random(4), []
    for i in range(6):
        choices = [sentence(rng, 1, 4) for _ in range(2 + i % 3)]
        rows.append({"question": sentence(rng, 1, 3), "choices": choices, "label": rng.randrange(len(choices))})
    tokenizer, hf = tokenizers_of("bert", tmp_path / "tokenizer")
    ours = both(cases, mesh, tmp_path, "BertForMultipleChoice", "bert")
    task, examples = task_of("multiple_choice", ours, tokenizer, rows)

    def loss(chosen):
        losses = []
        for row in (rows[i] for i in chosen):
            flat = hf([row["question"]] * len(row["choices"]), row["choices"], **PADDED)
            losses.append(ours.torch(**{name: x[None] for name, x in flat.items()}, labels=torch.tensor([row["label"]])).loss)
        return torch.stack(losses).mean()

    follow(ours, task, examples, loss, script, free=["head/out/bias"])


# --- writing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "case", "architecture", "smoothing"),
    [("t5", "t5", "T5ForConditionalGeneration", 0.0), ("roberta", "bart", "BartForConditionalGeneration", 0.1)],
    ids=["t5", "bart"],
)
def test_text_to_text_learns_the_rows_of_transformers_collator(kind, case, architecture, smoothing, cases, mesh, script, tmp_path):
    """Inputs of the decoder and targets are those of `DataCollatorForSeq2Seq`, whose padding of labels torch leaves out."""
    import torch
    import transformers

    rng = random.Random(5)
    rows = [{"source": sentence(rng, 1, 9), "target": sentence(rng, 1, 9)} for _ in range(6)]
    tokenizer, hf = tokenizers_of(kind, tmp_path / "tokenizer")
    ours = both(cases, mesh, tmp_path, architecture, case)
    task, examples = task_of("text_to_text", ours, tokenizer, rows, target_length=12, label_smoothing=smoothing)
    collator = transformers.DataCollatorForSeq2Seq(hf, model=ours.torch, label_pad_token_id=IGNORED)
    encoded = [hf(row["source"], text_target=row["target"], truncation=True, max_length=LENGTH) for row in rows]
    encoded = [{**each, "labels": hf(text_target=row["target"], truncation=True, max_length=12)["input_ids"]}
               for each, row in zip(encoded, rows, strict=True)]  # fmt: skip
    encoded = [{name: each[name] for name in ("input_ids", "attention_mask", "labels")} for each in encoded]
    together = collator(encoded)
    for i, item in enumerate(examples.items):
        kept = together["labels"][i] != IGNORED
        assert item["decoder"]["targets"].tolist() == together["labels"][i][kept].tolist()
        assert item["decoder"]["tokens"].tolist() == together["decoder_input_ids"][i][kept].tolist()
        assert item["encoder"]["tokens"].tolist() == together["input_ids"][i][together["attention_mask"][i] > 0].tolist()
        assert item["decoder"]["tokens"][0] == ours.torch.config.decoder_start_token_id
        assert item["decoder"]["targets"][-1] == hf.eos_token_id
    measure = torch.nn.CrossEntropyLoss(ignore_index=IGNORED, label_smoothing=smoothing)

    def loss(chosen):
        batch = collator([encoded[i] for i in chosen])
        out = ours.torch(**batch)
        if not smoothing:
            return out.loss
        return measure(out.logits.flatten(0, 1), batch["labels"].flatten())

    # What BART adds to its logits is a buffer in torch, which no step moves.
    follow(ours, task, examples, loss, script, still="head/bias" if case == "bart" else None)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    "{{ 'assistant :' if add_generation_prompt }}"
)


@pytest.mark.parametrize("packed", [False, True])
def test_llama_learns_the_assistants_tokens_alone_as_torch(packed, cases, mesh, script, tmp_path):
    """Which tokens are learned says transformers' mask; packed conversations are each computed alone there."""
    import torch

    rng, rows = random.Random(6), []
    for i in range(6 if not packed else 14):
        turns = [(role, sentence(rng, 1, 3)) for _ in range(1 + i % 2) for role in ("user", "assistant")]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    tokenizer, hf = tokenizers_of("llama", tmp_path / "tokenizer")
    ours = both(cases, mesh, tmp_path, "LlamaForCausalLM", "llama")
    task, examples = task_of("chat", ours, tokenizer, rows, length=32, chat_template=TEMPLATE, packed=packed)
    encoded = [
        hf.apply_chat_template(row["messages"], chat_template=TEMPLATE, return_dict=True, return_assistant_tokens_mask=True)
        for row in rows
    ]
    found = {tuple(each["input_ids"][:-1]): each for each in encoded}
    assert any(0 in each["assistant_masks"][1:] and 1 in each["assistant_masks"] for each in encoded)
    rows_of = []  # of each example its conversations
    for item in examples.items:
        segments = item["segments"]
        rows_of.append([found[tuple(item["tokens"][segments == s].tolist())] for s in range(1, segments.max() + 1)])
    assert sum(map(len, rows_of)) == len(rows) and packed == (len(rows_of) < len(rows))

    def loss(chosen):
        total, count = 0, 0
        for each in (each for i in chosen for each in rows_of[i]):
            ids, mask = torch.tensor(each["input_ids"]), torch.tensor(each["assistant_masks"], dtype=torch.bool)
            labels = torch.where(mask, ids, IGNORED)[1:]
            logits = ours.torch(input_ids=ids[None, :-1]).logits[0]
            total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            count += int((labels != IGNORED).sum())
        return total / count

    follow(ours, task, examples, loss, script)


# --- preferences -----------------------------------------------------------------------------


def test_dpo_is_equation_7_over_torchs_log_probabilities(cases, mesh, tmp_path):
    """Loss, rewards and gradient (Rafailov et al. 2023), the reference through `Predictor` and `Preference.refer`."""
    import torch

    rng, beta = random.Random(8), 0.3
    rows = [{"prompt": sentence(rng, 1, 3), "chosen": sentence(rng, 1, 3), "rejected": sentence(rng, 1, 3)} for _ in range(6)]
    tokenizer, hf = tokenizers_of("llama", tmp_path / "tokenizer")
    reference = both(cases, mesh, tmp_path / "reference", "LlamaForCausalLM", "llama")
    ours = both(cases, mesh, tmp_path / "policy", "LlamaForCausalLM", "llama")
    with torch.no_grad():
        for parameter in ours.torch.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    ours = dataclasses.replace(ours, params=ours.reread("moved"))
    task, examples = task_of("preference", ours, tokenizer, rows, length=32, beta=beta)

    def likelihoods(model, name):
        sums = []
        for row in rows:
            prompt = hf(row["prompt"])["input_ids"]
            answer = hf(row[name], add_special_tokens=False)["input_ids"] + [hf.eos_token_id]
            ids = torch.tensor([prompt + answer])
            logp = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
            picked = logp.gather(1, ids[0, 1:, None])[:, 0]
            sums.append(picked[len(prompt) - 1 :].sum())
        return torch.stack(sums)

    predictor = Predictor(task, reference.model, mesh, batch_size=4)
    passed = predictor.run(reference.params, examples.items, loss=False)
    before = {name: likelihoods(reference.torch, name).detach() for name in ("chosen", "rejected")}
    for name, expected in before.items():
        np.testing.assert_allclose([out[f"{name}_B"] for out in passed.outputs], expected, rtol=1e-5, atol=1e-4)
    task.refer(examples, passed.outputs)

    gains = {name: likelihoods(ours.torch, name) - before[name] for name in before}
    expected = -torch.nn.functional.logsigmoid(beta * (gains["chosen"] - gains["rejected"])).mean()
    expected.backward()
    passed = predictor.run(ours.params, examples.items)
    assert passed.loss == pytest.approx(expected.item(), abs=1e-4) and abs(passed.loss - np.log(2)) > 1e-3
    assert passed.means["chosen_reward"] == pytest.approx(beta * gains["chosen"].mean().item(), abs=1e-4)
    margins = (beta * (gains["chosen"] - gains["rejected"])).detach()
    assert passed.means["margin"] == pytest.approx(margins.mean().item(), abs=1e-4)
    assert passed.means["preferred"] == pytest.approx((margins > 0).float().mean().item())
    for name, gain in gains.items():
        rewards = [prediction[name] for prediction in task.read(rows, examples, passed.outputs)]
        np.testing.assert_allclose(rewards, beta * gain.detach(), atol=1e-4)

    batch = ExampleBatches(examples.items, 6, seed=0, epochs=1, pad_id=task.pad_id).batch(0)
    objective = task.objective(8)
    gradient = jax.jit(jax.grad(lambda params: objective(ours.model.apply, params, batch, None)[0] / len(rows)))(ours.params)
    with torch.no_grad():
        for parameter in ours.torch.parameters():
            parameter.copy_(parameter.grad)
    theirs = ours.reread("gradient")
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(theirs)) > 0.1
    same_parameters(gradient, theirs)


def test_class_weights_with_label_smoothing_are_torchs():
    import torch

    rng, weights = np.random.default_rng(0), [0.5, 2.0, 1.0, 3.0]
    scores, labels = rng.normal(size=(6, 4)).astype(np.float32), rng.integers(0, 4, 6)
    batch = {"labels_B": jnp.asarray(labels, jnp.int32), "weights_B": jnp.ones(6)}
    for smoothing in (0.0, 0.1):
        measure = torch.nn.CrossEntropyLoss(weight=torch.tensor(weights), label_smoothing=smoothing)
        expected = measure(torch.tensor(scores), torch.tensor(labels)).item()
        loss, weight, _ = objectives.classes(weights, smoothing)(
            lambda params, *_, **__: (params, None), jnp.asarray(scores), batch, None
        )
        assert float(loss / weight) == pytest.approx(expected, rel=1e-5)


def test_the_comparison_can_fail(cases, mesh, script, tmp_path):
    """Other labels on one side are noticed."""
    rows = [{"text": row["text"], "label": row["label"]} for row in texts()]
    tokenizer, hf = tokenizers_of("bert", tmp_path / "tokenizer")
    ours = both(cases, mesh, tmp_path, "BertForSequenceClassification", "bert", num_labels=3)
    task, examples = task_of("classification", ours, tokenizer, rows)
    encoded = script.encode_texts(hf, [([row["text"]], row["label"]) for row in rows], LENGTH, ["good", "bad", "so"])
    with pytest.raises(AssertionError, match="step 0"):
        follow(ours, task, examples, lambda chosen: ours.torch(**script.collate([encoded[i] for i in chosen], 0)).loss, script)
