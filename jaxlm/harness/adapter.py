"""Our models within lm-evaluation-harness (extra `eval`): its tasks, its command line, our log-likelihoods and texts.

    python -m jaxlm.harness.adapter --model jaxlm --model_args pretrained=runs/tiny --tasks hellaswag

is that library's own command with the model `jaxlm` added to it. In a script, give `simple_evaluate(model=JaxLM(trained), …)`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from jaxlm.generate import BatchGenerator, DecodeConfig
from jaxlm.harness.likelihood import Scorer
from jaxlm.models import Trained, load_model
from jaxlm.report.console import bar


@register_model("jaxlm")
class JaxLM(LM):
    """A model of ours as the harness asks for one.

    pretrained: the MODEL argument of our verbs, or a model that is loaded. max_length: most tokens read at once, at most the
    model's positions. add_bos_token: as `Scorer`'s `bos`. The harness gives `device` and `max_batch_size` to every model; here
    the platform is JAX's own and the batch has one size.
    """

    def __init__(
        self, pretrained: str | Trained, batch_size: int | str = 32, max_length: int | None = None,
        add_bos_token: bool | None = None, device: str | None = None, max_batch_size: int | None = None,
    ):  # fmt: skip
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}: give a whole number; the model jaxlm does not look for one by itself")
        trained = load_model(pretrained) if isinstance(pretrained, str) else pretrained
        self.scorer = Scorer(trained, length=max_length, batch_size=int(batch_size), bos=add_bos_token)
        tokenizer = self.scorer.tokenizer
        self.generator = BatchGenerator(trained.model, trained.mesh, tokenizer.vocab_size, pad_id=tokenizer.eos_id)

    @property
    def tokenizer_name(self) -> str:
        return str(self.scorer.tokenizer.fingerprint)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        trained = self.scorer.trained
        return {"model_name": trained.name, "model_num_parameters": trained.model.parameters()}

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        found = self.scorer.continuations([request.args for request in requests])
        return self._kept("loglikelihood", requests, [(one.logprob, one.greedy) for one in found])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        found = self.scorer.texts([request.args[0] for request in requests])
        return self._kept("loglikelihood_rolling", requests, [logprob for logprob, _ in found])

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy: ValueError where a task asks for draws. Texts are cut before the first of the strings that end them."""
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        with bar("writing", len(requests), "texts") as shown:
            for numbers in alike.values():
                written = self._write([requests[i].args[0] for i in numbers], requests[numbers[0]].args[1], shown.advance)
                for i, text in zip(numbers, written, strict=True):
                    texts[i] = text
        return self._kept("generate_until", requests, texts)

    def _write(self, contexts: list[str], options: Mapping[str, Any], advance: Callable[[int], None]) -> list[str]:
        asked = normalize_gen_kwargs(dict(options))
        if asked["do_sample"] and asked["temperature"] > 0:
            raise ValueError(f"a task asks for draws at temperature {asked['temperature']}: the model jaxlm writes greedily")
        scorer, tokenizer = self.scorer, self.scorer.tokenizer
        new = min(asked["max_gen_toks"], max(1, scorer.length // 2))  # half of the positions are the prompt's
        room = scorer.length - new - len(scorer.begin)
        prompts = [[*scorer.begin, *ids[-room:].tolist()] or [tokenizer.bos_id] for ids in scorer.encoder.bare(contexts)]
        trained, stop = scorer.trained, {tokenizer.eos_id, *scorer.trained.stop_ids()}
        written = self.generator(
            trained.params, prompts, DecodeConfig(new), stop, batch_size=scorer.batch_size, advance=advance
        )  # fmt: skip
        ends = [end for end in handle_stop_sequences(asked["until"], None) if end]
        return [before(tokenizer.decode(tokens), ends) for tokens in written]

    def _kept(self, kind: str, requests: Sequence[Any], answers: list[Any]) -> list[Any]:
        """The answers, which the harness's cache of them is told too."""
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers


def before(text: str, ends: Sequence[str]) -> str:
    """The text as far as the first of `ends`."""
    return text[: min((place for end in ends if (place := text.find(end)) >= 0), default=len(text))]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
