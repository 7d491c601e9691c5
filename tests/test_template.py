"""Every chat template of the table: its whole text written out by hand, and what the families and FastChat publish.

In the written texts ⟦…⟧ stands around what is learned.
"""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from string import ascii_letters

import jinja2
import pytest
from fastchat.conversation import get_conv_template
from tokenizers import AddedToken, Tokenizer, models, normalizers, processors

from stagewise.chat.encoding import encode_segments
from stagewise.chat.select import TokenizerTemplate, choose_template
from stagewise.chat.template import Segment
from stagewise.config.arguments import ChatArguments
from stagewise.formats.parsers import Conversation, Message
from template import TEMPLATES

ROOT = Path(__file__).resolve().parent.parent
U, A = "user", "assistant"
FOR_USERS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
FOR_HUMANS = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
LINKSOUL = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n            If a question "
    "does not make any sense, or is not factually coherent, explain why instead of answering something not correct. "
    "If you don't know the answer to a question, please don't share false information."
)
CODER = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer"
)
CHATML = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦Ciao<|im_end|>⟧\n"
)
QWEN3 = CHATML.replace("⟦Ciao", "⟦<think>\n\n</think>\n\nCiao")  # its last answer begins with its thoughts
CHATML_SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n"
LLAMA3 = (
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello<|eot_id|>⟧"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Ciao<|eot_id|>⟧"
)
COHERE = (
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦Hello<|END_OF_TURN_TOKEN|>⟧"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Bye<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦Ciao<|END_OF_TURN_TOKEN|>⟧"
)

