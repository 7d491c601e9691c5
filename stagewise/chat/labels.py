"""Which parts of a conversation have labels, and what is kept of one that is too long: whole turns, never half a
header.

system question₁ | answer₁ | question₂ | answer₂ | question₃ | answer₃        segments
right: the end goes first    system question₁ | answer₁ | question₂ | answer₂
left: the start goes first   system question₂ | answer₂ | question₃ | answer₃
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from stagewise.chat.template import Segment
from stagewise.formats.parsers import ANSWERS, Conversation

SIDES = ("right", "left")
Render = Callable[..., list[Segment]]  # the `segments` method of a template


@dataclass(frozen=True)
class LabeledSegments:
    """The segments of a conversation: which are answers of the model, and which have labels."""

    texts: list[str]
    answers: list[bool]
    learned: list[bool]


def label_segments(render: Render, conversation: Conversation, train_on_inputs: bool = False) -> LabeledSegments:
    """The segments; answers have labels, or everything with `train_on_inputs`, except messages with weight 0.

    Raises RecordError if the template can't render the conversation.
    """
    segments = render(conversation)
    texts, learned = [segment.text for segment in segments], [segment.learn for segment in segments]
    unlearned = [number for number, message in enumerate(conversation.messages) if not message.learn]
    if not unlearned:
        return LabeledSegments(texts, learned, [True] * len(texts) if train_on_inputs else learned)
    # Segments don't distinguish an answer without labels from context; the same conversation with labels on every
    # answer does.
    messages = tuple(replace(message, learn=True) for message in conversation.messages)
    answers = [segment.learn for segment in render(replace(conversation, messages=messages))]
    if train_on_inputs:
        learned = [own or not answer for own, answer in zip(learned, answers, strict=True)]
        for number in unlearned:
            if messages[number].role not in ANSWERS:  # the segment that holds it ends with the next answer's lead
                asked = render(replace(conversation, messages=messages[: number + 1]), generation=True)
                learned[len(asked) - 1] = False
    return LabeledSegments(texts, answers, learned)


def without_history(render: Render, conversation: Conversation, turns: LabeledSegments, keep: int) -> list[bool]:
    """`turns.learned` of the first `keep` segments, restricted to what follows the last answered question."""
    said = sum(turns.answers[:keep])
    for place in reversed(_questions(conversation)):
        before = 0
        if place:
            earlier = replace(conversation, messages=conversation.messages[:place])
            before = sum(label_segments(render, earlier).answers)
        if before < said:
            break
    numbers = [number for number, answer in enumerate(turns.answers) if answer]
    start = numbers[before] if before < said else keep
    return [learned and number >= start for number, learned in enumerate(turns.learned[:keep])]


def whole_turns(answers: Sequence[bool], lengths: Iterable[int], limit: int) -> tuple[int, int]:
    """The number of segments that fit `limit` tokens, and their length; lengths of the last ones may be missing.

    All of them if they fit; otherwise the last one kept is an answer. If not even the first answer fits, it is the
    last one kept, and is to be cut.
    """
    keep = length = total = 0
    for number, (answer, size) in enumerate(zip(answers, lengths, strict=False), 1):
        total += size
        if (answer or number == len(answers)) and (total <= limit or (answer and not keep)):
            keep, length = number, total
        if total > limit and keep:
            break
    return keep, length


def drop_first_exchanges(conversation: Conversation, fits: Callable[[Conversation], bool]) -> Conversation:
    """The conversation starting at the first later question from which on it fits; at least its last exchange."""
    last = max(number for number, message in enumerate(conversation.messages) if message.role in ANSWERS)
    parts = [
        replace(conversation, messages=conversation.messages[place:])
        for place in _questions(conversation)
        if 0 < place < last
    ]
    if not parts:
        return conversation
    return parts[min(bisect_left(parts, True, key=fits), len(parts) - 1)]


def _questions(conversation: Conversation) -> list[int]:
    return [number for number, message in enumerate(conversation.messages) if message.role == "user"]
