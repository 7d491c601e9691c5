"""A tokenizer's own chat template: cut exactly or refused; and which form a model is trained in, stage after stage."""

import copy
import itertools
import json
import pickle

import jinja2
import pytest
from tokenizers import AddedToken

from stagewise.chat import registry
from stagewise.chat.select import TRAINED_IN, choose_template
from stagewise.chat.template import Template
from stagewise.chat.tokenizer_template import TokenizerTemplate
from stagewise.config.arguments import ChatArguments
from stagewise.errors import ArgumentError, InexactCut, RecordError
from stagewise.formats.parsers import Conversation, Message
from template import TEMPLATES

U, A = "user", "assistant"
MARKERS = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<end_of_turn>", "<start_of_turn>", "<|end|>", "<｜end▁of▁sentence｜>", "<|user|>", "<|END_OF_TURN_TOKEN|>"),
]
TOOL = '[{"name": "get_weather", "description": "d", "parameters": {"type": "object", "properties": {}}}]'
CALL = '{"name": "get_weather", "arguments": {"city": "北京"}}'
LLAMA2_FAMILY = (  # the form of Llama-2-chat, as its tokenizer_config.json has it, without the system part
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LLAMA2_SEGMENTS = [
    ("<s>[INST] Hi [/INST]", False),
    (" Hello </s>", True),
    ("<s>[INST] Bye [/INST]", False),
    (" Ciao </s>", True),
]
CHATML_SEGMENTS = [
    ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
    ("Hello<|im_end|>", True),
    ("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", False),
    ("Ciao<|im_end|>", True),
    ("\n", False),
]


def talk(*texts, system=None, **more):
    return Conversation(
        tuple(Message((U, A)[n % 2], text) for n, text in enumerate(texts)), system, where="a.jsonl:7", **more
    )


def openai(conversation):
    system = [] if conversation.system is None else [{"role": "system", "content": conversation.system}]
    return system + [{"role": message.role, "content": message.content} for message in conversation.messages]


def pairs(segments):
    return [(segment.text, segment.learn) for segment in segments]


def joined(segments):
    return "".join(segment.text for segment in segments)


def learned(segments):
    return [segment.text for segment in segments if segment.learn]


def trl_template(name):
    import trl.chat_template_utils as known

    return getattr(known, f"{name}_chat_template")


@pytest.fixture(scope="module")
def tokenizers(tiny_tokenizer):
    """Tokenizers that have the end markers of all families here, by what they do about bos."""

    def make(**options):
        tokenizer = tiny_tokenizer(**options)
        tokenizer.add_tokens([AddedToken(marker, special=True) for marker in MARKERS])
        return tokenizer

    return {"plain": make(), "adds bos": make(adds_bos=True)}


def own(tokenizer, chat_template, **flags):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = chat_template
    return choose_template(tokenizer, ChatArguments(**flags)), tokenizer


# --- cutting ---------------------------------------------------------------------------------------------------------


def test_a_family_that_trims_is_cut_as_it_renders(tokenizers):
    template, tokenizer = own(tokenizers["adds bos"], LLAMA2_FAMILY)
    conversation = talk(" Hi ", "\nHello ", "Bye", "Ciao")
    assert pairs(template.segments(conversation)) == LLAMA2_SEGMENTS
    served = tokenizer.apply_chat_template(openai(conversation), tokenize=False)
    assert joined(template.segments(conversation)) == served
    assert template.stop == "</s>"


def test_what_the_template_refuses_is_a_record_error(tokenizers):
    template, _ = own(tokenizers["plain"], LLAMA2_FAMILY)
    with pytest.raises(RecordError, match=r"a\.jsonl:7: .*Only user and assistant roles are .*--template_name"):
        template.segments(talk("Hi", "Hello", system="Be kind."))


def test_what_a_filter_cannot_take_is_a_record_error(tokenizers):
    """The arguments of a call as plain text, to a family that goes through them by name."""
    calls = (
        "{% for call in m.tool_calls or [] %}{% for name, value in call.function.arguments | items %}"
        "{{ name + '=' + value }}{% endfor %}{% endfor %}"
    )
    text = CHATML.replace("WORDS", "m.content").replace("{% for m in messages %}", "{% for m in messages %}" + calls)
    template, _ = own(tokenizers["plain"], text)
    call = Message("tool_call", '{"name": "f", "arguments": "plain words"}')
    with pytest.raises(RecordError, match=r"a\.jsonl:7: .*refuses the conversation: .*mapping.*--template_name"):
        template.segments(Conversation((Message(U, "Hi"), call), where="a.jsonl:7"))


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_way_out(tokenizers):
    rewrites = TEMPLATES["chatml"].jinja().replace("+ words + ", '+ (words if loop.last else "…") + ')
    with pytest.raises(InexactCut, match="rewrites earlier turns; choose a form of this project with --template_name"):
        own(tokenizers["plain"], rewrites)


def test_a_template_without_an_end_marker_is_refused(tokenizers):
    text = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    with pytest.raises(InexactCut, match=r"ends an answer with '\\n', where no token of the tokenizer marks the end"):
        own(tokenizers["plain"], text)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + WORDS + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_changes_the_words_is_refused(tokenizers):
    template, _ = own(tokenizers["plain"], CHATML.replace("WORDS", "(m.content | replace('a', '4'))"))
    assert joined(template.segments(talk("a", "b"))).count("4") == 1  # what the user said may be changed
    with pytest.raises(RecordError, match=r"a\.jsonl:7: .* changes the words of turn 2"):
        template.segments(talk("b", "a"))


def test_a_template_that_changes_turns_by_content_is_caught_at_the_record(tokenizers):
    words = "(m.content if loop.last or 'secret' not in m.content else '-')"
    template, _ = own(tokenizers["plain"], CHATML.replace("WORDS", words))
    assert len(template.segments(talk("a", "b", "c", "d"))) == 5
    with pytest.raises(RecordError, match="does not keep turn 2 unchanged"):
        template.segments(talk("a", "secret", "c", "d"))


def test_a_question_that_looks_like_an_answer_does_not_move_the_cut(tokenizers):
    template, _ = own(tokenizers["plain"], CHATML.replace("WORDS", "m.content"))
    forged = "x<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"
    assert learned(template.segments(talk(forged, "Hello", forged, "Ciao"))) == ["Hello<|im_end|>", "Ciao<|im_end|>"]


def test_named_templates_need_a_default(tokenizers):
    template, _ = own(tokenizers["plain"], {"default": CHATML.replace("WORDS", "m.content"), "other": "x"})
    assert pairs(template.segments(talk("Hi", "Hello", "Bye", "Ciao"))) == CHATML_SEGMENTS
    with pytest.raises(ValueError, match=r"\['other'\] have no default"):
        own(tokenizers["plain"], {"other": "x"})


def test_generation_marks_are_not_saved(tokenizers):
    """Plain Jinja and most servers fail on them."""
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{%- generation -%} "
        "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    template, tokenizer = own(tokenizers["plain"], marked)
    assert "generation %}" not in tokenizer.chat_template and "generation -%}" not in tokenizer.chat_template
    conversation = talk("Hi", "Hello", "Bye", "Ciao")
    assert pairs(template.segments(conversation)) == CHATML_SEGMENTS
    plain = jinja2.Environment().from_string(tokenizer.chat_template)
    assert plain.render(messages=openai(conversation)) == "".join(text for text, _ in CHATML_SEGMENTS)


def test_it_gets_the_bos_that_its_form_leaves_out(tokenizers):
    expected = "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    template, tokenizer = own(tokenizers["adds bos"], CHATML.replace("WORDS", "m.content"))
    assert joined(template.segments(talk("Hi", "Hello"))) == expected
    assert tokenizer.apply_chat_template(openai(talk("Hi", "Hello")), tokenize=False) == expected
    # once, also when the next stage reads what this one saved
    again = choose_template(tokenizer, ChatArguments())
    assert joined(again.segments(talk("Hi", "Hello"))) == expected


def test_a_template_goes_to_worker_processes(tokenizers):
    template, _ = own(tokenizers["plain"], CHATML.replace("WORDS", "m.content"))
    before = template.segments(talk("a", "b"))
    assert pickle.loads(pickle.dumps(template)).segments(talk("a", "b")) == before


def test_a_prompt_must_end_with_what_the_model_is_told(tokenizers):
    template, _ = own(tokenizers["plain"], LLAMA2_FAMILY)
    with pytest.raises(RecordError, match="a prompt must end with a user turn"):
        template.segments(talk("Hi", "Hello"), generation=True)


def test_an_answer_that_is_not_learned_keeps_its_boundaries(tokenizers):
    template, _ = own(tokenizers["plain"], CHATML.replace("WORDS", "m.content"))
    turns = (Message(U, "Hi"), Message(A, "Hello", learn=False), Message(U, "Bye"), Message(A, "Ciao"))
    expected = [(text, flag and text != "Hello<|im_end|>") for text, flag in CHATML_SEGMENTS]
    assert pairs(template.segments(Conversation(turns))) == expected


# --- one rendering gives what turn by turn gives ---------------------------------------------------------------------

SAID = ["Hi", " Hi", "Hello\n", "\n\n", "\ue0001\ue001", "<|im_end|>", "你好", "{{ x }}", "0", "<think>"]
FAMILIES = ["qwen2_5", "qwen3", "qwen3_5_think", "qwen3_instruct_2507", "llama3", "llama3_1", "gemma3", "phi3", "lfm2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rendering_and_turn_by_turn_give_the_same(family, tokenizers):
    template, _ = own(tokenizers["plain"], trl_template(family))
    slow, _ = own(tokenizers["plain"], trl_template(family))
    slow._by_skeleton = lambda *_: None
    words = itertools.cycle(SAID)
    taken = 0
    for count, system in itertools.product((*range(1, 12), 24, 25), (None, "Be kind.", " \n")):
        conversation = talk(*itertools.islice(words, count), system=system)
        for generation in {False, count % 2 == 1}:
            try:
                expected = slow.segments(conversation, generation=generation)
            except RecordError as error:  # one rendering tells some apart that turn by turn can't
                assert error.reason == "inexact cut"
                continue
            taken += 1
            assert template.segments(conversation, generation=generation) == expected
    assert taken >= 20


def test_a_family_that_changes_its_form_late_is_cut_all_the_same(tokenizers):
    """What a short conversation shows is no promise for a long one."""
    late = CHATML.replace("m.role + '\n'", "m.role + ('!' if loop.index0 > 20 and m.role == 'user' else '') + '\n'")
    template, _ = own(tokenizers["plain"], late.replace("WORDS", "m.content"))
    segments = template.segments(talk(*(f"turn {n}" for n in range(40))))
    assert learned(segments) == [f"turn {n}<|im_end|>" for n in range(1, 40, 2)]
    assert [segment.text.count("user!\n") for segment in segments if not segment.learn] == [0] * 11 + [1] * 9 + [0]


def test_long_conversations_are_rendered_once(tokenizers):
    template, _ = own(tokenizers["plain"], trl_template("qwen3"))
    renderings = []
    render = template._render
    template._render = lambda *args: renderings.append(1) or render(*args)
    long = talk(*(f"turn {n}" for n in range(200)))
    template.segments(long)  # makes the skeleton from a short one
    assert len(renderings) < 30
    for number in range(5):
        renderings.clear()
        other = talk(*(f"other {number} {n}" for n in range(200)))
        assert len(learned(template.segments(other))) == 100
        assert len(renderings) == 1


# --- families whose template TRL knows -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said", "stop"),
    [
        ("qwen2_5", ["Hello<|im_end|>", "Ciao<|im_end|>"], "<|im_end|>"),
        ("llama3", ["Hello<|eot_id|>", "Ciao<|eot_id|>"], "<|eot_id|>"),
        ("llama3_1", ["Hello<|eot_id|>", "Ciao<|eot_id|>"], "<|eot_id|>"),
        ("gemma", ["Hello<end_of_turn>", "Ciao<end_of_turn>"], "<end_of_turn>"),
        ("phi3", ["Hello<|end|>", "Ciao<|end|>"], "<|end|>"),
        ("qwen3_instruct_2507", ["Hello<|im_end|>", "Ciao<|im_end|>"], "<|im_end|>"),
    ],
)
def test_public_families(name, said, stop, tokenizers):
    template, tokenizer = own(tokenizers["plain"], trl_template(name))
    conversation = talk("Hi", "Hello", "Bye", "Ciao")
    segments = template.segments(conversation)
    assert learned(segments) == said
    assert template.stop == stop
    assert joined(segments) == tokenizer.apply_chat_template(openai(conversation), tokenize=False)
    prompt = joined(template.segments(talk("Hi", "Hello", "Bye"), generation=True))
    assert prompt == tokenizer.apply_chat_template(
        openai(talk("Hi", "Hello", "Bye")), add_generation_prompt=True, tokenize=False
    )
    assert joined(segments).startswith(prompt)


@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3_instruct_2507", "llama3", "gemma", "gemma3", "phi3", "cohere", "lfm2"]
)
def test_trl_masks_the_same_answers(name, tokenizers):
    """Its forms mark what is learned; some count a newline before an answer to it, and what stands behind its end."""
    template, tokenizer = own(tokenizers["plain"], trl_template(name))
    conversation = talk("Hi", "Hello, you.", "Bye", "Ciao")
    masked = tokenizer.apply_chat_template(
        openai(conversation),
        chat_template=trl_template(f"{name}_training"),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    runs = itertools.groupby(
        zip(masked["input_ids"], masked["assistant_masks"], strict=True), key=lambda pair: pair[1]
    )
    texts = [tokenizer.decode([token for token, _ in run]) for is_answer, run in runs if is_answer]
    stop = template.stop
    assert [text.lstrip("\n").partition(stop)[0] + stop for text in texts] == learned(template.segments(conversation))
    assert {text.partition(stop)[2] for text in texts} <= {"", "\n", "\n</s>"}


def test_a_family_that_its_own_text_cannot_cut_gets_trls_training_form(tokenizers):
    """GLM-4.5 marks no end of an answer; TRL's form ends it with the tag of the next speaker."""
    template, _ = own(tokenizers["plain"], trl_template("glm4moe"))
    assert template.name.startswith("TRL's training form")
    said = learned(template.segments(talk("Hi", "Hello", "Bye", "Ciao")))
    assert said == ["\n<think></think>\nHello<|user|>", "\n<think></think>\nCiao<|user|>"]


def test_a_family_that_nothing_cuts_is_refused_with_the_ways_out(tokenizers):
    """The prompt opens a thought, the answer of the whole conversation shows none."""
    with pytest.raises(InexactCut, match="rewrites earlier turns; choose a form of this project with --template_name"):
        own(tokenizers["plain"], trl_template("deepseek_r1_distill"))
    with pytest.raises(InexactCut, match="or, for answers without thoughts, --enable_thinking False$"):
        own(tokenizers["plain"], trl_template("nemotron_3_nano"))
    template, _ = own(tokenizers["plain"], trl_template("nemotron_3_nano"), enable_thinking=False)
    assert learned(template.segments(talk("Hi", "Hello"))) == ["Hello<|im_end|>"]


def test_a_training_form_that_knows_nothing_of_a_flag_is_not_taken_with_it(tokenizers, monkeypatch):
    import trl.chat_template_utils as known

    deaf = trl_template("qwen2_5_training")
    monkeypatch.setattr(known, "get_training_chat_template", lambda tokenizer: deaf)
    assert own(tokenizers["plain"], trl_template("glm4moe"))[0].name.startswith("TRL's training form")
    with pytest.raises(InexactCut, match="ends an answer with|rewrites earlier turns"):
        own(tokenizers["plain"], trl_template("glm4moe"), enable_thinking=False)


# --- tools -----------------------------------------------------------------------------------------------------------

WITH_TOOLS = Conversation(
    (Message(U, "Weather?"), Message("tool_call", CALL), Message("observation", "sunny"), Message(A, "It is sunny.")),
    tools=TOOL,
    where="a.jsonl:7",
)


def test_a_template_that_does_not_show_the_tools_is_refused(tokenizers):
    template, _ = own(tokenizers["plain"], CHATML.replace("WORDS", "m.content"))
    for conversation in (WITH_TOOLS, talk("Hi", "Hello", tools=TOOL)):
        with pytest.raises(RecordError, match="leaves out the tool text 'get_weather'") as caught:
            template.segments(conversation)
        assert caught.value.reason == "tools not shown"


def test_a_family_that_shows_tools(tokenizers):
    template, tokenizer = own(tokenizers["plain"], trl_template("qwen2_5"))
    segments = template.segments(WITH_TOOLS)
    assert learned(segments) == [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call><|im_end|>',
        "It is sunny.<|im_end|>",
    ]
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京"}}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ]
    tools = [{"type": "function", "function": json.loads(TOOL)[0]}]
    assert joined(segments) == tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)