# name → (text of two exchanges with the system message "Be kind.", the same without one, end marker)
FORMS = {
    "vicuna": (
        "Be kind. USER: Hi ASSISTANT:⟦ Hello</s>⟧USER: Bye ASSISTANT:⟦ Ciao</s>⟧",
        f"{FOR_USERS} USER: Hi ASSISTANT:⟦ Hello</s>⟧USER: Bye ASSISTANT:⟦ Ciao</s>⟧",
        "</s>",
    ),
    "alpaca": (
        "Be kind.\n\n### Instruction:\nHi\n\n### Response:\n⟦Hello</s>⟧\n\n"
        "### Instruction:\nBye\n\n### Response:\n⟦Ciao</s>⟧\n\n",
        f"{ALPACA}\n\n### Instruction:\nHi\n\n### Response:\n⟦Hello</s>⟧\n\n"
        "### Instruction:\nBye\n\n### Response:\n⟦Ciao</s>⟧\n\n",
        "</s>",
    ),
    "llama2": (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]⟦ Hello </s>⟧<s>[INST] Bye [/INST]⟦ Ciao </s>⟧",
        "<s>[INST] Hi [/INST]⟦ Hello </s>⟧<s>[INST] Bye [/INST]⟦ Ciao </s>⟧",
        "</s>",
    ),
    "llama2-zh": (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]⟦ Hello</s>⟧<s>[INST] Bye [/INST]⟦ Ciao</s>⟧",
        "<s>[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\nHi [/INST]⟦ Hello</s>⟧"
        "<s>[INST] Bye [/INST]⟦ Ciao</s>⟧",
        "</s>",
    ),
    "linksoul": (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]⟦ Hello </s>⟧<s>[INST] Bye [/INST]⟦ Ciao </s>⟧",
        f"<s>[INST] <<SYS>>\n{LINKSOUL}\n<</SYS>>\n\nHi [/INST]⟦ Hello </s>⟧<s>[INST] Bye [/INST]⟦ Ciao </s>⟧",
        "</s>",
    ),
    "mistral": (
        "<s>[INST] Be kind.\n\nHi[/INST]⟦ Hello</s>⟧[INST] Bye[/INST]⟦ Ciao</s>⟧",
        "<s>[INST] Hi[/INST]⟦ Hello</s>⟧[INST] Bye[/INST]⟦ Ciao</s>⟧",
        "</s>",
    ),
    "zephyr": (
        "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\n⟦Hello</s>⟧\n"
        "<|user|>\nBye</s>\n<|assistant|>\n⟦Ciao</s>⟧\n",
        "<|user|>\nHi</s>\n<|assistant|>\n⟦Hello</s>⟧\n<|user|>\nBye</s>\n<|assistant|>\n⟦Ciao</s>⟧\n",
        "</s>",
    ),
    "deepseek": (
        "<s>Be kind.\n\nUser: Hi\n\nAssistant:⟦ Hello</s>⟧User: Bye\n\nAssistant:⟦ Ciao</s>⟧",
        "<s>User: Hi\n\nAssistant:⟦ Hello</s>⟧User: Bye\n\nAssistant:⟦ Ciao</s>⟧",
        "</s>",
    ),
    "orion": (
        "<s>Be kind.\n\nHuman: Hi\n\nAssistant: </s>⟦Hello</s>⟧Human: Bye\n\nAssistant: </s>⟦Ciao</s>⟧",
        "<s>Human: Hi\n\nAssistant: </s>⟦Hello</s>⟧Human: Bye\n\nAssistant: </s>⟦Ciao</s>⟧",
        "</s>",
    ),
    "xverse": (
        "Be kind.\n\nHuman: Hi\n\nAssistant: ⟦Hello</s>⟧Human: Bye\n\nAssistant: ⟦Ciao</s>⟧",
        "Human: Hi\n\nAssistant: ⟦Hello</s>⟧Human: Bye\n\nAssistant: ⟦Ciao</s>⟧",
        "</s>",
    ),
    "ziya": (
        "Be kind.\n<human>:Hi\n<bot>:⟦Hello</s>⟧\n<human>:Bye\n<bot>:⟦Ciao</s>⟧\n",
        "<human>:Hi\n<bot>:⟦Hello</s>⟧\n<human>:Bye\n<bot>:⟦Ciao</s>⟧\n",
        "</s>",
    ),
    "linly": (
        "Be kind.\nUser: Hi\nBot: ⟦Hello</s>⟧\nUser: Bye\nBot: ⟦Ciao</s>⟧\n",
        "User: Hi\nBot: ⟦Hello</s>⟧\nUser: Bye\nBot: ⟦Ciao</s>⟧\n",
        "</s>",
    ),
    "belle": (
        "Be kind.\n\nHuman: \nHi\n\nAssistant: \n⟦Hello</s>⟧Human: \nBye\n\nAssistant: \n⟦Ciao</s>⟧",
        "Human: \nHi\n\nAssistant: \n⟦Hello</s>⟧Human: \nBye\n\nAssistant: \n⟦Ciao</s>⟧",
        "</s>",
    ),
    "phoenix": (
        "Be kind.\n\nHuman: <s>Hi</s>Assistant: <s>⟦Hello</s>⟧Human: <s>Bye</s>Assistant: <s>⟦Ciao</s>⟧",
        f"{FOR_HUMANS}\n\nHuman: <s>Hi</s>Assistant: <s>⟦Hello</s>⟧Human: <s>Bye</s>Assistant: <s>⟦Ciao</s>⟧",
        "</s>",
    ),
    "firefly": (
        "<s>Be kind.\nHi</s>⟦Hello</s>⟧Bye</s>⟦Ciao</s>⟧",
        "<s>Hi</s>⟦Hello</s>⟧Bye</s>⟦Ciao</s>⟧",
        "</s>",
    ),
    "openbuddy": (
        "Be kind.\n\nUser: Hi\nAssistant:⟦ Hello</s>⟧\nUser: Bye\nAssistant:⟦ Ciao</s>⟧\n",
        "User: Hi\nAssistant:⟦ Hello</s>⟧\nUser: Bye\nAssistant:⟦ Ciao</s>⟧\n",
        "</s>",
    ),
    "tigerbot": (
        "Be kind.\n\n### Instruction:\nHi\n\n### Response:\n⟦Hello</s>⟧"
        "\n\n### Instruction:\nBye\n\n### Response:\n⟦Ciao</s>⟧",
        "\n\n### Instruction:\nHi\n\n### Response:\n⟦Hello</s>⟧\n\n### Instruction:\nBye\n\n### Response:\n⟦Ciao</s>⟧",
        "</s>",
    ),
    "aquila": (
        "Be kind.###Human: Hi###Assistant:⟦ Hello</s>⟧Human: Bye###Assistant:⟦ Ciao</s>⟧",
        f"{FOR_HUMANS}###Human: Hi###Assistant:⟦ Hello</s>⟧Human: Bye###Assistant:⟦ Ciao</s>⟧",
        "</s>",
    ),
    "rwkv": (
        "<s>System: Be kind.\n\nUser: Hi\n\nAssistant:⟦ Hello\n\n</s>⟧User: Bye\n\nAssistant:⟦ Ciao\n\n</s>⟧",
        "<s>User: Hi\n\nAssistant:⟦ Hello\n\n</s>⟧User: Bye\n\nAssistant:⟦ Ciao\n\n</s>⟧",
        "</s>",
    ),
    "base": ("Be kind.Hi⟦Hello</s>⟧Bye⟦Ciao</s>⟧", "Hi⟦Hello</s>⟧Bye⟦Ciao</s>⟧", "</s>"),
    "chatml": (CHATML_SYSTEM + CHATML, CHATML, "<|im_end|>"),
    "qwen": (
        CHATML_SYSTEM + CHATML,
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + CHATML,
        "<|im_end|>",
    ),
    "qwen3": (CHATML_SYSTEM + QWEN3, QWEN3, "<|im_end|>"),
    "yi": (CHATML_SYSTEM + CHATML, CHATML, "<|im_end|>"),
    "internlm2": ("<s>" + CHATML_SYSTEM + CHATML, "<s>" + CHATML, "<|im_end|>"),
    "orca": (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant⟦\nHello<|im_end|>⟧\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant⟦\nCiao<|im_end|>⟧\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant⟦\nHello<|im_end|>⟧\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant⟦\nCiao<|im_end|>⟧\n",
        "<|im_end|>",
    ),
    "starchat": (
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>⟦\nHello<|end|>⟧\n"
        "<|user|>\nBye<|end|>\n<|assistant|>⟦\nCiao<|end|>⟧\n",
        "<|system|>\n<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>⟦\nHello<|end|>⟧\n"
        "<|user|>\nBye<|end|>\n<|assistant|>⟦\nCiao<|end|>⟧\n",
        "<|end|>",
    ),
    "phi3": (
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello<|end|>⟧\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\n⟦Ciao<|end|>⟧\n",
        "<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello<|end|>⟧\n<|user|>\nBye<|end|>\n<|assistant|>\n⟦Ciao<|end|>⟧\n",
        "<|end|>",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>" + LLAMA3,
        "<s>" + LLAMA3,
        "<|eot_id|>",
    ),
    "gemma": (
        "<s><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello<end_of_turn>⟧\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟦Ciao<end_of_turn>⟧\n",
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello<end_of_turn>⟧\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟦Ciao<end_of_turn>⟧\n",
        "<end_of_turn>",
    ),
    "cohere": (
        "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be kind.<|END_OF_TURN_TOKEN|>" + COHERE,
        "<s>" + COHERE,
        "<|END_OF_TURN_TOKEN|>",
    ),
    "deepseek3": (
        "<s>Be kind.<｜User｜>Hi<｜Assistant｜>⟦Hello</s>⟧<｜User｜>Bye<｜Assistant｜>⟦Ciao</s>⟧",
        "<s><｜User｜>Hi<｜Assistant｜>⟦Hello</s>⟧<｜User｜>Bye<｜Assistant｜>⟦Ciao</s>⟧",
        "</s>",
    ),
    "deepseekcoder": (
        "<s>Be kind.\n### Instruction:\nHi\n### Response:⟦\nHello\n<|EOT|>⟧\n"
        "### Instruction:\nBye\n### Response:⟦\nCiao\n<|EOT|>⟧\n",
        f"<s>{CODER}\n### Instruction:\nHi\n### Response:⟦\nHello\n<|EOT|>⟧\n"
        "### Instruction:\nBye\n### Response:⟦\nCiao\n<|EOT|>⟧\n",
        "<|EOT|>",
    ),
    "chatglm": (
        "Be kind.\n[Round 0]\n问：Hi\n答：[gMASK]<sop>⟦Hello</s>⟧\n[Round 1]\n问：Bye\n答：[gMASK]<sop>⟦Ciao</s>⟧\n",
        "[Round 0]\n问：Hi\n答：[gMASK]<sop>⟦Hello</s>⟧\n[Round 1]\n问：Bye\n答：[gMASK]<sop>⟦Ciao</s>⟧\n",
        "</s>",
    ),
    "chatglm2": (
        "[gMASK]sopBe kind.\n\n[Round 1]\n\n问：Hi\n\n答：⟦Hello</s>⟧\n\n[Round 2]\n\n问：Bye\n\n答：⟦Ciao</s>⟧\n\n",
        "[gMASK]sop[Round 1]\n\n问：Hi\n\n答：⟦Hello</s>⟧\n\n[Round 2]\n\n问：Bye\n\n答：⟦Ciao</s>⟧\n\n",
        "</s>",
    ),
    "chatglm3": (
        "[gMASK]sop<|system|>\n Be kind.<|user|>\n Hi<|assistant|>⟦\n Hello<|user|>⟧"
        "\n Bye<|assistant|>⟦\n Ciao<|user|>⟧",
        "[gMASK]sop<|user|>\n Hi<|assistant|>⟦\n Hello<|user|>⟧\n Bye<|assistant|>⟦\n Ciao<|user|>⟧",
        "<|user|>",
    ),
    "glm4": (
        "[gMASK]<sop><|system|>\nBe kind.<|user|>\nHi<|assistant|>⟦\nHello<|user|>⟧\nBye<|assistant|>⟦\nCiao<|user|>⟧",
        "[gMASK]<sop><|user|>\nHi<|assistant|>⟦\nHello<|user|>⟧\nBye<|assistant|>⟦\nCiao<|user|>⟧",
        "<|user|>",
    ),
    "baichuan": (
        "Be kind.<reserved_102>Hi<reserved_103>⟦Hello</s>⟧<reserved_102>Bye<reserved_103>⟦Ciao</s>⟧",
        "<reserved_102>Hi<reserved_103>⟦Hello</s>⟧<reserved_102>Bye<reserved_103>⟦Ciao</s>⟧",
        "</s>",
    ),
    "baichuan2": (
        "Be kind.<reserved_106>Hi<reserved_107>⟦Hello</s>⟧<reserved_106>Bye<reserved_107>⟦Ciao</s>⟧",
        "<reserved_106>Hi<reserved_107>⟦Hello</s>⟧<reserved_106>Bye<reserved_107>⟦Ciao</s>⟧",
        "</s>",
    ),
    "internlm": (
        "<s><|System|>:Be kind.\n<|User|>:Hi\n<|Bot|>:⟦Hello<eoa>⟧\n<|User|>:Bye\n<|Bot|>:⟦Ciao<eoa>⟧\n",
        "<s><|User|>:Hi\n<|Bot|>:⟦Hello<eoa>⟧\n<|User|>:Bye\n<|Bot|>:⟦Ciao<eoa>⟧\n",
        "<eoa>",
    ),
    "moss": (
        "Be kind.\n<|Human|>: Hi<eoh>\n<|MOSS|>:⟦ Hello<eom>⟧\n<|Human|>: Bye<eoh>\n<|MOSS|>:⟦ Ciao<eom>⟧\n",
        "<|Human|>: Hi<eoh>\n<|MOSS|>:⟦ Hello<eom>⟧\n<|Human|>: Bye<eoh>\n<|MOSS|>:⟦ Ciao<eom>⟧\n",
        "<eom>",
    ),
}
NAMES = list(TEMPLATES)
MARKERS = [
    *("<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "[gMASK]", "<sop>", "sop"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|EOT|>"),
    *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    *("<｜User｜>", "<｜Assistant｜>", "<reserved_102>", "<reserved_103>", "<reserved_106>", "<reserved_107>"),
    *("<eoh>", "<eoa>", "<eom>"),
]


