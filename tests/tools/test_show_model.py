"""tools.show_model: what it prints is the model's, the flags have their effect, and no weights are read."""

import re

import pytest
import torch

from tools.show_model import describe, main

BASE = ["--bf16", "--torch_dtype", "bfloat16", "--per_device_train_batch_size", "2", "--model_max_length", "64"]


@pytest.fixture
def config_only(tiny_checkpoint):
    """A checkpoint without its weights."""

    def make(family="llama", **changes):
        folder = tiny_checkpoint(family, **changes)
        (folder / "model.safetensors").unlink()
        return folder

    return make


def shown(capsys, folder, *words, script="supervised_finetuning.py") -> str:
    main([script, "--model_name_or_path", str(folder), *words])
    return capsys.readouterr().out


def gib(text: str, name: str) -> float:
    return float(re.search(rf"^\| {name}[^|]* \| ([\d.]+) \|$", text, re.MULTILINE)[1])


def peak(folder, *words, script="supervised_finetuning.py") -> float:
    from stagewise.models.memory.estimate import estimate

    found = describe(script, ["--model_name_or_path", str(folder), *words])
    return estimate(found.model, found.step, found.in_bits).peak


def test_structure_kinds_and_share_by_hand(config_only, capsys):
    text = shown(capsys, config_only(), *BASE, "--lora_rank", "4")
    assert "LlamaForCausalLM (llama), lora\n" in text
    line = re.compile(r"^(model\.layers\.\*\.mlp\.up_proj\S*) +(\S+ × \S+) +×(\d+) +(\w+)(  trained)?$", re.MULTILINE)
    assert line.findall(text) == [
        ("model.layers.*.mlp.up_proj.base_layer.weight", "64 × 32", "2", "bfloat16", ""),
        ("model.layers.*.mlp.up_proj.lora_A.default.weight", "4 × 32", "2", "float32", "  trained"),
        ("model.layers.*.mlp.up_proj.lora_B.default.weight", "64 × 4", "2", "float32", "  trained"),
    ]
    # q 32x32, k and v 16x32, o 32x32; gate, up and down 64x32; rank 4: 4 · (inputs + outputs) of each
    attention, mlp = 2 * (2 * 1024 + 2 * 512), 2 * 3 * 2048
    adapter = 2 * 4 * (64 + 48 + 48 + 64 + 3 * 96)
    assert f"| attention | {attention:,} |" in text
    assert f"| MLP | {mlp:,} |" in text
    assert f"| adapter | {adapter:,} |" in text
    total = attention + mlp + adapter + 5 * 32 + 2 * 320 * 32
    assert f"| all | {total:,} | 100.0% | {adapter:,} ({adapter / total:.2%}) | |" in text


def test_experts_are_in_4_bit_with_the_rest_and_take_the_adapter(config_only, capsys):
    folder = config_only("mixtral")
    text = shown(capsys, folder, *BASE, "--qlora")
    experts = re.search(r"mlp\.experts\.\S*gate_up_proj +(\S+ × \S+ × \S+) +×2 +4 bit$", text, re.MULTILINE)
    assert experts and experts[1] == "4 × 128 × 32"
    # rank 8 in two layers: on q 32x32, k and v 16x32, o 32x32; on four experts' gate and up 128x32, down 32x64
    attention, stacks = 64 + 48 + 48 + 64, 4 * (128 + 32 + 32 + 64)
    assert f"| adapter | {2 * 8 * (attention + stacks):,} |" in text
    alone = shown(capsys, folder, *BASE, "--qlora", "--target_modules", "q_proj,k_proj,v_proj,o_proj")
    assert f"| adapter | {2 * 8 * attention:,} |" in alone
    text = shown(capsys, folder, *BASE, "--qlora", "--quantize_experts", "False")
    assert re.search(r"mlp\.experts\.\S*gate_up_proj +\S+ × \S+ × \S+ +×2 +bfloat16$", text, re.MULTILINE)
    assert f"| adapter | {2 * 8 * (attention + stacks):,} |" in text


def test_a_tied_head_is_said_and_counted_once(config_only, capsys):
    text = shown(capsys, config_only(tie_word_embeddings=True), *BASE)
    assert "head and embedding are one weight" in text
    assert "| head |" not in text


