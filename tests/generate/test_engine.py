"""The engine: each request has the text that it has alone, whoever comes and goes beside it."""

import dataclasses
import re
import time

import jax
import numpy as np
import pytest

from jaxlm.data.tokenizer import Characters
from jaxlm.generate import Generator, SampleConfig
from jaxlm.generate import engine as engine_module
from jaxlm.generate.constrain import Constraint, Grammar
from jaxlm.generate.engine import Engine, EngineConfig
from jaxlm.generate.request import Event, Full, Request
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
        self.tokens, self.prompt, self.ended, self.reason, self.events, self.stop = [], [], None, "", 0, None

    def __call__(self, event):
        assert self.ended is None, "nothing comes after the end"
        self.events += 1
        self.tokens += event.tokens
        self.prompt += event.prompt
        self.ended, self.reason, self.stop = event.ended, event.reason, event.stop

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


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
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
    """Clients first, then the users of each; a full queue is closed to those who fill it, not to another client."""
    order = []

    def submit(owner, user):
        request = Request((1, 2), 2, owner=owner, user=user)
        engine.submit(request, lambda event: event.ended and order.append(owner + user))

    for owner, user in ("a1", "a1", "a2", "a3"):
        submit(owner, user)
    for owner, user in ("a1", "a4"):
        with pytest.raises(Full, match="4 requests are waiting"):
            submit(owner, user)
    submit("b", "1")
    with pytest.raises(Full, match="5 requests are waiting"):
        submit("b", "2")
    engine.run()
    assert order == ["a1", "b1", "a2", "a3", "a1"]


def test_prompts_take_turns(case, monkeypatch):
    """A short prompt does not wait for the chunks of long ones before it, and short ones that keep coming starve no long one."""
    *_, engine = case
    read, order, short = engine._read_piece, [], requests_of(5)[0]
    monkeypatch.setattr(engine, "_read_piece", lambda seat: (order.append(len(seat.ticket.request.prompt)), read(seat)))

    def again(event):
        if event.ended and len(order) < 40:
            engine.submit(dataclasses.replace(short, max_tokens=1), again)

    ears = [Ear(), Ear()]
    for request, ear in zip(requests_of(41, 49, seed=5), ears, strict=True):
        engine.submit(dataclasses.replace(request, max_tokens=2), ear)
    again(Event(ended="length"))
    engine.run()
    assert 5 in order[:2], order
    assert order[:12].count(41) == 6 and order[:26].count(49) == 7 and len(order) >= 40, order
    assert [ear.ended for ear in ears] == ["length"] * 2


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


class Broken:
    """A guide that allows everything, and fails in one of its parts after some tokens."""

    def __init__(self, part, error, after):
        self.part, self.error, self.left = part, error, after

    def _maybe(self, part):
        if part == self.part:
            self.left -= 1
            if self.left < 0:
                raise self.error

    @property
    def ended(self):
        self._maybe("ended")
        return False

    def mask(self):
        self._maybe("mask")
        return np.ones(V, bool) if self.part != "shape" else np.ones((2, V), bool)

    def take(self, token):
        self._maybe("take")


class Panic(BaseException):
    """As a library in Rust raises: no Exception."""


def fault(kind):
    """A request one of whose own objects fails, and what its listener heard before it failed itself."""
    ear = Ear()
    prompt, error = (1, 2, 3), Panic("broken") if kind.endswith("panic") else RuntimeError("broken")
    part = kind.split()[0]
    if part == "listener":

        def deaf(event):
            if event.ended is None:
                raise error
            ear(event)

        return Request(prompt, 20), deaf, ear
    if part in ("sample", "stop"):
        request = Request(prompt, 20)
        object.__setattr__(request, part, Failing(error))
        return request, ear, ear
    return Request(prompt, 20, guide=Broken(part, error, 2 if kind.endswith("later") else 0)), ear, ear


class Failing(frozenset):
    """Settings that fail when they are read, not when they are handed in."""

    def __new__(cls, error):
        made = super().__new__(cls)
        made.error = error
        return made

    def __iter__(self):
        raise self.error

    def __getattr__(self, name):
        raise self.error


