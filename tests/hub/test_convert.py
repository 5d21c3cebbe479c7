"""What a folder may say wrong, one line each; other heads; which family a model of ours can be written as."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxlm.config import build
from jaxlm.hub import FAMILIES, family_for, label_names, load_folder, read_config, save_folder
from jaxlm.hub.family import complete, read_layers
from jaxlm.model import Model, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh

SMALL = {"vocab_size": 40, "positions": 16, "layers": 2, "width": 16, "heads": 4}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(ParallelConfig(), jax.devices()[:1])


@pytest.fixture
def folder(tmp_path):
    """A small Llama that we wrote."""
    model = Model(build(TransformerConfig, {"preset": "llama-1m", **SMALL, "kv_heads": 2, "mlp_width": 24}))
    return save_folder(tmp_path / "llama", model, model.init(jax.random.key(0)), like={"eos_token_id": 3})


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"model_type": "lama"}, ["model_type 'lama'", "did you mean 'llama'", "bert", "t5"]),
        ({"model_type": None}, ["model_type 'None'", "allowed"]),
        ({"hidden_act": "softsign"}, ["hidden_act", "softsign", "silu"]),
        ({"attention_bias": True}, ["attention_bias True", "False"]),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, ["longrope"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor 0.5", "whole heads"]),
        ({"architectures": ["LlamaForDreaming"]}, ["architecture of llama 'LlamaForDreaming'", "LlamaForCausalLM"]),
        ({"rms_norm_eps": float("nan")}, ["config.json", "NaN", "no number"]),
        ({"hidden_size": "wide"}, ["config.json", "hidden_size"]),
        ({"num_hidden_layers": 3}, ["missing", "model.layers.2.input_layernorm.weight"]),
    ],
)
def test_a_wrong_config_gives_one_line(folder, mesh, changes, parts):
    edit(folder, **changes)
    with pytest.raises(ValueError) as caught:
        load_folder(str(folder), mesh)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_config_that_is_no_json(folder, mesh):
    (folder / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load_folder(str(folder), mesh)


def test_another_head_takes_the_body_and_starts_anew(folder, mesh, capsys):
    params = load_folder(str(folder), mesh, head="sequence", labels=5).params
    body = load_folder(str(folder), mesh).params["transformer"]
    jax.tree.map(np.testing.assert_array_equal, params["transformer"], body)
    assert params["head"]["out"]["kernel"].shape == (16, 5) and np.any(np.asarray(params["head"]["out"]["kernel"]))
    assert "head/out/kernel" in capsys.readouterr().out
    again = load_folder(str(folder), mesh, head="sequence", labels=5).params
    np.testing.assert_array_equal(again["head"]["out"]["kernel"], params["head"]["out"]["kernel"])
    with pytest.raises(ValueError, match="head of llama"):
        load_folder(str(folder), mesh, head="masked_lm")


def test_parameters_may_be_held_in_half_precision(folder, mesh):
    full, half = load_folder(str(folder), mesh), load_folder(str(folder), mesh, parameters="bfloat16", dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    ids = {"tokens_BL": np.arange(12, dtype=np.int32)[None]}
    one, two = (np.asarray(side.model.apply(side.params, ids)[0]) for side in (full, half))
    assert 0 < np.abs(one - two).max() < 0.05 * np.abs(one).max()


def test_label_names_and_special_ids_are_kept(mesh, tmp_path):
    config = build(
        TransformerConfig,
        {"preset": "bert-tiny", **SMALL, "head": {"kind": "sequence", "labels": 3, "activation": "tanh", "norm": False}},
    )
    model = Model(config)
    named = {"id2label": {"0": "bad", "1": "so", "2": "good"}, "label2id": {"bad": 0, "so": 1, "good": 2}, "pad_token_id": 7}
    save_folder(tmp_path / "a", model, model.init(jax.random.key(0)), like=named)
    loaded = load_folder(str(tmp_path / "a"), mesh)
    save_folder(tmp_path / "b", loaded.model, loaded.params, like=loaded.theirs)
    written = json.loads((tmp_path / "b/config.json").read_text())
    assert {
        key: {str(k): v for k, v in value.items()} if key == "id2label" else value for key, value in written.items() if key in named
    } == named


@pytest.mark.parametrize(
    "preset, family",
    [("gpt2-small", "gpt2"), ("llama-1m", "llama"), ("bert-tiny", "bert"), ("roberta-base", "roberta"), ("t5-v1.1-small", "t5")],
)
def test_presets_are_written_as_their_family(preset, family):
    sizes = {key: value for key, value in SMALL.items() if key != "positions"}
    found, theirs = family_for(build(TransformerConfig, {"preset": preset, **sizes, "kv_heads": None}))
    assert found.name == family and theirs["model_type"] == family


@pytest.mark.parametrize(
    "preset, changes, parts",
    [
        ("bert-tiny", {"share_layers": True}, ["bert models cannot have share_layers True"]),
        # Read again the config would be the same, but the class in torch always has these tensors.
        ("bert-tiny", {"token_types": 0, "norm_eps": 1e-5}, ["token_types 0"]),
        ("llama-1m", {"norm_position": "post"}, ["norm_position post"]),
    ],
)
def test_what_torch_could_not_run_is_refused(preset, changes, parts):
    config = dataclasses.replace(build(TransformerConfig, {"preset": preset, **SMALL, "kv_heads": None}), **changes)
    with pytest.raises(ValueError) as caught:
        family_for(config)
    for part in parts:
        assert part in str(caught.value)


def test_an_albert_always_projects_its_embeddings():
    config = build(TransformerConfig, {"preset": "bert-tiny", **SMALL, "share_layers": True})
    with pytest.raises(ValueError, match=r"albert models cannot have .*embedding_width\) of 16"):
        FAMILIES["albert"].json(config)


def test_kinds_of_layer_are_named():
    with pytest.raises(ValueError, match="layer_types 'chunked_attention'"):
        read_layers({"layer_types": ["full_attention", "chunked_attention"]}, "GG")
    assert read_layers({"layer_types": ["sliding_attention", "full_attention"] * 3}, "G") == {"layer_pattern": "LG"}


def test_the_nearest_family_is_the_one_that_lacks_least():
    """An encoder without token types is DistilBERT's, if its epsilon is."""
    config = dataclasses.replace(build(TransformerConfig, {"preset": "bert-tiny", **SMALL}), token_types=0)
    assert family_for(config)[0].name == "distilbert"


