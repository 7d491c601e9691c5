"""Several conversations, kept apart: what each speaker is given, and what a visitor sees."""

import pytest

from stagewise.errors import ChatError
from stagewise.web.conversations import ADAPTER, BASE, Chat, Desk, thoughts_of

ONE, TWO = (ADAPTER,), (ADAPTER, BASE)


def answered(chat: Chat, question: str, **answers: str) -> None:
    job = chat.ask(question, tuple(answers))
    job.turn.answers.update(answers)
    chat.job = None


def said(chat: Chat, speaker: str) -> list[tuple[str, str]]:
    turn = chat.turns[-1]
    return [(message.role, message.content) for message in chat.conversation(turn, speaker).messages]


def test_each_speaker_goes_on_from_its_own_answers():
    chat = Chat(1, system=" Be brief. ")
    answered(chat, "one", adapter="A1", base="B1")
    answered(chat, "two", adapter="A2")
    chat.ask("three", TWO)
    assert said(chat, ADAPTER) == [("user", "one"), ("assistant", "A1"), ("user", "two"), ("assistant", "A2"),
                                   ("user", "three")]  # fmt: skip
    # the second answer was the adapter's alone: it is what the visitor saw
    assert said(chat, BASE) == [("user", "one"), ("assistant", "B1"), ("user", "two"), ("assistant", "A2"),
                                ("user", "three")]  # fmt: skip
    assert chat.conversation(chat.turns[-1], BASE).system == "Be brief."
    assert list(chat.lines(BASE)) == [(0, "user", "one", True), (0, "assistant", "B1", True), (1, "user", "two", True),
                                      (1, "assistant", "A2", False), (2, "user", "three", True)]  # fmt: skip


def test_no_system_prompt_is_the_templates_own():
    chat = Chat(1, system="  ")
    chat.ask("one", ONE)
    assert chat.conversation(chat.turns[0], ADAPTER).system is None


def test_an_exchange_without_words_is_not_told_again():
    chat = Chat(1)
    answered(chat, "one", adapter="")
    chat.ask("two", ONE)
    assert said(chat, ADAPTER) == [("user", "two")]


def test_asking_again_stops_what_is_being_said():
    chat = Chat(1)
    first = chat.ask("one", ONE)
    first.turn.answers[ADAPTER] = "half"
    second = chat.ask("two", ONE)
    assert first.stop.is_set() and not second.stop.is_set()
    assert chat.job is second
    third = chat.edit(0, "other", ONE)
    assert second.stop.is_set()
    assert [turn.question for turn in chat.turns] == ["other"]
    chat.clear()
    assert third.stop.is_set() and chat.job is None and chat.turns == []


def test_retry_takes_a_new_turn_and_keeps_the_others_answer():
    chat = Chat(1)
    answered(chat, "one", adapter="A1", base="B1")
    old = chat.turns[0]
    job = chat.retry(ONE)
    assert job.turn is chat.turns[0] is not old
    assert job.turn.answers == {BASE: "B1"}
    assert said(chat, ADAPTER) == [("user", "one")]


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        (lambda chat: chat.ask(" \n", ONE), "empty_question"),
        (lambda chat: chat.retry(ONE), "nothing_to_retry"),
        (lambda chat: chat.edit(0, "x", ONE), "gone"),
        (lambda chat: chat.edit(0, "", ONE), "empty_question"),
    ],
)
def test_what_cannot_be_done_changes_nothing(wrong, key):
    chat = Chat(1)
    with pytest.raises(ChatError) as error:
        wrong(chat)
    assert error.value.key == key
    assert chat.turns == [] and chat.job is None


def test_chats_of_a_desk():
    desk = Desk("Be kind.")
    first = desk.current
    assert desk.new() is first  # nothing was asked in it yet
    first.ask("a question that is longer than the list of chats has room for", ONE)
    assert first.title == "a question that is longer than…"
    second = desk.new()
    assert [chat.number for chat in desk.chats] == [2, 1]
    assert second.title == "" and second.system == "Be kind." and desk.current is second
    assert desk.open(1) is first is desk.current
    with pytest.raises(ChatError):
        desk.open(7)
    job = first.job
    desk.delete()
    assert job.stop.is_set() and desk.chats == [second] and desk.current is second
    desk.delete()
    assert len(desk.chats) == 1 and desk.current.number == 3


def test_jobs_are_taken_in_order_and_stopped_ones_not_at_all():
    desk = Desk()
    one = desk.current.ask("one", ONE)
    desk.put(one)
    two = desk.new().ask("two", ONE)
    desk.put(two)
    desk.put(desk.current.ask("three", ONE))
    assert desk.next_job() is one
    assert two.stop.is_set()
    last = desk.next_job()
    assert last.turn.question == "three"
    assert desk.next_job() is None
    desk.finish(two)  # a job that is over does not end another one
    assert desk.current.job is last
    desk.finish(last)
    assert desk.current.job is None


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("words", ("", "words")),
        ("<think>\nhm\n</think>\n\nwords", ("hm", "words")),
        ("<think>\nhm", ("hm", "")),
        ("hm\n</think>\n\nwords", ("hm", "words")),  # the prompt opened the block
        ("of <think> and </think> tags", ("", "of <think> and </think> tags")),
        ("", ("", "")),
    ],
)
def test_thoughts_are_told_from_words(answer, found):
    assert thoughts_of(answer) == found
