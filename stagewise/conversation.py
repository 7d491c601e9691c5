"""Message, Conversation, Preference: one parser for every accepted form of record.

Nothing is repaired here: a record is either taken as it stands or refused with a RecordError that names file and line.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

ROLES = {
    **dict.fromkeys(("human", "user", "prompter", "question"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "chatgpt", "chatbot", "model", "ai", "bard", "bing"), "assistant"),
    "system": "system",
    **dict.fromkeys(("function_call", "tool_call", "function-call", "tool-call"), "tool_call"),
    **dict.fromkeys(("observation", "tool", "function", "function_response", "tool_response"), "observation"),
}
ANSWERS = ("assistant", "tool_call")  # what the model says
QUESTIONS = ("user", "observation")  # what it is told
# The roles that may stand before each role; None is the start of the conversation.
BEFORE = {
    "user": (None, "assistant"),
    "assistant": ("user", "observation"),
    "tool_call": ("user", "observation", "assistant", "tool_call"),
    "observation": ("tool_call", "observation"),
}
CONVERT = "turn it into conversations first: python convert_dataset.py --data_type {kind} --in_file … --out_file …"


class RecordError(ValueError):
    """A record that can't be used: `where` is "file:line", `reason` the short slug it is counted under."""

    def __init__(self, where: str, reason: str, message: str):
        super().__init__(f"{where}: {message}")
        self.where, self.reason, self.message = where, reason, message

    def __reduce__(self):  # exceptions with several arguments don't cross processes by themselves
        return type(self), (self.where, self.reason, self.message)


@dataclass(frozen=True)
class Message:
    """One turn; `role` is user, assistant, tool_call or observation. A tool_call's content is a JSON object."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns in order; `system` None means the template's default, `tools` is a JSON list as text."""

    messages: tuple[Message, ...]
    system: str | None = None
    tools: str | None = None
    where: str = "?"


@dataclass(frozen=True)
class Preference:
    """A prompt, which ends with what the model is told, and two answers to it."""

    prompt: Conversation
    chosen: str
    rejected: str
    where: str = "?"


def parse_conversation(record: dict[str, Any], where: str) -> Conversation:
    """ShareGPT `conversations` (from/value) or OpenAI `messages` (role/content), with `system` and `tools`.

    Raises RecordError for anything else: unknown roles, empty turns, two questions in a row, text that isn't text.
    """
    turns = _turns(record, where)
    messages: list[Message] = []
    system = _optional_text(record.get("system"), "system", where)
    for number, turn in enumerate(turns, 1):
        for role, content in _messages(turn, number, where):
            if role != "system":
                messages.append(Message(role, content))
            elif number > 1:
                raise RecordError(where, "system turn in the middle", f"turn {number} is a system turn; it may only "
                                  "be the first")  # fmt: skip
            elif system is not None and content.strip() and content != system:
                raise RecordError(where, "two system prompts", 'the "system" field and the system turn differ')
            elif content.strip():
                system = content
    _check_order(messages, where)
    return Conversation(tuple(messages), system, _tools(record, where), where)


def parse_preference(record: dict[str, Any], where: str) -> Preference:
    """The three forms of a preference: conversations/chosen/rejected, question/response_chosen/response_rejected,
    instruction/input/output=[chosen, rejected]; the last two with `system` and `history` if wanted.

    An answer is a string, a message, or a list of one assistant message. Raises RecordError.
    """
    if _has(record, "conversations") or _has(record, "messages"):
        prompt = parse_conversation(record, where)
        answers = [record.get("chosen"), record.get("rejected")]
    elif _has(record, "question"):
        prompt = _instruction_prompt(record, record["question"], where)
        answers = [record.get("response_chosen"), record.get("response_rejected")]
    elif _has(record, "instruction"):
        prompt = _instruction_prompt(record, instruction_text(record, where), where)
        answers = record.get("output")
        if not isinstance(answers, list) or len(answers) != 2:
            raise RecordError(where, "no pair of answers", '"output" must be a list [chosen, rejected] in a '
                              f"preference record, found {_found(answers)}")  # fmt: skip
    else:
        raise RecordError(where, "no preference", "expected conversations/chosen/rejected, question/response_chosen/"
                          "response_rejected or instruction/output=[chosen, rejected], found the keys "
                          + _keys(record))  # fmt: skip
    if prompt.messages[-1].role not in QUESTIONS:
        raise RecordError(where, "prompt ends with an answer", "the conversation of a preference must end with what "
                          f"both answers reply to, it ends with {prompt.messages[-1].role}")  # fmt: skip
    chosen, rejected = (_answer(a, side, where) for a, side in zip(answers, ("chosen", "rejected"), strict=True))
    if chosen == rejected:
        raise RecordError(where, "answers alike", "the chosen and the rejected answer are the same text")
    return Preference(prompt, chosen, rejected, where)