def talk(*texts, system=None):
    return Conversation(tuple(Message((U, A)[n % 2], text) for n, text in enumerate(texts)), system, where="a.jsonl:7")


def openai(conversation):
    system = [] if conversation.system is None else [{"role": "system", "content": conversation.system}]
    return system + [{"role": message.role, "content": message.content} for message in conversation.messages]


def joined(segments):
    return "".join(segment.text for segment in segments)


def segments_of(written):
    """The segments that a text with ⟦…⟧ in it stands for."""
    parts = re.split(r"⟦(.*?)⟧", written, flags=re.DOTALL)
    return [Segment(text, number % 2 == 1) for number, text in enumerate(parts) if text]


def llama_tokenizer():
    """Llama 2's kind: a space before a text and behind every special token, what is unknown as bytes."""
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁"]
    tokens += [f"{space}{letter}" for letter in ascii_letters for space in ("", "▁")]
    merges = [("▁", token) for token in ("▁", *ascii_letters)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers(tiny_tokenizer):
    """Tokenizers that have the special tokens of all families, by what they do about bos."""
    found = {
        "plain": tiny_tokenizer(),
        "adds bos": tiny_tokenizer(adds_bos=True),
        "no bos": tiny_tokenizer(bos=False),
        "llama": llama_tokenizer(),
    }
    for tokenizer in found.values():
        tokenizer.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in MARKERS])
    return found


