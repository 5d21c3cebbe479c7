"""Files that hold a tensor beside the one that the config ties it to: read as transformers reads them."""

import jax
import numpy as np
import pytest
from torch_models import CASES, make, ragged

from jaxlm.hub import load_folder, read_config, save_folder
from jaxlm.model import Model
from jaxlm.parallel import ParallelConfig, make_mesh

pytestmark = pytest.mark.parity

# Case → the copy (a head, or its bias), what it is tied to.
HEADS = {
    "llama-llama3": ("lm_head.weight", "model.embed_tokens.weight"),
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
    "bert": ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    "roberta": ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    "distilbert": ("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
    "electra": ("generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"),
    "albert": ("predictions.decoder.weight", "albert.embeddings.word_embeddings.weight"),
    "modernbert": ("decoder.weight", "model.embeddings.tok_embeddings.weight"),
    "t5": ("lm_head.weight", "shared.weight"),
    "bart": ("lm_head.weight", "model.shared.weight"),
    "marian": ("lm_head.weight", "model.shared.weight"),
}
BIASES = {"bert": ("cls.predictions.decoder.bias", "cls.predictions.bias"), "roberta": ("lm_head.decoder.bias", "lm_head.bias")}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(ParallelConfig(), jax.devices()[:1])


def with_copy(folder, copy, original, how):
    """Write the copy beside the original: equal, other values, or alone."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[copy] = tensors[original].clone()
    if how == "other":
        tensors[copy] = tensors[copy].flip(0) + 0.25
    if how == "alone":
        del tensors[original]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def both(theirs, folder, mesh):
    """Logits of transformers and ours for the model in a folder."""
    import torch

    theirs = type(theirs).from_pretrained(folder).eval()
    model, params, _, config = load_folder(str(folder), mesh)
    ids, segments = ragged(2, [9, 9], 0)
    batch = {"tokens_BL": ids, "segments_BL": segments}
    kwargs = {"input_ids": torch.tensor(ids, dtype=torch.long)}
    if model.config.architecture == "encoder_decoder":
        batch = {"encoder": batch, "decoder": batch}
        kwargs["decoder_input_ids"] = kwargs["input_ids"]
    with torch.no_grad():
        expected = theirs(**kwargs).logits.numpy()
    logits = np.asarray(jax.jit(model.apply)(params, batch)[0])
    return expected, logits[..., : expected.shape[-1]], (model, params, config)


FAST = [("llama-llama3", "alone"), ("bert", "other"), ("t5", "equal"), ("t5", "other")]


@pytest.mark.parametrize(
    "case, how",
    [
        pytest.param(case, how, marks=() if (case, how) in FAST else pytest.mark.slow)
        for case in HEADS
        for how in ("equal", "other", "alone")
    ],
)
def test_a_head_beside_the_embeddings_is_read_as_transformers_reads_it(case, how, mesh, tmp_path, capsys):
    theirs = make(*CASES[case])
    theirs.save_pretrained(tmp_path / "theirs")
    with_copy(tmp_path / "theirs", *HEADS[case], how)
    expected, logits, (model, params, config) = both(theirs, tmp_path / "theirs", mesh)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert model.config.tie_embeddings == (how != "other")
    assert ("differ though config.json ties them" in capsys.readouterr().err) == (how == "other")
    save_folder(tmp_path / "ours", model, params, family=config["model_type"], like=config)
    again, ours, _ = both(theirs, tmp_path / "ours", mesh)
    np.testing.assert_allclose(again, expected, atol=1e-4)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("how", [pytest.param("equal", marks=pytest.mark.slow), "other", "alone"])
@pytest.mark.parametrize("case", ["bert", pytest.param("roberta", marks=pytest.mark.slow)])
def test_a_bias_beside_the_heads_own_is_read_as_transformers_reads_it(case, how, mesh, tmp_path):
    theirs = make(*CASES[case])
    theirs.save_pretrained(tmp_path)
    with_copy(tmp_path, *BIASES[case], how)
    expected, logits, _ = both(theirs, tmp_path, mesh)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("case, prefix", [pytest.param("t5", "", marks=pytest.mark.slow), ("bart", "model.")])
def test_embeddings_of_their_own_for_each_stack_are_refused(case, prefix, mesh, tmp_path):
    theirs = make(*CASES[case])
    for stack in ("encoder", "decoder"):
        folder = tmp_path / stack
        theirs.save_pretrained(folder)
        with_copy(folder, f"{prefix}{stack}.embed_tokens.weight", f"{prefix}shared.weight", "equal")
        expected, logits, _ = both(theirs, folder, mesh)
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        with_copy(folder, f"{prefix}{stack}.embed_tokens.weight", f"{prefix}shared.weight", "other")
        with pytest.raises(ValueError, match=f"{stack}.embed_tokens.weight and {prefix}shared.weight differ"):
            load_folder(str(folder), mesh)


def test_a_model_with_a_tied_head_does_not_take_a_file_with_another_head(mesh, tmp_path):
    from jaxlm.hub import load_parameters

    make(*CASES["gpt2"]).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    with_copy(tmp_path, *HEADS["gpt2"], "other")
    assert config.tie_embeddings and not read_config(tmp_path).tie_embeddings
    with pytest.raises(ValueError, match=r"give model\.tie_embeddings false"):
        load_parameters(tmp_path, Model(config), mesh)
