"""PPO: its losses by hand, and the stage through its command line on tiny models."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import ppo_training
from stagewise.losses import adapted_kl_coef, gae, kl_to_older, moments, ppo_policy_loss, value_loss, whiten
from tests.conftest import adapter_weights, build_tiny_tokenizer
from tests.launching import run as run_command
from tests.launching import torchrun
from tools import judging

ROOT = Path(__file__).resolve().parent.parent
CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
QUESTIONS = ["fever", "how much water a day", "I sleep badly", "my knee", "is sugar bad", "rest", "tea", "can I run"]


# ── losses ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_gae_by_hand():
    rewards = torch.tensor([[0.0, -0.1, 1.0], [0.5, 2.0, 9.0]])
    values = torch.tensor([[0.5, 0.4, 0.2], [1.0, -1.0, 7.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    # row 1: errors -0.14, -0.32, 0.8; each later one counts 0.72 of the one before
    # row 2: errors -1.4, 3.0; what stands after its last token counts nothing
    torch.testing.assert_close(advantages, torch.tensor([[0.04432, 0.256, 0.8], [0.76, 3.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.54432, 0.656, 1.0], [1.76, 2.0, 0.0]]))


def test_gae_against_the_sum_it_stands_for():
    """A(t) = sum over l of (gamma lam)^l (r(t+l) + gamma V(t+l+1) - V(t+l)), in float64."""
    generator = np.random.default_rng(0)
    rewards, values = generator.normal(size=(4, 9)), generator.normal(size=(4, 9))
    lengths, gamma, lam = [9, 1, 4, 8], 0.97, 0.9
    mask = torch.tensor([[t < length for t in range(9)] for length in lengths])
    advantages, returns = gae(torch.tensor(rewards), torch.tensor(values), mask, gamma, lam)
    for row, length in enumerate(lengths):
        v = [*values[row, :length], 0.0]
        errors = [rewards[row, t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, length))
            assert advantages[row, t].item() == pytest.approx(expected, rel=1e-9)
            assert returns[row, t].item() == pytest.approx(expected + v[t], rel=1e-9)
        assert not advantages[row, length:].any() and not returns[row, length:].any()


def test_gae_with_lambda_1_is_return_less_value():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.3, 0.2, 0.1]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([[7.0, 6.0, 4.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[6.7, 5.8, 3.9]]))


def test_policy_loss_by_hand():
    ratios, advantages = torch.tensor([1.5, 0.5, 1.1, 0.5]), torch.tensor([1.0, 1.0, -2.0, -1.0])
    old = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    losses, clipped = ppo_policy_loss(old + ratios.log(), old, advantages, clip=0.2)
    torch.testing.assert_close(losses, torch.tensor([-1.2, -0.5, 2.2, 0.8]))
    assert clipped.tolist() == [True, False, False, True]


def test_a_clipped_token_has_no_gradient():
    logps = torch.tensor([0.5, -0.1], requires_grad=True)
    losses, _ = ppo_policy_loss(logps, torch.zeros(2), torch.tensor([1.0, 1.0]), clip=0.2)
    losses.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([0.0, -math.exp(-0.1)]))


def test_value_loss_by_hand():
    values, returns = torch.tensor([1.0, 0.1, -1.0]), torch.tensor([2.0, 0.0, -0.1])
    losses = value_loss(values, torch.zeros(3), returns, clip=0.2)
    # (0.2 - 2)² is the larger one; both are the same; (-1 + 0.1)² is the larger one
    torch.testing.assert_close(losses, torch.tensor([1.62, 0.005, 0.405]))


def test_whitening():
    whitened = whiten(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    torch.testing.assert_close(whitened, torch.tensor([-2.0, -1.0, 0.0, 3.0]) / math.sqrt(3.5))
    assert whiten(torch.full((3,), 0.7)).abs().max() < 1e-3
    # two processes: each whitens its part by what both have
    both = moments(torch.tensor([1.0, 2.0])) + moments(torch.tensor([3.0, 6.0]))
    torch.testing.assert_close(whiten(torch.tensor([3.0, 6.0]), both), whitened[2:])


def test_kl_coefficient_by_the_formula():
    assert adapted_kl_coef(0.2, kl=6.0, target=6.0) == 0.2
    assert adapted_kl_coef(0.2, kl=6.3, target=6.0) == pytest.approx(0.201)  # error 0.05
    assert adapted_kl_coef(0.2, kl=60.0, target=6.0) == pytest.approx(0.204)  # clipped at 0.2
    assert adapted_kl_coef(0.2, kl=0.0, target=6.0) == pytest.approx(0.196)  # clipped at -0.2


def test_kl_to_older():
    moved = kl_to_older(torch.tensor([-1.0, math.log(2), -math.log(2)]), torch.tensor([-1.0, 0.0, 0.0]))
    torch.testing.assert_close(moved, torch.tensor([0.0, 1 - math.log(2), math.log(2) - 0.5]))


# ── the stage ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def words(tmp_path, tiny_checkpoint):
    """words("out", family="llama", save_steps=3): flags of a short run; None leaves a flag out."""
    tokenizer = build_tiny_tokenizer(chat_template=CHAT)
    made = {}

    def checkpoint(family, **kwargs):
        if (family, *kwargs) not in made:
            made[family, *kwargs] = tiny_checkpoint(family, tokenizer=tokenizer, **kwargs)
        return made[family, *kwargs]

    def record(question):
        turns = [("human", "hello"), ("gpt", "hi"), ("human", question), ("gpt", "see a doctor")]
        turns = turns if len(question) > 7 else turns[2:]
        return {"conversations": [{"from": who, "value": value} for who, value in turns]}

    for split, questions in (("train", QUESTIONS), ("validation", [f"what about {q}" for q in QUESTIONS[:5]])):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.jsonl").write_text("".join(json.dumps(record(q)) + "\n" for q in questions))

    def make(out, family="llama", **changes):
        flags = {
            "model_name_or_path": checkpoint(family),
            "reward_model_name_or_path": checkpoint("qwen3", task="score"),
            "train_file_dir": tmp_path / "train",
            "validation_file_dir": tmp_path / "validation",
            "output_dir": tmp_path / out,
            "max_source_length": 200,
            "max_target_length": 8,
            "batch_size": 4,
            "mini_batch_size": 2,
            "ppo_epochs": 2,
            "rollouts": 3,
            "per_device_eval_batch_size": 3,
            "learning_rate": 2e-3,
            "lora_dropout": 0,
            "logging_steps": 1,
            "report_to": "none",
            **changes,
        }
        return [word for name, value in flags.items() if value is not None for word in (f"--{name}", value)]

    return make


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def state(folder):
    return torch.load(folder / "ppo_state.pt", weights_only=True)


def rows(folder, step):
    lines = (folder / "eval_records" / f"step-{step}.jsonl").read_text().splitlines()
    return {row.pop("where"): row for row in map(json.loads, lines)}


def assert_same_weights(found, expected, **tolerance):
    found, expected = ({**adapter_weights(f), **state(f)["value_head"]} for f in (found, expected))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **tolerance)


class LikesEvenTokens(ppo_training.PPOTrainer):
    """Its reward is the share of an answer's tokens whose number is even: by chance one half."""

    def score(self, split, prompts, answers):
        return torch.tensor([sum(token % 2 == 0 for token in answer) / len(answer) for answer in answers])


