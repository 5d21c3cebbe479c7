"""The table: each pattern against its formula, both ways, in slices, and against what torch's forward passes use."""

import math

import jax
import numpy as np
import pytest

from jaxlm.hub.tensors import Table, blocks, flatten, letters_of, nest, paste, resolve

SIZES = {"X": 3, "D": 8, "N": 4, "K": 2, "H": 3, "F": 6, "V": 10, "E": 4}


def read_leaf(tensor, part, index, read, dtype):
    """The leaf at `index`, as `load` fills a shard."""
    out = np.empty([span.stop - span.start for span in index], dtype)
    for where, block in blocks(tensor, part, index, read):
        paste(out, index, block, where)
    return out


def fit(tensors, axes):
    """A table fitted to leaves of the given letters, and random values of those leaves."""
    shapes = {path: tuple(SIZES[letter] for letter in letters) for path, letters in axes.items()}
    rng = np.random.default_rng(0)
    leaves = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    return resolve(Table(tensors), shapes, axes), leaves


def write(rows, leaves, dtype=np.float32):
    """All Hugging Face tensors of the leaves."""
    return {name: row.write(at, lambda path, index: leaves[path][index], dtype) for row in rows for name, at in row.names()}


def reader(tensors, counts=None):
    def read(name, slices):
        if counts is not None:
            counts.append(math.prod(span.stop - span.start for span in slices))
        return tensors[name][slices]

    return read


def full(shape):
    return tuple(slice(0, size) for size in shape)


N, K, H, F = (SIZES[letter] for letter in "NKHF")


@pytest.mark.parametrize(
    ("axes", "pattern", "shape", "place"),
    [
        ("DNH", "(N H) D", (N * H, 8), lambda d, n, h: (n * H + h, d)),
        ("DNH", "D (N H)", (8, N * H), lambda d, n, h: (d, n * H + h)),
        ("NHD", "D (N H)", (8, N * H), lambda n, h, d: (d, n * H + h)),
        ("DF", "F D", (F, 8), lambda d, f: (f, d)),
        ("VD", "V D", (10, 8), lambda v, d: (v, d)),
        ("NH", "(N H)", (N * H,), lambda n, h: (n * H + h,)),
        ("V", "1 V", (1, 10), lambda v: (0, v)),
        ("EDF", "E F D", (4, F, 8), lambda e, d, f: (e, f, d)),
        ("D", "D", (8,), lambda d: (d,)),
    ],
)
def test_one_leaf_one_tensor(axes, pattern, shape, place):
    """Every element lies where the formula says."""
    (row,), leaves = fit({"t": {"leaf": pattern}}, {"leaf": axes})
    (value,) = write([row], leaves).values()
    assert value.shape == row.shape == shape
    for index in np.ndindex(leaves["leaf"].shape):
        assert value[place(*index)] == leaves["leaf"][index]


@pytest.mark.parametrize(
    ("patterns", "place"),
    [
        # GPT-2: queries of all heads, then keys, then values, along the columns.
        (("D (*N H)", "D (*K H)", "D (*K H)"), lambda i, d, n, h: (d, (0, N, N + K)[i] * H + n * H + h)),
        # Phi-3: the same along the rows.
        (("(*N H) D", "(*K H) D", "(*K H) D"), lambda i, d, n, h: ((0, N, N + K)[i] * H + n * H + h, d)),
        # GPT-NeoX: each head's query, key and value in turn.
        (("(N *H) D", "(N *H) D", "(N *H) D"), lambda i, d, n, h: (n * 3 * H + i * H + h, d)),
    ],
)
def test_fused_attention(patterns, place):
    heads = ["K" if "K" in pattern else "N" for pattern in patterns]
    axes = {name: f"D{letter}H" for name, letter in zip(("query", "key", "value"), heads, strict=True)}
    (row,), leaves = fit({"t": dict(zip(axes, patterns, strict=True))}, axes)
    (value,) = write([row], leaves).values()
    for i, leaf in enumerate(leaves.values()):
        for index in np.ndindex(leaf.shape):
            assert value[place(i, *index)] == leaf[index]
    assert value.size == sum(leaf.size for leaf in leaves.values()), "and nothing else is there"


