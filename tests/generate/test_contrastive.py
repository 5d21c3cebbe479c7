"""Contrastive search: the texts of equation 5 worked out by hand, every candidate read with its whole text."""

import itertools
import pathlib
import sys

import jax
import numpy as np
import pytest

from jaxlm.generate import ContrastiveConfig, ContrastiveGenerator, Generator, SampleConfig
from jaxlm.hub import load_folder
from jaxlm.model import HeadConfig, Model, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh, stored_shardings

sys.path.append(str(pathlib.Path(__file__).parent.parent / "hub"))
from torch_models import CASES, make

ONE = make_mesh(ParallelConfig(), jax.devices()[:1])
V, T = 33, 14
PROMPTS = [np.random.default_rng(length).integers(0, V, length).tolist() for length in (5, 1, 9)]


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def by_hand(forward, prompt: list[int], config: ContrastiveConfig, stop=()) -> list[int]:
    """`forward` gives hidden states (K, L, D) and logits (K, L, V) of whole texts, without a cache; here all is float64."""
    text, alpha = list(prompt), config.penalty_alpha
    for _ in range(config.max_tokens):
        logits = forward([text])[1][0, -1].astype(np.float64)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        candidates = np.argsort(-p, kind="stable")[: config.top_k]
        hidden = forward([[*text, int(v)] for v in candidates])[0].astype(np.float64)
        hidden /= np.linalg.norm(hidden, axis=-1, keepdims=True)
        likeness = np.einsum("KD,KLD->KL", hidden[:, -1], hidden[:, :-1]).max(axis=1)
        scores = (1 - alpha) * p[candidates] - alpha * likeness
        token = int(candidates[np.argmax(scores)])
        if token in stop:
            break
        text.append(token)
    return text[len(prompt) :]


def model_of(position: str) -> Model:
    # Tied embeddings would say the last token again; a table of 40 entries for 33 tokens.
    sizes = {"vocab_size": 40, "positions": 32, "layers": 2, "width": 16, "heads": 4}
    if position == "windowed":  # texts are long enough for a ring
        position, sizes = "rotary", {**sizes, "layer_pattern": "LG", "window": 3}
    return Model(TransformerConfig(**sizes, position=position, tie_embeddings=False, init_std=0.5))


@pytest.fixture(scope="module", params=[slow("learned"), "rotary", slow("windowed")])
def ours(request):
    model = model_of(request.param)
    params = model.init(jax.random.key(0))

    @jax.jit
    def read(params, tokens_BL):
        hidden_BLD = model.apply(params, {"tokens_BL": tokens_BL}, method="hidden")
        return hidden_BLD, model.apply(params, {"tokens_BL": tokens_BL})[0]

    def forward(texts):
        row = np.zeros((4, 24), np.int32)  # what stands behind a text is not seen
        row[: len(texts), : len(texts[0])] = texts
        hidden, logits = read(params, row)
        return np.asarray(hidden)[: len(texts), : len(texts[0])], np.asarray(logits)[: len(texts), : len(texts[0]), :V]

    return model, params, forward, ContrastiveGenerator(model, ONE, V)


