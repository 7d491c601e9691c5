"""evaluation.py: scores computed by hand, models whose answers are known, and what is refused."""

import csv
import importlib.util
import json
import math
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import evaluation
from stagewise.errors import ArgumentError, RecordError
from stagewise.evaluation import benchmark_csv, page
from stagewise.evaluation import lm_eval as evaluation_benchmarks
from stagewise.evaluation.compare import compare_metrics, read_evaluations, sentence, write_comparison
from stagewise.evaluation.statistics import RM_METRICS, SFT_METRICS, measure
from stagewise.formats.parsers import parse_conversation
from template import TEMPLATES
from tests.launching import environment, torchrun
from tests.launching import run as launched

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rouge_chinese", "jieba", "rouge_score", "sacrebleu", "lm_eval")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason="needs packages: pip install -r requirements-evaluation.txt",
)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def run(*words) -> dict:
    """Runs evaluation.py in this process; what it wrote to metrics.json, or to comparison.json."""
    words = [str(word) for word in words]
    evaluation.main(words)
    folder = Path(words[words.index("--output_dir") + 1])
    path = folder / ("comparison.json" if "--compare" in words else "metrics.json")
    return json.loads(path.read_text(encoding="utf-8"))


def refused(capsys, *words) -> str:
    """The error that the command line ends with."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(word) for word in words])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


# ── benchmark files ─────────────────────────────────────────────────────────────────────────────────────────────────

HEADERS = {
    "mmlu": None,
    "cmmlu": ["", "Question", "A", "B", "C", "D", "Answer"],
    "ceval": ["id", "question", "A", "B", "C", "D", "answer"],
}
# Right answers of what is measured: a model that always says B is right on 3 of 7, and on 1/2 and 1/3 by subject.
KEYS = {"first": "BBDA", "second": "CBD"}
SUBJECTS = {
    "mmlu": {"first": "anatomy", "second": "virology"},
    "cmmlu": {"first": "anatomy", "second": "virology"},
    "ceval": {"first": "law", "second": "physician"},
}


def write_csv(path: Path, name: str, keys: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [[f"question {n}, with\na line", "one", "two", "three", "four", key] for n, key in enumerate(keys)]
    if HEADERS[name]:
        rows = [HEADERS[name], *([n, *row] for n, row in enumerate(rows))]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def made_up(folder: Path, name: str, shots: str = "AC") -> Path:
    """A folder in the layout in which a benchmark was published."""
    layout = benchmark_csv.LAYOUTS[name]
    for which, keys in KEYS.items():
        subject = SUBJECTS[name][which]
        suffix = "" if name == "cmmlu" else f"_{layout.split}"
        write_csv(folder / layout.split / f"{subject}{suffix}.csv", name, keys)
        write_csv(folder / "dev" / f"{subject}{'' if name == 'cmmlu' else '_dev'}.csv", name, shots)
    return folder


@pytest.mark.parametrize("name", ["mmlu", "cmmlu", "ceval"])
def test_published_layouts_are_read(tmp_path, name):
    made_up(tmp_path / name, name)
    place = benchmark_csv.find_benchmark(str(tmp_path), name, alone=False)
    assert place == tmp_path / name
    assert benchmark_csv.find_benchmark(str(place), name, alone=True) == place
    subject = SUBJECTS[name]["first"]
    found = benchmark_csv.read_subject(place, name, subject, 2)
    asked, choices = "question 0, with\na line", {"A": "one", "B": "two", "C": "three", "D": "four"}
    first = {
        "mmlu": {"question": asked, "choices": ["one", "two", "three", "four"], "answer": 1},
        "cmmlu": {"Question": asked, **choices, "Answer": "B"},
        "ceval": {"question": asked, **choices, "answer": "B"},
    }[name]
    split = "val" if name == "ceval" else "test"
    assert found[split][0] == first
    assert [len(found[split]), len(found["dev"])] == [4, 2]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("q,a,b,c,d,E\n", "mmlu", r"anatomy.csv:1: expected the answer A, B, C or D, found 'E'"),
        ("q,a,b,c,d,A\nq,a,b,c,A\n", "mmlu", r"anatomy.csv:2: expected question, A, B, C, D, answer, found 5 columns"),
        ("id,question,A,B,C,D\n1,q,a,b,c,d\n", "ceval", r"anatomy.csv:1: the header lacks answer; found id, question"),
        ("", "mmlu", "holds no question"),
        (",Question,A,B,C,D,Answer\n", "cmmlu", "holds no question"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, text, name, message):
    path = tmp_path / "anatomy.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ArgumentError, match=message):
        benchmark_csv.read_questions(path, name)


def test_a_file_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "anatomy.csv"
    path.write_bytes("问题,a,b,c,d,A\n".encode("gbk"))
    with pytest.raises(ArgumentError, match=r"anatomy.csv: not text in UTF-8"):
        benchmark_csv.read_questions(path, "mmlu")


def test_examples_that_are_not_there(tmp_path):
    made_up(tmp_path, "mmlu")
    with pytest.raises(ArgumentError, match=r"--num_fewshot 5: .*anatomy_dev.csv has 2 examples"):
        benchmark_csv.read_subject(tmp_path, "mmlu", "anatomy", 5)
    (tmp_path / "dev/anatomy_dev.csv").unlink()
    with pytest.raises(ArgumentError, match=r"anatomy_dev.csv does not exist; --num_fewshot 0 uses no examples"):
        benchmark_csv.read_subject(tmp_path, "mmlu", "anatomy", 1)
    assert len(benchmark_csv.read_subject(tmp_path, "mmlu", "anatomy", 0)["test"]) == 4
    with pytest.raises(ArgumentError, match=r"--benchmark_dir .*: holds no ceval/val/\*_val.csv"):
        benchmark_csv.find_benchmark(str(tmp_path), "ceval", alone=True)


# ── models whose answers are known ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def says(tmp_path_factory, tiny_model, tiny_tokenizer):
    """Factory: a model's directory that says one letter whatever it is asked; says("B")."""

    def make(letter: str) -> Path:
        tokenizer, model = tiny_tokenizer(), tiny_model("llama", max_position_embeddings=4096)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.zero_()  # nothing is added to the embedding, which is one for all tokens
            same = torch.linspace(-1, 1, 32)
            model.get_input_embeddings().weight.copy_(same.repeat(320, 1))
            model.lm_head.weight.zero_()
            model.lm_head.weight[tokenizer.encode(letter, add_special_tokens=False)[0]] = same
        folder = tmp_path_factory.mktemp(f"says-{letter}")
        model.save_pretrained(folder)
        tokenizer.model_max_length = 4096
        tokenizer.save_pretrained(folder)
        return folder

    return make


