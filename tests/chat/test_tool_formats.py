"""Tools, calls and observations: written out by hand for every form, and against what the families publish."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken

from stagewise.chat.encoding import encode_segments
from stagewise.chat.template import Segment, Template
from stagewise.chat.tool_formats import DEFAULT, FORMS, ToolForm, openai_messages, openai_tools, turns
from stagewise.errors import RecordError
from stagewise.formats.parsers import Conversation, Message, parse_conversation, parse_preference
from template import TEMPLATES

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "toolcall"
U, A, C, O = "user", "assistant", "tool_call", "observation"  # noqa: E741
WITH_TOOLS = [name for name, template in TEMPLATES.items() if template.tools]

WEATHER = {"name": "get_weather", "description": "天气", "parameters": {"type": "object", "properties": {}}}
TIME = {"name": "get_time", "description": "d"}
ROME = '{"name": "get_weather", "arguments": {"city": "Rome"}}'
OSLO = '{"name": "get_time", "arguments": {"city": "Oslo", "h24": true}}'
ONE = Conversation(
    (Message(U, "Weather?"), Message(C, ROME), Message(O, '{"sky": "晴"}'), Message(A, "Sunny.")),
    system="Be kind.",
    tools=json.dumps([WEATHER]),
    where="a.jsonl:7",
)
# words and two calls in one turn, two observations, then a call of its own in a second exchange
MANY = Conversation(
    (
        *(Message(U, "Both?"), Message(A, "Let me look."), Message(C, ROME), Message(C, OSLO)),
        *(Message(O, "sunny"), Message(O, "12:00"), Message(A, "Done.")),
        *(Message(U, "Again?"), Message(C, ROME), Message(O, "rain"), Message(A, "Rain.")),
    ),
    tools=json.dumps([{"type": "function", "function": WEATHER}, TIME]),
    where="a.jsonl:8",
)

WEATHER_JSON = '{"name": "get_weather", "description": "天气", "parameters": {"type": "object", "properties": {}}}'
TIME_JSON = '{"name": "get_time", "description": "d"}'
WRAPPED = '{"type": "function", "function": '
QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
QWEN_HOW = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
QWEN_ROME = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
QWEN_OSLO = '<tool_call>\n{"name": "get_time", "arguments": {"city": "Oslo", "h24": true}}\n</tool_call>'
LLAMA3_DATE = "Environment: ipython\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA3_HOW = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
    'best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
    "argument name and its value}.Do not use variables.\n\n"
)
LLAMA3_WEATHER = """{
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "天气",
        "parameters": {
            "type": "object",
            "properties": {}
        }
    }
}

"""
LLAMA3_TIME = """{
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "d"
    }
}

"""
GLM_WEATHER = """## get_weather

{
    "name": "get_weather",
    "description": "天气",
    "parameters": {
        "type": "object",
        "properties": {}
    }
}
在调用上述函数时，请使用 Json 格式表示调用的参数。"""
GLM_TIME = """## get_time

