"""Message, Conversation and Preference, and how a list of turns becomes messages.

Nothing is repaired here: turns are used as they are, or refused with a RecordError that names file and line.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stagewise.errors import RecordError
from stagewise.formats.strict_json import parse_json

ROLES = {
    **dict.fromkeys(("human", "user", "prompter", "question"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "chatgpt", "chatbot", "model", "ai", "bard", "bing"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("function_call", "tool_call", "function-call", "tool-call"), "tool_call"),
    **dict.fromkeys(("observation", "tool", "function", "function_response", "tool_response"), "observation"),
}
ANSWERS = ("assistant", "tool_call")  # roles that the model generates
QUESTIONS = ("user", "observation")  # roles that it reads
# The roles that may precede each role; None is the start of the conversation.
BEFORE = {
    "user": (None, "assistant"),
    "assistant": ("user", "observation"),
    "tool_call": ("user", "observation", "assistant", "tool_call"),
    "observation": ("tool_call", "observation"),
}


# The reason of a record that is only too long → the flag that keeps it.
TOO_LONG = {
    "no room for an answer": "a larger --model_max_length",
    "prompt too long": "a larger --max_source_length",
    "answers too long": "a larger --max_target_length",
    "question too long": "a smaller --max_new_tokens, or a longer context,",
}


@dataclass(frozen=True)
class Message:
    """One turn; `role` is user, assistant, tool_call or observation. A tool_call's content is a JSON object.

    One with `learn` False is context only, without labels.
    """

    role: str
    content: str
    learn: bool = True


@dataclass(frozen=True)
class Conversation:
    """Turns in order; `system` None means the template's default, `tools` is a JSON list as text."""

    messages: tuple[Message, ...]
    system: str | None = None
    tools: str | None = None
    where: str = "?"


@dataclass(frozen=True)
class Preference:
    """A prompt that ends with a turn for the model to answer, and two answers to it.

    An answer begins and ends with an assistant message; it may have several turns.
    """

    prompt: Conversation
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    where: str = "?"


def read_turns(turns: Any, key: str, where: str) -> tuple[list[Message], str | None]:
    """The messages of a list of turns (from/value or role/content), and the system turn's text if there is one.

    The order of the roles is not checked here: see check_order. Raises RecordError.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # a table cell
        turns = json_value(turns, f'"{key}"', where, "broken JSON")
    if not isinstance(turns, list) or not turns:
        raise RecordError(where, "no turns", f'"{key}" must be a list of turns, found {found(turns)}')
    messages: list[Message] = []
    system = None
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise RecordError(where, "broken turn", f"turn {number} must be an object, found {found(turn)}")
        role = role_of(turn, number, where)
        if role != "system":
            messages += _messages(turn, role, number, where)
        elif number > 1:
            raise RecordError(where, "system turn in the middle", f"turn {number} is a system turn; it may only be "
                              "the first")  # fmt: skip
        else:
            content = text(_content(turn, number, where), "turn 1", where)
            system = content if content.strip() else None
    return messages, system


def role_of(turn: dict[str, Any], number: int, where: str) -> str:
    """The role of turn `number`, by its own name or one of its aliases."""
    name, other = turn.get("from"), turn.get("role")
    if name is None:
        name, other = other, None
    role = _role(name)
    if role is None:
        raise RecordError(where, "unknown role", f"turn {number} is from {name!r}; known roles: {', '.join(ROLES)}")
    if other is not None and _role(other) != role:
        raise RecordError(where, "two roles", f'turn {number} has two roles: "from" {name!r}, "role" {other!r}; leave '
                          "one")  # fmt: skip
    return role


def _role(name: Any) -> str | None:
    role = ROLES.get(name) if isinstance(name, str) else None
    return ROLES.get(name.strip().lower()) if role is None and isinstance(name, str) else role


def check_order(messages: Sequence[Message], where: str) -> None:
    """Raises RecordError unless the conversation starts with a question and each turn may follow the one before."""
    if not messages:
        raise RecordError(where, "no turns", "the conversation holds no turn besides the system prompt")
    before = None
    for number, message in enumerate(messages, 1):
        if before not in BEFORE[message.role]:
            if before == message.role:
                raise RecordError(where, f"two {before} turns in a row", f"turns {number - 1} and {number} are both "
                                  f"from the {before}")  # fmt: skip
            after = f"after {before}" if before else "at the start"
            raise RecordError(where, f"{message.role} {after}", f"turn {number} ({message.role}) can't stand {after}")
        before = message.role


def tools_of(record: dict[str, Any], where: str) -> str | None:
    """The record's `tools` (or `functions`) as the text of a JSON list, None if there are none."""
    tools = one_of(record, ("tools", "functions"), "two lists of tools", "the record", where)
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    if isinstance(tools, str):
        tools = json_value(tools, '"tools"', where)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError(where, "broken tools", f'"tools" must be a list of objects, found {found(tools)}')
    for tool in tools:
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RecordError(where, "broken tools", f"a tool has no name: {found(tool)}")
    return text(json.dumps(tools, ensure_ascii=False), '"tools"', where) if tools else None


