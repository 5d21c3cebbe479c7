"""The engine: each request has the text that it has alone, whoever comes and goes beside it."""

import dataclasses
import re
import time

import jax
import numpy as np
import pytest

from jaxlm.data.tokenizer import Characters
from jaxlm.generate import Generator, SampleConfig
from jaxlm.generate.constrain import Constraint, Grammar
from jaxlm.generate.engine import Engine, EngineConfig
from jaxlm.generate.request import Full, Request
from jaxlm.generate.slots import pieces
from jaxlm.model import HeadConfig, Model, RotaryConfig, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh, stored_shardings

ONE = make_mesh(ParallelConfig(), jax.devices()[:1])
GPT = TransformerConfig(vocab_size=40, positions=64, layers=2, width=16, heads=4, init_std=0.5)
LLAMA = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "kv_heads": 2, "qk_norm": "heads"}
MODELS = {
    "gpt": GPT,
    "windows": dataclasses.replace(GPT, **LLAMA, layer_pattern="LG", window=5, rope=RotaryConfig(theta=100.0, local_theta=10.0)),
}
V = 37
GREEDY, WARM = SampleConfig(temperature=0), SampleConfig(temperature=1.0)
SMALL = EngineConfig(slots=3, context=60, chunk=8)


class Ear:
    """What became of a request."""

    def __init__(self):
        self.tokens, self.prompt, self.ended, self.reason, self.events = [], [], None, "", 0

    def __call__(self, event):
        assert self.ended is None, "nothing comes after the end"
        self.events += 1
        self.tokens += event.tokens
        self.prompt += event.prompt
        self.ended, self.reason = event.ended, event.reason

    @property
    def ids(self):
        return [token.id for token in self.tokens]


def answers(engine, requests):
    ears = [Ear() for _ in requests]
    for request, ear in zip(requests, ears, strict=True):
        engine.submit(request, ear)
    engine.run()
    return ears


def requests_of(*lengths, seed=0, **more):
    rng = np.random.default_rng(seed)
    return [Request(tuple(rng.integers(0, V, n).tolist()), 3 + n % 9, seed=n, **more) for n in lengths]


@pytest.fixture(scope="module", params=["gpt", pytest.param("windows", marks=pytest.mark.slow)])
def case(request):
    model = Model(MODELS[request.param])
    params = model.init(jax.random.key(0))
    return model, params, Engine(model, params, ONE, V, SMALL)


def test_each_text_is_the_generators(case):
    """Seven requests through three slots, in pieces of 8: greedy, drawn, with penalties, by their seeds."""
    model, params, engine = case
    generator = Generator(model, ONE, V)
    mixed = [GREEDY, WARM, dataclasses.replace(WARM, top_p=0.8), dataclasses.replace(GREEDY, frequency_penalty=1.0)]
    requests = [
        dataclasses.replace(request, sample=mixed[i % 4], stop=frozenset({i}))
        for i, request in enumerate(requests_of(1, 8, 17, 5, 24, 9, 30))
    ]
    found = answers(engine, requests)
    for request, ear in zip(requests, found, strict=True):
        alone = list(
            generator.stream(params, request.prompt, request.max_tokens, request.sample, seed=request.seed, stop=request.stop)
        )
        assert ear.ids == alone
        assert ear.ended == ("length" if len(alone) == request.max_tokens else "stop")
    assert {ear.ended for ear in found} == {"length", "stop"}


def test_neighbours_change_nothing_to_the_bit(case):
    """Log-probabilities too: of each request alone, and beside others that come at any time."""
    *_, engine = case
    requests = requests_of(9, 20, 3, 26, 14, 2, sample=WARM, logprobs=2)
    together = answers(engine, requests)
    for request, ear in list(zip(requests, together, strict=True))[::2]:
        (alone,) = answers(engine, [request])
        assert alone.tokens == ear.tokens


@pytest.mark.parametrize("name", ["gpt", pytest.param("windows", marks=pytest.mark.slow)])
def test_slots_without_a_text_need_not_be_computed(name):
    """Of six slots one, four or all: the same greedy texts, log-probabilities but for their last digits."""
    model = Model(MODELS[name])
    params = model.init(jax.random.key(0))
    all_, few = (Engine(model, params, ONE, V, dataclasses.replace(SMALL, slots=6, exact=exact)) for exact in (True, False))
    few.warm()
    for lengths in ([5], [9, 20, 3], [30, 4, 4, 4, 4, 4], [11, 2, 9, 7, 23, 15, 3, 8]):
        requests = requests_of(*lengths, sample=GREEDY, logprobs=2)
        for one, other in zip(answers(all_, requests), answers(few, requests), strict=True):
            assert one.ids == other.ids and one.ended == other.ended
            np.testing.assert_allclose([t.logprob for t in one.tokens], [t.logprob for t in other.tokens], atol=1e-4)


