"""Our decoder against Hugging Face's torch GPT-2 and Llama: the same weights give the same logits and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import build
from jaxlm.model import Model, TransformerConfig

pytestmark = pytest.mark.parity

SIZES = {"vocab_size": 96, "positions": 32, "layers": 3, "width": 48, "heads": 6}


def gpt2():
    """A random GPT-2 in torch with perturbed norms and biases, and its weights as our tree."""
    import torch
    import transformers

    s = SIZES
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=s["vocab_size"],
            n_positions=s["positions"],
            n_embd=s["width"],
            n_layer=s["layers"],
            n_head=s["heads"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    w = perturb(theirs)
    N, D, X = s["heads"], s["width"], s["layers"]
    H = D // N

    def layers(name: str, *shape: int) -> np.ndarray:
        return np.stack([w[f"transformer.h.{i}.{name}"].reshape(shape) for i in range(X)])

    qkv = np.split(layers("attn.c_attn.weight", D, 3 * D), 3, axis=-1)
    qkv_bias = np.split(layers("attn.c_attn.bias", 3 * D), 3, axis=-1)
    attention = {
        name: {"kernel": kernel.reshape(X, D, N, H), "bias": bias.reshape(X, N, H)}
        for name, kernel, bias in zip(("query", "key", "value"), qkv, qkv_bias, strict=True)
    }
    attention["out"] = {"kernel": layers("attn.c_proj.weight", N, H, D), "bias": layers("attn.c_proj.bias", D)}
    norm = {"scale": w["transformer.ln_f.weight"], "bias": w["transformer.ln_f.bias"]}
    ours = {
        "embed": {"table": w["transformer.wte.weight"]},
        "embed_positions": {"table": w["transformer.wpe.weight"]},
        "final_norm": norm,
        "layers": {
            "attention": attention,
            "attention_norm": {"scale": layers("ln_1.weight", D), "bias": layers("ln_1.bias", D)},
            "mlp_norm": {"scale": layers("ln_2.weight", D), "bias": layers("ln_2.bias", D)},
            "mlp": {
                "up": {"kernel": layers("mlp.c_fc.weight", D, 4 * D), "bias": layers("mlp.c_fc.bias", 4 * D)},
                "down": {"kernel": layers("mlp.c_proj.weight", 4 * D, D), "bias": layers("mlp.c_proj.bias", D)},
            },
        },
    }
    return theirs, build(TransformerConfig, {"preset": "gpt2-small", **SIZES}), {"transformer": ours}


def llama():
    """A random grouped-query Llama in torch with perturbed norms, and its weights as our tree."""
    import torch
    import transformers

    s = {**SIZES, "kv_heads": 2, "mlp_width": 80}
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=s["vocab_size"],
            max_position_embeddings=s["positions"],
            hidden_size=s["width"],
            num_hidden_layers=s["layers"],
            num_attention_heads=s["heads"],
            num_key_value_heads=s["kv_heads"],
            intermediate_size=s["mlp_width"],
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        )
    )
    w = perturb(theirs)
    N, K, D, F, X = s["heads"], s["kv_heads"], s["width"], s["mlp_width"], s["layers"]
    H = D // N

    def layers(name: str) -> np.ndarray:
        return np.stack([w[f"model.layers.{i}.{name}.weight"] for i in range(X)])

    def kernel(name: str, *shape: int) -> dict[str, np.ndarray]:
        return {"kernel": np.swapaxes(layers(name), 1, 2).reshape(X, *shape)}  # torch stores (out, in)

    ours = {
        "transformer": {
            "embed": {"table": w["model.embed_tokens.weight"]},
            "final_norm": {"scale": w["model.norm.weight"]},
            "layers": {
                "attention": {
                    "query": kernel("self_attn.q_proj", D, N, H),
                    "key": kernel("self_attn.k_proj", D, K, H),
                    "value": kernel("self_attn.v_proj", D, K, H),
                    "out": kernel("self_attn.o_proj", N, H, D),
                },
                "attention_norm": {"scale": layers("input_layernorm")},
                "mlp_norm": {"scale": layers("post_attention_layernorm")},
                "mlp": {
                    "gate": kernel("mlp.gate_proj", D, F),
                    "up": kernel("mlp.up_proj", D, F),
                    "down": kernel("mlp.down_proj", F, D),
                },
            },
        },
        "head": {"table": w["lm_head.weight"]},
    }
    return theirs, build(TransformerConfig, {"preset": "llama-8b", **s}), ours


def perturb(model) -> dict[str, np.ndarray]:
    """Move every weight, in place, so that no norm is one and no bias zero; returns them as arrays."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", [gpt2, llama])
