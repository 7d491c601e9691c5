"""The table of chat templates. `--template_name` chooses one; `stagewise.chat.template.Template` explains the fields,
docs/templates.md how to add a family.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
    └────────────── user ───────────┘└────────lead────────┘└answer┘└─ end ──┘└after

The comment above each entry links to the format's source. Where the published format has no end-of-answer token, or
only one after the last answer, every answer here ends with the tokenizer's eos token, at which generation can stop.
"""

from stagewise.chat.registry import register
from stagewise.chat.template import Template
from stagewise.chat.tool_formats import DEEPSEEK, GLM4, LLAMA3, MISTRAL, QWEN

CHATML = {
    "system": "<|im_start|>system\n{content}<|im_end|>\n",
    "user": "<|im_start|>user\n{content}<|im_end|>\n",
    "lead": "<|im_start|>assistant\n",
    "end": "<|im_end|>",
    "after": "\n",
    "tokens": ("<|im_start|>",),
}
LLAMA2 = {
    "system": "<<SYS>>\n{content}\n<</SYS>>\n\n",
    "user": "{bos}[INST] {system}{content} [/INST]",
    "lead": "",
}
# GLM's role tags: the next one ends an answer
GLM = {"end": "<|user|>", "lead": "<|assistant|>"}

ASSISTANT_FOR_USERS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ASSISTANT_FOR_HUMANS = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
# with the white space of its training code
LINKSOUL_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n            "
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
DEEPSEEK_CODER_SYSTEM = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer"
)