def shuffled(trainer_class):
    """The same with the scores of a training rollout dealt to other answers; those of validation stay true."""

    class Trainer(trainer_class):
        def score(self, split, prompts, answers):
            scores = super().score(split, prompts, answers)
            order = np.random.default_rng([self.args.seed, 99, self.rollouts]).permutation(len(answers))
            return scores[torch.from_numpy(order)] if split == "train" else scores

    return Trainer


@pytest.mark.parametrize("family", ["llama", "bloom", "qwen3_5", "mixtral"])
def test_a_run_leaves_what_every_stage_leaves(family, stage, words):
    out = stage(
        "ppo_training", *words("out", family, report_to="tensorboard"), "--eval_on_start", "--save_eval_records"
    )
    manifest = json.loads((out / "run.json").read_text())
    assert (manifest["status"], manifest["stage"], manifest["steps"]) == ("finished", "ppo", 12)
    assert manifest["data"]["train"]["kept"] == 8 and manifest["data"]["validation"]["kept"] == 5
    assert all("lora_" in name for name in adapter_weights(out))
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    assert list((out / "logs").iterdir())
    logs = [log for log in history(out) if "policy_loss" in log]
    assert [log["step"] for log in logs] == list(range(1, 13))
    rollouts = [log for log in logs if "reward" in log]
    assert [log["step"] for log in rollouts] == [1, 5, 9], "the log says once what a rollout was like"
    names = {"reward", "reward_std", "kl", "kl_coef", "length", "repetition", "ended", "clip_fraction", "value_loss"}
    assert names < rollouts[0].keys()
    assert rollouts[0]["kl"] == pytest.approx(0, abs=1e-4) and rollouts[0]["clip_fraction"] == 0
    assert [log["kl_coef"] for log in rollouts] == pytest.approx([0.2, 0.2 * 0.98, 0.2 * 0.98**2], rel=1e-6)
    assert [log["epoch"] for log in rollouts] == [0.5, 1.0, 1.5]

    before, after = rows(out, 0), rows(out, 12)
    assert before.keys() == after.keys() == {f"a.jsonl:{n}" for n in range(1, 6)}
    assert all(abs(row["kl"]) < 1e-3 for row in before.values()), "the untrained adapter is the reference"
    last = [log for log in history(out) if "eval_reward" in log][-1]
    assert last["eval_reward"] == pytest.approx(np.mean([row["score"] for row in after.values()]), rel=1e-5)
    nats, tokens = (sum(row[name] for row in after.values()) for name in ("nll", "length"))
    assert last["eval_reference_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    answers = [json.loads(line) for line in (out / "eval_records" / "answers-step-12.jsonl").read_text().splitlines()]
    assert {a["where"]: pytest.approx(a["score"]) for a in answers} == {w: row["score"] for w, row in after.items()}
    assert all(isinstance(a["answer"], str) for a in answers)


def test_evaluation_numbers_are_those_of_the_answer_alone(stage, words, tiny_model, monkeypatch):
    """nll under the model without its adapter, by a plain forward pass over prompt and answer."""
    seen = {}

    class Trainer(ppo_training.PPOTrainer):
        def batches_of(self, prompts, answers):
            seen.update({p.where: (p.input_ids, a) for p, a in zip(prompts, answers, strict=True)})
            return super().batches_of(prompts, answers)

    monkeypatch.setattr(ppo_training, "PPOTrainer", Trainer)
    out = stage("ppo_training", *words("out", temperature=0.8, learning_rate=0.02), "--save_eval_records")
    base = tiny_model("llama")
    for where, row in rows(out, 12).items():
        prompt, answer = seen[where]
        logits = base(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        nll = -logits.log_softmax(-1)[range(len(answer)), answer].sum()
        assert row["nll"] == pytest.approx(nll.item(), rel=1e-4)
        assert row["length"] == len(answer) and row["ended"] == (answer[-1] == 2)


def test_a_prompts_numbers_are_the_means_of_its_answers(stage, words):
    out = stage("ppo_training", *words("out", temperature=0.8, eval_answers=3), "--save_eval_records")
    path = out / "eval_records" / "answers-step-12.jsonl"
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 15 and len({answer["answer"] for answer in answers}) > 5, "each has its own random numbers"
    for where, row in rows(out, 12).items():
        scores = {answer["number"]: answer["score"] for answer in answers if answer["where"] == where}
        assert scores.keys() == {0, 1, 2}
        assert row["score"] == pytest.approx((scores[0] + scores[1] + scores[2]) / 3, rel=1e-5)


def test_it_learns_what_is_rewarded(stage, words, tmp_path, monkeypatch):
    many = [{"messages": [{"role": "user", "content": f"number {n}"}]} for n in range(30)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(record) + "\n" for record in many))
    flags = {"batch_size": 8, "mini_batch_size": 8, "ppo_epochs": 4, "rollouts": 90, "learning_rate": 1e-2}
    flags |= {"validation_file_dir": tmp_path / "many.jsonl", "per_device_eval_batch_size": 30, "max_target_length": 4}
    flags |= {"init_kl_coef": 0.01, "logging_steps": 100}

    def gain(trainer, out):
        monkeypatch.setattr(ppo_training, "PPOTrainer", trainer)
        folder = stage("ppo_training", *words(out, **flags), "--eval_on_start", "--save_eval_records")
        before, after = rows(folder, 0), rows(folder, 360)
        return np.mean([after[where]["score"] - before[where]["score"] for where in before])

    assert gain(LikesEvenTokens, "true") > 0.2
    assert abs(gain(shuffled(LikesEvenTokens), "shuffled")) < 0.15


@pytest.mark.real
@pytest.mark.timeout(3600)
def test_shuffled_rewards_do_not_pass_the_reports_line(stage, tmp_path, monkeypatch):
    """The pipeline's PPO once more, by the command in its run.json, on the models that are there: with its rewards
    dealt to other answers the line that the report judges by does not hold.
    """
    outputs = Path(os.environ.get("OUTPUTS", ROOT / "outputs"))
    if not (outputs / "ppo" / "eval_records").is_dir():
        pytest.skip(f"{outputs} holds no PPO run of the pipeline: bash run_pipeline.sh makes it; OUTPUTS names others")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ppo_training, "PPOTrainer", shuffled(ppo_training.PPOTrainer))
    words = json.loads((outputs / "ppo" / "run.json").read_text())["command"][1:]
    dealt = stage("ppo_training", *words, "--report_to", "none", "--output_dir", tmp_path / "dealt")
    assert reward_line(outputs / "ppo").holds
    assert not reward_line(dealt).holds, reward_line(dealt)


