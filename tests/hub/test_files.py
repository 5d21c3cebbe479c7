"""Hugging Face folders: exact in every dtype and sharding, refused in one line where they do not fit, lean in memory."""

import dataclasses
import json
import math
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxlm.hub import files, saving
from jaxlm.hub.files import Tensors, find
from jaxlm.hub.loading import load
from jaxlm.hub.saving import save
from jaxlm.hub.tensors import Table, flatten, nest, resolve
from jaxlm.parallel import ParallelConfig, make_mesh, stored_shardings

SIZES = {"X": 2, "D": 16, "N": 4, "K": 2, "H": 4, "F": 24, "V": 32, "E": 4, "C": 3}
TABLE = Table(
    {
        "model.embed.weight": {"transformer/embed/table": "V D"},
        "model.layers.{x}.qkv.weight": {
            "transformer/layers/attention/query/kernel": "(*N H) D",
            "transformer/layers/attention/key/kernel": "(*K H) D",
        },
        "model.layers.{x}.norm.weight": {"transformer/layers/norm/scale": "D"},
        "model.layers.{x}.experts.{e}.up.weight": {"transformer/layers/moe/up/kernel": "F D"},
        "head.weight": {"head/kernel": "C D"},
    },
    prefix="model.",
    ignored=(r".*\.position_ids",),
    renames=(("gamma$", "weight"),),
)
AXES = {
    "transformer/embed/table": "VD",
    "transformer/layers/attention/query/kernel": "XDNH",
    "transformer/layers/attention/key/kernel": "XDKH",
    "transformer/layers/norm/scale": "XD",
    "transformer/layers/moe/up/kernel": "XEDF",
    "head/kernel": "DC",
}


def tree(make):
    return nest({path: make(path, letters, tuple(SIZES[letter] for letter in letters)) for path, letters in AXES.items()})


RNG = np.random.default_rng(0)
PARAMS = tree(lambda path, letters, shape: RNG.standard_normal(shape).astype(np.float32))
SHAPES = tree(lambda path, letters, shape: jax.ShapeDtypeStruct(shape, jnp.float32))
LOGICAL = tree(lambda path, letters, shape: PartitionSpec(*("layers" if letter == "X" else letter for letter in letters)))


def shardings(**sizes):
    return stored_shardings(LOGICAL, SHAPES, make_mesh(ParallelConfig(**sizes)))


def write(folder, **options):
    return save(folder, TABLE, PARAMS, LOGICAL, config={"model_type": "tiny"}, **options)


def change(folder, change):
    """Rewrite a folder's only weight file with the library, after `change` to its dict of tensors."""
    with safe_open(folder / "model.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def equal(got, expected=PARAMS):
    for path, leaf in flatten(expected).items():
        assert np.asarray(flatten(got)[path]).tobytes() == np.asarray(leaf).tobytes(), path
    return True


# --- there and back ---------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 8}, {"fsdp": 2, "tensor": 2, "data": 2}])
def test_saved_and_loaded_are_equal(tmp_path, sizes):
    """Byte for byte, from numpy and from sharded arrays, whatever the mesh; and laid out as asked."""
    places = shardings(**sizes)
    got = load(Tensors(write(tmp_path / "one")), TABLE, SHAPES, LOGICAL, places)
    assert equal(got)
    assert all(leaf.sharding == place for leaf, place in zip(jax.tree.leaves(got), jax.tree.leaves(places), strict=True))
    save(tmp_path / "two", TABLE, got, LOGICAL, config={})
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path, dtype):
    folder = write(tmp_path / "half", dtype=dtype)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), PARAMS)
    assert equal(load(Tensors(folder), TABLE, SHAPES, LOGICAL, shardings(fsdp=8), jnp.dtype(dtype)), half)
    wide = load(Tensors(folder), TABLE, SHAPES, LOGICAL, shardings(fsdp=8))
    assert equal(wide, jax.tree.map(lambda leaf: leaf.astype(np.float32), half)), "float32 is the default"