FAULTS = ["mask", "mask later", "mask panic", "take", "take panic", "ended", "ended later", "shape", "listener", "listener panic",
          "sample", "stop"]  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_whatever_a_request_brings_fails_alone(case, kind):
    """It ends with an error; the texts beside it are to the bit those that they are alone, with their log-probabilities."""
    *_, engine = case
    others = requests_of(9, 20, sample=WARM, logprobs=2)
    alone = [answers(engine, [request])[0].tokens for request in others]
    request, listener, heard = fault(kind)
    ears = [Ear(), Ear()]
    engine.submit(others[0], ears[0])
    engine.submit(request, listener)
    engine.submit(others[1], ears[1])
    engine.run()
    assert heard.ended == "error" and ("broken" in heard.reason or kind == "shape")
    assert [ear.tokens for ear in ears] == alone
    assert engine.stats().running == engine.stats().waiting == 0


def test_a_slow_guide_delays_its_own_text_only(case):
    """Its neighbours end long before it does; one that takes too long is ended."""
    model, params, engine = case

    class Slow(Broken):
        def mask(self):
            time.sleep(0.4)
            return super().mask()

    def slow():
        return Request((1, 2, 3), 3, WARM, guide=Slow("", None, 0))

    order, ears = [], [Ear() for _ in range(3)]
    (free,) = requests_of(30, sample=WARM, logprobs=1)
    (alone,) = answers(engine, [free])
    for request, ear in zip([slow(), free, slow()], ears, strict=True):
        engine.submit(request, lambda event, ear=ear: (ear(event), event.ended and order.append(ears.index(ear))))
    began = time.monotonic()
    engine.run()
    assert order[0] == 1 and {ear.ended for ear in ears} == {"length"} and ears[1].tokens == alone.tokens
    assert time.monotonic() - began < 6 * 0.4, "two slow guides work at the same time"
    impatient = Engine(model, params, ONE, V, dataclasses.replace(SMALL, guide_s=0.1))
    impatient._decoder = engine._decoder
    late, beside = answers(impatient, [slow(), free])
    assert late.ended == "error" and "took more than 0.1 s" in late.reason and beside.tokens == alone.tokens


@pytest.mark.parametrize("part", ["_place", "copy", "read", "allow", "GuideWorker"])
def test_what_fails_before_the_state_is_lost_fails_alone(case, monkeypatch, part):
    """Seating and reading: an error on the way takes along neither the tickets just taken nor the texts that run."""
    *_, engine = case
    (running,) = requests_of(9, sample=WARM, logprobs=1)
    running = dataclasses.replace(running, max_tokens=40)
    others = requests_of(25, 27, 26, seed=3, sample=WARM, logprobs=1)
    *before, alone = answers(engine, [*others, running])
    first, late = Ear(), [Ear() for _ in range(3)]
    engine.submit(running, first)
    engine.step()

    def fail(*args, **more):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with monkeypatch.context() as patch:
        where = {"_place": engine, "GuideWorker": engine_module}.get(part, engine._decoder)
        patch.setattr(where, part, fail)
        for ear in late:  # a prefix that is running elsewhere: it is copied
            guide = Broken("", None, 0) if part in ("allow", "GuideWorker") else None
            engine.submit(Request((*running.prompt[:8], 1, 2), 4, guide=guide), ear)
        engine.run()
    assert [ear.ended for ear in late] == ["error"] * 3, [ear.reason for ear in late]
    assert all("out of memory" in ear.reason for ear in late)
    assert first.tokens == alone.tokens and first.ended == "length"
    assert not engine._busy()
    # Nothing is reused of a slot whose cache has changed.
    assert [ear.tokens for ear in answers(engine, [*others, running])] == [ear.tokens for ear in (*before, alone)]


def test_an_engine_that_cannot_go_on_tells_everybody(engine, monkeypatch):
    """Those in slots and those who wait, and nobody is taken afterwards."""
    monkeypatch.setattr(engine._decoder, "write", lambda *args, **options: 1 / 0)
    monkeypatch.setattr(engine._decoder, "empty", lambda: [][0])
    ears = [Ear() for _ in range(3)]
    for ear in ears:
        engine.submit(Request((1, 2), 5), ear)
    engine.start()
    deadline = time.monotonic() + 30
    while not all(ear.ended for ear in ears) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [ear.ended for ear in ears] == ["error"] * 3 and "IndexError" in ears[2].reason
    with pytest.raises(Full):
        engine.submit(Request((1, 2), 5), Ear())
    assert not engine.stats().alive