def reward_line(folder):
    """What the report says of the mean reward on the English prompts."""
    steps = sorted(int(path.stem.removeprefix("step-")) for path in (folder / "eval_records").glob("step-*"))
    return judging.ppo(*(judging.in_language(rows(folder, step), "english") for step in (steps[0], steps[-1])))[0]


def test_checkpoints_stand_at_the_ends_of_rollouts_and_resume_there(stage, words):
    flags = words("whole", save_steps=3, rollouts=4, lora_dropout=0.3, eval_strategy="steps", eval_steps=5)
    whole = stage("ppo_training", *flags)
    # asked for after 3, 6, 9, 12 and 15 updates, of which a rollout has four
    assert {path.name for path in whole.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-12", "checkpoint-16"}
    assert [log["step"] for log in history(whole) if "eval_reward" in log] == [8, 12, 16]
    assert state(whole / "checkpoint-8")["rollouts"] == 2
    stopped = whole.parent / "stopped"
    (stopped).mkdir()
    shutil.copytree(whole / "checkpoint-8", stopped / "checkpoint-8")
    flags[flags.index("--output_dir") + 1] = stopped
    resumed = stage("ppo_training", *flags, "--resume_from_checkpoint", "True")
    assert_same_weights(resumed, whole, rtol=0, atol=0)
    assert state(resumed)["kl_coef"] == state(whole)["kl_coef"] != 0.2
    assert state(resumed)["rollouts"] == 4
    for log, other in zip(history(whole), history(resumed), strict=True):
        assert log.get("loss") == other.get("loss") and log["epoch"] == other["epoch"]


def test_a_signal_waits_for_the_end_of_the_rollout(stage, words, monkeypatch):
    import signal

    class Trainer(ppo_training.PPOTrainer):
        def end_update(self):
            if self.state.global_step == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            super().end_update()

    whole = stage("ppo_training", *words("whole"))
    monkeypatch.setattr(ppo_training, "PPOTrainer", Trainer)
    flags = words("stopped")
    with pytest.raises(SystemExit) as ended:
        stage("ppo_training", *flags)
    assert ended.value.code == 143
    stopped = whole.parent / "stopped"
    assert [path.name for path in stopped.glob("checkpoint-*")] == ["checkpoint-8"]
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", ["ppo_training.py", *map(str, flags), "--resume_from_checkpoint", "True"])
    ppo_training.main()
    assert_same_weights(stopped, whole, rtol=0, atol=0)


def test_early_stopping_leaves_updates_out_but_no_rollout(stage, words):
    fast = {"learning_rate": 0.05, "ppo_epochs": 4, "rollouts": 4, "target_kl": 0.5, "save_steps": 1}
    free = stage("ppo_training", *words("free", **fast))
    held = stage("ppo_training", *words("held", **fast, early_stopping=True))
    steps = [json.loads((folder / "run.json").read_text())["steps"] for folder in (free, held)]
    assert steps[0] == 32 and 4 <= steps[1] < 32
    assert state(free)["rollouts"] == state(held)["rollouts"] == 4
    # a run that is stopped and resumed among such rollouts is no different
    third = max(held.glob("checkpoint-*"), key=lambda path: state(path)["rollouts"] == 3)
    resumed = held.parent / "resumed"
    resumed.mkdir()
    shutil.copytree(third, resumed / third.name)
    stage("ppo_training", *words("resumed", **fast, early_stopping=True), "--resume_from_checkpoint", "True")
    assert_same_weights(resumed, held, rtol=0, atol=0)


def test_the_adapter_merges_and_the_value_head_stays_out_of_it(stage, words, tmp_path):
    out = stage("ppo_training", *words("out"))
    stage("merge_peft_adapter", "--lora_model", out, "--output_dir", tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "run.json").read_text())["status"] == "finished"
    assert not [name for name in adapter_weights(tmp_path / "merged") if "value_head" in name]
    assert set(state(out)["value_head"]) == {"weight", "bias"}
    assert state(out)["value_head"]["weight"].abs().sum() > 0


