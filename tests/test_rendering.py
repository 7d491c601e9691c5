"""Conversation → segments: exactly the assistant's words and the end marker are learned, and Jinja says the same."""

import copy
import json
import pickle

import jinja2
import pytest
from tokenizers import AddedToken

from stagewise.conversation import Conversation, Message, RecordError
from stagewise.rendering import CutError, Segment, Template, TokenizerTemplate, adds_bos, choose_template
from template import TEMPLATES

U, A = "user", "assistant"
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
QWEN_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"

TOOL = '[{"name": "get_weather", "description": "d", "parameters": {"type": "object", "properties": {}}}]'
CALL = '{"name": "get_weather", "arguments": {"city": "北京"}}'

# A template that shows earlier answers without their thoughts, as Qwen3's own does.
STRIPS_THOUGHTS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    '{% if message.role == "assistant" and loop.last %}{{ "<think>\n\n</think>\n\n" + message.content }}'
    '{% else %}{{ message.content.split("</think>")[-1] }}{% endif %}<|im_end|>\n'
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2_FAMILY = (  # the form of Llama-2-chat, as its tokenizer_config.json has it, without the system part
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


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


@pytest.fixture(scope="module")
def tokenizers(tiny_tokenizer):
    """Tokenizers that have the end markers of all families here, by what they do about bos."""

    def make(**options):
        tokenizer = tiny_tokenizer(**options)
        markers = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<start_of_turn>", "<|end|>"]
        tokenizer.add_tokens([AddedToken(marker, special=True) for marker in markers])
        return tokenizer

    return {"plain": make(), "adds bos": make(adds_bos=True), "no bos": make(bos=False)}


# --- the table: expected text written out ----------------------------------------------------------------------------

SEGMENTS = {
    "vicuna": [
        (VICUNA_SYSTEM + "USER: Hi ASSISTANT:", False),
        (" Hello</s>", True),
        ("USER: Bye ASSISTANT:", False),
        (" Ciao</s>", True),
    ],
    "alpaca": [
        (ALPACA_SYSTEM + "### Instruction:\nHi\n\n### Response:\n", False),
        ("Hello</s>", True),
        ("\n\n### Instruction:\nBye\n\n### Response:\n", False),
        ("Ciao</s>", True),
        ("\n\n", False),
    ],
    "llama2": [
        ("<s>[INST] Hi [/INST]", False),
        (" Hello </s>", True),
        ("<s>[INST] Bye [/INST]", False),
        (" Ciao </s>", True),
    ],
    "chatml": [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello<|im_end|>", True),
        ("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", False),
        ("Ciao<|im_end|>", True),
        ("\n", False),
    ],
    "qwen": [
        (QWEN_SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello<|im_end|>", True),
        ("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", False),
        ("Ciao<|im_end|>", True),
        ("\n", False),
    ],
}
OWN_SYSTEM = {
    "vicuna": "Be kind. USER: Hi ASSISTANT:",
    "alpaca": "Be kind.\n\n### Instruction:\nHi\n\n### Response:\n",
    "llama2": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]",
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "qwen": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
}
NAMES = list(TEMPLATES)


def test_every_template_of_the_table_is_tested():
    assert sorted(SEGMENTS) == sorted(OWN_SYSTEM) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_segments_of_two_exchanges(name, tokenizers):
    template = TEMPLATES[name].bind(tokenizers["plain"])
    assert pairs(template.segments(talk("Hi", "Hello", "Bye", "Ciao"))) == SEGMENTS[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_the_beginning_of_the_whole(name, tokenizers):
    template = TEMPLATES[name].bind(tokenizers["plain"])
    assert pairs(template.segments(talk("Hi", "Hello", "Bye"), generation=True)) == SEGMENTS[name][:3]


@pytest.mark.parametrize("name", NAMES)
def test_the_records_own_system_prompt(name, tokenizers):
    template = TEMPLATES[name].bind(tokenizers["plain"])
    segments = template.segments(talk("Hi", "Hello", system="Be kind."))
    assert segments[:2] == [Segment(OWN_SYSTEM[name], False), Segment(SEGMENTS[name][1][0], True)]


@pytest.mark.parametrize("name", NAMES)
def test_the_end_marker(name, tokenizers):
    assert TEMPLATES[name].bind(tokenizers["plain"]).stop == ("<|im_end|>" if name in ("chatml", "qwen") else "</s>")


# --- Jinja equals the segments ---------------------------------------------------------------------------------------

TALKS = {
    "one exchange": talk("Hi", "Hello"),
    "several": talk("Hi", "Hello", "Bye", "Ciao", "Again?", "Yes"),
    "a system prompt": talk("Hi", "Hello", "Bye", "Ciao", system="Be kind."),
    "an empty system prompt": talk("Hi", "Hello", system=""),
    "ends with a question": talk("Hi", "Hello", "Bye"),
    "white space at both ends": talk("\n Hi \t", "  Hello\n\n", " ", "\tx ", system="\n Be kind. "),
    "words that look like the form's": talk(
        "{content} {eos} {{ x }} {% if %}", "{system} \"a\" \\n 'b'", system="{bos}{user}"
    ),
    "Chinese": talk("你好，“医生”", "您好！\n请说。😀"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", TALKS)
@pytest.mark.parametrize("kind", ["plain", "adds bos", "no bos"])
def test_jinja_equals_the_segments(name, what, kind, tokenizers):
    tokenizer, conversation = copy.deepcopy(tokenizers[kind]), TALKS[what]
    template = choose_template(tokenizer, name, TEMPLATES)
    jinja = template.jinja()
    plain = jinja2.Environment().from_string(jinja)
    assert tokenizer.chat_template == jinja
    assert "generation %}" not in jinja
    for generation in (False, True):
        if generation and conversation.messages[-1].role == A:
            continue
        text = joined(template.segments(conversation, generation=generation))
        messages = openai(conversation)
        assert plain.render(messages=messages, add_generation_prompt=generation) == text
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False) == text


@pytest.mark.parametrize("name", NAMES)
def test_the_saved_template_cuts_the_same_way(name, tokenizers):
    """The next stage finds the template in the tokenizer and must learn the same words."""
    tokenizer = copy.deepcopy(tokenizers["adds bos"])
    template = choose_template(tokenizer, name, TEMPLATES)
    again = choose_template(tokenizer, None, TEMPLATES)
    assert isinstance(again, TokenizerTemplate)
    assert again.stop == template.stop
    assert again.jinja() == template.jinja()
    for what in ("several", "a system prompt", "white space at both ends", "Chinese"):
        assert again.segments(TALKS[what]) == template.segments(TALKS[what])
    assert again.segments(talk("Hi"), generation=True) == template.segments(talk("Hi"), generation=True)


# --- bos -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["plain", "adds bos", "no bos"])
def test_bos_once_where_the_tokenizer_or_the_form_has_one(name, kind, tokenizers):
    text = joined(TEMPLATES[name].bind(tokenizers[kind]).segments(talk("Hi", "Hello", "Bye", "Ciao")))
    expected = {"plain": 0, "adds bos": 1, "no bos": 0}
    if name == "llama2":  # every exchange of its form begins with one
        expected = {"plain": 2, "adds bos": 2, "no bos": 0}
    assert text.count("<s>") == expected[kind]
    assert text.startswith("<s>") == (expected[kind] > 0)
    assert "<s><s>" not in text


def test_adds_bos(tokenizers):
    assert {kind: adds_bos(tokenizer) for kind, tokenizer in tokenizers.items()} == {
        "plain": False,
        "adds bos": True,
        "no bos": False,
    }


def test_a_tokenizers_own_template_gets_the_bos_that_its_form_leaves_out(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["adds bos"])
    tokenizer.chat_template = TEMPLATES["chatml"].jinja()
    template = choose_template(tokenizer, None, TEMPLATES)
    expected = "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert joined(template.segments(talk("Hi", "Hello"))) == expected
    assert tokenizer.apply_chat_template(openai(talk("Hi", "Hello")), tokenize=False) == expected
    # once, also when the next stage reads what this one saved
    assert joined(choose_template(tokenizer, None, TEMPLATES).segments(talk("Hi", "Hello"))) == expected


# --- choosing --------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_template_gets_vicuna(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    template = choose_template(tokenizer, None, TEMPLATES)
    assert template.name == "vicuna"
    assert tokenizer.chat_template == template.jinja()


def test_an_unknown_name_is_refused_with_the_known_ones(tiny_tokenizer):
    with pytest.raises(ValueError, match="--template_name: unknown template 'vicunia'; known: vicuna, alpaca, llama2"):
        choose_template(tiny_tokenizer(), "vicunia", TEMPLATES)


def test_a_form_whose_end_marker_is_not_a_token_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"--template_name chatml: answers end with '<\|im_end\|>', which is not one"):
        choose_template(tiny_tokenizer(), "chatml", TEMPLATES)
    with pytest.raises(ValueError, match="--template_name vicuna: the tokenizer has no eos token"):
        choose_template(tiny_tokenizer(eos=False), "vicuna", TEMPLATES)


# --- a tokenizer's own template --------------------------------------------------------------------------------------


def own(tokenizer, chat_template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = chat_template
    return choose_template(tokenizer, None, TEMPLATES), tokenizer


def test_a_family_that_trims_is_cut_as_it_renders(tokenizers):
    template, tokenizer = own(tokenizers["adds bos"], LLAMA2_FAMILY)
    conversation = talk(" Hi ", "\nHello ", "Bye", "Ciao")
    assert pairs(template.segments(conversation)) == SEGMENTS["llama2"]
    assert joined(template.segments(conversation)) == tokenizer.apply_chat_template(
        openai(conversation), tokenize=False
    )
    assert template.stop == "</s>"


def test_what_the_template_refuses_is_a_record_error(tokenizers):
    template, _ = own(tokenizers["plain"], LLAMA2_FAMILY)
    with pytest.raises(
        RecordError, match=r"a\.jsonl:7: .*Only user and assistant roles are supported!.*--template_name"
    ):
        template.segments(talk("Hi", "Hello", system="Be kind."))


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_way_out(tokenizers):
    with pytest.raises(CutError, match="rewrites earlier turns; choose a form of this project with --template_name"):
        own(tokenizers["plain"], STRIPS_THOUGHTS)


def test_a_template_without_an_end_marker_is_refused(tokenizers):
    text = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    with pytest.raises(CutError, match=r"ends an answer with '\\n', where no token of the tokenizer marks the end"):
        own(tokenizers["plain"], text)


def test_a_template_that_changes_the_words_is_refused(tokenizers):
    upper = TEMPLATES["chatml"].jinja().replace('message["content"]', 'message["content"] | replace("a", "4")')
    template, _ = own(tokenizers["plain"], upper)
    assert joined(template.segments(talk("a", "b"))).count("4") == 1  # what the user said may be changed
    with pytest.raises(RecordError, match=r"a\.jsonl:7: .* changes the words of turn 2"):
        template.segments(talk("b", "a"))


def test_a_template_that_changes_turns_by_content_is_caught_at_the_record(tokenizers):
    drops = (
        TEMPLATES["chatml"]
        .jinja()
        .replace(
            'message["content"] + "<|im_end|>\\n"',
            '(message["content"] if loop.last or "secret" not in message["content"] else "-") + "<|im_end|>\\n"',
        )
    )
    template, _ = own(tokenizers["plain"], drops)
    assert len(template.segments(talk("a", "b", "c", "d"))) == 5
    with pytest.raises(RecordError, match="does not keep turn 2 as it was said"):
        template.segments(talk("a", "secret", "c", "d"))


def test_named_templates_need_a_default(tokenizers):
    template, _ = own(tokenizers["plain"], {"default": TEMPLATES["chatml"].jinja(), "other": "x"})
    assert pairs(template.segments(talk("Hi", "Hello", "Bye", "Ciao"))) == SEGMENTS["chatml"]
    with pytest.raises(ValueError, match=r"\['other'\] have no default"):
        own(tokenizers["plain"], {"other": "x"})


def test_generation_marks_are_not_saved(tokenizers):
    """Plain Jinja and most servers fail on them."""
    answer = 'message["content"] + "<|im_end|>\\n"'
    marked = TEMPLATES["chatml"].jinja()
    assert marked.count("{{ " + '"<|im_start|>assistant\\n" + ' + answer + " }}") == 1
    marked = marked.replace(f" + {answer} }}}}", " }}{%- generation -%} {{ " + answer + " }}{% endgeneration %}")
    template, tokenizer = own(tokenizers["plain"], marked)
    assert "generation %}" not in tokenizer.chat_template and "generation -%}" not in tokenizer.chat_template
    assert pairs(template.segments(talk("Hi", "Hello", "Bye", "Ciao"))) == SEGMENTS["chatml"]
    plain = jinja2.Environment().from_string(tokenizer.chat_template)
    assert plain.render(messages=openai(talk("Hi", "Hello", "Bye", "Ciao"))) == "".join(
        t for t, _ in SEGMENTS["chatml"]
    )


def test_a_template_goes_to_worker_processes(tokenizers):
    template, _ = own(tokenizers["plain"], TEMPLATES["chatml"].jinja())
    assert pickle.loads(pickle.dumps(template)).segments(talk("a", "b")) == template.segments(talk("a", "b"))


# --- families whose template TRL knows -------------------------------------------------------------------------------


def trl_template(name):
    import trl.chat_template_utils as known

    return getattr(known, f"{name}_chat_template")


QWEN3 = [
    ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
    ("<think>\n\n</think>\n\nHello<|im_end|>", True),
    ("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", False),
    ("<think>\n\n</think>\n\nCiao<|im_end|>", True),
    ("\n", False),
]


def test_qwen3_is_cut_by_the_training_template(tokenizers):
    """Nothing but the end of the prompt is given at generation: the empty thought is said by the model, so learned."""
    template, tokenizer = own(tokenizers["plain"], trl_template("qwen3"))
    assert template.name.startswith("TRL's training form")
    assert pairs(template.segments(talk("Hi", "Hello", "Bye", "Ciao"))) == QWEN3
    assert pairs(template.segments(talk("Hi", "Hello", "Bye"), generation=True)) == QWEN3[:3]
    assert template.stop == "<|im_end|>"
    messages = openai(talk("Hi", "Hello", "Bye", "Ciao"))
    served = tokenizer.apply_chat_template(messages, tokenize=False)
    assert served == "".join(text for text, _ in QWEN3)
    assert jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template.jinja()).render(
        messages=messages
    ) == served  # fmt: skip
    # the next stage finds a template that needs no replacement
    again = choose_template(tokenizer, None, TEMPLATES)
    assert pairs(again.segments(talk("Hi", "Hello", "Bye", "Ciao"))) == QWEN3


def test_qwen3_learns_written_thoughts(tokenizers):
    template, _ = own(tokenizers["plain"], trl_template("qwen3"))
    segments = template.segments(talk("1+1?", "<think>\nOne and one.\n</think>\n\n2"))
    assert [segment.text for segment in segments if segment.learn] == [
        "<think>\nOne and one.\n</think>\n\n2<|im_end|>"
    ]


@pytest.mark.parametrize(
    ("name", "learned", "stop"),
    [
        ("qwen2_5", ["Hello<|im_end|>", "Ciao<|im_end|>"], "<|im_end|>"),
        ("llama3", ["Hello<|eot_id|>", "Ciao<|eot_id|>"], "<|eot_id|>"),
        ("gemma", ["Hello<end_of_turn>", "Ciao<end_of_turn>"], "<end_of_turn>"),
        ("phi3", ["Hello<|end|>", "Ciao<|end|>"], "<|end|>"),
        ("qwen3_instruct_2507", ["Hello<|im_end|>", "Ciao<|im_end|>"], "<|im_end|>"),
    ],
)
def test_public_families(name, learned, stop, tokenizers):
    template, tokenizer = own(tokenizers["plain"], trl_template(name))
    conversation = talk("Hi", "Hello", "Bye", "Ciao")
    segments = template.segments(conversation)
    assert [segment.text for segment in segments if segment.learn] == learned
    assert template.stop == stop
    assert joined(segments) == tokenizer.apply_chat_template(openai(conversation), tokenize=False)
    prompt = joined(template.segments(talk("Hi", "Hello", "Bye"), generation=True))
    assert prompt == tokenizer.apply_chat_template(
        openai(talk("Hi", "Hello", "Bye")), add_generation_prompt=True, tokenize=False
    )
    assert joined(segments).startswith(prompt)


# --- tools -----------------------------------------------------------------------------------------------------------

WITH_TOOLS = Conversation(
    (Message(U, "Weather?"), Message("tool_call", CALL), Message("observation", "sunny"), Message(A, "It is sunny.")),
    tools=TOOL,
    where="a.jsonl:7",
)


@pytest.mark.parametrize("name", NAMES)
def test_our_forms_refuse_tools(name, tokenizers):
    template = TEMPLATES[name].bind(tokenizers["plain"])
    for conversation in (WITH_TOOLS, talk("Hi", "Hello", tools=TOOL)):
        with pytest.raises(RecordError, match=r"a\.jsonl:7: .*has no form for tools") as caught:
            template.segments(conversation)
        assert caught.value.reason == "tools not shown"


def test_a_template_that_does_not_show_the_tools_is_refused(tokenizers):
    text = TEMPLATES["chatml"].jinja().replace('message["role"] == "user"', 'message["role"] in ("user", "tool")')
    template, _ = own(tokenizers["plain"], text)
    with pytest.raises(RecordError, match="leaves out the tool text 'get_weather'"):
        template.segments(WITH_TOOLS)
    with pytest.raises(RecordError, match="leaves out the tool text 'get_weather'"):
        template.segments(talk("Hi", "Hello", tools=TOOL))


def test_a_family_that_shows_tools(tokenizers):
    template, tokenizer = own(tokenizers["plain"], trl_template("qwen2_5"))
    segments = template.segments(WITH_TOOLS)
    assert [segment.text for segment in segments if segment.learn] == [
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


def test_words_and_calls_of_one_turn_are_one_answer(tokenizers):
    template, _ = own(tokenizers["plain"], trl_template("qwen2_5"))
    turns = (
        Message(U, "Weather?"),
        Message(A, "Let me look."),
        Message("tool_call", CALL),
        Message("tool_call", CALL),
    )
    segments = template.segments(Conversation(turns, tools=TOOL))
    call = '\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>'
    assert [segment.text for segment in segments if segment.learn] == ["Let me look." + call * 2 + "<|im_end|>"]


def test_a_prompt_must_end_with_what_the_model_is_told(tokenizers):
    for template in (TEMPLATES["vicuna"].bind(tokenizers["plain"]), own(tokenizers["plain"], LLAMA2_FAMILY)[0]):
        with pytest.raises(RecordError, match="a prompt must end with a user turn"):
            template.segments(talk("Hi", "Hello"), generation=True)


# --- the real model --------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_smollm_inserts_its_own_system_prompt(smollm):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    served = tokenizer.chat_template
    template = choose_template(tokenizer, None, TEMPLATES)
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
    assert own_system[0].text == OWN_SYSTEM["chatml"]
    assert template.stop == "<|im_end|>"


def test_a_new_form_is_a_few_pieces(tokenizers):
    """What the docstring of Template promises to who extends the table."""
    template = Template("mine", user="Q: {content}\n", lead="A:", answer=" {content}", end="{eos}", after="\n")
    template = template.bind(tokenizers["plain"])
    assert pairs(template.segments(talk("Hi", "Hello", "Bye", "Ciao", system="S|"))) == [
        ("S|Q: Hi\nA:", False),
        (" Hello</s>", True),
        ("\nQ: Bye\nA:", False),
        (" Ciao</s>", True),
        ("\n", False),
    ]
