"""Fine-tune a BERT folder with PyTorch and transformers: the other side of jaxlm's fine-tuning results.

A plain training loop with the recipe, the order of examples and the padding of jaxlm's runs, so that only the
framework differs. Nothing of jaxlm is used. Each run appends one JSON line to `--out`.

    python benchmarks/torch_finetune.py sst2 --model FOLDER --data FOLDER --out results.jsonl

Recipe: AdamW (0.9, 0.999, 1e-8; decay 0.01 on matrices only), linear warm-up over 10% of the steps and linear decay
to 0, gradients clipped to norm 1, dropout as in config.json, float32. Scores are taken after every epoch.
"""

from __future__ import annotations

import argparse
import collections
import csv
import hashlib
import json
import os
import re
import string
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from train_step import processor

BETAS, EPSILON, WEIGHT_DECAY, CLIP, WARMUP = (0.9, 0.999), 1e-8, 0.01, 1.0, 0.1
RUN, MULTIPLE = 50, 16  # batches sorted by length together; batches are padded to a multiple of this
STRIDE, CANDIDATES, ANSWER = 128, 20, 30  # SQuAD: tokens that windows share; starts and ends tried; longest answer, in tokens
IGNORED = -100  # a label that transformers leaves out of the loss
Scores = dict[str, float]


@dataclass(frozen=True)
class Task:
    """A task that is read, encoded to examples of ids and labels, and scored from the logits of those examples."""

    head: str  # name of the transformers class that the model is loaded as
    read: Callable[[Path], dict[str, list]]  # data folder → split → records; `train` first, the others are scored
    labels: Callable[[list], list[str]]  # training records → names of the classes
    encode: Callable[[Any, list, int, list[str]], list[dict]]  # tokenizer, records, length, labels → examples
    score: Callable[[list, list[dict], list[np.ndarray], list[str]], Scores]  # records, examples, their logits, labels → scores
    length: int = 128  # of the longest example, in tokens


def inputs(encoded: Any, i: int) -> dict[str, list[int]]:
    return {key: encoded[key][i] for key in ("input_ids", "token_type_ids", "attention_mask")}


# ---------------------------------------------------------------------------------------------
# Texts, or pairs of them, with a class. Record: (texts, label).

TABS = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}


def classify(folder: str, files: dict[str, str], texts: list[int], label: int, header: bool = False, **dialect: Any) -> Task:
    """A task whose texts and label stand in these columns of a table."""

    def read(data: Path) -> dict[str, list]:
        records = {}
        for split, name in files.items():
            with (data / folder / name).open(encoding="utf-8-sig", newline="") as file:
                rows = list(csv.reader(file, **dialect))[header:]
            records[split] = [([row[i] for i in texts], row[label]) for row in rows]
        return records

    return Task(
        "AutoModelForSequenceClassification", read, lambda found: sorted({y for _, y in found}), encode_texts, score_classes
    )


def encode_texts(tokenizer: Any, records: list, length: int, labels: list[str]) -> list[dict]:
    texts = [[record[0][i] for record in records] for i in range(len(records[0][0]))]
    encoded = tokenizer(*texts, truncation=True, max_length=length)
    return [{**inputs(encoded, i), "labels": labels.index(label)} for i, (_, label) in enumerate(records)]


def score_classes(records: list, examples: list[dict], logits: list[np.ndarray], labels: list[str]) -> Scores:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    true = np.array([example["labels"] for example in examples])
    predicted = np.array([values.argmax() for values in logits])
    scores = {"accuracy": accuracy_score(true, predicted)}
    if len(labels) == 2:
        scores |= {"f1": f1_score(true, predicted), "mcc": matthews_corrcoef(true, predicted)}
    return scores


# ---------------------------------------------------------------------------------------------
# Words with tags. Record: [(word, tag), …].


def read_wnut17(data: Path) -> dict[str, list]:
    def read(file: str) -> list:
        sentences: list[list[tuple[str, str]]] = [[]]
        for line in (data / "ref-wnut17-ner" / file).read_text("utf-8").split("\n"):
            word, _, tag = line.partition("\t")
            if word.strip():
                sentences[-1].append((word, tag.strip()))
            elif sentences[-1]:
                sentences.append([])
        return [sentence for sentence in sentences if sentence]

    return {"train": read("wnut17train.conll"), "dev": read("emerging.dev.conll"), "test": read("emerging.test.annotated")}


