"""Ways to tune: every one learns, changes nothing that is frozen, and trains by the gradients that brute force gives."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxlm.model import Model, TransformerConfig
from jaxlm.model.config import HeadConfig, MoeConfig
from jaxlm.parallel import ParallelConfig, make_mesh, place_batch, settle
from jaxlm.train import (
    Checkpoints,
    GroupConfig,
    LoraConfig,
    OptimConfig,
    TuneConfig,
    Tuning,
    init_frozen,
    init_state,
    make_eval_step,
    make_optimizer,
    make_schedule,
    make_train_step,
    objectives,
    state_shapes,
    state_shardings,
)
from jaxlm.train.moments import Name
from jaxlm.train.optim import multipliers

# Its matrices are large: behind frozen ones that are nearly zero an adapter would learn little in few steps.
SHAPE = TransformerConfig(vocab_size=32, positions=8, layers=3, width=16, heads=2, init_std=0.3)
MODEL = Model(SHAPE)
LORA = LoraConfig(4, 8.0)
WAYS = {
    "full": TuneConfig(),
    "bitfit": TuneConfig("bias$|^head/|scale$"),
    "last": TuneConfig(r"layers\.[12]/|final_norm"),
    "lora": TuneConfig(None, LORA),
    "dora": TuneConfig("final_norm", LoraConfig(2, dora=True)),
    "some-lora": TuneConfig(None, LoraConfig(4, targets=r"layers\.(0|2)/(attention|mlp)/.*kernel")),
    "bfloat16": TuneConfig(r"layers\.2/", base="bfloat16"),
    "int8": TuneConfig(None, LORA, "int8"),
    "nf4": TuneConfig(None, LORA, "nf4"),
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(ParallelConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def params():
    """The model's, of seed 0; on the host, for a step takes away what it is given."""
    return copied(jax.jit(MODEL.init)(jax.random.key(0)))


def batch_of(rows: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, 32, (rows, 8)).astype(np.int32)
    weights = np.triu(np.ones((rows, 8), np.float32))  # rows of unequal weight
    return {"tokens_BL": tokens, "targets_BL": np.roll(tokens, -1, 1), "weights_BL": weights}


def build(mesh, config: TuneConfig, model: Model = MODEL, params=None, **options):
    """(tuning, optimizer, state, step) of a tiny run."""
    average = options.pop("average", None)
    settings = OptimConfig(learning_rate=3e-2, warmup=1, schedule="constant", average=average, **options.pop("optim", {}))
    schedule, tuning = make_schedule(settings, 20), Tuning(config, model)
    optimizer = options.pop("optimizer", None) or make_optimizer(settings, schedule, tuning)
    state = init_state(model, optimizer, 0, mesh, tuning, params, settings)
    step = make_train_step(
        model, objectives.tokens(8), optimizer, schedule, mesh, seed=0, tuning=tuning, optim=settings, **options
    )  # fmt: skip
    return tuning, optimizer, state, step


def copied(tree):
    """On the host, for the step donates what it is given."""
    return jax.tree.map(np.array, jax.device_get(tree))


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, copied(a), copied(b))


def flat(tree):
    return flatten_dict(tree, sep="/")


# --- every way --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_every_way_learns_freezes_and_compiles_once(way, mesh):
    """Twenty steps on one batch: the loss falls, each trained leaf moves, no frozen bit does, and the frozen arrays are
    handed on without a copy."""
    tuning, _, state, step = build(mesh, WAYS[way])
    batch = place_batch(batch_of(), mesh)
    before, frozen = copied(state.params), copied(state.frozen)
    places = jax.tree.map(lambda x: x.unsafe_buffer_pointer(), state.frozen)
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    assert step._cache_size() == 1
    equal(frozen, state.frozen)
    assert places == jax.tree.map(lambda x: x.unsafe_buffer_pointer(), state.frozen)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: not np.array_equal(a, b), before, copied(state.params))))
    # Optimiser state is of what is trained alone.
    held = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert held == 2 * tuning.trained_parameters
    assert (way == "full") == tuning.full == (tuning.trained_parameters == tuning.total)
    merged = jax.jit(tuning.merge)(state.params, state.frozen)
    sums = make_eval_step(MODEL, objectives.tokens(8), mesh)(merged, batch)
    assert float(sums["loss"] / sums["weight"]) < 0.8 * losses[0]


