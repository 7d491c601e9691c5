"""Broken, damaged and hostile files of models and adapters: one line that names the file, wherever they are read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from xxhash import xxh3_128_hexdigest

import merge_peft_adapter
from stagewise.adapters.attach import load_adapter
from stagewise.adapters.files import read_adapter_config
from stagewise.artifacts.manifest import read_manifest, write_manifest
from stagewise.artifacts.weight_files import check_hashes, check_weight_files, shard_names, weight_hashes
from stagewise.config.arguments import ModelArguments
from stagewise.data.cache import read_cache
from stagewise.errors import ArgumentError, FileError
from stagewise.evaluation.compare import PARTS, read_evaluations
from stagewise.models.config import load_config
from stagewise.models.loading import load_causal_lm
from stagewise.models.tokenizer import load_tokenizer
from stagewise.rl.reward_model import load_scorer
from tools import export_gguf

BROKEN = {"empty": b"", "half": b'{"model_type": "lla', "list": b"[]", "null": b"null", "not UTF-8": b'{"a": "\xff"}'}
OUTSIDE = ["/absolute/model.safetensors", "../model.safetensors", "a/../../model.safetensors", "..\\model.safetensors"]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def base(tiny_checkpoint):
    return tiny_checkpoint("llama")


@pytest.fixture
def sharded(tiny_checkpoint):
    return tiny_checkpoint("llama", max_shard_size="50KB")


@pytest.fixture
def adapter(base, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(read, *words: str) -> str:
    """The one line with which something is refused; it names `words`."""
    with pytest.raises(ArgumentError) as caught:
        read()
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    return text


# ── JSON of models and adapters ─────────────────────────────────────────────────────────────────────────────────────

READERS = {
    "config.json": lambda folder: load_config(ModelArguments(str(folder))),
    "generation_config.json": lambda folder: load_config(ModelArguments(str(folder))),
    INDEX: lambda folder: load_config(ModelArguments(str(folder))),
    "tokenizer.json": lambda folder: load_tokenizer(ModelArguments(str(folder))),
    "tokenizer_config.json": lambda folder: load_tokenizer(ModelArguments(str(folder))),
    "special_tokens_map.json": lambda folder: load_tokenizer(ModelArguments(str(folder))),
    "run.json": read_manifest,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("name", READERS)
def test_broken_json_of_a_model_is_one_line_with_the_file(base, name, content):
    (base / name).write_bytes(content)
    refused(lambda: READERS[name](base), str(base / name))


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_json_of_an_adapter_is_one_line_with_the_file(adapter, content):
    (adapter / "run.json").write_bytes(content)
    refused(lambda: read_adapter_config(adapter), str(adapter / "run.json"))
    (adapter / "run.json").unlink()
    (adapter / "adapter_config.json").write_bytes(content)
    refused(lambda: read_adapter_config(adapter), str(adapter / "adapter_config.json"))


@pytest.mark.parametrize("content", ["{}", '{"model": 3}', '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_json_that_is_no_tokenizer_is_one_line(base, content):
    (base / "tokenizer.json").write_text(content)
    refused(lambda: load_tokenizer(ModelArguments(str(base))), str(base), "no tokenizer could be loaded")


@pytest.mark.parametrize("content", ["{}", '{"peft_type": 3}', '{"peft_type": "NONE"}', '{"r": 8}'])
def test_json_that_is_no_adapter_is_one_line(adapter, content):
    (adapter / "adapter_config.json").write_text(content)
    refused(lambda: read_adapter_config(adapter), str(adapter / "adapter_config.json"))


def test_an_adapter_with_values_of_the_wrong_kind_is_one_line(base, adapter):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": "many"}))
    refused(lambda: load_adapter(load_causal_lm(ModelArguments(str(base))), adapter), str(adapter))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": 3},
        {"model_type": None},
        {"hidden_size": "many"},
        {"num_hidden_layers": None},
        {"rope_parameters": [1]},
        {"architectures": "LlamaForCausalLM"},
    ],
    ids=str,
)
def test_a_config_with_values_of_the_wrong_kind_is_one_line(base, changes):
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**raw, **changes}))
    try:
        load_causal_lm(ModelArguments(str(base)))
    except ArgumentError as error:
        assert str(base) in str(error)


@pytest.mark.parametrize("lineage", [3, "sft", [1], [{"base_model": "x"}], {}])
def test_a_lineage_of_another_kind_is_one_line(base, lineage):
    (base / "run.json").write_text(json.dumps({"stage": "sft", "lineage": lineage}))
    refused(lambda: read_manifest(base), str(base / "run.json"), "lineage")


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_in_the_output_directory_is_one_line(stage, base, tmp_path, capsys, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_bytes(content)
    words = ["--model_name_or_path", base, "--train_file_dir", "data/finetune/train", "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit, match="2"):
        stage("supervised_finetuning", *words)
    assert f"error: {tmp_path}/out/run.json: " in capsys.readouterr().err


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_of_an_evaluation_is_one_line(tmp_path, content):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_bytes(content)
    folders = [str(tmp_path / "one"), str(tmp_path / "two")]
    refused(lambda: read_evaluations(folders), f"{tmp_path}/one/metrics.json")


@pytest.mark.parametrize("row", ["[]", "3", "{}", '{"where": []}', "{"])
def test_a_broken_row_of_an_evaluation_is_one_line(tmp_path, row):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text('{"sft": {}}')
        (tmp_path / name / PARTS["sft"][0]).write_text(row + "\n")
    refused(lambda: read_evaluations([str(tmp_path / "one"), str(tmp_path / "two")]), f"--compare {tmp_path}/one")


@pytest.mark.parametrize("about", ["[]", "null", '{"kinds": 3}', '{"kinds": {"../../x": "example"}}', '{"kinds": {}}'])
def test_a_broken_cache_is_made_again(tmp_path, about):
    (tmp_path / "about.json").write_text(about)
    assert read_cache(tmp_path) is None


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cut", [0, 5, 200, -1])
@pytest.mark.parametrize("kind", ["base", "sharded", "adapter"])
def test_weights_that_are_empty_or_cut_are_one_line_with_the_file(request, kind, cut):
    folder = request.getfixturevalue(kind)
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:cut])
    read = read_adapter_config if kind == "adapter" else READERS["config.json"]
    refused(lambda: read(folder), str(path), "download or copy the directory again")


def test_a_shard_that_is_gone_is_named(sharded):
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.unlink()
    refused(lambda: check_weight_files(sharded), f"{path}: no such file, which {INDEX} names")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}'])
def test_an_index_without_files_is_named(sharded, index):
    (sharded / INDEX).write_text(index)
    refused(lambda: check_weight_files(sharded), str(sharded / INDEX))


# ── names that lead elsewhere ───────────────────────────────────────────────────────────────────────────────────────


def aim(sharded: Path, name: str) -> None:
    """Makes the index name a file `name` in place of its first shard."""
    index = json.loads((sharded / INDEX).read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"] = {key: name if file == first else file for key, file in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_the_merge_writes_nothing_outside_of_its_output_directory(sharded, adapter, tmp_path, kind):
    """The file that the index names holds a whole shard, so that reading it would work."""
    first = sorted(sharded.glob("*.safetensors"))[0]
    victim = tmp_path / "elsewhere" / "precious.safetensors"
    victim.parent.mkdir()
    shutil.copy(first, victim)
    before = victim.read_bytes()
    name = str(victim) if kind == "absolute" else "../" * len(sharded.parts) + str(victim)[1:]
    aim(sharded, name)
    words = ["--base_model", sharded, "--lora_model", adapter, "--output_dir", tmp_path / "out"]
    refused(lambda: merge_peft_adapter.main([str(word) for word in words]), INDEX, "is not below")
    assert victim.read_bytes() == before
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("index", [INDEX, "pytorch_model.bin.index.json"])
def test_an_index_names_no_file_elsewhere(base, index, name):
    (base / index).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    refused(lambda: shard_names(base, index), index, "is not below")
    refused(lambda: READERS["config.json"](base), index, "is not below")
    refused(lambda: load_causal_lm(ModelArguments(str(base))), index, "is not below")
    refused(lambda: export_gguf.export(base, base / "x.gguf", "f32", base, False), index, "is not below")


@pytest.mark.parametrize("name", ["/etc/passwd", "../../etc/passwd"])
@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("tokenizer_config.json", "vocab_file"),
        ("tokenizer_config.json", "merges_file"),
        ("tokenizer_config.json", "tokenizer_file"),
        ("special_tokens_map.json", "vocab_file"),
    ],
)
def test_a_tokenizer_names_no_file_elsewhere(base, adapter, tmp_path, file, key, name):
    """What it names is opened, and a vocabulary is copied beside what is saved."""
    path = base / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), key: name}))
    refused(lambda: load_tokenizer(ModelArguments(str(base))), str(path), "is not below")
    words = ["--base_model", base, "--lora_model", adapter, "--output_dir", tmp_path / "out"]
    refused(lambda: merge_peft_adapter.main([str(word) for word in words]), str(path), "is not below")


def test_the_merge_copies_no_file_from_elsewhere_beside_the_model(base, adapter, tmp_path, logged):
    (tmp_path / "secret").write_text("a private key")
    (base / "LICENSE").symlink_to(tmp_path / "secret")
    (base / "NOTICE").write_text("made by us")
    words = ["--base_model", base, "--lora_model", adapter, "--output_dir", tmp_path / "out"]
    merge_peft_adapter.main([str(word) for word in words])
    assert not (tmp_path / "out" / "LICENSE").exists()
    assert (tmp_path / "out" / "NOTICE").read_text() == "made by us"
    assert any(line.startswith(f"{base}/LICENSE: is a link to {tmp_path}/secret, outside of") for line in logged)


def test_the_names_of_chat_templates_lead_nowhere_else(base):
    """Each is saved in a file of its name."""
    path = base / "tokenizer_config.json"
    templates = [{"name": "default", "template": "x"}, {"name": "../../x", "template": "y"}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": templates}))
    refused(lambda: load_tokenizer(ModelArguments(str(base))), str(path), "'../../x'", "is not below")


def test_a_published_tokenizer_may_name_the_special_tokens_of_the_machine_it_was_made_on(base):
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "special_tokens_map_file": "/root/.cache/x.json"}))
    assert load_tokenizer(ModelArguments(str(base))).eos_token == "</s>"


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_account_names_no_file_elsewhere(base, name):
    (base / "run.json").write_text(json.dumps({"files": {name: "0" * 32}}))
    refused(lambda: check_hashes(base), "run.json", "is not below")


# ── hashes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def flip(path: Path) -> None:
    """Changes one bit of the last number in a file of weights."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_run_json_holds_the_hash_of_each_file_of_weights(sharded):
    (sharded / "adapter_model.bin").write_bytes(b"12345")
    (sharded / "optimizer.bin").write_bytes(b"12345")
    write_manifest(sharded, {"stage": "merge"}, weights=True)
    shards = {path.name: xxh3_128_hexdigest(path.read_bytes()) for path in sharded.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert read_manifest(sharded) == {
        "stage": "merge",
        "files": {"adapter_model.bin": xxh3_128_hexdigest(b"12345"), **shards},
    }


def test_a_changed_byte_of_a_merged_model_is_noticed_where_it_is_loaded(base, adapter, tmp_path):
    merged = tmp_path / "merged"
    words = ["--base_model", base, "--lora_model", adapter, "--output_dir"]
    merge_peft_adapter.main([str(word) for word in (*words, merged)])
    assert read_manifest(merged)["files"] == weight_hashes(merged)
    load_causal_lm(ModelArguments(str(merged)))
    (merged / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.5, "do_sample": true}')
    (merged / "chat_template.jinja").write_text("{{ messages }}")
    load_causal_lm(ModelArguments(str(merged)))  # what may be edited is not compared
    flip(merged / "model.safetensors")
    told = (str(merged / "model.safetensors"), "is not what was saved", 'remove "files" there')
    refused(lambda: load_causal_lm(ModelArguments(str(merged))), *told)
    again = [*words[:1], merged, *words[2:], tmp_path / "again"]
    refused(lambda: merge_peft_adapter.main([str(word) for word in again]), *told)
    refused(lambda: export_gguf.export(merged, tmp_path / "x.gguf", "f32", tmp_path, False), *told)
    manifest = read_manifest(merged)
    del manifest["files"]
    write_manifest(merged, manifest)
    load_causal_lm(ModelArguments(str(merged)))


def test_a_changed_byte_of_a_reward_model_is_noticed(tiny_checkpoint):
    folder = tiny_checkpoint("llama", task="score")
    write_manifest(folder, {"stage": "merge", "lineage": []}, weights=True)
    flip(folder / "model.safetensors")
    told = (str(folder / "model.safetensors"), "is not what was saved")
    rest = {"label": None, "tokenizer": None, "template": None, "device": "cpu", "longest": 8}
    refused(lambda: load_scorer(str(folder), ModelArguments(str(folder)), **rest), *told)


def test_a_changed_byte_of_an_adapter_is_noticed(adapter, tmp_path):
    write_manifest(adapter, {"stage": "sft", "lineage": []}, weights=True)
    read_adapter_config(adapter)
    flip(adapter / "adapter_model.safetensors")
    refused(lambda: read_adapter_config(adapter), "adapter_model.safetensors", "is not what was saved", "run.json")


def test_a_changed_byte_of_a_checkpoint_is_noticed_where_its_weights_are_taken(adapter):
    """--peft_path out/checkpoint-4: it has no run.json, and its own mark."""
    from stagewise.artifacts.checkpoints import mark_whole

    mark_whole(adapter)
    (adapter / "README.md").write_text("changed on purpose")
    read_adapter_config(adapter)
    flip(adapter / "adapter_model.safetensors")
    refused(lambda: read_adapter_config(adapter), "adapter_model.safetensors", "is not what was saved", "whole.json")


def test_a_stage_writes_the_hashes_of_its_adapter(stage, base, tmp_path):
    words = ["--model_name_or_path", base, "--train_file_dir", "data/finetune/train", "--output_dir", tmp_path / "out"]
    words += ["--max_train_samples", 4, "--max_steps", 1, "--report_to", "none", "--save_strategy", "no"]
    out = stage("supervised_finetuning", *words)
    content = (out / "adapter_model.safetensors").read_bytes()
    assert read_manifest(out)["files"] == {"adapter_model.safetensors": xxh3_128_hexdigest(content)}


def test_a_file_that_was_made_again_is_read_again(base):
    write_manifest(base, {"stage": "merge"}, weights=True)
    check_hashes(base)
    save_file({name: tensor + 1 for name, tensor in load_file(base / "model.safetensors").items()}, base / "m")
    shutil.copyfile(base / "m", base / "model.safetensors")
    assert torch.is_tensor(load_file(base / "model.safetensors")["lm_head.weight"])
    with pytest.raises(FileError, match="is not what was saved"):
        check_hashes(base)