def test_a_family_that_writes_what_tools_said_as_json(tokenizers):
    template, _ = own(tokenizers["plain"], trl_template("llama3_1"))
    segments = template.segments(WITH_TOOLS)
    assert learned(segments) == [
        '{"name": "get_weather", "parameters": {"city": "北京"}}<|eot_id|>',
        "It is sunny.<|eot_id|>",
    ]


def test_words_and_calls_of_one_turn_are_one_answer(tokenizers):
    template, _ = own(tokenizers["plain"], trl_template("qwen2_5"))
    turns = (
        Message(U, "Weather?"),
        Message(A, "Let me look."),
        Message("tool_call", CALL),
        Message("tool_call", CALL),
    )
    call = '\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>'
    assert learned(template.segments(Conversation(turns, tools=TOOL))) == ["Let me look." + call * 2 + "<|im_end|>"]


# --- thinking --------------------------------------------------------------------------------------------------------

EMPTY = "<think>\n\n</think>\n\n"
THOUGHT = "<think>\nOne and one.\n</think>\n\n"
QWEN3 = {
    None: [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello<|im_end|>", True),
        ("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", False),
        (EMPTY + "Ciao<|im_end|>", True),
        ("\n", False),
    ],
    False: [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello<|im_end|>", True),
        ("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n" + EMPTY, False),
        ("Ciao<|im_end|>", True),
        ("\n", False),
    ],
}
QWEN3[True] = QWEN3[None]