def test_names_and_leftovers_of_older_files(mesh, tmp_path):
    """T5's first files hold a bias that nothing reads and an older class name: both are let pass, as in torch."""
    from safetensors.numpy import load_file, save_file

    model = Model(build(TransformerConfig, {"preset": "t5-v1.1-small", "vocab_size": 40, "layers": 1, "width": 16, "heads": 2}))
    folder = save_folder(tmp_path / "t5", model, model.init(jax.random.key(0)))
    tensors = load_file(folder / "model.safetensors")
    extra = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    save_file({**tensors, extra: np.zeros((32, 2), np.float32)}, folder / "model.safetensors")
    edit(folder, architectures=["T5WithLMHeadModel"])
    assert load_folder(str(folder), mesh).model.config.head.kind == "language_model"


def test_a_family_that_rotates_whole_heads_is_not_given_a_part_of_them():
    """Llama's class in transformers ignores `partial_rotary_factor`; Phi-3's is the first of its kind that reads it."""
    config = build(TransformerConfig, {"preset": "llama-1m", **SMALL, "kv_heads": None, "rope": {"fraction": 0.5}})
    assert family_for(config)[0].name == "phi3"
    with pytest.raises(ValueError, match=r"llama models cannot have .*partial_rotary_factor 0\.5"):
        FAMILIES["llama"].json(config)


def test_a_gemma_without_windows_and_a_t5_with_the_tanh_gelu_are_written():
    """Gemma 2's class in transformers asks for a window even where all layers see everything."""
    gemma = FAMILIES["gemma2"].config(complete({"model_type": "gemma2", "layer_types": ["full_attention"] * 26}))
    assert FAMILIES["gemma2"].json(gemma)["sliding_window"] > 0
    t5 = build(TransformerConfig, {"preset": "t5-v1.1-small", **SMALL, "activation": "gelu_tanh"})
    assert family_for(t5)[1]["feed_forward_proj"] == "gelu_new"


@pytest.mark.parametrize(
    "named, part",
    [
        ({"0": "a", "2": "b"}, "ids 0, 2: expected 0 to 1"),
        ({"1": "a", "2": "b"}, "ids 1, 2: expected 0 to 1"),
        ({"0": "a", "1": "b", "2": "a"}, "name 'a' to several outputs"),
    ],
)
def test_names_of_labels_that_are_not_one_for_each_output_are_refused(named, part):
    with pytest.raises(ValueError, match=part):
        label_names({"id2label": named})
    assert label_names({"id2label": {"10": "k", **{str(i): chr(97 + i) for i in range(10)}}}) == tuple("abcdefghijk")


