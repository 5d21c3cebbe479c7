"""Many prompts at once: the texts of `transformers`, token for token; those of each prompt alone; the best by brute force."""

import collections
import dataclasses
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.generate import BatchGenerator, DecodeConfig, Generator, SampleConfig
from jaxlm.generate.batch import Prefilled, beam_search, greedy
from jaxlm.generate.processors import LogitsRules
from jaxlm.hub import load_folder
from jaxlm.model import Model, TransformerConfig, empty_cache
from jaxlm.parallel import ParallelConfig, make_mesh, stored_shardings

sys.path.append(str(pathlib.Path(__file__).parent.parent / "hub"))
from torch_models import BART, CASES, T5, make

PAD, START, V = 60, 2, 61
ONE = make_mesh(ParallelConfig(), jax.devices()[:1])


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 40, length).tolist() for length in lengths]


# --- transformers is right ----------------------------------------------------------------------

# As many layers in the decoder as in the encoder: their cache counts those of the encoder.
TORCH = {
    "gpt2": CASES["gpt2"],
    "llama": CASES["llama"],
    "qwen3": CASES["qwen3"],
    "t5": ("T5ForConditionalGeneration", {**T5, "num_decoder_layers": 2}),
    "bart": ("BartForConditionalGeneration", {**BART, "decoder_layers": 2, "scale_embedding": False}),
}
PROMPTS = prompts_of(5, 9, 3, 12, 7, 4, 1, 10)


@pytest.fixture(scope="module", params=TORCH)
def both(request, tmp_path_factory):
    """A torch model that says many things with confidence, ours with its parameters, and three tokens to end at: those
    that most texts hold."""
    import torch

    theirs = make(*TORCH[request.param])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # A loud table of tied embeddings would repeat the last token for ever.
            if parameter.ndim > 1 and ("shared" not in name):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
        if request.param == "bart":
            theirs.final_logits_bias.mul_(0.3)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    model, params, *_ = load_folder(str(folder), ONE)
    said = collections.Counter(token for text in generate(theirs, []) for token in set(text))
    return request.param, theirs, model, params, sorted(token for token, _ in said.most_common(3))


def generate(theirs, stop: list[int], **options) -> list[list[int]]:
    """New tokens by `transformers`, without what ended them."""
    return generated(theirs, stop, **options)[0]