def test_the_library_reads_what_we_write(tmp_path):
    with safe_open(write(tmp_path / "m") / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert np.array_equal(
            file.get_tensor("model.layers.1.experts.2.up.weight"), PARAMS["transformer"]["layers"]["moe"]["up"]["kernel"][1, 2].T
        )


def test_shards_and_their_index(tmp_path):
    """No file exceeds the limit; the index names every tensor; the whole is the same."""
    folder = write(tmp_path / "m", max_shard_bytes=6000)
    parts = sorted(folder.glob("*.safetensors"))
    assert len(parts) > 2
    assert parts[0].name == f"model-00001-of-{len(parts):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))
    for part in parts:
        with safe_open(part, "np") as file:
            names = list(file.keys())
            assert all(index["weight_map"][name] == part.name for name in names)
            assert sum(file.get_tensor(name).nbytes for name in names) <= 6000
    assert equal(load(Tensors(folder), TABLE, SHAPES, LOGICAL, shardings(fsdp=8)))


def test_a_folder_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_write_json", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "m")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    write(tmp_path / "m")
    with pytest.raises(ValueError, match="is there already and not empty"):
        write(tmp_path / "m")


def test_what_else_a_folder_holds(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model", "jaxlm_tokenizer.json"):
        (tokenizer / name).write_text(name)
    for name in ("model.safetensors", "config.json", "pytorch_model.bin"):
        (tokenizer / name).write_text("not the tokenizer's")
    folder = write(tmp_path / "m", tokenizer=tokenizer, generation_config={"eos_token_id": 1}, card="# A model\n")
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "tiny"}
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 1}
    assert (folder / "README.md").read_text() == "# A model\n"
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "generation_config.json", "README.md", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model", "jaxlm_tokenizer.json",
    }  # fmt: skip


def test_float16_overflow_is_refused(tmp_path):
    params = {**PARAMS, "head": {"kernel": PARAMS["head"]["kernel"] * np.float32(1e6)}}
    with pytest.raises(ValueError, match=r"head\.weight has values that float16 cannot hold: save as bfloat16 or float32"):
        save(tmp_path / "m", TABLE, params, LOGICAL, config={}, dtype="float16")
    with pytest.raises(ValueError, match=r"unknown dtype 'bfloat': did you mean 'bfloat16'\?"):
        save(tmp_path / "m", TABLE, params, LOGICAL, config={}, dtype="bfloat")


def test_loaded_parameters_may_be_donated(tmp_path):
    """On the CPU a device array may be the very memory that it was made from: replicas must not share a donation."""
    got = load(Tensors(write(tmp_path / "m")), TABLE, SHAPES, LOGICAL, shardings(data=8))
    step = jax.jit(lambda params: jax.tree.map(lambda leaf: leaf + 1, params), donate_argnums=0)
    assert equal(step(got), jax.tree.map(lambda leaf: leaf + np.float32(1), PARAMS))


# --- how much is read -------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}])
def test_every_byte_is_read_once(tmp_path, monkeypatch, sizes):
    """However many devices on this host hold a part of a tensor, or a copy of it."""
    tensors, counts = Tensors(write(tmp_path / "m")), []
    plain = tensors.read

    def read(name, slices):
        counts.append(math.prod(span.stop - span.start for span in slices))
        return plain(name, slices)

    monkeypatch.setattr(tensors, "read", read)
    assert equal(load(tensors, TABLE, SHAPES, LOGICAL, shardings(**sizes)))
    assert sum(counts) == sum(leaf.size for leaf in jax.tree.leaves(PARAMS))


def test_a_host_reads_its_own_part_only(tmp_path, monkeypatch):
    """What a process of a multi-host run does: its sharding speaks of its own devices only."""
    tensors, counts = Tensors(write(tmp_path / "m")), []
    plain = tensors.read

    def read(name, slices):
        counts.append(math.prod(span.stop - span.start for span in slices))
        return plain(name, slices)

    monkeypatch.setattr(tensors, "read", read)
    everywhere = NamedSharding.addressable_devices_indices_map
    mine = set(jax.devices()[:2])

    def addressable(self, shape):
        return {device: index for device, index in everywhere(self, shape).items() if device in mine}

    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", addressable)
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", lambda shape, sharding, arrays: arrays)
    got = load(tensors, TABLE, SHAPES, LOGICAL, shardings(fsdp=8))
    assert sum(counts) == sum(leaf.size for leaf in jax.tree.leaves(PARAMS)) // 4
    assert np.array_equal(got["head"]["kernel"][1], PARAMS["head"]["kernel"][2:4])


