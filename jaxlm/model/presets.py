"""Named sizes: the choices of published families, each with its paper. `TransformerConfig.PRESETS` is this table."""

from typing import Any

Preset = dict[str, Any]


def _gpt2(layers: int, width: int, heads: int) -> Preset:
    """Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2 and §2.3."""
    return {
        "vocab_size": 50257, "positions": 1024, "layers": layers, "width": width, "heads": heads,
        "activation": "gelu_tanh", "norm": "layernorm", "norm_eps": 1e-5, "position": "learned",
        "bias": True, "tie_embeddings": True, "init": "residual_scaled", "init_std": 0.02,
    }  # fmt: skip


def _llama(
    layers: int, width: int, heads: int, kv_heads: int, mlp_width: int,
    vocab_size: int | None = None, positions: int = 2048, theta: float = 10_000.0, tied: bool = True,
) -> Preset:  # fmt: skip
    """Touvron et al. 2023, "LLaMA", §2.2: pre-RMSNorm, SwiGLU, rotary. The papers do not state an
    initialisation; the released configs say a normal of 0.02 (`initializer_range`), used here."""
    return {
        "vocab_size": vocab_size, "positions": positions, "layers": layers, "width": width, "heads": heads,
        "kv_heads": kv_heads, "mlp_width": mlp_width, "activation": "swiglu", "norm": "rmsnorm",
        "norm_eps": 1e-5, "position": "rotary", "rope": {"theta": theta}, "bias": False,
        "tie_embeddings": tied, "init": "normal", "init_std": 0.02,
    }  # fmt: skip


# The Llama 3 sizes follow Dubey et al. 2024, "The Llama 3 Herd of Models", table 3, and for 1B and 3B the sizes of
# the released Llama 3.2 (without its context stretched to 131,072); those below 1B are ours, in the same proportions,
# vocabulary by the tokenizer.
_LLAMA3: Preset = {"vocab_size": 128_256, "positions": 8192, "theta": 500_000.0}


def _bert(layers: int, width: int, heads: int, vocab_size: int | None = 30_522) -> Preset:
    """Devlin et al. 2019, "BERT", §3 and appendix A.2: post-norm, GELU, normal of 0.02."""
    return {
        "architecture": "encoder", "vocab_size": vocab_size, "positions": 512, "layers": layers, "width": width, "heads": heads,
        "activation": "gelu", "norm": "layernorm", "norm_position": "post", "norm_eps": 1e-12, "position": "learned",
        "token_types": 2, "embedding_norm": True, "bias": True, "tie_embeddings": True, "init": "normal", "init_std": 0.02,
        "head": {"kind": "masked_lm", "activation": "gelu", "norm": True},
    }  # fmt: skip


def _roberta(layers: int, width: int, heads: int, vocab_size: int = 50_265) -> Preset:
    """Liu et al. 2019, "RoBERTa", and Conneau et al. 2020, "XLM-R": BERT without token types of its own, positions from 2."""
    return {**_bert(layers, width, heads, vocab_size), "token_types": 1, "position_offset": 2, "norm_eps": 1e-5}


def _t5(layers: int, width: int, heads: int, mlp_width: int, head_width: int = 64) -> Preset:
    """Raffel et al. 2020, "T5", §2.1; v1.1 of the released checkpoints (gated GELU, untied head). Their
    initialisation scales each matrix by its fan-in; here a normal of 0.02, and no scaling of the attention
    scores, as theirs."""
    return {
        "architecture": "encoder_decoder", "vocab_size": 32_128, "positions": 512, "layers": layers, "width": width, "heads": heads,
        "head_width": head_width, "mlp_width": mlp_width, "activation": "geglu_tanh", "norm": "rmsnorm", "norm_eps": 1e-6,
        "position": "relative", "attention_scale": 1.0, "bias": False, "tie_embeddings": False,
        "init": "normal", "init_std": 0.02,
    }  # fmt: skip


PRESETS: dict[str, Preset] = {
    "gpt2-small": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "llama-1m": _llama(4, 128, 4, 4, 384),
    "llama-3m": _llama(6, 192, 6, 6, 512),
    "llama-10m": _llama(8, 320, 5, 5, 896),
    "llama-30m": _llama(10, 512, 8, 8, 1408),
    "llama-100m": _llama(12, 768, 12, 12, 2048),
    "llama-300m": _llama(24, 1024, 16, 16, 2816),
    "llama-1b": _llama(16, 2048, 32, 8, 8192, **_LLAMA3),
    "llama-3b": _llama(28, 3072, 24, 8, 8192, **_LLAMA3),
    "llama-8b": _llama(32, 4096, 32, 8, 14_336, **_LLAMA3, tied=False),
    "llama-70b": _llama(80, 8192, 64, 8, 28_672, **_LLAMA3, tied=False),
    # The miniatures of Turc et al. 2019, "Well-Read Students Learn Better", table 1, and BERT's two sizes.
    "bert-tiny": _bert(2, 128, 2),
    "bert-mini": _bert(4, 256, 4),
    "bert-small": _bert(4, 512, 8),
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    "roberta-base": _roberta(12, 768, 12),
    "roberta-large": _roberta(24, 1024, 16),
    "xlm-roberta-base": _roberta(12, 768, 12, 250_002),
    "t5-v1.1-small": _t5(8, 512, 6, 1024),
    "t5-v1.1-base": _t5(12, 768, 12, 2048),
    "t5-v1.1-large": _t5(24, 1024, 16, 2816),
    "t5-v1.1-xl": _t5(24, 2048, 32, 5120),
}