def qwen3(tokenizer, source, enable_thinking):
    """Qwen3's form from the tokenizer, as its family published it, and from the table of this project."""
    if source == "own":
        return own(tokenizer, trl_template("qwen3"), enable_thinking=enable_thinking)
    tokenizer = copy.deepcopy(tokenizer)
    flags = ChatArguments(template_name="qwen3", enable_thinking=enable_thinking)
    return choose_template(tokenizer, flags), tokenizer


SOURCES = pytest.mark.parametrize("source", ["own", "table"])


@SOURCES
@pytest.mark.parametrize("enable_thinking", [None, True, False])
def test_qwen3(source, enable_thinking, tokenizers):
    template, tokenizer = qwen3(tokenizers["plain"], source, enable_thinking)
    expected = QWEN3[enable_thinking]
    conversation, prompt = talk("Hi", "Hello", "Bye", "Ciao"), talk("Hi", "Hello", "Bye")
    assert pairs(template.segments(conversation)) == expected
    assert template.stop == "<|im_end|>"
    asked = [(expected[0][0], False), expected[1], expected[2]]
    assert pairs(template.segments(prompt, generation=True)) == asked
    # served as trained, by transformers and by others, without a flag
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template.jinja())
    for messages, generation, text in (
        (openai(conversation), False, "".join(text for text, _ in expected)),
        (openai(prompt), True, "".join(text for text, _ in asked)),
    ):
        assert plain.render(messages=messages, add_generation_prompt=generation) == text
        served = tokenizer.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False)
        assert served == text
        # as the family's published text says it, which is told what the flag told us
        told = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        published = tokenizer.apply_chat_template(
            messages, chat_template=trl_template("qwen3"), add_generation_prompt=generation, tokenize=False, **told
        )
        assert published == text


