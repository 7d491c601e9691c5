"""The `stagewise` command: `stagewise sft …` does what `python supervised_finetuning.py …` does."""

from __future__ import annotations

import difflib
import importlib.util
import runpy
import sys

from stagewise.config.stages import STAGES

# Command -> its module and a description. The stages come from their table.
COMMANDS = {stage.name: (stage.script, stage.title) for stage in STAGES.values()} | {
    "merge": ("merge_peft_adapter", "merge an adapter into its base model"),
    "infer": ("inference", "chat in the terminal, or answer a file of prompts"),
    "web": ("web_demo", "chat in the browser"),
    "evaluate": ("evaluation", "metrics of answers, reward models and benchmarks"),
    "convert": ("convert_dataset", "convert data sets to ShareGPT records"),
    "show-data": ("tools.show_data", "show the training samples of a stage with their labels"),
    "show-model": ("tools.show_model", "show a model's parameters and estimate the memory of a run"),
    "quantize": ("tools.quantize_model", "save a model in 4 or 8 bits"),
    "export-gguf": ("tools.export_gguf", "export a merged model for llama.cpp"),
    "extend-vocabulary": ("tools.extend_vocabulary", "add tokens to a tokenizer and its model"),
}


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        ["usage: stagewise COMMAND [FLAGS]; stagewise COMMAND --help lists a command's flags", "", *lines]
    )


def main() -> None:
    """Runs the command named by the first word, with the remaining words as its flags.

    Exits with status 2 for an unknown command, else with the status of the command's script.
    """
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(usage())
        return
    name = sys.argv[1]
    if name not in COMMANDS:
        similar = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        print(f"error: {name}: no such command{hint}\n\n{usage()}", file=sys.stderr)
        raise SystemExit(2)
    module = COMMANDS[name][0]
    if module.startswith("tools."):
        sys.argv[1:] = sys.argv[2:]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    script = importlib.util.find_spec(module).origin  # a path, so that --help shows the script's name
    sys.argv = [script, *sys.argv[2:]]
    runpy.run_path(script, run_name="__main__")
