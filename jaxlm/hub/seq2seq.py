"""Encoder-decoders: T5, mT5, BART, Marian."""

from collections.abc import Collection
from typing import Any

from jaxlm.config import unknown
from jaxlm.hub.family import GATED, PLAIN, Family, Head, Json, Tensors, attention, linear, norm, table
from jaxlm.model import TransformerConfig

_ENCODER, _DECODER = "transformer/encoder", "transformer/decoder"
_SEQUENCE = {"pool": "last", "dense": True, "activation": "tanh", "bias": True}
_CLASSIFIER: Tensors = {
    **linear("classification_head.dense", "head/dense", "U D"),
    **linear("classification_head.out_proj", "head/out", "C U"),
}


def _t5_layers(stack: str, ours: str) -> Tensors:
    layer, mlp = f"{stack}.block.{{x}}.layer.", 2 if stack == "decoder" else 1
    rows: Tensors = {
        **attention(f"{layer}0.SelfAttention.", f"{ours}/layers/attention", "q", "k", "v", "o"),
        **norm(f"{layer}0.layer_norm", f"{ours}/layers/attention_norm"),
        f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": {f"{ours}/relative_bias/table": "R N"},
        **norm(f"{stack}.final_layer_norm", f"{ours}/final_norm"),
        **linear(f"{layer}{mlp}.DenseReluDense.wi_0", f"{ours}/layers/mlp/gate", "F D"),
        **linear(f"{layer}{mlp}.DenseReluDense.wi_1", f"{ours}/layers/mlp/up", "F D"),
        **linear(f"{layer}{mlp}.DenseReluDense.wo", f"{ours}/layers/mlp/down", "D F"),
        **norm(f"{layer}{mlp}.layer_norm", f"{ours}/layers/mlp_norm"),
    }
    if stack == "decoder":
        rows |= attention(f"{layer}1.EncDecAttention.", f"{ours}/layers/cross_attention", "q", "k", "v", "o")
        rows |= norm(f"{layer}1.layer_norm", f"{ours}/layers/cross_attention_norm")
    return rows


def _ungated(tensors: Tensors) -> Tensors:
    """Without a gate the one matrix before the non-linearity is called `wi`."""
    rows = {name: parts for name, parts in tensors.items() if ".wi_0." not in name}
    return {name.replace(".wi_1.", ".wi."): parts for name, parts in rows.items()}


def _read_t5(theirs: Json, names: Collection[str]) -> dict[str, Any]:
    gate, _, kind = theirs["feed_forward_proj"].rpartition("-")
    # Their "gated-gelu" means the tanh approximation.
    names_of = GATED if gate else PLAIN
    if kind not in names_of:
        raise unknown("t5 config: feed_forward_proj", theirs["feed_forward_proj"], names_of)
    activation = "geglu_tanh" if (gate, kind) == ("gated", "gelu") else names_of[kind]
    # v1.0 scales the last hidden states and shares the table with the head; the files of later versions hold a head.
    scales = theirs.get("scale_decoder_outputs", theirs.get("tie_word_embeddings", True))
    return {
        "activation": activation, "logit_scale": bool(scales) and theirs["model_type"] == "t5",
        "tie_embeddings": "lm_head.weight" not in names,
    }  # fmt: skip


def _write_t5(config: TransformerConfig) -> dict[str, Any]:
    names = {
        "geglu_tanh": "gated-gelu",
        "swiglu": "gated-silu",
        "relu": "relu",
        "gelu": "gelu",
        "silu": "silu",
        "gelu_tanh": "gelu_new",
    }
    return {
        "feed_forward_proj": names.get(config.activation, config.activation), "num_decoder_layers": config.stacks["decoder"],
        "tie_word_embeddings": config.logit_scale, "is_encoder_decoder": True, "use_cache": True,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "classifier_dropout": config.dropout,
    }  # fmt: skip