@pytest.mark.parametrize("way", WAYS)
def test_split_and_merge_are_inverse_and_say_their_shapes(way, params):
    """Fresh adapters leave the model as it is; what is held rounded comes back within its rounding."""
    tuning = Tuning(WAYS[way], MODEL)
    trained, frozen = jax.jit(tuning.split)(params, jax.random.key(1))
    for tree, shapes, axes in ((trained, tuning.shapes, tuning.axes), (frozen, tuning.frozen_shapes, tuning.frozen_axes)):
        assert jax.tree.structure(tree) == jax.tree.structure(shapes)
        assert flat(jax.tree.map(lambda x: (x.shape, x.dtype), tree)) == flat(jax.tree.map(lambda x: (x.shape, x.dtype), shapes))
        assert {path: len(letters) for path, letters in flat(axes).items()} == {path: x.ndim for path, x in flat(tree).items()}
    assert tuning.names.keys() == flat(trained).keys()
    merged = jax.jit(tuning.merge)(trained, frozen)
    if WAYS[way].base == "float32" and not WAYS[way].lora.dora:
        equal(params, merged)
    tolerance = {"float32": 1e-6, "bfloat16": 2**-8, "int8": 1 / 254, "nf4": 0.16}[WAYS[way].base]
    for path, value in flat(params).items():
        rounded = float(np.abs(value - flat(merged)[path]).max()) / float(np.abs(value).max() or 1)
        assert rounded <= tolerance * 1.01, path
        assert rounded == 0 or path.endswith("kernel")


def test_full_tuning_takes_the_steps_of_a_plain_loop(mesh, params):
    """With everything trained, the step is a gradient and an Optax update; splitting and merging add nothing to its program."""
    tuning, _, state, step = build(mesh, TuneConfig(), optim={"eps": 1e-4})
    assert not jax.make_jaxpr(tuning.merge)(params, {}).eqns and tuning.merge(params, {}) is params
    assert not jax.make_jaxpr(tuning.split)(params, jax.random.key(0)).eqns and tuning.split(params, None) == (params, {})
    settings = OptimConfig(learning_rate=3e-2, warmup=1, schedule="constant", eps=1e-4)
    optimizer, batch = make_optimizer(settings, make_schedule(settings, 20)), batch_of()

    @jax.jit
    def plain(params, opt_state):
        grads = jax.grad(lambda p: objectives.tokens(8)(MODEL.apply, p, batch, None)[0] / batch["weights_BL"].sum())(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    equal(params, state.params)
    opt_state = optimizer.init(params)
    for _ in range(3):
        params, opt_state = plain(params, opt_state)
        state, _ = step(state, batch)
    assert jax.tree.structure(opt_state) == jax.tree.structure(state.opt_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, state.params)


# --- gradients --------------------------------------------------------------------------------

EQUATIONS = {"query": "xdr,xrnh->xdnh", "out": "xnhr,xrd->xnhd", "up": "xdr,xrf->xdf"}


@pytest.mark.parametrize("dora, accumulate", [(False, 1), (True, 2)], ids=["lora", "dora-in-parts"])
def test_gradients_of_adapters_are_those_of_brute_force(dora, accumulate, mesh, params):
    """By plain gradient descent, with W + α/r · A · B (or m · V / ‖V‖ with the norm held fixed) written out by hand."""
    config = TuneConfig(None, LoraConfig(3, 6.0, targets="attention/(query|out)/kernel|mlp/up/kernel", dora=dora))
    sgd = optax.sgd(1.0)
    tuning, _, state, step = build(mesh, config, optimizer=sgd, accumulate=accumulate)
    rng, batch = np.random.default_rng(0), batch_of()
    start = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), copied(state.params))
    state = dataclasses.replace(state, params=jax.tree.map(jnp.asarray, start))

    def loss(trained):
        changed = flat(params)
        for path in [path for path in changed if path.rsplit("/")[-2] in EQUATIONS and path.endswith("kernel")]:
            a, b = flat(trained)[f"{path}/lora_a"], flat(trained)[f"{path}/lora_b"]
            v = changed[path] + 6.0 / 3 * jnp.einsum(EQUATIONS[path.rsplit("/")[-2]], a, b)
            if dora:
                over = (1, 2) if "out" in path else (1,)
                length = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(v**2, axis=over, keepdims=True)))
                v = v * flat(trained)[f"{path}/lora_magnitude"].reshape(length.shape) / length
            changed[path] = v
        return objectives.tokens(8)(MODEL.apply, unflatten_dict(changed, sep="/"), batch, None)[0] / batch["weights_BL"].sum()

    expected = jax.jit(jax.grad(loss))(start)
    state, _ = step(state, batch)
    assert tuning.shapes.keys() == expected.keys()
    for path, gradient in flat(expected).items():
        assert np.abs(gradient).max() > 1e-5
        np.testing.assert_allclose(flat(start)[path] - flat(state.params)[path], gradient, atol=1e-6, err_msg=path)