def test_full_training_holds_a_frozen_copy_as_reference(stage, words):
    from transformers import AutoModelForCausalLM

    flags = words("out", use_peft=False, lora_dropout=None, save_steps=3)
    out = stage("ppo_training", *flags, "--eval_on_start")
    first, last = (log for log in history(out) if "eval_kl" in log)
    assert first["eval_kl"] == pytest.approx(0, abs=1e-4) and abs(last["eval_kl"]) > 1e-3
    assert not [name for name in adapter_weights(out) if "value_head" in name]
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    whole = {name: value.clone() for name, value in adapter_weights(out).items()}
    for path in (*out.glob("checkpoint-12"), *out.glob("*.safetensors"), out / "run.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    stage("ppo_training", *flags, "--resume_from_checkpoint", "True")
    for name, value in adapter_weights(out).items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=0)


def test_an_sft_adapter_is_merged_into_policy_and_reference(stage, words, tmp_path):
    from stagewise.adapters.attach import attach_adapter
    from stagewise.config.arguments import AdapterArguments, ModelArguments
    from stagewise.models.loading import load_causal_lm

    flags = words("out")
    base = flags[flags.index("--model_name_or_path") + 1]
    model = attach_adapter(load_causal_lm(ModelArguments(str(base))), AdapterArguments(), "CAUSAL_LM")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "sft")
    out = stage("ppo_training", *flags, "--checkpoint_dir", tmp_path / "sft", "--eval_on_start", "--save_eval_records")
    plain = stage("ppo_training", *words("plain"), "--eval_on_start", "--save_eval_records")
    merged, alone = rows(out, 0), rows(plain, 0)
    assert all(abs(row["kl"]) < 1e-3 for row in merged.values()), "the reference holds it, too"
    assert all(merged[where]["nll"] != alone[where]["nll"] for where in merged)
    assert json.loads((out / "run.json").read_text())["lineage"][-1]["merged_adapter"] == str(tmp_path / "sft")


