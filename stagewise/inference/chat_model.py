"""A model that answers: a base, a base with any adapter, merged or quantized; one conversation as a stream, many in
batches. Shared by the terminal, the web page and the evaluation.

    speaker = ChatModel.load(ChatModelArguments("models/SmolLM2-135M-Instruct", lora_model="outputs/sft"))
    for piece in speaker.stream(Conversation((Message("user", "Hi"),)), SamplingArguments(temperature=0.7, seed=1)):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import copy
import os
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from stagewise.chat.encoding import AnyTemplate
from stagewise.chat.preference_encoding import encode_prompt
from stagewise.chat.select import EXAMPLE
from stagewise.errors import ChatModelError, RecordError
from stagewise.formats.parsers import Conversation
from stagewise.inference.arguments import DRAWING, MAX_NEW_TOKENS, ChatModelArguments, SamplingArguments
from stagewise.inference.batching import has_virtual_tokens, padding_is_unread, prompt_inputs
from stagewise.inference.decoding import (
    RowChoice,
    StopOnEvent,
    StopOnText,
    TextStream,
    Tokens,
    around_words,
    settled_rotations,
    text_of,
)
from stagewise.inference.loading import load_parts
from stagewise.inference.sampling import random_numbers
from stagewise.models.attention.choose import attention_for_generation
from stagewise.models.attention.rope import context_of, rotations
from stagewise.models.generation_config import finish_generation_config

__all__ = ["Answer", "ChatModel", "ChatModelArguments", "ChatModelError", "SamplingArguments"]

UNLIMITED = 1_000_000_000  # the context of a model that names none


@dataclass(frozen=True)
class Answer:
    """An answer: its text, its token ids with the end marker, and whether it reached the end marker."""

    text: str
    token_ids: tuple[int, ...]
    ended: bool


class ChatModel:
    """A model with its tokenizer and chat template. One answer, or one batch, is generated at a time, even with
    several threads.

    Attributes:
        model: the base, or the PEFT model around it.
        tokenizer, template: turn conversations into ids.
        stops: the ids at which an answer ends.
        context: the longest row of prompt and answer that the model reads.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, template: AnyTemplate):
        self.model, self.tokenizer, self.template = model.eval(), tokenizer, template
        self.adapter = next(iter(model.peft_config.values())) if isinstance(model, PeftModel) else None
        self.base: PreTrainedModel = model.get_base_model() if self.adapter else model
        self.defaults = copy.deepcopy(self.base.generation_config)
        finish_generation_config(self.base, tokenizer, template.stops)
        self.stops = _ends(self.base.generation_config.eos_token_id, self.defaults.eos_token_id)
        # end markers of several tokens: they are searched for here, generate does not know them
        self.markers = self.base.generation_config.stop_strings or []
        self.base.generation_config.stop_strings = None
        self.virtual_tokens = self.adapter.num_virtual_tokens if has_virtual_tokens(model) else 0
        longest = context_of(self.base.config) or _sane(tokenizer.model_max_length)
        self.context: int = longest - self.virtual_tokens
        if self.defaults.max_new_tokens is None:
            self.defaults.max_new_tokens = min(MAX_NEW_TOKENS, self.context // 2)
        self.around = around_words(template, EXAMPLE)
        self.lock = threading.Lock()
        self._pads: bool | None = None

    @classmethod
    def load(cls, args: ChatModelArguments) -> ChatModel:
        """Loads the model, adapter and tokenizer that `args` name.

        Raises:
            ChatModelError: with the flag of what cannot be loaded, before weights are read if possible.
        """
        return cls(*load_parts(args))

    # ── prompts ─────────────────────────────────────────────────────────────────────────────────────────────────

    def encode(self, conversation: Conversation, max_new_tokens: int | None = None) -> list[int]:
        """The prompt's ids up to the start of the answer.

        The earliest exchanges are dropped until `max_new_tokens` (default: the model's own) fit into the context.
        Raises ChatModelError if the last question alone is too long.
        """
        return self.fitted(conversation, max_new_tokens)[0]

    def longest_question(self, max_new_tokens: int) -> int:
        """The tokens that the context leaves for a prompt beside an answer. Raises ChatModelError if none."""
        if max_new_tokens >= self.context:
            raise ChatModelError(
                f"--max_new_tokens {max_new_tokens}: the model's context of {self.context} tokens leaves no room for "
                "a question; lower it"
            )
        return self.context - max_new_tokens

    def fitted(self, conversation: Conversation, max_new_tokens: int | None = None) -> tuple[list[int], Conversation]:
        """The result of `encode`, and the conversation with the exchanges that are in it."""
        room = max_new_tokens or SamplingArguments().settled(self.defaults)["max_new_tokens"]
        limit = self.longest_question(room)
        try:
            return encode_prompt(self.tokenizer, self.template, conversation, limit)
        except RecordError as error:
            if error.reason != "prompt too long":
                raise ChatModelError(str(error)) from error
            raise ChatModelError(
                f"{conversation.where}: the last question alone is longer than the {limit} tokens that the context "
                f"of {self.context} leaves beside --max_new_tokens {room}: shorten it, lower --max_new_tokens, or "
                "widen the context (--rope_scaling dynamic)"
            ) from error

    # ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────

    def stream(
        self,
        conversation: Conversation,
        sampling: SamplingArguments,
        *,
        adapter: bool = True,
        stop: threading.Event | None = None,
    ) -> Generator[str, None, Answer]:
        """Pieces of the answer's text as they are generated; joined they equal the text of `answers`. Complete
        characters only.

        The generator's return value (`answer = yield from speaker.stream(…)`) is the Answer.

        Args:
            conversation: ends with what is to be answered.
            sampling: how tokens are chosen.
            adapter: False answers with the base alone.
            stop: once set, ends the answer where it is. Closing the iterator does so, too.

        Raises:
            ChatModelError: for settings that contradict each other, or a question that is too long.
        """
        settings = self._settings(sampling)
        prompt = self.encode(conversation, settings["max_new_tokens"])
        return self._stream(prompt, settings, adapter, stop)

    def _stream(
        self, prompt: list[int], settings: dict[str, Any], adapter: bool, stop: threading.Event | None
    ) -> Generator[str, None, Answer]:
        words, said, pieces = self._words(settings), [], []
        halt, tokens = threading.Event(), queue.SimpleQueue()
        streamer = Tokens(tokens) if settings["num_beams"] == 1 else None

        def speak() -> None:
            try:
                (ids,) = self._generate([prompt], settings, adapter, streamer, (halt, *([stop] if stop else [])))
                if streamer is None:
                    tokens.put(ids)
                tokens.put(None)
            except BaseException as error:  # shown by the reading thread
                tokens.put(error)

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        try:
            while (found := tokens.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                for token in found:
                    said += [] if words.ended else [token]
                    if piece := words.add(token):
                        pieces.append(piece)
                        yield piece
                if words.ended:
                    break
            if piece := words.rest():
                pieces.append(piece)
                yield piece
            return Answer("".join(pieces), tuple(said), words.ended)
        finally:
            halt.set()
            thread.join()

    def answers(
        self,
        conversations: Sequence[Conversation],
        sampling: SamplingArguments,
        *,
        batch_size: int,
        adapter: bool = True,
    ) -> list[Answer]:
        """An answer to each conversation, in order, identical to its answer alone.

        Raises:
            ChatModelError: for settings that contradict each other, or a question that is too long.
        """
        settings = self._settings(sampling)
        prompts = [self.encode(conversation, settings["max_new_tokens"]) for conversation in conversations]
        found: dict[int, Answer] = {}
        for rows in self._batches(prompts, batch_size, settings["max_new_tokens"]):
            said = self._generate([prompts[row] for row in rows], settings, adapter, None, ())
            found.update((row, self._answer(ids, settings)) for row, ids in zip(rows, said, strict=True))
        return [found[row] for row in range(len(prompts))]

    def _settings(self, sampling: SamplingArguments) -> dict[str, Any]:
        """The settings for the model: also stop_ids and stop_texts, which end an answer, and bad_words_ids.

        Raises:
            ChatModelError: for settings that contradict each other, or that this tokenizer cannot honor.
        """
        settings = sampling.settled(self.defaults)
        if settings["min_new_tokens"] and self.markers:
            raise ChatModelError(
                f"--min_new_tokens: the end marker {self.markers[0]!r} is several tokens of this tokenizer, which "
                "cannot be held back; leave it out"
            )
        ids, texts = list(self.stops), list(self.markers)
        for text in settings["stop_strings"] or ():
            tokens = self.tokenizer.encode(text, add_special_tokens=False)
            if len(tokens) == 1 and not text_of(self.tokenizer, tokens):  # a separate marker, which is not text
                ids += tokens
            else:
                texts.append(text)
        words = [form for word in settings["bad_words"] or () for form in (word, f" {word}")]
        banned = [tuple(self.tokenizer.encode(word, add_special_tokens=False)) for word in words]
        return {
            **settings,
            "stop_ids": list(dict.fromkeys(ids)),
            "stop_texts": list(dict.fromkeys(texts)),
            "bad_words_ids": list(map(list, dict.fromkeys(banned))),
        }

    def _answer(self, ids: Sequence[int], settings: dict[str, Any]) -> Answer:
        words, text, said = self._words(settings), "", []
        for token in ids:
            said.append(token)
            text += words.add(token)
            if words.ended:
                break
        return Answer(text + ("" if words.ended else words.rest()), tuple(said), words.ended)

    def _words(self, settings: dict[str, Any]) -> TextStream:
        return TextStream(self.tokenizer, settings["stop_ids"], *self.around, settings["stop_texts"])

    def _batches(self, prompts: Sequence[Sequence[int]], size: int, longest: int) -> Iterator[list[int]]:
        """Rows of similar lengths; rows that cannot be padded exactly, or have their own positions, stay separate."""
        text = self.base.config.get_text_config()
        scaled = (rotations(text) or {}).get("rope_type")
        own = text.max_position_embeddings if scaled == "dynamic" else UNLIMITED
        batch: list[int] = []
        for row in sorted(range(len(prompts)), key=lambda row: -len(prompts[row])):
            alone = len(prompts[row]) + longest + self.virtual_tokens > own
            apart = batch and len(prompts[row]) != len(prompts[batch[0]]) and not self.pads_exactly
            if batch and (alone or apart or len(batch) == size):
                yield batch
                batch = []
            batch.append(row)
            if alone:
                yield batch
                batch = []
        if batch:
            yield batch

    @property
    def pads_exactly(self) -> bool:
        """Whether left padding leaves a row's logits unchanged; some recurrent families read the padding."""
        if self._pads is None:
            with self.lock:
                self._pads = padding_is_unread(self.model)
            if not self._pads:
                logger.info(f"batches: {type(self.base).__name__} reads padding; only rows of one length go together")
        return self._pads

    @torch.no_grad()
    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: dict[str, Any],
        adapter: bool,
        streamer: BaseStreamer | None,
        halts: Sequence[threading.Event],
    ) -> list[list[int]]:
        """The answers' ids, each with its end marker if it reached one, possibly followed by padding."""
        longest = settings["max_new_tokens"]
        numbers = None
        if settings["do_sample"]:
            seeds = [int.from_bytes(os.urandom(8)) if settings["seed"] is None else settings["seed"]] * len(prompts)
            keys = [[seed % 2**63, row * (settings["seed"] is None), *prompt]
                    for row, (seed, prompt) in enumerate(zip(seeds, prompts, strict=True))]  # fmt: skip
            numbers = random_numbers(keys, longest)
        config = copy.deepcopy(self.base.generation_config)
        chosen = {name: settings[name] for name in ("min_new_tokens", "num_beams", "length_penalty", "early_stopping")}
        chosen |= dict.fromkeys((*DRAWING, "repetition_penalty", "no_repeat_ngram_size"))  # done by RowChoice
        chosen |= {"do_sample": False, "max_new_tokens": longest, "max_length": None}
        chosen |= {"eos_token_id": settings["stop_ids"]}
        for name, value in chosen.items():
            setattr(config, name, value)
        with (
            self.lock,
            self._speaking(adapter),
            settled_rotations(self.base, max(map(len, prompts)) + longest + self.virtual_tokens),
            attention_for_generation(),
        ):
            inputs = prompt_inputs(self.model, prompts, adapter=adapter)
            begin = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
            criteria: list[StoppingCriteria] = [StopOnEvent(halts)] if halts else []
            if settings["stop_texts"]:
                criteria.append(StopOnText(self.tokenizer, settings["stop_texts"], begin))
            output = self.base.generate(
                **inputs,
                generation_config=config,
                logits_processor=[RowChoice(prompts, settings["num_beams"], numbers, settings)],
                stopping_criteria=StoppingCriteriaList(criteria),
                streamer=streamer,
            )
        return output[:, begin:].tolist()

    @contextmanager
    def _speaking(self, adapter: bool) -> Iterator[None]:
        """Switches the adapter off within the context if only the base is to answer."""
        if adapter or self.adapter is None or has_virtual_tokens(self.model):
            yield
        else:
            with self.model.disable_adapter():
                yield


def _ends(*kept: int | list[int] | None) -> tuple[int, ...]:
    """All ids at which a generation config ends, each once."""
    ids = [i for ids in kept if ids is not None for i in (ids if isinstance(ids, list) else [ids])]
    return tuple(dict.fromkeys(ids))


def _sane(length: int | None) -> int:
    """A tokenizer's length limit, unless it is the placeholder 10^30 of tokenizers without one."""
    return length if length and length < UNLIMITED else UNLIMITED
