"""Segments → token ids and labels: the only place that sets labels.

Each segment is encoded separately, so the ids of a prompt are a prefix of the ids of the whole, with any tokenizer.

    TextEncoder           (text, where)   → blocks         PT
    ConversationEncoder   Conversation    → an example     SFT

stagewise/chat/preference_encoding.py has the encoders of RM, DPO and PPO.

Each encodes many records at once, which is fastest for a tokenizer.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stagewise.chat.labels import (
    SIDES,
    LabeledSegments,
    drop_first_exchanges,
    label_segments,
    whole_turns,
    without_history,
)
from stagewise.chat.select import AnyTemplate as AnyTemplate
from stagewise.chat.template import Segment, adds_bos
from stagewise.data.examples import Encoded, Example, Row
from stagewise.errors import ArgumentError, RecordError, TooLongError
from stagewise.formats.parsers import Conversation, Message
from stagewise.tokenizer.encode import Piece, PieceEncoder, piece_encoder


def encode_segments(tokenizer: Any, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    """(ids, labels) of the segments, each encoded separately; nothing is added to them."""
    pieces = piece_encoder(tokenizer).row([segment.text for segment in segments])
    example = to_row(pieces, [segment.learn for segment in segments], "?").example()
    return example.input_ids, example.labels


@dataclass
class RecordEncoder:
    """Base of the encoders: every text is encoded by `_encoder`."""

    tokenizer: Any

    def __post_init__(self) -> None:
        self._encoder = PieceEncoder(self.tokenizer)
        self.in_thread = self._encoder.in_thread  # to be called first in each encoding thread


@dataclass
class ConversationEncoder(RecordEncoder):
    """Conversations → examples of at most `max_length` tokens; fastest with `many` at once.

    Args:
        tokenizer, template: the template bound to the tokenizer.
        max_length: tokens of an example.
        train_on_inputs: label the whole conversation, except messages with weight 0.
        mask_history: label only what follows the last question that is kept.
        truncation_side: an overlong conversation loses whole turns from its end ("right") or whole exchanges from its
            start ("left"; the system prompt stays). A single exchange that is too long is cut at the limit.

    Raises:
        ArgumentError: for settings that contradict each other.
    """

    template: AnyTemplate
    max_length: int
    train_on_inputs: bool = False
    mask_history: bool = False
    truncation_side: str = "right"

    def __post_init__(self) -> None:
        if self.truncation_side not in SIDES:
            raise ArgumentError(f"--truncation_side: expected right or left, found {self.truncation_side!r}")
        if self.train_on_inputs and self.mask_history:
            raise ArgumentError(
                "--train_on_inputs trains on everything, --mask_history only on the last turn: give one"
            )
        super().__post_init__()
        self._letters = (
            3.0  # tokens per character of the latest records; it only determines how much is encoded at a time
        )

    def __call__(self, conversation: Conversation) -> tuple[Example, bool]:
        """The conversation as an example, and whether it was cut. Raises RecordError if nothing gets a label."""
        (found,) = self.many([conversation])
        if isinstance(found, RecordError):
            raise found
        ((row,),) = found.items
        return row.example(), found.cut

    def letters(self, conversation: Conversation) -> int:
        return count_characters(conversation.messages)

    def many(self, conversations: Sequence[Conversation]) -> list[Encoded | RecordError]:
        """The same for many conversations, in compact form; a RecordError takes the place of its conversation."""
        found: list[Any] = [self._begin(conversation) for conversation in conversations]
        self._encode([work for work in found if isinstance(work, _Work)])
        return [work if isinstance(work, RecordError) else self._end(work) for work in found]

    def _begin(self, conversation: Conversation) -> "_Work | RecordError":
        try:
            turns = label_segments(self.template.segments, conversation, self.train_on_inputs)
        except RecordError as error:
            return error
        if any(turns.answers) and any(turns.learned):
            first = turns.answers.index(True)
            question = sum(map(self._encoder.at_least, turns.texts[:first]))
            if self.truncation_side == "right" and question >= self.max_length and not any(turns.learned[:first]):
                return self._no_room(conversation.where, turns.learned[: first + 1])
            return _Work(conversation, turns, [])
        why = "every answer has weight 0" if any(turns.answers) else "the conversation holds no answer to learn from"
        return RecordError(conversation.where, "nothing learned", why)

    def _encode(self, works: list["_Work"]) -> None:
        """Encodes each conversation, but hardly more of it than fits the limit."""
        while works:
            pieces, shares = [], []
            for work in works:
                new = work.next_pieces((self.max_length - work.tokens) * self._letters)
                shares.append(len(new))
                pieces += new
            encoded = iter(self._encoder(pieces))
            tokens = 0
            for work, share in zip(works, shares, strict=True):
                for _ in range(share):
                    tokens += work.take(next(encoded))
            self._letters = max(1.0, sum(len(piece.text) for piece in pieces) / max(tokens, 1))
            works = [work for work in works if not work.is_enough(self.max_length, self._encoder.at_least)]

    def _end(self, work: "_Work") -> Encoded | RecordError:
        shortened = False
        if self.truncation_side == "left" and work.answered(self.max_length) > self.max_length:
            try:
                work, shortened = self._shortened(work.conversation), True
            except RecordError as error:
                return error
        turns, where = work.turns, work.conversation.where
        keep, length = whole_turns(turns.answers, map(len, work.ids), self.max_length)
        learned = turns.learned[:keep]
        if self.mask_history:
            try:
                learned = without_history(self.template.segments, work.conversation, turns, keep)
            except RecordError as error:
                return error
        row = to_row(work.ids[:keep], learned, where, self.max_length)
        if not any(end > max(start, 1) for start, end in zip(row.spans[::2], row.spans[1::2], strict=True)):
            if keep == len(turns.texts) and length <= self.max_length and not shortened:
                why = (
                    "the last answer has weight 0, and --mask_history learns no other"
                    if self.mask_history
                    else ("the answers hold no token")
                )
                return RecordError(where, "nothing learned", why)
            return self._no_room(where, learned)
        lost = any(turns.answers[keep:]) or (self.train_on_inputs and keep < len(turns.texts))
        return Encoded("Example", [(row,)], shortened or length > self.max_length or lost)

    def _no_room(self, where: str, learned: Sequence[bool]) -> TooLongError:
        why = "the first question alone fills" if any(learned) else "no label stays within"
        return TooLongError(where, "no room for an answer", f"{why} the limit of {self.max_length} tokens, no token "
                            "of an answer is left; raise --model_max_length")  # fmt: skip

    def _shortened(self, conversation: Conversation) -> "_Work":
        """The conversation without its first exchanges, encoded."""
        known: dict[Piece, array] = {}

        def encoded(part: Conversation) -> _Work:
            work = _Work(part, label_segments(self.template.segments, part, self.train_on_inputs), [])
            pieces = work.next_pieces(float("inf"))
            new = [piece for piece in dict.fromkeys(pieces) if piece not in known]
            known.update(zip(new, self._encoder(new), strict=True))
            for piece in pieces:
                work.take(known[piece])
            return work

        return encoded(drop_first_exchanges(conversation, lambda part: encoded(part).answered() <= self.max_length))


@dataclass
class TextEncoder(RecordEncoder):
    """Documents, (text, where), as blocks of at most `block_size` tokens, all with labels, ending with the eos token.

    They begin with a bos if the tokenizer adds one. A long document is cut; each block begins with the last token of
    the previous one, since a row's first token is never predicted: so every token is predicted exactly once.

    Raises:
        ArgumentError: if the tokenizer has no eos token, or a block would have no label.
    """

    block_size: int

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ArgumentError(
                "the tokenizer has no eos token to end a document with; set one in tokenizer_config.json"
            )
        if self.block_size < 2:
            raise ArgumentError(f"--block_size: a block needs at least 2 tokens, found {self.block_size}")
        self._start = array("i", [self.tokenizer.bos_token_id] if adds_bos(self.tokenizer) else [])
        self._end = array("i", [self.tokenizer.eos_token_id])
        super().__post_init__()

    def letters(self, document: tuple[str, str]) -> int:
        return len(document[0])

    def many(self, documents: Sequence[tuple[str, str]]) -> list[Encoded | RecordError]:
        encoded = self._encoder.encode([text for text, _ in documents])
        return [
            Encoded("Example", [(row,) for row in self._blocks(self._start + ids + self._end, where)])
            for ids, (_, where) in zip(encoded, documents, strict=True)
        ]

    def _blocks(self, ids: array, where: str) -> list[Row]:
        starts = range(0, max(len(ids) - 1, 1), self.block_size - 1)
        blocks = [ids[begin : begin + self.block_size] for begin in starts]
        return [Row(block, array("i", (0, len(block))), where) for block in blocks]


# --- pieces ----------------------------------------------------------------------------------------------------------


@dataclass
class _Work:
    """A conversation that is being encoded: the ids of its first segments."""

    conversation: Conversation
    turns: LabeledSegments
    ids: list[array]
    tokens: int = 0
    said: bool = False  # whether the first answer is encoded

    def next_pieces(self, letters: float) -> list[Piece]:
        """The next segments: up to the next answer, and more if they have at most `letters` characters in total."""
        texts, answers, start = self.turns.texts, self.turns.answers, len(self.ids)
        end, least = start, next((n for n in range(start, len(texts)) if answers[n]), len(texts) - 1)
        while end < len(texts) and (end <= least or letters >= len(texts[end])):
            letters -= len(texts[end])
            end += 1
        return [Piece(texts[n], texts[n - 1] if n else None) for n in range(start, end)]

    def answered(self, limit: int = 0) -> int:
        """Tokens up to the last answer; more than `limit` if it is not encoded, since then it can't fit."""
        last = max(number for number, answer in enumerate(self.turns.answers) if answer)
        return sum(map(len, self.ids[: last + 1])) if last < len(self.ids) else limit + 1

    def take(self, ids: array) -> int:
        self.said = self.said or self.turns.answers[len(self.ids)]
        self.ids.append(ids)
        self.tokens += len(ids)
        return len(ids)

    def is_enough(self, limit: int, at_least: Callable[[str], int]) -> bool:
        """Whether everything is encoded, or nothing more fits: the first answer is there, and the next is beyond."""
        texts, done = self.turns.texts, len(self.ids)
        if done == len(texts) or not self.said or self.tokens > limit:
            return done == len(texts) or self.said
        end = next((n + 1 for n in range(done, len(texts)) if self.turns.answers[n]), len(texts))
        return self.tokens + sum(map(at_least, texts[done:end])) > limit


def count_characters(messages: Iterable[Message]) -> int:
    return sum(len(message.content) for message in messages)


def joined(pieces: Iterable[array]) -> array:
    ids = array("i")
    for piece in pieces:
        ids += piece
    return ids


def to_row(pieces: Sequence[array], learned: Sequence[bool], where: str, limit: int | None = None) -> Row:
    """The concatenated pieces, cut at `limit` tokens, and the spans of those with labels."""
    ids, spans = array("i"), array("i")
    for piece, learn in zip(pieces, learned, strict=True):
        start = len(ids)
        ids += piece
        if learn and len(ids) > start:
            spans.extend((start, len(ids)))
    if limit is not None and len(ids) > limit:
        del ids[limit:]
        pairs = zip(spans[::2], spans[1::2], strict=True)
        spans = array("i", [min(edge, limit) for pair in pairs if pair[0] < limit for edge in pair])
    return Row(ids, spans, where)
