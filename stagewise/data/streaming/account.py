"""The account of a stream, for run.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stagewise.data.mixture import Source
from stagewise.data.records import Account
from stagewise.data.streaming.file_index import Files
from stagewise.data.streaming.shards import LaneState


class StreamAccount:
    """Records read, kept and left out, as in run.json; complete when training ends."""

    def __init__(self, sources: Sequence[Source], files: Sequence[Files]):
        self.entry: dict[str, Any] = {"streamed": True}
        self.sources, self.files = sources, [list(map(str, one.paths)) for one in files]

    def settle(self, states: Sequence[LaneState]) -> None:
        """Adds up all lanes. `passes` is how often a source was started by the lane that is furthest in it."""
        totals = [sum_accounts([state.accounts[number] for state in states]) for number in range(len(self.files))]
        passes = [1 + max((state.taken[n].passes for state in states), default=-1) for n in range(len(self.files))]
        whole = sum_accounts(totals)
        self.entry |= {**whole.as_dict(), "files": [path for files in self.files for path in files]}
        if len(self.files) == 1:
            self.entry["passes"] = passes[0]
            return
        self.entry["sources"] = [
            {
                **{"name": source.name, "path": source.path, "weight": source.weight, "files": files},
                **{"read": total.read, "kept": total.kept, "share": round(total.kept / max(1, whole.kept), 4)},
                "passes": begun,
            }
            for source, files, total, begun in zip(self.sources, self.files, totals, passes, strict=True)
        ]

    def as_dict(self) -> dict[str, Any]:
        """The entry itself, not a copy: it is filled in when training ends."""
        return self.entry


def sum_accounts(accounts: Sequence[Account]) -> Account:
    """The sum of several accounts."""
    total = Account(*(sum(getattr(account, name) for account in accounts) for name in ("read", "kept", "cut")))
    for account in accounts:
        total.leave_out_as(account)
    return total
