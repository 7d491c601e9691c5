"""PPO's evaluation: the model answers the validation prompts, and its responses are scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers.trainer_utils import EvalLoopOutput

from stagewise.formats.json_lines import write_json_lines
from stagewise.inference.sampling import EVALUATION, repetition
from stagewise.training.metrics import perplexity, standard_error
from stagewise.training.sample_generations import Sample, Text, choose_examples

COLUMNS = ("score", "kl", "length", "nll", "ended", "repetition")


class EvaluatesAnswers:
    """Mixin for a Trainer with prompts as its validation set, and methods to `generate`, `score` and `judge`."""

    eval_answers = 1  # per prompt; the means over its responses
    answers: list[dict[str, Any]]  # of the last evaluation; during one, those of this process

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Answers validation prompts, with the same random numbers each time: COLUMNS, (B, 6), and index, (B,).

        A prompt's row is the mean over its `eval_answers` responses.
        """
        keys = [(i, number) for i in inputs["index"].tolist() for number in range(self.eval_answers)]
        prompts = [self.eval_dataset.examples[i] for i, _ in keys]
        answers = self.generate(prompts, [(EVALUATION, *key) for key in keys])
        scores, lengths = self.score("validation", prompts, answers), [len(answer) for answer in answers]
        judged = [self.judge(batch, 1.0) for batch in self.batches_of(prompts, answers)]
        logps, _, reference, plain = (torch.cat(parts) for parts in zip(*judged, strict=True))
        kl, nll = (torch.stack([row.sum() for row in flat.split(lengths)]) for flat in (logps - reference, -plain))
        repeated = scores.new_tensor([repetition(answer) for answer in answers])
        rows = torch.stack([scores, kl, scores.new_tensor(lengths), nll, self.ended(answers).float(), repeated], dim=1)
        rows = rows.unflatten(0, (-1, self.eval_answers)).mean(dim=1)
        said = zip(keys, prompts, answers, scores.tolist(), self.ended(answers).tolist(), strict=True)
        for (_, number), prompt, answer, score, ended in said:
            text = self.processing_class.decode(answer, skip_special_tokens=True)
            self.answers.append(
                {"where": prompt.where, "number": number, "answer": text, "score": score, "ended": ended}
            )
        return None, rows, inputs["index"]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Collects the responses of all processes in `answers`."""
        self.answers = []
        output = super().evaluation_loop(*args, **kwargs)
        # Processes get whole batches, so the last ones may repeat a record.
        answers = {(answer["where"], answer["number"]): answer for answer in gather_object(self.answers)}
        self.answers = list(answers.values())
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """With --save_eval_records also writes the responses' texts: eval_records/answers-step-N.jsonl."""
        metrics = super().evaluate(*args, **kwargs)
        if self.args.save_eval_records and self.args.should_save:
            path = Path(self.args.output_dir) / "eval_records" / f"answers-step-{self.state.global_step}.jsonl"
            write_json_lines(path, self.answers)
        return metrics

    def eval_samples(self, count: int, stops: Sequence[str], synced: bool = False) -> list[Sample]:
        """Some of the responses that the last evaluation scored (--eval_samples)."""
        answers = {answer["where"]: answer for answer in self.answers if answer["number"] == 0}
        samples = []
        for place in choose_examples(self, count):
            prompt = self.eval_dataset.examples[place]
            own = answers[prompt.where]
            text = Text("answer", own["answer"], own["score"], own["ended"])
            samples.append(Sample(prompt.where, self.processing_class.decode(prompt.input_ids), [text]))
        return samples


def answer_metrics(rows: np.ndarray) -> dict[str, float]:
    """COLUMNS of all responses -> their means, and the perplexity of their tokens under the reference."""
    means = dict(zip(COLUMNS, rows.mean(axis=0).tolist(), strict=True))
    return {
        "reward": means["score"],
        "reward_standard_error": standard_error(rows[:, 0]),
        "reference_perplexity": perplexity(means["nll"] / means["length"]),
        **{name: means[name] for name in ("kl", "length", "ended", "repetition")},
    }