def test_experts_have_adapters_of_their_own():
    """W_e + α/r · A_e · B_e in each expert and layer; the router stays as it is."""
    model = Model(dataclasses.replace(SHAPE, moe=MoeConfig(4), activation="swiglu", mlp_width=8))
    tuning, params = Tuning(TuneConfig(None, LoraConfig(2, 4.0)), model), jax.jit(model.init)(jax.random.key(0))
    trained, frozen = jax.jit(tuning.split)(params, jax.random.key(1))
    trained = jax.tree.map(lambda x: np.asarray(x) + 1, trained)
    merged = flat(jax.jit(tuning.merge)(trained, frozen))
    path = "transformer/decoder/layers/mlp/down/kernel"
    for layer, expert in ((0, 1), (2, 3)):
        a, b, w = (np.asarray(x)[layer, expert] for x in (*(flat(trained)[f"{path}/lora_{n}"] for n in "ab"), flat(params)[path]))
        np.testing.assert_allclose(np.asarray(merged[path])[layer, expert], w + 2 * a @ b, rtol=1e-5)
    assert not any("router" in path for path in flat(trained))


def test_the_start_of_an_adapter():
    """A uniform within ±1/√inputs, B zero, each layer and matrix drawn by itself."""
    model = Model(dataclasses.replace(SHAPE, width=64, heads=4))
    tuning = Tuning(WAYS["lora"], model)
    trained = flat(jax.device_get(jax.jit(lambda key: tuning.split(model.init(key), key)[0])(jax.random.key(0))))
    layers = "transformer/decoder/layers"
    for path, inputs in (("attention/query", 64), ("attention/out", 64), ("mlp/down", 256)):
        a = trained[f"{layers}/{path}/kernel/lora_a"]
        assert 0.9 / inputs**0.5 < np.abs(a).max() <= 1 / inputs**0.5
        assert a.std() == pytest.approx((3 * inputs) ** -0.5, rel=0.1) and not np.array_equal(a[0], a[1])
        assert not np.any(trained[f"{layers}/{path}/kernel/lora_b"])
    assert not np.array_equal(trained[f"{layers}/attention/query/kernel/lora_a"], trained[f"{layers}/attention/key/kernel/lora_a"])