def test_layers_and_experts_are_spread_over_names():
    (row,), leaves = fit({"l.{x}.e.{e}.w1": {"layers/gate": "F D"}}, {"layers/gate": "XEDF"})
    tensors = write([row], leaves)
    assert list(tensors)[:5] == ["l.0.e.0.w1", "l.0.e.1.w1", "l.0.e.2.w1", "l.0.e.3.w1", "l.1.e.0.w1"]
    assert np.array_equal(tensors["l.2.e.1.w1"], leaves["layers/gate"][2, 1].T)


EVERYTHING = {
    "wte": {"embed": "V D"},
    "h.{x}.c_attn": {"layers/query": "D (*N H)", "layers/key": "D (*K H)", "layers/value": "D (*K H)"},
    "h.{x}.neox": {"layers/q": "(N *H) D", "layers/k": "(N *H) D"},
    "h.{x}.neox.bias": {"layers/qb": "(N *H)", "layers/kb": "(N *H)"},
    "h.{x}.gate_up": {"layers/gate": "(*F) D", "layers/up": "(*F) D"},
    "h.{x}.e.{e}.w2": {"layers/down": "D F"},
    "h.{x}.experts": {"layers/experts": "E F D"},
    "h.{x}.out": {"layers/out": "D (N H)"},
    "bias": {"bias": "1 V"},
    "norm": {"norm": "D"},
}
AXES = {
    "embed": "VD", "layers/query": "XDNH", "layers/key": "XDKH", "layers/value": "XDKH", "layers/q": "XDNH", "layers/k": "XDNH",
    "layers/qb": "XNH", "layers/kb": "XNH", "layers/gate": "XDF", "layers/up": "XDF", "layers/down": "XEFD",
    "layers/experts": "XEDF", "layers/out": "XNHD", "bias": "V", "norm": "D",
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_there_and_back_is_exact(dtype):
    rows, leaves = fit(EVERYTHING, AXES)
    leaves = {path: leaf.astype(jax.numpy.dtype(dtype)) for path, leaf in leaves.items()}
    tensors = write(rows, leaves, jax.numpy.dtype(dtype))
    for row in rows:
        for part in row.parts:
            back = read_leaf(row, part, full(part.shape), reader(tensors), np.float32)
            assert back.astype(dtype).tobytes() == leaves[part.path].tobytes()


@pytest.mark.parametrize("tile", [4, 1 << 16])
def test_any_slice_is_the_slice_of_the_whole(monkeypatch, tile):
    """H too, which no rule splits: its slices are not one run of the merged axis. Copied in tiles or at once."""
    monkeypatch.setattr("jaxlm.hub.tensors.TILE", tile)
    rows, leaves = fit(EVERYTHING, AXES)
    tensors, rng = write(rows, leaves), np.random.default_rng(1)
    for row in rows:
        for part in row.parts:
            for _ in range(20):
                ends = [sorted(rng.choice(size + 1, 2, replace=False)) for size in part.shape]
                index = tuple(slice(int(start), int(stop)) for start, stop in ends)
                assert np.array_equal(read_leaf(row, part, index, reader(tensors), np.float32), leaves[part.path][index])


def test_a_shard_reads_its_own_bytes_only():
    """Split along D, N, K, F, V, E or X, exactly the shard's elements are asked for."""
    rows, leaves = fit({name: parts for name, parts in EVERYTHING.items() if "neox" not in name}, AXES_WITHOUT_NEOX)
    tensors = write(rows, leaves)
    for row in rows:
        for part in row.parts:
            for axis, letter in enumerate(part.axes):
                if letter != "H":
                    counts: list[int] = []
                    index = tuple(slice(0, size // 2) if i == axis else slice(0, size) for i, size in enumerate(part.shape))
                    got = read_leaf(row, part, index, reader(tensors, counts), np.float32)
                    assert sum(counts) == got.size, f"{part.path} along {letter}"


AXES_WITHOUT_NEOX = {path: letters for path, letters in AXES.items() if path.split("/")[-1] not in ("q", "k", "qb", "kb")}


def test_a_table_may_name_more_than_the_model_has():
    rows, _ = fit({"w": {"kernel": "F D"}, "b": {"bias": "F"}}, {"kernel": "DF"})
    assert [row.name for row in rows] == ["w"]


def test_a_parameter_without_a_place_is_refused():
    with pytest.raises(ValueError, match=r"has no place for these parameters of the model: layers/query_norm/scale$"):
        resolve(Table({"w": {"kernel": "F D"}}), {"kernel": (8, 6), "layers/query_norm/scale": (3, 8)}, {"kernel": "DF"})


def test_encoder_and_decoder_may_differ_in_depth():
    """Sizes are the leaf's own: T5's stacks have their own number of layers."""
    table = Table({"e.{x}.w": {"e/w": "F D"}, "d.{x}.w": {"d/w": "F D"}})
    rows = resolve(table, {"e/w": (2, 8, 6), "d/w": (5, 8, 6)}, {"e/w": "XDF", "d/w": "XDF"})
    assert [len(list(row.names())) for row in rows] == [2, 5]


def test_letters_of_logical_axes():
    assert letters_of(("layers", "D", "N", "H"), "XNHD") == "XDNH"
    assert letters_of(jax.sharding.PartitionSpec("layers", None), "XD") == "XD", "a norm's scale is split over nothing"
    with pytest.raises(AssertionError, match="Only one letter may be left out"):
        letters_of((None, None), "NH")


def test_flatten_and_nest():
    tree = {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    assert flatten(tree) == {"a/b/c": 1, "a/d": 2, "e": 3}
    assert nest(flatten(tree)) == tree


# --- against torch -----------------------------------------------------------------------------


def captured(theirs, projection):
    """The queries, keys and values that a torch model attends with at position 0 (where rotary angles are zero), each
    (heads, H), and the vector that its fused `projection` made them from."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = {}

    def attend(module, query, key, value, *args, **kwargs):
        seen.update(query=query[0, :, 0], key=key[0, :, 0], value=value[0, :, 0])
        return torch.zeros_like(query).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("capture", attend)
    theirs.config._attn_implementation = "capture"
    module = dict(theirs.named_modules())[projection]
    module.register_forward_pre_hook(lambda module, args: seen.update(x=args[0].reshape(-1)))
    with torch.no_grad():
        theirs.eval()(input_ids=torch.tensor([[5]]))
    return {name: value.numpy() for name, value in seen.items()}


def torch_model(kind):
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=32, n_embd=24, n_layer=1, n_head=4, **ids)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "neox":
        model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, **ids))
    else:
        model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, num_key_value_heads=2, **ids))
    with torch.no_grad():  # biases start at zero
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "projection", "patterns", "heads"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn", "D (*N H)", "NNN"),
        ("neox", "gpt_neox.layers.0.attention.query_key_value", "(N *H) D", "NNN"),
        ("phi3", "model.layers.0.self_attn.qkv_proj", "(*N H) D", "NKK"),
    ],
)
def test_fused_attention_is_split_as_torch_splits_it(kind, projection, patterns, heads):
    model = torch_model(kind)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    names = ("query", "key", "value")
    axes = {f"{name}/kernel": f"D{letter}H" for name, letter in zip(names, heads, strict=True)}
    table = {f"{projection}.weight": {path: patterns.replace("N", letters[1]) for path, letters in axes.items()}}
    if kind != "phi3":
        bias = {f"{name}/bias": patterns.replace("D", "").strip() for name in names}
        axes, table = axes | dict.fromkeys(bias, "NH"), table | {f"{projection}.bias": bias}
    sizes = {"D": 24, "N": 4, "K": 2, "H": 6}
    rows = resolve(Table(table), {path: [sizes[letter] for letter in letters] for path, letters in axes.items()}, axes)
    ours = {p.path: read_leaf(row, p, full(p.shape), reader(weights), np.float32) for row in rows for p in row.parts}
    theirs = captured(model, projection)
    for name in names:
        got = np.einsum("D,DNH->NH", theirs["x"], ours[f"{name}/kernel"]) + ours.get(f"{name}/bias", np.zeros((1, 1), np.float32))
        np.testing.assert_allclose(got, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parity
def test_gate_and_up_are_split_as_torch_splits_them():
    import torch

    model = torch_model("phi3")
    mlp = model.model.layers[0].mlp
    table = Table({"w": {"gate": "(*F) D", "up": "(*F) D"}})
    (row,) = resolve(table, {"gate": (24, 40), "up": (24, 40)}, {"gate": "DF", "up": "DF"})
    weights = {"w": mlp.gate_up_proj.weight.detach().numpy()}
    gate, up = (read_leaf(row, part, full(part.shape), reader(weights), np.float32) for part in row.parts)
    x, seen = np.random.default_rng(0).standard_normal((1, 1, 24)).astype(np.float32), []
    mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().numpy()))
    mlp(torch.tensor(x))
    inner = x @ gate / (1 + np.exp(-(x @ gate))) * (x @ up)
    np.testing.assert_allclose(inner, seen[0], rtol=1e-4, atol=1e-5)
