"""Decoders: GPT-2, GPT-NeoX, and the line of Llama (Mistral, Qwen 2 and 3, Gemma 2, OLMo 2, Phi-3, Mixtral)."""

from collections.abc import Collection
from typing import Any

from jaxlm.hub.family import (
    Family,
    Head,
    Json,
    Tensors,
    attention,
    linear,
    norm,
    read_layers,
    read_rope,
    table,
    write_layers,
    write_rope,
)  # fmt: skip
from jaxlm.model import TransformerConfig

_STACK = "transformer/decoder"
_LAYER = f"{_STACK}/layers"


def _heads(name: str, head: str = "lm_head.weight", score: str = "score.weight") -> dict[str, Head]:
    """A language model, and labels from the last token's hidden state by a matrix alone."""
    last: Json = {"dense": False, "bias": False}
    return {
        "language_model": Head(f"{name}ForCausalLM", {}, {head: {"head/table": "V W"}}),
        "sequence": Head(f"{name}ForSequenceClassification", {**last, "pool": "last"}, {score: {"head/out/kernel": "C U"}}),
        "token": Head(f"{name}ForTokenClassification", {"dense": False, "bias": True}, linear("score", "head/out", "C U")),
        "embedding": Head(f"{name}Model", {"dense": False, "pool": "last"}),
    }


_GPT2_LAYER = "transformer.h.{x}."