@pytest.mark.parametrize("chunk", [1, 64, 1 << 20])
def test_any_slice_of_a_stored_tensor(tmp_path, monkeypatch, chunk):
    """Whole rows cut, rows one by one, or in one run: the same numbers."""
    monkeypatch.setattr(files, "CHUNK", chunk)
    value, rng = np.arange(5 * 6 * 7, dtype=np.float32).reshape(5, 6, 7), np.random.default_rng(0)
    save_file({"other": np.zeros(3, np.float32), "t": value, "scalar": np.full((), 4.0)}, tmp_path / "model.safetensors")
    tensors = Tensors(tmp_path)
    for _ in range(50):
        ends = [sorted(rng.choice(size + 1, 2, replace=False)) for size in value.shape]
        index = tuple(slice(int(start), int(stop)) for start, stop in ends)
        assert np.array_equal(tensors.read("t", index), value[index])
    assert tensors.read("scalar", ()) == 4


# --- what fits, what does not ------------------------------------------------------------------


def test_all_that_does_not_fit_is_said_at_once(tmp_path):
    folder = write(tmp_path / "m")

    def spoil(tensors):
        del tensors["model.embed.weight"]
        for i in range(9):
            tensors[f"other.{i}"] = np.zeros(1, np.float32)
        tensors["model.layers.0.qkv.weight"] = np.zeros((24, 8), np.float32)
        tensors["head.weight"] = np.zeros((3, 16), np.int8)

    change(folder, spoil)
    with pytest.raises(ValueError, match="does not fit") as error:
        load(Tensors(folder), TABLE, SHAPES, LOGICAL, shardings())
    text = str(error.value)
    assert "\n" not in text
    assert "missing: model.embed.weight; " in text
    assert "extra: other.0, other.1, " in text
    assert "other.7 and 1 more; " in text
    assert "model.layers.0.qkv.weight (24, 8), expected (24, 16)" in text
    assert "head.weight is I8, expected one of F64, F32, F16, BF16" in text


def test_names_without_the_prefix_and_as_older_files_have_them(tmp_path):
    folder = write(tmp_path / "m")

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.").replace("norm.weight", "norm.gamma")] = tensors.pop(name)
        tensors["embed.position_ids"] = np.arange(4)

    change(folder, rename)
    assert "layers.0.norm.gamma" in Tensors(folder).index
    assert equal(load(Tensors(folder), TABLE, SHAPES, LOGICAL, shardings()))


def test_a_new_head(tmp_path, capsys):
    """Missing, or for another number of classes: taken from the initialiser and said so; the rest is the file's."""
    fresh = {"head": {"kernel": np.full((16, 3), 7, np.float32)}}
    for spoil in (lambda t: t.pop("head.weight"), lambda t: t.update({"head.weight": np.zeros((5, 16), np.float32)})):
        folder = write(tmp_path / f"m{len(list(tmp_path.iterdir()))}")
        change(folder, spoil)
        tensors, options = Tensors(folder), {"optional": ("head/.*",), "fresh": lambda: jax.tree.map(jnp.asarray, PARAMS | fresh)}
        assert equal(load(tensors, TABLE, SHAPES, LOGICAL, shardings(fsdp=8), **options), PARAMS | fresh)
        assert "initialised anew: head/kernel" in capsys.readouterr().out
        with pytest.raises(ValueError, match=r"head\.weight"):
            load(tensors, TABLE, SHAPES, LOGICAL, shardings())


def test_ignored_tensors(tmp_path):
    folder = write(tmp_path / "m")
    change(folder, lambda tensors: tensors.update({"cls.bias": np.zeros(3, np.float32)}))
    with pytest.raises(ValueError, match=r"extra: cls\.bias$"):
        load(Tensors(folder), TABLE, SHAPES, LOGICAL, shardings())
    assert equal(load(Tensors(folder), TABLE, SHAPES, LOGICAL, shardings(), ignored=(r"cls\..*",)))


def test_a_row_that_files_do_without(tmp_path):
    """Ours has it (ones, in every layer), the file lacks it for some: it is neither missed nor written."""
    table = dataclasses.replace(TABLE, absent=(r"layers\.0\.norm",))
    params = jax.tree.map(np.copy, PARAMS)
    params["transformer"]["layers"]["norm"]["scale"][0] = 1
    folder = save(tmp_path / "m", table, params, LOGICAL, config={})
    assert "model.layers.0.norm.weight" not in Tensors(folder).index
    assert "model.layers.1.norm.weight" in Tensors(folder).index
    assert equal(load(Tensors(folder), table, SHAPES, LOGICAL, shardings(fsdp=8)), params)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "consolidated.00.pth"])
def test_pickles_are_refused_with_a_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n")
    with pytest.raises(ValueError, match=rf"{name}, which may run code .*save_pretrained\(NEW\)$"):
        Tensors(tmp_path)


