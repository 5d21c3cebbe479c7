"""OpenAI's messages → those of `Chat`; what a client sends back of an answer is taken as it was given."""

from typing import Any

from jaxlm.serve.fields import bad

MESSAGES = 4096
_MORE = ("name", "reasoning", "reasoning_content")
"""Keys that a chat template may read beside role and content, as vLLM hands them on."""
_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of content parts, and the key that holds their text."""


def read_messages(given: Any) -> list[dict[str, Any]]:
    """Messages with role and content: parts of text joined, `developer` for `system`, an assistant's refusal as its content.

    Raises ApiError for messages that hold something other than text, or call tools.
    """
    if not isinstance(given, list) or not given or len(given) > MESSAGES:
        raise bad(f"messages must be a list of 1 to {MESSAGES} objects with role and content", "messages")
    made = []
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise bad(f"{where} must be an object with role and content", "messages")
        role, content = message.get("role"), message.get("content")
        if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
            raise bad(
                f"{where} calls a tool or answers one: this server's models call no tools", "messages", "unsupported_parameter"
            )
        if message.get("audio"):
            raise bad(f"{where} holds audio: this server reads text alone", "messages", "unsupported_parameter")
        if isinstance(content, list):
            content = "".join(_part(part, where) for part in content)
        if content is None and role == "assistant":  # of an answer that is a refusal, or of a call of a tool
            refusal = message.get("refusal")
            content = refusal if isinstance(refusal, str) else ""
        own = {"role": "system" if role == "developer" else role, "content": content, **{key: message.get(key) for key in _MORE}}
        for key in _MORE:
            if not isinstance(own[key], str | None):
                raise bad(f"{where} has a {key} that is not a text", "messages")
        made.append({key: value for key, value in own.items() if value is not None})
    return made


def _part(part: Any, where: str) -> str:
    """The text of a content part."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        text = part.get(_PARTS.get(str(part.get("type")), ""))
        if isinstance(text, str):
            return text
    raise bad(f"{where} holds a part that is not text: this server's models read text alone", "messages")
