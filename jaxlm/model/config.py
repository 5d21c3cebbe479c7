"""Sizes and choices of a Transformer.

One `TransformerConfig` describes every family: a family is a preset of it (`presets.py`), never a second
implementation.
"""

import dataclasses
from typing import Any, ClassVar, Literal

from jaxlm.model.precision import Quantize
from jaxlm.model.presets import PRESETS


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
    """Rotary positions (Su et al. 2021, "RoFormer") and how they are stretched over longer contexts."""

    theta: float = 10_000.0
    """Base of the frequencies."""
    local_theta: float | None = None
    """Base in layers that see a window only, whose positions are then never scaled (as in Gemma 3 and ModernBERT); empty:
    these layers have the angles of all others."""
    fraction: float = 1.0
    """Share of each head's width that is turned."""
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn"] = "none"
    """How contexts beyond original_positions are reached."""
    factor: float = 1.0
    """How much longer the context becomes."""
    original_positions: int | None = None
    """Context before stretching; empty: positions."""
    low_frequency: float = 1.0
    """llama3: waves longer than original_positions / this are stretched whole."""
    high_frequency: float = 4.0
    """llama3: waves shorter than original_positions / this are left alone."""
    beta_fast: float = 32.0
    """yarn: waves that turn more often than this over original_positions are left alone."""
    beta_slow: float = 1.0
    """yarn: waves that turn less often than this are stretched whole."""
    magnitude: float | None = None
    """yarn: what cos and sin are multiplied with; empty: 0.1 · ln(factor) + 1."""

    def __post_init__(self) -> None:
        for name in ("theta", "local_theta", "factor", "original_positions", "magnitude", "low_frequency", "beta_slow"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}: it must be positive")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}: it must be above 0 and at most 1")
        for low, high in (("low_frequency", "high_frequency"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low)} must be below {high} {getattr(self, high)}")

    @property
    def local(self) -> "RotaryConfig":
        """Rotary positions of layers that see a window only."""
        if self.local_theta is None:
            return self
        return dataclasses.replace(self, theta=self.local_theta, local_theta=None, scaling="none")


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Mixture of experts in place of each MLP (Shazeer et al. 2017; Fedus et al. 2022; Jiang et al. 2024, "Mixtral")."""

    experts: int = 0
    """Number of experts; 0: a plain MLP."""
    chosen: int = 2
    """Experts that each token goes to."""
    shared: int = 0
    """Experts that every token goes to, beside the chosen ones (Dai et al. 2024, "DeepSeekMoE")."""
    normalize: bool = True
    """The weights of the chosen experts sum to 1."""
    balance_loss: float = 0.01
    """Weight of the load-balance loss (Fedus et al. 2022, "Switch Transformers", eq. 4), added to every objective."""
    router_z_loss: float = 0.0
    """Weight of the router's z-loss (Zoph et al. 2022, "ST-MoE", eq. 5)."""

    def __post_init__(self) -> None:
        if self.experts < 0 or self.shared < 0 or self.balance_loss < 0 or self.router_z_loss < 0:
            raise ValueError("experts, shared, balance_loss and router_z_loss must not be negative")
        if self.experts and not 1 <= self.chosen <= self.experts:
            raise ValueError(f"chosen is {self.chosen}: it must lie between 1 and experts, {self.experts}")


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """What stands on the hidden states."""

    kind: Literal["language_model", "masked_lm", "sequence", "token", "span", "choice", "embedding", "detection"] = "language_model"
    """language_model and masked_lm score the vocabulary; sequence, token and choice labels; span the begin and the
    end of an answer; embedding gives a vector a text; detection tells replaced tokens."""
    labels: int = 2
    """Classes of a sequence or token head; 1: a regression."""
    pool: Literal["first", "mean", "last"] = "first"
    """Which hidden state stands for a text: that of its first token, their mean, that of its last token."""
    dense: bool = True
    """A dense layer before the output of a masked_lm, sequence, choice, detection or embedding head."""
    dense_bias: bool = True
    """That layer has a bias."""
    activation: str = "tanh"
    """Its non-linearity: any of the MLP's that do not gate, or tanh."""
    norm: bool = False
    """A norm after it."""
    bias: bool = True
    """The output has a bias."""
    pair: bool = False
    """A masked_lm also tells whether the second text of a pair follows the first."""

    def __post_init__(self) -> None:
        if self.labels < 1:
            raise ValueError(f"labels is {self.labels}: it must be at least 1")
        if self.pair and self.kind != "masked_lm":
            raise ValueError(f"pair belongs to a masked_lm head: this is {self.kind}")


