"""What a chat template puts around the words of a conversation, found with marks in place of the words.

    texts and places   "<|im_start|>user\\n" 0 "<|im_end|>\\n<|im_start|>assistant\\n" | 1 "<|im_end|>" | "\\n"

The same turns with other words fill the same skeleton. That a rendered text is the skeleton with its words in it is
checked letter by letter, so that a cut which is taken is the cut.
"""

import re
from collections.abc import Sequence
from typing import Any

MARK = re.compile("\ue000(\\d+)\ue001")
SHORT = 6  # messages, at least: a first exchange, one in the middle, and a last

Cut = list[tuple[str, bool]]  # (text, whether it is an answer), which joined are the whole
Skeleton = list[tuple[str | int, int, bool]]  # (text or the place of a message, number of its piece, is it an answer)


def marked_messages(count: int, system: bool) -> list[dict[str, Any]]:
    """`count` messages in turn, a system prompt counted in, with marks in place of words."""
    roles = ["system"] * system + ["user", "assistant"] * count
    return [{"role": role, "content": f"\ue000{place}\ue001"} for place, role in enumerate(roles[:count])]


def short_count(count: int, system: bool) -> int | None:
    """How many messages to learn `count` messages from, ending alike; None for those themselves."""
    short = SHORT + system + (count - system - SHORT) % 2
    return short if count > short else None


def lengthened(cut: Cut, count: int) -> Cut:
    """The cut of a marked conversation with its second exchange repeated until there are `count` messages."""
    known = 1 + max(int(place) for text, _ in cut for place in MARK.findall(text))
    first, middle, rest = cut[:2], cut[2:4], cut[4:]
    repeated = [_shifted(piece, by) for by in range(0, count - known + 1, 2) for piece in middle]
    return [*first, *repeated, *(_shifted(piece, count - known) for piece in rest)]


def skeleton_of(cut: Cut) -> Skeleton:
    """A marked conversation's cut as texts and places."""
    return [
        (int(part) if odd % 2 else part, number, is_answer)
        for number, (text, is_answer) in enumerate(cut)
        for odd, part in enumerate(MARK.split(text))
        if part
    ]


def filled(skeleton: Skeleton, words: Sequence[str], whole: str) -> Cut | None:
    """`whole` cut as the skeleton is, or None where it isn't the skeleton with these words in it.

    A family may show words as they are, without newlines before them (Qwen3) or without white space around them.
    """
    cut: Cut = []
    start = cursor = 0
    for place, (part, number, is_answer) in enumerate(skeleton):
        if isinstance(part, str):
            shown = part if whole.startswith(part, cursor) else None
        else:
            following = skeleton[place + 1][0] if place + 1 < len(skeleton) else ""
            behind = following if isinstance(following, str) else ""
            forms = (words[part], words[part].lstrip("\n"), words[part].strip())
            shown = next((form for form in forms if whole.startswith(form + behind, cursor)), None)
        if shown is None:
            return None
        cursor += len(shown)
        if place + 1 == len(skeleton) or skeleton[place + 1][1] != number:
            cut.append((whole[start:cursor], is_answer))
            start = cursor
    return cut if cursor == len(whole) else None


def _shifted(piece: tuple[str, bool], by: int) -> tuple[str, bool]:
    return MARK.sub(lambda mark: f"\ue000{int(mark[1]) + by}\ue001", piece[0]), piece[1]