{
    "name": "get_time",
    "description": "d"
}
在调用上述函数时，请使用 Json 格式表示调用的参数。"""
DEEPSEEK_HOW = (
    "\n</tools>\n\nFor function call returns, you should first print <｜tool▁calls▁begin｜>\nFor each function call, "
    "you should return object like:\n<｜tool▁call▁begin｜>function<｜tool▁sep｜><function_name>\n```json\n"
    "<function_arguments_in_json_format>\n```<｜tool▁call▁end｜>\nAt the end of function call returns, you should "
    "print <｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
)
DEEPSEEK_ROME = (
    '<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜>'
)
DEEPSEEK_OSLO = (
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_time\n```json\n"
    '{"city": "Oslo", "h24": true}\n```<｜tool▁call▁end｜>'
)
REACT = "You can call these tools, each described by its JSON schema:\n"
REACT_HOW = (
    "\n\nTo call a tool, answer with its name and its arguments as a JSON object:\nAction: tool name\n"
    'Action Input: {"argument name": value}\n\nWhat it returns is given to you as:\nObservation: result'
)
REACT_ROME = 'Action: get_weather\nAction Input: {"city": "Rome"}'
REACT_OSLO = 'Action: get_time\nAction Input: {"city": "Oslo", "h24": true}'
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def said(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def headed(role, text):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


LLAMA3_SPEAKS = "<|start_header_id|>assistant<|end_header_id|>\n\n"
# ⟦what is learned⟧, of ONE and of MANY
WRITTEN = {
    "qwen": (
        said("system", f"Be kind.\n\n{QWEN_TOOLS}{WRAPPED}{WEATHER_JSON}}}{QWEN_HOW}")
        + said("user", "Weather?")
        + f"<|im_start|>assistant\n⟦{QWEN_ROME}<|im_end|>⟧\n"
        + said("user", '<tool_response>\n{"sky": "晴"}\n</tool_response>')
        + "<|im_start|>assistant\n⟦Sunny.<|im_end|>⟧\n",
        said(
            "system",
            f"You are a helpful assistant.\n\n{QWEN_TOOLS}{WRAPPED}{WEATHER_JSON}}}\n{WRAPPED}{TIME_JSON}}}{QWEN_HOW}",
        )
        + said("user", "Both?")
        + f"<|im_start|>assistant\n⟦Let me look.\n{QWEN_ROME}\n{QWEN_OSLO}<|im_end|>⟧\n"
        + said("user", "<tool_response>\nsunny\n</tool_response>\n<tool_response>\n12:00\n</tool_response>")
        + "<|im_start|>assistant\n⟦Done.<|im_end|>⟧\n"
        + said("user", "Again?")
        + f"<|im_start|>assistant\n⟦{QWEN_ROME}<|im_end|>⟧\n"
        + said("user", "<tool_response>\nrain\n</tool_response>")
        + "<|im_start|>assistant\n⟦Rain.<|im_end|>⟧\n",
    ),
    "qwen3": (
        said("system", f"Be kind.\n\n{QWEN_TOOLS}{WRAPPED}{WEATHER_JSON}}}{QWEN_HOW}")
        + said("user", "Weather?")
        + f"<|im_start|>assistant\n⟦{QWEN_ROME}<|im_end|>⟧\n"
        + said("user", '<tool_response>\n{"sky": "晴"}\n</tool_response>')
        + "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nSunny.<|im_end|>⟧\n",
        said("system", f"{QWEN_TOOLS}{WRAPPED}{WEATHER_JSON}}}\n{WRAPPED}{TIME_JSON}}}{QWEN_HOW}")
        + said("user", "Both?")
        + f"<|im_start|>assistant\n⟦Let me look.\n{QWEN_ROME}\n{QWEN_OSLO}<|im_end|>⟧\n"
        + said("user", "<tool_response>\nsunny\n</tool_response>\n<tool_response>\n12:00\n</tool_response>")
        + "<|im_start|>assistant\n⟦Done.<|im_end|>⟧\n"
        + said("user", "Again?")
        + f"<|im_start|>assistant\n⟦{QWEN_ROME}<|im_end|>⟧\n"
        + said("user", "<tool_response>\nrain\n</tool_response>")
        + "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nRain.<|im_end|>⟧\n",
    ),
    "llama3": (
        "<s>"
        + headed("system", f"{LLAMA3_DATE}Be kind.")
        + headed("user", f"{LLAMA3_HOW}{LLAMA3_WEATHER}Weather?")
        + LLAMA3_SPEAKS
        + '⟦{"name": "get_weather", "parameters": {"city": "Rome"}}<|eot_id|>⟧'
        + headed("ipython", '"{\\"sky\\": \\"晴\\"}"')
        + f"{LLAMA3_SPEAKS}⟦Sunny.<|eot_id|>⟧",
        "<s>"
        + headed("system", LLAMA3_DATE)
        + headed("user", f"{LLAMA3_HOW}{LLAMA3_WEATHER}{LLAMA3_TIME}Both?")
        + f'{LLAMA3_SPEAKS}⟦Let me look.\n{{"name": "get_weather", "parameters": {{"city": "Rome"}}}}; '
        + '{"name": "get_time", "parameters": {"city": "Oslo", "h24": true}}<|eot_id|>⟧'
        + headed("ipython", '"sunny"')
        + headed("ipython", '"12:00"')
        + f"{LLAMA3_SPEAKS}⟦Done.<|eot_id|>⟧"
        + headed("user", "Again?")
        + f'{LLAMA3_SPEAKS}⟦{{"name": "get_weather", "parameters": {{"city": "Rome"}}}}<|eot_id|>⟧'
        + headed("ipython", '"rain"')
        + f"{LLAMA3_SPEAKS}⟦Rain.<|eot_id|>⟧",
    ),
    "mistral": (
        f"<s>[AVAILABLE_TOOLS] [{WRAPPED}{WEATHER_JSON}}}][/AVAILABLE_TOOLS]"
        "[INST] Be kind.\n\nWeather?[/INST]"
        '⟦[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Rome"}}]</s>⟧'
        '[TOOL_RESULTS] {"content": {"sky": "晴"}}[/TOOL_RESULTS]⟦ Sunny.</s>⟧',
        f"<s>[AVAILABLE_TOOLS] [{WRAPPED}{WEATHER_JSON}}}, {WRAPPED}{TIME_JSON}}}][/AVAILABLE_TOOLS]"
        "[INST] Both?[/INST]"
        '⟦ Let me look.[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Rome"}}, '
        '{"name": "get_time", "arguments": {"city": "Oslo", "h24": true}}]</s>⟧'
        '[TOOL_RESULTS] {"content": sunny}[/TOOL_RESULTS][TOOL_RESULTS] {"content": 12:00}[/TOOL_RESULTS]'
        "⟦ Done.</s>⟧[INST] Again?[/INST]"
        '⟦[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Rome"}}]</s>⟧'
        '[TOOL_RESULTS] {"content": rain}[/TOOL_RESULTS]⟦ Rain.</s>⟧',
    ),
    "glm4": (
        f"[gMASK]<sop><|system|>\n# 可用工具\n\n{GLM_WEATHER}<|system|>\nBe kind.<|user|>\nWeather?<|assistant|>"
        '⟦get_weather\n{"city": "Rome"}<|observation|>⟧\n{"sky": "晴"}<|assistant|>⟦\nSunny.<|user|>⟧',
        f"[gMASK]<sop><|system|>\n# 可用工具\n\n{GLM_WEATHER}\n\n{GLM_TIME}<|user|>\nBoth?<|assistant|>"
        '⟦\nLet me look.<|assistant|>get_weather\n{"city": "Rome"}'
        '<|assistant|>get_time\n{"city": "Oslo", "h24": true}<|observation|>⟧'
        "\nsunny<|observation|>\n12:00<|assistant|>⟦\nDone.<|user|>⟧\nAgain?<|assistant|>"
        '⟦get_weather\n{"city": "Rome"}<|observation|>⟧\nrain<|assistant|>⟦\nRain.<|user|>⟧',
    ),
    "deepseek3": (
        f"<s>Be kind.\n\n{QWEN_TOOLS}{WRAPPED}{WEATHER_JSON}}}{DEEPSEEK_HOW}<｜User｜>Weather?<｜Assistant｜>"
        f"⟦<｜tool▁calls▁begin｜>{DEEPSEEK_ROME}<｜tool▁calls▁end｜></s>⟧"
        '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>{"sky": "晴"}<｜tool▁output▁end｜><｜tool▁outputs▁end｜>'
        "⟦Sunny.</s>⟧",
        f"<s>{QWEN_TOOLS}{WRAPPED}{WEATHER_JSON}}}\n{WRAPPED}{TIME_JSON}}}{DEEPSEEK_HOW}"
        f"<｜User｜>Both?<｜Assistant｜>"
        f"⟦Let me look.<｜tool▁calls▁begin｜>{DEEPSEEK_ROME}\n{DEEPSEEK_OSLO}<｜tool▁calls▁end｜></s>⟧"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜>"
        "<｜tool▁output▁begin｜>12:00<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
        "⟦Done.</s>⟧<｜User｜>Again?<｜Assistant｜>"
        f"⟦<｜tool▁calls▁begin｜>{DEEPSEEK_ROME}<｜tool▁calls▁end｜></s>⟧"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>rain<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
        "⟦Rain.</s>⟧",
    ),
    "vicuna": (
        f"Be kind.\n\n{REACT}{WEATHER_JSON}{REACT_HOW} USER: Weather? ASSISTANT:⟦ {REACT_ROME}</s>⟧"
        'USER: Observation: {"sky": "晴"} ASSISTANT:⟦ Sunny.</s>⟧',
        f"{VICUNA}\n\n{REACT}{WEATHER_JSON}\n{TIME_JSON}{REACT_HOW} USER: Both? ASSISTANT:"
        f"⟦ Let me look.\n{REACT_ROME}\n{REACT_OSLO}</s>⟧USER: Observation: sunny\nObservation: 12:00 ASSISTANT:"
        f"⟦ Done.</s>⟧USER: Again? ASSISTANT:⟦ {REACT_ROME}</s>⟧USER: Observation: rain ASSISTANT:⟦ Rain.</s>⟧",
    ),
    "llama2": (
        f"<s>[INST] <<SYS>>\nBe kind.\n\n{REACT}{WEATHER_JSON}{REACT_HOW}\n<</SYS>>\n\nWeather? [/INST]"
        f'⟦ {REACT_ROME} </s>⟧<s>[INST] Observation: {{"sky": "晴"}} [/INST]⟦ Sunny. </s>⟧',
        f"<s>[INST] <<SYS>>\n{REACT}{WEATHER_JSON}\n{TIME_JSON}{REACT_HOW}\n<</SYS>>\n\nBoth? [/INST]"
        f"⟦ Let me look.\n{REACT_ROME}\n{REACT_OSLO} </s>⟧<s>[INST] Observation: sunny\nObservation: 12:00 [/INST]"
        f"⟦ Done. </s>⟧<s>[INST] Again? [/INST]⟦ {REACT_ROME} </s>⟧<s>[INST] Observation: rain [/INST]⟦ Rain. </s>⟧",
    ),
    "chatglm2": (
        f"[gMASK]sopBe kind.\n\n{REACT}{WEATHER_JSON}{REACT_HOW}\n\n[Round 1]\n\n问：Weather?\n\n答："
        f'⟦{REACT_ROME}</s>⟧\n\n[Round 1]\n\n问：Observation: {{"sky": "晴"}}\n\n答：⟦Sunny.</s>⟧\n\n',
        f"[gMASK]sop{REACT}{WEATHER_JSON}\n{TIME_JSON}{REACT_HOW}\n\n[Round 1]\n\n问：Both?\n\n答："
        f"⟦Let me look.\n{REACT_ROME}\n{REACT_OSLO}</s>⟧\n\n[Round 1]\n\n问：Observation: sunny\n"
        "Observation: 12:00\n\n答："
        f"⟦Done.</s>⟧\n\n[Round 2]\n\n问：Again?\n\n答：⟦{REACT_ROME}</s>⟧\n\n[Round 2]\n\n"
        "问：Observation: rain\n\n答："
        "⟦Rain.</s>⟧\n\n",
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    """A tokenizer that has the special tokens of all families."""
    tokenizer = tiny_tokenizer()
    bound = [template for template in TEMPLATES.values() if "{eos}" not in template.end]
    markers = {token for template in TEMPLATES.values() for token in template.tokens}
    markers |= {template.end.strip() for template in bound}
    tokenizer.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in sorted(markers)])
    return tokenizer


def segments_of(written):
    parts = re.split(r"⟦(.*?)⟧", written, flags=re.DOTALL)
    return [Segment(text, number % 2 == 1) for number, text in enumerate(parts) if text]


def joined(segments):
    return "".join(segment.text for segment in segments)


def served(tokenizer, template, conversation, generation=False, messages=None):
    """What a server's chat template makes of the conversation, as clients send it."""
    return tokenizer.apply_chat_template(
        messages or openai_messages(turns(conversation.messages), conversation.system),
        tools=openai_tools(conversation.tools),
        chat_template=template if isinstance(template, str) else template.jinja(),
        add_generation_prompt=generation,
        tokenize=False,
    )