def test_folders_that_are_broken(tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"holds no model\.safetensors and no .*; there are: no files"):
        Tensors(tmp_path)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match=r"Git LFS pointer.*git lfs pull"):
        Tensors(tmp_path)
    for junk in (b"", b"abc", b"\xff" * 64, (5).to_bytes(8, "little") + b"[1,2]", (2).to_bytes(8, "little") + b"{{"):
        file.write_bytes(junk)
        with pytest.raises(ValueError, match="is not a safetensors file"):
            Tensors(tmp_path)
    header = b'{"t":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="its header cannot be read"):
        Tensors(tmp_path)
    save_file({"t": np.zeros(100, np.float32)}, file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is cut short: it has"):
        Tensors(tmp_path)
    file.unlink()
    for name in ("model-00001-of-00001.safetensors", "../elsewhere.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": name}}))
        with pytest.raises(ValueError, match=f"names files that are not there: {name}"):
            Tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="it has no weight_map"):
        Tensors(tmp_path)


# --- finding ------------------------------------------------------------------------------------


def test_find_a_folder(tmp_path, monkeypatch):
    folder = write(tmp_path / "bert-tiny")
    assert find(str(folder)) == folder
    monkeypatch.setenv("MODELS", str(tmp_path))
    assert find("${MODELS}/bert-tiny") == folder
    with pytest.raises(ValueError, match=r"no model folder '.*bert-tinny': did you mean '.*bert-tiny'\?$"):
        find(str(tmp_path / "bert-tinny"))
    with pytest.raises(ValueError, match="is a file: give its folder"):
        find(str(folder / "config.json"))


def test_find_in_the_hub_cache(tmp_path, monkeypatch):
    """Offline, what was downloaded before is found; what was not is refused in one line."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--someone--model"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("abc")
    (kept / "snapshots").mkdir()
    folder = write(kept / "snapshots" / "abc")
    assert find("someone/model") == folder
    for name in ("someone/else", "gpt2"):
        with pytest.raises(ValueError, match=f"'{name}' is no folder, was not downloaded before") as error:
            find(name)
        assert "\n" not in str(error.value)


# --- against torch -----------------------------------------------------------------------------


@pytest.mark.parity
def test_bfloat16_is_torchs(tmp_path):
    import torch
    from safetensors.torch import save_file as save_torch

    value = torch.randn(6, 10)
    save_torch({"b": value.bfloat16(), "h": value.half()}, tmp_path / "model.safetensors")
    tensors, index = Tensors(tmp_path), (slice(1, 5), slice(2, 9))
    got = tensors.read("b", index)
    assert got.dtype == ml_dtypes.bfloat16
    assert np.array_equal(got.astype(np.float32), value.bfloat16().float().numpy()[index])
    assert np.array_equal(tensors.read("h", index), value.half().numpy()[index])


@pytest.mark.parity
def test_experts_as_transformers_writes_them(tmp_path):
    """In memory Mixtral's experts are one tensor, in a file one each: w1 is the gate, w3 goes up, w2 down."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    theirs = transformers.MixtralForCausalLM(config)
    theirs.save_pretrained(tmp_path)
    expert = "model.layers.{x}.block_sparse_moe.experts.{e}."
    rows = {
        expert + "w1.weight": {"gate": "F D"},
        expert + "w3.weight": {"up": "F D"},
        expert + "w2.weight": {"down": "D F"},
        "model.layers.{x}.block_sparse_moe.gate.weight": {"router": "E D"},
    }
    axes = {"gate": "XEDF", "up": "XEDF", "down": "XEFD", "router": "XDE"}
    shapes = {path: jax.ShapeDtypeStruct(tuple(SIZES[letter] for letter in letters), jnp.float32) for path, letters in axes.items()}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    got = load(
        Tensors(tmp_path), Table(rows), shapes, axes, dict.fromkeys(axes, place),
        ignored=(r"lm_head.*", r"model\.(embed|norm).*", r".*(self_attn|layernorm).*"),
    )  # fmt: skip
    for i, layer in enumerate(theirs.model.layers):
        experts = layer.mlp.experts
        fused, down = experts.gate_up_proj.detach().numpy(), experts.down_proj.detach().numpy()
        assert np.array_equal(np.swapaxes(np.concatenate([got["gate"][i], got["up"][i]], axis=2), 1, 2), fused)
        assert np.array_equal(np.swapaxes(got["down"][i], 1, 2), down)
        assert np.array_equal(got["router"][i].T, layer.mlp.gate.weight.detach().numpy())


