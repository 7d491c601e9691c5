"""Every accepted form of record, and what is said about the others."""

import json
import pickle

import pytest

from stagewise.errors import RecordError
from stagewise.formats.parsers import (
    Conversation,
    Message,
    Preference,
    parse_conversation,
    parse_history,
    parse_preference,
    parse_prompt,
    parse_text,
    prompt_of,
)

U, A = "user", "assistant"
HI = {"from": "human", "value": "Hi"}
HELLO = {"from": "gpt", "value": "Hello"}
TOOL = {"name": "get_weather", "parameters": {"type": "object"}}
CALL = {"name": "get_weather", "arguments": {"city": "北京"}}


def sharegpt(*turns, **more):
    return {"conversations": [{"from": role, "value": value} for role, value in turns], **more}


def reason(parse, record):
    with pytest.raises(RecordError) as caught:
        parse(record, "sft.jsonl:17")
    assert str(caught.value).startswith("sft.jsonl:17: ")
    assert caught.value.where == "sft.jsonl:17"
    return caught.value.reason, str(caught.value)


# --- conversations ---------------------------------------------------------------------------------------------------


def test_sharegpt_with_a_system_field():
    got = parse_conversation(sharegpt(("human", "Hi"), ("gpt", "Hello"), system="Be kind."), "a.jsonl:1")
    assert got == Conversation((Message(U, "Hi"), Message(A, "Hello")), "Be kind.", None, "a.jsonl:1")


def test_openai_messages_with_a_system_message_and_text_parts():
    record = {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]},
            {"role": "assistant", "content": "Hello"},
        ]
    }
    got = parse_conversation(record, "a:1")
    assert got.system == "Be kind."
    assert got.messages == (Message(U, "Hi there"), Message(A, "Hello"))