def test_stop_tokens_wait_for_min_tokens(case):
    """The tokens that would end the text do not come before; afterwards the text goes as the logits say."""
    *_, engine = case
    (request,) = requests_of(11, sample=GREEDY)
    (free,) = answers(engine, [dataclasses.replace(request, max_tokens=12)])
    stop = frozenset(free.ids[:2])
    ended, late = answers(engine, [dataclasses.replace(request, stop=stop, max_tokens=12, min_tokens=least) for least in (0, 4)])
    assert ended.ended == "stop" and ended.ids == [] and ended.stop.id == free.ids[0]
    assert len(late.ids) >= 4 and not stop & set(late.ids)


def test_only_allowed_tokens_come(case):
    """The likeliest of them at each place, by the full forward pass; a guide and the list hold together."""
    model, params, engine = case
    (request,) = requests_of(11, sample=GREEDY)
    allowed = (3, 8, 20)
    (ear,) = answers(engine, [dataclasses.replace(request, allowed=allowed, max_tokens=8)])
    ids = list(request.prompt)
    for token in ear.ids:
        logits, _ = jax.jit(model.apply)(params, {"tokens_BL": np.array([ids], np.int32)})
        assert token == max(allowed, key=lambda i: logits[0, -1, i])
        ids.append(token)
    tokenizer = Characters("abcdefghijklmnopqrstuvwxyz0123456789")
    guided = [
        Request((1,), 5, WARM, allowed=allowed, guide=Grammar(tokenizer, Constraint(regex=regex))) for regex in ("[a-i]*", "z")
    ]
    both, none = answers(engine, guided)
    assert set(both.ids) <= {3, 8} and none.ended == "stuck"


def test_a_text_whose_constraints_leave_no_token_ends_alone(case):
    """Behind its prompt, or after some tokens; another text beside it is as if alone."""
    *_, engine = case
    tokenizer = Characters("abcdefghijklmnopqrstuvwxyz0123456789")
    (free,) = requests_of(11, sample=WARM)
    pairs = ((3, 3), (3, 8), (8, 3), (8, 8))
    after = [Request((1,), 5, sample, allowed=(3, 8), bad=pairs, stop=stop) for sample in (WARM, GREEDY) for stop in (
        frozenset({9}), frozenset(range(10, 18)))]  # fmt: skip
    at_once = Request((1,), 5, WARM, guide=Grammar(tokenizer, Constraint(regex="z[a-z]*")), bad=((35,),))
    *stuck, beside, none = answers(engine, [*after, free, at_once])
    assert all(ear.ended == "stuck" and len(ear.ids) == 1 and ear.reason.startswith("no token may come next") for ear in stuck)
    assert none.ended == "stuck" and none.ids == []
    assert beside.tokens == answers(engine, [free])[0].tokens


def test_bad_sequences_never_come(case):
    """Of one token and of several, among new tokens alone; nothing else is changed before one would have come."""
    *_, engine = case
    for sample in (GREEDY, WARM):
        (request,) = requests_of(11, sample=sample)
        request = dataclasses.replace(request, max_tokens=25)
        (free,) = answers(engine, [request])
        bad = tuple(free.ids[2:5])
        (ear,) = answers(engine, [dataclasses.replace(request, bad=(bad, (free.ids[7],)))])
        single = free.ids[7]
        same = min(free.ids.index(single), 4)
        assert ear.ids[:same] == free.ids[:same] and single not in ear.ids
        assert all(tuple(ear.ids[i : i + 3]) != bad for i in range(len(ear.ids)))