def test_biases_are_added_to_the_logits(case):
    """Of the likeliest tokens by hand, beside a request without; the log-probabilities that are told are the model's own."""
    model, params, engine = case
    request, plain = requests_of(11, 12, sample=GREEDY, logprobs=0)
    (free,) = answers(engine, [request])
    bias = {free.ids[0]: -100.0, 3: 1.5, 20: 0.7}
    ear, beside = answers(engine, [dataclasses.replace(request, bias=tuple(bias.items())), plain])
    assert beside.tokens == answers(engine, [plain])[0].tokens
    text, apply = list(request.prompt), jax.jit(model.apply)
    for token in ear.tokens:
        logits = np.array(apply(params, {"tokens_BL": np.array([text], np.int32)})[0][0, -1])
        assert token.logprob == pytest.approx(float(jax.nn.log_softmax(logits)[token.id]), abs=1e-4)
        logits[list(bias)] += list(bias.values())
        assert token.id == np.argmax(logits[:V])
        text.append(token.id)
    assert ear.ids != free.ids and len(ear.ids) == len(free.ids)
    with pytest.raises(ValueError, match="vocabulary"):
        engine.submit(dataclasses.replace(request, bias=((V, 1.0),)), Ear())


def test_log_probabilities_are_the_models(case):
    """Of the prompt's tokens and of the text's, in the float32 of the full forward pass, over the whole table; entries that only
    pad it are not among the likeliest."""
    model, params, engine = case
    (request,) = requests_of(19, sample=WARM, logprobs=3, prompt_logprobs=True)
    (ear,) = answers(engine, [request])
    text = [*request.prompt, *ear.ids]
    logits, _ = jax.jit(model.apply)(params, {"tokens_BL": np.array([text], np.int32)})
    logp = np.asarray(jax.nn.log_softmax(logits[0], axis=-1))
    told = [*ear.prompt, *ear.tokens]
    assert [token.id for token in told] == text and told[0].logprob is None
    for place, token in enumerate(told[1:]):
        assert token.logprob == pytest.approx(logp[place, token.id], abs=1e-4)
        assert [id for id, _ in token.top] == np.argsort(-logp[place, :V])[:3].tolist()
    (scored,) = answers(engine, [dataclasses.replace(request, max_tokens=0)])
    assert scored.prompt == ear.prompt and not scored.tokens and scored.ended == "length"


def test_a_prompts_beginning_is_read_once(case):
    """From the slot that holds it, or copied from one that is still running; the text is the same."""
    model, params, engine = case
    long, *_ = requests_of(27, seed=7, sample=WARM, logprobs=1)
    (first,) = answers(engine, [long])
    before = engine.stats().reused_tokens
    again = answers(engine, [long, dataclasses.replace(long, seed=5), dataclasses.replace(long, prompt=long.prompt[:17])])
    assert engine.stats().reused_tokens - before == 24 + 24 + 16
    assert again[0].tokens == first.tokens
    fresh = Engine(model, params, ONE, V, SMALL)
    fresh._decoder = engine._decoder  # compiled
    assert answers(fresh, [dataclasses.replace(long, prompt=long.prompt[:17])])[0].tokens == again[2].tokens


def test_pieces_hang_on_the_prompt_alone():
    assert pieces(300, 0, 128) == [(0, 128, 128), (128, 128, 128), (256, 44, 128)]
    assert pieces(300, 128, 128) == [(128, 128, 128), (256, 44, 128)]
    assert pieces(5, 0, 128) == [(0, 5, 8)] and pieces(32, 0, 128) == [(0, 32, 32)] and pieces(33, 0, 128) == [(0, 33, 128)]


def test_guided_texts_match_beside_others_that_do_not(case):
    """By llguidance through the engine, and by a guide that runs dry; their neighbours are as if alone."""
    *_, engine = case
    tokenizer = Characters("abcdefghijklmnopqrstuvwxyz0123456789")  # and the end of text: 37
    assert tokenizer.vocab_size <= V + 1
    guided = [
        Request(
            (1, 2, 3),
            12,
            WARM,
            seed=seed,
            guide=Grammar(tokenizer, Constraint(regex="[a-c]{2}x[0-9]+z")),
            stop=frozenset({tokenizer.eos_id}),
        )
        for seed in range(3)
    ]

    class Dry:
        ended = False

        def mask(self):
            raise ValueError("nothing may come")

        def take(self, token):
            raise AssertionError

    free = requests_of(9, sample=WARM)
    found = answers(engine, [guided[0], *free, guided[1], Request((1,), 3, guide=Dry()), guided[2]])
    for ear in (found[0], found[2], found[4]):
        text = tokenizer.decode(ear.ids)
        assert re.fullmatch("[a-c]{2}x[0-9]*z?", text) and (ear.ended == "length" or text[-1] == "z")
    assert (found[3].ended, found[3].reason) == ("stuck", "nothing may come")
    assert found[1].tokens == answers(engine, free)[0].tokens


# --- the queue ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make():
    """Engines with one slot, whose programs are compiled once."""
    model, first = Model(GPT), []
    params = model.init(jax.random.key(0))

    def engine():
        made = Engine(model, params, ONE, V, EngineConfig(slots=1, context=32, queue=4, chunk=8))
        first.append(made)
        made._decoder = first[0]._decoder
        return made

    return engine


