"""Encoders made of a function of one record, for tests that look at what becomes of what is encoded."""

from array import array

import numpy as np

from stagewise.chat.encoding import ConversationEncoder, TextEncoder
from stagewise.data.examples import IGNORE_INDEX, Encoded, Example, PreferenceExample, Row
from stagewise.errors import RecordError


class OneByOne:
    """`encode(record)` gives an example, a pair, (either, whether it was cut) or a list of examples."""

    def __init__(self, encode):
        self.encode = encode

    def many(self, records):
        return [self._one(record) for record in records]

    def letters(self, record):
        return 1

    def in_thread(self):
        pass

    def _one(self, record):
        try:
            result = self.encode(record)
        except RecordError as error:
            return error
        result, cut = result if isinstance(result, tuple) else (result, False)
        if isinstance(result, PreferenceExample):
            return Encoded("PreferenceExample", [(row_of(result.chosen), row_of(result.rejected))], cut)
        results = result if isinstance(result, list) else [result]
        return Encoded("Example", [(row_of(example),) for example in results], cut)


def row_of(example: Example) -> Row:
    """The example as numbers; a label is the token's own id or −100."""
    learned = np.array(example.labels) != IGNORE_INDEX
    edges = np.flatnonzero(np.diff(learned, prepend=False, append=False))
    row = Row(array("i", example.input_ids), array("i", edges.tolist()), example.where)
    assert row.example() == example
    return row


def encode_text(tokenizer, text, block_size, where="?"):
    """The blocks of one document."""
    (found,) = TextEncoder(tokenizer, block_size).many([(text, where)])
    return [row.example() for (row,) in found.items]


def encode_conversation(
    tokenizer,
    template,
    conversation,
    max_length: int,
    *,
    train_on_inputs: bool = False,
    mask_history: bool = False,
    truncation_side: str = "right",
) -> tuple[Example, bool]:
    """One conversation as an example of at most `max_length` tokens, and whether it was cut: see ConversationEncoder.

    Raises RecordError where nothing would be learned.
    """
    settings = (train_on_inputs, mask_history, truncation_side)
    return ConversationEncoder(tokenizer, template, max_length, *settings)(conversation)