def test_what_is_quantized_is_shown_in_its_bits(config_only, capsys):
    pytest.importorskip("bitsandbytes")
    text = shown(capsys, config_only(), *BASE, "--qlora")
    assert "linear layers in 4 bit" in text
    assert re.search(r"q_proj\.base_layer\.weight +32 × 32 +×2 +4 bit$", text, re.MULTILINE)
    assert re.search(r"lm_head\.weight +320 × 32 +×1 +bfloat16$", text, re.MULTILINE)


def test_longlora_trains_embedding_and_norms_too(config_only, capsys):
    text = shown(capsys, config_only(), *BASE, "--shift_attn")
    # both stand beside their frozen originals: a vocabulary of 320 and 5 norms, 32 wide
    assert f"| embedding | {2 * 320 * 32:,} | " in text
    assert re.search(r"^\| embedding \|.*\| 10,240 \| bfloat16 \|$", text, re.MULTILINE)
    assert re.search(r"^\| norms \|.*\| 160 \| bfloat16 \|$", text, re.MULTILINE)
    assert "an attention mask" not in text
    without = shown(capsys, config_only(), *BASE, "--shift_attn", "--longlora_plus", "False")
    assert "| embedding | 10,240 |" in without


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        ("prompt_tuning --num_virtual_tokens 4", 4 * 32),
        ("p_tuning --num_virtual_tokens 4", 4 * 32 + 3 * (32 * 32 + 32)),
        # keys and values of two heads of 8 in each of two layers
        ("prefix_tuning --num_virtual_tokens 4", 4 * 2 * 2 * 16),
    ],
)
def test_virtual_tokens_are_shown_without_weights(words, numbers, config_only, capsys):
    text = shown(capsys, config_only(), *BASE, "--fine_tuning_type", *words.split())
    assert f"| adapter | {numbers:,} |" in text
    assert re.search(r"^model\.layers\.\*\.mlp\.up_proj\.weight +64 × 32 +×2 +bfloat16$", text, re.MULTILINE)
    assert re.search(r"^lm_head\.weight +320 × 32 ", text, re.MULTILINE)
    assert "one step: 2 × 68 tokens" in text


def test_a_reward_head_and_adaloras_numbers_are_what_they_are(config_only, capsys):
    text = shown(capsys, config_only(), "--max_source_length", "32", script="reward_modeling.py")
    assert re.search(r"^\| head \| 64 \|.*\| 32 \|", text, re.MULTILINE)
    assert "| other |" not in text
    text = shown(capsys, config_only(), *BASE, "--fine_tuning_type", "adalora")
    assert re.search(r"^\| attention \| 6,144 \|.*\| 0 \|", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (["--gradient_checkpointing"], []),
        (["--per_device_train_batch_size", "1"], []),
        (["--model_max_length", "32"], []),
        ([], ["--lora_rank", "64"]),
        (["--target_modules", "q_proj"], []),
        ([], ["--use_peft", "False"]),
        ([], ["--modules_to_save", "embed_tokens"]),
        (["--optim", "sgd"], []),
        (["--flash_attn"], []),
        ([], ["--torch_dtype", "float32"]),
        ([], ["--gradient_accumulation_steps", "4"]),
        (["--lora_dropout", "0"], []),
    ],
)
def test_every_flag_that_memory_depends_on_has_its_effect(less, more, config_only):
    folder = config_only(hidden_size=128, intermediate_size=256)
    assert peak(folder, *BASE, *less) < peak(folder, *BASE, *more)