@SOURCES
def test_thoughts_of_the_last_answer_are_learned_and_earlier_ones_left_out(source, tokenizers):
    template, tokenizer = qwen3(tokenizers["plain"], source, None)
    conversation = talk("1+1?", THOUGHT + "2", "2+2?", THOUGHT + "4")
    segments = template.segments(conversation)
    assert learned(segments) == ["2<|im_end|>", THOUGHT + "4<|im_end|>"]
    published = tokenizer.apply_chat_template(
        openai(conversation), chat_template=trl_template("qwen3"), tokenize=False
    )
    assert joined(segments) == published
    assert learned(template.segments(talk("1+1?", THOUGHT + "2"))) == [THOUGHT + "2<|im_end|>"]


TOOL_THOUGHTS = Conversation(
    (
        *(Message(U, "Weather?"), Message(A, THOUGHT + "Let me look."), Message("tool_call", CALL)),
        *(Message("observation", "sunny"), Message(A, THOUGHT + "It is sunny.")),
        *(Message(U, "And there?"), Message(A, THOUGHT), Message("tool_call", CALL), Message("tool_call", CALL)),
        *(Message("observation", "rain"), Message("observation", "snow"), Message("tool_call", CALL)),
        *(Message("observation", "wind"), Message(A, "Rain.")),
    ),
    system="Be kind.",
    tools=TOOL,
)


