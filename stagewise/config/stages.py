"""The stages, and what the rest of the project needs to know about each; defined here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A stage of training.

    Args:
        name: short name in run.json, in output folders and on the command line: "sft".
        script: its script without ".py": "supervised_finetuning".
        title: for pages and model cards: "supervised finetuning".
        record: the kind of its data's records: text, conversation, pair or prompt.
        capacity_flag: the flag for the tokens of a packed row; None if rows are not packed.
        virtual_tokens: whether prompt tuning, P-tuning and prefix tuning are possible. They precede a text whose every
            position the stage reads; a reward is read at one position, and PPO samples answers and reads values.
        reference: whether the model is compared with itself without the adapter.
        chats: whether the merged model answers questions.
        curve: the metric of its training curve.
    """

    name: str
    script: str
    title: str
    record: str
    capacity_flag: str | None = None
    virtual_tokens: bool = False
    reference: bool = False
    chats: bool = False
    curve: str = "loss"

    @property
    def label(self) -> str:
        """ "SFT"."""
        return self.name.upper()

    @property
    def task(self) -> str:
        """PEFT's name for the task: SEQ_CLS for a reward model."""
        return "SEQ_CLS" if self.name == "rm" else "CAUSAL_LM"


STAGES = {
    stage.name: stage
    for stage in (
        Stage("pt", "pretraining", "continued pretraining", "text", capacity_flag="block_size", virtual_tokens=True),
        Stage(
            "sft",
            "supervised_finetuning",
            "supervised finetuning",
            "conversation",
            capacity_flag="model_max_length",
            virtual_tokens=True,
            chats=True,
        ),
        Stage("rm", "reward_modeling", "reward modeling", "pair"),
        Stage(
            "ppo",
            "ppo_training",
            "proximal policy optimization",
            "prompt",
            reference=True,
            chats=True,
            curve="reward",
        ),
        Stage(
            "dpo",
            "dpo_training",
            "direct preference optimization",
            "pair",
            virtual_tokens=True,
            reference=True,
            chats=True,
        ),
    )
}
BY_SCRIPT = {stage.script: stage for stage in STAGES.values()}