@pytest.fixture
def engine(make):
    return make()


def test_owners_take_turns(engine):
    order = []
    for owner in "aaab":
        engine.submit(Request((1, 2), 2, owner=owner), lambda event, owner=owner: event.ended and order.append(owner))
    with pytest.raises(Full, match="4 requests are waiting"):
        engine.submit(Request((1,), 2), Ear())
    engine.run()
    assert order == ["a", "b", "a", "a"]


def test_those_who_leave_free_their_slots(engine):
    ears = [Ear() for _ in range(3)]
    tickets = [engine.submit(Request((1, 2), 30), ear) for ear in ears]
    engine.step()
    engine.cancel(tickets[0])
    engine.cancel(tickets[2])
    engine.run()
    assert [ear.ended for ear in ears] == ["cancelled", "length", "cancelled"]
    assert 0 < len(ears[0].ids) < 30 and not ears[2].ids and len(ears[1].ids) == 30
    engine.cancel(tickets[1])
    assert engine.stats().running == engine.stats().waiting == 0


def test_a_step_that_fails_takes_no_one_else_along(engine, monkeypatch):
    whole, ears = engine._decoder.write, [Ear(), Ear()]
    for ear in ears:
        engine.submit(Request((1, 2), 5), ear)
    monkeypatch.setattr(engine._decoder, "write", lambda *args, **options: 1 / 0)
    engine.step()
    monkeypatch.setattr(engine._decoder, "write", whole)
    engine.run()
    assert (ears[0].ended, ears[0].reason) == ("error", "ZeroDivisionError: division by zero")
    assert ears[1].ended == "length" and len(ears[1].ids) == 5


def test_a_listener_that_fails_ends_its_own_request(engine):
    def deaf(event):
        raise RuntimeError("not listening")

    other = Ear()
    engine.submit(Request((1, 2), 20), deaf)
    engine.submit(Request((1, 2), 20), other)
    engine.run()
    assert other.ended == "length"


def test_it_works_in_a_thread_and_ends_in_order(engine):
    engine.start()
    ears = [Ear() for _ in range(3)]
    for ear in ears:
        engine.submit(Request((1, 2), 25), ear)
    assert engine.stats().alive
    engine.close(drain_s=60)
    assert [ear.ended for ear in ears] == ["length"] * 3
    with pytest.raises(Full, match="closing"):
        engine.submit(Request((1,), 2), Ear())
    assert not engine.stats().alive


def test_an_end_without_patience_cancels(engine):
    engine.start()
    ears = [Ear() for _ in range(3)]
    for ear in ears:
        engine.submit(Request((1, 2), 29), ear)
    engine.close()
    deadline = time.monotonic() + 30
    while any(ear.ended is None for ear in ears) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "cancelled" in {ear.ended for ear in ears} and all(ear.ended for ear in ears)


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request(()), "the prompt is empty"),
        (Request((1, V)), "a token of the prompt is not among the 37"),
        (Request((1,), -1), "max_tokens is -1"),
        (Request((1,) * 30, 3), "the prompt of 30 tokens and max_tokens 3 are more than the context of 32"),
        (Request((1,), 3, stop=frozenset(range(9))), "9 tokens end the text: at most 8 may"),
        (Request((1,), 3, logprobs=21), "logprobs is 21: it must be from 0 to 20"),
    ],
)
def test_mistakes(engine, request_, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(request_, Ear())


def test_only_decoders_write():
    encoder = dataclasses.replace(GPT, architecture="encoder", head=HeadConfig(kind="masked_lm"))
    with pytest.raises(ValueError, match="text is written by architecture decoder"):
        Engine(Model(encoder), {}, ONE, V)


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize("name", MODELS)
def test_every_mesh_gives_the_same_texts(name):
    model = Model(MODELS[name])
    params = model.init(jax.random.key(0))
    requests = requests_of(9, 20, 3, 26, 14, sample=WARM)
    expected = [ear.ids for ear in answers(Engine(model, params, ONE, V, SMALL), requests)]
    mesh = make_mesh(ParallelConfig(data=2, fsdp=2, tensor=2), jax.devices())
    placed = jax.device_put(params, stored_shardings(model.axes, model.shapes, mesh))
    assert [ear.ids for ear in answers(Engine(model, placed, mesh, V, dataclasses.replace(SMALL, slots=4)), requests)] == expected


def test_nothing_is_compiled_again(case):
    *_, engine = case
    answers(engine, requests_of(2, 9, 30))
    sizes = engine._decoder.write._cache_size(), engine._decoder.read._cache_size()
    answers(engine, requests_of(1, 10, 25, 4, 29, seed=3, sample=dataclasses.replace(WARM, min_p=0.1), stop=frozenset({3, 4})))
    assert (engine._decoder.write._cache_size(), engine._decoder.read._cache_size()) == sizes
