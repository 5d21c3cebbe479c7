"""What compiled train steps send: on each axis the collectives that it should, no others, and as many bytes as the formulas
of docs/parallelism.md say."""

import collections
import dataclasses
import importlib.util
import math
import pathlib

import jax
import pytest

from jaxlm.model import Model
from jaxlm.parallel import ParallelConfig, make_mesh
from jaxlm.parallel.hlo import collectives, sent_bytes
from jaxlm.train import OptimConfig, make_optimizer, make_schedule, make_train_step, objectives, state_shapes

pytestmark = pytest.mark.parallel


def beside(name):
    """A module beside this file."""
    found = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


axes = beside("test_axes")
B, L, D, LAYERS = axes.B, axes.L, 32, 2
DECODER = dataclasses.replace(axes.DECODER, unroll=True, layers=LAYERS, kv_heads=4)
NUMBERS = 128  # bytes of losses, weights and norms


def sent(config, chunk=L, accumulate=1, **mesh):
    """The collectives of one step; all numbers are of 4 bytes."""
    model, made = Model(config), make_mesh(ParallelConfig(**{"data": 1, **mesh}))
    schedule = make_schedule(OptimConfig(), 10)
    optimizer = make_optimizer(OptimConfig(clip=None), schedule)
    with jax.set_mesh(made):
        step = make_train_step(model, objectives.tokens(chunk), optimizer, schedule, made, seed=0, accumulate=accumulate)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), axes.rows())
        hlo = step.lower(state_shapes(model, optimizer), batch).compile().as_text()
    return model, collectives(hlo, made.size)


def total(found, kind):
    return sum(one.times * one.bytes for one in found if one.kind == kind)


def shapes_of(found, kind):
    counts = collections.Counter()
    for one in found:
        counts.update({shape: one.times * one.shapes.count(shape) for shape in one.shapes if one.kind == kind})
    return counts


@pytest.mark.parametrize(
    "mesh",
    [
        {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2},
        *(pytest.param(mesh, marks=pytest.mark.slow, id=axes.name_of(mesh))
          for mesh in ({"data": 8}, {"fsdp": 2, "context": 4}, {"expert": 2, "fsdp": 4})),
    ],
    ids=axes.name_of,
)  # fmt: skip
def test_more_chunks_of_the_loss_send_no_more(mesh):
    """The table is gathered once and its gradient summed once, not once a chunk; what tensor sends of each token is the same in
    either number of chunks. Tied and with a bias, or neither."""
    config = dataclasses.replace(DECODER, vocab_size=512, layers=1, tie_embeddings="data" in mesh, logit_bias="data" in mesh)
    if "expert" in mesh:
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, experts=4, chosen=2))
    one, four = (sent(config, chunk, **mesh)[1] for chunk in (L, L // 4))
    assert sent_bytes(four) <= sent_bytes(one)
    assert not [found for found in four if found.times > 1 and found.bytes > B * L * D * 4 // 4], (
        "nothing of a table's size in a loop"
    )


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}], ids=axes.name_of)
def test_gradients_of_the_tables_are_scattered(mesh):
    """Each table's gradient is summed straight into the part that a device stores, on a CPU too."""
    config = dataclasses.replace(DECODER, vocab_size=512, layers=1)
    _, found = sent(config, L // 4, **mesh)
    part = (512 // mesh.get("tensor", 1), D // mesh["fsdp"])
    assert shapes_of(found, "reduce-scatter") == {part: 2}
    assert not [shape for shape in shapes_of(found, "all-reduce") if math.prod(shape) >= 512 * D // mesh.get("tensor", 1)]


def test_data_adds_up_the_gradients_and_nothing_else():
    model, found = sent(DECODER, data=8)
    assert {one.kind for one in found} == {"all-reduce"}
    assert 0 <= total(found, "all-reduce") - 4 * model.parameters() <= NUMBERS


def test_fsdp_gathers_parameters_never_activations():
    """Each matrix once for the forward pass and once for the backward one at most; XLA:CPU adds up gradients whole, where
    others scatter what they reduce."""
    model, found = sent(DECODER, fsdp=8)
    assert {one.kind for one in found} <= {"all-reduce", "all-gather", "reduce-scatter"}
    parameters = {leaf.shape[-n:] for leaf in jax.tree.leaves(model.shapes) for n in (1, 2, 3)}
    assert set(shapes_of(found, "all-gather")) <= parameters, shapes_of(found, "all-gather")
    assert 4 * model.parameters() * 0.9 < total(found, "all-gather") <= 2 * 4 * model.parameters()


def test_tensor_adds_up_activations_and_gathers_them():
    """Shoeybi et al. 2019, "Megatron-LM", §3, and Korthikanti et al. 2022, §4.2.2: two sums forward and two backward in each
    layer, of which XLA:CPU makes one for each of the five maps that read the residual stream, and whole where others scatter
    (tests/parallel/test_topologies.py has the TPU's). One more for the look-up of the tokens, whose vocabulary is split, and one
    for the gradient of the head. What maps read is brought together again, twice forward and twice backward in each layer, for
    the head, and for the gradient of the look-up."""
    _, found = sent(DECODER, data=2, tensor=4)
    assert {one.kind for one in found} == {"all-reduce", "all-gather"}
    assert shapes_of(found, "all-reduce")[B // 2, L, D] == (2 + 5) * LAYERS + 2
    assert shapes_of(found, "all-gather") == {(B // 2, L, D): 4 * LAYERS + 2}


def test_the_vocabulary_stays_in_parts():
    """Cross-entropy over a split vocabulary sends numbers of a token, never its logits."""
    _, found = sent(dataclasses.replace(DECODER, vocab_size=4096), data=2, tensor=4)
    assert max(math.prod(shape) for one in found for shape in one.shapes) <= B // 2 * L * D * 32, "a row of the table at most"
    assert not [shape for one in found for shape in one.shapes if shape[-1:] in ((4096,), (1024,)) and len(shape) == 3]


def test_context_passes_keys_and_values_on():
    """Nothing is gathered: halves change places for the balanced order, keys and values go round, gradients are added up."""
    model, found = sent(DECODER, context=8)
    assert {one.kind for one in found} == {"all-reduce", "collective-permute"}
    own = B * L // 8 * 4 * 8  # numbers of a device's queries, keys or values
    assert max(math.prod(shape) for shape in shapes_of(found, "collective-permute")) == own
    assert 4 * model.parameters() <= total(found, "all-reduce") <= 1.3 * 4 * model.parameters() + NUMBERS


def test_stages_pass_activations_on_and_keep_their_layers():
    _, found = sent(DECODER, stage=2, data=4)
    assert {one.kind for one in found} == {"all-reduce", "collective-permute"}
    handed = B // 4 // 2 * L * D  # of a device's rows the part that is handed on
    assert max(math.prod(shape) for shape in shapes_of(found, "collective-permute")) == handed


def test_tokens_travel_to_their_experts():
    """There and back, and in the gradient again; only the router's matrix, which is split with them, is gathered."""
    config = dataclasses.replace(axes.MODELS["experts"], unroll=True)
    _, found = sent(config, data=2, expert=4)
    assert {one.kind for one in found} == {"all-reduce", "all-to-all", "all-gather"}
    assert set(shapes_of(found, "all-gather")) == {(D, config.moe.experts)}