@pytest.mark.parametrize("user", ["human", "user", "Human", " USER ", "prompter"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant", "bot", "chatgpt", "model", "ASSISTANT"])
def test_role_aliases(user, assistant):
    got = parse_conversation(sharegpt((user, "Hi"), (assistant, "Hello")), "a:1")
    assert [message.role for message in got.messages] == [U, A]


def test_white_space_at_both_ends_of_every_text_is_kept():
    got = parse_conversation(sharegpt(("human", "\n Hi \t"), ("gpt", "  Hello\n\n"), system=" Be kind. "), "a:1")
    assert [message.content for message in got.messages] == ["\n Hi \t", "  Hello\n\n"]
    assert got.system == " Be kind. "


def test_fields_a_dataset_fills_with_null_count_as_missing():
    record = {"conversations": [HI, HELLO], "messages": None, "system": None, "tools": None}
    assert parse_conversation(record, "a:1") == Conversation((Message(U, "Hi"), Message(A, "Hello")), where="a:1")


@pytest.mark.parametrize("system", ["", "  ", None])
def test_an_empty_system_prompt_means_the_templates_own(system):
    assert parse_conversation(sharegpt(("human", "Hi"), ("gpt", "Hello"), system=system), "a:1").system is None
    first = sharegpt(("system", system or ""), ("human", "Hi"), ("gpt", "Hello"))
    assert parse_conversation(first, "a:1").system is None


def test_sharegpt_tool_calls():
    record = sharegpt(
        ("human", "Weather?"),
        ("function_call", json.dumps(CALL)),
        ("observation", ""),
        ("gpt", "No data."),
        tools=json.dumps([TOOL]),
    )
    got = parse_conversation(record, "a:1")
    assert [message.role for message in got.messages] == [U, "tool_call", "observation", A]
    assert json.loads(got.messages[1].content) == CALL
    assert json.loads(got.tools) == [TOOL]


def test_openai_tool_calls_and_their_words():
    calls = [{"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}}]
    record = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "Let me look.", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
            {"role": "assistant", "content": None, "tool_calls": calls * 2},
            {"role": "tool", "content": "sunny"},
            {"role": "tool", "content": "still sunny"},
            {"role": "assistant", "content": "Sunny."},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    }
    got = parse_conversation(record, "a:1")
    call = Message("tool_call", '{"name": "get_weather", "arguments": {"city": "北京"}}')
    sunny = Message("observation", "sunny")
    assert got.messages == (
        Message(U, "Weather?"),
        Message(A, "Let me look."),
        call,
        sunny,
        call,
        call,
        sunny,
        Message("observation", "still sunny"),
        Message(A, "Sunny."),
    )


@pytest.mark.parametrize(
    ("record", "slug", "says"),
    [
        (sharegpt(("human", "Hi"), ("gtp", "x")), "unknown role", "turn 2 is from 'gtp'"),
        (sharegpt(("human", "Hi"), (7, "x")), "unknown role", "turn 2 is from 7"),
        (sharegpt(("human", "a"), ("human", "b"), ("gpt", "c")), "two user turns in a row", "turns 1 and 2"),
        (sharegpt(("human", "a"), ("gpt", "b"), ("gpt", "c")), "two assistant turns in a row", "turns 2 and 3"),
        (sharegpt(("gpt", "Hello"), ("human", "Hi")), "assistant at the start", "turn 1 (assistant)"),
        (sharegpt(("human", "a"), ("observation", "b")), "observation after user", "turn 2"),
        (sharegpt(("human", "a"), ("gpt", " \n")), "empty turn", "turn 2 (assistant) is empty"),
        (sharegpt(("human", ""), ("gpt", "b")), "empty turn", "turn 1 (user) is empty"),
        (sharegpt(("human", "a"), ("gpt", 5)), "not text", "turn 2 must be text, found int 5"),
        (sharegpt(("human", "a"), ("gpt", None)), "not text", "turn 2 must be text, found NoneType null"),
        (sharegpt(("human", "a"), ("gpt", "\ud83d")), "broken character", "surrogate"),
        (sharegpt(("human", "a"), ("system", "b"), ("gpt", "c")), "system turn in the middle", "turn 2"),
        (sharegpt(("system", "a"), ("human", "b"), system="c"), "two system prompts", '"system"'),
        (sharegpt(("system", "a")), "no turns", "besides the system prompt"),
        (sharegpt(), "no turns", '"conversations" must be a list of turns'),
        ({"conversations": "Hi"}, "no turns", "found str"),
        ({"conversations": ["Hi"]}, "broken turn", "turn 1 must be an object"),
        ({"conversations": [HI], "messages": [HI]}, "two conversations", '"messages"'),
        ({"id": 3, "dialog": []}, "no conversation", "found the keys id, dialog"),
        ({"prompt": "a", "response": "b"}, "no conversation", "python convert_dataset.py"),
        ({"text": "a"}, "text record", "found a text (the keys text): pretraining.py reads it"),
        ({"conversations": [HI], "chosen": "a", "rejected": "b"}, "preference record", "dpo_training.py read it"),
        ({"instruction": "a", "output": ["b", "c"]}, "preference record", "this stage reads"),
        (sharegpt(("human", "a")), "no answer", "no turn is from the assistant"),
        ({"instruction": "a", "output": ""}, "no answer", "no turn is from the assistant"),
        ({"instruction": "a", "history": ["x", "y"]}, "no answer", 'there is no "output" or "answer"'),
        ({"instruction": " ", "input": "", "output": "b"}, "empty turn", "turn 1 (user) is empty"),
        ({"instruction": "a", "output": " "}, "empty turn", "turn 2 (assistant) is empty"),
        ({"question": float("nan"), "answer": "b"}, "NaN", "question must be text, found NaN"),
        ({"question": "a", "answer": "b", "history": "[1"}, "broken history", '"history" is not JSON'),
        ({"question": "a", "answer": "b", "history": [["x", ""]]}, "empty turn", "turn 2 (assistant) is empty"),
        ({"conversations": "[1"}, "broken JSON", '"conversations" is not JSON'),
        ({"conversations": [HI, {**HELLO, "weight": 0.5}]}, "broken weight", "turn 2"),
        ({"conversations": [HI, {**HELLO, "train": "false"}]}, "broken weight", 'turn 2: "train"'),
        ({"conversations": [HI, {"from": "gpt", "value": "", "reasoning_content": "hm"}]}, "empty turn", "turn 2"),
        (sharegpt(("human", "a"), ("function_call", "f(x)")), "broken tool JSON", "turn 2 (function_call)"),
        (sharegpt(("human", "a"), ("function_call", '{"f": 1}')), "broken tool call", "turn 2"),
        (
            sharegpt(("human", "a"), ("function_call", '{"name": "f", "parameters": {"x": 1}}')),
            "broken tool call",
            'must stand in "arguments"',
        ),
        (
            sharegpt(("human", "a"), ("function_call", '[{"name": "f", "input": {"x": 1}}]')),
            "broken tool call",
            'must stand in "arguments"',
        ),
        (
            sharegpt(("human", "a"), ("function_call", '{"name": "f", "arguments": null}')),
            "broken tool call",
            'must stand in "arguments"',
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}]},
            "broken tool call",
            "turn 1 (user) calls tools",
        ),
        (sharegpt(("human", "a"), ("gpt", "b"), tools="[{]"), "broken tool JSON", '"tools" is not JSON'),
        (sharegpt(("human", "a"), ("gpt", "b"), tools="{}"), "broken tools", "must be a list"),
        (sharegpt(("human", "a"), ("gpt", "b"), tools=[{"x": 1}]), "broken tools", "no name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not text", "type 'image_url'"),
    ],
)
def test_refused_conversations(record, slug, says):
    got, message = reason(parse_conversation, record)
    assert got == slug
    assert says in message


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"loss": 0}])
def test_a_turn_may_ask_not_to_be_learned(mark):
    turns = [{**HI, **mark}, {**HELLO, **mark}, HI, {**HELLO, "weight": 1, "train": True, "loss": None}]
    got = parse_conversation({"conversations": turns}, "a:1").messages
    assert got == (Message(U, "Hi", False), Message(A, "Hello", False), Message(U, "Hi"), Message(A, "Hello"))


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_thoughts_in_a_field_of_their_own_stand_before_the_words(key):
    record = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", key: " Easy. "}]}
    assert parse_conversation(record, "a:1").messages[1] == Message(A, "<think>\n Easy. \n</think>\n\n4")
    calls = [{"function": {"name": "get_weather", "arguments": {}}}]
    record["messages"][1] = {"role": "assistant", "content": None, "tool_calls": calls, key: "Look.", "weight": 0}
    assert parse_conversation(record, "a:1").messages[1:] == (
        Message(A, "<think>\nLook.\n</think>\n\n", False),
        Message("tool_call", '{"name": "get_weather", "arguments": {}}', False),
    )


