"""Text from anywhere → tokens → batches; rows of tasks → examples → batches."""

from jaxlm.data.cache import build_corpora, corpus_folder
from jaxlm.data.chat import DEFAULT_TEMPLATE, Chat, ChatRows, Message, check_messages, pack_chats
from jaxlm.data.corpus import Corpora, Corpus, DataConfig, HoldoutConfig, in_memory, xz_bits_per_byte
from jaxlm.data.corrupt import CorruptConfig, Corruption, make_corruption
from jaxlm.data.denoising import start_of
from jaxlm.data.detokenizer import StreamDecoder
from jaxlm.data.examples import Example, ExampleBatches, collate, in_order
from jaxlm.data.packing import Batch, Packed, Windows, best_fit_decreasing, stack
from jaxlm.data.pipeline import EvalBatches, Prefetch, State, StreamBatches, TrainBatches, eval_batches, prefetch, train_batches
from jaxlm.data.post_processor import framed, with_prefix_space
from jaxlm.data.rows import ColumnsConfig, Input, RowsConfig, Table, read_inputs, read_rows, split_rows
from jaxlm.data.sources import SourceConfig, describe, documents
from jaxlm.data.splits import HELD_OUT, TRAIN, UNSEEN, Splits, named_split
from jaxlm.data.text_encoding import Encoding, TextEncoder
from jaxlm.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer

__all__ = [
    "DEFAULT_TEMPLATE",
    "HELD_OUT",
    "TRAIN",
    "UNSEEN",
    "Batch",
    "Chat",
    "ChatRows",
    "ColumnsConfig",
    "Corpora",
    "Corpus",
    "CorruptConfig",
    "Corruption",
    "DataConfig",
    "Encoding",
    "EvalBatches",
    "Example",
    "ExampleBatches",
    "HoldoutConfig",
    "Input",
    "Message",
    "Packed",
    "Prefetch",
    "RowsConfig",
    "SourceConfig",
    "Splits",
    "State",
    "StreamBatches",
    "StreamDecoder",
    "Table",
    "TextEncoder",
    "Tokenizer",
    "TokenizerConfig",
    "TrainBatches",
    "Windows",
    "best_fit_decreasing",
    "build_corpora",
    "check_messages",
    "collate",
    "corpus_folder",
    "describe",
    "documents",
    "eval_batches",
    "framed",
    "in_memory",
    "in_order",
    "load_tokenizer",
    "make_corruption",
    "named_split",
    "pack_chats",
    "prefetch",
    "read_inputs",
    "read_rows",
    "split_rows",
    "stack",
    "start_of",
    "train_batches",
    "train_tokenizer",
    "with_prefix_space",
    "xz_bits_per_byte",
]