# --- the texts written out -------------------------------------------------------------------------------------------

EXCHANGES = talk("Hi", "Hello", "Bye", "Ciao")


def test_every_template_is_written_out():
    assert sorted(FORMS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_two_exchanges_with_and_without_a_system_message(name, tokenizers):
    template = TEMPLATES[name].bind(tokenizers["plain"])
    with_system, without, stop = FORMS[name]
    assert template.segments(replace(EXCHANGES, system="Be kind.")) == segments_of(with_system)
    assert template.segments(EXCHANGES) == segments_of(without)
    assert template.stop == stop


@pytest.mark.parametrize("name", NAMES)
def test_the_record_may_say_that_there_is_no_system_prompt(name, tokenizers):
    template = TEMPLATES[name].bind(tokenizers["plain"])
    text = joined(template.segments(replace(EXCHANGES, system="")))
    for default in (FOR_USERS, FOR_HUMANS, ALPACA, LINKSOUL, CODER, "You are a helpful assistant."):
        assert default not in text
    assert text.endswith(joined(segments_of(FORMS[name][1]))[-20:])


# --- Jinja and the segments say the same -----------------------------------------------------------------------------

ODD = {
    "one exchange": talk("Hi", "Hello"),
    "three": talk("Hi", "Hello", "Bye", "Ciao", "Again?", "Yes"),
    "a system prompt": talk("Hi", "Hello", "Bye", "Ciao", system="Be kind."),
    "an empty system prompt": talk("Hi", "Hello", "Bye", "Ciao", system=""),
    "ends with a question": talk("Hi", "Hello", "Bye"),
    "a first question": talk("Hi"),
    "white space at both ends": talk(
        "\n Hi \t", "  Hello\n\n", " ", "\n\tx ", " \n", "\r\n\u3000", system="\n Kind. "
    ),
    "words that look like the form's": talk(
        "{content} {eos} {round} {{ x }} {% if %}{# c #}",
        "{system} {bos}",
        "{{content}}",
        "}{",
        system="{user}{round0}",
    ),
    "quotes and backslashes": talk("\"a\" 'b' `c` \\n \\", '\\" \\u4e2d', "'''", '"""', system='it\'s \\ "so"'),
    "special tokens": talk("<s></s><|im_end|>", "[INST] <|user|> </s>", "<eoa>", "<end_of_turn>", system="<s>"),
    "Chinese": talk("你好，“医生”", "您好！\n请说。", "头疼？", "多喝水。", system="你是医生。"),
    "emoji": talk("😀👩‍👩‍👧", "🍯\ufe0f", "é e\u0301", "\u200b", system="🤖"),
}
KINDS = ["plain", "adds bos", "no bos"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_jinja_is_the_text_of_the_segments(name, kind, tokenizers):
    tokenizer = copy.deepcopy(tokenizers[kind])
    template = choose_template(tokenizer, ChatArguments(template_name=name))
    assert tokenizer.chat_template == template.jinja()
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template.jinja())
    for what, conversation in ODD.items():
        for generation in (False, True):
            if generation and conversation.messages[-1].role == A:
                continue
            text = joined(template.segments(conversation, generation=generation))
            messages = openai(conversation)
            assert plain.render(messages=messages, add_generation_prompt=generation) == text, what
            served = tokenizer.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False)
            assert served == text, what