@pytest.mark.parity
def test_transformers_opens_what_we_write(tmp_path):
    """GPT-2 in bfloat16 and several files: from_pretrained gives every weight, rounded once."""
    import torch
    import transformers

    sizes = {"X": 2, "D": 16, "N": 4, "H": 4, "F": 64, "V": 32, "P": 12}
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=12, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.save_pretrained(tmp_path / "theirs")
    layer = "transformer.h.{x}."
    qkv = ("query", "key", "value")
    rows = {
        "transformer.wte.weight": {"wte": "V D"},
        "transformer.wpe.weight": {"wpe": "P D"},
        layer + "attn.c_attn.weight": {f"{name}/kernel": "D (*N H)" for name in qkv},
        layer + "attn.c_attn.bias": {f"{name}/bias": "(*N H)" for name in qkv},
        layer + "attn.c_proj.weight": {"out/kernel": "(N H) D"},
        layer + "attn.c_proj.bias": {"out/bias": "D"},
        layer + "mlp.c_fc.weight": {"up/kernel": "D F"},
        layer + "mlp.c_fc.bias": {"up/bias": "F"},
        layer + "mlp.c_proj.weight": {"down/kernel": "F D"},
        layer + "mlp.c_proj.bias": {"down/bias": "D"},
        **{f"{layer}ln_{i}.{kind}": {f"ln_{i}/{kind}": "D"} for i in (1, 2) for kind in ("weight", "bias")},
        **{f"transformer.ln_f.{kind}": {f"ln_f/{kind}": "D"} for kind in ("weight", "bias")},
    }
    axes = {"wte": "VD", "wpe": "PD", "ln_f/weight": "D", "ln_f/bias": "D"}
    axes |= {f"{name}/kernel": "XDNH" for name in qkv} | {f"{name}/bias": "XNH" for name in qkv}
    axes |= {"out/kernel": "XNHD", "up/kernel": "XDF", "up/bias": "XF", "down/kernel": "XFD"}
    axes |= dict.fromkeys(("out/bias", "down/bias", "ln_1/weight", "ln_1/bias", "ln_2/weight", "ln_2/bias"), "XD")
    shapes = nest({path: jax.ShapeDtypeStruct(tuple(sizes[c] for c in letters), jnp.float32) for path, letters in axes.items()})
    places = stored_shardings(nest({p: PartitionSpec(*a) for p, a in axes.items()}), shapes, make_mesh(ParallelConfig(fsdp=8)))
    table = Table(rows, prefix="transformer.")
    params = load(Tensors(tmp_path / "theirs"), table, shapes, nest(axes), places)
    save(tmp_path / "ours", table, params, nest(axes), dtype="bfloat16", config=config.to_dict(), max_shard_bytes=5000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    ours = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert torch.equal(a.bfloat16(), b), name


# --- several processes -------------------------------------------------------------------------

TWO = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
import test_files as t

places = t.shardings(data=1, fsdp=4)
tensors, counts = t.Tensors(sys.argv[3]), []
plain = tensors.read
tensors.read = lambda name, slices: counts.append(t.math.prod(s.stop - s.start for s in slices)) or plain(name, slices)
params = t.load(tensors, t.TABLE, t.SHAPES, t.LOGICAL, places)
t.save(sys.argv[4], t.TABLE, params, t.LOGICAL, config={"model_type": "tiny"})
print(sum(counts))
"""


@pytest.mark.slow
def test_two_processes_read_half_each_and_write_one_folder(tmp_path):
    folder = write(tmp_path / "one")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    env["PYTHONPATH"] = os.pathsep.join([str(pathlib.Path(__file__).parent), env.get("PYTHONPATH", "")])
    words = [str(port), str(folder), str(tmp_path / "two")]
    processes = [
        subprocess.Popen([sys.executable, "-c", TWO, str(i), *words], env=env, stdout=subprocess.PIPE, text=True) for i in range(2)
    ]
    read = [int(process.communicate(timeout=120)[0].split()[-1]) for process in processes]
    total = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    assert sum(read) == total, "each leaf of this model is split"
    assert max(read) == total // 2
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


# --- memory -------------------------------------------------------------------------------------

BIG = {"X": 20, "D": 2048, "N": 16, "K": 4, "H": 128, "F": 5632, "V": 32_000}
BIG_TABLE = {
    "model.embed_tokens.weight": {"embed/table": "V D"},
    "model.layers.{x}.self_attn.q_proj.weight": {"layers/query/kernel": "(N H) D"},
    "model.layers.{x}.self_attn.k_proj.weight": {"layers/key/kernel": "(K H) D"},
    "model.layers.{x}.self_attn.v_proj.weight": {"layers/value/kernel": "(K H) D"},
    "model.layers.{x}.self_attn.o_proj.weight": {"layers/out/kernel": "D (N H)"},
    "model.layers.{x}.mlp.gate_proj.weight": {"layers/gate/kernel": "F D"},
    "model.layers.{x}.mlp.up_proj.weight": {"layers/up/kernel": "F D"},
    "model.layers.{x}.mlp.down_proj.weight": {"layers/down/kernel": "D F"},
    "model.layers.{x}.input_layernorm.weight": {"layers/norm/scale": "D"},
    "lm_head.weight": {"head/table": "V D"},
}
BIG_AXES = {
    "embed/table": "VD", "layers/query/kernel": "XDNH", "layers/key/kernel": "XDKH", "layers/value/kernel": "XDKH",
    "layers/out/kernel": "XNHD", "layers/gate/kernel": "XDF", "layers/up/kernel": "XDF", "layers/down/kernel": "XFD",
    "layers/norm/scale": "XD", "head/table": "VD",
}  # fmt: skip

MEASURE = """
import sys, time
import jaxlm.host
if sys.argv[3] == "prepared":
    assert jaxlm.host.prepare() is None
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxlm.hub.files import Tensors
from jaxlm.hub.loading import load
from jaxlm.hub.saving import save
from jaxlm.hub.tensors import Table, nest
from jaxlm.parallel import ParallelConfig, make_mesh, stored_shardings

sizes, rows, axes = eval(sys.argv[4])
dtype = jnp.dtype(sys.argv[2])
shapes = nest({p: jax.ShapeDtypeStruct(tuple(sizes[c] for c in letters), dtype) for p, letters in axes.items()})
logical = nest({p: PartitionSpec(*letters) for p, letters in axes.items()})
places = stored_shardings(logical, shapes, make_mesh(ParallelConfig(fsdp=8)))
jax.block_until_ready(jax.jit(lambda: jnp.zeros((8,)))())
# Not ru_maxrss: a child process inherits its parent's.
memory = lambda key: 1024 * int(open("/proc/self/status").read().split(key + ":")[1].split()[0])
peak = lambda: memory("VmHWM")
before, start = memory("VmRSS"), time.perf_counter()
params = load(Tensors(sys.argv[1]), Table(rows), shapes, logical, places)
took, used, size = time.perf_counter() - start, peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params))
start = time.perf_counter()
if sys.argv[5:]:
    save(sys.argv[5], Table(rows), params, logical, config={}, dtype="bfloat16", max_shard_bytes=10**9)
