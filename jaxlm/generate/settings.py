"""A model's own settings for writing text (Hugging Face's `generation_config.json`) as defaults of ours."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from jaxlm.generate.batch import DecodeConfig
from jaxlm.generate.processors import LogitsRules
from jaxlm.generate.request import BAD, BAD_LENGTH
from jaxlm.generate.sample import SampleConfig
from jaxlm.hub import GENERATION

# What changes the text in transformers and is not read here, with the values that say nothing.
_UNREAD: Mapping[str, tuple[Any, ...]] = {
    "assistant_early_exit": (), "constraints": (), "diversity_penalty": (0.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,),
    "force_words_ids": (), "forced_decoder_ids": (), "guidance_scale": (1, 1.0), "num_beam_groups": (1,), "penalty_alpha": (0.0,),
    "dola_layers": (), "max_time": (), "num_return_sequences": (1,), "token_healing": (False,), "top_h": (),
    "watermarking_config": (),
}  # fmt: skip
# Settings of transformers that leave the text as it is, or that others here read. Any other name in the file is reported.
_SILENT = frozenset((
    "_commit_hash", "_from_model_config", "assistant_confidence_threshold", "assistant_ensemble_weight", "assistant_lookbehind",
    "bos_token_id", "cache_config", "cache_implementation", "compile_config", "continuous_batching_config",
    "decoder_start_token_id", "disable_compile", "eos_token_id", "is_assistant", "low_memory", "max_cache_len",
    "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "output_attentions",
    "output_hidden_states", "output_logits", "output_scores", "pad_token_id", "prefill_chunk_size", "prompt_lookup_num_tokens",
    "remove_invalid_values", "return_dict_in_generate", "speculation_type", "target_lookbehind", "transformers_version",
    "use_cache", "use_mtp",
))  # fmt: skip
BEAMS = ("num_beams", "length_penalty", "early_stopping", "renormalize_logits")
"""Settings of beams, without effect on texts of one beam."""
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
TOP_K = 50
"""Of transformers, where a model asks for sampling and names no other."""


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Defaults for writing text. Empty where the model has none."""

    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The settings that apply, by the file's names."""
    unread: tuple[str, ...] = ()
    """Settings of the file that jaxlm does not have."""
    where: str = GENERATION

    @classmethod
    def read(cls, given: Mapping[str, Any], where: str = GENERATION) -> "GenerationSettings":
        """The settings of a `generation_config.json`, nulls left out. ValueError, in one line, for a value of the wrong kind."""
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name in _READERS:
                try:
                    values[name] = _READERS[name](value)
                except (TypeError, ValueError, OverflowError):
                    raise ValueError(f"{where}: {name} is {value!r:.60}, which is not what transformers reads there") from None
        values = {name: value for name, value in values.items() if not _neutral(name, value)}
        if values.get("do_sample") and "top_k" not in given:
            values["top_k"] = TOP_K
        if values.get("top_k") == 0:  # off
            del values["top_k"]
        if values.get("do_sample") is False:
            values = {name: value for name, value in values.items() if name not in _SAMPLING}
        if "max_new_tokens" in values:
            values.pop("max_length", None)
        if "min_new_tokens" in values:
            values.pop("min_length", None)
        unread = tuple(name for name, neutral in _UNREAD.items() if name in given and given[name] not in neutral)
        if where == GENERATION:  # a config.json also says what the model is
            unread += tuple(name for name in given if name not in SETTINGS and name not in _SILENT)
        return cls(values, unread, where)

    def temperature(self, encoder_decoder: bool) -> float:
        """Sampling temperature; 0 where the likeliest text is searched for. The default is 0 for an encoder-decoder and for beams,
        else 0.8."""
        sampled = self.values.get("do_sample")
        if sampled:
            return self.values.get("temperature", 1.0)
        if sampled is False or encoder_decoder or self.values.get("num_beams", 1) > 1:
            return 0.0
        return self.values.get("temperature", SampleConfig().temperature)

    def sampling(self, flags: Mapping[str, Any], encoder_decoder: bool = False) -> SampleConfig:
        """How tokens are drawn: `flags` (names of `SampleConfig`, None: not given) over the settings."""
        own = {name: self.values[name] for name in (*_SAMPLING[1:], "repetition_penalty") if name in self.values}
        own["temperature"] = self.temperature(encoder_decoder)
        return self._built(SampleConfig, own, flags)

    def decode(self, flags: Mapping[str, Any]) -> DecodeConfig:
        """How the most likely text is searched for: `flags` (names of `DecodeConfig`, None: not given) over the settings, which say
        nothing of `max_tokens`: see `room`."""
        own = {ours: self.values[theirs] for theirs, ours in _DECODE.items() if theirs in self.values}
        return self._built(DecodeConfig, own, flags)

    def _built(self, kind: Any, own: dict[str, Any], flags: Mapping[str, Any]) -> Any:
        try:
            kind(**own)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None
        return kind(**own | {name: value for name, value in flags.items() if value is not None})

    def alone(self) -> "GenerationSettings":
        """The constraints on tokens alone: what a run keeps of the model that it started from, as its own config says the rest."""
        lengths = ("min_length", "min_new_tokens")
        names = {field.name for field in dataclasses.fields(LogitsRules) if field.name not in (*lengths, *_DECODE)}
        return dataclasses.replace(self, values={name: value for name, value in self.values.items() if name in names})

    def searched(self, config: DecodeConfig) -> dict[str, Any]:
        """A `generation_config.json` by which texts are searched for as `config` says, under these constraints on tokens alone."""
        given = {theirs: getattr(config, ours) for theirs, ours in _DECODE.items() if theirs != "early_stopping"}
        early: Any = {"true": True, "false": False}.get(config.early_stopping, config.early_stopping)
        return {**self.alone().values, **given, "early_stopping": early, "max_new_tokens": config.max_tokens, "do_sample": False}

    def rules(self) -> LogitsRules:
        """Constraints on single tokens; those that `DecodeConfig` has too are left to it."""
        names = [field.name for field in dataclasses.fields(LogitsRules) if field.name not in _DECODE]
        return LogitsRules(**{name: self.values[name] for name in names if name in self.values})

    def for_requests(self, stop: Collection[int]) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
        """What an engine's requests can hold of the constraints: sequences that must not occur, and the names of the settings that
        are left out. Least lengths are `least`."""
        rules = self.rules()
        banned: tuple[tuple[int, ...], ...] = tuple((token,) for token in rules.suppress_tokens)
        banned += tuple(word for word in rules.bad_words_ids if len(word) > 1 or word[0] not in stop)
        fits = len(banned) <= BAD and all(len(word) <= BAD_LENGTH for word in banned)
        held = {"min_length", "min_new_tokens", "renormalize_logits", *(("bad_words_ids", "suppress_tokens") if fits else ())}
        every = (field.name for field in dataclasses.fields(LogitsRules))
        left = tuple(name for name in every if name in self.values and name not in held)
        return banned if fits else (), (*left, *(name for name in BEAMS if name in self.values))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings of which each ends a text that it occurs in."""
        return self.values.get("stop_strings", ())

    def least(self, prompt: int) -> int:
        """Least new tokens behind `prompt` tokens of the decoder's."""
        return self.values.get("min_new_tokens", max(0, self.values.get("min_length", 0) - prompt))

    def room(self, prompt: int, default: int) -> int:
        """Most new tokens behind `prompt` tokens of the decoder's (an encoder-decoder begins with 1), at least 1."""
        if "max_new_tokens" in self.values:
            return self.values["max_new_tokens"]
        return max(1, self.values["max_length"] - prompt) if "max_length" in self.values else default

    def told(self, flags: Collection[str] = (), missing: Collection[str] = ()) -> str | None:
        """One line that says which settings apply; None where the file has none.

        `flags` are the file's names of what the user gave, `missing` those that the caller cannot honour.
        """
        applied = {name: value for name, value in self.values.items() if name not in flags and name not in missing}
        parts = [", ".join(f"{name} {_shown(value)}" for name, value in applied.items())] if applied else []
        over = [name for name in self.values if name in flags]
        left = [*(name for name in self.values if name in missing and name not in flags), *self.unread]
        parts += [f"overridden: {', '.join(over)}"] if over else []
        parts += [f"not applied: {', '.join(left)}"] if left else []
        return f"{self.where}: {'; '.join(parts)}" if parts else None


