"""The RM test: how often a reward model prefers the chosen answer, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from peft import PeftConfig, PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from stagewise.adapters.attach import load_adapter
from stagewise.adapters.files import task_of
from stagewise.artifacts.manifest import read_manifest
from stagewise.artifacts.processes import in_batches
from stagewise.chat.encoding import AnyTemplate
from stagewise.chat.preference_encoding import encode_preference
from stagewise.chat.reward_template import (
    Ending,
    Reading,
    older_notice,
    reading_of,
    saved_reading,
    set_pad_token,
    settle_reward_form,
)
from stagewise.chat.select import choose_template
from stagewise.config.arguments import ChatArguments, ModelArguments, PairArguments
from stagewise.config.checks import check_shared
from stagewise.data.examples import IGNORE_INDEX, PreferenceExample
from stagewise.data.packing import PreferenceCollator
from stagewise.errors import ArgumentError
from stagewise.formats.parsers import Message, Preference
from stagewise.inference.loading import settle_factor
from stagewise.models.config import load_config
from stagewise.models.loading import load_reward_model
from stagewise.models.tokenizer import load_tokenizer
from stagewise.training.evaluation_set import padded_length


@dataclass
class PairScorer:
    """A reward model with its tokenizer and chat template."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: AnyTemplate
    ending: Ending | None  # None: the rows of a reward model from an older version

    @torch.no_grad()
    def __call__(self, pairs: Sequence[PreferenceExample], batch_size: int) -> list[tuple[float, float]]:
        """(chosen score, rejected score) of each pair, in order, as in the validation of reward_modeling.py."""
        collate, device = PreferenceCollator(self.tokenizer.pad_token_id), self.model.device

        def scores_of(batch: list[int]) -> list[tuple[float, float]]:
            inputs = collate([pairs[index] for index in batch])
            ids, mask = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
            scores = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1).float()
            if not torch.isfinite(scores).all():
                raise ArgumentError(
                    "--model_name_or_path: gave a score that is NaN or infinite; load it with --torch_dtype bfloat16 "
                    "or float32"
                )
            return list(zip(*(part.tolist() for part in scores.chunk(2)), strict=True))

        return in_batches([padded_length(pair) for pair in pairs], batch_size, "pairs", scores_of)


def is_reward_model(args: ModelArguments, adapter: PeftConfig | None) -> bool:
    """Whether a model is a reward model, by its config and its adapter's; reads no weights."""
    if adapter is not None:
        return task_of(adapter) == "SEQ_CLS"
    settle_factor(args)
    return any(name.endswith("ForSequenceClassification") for name in load_config(args).architectures or [])


def load_pair_scorer(
    args: ModelArguments,
    adapter: str | None,
    chat: ChatArguments,
    device: torch.device,
) -> PairScorer:
    """Loads a reward model: base and adapter, or merged.

    Args:
        args: the model flags; the adapter's tokenizer is used if it has one.
        adapter: its directory, or None.
        chat: the chat template flags.
        device: for the model.

    Raises:
        ArgumentError: with the flag, also for a classifier with several labels.
    """
    if adapter and not args.tokenizer_name_or_path and (Path(adapter) / "tokenizer_config.json").is_file():
        args.tokenizer_name_or_path = adapter
    args.kept_rope = ((read_manifest(adapter) if adapter else None) or {}).get("rope")
    settle_factor(args)
    check_shared(args)
    labels = 1 if adapter else load_config(args).num_labels
    if labels != 1:
        raise ArgumentError(f"--model_name_or_path {args.model_name_or_path}: has {labels} labels, expected one score")
    tokenizer = load_tokenizer(args)
    name, config = adapter or args.model_name_or_path, load_config(args)
    reading = saved_reading(adapter) if adapter else reading_of(tokenizer, name)
    template = choose_template(tokenizer, chat, adapter)
    ending = _settled(tokenizer, template, reading, config, name)
    model = load_reward_model(args, tokenizer)
    if not getattr(model, "hf_device_map", None):
        model = model.to(device)
    if adapter:
        model = load_adapter(model, adapter)
        logger.info(f"adapter: {adapter}, {next(iter(model.peft_config.values())).peft_type.value}")
    return PairScorer(model.eval(), tokenizer, template, ending)


def _settled(
    tokenizer: PreTrainedTokenizerBase, template: AnyTemplate, reading: Reading, config: PretrainedConfig, name: str
) -> Ending | None:
    """How the rows of a reward model end; also sets the tokenizer's pad token to the model's."""
    if reading is Reading.OLDER:
        logger.warning(older_notice(name, tokenizer, template))
        return None
    text = config.get_text_config()
    if reading is Reading.MARKED:
        return settle_reward_form(tokenizer, template, text.vocab_size)
    ending = Ending(template.closing, template.tail)
    if text.pad_token_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(text.pad_token_id)
    else:  # in a batch of one, a row's score is at its last token
        last = tokenizer.encode(template.closing + template.tail, add_special_tokens=False)[-1]
        set_pad_token(tokenizer, {last}, text.vocab_size)
    return ending


@dataclass(frozen=True)
class Pair:
    """One record of a test: the texts, and the tokens of both answers."""

    preference: Preference
    example: PreferenceExample


def encode_pair(scorer: PairScorer, preference: Preference, limits: PairArguments) -> tuple[Pair, bool]:
    """A pair within the length limits, and whether it was cut. Raises RecordError if it cannot be scored."""
    sizes = (limits.max_source_length, limits.max_target_length)
    example, cut = encode_preference(scorer.tokenizer, scorer.template, preference, *sizes, scorer.ending)
    return Pair(preference, example), cut


def pair_rows(pairs: Sequence[Pair], scores: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    """A row of scores.jsonl for each pair: the texts and every number of RM_METRICS; a tie counts one half."""
    rows = []
    for pair, (chosen, rejected) in zip(pairs, scores, strict=True):
        prompt = pair.preference.prompt
        lengths = [_answer_tokens(pair.example, side) for side in ("chosen", "rejected")]
        rows.append(
            {
                "where": pair.preference.where,
                "system": prompt.system,
                "prompt": [{"role": m.role, "content": m.content} for m in prompt.messages],
                "chosen_answer": _words(pair.preference.chosen),
                "rejected_answer": _words(pair.preference.rejected),
                "chosen": chosen,
                "rejected": rejected,
                "margin": chosen - rejected,
                "correct": _wins(chosen - rejected),
                "chosen_tokens": lengths[0],
                "rejected_tokens": lengths[1],
                "longer_is_better": _wins(lengths[0] - lengths[1]),
            }
        )
    return rows


def _answer_tokens(example: PreferenceExample, side: str) -> int:
    return sum(label != IGNORE_INDEX for label in getattr(example, side).labels)


def _words(messages: Sequence[Message]) -> str:
    return "\n".join(message.content for message in messages)


def _wins(difference: float) -> float:
    return 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0
