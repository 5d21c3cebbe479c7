"""Encoders: BERT, RoBERTa, XLM-RoBERTa, DistilBERT, ELECTRA, ALBERT, ModernBERT."""

import dataclasses
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
)
from jaxlm.model import TransformerConfig

_STACK = "transformer/encoder"
_LAYER = f"{_STACK}/layers"
_CLS = {"pool": "first", "dense": True, "activation": "tanh", "norm": False, "bias": True}
_PLAIN = {"dense": False, "bias": True}
_MEAN = {"pool": "mean", "dense": False}

_POST_NORM: Json = {
    "architecture": "encoder", "norm": "layernorm", "norm_position": "post", "position": "learned", "embedding_norm": True,
    "bias": True,
}  # fmt: skip
_KEYS = {
    "vocab_size": "vocab_size", "layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads",
    "mlp_width": "intermediate_size", "token_types": "type_vocab_size", "norm_eps": "layer_norm_eps",
    "init_std": "initializer_range", "dropout": "hidden_dropout_prob", "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip


def _embeddings(prefix: str) -> Tensors:
    return {
        **table(f"{prefix}word_embeddings", "transformer/embed"),
        **table(f"{prefix}position_embeddings", f"{_STACK}/embed_positions", "P W"),
        **table(f"{prefix}token_type_embeddings", f"{_STACK}/embed_types", "T W"),
        **norm(f"{prefix}LayerNorm", f"{_STACK}/embed_norm", "W"),
    }


def _bert_like(prefix: str) -> Tensors:
    layer = f"{prefix}encoder.layer.{{x}}."
    return {
        **_embeddings(f"{prefix}embeddings."),
        **attention(f"{layer}attention.", f"{_LAYER}/attention", "self.query", "self.key", "self.value", "output.dense"),
        **norm(f"{layer}attention.output.LayerNorm", f"{_LAYER}/attention_norm"),
        **linear(f"{layer}intermediate.dense", f"{_LAYER}/mlp/up", "F D"),
        **linear(f"{layer}output.dense", f"{_LAYER}/mlp/down", "D F"),
        **norm(f"{layer}output.LayerNorm", f"{_LAYER}/mlp_norm"),
    }


def _masked(dense: str, layer_norm: str, bias: str, table: str) -> Tensors:
    """A masked language model's head; `table` is the matrix over the vocabulary where it is not tied to the embeddings."""
    rows = {**linear(dense, "head/dense", "W D"), **norm(layer_norm, "head/norm", "W")}
    return {**rows, bias: {"head/bias": "V"}, table: {"head/table": "V W"}}


def _labels(out: str, dense: str | None = None) -> Tensors:
    rows = linear(out, "head/out", "C U")
    return {**rows, **linear(dense, "head/dense", "U D")} if dense else rows


def _masked_fields(activation: str | None) -> Json:
    """None: the activation of the model's MLPs."""
    return {"dense": True, "dense_bias": True, "activation": activation, "norm": True, "bias": True}


def _untyped(config: TransformerConfig) -> list[str]:
    """These families always have a table of token types."""
    return [] if config.token_types else ["token_types 0"]


def _positions(theirs: Json, names: Any) -> dict[str, Any]:
    return {"positions": theirs["max_position_embeddings"]}


def _same_dropout(config: TransformerConfig) -> dict[str, Any]:
    return {"max_position_embeddings": config.positions + config.position_offset, "attention_probs_dropout_prob": config.dropout}


# Devlin et al. 2019. The first checkpoints call the norms' parameters gamma and beta.
BERT = Family(
    name="bert",
    prefix="bert.",
    fixed=_POST_NORM,
    keys=_KEYS,
    activation="hidden_act",
    read=_positions,
    write=_same_dropout,
    require={"is_decoder": False, "position_embedding_type": "absolute"},
    cannot=_untyped,
    tensors=_bert_like("bert."),
    heads={
        "masked_lm": Head(
            "BertForMaskedLM", _masked_fields(None),
            _masked("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias",
                    "cls.predictions.decoder.weight"),
        ),
        "sequence": Head("BertForSequenceClassification", _CLS, _labels("classifier", "bert.pooler.dense")),
        "choice": Head("BertForMultipleChoice", _CLS, _labels("classifier", "bert.pooler.dense")),
        "token": Head("BertForTokenClassification", _PLAIN, _labels("classifier")),
        "span": Head("BertForQuestionAnswering", _PLAIN, _labels("qa_outputs")),
        "embedding": Head("BertModel", _MEAN, carried=(r"(^|\.)pooler\.",)),
    },
    ignored=(r"embeddings\.position_ids", r"cls\.predictions\.decoder\.", r"cls\.seq_relationship\.", r"pooler\."),
    copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
)  # fmt: skip

# Liu et al. 2019. Positions count from 2, behind that of the padding token.
ROBERTA = Family(
    name="roberta",
    prefix="roberta.",
    fixed={**_POST_NORM, "position_offset": 2},
    keys=_KEYS,
    activation="hidden_act",
    read=lambda theirs, names: {"positions": theirs["max_position_embeddings"] - 2},
    write=lambda config: {**_same_dropout(config), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    require={"is_decoder": False, "position_embedding_type": "absolute", "pad_token_id": 1},
    cannot=_untyped,
    tensors=_bert_like("roberta."),
    heads={
        "masked_lm": Head(
            "RobertaForMaskedLM",
            _masked_fields("gelu"),
            _masked("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder.weight"),
        ),
        "sequence": Head("RobertaForSequenceClassification", _CLS, _labels("classifier.out_proj", "classifier.dense")),
        "choice": Head("RobertaForMultipleChoice", _CLS, _labels("classifier", "roberta.pooler.dense")),
        "token": Head("RobertaForTokenClassification", _PLAIN, _labels("classifier")),
        "span": Head("RobertaForQuestionAnswering", _PLAIN, _labels("qa_outputs")),
        "embedding": Head("RobertaModel", _MEAN, carried=(r"(^|\.)pooler\.",)),
    },
    ignored=(r"embeddings\.position_ids", r"lm_head\.decoder\.", r"pooler\."),
    copies={"lm_head.decoder.bias": "lm_head.bias"},
)

# Conneau et al. 2020: RoBERTa on a hundred languages.
XLM_ROBERTA = dataclasses.replace(
    ROBERTA,
    name="xlm-roberta",
    heads={
        kind: dataclasses.replace(head, architecture=head.architecture.replace("Roberta", "XLMRoberta"))
        for kind, head in ROBERTA.heads.items()
    },
)

_DISTIL_LAYER = "distilbert.transformer.layer.{x}."

# Sanh et al. 2019.
DISTILBERT = Family(
    name="distilbert",
    prefix="distilbert.",
    fixed={**_POST_NORM, "norm_eps": 1e-12},
    keys={
        "vocab_size": "vocab_size", "positions": "max_position_embeddings", "layers": "n_layers", "width": "dim",
        "heads": "n_heads", "mlp_width": "hidden_dim", "init_std": "initializer_range", "dropout": "dropout",
        "tie_embeddings": "tie_word_embeddings",
    },
    activation="activation",
    write=lambda config: {"attention_dropout": config.dropout, "sinusoidal_pos_embds": False},
    tensors={
        **_embeddings("distilbert.embeddings."),
        **attention(f"{_DISTIL_LAYER}attention.", f"{_LAYER}/attention", "q_lin", "k_lin", "v_lin", "out_lin"),
        **norm(f"{_DISTIL_LAYER}sa_layer_norm", f"{_LAYER}/attention_norm"),
        **linear(f"{_DISTIL_LAYER}ffn.lin1", f"{_LAYER}/mlp/up", "F D"),
        **linear(f"{_DISTIL_LAYER}ffn.lin2", f"{_LAYER}/mlp/down", "D F"),
        **norm(f"{_DISTIL_LAYER}output_layer_norm", f"{_LAYER}/mlp_norm"),
    },
    heads={
        "masked_lm": Head("DistilBertForMaskedLM", _masked_fields(None),
                          _masked("vocab_transform", "vocab_layer_norm", "vocab_projector.bias", "vocab_projector.weight")),
        "sequence": Head("DistilBertForSequenceClassification", {**_CLS, "activation": "relu"},
                         _labels("classifier", "pre_classifier")),
        "choice": Head("DistilBertForMultipleChoice", {**_CLS, "activation": "relu"}, _labels("classifier", "pre_classifier")),
        "token": Head("DistilBertForTokenClassification", _PLAIN, _labels("classifier")),
        "span": Head("DistilBertForQuestionAnswering", _PLAIN, _labels("qa_outputs")),
        "embedding": Head("DistilBertModel", _MEAN),
    },
    ignored=(r"embeddings\.position_ids", r"vocab_projector\.weight"),
)  # fmt: skip

# Clark et al. 2020: a discriminator, and the generator that it was trained with.
ELECTRA = Family(
    name="electra",
    prefix="electra.",
    fixed=_POST_NORM,
    keys={**_KEYS, "embedding_width": "embedding_size"},
    activation="hidden_act",
    read=_positions,
    write=lambda config: {**_same_dropout(config), "embedding_size": config.W},
    require={"is_decoder": False, "position_embedding_type": "absolute"},
    cannot=_untyped,
    tensors={**_bert_like("electra."), **linear("electra.embeddings_project", f"{_STACK}/embed_project", "D W")},
    heads={
        "detection": Head(
            "ElectraForPreTraining", {**_masked_fields(None), "norm": False},
            _labels("discriminator_predictions.dense_prediction", "discriminator_predictions.dense"),
        ),
        "masked_lm": Head(
            "ElectraForMaskedLM", _masked_fields("gelu"),
            _masked("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias",
                    "generator_lm_head.weight"),
        ),
        "sequence": Head("ElectraForSequenceClassification", {**_CLS, "activation": "gelu"},
                         _labels("classifier.out_proj", "classifier.dense")),
        "token": Head("ElectraForTokenClassification", _PLAIN, _labels("classifier")),
        "span": Head("ElectraForQuestionAnswering", _PLAIN, _labels("qa_outputs")),
        "embedding": Head("ElectraModel", _MEAN),
    },
    ignored=(r"embeddings\.position_ids", r"generator_lm_head\.weight"),
)  # fmt: skip


def _read_albert(theirs: Json, names: Any) -> dict[str, Any]:
    if theirs["embedding_size"] == theirs["hidden_size"]:
        raise ValueError(
            f"an embedding_size (our embedding_width) of {theirs['embedding_size']}, that of the hidden states, which its class "
            "projects all the same: not supported"
        )
    return _positions(theirs, names)


_ALBERT_LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0."

# Lan et al. 2020: one block, used again and again.
ALBERT = Family(
    name="albert",
    prefix="albert.",
    fixed={**_POST_NORM, "share_layers": True},
    keys={**_KEYS, "embedding_width": "embedding_size"},
    activation="hidden_act",
    read=_read_albert,
    write=lambda config: {**_same_dropout(config), "embedding_size": config.W, "num_hidden_groups": 1, "inner_group_num": 1},
    require={"num_hidden_groups": 1, "inner_group_num": 1, "position_embedding_type": "absolute"},
    cannot=_untyped,
    tensors={
        **_embeddings("albert.embeddings."),
        **linear("albert.encoder.embedding_hidden_mapping_in", f"{_STACK}/embed_project", "D W"),
        **attention(f"{_ALBERT_LAYER}attention.", f"{_LAYER}/attention", "query", "key", "value", "dense"),
        **norm(f"{_ALBERT_LAYER}attention.LayerNorm", f"{_LAYER}/attention_norm"),
        **linear(f"{_ALBERT_LAYER}ffn", f"{_LAYER}/mlp/up", "F D"),
        **linear(f"{_ALBERT_LAYER}ffn_output", f"{_LAYER}/mlp/down", "D F"),
        **norm(f"{_ALBERT_LAYER}full_layer_layer_norm", f"{_LAYER}/mlp_norm"),
    },
    heads={
        "masked_lm": Head("AlbertForMaskedLM", _masked_fields(None),
                          _masked("predictions.dense", "predictions.LayerNorm", "predictions.bias", "predictions.decoder.weight")),
        "sequence": Head("AlbertForSequenceClassification", _CLS, _labels("classifier", "albert.pooler")),
        "choice": Head("AlbertForMultipleChoice", _CLS, _labels("classifier", "albert.pooler")),
        "token": Head("AlbertForTokenClassification", _PLAIN, _labels("classifier")),
        "span": Head("AlbertForQuestionAnswering", _PLAIN, _labels("qa_outputs")),
        "embedding": Head("AlbertModel", _MEAN, carried=(r"(^|\.)pooler\.",)),
    },
    ignored=(r"embeddings\.position_ids", r"predictions\.decoder\.", r"pooler\.", r"sop_classifier\."),
    copies={"predictions.decoder.bias": "predictions.bias"},
)  # fmt: skip


def _read_modernbert(theirs: Json, names: Any) -> dict[str, Any]:
    ropes = theirs.get("rope_parameters") or {}
    sliding = ropes.get("sliding_attention", {})
    if sliding.get("rope_type", "default") != "default":
        raise ValueError(
            f"modernbert config: rope_type {sliding['rope_type']!r} of sliding_attention is not supported: only 'default' is"
        )
    full = {"rope_theta": theirs.get("global_rope_theta", 160_000.0), **ropes.get("full_attention", {})}
    local = sliding.get("rope_theta") or theirs.get("local_rope_theta", 10_000.0)
    every = theirs.get("global_attn_every_n_layers", 3)
    pattern = "".join("L" if i % every else "G" for i in range(theirs["num_hidden_layers"]))
    return {
        **read_layers(theirs, pattern),
        "head.dense_bias": bool(theirs.get("classifier_bias", False)),
        "rope": {**read_rope({"rope_parameters": full})["rope"], "local_theta": local},
        "head.pool": {"cls": "first", "mean": "mean"}[theirs.get("classifier_pooling", "cls")],
    }


def _write_modernbert(config: TransformerConfig) -> dict[str, Any]:
    return {
        "attention_dropout": config.dropout, "embedding_dropout": config.dropout, "local_attention": config.window,
        "layer_types": write_layers(config), "classifier_pooling": "mean" if config.head.pool == "mean" else "cls",
        "classifier_bias": config.head.dense_bias, "decoder_bias": True, "classifier_activation": "gelu",
        "attention_bias": False, "mlp_bias": False,
        "norm_bias": False,
        "rope_parameters": {
            "full_attention": write_rope(config)["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope.local.theta},
        },
    }  # fmt: skip


_MODERN_LAYER = "model.layers.{x}."
_MODERN_HEAD: Json = {"dense": True, "activation": "gelu", "norm": True, "bias": True}
_MODERN_DENSE: Tensors = {**linear("head.dense", "head/dense", "U D"), **norm("head.norm", "head/norm")}
_MODERN_LABELS: Tensors = {**_MODERN_DENSE, **linear("classifier", "head/out", "C U")}

# Warner et al. 2024. The first block has no norm before its attention: the embeddings have been normalised.
MODERNBERT = Family(
    name="modernbert",
    prefix="model.",
    fixed={
        "architecture": "encoder", "norm": "layernorm", "norm_position": "pre", "position": "rotary", "embedding_norm": True,
        "bias": False, "first_norm": False, "activation": "geglu",
    },
    keys={
        "vocab_size": "vocab_size", "positions": "max_position_embeddings", "layers": "num_hidden_layers", "width": "hidden_size",
        "heads": "num_attention_heads", "mlp_width": "intermediate_size", "norm_eps": "norm_eps", "dropout": "mlp_dropout",
        "window": "local_attention", "init_std": "initializer_range", "tie_embeddings": "tie_word_embeddings",
    },
    activation="hidden_activation",
    read=_read_modernbert,
    write=_write_modernbert,
    require={
        "attention_bias": False, "mlp_bias": False, "norm_bias": False, "decoder_bias": True, "classifier_activation": "gelu",
    },
    tensors={
        **table("model.embeddings.tok_embeddings", "transformer/embed"),
        **norm("model.embeddings.norm", f"{_STACK}/embed_norm", "W"),
        **norm(f"{_MODERN_LAYER}attn_norm", f"{_LAYER}/attention_norm"),
        f"{_MODERN_LAYER}attn.Wqkv.weight": {
            f"{_LAYER}/attention/query/kernel": "(*N H) D", f"{_LAYER}/attention/key/kernel": "(*K H) D",
            f"{_LAYER}/attention/value/kernel": "(*K H) D",
        },
        **linear(f"{_MODERN_LAYER}attn.Wo", f"{_LAYER}/attention/out", "D (N H)"),
        **norm(f"{_MODERN_LAYER}mlp_norm", f"{_LAYER}/mlp_norm"),
        f"{_MODERN_LAYER}mlp.Wi.weight": {f"{_LAYER}/mlp/gate/kernel": "*F D", f"{_LAYER}/mlp/up/kernel": "*F D"},
        **linear(f"{_MODERN_LAYER}mlp.Wo", f"{_LAYER}/mlp/down", "D F"),
        **norm("model.final_norm", f"{_STACK}/final_norm"),
    },
    heads={
        "masked_lm": Head(
            "ModernBertForMaskedLM", _MODERN_HEAD,
            _masked("head.dense", "head.norm", "decoder.bias", "decoder.weight"),
        ),
        "sequence": Head("ModernBertForSequenceClassification", _MODERN_HEAD, _MODERN_LABELS),
        "choice": Head("ModernBertForMultipleChoice", _MODERN_HEAD, _MODERN_LABELS),
        "token": Head("ModernBertForTokenClassification", _MODERN_HEAD, _MODERN_LABELS),
        "span": Head("ModernBertForQuestionAnswering", _MODERN_HEAD, _MODERN_LABELS),
        "embedding": Head("ModernBertModel", {"dense": False}),
    },
    ignored=(r"decoder\.weight",),
    missing=(r"layers\.0\.attn_norm\.",),
)  # fmt: skip

ENCODERS = (BERT, ROBERTA, XLM_ROBERTA, DISTILBERT, ELECTRA, ALBERT, MODERNBERT)