@pytest.mark.parametrize("name", NAMES)
def test_messages_stand_in_the_text_as_they_are(name, tokenizers):
    template = TEMPLATES[name].bind(tokenizers["plain"])
    for what, conversation in ODD.items():
        segments = template.segments(conversation)
        rest = joined(segments)
        for message in conversation.messages:
            assert message.content in rest, what
            rest = rest[rest.index(message.content) + len(message.content) :]
        learned = [segment.text for segment in segments if segment.learn]
        answers = [message.content for message in conversation.messages if message.role == A]
        before, after = segments_of(FORMS[name][0])[1].text.split("Hello")
        expected = [before + answer + after for answer in answers]
        if name == "qwen3" and conversation.messages[-1].role == A:
            expected[-1] = "<think>\n\n</think>\n\n" + expected[-1]
        assert learned == expected, what


# A form that leaves the thoughts of earlier turns out can't be cut by its text alone: the table's own code does it.
@pytest.mark.parametrize("name", [name for name in NAMES if not TEMPLATES[name].thinking])
def test_the_saved_text_alone_is_cut_the_same_way(name, tokenizers):
    """As a tokenizer's own template, found by somebody who doesn't have this table."""
    tokenizer = tokenizers["adds bos"]
    template = TEMPLATES[name].bind(tokenizer)
    again = TokenizerTemplate(tokenizer, template.jinja())
    assert (again.stop, again.jinja()) == (template.stop, template.jinja())
    for what in ("three", "a system prompt", "white space at both ends", "Chinese"):
        assert again.segments(ODD[what]) == template.segments(ODD[what]), what
    assert again.segments(talk("Hi"), generation=True) == template.segments(talk("Hi"), generation=True)