def trl_template(name):
    import trl.chat_template_utils as known

    return getattr(known, f"{name}_chat_template")


# --- written out -----------------------------------------------------------------------------------------------------


def test_every_form_is_written_out():
    assert {TEMPLATES[name].tools for name in WRITTEN} == set(FORMS.values())


@pytest.mark.parametrize("name", WRITTEN)
def test_one_call_and_many(name, tokenizer):
    template = TEMPLATES[name].bind(tokenizer)
    assert template.segments(ONE) == segments_of(WRITTEN[name][0])
    assert template.segments(MANY) == segments_of(WRITTEN[name][1])


@pytest.mark.parametrize("name", WRITTEN)
def test_the_jinja_says_the_same_letter_by_letter(name, tokenizer):
    template = TEMPLATES[name].bind(tokenizer)
    for conversation, written in zip((ONE, MANY), WRITTEN[name], strict=True):
        assert served(tokenizer, template, conversation) == re.sub("[⟦⟧]", "", written)


# --- every template --------------------------------------------------------------------------------------------------

ODD = replace(
    MANY,
    messages=(
        *(
            Message(U, "\n 'a' \"b\" & <c> \\ "),
            Message(C, '{"name": "get_time", "arguments": {"q": "<\'\\"&\\n北"}}'),
        ),
        *(Message(O, "{content} ⟨x⟩ \n"), Message(O, "{{ x }} {quoted}"), Message(C, '{"name": "get_time"}')),
        *(Message(O, ""), Message(A, " \n{calls} {eos}")),
    ),
    system=" {tools} {system} ",
)
WITHOUT_A_LIST = replace(MANY, tools=None)
ENDS_WITH_A_CALL = replace(ONE, messages=ONE.messages[:2])
CONVERSATIONS = {
    "one": ONE,
    "many": MANY,
    "odd": ODD,
    "no list": WITHOUT_A_LIST,
    "a call at the end": ENDS_WITH_A_CALL,
}


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_what_is_served_is_what_is_trained(name, tokenizer):
    template = TEMPLATES[name].bind(tokenizer)
    for what, conversation in CONVERSATIONS.items():
        segments = template.segments(conversation)
        assert served(tokenizer, template, conversation) == joined(segments), what
        ids, labels = encode_segments(tokenizer, segments)
        for number, message in enumerate(conversation.messages):
            is_prompt = message.role in (U, O) and (number + 1 == len(conversation.messages) or (
                conversation.messages[number + 1].role != O))  # fmt: skip
            if not is_prompt:
                continue
            part = replace(conversation, messages=conversation.messages[: number + 1])
            prompt = template.segments(part, generation=True)
            assert served(tokenizer, template, part, generation=True) == joined(prompt), what
            prompt_ids, _ = encode_segments(tokenizer, prompt)
            assert ids[: len(prompt_ids)] == prompt_ids, what
            assert labels[len(prompt_ids) - 1] == -100 != labels[len(prompt_ids)], what


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_calls_are_learned_and_observations_are_not(name, tokenizer):
    segments = TEMPLATES[name].bind(tokenizer).segments(MANY)
    said = [segment.text for segment in segments if segment.learn]
    context = "".join(segment.text for segment in segments if not segment.learn)
    assert len(said) == 4
    assert [text in said[0] for text in ("Let me look.", "get_weather", '"Rome"', "get_time", '"Oslo"')] == [True] * 5
    assert ["Done." in said[1], "get_weather" in said[2], "Rain." in said[3]] == [True] * 3
    for told in ("sunny", "12:00", "rain"):
        assert told in context and not any(told in text for text in said)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_call_that_is_not_learned_keeps_its_boundaries(name, tokenizer):
    template = TEMPLATES[name].bind(tokenizer)
    messages = tuple(replace(message, learn=message.content != ROME) for message in ONE.messages)
    before, after = template.segments(ONE), template.segments(replace(ONE, messages=messages))
    assert [segment.text for segment in after] == [segment.text for segment in before]
    assert [segment.learn for segment in before] == [False, True, False, True] + [False] * (len(before) - 4)
    assert [segment.learn for segment in after] == [False, False, False, True] + [False] * (len(before) - 4)


