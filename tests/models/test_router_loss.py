"""The routers' loss: what it is, that it is in a stage's loss when it is asked for, and what it does."""

import importlib
import json
import sys

import pytest
import torch
from packaging.version import Version

from stagewise.adapters.attach import attach_adapter
from stagewise.config.arguments import AdapterArguments, ModelArguments
from stagewise.errors import ArgumentError
from stagewise.models.hub import TRANSFORMERS
from stagewise.models.router_loss import RouterLoss, router_loss
from tests.adapters.test_compatibility import SCRIPTS
from tests.conftest import build_tiny_model
from tests.pair_runs import records as pair_records

ON = ("--router_aux_loss", "True", "--router_aux_loss_coef", "0.5")
# Mixtures of experts with the field that says how many there are.
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
}


def by_hand(scores: list[torch.Tensor], mask: list[bool], chosen: int) -> float:
    """The formula of the module's text, token by token, from the routers' scores: (tokens, experts) a layer."""
    experts = scores[0].shape[1]
    sent, probability, count = [0.0] * experts, [0.0] * experts, 0
    for layer in scores:
        for row, there in zip(layer.tolist(), mask, strict=True):
            if not there:
                continue
            count += 1
            exponents = [2.718281828459045**value for value in row]
            for expert, value in enumerate(exponents):
                probability[expert] += value / sum(exponents)
            for expert in sorted(range(experts), key=lambda e: -row[e])[:chosen]:
                sent[expert] += 1
    return experts * sum(s / count * p / count for s, p in zip(sent, probability, strict=True))


def scores_of(output, config):
    """A router returns scores, weights and indices, in an order that differs between versions of transformers."""
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    (scores,) = [tensor for tensor in output if tensor.is_floating_point() and tensor.shape[-1] == experts]
    return scores.detach()


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_formulas_without_padding(family, adapted):
    model = build_tiny_model(family, **FAMILIES[family])
    held = []
    for module in model.modules():
        if "Router" in type(module).__name__:
            module.register_forward_hook(lambda module, args, output: held.append(scores_of(output, model.config)))
    if adapted:
        model = attach_adapter(model, AdapterArguments(target_modules="q_proj,v_proj"), "CAUSAL_LM")
    router = RouterLoss(model, 3.0)
    ids = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    model.train()(input_ids=ids, attention_mask=mask, use_cache=False)
    assert len(held) == 2  # one a layer
    if family == "granitemoe" and Version(TRANSFORMERS) < Version("5.18"):  # its forward pass computes no loss there
        with pytest.raises(ArgumentError, match=rf"GraniteMoeForCausalLM of transformers {TRANSFORMERS} computes no"):
            router.take()
        return
    expected = by_hand([scores.reshape(18, -1) for scores in held], mask.flatten().bool().tolist(), 2)
    found = router.take()
    assert found.item() == pytest.approx(3 * expected, rel=1e-4)
    assert found.requires_grad
    assert router.seen.tolist() == pytest.approx([expected, 1], rel=1e-4)


