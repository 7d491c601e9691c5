"""A chat in the terminal: the conversation so far, what the next answer sees of it, and the commands."""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

from stagewise.formats.json_lines import json_bytes
from stagewise.formats.parsers import Conversation, Message
from stagewise.inference.chat_model import Answer, ChatModel, SamplingArguments

COMMANDS = {
    "/clear": "clear the conversation",
    "/system [TEXT|-]": "show, set or (-) remove the system prompt",
    "/regen": "answer the last question again",
    "/save [FILE]": "append the conversation to a jsonl file that can be trained on (conversation.jsonl)",
    "/help": "this list",
    "/quit": "exit (also Ctrl-D)",
}
KEYS = (
    "Enter sends; Alt+Enter, or \\ at the end of a line, starts a new line; Ctrl-C stops an answer.",
    "A question that begins with / is written with two: //",
)
NARROWEST = 44  # columns to which the help is wrapped at least: the longest word beside the names


def chat_help(columns: int) -> str:
    """The commands of the chat and its keys, wrapped at words to the width of the terminal."""
    width = max(columns, NARROWEST)
    lines = [
        textwrap.fill(f"{name:<17} {what}", width, initial_indent="  ", subsequent_indent=" " * 20)
        for name, what in COMMANDS.items()
    ]
    lines += [textwrap.fill(text, width, initial_indent="  ", subsequent_indent="  ") for text in KEYS]
    return "\n".join(lines)


class ChatSession:
    """One conversation with a chat model.

    Attributes:
        messages: the conversation so far.
        system: the system prompt; None: the template's own.
        forgotten: exchanges at the beginning that did not fit into the last answer's context.
    """

    def __init__(self, speaker: ChatModel, sampling: SamplingArguments, system: str | None = None):
        self.speaker, self.sampling, self.system = speaker, sampling, system
        self.messages: list[Message] = []
        self.forgotten = 0
        self._again = 0  # how often the last question has been answered again

    def ask(self, question: str, stop: threading.Event | None = None) -> Generator[str, None, Answer]:
        """Yields the answer's pieces; question and answer then belong to the conversation.

        A stopped answer is kept as far as it came. Raises ChatModelError, and the conversation stays as it was.
        """
        return self._answer(self.messages, question, stop, again=0)

    def again(self, stop: threading.Event | None = None) -> Generator[str, None, Answer]:
        """Answers the last question again, with the next seed. Raises ValueError if nothing was asked."""
        if not self.messages:
            raise ValueError("nothing was asked yet")
        return self._answer(self.messages[:-2], self.messages[-2].content, stop, again=self._again + 1)

    def _answer(
        self, earlier: list[Message], question: str, stop: threading.Event | None, again: int
    ) -> Generator[str, None, Answer]:
        """Refuses what cannot be asked right away, not at the first piece."""
        messages = [*answered_messages(earlier), Message("user", question)]
        asked = Conversation(tuple(messages), self.system, where="this conversation")
        settings = self.sampling.settled(self.speaker.defaults)
        seen = self.speaker.fitted(asked, settings["max_new_tokens"])[1].messages
        seed = self.sampling.seed
        sampling = replace(self.sampling, seed=None if seed is None else seed + again)
        pieces = self.speaker.stream(asked, sampling, stop=stop)
        self.forgotten = sum(message.role == "user" for message in messages[: len(messages) - len(seen)])
        self._again = again
        return self._kept(messages, pieces)

    def _kept(self, messages: list[Message], pieces: Generator[str, None, Answer]) -> Generator[str, None, Answer]:
        answer = yield from pieces
        self.messages = [*messages, Message("assistant", answer.text)]
        return answer

    @property
    def always_the_same(self) -> bool:
        """Whether /regen would give the same answer, since nothing is sampled."""
        return not self.sampling.settled(self.speaker.defaults)["do_sample"]

    def clear(self) -> None:
        """Clears the conversation; the system prompt stays."""
        self.messages, self.forgotten, self._again = [], 0, 0

    def save(self, path: str | Path) -> int:
        """Appends the conversation as one ShareGPT record to a file; returns its number of messages.

        Raises:
            ValueError: the conversation is empty, or the file cannot be written.
        """
        said = answered_messages(self.messages)
        if not said:
            raise ValueError("the conversation is empty")
        names = {"user": "human", "assistant": "gpt"}
        record: dict[str, object] = {} if self.system is None else {"system": self.system}
        record["conversations"] = [{"from": names[m.role], "value": m.content} for m in said]
        try:
            with Path(path).expanduser().open("ab") as file:
                file.write(json_bytes(record))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
        return len(said)


def answered_messages(messages: list[Message]) -> list[Message]:
    """Questions with their answers, without those stopped before the first word: they can't be trained on."""
    pairs = zip(messages[::2], messages[1::2], strict=True)
    return [message for pair in pairs if pair[1].content.strip() for message in pair]
