"""Sizes and choices of a Transformer, and the presets of published families.

A family is a preset of this one config, never a second implementation.
"""

import dataclasses
from typing import Any, ClassVar, Literal


def _gpt2(layers: int, width: int, heads: int) -> dict[str, Any]:
    """Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2 and §2.3."""
    return {
        "vocab_size": 50257, "positions": 1024, "layers": layers, "width": width, "heads": heads,
        "activation": "gelu_tanh", "norm": "layernorm", "norm_eps": 1e-5, "position": "learned",
        "bias": True, "tie_embeddings": True, "init": "residual_scaled", "init_std": 0.02,
    }  # fmt: skip


def _llama(
    layers: int, width: int, heads: int, kv_heads: int, mlp_width: int,
    vocab_size: int | None = None, positions: int = 2048, theta: float = 10_000.0, tied: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Touvron et al. 2023, "LLaMA", §2.2: pre-RMSNorm, SwiGLU, rotary. The papers do not state an
    initialisation; the released configs say a normal of 0.02 (`initializer_range`), used here."""
    return {
        "vocab_size": vocab_size, "positions": positions, "layers": layers, "width": width, "heads": heads,
        "kv_heads": kv_heads, "mlp_width": mlp_width, "activation": "swiglu", "norm": "rmsnorm",
        "norm_eps": 1e-5, "position": "rotary", "rope_theta": theta, "bias": False,
        "tie_embeddings": tied, "init": "normal", "init_std": 0.02,
    }  # fmt: skip


# The Llama 3 sizes follow Dubey et al. 2024, "The Llama 3 Herd of Models", table 3, and for 1B and 3B
# the released Llama 3.2 configs; those below 1B are ours, in the same proportions, vocabulary by the tokenizer.
_LLAMA3: dict[str, Any] = {"vocab_size": 128_256, "positions": 8192, "theta": 500_000.0}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """One description for every family."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
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
    }

    preset: str | None = None
    """Named sizes to start from; every option given beside it wins."""
    vocab_size: int | None = None
    """Entries of the vocabulary; empty: the tokenizer's, rounded up to vocab_multiple."""
    vocab_multiple: int = 64
    """What a vocabulary size taken from the tokenizer is rounded up to, for even splits and tiles."""
    positions: int = 1024
    """Longest context in tokens."""
    layers: int = 6
    """Number of blocks."""
    width: int = 384
    """Width of the residual stream."""
    heads: int = 6
    """Query heads."""
    kv_heads: int | None = None
    """Key/value heads: as many as heads (multi-head), fewer (grouped), 1 (multi-query); empty: heads."""
    head_width: int | None = None
    """Width of a head; empty: width / heads."""
    mlp_width: int | None = None
    """Inner width of the MLP; empty: 4 × width, or 8/3 × width rounded up to 64 for gated activations."""
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu", "geglu"] = "gelu_tanh"
    """Non-linearity of the MLP; swiglu and geglu gate it."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of normalisation."""
    norm_position: Literal["pre", "post"] = "pre"
    """Normalise the input of each sub-layer (pre) or the sum after it (post)."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    position: Literal["learned", "rotary", "none"] = "learned"
    """How a token knows its place."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    qk_norm: bool = False
    """RMS-normalise each query and key head."""
    bias: bool = True
    """Biases in linear layers and LayerNorms."""
    tie_embeddings: bool = True
    """The head uses the embedding matrix."""
    dropout: float = 0.0
    """Probability of dropping embeddings, attention weights and sub-layer outputs in training."""
    logit_softcap: float | None = None
    """Bound logits to ±cap by cap · tanh(logits / cap)."""
    init: Literal["residual_scaled", "normal"] = "residual_scaled"
    """normal: every matrix from N(0, init_std); residual_scaled: outputs into the residual stream divided by √(2·layers)."""
    init_std: float = 0.02
    """Standard deviation of the initial matrices."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; parameters are always float32."""
    unroll: bool = False
    """Unroll the layers instead of scanning them: slower to compile, faster to run on a CPU."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but the matrix products, everything."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "vocab_multiple",
            "positions",
            "layers",
            "width",
            "heads",
            "kv_heads",
            "head_width",
            "mlp_width",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if self.head_width is None and self.width % self.heads:
            fits = [n for n in range(1, self.width + 1) if self.width % n == 0]
            best = sorted(fits, key=lambda n: abs(n - self.heads))[:2]
            raise ValueError(
                f"heads {self.heads} does not divide width {self.width}: "
                f"heads {' or '.join(map(str, sorted(best)))} would, or give head_width"
            )
        if self.heads % self.K:
            fits = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}: allowed: {', '.join(map(str, fits))}")
        if self.position == "rotary" and self.H % 2:
            raise ValueError(f"rotary positions need an even head width, given {self.H}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: it must be at least 0 and below 1")
        for name in ("norm_eps", "init_std", "rope_theta", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}: it must be positive")

    # Sizes by their letter; D is the width itself, the others have defaults that depend on each other.
    @property
    def K(self) -> int:  # noqa: N802
        return self.kv_heads or self.heads

    @property
    def H(self) -> int:  # noqa: N802
        return self.head_width or self.width // self.heads

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "geglu")

    @property
    def F(self) -> int:  # noqa: N802
        if self.mlp_width:
            return self.mlp_width
        return -(-8 * self.width // 3 // 64) * 64 if self.gated else 4 * self.width

    @property
    def V(self) -> int:  # noqa: N802
        assert self.vocab_size is not None, "the experiment fills in the tokenizer's vocabulary size"
        return self.vocab_size

    def sizes(self) -> dict[str, int]:
        """Letter of the shape alphabet → size, for every axis of a parameter."""
        return {"D": self.width, "N": self.heads, "K": self.K, "H": self.H, "F": self.F, "V": self.V, "P": self.positions}

    def matmul_parameters(self) -> int:
        """Weights that every token is multiplied with: all matrices but the embedding look-ups."""
        attention = 2 * self.width * self.H * (self.heads + self.K)
        mlp = (3 if self.gated else 2) * self.width * self.F
        return self.layers * (attention + mlp) + self.width * self.V

    def train_flops_per_token(self, length: int) -> float:
        """FLOPs of forward and backward for one token in a row of `length` tokens.

        6 per matrix weight, and 12 · layers · N·H · length for the attention products, causal rows
        counted whole as is the custom (Chowdhery et al. 2022, "PaLM", appendix B).
        """
        return 6.0 * self.matmul_parameters() + 12.0 * self.layers * self.heads * self.H * length
