"""Adapter folders against PEFT: what we write it computes, what it writes we compute, and what has no place is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_models import CASES, make, ragged

from jaxlm.hub import FAMILIES, load_adapter, load_folder, save_adapter, save_folder
from jaxlm.model import Model, TransformerConfig
from jaxlm.model.config import MoeConfig
from jaxlm.parallel import ParallelConfig, make_mesh
from jaxlm.train import LoraConfig, TuneConfig, Tuning

# Family → class of transformers: a head over labels, a language model, an encoder-decoder.
MODELS = {"bert": "BertForSequenceClassification", "llama": "LlamaForCausalLM", "t5": "T5ForConditionalGeneration"}
FUSED = ("gpt2", "gpt_neox", "phi3")
EXPERTS = TransformerConfig(
    vocab_size=64, positions=16, layers=2, width=16, heads=2, position="rotary", norm="rmsnorm", activation="swiglu", mlp_width=16,
    bias=False, tie_embeddings=False, moe=MoeConfig(2),
)  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """`bases(family)`: the torch model, our model and parameters, and the folder of both; each made once."""
    made = {}
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])

    def base(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            theirs = make(MODELS.get(family, CASES[family][0]), CASES[family][1])
            theirs.save_pretrained(folder)
            model, params, *_ = load_folder(str(folder), mesh)
            made[family] = model, params, folder
        model, params, folder = made[family]
        return make(MODELS.get(family, CASES[family][0]), CASES[family][1]), model, params, folder

    return base


def moved(tree, seed=0):
    """Every trained number moved, so that no B is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 0.1 * rng.normal(size=x.shape), jnp.float32), tree)


def inputs(model):
    import torch

    ids, segments = ragged(0, [11, 7, 4], 0)
    long = {"input_ids": torch.tensor(ids, dtype=torch.long), "attention_mask": torch.tensor(segments, dtype=torch.long)}
    ours = {"tokens_BL": ids, "segments_BL": segments}
    if model.config.architecture != "encoder_decoder":
        return ours, long
    decoder, shown = ragged(1, [8, 5, 3], 0)
    more = {"decoder_input_ids": torch.tensor(decoder, dtype=torch.long)}
    more["decoder_attention_mask"] = torch.tensor(shown, dtype=torch.long)
    return {"encoder": ours, "decoder": {"tokens_BL": decoder, "segments_BL": shown}}, {**long, **more}


def logits(model, params):
    batch, _ = inputs(model)
    out = jax.jit(model.apply)(params, batch)
    scores = np.asarray(out[0] if isinstance(out, tuple) else out)
    kept = batch.get("decoder", batch)["segments_BL"] > 0 if scores.ndim == 3 else np.ones(len(scores), bool)
    return scores[kept], kept


def assert_same_logits(theirs, model, params):
    import torch

    ours, kept = logits(model, params)
    with torch.no_grad():
        expected = theirs.eval()(**inputs(model)[1]).logits.numpy()[kept]
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def tensors_of(theirs):
    return {name: value.detach().numpy() for name, value in theirs.state_dict().items()}


def open_in_peft(theirs, folder):
    """With every tensor of the file in its place, and no place left empty."""
    import peft
    from safetensors import safe_open

    adapted = peft.PeftModel.from_pretrained(theirs, folder)
    with safe_open(folder / "adapter_model.safetensors", "np") as stored:
        assert set(stored.keys()) == set(peft.get_peft_model_state_dict(adapted))
    return adapted


def saved_in_peft(theirs, folder, **options):
    import peft
    import torch

    adapted = peft.get_peft_model(theirs, peft.LoraConfig(**options))

    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parity
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", MODELS)
def test_what_we_write_peft_computes(family, dora, bases, tmp_path):
    """Our merged logits are PEFT's unmerged ones, and those of the whole model that we export; read again, every number is
    the same."""
    import transformers

    theirs, model, params, _ = bases(family)
    config = TuneConfig("^head/" if family == "bert" else None, LoraConfig(4, 6.0, dora=dora))
    tuning = Tuning(config, model)
    trained, frozen = tuning.split(params, jax.random.key(1))
    trained = moved(trained)
    merged = jax.jit(tuning.merge)(trained, frozen)
    save_adapter(tmp_path / "adapter", config, trained, model, family, "some/base")

    adapted = open_in_peft(theirs, tmp_path / "adapter")
    assert_same_logits(adapted, model, merged)
    assert np.abs(logits(model, merged)[0] - logits(model, params)[0]).max() > 1e-2, "adapters that do nothing prove nothing"
    save_folder(tmp_path / "whole", model, merged, family=family)
    assert_same_logits(getattr(transformers, MODELS[family]).from_pretrained(tmp_path / "whole"), model, merged)

    again = load_adapter(tmp_path / "adapter", model, family)
    assert again.config.lora == config.lora and again.base_name == "some/base"
    jax.tree.map(np.testing.assert_array_equal, again.trained, jax.device_get(trained))