# --- prefixes, bos, ids ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [*KINDS, "llama"])
def test_the_prompt_of_every_turn_begins_the_whole(name, kind, tokenizers):
    tokenizer = tokenizers[kind]
    template = TEMPLATES[name].bind(tokenizer)
    for what, conversation in ODD.items():
        segments = template.segments(conversation)
        ids, labels = encode_segments(tokenizer, segments)
        for turns in range(1, len(conversation.messages), 2):
            part = replace(conversation, messages=conversation.messages[:turns])
            prompt = template.segments(part, generation=True)
            assert joined(segments).startswith(joined(prompt)), what
            prompt_ids, _ = encode_segments(tokenizer, prompt)
            assert ids[: len(prompt_ids)] == prompt_ids, what
            assert labels[len(prompt_ids) - 1] == -100 != labels[len(prompt_ids)], what


@pytest.mark.parametrize("name", NAMES)
def test_what_is_learned_decodes_to_the_answers(name, tokenizers):
    tokenizer = tokenizers["adds bos"]
    template = TEMPLATES[name].bind(tokenizer)
    ids, labels = encode_segments(tokenizer, template.segments(talk("Hi", "  Hello\n", "Bye", "再见")))
    learned = tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if label != -100])
    written = "".join(segment.text for segment in segments_of(FORMS[name][0]) if segment.learn)
    assert learned == written.replace("Hello", "  Hello\n").replace("Ciao", "再见")


# forms that begin with a bos by themselves, and those that repeat it
BEGIN = ("mistral", "deepseek", "orion", "firefly", "rwkv", "internlm2", "llama3", "gemma", "cohere", "deepseek3",
         "deepseekcoder", "internlm")  # fmt: skip
REPEAT = {"llama2": 2, "llama2-zh": 2, "linksoul": 2, "phoenix": 4}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", [None, "", "Be kind."])
def test_bos_is_never_doubled_and_never_missing(name, kind, system, tokenizers):
    template = TEMPLATES[name].bind(tokenizers[kind])
    text = joined(template.segments(replace(EXCHANGES, system=system)))
    own = REPEAT.get(name, int(name in BEGIN))
    extra = int(name not in BEGIN and (name == "phoenix" or name not in REPEAT))
    assert text.count("<s>") == {"plain": own, "adds bos": own + extra, "no bos": 0}[kind]
    assert "<s><s>" not in text
    if kind == "adds bos":
        assert text.startswith("<s>")


