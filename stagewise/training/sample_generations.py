"""The model's answers to a few validation records at each evaluation: eval_samples/step-N.jsonl (--eval_samples).

The records are the same every time, spread from the longest to the shortest, and decoding is greedy, so evaluations
only differ by the training in between. No random number is drawn: training is not affected.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from loguru import logger
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, TrainerCallback

from stagewise.artifacts.eval_samples import sample_path
from stagewise.data.examples import IGNORE_INDEX, Example, PreferenceExample
from stagewise.formats.json_lines import write_json_lines
from stagewise.inference.sampling import adapters_folded, left_padded
from stagewise.models.attention.choose import attention_for_generation
from stagewise.models.attention.rope import context_of
from stagewise.reports.only_shown import errors_logged

LONGEST = 128  # tokens of such an answer
ROOM = LONGEST + 128  # tokens of the context reserved for an answer and virtual tokens
BEGINNING = 64  # tokens of a text that is continued


@dataclass(frozen=True)
class Text:
    """One of a sample's texts: "answer" and "reference", "chosen" and "rejected" …, with its score, if any."""

    label: str
    text: str
    score: float | None = None
    ended: bool = True  # False: the answer was cut after LONGEST tokens


@dataclass(frozen=True)
class Sample:
    where: str
    prompt: str
    texts: list[Text] = field(default_factory=list)


def evenly_spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers 0 to count - 1, evenly spread."""
    wanted = min(count, wanted)
    return [(2 * n + 1) * count // (2 * wanted) for n in range(wanted)]


def question_and_answer(example: Example) -> tuple[list[int], list[int], bool]:
    """An example's ids before its last span with labels, that span, and whether it is an answer.

    If the labels start at the beginning, as in texts, the first tokens take the place of the question.
    """
    ids, labels = example.input_ids, example.labels
    end = len(labels)
    while end and labels[end - 1] == IGNORE_INDEX:
        end -= 1
    start = end
    while start and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    if not end:  # a prompt
        return ids, [], True
    if start > 1:  # a start token alone is no prompt
        return ids[:start], ids[start:end], True
    cut = max(1, min(BEGINNING, end // 2))
    return ids[:cut], ids[cut : min(end, cut + LONGEST)], False


@torch.no_grad()
def greedy_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    stops: Sequence[str],
    longest: int = LONGEST,
    synced: bool = False,
) -> list[tuple[str, bool]]:
    """The greedy answer to each prompt, and whether it ended before the limit.

    Args:
        model: a causal language model, with any adapter or none; its mode is restored.
        tokenizer: of the model.
        prompts: token ids.
        stops: texts at which an answer ends, beside the tokenizer's end token.
        longest: tokens of an answer.
        synced: every process takes part, because each holds a shard of the weights (ZeRO-3).
    """
    markers = [(stop, tokenizer.encode(stop, add_special_tokens=False)) for stop in stops]
    ends = {ids[0] for _, ids in markers if len(ids) == 1} | {tokenizer.eos_token_id} - {None}
    several = [stop for stop, ids in markers if len(ids) > 1]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    how = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # overrides the model's own settings
        no_repeat_ngram_size=0,
        max_new_tokens=longest,
        use_cache=True,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    ids, mask = (tensor.to(model.device) for tensor in left_padded(prompts, pad_id))
    options = {"stop_strings": several, "tokenizer": tokenizer} if several else {}
    training = model.training
    model.eval()
    try:
        with attention_for_generation(), nullcontext() if synced else adapters_folded(model):
            rows = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=how, synced_gpus=synced, **options
            )
    finally:
        model.train(training)
    found = []
    for row in rows[:, ids.shape[1] :].tolist():
        length = next((place for place, token in enumerate(row) if token in ends), None)
        text = tokenizer.decode(row[:length], skip_special_tokens=True)
        cut = next((stop for stop in several if stop in text), None)
        found.append((text.split(cut)[0] if cut else text, length is not None or cut is not None))
    return found


def choose_examples(trainer: Any, count: int) -> list[int]:
    """The indices of the validation examples to show: at most `count` whose context leaves room for an answer."""
    examples = trainer.eval_dataset.examples
    context = context_of(trainer.model.config)
    places: list[int] = []
    for place in evenly_spread(len(examples), count):
        while place < len(examples) and context and len(question_of_example(examples[place])[0]) > context - ROOM:
            place += 1  # shorter ones follow
        if place < len(examples) and place not in places:
            places.append(place)
    return places


def question_of_example(example: Example | PreferenceExample) -> tuple[list[int], list[int], bool]:
    """`question_and_answer` of an example, or of a pair's chosen answer."""
    return question_and_answer(example.chosen if isinstance(example, PreferenceExample) else example)


def generate_samples(trainer: Any, places: Sequence[int], stops: Sequence[str], synced: bool) -> list[Sample]:
    """The model's answers to validation examples, and the reference answers."""
    tokenizer, model = trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model)
    found = [question_of_example(trainer.eval_dataset.examples[place]) for place in places]
    if not found:
        return []
    with trainer.accelerator.autocast():
        answers = greedy_answers(model, tokenizer, [ids for ids, _, _ in found], stops, synced=synced)
    samples = []
    for place, (ids, reference, answers_it), (text, ended) in zip(places, found, answers, strict=True):
        expected = tokenizer.decode(reference, skip_special_tokens=True)
        # LONGEST tokens may end within a character, whose part is dropped
        own = Text("answer", text if ended else text.rstrip("\ufffd"), ended=ended)
        texts = [own, Text("reference", expected, ended=answers_it)]
        samples.append(Sample(trainer.eval_dataset.wheres[place], tokenizer.decode(ids), texts))
    return samples


def scored_pairs(trainer: Any, places: Sequence[int]) -> list[Sample]:
    """Validation pairs with their rewards in the last evaluation."""
    tokenizer, table = trainer.processing_class, trainer.compute_metrics
    rewards = dict(zip(table.order.tolist(), table.rows.tolist(), strict=True))
    samples = []
    for place in places:
        pair = trainer.eval_dataset.examples[place]
        texts = []
        for label, side, reward in zip(
            ("chosen", "rejected"), (pair.chosen, pair.rejected), rewards[place], strict=True
        ):
            answer = tokenizer.decode(question_and_answer(side)[1], skip_special_tokens=True)
            texts.append(Text(label, answer, reward))
        samples.append(Sample(pair.where, tokenizer.decode(question_of_example(pair)[0]), texts))
    return samples


class EvaluationSamples(TrainerCallback):
    """Writes the samples of the stage's trainer (`trainer.eval_samples`) after each evaluation."""

    def __init__(self, trainer: Any, count: int, stops: Sequence[str], zero3: bool):
        self.trainer, self.count, self.stops, self.zero3 = trainer, count, stops, zero3

    def on_evaluate(self, args, state, control, **kwargs):
        if not (state.is_world_process_zero or self.zero3):
            return
        try:
            samples = self.trainer.eval_samples(self.count, self.stops, synced=self.zero3)
        except Exception as error:
            if self.zero3:  # the other processes wait in the middle of an answer
                raise
            logger.warning(f"--eval_samples: none at step {state.global_step}: {type(error).__name__}: {error}")
            return
        if state.is_world_process_zero and samples:
            with errors_logged("--eval_samples"):
                write_json_lines(sample_path(args.output_dir, state.global_step), map(asdict, samples))
