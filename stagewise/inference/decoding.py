"""Between `generate` and a reader: each row's sampling from its own random numbers, and ids that become complete
words.

A row's answer depends only on its prompt and the seed: not on the rest of the batch, its padding, or the number of
processes.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from stagewise.inference.sampling import sample_token

# Settings that exclude tokens from sampling, in transformers' order, and the value that excludes none.
FILTERS = {
    "top_h": (TopHLogitsWarper, None),
    "top_k": (TopKLogitsWarper, 0),
    "top_p": (TopPLogitsWarper, 1),
    "min_p": (MinPLogitsWarper, 0),
    "typical_p": (TypicalLogitsWarper, 1),
    "epsilon_cutoff": (EpsilonLogitsWarper, 0),
    "eta_cutoff": (EtaLogitsWarper, 0),
}
BROKEN = "\ufffd"  # a tokenizer's placeholder for an incomplete character


class RowChoice(LogitsProcessor):
    """Applies transformers' own penalties and filters to each row without its padding, then samples each row's token.

    Args:
        prompts: the rows' prompt ids, without padding.
        beams: rows of the scores per prompt; above 1 nothing is sampled.
        numbers: (B, N), the random number of each token of each row; None: greedy decoding.
        settings: temperature, those of FILTERS, repetition_penalty, no_repeat_ngram_size and bad_words_ids as in
            transformers.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], beams: int, numbers: torch.Tensor | None, settings: dict[str, Any]
    ):
        self.prompts, self.beams, self.numbers = [torch.tensor(prompt) for prompt in prompts], beams, numbers
        self.begin: int | None = None  # columns of the ids that generate starts with: padded prompts, or none
        self.penalties: list[LogitsProcessor] = []
        if settings["repetition_penalty"] != 1:
            self.penalties.append(RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
        if settings["no_repeat_ngram_size"]:
            self.penalties.append(NoRepeatNGramLogitsProcessor(settings["no_repeat_ngram_size"]))
        if settings["bad_words_ids"]:
            self.penalties.append(NoBadWordsLogitsProcessor(settings["bad_words_ids"]))
        self.filters: list[LogitsProcessor] = []
        if numbers is None:
            return
        if settings["temperature"] != 1:
            self.filters.append(TemperatureLogitsWarper(float(settings["temperature"])))
        for name, (kind, without) in FILTERS.items():
            if settings[name] not in (None, without):
                self.filters.append(kind(settings[name]))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """(B · beams, T) and (B · beams, V) → (B · beams, V); a sampled row allows only its token."""
        if self.begin is None:
            self.begin = input_ids.shape[1]
        said = input_ids[:, self.begin :]
        if self.penalties:
            scores = torch.cat([self._penalised(row, said[row], scores[row]) for row in range(len(scores))])
        if self.numbers is None:
            return scores
        for each in self.filters:
            scores = each(input_ids, scores)
        tokens = sample_token(scores.float().softmax(dim=-1), self.numbers[:, said.shape[1]].to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.unsqueeze(1), 0.0)

    def _penalised(self, row: int, said: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([self.prompts[row // self.beams].to(said.device), said]).unsqueeze(0)
        scores = scores.unsqueeze(0)
        for each in self.penalties:
            scores = each(ids, scores)
        return scores


class ForcedToken(LogitsProcessor):
    """Forces one token whatever the logits are: two runs can then be compared on the same text."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self.token] = 0.0
        return chosen


class StopOnEvent(StoppingCriteria):
    """Ends all rows where they are, once one of the events is set."""

    def __init__(self, events: Sequence[threading.Event]):
        self.events = events

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), any(event.is_set() for event in self.events), device=input_ids.device)


class StopOnText(StoppingCriteria):
    """Ends each row once its answer contains one of the texts; the end of the prompt does not count.

    Args:
        tokenizer: decodes.
        texts: strings that end an answer.
        begin: columns of the ids that are prompt.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], begin: int):
        self.tokenizer, self.texts, self.begin = tokenizer, tuple(texts), begin
        self.window = max(len(text.encode()) for text in texts) + 8  # tokens; almost every one has at least a byte

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        said = input_ids[:, self.begin :][:, -self.window :].tolist()
        ended = [any(text in text_of(self.tokenizer, ids) for text in self.texts) for ids in said]
        return torch.tensor(ended, device=input_ids.device)


class Tokens(BaseStreamer):
    """Puts the ids of one answer into a queue as lists; skips the prompt, which generate sends first.

    A prompt of embeddings has no ids: its first message has no columns.
    """

    def __init__(self, out: queue.SimpleQueue):
        self.out, self.asked = out, False

    def put(self, value: torch.Tensor) -> None:
        if self.asked:
            self.out.put(value.flatten().tolist())
        self.asked = True

    def end(self) -> None:
        """Does nothing: the generating thread reports its own end."""


class TextStream:
    """Turns an answer's ids into pieces of text as they arrive: complete characters only, without surrounding white
    space.

    Args:
        tokenizer: decodes.
        stops: ids that end an answer; they are not text.
        before, after: white space that the chat template puts around an answer.
        stop_strings: texts that end an answer: end markers of several tokens, and others.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[int], before: str, after: str, stop_strings: Sequence[str]):
        self.tokenizer, self.stops = tokenizer, frozenset(stops)
        self.before, self.after, self.stop_strings = before, after, tuple(stop_strings)
        self.ids: list[int] = []
        self.start = self.read = 0  # decoded from `start`; text up to `read` is in `held` or has been returned
        self.held = ""  # decoded, but it may belong to an end marker or to the surrounding white space
        self.began = self.ended = False

    def add(self, token: int) -> str:
        """The text that is certain after this token; often "", and always after the end."""
        if self.ended:
            return ""
        if token in self.stops:
            self.ended = True
            return self.rest()
        self.ids.append(token)
        earlier, now = self._decode(self.ids[self.start : self.read]), self._decode(self.ids[self.start :])
        new = now[len(earlier) :]
        if not new or (new.endswith(BROKEN) and not self._ends(self.held + new)):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return self._let_go(new)

    def rest(self) -> str:
        """The held text, when no more ids come."""
        earlier, now = self._decode(self.ids[self.start : self.read]), self._decode(self.ids[self.start :])
        if not self.ended:  # the answer was cut, possibly within a character
            now = now.rstrip(BROKEN)
        self.start = self.read = len(self.ids)
        piece = self._let_go(now[len(earlier) :])
        left, self.held = self.held, ""
        if not self.began:
            left = left.removeprefix(self.before)
        return piece + (left.removesuffix(self.after) if self.after else left)

    def _ends(self, text: str) -> bool:
        """Whether a stop string is complete in a text; a token may contain its last character and bytes of the next
        one.
        """
        return any(marker in text for marker in self.stop_strings)

    def _decode(self, ids: list[int]) -> str:
        return text_of(self.tokenizer, ids)

    def _let_go(self, text: str) -> str:
        self.held += text
        for marker in self.stop_strings:
            if marker in self.held:
                self.held, self.ended = self.held.split(marker)[0], True
        if not self.began:
            if len(self.held) < len(self.before) and self.before.startswith(self.held):
                return ""
            self.held = self.held.removeprefix(self.before)
            self.began = bool(self.held)
        kept = 0 if self.ended else max((overlap(self.held, m) for m in self.stop_strings), default=0)
        if self.after and self.held[: len(self.held) - kept].endswith(self.after):
            kept += len(self.after)
        cut = len(self.held) - kept
        given, self.held = self.held[:cut], self.held[cut:]
        return given


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def overlap(text: str, marker: str) -> int:
    """The number of characters at the end of a text with which the marker may begin."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)


def around_words(template: Any, example: Any) -> tuple[str, str]:
    """The white space that a chat template generates before and after the words of an answer."""
    answer = example.messages[-1].content
    learned = "".join(segment.text for segment in template.segments(example) if segment.learn)
    before, _, behind = learned.partition(answer)
    behind = behind.split(template.stop)[0]
    return before if before.isspace() else "", behind if behind.isspace() else ""


@contextmanager
def settled_rotations(model: nn.Module, length: int) -> Iterator[None]:
    """Dynamic (NTK) positions for one answer: the frequencies of `length` tokens from its first to its last token.

    transformers changes them token by token, while cached keys keep earlier ones, and a shorter next row would still
    get those of the longer one. Within the model's own context nothing changes. Does nothing for other models.
    """
    # (module, prefix of its buffers' names, kind of layer): families with sliding windows have one for each kind
    scaled = [
        (module, f"{kind}_" if kind else "", kind)
        for module in model.modules()
        if (types := getattr(module, "rope_type", None))
        for kind, how in (types.items() if isinstance(types, dict) else [(None, types)])
        if how == "dynamic"
    ]
    for module, prefix, kind in scaled:
        own, device = module.config.max_position_embeddings, getattr(module, f"{prefix}inv_freq").device
        longest = max(length, own)
        frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](module.config, device, seq_len=longest, layer_type=kind)
        module.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", longest)
        module.original_max_seq_len = 0  # transformers does not reset them
    try:
        yield
    finally:
        for module, prefix, _ in scaled:
            original = getattr(module, f"{prefix}original_inv_freq")
            frequencies = original.to(getattr(module, f"{prefix}inv_freq").device)
            module.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
            module.original_max_seq_len = module.config.max_position_embeddings
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