Activation = Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu", "geglu_tanh"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """One description for every family."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    preset: str | None = None
    """Named sizes to start from; every option given beside it wins."""
    architecture: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
    """decoder: each token sees those before it; encoder: all of its text; encoder_decoder: a decoder that also sees
    an encoder's text."""
    vocab_size: int | None = None
    """Entries of the vocabulary; empty: the tokenizer's, rounded up to vocab_multiple."""
    vocab_multiple: int = 64
    """What a vocabulary size taken from the tokenizer is rounded up to, for even splits and tiles."""
    token_types: int = 0
    """Kinds of token (first and second text of a pair), each with a vector added to the embedding."""
    positions: int = 1024
    """Longest context in tokens."""
    layers: int = 6
    """Number of blocks, of the encoder where there are two stacks."""
    decoder_layers: int | None = None
    """Number of blocks of an encoder_decoder's decoder; empty: layers."""
    share_layers: bool = False
    """All blocks of a stack have the same parameters (Lan et al. 2020, "ALBERT")."""
    width: int = 384
    """Width of the residual stream."""
    embedding_width: int | None = None
    """Width of the token embeddings, projected to width where it differs; empty: width."""
    embedding_norm: bool = False
    """Normalise the embeddings."""
    embedding_scale: bool = False
    """Multiply the token embeddings with √width (Vaswani et al. 2017, §3.4)."""
    heads: int = 6
    """Query heads."""
    kv_heads: int | None = None
    """Key/value heads: as many as heads (multi-head), fewer (grouped), 1 (multi-query); empty: heads."""
    head_width: int | None = None
    """Width of a head; empty: width / heads."""
    mlp_width: int | None = None
    """Inner width of the MLP, or of an expert; empty: 4 × width, or 8/3 × width rounded up to 64 for gated activations."""
    activation: Activation = "gelu_tanh"
    """Non-linearity of the MLP; swiglu, geglu and geglu_tanh gate it."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of normalisation."""
    norm_position: Literal["pre", "post", "both", "output"] = "pre"
    """Normalise the input of each sub-layer (pre), the sum after it (post), its input and its output (both), its
    output alone (output)."""
    norm_offset: bool = False
    """The norms' scales are stored less 1 (Gemma)."""
    first_norm: bool = True
    """The first block normalises the input of its attention; false: the embeddings' norm has done so (ModernBERT)."""
    parallel: bool = False
    """Attention and MLP read the same residual stream and are added together (Wang and Komatsuzaki 2021, "GPT-J")."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    position: Literal["learned", "rotary", "sinusoidal", "relative", "alibi", "none"] = "learned"
    """How a token knows its place; relative: T5's buckets; alibi: a slope a head (Press et al. 2022)."""
    position_offset: int = 0
    """Rows of the table of learned positions before that of the first token (RoBERTa, BART: 2)."""
    relative_buckets: int = 32
    """Buckets of relative positions (Raffel et al. 2020, "T5", §2.1)."""
    relative_distance: int = 128
    """Distance from which on all relative positions share a bucket."""
    rope: RotaryConfig = RotaryConfig()
    layer_pattern: str = "G"
    """Kinds of layer in order, repeated: G sees the whole context, L a window of it."""
    window: int = 1024
    """Tokens that an L layer sees: each token and those before it, or half of them on either side in an encoder."""
    qk_norm: Literal["none", "heads", "whole"] = "none"
    """RMS-normalise queries and keys: each head by itself, or all heads as one vector (OLMo 2)."""
    attention_scale: float | None = None
    """What query · key is multiplied with; empty: 1/√head_width."""
    attention_softcap: float | None = None
    """Bound attention scores to ±cap by cap · tanh(score / cap)."""
    kernel: Literal["auto", "xla", "chunked", "cudnn", "splash"] = "auto"
    """What computes attention; auto: the fastest that this platform and these shapes allow."""
    context: Literal["auto", "ring", "ulysses", "gather"] = "auto"
    """How devices that share a row's length (parallel.context) attend: keys and values go round them (ring), each takes
    some heads of the whole length (ulysses), or each gets all keys and values (gather). auto: the first that can."""
    bias: bool = True
    """Biases in linear layers and LayerNorms."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values; empty: as bias."""
    tie_embeddings: bool = True
    """The head uses the embedding matrix."""
    dropout: float = 0.0
    """Probability of dropping embeddings, attention weights and sub-layer outputs in training."""
    logit_scale: bool = False
    """Multiply the last hidden states with 1/√width before the head (T5 v1.0)."""
    logit_bias: bool = False
    """The language-model head has a bias (BART, Marian)."""
    logit_softcap: float | None = None
    """Bound logits to ±cap by cap · tanh(logits / cap)."""
    head: HeadConfig = HeadConfig()
    moe: MoeConfig = MoeConfig()
    init: Literal["residual_scaled", "normal"] = "residual_scaled"
    """normal: every matrix from N(0, init_std); residual_scaled: outputs into the residual stream divided by √(2·layers)."""
    init_std: float = 0.02
    """Standard deviation of the initial matrices."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision that parameters are held in. bfloat16: a step changes them in float32, where moments and averages stay, and
    rounds them at random (`precision.stochastic`), as rounding to nearest would lose small steps."""
    quantize: Quantize = "none"
    """Multiply the maps of attention and MLPs, forward and backward, in int8 or fp8, by way of qwix; not those of embeddings,
    heads and norms. Parameters stay as they are."""
    cache: Literal["same", "int8"] = "same"
    """How generation holds the keys and values of what it has seen: as they are computed, or in int8 with a scale for each
    head and place, which takes about half of bfloat16's bytes."""
    unroll: bool = False
    """Unroll the layers instead of scanning them: slower to compile, faster to run on a CPU."""
    microbatches: int | None = None
    """Parts of a batch that go through the stages (parallel.stage) one behind the other. Their number times that of the devices
    that share a batch (data × fsdp × expert) divides data.batch_size / train.accumulate. Empty: as many as stages. The more,
    the less of the time stages idle: (stages − 1) / (microbatches · rounds + stages − 1) of it."""
    rounds: int = 1
    """How often a part of the batch goes through all stages, each of which then holds as many runs of layers."""
    remat: Literal["none", "dots", "attention", "offload", "full"] = "none"
    """What the backward pass recomputes: nothing; all but the matrix products; all but what attention gives, kept on the
    device or, by offload, in the host's memory; everything."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "vocab_multiple", "positions", "layers", "decoder_layers", "width", "embedding_width", "heads",
            "kv_heads", "head_width", "mlp_width", "window", "relative_distance", "microbatches", "rounds",
        ):  # fmt: skip
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
        if self.position == "rotary" and self.rotary_width % 2:
            raise ValueError(f"rotary positions need an even width, given {self.rotary_width} (head width × rope.fraction)")
        if self.position == "rotary" and self.rope.scaling == "dynamic" and self.rotary_width < 4:
            raise ValueError(f"dynamic scaling needs a rotary width of at least 4, given {self.rotary_width}")
        if self.position == "sinusoidal" and self.width % 2:
            raise ValueError(f"sinusoidal positions need an even width, given {self.width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: it must be at least 0 and below 1")
        for name in ("norm_eps", "init_std", "logit_softcap", "attention_scale", "attention_softcap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}: it must be positive")
        if self.relative_buckets < 4 or self.relative_buckets % 2:
            raise ValueError(f"relative_buckets is {self.relative_buckets}: it must be even and at least 4")
        if not self.layer_pattern or set(self.layer_pattern) - {"G", "L"}:
            raise ValueError(f"layer_pattern is {self.layer_pattern!r}: it is made of G (whole context) and L (window)")
        if self.token_types < 0 or self.position_offset < 0:
            raise ValueError("token_types and position_offset must not be negative")
        if self.architecture != "encoder_decoder" and self.decoder_layers is not None:
            raise ValueError(
                f"decoder_layers {self.decoder_layers} belongs to architecture encoder_decoder: this is {self.architecture}"
            )
        if self.architecture == "encoder" and self.head.kind == "language_model":
            raise ValueError("head.kind language_model needs a decoder: an encoder takes masked_lm, or a head over labels")
        if self.param_dtype != "float32" and self.share_layers:
            raise ValueError(f"share_layers sums the gradients of all layers in param_dtype {self.param_dtype}: give float32")
        if self.factored and (self.head.kind == "language_model" or (self.head.kind == "masked_lm" and not self.head.dense)):
            raise ValueError(
                f"embedding_width {self.embedding_width} differs from width {self.width}: of the heads over the vocabulary only a "
                f"masked_lm one with head.dense leads from width to it, not {self.head.kind}"
            )
        if self.quantize != "none" and self.moe.experts:
            raise ValueError(
                f"quantize {self.quantize} multiplies attention and plain MLPs: with moe.experts {self.moe.experts} give none"
            )
        if self.parallel and self.norm_position != "pre":
            raise ValueError(f"parallel attention and MLP need norm_position pre, given {self.norm_position}")

    # Sizes by their letter; D is the width itself, the others have defaults that depend on each other.
    @property
    def K(self) -> int:  # noqa: N802
        return self.kv_heads or self.heads

    @property
    def H(self) -> int:  # noqa: N802
        return self.head_width or self.width // self.heads

    @property
    def rotary_width(self) -> int:
        """How much of each head is turned."""
        return int(self.H * self.rope.fraction)

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "geglu", "geglu_tanh")

    @property
    def F(self) -> int:  # noqa: N802
        if self.mlp_width:
            return self.mlp_width
        return -(-8 * self.width // 3 // 64) * 64 if self.gated else 4 * self.width

    @property
    def V(self) -> int:  # noqa: N802
        assert self.vocab_size is not None, "the experiment fills in the tokenizer's vocabulary size"
        return self.vocab_size

    @property
    def W(self) -> int:  # noqa: N802
        return self.embedding_width or self.width

    @property
    def factored(self) -> bool:
        """Token embeddings have a width of their own."""
        return self.width != self.W

    @property
    def stacks(self) -> dict[str, int]:
        """Name of each stack → its number of blocks."""
        if self.architecture == "encoder_decoder":
            return {"encoder": self.layers, "decoder": self.decoder_layers or self.layers}
        return {self.architecture: self.layers}

    def local(self, layers: int) -> list[bool]:
        """Of each of `layers` blocks, whether it sees a window only."""
        return [self.layer_pattern[i % len(self.layer_pattern)] == "L" for i in range(layers)]

    def sizes(self) -> dict[str, int]:
        """Letter of the shape alphabet → size, for every axis of a parameter."""
        return {
            "D": self.width, "N": self.heads, "K": self.K, "H": self.H, "F": self.F, "V": self.V, "W": self.W,
            "P": self.positions + self.position_offset, "T": self.token_types, "R": self.relative_buckets,
            "E": self.moe.experts, "C": self.outputs, "U": self.width,
        }  # fmt: skip

    @property
    def outputs(self) -> int:
        """Numbers that a head over labels gives."""
        return {"span": 2, "choice": 1, "detection": 1}.get(self.head.kind, self.head.labels)

    def matmul_parameters(self) -> int:
        """Weights that every token is multiplied with: all matrices but the embedding look-ups; of experts the chosen."""
        attention = 2 * self.width * self.H * (self.heads + self.K)
        mlp = (3 if self.gated else 2) * self.width * self.F
        if self.moe.experts:
            mlp = mlp * (self.moe.chosen + self.moe.shared) + self.width * self.moe.experts
        blocks = sum(self.stacks.values()) * (attention + mlp)
        if self.architecture == "encoder_decoder":
            blocks += self.stacks["decoder"] * attention
        factored = self.width * self.W if self.factored else 0
        scored = self.W * self.V if self.head.kind in ("language_model", "masked_lm") else 0
        dense = self.width * self.W if self.head.kind == "masked_lm" and self.head.dense else 0
        return blocks + factored + dense + scored

    def train_flops_per_token(self, length: int) -> float:
        """FLOPs of forward and backward for one token in a row of `length` tokens.

        6 per matrix weight, and 12 · layers · N·H · length for the attention products, causal rows
        counted whole as is the custom (Chowdhery et al. 2022, "PaLM", appendix B); a window counts as its length.
        Of an encoder-decoder a token of each stack, both of this length.
        """
        seen = 0
        for name, layers in self.stacks.items():
            seen += sum(min(length, self.window) if local else length for local in self.local(layers))
            seen += layers * length if self.architecture == "encoder_decoder" and name == "decoder" else 0
        return 6.0 * self.matmul_parameters() + 12.0 * seen * self.heads * self.H
