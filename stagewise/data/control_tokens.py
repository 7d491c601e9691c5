"""Records whose text contains a control token: `<|im_end|>` written by a person is read as the end of a turn.

Such text is encoded as the token it names, as by every server that tokenizes a rendered chat template. This cannot be
changed for single records, so they are counted and reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from stagewise.data.records import Account
from stagewise.formats.parsers import Conversation, Preference


class Watched:
    """Passes records through, counting those with the text of a control token in `account`.

    Args:
        records: conversations, preferences, or documents (text, where).
        account: `control` counts them, `first_control` names the first one and its token.
        tokenizer: its special tokens are searched for.
    """

    def __init__(self, records: Iterable[Any], account: Account, tokenizer: Any):
        self._records, self._account = records, account
        names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        pattern = any_of([name for name in names if name.strip()])
        self._find = re.compile(pattern).search if pattern else None

    def __iter__(self) -> Iterator[Any]:
        if self._find is None:
            yield from self._records
            return
        for record in self._records:
            found = next(filter(None, map(self._find, texts_of(record))), None)
            if found:
                self._account.control += 1
                where = record[1] if isinstance(record, tuple) else record.where
                self._account.first_control = self._account.first_control or f"{where} holds {found[0]!r}"
            yield record


class WatchedSequence(Watched):
    """The same for records of a known number."""

    def __len__(self) -> int:
        return len(self._records)


def count_control_tokens(records: Iterable[Any], account: Account, tokenizer: Any) -> Watched:
    return (WatchedSequence if hasattr(records, "__len__") else Watched)(records, account, tokenizer)


def any_of(names: Iterable[str]) -> str:
    """A pattern that matches the longest of the names: `<(?:/s>|s>|unused(?:0>|1>))`.

    A tokenizer may have thousands with a common prefix: trying them one by one at every `<` would take longer than
    encoding.
    """
    branches, ends = [], False
    for letter, group in groupby(sorted(set(names)), key=lambda name: name[:1]):
        if letter:
            branches.append(re.escape(letter) + any_of(name[1:] for name in group))
        else:
            ends = True
    whole = "|".join(branches)
    return f"(?:{whole})" + "?" * ends if len(branches) > 1 or (ends and branches) else whole


def texts_of(record: Conversation | Preference | tuple[str, str]) -> Iterable[str]:
    """The texts that people wrote in a record."""
    if isinstance(record, tuple):
        return [record[0]]
    conversation, answers = record, ()
    if isinstance(record, Preference):
        conversation, answers = record.prompt, (*record.chosen, *record.rejected)
    texts = [message.content for message in (*conversation.messages, *answers)]
    return [*texts, *filter(None, (conversation.system, conversation.tools))]


def control_line(account: Account) -> str | None:
    """A log line, None if no record contains such a text."""
    if not account.control:
        return None
    told = "1 record holds" if account.control == 1 else f"{account.control:,} records hold"
    return (
        f"{told} the text of a control token and will be read with that token in it; {account.first_control} "
        "(docs/labels.md)"
    )