@pytest.mark.parametrize("name", WRITTEN)
def test_clients_that_leave_the_content_out(name, tokenizer):
    template = TEMPLATES[name].bind(tokenizer)
    messages = openai_messages(turns(ONE.messages), ONE.system)
    messages[2]["content"] = None
    assert served(tokenizer, template, ONE, messages=messages) == joined(template.segments(ONE))
    del messages[2]["content"]
    messages[2]["tool_calls"][0]["id"] = "call_1"
    messages[3]["tool_call_id"] = "call_1"
    assert served(tokenizer, template, ONE, messages=messages) == joined(template.segments(ONE))


def test_arguments_written_as_text_are_the_object_that_they_say(tokenizer):
    template = TEMPLATES["qwen"].bind(tokenizer)
    text = '{"name": "get_weather", "arguments": "{\\"city\\":\\"Rome\\"}"}'
    messages = (ONE.messages[0], Message(C, text), *ONE.messages[2:])
    assert template.segments(replace(ONE, messages=messages)) == template.segments(ONE)
    words = (ONE.messages[0], Message(C, '{"name": "search", "arguments": "the sea"}'))
    assert template.segments(Conversation(words))[1].text == (
        '<tool_call>\n{"name": "search", "arguments": the sea}\n</tool_call><|im_end|>'
    )