def generated(theirs, stop: list[int], **options):
    """The same, and the scores of the texts where beams have some."""
    import torch
    import transformers

    reads, width = theirs.config.is_encoder_decoder, max(map(len, PROMPTS))
    ids, shown = np.full((len(PROMPTS), width), PAD), np.zeros((len(PROMPTS), width), np.int64)
    for row, prompt in enumerate(PROMPTS):
        place = slice(len(prompt)) if reads else slice(width - len(prompt), None)
        ids[row, place], shown[row, place] = prompt, 1
    theirs.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=START if reads else None, pad_token_id=PAD, eos_token_id=stop or None
    )
    out = theirs.generate(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(shown), do_sample=False, max_new_tokens=12,
        return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    rows = out.sequences[:, 1 if reads else width :].tolist()
    texts = [list(itertools.takewhile(lambda token: token not in stop, row)) for row in rows]
    return texts, out.sequences_scores.numpy() if "sequences_scores" in out else None, out


@pytest.mark.parity
def test_texts_are_those_of_transformers(both):
    """Token for token: greedy, and four beams with three length penalties (of which the last makes the rule matter by which
    a search gives up); ragged prompts, several tokens that end a text."""
    name, theirs, model, params, stop = both
    ours, lengths = BatchGenerator(model, ONE, V, pad_id=PAD, start_id=START), set()
    for beams, penalty in ((1, 1.0), (4, 1.0), (4, 0.6), (4, 2.0)):
        expected = generate(theirs, stop, num_beams=beams, length_penalty=penalty)
        found = ours(params, PROMPTS, DecodeConfig(12, beams, penalty), stop)
        assert found == expected, (beams, penalty)
        lengths |= {len(text) for text in found}
    assert len(lengths) > 1, "texts end sooner and later"
    if name == "bart":
        forced, banned = 7, max(expected, key=len)[1]
        expected = generate(theirs, stop, num_beams=4, forced_bos_token_id=forced, bad_words_ids=[[banned]])
        ours = BatchGenerator(model, ONE, V, pad_id=PAD, start_id=START, banned=[banned])
        assert ours(params, PROMPTS, DecodeConfig(12, 4), stop, forced=[forced]) == expected


@pytest.mark.parity
def test_the_best_texts_and_their_scores_are_those_of_transformers(both):
    """The three best of four beams; the log-probabilities of greedy texts, from the scores of each step."""
    _, theirs, model, params, stop = both
    ours = BatchGenerator(model, ONE, V, pad_id=PAD, start_id=START)
    for penalty in (1.0, 0.6):
        texts, scores, _ = generated(theirs, stop, num_beams=4, length_penalty=penalty, num_return_sequences=3)
        found = ours.ranked(params, PROMPTS, DecodeConfig(12, 4, penalty, n_best=3), stop)
        assert [text.tokens for best in found for text in best] == texts
        np.testing.assert_allclose([text.score for best in found for text in best], scores, rtol=2e-4, atol=1e-4)
    texts, _, out = generated(theirs, stop)
    (found,) = zip(*ours.ranked(params, PROMPTS, DecodeConfig(12), stop), strict=True)
    assert [text.tokens for text in found] == texts
    steps = np.stack([np.asarray(jax.nn.log_softmax(step.numpy(), axis=-1)).max(-1) for step in out.scores], axis=1)
    for text, logp_T in zip(found, steps, strict=True):
        np.testing.assert_allclose(text.logprob, logp_T[: len(text.tokens) + 1].sum(), rtol=2e-4, atol=1e-4)


# --- each prompt alone is right -----------------------------------------------------------------

TINY = TransformerConfig(vocab_size=40, positions=64, layers=2, width=16, heads=4, position="rotary")
MODELS = {
    "decoder": dataclasses.replace(TINY, kv_heads=2, layer_pattern="LG", window=5, norm="rmsnorm", activation="swiglu"),
    "encoder-decoder": dataclasses.replace(TINY, architecture="encoder_decoder", position="relative", relative_buckets=8),
}


@pytest.fixture(scope="module", params=MODELS)
def ours(request):
    model, rng = Model(MODELS[request.param]), np.random.default_rng(0)
    return model, jax.tree.map_with_path(
        lambda path, x: rng.normal(path[-1].key == "scale", 0.5, x.shape).astype(np.float32), model.shapes
    )  # fmt: skip


def generator(model: Model, mesh=ONE) -> BatchGenerator:
    """Of a tokenizer with 37 tokens: the table's last three mean nothing."""
    return BatchGenerator(model, mesh, 37, pad_id=36, start_id=2)


def by_hand(model: Model, params, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy with all of the text read again for each token, one prompt at a time, no cache."""
    reads = model.config.architecture == "encoder_decoder"
    apply, texts = jax.jit(lambda batch: model.apply(params, batch)[0]), []
    for prompt in prompts:
        text = [2] if reads else list(prompt)
        start = len(text)
        for _ in range(new):
            row = np.zeros((1, 64), np.int32)
            row[0, : len(text)] = text
            batch = {"tokens_BL": row}
            if reads:
                source, segments = np.zeros((2, 1, 16), np.int32)
                source[0, : len(prompt)], segments[0, : len(prompt)] = prompt, 1
                batch = {"encoder": {"tokens_BL": source, "segments_BL": segments}, "decoder": batch}
            text.append(int(np.argmax(np.asarray(apply(batch))[0, len(text) - 1, :37])))
        texts.append(text[start:])
    return texts


def test_each_token_is_what_the_full_forward_says(ours):
    """For more tokens than the cache has room for at first, prompts shorter and longer than the window."""
    model, params = ours
    prompts = prompts_of(3, 16, 1, 9, seed=1)
    prompts = [[token % 37 for token in prompt] for prompt in prompts]
    found = generator(model)(params, prompts, DecodeConfig(40), ())
    assert found == by_hand(model, params, prompts, 40)
    assert len({tuple(text) for text in found}) == 4
    if model.config.architecture == "decoder":
        stream = Generator(model, ONE, 37).stream(params, prompts[0], 40, SampleConfig(temperature=0))
        assert found[0] == list(stream)


@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_text_does_not_depend_on_its_neighbours(ours, beams):
    """Alone or beside others, in any order; what stops one text leaves the others."""
    model, params = ours
    run, config = generator(model), DecodeConfig(10, beams, 0.8)
    prompts = [[token % 37 for token in prompt] for prompt in prompts_of(3, 8, 1, 5, 12, seed=2)]
    free = run(params, prompts, config, {38, 39})
    stop = {free[0][4], free[3][2]}
    alone = [run(params, [prompt], config, stop)[0] for prompt in prompts]
    assert run(params, prompts, config, stop) == alone
    assert run(params, prompts[::-1], config, stop) == alone[::-1]
    assert not stop & {token for text in alone for token in text} and min(map(len, alone)) < 10


def test_prompts_of_like_length_share_a_compilation(ours):
    model, params = ours
    run, done = generator(model), []
    for lengths in ((5, 8, 7), (8, 8, 8, 6), (2, 3)):
        run(params, [[1] * length for length in lengths], DecodeConfig(2), {5}, batch_size=2, advance=done.append)
    assert run._run._cache_size() == 1
    assert done == [2, 1, 2, 2, 2]
    assert run(params, [], DecodeConfig(2), ()) == []


def test_on_a_mesh_of_eight_devices_the_texts_are_the_same(ours):
    """Rows over data and fsdp, parameters over fsdp and tensor; three rows a batch are rounded up to four."""
    model, params = ours
    prompts = [[token % 37 for token in prompt] for prompt in prompts_of(3, 8, 1, 5, 4, 7, seed=3)]
    config, stop = DecodeConfig(8, beams=3), {3, 17}
    mesh = make_mesh(ParallelConfig(data=2, fsdp=2, tensor=2))
    split = jax.device_put(params, stored_shardings(model.axes, model.shapes, mesh))
    found = generator(model, mesh)(split, prompts, config, stop, batch_size=3)
    assert found == generator(model)(params, prompts, config, stop)


# --- the search, over a table of what follows what ----------------------------------------------


def searched(search, logp_VV: np.ndarray, firsts: list[int], T: int, *more, calls: list | None = None):
    """The texts and scores that a search finds where the next token depends on the last one alone."""
    table = jnp.asarray(logp_VV)

    def step(token_R, cache):
        if calls is not None:
            jax.debug.callback(lambda: calls.append(1))
        return table[token_R], dataclasses.replace(cache, length=cache.length + 1)

    B = len(firsts)
    cache = empty_cache(TransformerConfig(vocab_size=8, layers=1, width=2, heads=1), B, 1)
    start = Prefilled(
        table[jnp.array(firsts)],
        dataclasses.replace(cache, length=jnp.int32(1)),
        jnp.zeros((B, T), jnp.int32),
        0,
        jnp.ones(B, bool),
    )
    found = jax.device_get(jax.jit(lambda: search(step, start, *more))())
    return [
        [(tokens[:length].tolist(), score) for tokens, length, score in zip(*texts, strict=True)]
        for texts in zip(*found, strict=True)
    ]  # fmt: skip


def log_table(size: int, seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, 1.5, (size, size)).astype(np.float32)
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))


@pytest.mark.parametrize("stop", [[4], [1, 4], []], ids=str)
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
def test_with_enough_beams_the_best_of_all_texts_is_found(penalty, stop):
    """Of all texts of up to 4 of 5 tokens, that which ends or is full and has the highest log p / tokens^penalty."""
    logp, firsts = log_table(5, 1), [0, 1, 2, 3]
    found = searched(beam_search, logp, firsts, 4, jnp.array(stop, jnp.int32), jnp.float32(penalty), 128, 5)
    for first, texts in zip(firsts, found, strict=True):
        every = []
        for length in range(1, 5):
            for tokens in itertools.product(range(5), repeat=length):
                ends = tokens[-1] in stop
                if any(token in stop for token in tokens[:-1]) or not (ends or length == 4):
                    continue
                total = sum(logp[a, b] for a, b in itertools.pairwise([first, *tokens]))
                every.append((total / length**penalty, list(tokens[:-1] if ends else tokens)))
        best = sorted(every, reverse=True)[:5]
        assert [text for text, _ in texts] == [text for _, text in best]
        np.testing.assert_allclose([score for _, score in texts], [score for score, _ in best], rtol=1e-5)


def test_the_loop_ends_with_the_last_text():
    """A chain 0 → 1 → … → 7, where 7 ends: the longest of three texts needs 4 steps behind its prompt, of 30 allowed."""
    logp, calls = np.log(np.eye(8, k=1, dtype=np.float32) + 1e-6), []
    found = searched(greedy, logp, [4, 2, 5], 30, jnp.array([7], jnp.int32), jnp.float32(1), calls=calls)
    jax.effects_barrier()
    assert [text for ((text, _),) in found] == [[5, 6], [3, 4, 5, 6], [6]] and len(calls) == 4


# --- mistakes -----------------------------------------------------------------------------------


def test_mistakes_are_told():
    learned = Model(dataclasses.replace(TINY, position="learned", positions=16))
    run, params = generator(learned), learned.shapes
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        run(params, [[1], []], DecodeConfig(4), ())
    with pytest.raises(ValueError, match=r"prompt 0 of 14 tokens and max_tokens 4 need 17 positions: the model learned 16"):
        run(params, [[1] * 14], DecodeConfig(4), ())
    with pytest.raises(ValueError, match="more than the 2 forced tokens"):
        run(params, [[1]], DecodeConfig(2), (), forced=[1, 2])
    with pytest.raises(ValueError, match="start_id is missing"):
        BatchGenerator(Model(MODELS["encoder-decoder"]), ONE, 37, pad_id=0)
    encoder = dataclasses.replace(TINY, architecture="encoder", head=dataclasses.replace(TINY.head, kind="masked_lm"))
    with pytest.raises(ValueError, match="not by encoder with masked_lm"):
        BatchGenerator(Model(encoder), ONE, 37, pad_id=0)
    with pytest.raises(ValueError, match="n_best is 3: it must be at most beams, which is 2"):
        DecodeConfig(beams=2, n_best=3)
    for wrong in ({"max_tokens": 0}, {"beams": 0}, {"n_best": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is 0"):
            DecodeConfig(**wrong)


# --- what a model's generation settings force or forbid -------------------------------------------


def settings_of(name: str, theirs, stop: list[int]) -> list[tuple[dict, DecodeConfig, LogitsRules]]:
    """Options of `transformers` and ours, each of which changes a text that it is tried on."""
    said = generate(theirs, [])
    plain = said[0]
    words = ((plain[0],), (plain[2], plain[3]), tuple(plain[:2]))
    loud = collections.Counter(token for text in said for token in text if token not in stop).most_common(1)[0][0]
    prompt = 1 if theirs.config.is_encoder_decoder else 5
    bad = sorted({token for text in said for token in text} - {*stop})[::2]
    cases = [
        ({"no_repeat_ngram_size": 1, "num_beams": 1}, DecodeConfig(12, no_repeat_ngram_size=1), LogitsRules()),
        ({"no_repeat_ngram_size": 2, "repetition_penalty": 1.7},
         DecodeConfig(12, no_repeat_ngram_size=2, repetition_penalty=1.7), LogitsRules()),
        ({"bad_words_ids": [list(word) for word in words], "min_new_tokens": 7, "num_beams": 4, "length_penalty": 2.0},
         DecodeConfig(12, 4, 2.0, min_tokens=7), LogitsRules(bad_words_ids=words)),
        ({"suppress_tokens": [loud], "begin_suppress_tokens": [plain[0]], "min_length": prompt + 6, "forced_eos_token_id": stop[0],
          "num_beams": 3, "early_stopping": True, "no_repeat_ngram_size": 3, "repetition_penalty": 1.3},
         DecodeConfig(12, 3, early_stopping="true", no_repeat_ngram_size=3, repetition_penalty=1.3),
         LogitsRules(suppress_tokens=(loud,), begin_suppress_tokens=(plain[0],), min_length=prompt + 6,
                     forced_eos_token_id=(stop[0],))),
        ({"num_beams": 3, "early_stopping": "never", "length_penalty": 1.5, "no_repeat_ngram_size": 2},
         DecodeConfig(12, 3, 1.5, early_stopping="never", no_repeat_ngram_size=2), LogitsRules()),
        ({"sequence_bias": [[[plain[0]], -9.0], [[plain[1], plain[2]], 30.0], [[loud], -2.0]], "repetition_penalty": 1.3,
          "encoder_repetition_penalty": 1.8, "encoder_no_repeat_ngram_size": 2, "exponential_decay_length_penalty": [5, 1.3],
          "num_beams": 1}, DecodeConfig(12, repetition_penalty=1.3),
         LogitsRules(sequence_bias=(((plain[0],), -9.0), (tuple(plain[1:3]), 30.0), ((loud,), -2.0)),
                     encoder_repetition_penalty=1.8, encoder_no_repeat_ngram_size=2, exponential_decay_length_penalty=(5, 1.3))),
        ({"bad_words_ids": [[token] for token in bad], "renormalize_logits": True, "num_beams": 3, "length_penalty": 0.3},
         DecodeConfig(12, 3, 0.3), LogitsRules(bad_words_ids=tuple((token,) for token in bad), renormalize_logits=True)),
    ]  # fmt: skip
    if theirs.config.is_encoder_decoder:
        cases.append((
            {"forced_bos_token_id": 9, "forced_eos_token_id": stop[1], "begin_suppress_tokens": [plain[1]], "num_beams": 4,
             "encoder_no_repeat_ngram_size": 1, "early_stopping": True, "length_penalty": 0.0},
            DecodeConfig(12, 4, 0.0, early_stopping="true"),
            LogitsRules(forced_bos_token_id=9, forced_eos_token_id=(stop[1],), begin_suppress_tokens=(plain[1],),
                        encoder_no_repeat_ngram_size=1),
        ))  # fmt: skip
    return cases


@pytest.mark.slow
@pytest.mark.parity
def test_settings_of_generation_are_those_of_transformers(both):
    """Each prompt alone, as the padding of a batch counts as tokens for transformers; beams with their rules of giving up."""
    name, theirs, model, params, _ = both
    if name in ("llama", "qwen3"):
        pytest.skip("the same code as for gpt2")
    ours = BatchGenerator(model, ONE, V, pad_id=PAD, start_id=START)
    prompts = [prompt for prompt in PROMPTS if len(prompt) >= 5][:3]
    stop = sorted({text[6] for text in generate(theirs, [])})[:4]
    plain = ours(params, prompts, DecodeConfig(12), stop)
    for options, config, rules in settings_of(name, theirs, stop):
        expected = [generated_alone(theirs, prompt, stop, **options) for prompt in prompts]
        assert ours(params, prompts, config, stop, rules=rules) == expected, options
        assert expected != plain, options


@pytest.mark.slow
@pytest.mark.parity
def test_beams_sample_as_those_of_transformers(tmp_path):
    """The two-token texts of 3,000 draws each have the same distribution, with temperature, filters and a token that may end."""
    import torch
    import transformers

    theirs = make(*TORCH["gpt2"])
    theirs.save_pretrained(tmp_path)
    model, params, *_ = load_folder(str(tmp_path), ONE)
    prompt, draws, stop = [5, 9, 12], 3000, 7
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=PAD, eos_token_id=stop)
    torch.manual_seed(0)
    given = torch.tensor([prompt] * draws)
    options = {"num_beams": 2, "temperature": 0.6, "top_k": 6, "top_p": 0.9, "length_penalty": 0.5}
    out = theirs.generate(given, attention_mask=torch.ones_like(given), do_sample=True, max_new_tokens=2, **options)
    expected = [tuple(itertools.takewhile(lambda token: token not in (stop, PAD), row)) for row in out[:, 3:].tolist()]
    sampling = SampleConfig(0.6, top_k=6, top_p=0.9)
    ours = BatchGenerator(model, ONE, V, pad_id=PAD)
    found = ours(params, [prompt] * draws, DecodeConfig(2, 2, 0.5), [stop], batch_size=1024, sampling=sampling, seeds=range(draws))
    counts = [collections.Counter(map(tuple, texts)) for texts in (expected, found)]
    frequent = [text for text, _ in (counts[0] + counts[1]).most_common() if counts[0][text] + counts[1][text] >= 20]
    assert len(frequent) >= 8 and sum(c[text] for c in counts for text in frequent) > 0.9 * 2 * draws
    chi = sum((counts[0][text] - counts[1][text]) ** 2 / (counts[0][text] + counts[1][text]) for text in frequent)
    assert chi < len(frequent) + 4 * (2 * len(frequent)) ** 0.5, (chi, len(frequent))
    assert found[:10] == ours(params, [prompt] * 10, DecodeConfig(2, 2, 0.5), [stop], sampling=sampling, seeds=range(10))


def generated_alone(theirs, prompt: list[int], stop: list[int], **options) -> list[int]:
    import torch
    import transformers

    reads = theirs.config.is_encoder_decoder
    theirs.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=START if reads else None, pad_token_id=PAD, eos_token_id=stop
    )
    out = theirs.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        max_new_tokens=12, **options,
    )  # fmt: skip
    row = out[0, 1 if reads else len(prompt) :].tolist()
    return list(itertools.takewhile(lambda token: token not in stop, row))
