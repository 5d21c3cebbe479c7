"""Every family against torch: the same files give the same hidden states, logits and gradients, and go back byte for byte."""

import functools
import json

import jax
import numpy as np
import pytest
from torch_models import CASES, make, ragged

from jaxlm.hub import FAMILIES, Tensors, family_of, load, load_folder, save_folder
from jaxlm.hub.convert import table_of
from jaxlm.parallel import ParallelConfig, make_mesh, stored_shardings

pytestmark = pytest.mark.parity


def inputs(model, config, lengths: list[int]):
    """The same batch for both sides: ours, with targets and weights, and the keyword arguments of theirs."""
    import torch

    def long(array):
        return torch.tensor(array, dtype=torch.long)

    pad = model.config.pad_token_id or 0
    ids, segments = ragged(0, lengths, pad)
    targets = np.random.default_rng(9).integers(3, 60, ids.shape).astype(np.int32)
    ours = {"tokens_BL": ids, "segments_BL": segments}
    theirs = {"input_ids": long(ids), "attention_mask": long(segments)}
    if config.token_types > 1:
        types = np.random.default_rng(5).integers(0, config.token_types, ids.shape).astype(np.int32)
        ours["types_BL"], theirs["token_type_ids"] = types, long(types)
    if config.architecture != "encoder_decoder":
        return {**ours, "targets_BL": targets, "weights_BL": segments.astype(np.float32)}, theirs
    decoder, decoder_segments = ragged(1, [max(2, length - 3) for length in lengths], pad)
    theirs |= {"decoder_input_ids": long(decoder), "decoder_attention_mask": long(decoder_segments)}
    targets = targets[:, : decoder.shape[1]]
    scored = {"tokens_BL": decoder, "segments_BL": decoder_segments, "targets_BL": targets}
    return {"encoder": ours, "decoder": {**scored, "weights_BL": decoder_segments.astype(np.float32)}}, theirs


def own(batch):
    return batch.get("decoder", batch)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(ParallelConfig(), jax.devices()[:1])


def torch_loss(logits, batch):
    import torch

    targets = torch.tensor(own(batch)["targets_BL"], dtype=torch.long)
    weights = torch.tensor(own(batch)["weights_BL"])
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum()


def decoded(theirs, input_ids, attention_mask, output_hidden_states=False):
    """Logits and last hidden states of torch reading one token after the other into its cache."""
    import types

    import torch

    cache, parts = None, []
    for i in range(input_ids.shape[1]):
        out = theirs(
            input_ids=input_ids[:, i : i + 1], attention_mask=attention_mask[:, : i + 1], past_key_values=cache, use_cache=True,
            output_hidden_states=True, position_ids=torch.full((input_ids.shape[0], 1), i),
        )  # fmt: skip
        cache = out.past_key_values
        parts.append((out.logits, out.hidden_states[-1]))
    logits, hidden = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    return types.SimpleNamespace(logits=logits, hidden_states=[hidden])


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_logits_and_all_gradients_are_torchs(case, mesh, tmp_path):
    """To 1e-4 in float32, at several lengths; gradients of every parameter, brought into our layout by the same table."""
    from safetensors.torch import save_file

    theirs = make(*CASES[case])
    theirs.save_pretrained(tmp_path / "theirs")
    model, params, folder, config = load_folder(str(tmp_path / "theirs"), mesh)
    apply = jax.jit(lambda p, b: (model.apply(p, b)[0], model.apply(p, b, method="hidden")))
    forward = theirs
    if case == "llama-dynamic":  # a token's base grows with its own position, as theirs does from one decoded token to the next
        forward = functools.partial(decoded, theirs)
    for lengths in ([11, 7, 4], [16, 9, 2]):
        batch, kwargs = inputs(theirs, model.config, lengths)
        out = forward(**kwargs, output_hidden_states=True)
        states = out.decoder_hidden_states[-1] if "decoder" in batch else out.hidden_states[-1]
        kept = own(batch)["segments_BL"] > 0
        logits, hidden = apply(params, batch)
        np.testing.assert_allclose(np.asarray(hidden)[kept], states.detach().numpy()[kept], atol=1e-4)
        np.testing.assert_allclose(np.asarray(logits)[kept], out.logits.detach().numpy()[kept], atol=1e-4)

    batch, kwargs = inputs(theirs, model.config, [16, 9, 2])
    loss = torch_loss(forward(**kwargs).logits, batch)
    loss.backward()
    # The routers' balance loss is not part of torch's loss here.
    plain = type(model)(model.config) if not model.config.moe.experts else _without_balance(model)
    (ours, _), grads = jax.jit(jax.value_and_grad(lambda p: plain.apply(p, batch, method="loss", chunk=16), has_aux=True))(params)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5)

    stored = Tensors(folder)
    found = {name: p.grad if p.grad is not None else p * 0 for name, p in theirs.named_parameters(remove_duplicate=False)}
    (tmp_path / "grads").mkdir()
    save_file(
        {name: _as_stored(name, found, stored).contiguous().clone() for name in stored.index}, tmp_path / "grads/model.safetensors"
    )
    family = family_of(config)
    shardings = stored_shardings(model.axes, model.shapes, mesh)
    expected = load(Tensors(tmp_path / "grads"), table_of(family, model.config), model.shapes, model.axes, shardings)
    for path, value in jax.tree.leaves_with_path(expected):
        name = "/".join(str(key.key) for key in path)
        if "head/bias" in name and case in ("bart", "marian"):
            continue  # a buffer in torch, which has no gradient
        mine = grads
        for key in path:
            mine = mine[key.key]
        value, mine = np.asarray(value), np.asarray(mine)
        if family.missing and "attention_norm" in name:
            value, mine = value[1:], mine[1:]
        np.testing.assert_allclose(mine, value, atol=1e-4 * max(1.0, float(np.abs(value).max())), err_msg=name)