def scans(jaxpr):
    """Every scan in a program, with the sizes of what it carries."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            first, count = eqn.params["num_consts"], eqn.params["num_carry"]
            yield eqn.params["length"], sum(v.aval.size for v in eqn.invars[first : first + count])
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from scans(inner)


@pytest.mark.parametrize("way", ["lora", "last"])
def test_gradients_are_summed_in_the_small_tree(way, mesh):
    """With four parts of the batch, what the loop over them carries is as large as what is trained, and two metrics more."""
    tuning, settings = Tuning(WAYS[way], MODEL), OptimConfig()
    schedule = make_schedule(settings, 20)
    optimizer = make_optimizer(settings, schedule, tuning)
    step = make_train_step(MODEL, objectives.tokens(8), optimizer, schedule, mesh, seed=0, accumulate=4, tuning=tuning)
    program = jax.make_jaxpr(step)(state_shapes(MODEL, optimizer, tuning), batch_of())
    carried = [size for length, size in scans(program.jaxpr) if length == 4]
    assert carried == [tuning.trained_parameters + 3]  # loss, weight, nll
    assert tuning.trained_parameters < tuning.total


# --- held in fewer bits -----------------------------------------------------------------------


@pytest.mark.parametrize("base, bytes_each", [("bfloat16", 2), ("int8", 1 + 4 / 64), ("nf4", 0.5 + 4 / 64)])
def test_bytes_of_frozen_matrices(base, bytes_each, mesh):
    """Measured in arrays: values and scales of every matrix of the blocks; embeddings and norms stay float32."""
    model = Model(dataclasses.replace(SHAPE, width=64, heads=1, mlp_width=64))
    tuning = Tuning(TuneConfig(None, LORA, base), model)
    frozen = flat(jax.device_get(init_frozen(model, 0, mesh, tuning)))
    matrices = sum(value.nbytes for path, value in frozen.items() if "kernel" in path)
    assert matrices == bytes_each * 3 * (4 + 2) * 64 * 64
    assert all(value.dtype == np.float32 for path, value in frozen.items() if "kernel" not in path)


def test_int8_and_nf4_round_to_the_nearest():
    """int8: to the nearest step of each output's scale. nf4: to the nearest of 16 values between −1 and 1 times the largest
    absolute value of 64 inputs."""
    model = Model(dataclasses.replace(SHAPE, width=128, heads=2, layers=1))
    params = jax.jit(model.init)(jax.random.key(0))
    path = "transformer/decoder/layers/mlp/up/kernel"
    w = np.asarray(flat(params)[path])[0]  # D, F
    held = {base: Tuning(TuneConfig(None, LoraConfig(1, targets="mlp/down"), base), model) for base in ("int8", "nf4")}
    both = jax.jit(lambda p: {base: flat(t.merge(*t.split(p, jax.random.key(0))))[path][0] for base, t in held.items()})
    back = jax.device_get(both(params))
    step = np.abs(w).max(axis=0) / 127
    assert (np.abs(back["int8"] - w) <= 0.51 * step).all()
    blocks, rounded = w.reshape(2, 64, -1), back["nf4"].reshape(2, 64, -1)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    levels = np.unique(np.round(rounded / largest, 5))
    assert len(levels) == 16 and {-1.0, 0.0, 1.0} <= set(levels.tolist())
    least = np.abs((blocks / largest)[..., None] - levels).min(-1)
    np.testing.assert_allclose(np.abs(blocks - rounded) / largest, least, atol=1e-4)


def test_matrices_come_in_the_precision_of_the_computation(params):
    """A step in bfloat16 makes the matrices that it changes in bfloat16, half the bytes, and computes the same."""
    model = Model(dataclasses.replace(SHAPE, dtype="bfloat16"))
    tuning = Tuning(TuneConfig(None, LORA, "int8"), model)

    @jax.jit
    def logits(params):
        trained, frozen = tuning.split(params, jax.random.key(1))
        half = tuning.join(*tuning.parts(trained, frozen, jnp.bfloat16))
        both = [model.apply(p, batch_of())[0] for p in (tuning.merge(trained, frozen), half)]
        return both, jax.tree.map(lambda x: x.dtype == jnp.bfloat16, half)

    both, halved = logits(params)
    np.testing.assert_array_equal(*both)
    assert {path for path, is_half in flat(halved).items() if is_half} == {path for path in flat(params) if path.endswith("kernel")}


def test_base_needs_an_even_axis_and_something_frozen():
    odd = Model(dataclasses.replace(SHAPE, width=15, heads=3))
    with pytest.raises(ValueError, match=r"nf4 packs two numbers into a byte, but the last axis of .* is 5: give int8"):
        Tuning(TuneConfig(None, LORA, "nf4"), odd)
    with pytest.raises(ValueError, match=r"tune\.base int8 .* tune\.train '\.\*' freezes none"):
        Tuning(TuneConfig(base="int8"), MODEL)


# --- expressions ------------------------------------------------------------------------------


def test_layers_by_number(params):
    """Stacked leaves are split by layer; the trained part holds those layers in order."""
    params = jax.tree.map(lambda x: x + np.arange(x.size, dtype=np.float32).reshape(x.shape), params)
    tuning = Tuning(TuneConfig(r"layers\.(0|2)/attention/query"), MODEL)
    trained, frozen = tuning.split(params, jax.random.key(0))
    path = "transformer/decoder/layers/attention/query/kernel"
    np.testing.assert_array_equal(flat(trained)[path], np.asarray(flat(params)[path])[[0, 2]])
    np.testing.assert_array_equal(flat(frozen)[path], np.asarray(flat(params)[path])[[1]])
    assert tuning.names[path] == tuple(f"transformer/decoder/layers.{i}/attention/query/kernel" for i in (0, 2))
    assert tuning.trained_parameters == 2 * (16 * 16 + 16)
    equal(params, tuning.merge(trained, frozen))


def test_stacks_by_name_and_layers_that_are_shared():
    """Of an encoder-decoder each stack has its own layers; a shared block is one, without a number."""
    pair = dataclasses.replace(SHAPE, architecture="encoder_decoder", layers=2, decoder_layers=3)
    tuning = Tuning(TuneConfig(r"decoder/layers\.2/cross_attention/|encoder/layers\.0/mlp/up/kernel"), Model(pair))
    assert {name for names in tuning.names.values() for name in names} == {
        *(f"transformer/decoder/layers.2/cross_attention/{name}/{part}" for name in ("query", "key", "value", "out")
          for part in ("kernel", "bias")),
        "transformer/encoder/layers.0/mlp/up/kernel",
    }  # fmt: skip
    shared = Tuning(TuneConfig(None, LORA), Model(dataclasses.replace(SHAPE, share_layers=True)))
    assert flat(shared.shapes)["transformer/decoder/layers/mlp/up/kernel/lora_a"].shape == (16, 4)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"train": "atention/(query|key)"}, r"tune\.train 'atention/.*' finds no parameter: did you mean 'attention/query'\?"),
        ({"train": r"layers\.7/"}, r"finds no parameter: did you mean 'layers\.[012]'\? there are \S+/layers\.\d/"),
        ({"train": None, "lora": LoraConfig(2, targets="mpl/up")}, r"tune\.lora\.targets 'mpl/up' finds .*did you mean 'mlp/up'"),
        ({"lora": LoraConfig(2)}, r"tune\.train '\.\*' trains .*kernel, which tune\.lora\.targets gives an adapter"),
    ],
)  # fmt: skip
def test_expressions_that_find_nothing_or_too_much_are_refused(options, said):
    with pytest.raises(ValueError, match=said) as caught:
        Tuning(TuneConfig(**options), MODEL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: TuneConfig(None), "nothing is trained"),
        (lambda: TuneConfig("("), r"train '\(' is not a regular expression"),
        (lambda: LoraConfig(2, targets="["), "targets .* is not a regular expression"),
        (lambda: LoraConfig(-1), "rank .-1. must not be negative"),
        (lambda: LoraConfig(dora=True), "give a rank above 0"),
        (lambda: GroupConfig("("), "pattern .* is not a regular expression"),
        (lambda: GroupConfig("a", -1.0), "must not be negative"),
        (lambda: OptimConfig(layer_decay=0.0), "layer_decay is 0.0"),
        (lambda: OptimConfig(average=1.5), "average is 1.5"),
    ],
)
def test_configs_that_mean_nothing_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# --- rates by name ----------------------------------------------------------------------------


def rates_of(config: OptimConfig, tuning: Tuning, kind: int = 0) -> dict[str, list[float]]:
    return {path: np.ravel(value).tolist() for path, value in flat(multipliers(config, tuning)[kind]).items()}


def test_layer_decay_by_hand():
    """decay^(n + 1 − depth): embeddings 0, block i its i + 1, the last norm and the head n + 1."""
    head = dataclasses.replace(SHAPE, architecture="encoder", head=HeadConfig("sequence"))
    rates = rates_of(OptimConfig(layer_decay=0.5), Tuning(TuneConfig(), Model(head)))
    for name in ("transformer/embed/table", "transformer/encoder/embed_positions/table"):
        assert rates[name] == [1 / 16]
    assert rates["transformer/encoder/layers/mlp/up/kernel"] == [1 / 8, 1 / 4, 1 / 2]
    assert rates["transformer/encoder/final_norm/scale"] == rates["head/out/kernel"] == rates["head/dense/bias"] == [1.0]
    last = rates_of(OptimConfig(layer_decay=0.5), Tuning(TuneConfig(r"layers\.[12]/|^head/"), Model(head)))
    assert last["transformer/encoder/layers/mlp/up/kernel"] == [1 / 4, 1 / 2]
    lora = rates_of(OptimConfig(layer_decay=0.5), Tuning(TuneConfig(None, LoraConfig(1, targets=r"layers\.(0|2)/")), Model(head)))
    assert lora["transformer/encoder/layers/mlp/up/kernel/lora_b"] == [1 / 8, 1 / 2]

    pair = TransformerConfig(architecture="encoder_decoder", vocab_size=32, positions=8, layers=1, decoder_layers=2, width=16,
                             heads=2, position="relative", relative_buckets=4)  # fmt: skip
    rates = rates_of(OptimConfig(layer_decay=0.5), Tuning(TuneConfig(), Model(pair)))
    assert rates["transformer/encoder/layers/mlp/up/kernel"] == [1 / 2]
    assert rates["transformer/decoder/layers/mlp/up/kernel"] == [1 / 4, 1 / 2]
    assert rates["transformer/encoder/relative_bias/table"] == [1 / 4] and rates["transformer/embed/table"] == [1 / 8]


def test_groups_in_order():
    """The first that matches counts; a weight is decayed as `decay` says, unless its group has a decay of its own."""
    query = GroupConfig(r"layers\.1/attention/query", 3.0, weight_decay=0.25)
    groups = (query, GroupConfig("attention/", 0.5), GroupConfig("embed", 0.0))
    config = OptimConfig(groups=groups, decay="kernel$|lora_a$", weight_decay=1.0)
    tuning = Tuning(TuneConfig(), MODEL)
    rates, decays = rates_of(config, tuning), rates_of(config, tuning, 1)
    layers = "transformer/decoder/layers"
    assert rates[f"{layers}/attention/query/kernel"] == [0.5, 3.0, 0.5] and decays[f"{layers}/attention/query/kernel"] == [
        1,
        0.25,
        1,
    ]
    assert decays[f"{layers}/attention/query/bias"] == [0, 0.25, 0], "a decay of the group's own is of all its parameters"
    assert rates[f"{layers}/attention/key/bias"] == [0.5] and decays[f"{layers}/attention/key/bias"] == [0]
    assert rates["transformer/embed/table"] == [0.0] and rates[f"{layers}/mlp/up/kernel"] == [1.0]
    lora = rates_of(OptimConfig(decay="lora_a$", weight_decay=1.0), Tuning(TuneConfig(None, LORA), MODEL), 1)
    assert lora[f"{layers}/mlp/up/kernel/lora_a"] == [1] and lora[f"{layers}/mlp/up/kernel/lora_b"] == [0]
    for again in ("attention/query", "attention/"):
        unused = OptimConfig(groups=(GroupConfig("attention/"), GroupConfig(again)))
        with pytest.raises(ValueError, match=rf"optim\.groups: pattern '{again}' finds no trained parameter"):
            make_optimizer(unused, lambda step: 0.1, tuning)
    with pytest.raises(ValueError, match=r"weight_decay 0\.1 would do nothing with learning_rate 0"):
        GroupConfig("embed", 0.0, 0.1)


def updated(optimizer, gradient, params):
    """The first updates with this gradient everywhere, and the state after them."""

    @jax.jit
    def update(params):
        grads = jax.tree.map(lambda x: x * 0 + gradient, params)
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(grads, optimizer.init(params), params)

    return jax.device_get(update(params))


def test_the_optimiser_follows_its_multipliers(params):
    """With a zero gradient a weight moves by rate · decay; with one, Adam's first update is the rate itself."""
    groups = (GroupConfig(r"layers\.1/mlp/up", 3.0, weight_decay=0.0), GroupConfig(r"layers\.2/mlp/up", 0.5))
    tuning = Tuning(TuneConfig(), MODEL)
    optimizer = make_optimizer(OptimConfig(weight_decay=0.5, clip=None, groups=groups), lambda step: 0.1, tuning)
    path = "transformer/decoder/layers/mlp/up/kernel"
    w, still, moved = flat(params)[path], *(flat(updated(optimizer, g, params)[0])[path] for g in (0.0, 1.0))
    np.testing.assert_allclose(still, w * np.array([-0.05, 0, -0.025], np.float32)[:, None, None], rtol=1e-5)
    expected = np.broadcast_to(np.array([-0.1, -0.3, -0.05])[:, None, None], w.shape)
    np.testing.assert_allclose(moved - still, expected, rtol=1e-4)