def test_a_folder_that_does_not_say_what_its_head_is_for(folder, tmp_path):
    """The class may stand alone or behind unknown ones; without any a head that is not the default one is not guessed."""
    config = build(
        TransformerConfig,
        {"preset": "bert-tiny", **SMALL, "head": {"kind": "sequence", "labels": 3, "activation": "tanh", "norm": False}},
    )
    model = Model(config)
    save_folder(tmp_path / "labels", model, model.init(jax.random.key(0)))
    edit(tmp_path / "labels", architectures=None)
    with pytest.raises(ValueError, match=r"architectures, .*BertForSequenceClassification.* or BertForTokenClassification"):
        read_config(tmp_path / "labels")
    for named in ("BertForSequenceClassification", ["Own", "BertForSequenceClassification"]):
        edit(tmp_path / "labels", architectures=named)
        assert read_config(tmp_path / "labels").head.kind == "sequence"
    edit(folder, architectures=[])
    assert read_config(folder).head.kind == "language_model"


def test_quantised_tensors_are_refused_by_the_name_of_their_config(folder, mesh):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: value.astype(np.int8) if "q_proj" in name else value for name, value in tensors.items()},
        folder / "model.safetensors",
    )
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 8})
    with pytest.raises(ValueError, match=r"quantization_config \(gptq\)"):
        load_folder(str(folder), mesh)


def test_what_no_family_can_say_is_refused_with_its_name():
    config = dataclasses.replace(build(TransformerConfig, {"preset": "llama-1m", **SMALL, "kv_heads": None}), activation="relu2")
    with pytest.raises(ValueError, match=r"nearest: llama models cannot have .*relu2"):
        family_for(config)


def test_pooling_is_that_of_the_folder(mesh, tmp_path):
    """sentence-transformers writes beside the weights which hidden state stands for a text."""
    config = build(
        TransformerConfig, {"preset": "bert-tiny", **SMALL, "head": {"kind": "embedding", "dense": False, "pool": "mean"}}
    )
    model = Model(dataclasses.replace(config, head=dataclasses.replace(config.head, activation="tanh", norm=False)))
    folder = save_folder(tmp_path / "bert", model, model.init(jax.random.key(0)))
    assert load_folder(str(folder), mesh).model.config.head.pool == "mean"
    (folder / "1_Pooling").mkdir()
    file = folder / "1_Pooling" / "config.json"
    file.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    assert load_folder(str(folder), mesh).model.config.head.pool == "first"
    file.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ValueError, match="max_tokens is not supported"):
        load_folder(str(folder), mesh)


@pytest.mark.parametrize("changes", [{"param_dtype": "bfloat16"}, {"quantize": "int8"}])
def test_how_a_model_was_trained_is_not_in_its_folder(mesh, tmp_path, changes):
    config = build(TransformerConfig, {"preset": "llama-1m", **SMALL, "kv_heads": 2, "mlp_width": 24, **changes})
    model = Model(config)
    params = model.init(jax.random.key(0))
    save_folder(tmp_path / "out", model, params)
    loaded = load_folder(str(tmp_path / "out"), mesh)
    assert (loaded.model.config.param_dtype, loaded.model.config.quantize) == ("float32", "none")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), b), params, loaded.params)


@pytest.mark.parametrize(
    "wrap, prefix",
    [
        (lambda name: f"module.{name}", "'module.', which DataParallel put there"),
        (lambda name: f"_orig_mod.{name}", "'_orig_mod.', which torch.compile put there"),
        (lambda name: f"_orig_mod.module.{name}", "'_orig_mod.module.'"),
        (lambda name: f"model.{name}", "hold 'model.':"),
        (lambda name: f"net.llm.{name}", "hold 'net.llm.':"),
        (lambda name: name.replace("layers.", "layers._orig_mod."), "'_orig_mod.', which torch.compile put there"),
        (lambda name: f"module.{name.removeprefix('model.')}", "'module.', which DataParallel put there"),
    ],
)
def test_a_wrappers_prefix_is_named(folder, mesh, wrap, prefix):
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    save_file({wrap(name): x for name, x in load_file(file).items()}, file)
    with pytest.raises(ValueError) as error:
        load_folder(str(folder), mesh)
    assert prefix in str(error.value) and "\n" not in str(error.value)
    # The advice works: those names are what it leaves.
    taken = prefix.split("'")[1]
    save_file({name.replace(taken, "", 1): x for name, x in load_file(file).items()}, file)
    load_folder(str(folder), mesh)
