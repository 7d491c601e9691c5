"""The notebooks: they run from top to bottom on a tiny model, two steps per stage."""

import json
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="the notebooks need requirements-docs.txt")
nbformat = pytest.importorskip("nbformat", reason="the notebooks need requirements-docs.txt")
pytest.importorskip("ipykernel", reason="the notebooks need requirements-docs.txt")

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"dpo": ("pt", "sft", "dpo"), "ppo": ("pt", "sft", "rm", "ppo")}


@pytest.mark.parametrize("name", STAGES)
def test_a_notebook_is_kept_without_what_it_printed(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


def test_there_are_no_other_notebooks():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(STAGES)


@pytest.mark.real
@pytest.mark.parametrize("name", STAGES)
def test_a_notebook_runs_from_top_to_bottom(name, tiny_smollm, tmp_path, monkeypatch):
    for variable, value in {
        "MODEL": str(tiny_smollm),
        "OUTPUTS": str(tmp_path),
        "MAX_STEPS": "2",
        "MAX_EVAL_SAMPLES": "2",
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }.items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    runner = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": ROOT}}
    )
    runner.execute()

    for stage in STAGES[name]:
        manifest = json.loads((tmp_path / stage / "run.json").read_text(encoding="utf-8"))
        assert (manifest["status"], manifest["stage"]) == ("finished", stage)
        assert manifest["steps"] in (2, 4)  # PPO: a rollout's steps stay together
        assert (tmp_path / f"{stage}-merged" / "model.safetensors").is_file()
    said = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []) if cell.outputs
    )
    assert "base: " in said
    assert f"{name.upper()}: " in said
    assert said.rstrip().splitlines()[-1].startswith("merge from ")