def text(value: Any, name: str, where: str) -> str:
    """`value` if it is text that can be encoded; otherwise raises a RecordError that calls it `name`."""
    if not isinstance(value, str):
        if isinstance(value, float) and math.isnan(value):
            raise RecordError(where, "NaN", f"{name} must be text, found NaN, which tables write for a missing value; "
                              "leave the cell empty")  # fmt: skip
        raise RecordError(where, "not text", f"{name} must be text, found {found(value)}")
    if value.isascii():  # a common case, checked first
        return value
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # half of an escaped emoji, which no tokenizer accepts
        raise RecordError(where, "broken character", f"{name} holds half of a surrogate pair at character "
                          f"{error.start}: {value[error.start]!r}") from error  # fmt: skip
    return value


def optional_text(value: Any, name: str, where: str) -> str | None:
    """As text(); None for what is missing or blank."""
    if value is None:
        return None
    return value if text(value, name, where).strip() else None


def json_value(value: str, name: str, where: str, reason: str = "broken tool JSON") -> Any:
    """`value` read as JSON; otherwise RecordError, which calls it `name`."""
    try:
        return parse_json(value)
    except ValueError as error:
        raise RecordError(where, reason, f"{name} is not JSON: {error}") from error


def found(value: Any) -> str:
    """What kind of thing stands there, and how it begins, for a message."""
    if isinstance(value, (list, dict)):
        value = value[:3] if isinstance(value, list) else dict(list(value.items())[:3])
    kind = type(value).__name__
    shown = json.dumps(value[:70] if isinstance(value, str) else value, ensure_ascii=False, default=str)
    return f"{kind} {shown[:60]}{'…' if len(shown) > 60 else ''}"


# --- one turn --------------------------------------------------------------------------------------------------------


def _messages(turn: dict[str, Any], role: str, number: int, where: str) -> list[Message]:
    """One turn; several messages where an assistant thinks or speaks and calls tools in the same turn."""
    learn = _is_learned(turn, number, where)
    content = _content(turn, number, where)
    calls = [Message("tool_call", call, learn) for call in _tool_calls(turn, number, where)]
    if calls and role != "assistant":
        raise RecordError(where, "broken tool call", f"turn {number} ({role}) calls tools; only the assistant can")
    if calls and content is None:
        content = ""
    content = text(content, f"turn {number}", where)
    thought = one_of(turn, ("reasoning_content", "thinking"), "two contents", f"turn {number}", where)
    thought = optional_text(thought, f"turn {number}'s thoughts", where)
    said, blank = [], not content.strip()
    if thought is not None and role in ANSWERS:
        thought = f"<think>\n{thought}\n</think>\n\n"
        if role == "tool_call":
            said = [Message("assistant", thought, learn)]
        else:
            content = thought + content
    if role == "tool_call":
        return [*said, *(Message(role, call, learn) for call in _calls_from_text(content, number, where))]
    if blank and not calls and role != "observation":  # a tool may well give nothing back
        raise RecordError(where, "empty turn", f"turn {number} ({role}) is empty")
    if calls and not content.strip():
        return calls
    return [Message(role, content, learn), *calls]


