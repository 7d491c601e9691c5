"""Scaled rotary positions against the papers' formulas in float64, through config, weights, adapter and merge."""

import json
import math
from copy import deepcopy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stagewise.config.arguments import ModelArguments, PairArguments
from stagewise.config.checks import check_shared
from stagewise.errors import ArgumentError, RopeError
from stagewise.models.attention.rope import (
    check_continued,
    context_of,
    kept_rope,
    restore_rope,
    scale_rope,
    write_rope,
)
from stagewise.models.config import load_config
from stagewise.models.loading import load_causal_lm
from tests.conftest import build_tiny_model, tiny_config

THETA, SIZE, CONTEXT = 10000.0, 16, 64
SHAPE = {"head_dim": SIZE, "max_position_embeddings": CONTEXT, "rope_parameters": {"rope_theta": THETA}}
SHORT = [1.0 + 0.05 * i for i in range(SIZE // 2)]
LONG = [1.5 + 0.5 * i for i in range(SIZE // 2)]

# --- the papers ------------------------------------------------------------------------------------------------------


def plain(theta: float = THETA) -> list[float]:
    return [theta ** (-2 * i / SIZE) for i in range(SIZE // 2)]


def linear(factor: float, length: int) -> tuple[list[float], float]:
    """Chen et al. 2023, equation 4: position m becomes m L / L', so that every frequency is divided by L' / L."""
    return [frequency / factor for frequency in plain()], 1.0


def dynamic(factor: float, length: int) -> tuple[list[float], float]:
    """NTK-aware scaling with a scale that follows the length: b' = b s^(d / (d - 2)), s = 1 within the context."""
    scale = factor * max(length, CONTEXT) / CONTEXT - (factor - 1)
    return plain(THETA * scale ** (SIZE / (SIZE - 2))), 1.0


def yarn(factor: float, length: int) -> tuple[list[float], float]:
    """Peng et al. 2023: by how often a dimension turns within the context; beta 1 and 32; section 3.4's temperature.

    The ramp runs over the dimension's index, between the indices (rounded outwards) where it turns 32 times and once,
    as the authors' program has it.
    """

    def index(turns: float) -> float:
        return SIZE * math.log(CONTEXT / (turns * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = max(math.floor(index(32)), 0), min(math.ceil(index(1)), SIZE - 1)
    found = []
    for i, frequency in enumerate(plain()):
        divided = min(max((i - low) / (high - low), 0.0), 1.0)
        found.append((1 - divided) * frequency + divided * frequency / factor)
    return found, 0.1 * math.log(factor) + 1


def longrope(factor: float, length: int) -> tuple[list[float], float]:
    """Ding et al. 2024: each frequency divided by its own factor; one list within the context and one beyond."""
    factors = LONG if length > CONTEXT else SHORT
    scale = math.sqrt(1 + math.log(factor) / math.log(CONTEXT))
    return [frequency / by for frequency, by in zip(plain(), factors, strict=True)], scale


PAPERS = {"linear": linear, "dynamic": dynamic, "yarn": yarn, "longrope": longrope}


@pytest.fixture
def factors_file(tmp_path):
    path = tmp_path / "factors.json"
    path.write_text(json.dumps({"short_factor": SHORT, "long_factor": LONG}))
    return str(path)


@pytest.fixture
def flags(factors_file):
    def make(kind, factor=4.0, name="m", **more):
        file = factors_file if kind == "longrope" else None
        return ModelArguments(str(name), rope_scaling=kind, rope_factor=factor, rope_factors_file=file, **more)

    return make


def rotary(model):
    return model.model.rotary_emb


def tables(frequencies: list[float], scale: float, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position, (T, SIZE), in float64."""
    angles = torch.arange(length, dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos() * scale, angles.sin() * scale


@pytest.mark.parametrize("length", [40, 64, 100, 256])
@pytest.mark.parametrize("family", ["llama", "qwen3", "falcon_rotary"])
@pytest.mark.parametrize("kind", PAPERS)
@torch.no_grad()
def test_positions_are_the_papers(kind, family, length, flags):
    shape = SHAPE if family != "falcon_rotary" else {**SHAPE, "hidden_size": 64}
    shape = {name: value for name, value in shape.items() if family != "falcon_rotary" or name != "head_dim"}
    config = tiny_config(family, **deepcopy(shape))
    scale_rope(config, flags(kind))
    model = AutoModelForCausalLM.from_config(config)
    inner = model.transformer if family == "falcon_rotary" else model.model
    found = inner.rotary_emb(torch.zeros(1), torch.arange(length)[None])
    expected = tables(*PAPERS[kind](4.0, length), length)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[0].double(), other, rtol=0, atol=2e-5 * max(1, length / 64))


@pytest.mark.parametrize("kind", PAPERS)
def test_the_base_frequency_stays(kind, flags):
    config = tiny_config("llama", **deepcopy(SHAPE))
    scale_rope(config, flags(kind))
    assert config.rope_parameters["rope_theta"] == THETA
    assert config.rope_parameters["rope_type"] == kind
    assert context_of(config) == 256
    # dynamic's formula and every reader of a linear factor start from the model's own context
    assert config.max_position_embeddings == (256 if kind in ("yarn", "longrope") else CONTEXT)


def test_windows_keep_their_positions(flags):
    config = tiny_config("gemma3", max_position_embeddings=CONTEXT)
    before = deepcopy(config.rope_parameters)
    scale_rope(config, flags("linear"))
    assert config.rope_parameters["sliding_attention"] == before["sliding_attention"]
    assert config.rope_parameters["full_attention"]["factor"] == 4
    assert config.rope_parameters["full_attention"]["rope_theta"] == before["full_attention"]["rope_theta"]


# --- the factor ------------------------------------------------------------------------------------------------------


def test_factor_of_the_rows_length():
    class Rows:
        block_size = 160

    for part, factor in ((Rows(), 2.5), (PairArguments(max_source_length=100, max_target_length=28), 2.0)):
        args, config = ModelArguments("m", rope_scaling="linear"), tiny_config("llama", **deepcopy(SHAPE))
        check_shared(args, part)
        scale_rope(config, args)
        assert config.rope_parameters["factor"] == factor


def test_scaling_again_with_the_same_type_counts_from_the_own_context(flags):
    for kind in ("linear", "yarn"):
        config = tiny_config("llama", **deepcopy(SHAPE))
        scale_rope(config, flags(kind, 2.0))
        scale_rope(config, flags(kind, 4.0))
        once = tiny_config("llama", **deepcopy(SHAPE))
        scale_rope(once, flags(kind, 4.0))
        assert config.to_dict() == once.to_dict()


def test_nothing_without_the_flag():
    config = tiny_config("llama", **deepcopy(SHAPE))
    before = config.to_dict()
    scale_rope(config, ModelArguments("m"))
    assert config.to_dict() == before


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bloom", "gpt2", "falcon"])
def test_a_model_without_rotary_positions_is_refused(family, flags):
    with pytest.raises(RopeError, match="--rope_scaling linear: .* has no rotary positions"):
        scale_rope(tiny_config(family), flags("linear"))


def test_a_model_scaled_in_another_way_is_refused(flags):
    config = tiny_config("llama", **deepcopy(SHAPE))
    scale_rope(config, flags("yarn", 2.0))
    with pytest.raises(RopeError, match="scaled by yarn already, yarn, factor 2"):
        scale_rope(config, flags("linear"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, 'Write {"short_factor": [...], "long_factor": [...]} to a file'),
        ("{", "not valid json"),
        ('{"short_factor": [1, 2], "long_factor": [1, 2]}', "short_factor: expected 8 numbers above 0.*2 values"),
        (json.dumps({"short_factor": SHORT, "long_factor": [0] * 8}), "long_factor: expected 8 numbers above 0"),
        ("[]", "found None"),
    ],
)
def test_longrope_says_how_its_factors_are_given(tmp_path, text, message):
    path = tmp_path / "wrong.json"
    path.write_text(text or "")
    args = ModelArguments("m", rope_scaling="longrope", rope_factor=4.0, rope_factors_file=text and str(path))
    with pytest.raises(RopeError, match=message.replace("{", "\\{").replace("[", "\\[") if text is None else message):
        scale_rope(tiny_config("llama", **deepcopy(SHAPE)), args)


@pytest.mark.parametrize(
    ("flags_", "message"),
    [
        ({"rope_scaling": "ntk"}, "--rope_scaling: expected one of linear, dynamic, yarn, longrope, found 'ntk'"),
        ({"rope_factor": 2.0}, "--rope_factor needs --rope_scaling"),
        ({"rope_scaling": "linear", "rope_factor": 1.0}, "--rope_factor: expected a number above 1"),
        ({"rope_scaling": "linear", "rope_factors_file": "f"}, "--rope_factors_file has no effect on linear"),
        ({"rope_factors_file": "f"}, "--rope_factors_file needs --rope_scaling"),
    ],
)
def test_flags_that_do_not_fit(flags_, message):
    with pytest.raises(ArgumentError, match=message):
        check_shared(ModelArguments("m", **flags_))


@pytest.mark.parametrize(
    ("length", "message"),
    [(None, "give --rope_factor"), (("--block_size", 64), "--block_size 64 is within the model's own context of 64")],
)
def test_no_factor_can_be_found(length, message):
    args = ModelArguments("m", rope_scaling="linear")
    args.rope_length = length
    with pytest.raises(RopeError, match=message):
        scale_rope(tiny_config("llama", **deepcopy(SHAPE)), args)


# --- loaded, kept, merged --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAPERS)
@torch.no_grad()
def test_it_is_set_before_the_weights_load(kind, flags, tiny_checkpoint):
    folder = tiny_checkpoint("llama", **deepcopy(SHAPE))
    model = load_causal_lm(flags(kind, name=folder), for_training=False)
    assert rotary(model).rope_type == kind
    ids = torch.arange(4, 204)[None]
    plain_model = load_causal_lm(ModelArguments(str(folder)), for_training=False)
    difference = (model(ids).logits - plain_model(ids).logits).abs().max()
    assert difference > 0.01
    model.save_pretrained(folder / "saved")
    again = AutoModelForCausalLM.from_pretrained(folder / "saved")
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("kind", PAPERS)
@torch.no_grad()
def test_config_json_in_both_ways_of_saying_it(kind, older, flags, tiny_checkpoint):
    folder = tiny_checkpoint("llama", **deepcopy(SHAPE))
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    if older:
        del raw["rope_parameters"]
        raw |= {"rope_theta": THETA, "rope_scaling": None}
    config = load_config(flags(kind, name=folder))
    write_rope(raw, config)
    path.write_text(json.dumps(raw))
    assert ("rope_parameters" in raw) is not older
    assert (raw["rope_theta"] if older else raw["rope_parameters"]["rope_theta"]) == THETA
    again = AutoConfig.from_pretrained(folder)
    assert again.rope_parameters == config.rope_parameters
    assert again.max_position_embeddings == config.max_position_embeddings


def test_what_run_json_keeps_is_enough(flags):
    for kind in PAPERS:
        config, fresh = (tiny_config("llama", **deepcopy(SHAPE)) for _ in range(2))
        scale_rope(config, flags(kind))
        restore_rope(fresh, json.loads(json.dumps(kept_rope(config))))
        assert fresh.to_dict() == config.to_dict()
    with pytest.raises(RopeError, match="which a bloom base has not"):
        restore_rope(tiny_config("bloom"), kept_rope(config))


def test_going_on_from_an_adapter_needs_the_same_scaling(flags):
    config = tiny_config("llama", **deepcopy(SHAPE))
    scale_rope(config, flags("linear"))
    kept = kept_rope(config)
    check_continued(flags("linear"), "peft_path", "a", kept)
    check_continued(ModelArguments("m"), "peft_path", "a", None)
    for other in (ModelArguments("m"), flags("linear", 2.0), flags("yarn")):
        with pytest.raises(RopeError, match="was trained with --rope_scaling linear --rope_factor 4; give the same"):
            check_continued(other, "peft_path", "a", kept)


@pytest.mark.parametrize(
    ("kind", "packed"), [("linear", True), ("dynamic", False), ("yarn", True), ("longrope", False)]
)
def test_a_stage_and_its_merge_keep_it(stage, kind, packed, tmp_path, tiny_checkpoint, factors_file):
    from merge_peft_adapter import main as merge

    base = tiny_checkpoint("llama", **deepcopy(SHAPE))
    data = tmp_path / "text.txt"
    data.write_text("drink water and rest when you have a fever " * 40)
    words = {"model_name_or_path": base, "train_file_dir": data, "output_dir": tmp_path / "out", "block_size": 128}
    words |= {"rope_factors_file": factors_file} if kind == "longrope" else {}
    words |= {"rope_scaling": kind, "max_steps": 1, "report_to": "none", "save_strategy": "no", "learning_rate": 0.01}
    out = stage("pretraining", *(word for name, value in words.items() for word in (f"--{name}", value)))
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["rope"]["rope_parameters"]["factor"] == 2
    assert manifest["rows"].startswith("packed" if packed else "padded")
    merge(["--lora_model", str(out), "--output_dir", str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert rotary(merged).rope_type == kind
    assert merged.config.rope_parameters["factor"] == 2
    assert merged.config.rope_parameters["rope_theta"] == THETA
    merged(torch.arange(4, 132)[None])
    expected = tables(*PAPERS[kind](2.0, 128), 128)
    found = rotary(merged)(torch.zeros(1), torch.arange(128)[None])
    torch.testing.assert_close(found[0][0].double(), expected[0], rtol=0, atol=1e-4)


def test_tiny_models_are_not_scaled_by_themselves():
    assert rotary(build_tiny_model("llama")).rope_type == "default"


PREFERENCE = {"question": "fever?", "response_chosen": "rest and drink", "response_rejected": "who cares"}


@pytest.fixture
def preferences(tmp_path, tiny_checkpoint):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PREFERENCE) + "\n")
    words = {"model_name_or_path": tiny_checkpoint("llama", **deepcopy(SHAPE)), "train_file_dir": path}
    words |= {"output_dir": tmp_path / "out", "max_steps": 1, "report_to": "none", "save_strategy": "no"}
    words |= {"max_source_length": 130, "max_target_length": 30}
    return lambda **more: [w for name, value in {**words, **more}.items() for w in (f"--{name}", value)]


def test_a_reward_models_adapter_is_put_on_a_base_scaled_as_in_its_training(stage, preferences):
    from stagewise.rl.reward_model import _adapter

    out = stage("reward_modeling", *preferences(rope_scaling="linear"))
    model, _, _ = _adapter(ModelArguments(str(out)), None)
    assert model.config.rope_parameters["factor"] == 2.5
    assert model.config.rope_parameters["rope_type"] == "linear"


def test_a_run_that_goes_on_says_what_it_needs(stage, preferences, tmp_path, capsys):
    out = stage("reward_modeling", *preferences(rope_scaling="linear", rope_factor=3))
    with pytest.raises(SystemExit):
        stage("reward_modeling", *preferences(output_dir=tmp_path / "more", peft_path=out))
    assert f"--peft_path {out}: was trained with --rope_scaling linear --rope_factor 3" in capsys.readouterr().err
    again = stage(
        "reward_modeling",
        *preferences(output_dir=tmp_path / "more", peft_path=out, rope_scaling="linear", rope_factor=3),
    )
    assert json.loads((again / "run.json").read_text())["rope"]["rope_parameters"]["factor"] == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"rope_scaling": "linear", "max_source_length": 30, "max_target_length": 30},
            "within the model's own context",
        ),
        ({"rope_scaling": "longrope", "rope_factor": 2}, "--rope_factors_file"),
        ({"shift_attn": True}, "--shift_attn: not in DPO"),
    ],
)
def test_a_stage_refuses_before_weights_load(stage, preferences, more, message, capsys, monkeypatch):
    import dpo_training

    monkeypatch.setattr(dpo_training, "load_causal_lm", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit):
        stage("dpo_training", *preferences(**more))
    assert message in capsys.readouterr().err


def test_a_dpo_reference_of_its_own_is_scaled_too(stage, preferences, tiny_checkpoint, monkeypatch):
    import dpo_training

    factors, load = [], dpo_training.load_causal_lm

    def loaded(*given, **options):
        model = load(*given, **options)
        factors.append(model.config.rope_parameters.get("factor"))
        return model

    monkeypatch.setattr(dpo_training, "load_causal_lm", loaded)
    reference = tiny_checkpoint("llama", **deepcopy(SHAPE))
    more = {"rope_scaling": "linear", "use_peft": False, "ref_model_name_or_path": reference}
    stage("dpo_training", *preferences(**more))
    assert factors == [2.5, 2.5]
