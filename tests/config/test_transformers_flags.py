"""transformers' flags as they are read from its source: the same as the class itself has."""

import subprocess
import sys

from stagewise.config.flags import flags_of
from stagewise.config.transformers_flags import MOST_USED, training_arguments
from tests.conftest import ROOT


def test_the_flags_are_those_of_the_class():
    from transformers import TrainingArguments

    read, real = flags_of([training_arguments()]), flags_of([TrainingArguments])
    assert list(read) == list(real)
    for name, flag in real.items():
        other = read[name]
        if not name.startswith("log_level"):  # whose choices are made while transformers is imported
            assert other.choices == flag.choices, name
            assert issubclass(flag.kind, str) or other.kind.__name__ == flag.kind.__name__, name
        found = (other.several, other.or_text, other.required, other.default, other.help)
        assert found == (flag.several, flag.or_text, flag.required, flag.default, flag.help), name
    assert real.keys() > MOST_USED.keys()


def test_a_source_that_is_written_in_another_way_gives_nothing(tmp_path):
    (tmp_path / "training_args.py").write_text("class Other: pass\n")
    assert training_arguments(tmp_path) is None
    assert training_arguments(tmp_path / "nowhere") is None


def test_nothing_of_torch_is_imported():
    code = (
        "import sys; from stagewise.training.first_look import first_look; "
        "from stagewise.config.transformers_flags import training_arguments as read; "
        " assert read(); print({'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")
