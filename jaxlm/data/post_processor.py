"""What a `tokenizer.json` puts around a text: special tokens, a space before it."""

import json

from jaxlm.data.special import SPECIAL
from jaxlm.data.tokenizer import END_OF_TEXT, Tokenizer


def framed(tokenizer: Tokenizer, framing: str, *, architecture: str) -> Tokenizer:
    """A tokenizer made here with the post-processor that `TokenizerConfig.framing` names, for a model of this architecture."""
    from tokenizers import processors

    special = tokenizer.special
    if framing == "auto":
        both = {"cls", "sep"} <= special.keys()
        framing = {"encoder": "cls_sep" if both else "bos", "encoder_decoder": "eos"}.get(architecture, "bos")
    ids = {SPECIAL[role]: special[role] for role in ("cls", "sep") if role in special} | {END_OF_TEXT: tokenizer.eos_id}
    single = {
        "none": "$A", "bos": f"{END_OF_TEXT} $A", "eos": f"$A {END_OF_TEXT}",
        "cls_sep": f"{SPECIAL['cls']} $A {SPECIAL['sep']}",
    }[framing]  # fmt: skip
    second = single.removeprefix(f"{SPECIAL['cls']} ").replace("$A", "$B")
    if architecture == "encoder":  # token types are the encoders'
        second = " ".join(f"{part}:1" for part in second.split())
    processor = processors.TemplateProcessing(single=single, pair=f"{single} {second}", special_tokens=list(ids.items()))
    definition = json.loads(tokenizer.definition())
    definition["post_processor"] = None if framing == "none" else json.loads(processor.__getstate__())
    return tokenizer.with_definition(json.dumps(definition, ensure_ascii=False))


def with_prefix_space(definition: str) -> str:
    """A `tokenizer.json` that puts a space before each text or word that has none, where it is byte-level and nothing else.

    So transformers wants GPT-2's and RoBERTa's kind of tokenizer for lists of words (`add_prefix_space=True`).
    """
    parsed = json.loads(definition)
    if (parsed["pre_tokenizer"] or {}).get("type") != "ByteLevel":
        return definition
    parsed["pre_tokenizer"]["add_prefix_space"] = True
    post = parsed["post_processor"] or {}
    for part in (post, *post.get("processors", [])):
        if "add_prefix_space" in part:  # offsets do not count the space that was put there
            part["add_prefix_space"] = True
    return json.dumps(parsed, ensure_ascii=False)