@pytest.mark.parity
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", MODELS)
def test_what_peft_writes_we_compute(family, dora, bases, tmp_path):
    """With modules of its choice, some layers only, ranks and scales that differ, and a classifier trained whole."""
    theirs, model, params, _ = bases(family)
    options = {
        "bert": {"target_modules": ["query", "output.dense"], "task_type": "SEQ_CLS", "rank_pattern": {"query": 2}},
        "llama": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2], "alpha_pattern": {"q_proj": 3}},
        "t5": {"target_modules": ["q", "wo"], "use_rslora": True},
    }[family]
    adapted = saved_in_peft(theirs, tmp_path, r=4, lora_alpha=8, use_dora=dora, **options)
    found = load_adapter(tmp_path, model, family)
    tuning = Tuning(found.config, model)
    jax.tree.map(lambda x, s: np.testing.assert_equal(x.shape, s.shape), found.trained, tuning.shapes)
    _, frozen = tuning.split(params, jax.random.key(0))
    assert_same_logits(adapted, model, tuning.merge(found.trained, frozen))
    assert (found.config.train is not None) == (family == "bert")
    if family == "llama":
        assert {leaf.adapted for leaf in tuning.leaves} == {(), (0, 2)}


@pytest.mark.parity
def test_outputs_that_the_base_has_too_keep_their_names(bases, tmp_path):
    """A classifier's adapter is one of its base's outputs; under another number of labels the names are none of its own."""
    from jaxlm.models import load_model

    theirs, _, _, folder = bases("bert")
    saved_in_peft(theirs, tmp_path, r=2, lora_alpha=4, target_modules=["query"], task_type="SEQ_CLS")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(folder)}))
    assert load_model(str(tmp_path)).labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parity
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", FUSED)
def test_fused_matrices(family, dora, bases, tmp_path):
    """Three adapters of ours are one of theirs with three times the rank, one of theirs three of ours: the merged matrices
    agree both ways, and ours come back as they were."""
    theirs, model, params, _ = bases(family)
    config = TuneConfig(None, LoraConfig(3, dora=dora))
    tuning = Tuning(config, model)
    trained, frozen = tuning.split(params, jax.random.key(1))
    trained = moved(trained)
    save_adapter(tmp_path / "ours", config, trained, model, family)
    merged = open_in_peft(theirs, tmp_path / "ours").merge_and_unload()
    assert_same_tensors(merged, model, tuning.merge(trained, frozen), family, tmp_path / "whole")
    again = load_adapter(tmp_path / "ours", model, family)
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, again.trained, jax.device_get(trained))

    theirs, *_ = bases(family)
    fused = {"gpt2": ["c_attn", "c_fc"], "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj", "gate_up_proj"]}[family]
    adapted = saved_in_peft(theirs, tmp_path / "theirs", r=3, target_modules=fused, use_dora=dora, fan_in_fan_out=family == "gpt2")
    found = load_adapter(tmp_path / "theirs", model, family)
    tuning = Tuning(found.config, model)
    whole = tuning.merge(found.trained, tuning.split(params, jax.random.key(0))[1])
    assert_same_tensors(adapted.merge_and_unload(), model, whole, family, tmp_path / "whole2")