def parse_text(record: dict[str, Any], where: str) -> str:
    """The text of a pretraining record {"text": …}, whitespace kept. Raises RecordError where there is none."""
    if not _has(record, "text"):
        raise RecordError(where, "no text", f'expected {{"text": …}}, found the keys {_keys(record)}')
    text = _text(record["text"], "text", where)
    if not text.strip():
        raise RecordError(where, "empty text", "the text is empty")
    return text


def prompt_of(conversation: Conversation) -> Conversation:
    """The conversation without its last assistant turn; one that ends with a question is its own prompt."""
    messages = conversation.messages
    while messages and messages[-1].role in ANSWERS:
        messages = messages[:-1]
    return replace(conversation, messages=messages)


def instruction_text(record: dict[str, Any], where: str) -> str:
    """An alpaca record's question: `instruction`, and `input` below it where there is one."""
    instruction = _text(record.get("instruction"), "instruction", where)
    extra = _optional_text(record.get("input"), "input", where)
    return instruction if extra is None else f"{instruction}\n{extra}"


def parse_history(history: Any, where: str) -> tuple[Message, ...]:
    """Earlier exchanges, as [[question, answer], …] or flat [question, answer, …]."""
    if history is None or history == "":
        return ()
    if isinstance(history, str) or not isinstance(history, Iterable):
        raise RecordError(where, "broken history", f'"history" must be a list, found {_found(history)}')
    flat = [text for item in history for text in (item if isinstance(item, (list, tuple)) else [item])]
    pairs = all(isinstance(item, (list, tuple)) and len(item) == 2 for item in history)
    if not pairs and (len(flat) % 2 or any(isinstance(item, (list, tuple)) for item in history)):
        raise RecordError(where, "broken history", '"history" must be pairs [question, answer] or a flat list of '
                          "questions and answers in turn")  # fmt: skip
    roles = ("user", "assistant") * (len(flat) // 2)
    messages = tuple(Message(role, _text(text, "history", where)) for role, text in zip(roles, flat, strict=True))
    return messages


# --- pieces ----------------------------------------------------------------------------------------------------------


def _turns(record: dict[str, Any], where: str) -> list[Any]:
    keys = [key for key in ("conversations", "messages") if _has(record, key)]
    if len(keys) == 2:
        raise RecordError(where, "two conversations", 'the record has both "conversations" and "messages"; leave one')
    if not keys:
        kind = "alpaca" if _has(record, "instruction") else "qa" if _has(record, "question") else None
        if kind:
            raise RecordError(where, f"{kind} record", f"found the keys {_keys(record)}; " + CONVERT.format(kind=kind))
        raise RecordError(where, "no conversation", 'expected "conversations" (from/value) or "messages" '
                          f"(role/content), found the keys {_keys(record)}")  # fmt: skip
    turns = record[keys[0]]
    if not isinstance(turns, list) or not turns:
        raise RecordError(where, "no turns", f'"{keys[0]}" must be a list of turns, found {_found(turns)}')
    return turns


def _messages(turn: Any, number: int, where: str) -> list[tuple[str, str]]:
    """One turn as (role, content): several where an assistant speaks and calls tools in the same turn."""
    if not isinstance(turn, dict):
        raise RecordError(where, "broken turn", f"turn {number} must be an object, found {_found(turn)}")
    name = turn.get("from", turn.get("role"))
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise RecordError(where, "unknown role", f"turn {number} is from {name!r}; known roles: {', '.join(ROLES)}")
    if turn.get("reasoning_content") or turn.get("thinking"):
        raise RecordError(where, "separate reasoning", f"turn {number} holds its reasoning in a field of its own, "
                          "which is not trained on; put it into the content as <think>…</think>")  # fmt: skip
    if any(turn.get(key) in (0, False) and turn.get(key) is not None for key in ("weight", "train", "loss")):
        raise RecordError(where, "unlearned turn", f"turn {number} asks not to be learned (weight 0); every assistant "
                          "turn is learned here: end the conversation before it or leave the mark out")  # fmt: skip
    content = turn["value"] if "value" in turn else turn.get("content")
    calls = _tool_calls(turn, number, where)
    if calls and (content is None or content == ""):
        return calls
    content = _text(_joined_parts(content, number, where), f"turn {number}", where)
    if not content.strip() and role not in ("observation", "system"):
        raise RecordError(where, "empty turn", f"turn {number} ({role}) is empty")
    if role == "tool_call":
        return _calls_from_text(content, number, where)
    return [(role, content), *calls]


def _joined_parts(content: Any, number: int, where: str) -> Any:
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RecordError(where, "not text", f"turn {number} holds a part of type {kind!r}; only text is trained")
    return "".join(part["text"] for part in content)


def _tool_calls(turn: dict[str, Any], number: int, where: str) -> list[tuple[str, str]]:
    """OpenAI `tool_calls` (and the older `function_call`) as tool_call messages."""
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RecordError(where, "broken tool call", f"turn {number}: a tool call needs a name and arguments, "
                              f"found {_found(call)}")  # fmt: skip
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments or "{}", f"turn {number}: the arguments of {function['name']}", where)
        call = {"name": function["name"], "arguments": arguments}
        found.append(("tool_call", json.dumps(call, ensure_ascii=False)))
    return found


