"""Records that are left out: a malformed one ends the run, one that is only too long is counted.

A malformed record (RecordError) is an error unless --on_bad_record skip is given. A sound record that does not fit the
length limits (TooLongError) is never one: it is left out, counted by its reason, and named in one line, as long as at
least half of the records are kept.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from stagewise.errors import ArgumentError, RecordError, TooLongError
from stagewise.formats.messages import TOO_LONG

LOOK_ON = 10_000  # records behind a bad one that are checked before the run ends: seconds, whatever the files' size
WAY_OUT = "--on_bad_record skip leaves such records out and counts them"


def with_those_behind(error: RecordError, behind: Iterable[Any]) -> RecordError:
    """The same error, saying how many of the records behind it are bad as well and which flag continues without them.

    Args:
        error: what is wrong with the first bad record.
        behind: what became of each record behind it: a RecordError, or anything else for one that is sound. The first
            LOOK_ON are taken.
    """
    looked_at = bad = alike = 0
    try:
        for other in islice(behind, LOOK_ON):
            looked_at += 1
            if isinstance(other, RecordError) and not isinstance(other, TooLongError):
                bad, alike = bad + 1, alike + (other.reason == error.reason)
    except RecordError as other:  # found while the next record was read
        looked_at, bad, alike = looked_at + 1, bad + 1, alike + (other.reason == error.reason)
    if not looked_at:
        found = "it is the last record"
    elif not bad:
        found = f"none of the next {looked_at:,} records is bad"
    else:
        found = f"of the next {looked_at:,} records {bad:,} are bad as well, {alike:,} of them for the same reason"
    return error.saying(f"{error.message} ({found}; {WAY_OUT})")


def too_long(left_out: Mapping[str, int]) -> dict[str, int]:
    """Those of the reasons, with their counts, for which a record is only too long."""
    return {reason: count for reason, count in left_out.items() if reason in TOO_LONG}


def check_share(left_out: Mapping[str, int], kept: int, example: RecordError | None, what: str) -> None:
    """Raises ArgumentError where more records are too long than are kept.

    Args:
        left_out: reason → count.
        kept: how many records fit.
        example: what was said of the first of those that do not.
        what: which records they are, for the message.
    """
    long = too_long(left_out)
    if sum(long.values()) > kept:
        others = f", or --on_bad_record skip to continue with the {kept:,} that fit" if kept else ""
        raise ArgumentError(
            f"{what}: {_share(long, kept)} are too long ({_reasons(long)}), the first: {example}. Give "
            f"{_remedies(long).rstrip(',')}{others}"
        )


def remedy(left_out: Mapping[str, int]) -> str:
    """What keeps the records that are too long, for the end of a sentence; nothing where there is none."""
    long = too_long(left_out)
    return f"; {_remedies(long)} keeps those that are too long" if long else ""


def too_long_line(left_out: Mapping[str, int], kept: int, limits: Mapping[str, int] | None = None) -> str | None:
    """A line about the records that are too long, None where there is none; `limits` by the names of their flags."""
    long = too_long(left_out)
    if not long:
        return None
    now = " and ".join(str(limit) for name, limit in (limits or {}).items() if name in _remedies(long))
    now = f" (now {now})" if now else ""
    return f"{_share(long, kept)} are left out because they are too long; {_remedies(long)}{now} keeps them"


def _share(long: Mapping[str, int], kept: int) -> str:
    count = sum(long.values())
    return f"{count:,} of {count + kept:,} records ({count / (count + kept):.1%})"


def _reasons(long: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in long.items())


def _remedies(long: Mapping[str, int]) -> str:
    return " or ".join(dict.fromkeys(TOO_LONG[reason] for reason in long))
