"""Records that hold the text of a control token: what a person wrote as `<|im_end|>` is read as the end of a turn.

The text is encoded as the token that it names, as every server reads it that tokenizes a rendered chat template. That
cannot be undone for one record alone, so it is counted and said.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from stagewise.data.records import Account
from stagewise.formats.parsers import Conversation, Preference


class Watched:
    """Records as they are, while those with the text of a control token are counted in `account`.

    Args:
        records: conversations, preferences, or documents (text, where).
        account: `control` counts them, `first_control` says where the first one is and what it holds.
        tokenizer: its special tokens are what is looked for.
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
    """The same of records whose number is known beforehand."""

    def __len__(self) -> int:
        return len(self._records)


def watched(records: Iterable[Any], account: Account, tokenizer: Any) -> Watched:
    return (WatchedSequence if hasattr(records, "__len__") else Watched)(records, account, tokenizer)


def any_of(names: Iterable[str]) -> str:
    """A pattern of the names, the longest that fits: `<(?:/s>|s>|unused(?:0>|1>))`.

    A tokenizer may have thousands that begin alike: tried one by one at every `<` they take longer than encoding.
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
    """What people wrote in a record."""
    if isinstance(record, tuple):
        return [record[0]]
    conversation, answers = record, ()
    if isinstance(record, Preference):
        conversation, answers = record.prompt, (*record.chosen, *record.rejected)
    texts = [message.content for message in (*conversation.messages, *answers)]
    return [*texts, *filter(None, (conversation.system, conversation.tools))]


def control_line(account: Account) -> str | None:
    """A line for a person, None where no record holds such a text."""
    if not account.control:
        return None
    told = "1 record holds" if account.control == 1 else f"{account.control:,} records hold"
    return (
        f"{told} the text of a control token and will be read with that token in it; {account.first_control} "
        "(docs/labels.md)"
    )