def _without_balance(model):
    import dataclasses

    return type(model)(dataclasses.replace(model.config, moe=dataclasses.replace(model.config.moe, balance_loss=0.0)))


def _as_stored(name: str, found: dict, stored: Tensors):
    """The gradient of a tensor as the file names it, which differs for buffers, NeoX's head and Mixtral's experts."""
    import re

    import torch

    if name in found:
        return found[name]
    if name == "embed_out.weight":
        return found["lm_head.weight"]
    if expert := re.fullmatch(r"(.*\.)block_sparse_moe\.experts\.(\d+)\.(w\d)\.weight", name):
        layer, number, which = expert[1], int(expert[2]), expert[3]
        if which == "w2":
            return found[f"{layer}mlp.experts.down_proj"][number]
        up = found[f"{layer}mlp.experts.gate_up_proj"][number]
        return up.chunk(2)[0 if which == "w1" else 1]
    if ".block_sparse_moe.gate." in name:
        return found[name.replace("block_sparse_moe", "mlp")]
    assert name == "final_logits_bias", f"{name} has no gradient"
    return torch.zeros(stored.index[name].shape)


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_byte_equal_and_opens_in_torch(case, mesh, tmp_path):
    """import → export gives the same tensors, byte for byte, and a config that means the same; `from_pretrained` finds
    no key missing, none unexpected, and computes the same logits."""
    import torch
    import transformers

    theirs = make(*CASES[case])
    theirs.save_pretrained(tmp_path / "theirs")
    model, params, _, config = load_folder(str(tmp_path / "theirs"), mesh)
    save_folder(tmp_path / "ours", model, params, family=family_of(config).name, like=config)

    before, after = Tensors(tmp_path / "theirs"), Tensors(tmp_path / "ours")
    assert before.index.keys() == after.index.keys()
    for name, stored in before.index.items():
        whole = tuple(slice(0, size) for size in stored.shape)
        assert stored.shape == after.index[name].shape, name
        assert before.read(name, whole).tobytes() == after.read(name, whole).tobytes(), name

    cls = getattr(transformers, CASES[case][0])
    again, report = cls.from_pretrained(tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    _, kwargs = inputs(theirs, model.config, [11, 7])
    torch.testing.assert_close(again.eval()(**kwargs).logits, theirs(**kwargs).logits, rtol=0, atol=0)
    old = theirs.config.to_dict()
    for key, value in again.config.to_dict().items():
        if key not in ("transformers_version", "_name_or_path", "n_positions"):  # of T5: transformers 4 wrote the last one
            assert value == (pytest.approx(old.get(key)) if isinstance(value, float) else old.get(key)), key


def test_every_family_has_a_case():
    assert {name for name in FAMILIES if any(case == name or case.startswith(f"{name}-") for case in CASES)} == set(FAMILIES)


def test_the_comparison_can_fail(mesh, tmp_path):
    """Another epsilon or rotary base moves the logits beyond the tolerance."""
    theirs = make(*CASES["llama"])
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    for change in ({"rms_norm_eps": 1e-2}, {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}):
        (tmp_path / "theirs/config.json").write_text(json.dumps({**config, **change}))
        model, params, *_ = load_folder(str(tmp_path / "theirs"), mesh)
        batch, kwargs = inputs(theirs, model.config, [11])
        difference = np.asarray(model.apply(params, batch)[0]) - theirs(**kwargs).logits.detach().numpy()
        assert np.abs(difference).max() > 1e-3


def test_config_values_that_a_file_leaves_out_are_the_familys(mesh, tmp_path):
    """A Llama whose config.json names no epsilon has 1e-6, not the default of our config."""
    theirs = make(*CASES["llama"])
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rms_norm_eps"], config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": 500.0}))  # as transformers 4 wrote it
    model = load_folder(str(tmp_path), mesh).model
    assert model.config.norm_eps == 1e-6 and model.config.rope.theta == 500.0