def test_updates_see_the_advantages_of_their_own_rollout(stage, words, monkeypatch):
    """Scores whitened over the rollout, KL penalty, GAE and whitening, put together again from the trainer's parts."""
    caught = {}

    class Trainer(ppo_training.PPOTrainer):
        def estimate_advantages(self, prompts, answers, scores):
            coefficient = self.kl_coef
            batches = super().estimate_advantages(prompts, answers, scores)
            with torch.no_grad():
                reference = torch.cat([self.policy.reference_logps(batch)[0] for batch in batches])
            caught[self.rollouts] = (answers, scores, coefficient, batches, reference)
            return batches

    monkeypatch.setattr(ppo_training, "PPOTrainer", Trainer)
    stage("ppo_training", *words("out", learning_rate=0.02, missing_eos_penalty=1.5, gamma=0.99))
    for answers, scores, coefficient, batches, reference in caught.values():
        flat = {k: torch.cat([b[k] for b in batches]).double().numpy() for k in
                ("old_logps", "old_values", "advantages", "returns")}  # fmt: skip
        scored = scores.double().numpy() - 1.5 * np.array([answer[-1] != 2 for answer in answers])
        scored = (scored - scored.mean()) / scored.std()
        expected, returns, start = [], [], 0
        for answer, score in zip(answers, scored, strict=True):
            span = slice(start, start + len(answer))
            rewards = -coefficient * (flat["old_logps"][span] - reference.double().numpy()[span])
            rewards[-1] += score
            values = [*flat["old_values"][span], 0.0]
            errors = [rewards[t] + 0.99 * values[t + 1] - values[t] for t in range(len(answer))]
            for t in range(len(answer)):
                expected.append(sum((0.99 * 0.95) ** (k - t) * errors[k] for k in range(t, len(answer))))
                returns.append(expected[-1] + values[t])
            start += len(answer)
        expected = (np.array(expected) - np.mean(expected)) / np.std(expected)
        np.testing.assert_allclose(flat["advantages"], expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(flat["returns"], returns, rtol=1e-3, atol=1e-4)
    assert len(caught) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": 3}, "--batch_size 3: expected a multiple of --mini_batch_size 2"),
        ({"batch_size": 10, "mini_batch_size": 5}, "--batch_size 10: a rollout takes 10 prompts, there are 8"),
        ({"per_device_train_batch_size": 1}, "--mini_batch_size and --per_device_train_batch_size are the same"),
        ({"gradient_accumulation_steps": 3}, "--gradient_accumulation_steps: must divide a rollout's 4 minibatches"),
        ({"max_steps": 5}, "--rollouts and --max_steps both say how long"),
        ({"adap_kl_ctrl": False, "target_kl": 3}, "--target_kl has no effect without"),
        ({"batch_size": 1, "mini_batch_size": 1}, "one score cannot be whitened; give more prompts, or --reward_b"),
        ({"temperature": 0}, "--temperature: expected more than 0, found 0.0"),
        ({"mini_batch_size": 0}, "--batch_size 4: expected a multiple of --mini_batch_size 0"),
        ({"temperature": "nan"}, "--temperature: expected more than 0, found nan"),
        ({"target_kl": "nan"}, "--target_kl: expected more than 0, found nan"),
        ({"top_p": 1.2}, "--top_p: expected above 0, at most 1 (all tokens), found 1.2"),
        ({"top_p": 0}, "--top_p: expected above 0, at most 1 (all tokens), found 0.0"),
        ({"top_k": -1}, "--top_k: expected 0 or more, found -1"),
        ({"init_kl_coef": -0.1}, "--init_kl_coef: expected 0 or more, found -0.1"),
        ({"vf_coef": -1}, "--vf_coef: expected 0 or more, found -1.0"),
        ({"missing_eos_penalty": -1}, "--missing_eos_penalty: expected 0 or more, found -1.0"),
        ({"reward_baseline": "nan"}, "--reward_baseline: expected a finite number, found nan"),
        ({"dataloader_num_workers": 2}, "--dataloader_num_workers has no effect"),
        ({"reward_label": 4}, "--reward_label 4: the reward model has 0"),
        ({"reward_model_name_or_path": "./none"}, "--reward_model_name_or_path ./none"),
    ],
)
def test_flags_that_cannot_be_honoured_are_refused_by_name(flags, message, stage, words, capsys):
    with pytest.raises(SystemExit):
        stage("ppo_training", *words("out", **flags))
    assert message in capsys.readouterr().err


