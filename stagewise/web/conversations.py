"""Several conversations side by side, each answered by one or two chat models: the state of the chat page.

A `Desk` is the state of one visitor. A question becomes a `Job`, which is taken by whoever has the model; another
question in the same chat, or `stop`, ends the current job.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Event

from stagewise.chat.thinking import split_thoughts
from stagewise.errors import ChatError
from stagewise.formats.parsers import Conversation, Message

TITLE_LENGTH = 32
ADAPTER, BASE = "adapter", "base"  # which model answers; a model without an adapter has only the first


def thoughts_of(answer: str) -> tuple[str, str]:
    """(thoughts, words) of an answer that may be unfinished. Some templates open the thinking block in the prompt."""
    begun = answer.lstrip().startswith("<think>")
    if begun and "</think>" not in answer:
        return answer.lstrip().removeprefix("<think>").strip(), ""
    if begun or "<think>" not in answer:
        return split_thoughts(answer)
    return "", answer


@dataclass
class ChatTurn:
    """A question, and each model's answer so far."""

    question: str
    answers: dict[str, str] = field(default_factory=dict)
    costs: dict[str, tuple[int, float]] = field(default_factory=dict)  # tokens and seconds of each finished answer

    def answer(self, speaker: str) -> tuple[str | None, bool]:
        """The answer of `speaker`, else of the other one; and whether it is its own."""
        if speaker in self.answers:
            return self.answers[speaker], True
        return next(iter(self.answers.values()), None), False


@dataclass
class AnswerJob:
    """A turn to be answered."""

    chat: Chat
    turn: ChatTurn
    speakers: tuple[str, ...]
    stop: Event = field(default_factory=Event)


@dataclass
class Chat:
    """One conversation."""

    number: int
    system: str = ""
    turns: list[ChatTurn] = field(default_factory=list)
    job: AnswerJob | None = None

    @property
    def title(self) -> str:
        """The beginning of the first question, "" if there is none."""
        words = " ".join(self.turns[0].question.split()) if self.turns else ""
        return words if len(words) <= TITLE_LENGTH else words[: TITLE_LENGTH - 1].rstrip() + "…"

    def conversation(self, turn: ChatTurn, speaker: str) -> Conversation:
        """The conversation for `speaker` to answer `turn`: the exchanges before it, without empty answers."""
        messages: list[Message] = []
        for earlier in self.turns[: self._place(turn)]:
            answer = earlier.answer(speaker)[0]
            if answer:
                messages += [Message("user", earlier.question), Message("assistant", answer)]
        messages.append(Message("user", turn.question))
        return Conversation(tuple(messages), self.system.strip() or None, None, "chat")

    def _place(self, turn: ChatTurn) -> int:
        return next(place for place, own in enumerate(self.turns) if own is turn)

    def lines(self, speaker: str) -> Iterator[tuple[int, str, str, bool]]:
        """(turn, kind, text, own) of each message of one model's chat; kind is user, thoughts or assistant."""
        for number, turn in enumerate(self.turns):
            yield number, "user", turn.question, True
            answer, own = turn.answer(speaker)
            if answer is None:
                continue
            thoughts, words = thoughts_of(answer)
            if thoughts:
                yield number, "thoughts", thoughts, own
            if words or not thoughts:
                yield number, "assistant", words, own

    # ── what the visitor does ───────────────────────────────────────────────────────────────────────────────────────

    def stop(self) -> None:
        """Stops the current job; the answer so far stays."""
        if self.job is not None:
            self.job.stop.set()
            self.job = None

    def ask(self, question: str, speakers: tuple[str, ...]) -> AnswerJob:
        if not question.strip():
            raise ChatError("empty_question")
        self.stop()
        self.turns.append(ChatTurn(question))
        self.job = AnswerJob(self, self.turns[-1], speakers)
        return self.job

    def retry(self, speakers: tuple[str, ...]) -> AnswerJob:
        """Asks the last question again; other models' answers to it stay."""
        if not self.turns:
            raise ChatError("nothing_to_retry")
        self.stop()
        last = self.turns.pop()
        # A new turn: an answer that is still being generated belongs to the old one.
        kept = {who: answer for who, answer in last.answers.items() if who not in speakers}
        self.turns.append(ChatTurn(last.question, kept))
        self.job = AnswerJob(self, self.turns[-1], speakers)
        return self.job

    def edit(self, number: int, question: str, speakers: tuple[str, ...]) -> AnswerJob:
        """Replaces the question of turn `number`; later turns are dropped."""
        if not question.strip():
            raise ChatError("empty_question")
        if not 0 <= number < len(self.turns):
            raise ChatError("gone")
        self.stop()
        del self.turns[number:]
        return self.ask(question, speakers)

    def clear(self) -> None:
        self.stop()
        self.turns.clear()


class Desk:
    """One visitor's chats, newest first; never empty."""

    def __init__(self, system: str = ""):
        self.system = system
        self.chats: list[Chat] = []
        self.jobs: list[AnswerJob] = []  # waiting jobs
        self.count = 0
        self.language = "en"
        self.current = self.new()

    def new(self) -> Chat:
        """Opens a chat to begin in: a new one, or an existing one without questions."""
        empty = next((chat for chat in self.chats if not chat.turns), None)
        if empty is None:
            self.count += 1
            empty = Chat(self.count, self.system)
            self.chats.insert(0, empty)
        self.current = empty
        return empty

    def chat(self, number: int) -> Chat:
        found = next((chat for chat in self.chats if chat.number == number), None)
        if found is None:
            raise ChatError("gone")
        return found

    def open(self, number: int) -> Chat:
        self.current = self.chat(number)
        return self.current

    def delete(self) -> None:
        """Deletes the current chat; the newest of the others is shown."""
        self.current.stop()
        self.chats.remove(self.current)
        if self.chats:
            self.current = self.chats[0]
        else:
            self.new()

    def put(self, job: AnswerJob) -> None:
        self.jobs.append(job)

    def next_job(self) -> AnswerJob | None:
        """The oldest waiting job that was not stopped."""
        while self.jobs:
            job = self.jobs.pop(0)
            if not job.stop.is_set():
                return job
        return None

    def finish(self, job: AnswerJob) -> None:
        if job.chat.job is job:
            job.chat.job = None

    def leave(self) -> None:
        """Stops all jobs: the visitor is gone."""
        for chat in self.chats:
            chat.stop()
