"""Every stage reads every form of record that it can use, from files of every form in one folder."""

import gzip
import json
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from stagewise.config.arguments import DataArguments, ModelArguments
from stagewise.data.split_loader import SplitLoader
from stagewise.formats.readers import RECORD_FILES
from stagewise.rl.rollout import read_prompts
from template import TEMPLATES


def chat(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


CONVERSATIONS = [
    {"conversations": [{"from": "human", "value": "a cold"}, {"from": "gpt", "value": "rest"}], "system": "be kind"},
    {"messages": chat("a cold", "rest", "how long", "a week")},
    {"instruction": "answer", "input": "a cold", "output": "rest", "history": ["fever", "water"]},
    {"instruction": "answer", "input": "", "output": "rest", "history": [["fever", "water"]]},
    {"question": "a cold", "answer": "rest"},
]
PREFERENCES = [
    {"conversations": [{"from": "human", "value": "a cold"}], "chosen": "rest", "rejected": "sleep"},
    {"messages": chat("a cold"), "chosen": chat("", "rest", "how long", "a week")[1:], "rejected": chat("", "no")[1]},
    {"question": "a cold", "response_chosen": "rest", "response_rejected": "diet", "history": ["fever", "water"]},
    {"instruction": "answer", "input": "a cold", "output": ["rest", "diet"]},
    {"chosen": chat("fever", "water", "a cold", "rest"), "rejected": chat("fever", "water", "a cold", "diet")},
]
TEXTS = [{"text": f"drink water {n}"} for n in range(5)]


def cell(value):
    return '"' + (value if isinstance(value, str) else json.dumps(value)).replace('"', '""') + '"'


def write_all(folder, records):
    """Each record in one file of every form; gives back how many records there are in all."""
    folder.mkdir(parents=True)
    for number, record in enumerate(records):
        line, header = json.dumps(record), list(record)
        row = ",".join(cell(record[key]) for key in header)
        (folder / f"a{number}.jsonl").write_text(line + "\n")
        (folder / f"b{number}.json").write_text(json.dumps([record], indent=1))
        (folder / f"c{number}.jsonl.gz").write_bytes(gzip.compress(line.encode()))
        (folder / f"d{number}.json.zst").write_bytes(pyarrow.Codec("zstd").compress(line.encode(), asbytes=True))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), folder / f"e{number}.parquet")
        # Messages as answers are no text of a table: a cell "[…]" there is an answer that looks like that.
        if not any(isinstance(record.get(key), (list, dict)) for key in ("chosen", "rejected")):
            (folder / f"f{number}.csv").write_text(",".join(header) + "\n" + row + "\n")
            (folder / f"g{number}.tsv").write_text("\t".join(header) + "\n" + row.replace('","', '"\t"') + "\n")
    return sum(1 for _ in folder.iterdir())


@pytest.mark.parametrize(
    ("script", "records"),
    [
        ("pretraining", TEXTS),
        ("supervised_finetuning", CONVERSATIONS),
        ("reward_modeling", PREFERENCES),
        ("dpo_training", PREFERENCES),
    ],
)
def test_a_stage_reads_all_of_its_forms(stage, tiny_checkpoint, tmp_path, script, records):
    count = write_all(tmp_path / "train", records)
    assert count >= 30
    if script == "pretraining":
        (tmp_path / "train/h.txt").write_text("drink water")
        count += 1
    flags = {
        "model_name_or_path": tiny_checkpoint("llama"),
        "train_file_dir": tmp_path / "train",
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "report_to": "none",
    }
    out = stage(script, *(word for name, value in flags.items() for word in (f"--{name}", value)))
    account = json.loads((out / "run.json").read_text())["data"]["train"]
    assert (account["read"], account["kept"], account["left_out"]) == (count, count, {})


@pytest.mark.parametrize("records", [CONVERSATIONS, PREFERENCES])
def test_prompts_are_read_from_all_of_them(tiny_tokenizer, tmp_path, records):
    count = write_all(tmp_path / "train", records)
    args = SimpleNamespace(output_dir=tmp_path / "out", seed=1, data_seed=None, dry_run=False, do_train=True)
    args.do_eval = False
    loader = SplitLoader(DataArguments(str(tmp_path / "train")), ModelArguments("none"), args, RECORD_FILES)
    splits, conversations = read_prompts(loader, args, tiny_tokenizer(), TEMPLATES["vicuna"], 9999)
    assert len(splits.train) == splits.accounts["train"].kept == count
    for prompt in splits.train:
        messages = conversations["train"][prompt.where].messages
        assert messages[-1].role == "user"
        number = int(prompt.where.split(".")[0][1:])
        assert messages == conversations["train"][f"a{number}.jsonl:1"].messages  # whatever the file's form


def test_a_stage_says_which_form_it_found_and_who_reads_it(stage, tiny_checkpoint, tmp_path, capsys):
    write_all(tmp_path / "train", PREFERENCES[:1])
    flags = ["--model_name_or_path", tiny_checkpoint("llama"), "--train_file_dir", tmp_path / "train"]
    with pytest.raises(SystemExit):
        stage("supervised_finetuning", *flags, "--output_dir", tmp_path / "out", "--max_steps", 1)
    said = capsys.readouterr().err
    assert "a0.jsonl:1: found a preference (the keys conversations, chosen, rejected): reward_modeling.py and" in said
