"""Small random torch models of every family, to compare with: built by `transformers`, no part of what runs."""

import numpy as np

BASE = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40,
        "max_position_embeddings": 32, "initializer_range": 0.05}  # fmt: skip
GROUPED = {**BASE, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {**GROUPED, "head_dim": 8}
T5 = {"vocab_size": 61, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
      "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "dropout_rate": 0.0,
      "decoder_start_token_id": 0}  # fmt: skip
BART = {"vocab_size": 61, "d_model": 24, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32, "dropout": 0.0,
        "scale_embedding": True}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip

# Name of the case → class of transformers, config. Windows and caps are small enough to bite.
CASES = {
    "bert": ("BertForMaskedLM", {**BASE, **NO_DROPOUT}),
    "bert-relu": ("BertForMaskedLM", {**BASE, **NO_DROPOUT, "hidden_act": "relu"}),
    "roberta": ("RobertaForMaskedLM", {**BASE, **NO_DROPOUT, "max_position_embeddings": 34, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", {**BASE, **NO_DROPOUT, "max_position_embeddings": 34, "type_vocab_size": 1}),
    "distilbert": ("DistilBertForMaskedLM", {"vocab_size": 61, "dim": 24, "n_layers": 3, "n_heads": 4, "hidden_dim": 40,
                   "max_position_embeddings": 32, "dropout": 0.0, "attention_dropout": 0.0}),
    "distilbert-relu": ("DistilBertForMaskedLM", {"vocab_size": 61, "dim": 24, "n_layers": 1, "n_heads": 4, "hidden_dim": 40,
                        "max_position_embeddings": 32, "dropout": 0.0, "attention_dropout": 0.0, "activation": "relu"}),
    "modernbert": ("ModernBertForMaskedLM", {**BASE, "num_hidden_layers": 5, "local_attention": 8, "pad_token_id": 0,
                   "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}),
    # Layers that see a window keep their own base, unscaled.
    "modernbert-yarn": ("ModernBertForMaskedLM", {**BASE, "num_hidden_layers": 5, "local_attention": 8, "pad_token_id": 0,
                        "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "rope_parameters": {
                            "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 5e3}}}),
    # The generator's head is GELU whatever the blocks are; the discriminator's is as they are.
    "electra": ("ElectraForMaskedLM", {**BASE, **NO_DROPOUT, "embedding_size": 16, "hidden_act": "relu"}),
    "albert": ("AlbertForMaskedLM", {**BASE, **NO_DROPOUT, "embedding_size": 16}),
    "albert-gelu": ("AlbertForMaskedLM", {**BASE, **NO_DROPOUT, "embedding_size": 16, "hidden_act": "gelu"}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 61, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 4, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt_neox": ("GPTNeoXForCausalLM", {**BASE, "rotary_pct": 0.67}),
    "gpt_neox-serial": ("GPTNeoXForCausalLM", {**BASE, "use_parallel_residual": False, "rotary_pct": 1.0,
                        "hidden_act": "gelu_new"}),
    "llama": ("LlamaForCausalLM", GROUPED),
    "llama-linear": ("LlamaForCausalLM", {**GROUPED, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-llama3": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama-yarn": ("LlamaForCausalLM", {**GROUPED, "rope_parameters": YARN}),
    "llama-dynamic": ("LlamaForCausalLM", {**GROUPED, "max_position_embeddings": 8,
                      "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("MistralForCausalLM", {**WIDE, "sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", {**GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", WIDE),
    "gemma2": ("Gemma2ForCausalLM", {**WIDE, "sliding_window": 4, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0}),
    "olmo2": ("Olmo2ForCausalLM", GROUPED),
    "phi3": ("Phi3ForCausalLM", {**GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
             "partial_rotary_factor": 0.67}}),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-v1.1": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("MT5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
    "bart": ("BartForConditionalGeneration", BART),
    "marian": ("MarianMTModel", {**BART, "pad_token_id": 60, "decoder_start_token_id": 60, "eos_token_id": 0,
               "activation_function": "swish"}),
}  # fmt: skip


def make(architecture: str, options: dict, **more):
    """A torch model with every parameter moved, so that no norm is one and no bias zero."""
    import torch
    import transformers

    cls = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = cls(cls.config_class(**options, **more))
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if architecture.startswith("Marian") and "embed_positions" in name:
                continue  # sinusoids, in no file
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name == "final_logits_bias":
                buffer.add_(torch.randn(buffer.shape, generator=generator))
    return model.eval()


def ragged(seed: int, lengths: list[int], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids in rows of these lengths, padded on the right, and their segments; special ids are kept out."""
    rng = np.random.default_rng(seed)
    ids, segments = np.full((len(lengths), max(lengths)), pad, np.int32), np.zeros((len(lengths), max(lengths)), np.int32)
    for row, length in enumerate(lengths):
        ids[row, :length] = rng.integers(3, 60, length)
        segments[row, :length] = 1
    return ids, segments
