"""Records → Conversation, Preference or text: one parser per stage for every accepted form, detected from the keys.

Nothing is repaired here: a record is used as it is, or refused with a RecordError that names file and line, what was
found and, for another stage's form, the stage that reads it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from stagewise.errors import RecordError, TooLongError
from stagewise.formats.messages import (
    ANSWERS,
    QUESTIONS,
    ROLES,
    Conversation,
    Message,
    Preference,
    check_order,
    found,
    json_value,
    one_of,
    optional_text,
    read_turns,
    text,
    tools_of,
)

__all__ = ["ANSWERS", "QUESTIONS", "ROLES", "Conversation", "Message", "Preference", "RecordError", "TooLongError"]

# form of record → (its name, the scripts that read it)
FORMS = {
    "preference": ("a preference", "reward_modeling.py and dpo_training.py read it, and ppo_training.py its prompt"),
    "conversation": ("a conversation", "supervised_finetuning.py and ppo_training.py read it"),
    "alpaca": ("an instruction", "supervised_finetuning.py and ppo_training.py read it"),
    "qa": ("a question", "supervised_finetuning.py and ppo_training.py read it"),
    "text": ("a text", "pretraining.py reads it"),
}
CONVERSATIONS = (
    '"conversations" (from/value), "messages" (role/content), "instruction" with "output", or "question" with "answer"'
)
PREFERENCES = "conversations/chosen/rejected, question/response_chosen/response_rejected or instruction/output=[…, …]"


def form_of(record: dict[str, Any]) -> str | None:
    """The form of a record by its keys: a key of FORMS, or None."""
    if any(_has(record, key) for key in ("chosen", "rejected", "response_chosen", "response_rejected")):
        return "preference"
    if _has(record, "conversations") or _has(record, "messages"):
        return "conversation"
    if _has(record, "instruction"):
        return "preference" if isinstance(record.get("output"), (list, tuple)) else "alpaca"
    if _has(record, "question"):
        return "qa"
    return "text" if _has(record, "text") else None


def parse_conversation(record: dict[str, Any], where: str) -> Conversation:
    """ShareGPT `conversations`, OpenAI `messages`, instruction/input/output/history or question/answer.

    Each may have `system` and `tools`. Raises RecordError for anything else: unknown roles, empty turns, two questions
    in a row, values that aren't text, no answer at all.
    """
    conversation = _conversation(record, where)
    roles = [message.role for message in conversation.messages]
    # The answer to an instruction or question is in the record itself, whatever its history holds.
    if not any(role in ANSWERS for role in (roles if form_of(record) == "conversation" else roles[-1:])):
        raise RecordError(where, "no answer", 'no turn is from the assistant, there is no "output" or "answer"')
    return conversation


def parse_prompt(record: dict[str, Any], where: str) -> Conversation:
    """What the assistant should answer: a conversation without its last answer, or the prompt of a preference."""
    if form_of(record) == "preference":
        return parse_preference(record, where).prompt
    return prompt_of(_conversation(record, where))


def parse_preference(record: dict[str, Any], where: str) -> Preference:
    """conversations/chosen/rejected, question/response_chosen/response_rejected or instruction/output=[…, …].

    The last two may have `system` and `history`. An answer is a text, a message, or a list of messages that begins
    with the assistant; two full conversations are split where they start to differ. Raises RecordError.
    """
    cell = record.get("output")  # from a table: the two answers as JSON text
    if form_of(record) != "preference" and not (isinstance(cell, str) and cell.lstrip().startswith("[")):
        raise _unfit(record, where, "no preference", PREFERENCES)
    context, system, answers = _asked(record, where)
    sides, systems = [], [system]
    for side, answer in zip(("chosen", "rejected"), answers, strict=True):
        messages, own_system = _answer(answer, side, where)
        sides.append(messages)
        systems.append(own_system)
    whole = [side[0].role in QUESTIONS for side in sides]
    if any(whole):
        context, sides = _split(context, sides, whole, where)
    given = {own for own in systems if own is not None}
    if len(given) > 1:
        raise RecordError(where, "two system prompts", "the record holds system prompts that differ")
    if not context:
        raise RecordError(where, "no prompt", 'the answers need "conversations", "question" or "instruction" before '
                          f"them, found the keys {_keys(record)}")  # fmt: skip
    if context[-1].role not in QUESTIONS:
        raise RecordError(where, "prompt ends with an answer", "the conversation of a preference must end with what "
                          f"both answers reply to, it ends with {context[-1].role}")  # fmt: skip
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        _check_answer(context, side, name, where)
    if sides[0] == sides[1]:
        raise RecordError(where, "answers alike", "the chosen and the rejected answer are the same text")
    prompt = Conversation(tuple(context), next(iter(given), None), tools_of(record, where), where)
    return Preference(prompt, tuple(sides[0]), tuple(sides[1]), where)


def parse_text(record: dict[str, Any], where: str) -> str:
    """The text of a pretraining record {"text": …}, whitespace kept. Raises RecordError if there is none."""
    if not _has(record, "text"):
        raise _unfit(record, where, "no text", '{"text": …}')
    value = text(record["text"], "text", where)
    if not value.strip():
        raise RecordError(where, "empty text", "the text is empty")
    return value


def prompt_of(conversation: Conversation) -> Conversation:
    """The conversation without its last assistant turn; one that ends with a question is its own prompt."""
    messages = conversation.messages
    while messages and messages[-1].role in ANSWERS:
        messages = messages[:-1]
    return replace(conversation, messages=messages)


def parse_history(history: Any, where: str) -> tuple[Message, ...]:
    """Earlier exchanges: [[question, answer], …], a flat [question, answer, …], or either one as JSON text."""
    if history is None or history == "":
        return ()
    if isinstance(history, str):  # a table cell
        history = json_value(history, '"history"', where, "broken history")
    if isinstance(history, (str, dict)) or not isinstance(history, Iterable):
        raise RecordError(where, "broken history", f'"history" must be a list, found {found(history)}')
    flat = [part for item in history for part in (item if isinstance(item, (list, tuple)) else [item])]
    pairs = all(isinstance(item, (list, tuple)) and len(item) == 2 for item in history)
    if not pairs and (len(flat) % 2 or any(isinstance(item, (list, tuple)) for item in history)):
        raise RecordError(where, "broken history", '"history" must be pairs [question, answer] or a flat list of '
                          "questions and answers in turn")  # fmt: skip
    roles = ("user", "assistant") * (len(flat) // 2)
    return tuple(Message(role, text(part, "history", where)) for role, part in zip(roles, flat, strict=True))


# --- pieces ----------------------------------------------------------------------------------------------------------


def _conversation(record: dict[str, Any], where: str) -> Conversation:
    """A conversation in any form, with or without an answer."""
    form = form_of(record)
    if form not in PARTS:
        raise _unfit(record, where, "no conversation", CONVERSATIONS)
    messages, first = PARTS[form](record, where)
    system = optional_text(record.get("system"), "system", where)
    if first is not None and system is not None and first != system:
        raise RecordError(where, "two system prompts", 'the "system" field and the system turn differ')
    check_order(messages, where)
    return Conversation(tuple(messages), first if system is None else system, tools_of(record, where), where)


def _turns(record: dict[str, Any], where: str) -> tuple[list[Message], str | None]:
    keys = [key for key in ("conversations", "messages") if _has(record, key)]
    if len(keys) == 2:
        raise RecordError(where, "two conversations", 'the record has both "conversations" and "messages"; leave one')
    return read_turns(record[keys[0]], keys[0], where)


def _alpaca(record: dict[str, Any], where: str) -> tuple[list[Message], None]:
    """history, and `input` below `instruction`, answered by `output`."""
    parts = [optional_text(record.get(key), key, where) for key in ("instruction", "input")]
    return _exchange(record, "\n".join(part for part in parts if part is not None), "output", where), None


def _qa(record: dict[str, Any], where: str) -> tuple[list[Message], None]:
    return _exchange(record, record["question"], "answer", where), None


PARTS: dict[str, Callable[[dict[str, Any], str], tuple[list[Message], str | None]]] = {
    "conversation": _turns,
    "alpaca": _alpaca,
    "qa": _qa,
}


def _exchange(record: dict[str, Any], question: Any, answer: str | None, where: str) -> list[Message]:
    """The history, the question, and the answer if the record has that key."""
    messages = [*parse_history(record.get("history"), where), Message("user", text(question, "question", where))]
    if answer is not None and record.get(answer) not in (None, ""):
        messages.append(Message("assistant", text(record[answer], answer, where)))
    for number, message in enumerate(messages, 1):
        if not message.content.strip():
            raise RecordError(where, "empty turn", f"turn {number} ({message.role}) is empty")
    return messages


def _asked(record: dict[str, Any], where: str) -> tuple[list[Message], str | None, list[Any]]:
    """The prompt of a preference (empty if the answers are full conversations), and its answers."""
    system = optional_text(record.get("system"), "system", where)
    if _has(record, "conversations") or _has(record, "messages"):
        answers = [record.get("chosen"), record.get("rejected")]
        return *_before_answers(*_turns(record, where), system, where), answers
    if _has(record, "question"):
        names = [(f"response_{side}", side) for side in ("chosen", "rejected")]
        answers = [one_of(record, pair, "two contents", "the record", where) for pair in names]
        return _exchange(record, record["question"], None, where), system, answers
    if _has(record, "instruction"):
        messages = _alpaca({**record, "output": None}, where)[0]
        if not _has(record, "output"):
            return messages, system, [record.get("chosen"), record.get("rejected")]
        answers = record["output"]
        if isinstance(answers, str) and answers.lstrip().startswith("["):  # a table cell
            answers = json_value(answers, '"output"', where, "no pair of answers")
        if not isinstance(answers, (list, tuple)) or len(answers) != 2:
            raise RecordError(where, "no pair of answers", '"output" must be a list [chosen, rejected] in a '
                              f"preference record, found {found(answers)}")  # fmt: skip
        return messages, system, list(answers)
    answers = [record.get("chosen"), record.get("rejected")]
    if isinstance(record.get("prompt"), list):
        return *_before_answers(*read_turns(record["prompt"], "prompt", where), system, where), answers
    if isinstance(record.get("prompt"), str):
        return _exchange(record, record["prompt"], None, where), system, answers
    return [], system, answers


def _before_answers(
    messages: list[Message], first: str | None, system: str | None, where: str
) -> tuple[list[Message], str | None]:
    """The turns before the answers, in order, and the system prompt of the turn `first` or of the record."""
    if first is not None and system is not None and first != system:
        raise RecordError(where, "two system prompts", 'the "system" field and the system turn differ')
    check_order(messages, where)
    return messages, first if system is None else system


def _answer(answer: Any, side: str, where: str) -> tuple[list[Message], str | None]:
    """One side as messages, and its system turn: an answer, or a full conversation, which starts with a question."""
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], str):
        answer = answer[0]
    if isinstance(answer, (list, dict)):
        messages, system = read_turns([answer] if isinstance(answer, dict) else answer, side, where)
        if not messages:
            raise RecordError(where, "broken answer", f'"{side}" holds nothing but a system turn')
        return messages, system
    if answer is None:
        raise RecordError(where, "no answer", f'there is no "{side}" answer')
    if not text(answer, side, where).strip():
        raise RecordError(where, "empty answer", f'"{side}" is empty')
    return [Message("assistant", answer)], None


def _split(
    context: list[Message], sides: list[list[Message]], whole: list[bool], where: str
) -> tuple[list[Message], list[list[Message]]]:
    """The common prefix of two full conversations, up to its last question, and the rest of each."""
    if not all(whole):
        raise RecordError(where, "broken answer", "one answer is a whole conversation, the other is not")
    shared = 0
    for one, other in zip(*sides, strict=False):
        if (one.role, one.content) != (other.role, other.content):
            break
        shared += 1
    while shared and (sides[0][shared - 1].role not in QUESTIONS or shared in map(len, sides)):
        shared -= 1
    prompt = sides[0][:shared]
    if not prompt:
        raise RecordError(where, "no prompt", "the chosen and the rejected conversation do not begin with the same "
                          "question")  # fmt: skip
    if context and context != prompt[: len(context)]:
        raise RecordError(where, "broken answer", "the chosen and rejected conversations do not begin with the "
                          "record's own conversation")  # fmt: skip
    return prompt, [side[shared:] for side in sides]


def _check_answer(context: Sequence[Message], answer: Sequence[Message], side: str, where: str) -> None:
    if not answer or answer[0].role not in ANSWERS or answer[-1].role not in ANSWERS:
        ends = f"{answer[0].role} … {answer[-1].role}" if answer else "nothing"
        raise RecordError(where, "broken answer", f'"{side}" must begin and end with the assistant, found {ends}')
    if not any(message.learn for message in answer if message.role in ANSWERS):
        raise RecordError(where, "nothing learned", f'every turn of "{side}" has the weight 0')
    check_order([*context, *answer], where)


def _has(record: dict[str, Any], key: str) -> bool:
    return record.get(key) is not None


def _keys(record: dict[str, Any]) -> str:
    return ", ".join(map(str, record)) or "none"


def _unfit(record: dict[str, Any], where: str, reason: str, wanted: str) -> RecordError:
    """The error for a record of another stage's form, or of no known form."""
    form = form_of(record)
    if form is not None:
        name, readers = FORMS[form]
        return RecordError(where, f"{form} record", f"found {name} (the keys {_keys(record)}): {readers}; this stage "
                           f"reads {wanted}")  # fmt: skip
    return RecordError(where, reason, f"expected {wanted}, found the keys {_keys(record)}; python convert_dataset.py "
                       "turns other forms into these")  # fmt: skip