def test_a_salt_keeps_prefixes_apart(case):
    *_, engine = case
    (long,) = requests_of(27, seed=11, sample=WARM, logprobs=1)
    (first,) = answers(engine, [dataclasses.replace(long, cache_salt="a")])
    before = engine.stats().reused_tokens
    (other,) = answers(engine, [dataclasses.replace(long, cache_salt="b")])
    assert engine.stats().reused_tokens == before and other.tokens == first.tokens
    (again,) = answers(engine, [dataclasses.replace(long, cache_salt="a")])
    assert engine.stats().reused_tokens == before + 24 and again.tokens == first.tokens


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
        (Request((1,), 3, allowed=(4, 5), bad=((4,), (5,), (6, 4))), "none of the allowed tokens may come"),
        (Request((1,), 3, allowed=(4, 5), bad=((4,),), stop=frozenset({5}), min_tokens=1), "none of the allowed tokens may come"),
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


EVERYTHING = [
    {}, {"logprobs": 3}, {"logprobs": 0, "prompt_logprobs": True, "max_tokens": 0}, {"logprobs": 2, "prompt_logprobs": True},
    {"bias": ((3, 1.0),)}, {"min_tokens": 2, "stop": frozenset({3, 4})}, {"allowed": (1, 2)}, {"bad": ((1, 2), (4,))},
    {"guide": "letters"}, {"cache_salt": "x"}, {"sample": dataclasses.replace(WARM, min_p=0.1, top_k=3, top_p=0.5)},
    {"sample": dataclasses.replace(WARM, typical_p=0.5, presence_penalty=1.0, repetition_penalty=1.2)},
]  # fmt: skip


def test_nothing_is_compiled_again_once_it_is_warm(case):
    """Whatever is asked for, prompts of any length, copied prefixes included."""
    model, params, _ = case
    engine = Engine(model, params, ONE, V, SMALL)
    engine.warm()
    programs = {name: getattr(engine._decoder, name) for name in ("read", "write", "copy", "allow")}
    sizes = {name: program._cache_size() for name, program in programs.items()}
    assert engine.stats().requests == 0
    for more in EVERYTHING:
        if "guide" in more:
            more = {"guide": Broken("", None, 0)}
        for length in (1, 7, 9, 30):
            (request,) = requests_of(length)
            ears = answers(engine, [dataclasses.replace(request, **more)] * 2)
            assert {ear.ended for ear in ears} <= {"length", "stop"}
    assert {name: program._cache_size() for name, program in programs.items()} == sizes


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize("axes", [{"tensor": 2}, {"data": 2}], ids=str)
def test_a_mesh_is_warm_too(axes):
    """Each program finds the state as every other one leaves it, and as it is after a step that failed."""
    model, mesh = Model(GPT), make_mesh(ParallelConfig(**axes), jax.devices()[:2])
    params = jax.device_put(model.init(jax.random.key(0)), stored_shardings(model.axes, model.shapes, mesh))
    engine = Engine(model, params, mesh, V, dataclasses.replace(SMALL, slots=2, context=32))
    engine.warm()
    programs = [getattr(engine._decoder, name) for name in ("read", "write", "copy", "allow")]
    sizes = [program._cache_size() for program in programs]
    prompts = [
        Request(tuple(range(1, length + 1)), 4, guide=guide) for length in (1, 9, 17, 20) for guide in (None, Broken("", None, 0))
    ]
    assert {ear.ended for ear in answers(engine, prompts)} == {"length"}
    engine._state = engine._decoder.empty()
    assert {ear.ended for ear in answers(engine, prompts[:1])} == {"length"}
    assert [program._cache_size() for program in programs] == sizes


def test_a_text_that_has_ended_waits_for_no_guide(case):
    """Its guide fails on what may follow the last token, of which nobody asks."""
    *_, engine = case
    (ear,) = answers(engine, [Request((1, 2), 3, guide=Broken("mask", RuntimeError("broken"), 3))])
    assert ear.ended == "length" and len(ear.ids) == 3


def test_scores_are_computed_while_somebody_asks_alone(case, monkeypatch):
    """A slot whose request had asked for them costs the texts of others nothing."""
    *_, engine = case
    write, told = engine._decoder.write, []

    def watched(*args):
        state, burst = write(*args)
        told.append(float(abs(burst.scores.top).max()))
        return state, burst

    monkeypatch.setattr(engine._decoder, "write", watched)
    answers(engine, requests_of(5, logprobs=2))
    assert max(told) > 0
    told.clear()
    answers(engine, requests_of(6))
    assert max(told) == 0
