"""Log-likelihoods: those of torch, those of every split over devices, and windows that predict each token once."""

from pydoc_data.topics import topics

import jax
import numpy as np
import pytest

from jaxlm.data import load_tokenizer
from jaxlm.harness import Scorer
from jaxlm.harness.likelihood import beginning
from jaxlm.models import load_model
from jaxlm.parallel import ParallelConfig, make_mesh

PAIRS = [
    ("The value of a name", " is an object."), ("The value of a name", " is"), ("It ends in a space ", "and goes on"),
    ("", "Nothing stands before it."), ("\n", "nor here"), ("A long one: " + "names of modules are names, " * 4, "so it is cut"),
    ("x", " y"), ("A second long one: " + "what is bound to a name is an object. " * 4, "cut too"), ("Ünï", "cödé ☃"),
    ("Longer than the model", " reads is this: it is as long as two windows and a half. " * 2),
]  # fmt: skip


def by_torch(theirs, ids: list[int], scored: int) -> tuple[float, bool]:
    """Of the last `scored` tokens, read alone."""
    import torch

    with torch.no_grad():
        logp = theirs(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)[-scored:]
    last = torch.tensor(ids[-scored:])
    return float(logp[torch.arange(scored), last].sum()), bool((logp.argmax(-1) == last).all())


def likeliest(theirs, ids: list[int], new: int) -> list[int]:
    import torch

    for _ in range(new):
        with torch.no_grad():
            ids = [*ids, int(theirs(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-new:]


@pytest.mark.parity
def test_continuations_are_those_of_torch(both):
    """The encodings by hand, with `transformers`' tokenizer: spaces go to the continuation, the beginning is cut to the model's
    32 positions, and what the tokenizer adds is there once."""
    import transformers

    name, theirs, folder = both
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    scorer = Scorer(load_model(str(folder)), batch_size=4)
    assert scorer.begin == ([hf.bos_token_id] if name == "llama" else [])
    expected = []
    for context, continuation in PAIRS:
        kept = context.rstrip()
        whole = hf(context + continuation)["input_ids"]
        known = hf(kept)["input_ids"]
        new = whole[len(known) :]
        ids, parts = [*(known or [hf.bos_token_id]), *new], []
        for start in range(len(ids) - len(new), len(ids), 32):
            stop = min(start + 32, len(ids))
            parts.append(by_torch(theirs, ids[max(0, stop - 33) : stop], stop - start))
        expected.append((sum(logprob for logprob, _ in parts), all(greedy for _, greedy in parts)))
    assert len(parts) > 2, "the last one has several windows"
    found = scorer.continuations(PAIRS)
    np.testing.assert_allclose([one.logprob for one in found], [logprob for logprob, _ in expected], rtol=1e-5, atol=1e-4)
    assert [one.greedy for one in found] == [greedy for _, greedy in expected]
    assert scorer.truncated == 3, "the long ones"


@pytest.mark.parity
def test_what_the_model_would_write_is_greedy(both):
    """Texts of the model itself, and the same with another last token."""
    _, theirs, folder = both
    trained = load_model(str(folder))
    scorer = Scorer(trained, batch_size=4)
    start = [1, 40, 50, 60]
    new = likeliest(theirs, start, 5)
    rows = [scorer._example(np.array([*start, *new[:-1], last]), 5) for last in (new[-1], new[-1] - 1)]
    assert [one.greedy for one in scorer._run("", rows)] == [True, False]
    assert not scorer._run("", [scorer._example(np.array([*start, new[0] - 1, *new[1:]]), 5)])[0].greedy


@pytest.mark.slow
@pytest.mark.parity
def test_whole_texts_are_those_of_torch(both):
    """Token by token, each from as much before it as its window holds."""
    _, theirs, folder = both
    scorer, tokenizer = Scorer(load_model(str(folder)), batch_size=4, length=16), load_tokenizer(folder)
    texts = ["", "ab", list(topics.values())[3][:150]]
    found = scorer.texts(texts)
    for text, (logprob, tokens) in zip(texts, found, strict=True):
        ids = tokenizer.encode(text).tolist()
        given, total = [tokenizer.bos_id, *ids], 0.0
        for i in range(len(ids)):
            stop = min((i // 16 + 1) * 16, len(ids))  # of its window, which reads 16 tokens or all that there are
            total += by_torch(theirs, given[max(0, stop - 16) : i + 2], 1)[0]
        np.testing.assert_allclose(logprob, total, rtol=1e-5, atol=1e-4)
        assert tokens == len(ids)
    assert found[0] == (0, 0)


def test_windows_cover_a_text_as_the_harness_has_it(tiny):
    """The example of lm-eval's own documentation: ten tokens, four at a time."""
    scorer = Scorer(tiny, length=4)
    bos = scorer.tokenizer.bos_id
    rows = list(scorer._windows(np.array([bos, *range(10)]), 10))
    assert [row["tokens"].tolist() for row in rows] == [[bos, 0, 1, 2], [3, 4, 5, 6], [5, 6, 7, 8]]
    assert [row["targets"][row["weights"] > 0].tolist() for row in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.slow
@pytest.mark.parallel
def test_split_over_devices_nothing_changes(tiny_folder):
    """fsdp 2 × tensor 2 against one device and against each pair alone; ten pairs in batches of four leave a short one."""
    one = Scorer(load_model(str(tiny_folder)), batch_size=4)
    mesh = make_mesh(ParallelConfig(fsdp=2, tensor=2), jax.devices()[:4])
    split = Scorer(load_model(str(tiny_folder), mesh), batch_size=4)
    expected, found = one.continuations(PAIRS), split.continuations(PAIRS)
    alone = [one.continuations([pair])[0] for pair in PAIRS]
    for others in (found, alone):
        np.testing.assert_allclose([x.logprob for x in others], [x.logprob for x in expected], rtol=1e-5)
        assert [x.greedy for x in others] == [x.greedy for x in expected]
    np.testing.assert_allclose(split.texts(["abc" * 30])[0][0], one.texts(["abc" * 30])[0][0], rtol=1e-5)


def test_the_same_shapes_are_compiled_once(tiny):
    scorer = Scorer(tiny, batch_size=4)
    scorer.continuations(PAIRS)
    compiled = scorer._step._cache_size()
    scorer.continuations(PAIRS[::-1])
    assert scorer._step._cache_size() == compiled <= 4


def test_impossible_continuations_are_told(tiny):
    scorer = Scorer(tiny, length=8)
    with pytest.raises(ValueError, match="'' adds no token to its context 'x'"):
        scorer.continuations([("x", "")])
    with pytest.raises(ValueError, match="length is -1"):
        Scorer(tiny, length=-1)
    assert scorer.continuations([]) == [] and scorer.texts([]) == []


def test_a_beginning_of_text_on_request(tiny):
    """Our own tokenizers put nothing before a text; with `bos` its end of text stands there, as in training."""
    assert beginning(tiny.tokenizer) == []
    plain, begun = (Scorer(tiny, bos=bos).continuations([("a", "b"), ("", "b")]) for bos in (False, True))
    assert plain[0].logprob != begun[0].logprob and plain[1] == begun[1]