def test_a_form_without_tools_refuses_them(tokenizer):
    template = TEMPLATES["base"].bind(tokenizer)
    plain = Conversation((Message(U, "Hi"), Message(A, "Hello")), tools=ONE.tools, where="a.jsonl:7")
    for conversation in (ONE, WITHOUT_A_LIST, plain):
        with pytest.raises(RecordError, match=r"a\.jsonl:\d: the template 'base' has no form for tools") as caught:
            template.segments(conversation)
        assert caught.value.reason == "tools not shown"


def test_a_new_form_is_a_few_pieces(tokenizer):
    """What the docstring of ToolForm promises to who extends the table."""
    form = ToolForm(
        "mine", tool="{name}", call="!{name} {arguments}", observation="={content}", system="{tools}|{system}"
    )
    template = Template("mine", user="({content})", lead=":", tools=form).bind(tokenizer)
    assert template.segments(ONE) == segments_of(
        'get_weather|Be kind.(Weather?):⟦!get_weather {"city": "Rome"}</s>⟧(={"sky": "晴"}):⟦Sunny.</s>⟧'
    )
    assert served(tokenizer, template, ONE) == joined(template.segments(ONE))


def test_the_form_of_a_template_that_names_none_is_the_default():
    assert Template("mine", user="{content}", lead="").tools is DEFAULT


