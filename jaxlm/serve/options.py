"""Where a server listens and what it lets through."""

import dataclasses
import ipaddress
import os
from typing import Literal

from jaxlm.devices import LoadOptions

KEY = "JAXLM_API_KEY"
OF_ENGINE = ("slots", "context", "cache", "exact", "max_tokens", "max_n", "generation_config")
"""Options that apply to text generation only."""


@dataclasses.dataclass(frozen=True)
class ServeOptions(LoadOptions):
    """The flags of `jaxlm serve`."""

    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own (loopback) needs an API key."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    api_key: str | None = None
    """What clients must send as their API key; empty: $JAXLM_API_KEY, which no list of processes shows."""
    name: str | None = None
    """What the model is called; empty: the name of its folder."""
    slots: int = 8
    """Texts that are written at a time."""
    context: int | None = None
    """Most tokens of a prompt and its text together, for each slot; empty: the model's positions, at most 4096."""
    cache: Literal["same", "int8"] = "same"
    """How keys and values of the slots are held: as they are computed, or in int8, which takes about half of bfloat16's bytes."""
    exact: bool = True
    """A text is the same to the bit however many run beside it. false: faster on a CPU while few do, as only their slots are
    computed; log-probabilities then differ in their last digits with how many run."""
    split_special_tokens: bool = False
    """Read special tokens that prompts and messages spell, such as <|im_end|>, as ordinary text, so that what a user writes cannot
    end a turn; false: as special tokens, as transformers and vLLM do."""
    queue: int = 256
    """Texts that may wait for a slot; beyond it the answer is 429."""
    max_tokens: int | None = None
    """Most new tokens of a text, whatever is asked for; empty: what the context holds."""
    max_n: int = 16
    """Most texts for one prompt."""
    max_texts: int = 256
    """Most texts of one request: prompts times n, or texts to embed or classify."""
    max_body: int = 4 << 20
    """Most bytes of a request."""
    timeout: float = 600.0
    """Seconds after which a text ends as it stands."""
    drain: float = 30.0
    """Seconds that running texts have to end once the server is told to stop."""
    generation_config: Literal["auto", "none"] = "auto"
    """auto: what a request leaves out is as the model's own generation_config.json has it; none: that file is not read."""

    def __post_init__(self) -> None:
        for name in ("slots", "context", "queue", "max_tokens", "max_n", "max_texts", "max_body"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port is {self.port}: it must be from 0 to 65535")
        if self.timeout <= 0 or self.drain < 0:
            raise ValueError("timeout must be positive, and drain not negative")
        if not self.loopback and not self.key:
            raise ValueError(
                f"host {self.host!r} can be reached from other machines: set an API key (${KEY} or --api-key), or keep 127.0.0.1"
            )

    @property
    def key(self) -> str:
        return self.api_key or os.environ.get(KEY, "")

    @property
    def loopback(self) -> bool:
        """Only this machine can reach the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
