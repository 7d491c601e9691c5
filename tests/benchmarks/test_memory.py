"""benchmarks/memory.py without a GPU: which cells it plans, what it keeps, and its table."""

import json
import weakref

import pytest
import torch

from benchmarks import memory as benchmark
from benchmarks import memory_cell, memory_table
from benchmarks.memory_shapes import Cell

SMALL = ("--tokens", "16", "--steps", "1")


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def planned(*words) -> list[dict]:
    args = benchmark.parse_arguments(list(words))
    return benchmark.plan(benchmark.cells_of(args), benchmark.gpu_room(args)[0])


def test_all_published_shapes_and_methods_are_planned():
    cells = [(cell.shape, cell.method) for cell in benchmark.cells_of(benchmark.parse_arguments([]))]
    methods = ["full", "full16", "lora", "qlora8", "qlora4"]
    expected = [(shape, method) for shape in ("0.5B", "1.5B", "8B", "14B", "32B", "8x7B") for method in methods]
    assert cells == [*expected, ("8x7B", "qlora4_experts"), ("8x7B", "qlora4_all")]


@pytest.mark.parametrize(
    ("cell", "room", "fits"),
    [
        ("8B:full", 79, False),  # 8.03 billion weights, gradients and two states in float32: 120 GiB
        ("8B:full", 139, True),
        ("8B:full16", 79, True),  # the same in 16 bit: 60 GiB
        ("8x7B:qlora4", 79, False),  # 45.1 of 46.7 billion weights are experts, in 16 bit: 84 GiB
        ("8x7B:qlora4", 139, True),
        ("8x7B:qlora4_experts", 79, True),
        ("32B:lora", 79, True),
        ("32B:lora", 66, False),  # 61 GiB of weights, and 5 for the step: with the context it is above 66
    ],
)
def test_what_cannot_fit_is_said_beforehand(cell, room, fits):
    (row,) = planned("--cells", cell, "--gpu_gib", str(room))
    assert ("skipped" not in row) is fits
    if not fits:
        assert row["skipped"] == f"cannot fit: the GPU has {room:.1f} GiB"


def test_weights_of_the_plan_by_hand():
    rows = planned("--cells", "8B:full16,8x7B:lora,32B:qlora4")
    assert rows[0]["weights"] == 2 * 8_030_261_248
    assert rows[1]["weights"] == 2 * 46_702_792_704 + 4 * 6_815_744  # an adapter of rank 8 on attention, in float32
    # 31.2 billion in 4 bit with their scales, the embedding and the head (2 · 152064 · 5120) in 16
    assert rows[2]["weights"] == pytest.approx(31.2e9 * (0.5 + 1 / 64) + 2 * 2 * 152064 * 5120, rel=0.03)


def test_the_estimates_alone_are_printed(capsys):
    benchmark.main(["--dry_run", "--gpu_gib", "80", "--cells", "0.5B:lora,8B:full"])
    printed = capsys.readouterr()
    assert "cannot fit: the GPU has 80.0 GiB" in printed.err and "0.5B | lora" in printed.out


def test_rows_are_kept_as_they_are_finished_and_the_table_comes_last(tmp_path, monkeypatch, capsys):
    out, seen = tmp_path / "not_yet" / "rows.jsonl", []

    def start_cell(cell, seconds):
        seen.append((cell.shape, cell.method, len(rows_of(out)) if out.exists() else 0))
        measured = {"peak": 2**31, "tokens_per_second": 1234.5}
        return measured if cell.method == "lora" else {"skipped": "stopped after 9 s"}

    monkeypatch.setattr(benchmark, "start_cell", start_cell)
    words = ["--cells", "tiny:full,tiny:lora,8B:full", "--gpu_gib", "79", "--output", str(out), *SMALL]
    benchmark.main(words)
    assert seen == [("tiny", "full", 0), ("tiny", "lora", 1)]  # 8B:full is not begun
    assert [row.get("skipped") for row in rows_of(out)] == [
        "stopped after 9 s",
        None,
        "cannot fit: the GPU has 79.0 GiB",
    ]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("a GPU of 79 GiB: one row of 16 tokens, with gradient checkpointing")
    assert [line.split(" | ")[0] for line in printed[-3:]] == ["| tiny", "| tiny", "| 8B"]
    assert printed[-2].split(" | ")[3] == "2.0" and printed[-2].split(" | ")[6] == "1,234"
    # a later measurement of a cell takes the place of the earlier one
    with open(out, "a") as file:
        file.write(json.dumps({**rows_of(out)[1], "tokens_per_second": 99.0}) + "\n")
    benchmark.main(["--table", str(out)])
    again = capsys.readouterr().out.splitlines()
    assert len(again) == len(printed) and again[-2].split(" | ")[6] == "99"


def test_time_that_is_up_is_said(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "start_cell", None)
    benchmark.main(["--cells", "tiny:full", "--minutes", "0.1", *SMALL])
    assert "| the time was up |" in capsys.readouterr().out


def test_a_short_limit_of_a_cell_is_not_the_end_of_the_time(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "start_cell", lambda cell, seconds: {"skipped": f"stopped after {seconds} s"})
    benchmark.main(["--cells", "tiny:full", "--seconds", "9", *SMALL])
    assert "| stopped after 9.0 s |" in capsys.readouterr().out


def test_the_heading_says_what_is_installed(monkeypatch):
    """bitsandbytes is not among the requirements."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else name)
    told = memory_table.heading(Cell("tiny", "lora", tokens=16, checkpointing=False, flash_attn=True), "CPU")
    assert told.startswith(
        "CPU: one row of 16 tokens, without gradient checkpointing, adamw_torch_fused, --flash_attn; "
    )
    assert "peft" in told and "bitsandbytes" not in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cells", "8B:qlora5"], "--cells: expected some of full, full16"),
        (["--cells", "8B"], "found ''"),
        (["--cells", "9B:lora"], "found '9B'"),
        (["--shapes", "8B,9B"], "--shapes: expected some of"),
        (["--cells", "8B:qlora4_experts"], "the shape has no experts"),
        (["--shapes", "8B", "--methods", "qlora4_experts"], "none of --shapes 8B has experts"),
        (["--table", "nowhere.jsonl"], "--table nowhere.jsonl: no such file"),
    ],
)
def test_a_cell_that_does_not_exist_is_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(words)
    assert message in capsys.readouterr().err


def test_experts_leave_16_bit_before_the_next_ones_are_made(monkeypatch):
    quantize, held = memory_cell.quantize_experts, []

    def watched(module, name):
        assert not [each for each in held if each() is not None]
        held.append(weakref.ref(getattr(module, name)))
        quantize(module, name)

    monkeypatch.setattr(memory_cell, "quantize_experts", watched)
    model = memory_cell.random_model(Cell("tiny_moe", "qlora4_experts", tokens=16), torch.device("cpu"))
    assert len(held) == 4  # two layers, two parameters each
    assert {p.dtype for p in model.parameters() if p.dim() == 3} == {torch.uint8}


def test_small_cells_run_in_processes_of_their_own(tmp_path):
    out = tmp_path / "rows.jsonl"
    benchmark.main(["--cells", "tiny:full,tiny_moe:qlora4_experts,tiny_moe:qlora4_all", "--output", str(out), *SMALL])
    for row in rows_of(out):
        assert "skipped" not in row, row
        assert row["tokens_per_second"] > 0
        # random weights of 0.02: near a uniform choice of 320 tokens, ln 320 = 5.77
        assert row["losses"][0] == pytest.approx(5.77, abs=0.1)