@pytest.mark.parametrize("name", typing.get_args(Name))
def test_a_group_is_decayed_where_nothing_else_is(name, params):
    """Under every optimiser: `optim.weight_decay` is 0, and of two groups one is of norms, which `optim.decay` leaves out."""
    groups = (GroupConfig(r"mlp/up/kernel", weight_decay=0.5), GroupConfig("final_norm", 0.5, weight_decay=0.25))
    config = OptimConfig(name=name, weight_decay=0.0, clip=None, groups=groups)
    still = flat(updated(make_optimizer(config, lambda step: 0.1, Tuning(TuneConfig(), MODEL)), 0.0, params)[0])
    rate = {path: 0.05 if "mlp/up/kernel" in path else 0.0125 if "final_norm" in path else 0 for path in still}
    for path, w in flat(params).items():
        np.testing.assert_allclose(still[path], -rate[path] * w, rtol=1e-5, atol=1e-7, err_msg=path)
    assert len(set(rate.values())) == 3


def test_a_tuning_without_multipliers_changes_no_bit_of_the_optimiser(params):
    """Nor the form of its state: older checkpoints fit."""
    config, tuning = OptimConfig(), Tuning(TuneConfig(), MODEL)
    equal(*(updated(make_optimizer(config, lambda step: 0.1, *given), 0.01, params) for given in ((), (tuning,))))