NO_SETTINGS = GenerationSettings()


def _shown(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _neutral(name: str, value: Any) -> bool:
    """The value changes nothing."""
    off: dict[str, Any] = {
        "num_beams": 1, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0,
        "repetition_penalty": 1.0, "top_p": 1.0, "typical_p": 1.0, "min_p": 0.0, "early_stopping": "false", "length_penalty": 1.0,
        "encoder_repetition_penalty": 1.0, "renormalize_logits": False,
    }  # fmt: skip
    return value == () or (name in off and value == off[name])


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(map(_whole, value if isinstance(value, list) else [value]))


def _words(value: Any) -> tuple[tuple[int, ...], ...]:
    if not all(isinstance(word, list) and word for word in value):
        raise ValueError
    return tuple(map(_ids, value))


def _biases(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    if not all(isinstance(ids, list) and ids for ids, _ in value):
        raise ValueError
    return tuple((_ids(ids), _number(bias)) for ids, bias in value)


def _decay(value: Any) -> tuple[int, float]:
    start, factor = value
    return _whole(start), _number(factor)


def _strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(text, str) and text for text in strings):
        raise ValueError
    return strings


def _stopping(value: Any) -> str:
    if value not in (True, False, "never"):
        raise ValueError
    return str(value).lower()


_READERS: Mapping[str, Any] = {
    "do_sample": _flag, "temperature": _number, "top_k": _whole, "top_p": _number, "min_p": _number, "typical_p": _number,
    "repetition_penalty": _number, "num_beams": _whole, "length_penalty": _number, "early_stopping": _stopping,
    "max_new_tokens": _whole, "max_length": _whole, "min_new_tokens": _whole, "min_length": _whole, "no_repeat_ngram_size": _whole,
    "encoder_no_repeat_ngram_size": _whole, "bad_words_ids": _words, "suppress_tokens": _ids, "begin_suppress_tokens": _ids,
    "forced_bos_token_id": _whole, "forced_eos_token_id": _ids,
    "sequence_bias": _biases, "encoder_repetition_penalty": _number, "exponential_decay_length_penalty": _decay,
    "renormalize_logits": _flag, "stop_strings": _strings,
}  # fmt: skip
SETTINGS = frozenset([*_READERS, *_UNREAD])
"""Names of a `generation_config.json` that change what is written, special tokens aside."""
# Their names of the fields of DecodeConfig.
_DECODE: Mapping[str, str] = {
    "num_beams": "beams", "length_penalty": "length_penalty", "early_stopping": "early_stopping",
    "no_repeat_ngram_size": "no_repeat_ngram_size", "repetition_penalty": "repetition_penalty", "min_new_tokens": "min_tokens",
}  # fmt: skip