@pytest.mark.parametrize(
    ("record", "texts", "system"),
    [
        ({"instruction": "Translate.", "input": " cold ", "output": "\n感冒"}, ["Translate.\n cold ", "\n感冒"], None),
        ({"instruction": "Hi", "input": "", "output": "Hello", "system": "Be kind."}, ["Hi", "Hello"], "Be kind."),
        ({"instruction": "Hi", "input": None, "output": "Hello", "system": " "}, ["Hi", "Hello"], None),
        ({"instruction": "", "input": "Hi", "output": "Hello"}, ["Hi", "Hello"], None),
        ({"instruction": "e", "output": "f", "history": [["a", "b"], ["c", "d"]]}, list("abcdef"), None),
        ({"instruction": "c", "output": "d", "history": ["a", "b"]}, list("abcd"), None),
        ({"instruction": "c", "output": "d", "history": '[["a", "b"]]'}, list("abcd"), None),
        ({"question": "Hi", "answer": "Hello", "system": "s"}, ["Hi", "Hello"], "s"),
        ({"question": "c", "answer": "d", "history": ["a", "b"]}, list("abcd"), None),
        ({"conversations": '[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]'}, ["a", "b"], None),
    ],
)
def test_instructions_and_questions_are_conversations(record, texts, system):
    got = parse_conversation(record, "a:1")
    assert [message.content for message in got.messages] == texts
    assert [message.role for message in got.messages] == [(U, A)[n % 2] for n in range(len(texts))]
    assert (got.system, got.where) == (system, "a:1")