# --- averages, checkpoints, meshes ------------------------------------------------------------


def test_the_average_by_hand_and_not_of_skipped_updates(mesh):
    _, _, state, step = build(mesh, WAYS["lora"], average=0.15)
    mean, batch = copied(state.params), batch_of()
    equal(mean, state.average)
    for n in range(3):
        state, _ = step(state, batch)
        share = 1 - min(0.15, (1 + n) / (10 + n))
        mean = jax.tree.map(lambda m, new, share=share: m + np.float32(share) * (new - m), mean, copied(state.params))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), mean, copied(state.average))
    assert state.scored is state.average
    before = copied((state.params, state.average))
    state, metrics = step(state, {**batch, "weights_BL": np.full((4, 8), np.inf, np.float32)})
    assert metrics["skipped"] == 1
    equal(before, (state.params, state.average))


def test_resume_is_bit_equal_with_adapters_and_average(mesh, tmp_path):
    """Four steps are two, a checkpoint in which nothing frozen lies, and two more; who reads the model gets the average."""
    config = TuneConfig("final_norm", LORA, "int8")
    tuning, optimizer, state, step = build(mesh, config, average=0.9)
    batches = [batch_of(seed=i) for i in range(4)]
    for batch in batches[:2]:
        state, _ = step(state, batch)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(2, state, {"at": 2}, {"loss": 1.0})
    checkpoints.close()
    for batch in batches[2:]:
        state, _ = step(state, batch)
    whole = copied(state)

    items = {path.name for path in (tmp_path / "checkpoints/2").iterdir() if path.is_dir()}
    assert items == {"params", "optimizer", "average", "progress", "metrics"}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    shapes = state_shapes(MODEL, optimizer, tuning, OptimConfig(average=0.9))
    shardings = state_shardings(MODEL, optimizer, mesh, tuning, OptimConfig(average=0.9))
    state, progress = checkpoints.restore(2, shapes, shardings, init_frozen(MODEL, 0, mesh, tuning))
    assert progress == {"at": 2} and state.step == 2
    equal(state.average, checkpoints.restore_params(2, shapes.params, shardings.params))
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: not np.array_equal(a, b), copied(state.average), copied(state.params))))
    checkpoints.close()
    for batch in batches[2:]:
        state, _ = step(state, batch)
    equal(whole, state)