def test_the_command_of_an_earlier_pipeline(stage, words):
    """Its flags as they are: several steps by --max_steps, a baseline in place of whitening, --do_train."""
    flags = words("out", rollouts=None, mini_batch_size=None, ppo_epochs=None, max_steps=6, reward_baseline=0.0,
                  target_kl=0.1, model_type="llama", per_device_eval_batch_size=None)  # fmt: skip
    out = stage("ppo_training", *flags, "--do_train", "--early_stopping", "True")
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    assert state(out)["rollouts"] >= 2, "one update an epoch, four epochs a rollout"


def test_the_best_checkpoint_is_the_one_of_the_highest_reward(stage, words):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4}
    out = stage("ppo_training", *words("out", **best, learning_rate=0.05))
    rewards = {log["step"]: log["eval_reward"] for log in history(out) if "eval_reward" in log}
    kept = json.loads((out / "trainer_state.json").read_text())["best_model_checkpoint"]
    step = max(rewards, key=rewards.get)
    assert kept.endswith(f"checkpoint-{step}")
    assert json.loads((out / "run.json").read_text())["metrics"]["eval"]["eval_reward"] == rewards[step]
    saved, best = adapter_weights(out), adapter_weights(out / f"checkpoint-{step}")
    assert all(torch.equal(value, best[name]) for name, value in saved.items()), "it is what is saved at the end"