def _content(turn: dict[str, Any], number: int, where: str) -> Any:
    """What a turn says, "value" or "content"; parts are joined."""
    content, other = turn.get("value"), turn.get("content")
    if content is None:
        return _joined_parts(other, number, where)
    content = _joined_parts(content, number, where)
    if other is not None and _joined_parts(other, number, where) != content:
        raise RecordError(where, "two contents", f'turn {number} has two contents that differ: "value" '
                          f'{found(content)}, "content" {found(other)}; leave one')  # fmt: skip
    return content


def one_of(holder: dict[str, Any], names: tuple[str, str], reason: str, what: str, where: str) -> Any:
    """What stands under either of two names that mean the same. Raises RecordError where both do and differ."""
    first, second = (holder.get(name) for name in names)
    if first and second and first != second:
        raise RecordError(where, reason, f'{what} has both "{names[0]}" and "{names[1]}", and they differ; leave one')
    return first or second


def _is_learned(turn: dict[str, Any], number: int, where: str) -> bool:
    marks = {key: turn[key] for key in ("weight", "train", "loss") if turn.get(key) is not None}
    for key, mark in marks.items():
        if mark not in (0, 1):  # True and False are these
            raise RecordError(where, "broken weight", f'turn {number}: "{key}" must be 0 or 1, found {found(mark)}')
    return all(marks.values())


def _joined_parts(content: Any, number: int, where: str) -> Any:
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RecordError(where, "not text", f"turn {number} holds a part of type {kind!r}; only text is trained")
    return "".join(part["text"] for part in content)


def _tool_calls(turn: dict[str, Any], number: int, where: str) -> list[str]:
    """OpenAI `tool_calls` (and the older `function_call`) as JSON objects {"name", "arguments"}."""
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    return [_call_text(call, number, where) for call in calls]


def _call_text(call: Any, number: int, where: str) -> str:
    return text(json.dumps(_call(call, number, where), ensure_ascii=False), f"turn {number}'s tool call", where)


def _call(call: Any, number: int, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RecordError(where, "broken tool call", f"turn {number}: a tool call needs a name and arguments, "
                          f"found {found(call)}")  # fmt: skip
    _check_arguments(function, number, where)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = json_value(arguments or "{}", f"turn {number}: the arguments of {function['name']}", where)
    return {"name": function["name"], "arguments": arguments}


def _calls_from_text(content: str, number: int, where: str) -> list[str]:
    """ShareGPT's function_call: one JSON object {"name", "arguments"}, or a list of them for calls in parallel."""
    if not content.strip():
        raise RecordError(where, "empty turn", f"turn {number} (tool_call) is empty")
    calls = json_value(content, f"turn {number} (function_call)", where)
    if isinstance(calls, list) and calls:
        return [_call_text(call, number, where) for call in calls]
    if not isinstance(calls, dict) or not isinstance(calls.get("name"), str):
        raise RecordError(where, "broken tool call", f"turn {number}: expected {{\"name\": …, \"arguments\": …}}, "
                          f"found {found(calls)}")  # fmt: skip
    _check_arguments(calls, number, where)
    text(json.dumps(calls, ensure_ascii=False), f"turn {number}'s tool call", where)  # for what is escaped in it
    return [content]


def _check_arguments(call: dict[str, Any], number: int, where: str) -> None:
    """Raises RecordError where a call's arguments are null, or stand under another name and would be lost."""
    others = [key for key in call if key not in ("name", "arguments", "id", "type")]
    if call.get("arguments", {}) is None or (others and "arguments" not in call):
        raise RecordError(where, "broken tool call", f'turn {number}: a tool call\'s arguments must stand in '
                          f'"arguments", found {found(call)}')  # fmt: skip