def tags(records: list) -> list[str]:
    return sorted({tag for sentence in records for _, tag in sentence})


def encode_words(tokenizer: Any, records: list, length: int, labels: list[str]) -> list[dict]:
    """The first sub-word of each word has the word's tag as label; `words` says which word a labelled token begins."""
    words = [[word for word, _ in sentence] for sentence in records]
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=length)
    examples = []
    for i, sentence in enumerate(records):
        word_of = encoded.word_ids(i)
        first = [w if w is not None and w != before else None for w, before in zip(word_of, [None, *word_of], strict=False)]
        label = [IGNORED if w is None else labels.index(sentence[w][1]) for w in first]
        examples.append({**inputs(encoded, i), "labels": label, "words": first})
    return examples


def spans(sequence: list[str]) -> set[tuple[str, int, int]]:
    """Entities as (type, first word, end) by the rules of conlleval: an I after another type or after O begins one too."""
    found, kind, start = set(), None, 0
    for i, tag in enumerate([*sequence, "O"]):
        prefix, _, name = tag.partition("-")
        if kind is not None and (prefix != "I" or name != kind):
            found.add((kind, start, i))
            kind = None
        if kind is None and prefix != "O":
            kind, start = name, i
    return found


def score_spans(records: list, examples: list[dict], logits: list[np.ndarray], labels: list[str]) -> Scores:
    right = predicted = true = 0
    for sentence, example, values in zip(records, examples, logits, strict=True):
        guess = ["O"] * len(sentence)  # stays so for words beyond the longest length
        for word, label in zip(example["words"], values.argmax(-1), strict=True):
            if word is not None:
                guess[word] = labels[label]
        ours, theirs = spans(guess), spans([tag for _, tag in sentence])
        right, predicted, true = right + len(ours & theirs), predicted + len(ours), true + len(theirs)
    return {"precision": right / max(1, predicted), "recall": right / max(1, true), "f1": 2 * right / max(1, predicted + true)}


# ---------------------------------------------------------------------------------------------
# Questions with an answer in their context. Record: a question of SQuAD with its `context`.