def test_a_dry_run_takes_no_step(stage, words):
    out = stage("ppo_training", *words("out"), "--dry_run")
    assert not out.exists()


def test_evaluation_alone(stage, words):
    out = stage("ppo_training", *words("out", rollouts=None, train_file_dir=None), "--do_eval")
    assert "eval_reward" in json.loads((out / "eval_results.json").read_text())


@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_two_processes_are_one_process_with_twice_the_batch(family, stage, words, tmp_path):
    # Plain gradient descent: Adam would hide a wrong scale, and blow rounding up.
    flags = {"optim": "sgd", "learning_rate": 0.5, "rollouts": 2, "eval_strategy": "steps", "eval_steps": 4}
    one = stage("ppo_training", *words("one", family, **flags), "--save_eval_records")
    halves = {"batch_size": 2, "mini_batch_size": 1, "per_device_eval_batch_size": 1}
    run_command(torchrun("ppo_training", *words("two", family, **flags, **halves), "--save_eval_records"))
    two = tmp_path / "two"
    assert_same_weights(two, one, rtol=1e-4, atol=1e-5)
    moved = adapter_weights(one)
    assert max(value.abs().max() for name, value in moved.items() if "lora_B" in name) > 1e-3
    for step in (4, 8):
        found, expected = rows(two, step), rows(one, step)
        assert found.keys() == expected.keys()
        for where, row in expected.items():
            assert found[where] == pytest.approx(row, rel=1e-3, abs=1e-3)
        texts = [(folder / "eval_records" / f"answers-step-{step}.jsonl").read_text() for folder in (one, two)]
        texts = [{a["where"]: a["answer"] for a in map(json.loads, text.splitlines())} for text in texts]
        assert texts[0] == texts[1]
    for log, other in zip(history(one), history(two), strict=True):
        for name in {"loss", "reward", "reward_std", "kl", "kl_coef", "clip_fraction", "length"} & log.keys():
            assert other[name] == pytest.approx(log[name], rel=1e-3, abs=1e-4), (name, log["step"])


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_deepspeed_trains_saves_and_resumes(stage, words, tmp_path):
    plain = stage("ppo_training", *words("plain"))
    halves = {"batch_size": 2, "mini_batch_size": 1}
    flags = words(
        "ds", **halves, deepspeed=ppo_training.__file__.replace("ppo_training.py", "zero2.json"), save_steps=4
    )
    run_command(torchrun("ppo_training", *flags))
    out = tmp_path / "ds"
    assert_same_weights(out, plain, rtol=2e-2, atol=2e-3)
    whole = {name: value.clone() for name, value in adapter_weights(out).items()}
    (out / "checkpoint-12" / "whole.json").unlink()
    for name in ("run.json", "adapter_model.safetensors", "adapter_config.json"):
        (out / name).unlink()
    run_command(torchrun("ppo_training", *flags, "--resume_from_checkpoint", "True"))
    for name, value in adapter_weights(out).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_zero3_is_refused_by_name(words):
    zero3 = ppo_training.__file__.replace("ppo_training.py", "zero3.json")
    with pytest.raises(AssertionError, match=r"cannot be sampled from partitioned weights \(ZeRO-3\); use zero2.json"):
        run_command(torchrun("ppo_training", *words("out", deepspeed=zero3)))