# --- what the families publish ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "file"), [("qwen", "qwen2_5"), ("qwen3", "qwen3")])
def test_qwen_publishes_the_same(name, file, tokenizer):
    template = TEMPLATES[name].bind(tokenizer)
    for conversation in (ONE, replace(MANY, system="Be kind."), replace(ODD, messages=ODD.messages[:6])):
        for number in range(1, len(conversation.messages) + 1):
            part = replace(conversation, messages=conversation.messages[:number])
            for generation in {False, part.messages[-1].role in (U, O)}:
                text = joined(template.segments(part, generation=generation))
                assert served(tokenizer, trl_template(file), part, generation) == text


def test_llama_publishes_the_same(tokenizer):
    """Its own takes one call a turn, and no words beside it."""
    template = TEMPLATES["llama3"].bind(tokenizer)
    exchange = replace(MANY, system="Be kind.", messages=(MANY.messages[0], *MANY.messages[2:3], *MANY.messages[4:]))
    exchange = replace(exchange, messages=tuple(m for m in exchange.messages if m.content != "12:00"))
    for conversation in (ONE, exchange):
        text = joined(template.segments(conversation))
        assert served(tokenizer, trl_template("llama3_1"), conversation) == text
        prompt = replace(conversation, messages=conversation.messages[:3])
        text = joined(template.segments(prompt, generation=True))
        assert served(tokenizer, trl_template("llama3_1"), prompt, generation=True) == text


def test_deepseek_publishes_the_same(tokenizer):
    """Its own shows no list of tools, takes arguments as text, and forgets the header of a second turn of calls."""
    template = TEMPLATES["deepseek3"].bind(tokenizer)
    conversation = replace(MANY, tools=None, system="Be kind.", messages=MANY.messages[:7])
    for count, generation in ((7, False), (6, True), (1, True)):
        part = replace(conversation, messages=conversation.messages[:count])
        messages = openai_messages(turns(part.messages), part.system)
        for message in messages:
            for call in message.get("tool_calls", []):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        published = served(tokenizer, trl_template("deepseekv3"), part, generation, messages)
        published = published.removesuffix("<think>\n")  # what the later R1 added to a prompt
        text = joined(template.segments(part, generation=generation))
        assert published == text.replace("</s>", "<｜end▁of▁sentence｜>")