# Radford et al. 2019. Its matrices lie (in, out), as ours.
GPT2 = Family(
    name="gpt2",
    prefix="transformer.",
    fixed={"architecture": "decoder", "norm": "layernorm", "norm_position": "pre", "position": "learned", "bias": True},
    keys={
        "vocab_size": "vocab_size", "positions": "n_positions", "layers": "n_layer", "width": "n_embd", "heads": "n_head",
        "mlp_width": "n_inner", "norm_eps": "layer_norm_epsilon", "dropout": "resid_pdrop", "init_std": "initializer_range",
        "tie_embeddings": "tie_word_embeddings",
    },
    activation="activation_function",
    write=lambda config: {
        "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        "n_inner": None if config.F == 4 * config.width else config.F,
    },
    require={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    tensors={
        **table("transformer.wte", "transformer/embed"),
        **table("transformer.wpe", f"{_STACK}/embed_positions", "P W"),
        **norm(f"{_GPT2_LAYER}ln_1", f"{_LAYER}/attention_norm"),
        f"{_GPT2_LAYER}attn.c_attn.weight": {
            f"{_LAYER}/attention/query/kernel": "D (*N H)", f"{_LAYER}/attention/key/kernel": "D (*K H)",
            f"{_LAYER}/attention/value/kernel": "D (*K H)",
        },
        f"{_GPT2_LAYER}attn.c_attn.bias": {
            f"{_LAYER}/attention/query/bias": "(*N H)", f"{_LAYER}/attention/key/bias": "(*K H)",
            f"{_LAYER}/attention/value/bias": "(*K H)",
        },
        **linear(f"{_GPT2_LAYER}attn.c_proj", f"{_LAYER}/attention/out", "(N H) D", bias="D"),
        **norm(f"{_GPT2_LAYER}ln_2", f"{_LAYER}/mlp_norm"),
        **linear(f"{_GPT2_LAYER}mlp.c_fc", f"{_LAYER}/mlp/up", "D F", bias="F"),
        **linear(f"{_GPT2_LAYER}mlp.c_proj", f"{_LAYER}/mlp/down", "F D", bias="D"),
        **norm("transformer.ln_f", f"{_STACK}/final_norm"),
    },
    heads={
        **_heads("GPT2"),
        "language_model": Head("GPT2LMHeadModel", {}, {"lm_head.weight": {"head/table": "V W"}}),
        "token": Head("GPT2ForTokenClassification", {"dense": False, "bias": True}, linear("classifier", "head/out", "C U")),
    },
    ignored=(r"attn\.(masked_)?bias$",),
)  # fmt: skip

_NEOX_LAYER = "gpt_neox.layers.{x}."

# Black et al. 2022. Attention and MLP side by side; queries, keys and values take turns in each head.
GPT_NEOX = Family(
    name="gpt_neox",
    prefix="gpt_neox.",
    fixed={"architecture": "decoder", "norm": "layernorm", "norm_position": "pre", "position": "rotary", "bias": True},
    keys={
        "vocab_size": "vocab_size", "positions": "max_position_embeddings", "layers": "num_hidden_layers", "width": "hidden_size",
        "heads": "num_attention_heads", "mlp_width": "intermediate_size", "norm_eps": "layer_norm_eps",
        "dropout": "hidden_dropout", "init_std": "initializer_range", "tie_embeddings": "tie_word_embeddings",
        "parallel": "use_parallel_residual",
    },
    activation="hidden_act",
    read=lambda theirs, names: read_rope(theirs, partial=True),
    write=lambda config: {"attention_dropout": config.dropout, "attention_bias": True, **write_rope(config, always=True)},
    require={"attention_bias": True},
    tensors={
        **table("gpt_neox.embed_in", "transformer/embed"),
        **norm(f"{_NEOX_LAYER}input_layernorm", f"{_LAYER}/attention_norm"),
        f"{_NEOX_LAYER}attention.query_key_value.weight": {
            f"{_LAYER}/attention/query/kernel": "(N *H) D", f"{_LAYER}/attention/key/kernel": "(K *H) D",
            f"{_LAYER}/attention/value/kernel": "(K *H) D",
        },
        f"{_NEOX_LAYER}attention.query_key_value.bias": {
            f"{_LAYER}/attention/query/bias": "(N *H)", f"{_LAYER}/attention/key/bias": "(K *H)",
            f"{_LAYER}/attention/value/bias": "(K *H)",
        },
        **linear(f"{_NEOX_LAYER}attention.dense", f"{_LAYER}/attention/out", "D (N H)"),
        **norm(f"{_NEOX_LAYER}post_attention_layernorm", f"{_LAYER}/mlp_norm"),
        **linear(f"{_NEOX_LAYER}mlp.dense_h_to_4h", f"{_LAYER}/mlp/up", "F D"),
        **linear(f"{_NEOX_LAYER}mlp.dense_4h_to_h", f"{_LAYER}/mlp/down", "D F"),
        **norm("gpt_neox.final_layer_norm", f"{_STACK}/final_norm"),
    },
    heads={
        **_heads("GPTNeoX", head="embed_out.weight"),
        "token": Head("GPTNeoXForTokenClassification", {"dense": False, "bias": True}, linear("classifier", "head/out", "C U")),
    },
    ignored=(r"attention\.(masked_)?bias$", r"rotary_emb\.inv_freq"),
    renames=((r"^lm_head\.", "embed_out."),),
)  # fmt: skip

# --- the line of Llama -----------------------------------------------------------------------------

_X = "model.layers.{x}."
_FIXED: Json = {
    "architecture": "decoder", "norm": "rmsnorm", "norm_position": "pre", "position": "rotary", "bias": False,
    "activation": "swiglu",
}  # fmt: skip
_KEYS = {
    "vocab_size": "vocab_size", "positions": "max_position_embeddings", "layers": "num_hidden_layers", "width": "hidden_size",
    "heads": "num_attention_heads", "mlp_width": "intermediate_size", "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range", "tie_embeddings": "tie_word_embeddings", "dropout": "attention_dropout",
}  # fmt: skip
_SPLIT_ATTENTION = attention(f"{_X}self_attn.", f"{_LAYER}/attention", "q_proj", "k_proj", "v_proj", "o_proj")
_SPLIT_MLP: Tensors = {
    **linear(f"{_X}mlp.gate_proj", f"{_LAYER}/mlp/gate", "F D"),
    **linear(f"{_X}mlp.up_proj", f"{_LAYER}/mlp/up", "F D"),
    **linear(f"{_X}mlp.down_proj", f"{_LAYER}/mlp/down", "D F"),
}
_ENDS: Tensors = {**table("model.embed_tokens", "transformer/embed"), **norm("model.norm", f"{_STACK}/final_norm")}
_NORMS: Tensors = {
    **norm(f"{_X}input_layernorm", f"{_LAYER}/attention_norm"),
    **norm(f"{_X}post_attention_layernorm", f"{_LAYER}/mlp_norm"),
}
_BUFFERS = (r"rotary_emb\.inv_freq",)


def _read(theirs: Json, names: Collection[str], partial: bool = False) -> dict[str, Any]:
    width, heads = theirs["hidden_size"], theirs["num_attention_heads"]
    return {
        "kv_heads": theirs.get("num_key_value_heads") or heads, "head_width": theirs.get("head_dim") or width // heads,
        **read_rope(theirs, partial),
    }  # fmt: skip


def _write(config: TransformerConfig) -> dict[str, Any]:
    width = {"head_dim": config.H} if config.H * config.heads != config.width else {}
    return {"num_key_value_heads": config.K, "use_cache": True, **width, **write_rope(config)}


def _read_window(theirs: Json, names: Collection[str], partial: bool = False) -> dict[str, Any]:
    """A window in every layer, or none."""
    window = theirs.get("sliding_window")
    return {**_read(theirs, names, partial), **({"window": window, "layer_pattern": "L"} if window else {})}


def _write_window(config: TransformerConfig) -> dict[str, Any]:
    return {**_write(config), "sliding_window": config.window if config.layer_pattern == "L" else None}


def _read_some_windows(theirs: Json, names: Collection[str]) -> dict[str, Any]:
    """A window in the layers after the first `max_window_layers`, or none."""
    fields = _read(theirs, names)
    layers, window = theirs["num_hidden_layers"], theirs.get("sliding_window")
    if not theirs.get("use_sliding_window") or not window:
        return fields
    first = min(theirs.get("max_window_layers", layers), layers)
    return {**fields, "window": window, **read_layers(theirs, "G" * first + "L" * (layers - first))}


def _write_some_windows(config: TransformerConfig) -> dict[str, Any]:
    used = "L" in config.layer_pattern
    first = config.local(config.layers).index(True) if used else 0
    return {
        **_write(config), "use_sliding_window": used, "sliding_window": config.window if used else None,
        "layer_types": write_layers(config), **({"max_window_layers": first} if used else {}),
    }  # fmt: skip


LLAMA = Family(  # Touvron et al. 2023; Dubey et al. 2024
    name="llama", prefix="model.", fixed=_FIXED, keys=_KEYS, activation="hidden_act", read=_read, write=_write,
    require={"attention_bias": False, "mlp_bias": False},
    tensors={**_ENDS, **_SPLIT_ATTENTION, **_SPLIT_MLP, **_NORMS}, heads=_heads("Llama"), ignored=_BUFFERS,
)  # fmt: skip

MISTRAL = Family(  # Jiang et al. 2023
    name="mistral", prefix="model.", fixed=_FIXED, keys=_KEYS, activation="hidden_act", read=_read_window, write=_write_window,
    tensors=LLAMA.tensors, heads=_heads("Mistral"), ignored=_BUFFERS,
)  # fmt: skip

QWEN2 = Family(  # Yang et al. 2024
    name="qwen2", prefix="model.", fixed={**_FIXED, "qkv_bias": True}, keys=_KEYS, activation="hidden_act",
    read=_read_some_windows, write=_write_some_windows, tensors=LLAMA.tensors, heads=_heads("Qwen2"), ignored=_BUFFERS,
)  # fmt: skip

QWEN3 = Family(  # Yang et al. 2025
    name="qwen3", prefix="model.", fixed={**_FIXED, "qk_norm": "heads"}, keys=_KEYS, activation="hidden_act",
    read=_read_some_windows, write=lambda config: {**_write_some_windows(config), "head_dim": config.H},
    require={"attention_bias": False},
    tensors={
        **LLAMA.tensors,
        **norm(f"{_X}self_attn.q_norm", f"{_LAYER}/attention/query_norm", "H"),
        **norm(f"{_X}self_attn.k_norm", f"{_LAYER}/attention/key_norm", "H"),
    },
    heads=_heads("Qwen3"), ignored=_BUFFERS,
)  # fmt: skip

OLMO2 = Family(  # OLMo Team 2024: norms after the sub-layers alone
    name="olmo2", prefix="model.", fixed={**_FIXED, "norm_position": "output", "qk_norm": "whole"}, keys=_KEYS,
    activation="hidden_act", read=_read, write=_write,
    require={"attention_bias": False},
    tensors={
        **_ENDS, **_SPLIT_ATTENTION, **_SPLIT_MLP,
        **norm(f"{_X}post_attention_layernorm", f"{_LAYER}/attention_output_norm"),
        **norm(f"{_X}post_feedforward_layernorm", f"{_LAYER}/mlp_output_norm"),
        **norm(f"{_X}self_attn.q_norm", f"{_LAYER}/attention/query_norm", "(N H)"),
        **norm(f"{_X}self_attn.k_norm", f"{_LAYER}/attention/key_norm", "(K H)"),
    },
    heads={kind: head for kind, head in _heads("Olmo2").items() if kind != "token"}, ignored=_BUFFERS,
)  # fmt: skip

PHI3 = Family(  # Abdin et al. 2024: fused matrices
    name="phi3", prefix="model.", fixed=_FIXED, keys=_KEYS, activation="hidden_act",
    read=lambda theirs, names: _read_window(theirs, names, partial=True),
    write=lambda config: {
        **_write_window(config), "resid_pdrop": config.dropout, "embd_pdrop": config.dropout,
    },
    tensors={
        **_ENDS, **_NORMS,
        f"{_X}self_attn.qkv_proj.weight": {
            f"{_LAYER}/attention/query/kernel": "(*N H) D", f"{_LAYER}/attention/key/kernel": "(*K H) D",
            f"{_LAYER}/attention/value/kernel": "(*K H) D",
        },
        **linear(f"{_X}self_attn.o_proj", f"{_LAYER}/attention/out", "D (N H)"),
        f"{_X}mlp.gate_up_proj.weight": {f"{_LAYER}/mlp/gate/kernel": "*F D", f"{_LAYER}/mlp/up/kernel": "*F D"},
        **linear(f"{_X}mlp.down_proj", f"{_LAYER}/mlp/down", "D F"),
    },
    heads=_heads("Phi3"), ignored=_BUFFERS,
)  # fmt: skip


def _read_gemma2(theirs: Json, names: Collection[str]) -> dict[str, Any]:
    layers = theirs["num_hidden_layers"]
    return {
        **_read(theirs, names), **read_layers(theirs, "".join("LG"[i % 2] for i in range(layers))),
        "attention_scale": theirs["query_pre_attn_scalar"] ** -0.5,
    }  # fmt: skip


def _whole(number: float) -> float:
    """As a whole number where it is one but for rounding."""
    return round(number) if abs(number - round(number)) < 1e-6 * number else number


GEMMA2 = Family(  # Gemma Team 2024: norms before and after the sub-layers, soft caps, every other layer local
    name="gemma2", prefix="model.",
    fixed={
        **_FIXED, "norm_position": "both", "norm_offset": True, "embedding_scale": True, "activation": "geglu_tanh",
        "layer_pattern": "LG",
    },
    keys={**_KEYS, "window": "sliding_window", "attention_softcap": "attn_logit_softcapping",
          "logit_softcap": "final_logit_softcapping"},
    activation="hidden_activation", read=_read_gemma2,
    write=lambda config: {
        **_write(config), "layer_types": write_layers(config), "head_dim": config.H,
        **({"hidden_activation": "gelu_pytorch_tanh"} if config.activation == "geglu_tanh" else {}),
        # Its class asks for a window even where no layer has one.
        "sliding_window": config.window or config.positions,
        "query_pre_attn_scalar": _whole((config.attention_scale or config.H**-0.5) ** -2),
    },
    require={"attention_bias": False, "use_bidirectional_attention": None},
    tensors={
        **_ENDS, **_SPLIT_ATTENTION, **_SPLIT_MLP,
        **norm(f"{_X}input_layernorm", f"{_LAYER}/attention_norm"),
        **norm(f"{_X}post_attention_layernorm", f"{_LAYER}/attention_output_norm"),
        **norm(f"{_X}pre_feedforward_layernorm", f"{_LAYER}/mlp_norm"),
        **norm(f"{_X}post_feedforward_layernorm", f"{_LAYER}/mlp_output_norm"),
    },
    heads=_heads("Gemma2"), ignored=_BUFFERS,
)  # fmt: skip

_EXPERTS = f"{_X}block_sparse_moe."

MIXTRAL = Family(  # Jiang et al. 2024
    name="mixtral", prefix="model.", fixed={**_FIXED, "moe.normalize": True},
    keys={**_KEYS, "moe.experts": "num_local_experts", "moe.chosen": "num_experts_per_tok",
          "moe.balance_loss": "router_aux_loss_coef"},
    activation="hidden_act", read=_read_window, write=_write_window, require={"router_jitter_noise": 0.0},
    tensors={
        **_ENDS, **_SPLIT_ATTENTION, **_NORMS,
        f"{_EXPERTS}gate.weight": {f"{_LAYER}/mlp/router/kernel": "E D"},
        f"{_EXPERTS}experts.{{e}}.w1.weight": {f"{_LAYER}/mlp/gate/kernel": "F D"},
        f"{_EXPERTS}experts.{{e}}.w3.weight": {f"{_LAYER}/mlp/up/kernel": "F D"},
        f"{_EXPERTS}experts.{{e}}.w2.weight": {f"{_LAYER}/mlp/down/kernel": "D F"},
    },
    heads=_heads("Mixtral"), ignored=_BUFFERS,
)  # fmt: skip

DECODERS = (GPT2, GPT_NEOX, LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, PHI3, GEMMA2, MIXTRAL)
