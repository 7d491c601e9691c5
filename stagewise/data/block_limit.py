"""--max_train_samples and --max_eval_samples in pretraining: they count rows of --block_size tokens, not documents.

documents    aaaaaaaaaa bb c dd …           of any length: a .txt file is one
blocks       aaaa aaaa aa bb c dd …         what they are cut into, here of 4 tokens
packed rows  aaaa | aaaa | aabb | cdd … |   three rows hold the blocks up to bb; padded, each block is a row
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from stagewise.data.packing import pack


@dataclass(frozen=True)
class BlockLimit:
    """At most `rows` rows: packed ones of `capacity` tokens, or one for each block where that is None."""

    rows: int
    capacity: int | None
    reason: str  # the reason under which records beyond the limit are counted

    def reached(self, blocks: int, tokens: int) -> bool:
        """Whether this many blocks, with this many tokens in total, fill `rows` rows however they are packed."""
        return blocks >= self.rows if self.capacity is None else tokens >= self.rows * self.capacity

    def kept(self, lengths: Sequence[int]) -> int:
        """How many of the first blocks, with `lengths` tokens each, are in the rows."""
        if self.capacity is None or len(lengths) <= self.rows:
            return min(len(lengths), self.rows)
        least, most = self.rows, bisect_right(list(accumulate(lengths)), self.rows * self.capacity)
        if most <= least or self._made_of(lengths, most) <= self.rows:
            return max(least, most)
        while most - least > 1:
            middle = (least + most) // 2
            made = self._made_of(lengths, middle)
            if made == self.rows:
                return middle
            least, most = (middle, most) if made < self.rows else (least, middle)
        return least

    def _made_of(self, lengths: Sequence[int], blocks: int) -> int:
        return len(pack(lengths[:blocks], self.capacity))