@SOURCES
def test_thoughts_between_calls(source, tokenizers):
    """Behind the last question they stay where they were; a call without thoughts gets no empty ones."""
    template, tokenizer = qwen3(tokenizers["plain"], source, True)
    segments = template.segments(TOOL_THOUGHTS)
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>'
    assert learned(segments) == [
        f"Let me look.\n{call}<|im_end|>",
        "It is sunny.<|im_end|>",
        f"{THOUGHT}{call}\n{call}<|im_end|>",
        f"{call}<|im_end|>",
        f"{EMPTY}Rain.<|im_end|>",
    ]
    function = {"name": "get_weather", "arguments": {"city": "北京"}}
    calls = [{"type": "function", "function": function}]
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Let me look.", "reasoning_content": "One and one.", "tool_calls": calls},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny.", "reasoning_content": "One and one."},
        {"role": "user", "content": "And there?"},
        {"role": "assistant", "content": "", "reasoning_content": "One and one.", "tool_calls": calls * 2},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "snow"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "wind"},
        {"role": "assistant", "content": "Rain."},
    ]
    tools = [{"type": "function", "function": json.loads(TOOL)[0]}]
    published = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=trl_template("qwen3"), tokenize=False
    )
    assert joined(segments) == published
    assert tokenizer.apply_chat_template(messages, tools=tools, tokenize=False) == published