@pytest.mark.parametrize(
    "record",
    [
        sharegpt(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"), system="s"),
        sharegpt(("human", "a"), ("gpt", "b"), ("human", "c"), system="s"),
        {"instruction": "c", "history": ["a", "b"], "system": "s"},
        {"instruction": "c", "history": ["a", "b"], "system": "s", "output": ["x", "y"]},
        {"question": "c", "history": ["a", "b"], "system": "s", "answer": "d"},
        {"question": "c", "history": ["a", "b"], "system": "s", "response_chosen": "x", "response_rejected": "y"},
        sharegpt(("human", "a"), ("gpt", "b"), ("human", "c"), system="s", chosen="x", rejected="y"),
    ],
)
def test_prompts_are_taken_from_every_form(record):
    messages = (Message(U, "a"), Message(A, "b"), Message(U, "c"))
    assert parse_prompt(record, "a:1") == Conversation(messages, "s", None, "a:1")


def test_a_text_is_no_prompt():
    assert reason(parse_prompt, {"text": "a"})[0] == "text record"


def test_a_record_error_keeps_its_parts_across_processes():
    error = pickle.loads(pickle.dumps(RecordError("a:1", "slug", "words")))
    assert (error.where, error.reason, str(error)) == ("a:1", "slug", "a:1: words")


def test_prompt_of_drops_the_last_answer_only():
    turns = (("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))
    whole = parse_conversation(sharegpt(*turns, system="s"), "a:1")
    prompt = Conversation((Message(U, "a"), Message(A, "b"), Message(U, "c")), "s", None, "a:1")
    assert prompt_of(whole) == prompt
    assert prompt_of(prompt) == prompt  # a conversation that ends with a question is its own prompt
    called = parse_conversation(sharegpt(("human", "a"), ("function_call", json.dumps(CALL))), "a:1")
    assert [message.role for message in prompt_of(called).messages] == [U]


# --- preferences -----------------------------------------------------------------------------------------------------

PROMPT = Conversation((Message(U, "Hi"),), None, None, "a:1")
GOOD, BAD = (Message(A, "good"),), (Message(A, "bad"),)


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("good", "bad"),
        ({"from": "gpt", "value": "good"}, {"role": "assistant", "content": "bad"}),
        ([{"from": "gpt", "value": "good"}], ["bad"]),
    ],
)
def test_preference_with_a_conversation(chosen, rejected):
    record = {"conversations": [HI], "chosen": chosen, "rejected": rejected}
    assert parse_preference(record, "a:1") == Preference(PROMPT, GOOD, BAD, "a:1")


@pytest.mark.parametrize("history", [[["a", "b"]], ["a", "b"], '["a", "b"]'])
def test_preference_with_a_question_and_its_history(history):
    record = {"question": "Hi", "response_chosen": "good", "response_rejected": "bad", "system": "s"}
    got = parse_preference({**record, "history": history}, "a:1")
    turns = (Message(U, "a"), Message(A, "b"), Message(U, "Hi"))
    assert got == Preference(Conversation(turns, "s", None, "a:1"), GOOD, BAD, "a:1")
    assert parse_preference({**record, "system": None, "history": []}, "a:1").prompt == PROMPT


@pytest.mark.parametrize(("extra", "question"), [("", "Hi"), (None, "Hi"), ("there", "Hi\nthere")])
@pytest.mark.parametrize("output", [["good", "bad"], '["good", "bad"]'])
def test_preference_with_an_instruction(extra, question, output):
    record = {"instruction": "Hi", "input": extra, "output": output}
    got = parse_preference(record, "a:1")
    assert (got.prompt.messages, got.chosen, got.rejected) == ((Message(U, question),), GOOD, BAD)


def test_answers_of_several_turns_and_tool_calls():
    call = {"from": "function_call", "value": json.dumps(CALL)}
    seen = {"from": "observation", "value": "sunny"}
    record = sharegpt(("human", "Weather?"), tools=[TOOL], chosen=[call, seen, HELLO], rejected="Who knows.")
    got = parse_preference(record, "a:1")
    assert [message.role for message in got.chosen] == ["tool_call", "observation", A]
    assert got.rejected == (Message(A, "Who knows."),)
    assert json.loads(got.prompt.tools) == [TOOL]
    record = sharegpt(("human", "a"), chosen=[{**HELLO, "weight": 0}, HI, HELLO], rejected=[HELLO])
    assert parse_preference(record, "a:1").chosen == (
        Message(A, "Hello", False),
        Message(U, "Hi"),
        Message(A, "Hello"),
    )


@pytest.mark.parametrize("before", [{}, {"prompt": "a"}, {"conversations": [{"from": "human", "value": "a"}]}])
def test_two_whole_conversations_are_split_where_they_stop_being_alike(before):
    def talk(*texts):
        return [{"role": (U, A)[n % 2], "content": text} for n, text in enumerate(texts)]

    got = parse_preference({**before, "chosen": talk(*"abcd"), "rejected": talk(*"abcx")}, "a:1")
    assert [message.content for message in got.prompt.messages] == ["a", "b", "c"]
    assert (got.chosen, got.rejected) == ((Message(A, "d"),), (Message(A, "x"),))
    got = parse_preference({**before, "chosen": talk("a", "b"), "rejected": talk(*"abcd")}, "a:1")
    assert [message.content for message in got.prompt.messages] == ["a"]
    assert [[message.content for message in side] for side in (got.chosen, got.rejected)] == [["b"], ["b", "c", "d"]]
    system = [{"role": "system", "content": "s"}]
    got = parse_preference({**before, "chosen": system + talk("a", "b"), "rejected": talk("a", "x")}, "a:1")
    assert got.prompt == Conversation((Message(U, "a"),), "s", None, "a:1")


def test_a_prompt_as_text():
    record = {"prompt": "Hi", "chosen": "good", "rejected": "bad"}
    assert parse_preference(record, "a:1") == Preference(PROMPT, GOOD, BAD, "a:1")


@pytest.mark.parametrize(
    ("record", "slug"),
    [
        ({"conversations": [HI, HELLO], "chosen": "a", "rejected": "b"}, "prompt ends with an answer"),
        ({"conversations": [HI], "chosen": "a", "rejected": "a"}, "answers alike"),
        ({"conversations": [HI], "chosen": "a", "rejected": " "}, "empty answer"),
        ({"conversations": [HI], "chosen": "a", "rejected": float("nan")}, "NaN"),
        ({"conversations": [HI], "chosen": "a", "rejected": 5}, "not text"),
        ({"conversations": [HI], "chosen": "a"}, "no answer"),
        ({"conversations": [HI], "chosen": [HI, HELLO], "rejected": "b"}, "broken answer"),
        ({"conversations": [HI], "chosen": HI, "rejected": "b"}, "broken answer"),
        ({"conversations": [HI], "chosen": [HELLO, HI], "rejected": "b"}, "broken answer"),
        ({"conversations": [HI], "chosen": [HELLO, HELLO], "rejected": "b"}, "two assistant turns in a row"),
        ({"conversations": [HI], "chosen": [{**HELLO, "weight": 0}], "rejected": "b"}, "nothing learned"),
        ({"conversations": [HI], "chosen": [{"from": "system", "value": "s"}], "rejected": "b"}, "broken answer"),
        ({"chosen": [HI, HELLO], "rejected": [{**HI, "value": "x"}, HELLO]}, "no prompt"),
        ({"chosen": [HI, HELLO], "rejected": [HI]}, "no prompt"),
        ({"conversations": [{**HI, "value": "x"}], "chosen": [HI, HELLO], "rejected": [HI, HELLO]}, "broken answer"),
        ({"conversations": [HI], "system": "s", "chosen": [{"from": "system", "value": "t"}, HI, HELLO],
          "rejected": [HI, {**HELLO, "value": "x"}]}, "two system prompts"),
        ({"instruction": "Hi", "output": "a"}, "alpaca record"),
        ({"conversations": [HI, HELLO]}, "conversation record"),
        ({"question": "Hi", "answer": "a"}, "qa record"),
        ({"instruction": "Hi", "output": ["a", "b", "c"]}, "no pair of answers"),
        ({"question": "", "response_chosen": "a", "response_rejected": "b"}, "empty turn"),
        ({"question": "q", "response_chosen": "a", "response_rejected": "b", "history": ["x"]}, "broken history"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"id": 3}, "no preference"),
    ],
)  # fmt: skip
def test_refused_preferences(record, slug):
    assert reason(parse_preference, record)[0] == slug