def test_checkpoints_rank_by_any_metric(mesh, tmp_path):
    """The best and the newest are kept; the highest where higher is better; one without a number is the worst."""
    _, _, state, _ = build(mesh, WAYS["lora"])
    scores = {1: (0.5, 0.1), 2: (0.2, 0.9), 3: (np.nan, np.nan), 4: (0.4, 0.3)}
    for name, metric, higher, best in (("a", "loss", False, 2), ("b", "accuracy", True, 2), ("c", "accuracy", False, 1)):
        checkpoints = Checkpoints(tmp_path / name, 1, metric, higher)
        for step, (loss, accuracy) in scores.items():
            metrics = {"loss": loss, "accuracy": accuracy}
            checkpoints.save(step, state, None, metrics if step != 2 else None)
            if step == 2:  # stopped between saving and the end of the evaluation, and gone on
                checkpoints.close()
                checkpoints = Checkpoints(tmp_path / name, 1, metric, higher)
                checkpoints.score(step, metrics)
        checkpoints.close()
        again = Checkpoints(tmp_path / name, 1, metric, higher)
        assert again.best() == best and again.manager.all_steps() == [best, 4]
        shardings = state_shardings(MODEL, optax.sgd(1.0), mesh, Tuning(WAYS["lora"], MODEL)).params
        equal(state.params, again.restore_params(best, Tuning(WAYS["lora"], MODEL).shapes, shardings))  # no average was kept
        again.close()


@pytest.mark.parametrize("way", ["last", "dora-nf4"])
def test_a_mesh_gives_one_devices_numbers(way, mesh):
    """data × fsdp × tensor of eight devices, an average kept, the batch in two parts; matrices and adapters lie in parts."""
    model = Model(dataclasses.replace(SHAPE, heads=4))
    config = WAYS["last"] if way == "last" else TuneConfig("final_norm", LoraConfig(2, dora=True), "nf4")
    many = make_mesh(ParallelConfig(data=2, fsdp=2, tensor=2))
    seen = []
    for where in (mesh, many):
        with jax.set_mesh(where):
            _, _, state, step = build(where, config, model, average=0.5, accumulate=2, optim={"eps": 1e-4})
            losses = []
            for _ in range(3):
                state, metrics = step(state, place_batch(batch_of(8), where))
                losses.append(float(settle(where, metrics)["loss"]))
            seen.append((losses, copied(state.params), copied(state.average)))
    np.testing.assert_allclose(seen[0][0], seen[1][0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), seen[0][1:], seen[1][1:])
    layers = "transformer/decoder/layers"
    if way == "last":
        assert flat(state.frozen)[f"{layers}/mlp/up/kernel"].addressable_shards[0].data.shape == (1, 8, 32)
    else:
        assert flat(state.params)[f"{layers}/mlp/up/kernel/lora_a"].addressable_shards[0].data.shape[1] == 8
        assert flat(state.params)[f"{layers}/attention/query/kernel/lora_b"].addressable_shards[0].data.shape[2:] == (2, 4)


