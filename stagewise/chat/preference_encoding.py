"""Preference pairs and prompts → token ids.

    PreferenceEncoder     Preference      → a pair         RM, DPO
    PromptEncoder         Conversation    → a prompt       PPO

Which text is encoded next depends on the ids so far: a prompt that is too long loses its first exchanges. So each
record is a generator that requests ids, and one tokenizer call serves many of them.
"""

from array import array
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stagewise.chat.encoding import RecordEncoder, count_characters, joined, to_row
from stagewise.chat.labels import label_segments, whole_turns
from stagewise.chat.reward_template import Ending
from stagewise.chat.select import AnyTemplate
from stagewise.data.examples import Encoded, PreferenceExample, Row
from stagewise.errors import RecordError, TooLongError
from stagewise.formats.parsers import Conversation, Preference
from stagewise.tokenizer.encode import Piece, PieceEncoder, piece_encoder, pieces_of


@dataclass
class PromptEncoder(RecordEncoder):
    """Conversations → their ids up to the start of the answer, at most `max_length`: see encode_prompt."""

    template: AnyTemplate
    max_length: int

    def letters(self, conversation: Conversation) -> int:
        return count_characters(conversation.messages)

    def many(self, conversations: Sequence[Conversation]) -> list[Encoded | RecordError]:
        """They have no labels; one that lost exchanges counts as cut."""
        return _together([self._encoded(each) for each in conversations], self._encoder)

    def _encoded(self, conversation: Conversation) -> "Asking":
        pieces, prompt = yield from _prompt(self.template, conversation, self.max_length, self._encoder.at_least)
        row = Row(joined(pieces), array("i"), conversation.where)
        return Encoded("Example", [(row,)], prompt.messages != conversation.messages)


@dataclass
class PreferenceEncoder(RecordEncoder):
    """Preferences → both answers after the same prompt: see encode_preference."""

    template: AnyTemplate
    max_source_length: int
    max_target_length: int
    ending: Ending | None = None

    def letters(self, preference: Preference) -> int:
        return sum(map(count_characters, (preference.prompt.messages, preference.chosen, preference.rejected)))

    def many(self, preferences: Sequence[Preference]) -> list[Encoded | RecordError]:
        limits = self.max_source_length, self.max_target_length, self._encoder.at_least
        return _together([_pair(self.template, each, *limits, self.ending) for each in preferences], self._encoder)


def encode_prompt(
    tokenizer: Any, template: AnyTemplate, conversation: Conversation, limit: int
) -> tuple[list[int], Conversation]:
    """Ids up to the start of the answer, and the conversation with the exchanges that are kept.

    The earliest exchanges are dropped until it fits. Raises RecordError if the last question alone has more than
    `limit` tokens.
    """
    encoder = piece_encoder(tokenizer)
    pieces, prompt = _alone(_prompt(template, conversation, limit, encoder.at_least), encoder)
    return joined(pieces).tolist(), prompt


def encode_preference(
    tokenizer: Any,
    template: AnyTemplate,
    preference: Preference,
    max_source_length: int,
    max_target_length: int,
    ending: Ending | None = None,
) -> tuple[PreferenceExample, bool]:
    """Both answers after the same prompt, each answer (with its end marker) at most `max_target_length` tokens.

    An overlong answer of several turns loses whole turns from its end; only its first turn may be cut. With `ending`
    the rows are those of a reward model: each is encoded as one text, like `apply_chat_template` does, and a cut
    answer is closed with the end marker, too; labels mark the scored answer and may begin one token late. Returns
    whether an answer was cut or an exchange of the prompt dropped. Raises RecordError if both answers have the same
    tokens, one has no label, or the last question is too long.
    """
    encoder = piece_encoder(tokenizer)
    limits = max_source_length, max_target_length, encoder.at_least
    found = _alone(_pair(template, preference, *limits, ending), encoder)
    ((chosen, rejected),) = found.items
    return PreferenceExample(chosen.example(), rejected.example(), preference.where), found.cut


# --- records whose ids say what is asked for next --------------------------------------------------------------------

# Yields texts of a conversation, from its start, to get their ids, as often as needed; then returns.
Asking = Generator[Sequence[str], list[array], Any]


def _prompt(template: AnyTemplate, conversation: Conversation, limit: int, at_least: Callable[[str], int]) -> Asking:
    """The ids of each segment of a prompt, and the conversation they show: see encode_prompt."""
    messages = conversation.messages
    while True:
        prompt = replace(conversation, messages=messages)
        texts = [segment.text for segment in template.segments(prompt, generation=True)]
        later = next((n for n, message in enumerate(messages) if message.role == "user" and n > 0), None)
        if later is None or sum(map(at_least, texts)) <= limit:  # otherwise it certainly does not fit
            pieces = yield texts
            length = sum(map(len, pieces))
            if length <= limit:
                return pieces, prompt
            if later is None:
                raise TooLongError(conversation.where, "prompt too long", f"the last question alone has {length} "
                                   f"tokens, the limit is {limit}; raise --max_source_length")  # fmt: skip
        messages = messages[later:]