# --- real records ----------------------------------------------------------------------------------------------------


def real(name, parse):
    path = REAL / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [parse(json.loads(line), f"{name}:{number}") for number, line in enumerate(lines, 1)]


@pytest.mark.parametrize("name", WRITTEN)
def test_real_conversations(name, tokenizer):
    template = TEMPLATES[name].bind(tokenizer)
    conversations = real("toolcall_zh.jsonl", parse_conversation)
    assert len(conversations) == 150
    for conversation in conversations:
        segments = template.segments(conversation)
        assert served(tokenizer, template, conversation) == joined(segments), conversation.where
        said = "".join(segment.text for segment in segments if segment.learn)
        for message in conversation.messages:
            if message.role == A:
                assert message.content in said
            elif message.role == C:
                assert json.loads(message.content)["name"] in said


@pytest.mark.parametrize("name", WRITTEN)
def test_real_preferences(name, tokenizer):
    template = TEMPLATES[name].bind(tokenizer)
    preferences = real("toolcall_preference_zh.jsonl", parse_preference)
    assert len(preferences) == 6
    for preference in preferences:
        prompt = joined(template.segments(preference.prompt, generation=True))
        for answer in (preference.chosen, preference.rejected):
            whole = replace(preference.prompt, messages=(*preference.prompt.messages, *answer))
            assert joined(template.segments(whole)).startswith(prompt)
            assert served(tokenizer, template, whole) == joined(template.segments(whole))


@pytest.mark.parametrize(("name", "file"), [("qwen", "qwen2_5"), ("qwen3", "qwen3")])
def test_real_conversations_as_qwen_publishes_them(name, file, tokenizer):
    template = TEMPLATES[name].bind(tokenizer)
    for conversation in real("toolcall_zh.jsonl", parse_conversation):
        conversation = replace(conversation, system=conversation.system or "Be kind.")
        assert served(tokenizer, trl_template(file), conversation) == joined(template.segments(conversation))


def test_a_tokenizers_own_template_on_real_conversations(tokenizer):
    from stagewise.chat.tokenizer_template import TokenizerTemplate

    own = TokenizerTemplate(copy.deepcopy(tokenizer), trl_template("qwen3"))
    template = TEMPLATES["qwen3"].bind(tokenizer)
    for conversation in real("toolcall_zh.jsonl", parse_conversation):
        assert own.segments(conversation) == template.segments(conversation)


def test_calls_with_an_end_of_their_own_end_generation_too(tokenizer):
    assert TEMPLATES["glm4"].bind(tokenizer).stops == ("<|user|>", "<|observation|>")
    assert TEMPLATES["qwen"].bind(tokenizer).stops == ("<|im_end|>",)


# --- the docs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["tools.md", "tools_zh.md"])
def test_the_examples_of_the_page_are_true(page, tokenizer):
    text = (Path(__file__).resolve().parents[2] / "docs" / page).read_text(encoding="utf-8")
    records = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]
    sharegpt, openai, thinks = (parse_conversation(record, page) for record in records)
    called, thought = re.findall(r"^```\n(<\|im_start.*?)^```$", text, re.MULTILINE | re.DOTALL)
    qwen, qwen3 = (TEMPLATES[name].bind(tokenizer) for name in ("qwen", "qwen3"))
    assert qwen.segments(sharegpt) == qwen.segments(openai) == segments_of(called)
    assert qwen3.segments(thinks) == segments_of(thought)


@pytest.mark.parametrize("page", ["tools.md", "tools_zh.md"])
def test_the_table_of_the_page_is_the_table(page):
    text = (Path(__file__).resolve().parents[2] / "docs" / page).read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")][:2] for line in text.splitlines() if line[:2] == "| "
    ]
    named = {form: set(re.split(", |、", names)) for form, names in rows if form in FORMS}
    used = {form: {name for name in WITH_TOOLS if TEMPLATES[name].tools.name == form} for form in FORMS}
    assert named.pop("default") and used.pop("default")
    assert named == used
