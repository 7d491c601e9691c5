import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import adapter_weights
from tests.encoders import encode_text


@pytest.fixture
def folders(tmp_path):
    """A folder with a .jsonl, and a .txt in a subfolder; and one for validation."""
    train, validation = tmp_path / "train", tmp_path / "validation"
    (train / "book" / "part").mkdir(parents=True)
    validation.mkdir()
    (train / "lines.jsonl").write_text(
        "".join(json.dumps({"text": f"fever and water number {n}"}) + "\n" for n in range(6))
    )
    (train / "book" / "part" / "one.txt").write_text("drink water and rest\n\nwhen you have a fever\n" * 12)
    (validation / "lines.jsonl").write_text(
        "".join(json.dumps({"text": f"rest with fever {n}"}) + "\n" for n in range(3))
    )
    return train, validation


def flags(folders, model, out, **changes):
    values = {
        "model_name_or_path": model,
        "train_file_dir": folders[0],
        "validation_file_dir": folders[1],
        "output_dir": out,
        "block_size": 64,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "report_to": "none",
        **changes,
    }
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def manifest(folder):
    return json.loads((folder / "run.json").read_text())


def test_text_and_jsonl_of_nested_folders_are_read_and_accounted_for(stage, folders, tiny_checkpoint, tmp_path):
    out = stage("pretraining", *flags(folders, tiny_checkpoint("llama"), tmp_path / "out"), "--eval_on_start")
    run = manifest(out)
    assert [path.rsplit("/", 1)[1] for path in run["data"]["train"]["files"]] == ["one.txt", "lines.jsonl"]
    assert (run["data"]["train"]["read"], run["data"]["train"]["kept"]) == (7, 7)
    assert run["rows"].startswith("packed")
    assert run["metrics"]["eval"]["eval_loss"] < run["metrics"]["eval_before"]["eval_loss"]


def test_validation_loss_is_the_mean_over_all_tokens_of_the_documents_alone(
    stage, folders, tiny_checkpoint, tiny_tokenizer, tmp_path
):
    checkpoint = tiny_checkpoint("llama")
    out = stage("pretraining", *flags(folders, checkpoint, tmp_path / "out", max_steps=1), "--eval_on_start")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint).double(), tiny_tokenizer()
    total = count = 0
    for n in range(3):
        ids = torch.tensor([[*tokenizer(f"rest with fever {n}")["input_ids"], tokenizer.eos_token_id]])
        logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        total, count = total - logps.sum().item(), count + ids.shape[1] - 1
    before = manifest(out)["metrics"]["eval_before"]
    assert before["eval_tokens"] == count
    assert before["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_documents_one_by_one_where_packing_is_off(stage, folders, tiny_checkpoint, tmp_path):
    out = stage("pretraining", *flags(folders, tiny_checkpoint("llama"), tmp_path / "out", packing=False, max_steps=1))
    assert manifest(out)["rows"] == "padded, one record a row: --packing False"


def test_every_token_of_a_long_document_is_learned_once(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    text = "drink water and rest " * 40
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    learned = [label for block in encode_text(tokenizer, text, 64) for label in block.labels[1:]]
    assert learned == whole[1:]


def test_a_command_of_the_public_notebooks_runs_as_it_is(stage, folders, tiny_checkpoint, tmp_path, capsys):
    """The flags of the published walk-through for earlier pipelines of this shape, word for word but the paths."""
    words = f"""--model_type bloom --model_name_or_path {tiny_checkpoint("bloom")} --train_file_dir {folders[0]}
        --validation_file_dir {folders[1]} --per_device_train_batch_size 3 --per_device_eval_batch_size 3 --do_train
        --do_eval --use_peft True --seed 42 --bf16 --max_train_samples 20000 --max_eval_samples 10
        --num_train_epochs 1 --learning_rate 2e-4 --warmup_ratio 0.05 --weight_decay 0.01 --logging_strategy steps
        --logging_steps 10 --eval_steps 50 --evaluation_strategy steps --save_steps 500 --save_strategy steps
        --save_total_limit 3 --gradient_accumulation_steps 1 --preprocessing_num_workers 1 --block_size 128
        --group_by_length True --output_dir {tmp_path / "out"} --overwrite_output_dir --ddp_timeout 30000
        --logging_first_step True --target_modules all --lora_rank 8 --lora_alpha 16 --lora_dropout 0.05
        --torch_dtype float16 --device_map auto --report_to tensorboard --ddp_find_unused_parameters False
        --gradient_checkpointing True""".split()
    out = stage("pretraining", *words)
    run = manifest(out)
    assert run["status"] == "finished"
    assert run["rows"].startswith("padded")
    assert (out / "adapter_model.safetensors").is_file()
    told = capsys.readouterr().err
    assert "--evaluation_strategy is --eval_strategy today" in told
    assert "--group_by_length is --train_sampling_strategy group_by_length today" in told
    assert "--warmup_ratio is --warmup_steps today" in told


def test_embedding_and_head_can_be_trained_and_stay_tied(stage, folders, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint("llama", tie_word_embeddings=True)
    out = stage("pretraining", *flags(folders, checkpoint, tmp_path / "out", modules_to_save="embed_tokens,lm_head"))
    stage("merge_peft_adapter", "--lora_model", out, "--output_dir", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    before = adapter_weights(checkpoint)["model.embed_tokens.weight"]
    assert (merged.lm_head.weight - before).abs().max() > 1e-3