def test_bits_lower_the_weights(config_only, capsys):
    pytest.importorskip("bitsandbytes")
    folder = config_only(hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    whole, eight, four = (peak(folder, *BASE, *words) for words in ([], ["--load_in_8bit"], ["--load_in_4bit"]))
    assert four < eight
    assert four < whole
    assert peak(folder, *BASE, "--qlora") < four  # its scales are quantized once more


@pytest.mark.parametrize(
    ("script", "words", "rows", "tokens", "logits"),
    [
        ("pretraining.py", ["--block_size", "128"], 2, 128, 256),
        ("supervised_finetuning.py", ["--model_max_length", "64"], 2, 64, 128),
        ("reward_modeling.py", ["--max_source_length", "40", "--max_target_length", "24"], 4, 64, 0),
        # two pairs: four rows; each pair's answers at their own 24 positions
        ("dpo_training.py", ["--max_source_length", "40", "--max_target_length", "24"], 4, 64, 4 * 48),
    ],
)
def test_rows_of_every_stage(script, words, rows, tokens, logits, config_only):
    found = describe(
        script, ["--model_name_or_path", str(config_only()), "--per_device_train_batch_size", "2", *words]
    )
    assert (found.step.rows, found.step.tokens, found.step.logit_tokens) == (rows, tokens, logits)


def test_full_dpo_holds_a_second_model(config_only):
    folder = config_only()
    lora, full = (
        describe("dpo_training", ["--model_name_or_path", str(folder), *words]).step.reference
        for words in ([], ["--use_peft", "False"])
    )
    assert (lora, full) == (False, True)


def test_ppo_is_shown_without_memory(config_only, capsys):
    text = shown(capsys, config_only(), "--reward_model_name_or_path", "rm", script="ppo_training.py")
    assert "memory: not estimated for PPO" in text
    assert "| all |" in text


def test_a_family_that_was_not_compared_says_so(config_only, capsys):
    assert "rough figure" in shown(capsys, config_only("bloom"), *BASE)
    assert "rough figure" not in shown(capsys, config_only("llama"), *BASE)


def test_the_table_adds_up(config_only, capsys):
    text = shown(capsys, config_only(vocab_size=50000), *BASE, "--model_max_length", "4096")
    parts = ["weights", "gradients", "optimizer", "activations", "logits", "working"]
    assert gib(text, "peak, in the loss") == pytest.approx(
        sum(gib(text, part) for part in parts if f"| {part} |" in text and part != "gradients"), abs=0.03
    )


def test_what_8_bit_holds_in_spite_of_checkpointing_is_a_part_of_the_table(config_only, capsys):
    folder = config_only(hidden_size=256, intermediate_size=1024, vocab_size=2000)
    words = [*BASE, "--model_max_length", "8192", "--gradient_checkpointing"]
    text = shown(capsys, folder, *words, "--load_in_8bit")
    # two layers: q, k and v read 256 numbers, o 32 (four heads of 8), gate and up 256, down 1024; two bytes each
    assert gib(text, "inputs of 8 bit layers") == pytest.approx(16384 * 2 * 2 * (512 + 32 + 1024) / 2**30, abs=0.005)
    assert gib(text, "outliers of 8 bit layers, half") == pytest.approx(16384 * 2 * 2 * 512 / 2**30, abs=0.005)
    assert "8 bit layers" not in shown(capsys, folder, *words, "--load_in_4bit")
    assert "8 bit layers" not in shown(capsys, folder, *BASE, "--load_in_8bit")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no_such.py"], "expected a stage's script first"),
        (["supervised_finetuning.py", "--learning_rat", "1"], "--learning_rat: no such flag"),
        (["supervised_finetuning.py", "--deepspeed", "zero3.json"], "--deepspeed: the estimate is for a process"),
        (["supervised_finetuning.py", "--use_liger_kernel"], "--use_liger_kernel: its kernels keep other"),
        (
            ["supervised_finetuning.py", "--shift_attn", "--fine_tuning_type", "p_tuning"],
            "--shift_attn: not with p_tun",
        ),
        (["dpo_training.py", "--shift_attn"], "--shift_attn: not in DPO"),
        (["supervised_finetuning.py", "--optim", "adafactor"], "--optim adafactor: no estimate for it"),
        (["supervised_finetuning.py", "--model_name_or_path", "./nowhere"], "./nowhere: no such directory"),
    ],
)
def test_what_cannot_be_estimated_is_refused(words, message, config_only, capsys):
    given = (
        []
        if "--model_name_or_path" in words or "no_such.py" in words
        else ["--model_name_or_path", str(config_only())]
    )
    with pytest.raises(SystemExit) as stop:
        main([*words, *given])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_flags_of_a_file_are_given_as_those_behind_it(config_only, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"model_name_or_path: {config_only()}\nuse_peft: true\nfine_tuning_type: full\n")
    with pytest.raises(SystemExit):
        main(["supervised_finetuning.py", str(path)])
    assert "--use_peft True trains an adapter, --fine_tuning_type full" in capsys.readouterr().err


def test_fp16_false_does_not_take_bf16_back(config_only):
    steps = [
        describe("reward_modeling.py", ["--model_name_or_path", str(config_only()), *words]).step
        for words in (["--bf16", "--fp16", "False"], ["--fp16"], ["--fp16", "False"])
    ]
    assert [step.autocast for step in steps] == [True, True, False]


def test_nothing_is_allocated(config_only):
    found = describe("pretraining", ["--model_name_or_path", str(config_only())])
    assert {parameter.device for parameter in found.model.parameters()} == {torch.device("meta")}