@SOURCES
def test_thoughts_that_are_switched_off_are_refused(source, tokenizers):
    template, _ = qwen3(tokenizers["plain"], source, False)
    for texts in (("1+1?", THOUGHT + "2"), ("1+1?", THOUGHT + "2", "2+2?", "4")):
        with pytest.raises(
            RecordError, match=r"a\.jsonl:7: an answer holds thoughts, which --enable_thinking"
        ) as caught:
            template.segments(talk(*texts))
        assert caught.value.reason == "thoughts switched off"
    assert learned(template.segments(talk("1+1?", EMPTY + "2"))) == ["2<|im_end|>"]


@pytest.mark.parametrize(
    ("enable_thinking", "prompt", "said"),
    [
        (None, "<think>\n", "One and one.\n</think>\n\n4<|im_end|>"),
        (True, "<think>\n", "One and one.\n</think>\n\n4<|im_end|>"),
        (False, EMPTY, "4<|im_end|>"),
    ],
)
def test_a_family_whose_prompt_opens_the_thoughts(enable_thinking, prompt, said, tokenizers):
    """Qwen3.5: what the prompt opens isn't learned, in earlier answers it isn't there."""
    template, tokenizer = own(tokenizers["plain"], trl_template("qwen3_5_think"), enable_thinking=enable_thinking)
    conversation = talk("Hi", "Hello", "2+2?", "4" if enable_thinking is False else THOUGHT + "4")
    segments = template.segments(conversation)
    assert pairs(segments) == [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello<|im_end|>", True),
        ("\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n" + prompt, False),
        (said, True),
        ("\n", False),
    ]
    served = tokenizer.apply_chat_template(openai(conversation)[:3], add_generation_prompt=True, tokenize=False)
    assert served == joined(segments[:3])


def test_a_client_may_still_ask_for_the_other(tokenizers):
    _, tokenizer = qwen3(tokenizers["plain"], "table", False)
    messages = openai(talk("Hi"))
    without, with_thoughts = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, enable_thinking=value)
        for value in (False, True)
    )
    assert without == with_thoughts + EMPTY


@SOURCES
def test_the_next_stage_goes_on_as_the_flag_said(source, tokenizers):
    first, tokenizer = qwen3(tokenizers["plain"], source, False)
    again = choose_template(tokenizer, ChatArguments())
    conversation = talk("Hi", "Hello", "Bye", "Ciao")
    assert again.segments(conversation) == first.segments(conversation)
    assert again.jinja() == first.jinja()
    other = choose_template(tokenizer, ChatArguments(enable_thinking=True))
    assert pairs(other.segments(conversation)) == QWEN3[True]
    assert tokenizer.chat_template.count("enable_thinking = true") == 1
    assert "enable_thinking = false" not in tokenizer.chat_template


@pytest.mark.parametrize("value", [True, False])
def test_thinking_without_a_place_for_it_is_refused_with_the_way_out(value, tokenizers):
    tokenizer = copy.deepcopy(tokenizers["plain"])
    for flags in ({"template_name": "chatml"}, {}):  # the second time as the tokenizer's own
        with pytest.raises(ArgumentError, match="--enable_thinking: .*no place for thoughts.*--template_name qwen3"):
            choose_template(tokenizer, ChatArguments(enable_thinking=value, **flags))
    with pytest.raises(ArgumentError, match="--enable_thinking: the tokenizer's own chat template has no place"):
        own(tokenizer, trl_template("qwen2_5"), enable_thinking=value)


