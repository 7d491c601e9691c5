"""Records that are left out: a malformed one ends the run, an overlong one is counted.

A malformed record (RecordError) is an error unless --on_bad_record skip is given. A valid record that does not fit the
length limits (TooLongError) is left out and counted by its reason, with one log line, as long as at least half of the
records are kept.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from stagewise.errors import ArgumentError, RecordError, TooLongError
from stagewise.formats.messages import TOO_LONG

LOOK_ON = 10_000  # records after a bad one that are checked before the run ends: seconds, for files of any size
WAY_OUT = "--on_bad_record skip leaves such records out and counts them"


def with_those_behind(error: RecordError, behind: Iterable[Any]) -> RecordError:
    """The same error, with the number of bad records after it and the flag that continues without them.

    Args:
        error: the error of the first bad record.
        behind: the outcome of each record after it: a RecordError, or anything else for a valid one. The first LOOK_ON
            are taken.
    """
    looked_at = bad = alike = 0
    try:
        for other in islice(behind, LOOK_ON):
            looked_at += 1
            if isinstance(other, RecordError) and not isinstance(other, TooLongError):
                bad, alike = bad + 1, alike + (other.reason == error.reason)
    except RecordError as other:  # raised while the next record was read
        looked_at, bad, alike = looked_at + 1, bad + 1, alike + (other.reason == error.reason)
    if not looked_at:
        found = "it is the last record"
    elif not bad:
        found = f"none of the next {looked_at:,} records is bad"
    else:
        found = f"of the next {looked_at:,} records {bad:,} are bad as well, {alike:,} of them for the same reason"
    return error.saying(f"{error.message} ({found}; {WAY_OUT})")


def too_long(left_out: Mapping[str, int]) -> dict[str, int]:
    """The reasons, with their counts, that only say a record is too long."""
    return {reason: count for reason, count in left_out.items() if reason in TOO_LONG}


def check_share(left_out: Mapping[str, int], kept: int, example: RecordError | None, what: str) -> None:
    """Raises ArgumentError if more records are too long than are kept.

    Args:
        left_out: reason → count.
        kept: how many records fit.
        example: the error of the first one that does not.
        what: the kind of records, for the message.
    """
    long = too_long(left_out)
    if sum(long.values()) > kept:
        others = f", or --on_bad_record skip to continue with the {kept:,} that fit" if kept else ""
        raise ArgumentError(
            f"{what}: {_share(long, kept)} are too long ({_reasons(long)}), the first: {example}. Give "
            f"{_remedies(long).rstrip(',')}{others}"
        )


def remedy(left_out: Mapping[str, int]) -> str:
    """What would keep the overlong records, as the end of a sentence; empty if there are none."""
    long = too_long(left_out)
    return f"; {_remedies(long)} keeps those that are too long" if long else ""


def too_long_line(left_out: Mapping[str, int], kept: int, limits: Mapping[str, int] | None = None) -> str | None:
    """A log line about the overlong records, None if there are none; `limits` by the names of their flags."""
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
