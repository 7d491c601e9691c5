"""A model's answers to questions with known answers, and the probability it gives to those.

The last answer of each conversation is generated again from its context; the perplexity covers every answer that a
stage would train on, as in the stage's own validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stagewise.artifacts.processes import in_batches
from stagewise.chat.encoding import ConversationEncoder
from stagewise.data.examples import IGNORE_INDEX, Example
from stagewise.data.packing import PaddedCollator
from stagewise.errors import ChatModelError, RecordError, TooLongError
from stagewise.evaluation.text_metrics import bleu_counts, language_of, rouge
from stagewise.formats.parsers import Conversation, prompt_of
from stagewise.inference.chat_model import Answer, ChatModel, SamplingArguments
from stagewise.inference.decoding import settled_rotations
from stagewise.losses import token_nll
from stagewise.models.attention.rope import rotations
from stagewise.models.forward import document_sums, label_logits, takes_kept_logits
from stagewise.rl.reward_model import Scorer
from stagewise.training.metrics import perplexity


@dataclass(frozen=True)
class Question:
    """One record of a test: the question, the reference answer, and the whole conversation for the perplexity."""

    prompt: Conversation
    reference: str
    example: Example


def question_of(conversation: Conversation) -> tuple[Conversation, str]:
    """The context of the last answer in words, and the answer.

    Raises:
        RecordError: for a conversation without an answer in words, or without a question before it.
    """
    messages = conversation.messages
    spoken = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not spoken:
        raise RecordError(conversation.where, "no answer in words", "every answer is a call of a tool")
    prompt = prompt_of(replace(conversation, messages=messages[: spoken[-1]]))
    if not prompt.messages:
        raise RecordError(conversation.where, "no question", "there is no question before the only answer")
    return prompt, messages[spoken[-1]].content


class QuestionEncoder:
    """Conversations → Questions for the model.

    Args:
        speaker: its tokenizer and context are used.
        max_new_tokens: the part of the context reserved for an answer.
    """

    def __init__(self, speaker: ChatModel, max_new_tokens: int):
        self.speaker, self.max_new_tokens = speaker, max_new_tokens
        self.encoder = ConversationEncoder(speaker.tokenizer, speaker.template, speaker.context)

    def __call__(self, conversation: Conversation) -> tuple[Question, bool]:
        """The question, and whether it was cut to the context. Raises RecordError if it cannot be asked."""
        where = conversation.where
        prompt, reference = question_of(conversation)
        try:
            self.speaker.encode(prompt, self.max_new_tokens)
        except ChatModelError as error:
            message = str(error).removeprefix(f"{where}: ")
            if isinstance(error.__cause__, TooLongError):
                raise TooLongError(where, "question too long", message) from error
            raise RecordError(where, getattr(error.__cause__, "reason", "question refused"), message) from error
        example, cut = self.encoder(conversation)
        return Question(prompt, reference, example), cut


@torch.no_grad()
def reference_losses(speaker: ChatModel, examples: Sequence[Example], batch_size: int) -> list[tuple[float, int]]:
    """(negative log-likelihood in nats, number of labels) of each example, as in the stage's validation.

    Raises:
        ChatModelError: for a loss that is not finite.
    """
    collate, keep = PaddedCollator(speaker.tokenizer.pad_token_id), takes_kept_logits(speaker.model)
    device = speaker.model.get_input_embeddings().weight.device
    scaled = (rotations(speaker.base.config.get_text_config()) or {}).get("rope_type")
    size = 1 if scaled == "dynamic" else batch_size  # such positions depend on the longest row of a batch

    def losses_of(batch: list[int]) -> list[tuple[float, int]]:
        inputs = {name: value.to(device) for name, value in collate([examples[index] for index in batch]).items()}
        with settled_rotations(speaker.base, inputs["input_ids"].shape[1]):
            logits, targets = label_logits(speaker.model, inputs, keep)
        losses = document_sums(token_nll(logits, targets), inputs)
        if not torch.isfinite(losses).all():
            raise ChatModelError(
                "--model_name_or_path: gives a loss that is NaN or infinite; load it with --torch_dtype bfloat16 or "
                "float32"
            )
        counts = (targets != IGNORE_INDEX).sum(dim=1)
        return list(zip(losses.tolist(), counts.tolist(), strict=True))

    return in_batches([len(example.input_ids) for example in examples], size, "perplexity", losses_of)


def answers_to(
    speaker: ChatModel, questions: Sequence[Question], sampling: SamplingArguments, batch_size: int
) -> list[Answer]:
    """The answer to each question, in order."""

    def answers_of(batch: list[int]) -> list[Answer]:
        return speaker.answers([questions[index].prompt for index in batch], sampling, batch_size=batch_size)

    lengths = [len(speaker.encode(question.prompt, sampling.max_new_tokens)) for question in questions]
    return in_batches(lengths, batch_size, "answers", answers_of)


def rewards_of(
    scorer: Scorer,
    speaker: ChatModel,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    max_new_tokens: int,
    batch_size: int,
) -> list[float]:
    """The reward model's score of each answer, as in PPO."""
    prompts = [speaker.encode(question.prompt, max_new_tokens) for question in questions]

    def scores_of(batch: list[int]) -> list[float]:
        scores = scorer(
            [questions[index].prompt for index in batch],
            [prompts[index] for index in batch],
            [list(answers[index].token_ids) for index in batch],
        )
        return scores.tolist()

    return in_batches([len(prompt) for prompt in prompts], batch_size, "scores", scores_of)


def answer_rows(
    speaker: ChatModel,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    losses: Sequence[tuple[float, int]],
    rewards: Sequence[float] | None,
) -> list[dict[str, Any]]:
    """A row of answers.jsonl for each question: the texts and every number of SFT_METRICS."""
    rows = []
    for number, (question, answer, (nll, tokens)) in enumerate(zip(questions, answers, losses, strict=True)):
        language = language_of(question.reference)
        text = answer.text.strip()
        row: dict[str, Any] = {
            "where": question.prompt.where,
            "language": language,
            "system": question.prompt.system,
            "prompt": [{"role": m.role, "content": m.content} for m in question.prompt.messages],
            "reference": question.reference,
            "answer": answer.text,
            "ended": int(answer.ended),
            "answer_tokens": len(answer.token_ids) - answer.ended,
            "reference_tokens": len(speaker.tokenizer.encode(question.reference, add_special_tokens=False)),
            "answer_characters": len(text),
            "nll": nll,
            "tokens": tokens,
            "perplexity": perplexity(nll / tokens),
            **rouge(text, question.reference, language),
            **bleu_counts(text, question.reference.strip(), language),
        }
        if rewards is not None:
            row["reward"] = rewards[number]
        rows.append(row)
    return rows