# --- choosing --------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_template_gets_vicuna(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    template = choose_template(tokenizer, ChatArguments())
    assert template.name == "vicuna"
    assert tokenizer.chat_template == template.jinja()


def test_an_unknown_name_is_refused_with_the_known_ones(tiny_tokenizer):
    with pytest.raises(
        ArgumentError, match="--template_name: unknown template 'vicunia'; known: vicuna, alpaca, llama2"
    ):
        choose_template(tiny_tokenizer(), ChatArguments(template_name="vicunia"))


def reloaded(tokenizer, folder):
    """The tokenizer as the next stage gets it."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", [None, "vicuna", "chatml", "qwen3"])
def test_the_next_stage_finds_the_form_by_its_name(name, tokenizers, tmp_path):
    first = copy.deepcopy(tokenizers["plain"])
    template = choose_template(first, ChatArguments(template_name=name))
    tokenizer = reloaded(reloaded(first, tmp_path / "adapter"), tmp_path / "merged")
    assert tokenizer.init_kwargs[TRAINED_IN] == (name or "vicuna")
    again = choose_template(tokenizer, ChatArguments())
    assert isinstance(again, Template)
    assert again == template
    same = choose_template(tokenizer, ChatArguments(template_name=name or "vicuna"))
    assert same == template


def test_a_table_that_was_changed_since_is_not_used(tokenizers, tmp_path, monkeypatch):
    first = copy.deepcopy(tokenizers["plain"])
    choose_template(first, ChatArguments(template_name="vicuna"))
    monkeypatch.setitem(registry._TEMPLATES, "vicuna", Template("vicuna", user="Q: {content}", lead=" A:"))
    again = choose_template(reloaded(first, tmp_path), ChatArguments())
    assert isinstance(again, TokenizerTemplate)
    assert joined(again.segments(talk("Hi", "Hello", system=""))) == "USER: Hi ASSISTANT: Hello</s>"
    with pytest.raises(ArgumentError, match="--template_name vicuna: the model was trained with vicuna"):
        choose_template(reloaded(first, tmp_path), ChatArguments(template_name="vicuna"))


def test_another_form_on_a_later_stage_is_refused_and_both_are_shown(tokenizers, tmp_path):
    first = copy.deepcopy(tokenizers["plain"])
    choose_template(first, ChatArguments(template_name="vicuna"))
    tokenizer = reloaded(first, tmp_path)
    before = tokenizer.chat_template
    with pytest.raises(ArgumentError) as caught:
        choose_template(tokenizer, ChatArguments(template_name="chatml"))
    message = str(caught.value)
    assert message.startswith("--template_name chatml: the model was trained with vicuna")
    assert '\n  vicuna: "A chat between a curious user and an artificial' in message
    assert '\n  chatml: "<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n"' in message
    assert "leave --template_name out to continue with vicuna, or add --force_template" in message
    assert tokenizer.chat_template == before
    template = choose_template(tokenizer, ChatArguments(template_name="chatml", force_template=True))
    assert tokenizer.chat_template == template.jinja() == TEMPLATES["chatml"].bind(tokenizer).jinja()
    assert reloaded(tokenizer, tmp_path).init_kwargs[TRAINED_IN] == "chatml"


def test_a_model_trained_in_its_own_template_is_lineage_too(tokenizers, tmp_path):
    _, tokenizer = own(tokenizers["plain"], trl_template("qwen2_5"))
    tokenizer = reloaded(tokenizer, tmp_path)
    with pytest.raises(ArgumentError, match="--template_name vicuna: the model was trained with the tokenizer's own"):
        choose_template(tokenizer, ChatArguments(template_name="vicuna"))
    assert choose_template(tokenizer, ChatArguments()).jinja() == trl_template("qwen2_5")


def test_a_hub_models_own_template_may_be_replaced(tokenizers):
    template, tokenizer = own(tokenizers["plain"], trl_template("qwen2_5"), template_name="vicuna")
    assert template.name == "vicuna"
    assert tokenizer.chat_template == template.jinja()


def test_forcing_without_a_conflict_is_refused(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["plain"])
    with pytest.raises(ArgumentError, match="--force_template has no effect without --template_name"):
        choose_template(tokenizer, ChatArguments(force_template=True))
    forced = ChatArguments(template_name="vicuna", force_template=True)
    with pytest.raises(ArgumentError, match="--force_template has no effect: the model was trained with no template"):
        choose_template(tokenizer, forced)
    choose_template(tokenizer, ChatArguments(template_name="vicuna"))
    with pytest.raises(
        ArgumentError, match="--force_template has no effect: the model was trained with vicuna, the same"
    ):
        choose_template(tokenizer, forced)


def test_another_mode_of_thinking_is_not_another_form(tokenizers, tmp_path):
    first = copy.deepcopy(tokenizers["plain"])
    choose_template(first, ChatArguments(template_name="qwen3", enable_thinking=False))
    flags = ChatArguments(template_name="qwen3", enable_thinking=True)
    assert choose_template(reloaded(first, tmp_path), flags).enable_thinking is True


def test_the_form_of_the_adapter_that_a_run_starts_from_counts(tokenizers, tmp_path):
    adapter = copy.deepcopy(tokenizers["plain"])
    choose_template(adapter, ChatArguments(template_name="alpaca"))
    adapter.save_pretrained(tmp_path / "adapter")
    base = copy.deepcopy(tokenizers["plain"])
    assert choose_template(base, ChatArguments(), str(tmp_path / "adapter")).name == "alpaca"
    base = copy.deepcopy(tokenizers["plain"])
    with pytest.raises(ArgumentError, match="the model was trained with alpaca"):
        choose_template(base, ChatArguments(template_name="vicuna"), str(tmp_path / "adapter"))
    (tmp_path / "elsewhere").mkdir()  # an adapter without a tokenizer
    assert choose_template(base, ChatArguments(), str(tmp_path / "elsewhere")).name == "alpaca"


def test_the_form_goes_from_stage_to_stage(stage, tiny_checkpoint, tmp_path, capsys):
    """Training with tool calls, merge, and a next stage, by their command lines."""
    turns = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": CALL},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "It is sunny."},
    ]
    record = json.dumps({"conversations": turns, "tools": TOOL}, ensure_ascii=False)
    (tmp_path / "data.jsonl").write_text(f"{record}\n" * 4, encoding="utf-8")
    base = tiny_checkpoint("llama", max_position_embeddings=2048)

    def words(model, out, **flags):
        flags = {
            "model_name_or_path": model,
            "output_dir": tmp_path / out,
            "train_file_dir": tmp_path / "data.jsonl",
            "model_max_length": 1500,
            "per_device_train_batch_size": 1,
            "max_steps": 1,
            "report_to": "none",
            **flags,
        }
        return [word for name, value in flags.items() for word in (f"--{name}", value)]

    adapter = stage("supervised_finetuning", *words(base, "adapter", template_name="alpaca"))
    merged = stage(
        "merge_peft_adapter", "--base_model", base, "--lora_model", adapter, "--output_dir", tmp_path / "merged"
    )
    with pytest.raises(SystemExit):
        stage("supervised_finetuning", *words(merged, "other", template_name="vicuna"))
    said = capsys.readouterr().err
    assert "--template_name vicuna: the model was trained with alpaca" in said and "--force_template" in said
    again = stage("supervised_finetuning", *words(merged, "again"))
    forced = stage("supervised_finetuning", *words(merged, "forced", template_name="vicuna", force_template="True"))
    for folder, name in ((adapter, "alpaca"), (merged, "alpaca"), (again, "alpaca"), (forced, "vicuna")):
        assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["template"] == name
        assert json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))[TRAINED_IN] == name


# --- the real model --------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_smollm_inserts_its_own_system_prompt(smollm):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    served = tokenizer.chat_template
    template = choose_template(tokenizer, ChatArguments())
    assert tokenizer.chat_template == served
    default = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert pairs(template.segments(talk(" Hi\n", "\n Hello ", "Bye", "Ciao"))) == [
        (default + "<|im_start|>user\n Hi\n<|im_end|>\n<|im_start|>assistant\n", False),
        ("\n Hello <|im_end|>", True),
        ("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", False),
        ("Ciao<|im_end|>", True),
        ("\n", False),
    ]
    own_system = template.segments(talk("Hi", "Hello", system="Be kind."))
    assert own_system[0].text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>")
    assert template.stop == "<|im_end|>"