_FORMS = [
    # --- plain text: any tokenizer with an eos token -----------------------------------------------------------------
    # https://github.com/lm-sys/FastChat/blob/main/fastchat/conversation.py (vicuna_v1.1)
    Template(
        "vicuna",
        system="{content} ",
        default_system=ASSISTANT_FOR_USERS,
        user="USER: {content}",
        lead=" ASSISTANT:",
        answer=" {content}",
    ),
    # https://huggingface.co/datasets/tatsu-lab/alpaca (its text column), continued over several turns
    Template(
        "alpaca",
        system="{content}\n\n",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
        user="### Instruction:\n{content}\n\n",
        lead="### Response:\n",
        after="\n\n",
    ),
    # https://huggingface.co/meta-llama/Llama-2-7b-chat-hf/blob/main/tokenizer_config.json: every exchange has its own
    # bos; an answer has a space on both sides, and the model generates both
    Template("llama2", **LLAMA2, answer=" {content} "),
    # https://github.com/ymcui/Chinese-LLaMA-Alpaca-2/blob/main/scripts/openai_server_demo/openai_api_server.py
    Template(
        "llama2-zh",
        **LLAMA2,
        answer=" {content}",
        default_system="You are a helpful assistant. 你是一个乐于助人的助手。",
    ),
    # https://github.com/LinkSoul-AI/Chinese-Llama-2-7b/blob/main/train.py
    Template("linksoul", **LLAMA2, answer=" {content} ", default_system=LINKSOUL_SYSTEM),
    # https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.3/blob/main/tokenizer_config.json. The family puts the
    # system prompt into the last question, so earlier turns could not be trained on; here it is in the first
    Template(
        "mistral",
        start="{bos}",
        system="{content}\n\n",
        user="[INST] {system}{content}[/INST]",
        lead="",
        answer=" {content}",
        tools=MISTRAL,
    ),
    # https://huggingface.co/HuggingFaceH4/zephyr-7b-beta/blob/main/tokenizer_config.json
    Template(
        "zephyr",
        system="<|system|>\n{content}{eos}\n",
        user="<|user|>\n{content}{eos}\n",
        lead="<|assistant|>\n",
        after="\n",
    ),
    # https://huggingface.co/deepseek-ai/deepseek-llm-7b-chat/blob/main/tokenizer_config.json
    Template(
        "deepseek",
        start="{bos}",
        system="{content}\n\n",
        user="User: {content}\n\n",
        lead="Assistant:",
        answer=" {content}",
    ),
    # https://huggingface.co/OrionStarAI/Orion-14B-Chat/blob/main/tokenizer_config.json: an eos before the answer too
    Template(
        "orion",
        start="{bos}",
        system="{content}\n\n",
        user="Human: {content}\n\n",
        lead="Assistant: {eos}",
    ),
    # https://huggingface.co/xverse/XVERSE-13B-Chat
    Template("xverse", system="{content}\n\n", user="Human: {content}\n\n", lead="Assistant: "),
    # https://huggingface.co/IDEA-CCNL/Ziya-LLaMA-13B-v1/blob/main/README.md
    Template("ziya", system="{content}\n", user="<human>:{content}\n", lead="<bot>:", after="\n"),
    # https://github.com/CVI-SZU/Linly, dialogues: https://github.com/fengyh3/llama_inference
    Template("linly", system="{content}\n", user="User: {content}\n", lead="Bot: ", after="\n"),
    # https://github.com/LianjiaTech/BELLE/blob/main/train/src/sample_generator.py
    Template("belle", system="{content}\n\n", user="Human: \n{content}\n\n", lead="Assistant: \n"),
    # https://github.com/FreedomIntelligence/LLMZoo/blob/main/llmzoo/utils.py
    Template(
        "phoenix",
        system="{content}\n\n",
        default_system=ASSISTANT_FOR_HUMANS,
        user="Human: {bos}{content}{eos}",
        lead="Assistant: {bos}",
    ),
    # https://github.com/yangjianxin1/Firefly/blob/master/component/dataset.py; the family has no system prompt
    Template("firefly", start="{bos}", system="{content}\n", user="{system}{content}{eos}", lead=""),
    # https://github.com/OpenBuddy/OpenBuddy/blob/main/legacy-prompt-format.md; its later models have their own tokens
    Template(
        "openbuddy",
        system="{content}\n\n",
        user="User: {content}\n",
        lead="Assistant:",
        answer=" {content}",
        after="\n",
    ),
    # https://huggingface.co/TigerResearch/tigerbot-70b-chat-v4-4bit-exl2/blob/main/tokenizer_config.json
    Template("tigerbot", user="\n\n### Instruction:\n{content}", lead="\n\n### Response:\n"),
    # https://huggingface.co/BAAI/AquilaChat2-34B/blob/main/predict.py (aquila)
    Template(
        "aquila",
        system="{content}###",
        default_system=ASSISTANT_FOR_HUMANS,
        user="Human: {content}###",
        lead="Assistant:",
        answer=" {content}",
    ),
    # https://huggingface.co/fla-hub/rwkv7-0.1B-g1/blob/main/tokenizer_config.json: an empty line ends an answer; with
    # the eos after it, an answer may contain empty lines
    Template(
        "rwkv",
        start="{bos}",
        system="System: {content}\n\n",
        user="User: {content}\n\n",
        lead="Assistant:",
        answer=" {content}",
        end="\n\n{eos}",
    ),
    # no format: the texts concatenated as they are
    Template("base", user="{content}", lead="", tools=None),
    # --- ChatML and its relatives --------------------------------------------------------------------------------
    # https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
    Template("chatml", **CHATML),
    # https://huggingface.co/Qwen/Qwen2-7B-Instruct/blob/main/tokenizer_config.json
    Template("qwen", **CHATML, default_system="You are a helpful assistant.", tools=QWEN),
    # https://huggingface.co/Qwen/Qwen3-8B/blob/main/tokenizer_config.json
    Template("qwen3", **CHATML, tools=QWEN, thinking=True),
    # https://huggingface.co/01-ai/Yi-34B-Chat/blob/main/tokenizer_config.json
    Template("yi", **CHATML),
    # https://huggingface.co/internlm/internlm2-chat-7b/blob/main/tokenizer_config.json
    Template("internlm2", **CHATML, start="{bos}"),
    # https://huggingface.co/microsoft/Orca-2-7b/blob/main/README.md: the model generates the newline after the tag
    Template("orca", **(CHATML | {"lead": "<|im_start|>assistant", "answer": "\n{content}"})),
    # https://huggingface.co/HuggingFaceH4/starchat-beta/blob/main/README.md
    Template(
        "starchat",
        system="<|system|>\n{content}<|end|>\n",
        always_system=True,
        user="<|user|>\n{content}<|end|>\n",
        lead="<|assistant|>",
        answer="\n{content}",
        end="<|end|>",
        after="\n",
        tokens=("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    # https://huggingface.co/microsoft/Phi-3-mini-4k-instruct/blob/main/tokenizer_config.json
    Template(
        "phi3",
        system="<|system|>\n{content}<|end|>\n",
        user="<|user|>\n{content}<|end|>\n",
        lead="<|assistant|>\n",
        end="<|end|>",
        after="\n",
        tokens=("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    # --- families with tokens of their own ---------------------------------------------------------------------------
    # https://huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct/blob/main/tokenizer_config.json
    Template(
        "llama3",
        start="{bos}",
        system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
        lead="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        tokens=("<|start_header_id|>", "<|end_header_id|>"),
        tools=LLAMA3,
    ),
    # https://huggingface.co/google/gemma-3-1b-it/blob/main/tokenizer_config.json: the system prompt has no turn
    Template(
        "gemma",
        start="{bos}",
        system="{content}\n\n",
        user="<start_of_turn>user\n{system}{content}<end_of_turn>\n",
        lead="<start_of_turn>model\n",
        end="<end_of_turn>",
        after="\n",
        tokens=("<start_of_turn>",),
    ),
    # https://huggingface.co/CohereForAI/aya-23-8B/blob/main/tokenizer_config.json
    Template(
        "cohere",
        start="{bos}",
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
        user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
        lead="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        end="<|END_OF_TURN_TOKEN|>",
        tokens=("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    ),
    # https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/tokenizer_config.json
    Template(
        "deepseek3",
        start="{bos}",
        user="<｜User｜>{content}",
        lead="<｜Assistant｜>",
        tokens=("<｜User｜>", "<｜Assistant｜>"),
        tools=DEEPSEEK,
    ),
    # https://huggingface.co/deepseek-ai/deepseek-coder-6.7b-instruct/blob/main/tokenizer_config.json, whose system
    # prompt ends with a newline; a custom one gets it, too
    Template(
        "deepseekcoder",
        start="{bos}",
        system="{content}\n",
        default_system=DEEPSEEK_CODER_SYSTEM,
        user="### Instruction:\n{content}\n",
        lead="### Response:",
        answer="\n{content}",
        end="\n<|EOT|>",
        after="\n",
    ),
    # https://huggingface.co/THUDM/chatglm-6b/blob/main/modeling_chatglm.py (chat, get_masks). There a first question
    # gets its number only once a second follows, and earlier answers have no special tokens: such turns can't be
    # labeled
    Template(
        "chatglm",
        system="{content}\n",
        user="[Round {round0}]\n问：{content}\n答：",
        lead="[gMASK]<sop>",
        after="\n",
        tokens=("[gMASK]", "<sop>"),
    ),
    # https://huggingface.co/THUDM/chatglm2-6b/blob/main/tokenization_chatglm.py (build_prompt, get_prefix_tokens)
    Template(
        "chatglm2",
        start="[gMASK]sop",
        system="{content}\n\n",
        user="[Round {round}]\n\n问：{content}\n\n",
        lead="答：",
        after="\n\n",
        tokens=("[gMASK]", "sop"),
    ),
    # https://huggingface.co/THUDM/chatglm3-6b/blob/main/tokenizer_config.json
    Template(
        "chatglm3",
        start="[gMASK]sop",
        system="<|system|>\n {content}",
        user="<|user|>\n {content}",
        answer="\n {content}",
        tokens=("[gMASK]", "sop", "<|system|>", "<|assistant|>"),
        **GLM,
    ),
    # https://huggingface.co/THUDM/GLM-4-9B-0414/blob/main/chat_template.jinja
    Template(
        "glm4",
        start="[gMASK]<sop>",
        system="<|system|>\n{content}",
        user="<|user|>\n{content}",
        answer="\n{content}",
        tokens=("[gMASK]", "<sop>", "<|system|>", "<|assistant|>"),
        tools=GLM4,
        **GLM,
    ),
    # https://huggingface.co/baichuan-inc/Baichuan-13B-Chat/blob/main/modeling_baichuan.py (_build_chat_input)
    Template(
        "baichuan",
        user="<reserved_102>{content}",
        lead="<reserved_103>",
        tokens=("<reserved_102>", "<reserved_103>"),
    ),
    # https://huggingface.co/baichuan-inc/Baichuan2-7B-Chat/blob/main/generation_utils.py
    Template(
        "baichuan2",
        user="<reserved_106>{content}",
        lead="<reserved_107>",
        tokens=("<reserved_106>", "<reserved_107>"),
    ),
    # https://huggingface.co/internlm/internlm-chat-7b/blob/main/modeling_internlm.py (build_inputs); its first release
    # had <eoh> before the newline of a question
    Template(
        "internlm",
        start="{bos}",
        system="<|System|>:{content}\n",
        user="<|User|>:{content}\n",
        lead="<|Bot|>:",
        end="<eoa>",
        after="\n",
    ),
    # https://github.com/OpenMOSS/MOSS/blob/main/README.md
    Template(
        "moss",
        system="{content}\n",
        user="<|Human|>: {content}<eoh>\n",
        lead="<|MOSS|>:",
        answer=" {content}",
        end="<eom>",
        after="\n",
        tokens=("<eoh>",),
    ),
]

TEMPLATES: dict[str, Template] = {template.name: template for template in _FORMS}
register(_FORMS)