def test_history_in_pairs_flat_or_missing():
    turns = (Message(U, "a"), Message(A, "b"), Message(U, "c"), Message(A, "d"))
    assert parse_history([["a", "b"], ["c", "d"]], "a:1") == turns
    assert parse_history(["a", "b", "c", "d"], "a:1") == turns
    assert parse_history(None, "a:1") == parse_history([], "a:1") == ()
    for broken in ("ab", 3, [["a", "b"], "c"], [["a"]], ["a", "b", "c"]):
        with pytest.raises(RecordError):
            parse_history(broken, "a:1")


# --- text ------------------------------------------------------------------------------------------------------------


def test_text_keeps_its_white_space():
    assert parse_text({"text": "\n a \n"}, "a:1") == "\n a \n"


@pytest.mark.parametrize(
    ("record", "slug"),
    [
        ({}, "no text"),
        ({"text": " "}, "empty text"),
        ({"text": 1}, "not text"),
        ({"text": float("nan")}, "NaN"),
        ({"conversations": [HI, HELLO]}, "conversation record"),
    ],
)
def test_refused_text(record, slug):
    assert reason(parse_text, record)[0] == slug


def test_a_prompt_of_messages_stands_before_the_answers():
    """As many sets on the Hub have it: prompt, chosen and rejected are lists of messages."""
    prompt = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "A cold?"},
    ]
    answers = {
        side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "Rest."), ("rejected", "No."))
    }
    found = parse_preference({"prompt": prompt, **answers}, "a:1")
    assert found.prompt.system == "Be kind."
    assert [(m.role, m.content) for m in found.prompt.messages] == [
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "A cold?"),
    ]
    assert (found.chosen, found.rejected) == ((Message("assistant", "Rest."),), (Message("assistant", "No."),))
    with pytest.raises(RecordError, match="two user turns|both from the user"):
        parse_preference({"prompt": [prompt[1], prompt[1]], **answers}, "a:1")