_T5_FIXED: Json = {
    "architecture": "encoder_decoder", "norm": "rmsnorm", "norm_position": "pre", "position": "relative", "bias": False,
    "attention_scale": 1.0,
}  # fmt: skip
_T5_KEYS = {
    "vocab_size": "vocab_size", "width": "d_model", "head_width": "d_kv", "mlp_width": "d_ff", "layers": "num_layers",
    "decoder_layers": "num_decoder_layers", "heads": "num_heads", "relative_buckets": "relative_attention_num_buckets",
    "relative_distance": "relative_attention_max_distance", "norm_eps": "layer_norm_epsilon", "dropout": "dropout_rate",
    "positions": "n_positions",
}  # fmt: skip
_T5_TENSORS: Tensors = {
    **table("shared", "transformer/embed"),
    **_t5_layers("encoder", _ENCODER),
    **_t5_layers("decoder", _DECODER),
}
_LM: Tensors = {"lm_head.weight": {"head/table": "V W"}}

T5 = Family(  # Raffel et al. 2020; v1.1: Shazeer 2020
    name="t5", prefix="transformer.", fixed=_T5_FIXED, keys=_T5_KEYS, read=_read_t5, write=_write_t5,
    tensors=_T5_TENSORS, adapt=lambda config, tensors: tensors if config.gated else _ungated(tensors),
    heads={
        "language_model": Head("T5ForConditionalGeneration", {}, _LM),
        "sequence": Head("T5ForSequenceClassification", _SEQUENCE, _CLASSIFIER, prefix="transformer."),
        "embedding": Head("T5Model", {"dense": False, "pool": "mean"}),
    },
    # The first files hold a bias of the attention to the encoder, which nothing ever read.
    ignored=(r"(encoder|decoder)\.embed_tokens\.weight", r"EncDecAttention\.relative_attention_bias"),
    copies={f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")},
    unties_copies=False,
)  # fmt: skip

MT5 = Family(  # Xue et al. 2021
    name="mt5", prefix="transformer.", fixed=_T5_FIXED, keys=_T5_KEYS, read=_read_t5,
    write=lambda config: {**_write_t5(config), "tie_word_embeddings": config.tie_embeddings},
    tensors=_T5_TENSORS, adapt=T5.adapt,
    heads={
        "language_model": Head("MT5ForConditionalGeneration", {}, _LM),
        "sequence": Head("MT5ForSequenceClassification", _SEQUENCE, _CLASSIFIER, prefix="transformer."),
        "embedding": Head("MT5Model", {"dense": False, "pool": "mean"}),
    },
    ignored=T5.ignored, copies=T5.copies, unties_copies=False,
)  # fmt: skip


def _bart_layers(stack: str, ours: str) -> Tensors:
    layer = f"model.{stack}.layers.{{x}}."
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    rows: Tensors = {
        **attention(f"{layer}self_attn.", f"{ours}/layers/attention", *names),
        **norm(f"{layer}self_attn_layer_norm", f"{ours}/layers/attention_norm"),
        **linear(f"{layer}fc1", f"{ours}/layers/mlp/up", "F D"),
        **linear(f"{layer}fc2", f"{ours}/layers/mlp/down", "D F"),
        **norm(f"{layer}final_layer_norm", f"{ours}/layers/mlp_norm"),
        **table(f"model.{stack}.embed_positions", f"{ours}/embed_positions", "P W"),
        **norm(f"model.{stack}.layernorm_embedding", f"{ours}/embed_norm", "W"),
    }
    if stack == "decoder":
        rows |= attention(f"{layer}encoder_attn.", f"{ours}/layers/cross_attention", *names)
        rows |= norm(f"{layer}encoder_attn_layer_norm", f"{ours}/layers/cross_attention_norm")
    return rows


def _read_bart(theirs: Json, names: Collection[str]) -> dict[str, Any]:
    for key in ("attention_heads", "ffn_dim"):
        encoder, decoder = theirs[f"encoder_{key}"], theirs[f"decoder_{key}"]
        if encoder != decoder:
            raise ValueError(
                f"{theirs['model_type']} config: encoder_{key} {encoder} and decoder_{key} {decoder} differ: not supported"
            )
    return {}


def _write_bart(config: TransformerConfig) -> dict[str, Any]:
    return {
        "decoder_attention_heads": config.heads, "decoder_ffn_dim": config.F, "encoder_ffn_dim": config.F,
        "decoder_layers": config.stacks["decoder"], "attention_dropout": config.dropout, "is_encoder_decoder": True,
        "use_cache": True,
    }  # fmt: skip


_BART_FIXED: Json = {
    "architecture": "encoder_decoder", "norm": "layernorm", "norm_position": "post", "bias": True, "logit_bias": True,
    "norm_eps": 1e-5,
}  # fmt: skip
_BART_KEYS = {
    "vocab_size": "vocab_size", "positions": "max_position_embeddings", "width": "d_model", "mlp_width": "encoder_ffn_dim",
    "layers": "encoder_layers", "decoder_layers": "decoder_layers", "heads": "encoder_attention_heads", "dropout": "dropout",
    "embedding_scale": "scale_embedding", "init_std": "init_std", "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip
_BART_TENSORS: Tensors = {
    **table("model.shared", "transformer/embed"),
    **_bart_layers("encoder", _ENCODER),
    **_bart_layers("decoder", _DECODER),
}
_BART_LM: Tensors = {"final_logits_bias": {"head/bias": "1 V"}, **_LM}
_BART_COPIES = {f"model.{stack}.embed_tokens.weight": "model.shared.weight" for stack in ("encoder", "decoder")}
_BART_IGNORED = (r"(encoder|decoder)\.embed_tokens\.weight", r"(encoder|decoder)\.version$")

BART = Family(  # Lewis et al. 2020
    name="bart", prefix="model.",
    fixed={**_BART_FIXED, "position": "learned", "position_offset": 2, "embedding_norm": True},
    keys=_BART_KEYS, activation="activation_function", read=_read_bart,
    write=lambda config: {
        **_write_bart(config), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    },
    tensors=_BART_TENSORS,
    heads={
        "language_model": Head("BartForConditionalGeneration", {}, _BART_LM),
        "sequence": Head("BartForSequenceClassification", _SEQUENCE, _CLASSIFIER),
        "span": Head("BartForQuestionAnswering", {"dense": False, "bias": True}, linear("qa_outputs", "head/out", "C U")),
        "embedding": Head("BartModel", {"dense": False, "pool": "mean"}),
    },
    ignored=_BART_IGNORED, copies=_BART_COPIES,
)  # fmt: skip

MARIAN = Family(  # Junczys-Dowmunt et al. 2018: the Transformer of Vaswani et al. 2017
    name="marian", prefix="model.", fixed={**_BART_FIXED, "position": "sinusoidal"}, keys=_BART_KEYS,
    activation="activation_function", read=_read_bart,
    write=lambda config: {
        **_write_bart(config), "decoder_vocab_size": config.V, "pad_token_id": config.V - 1, "eos_token_id": 0,
        "decoder_start_token_id": config.V - 1, "forced_eos_token_id": 0, "share_encoder_decoder_embeddings": True,
        **({"activation_function": "swish"} if config.activation == "silu" else {}),
    },
    require={"share_encoder_decoder_embeddings": True},
    tensors={name: parts for name, parts in _BART_TENSORS.items() if "embed_positions" not in name},
    heads={
        "language_model": Head("MarianMTModel", {}, _BART_LM),
        "embedding": Head("MarianModel", {"dense": False, "pool": "mean"}),
    },
    ignored=(*_BART_IGNORED, r"embed_positions\.weight"), copies=_BART_COPIES,
)  # fmt: skip

SEQ2SEQ = (T5, MT5, BART, MARIAN)