# --- an answer that isn't learned ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_of_weight_0_keeps_its_segment_and_ids(name, tokenizers):
    tokenizer = tokenizers["plain"]
    template = TEMPLATES[name].bind(tokenizer)
    messages = list(EXCHANGES.messages)
    messages[1] = replace(messages[1], learn=False)
    learned, half = template.segments(EXCHANGES), template.segments(replace(EXCHANGES, messages=tuple(messages)))
    assert [segment.text for segment in half] == [segment.text for segment in learned]
    answers = [number for number, segment in enumerate(learned) if segment.learn]
    assert [number for number, segment in enumerate(half) if segment.learn] == answers[1:]
    assert encode_segments(tokenizer, half)[0] == encode_segments(tokenizer, learned)[0]


# --- binding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_without_the_familys_tokens_is_refused_with_the_way_out(name, tiny_tokenizer):
    template = TEMPLATES[name]
    needed = [*template.tokens, *([] if "{eos}" in template.end else [template.end.strip()])]
    for missing in needed:
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens([AddedToken(token, special=True) for token in needed if token != missing])
        with pytest.raises(ValueError, match=rf"--template_name {name}: .*{re.escape(repr(missing))}.*vicuna, llama2"):
            template.bind(tokenizer)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in needed])
    assert template.bind(tokenizer).stop == FORMS[name][2]
    if "{eos}" in template.end:
        with pytest.raises(ValueError, match=f"--template_name {name}: the tokenizer has no eos token"):
            template.bind(tiny_tokenizer(eos=False))


def test_the_special_tokens_of_a_form_are_named_in_its_entry():
    """What of a form's text is a token of the fixture, or was written in token brackets, is checked when binding."""
    plain = {  # words in brackets that the families' tokenizers spell in several tokens
        "zephyr": {"<|system|>", "<|user|>", "<|assistant|>"},
        "internlm": {"<|System|>", "<|User|>", "<|Bot|>"},
        "moss": {"<|Human|>", "<|MOSS|>"},
    }
    for name, template in TEMPLATES.items():
        text = template.start + template.system + template.user + template.lead + template.answer + template.end
        found = set(re.findall(r"<[|｜][^<>]+[|｜]>|<reserved_\d+>|\[gMASK\]|<e[oa-z]{2}>|<[a-z]+_of_turn>", text))
        assert found - plain.get(name, set()) <= {*template.tokens, template.end.strip()}, name


# --- what the families publish ---------------------------------------------------------------------------------------


def published(name):
    """A family's own chat template, as TRL ships it to recognize the family's tokenizers."""
    import trl.chat_template_utils as known

    return getattr(known, f"{name}_chat_template")


@pytest.mark.parametrize(
    ("name", "file", "systems"),
    [
        ("llama3", "llama3", (None, "Be kind.")),
        ("gemma", "gemma", (None,)),  # refuses a system prompt
        ("gemma", "gemma3", (None, "Be kind.")),
        ("cohere", "cohere", (None, "Be kind.")),
        ("deepseek3", "deepseekv3", (None, "Be kind.")),
        ("phi3", "phi3", (None, "Be kind.")),
        ("qwen", "qwen2_5", ("Be kind.",)),  # by default it names its maker
        ("qwen3", "qwen3", (None, "Be kind.")),
    ],
)
def test_the_familys_own_template_gives_the_same_text(name, file, systems, tokenizers):
    tokenizer = tokenizers["plain"]
    template = TEMPLATES[name].bind(tokenizer)
    for system in systems:
        for conversation in (talk("Hi", "Hello", "Bye", system=system), replace(EXCHANGES, system=system)):
            generation = conversation.messages[-1].role == U
            text = tokenizer.apply_chat_template(
                openai(conversation), chat_template=published(file), add_generation_prompt=generation, tokenize=False
            )
            if name == "deepseek3":  # the file is the reasoning model's: its prompt begins the thoughts, V3's doesn't
                text = text.replace("<｜end▁of▁sentence｜>", "</s>").removesuffix("<think>\n")
            if name == "phi3" and not generation:
                text = text.removesuffix("</s>")  # only behind the last answer: no turn before could be learned so
            assert joined(template.segments(conversation, generation=generation)) == text