def _pair(
    template: AnyTemplate,
    preference: Preference,
    max_source_length: int,
    max_target_length: int,
    at_least: Callable[[str], int],
    ending: Ending | None = None,
) -> Asking:
    """The pair: see encode_preference."""
    where = preference.where
    asked, prompt = yield from _prompt(template, preference.prompt, max_source_length, at_least)
    cut = prompt.messages != preference.prompt.messages
    first, prompt_ids = len(asked), joined(asked)
    rows, shortened = [], False
    for answer in (preference.chosen, preference.rejected):
        turns = label_segments(template.segments, replace(prompt, messages=(*prompt.messages, *answer)))
        last = max(number for number, answers in enumerate(turns.answers) if answers) + 1
        ids = yield turns.texts[:last]
        if joined(ids[:first]) != prompt_ids:
            raise RecordError(where, "inexact cut", "the prompt's tokens change when an answer follows")
        keep, length = whole_turns(turns.answers[first:last], map(len, ids[first:]), max_target_length)
        shortened = shortened or length > max_target_length or first + keep < last
        learned = [False] * first + turns.learned[first : first + keep]
        row = to_row(ids[: first + keep], learned, where, len(prompt_ids) + max_target_length)
        if not row.spans and any(turns.learned[first + keep :]):
            raise TooLongError(where, "answers too long", f"no turn with labels stays within the limit of "
                               f"{max_target_length} tokens; raise --max_target_length")  # fmt: skip
        if not row.spans:
            raise RecordError(where, "nothing learned", "every turn of an answer has weight 0")
        if ending is not None:
            text = "".join(turns.texts[: first + keep])
            row = yield from _as_one_text(row, text, ending, len(prompt_ids), max_target_length, length)
        rows.append(row)
    if rows[0].ids == rows[1].ids and shortened:
        raise TooLongError(where, "answers too long", f"both answers begin with the same {max_target_length} or fewer "
                           "tokens and differ only beyond the limit; raise --max_target_length")  # fmt: skip
    if rows[0].ids == rows[1].ids:
        raise RecordError(where, "answers alike", "both answers are the same tokens")
    return Encoded("PreferenceExample", [tuple(rows)], cut or shortened)


def _as_one_text(row: Row, text: str, ending: Ending, prompt: int, limit: int, length: int) -> Asking:
    """A row of pieces as the row of a reward model.

    Args:
        row: the row of pieces encoded separately, its answer cut at `limit` tokens.
        text: the whole conversation, up to the end marker.
        ending: how the row ends.
        prompt: tokens of the prompt.
        length: tokens of the answer's pieces.
    """
    whole, closing = yield [text, ending.closing + ending.tail]
    if length <= limit and len(whole) <= prompt + limit:
        if not ending.tail and whole == row.ids:
            return row
        ids = whole
        if ending.tail:
            (ids,) = yield [text + ending.tail]
    else:
        ids = whole[: prompt + max(limit - len(closing), 0)] + closing
    same = next((n for n, (own, other) in enumerate(zip(row.ids[:prompt], ids, strict=False)) if own != other), prompt)
    return Row(ids, array("i", (min(same, len(ids) - 1), len(ids))), row.where)


def _together(jobs: Sequence[Asking], encode: PieceEncoder) -> list[Any]:
    """The result of each job, or its RecordError; the requests of all jobs are encoded at once, each text once."""
    found: list[Any] = [None] * len(jobs)
    known: dict[Piece, array] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(jobs)))
    while answers:
        asked: dict[int, list[Piece]] = {}
        for number, answer in answers.items():
            try:
                asked[number] = pieces_of(jobs[number].send(answer))
            except StopIteration as done:
                found[number] = done.value
            except RecordError as error:
                found[number] = error
        new = list(dict.fromkeys(piece for pieces in asked.values() for piece in pieces if piece not in known))
        known.update(zip(new, encode(new), strict=True))
        answers = {number: [known[piece] for piece in pieces] for number, pieces in asked.items()}
    return found


def _alone(job: Asking, encode: PieceEncoder) -> Any:
    """The result of one job. Raises its RecordError."""
    (found,) = _together([job], encode)
    if isinstance(found, RecordError):
        raise found
    return found