def test_alike_experts_cost_as_many_as_a_token_goes_to():
    model = build_tiny_model("mixtral", num_experts_per_tok=2)
    router = RouterLoss(model, 1.0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # every expert has probability 1/4: E Σ (sent / tokens) / 4 = k
    model.train()(input_ids=torch.arange(4, 40)[None], use_cache=False)
    assert router.take().item() == pytest.approx(2)


def test_only_training_passes_ask_for_it():
    model = build_tiny_model("mixtral")
    router = RouterLoss(model, 1.0)
    ids = torch.arange(4, 20)[None]
    assert model.eval()(input_ids=ids).aux_loss is None
    with torch.no_grad():
        assert model.train()(input_ids=ids).aux_loss is None
    assert router.found is None
    assert model(input_ids=ids).aux_loss is not None


# ── in the stages ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def words(tmp_path, tiny_checkpoint):
    """words("sft", "out", flags …): a short run of a stage on a tiny Mixtral without dropout."""
    model, scorer = tiny_checkpoint("mixtral"), tiny_checkpoint("llama", task="score")

    def make(stage: str, out: str, *more, steps=2, **changes) -> list[str]:
        data = tmp_path / f"{stage}.jsonl"
        if stage == "pt":
            lines = [{"text": f"fever and water number {n} " * (1 + n % 3)} for n in range(8)]
        elif stage in ("rm", "dpo"):
            lines = pair_records(0, 6)
        else:
            turns = [("human", "what about fever"), ("gpt", "drink water and rest")]
            lines = [
                {"conversations": [{"from": w, "value": f"{t} {n}" * (1 + n % 2)} for w, t in turns]} for n in range(8)
            ]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        values = {
            "model_name_or_path": model,
            "train_file_dir": data,
            "output_dir": tmp_path / out,
            "per_device_train_batch_size": 2,
            "max_steps": steps,
            "learning_rate": 1e-3,
            "lora_dropout": 0,
            "logging_steps": 1,
            "report_to": "none",
            **({"block_size": 64} if stage == "pt" else {}),
            **({"model_max_length": 400} if stage == "sft" else {}),
        }
        if stage == "ppo":
            values |= {"reward_model_name_or_path": scorer, "max_target_length": 6, "batch_size": 4, "ppo_epochs": 2}
        flat = [str(word) for name, value in {**values, **changes}.items() for word in (f"--{name}", value)]
        return [*flat, *map(str, more)]

    return make


def logs(folder) -> list[dict]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("stage_name", ["pt", "sft", "dpo", "ppo"])
def test_it_is_in_the_loss_when_it_is_on_and_absent_when_off(stage_name, accumulated, stage, words):
    flags = {"gradient_accumulation_steps": accumulated}
    off = logs(stage(SCRIPTS[stage_name], *words(stage_name, "off", **flags)))
    on = logs(stage(SCRIPTS[stage_name], *words(stage_name, "on", *ON, **flags)))
    assert not [entry for entry in off if "router_loss" in entry]
    assert all(entry["router_loss"] > 2 for entry in on)  # two of four experts: 2 where all are used alike
    # both begin with the same weights and batches
    assert on[0]["loss"] - off[0]["loss"] == pytest.approx(0.5 * on[0]["router_loss"], abs=2e-4)
    assert on[1]["loss"] != pytest.approx(off[1]["loss"] + 0.5 * on[1]["router_loss"], abs=1e-7)  # it was learned from


def test_the_checkpoints_own_weight_counts_unless_another_is_given(stage, words, tiny_checkpoint):
    model = tiny_checkpoint("mixtral", router_aux_loss_coef=0.25)
    off = logs(stage(SCRIPTS["sft"], *words("sft", "off", model_name_or_path=model)))
    on = logs(stage(SCRIPTS["sft"], *words("sft", "on", "--output_router_logits", "True", model_name_or_path=model)))
    assert on[0]["loss"] - off[0]["loss"] == pytest.approx(0.25 * on[0]["router_loss"], abs=2e-4)


def test_experts_are_used_more_alike_with_it(stage, words):
    flags = {"fine_tuning_type": "full", "learning_rate": 1e-2}

    def run(out, *more):
        flat = words("pt", out, *more, steps=12, **flags)
        place = flat.index("--lora_dropout")
        return logs(stage(SCRIPTS["pt"], *flat[:place], *flat[place + 2 :]))

    # A weight that moves nothing shows where the run goes without the loss.
    without = run("without", "--router_aux_loss", "True", "--router_aux_loss_coef", "1e-12")
    with_it = run("with", "--router_aux_loss", "True", "--router_aux_loss_coef", "10")
    assert with_it[0]["router_loss"] == pytest.approx(without[0]["router_loss"])
    assert with_it[-1]["router_loss"] < 2.05 < 2.1 < without[-1]["router_loss"]


def test_gradient_checkpointing_changes_nothing(stage, words):
    plain = stage(SCRIPTS["sft"], *words("sft", "plain", *ON))
    saving = stage(SCRIPTS["sft"], *words("sft", "saving", *ON, "--gradient_checkpointing", "True"))
    for first, second in zip(logs(plain), logs(saving), strict=True):
        for name in ("loss", "router_loss", "grad_norm"):
            assert first[name] == pytest.approx(second[name], rel=1e-4)


def test_validation_is_without_it(stage, words, tmp_path):
    flags = {"validation_file_dir": tmp_path / "sft.jsonl", "eval_on_start": True}
    found = []
    for out, more in (("off", ()), ("on", ON)):
        state = json.loads(
            (stage(SCRIPTS["sft"], *words("sft", out, *more, **flags)) / "trainer_state.json").read_text()
        )
        found.append(next(entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry))
    assert found[0] == found[1]


# ── refused ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "family", "more", "message"),
    [
        ("sft", "llama", ON, "--router_aux_loss: 'llama' has no routers' loss"),
        ("dpo", "bloom", ON, "--router_aux_loss: 'bloom' has no routers' loss"),
        ("rm", "mixtral", ON, "--router_aux_loss: a reward model gives no routers' loss"),
        ("pt", "mixtral", ON[2:], "--router_aux_loss_coef has no effect without --router_aux_loss"),
        ("pt", "mixtral", (*ON[:3], "0"), "--router_aux_loss_coef: expected a number above 0, found 0"),
    ],
)
def test_where_it_cannot_act_it_is_refused_before_weights_load(
    name, family, more, message, words, tiny_checkpoint, monkeypatch, capsys
):
    module = importlib.import_module(SCRIPTS[name])
    for loader in ("load_causal_lm", "load_reward_model"):
        monkeypatch.setattr(module, loader, None, raising=False)
    flat = words(name, "out", *more, model_name_or_path=tiny_checkpoint(family))
    monkeypatch.setattr(sys, "argv", [f"{SCRIPTS[name]}.py", *flat])
    with pytest.raises(SystemExit):
        module.main()
    assert message in capsys.readouterr().err


def test_a_checkpoint_without_a_weight_for_it_needs_one():
    model = build_tiny_model("mixtral", router_aux_loss_coef=0.0)
    with pytest.raises(ArgumentError, match="the checkpoint's weight for it is 0.0; give one"):
        router_loss(model, ModelArguments("x", router_aux_loss=True))
    assert router_loss(model, ModelArguments("x", router_aux_loss=True, router_aux_loss_coef=0.1)).weight == 0.1
    assert router_loss(model, ModelArguments("x")) is None


def test_a_model_that_gives_none_is_named():
    model = build_tiny_model("mixtral")
    router = RouterLoss(model, 1.0)
    model.register_forward_hook(lambda module, args, output: setattr(output, "aux_loss", 0), prepend=True)
    model.train()(input_ids=torch.arange(4, 20)[None])
    with pytest.raises(ArgumentError, match="computes no router loss in its forward pass"):
        router.take()