print(used / size, size, took, (peak() - before) / size, time.perf_counter() - start)
"""


def big_checkpoint(folder: pathlib.Path) -> int:
    """About 2 GB of bfloat16 in 8 files with Llama's names; its bytes."""
    folder.mkdir()
    shapes = {path: tuple(BIG[letter] for letter in letters) for path, letters in BIG_AXES.items()}
    names = [(name, row.shape) for row in resolve(Table(BIG_TABLE), shapes, BIG_AXES) for name, _ in row.names()]
    noise = np.random.default_rng(0).standard_normal(1 << 20).astype(ml_dtypes.bfloat16)
    weight_map: dict[str, str] = {}
    for i in range(8):
        part = {name: np.resize(noise, shape) for name, shape in names[i::8]}
        save_file(part, folder / f"model-{i + 1:05d}-of-00008.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{i + 1:05d}-of-00008.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="measures with Linux's /proc")
@pytest.mark.parametrize("malloc", ["plain", "prepared"])
def test_loading_takes_hardly_more_memory_than_the_model(tmp_path, malloc):
    """2 GB in 8 files onto 8 devices: the peak stays within 1.3 times the model, and saving adds next to nothing."""
    assert big_checkpoint(tmp_path / "big") > 1.9e9
    arguments = [tmp_path / "big", "bfloat16", malloc, repr((BIG, BIG_TABLE, BIG_AXES)), tmp_path / "saved"]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, arguments)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, size, seconds, saving, writing = map(float, done.stdout.split()[-5:])
    print(f"{malloc}: {size / 1e9:.2f} GB in {seconds:.1f} s, peak {peak:.2f}; saved in {writing:.1f} s, peak {saving:.2f}")
    assert peak < 1.3
    assert saving < 1.4