def test_logits_loss_and_gradients_agree(family):
    import torch

    theirs, config, params = family()
    model = Model(config)
    params = jax.tree.map(jnp.asarray, params)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, model.shapes)
    ids = np.random.default_rng(0).integers(0, 96, (3, 20)).astype(np.int32)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    batch = {"tokens_BL": inputs, "targets_BL": targets, "weights_BL": np.ones(targets.shape, np.float32)}

    logits = theirs(torch.tensor(inputs, dtype=torch.long)).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(targets, dtype=torch.long).flatten(), reduction="sum"
    )
    loss.backward()

    np.testing.assert_allclose(model.apply(params, batch)[0], logits.detach().numpy(), atol=1e-4)
    (ours, _), grads = jax.value_and_grad(lambda p: model.apply(p, batch, method="loss", chunk=19), has_aux=True)(params)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5)
    embed = "transformer.wte.weight" if family is gpt2 else "model.embed_tokens.weight"
    up = "transformer.h.1.mlp.c_fc.weight" if family is gpt2 else "model.layers.1.mlp.up_proj.weight"
    found = dict(theirs.named_parameters())
    up_grad = found[up].grad.numpy() if family is gpt2 else found[up].grad.numpy().T
    grads = grads["transformer"]
    np.testing.assert_allclose(grads["embed"]["table"], found[embed].grad.numpy(), atol=2e-4)
    np.testing.assert_allclose(grads["layers"]["mlp"]["up"]["kernel"][1], up_grad, atol=2e-4)


def test_adamw_takes_torchs_steps():
    """Three steps of our optimiser (decay mask, clipping, bias correction) against torch.optim.AdamW."""
    import torch

    from jaxlm.train import OptimConfig, make_optimizer

    config = OptimConfig(learning_rate=1e-2, weight_decay=0.1, clip=1.0, beta2=0.95)
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(5, 7)), "scale": rng.normal(size=7)}
    grads = [{name: 3 * rng.normal(size=value.shape) for name, value in start.items()} for _ in range(3)]

    tensors = {name: torch.nn.Parameter(torch.tensor(value, dtype=torch.float32)) for name, value in start.items()}
    groups = [{"params": [tensors["kernel"]], "weight_decay": 0.1}, {"params": [tensors["scale"]], "weight_decay": 0.0}]
    torch_adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    optimizer = make_optimizer(config, lambda step: 1e-2)
    params = {name: jnp.asarray(value, jnp.float32) for name, value in start.items()}
    state = optimizer.init(params)
    for grad in grads:
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(grad[name], dtype=torch.float32)
        torch.nn.utils.clip_grad_norm_(list(tensors.values()), 1.0)
        torch_adam.step()
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update({n: jnp.asarray(g, jnp.float32) for n, g in grad.items()}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for name, tensor in tensors.items():
        np.testing.assert_allclose(params[name], tensor.detach().numpy(), atol=1e-6)


def test_a_changed_choice_is_seen():
    """The comparison can fail: another activation or epsilon moves the logits beyond its tolerance."""
    import torch

    theirs, config, params = gpt2()
    ids = np.random.default_rng(0).integers(0, 96, (1, 12)).astype(np.int32)
    expected = theirs(torch.tensor(ids, dtype=torch.long)).logits.detach().numpy()
    for wrong in ({"activation": "gelu"}, {"norm_eps": 1e-2}):
        logits = Model(dataclasses.replace(config, **wrong)).apply(jax.tree.map(jnp.asarray, params), {"tokens_BL": ids})[0]
        assert np.abs(np.asarray(logits) - expected).max() > 1e-4
