"""Every head that a family has, against the class of `transformers` that it names."""

import jax
import numpy as np
import pytest
from torch_models import CASES, make, ragged

from jaxlm.hub import FAMILIES, load_folder, save_folder
from jaxlm.parallel import ParallelConfig, make_mesh

pytestmark = pytest.mark.parity

HEADS = [(name, kind) for name, family in FAMILIES.items() for kind in family.heads if kind not in ("language_model", "masked_lm")]
EOS = 2


def options(name: str) -> dict:
    case = dict(CASES[name][1])
    return case | ({"eos_token_id": EOS, "pad_token_id": 0} if FAMILIES[name].fixed["architecture"] == "encoder_decoder" else {})


@pytest.mark.parametrize("name, kind", HEADS, ids=lambda value: value)
def test_a_heads_scores_are_torchs(name, kind, tmp_path):
    import torch

    head = FAMILIES[name].heads[kind]
    more = {"num_labels": 5} if kind in ("sequence", "token") else {}
    theirs = make(head.architecture, options(name), **more)
    if getattr(theirs.config, "pad_token_id", None) is None:
        theirs.config.pad_token_id = 0
    theirs.save_pretrained(tmp_path / "theirs")
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    model, params, _, config = load_folder(str(tmp_path / "theirs"), mesh)
    assert model.config.head.kind == kind

    pad = theirs.config.pad_token_id
    ids, segments = ragged(3, [11, 7, 4], pad)
    ours = {"tokens_BL": ids, "segments_BL": segments}
    kwargs = {"input_ids": torch.tensor(ids, dtype=torch.long), "attention_mask": torch.tensor(segments, dtype=torch.long)}
    if model.config.architecture == "encoder_decoder":
        # Their classifiers read the decoder's state of the end-of-text token, given the same text shifted by one; without
        # the mask of the decoder its padding stands behind all that is looked at.
        ids[np.arange(3), [10, 6, 3]] = EOS
        kwargs["input_ids"] = torch.tensor(ids, dtype=torch.long)
        start = theirs.config.decoder_start_token_id
        shifted = np.concatenate([np.full((3, 1), start, np.int32), ids[:, :-1]], axis=1)
        ours = {"encoder": ours, "decoder": {"tokens_BL": shifted, "segments_BL": segments}}
    if kind == "choice":
        kwargs = {key: value[None] for key, value in kwargs.items()}

    if kind == "embedding":  # the bare model: its last hidden states, of which the head takes one or the mean
        scores = np.asarray(jax.jit(lambda p, b: model.apply(p, b, method="hidden"))(params, ours))
        if "decoder" in ours:
            kwargs["decoder_input_ids"] = torch.tensor(ours["decoder"]["tokens_BL"], dtype=torch.long)
    else:
        scores = np.asarray(jax.jit(model.apply)(params, ours))
    with torch.no_grad():
        out = theirs(**kwargs)
    if kind == "embedding":
        expected = out.last_hidden_state
    elif kind == "span":
        expected = torch.stack([out.start_logits, out.end_logits], dim=-1)
    else:
        expected = out.logits[0] if kind == "choice" else out.logits
    kept = segments > 0 if expected.ndim > 1 and expected.shape[:2] == ids.shape else np.ones(len(scores), bool)
    np.testing.assert_allclose(scores[kept], expected.numpy()[kept], atol=1e-4)

    save_folder(tmp_path / "ours", model, params, family=name, like=config, source=tmp_path / "theirs")
    _, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    sinusoids = {"encoder.embed_positions.weight", "decoder.embed_positions.weight"}  # of Marian, computed and in no file
    assert not report["missing_keys"] - sinusoids and not report["unexpected_keys"] and not report["mismatched_keys"]
