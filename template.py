"""The table of chat templates: read it, extend it. `--template_name` chooses one; what the pieces mean is said in
`stagewise.rendering.Template`.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
    └────────────── user ───────────┘└────────lead────────┘└answer┘└─ end ──┘└after
"""

from stagewise.rendering import Template

CHATML = {
    "system": "<|im_start|>system\n{content}<|im_end|>\n",
    "user": "<|im_start|>user\n{content}<|im_end|>\n",
    "lead": "<|im_start|>assistant\n",
    "end": "<|im_end|>",
    "after": "\n",
}

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in [
        # https://github.com/lm-sys/FastChat (vicuna v1.1): "SYSTEM USER: … ASSISTANT: …</s>USER: …"
        Template(
            "vicuna",
            system="{content} ",
            default_system="A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions.",
            user="USER: {content}",
            lead=" ASSISTANT:",
            answer=" {content}",
        ),
        # https://github.com/tatsu-lab/stanford_alpaca, continued over several turns as FastChat does
        Template(
            "alpaca",
            system="{content}\n\n",
            default_system="Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.",
            user="### Instruction:\n{content}\n\n",
            lead="### Response:\n",
            after="\n\n",
        ),
        # https://huggingface.co/meta-llama/Llama-2-7b-chat-hf: every exchange has its own bos; an answer stands
        # between two spaces, both of which the model says itself
        Template(
            "llama2",
            system="<<SYS>>\n{content}\n<</SYS>>\n\n",
            user="{bos}[INST] {system}{content} [/INST]",
            lead="",
            answer=" {content} ",
        ),
        Template("chatml", **CHATML),
        # https://huggingface.co/Qwen/Qwen2.5-7B-Instruct, without its maker's name in the system prompt
        Template("qwen", default_system="You are a helpful assistant.", **CHATML),
    ]
}