def read_squad(data: Path) -> dict[str, list]:
    """The published development set, split by title, since there is no training file."""
    articles = json.loads((data / "qa-squad-v1.1-dev" / "dev-v1.1.json").read_text("utf-8"))["data"]
    split: dict[str, list] = {"train": [], "held_out": []}
    for article in articles:
        digest = hashlib.blake2b(article["title"].encode(), digest_size=8).hexdigest()
        part = split["train" if int(digest, 16) % 5 else "held_out"]
        part += [{**qa, "context": paragraph["context"]} for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
    return split


def encode_questions(tokenizer: Any, records: list, length: int, labels: list[str]) -> list[dict]:
    """Windows over each context; one that does not hold the whole first answer is labelled with [CLS]."""
    encoded = tokenizer(
        [record["question"] for record in records], [record["context"] for record in records],
        truncation="only_second", max_length=length, stride=STRIDE, return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    examples = []
    for i, question in enumerate(encoded["overflow_to_sample_mapping"]):
        answer = records[question]["answers"][0]
        start, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
        ends = [encoded.char_to_token(i, start, 1), encoded.char_to_token(i, end - 1, 1)]
        offsets = [o if s == 1 else None for o, s in zip(encoded["offset_mapping"][i], encoded.sequence_ids(i), strict=True)]
        ends = [0, 0] if None in ends else ends
        examples.append({**inputs(encoded, i), "ends": ends, "question": question, "offsets": offsets})
    return examples


def answer_words(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, no punctuation, no articles."""
    kept = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def overlap(predicted: list[str], true: list[str]) -> float:
    common = sum((collections.Counter(predicted) & collections.Counter(true)).values())
    return 2 * common / (len(predicted) + len(true)) if common else 0.0


def score_answers(records: list, examples: list[dict], logits: list[np.ndarray], labels: list[str]) -> Scores:
    """Exact match and F1 in [0, 1] of the best span of all windows of a question, the better of its true answers."""
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(records)
    for example, values in zip(examples, logits, strict=True):
        context, offsets = records[example["question"]]["context"], example["offsets"]
        first, last = (np.argsort(-values[:, i], kind="stable")[:CANDIDATES] for i in (0, 1))
        for a in first:
            for b in last:
                if offsets[a] and offsets[b] and a <= b < a + ANSWER:
                    text = context[offsets[a][0] : offsets[b][1]]
                    best[example["question"]] = max(best[example["question"]], (values[a, 0] + values[b, 1], text))
    exact, f1 = [], []
    for record, (_, text) in zip(records, best, strict=True):
        ours, true = answer_words(text), [answer_words(answer["text"]) for answer in record["answers"]]
        exact.append(max(ours == words for words in true))
        f1.append(max(overlap(ours, words) for words in true))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}


TASKS = {
    "sst2": classify("sentiment-sst2", {"train": "train.tsv", "dev": "dev.tsv"}, [0], 1, **TABS),
    "agnews": classify("topic-agnews", {"train": "train_5000.csv", "test_1000": "test_1000.csv"}, [0], 1),
    "banking77": classify("intent-banking77", {"train": "train.csv", "test": "test.csv"}, [0], 1, header=True),
    "cola": classify("glue-cola", {"train": "in_domain_train.tsv", "dev": "in_domain_dev.tsv"}, [3], 1, **TABS),
    "mrpc": classify("glue-mrpc", {s: f"msr_paraphrase_{s}.txt" for s in ("train", "test")}, [3, 4], 0, header=True, **TABS),
    # Without its training file, of 180,000 titles: the development set is trained on.
    "thucnews": classify("topic-zh-thucnews-titles", {"train": "dev.txt", "test": "test.txt"}, [0], 1, **TABS),
    "wnut17": Task("AutoModelForTokenClassification", read_wnut17, tags, encode_words, score_spans),
    "squad": Task("AutoModelForQuestionAnswering", read_squad, lambda _: ["start", "end"], encode_questions, score_answers, 384),
}


# ---------------------------------------------------------------------------------------------
# Batches and the loop


def epoch_batches(examples: list[dict], size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Indices of each batch of an epoch (counted from 0): shuffled, near in length; the last short batch is kept."""
    rng = np.random.default_rng([seed, epoch])
    lengths, order = np.array([len(example["input_ids"]) for example in examples]), rng.permutation(len(examples))
    runs = [order[i : i + RUN * size] for i in range(0, len(order), RUN * size)]
    runs = [run[np.argsort(-lengths[run], kind="stable")] for run in runs]
    batches = [run[i : i + size] for run in runs for i in range(0, len(run), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def collate(examples: list[dict], pad: int) -> dict[str, torch.Tensor]:
    """Padded to the longest, rounded up to a multiple of 16."""
    longest = max(len(example["input_ids"]) for example in examples)
    shape = len(examples), -(-longest // MULTIPLE) * MULTIPLE

    def padded(key: str, fill: int) -> torch.Tensor:
        out = np.full(shape, fill, np.int64)
        for row, example in zip(out, examples, strict=True):
            row[: len(example[key])] = example[key]
        return torch.from_numpy(out)

    fills = {"input_ids": pad, "token_type_ids": 0, "attention_mask": 0}
    batch = {key: padded(key, fill) for key, fill in fills.items()}
    if "ends" in examples[0]:
        batch["start_positions"], batch["end_positions"] = torch.tensor([example["ends"] for example in examples]).unbind(1)
    elif isinstance(examples[0]["labels"], list):
        batch["labels"] = padded("labels", IGNORED)
    else:
        batch["labels"] = torch.tensor([example["labels"] for example in examples])
    return batch


def make_optimizer(model: torch.nn.Module, peak: float, steps: int) -> tuple[Any, Any]:
    """AdamW and its schedule, in which the step n = 0, 1, … is taken at the n-th rate."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = {"params": [p for p in trained if p.ndim >= 2], "weight_decay": WEIGHT_DECAY}
    others = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
    # The fastest of torch's three forms on a CPU: 15 ms a step of MiniLM on two cores, where the others take 75.
    optimizer = torch.optim.AdamW([matrices, others], lr=peak, betas=BETAS, eps=EPSILON, fused=True)
    warmup = round(WARMUP * steps)

    def rate(step: int) -> float:
        return (step + 1) / (warmup + 1) if step < warmup else (steps - 1 - step) / max(1, steps - 1 - warmup)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


@torch.inference_mode()
def predict(model: Any, examples: list[dict], size: int, pad: int) -> list[np.ndarray]:
    """Logits of each example: (classes,), or (tokens, classes) where the head stands on tokens."""
    model.eval()
    order = np.argsort([-len(example["input_ids"]) for example in examples], kind="stable")
    logits: list[Any] = [None] * len(examples)
    for i in range(0, len(order), size):
        chosen = order[i : i + size]
        out = model(**collate([examples[j] for j in chosen], pad))
        values = torch.stack([out.start_logits, out.end_logits], -1) if "start_logits" in out else out.logits
        for j, value in zip(chosen, values.numpy(), strict=True):
            logits[j] = value[: len(examples[j]["input_ids"])] if value.ndim == 2 else value
    return logits


def finetune(args: argparse.Namespace) -> dict[str, Any]:
    task = TASKS[args.task]
    length = args.length or task.length
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    records = task.read(args.data)
    labels = task.labels(records["train"])
    if args.limit:
        records = {split: found[:: max(1, len(found) // args.limit)][: args.limit] for split, found in records.items()}
    examples = {split: task.encode(tokenizer, found, length, labels) for split, found in records.items()}

    torch.manual_seed(args.seed)  # the new head and dropout
    model = getattr(transformers, task.head).from_pretrained(args.model, num_labels=len(labels), dtype=torch.float32)
    if args.freeze_embeddings:
        model.base_model.embeddings.requires_grad_(False)  # three tables and their norm
    steps = args.epochs * len(epoch_batches(examples["train"], args.batch_size, args.seed, 0))
    optimizer, schedule = make_optimizer(model, args.learning_rate, steps)

    epochs, step = [], 0
    for epoch in range(args.epochs):
        model.train()
        losses, began = [], time.perf_counter()
        for chosen in epoch_batches(examples["train"], args.batch_size, args.seed, epoch):
            loss = model(**collate([examples["train"][i] for i in chosen], tokenizer.pad_token_id)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            step += 1
            if step % 50 == 0:
                print(f"step {step} of {steps}, loss {np.mean(losses[-50:]):.4f}", file=sys.stderr)
        row = {"epoch": epoch + 1, "seconds": time.perf_counter() - began, "loss": float(np.mean(losses))}
        for split in list(records)[1:]:
            logits = predict(model, examples[split], args.batch_size, tokenizer.pad_token_id)
            row[split] = task.score(records[split], examples[split], logits, labels)
        epochs.append(row)
        print(json.dumps(row))

    seconds = sum(row["seconds"] for row in epochs)
    recipe = {key: getattr(args, key) for key in ("seed", "learning_rate", "batch_size", "limit", "freeze_embeddings", "threads")}
    return {
        "task": args.task, "framework": "torch", **recipe, "length": length, "epochs": epochs,
        "warmup": round(WARMUP * steps), "weight_decay": WEIGHT_DECAY, "clip": CLIP, "betas": BETAS, "eps": EPSILON,
        "steps": steps, "seconds": seconds, "steps_per_second": steps / seconds,
        "records": {split: len(found) for split, found in records.items()},
        "examples": {split: len(found) for split, found in examples.items()},
        "model": "/".join(args.model.resolve().parts[-2:]), "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__, "transformers": transformers.__version__, "cpu": processor(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--model", type=Path, required=True, help="folder of a BERT model and its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the folders of the data sets")
    parser.add_argument("--seed", type=int, default=0, help="of the order of examples, the new head and dropout")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="peak")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, help="longest example in tokens; 128, for squad 384")
    parser.add_argument("--limit", type=int, help="take so many records of each split, evenly spread")
    parser.add_argument("--freeze-embeddings", action="store_true")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="by default one for each core given")
    parser.add_argument("--out", type=Path, required=True, help="file that the result is appended to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    result = finetune(args)
    with args.out.open("a") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
