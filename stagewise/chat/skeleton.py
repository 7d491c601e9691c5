"""The text that a chat template puts around messages, found by rendering placeholders instead of words.

    texts and places   "<|im_start|>user\\n" 0 "<|im_end|>\\n<|im_start|>assistant\\n" | 1 "<|im_end|>" | "\\n"

The same turns with other words fill the same skeleton. A cut is only accepted if the rendered text equals the skeleton
with its words filled in, character by character.
"""

import re
from collections.abc import Sequence
from typing import Any

MARK = re.compile("\ue000(\\d+)\ue001")
SHORT = 6  # messages, at least: a first exchange, one in the middle, and a last one

Cut = list[tuple[str, bool]]  # (text, whether it is an answer); concatenated they are the whole
# (text or index of a message, number of its piece, whether it is an answer)
Skeleton = list[tuple[str | int, int, bool]]


def marked_messages(count: int, system: bool) -> list[dict[str, Any]]:
    """`count` alternating messages, including a system prompt, with placeholders instead of words."""
    roles = ["system"] * system + ["user", "assistant"] * count
    return [{"role": role, "content": f"\ue000{place}\ue001"} for place, role in enumerate(roles[:count])]


def short_count(count: int, system: bool) -> int | None:
    """The number of messages from which to learn `count` messages with the same end; None for those themselves."""
    short = SHORT + system + (count - system - SHORT) % 2
    return short if count > short else None


def lengthened(cut: Cut, count: int) -> Cut:
    """The cut of a conversation of placeholders with its second exchange repeated up to `count` messages."""
    known = 1 + max(int(place) for text, _ in cut for place in MARK.findall(text))
    first, middle, rest = cut[:2], cut[2:4], cut[4:]
    repeated = [_shifted(piece, by) for by in range(0, count - known + 1, 2) for piece in middle]
    return [*first, *repeated, *(_shifted(piece, count - known) for piece in rest)]


def skeleton_of(cut: Cut) -> Skeleton:
    """The cut of a conversation of placeholders as texts and indices."""
    return [
        (int(part) if odd % 2 else part, number, is_answer)
        for number, (text, is_answer) in enumerate(cut)
        for odd, part in enumerate(MARK.split(text))
        if part
    ]


def filled(skeleton: Skeleton, words: Sequence[str], whole: str) -> Cut | None:
    """`whole` cut like the skeleton, or None if it isn't the skeleton with these words.

    A family may render words unchanged, without leading newlines (Qwen3) or without surrounding white space.
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
