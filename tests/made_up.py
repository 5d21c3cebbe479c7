"""Small data sets in the files, formats and columns of the real ones that configs/ names, every text of them made up."""

import csv
import io
import json
import pathlib
import random

import numpy as np

NAMES = "Ada Ben Cleo Dan Eve Finn".split()  # noqa: SIM905
PLACES = "harbour market forest library station garden".split()  # noqa: SIM905
THINGS = "lamp boat chair letter apple drum".split()  # noqa: SIM905


class Writer:
    """Seeded, so that a set is the same each time."""

    def __init__(self, seed: int = 0):
        self.rng = random.Random(seed)
        syllables = [a + b for a in "bdfglmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "il")]
        self.words = ["".join(self.rng.choices(syllables, k=self.rng.randint(2, 4))) for _ in range(4000)]

    def sentence(self) -> str:
        name, place, thing = (self.rng.choice(kind) for kind in (NAMES, PLACES, THINGS))
        return f"{name} saw a {self.rng.choice(self.words)} {thing} in the {place}."

    def text(self, sentences: int) -> str:
        return " ".join(self.sentence() for _ in range(sentences))

    def rare(self, words: int) -> str:
        """Words of which hardly any comes twice: there is much for a tokenizer to learn."""
        return " ".join(self.rng.choices(self.words, k=words))


def lines(rows) -> str:
    return "".join(f"{row}\n" for row in rows)


def json_lines(rows) -> str:
    return lines(json.dumps(row, ensure_ascii=False) for row in rows)


def csv_lines(rows, quoting=csv.QUOTE_MINIMAL) -> str:
    out = io.StringIO()
    csv.writer(out, quoting=quoting, lineterminator="\n").writerows(rows)
    return out.getvalue()


def tsv_with_mark(rows) -> str:
    """As MRPC's files are: a byte-order mark, and lines that end in CRLF."""
    return "\ufeff" + "".join("\t".join(map(str, row)) + "\r\n" for row in rows)


def squad(w: Writer, articles=12) -> str:
    def paragraph(article, number):
        context, asked = w.text(6), []
        for i, name in enumerate(name for name in NAMES if name in context):
            start = context.index(name)
            asked.append({"id": f"{article}-{number}-{i}", "question": f"Who saw it, {w.rare(2)}?",
                          "answers": [{"text": name, "answer_start": start}]})  # fmt: skip
        return {"context": context, "qas": asked}

    found = [{"title": f"Article {i}", "paragraphs": [paragraph(i, n) for n in range(2)]} for i in range(articles)]
    return json.dumps({"version": "1.1", "data": found})


def conll(w: Writer, sentences=60) -> str:
    """A TAB stands in some of the lines between sentences, as in WNUT 2017's file to train on."""
    made = []
    for i in range(sentences):
        words = w.sentence().removesuffix(".").split()
        tags = ["B-person" if word in NAMES else "B-location" if word in PLACES else "O" for word in words]
        made += [f"{word}\t{tag}" for word, tag in zip(words, tags, strict=True)] + [".\tO", "\t" if i % 3 else ""]
    return lines(made)


def dialogue(w: Writer, rows=40) -> list[str]:
    return [" __eou__ ".join(w.sentence() for _ in range(w.rng.randint(2, 5))) + " __eou__" for _ in range(rows)]


def moderation(w: Writer, rows=60):
    """A category that a row does not name is unknown there."""
    for i in range(rows):
        marks = {name: int(i % (k + 3) == 0) for k, name in enumerate(("S", "H", "V", "HR", "SH"))}
        yield {"prompt": w.text(2)} | {name: mark for name, mark in marks.items() if w.rng.random() < 0.9}


def preferences(w: Writer, rows=40):
    for _ in range(rows):
        asked = f"\n\nHuman: {w.text(1)}\n\nAssistant: {w.sentence()}\n\nHuman: {w.sentence()}\n\nAssistant:"
        yield {"chosen": f"{asked} Gladly, {w.rare(3)}.", "rejected": f"{asked} No {w.rare(4)}."}


def files(w: Writer) -> dict[str, str]:
    """Path below the folder of data sets → its content."""

    def labelled(n, labels):
        return [(w.sentence(), labels[i % len(labels)]) for i in range(n)]

    same = [(i % 2, 10 + i, 20 + i, f'{w.sentence()} "Yes', w.sentence()) for i in range(60)]
    simlex = ["word1", "word2", "POS", "SimLex999", "conc(w1)", "conc(w2)", "concQ", "Assoc(USF)", "SimAssoc333", "SD(SimLex)"]
    papers = [{"source": [w.sentence() for _ in range(4)], "source_labels": [0], "rouge_scores": [0.5], "paper_id": str(i),
               "target": [w.sentence()], "title": w.rare(3)} for i in range(300)]  # fmt: skip
    papers[0]["source"] = [w.rare(6000)]  # the words that 4,000 entries of a vocabulary are made of
    choices = [{"query": w.sentence(), "choices": [w.rare(2) for _ in range(4)], "gold": i % 4} for i in range(40)]
    titles = [("".join(w.rng.choices("春夏秋冬山水花鸟日月", k=8)), i % 10) for i in range(80)]
    made = {
        "sentiment-sst2/train.tsv": lines(f"{text}\t{label}" for text, label in labelled(60, "01")),
        "glue-cola/in_domain_train.tsv": lines(
            f"gj04\t{label}\t{'*' if label == '0' else ''}\t{text}" for text, label in labelled(60, "01")
        ),
        "topic-agnews/train_5000.csv": csv_lines(labelled(80, (0, 1, 2, 3)), csv.QUOTE_NONNUMERIC),
        "intent-banking77/train.csv": csv_lines([("text", "category"), *labelled(80, ["card lost", "top_up", "fee, extra"])]),
        "glue-mrpc/msr_paraphrase_train.txt": tsv_with_mark([("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"), *same]),
        "robust-counter-fitting-lexicon/SimLex-999.txt": lines(
            "\t".join(map(str, row))
            for row in (simlex, *((*w.rare(2).split(), "A", w.rng.randint(0, 100) / 10, 1, 2, 1, 3, 0, 0.4) for _ in range(60)))
        ),
        "mc-openbookqa-copa-winogrande/openbook_qa.jsonl": json_lines(choices),
        "qa-squad-v1.1-dev/dev-v1.1.json": squad(w),
        "ref-wnut17-ner/wnut17train.conll": conll(w),
        "ref-preference-hh/harmless_base_test_1000.jsonl": json_lines(preferences(w)),
        "ref-moderation-openai/samples-1595.jsonl": json_lines(moderation(w)),
        "summ-scitldr/train.jsonl": json_lines(papers),
        "topic-zh-thucnews-titles/dev.txt": lines(f"{title}\t{label}" for title, label in titles),
        "topic-zh-thucnews-titles/test.txt": lines(f"{title}\t{label}" for title, label in titles[:20]),
        "lm-tinyshakespeare/input.txt": "\n\n".join(f"{name.upper()}:\n{w.text(2)}" for name in NAMES * 60),
        "dialogue-xdailydialog/en_1k_part.txt": lines(dialogue(w)),
    }
    for name in ("en_dev", "en_test"):
        made[f"dialogue-xdailydialog/{name}.txt"] = lines(f"{turns}\t1\t3 4\t0 0" for turns in dialogue(w, 20))
    for name, count in (("train", 600), ("val", 12)):
        made[f"mt-multi30k-en-de/{name}.en.txt"] = lines(w.rare(12) for _ in range(count))
        made[f"mt-multi30k-en-de/{name}.de.txt"] = lines(w.rare(12) for _ in range(count))
    return made


def write_data(folder: pathlib.Path) -> pathlib.Path:
    """All of them, below `folder`."""
    for path, text in files(Writer()).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf8", newline="")
    return folder


def write_documents(file: pathlib.Path, count: int = 200) -> pathlib.Path:
    """Unlabelled text: a document a line."""
    w = Writer(1)
    file.write_text(json_lines({"text": w.text(w.rng.randint(2, 8))} for _ in range(count)), encoding="utf8")
    return file


def predictable_rows(rows, seed):
    """Rows of 32 of 128 tokens with something to learn: each token mostly follows from the one before."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((rows, 33), np.int32)
    for i in range(1, 33):
        tokens[:, i] = np.where(rng.random(rows) < 0.9, (tokens[:, i - 1] * 5 + 7) % 128, rng.integers(0, 128, rows))
    return {"tokens_BL": tokens[:, :-1], "targets_BL": tokens[:, 1:], "weights_BL": np.ones((rows, 32), np.float32)}