# --- what FastChat publishes -----------------------------------------------------------------------------------------
# Not compared, since the family's own form is another: alpaca (FastChat: "### Instruction: Hi" in one line), mistral
# (the first version's spaces), llama2-zh (a space before the end, a longer system prompt), chatglm3 (no space behind
# the newline), internlm (the first release), rwkv (Bob and Alice), openbuddy (one newline behind the system prompt),
# deepseekcoder (no <|EOT|>). FastChat doesn't have the others.
FASTCHAT = {  # name → (FastChat's name, system prompt in its words, our text as FastChat has it)
    "vicuna": ("vicuna_v1.1", "Be kind.", lambda text: text),
    "llama2": ("llama-2", "Be kind.", lambda text: text.removeprefix("<s>") + "<s>"),
    "chatglm": ("chatglm", "Be kind.", lambda text: text.replace("[gMASK]<sop>", "").replace("</s>", "")),
    "chatglm2": ("chatglm2", "Be kind.", lambda text: text.replace("[gMASK]sop", "").replace("</s>", "")),
    "phoenix": ("phoenix", "Be kind.\n\n", lambda text: text),
    "tigerbot": ("tigerbot", "Be kind.", lambda text: text.replace("</s>", "") + "\n\n"),
    "starchat": ("starchat", "Be kind.", lambda text: text.replace("<|system|>", "<system>")),
    "baichuan": ("baichuan-chat", "Be kind.", lambda text: text.replace("</s>", "")),
    "baichuan2": ("baichuan2-chat", "Be kind.", lambda text: text.replace("</s>", "")),
    "qwen": ("qwen-7b-chat", "Be kind.", lambda text: text),
    "aquila": ("aquila", "Be kind.", lambda text: text),
    "zephyr": ("zephyr", "Be kind.", lambda text: text),
    "orca": ("orca-2", "Be kind.", lambda text: text),
    "deepseek": (
        "deepseek-chat",
        "<｜begin▁of▁sentence｜>Be kind.\n\n",
        lambda text: text.replace("<s>", "<｜begin▁of▁sentence｜>").replace("</s>", "<｜end▁of▁sentence｜>"),
    ),
}


@pytest.mark.parametrize("name", FASTCHAT)
def test_fastchat_gives_the_same_text(name, tokenizers):
    theirs, system, as_theirs = FASTCHAT[name]
    form = get_conv_template(theirs)
    form.set_system_message(system)
    for number, text in enumerate(("Hi", "Hello", "Bye", "Ciao")):
        form.append_message(form.roles[number % 2], text)
    ours = joined(TEMPLATES[name].bind(tokenizers["plain"]).segments(replace(EXCHANGES, system="Be kind.")))
    assert as_theirs(ours) == form.get_prompt()


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("vicuna", "vicuna_v1.1"),
        ("qwen", "qwen-7b-chat"),
        ("yi", "Yi-34b-chat"),
        ("aquila", "aquila"),
        ("phoenix", "phoenix"),
    ],
)
def test_fastchat_has_the_same_default_system_prompt(name, theirs, tokenizers):
    form = get_conv_template(theirs)
    for number, text in enumerate(("Hi", "Hello", "Bye", "Ciao")):
        form.append_message(form.roles[number % 2], text)
    assert joined(TEMPLATES[name].bind(tokenizers["plain"]).segments(EXCHANGES)) == form.get_prompt()


# --- the docs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["templates.md", "templates_zh.md"])
def test_the_docs_table_is_the_table(page):
    rows = re.findall(
        r"^\| `([\w-]+)` \| (.*) \| (.*) \| `(.*)` \| (.*) \|$", (ROOT / "docs" / page).read_text(), re.M
    )
    assert [row[0] for row in rows] == NAMES
    code = (ROOT / "template.py").read_text()
    for name, _families, system, end, source in rows:
        template = TEMPLATES[name]
        assert end.replace("eos", "{eos}").replace("\\|", "|") == json.dumps(template.end)[1:-1], name
        assert (system == "—") == (not template.default_system), name
        assert system in ("—", *(f"“{template.default_system[:size]}…”" for size in range(10, 60)),
                          f"“{template.default_system}”"), name  # fmt: skip
        for address in re.findall(r"\((https://[^)]+)\)", source):
            assert address in code, name
