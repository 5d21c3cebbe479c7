"""Conversations in the forms that data sets have → messages of role and content.

Read are lists of: messages under any usual pair of keys (`role`/`content`, ShareGPT's `from`/`value`, `speaker`/`utterance`, …);
exchanges, objects with one key a speaker (`{"usr": …, "sys": …}`, `{"question": …, "answer": …}`) or pairs of texts; and texts,
or objects with one but without a speaker, which the user and the assistant say in turn.
"""

from collections.abc import Mapping, Sequence
from typing import Any

ROLE_KEYS = ("role", "from", "speaker", "author", "sender", "name")
CONTENT_KEYS = ("content", "value", "utterance", "text", "message", "utt")
_NAMES = {
    "user": "user usr human customer client prompter patient student question query instruction prompt input u h",
    "assistant": """assistant gpt chatgpt bot chatbot model agent ai sys answer response output completion doctor teacher bing bard
        claude a""",
    "system": "system developer",
}
SPEAKERS = {name: role for role, names in _NAMES.items() for name in names.split()}
"""Name of a speaker → role. In a dialogue where no other speaker is the assistant, a `system` that replies is."""


def messages_of(value: Sequence[Any], speakers: Mapping[str, str]) -> list[dict[str, Any]]:
    """The turns of a conversation as messages; `speakers` goes before `SPEAKERS`.

    Raises ValueError, to be read after the role's name, for a turn that has none of the forms or a speaker without a role.
    """
    turns: list[dict[str, Any]] = []
    for i, turn in enumerate(value):
        if isinstance(turn, str):
            turns.append({"role": ("user", "assistant")[i % 2], "content": turn})
        elif isinstance(turn, Mapping):
            turns += _turns(turn, speakers, ("user", "assistant")[i % 2])
        elif isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
            turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True) if text]
        else:
            raise ValueError(f"holds {_shown(turn)}, not a message: an object with role and content")
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles and "user" in roles:
        for turn in turns[roles.index("user") :]:
            turn["role"] = "assistant" if turn["role"] == "system" else turn["role"]
    return turns


def _turns(turn: Mapping[str, Any], speakers: Mapping[str, str], next_role: str) -> list[dict[str, Any]]:
    role_key = next((key for key in ROLE_KEYS if isinstance(turn.get(key), str | int)), None)
    content_key = next((key for key in CONTENT_KEYS if key in turn and key != role_key), None)
    if content_key is not None:
        rest = {key: value for key, value in turn.items() if key not in (role_key, content_key)}
        role = next_role if role_key is None else _role(str(turn[role_key]), speakers)
        return [{"role": role, "content": _content(turn[content_key], turn), **rest}]
    named = {key: text for key, text in turn.items() if _lookup(key, speakers) and isinstance(text, str | None)}
    if not named or not all(key in named or not isinstance(value, str) for key, value in turn.items()):
        raise ValueError(f"holds {_shown(turn)}, not a message: an object with role and content")
    order = {"system": 0, "user": 1, "assistant": 2}
    said = [{"role": _role(key, speakers), "content": text} for key, text in named.items() if text]
    return sorted(said, key=lambda message: order[message["role"]])


def _content(content: Any, turn: Mapping[str, Any]) -> str:
    """The text of a message, of OpenAI's parts those of type text."""
    if isinstance(content, list) and content:
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else content  # type: ignore[arg-type]
    if not isinstance(content, str):
        raise ValueError(f"holds {_shown(turn)}, not a message: an object with role and content")
    return content


def _lookup(name: str, speakers: Mapping[str, str]) -> str | None:
    return speakers.get(name) or SPEAKERS.get(name.strip().casefold())


def _role(name: str, speakers: Mapping[str, str]) -> str:
    role = _lookup(name, speakers)
    if role is None:
        raise ValueError(f"has the speaker {name[:40]!r}: --data.rows.speakers says who is who, as in A=user,B=assistant")
    return role


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
