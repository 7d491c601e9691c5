"""The reward model of PPO: any sequence classifier, used with its own tokenizer and chat template.

has a chat template     the conversation with the response, as `apply_chat_template` encodes it
has none                prompt and response as a pair of texts

Response tokens are decoded first, even if both models share a tokenizer: a reward model is trained on encoded texts,
and sampled tokens may spell a text differently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
import torch
from loguru import logger
from torch import nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedTokenizerBase

from stagewise.adapters.attach import load_adapter
from stagewise.adapters.files import read_adapter_config, task_of
from stagewise.artifacts.manifest import read_manifest
from stagewise.artifacts.weight_files import check_hashes
from stagewise.chat.encoding import AnyTemplate, encode_segments
from stagewise.chat.reward_template import Reading, older_notice, reading_of
from stagewise.chat.select import choose_template
from stagewise.chat.tool_formats import openai_messages, openai_tools, turns
from stagewise.config.arguments import ChatArguments, ModelArguments
from stagewise.errors import InexactCut, RecordError, RewardError
from stagewise.formats.parsers import Conversation, Message
from stagewise.inference.decoding import BROKEN
from stagewise.models.attention.choose import choose_attention
from stagewise.models.attention.rope import context_of
from stagewise.models.config import DTYPES, load_config
from stagewise.models.hub import find_source, hub_options
from stagewise.models.loading import load_reward_model
from stagewise.models.reward_head import Float32Linear
from stagewise.models.tokenizer import check_vocabulary, load_tokenizer

FLAG = "--reward_model_name_or_path"
PAIR = "prompt and answer as a pair"
ROWS = 16  # responses scored at a time


@dataclass
class Scorer:
    """Scores responses.

    Args:
        model: a sequence classifier in eval mode.
        tokenizer: its own tokenizer, whose chat template makes its rows.
        template: the chat template of a reward model from an older version; otherwise None.
        policy_tokenizer: of the responses.
        policy_template: the chat template of the prompts if the reward model shares it and the tokenizer.
        ends: the ids that end the policy's responses.
        label: the score is this label's logit.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    template: AnyTemplate | None
    policy_tokenizer: PreTrainedTokenizerBase
    policy_template: AnyTemplate | None
    ends: frozenset[int]
    label: int = 0

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Conversation], prompt_ids: Sequence[list[int]], answers: Sequence[list[int]]
    ) -> torch.Tensor:
        """Scores of responses, (B,) in float32 on the model's device.

        Args:
            prompts: conversations to be answered.
            prompt_ids: the same as the policy's tokens, possibly without their first exchanges.
            answers: the policy's tokens, including the end marker of a complete response.
        """
        rows = [self.encode(*row) for row in zip(prompts, prompt_ids, answers, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
        pad_id = self.model.config.get_text_config().pad_token_id
        size = 1 if pad_id is None else ROWS  # without one the model cannot tell where a row of a batch ends
        scores = torch.zeros(len(rows), device=self.model.device)
        for start in range(0, len(rows), size):
            places = order[start : start + size]
            batch = self.tokenizer.pad([rows[i] for i in places], padding_side="right", return_tensors="pt")
            if pad_id is not None:
                batch["input_ids"].masked_fill_(batch["attention_mask"] == 0, pad_id)
            scores[places] = self.model(**batch.to(self.model.device)).logits[:, self.label].float()
        if not torch.isfinite(scores).all():
            raise RewardError(
                f"{FLAG}: gave a score that is NaN or infinite; load it with --torch_dtype bfloat16 or float32"
            )
        return scores

    def encode(self, prompt: Conversation, prompt_ids: list[int], answer: list[int]) -> dict[str, list[int]]:
        """One response as the reward model's input; a response that was cut off is closed, as in its training."""
        ended = answer[-1] in self.ends
        # Special tokens within a response are kept if they mean the same to both models.
        hidden = self.policy_template is None
        text = self.policy_tokenizer.decode(answer[:-1] if ended else answer, skip_special_tokens=hidden).strip()
        text = text if ended else text.rstrip(BROKEN)
        limit = position_limit(self.model.config, self.tokenizer)
        if not self.tokenizer.chat_template:
            question = "\n".join(message.content for message in prompt.messages)
            return self._pair(question, text, limit, prompt.where)
        messages = self._asked(prompt, prompt_ids)
        while True:
            ids = self._row(replace(prompt, messages=(*messages, Message("assistant", text))))
            later = [number for number, message in enumerate(messages) if message.role == "user" and number > 0]
            if limit is None or len(ids) <= limit:
                return {"input_ids": ids}
            if not later:
                raise RecordError(prompt.where, "too long for the reward model", f"the last question with its answer "
                                  f"has {len(ids)} tokens, {FLAG} takes {limit}")  # fmt: skip
            messages = messages[later[0] :]

    def _asked(self, prompt: Conversation, prompt_ids: list[int]) -> tuple[Message, ...]:
        """The messages of the policy's prompt, if they can be determined: it may lack the first exchanges."""
        messages = prompt.messages
        while self.policy_template is not None:
            later = [number for number, message in enumerate(messages) if message.role == "user" and number > 0]
            shown = self.policy_template.segments(replace(prompt, messages=messages), generation=True)
            if not later or encode_segments(self.policy_tokenizer, shown)[0] == prompt_ids:
                break
            messages = messages[later[0] :]
        return messages

    def _row(self, whole: Conversation) -> list[int]:
        """A conversation as the tokens that the model was trained on."""
        if self.template is not None:
            segments = self.template.segments(whole)
            last = max(number for number, segment in enumerate(segments) if segment.learn)
            return encode_segments(self.tokenizer, segments[: last + 1])[0]
        messages = openai_messages(turns(whole.messages), whole.system)
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=openai_tools(whole.tools), tokenize=True, return_dict=False
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise RecordError(whole.where, "refused by the chat template", f"the chat template of {FLAG} refuses the "
                              f"conversation: {error}") from error  # fmt: skip

    def _pair(self, question: str, answer: str, limit: int | None, where: str) -> dict[str, list[int]]:
        """Prompt and response as a pair of texts; a long prompt keeps its end."""
        pair = dict(self.tokenizer(question, answer))
        if limit is None or len(pair["input_ids"]) <= limit:
            return pair
        alone = len(self.tokenizer("", answer)["input_ids"])
        if alone >= limit:
            raise RecordError(where, "too long for the reward model", f"an answer alone has {alone} of its tokens, "
                              f"{FLAG} takes {limit}; lower --max_target_length")  # fmt: skip
        self.tokenizer.truncation_side = "left"
        return dict(self.tokenizer(question, answer, truncation="only_first", max_length=limit))


def position_limit(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The most tokens a model reads, or None if unknown."""
    known = [context_of(config), tokenizer.model_max_length]
    return min((n for n in known if n and 0 < n < 10**9), default=None)


def load_scorer(
    name: str,
    args: ModelArguments,
    *,
    label: int | None,
    tokenizer: PreTrainedTokenizerBase,
    template: AnyTemplate,
    device: torch.device,
    longest: int,
) -> Scorer:
    """Loads a reward model: this project's, merged or as an adapter, or any sequence classifier.

    Args:
        name: directory or hub name.
        args: the policy's model flags, for precision, cache and access.
        label: the label whose logit is the score; None for a model with one label.
        tokenizer: the policy's.
        template: the policy's.
        device: for the reward model.
        longest: the most tokens of prompt and response.

    Raises:
        RewardError: with what was found and what to do.
    """
    own = replace(args, model_name_or_path=name, tokenizer_name_or_path=None, model_type="auto", model_revision="main")
    own.device_map = None
    own.qlora = own.load_in_4bit = own.load_in_8bit = (
        False  # the policy is trained on the scores: they should not be rounded
    )
    own.router_aux_loss, own.router_aux_loss_coef = False, None
    own.rope_scaling, own.rope_factor, own.rope_factors_file, own.shift_attn = None, None, None, False
    folder = Path(name)
    is_adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    try:
        model, rm_tokenizer, label = (_adapter if is_adapter else _classifier)(own, label)
        own_template, reading = _form_of(rm_tokenizer, name)
    except ValueError as error:
        raise error if isinstance(error, RewardError) else RewardError(f"{FLAG} {name}: {error}") from error
    same = own_template is not None and own_template.jinja() == template.jinja() and _alike(rm_tokenizer, tokenizer)
    limit = position_limit(model.config, rm_tokenizer)
    if same and limit is not None and longest > limit:
        raise RewardError(
            f"{FLAG} {name}: reads {limit} tokens, prompt and answer may have {longest}; lower --max_source_length or "
            "--max_target_length"
        )
    forms = {True: "the policy's own form", False: "its own chat template" if rm_tokenizer.chat_template else PAIR}
    logger.info(f"reward model: {name}, {type(model).__name__}, label {label}, reads {forms[same]}")
    model.config.get_text_config().use_cache = False
    stop_id = tokenizer.encode(template.stop, add_special_tokens=False)[-1]
    return Scorer(
        model=model.to(device).eval().requires_grad_(False),
        tokenizer=rm_tokenizer,
        template=own_template if reading is Reading.OLDER else None,
        policy_tokenizer=tokenizer,
        policy_template=template if same else None,
        ends=frozenset({stop_id, tokenizer.eos_token_id} - {None}),
        label=label,
    )


# --- pieces ----------------------------------------------------------------------------------------------------------


def _form_of(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[AnyTemplate | None, Reading]:
    """The chat template that a reward model was trained with, None if unknown, and the rows it reads."""
    reading, saved = reading_of(tokenizer, name), tokenizer.chat_template
    if not saved:
        return None, reading
    try:
        template = choose_template(tokenizer, ChatArguments())
    except InexactCut:
        if reading is Reading.OLDER:
            raise
        template = None
    if reading is Reading.OLDER:
        logger.warning(older_notice(name, tokenizer, template))
    tokenizer.chat_template = saved
    return template, reading


def _adapter(args: ModelArguments, label: int | None) -> tuple[nn.Module, PreTrainedTokenizerBase, int]:
    """The base that the adapter names, with the adapter and its head."""
    folder = args.model_name_or_path
    config = read_adapter_config(folder)
    if task_of(config) != "SEQ_CLS":
        raise RewardError(f"{FLAG} {folder}: an adapter for {config.task_type}, expected a reward model's (SEQ_CLS)")
    args = replace(args, model_name_or_path=config.base_model_name_or_path, tokenizer_name_or_path=folder)
    args.kept_rope = (read_manifest(folder) or {}).get("rope")
    tokenizer = load_tokenizer(args)
    return load_adapter(load_reward_model(args, tokenizer), folder), tokenizer, _label(1, label, {0: "score"})


def _classifier(args: ModelArguments, label: int | None) -> tuple[nn.Module, PreTrainedTokenizerBase, int]:
    config, name = load_config(args), args.model_name_or_path
    if any(architecture.endswith("ForCausalLM") for architecture in config.architectures or []):
        raise RewardError(f"{FLAG} {name}: a language model, expected a sequence classifier (reward_modeling.py)")
    label = _label(config.num_labels, label, config.id2label)
    tokenizer, source = load_tokenizer(args), find_source(name, args)
    if Path(source).is_dir():
        check_hashes(Path(source))
    model, info = AutoModelForSequenceClassification.from_pretrained(
        source,
        config=config,
        dtype="auto" if args.torch_dtype == "auto" else DTYPES[args.torch_dtype],
        attn_implementation=choose_attention(config, args),
        output_loading_info=True,
        **hub_options(source, args),
    )
    if info["missing_keys"]:
        raise RewardError(f"{FLAG} {name}: the checkpoint lacks {', '.join(sorted(info['missing_keys'])[:5])}")
    check_vocabulary(model, tokenizer)
    head = getattr(model, "score", None)
    if isinstance(head, nn.Linear) and head.weight.dtype != torch.float32:
        # Scores in 16 bit would be rounded to steps as large as the differences between responses.
        model.score = Float32Linear(head.in_features, head.out_features, bias=head.bias is not None)
        model.score.load_state_dict(head.state_dict())
    return model, tokenizer, label


def _label(count: int, asked: int | None, names: Mapping[int, str]) -> int:
    if asked is None and count == 1:
        return 0
    shown = ", ".join(f"{number} ({names.get(number, '?')})" for number in range(count))
    if asked is None:
        raise RewardError(f"{FLAG}: has {count} labels; --reward_label says which is the score: {shown}")
    if not 0 <= asked < count:
        raise RewardError(f"--reward_label {asked}: the reward model has {shown}")
    return asked


def _alike(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers encode every text to the same ids, except the text of a pad token."""
    backends = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (one, other)]
    if None in backends:
        return False
    pads = {one.pad_token, other.pad_token}
    rules = []
    for backend in backends:
        rule = json.loads(backend.to_str())
        rule |= {"padding": None, "truncation": None}
        rule["added_tokens"] = [token for token in rule["added_tokens"] if token["content"] not in pads]
        rules.append(rule)
    return rules[0] == rules[1]