def test_texts_are_those_worked_out_by_hand(ours):
    """Prompts of several lengths in one batch, with tokens that end a text; another weight needs no other program."""
    _, params, forward, generator = ours
    texts = {}
    for alpha in (0.6, 0.2):
        config = ContrastiveConfig(4, alpha, T)
        texts[alpha] = generator(params, PROMPTS, config, stop=[V, V + 1])  # ids that no text holds
        assert texts[alpha] == [by_hand(forward, prompt, config) for prompt in PROMPTS]
    assert texts[0.6] != texts[0.2]
    stop = [texts[0.6][0][-1], texts[0.6][1][T // 2]]
    found = generator(params, PROMPTS, ContrastiveConfig(4, 0.6, T), stop)
    assert found == [list(itertools.takewhile(lambda token: token not in stop, text)) for text in texts[0.6]]
    assert min(map(len, found)) < T and len(set(map(len, found))) > 1, "texts end sooner and later"
    assert generator._run._cache_size() == 1


@pytest.mark.slow
def test_without_a_penalty_or_a_choice_it_is_greedy(ours):
    """And with a penalty alone no token that stands in the way: other texts. All candidates may be asked for, and more."""
    model, params, forward, generator = ours
    greedy = [list(Generator(model, ONE, V).stream(params, prompt, T, SampleConfig(0))) for prompt in PROMPTS]
    assert generator(params, PROMPTS, ContrastiveConfig(4, 0.0, T)) == greedy
    assert generator(params, PROMPTS, ContrastiveConfig(1, 0.6, T)) == greedy
    alone = generator(params, PROMPTS, ContrastiveConfig(4, 1.0, T))
    assert alone == [by_hand(forward, prompt, ContrastiveConfig(4, 1.0, T)) for prompt in PROMPTS] != greedy
    assert generator(params, PROMPTS, ContrastiveConfig(V, 0.6, 5)) == generator(params, PROMPTS, ContrastiveConfig(99, 0.6, 5))


@pytest.mark.slow
def test_a_text_beyond_the_room_that_the_cache_begins_with(ours):
    """The cache grows after 32 tokens; a model of learned positions has no room for it and says so."""
    model, params, _, generator = ours
    config = ContrastiveConfig(3, 0.5, 40)
    if model.config.position == "learned":
        with pytest.raises(ValueError, match="a prompt of 9 tokens and max_tokens 40 need more than the 32 positions"):
            generator(params, PROMPTS, config)
        return

    def forward(texts):
        batch = {"tokens_BL": np.pad(texts, ((0, 3 - len(texts)), (0, 64 - len(texts[0])))).astype(np.int32)}
        hidden, logits = read(params, batch)
        return np.asarray(hidden)[: len(texts), : len(texts[0])], np.asarray(logits)[: len(texts), : len(texts[0]), :V]

    read = jax.jit(lambda p, batch: (model.apply(p, batch, method="hidden"), model.apply(p, batch)[0]))
    assert generator(params, PROMPTS, config) == [by_hand(forward, prompt, config) for prompt in PROMPTS]


@pytest.mark.slow
def test_on_a_mesh_of_eight_devices_the_texts_are_the_same(ours):
    model, params, _, generator = ours
    config, mesh = ContrastiveConfig(4, 0.6, T), make_mesh(ParallelConfig(data=2, fsdp=2, tensor=2))
    split = jax.device_put(params, stored_shardings(model.axes, model.shapes, mesh))
    assert ContrastiveGenerator(model, mesh, V)(split, PROMPTS, config) == generator(params, PROMPTS, config)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_texts_are_those_of_torch_read_without_a_cache(name, tmp_path):
    """`transformers` 5 has the search no more: its models' hidden states and logits, equation 5 by hand."""
    import torch

    theirs = make(*CASES[name])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    model, params, *_ = load_folder(str(tmp_path), ONE)

    def forward(texts):
        with torch.no_grad():
            out = theirs(torch.tensor(texts), output_hidden_states=True, use_cache=False)
        return out.hidden_states[-1].numpy(), out.logits.numpy()

    config = ContrastiveConfig(5, 0.6, T)
    expected = [by_hand(forward, prompt, config) for prompt in PROMPTS]
    found = ContrastiveGenerator(model, ONE, 61)(params, PROMPTS, config)
    assert found == expected != [by_hand(forward, prompt, ContrastiveConfig(1, 0.0, T)) for prompt in PROMPTS]


def test_mistakes_are_told():
    for wrong, message in (
        ({"top_k": 0}, "top_k is 0: it must be at least 1"),
        ({"penalty_alpha": 1.5}, "penalty_alpha is 1.5: it must be from 0 to 1"),
        ({"penalty_alpha": float("nan")}, "penalty_alpha is nan"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ContrastiveConfig(**wrong)
    generator = ContrastiveGenerator(model_of("rotary"), ONE, V)
    with pytest.raises(ValueError, match="a prompt is empty"):
        generator({}, [[3], []], ContrastiveConfig())
    assert generator({}, [], ContrastiveConfig()) == []
    encoder = TransformerConfig(
        vocab_size=40, positions=8, layers=1, width=8, heads=2, architecture="encoder", head=HeadConfig("masked_lm")
    )
    with pytest.raises(ValueError, match="not encoder with masked_lm"):
        ContrastiveGenerator(Model(encoder), ONE, V)