def _calls_from_text(content: str, number: int, where: str) -> list[tuple[str, str]]:
    """ShareGPT's function_call: one JSON object {"name", "arguments"}, or a list of them for calls in parallel."""
    calls = _json(content, f"turn {number} (function_call)", where)
    if isinstance(calls, list) and calls:
        return _tool_calls({"tool_calls": calls}, number, where)
    if not isinstance(calls, dict) or not isinstance(calls.get("name"), str):
        raise RecordError(where, "broken tool call", f"turn {number}: expected {{\"name\": …, \"arguments\": …}}, "
                          f"found {_found(calls)}")  # fmt: skip
    return [("tool_call", content)]


def _check_order(messages: list[Message], where: str) -> None:
    if not messages:
        raise RecordError(where, "no turns", "the conversation holds no turn besides the system prompt")
    before = None
    for number, message in enumerate(messages, 1):
        if before == message.role and message.role in ("user", "assistant"):
            raise RecordError(where, f"two {message.role} turns in a row", f"turns {number - 1} and {number} are both "
                              f"from the {message.role}")  # fmt: skip
        if before not in BEFORE[message.role]:
            after = f"after {before}" if before else "at the start"
            raise RecordError(where, f"{message.role} {after}", f"turn {number} ({message.role}) can't stand {after}")
        before = message.role


def _tools(record: dict[str, Any], where: str) -> str | None:
    tools = record.get("tools") or record.get("functions")
    if not tools:
        return None
    if isinstance(tools, str):
        if not tools.strip():
            return None
        tools = _json(tools, '"tools"', where)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError(where, "broken tools", f'"tools" must be a list of objects, found {_found(tools)}')
    for tool in tools:
        if not isinstance(tool.get("function", tool).get("name"), str):
            raise RecordError(where, "broken tools", f"a tool has no name: {_found(tool)}")
    return json.dumps(tools, ensure_ascii=False) if tools else None


def _instruction_prompt(record: dict[str, Any], question: Any, where: str) -> Conversation:
    messages = (*parse_history(record.get("history"), where), Message("user", _text(question, "question", where)))
    for number, message in enumerate(messages, 1):
        if not message.content.strip():
            raise RecordError(where, "empty turn", f"turn {number} ({message.role}) is empty")
    system = _optional_text(record.get("system"), "system", where)
    return Conversation(messages, system, _tools(record, where), where)


def _answer(answer: Any, side: str, where: str) -> str:
    if isinstance(answer, list):
        if len(answer) != 1:
            raise RecordError(where, "broken answer", f'"{side}" must hold one assistant message, found {len(answer)} '
                              "turns; put the earlier turns into the conversation")  # fmt: skip
        answer = answer[0]
    if isinstance(answer, dict):
        found = _messages(answer, 1, where)
        if [role for role, _ in found] != ["assistant"]:
            raise RecordError(where, "broken answer", f'"{side}" must be from the assistant, found {found[0][0]}')
        answer = found[0][1]
    text = _text(answer, side, where)
    if not text.strip():
        raise RecordError(where, "empty answer", f'"{side}" is empty')
    return text


def _has(record: dict[str, Any], key: str) -> bool:
    return record.get(key) is not None


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(where, "not text", f"{name} must be text, found {_found(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # half of an escaped emoji, which no tokenizer takes
        raise RecordError(where, "broken character", f"{name} holds half of a surrogate pair at character "
                          f"{error.start}: {value[error.start]!r}") from error  # fmt: skip
    return value


def _optional_text(value: Any, name: str, where: str) -> str | None:
    if value is None:
        return None
    return _text(value, name, where) if _text(value, name, where).strip() else None


def _json(text: str, name: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(where, "broken tool JSON", f"{name} is not JSON: {error}") from error


def _found(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return f"{type(value).__name__} {shown[:60]}{'…' if len(shown) > 60 else ''}"


def _keys(record: dict[str, Any]) -> str:
    return ", ".join(map(str, record)) or "none"