def test_a_run_starts_from_given_parameters(mesh):
    """Loaded parameters, not those of the seed, and taken over; the frozen part alone can be made again of the same ones."""
    given = jax.jit(MODEL.init)(jax.random.key(7))
    expected = copied(given)
    tuning, _, state, step = build(mesh, WAYS["lora"], params=given)
    equal(expected, jax.jit(tuning.merge)(state.params, state.frozen))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    equal(state.frozen, init_frozen(MODEL, 0, mesh, tuning, expected))
    state, metrics = step(state, batch_of())
    assert metrics["skipped"] == 0


def test_an_objective_may_draw_though_nothing_is_dropped(mesh):
    """With `stochastic` it is given a key, another one each step; else none."""
    keys = []

    def objective(apply, params, batch, rng):
        keys.append(rng)
        loss, weight, metrics = objectives.tokens(8)(apply, params, batch, None)
        return loss, weight, {**metrics, "drawn": jax.random.uniform(rng) if rng is not None else jnp.zeros(())}

    settings = OptimConfig()
    schedule = make_schedule(settings, 20)
    optimizer = make_optimizer(settings, schedule)
    drawn, state = [], init_state(MODEL, optimizer, 0, mesh)
    for stochastic in (False, True):
        step = make_train_step(MODEL, objective, optimizer, schedule, mesh, seed=0, stochastic=stochastic)
        for _ in range(2):
            state, metrics = step(state, batch_of())
            drawn.append(float(metrics["drawn"]))
    assert drawn[:2] == [0, 0] and len({*drawn[2:]} - {0.0}) == 2 and keys[0] is None


@pytest.mark.parametrize(
    "base, dora, moe, stages",
    [("nf4", False, MoeConfig(), 1), ("int8", True, MoeConfig(experts=2), 1), ("float32", True, MoeConfig(), 3)],
)
def test_a_layers_own_kernel_is_that_of_the_whole(base, dora, moe, stages):
    """Loss and gradients where each layer composes its kernel, and where all kernels are made before: with experts, in stages."""
    model = Model(dataclasses.replace(SHAPE, moe=moe, remat="full"))
    tuning = Tuning(TuneConfig("final_norm", LoraConfig(4, 8.0, dora=dora), base), model)
    mesh = make_mesh(ParallelConfig(data=1, stage=stages), jax.devices()[:stages])
    trained, frozen = jax.jit(tuning.split)(model.init(jax.random.key(0)), jax.random.key(1))
    trained = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), trained)
    tokens = jax.random.randint(jax.random.key(3), (3, 8), 0, 32)
    batch = {"tokens_BL": tokens, "targets_BL": tokens[:, ::-1], "weights_BL": jnp.ones((3, 8))}

    def loss(trained, by_layer):
        params = tuning.join(*tuning.parts(trained, frozen, by_layer=by_layer))
        return objectives.tokens(8)(model.apply, params, batch, None)[0]

    with jax.set_mesh(mesh):
        found = [jax.jit(jax.value_and_grad(lambda t, b=by_layer: loss(t, b)))(trained) for by_layer in (True, False)]
    for a, b in zip(*map(jax.tree.leaves, jax.device_get(found)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max() + 1e-6)


def test_a_step_holds_the_kernel_of_one_layer_at_a_time():
    """A frozen base in few bits used to be released whole within a step: 7 bytes a parameter, whatever the base."""
    config = TransformerConfig(vocab_size=32, positions=16, layers=12, width=128, heads=2, remat="full", position="rotary")
    model, settings = Model(config), OptimConfig()
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    tuning, schedule = Tuning(TuneConfig(None, LORA, "nf4"), model), make_schedule(settings, 10)
    optimizer = make_optimizer(settings, schedule, tuning)
    step = make_train_step(model, objectives.tokens(16), optimizer, schedule, mesh, seed=0, tuning=tuning)
    shape = {"tokens_BL": jnp.int32, "targets_BL": jnp.int32, "weights_BL": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct((1, 16), dtype) for name, dtype in shape.items()}
    with jax.set_mesh(mesh):
        memory = step.lower(state_shapes(model, optimizer, tuning, settings), batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * tuning.total
