"""How a command writes text: its flags over the model's own generation settings."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from jaxlm.devices import LoadOptions
from jaxlm.report.console import say

if TYPE_CHECKING:
    from jaxlm.generate import DecodeConfig, GenerationSettings, LogitsRules, SampleConfig

# What a flag overrides, by the names of generation_config.json.
_OVERRIDES = {
    "max_tokens": ("max_new_tokens", "max_length"), "temperature": ("temperature", "do_sample"), "top_k": ("top_k",),
    "top_p": ("top_p",), "min_p": ("min_p",), "typical_p": ("typical_p",), "repetition_penalty": ("repetition_penalty",),
    "beams": ("num_beams",), "length_penalty": ("length_penalty",), "early_stopping": ("early_stopping",),
    "no_repeat_ngram_size": ("no_repeat_ngram_size",), "min_tokens": ("min_new_tokens", "min_length"),
}  # fmt: skip
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p")
"""Settings of drawing, which a search does not have."""


@dataclasses.dataclass(frozen=True)
class SamplingOptions(LoadOptions):
    """Flags of commands that write text. Empty ones are as the model's generation_config.json says."""

    max_tokens: int | None = None
    """Maximum number of new tokens; empty: the model's own setting, else 200, in a chat 512."""
    temperature: float | None = None
    """Sampling temperature; 0 selects the most likely token. Empty: the model's own setting, else 0.8, but 0 with beams and for an
    encoder-decoder. With beams above 0: continuations of all beams are sampled."""
    top_k: int | None = None
    """Sample from this many most likely tokens."""
    top_p: float | None = None
    """Sample from the smallest set of tokens that holds this probability."""
    min_p: float | None = None
    """Sample from tokens at least this fraction as likely as the most likely one."""
    typical_p: float | None = None
    """Sample from the tokens whose surprisal is nearest to the entropy, up to this probability."""
    repetition_penalty: float | None = None
    """Divides positive logits of tokens that occurred and multiplies negative ones; 1: off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the text contains."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time that the text contains it."""
    split_special_tokens: bool = False
    """Read special tokens that a prompt or message spells, such as </s>, as ordinary text; false: as special tokens, as
    transformers does."""
    seed: int = 0
    """Random seed."""
    generation_config: Literal["auto", "none"] = "auto"
    """auto: the model's own generation_config.json gives the defaults of these options, and tokens that must or may not come;
    none: it is not read."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}: it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What flags and settings amount to for one model."""

    sampling: "SampleConfig"
    decode: "DecodeConfig"
    """Its `max_tokens` is not used: see `room`."""
    rules: "LogitsRules"
    """All constraints on tokens, those of `decode` among them."""
    settings: "GenerationSettings"
    max_tokens: int | None
    default: int
    given: frozenset[str]
    """Names of the settings that flags override."""

    def room(self, prompt: int) -> int:
        """Maximum number of new tokens after `prompt` tokens of the decoder."""
        return self.max_tokens or self.settings.room(prompt, self.default)

    @property
    def beams(self) -> bool:
        return self.decode.beams > 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end a text, of which they are the end; beams do not look for them."""
        return () if self.beams else self.settings.stop_strings

    def told(self, missing: Any = ()) -> str | None:
        """One line that says which of the model's settings apply, None where it has none, but for those `missing` here."""
        from jaxlm.generate.settings import BEAMS

        missing = {*missing, *(("stop_strings",) if self.beams else BEAMS)}
        if self.sampling.temperature > 0:
            return self.settings.told(self.given, missing)
        values = {name: value for name, value in self.settings.values.items() if name not in SAMPLING[2:]}
        return dataclasses.replace(self.settings, values=values).told(self.given, missing)


def _flags(options: SamplingOptions, kind: Any) -> dict[str, Any]:
    """The flags that are fields of `kind`, None where they are not given; how many tokens is `Decoding.room`'s."""
    return {f.name: getattr(options, f.name, None) for f in dataclasses.fields(kind) if f.name != "max_tokens"}


def check_flags(options: SamplingOptions) -> None:
    """Raise ValueError for a flag out of range, before a model is read."""
    from jaxlm.generate import DecodeConfig, SampleConfig

    for kind in (SampleConfig, DecodeConfig):
        kind(**{name: value for name, value in _flags(options, kind).items() if value is not None})


def decoding_of(trained: Any, options: SamplingOptions, default: int) -> Decoding:
    """How `options` have this model write; `default` is the maximum number of new tokens where nobody says another. ValueError for
    settings or flags out of range, and for flags that would do nothing."""
    from jaxlm.generate import DecodeConfig, GenerationSettings, SampleConfig

    settings = trained.generation() if options.generation_config == "auto" else GenerationSettings()
    drawn = _flags(options, SampleConfig)
    if options.temperature is None and (getattr(options, "beams", None) or 1) > 1 and not settings.values.get("do_sample"):
        drawn["temperature"] = 0.0
    sampling = settings.sampling(drawn, trained.model.config.architecture == "encoder_decoder")
    decode = settings.decode(_flags(options, DecodeConfig))
    if not hasattr(options, "beams"):  # a command without beams
        decode = dataclasses.replace(decode, beams=1, n_best=1)
    rules = settings.rules()
    if decode.beams == 1:  # without effect
        rules = dataclasses.replace(rules, renormalize_logits=False)
    if getattr(options, "min_tokens", None) is not None:
        rules = dataclasses.replace(rules, min_length=0)
    given = {name for flag, names in _OVERRIDES.items() if getattr(options, flag, None) is not None for name in names}
    decoding = Decoding(sampling, decode, decode.rules(rules), settings, options.max_tokens, default, frozenset(given))
    _check_read(options, decoding)
    return decoding


# Flags of commands that write text, each with the value at which it does nothing anywhere.
_NEUTRAL: dict[str, Any] = {
    "top_k": None, "top_p": 1, "min_p": 0, "typical_p": 1, "length_penalty": 1, "early_stopping": "false", "presence_penalty": 0,
    "frequency_penalty": 0, "beams": 1, "no_repeat_ngram_size": 0, "min_tokens": 0,
}  # fmt: skip


def _check_read(options: SamplingOptions, decoding: Decoding) -> None:
    """Raise ValueError for a flag that does nothing in the way in which text will be written."""
    drawn = decoding.sampling.temperature > 0 or getattr(options, "penalty_alpha", None) is not None
    free = all(getattr(options, name, None) is None for name in ("regex", "json_schema"))
    for names, holds, when in (
        (("top_k", "top_p", "min_p", "typical_p"), drawn, "if tokens are sampled, at a temperature above 0"),
        (("beams", "no_repeat_ngram_size", "min_tokens"), free, "without regex and json_schema"),
        (("length_penalty", "early_stopping"), decoding.beams, "with beams above 1"),
        (("presence_penalty", "frequency_penalty"), not decoding.beams, "without beams"),
    ):
        for name in names:
            value = getattr(options, name, None)
            if not holds and value is not None and value != _NEUTRAL[name]:
                raise ValueError(f"{name} {value} would do nothing here: it is read {when}; leave it out")


def report_spelled(texts: int, split: bool) -> None:
    """Say how many texts spell a special token, and how they are read."""
    if texts:
        how = "ordinary text" if split else "that token"
        say(f"{texts:,} texts spell a special token, which is read as {how} (--split-special-tokens {str(not split).lower()})")