def assert_same_tensors(theirs, model, params, family, folder):
    import transformers

    save_folder(folder, model, params, family=family)
    ours = tensors_of(getattr(transformers, CASES[family][0]).from_pretrained(folder))
    for name, value in tensors_of(theirs).items():
        np.testing.assert_allclose(ours[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parity
def test_part_of_a_fused_matrix(bases, tmp_path):
    """An adapter on queries alone leaves keys and values as they are; of DoRA all parts are needed."""
    theirs, model, params, _ = bases("gpt2")
    config = TuneConfig(None, LoraConfig(3, targets=r"layers\.1/attention/query"))
    tuning = Tuning(config, model)
    trained, frozen = tuning.split(params, jax.random.key(1))
    trained = moved(trained)
    save_adapter(tmp_path / "ours", config, trained, model)
    merged = open_in_peft(theirs, tmp_path / "ours").merge_and_unload()
    assert_same_tensors(merged, model, tuning.merge(trained, frozen), "gpt2", tmp_path / "whole")
    lengths = TuneConfig(None, LoraConfig(3, targets="attention/query", dora=True))
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn is one matrix.*attention/key/kernel.*lora\.targets"):
        save_adapter(tmp_path / "no", lengths, Tuning(lengths, model).split(params, jax.random.key(1))[0], model)


@pytest.mark.parity
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mixtral"])
def test_every_familys_modules_have_the_names_that_torch_has(family, bases, tmp_path):
    """What `target_modules` lists are Linear layers of the torch model, and all of its blocks'."""
    theirs, model, params, _ = bases(family)
    config = TuneConfig(None, LoraConfig(1))
    save_adapter(tmp_path / "ours", config, Tuning(config, model).split(params, jax.random.key(0))[0], model, family)
    said = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    linear = {name for name, module in theirs.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    blocks = {name for name in linear if any(part.isdigit() for part in name.split("."))}
    assert set(said["target_modules"]) == blocks


@pytest.mark.parity
def test_the_bare_model_lacks_the_prefix(bases, tmp_path):
    import transformers

    _, _, _, folder = bases("bert")
    theirs = transformers.BertModel.from_pretrained(folder)
    model, params, *_ = load_folder(str(folder), make_mesh(ParallelConfig(), jax.devices()[:1]), head="embedding")
    config = TuneConfig(None, LoraConfig(2))
    trained = moved(Tuning(config, model).split(params, jax.random.key(0))[0])
    save_adapter(tmp_path / "ours", config, trained, model, "bert")
    open_in_peft(theirs, tmp_path / "ours")
    again = load_adapter(tmp_path / "ours", model, "bert")
    jax.tree.map(np.testing.assert_array_equal, again.trained, jax.device_get(trained))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"peft_type": "IA3"}, r"peft_type 'IA3' is not supported: 'LORA' is"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights 'pissa' is not supported"),
        ({"use_dora": True}, r"does not fit.*no magnitude vector.*use_dora is True"),
    ],
)
def test_adapters_that_mean_something_else_are_refused(change, said, tmp_path):
    model, *_ = _written(tmp_path / "a")
    file = tmp_path / "a/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=said):
        load_adapter(tmp_path / "a", model)


def _written(folder, config=None, shape=None):
    model = Model(shape or TransformerConfig(vocab_size=64, positions=16, layers=2, width=16, heads=2))
    config = config or TuneConfig(None, LoraConfig(2))
    trained, _ = Tuning(config, model).split(model.init(jax.random.key(0)), jax.random.key(1))
    save_adapter(folder, config, moved(trained), model)
    return model, config, trained


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    cases = [
        (TuneConfig(), None, "this tuning has none"),
        (TuneConfig("bias$", LoraConfig(2)), None, r"tune\.train also trained .*bias.*export the whole model"),
        (TuneConfig(None, LoraConfig(2, targets="mlp/up")), EXPERTS, r"experts: leave .*mlp/up/kernel out of lora\.targets"),
    ]
    for config, shape, said in cases:
        with pytest.raises(ValueError, match=said):
            _written(tmp_path / "a", config, shape)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_adapters_of_another_model_are_refused(tmp_path):
    _written(tmp_path / "a")
    deeper = Model(TransformerConfig(vocab_size=64, positions=16, layers=1, width=16, heads=2))
    with pytest.raises(ValueError, match=r"does not fit this model: it has no place for base_model\.model\.transformer\.h\.1\."):
        load_adapter(tmp_path / "a", deeper)
    wider = Model(TransformerConfig(vocab_size=64, positions=16, layers=2, width=32, heads=2))
    with pytest.raises(ValueError, match=r"the adapter of transformer\.h\.0\.\S+ does not fit: A is .* the module has 32 inputs"):
        load_adapter(tmp_path / "a", wider)
    with pytest.raises(ValueError, match="not the folder of an adapter"):
        load_adapter(tmp_path, deeper)
    with pytest.raises(ValueError, match="not empty"):
        _written(tmp_path / "a")
