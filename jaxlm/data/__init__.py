"""Text from anywhere → tokens → batches."""

from jaxlm.data.cache import build_corpora, corpus_folder
from jaxlm.data.corpus import Corpora, Corpus, DataConfig, HoldoutConfig, in_memory, xz_bits_per_byte
from jaxlm.data.corrupt import CorruptConfig, Corruption, make_corruption
from jaxlm.data.packing import Batch, Packed, Windows, best_fit_decreasing, stack
from jaxlm.data.pipeline import EvalBatches, Prefetch, State, StreamBatches, TrainBatches, eval_batches, prefetch, train_batches
from jaxlm.data.sources import SourceConfig, describe, documents
from jaxlm.data.tokenizer import StreamDecoder, Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer

__all__ = [
    "Batch",
    "Corpora",
    "Corpus",
    "CorruptConfig",
    "Corruption",
    "DataConfig",
    "EvalBatches",
    "HoldoutConfig",
    "Packed",
    "Prefetch",
    "SourceConfig",
    "State",
    "StreamBatches",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerConfig",
    "TrainBatches",
    "Windows",
    "best_fit_decreasing",
    "build_corpora",
    "corpus_folder",
    "describe",
    "documents",
    "eval_batches",
    "in_memory",
    "load_tokenizer",
    "make_corruption",
    "prefetch",
    "stack",
    "train_batches",
    "train_tokenizer",
    "xz_bits_per_byte",
]