def adapter_that_says(base: Path, letter: str, folder: Path) -> Path:
    """A LoRA on the head of a model of `says` that turns it to another letter, more strongly than its own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=1, lora_alpha=1, target_modules=["lm_head"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        layer = model.get_base_model().lm_head
        layer.lora_A["default"].weight.copy_(torch.linspace(-1, 1, 32))
        layer.lora_B["default"].weight[tokenizer.encode(letter, add_special_tokens=False)[0]] = 3
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["mmlu", "cmmlu", "ceval"])
def test_a_benchmark_from_a_folder_with_a_model_whose_answers_are_known(tmp_path, says, name, capsys):
    made_up(tmp_path / "files" / name, name)
    first, second = SUBJECTS[name].values()
    flags = ["--benchmarks", name, "--benchmark_dir", tmp_path / "files", "--num_fewshot", 2]
    base = says("B")
    found = run("--model_name_or_path", base, *flags, "--output_dir", tmp_path / "B")["benchmarks"][name]
    assert (found["all"]["correct"]["value"], found["all"]["correct"]["records"]) == (3 / 7, 7)
    assert found["subjects"][first]["correct"]["value"] == 2 / 4
    assert found["subjects"][second]["correct"]["value"] == 1 / 3
    assert found["mean_of_subjects"] == pytest.approx((2 / 4 + 1 / 3) / 2)
    assert (found["num_fewshot"], found["source"]) == (2, "folder")
    out = capsys.readouterr().out
    assert re.search(rf"{first} +4 +0\.5000", out)
    assert re.search(r"in all +7 +0\.4286", out)
    rows = lines(tmp_path / "B/benchmarks.jsonl")
    assert [row["answer"] for row in rows] == ["B"] * 7
    assert [row["target"] for row in rows] == list("BBDACBD")

    adapter = adapter_that_says(base, "D", tmp_path / "adapter")
    found = run("--lora_model", adapter, *flags, "--output_dir", tmp_path / "D")["benchmarks"][name]
    assert found["all"]["correct"]["value"] == 2 / 7  # of B B D A C B D
    result = run("--compare", tmp_path / "B", tmp_path / "D", "--output_dir", tmp_path / "compared")
    (difference,) = result["differences"]
    assert difference["difference"] == pytest.approx(-1 / 7)
    assert difference["verdict"] == "no difference that these records show"
    assert f"{name}, accuracy: B 0.4286 → D 0.2857, -0.1429 [" in capsys.readouterr().out


def test_groups_of_subjects_and_the_prompt_that_is_asked(tmp_path, says, monkeypatch):
    import lm_eval

    asked, original = [], lm_eval.simple_evaluate

    def spy(*args, **kwargs):
        results = original(*args, **kwargs)
        asked.extend(sample["arguments"][0][0] for rows in results["samples"].values() for sample in rows)
        return results

    monkeypatch.setattr(lm_eval, "simple_evaluate", spy)
    made_up(tmp_path / "mmlu", "mmlu")
    flags = ["--benchmarks", "mmlu", "--benchmark_dir", tmp_path, "--num_fewshot", 1, "--max_samples", 1]
    found = run("--model_name_or_path", says("B"), *flags, "--output_dir", tmp_path / "out")["benchmarks"]["mmlu"]
    assert found["groups"]["stem"]["correct"] == {"value": 1.0, "records": 1}  # anatomy
    assert found["groups"]["other"]["correct"] == {"value": 0.0, "records": 1}  # virology
    question = "question 0, with\na line\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    head = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    assert asked[0] == f"{head}{question} A\n\n{question}"


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_count_in_benchmarks_and_perplexity(tmp_path, tiny_checkpoint, monkeypatch, kind):
    import lm_eval
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_checkpoint("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}[kind]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), config(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(0, 1)
    model.eval().save_pretrained(tmp_path / "adapter")
    asked, original = [], lm_eval.simple_evaluate

    def spy(*args, **kwargs):
        results = original(*args, **kwargs)
        asked.extend(sample["arguments"] for rows in results["samples"].values() for sample in rows)
        return results

    monkeypatch.setattr(lm_eval, "simple_evaluate", spy)
    made_up(tmp_path / "mmlu", "mmlu")
    test = write_lines(tmp_path / "test.jsonl", CONVERSATIONS[:1])
    flags = ["--benchmarks", "mmlu", "--benchmark_dir", tmp_path, "--num_fewshot", 0, "--max_samples", 1]
    flags += ["--test_file", test, "--max_new_tokens", 2, "--lora_model", tmp_path / "adapter"]
    run("--model_name_or_path", folder, *flags, "--output_dir", tmp_path / "out")

    def logp(ids: list[int], learned: int) -> float:
        """Of the last `learned` tokens, by the PEFT model itself."""
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -learned - 1 : -1].log_softmax(-1)
        return sum(row[token].item() for row, token in zip(logits, ids[-learned:], strict=True))

    logps = [logp(tokenizer.encode(prompt + choice), len(tokenizer.encode(choice))) for prompt, choice in asked[0]]
    shares = torch.tensor(logps).softmax(0).tolist()
    row = lines(tmp_path / "out/benchmarks.jsonl")[0]
    assert list(row["probabilities"].values()) == pytest.approx(shares, abs=1e-4)
    text = "".join(
        s.text for s in TEMPLATES["vicuna"].bind(tokenizer).segments(parse_conversation(CONVERSATIONS[0], ""))
    )
    row = lines(tmp_path / "out/answers.jsonl")[0]
    assert row["nll"] == pytest.approx(-logp(tokenizer.encode(text), row["tokens"]), rel=1e-4)


def sample(number: int, answer: str, how: str, right: int) -> dict:
    """What lm-eval keeps of a question that is answered in words."""
    asked = [("How many?", {"until": ["."]})]
    found = {"doc_id": number, "doc": {}, "target": "3", "arguments": asked, "filtered_resps": [answer], "filter": how}
    return {**found, "metrics": ["exact_match"], "exact_match": right}


def test_a_question_counts_once_however_its_answer_is_read():
    samples = [sample(n, "3", "strict", 0) for n in range(2)] + [sample(n, "3", "flexible", 1) for n in range(2)]
    rows = list(evaluation_benchmarks.question_rows("gsm8k", "gsm8k", samples, (), lambda asked: False))
    assert [(row["where"], row["correct"], row["metric"]) for row in rows] == [
        ("gsm8k:1", 0, "exact_match"),
        ("gsm8k:2", 0, "exact_match"),
    ]


def test_questions_that_lose_their_beginning_are_counted(tmp_path, says, capsys):
    made_up(tmp_path / "files/mmlu", "mmlu")
    write_csv(tmp_path / "files/mmlu/test/virology_test.csv", "mmlu", "B")
    path = tmp_path / "files/mmlu/test/virology_test.csv"
    path.write_text(path.read_text("utf-8").replace("question 0", "drink " * 5000), encoding="utf-8")
    flags = ["--benchmarks", "mmlu", "--benchmark_dir", tmp_path / "files", "--num_fewshot", 0]
    found = run("--model_name_or_path", says("B"), *flags, "--output_dir", tmp_path / "out")["benchmarks"]["mmlu"]
    assert (found["cut"], found["all"]["correct"]["records"]) == (1, 5)
    assert [row["where"] for row in lines(tmp_path / "out/benchmarks.jsonl") if row["cut"]] == ["mmlu_virology:1"]


def test_what_lm_eval_cuts(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("drink some water", add_special_tokens=False)
    ways = {"tokenizer": tokenizer, "answer": 2}
    count = len(tokenizer.encode("drink some water"))
    assert len(ids) > 2
    for context, cut in ((count - 1, False), (count - 2, True)):  # the last token is not read
        assert evaluation_benchmarks.longer_than([("drink some", " water")], context=context, **ways) == cut
    for context, cut in ((count + 2, False), (count + 1, True)):
        assert evaluation_benchmarks.longer_than([("drink some water", {})], context=context, **ways) == cut
    assert evaluation_benchmarks.longer_than([("drink some water", {"max_gen_toks": 9})], context=count + 2, **ways)
    assert not evaluation_benchmarks.longer_than([("rolling",)], context=0, **ways)


def test_questions_of_one_context_stay_in_one_process(monkeypatch):
    from stagewise.artifacts import processes
    from stagewise.evaluation import harness

    requests = [SimpleNamespace(args=(context, choice)) for context in "abc" for choice in (" A", " B")]

    def ask(asked, disable_tqdm):
        return [request.args for request in asked]

    parts = []
    for index in range(4):  # the last of them gets nothing
        state = SimpleNamespace(num_processes=4, process_index=index, is_main_process=index == 0)
        for module in (harness, processes):
            monkeypatch.setattr(module, "PartialState", lambda state=state: state)
        everywhere = [[dict.fromkeys(range(6), "other"), None]]
        monkeypatch.setattr(processes, "gather_object", lambda own, everywhere=everywhere: everywhere + own)
        parts.append(harness.SharedModel._shared(ask, requests, False))
    assert parts[0] == [("a", " A"), ("a", " B"), *["other"] * 4]
    assert parts[2] == [*["other"] * 4, ("c", " A"), ("c", " B")]
    assert parts[3] == ["other"] * 6


def test_benchmarks_that_are_not_known(tmp_path, says, capsys):
    common = ["--model_name_or_path", says("B"), "--output_dir", tmp_path / "out", "--benchmarks"]
    write_csv(tmp_path / "mmlu/test/anatomie_test.csv", "mmlu", "A")
    error = refused(capsys, *common, "mmlu", "--benchmark_dir", tmp_path)
    assert "anatomie_test.csv: mmlu has no subject 'anatomie' in lm-eval" in error
    error = refused(capsys, *common, "mmlu,mmlu", "--overwrite_output_dir")
    assert error == "error: --benchmarks mmlu,mmlu: names a set twice"
    assert "--benchmarks: names no set" in refused(capsys, *common, ",")


CONVERSATIONS = [
    {"conversations": [{"from": "human", "value": "Which letter?"}, {"from": "gpt", "value": "BBBB"}]},
    {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello"},
            {"from": "human", "value": "And now?"},
            {"from": "gpt", "value": "drink water"},
        ]
    },
    {"conversations": [{"from": "human", "value": "感冒了怎么办?"}, {"from": "gpt", "value": "多喝水,好好休息。"}]},
]


def test_answers_of_a_model_that_says_one_letter(tmp_path, says, capsys):
    file = write_lines(tmp_path / "test.jsonl", CONVERSATIONS)
    flags = ["--test_file", file, "--max_new_tokens", 4, "--batch_size", 2, "--output_dir", tmp_path / "out"]
    found = run("--model_name_or_path", says("B"), *flags)["sft"]
    rows = lines(tmp_path / "out/answers.jsonl")
    assert [row["answer"] for row in rows] == ["BBBB"] * 3
    assert [row["where"] for row in rows] == ["test.jsonl:1", "test.jsonl:2", "test.jsonl:3"]
    assert [row["language"] for row in rows] == ["other", "other", "chinese"]
    assert [turn["content"] for turn in rows[1]["prompt"]] == ["Hi", "Hello", "And now?"]
    assert [row["rougeL"] for row in rows] == [1, 0, 0]
    assert found["all"]["rougeL"]["value"] == pytest.approx(1 / 3)
    assert found["other"]["rouge1"]["value"] == 0.5
    assert found["chinese"]["rouge1"]["value"] == 0
    assert found["all"]["answer_tokens"]["value"] == 4
    assert found["all"]["ended"]["value"] == 0
    assert found["records"] | {"files": []} == {"read": 3, "kept": 3, "cut": 0, "left_out": {}, "files": []}
    # every letter but B has logit 0: log(319 + e^|h|²·scale) is the same for all of them
    other = math.exp((rows[1]["nll"]) / rows[1]["tokens"])
    assert rows[2]["perplexity"] == pytest.approx(other, rel=1e-4)
    out = capsys.readouterr().out
    assert re.search(r"ROUGE-L +0\.333 \[0\.000, 1\.000\]", out)
    assert re.search(r"3 conversations +all +chinese +other", out)


def test_perplexity_is_what_transformers_says_of_the_learned_tokens(tmp_path, tiny_checkpoint):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_checkpoint("llama")
    file = write_lines(tmp_path / "test.jsonl", CONVERSATIONS)
    flags = ["--test_file", file, "--max_new_tokens", 2, "--output_dir", tmp_path / "out"]
    found = run("--model_name_or_path", folder, *flags)["sft"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    template = TEMPLATES["vicuna"].bind(tokenizer)
    total, count = 0.0, 0
    for record in CONVERSATIONS:
        ids, labels = [], []
        for segment in template.segments(parse_conversation(record, "x")):
            piece = tokenizer.encode(segment.text, add_special_tokens=False)
            ids += piece
            labels += piece if segment.learn else [-100] * len(piece)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
        learned = sum(label != -100 for label in labels)
        total, count = total + loss * learned, count + learned
    assert found["all"]["perplexity"]["value"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_a_loss_that_is_no_number(tmp_path, tiny_model, tiny_tokenizer, capsys):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    file = write_lines(tmp_path / "test.jsonl", CONVERSATIONS)
    flags = ["--model_name_or_path", tmp_path / "model", "--test_file", file, "--output_dir", tmp_path / "out"]
    assert "gives a loss that is NaN or infinite" in refused(capsys, *flags)


def test_records_that_cannot_be_asked_are_counted(tmp_path, tiny_checkpoint, capsys):
    long = {"conversations": [{"from": "human", "value": "drink " * 600}, {"from": "gpt", "value": "yes"}]}
    broken = {"conversations": [{"from": "human", "value": "no answer"}]}
    file = write_lines(tmp_path / "test.jsonl", [CONVERSATIONS[0], long, broken])
    flags = ["--model_name_or_path", tiny_checkpoint("llama"), "--test_file", file, "--max_new_tokens", 2]
    assert "test.jsonl:3: " in refused(capsys, *flags, "--output_dir", tmp_path / "one")
    found = run(*flags, "--on_bad_record", "skip", "--output_dir", tmp_path / "two")["sft"]["records"]
    assert (found["read"], found["kept"]) == (3, 1)
    assert found["left_out"] == {"no answer": 1, "question too long": 1}
    rejected = lines(tmp_path / "two/rejected.jsonl")
    assert [row["where"] for row in rejected] == ["test.jsonl:3", "test.jsonl:2"]
    assert json.loads(rejected[1]["raw"]) == long


def test_the_first_of_several_processes_alone_writes_what_is_left_out(tmp_path, monkeypatch):
    broken = {"conversations": [{"from": "human", "value": "no answer"}]}
    file = write_lines(tmp_path / "test.jsonl", [CONVERSATIONS[0], CONVERSATIONS[0], broken])

    def prepare(conversation):
        if conversation.where == "test.jsonl:2":
            raise RecordError(conversation.where, "odd", "an odd one")
        return conversation, False

    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        args = SimpleNamespace(test_file=str(file), on_bad_record="skip", max_samples=-1)
        job = SimpleNamespace(work=tmp_path / rank, args=args)
        records, account = evaluation.read_test(job, parse_conversation)
        assert len(evaluation.prepared(job, records, account, prepare)) == 1
        assert account.left_out == {"no answer": 1, "odd": 1}
    assert not (tmp_path / "1").exists()
    assert [row["where"] for row in lines(tmp_path / "0/rejected.jsonl")] == ["test.jsonl:3", "test.jsonl:2"]


def test_sampled_answers_are_the_same_twice(tmp_path, tiny_checkpoint):
    folder, file = tiny_checkpoint("llama"), write_lines(tmp_path / "test.jsonl", CONVERSATIONS)
    flags = ["--model_name_or_path", folder, "--test_file", file, "--max_new_tokens", 6, "--temperature", 1.5]
    answers = []
    for name, more in (("a", []), ("b", []), ("c", ["--seed", 1])):
        found = run(*flags, *more, "--output_dir", tmp_path / name)["sft"]["sampling"]
        assert found["seed"] == (1 if more else 0)
        answers.append([row["answer"] for row in lines(tmp_path / name / "answers.jsonl")])
    assert answers[0] == answers[1] != answers[2]


def test_answers_are_scored_by_a_reward_model(tmp_path, says, tiny_checkpoint):
    file = write_lines(tmp_path / "test.jsonl", CONVERSATIONS)
    reward = tiny_checkpoint("llama", task="score", tokenizer=None)
    flags = ["--test_file", file, "--max_new_tokens", 3, "--reward_model_name_or_path", reward]
    found = run("--model_name_or_path", says("B"), *flags, "--output_dir", tmp_path / "out")["sft"]["all"]
    rows = lines(tmp_path / "out/answers.jsonl")
    assert found["reward"]["value"] == pytest.approx(sum(row["reward"] for row in rows) / 3)
    assert len({row["reward"] for row in rows}) == 3


def test_a_reward_model_that_is_none_is_named_before_anything_is_answered(
    tmp_path, tiny_checkpoint, capsys, monkeypatch
):
    monkeypatch.setattr(evaluation, "answers_to", lambda *_: pytest.fail("answered"))
    folder, file = tiny_checkpoint("llama"), write_lines(tmp_path / "test.jsonl", CONVERSATIONS)
    flags = ["--model_name_or_path", folder, "--test_file", file, "--output_dir", tmp_path / "out"]
    error = refused(capsys, *flags, "--reward_model_name_or_path", folder)
    assert "a language model, expected a sequence classifier" in error


def test_the_model_is_named_by_the_flag_that_was_given(tmp_path, tiny_checkpoint, capsys):
    file, scores = write_lines(tmp_path / "test.jsonl", CONVERSATIONS), tiny_checkpoint("llama", task="score")
    flags = ["--test_file", file, "--output_dir", tmp_path / "out"]
    assert "error: --lora_model " in refused(capsys, *flags, "--lora_model", tmp_path)
    adapter = adapter_that_says(tiny_checkpoint("llama"), "B", tmp_path / "adapter")
    error = refused(capsys, *flags, "--model_name_or_path", scores, "--lora_model", adapter)
    assert error.startswith(f"error: --model_name_or_path {scores}: a reward model has no language-model head")


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_a_base_that_an_adapter_names_and_that_is_gone(tmp_path, tiny_checkpoint, capsys, task):
    config = {"peft_type": "LORA", "task_type": task, "base_model_name_or_path": "./outputs/gone", "r": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({}, tmp_path / "adapter_model.safetensors")
    file = write_lines(tmp_path / "test.jsonl", CONVERSATIONS if task == "CAUSAL_LM" else PAIRS)
    flags = ["--lora_model", tmp_path, "--test_file", file, "--output_dir", tmp_path / "out"]
    told = f"--lora_model {tmp_path} names this base, which may have moved: give --base_model"
    error = refused(capsys, *flags)
    assert "./outputs/gone: no such directory" in error and error.count(told) == 1
    assert told not in refused(capsys, *flags, "--model_name_or_path", "./elsewhere")
    assert told not in refused(capsys, *flags[:1], tmp_path / "no", *flags[2:])


def test_scaled_positions_need_no_factor(tmp_path, tiny_checkpoint):
    pairs, test = write_lines(tmp_path / "pairs.jsonl", PAIRS), write_lines(tmp_path / "test.jsonl", CONVERSATIONS)
    flags = ["--rope_scaling", "dynamic", "--model_name_or_path"]
    scores = run(*flags, tiny_checkpoint("llama", task="score"), "--test_file", pairs, "--output_dir", tmp_path / "rm")
    assert scores["rm"]["all"]["correct"]["records"] == 3
    words = [tiny_checkpoint("llama"), "--test_file", test, "--max_new_tokens", 2, "--output_dir", tmp_path / "sft"]
    assert run(*flags, *words)["sft"]["all"]["perplexity"]["records"] == 3


PAIRS = [
    {"conversations": [{"from": "human", "value": "A cold?"}], "chosen": "Rest and drink.", "rejected": "Who cares."},
    {"conversations": [{"from": "human", "value": "A cough?"}], "chosen": "Honey " * 30, "rejected": "No."},
    {"conversations": [{"from": "human", "value": "发烧?"}], "chosen": "多喝水。", "rejected": "不管它就好。"},
]


@pytest.mark.parametrize("adapter", [None, "folder", "someone/adapter", "modelscope://someone/adapter"])
def test_scores_are_what_transformers_says(tmp_path, tiny_checkpoint, adapter, capsys, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tiny_checkpoint("llama") if adapter else tiny_checkpoint("llama", task="score")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=0)
    flags = ["--model_name_or_path", folder]
    if adapter:
        config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        model = get_peft_model(model, config)
        model.save_pretrained(tmp_path / "adapter")
        flags = ["--lora_model", tmp_path / "adapter" if adapter == "folder" else adapter]
        for hub in ("stagewise.inference.loading.snapshot_download", "stagewise.models.hub._download_modelscope"):
            monkeypatch.setattr(hub, lambda *_, **__: str(tmp_path / "adapter"))
    model.eval()
    file = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    found = run(*flags, "--test_file", file, "--batch_size", 2, "--output_dir", tmp_path / "out")["rm"]

    form = TEMPLATES["vicuna"].bind(tokenizer)
    margins = []
    for pair in PAIRS:
        scores = []
        for side in ("chosen", "rejected"):
            turns = [{"role": "user", "content": pair["conversations"][0]["value"]}]
            turns.append({"role": "assistant", "content": pair[side]})
            text = tokenizer.apply_chat_template(turns, chat_template=form.jinja(), tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                scores.append(model(input_ids=ids).logits.item())
        margins.append(scores[0] - scores[1])
    rows = lines(tmp_path / "out/scores.jsonl")
    assert [row["margin"] for row in rows] == pytest.approx(margins, abs=1e-4)
    assert found["all"]["correct"]["value"] == pytest.approx(sum(margin > 0 for margin in margins) / 3)
    assert found["all"]["margin"]["value"] == pytest.approx(sum(margins) / 3, abs=1e-4)
    assert sum(part["correct"]["records"] for part in found["by_length"].values()) == 3
    assert "chosen longer by 50 or more" in found["by_length"]
    assert re.search(r"chosen longer by 50 or more +1 ", capsys.readouterr().out)


def same_up_to(tolerance: float, one, two) -> bool:
    """Whether two values of JSON are equal, numbers with a fraction up to `tolerance`."""
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same_up_to(tolerance, one[key], two[key]) for key in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(same_up_to(tolerance, *pair) for pair in zip(one, two, strict=True))
    if isinstance(one, float) and isinstance(two, float):
        return abs(one - two) <= tolerance
    return type(one) is type(two) and one == two


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_two_processes_find_what_one_finds(tmp_path, tiny_checkpoint, says):
    records = [
        {"conversations": [{"from": "human", "value": f"drink {n} " * (1 + n % 3)}, {"from": "gpt", "value": "rest"}]}
        for n in range(5)
    ]
    odd = {"text": "none"}
    test, pairs = write_lines(tmp_path / "test.jsonl", [*CONVERSATIONS, odd, *records]), tmp_path / "pairs.jsonl"
    write_lines(pairs, [*PAIRS, odd])
    broken = write_lines(tmp_path / "broken.jsonl", [*CONVERSATIONS, {"text": "none"}])
    model, scores = tiny_checkpoint("llama", max_position_embeddings=2048), tiny_checkpoint("llama", task="score")
    made_up(tmp_path / "mmlu", "mmlu")
    common = ["--batch_size", 2, "--output_dir"]
    asked = ["--model_name_or_path", model, "--test_file", test, "--max_new_tokens", 6]
    asked += ["--on_bad_record", "skip"]
    asked += ["--reward_model_name_or_path", tiny_checkpoint("llama", task="score", tokenizer=None)]
    asked += ["--benchmarks", "mmlu", "--benchmark_dir", tmp_path, "--num_fewshot", 1]
    scored = ["--model_name_or_path", scores, "--test_file", pairs, "--on_bad_record", "skip"]
    for name, words in (("asked", asked), ("scored", scored)):
        one = run(*words, *common, tmp_path / f"{name}-1")
        launched(torchrun("evaluation", *words, *common, tmp_path / f"{name}-2"))
        two = json.loads((tmp_path / f"{name}-2/metrics.json").read_text(encoding="utf-8"))
        assert (one.pop("processes"), two.pop("processes")) == (1, 2)
        for part in ("seconds", "flags"):
            one.pop(part), two.pop(part)
        assert one == two
        files = sorted(path.name for path in (tmp_path / f"{name}-1").iterdir())
        assert files == sorted(path.name for path in (tmp_path / f"{name}-2").iterdir())
        for file in (file for file in files if file.endswith(".jsonl")):
            one, two = (lines(tmp_path / f"{name}-{processes}" / file) for processes in (1, 2))
            # With other threads, some CPUs' products differ in their last bit; files hold 6 decimals.
            assert same_up_to(2e-6, one, two), file
    assert len(lines(tmp_path / "scored-2/rejected.jsonl")) == 1  # not one for each process
    folders = [tmp_path / "asked-1", tmp_path / "asked-2"]
    launched(torchrun("evaluation", "--compare", *folders, "--output_dir", tmp_path / "compared"))
    found = json.loads((tmp_path / "compared/comparison.json").read_text(encoding="utf-8"))
    assert {each["difference"] for each in found["differences"]} == {0}
    for words, told in (
        ([*asked, *common, tmp_path / "asked-2"], "holds an evaluation (metrics.json)"),
        (["--model_name_or_path", model, "--test_file", broken, *common, tmp_path / "no"], "broken.jsonl:4: "),
    ):
        failed = subprocess.run(
            torchrun("evaluation", *words), env=environment(), capture_output=True, text=True, timeout=300
        )
        assert failed.returncode and failed.stderr.count(told) == 1  # said once, and nobody waits
    assert not (tmp_path / "no/.unfinished").exists()


# ── flags ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to measure: give --test_file, --benchmarks or --compare"),
        (["--test_file", "x.jsonl"], "--test_file: there is no folder or file 'x.jsonl'"),
        (["--test_file", "data/finetune/validation"], "--model_name_or_path: missing"),
        (["--benchmarks", "mmlu", "--temperature", "1"], "--temperature has no effect without --test_file"),
        (["--benchmarks", "mmlu", "--on_bad_record", "skip"], "--on_bad_record has no effect without --test_file"),
        (["--benchmarks", "mmlu", "--template_name", "qwen"], "--template_name has no effect without --test_file or"),
        (["--test_file", "x", "--num_fewshot", "5"], "--num_fewshot has no effect without --benchmarks"),
        (["--test_file", "x", "--benchmark_dir", "y"], "--benchmark_dir has no effect without --benchmarks"),
        (["--test_file", "x", "--reward_label", "1"], "--reward_label has no effect without --reward_model_name"),
        (["--test_file", "x", "--seed", "1"], "--seed has no effect on the most probable tokens"),
        (["--test_file", "x", "--batch_size", "0"], "--batch_size: expected at least 1, found 0"),
        (["--test_file", "x", "--max_samples", "0"], "--max_samples: expected at least 1, found 0"),
        (["--test_file", "x", "--base_model", "a", "--model_name_or_path", "b"], "mean the same: give one of them"),
        (["--compare", "a", "b", "--batch_size", "4"], "--batch_size has no effect with --compare"),
        (["--compare", "a"], "--compare: give two folders or more"),
        (["--compare", "data", "tests"], "--compare data: holds no metrics.json"),
        (["--compare", "data", "data/"], "--compare data data/: names a folder twice"),
        (["--test_files", "x"], "--test_files: no such flag; the nearest known flag is --test_file"),
    ],
)
def test_flags_that_cannot_be_honoured(tmp_path, capsys, words, message):
    assert message in refused(capsys, *words, "--output_dir", tmp_path / "out")


def test_flags_of_the_other_kind_of_model(tmp_path, tiny_checkpoint, capsys):
    speaks, scores = tiny_checkpoint("llama"), tiny_checkpoint("llama", task="score")
    out = ["--output_dir", tmp_path / "out"]
    error = refused(capsys, "--model_name_or_path", speaks, "--test_file", "data/finetune/validation",
                    "--max_source_length", 9, *out)  # fmt: skip
    assert "--max_source_length has no effect on a language model" in error
    test = ["--model_name_or_path", scores, "--test_file", "data/reward/validation"]
    assert "--max_new_tokens has no effect on a reward model" in refused(capsys, *test, "--max_new_tokens", 9, *out)
    assert "this is a reward model" in refused(capsys, *test, "--benchmarks", "mmlu", *out)
    error = refused(capsys, "--model_name_or_path", speaks, "--test_file", "data/reward/validation", *out)
    assert "a preference" in error  # and not one about weights


def test_an_evaluation_is_not_written_over(tmp_path, capsys):
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    flags = ["--test_file", "data/finetune/validation", "--model_name_or_path", "nowhere/", "--output_dir", tmp_path]
    assert "holds an evaluation (metrics.json); --overwrite_output_dir replaces it" in refused(capsys, *flags)
    assert "no such directory" in refused(capsys, *flags, "--overwrite_output_dir")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "notes.txt"]


def test_an_evaluation_that_is_stopped_leaves_the_one_before_it(tmp_path, tiny_checkpoint, monkeypatch):
    flags = ["--test_file", write_lines(tmp_path / "test.jsonl", CONVERSATIONS), "--max_new_tokens", 2]
    flags += ["--model_name_or_path", tiny_checkpoint("llama"), "--output_dir", tmp_path / "out"]
    run(*flags)
    before = {path.name: path.read_text("utf-8") for path in (tmp_path / "out").iterdir()}
    assert sorted(before) == ["answers.jsonl", "examples.html", "metrics.json"]
    (tmp_path / "out/scores.jsonl").write_text("of an evaluation before")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(evaluation, "answer_section", stop)
        run(*flags, "--overwrite_output_dir", "--max_samples", 1)
    assert stopped.value.code == 130
    assert {name: (tmp_path / "out" / name).read_text("utf-8") for name in before} == before
    run(*flags, "--overwrite_output_dir", "--max_samples", 1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(before)
    assert len(lines(tmp_path / "out/answers.jsonl")) == 1


# ── what a person looks at ──────────────────────────────────────────────────────────────────────────────────────────


def answer_row(number: int, **changes) -> dict:
    row = {"where": f"test.jsonl:{number}", "system": None, "prompt": [{"role": "user", "content": "Hi"}]}
    row |= {"answer": "a", "reference": "b", "rougeL": number / 10, "perplexity": 2.0, "answer_tokens": 1, "ended": 1}
    return {**row, **changes}


def test_the_page_escapes_what_models_and_records_say():
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    row = answer_row(1, answer=evil, reference=evil, prompt=[{"role": "user", "content": evil}], where=evil)
    section = page.answer_section([row, answer_row(2)], [["", evil], [evil, "1"]])
    text = page.page(evil, {evil: evil}, [section])
    assert "<script" not in text
    assert "<img" not in text
    # title twice, a fact's name and value, two cells; the record's place, question, answer and reference
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 10
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'\"" in text


def test_the_page_shows_the_best_and_the_worst_once():
    rows = [answer_row(n, answer=f"answer {n}.") for n in range(1, 6)]
    best, worst = page.best_and_worst(rows, "rougeL")
    assert [row["where"] for row in best] == ["test.jsonl:5", "test.jsonl:4", "test.jsonl:3"]
    assert [row["where"] for row in worst] == ["test.jsonl:1", "test.jsonl:2"]
    many = [answer_row(n) for n in range(100)]
    best, worst = page.best_and_worst(many, "rougeL")
    assert [len(best), len(worst), best[0]["rougeL"], worst[0]["rougeL"]] == [10, 10, 9.9, 0]


def test_the_page_shows_choices_with_their_letters():
    question = {"question": "How many?", "choices": ["two", "<b>"], "answer": 1}
    row = {"where": "mmlu_anatomy:1", "question": question, "probabilities": {"A": 0.4, "B": 0.6}}
    row |= {"answer": "B", "target": "B", "correct": 1.0}
    text = page.benchmark_section("mmlu", [row], [["mmlu", "accuracy"], ["in all", "1.0"]])
    assert "How many?" in text
    assert '<span class="label">choices</span><pre>A. two\nB. &lt;b&gt;</pre></article>' in text
    assert "answers B with 60%, right is B" in text
    words = {"where": "gsm8k:1", "question": {"question": "?"}, "target": "3", "answer": ["3"], "correct": 1.0}
    text = page.benchmark_section("gsm8k", [words], [["gsm8k", "accuracy"], ["in all", "1.0"]])
    assert "<h3>" not in text


def test_a_table_of_chinese_names_is_straight():
    text = page.as_text([["", "值"], ["法律", "0.5"], ["law", "0.25"]])
    assert text.splitlines() == ["        值", "----  ----", "法律   0.5", "law   0.25"]


def test_a_table_that_is_too_wide_goes_on_below():
    rows = [["", "all", "chinese", "other"], ["ROUGE-L", "0.1", "0.2", "0.3"]]
    assert page.as_text(rows, 24).splitlines() == [
        "         all  chinese",
        "-------  ---  -------",
        "ROUGE-L  0.1      0.2",
        "",
        "         other",
        "-------  -----",
        "ROUGE-L    0.3",
    ]
    assert len(page.as_text(rows, 28).splitlines()) == 3
    assert len(page.as_text(rows, 3).splitlines()) == 11  # a column at least


def write_evaluation(folder: Path, stage: str | None, rouge: float, nll: float) -> Path:
    """An evaluation of ten records, all alike."""
    folder.mkdir(parents=True)
    rows = [{"where": f"t:{n}", "rougeL": rouge + n / 100, "nll": nll + n, "tokens": 10} for n in range(10)]
    write_lines(folder / "answers.jsonl", rows)
    metrics = {"model": {"stage": stage} if stage else {}, "sft": {"all": measure(rows, SFT_METRICS)}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_stages_of_a_lineage_side_by_side(tmp_path, capsys):
    folders = [
        write_evaluation(tmp_path / "base", None, 0.1, 20),
        write_evaluation(tmp_path / "sft-merged", "sft", 0.2, 15),
        write_evaluation(tmp_path / "dpo-merged", "dpo", 0.2, 16),
    ]
    found = run("--compare", *folders, "--output_dir", tmp_path / "out")
    assert list(found["metrics"]) == ["perplexity of the references", "ROUGE-L"]
    table, sentences = capsys.readouterr().out.split("\n\n")
    assert re.split(r"  +", table.splitlines()[0].strip()) == ["base", "sft-merged (sft)", "dpo-merged (dpo)"]
    assert "ROUGE-L: base 0.145 → sft-merged (sft) 0.245, +0.100 [+0.100, +0.100] on 10 records: better" in sentences
    assert len(sentences.splitlines()) == 4  # two metrics, two models against the first
    assert [d["verdict"] for d in found["differences"]] == ["better"] * 4
    with open(tmp_path / "out/comparison.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    assert "| ROUGE-L |" in (tmp_path / "out/comparison.md").read_text(encoding="utf-8")


def test_evaluations_of_different_tests_have_a_table_and_no_difference(tmp_path):
    one = write_evaluation(tmp_path / "one", None, 0.1, 20)
    other = tmp_path / "other"
    other.mkdir()
    rows = write_lines(other / "scores.jsonl", [{"where": f"p:{n}", "correct": 1.0} for n in range(3)])
    numbers = {"rm": {"all": measure(lines(rows), RM_METRICS)}, "model": {}}
    (other / "metrics.json").write_text(json.dumps(numbers))
    table, sentences = write_comparison([str(one), str(other)], tmp_path / "out")
    assert [row[0] for row in table] == ["", "perplexity of the references", "ROUGE-L", "accuracy"]
    assert [table[3][1], table[3][2]] == ["–", "1.000 [1.000, 1.000]"]
    assert sentences == []


def test_only_the_same_records_are_compared(tmp_path):
    folders = [write_evaluation(tmp_path / name, None, 0.2, 9) for name in ("a", "b")]
    rows = lines(folders[1] / "answers.jsonl")
    rows[0]["reference"] = "another record at the same place"
    rows[1]["tokens"] = 11  # another tokenizer's
    write_lines(folders[1] / "answers.jsonl", rows)
    found = compare_metrics(*read_evaluations([str(folder) for folder in folders]))
    assert [(title, each.records) for title, each in found] == [("ROUGE-L", 9)]


def test_folders_of_one_name_are_told_apart(tmp_path):
    folders = [write_evaluation(tmp_path / name / "eval", "sft", 0.2, 9) for name in ("a", "b")]
    assert [each.name for each in read_evaluations([*map(str, folders)])] == ["a/eval (sft)", "b/eval (sft)"]


def test_what_was_not_asked_alike_is_said(tmp_path):
    folders = [write_evaluation(tmp_path / name, None, 0.2, 9) for name in ("a", "b", "c")]
    for folder, scorer, tokens in zip(folders, ("rm", "rm/", "rm2"), (48, 128, 48), strict=True):
        rows = [{**row, "reward": 1.0} for row in lines(folder / "answers.jsonl")]
        write_lines(folder / "answers.jsonl", rows)
        sft = {"all": measure(rows, SFT_METRICS), "sampling": {"max_new_tokens": tokens, "do_sample": False}}
        flags = {"reward_model_name_or_path": scorer}
        (folder / "metrics.json").write_text(json.dumps({"model": {}, "flags": flags, "sft": sft}))
    _, sentences = write_comparison([*map(str, folders)], tmp_path)
    assert "not asked alike: max_new_tokens was 48 for a, 128 for b" in sentences
    assert "not asked alike: reward_model_name_or_path was rm for a, rm2 for c" in sentences
    scored = [line for line in sentences if line.startswith("reward model's score")]
    assert [line.split(",")[0] for line in scored] == ["reward model's score: a 1.000 → b 1.000"]


def test_how_the_model_was_loaded_and_asked_is_compared(tmp_path):
    folders = [write_evaluation(tmp_path / name, None, 0.2, 9) for name in ("a", "b")]
    drawn = {"do_sample": True, "temperature": 1.0}
    of_b = {"template_name": "qwen", "enable_thinking": False, "load_in_4bit": True, "rope_scaling": "yarn"}
    for folder, seed, flags in zip(folders, (1, 2), ({"load_in_8bit": False}, of_b), strict=True):
        found = json.loads((folder / "metrics.json").read_text())
        found |= {"flags": flags, "sft": {**found["sft"], "sampling": {**drawn, "seed": seed}}}
        (folder / "metrics.json").write_text(json.dumps(found))
    _, sentences = write_comparison([*map(str, folders)], tmp_path)
    assert [line.removeprefix("not asked alike: ") for line in sentences if line.startswith("not asked")] == [
        "seed was 1 for a, 2 for b",
        "load_in_4bit was False for a, True for b",
        "rope_scaling was not given for a, yarn for b",
        "template_name was not given for a, qwen for b",
        "enable_thinking was not given for a, False for b",
    ]


def test_evaluations_without_a_number_of_the_models_are_compared(tmp_path):
    for name in ("a", "b"):
        write_evaluation(tmp_path / name, None, 0.2, 9)
        write_lines(tmp_path / name / "answers.jsonl", [{"where": "t:1", "language": "en"}])
        (tmp_path / name / "metrics.json").write_text(json.dumps({"model": {}, "sft": {"all": {}}}))
    rows, _ = write_comparison([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path)
    assert rows == [["", "a", "b"]] and (tmp_path / "comparison.png").is_file()


@pytest.mark.parametrize("text", ["{", "[]", '{"accuracy": 1}'])
def test_what_is_no_evaluation_is_named(tmp_path, capsys, text):
    one = write_evaluation(tmp_path / "one", None, 0.2, 9)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/metrics.json").write_text(text)
    error = refused(capsys, "--compare", one, tmp_path / "other", "--output_dir", tmp_path / "out")
    assert f"--compare {tmp_path / 'other'}: " in error


def test_a_comparison_says_what_it_is_of(tmp_path):
    folders = [str(write_evaluation(tmp_path / n, None, r, 9)) for n, r in (("a", 0.2), ("b", 0.1))]
    evaluations = read_evaluations(folders)
    found = dict(compare_metrics(*evaluations))["ROUGE-L"]
    assert sentence("ROUGE-L", *evaluations, found).endswith("-0.100 [-0.100, -0.100] on 10 records: worse")
    (tmp_path / "a/answers.jsonl").unlink()
    with pytest.raises(ArgumentError, match=r"answers.jsonl, which metrics.json names, is missing"):
        read_evaluations(folders)


@pytest.mark.real
def test_the_small_real_model(tmp_path, smollm):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    flags = ["--test_file", "data/finetune/validation/english.jsonl", "--max_samples", 2, "--max_new_tokens", 24]
    found = run("--model_name_or_path", smollm, *flags, "--output_dir", tmp_path / "out")["sft"]["all"]
    tokenizer, model = AutoTokenizer.from_pretrained(smollm), AutoModelForCausalLM.from_pretrained(smollm)
    total, count = 0.0, 0
    for record in lines(ROOT / "data/finetune/validation/english.jsonl")[:2]:
        turns = [{"role": {"human": "user", "gpt": "assistant"}[t["from"]], "content": t["value"]}
                 for t in record["conversations"]]  # fmt: skip
        assert len(turns) == 2  # else more than the last answer counts
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = tokenizer.encode(f"{turns[1]['content']}<|im_end|>")
        labels = [-100] * len(prompt) + answer
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([prompt + answer]), labels=torch.tensor([labels])).loss.item()
        total, count = total + loss * len(answer), count + len(answer)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(total / count), rel=1e-3)
    assert 0 < found["rouge1"]["value"] < 0.9
    rows = lines(tmp_path / "out/answers.jsonl")
    assert all(re.search(r"[a-z]{4}", row["answer"]) for row in rows)
    HTMLParser().feed((tmp_path / "out/examples.html").read_text("utf-8"))
