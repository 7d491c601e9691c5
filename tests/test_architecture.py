"""Who may import whom, read from the syntax trees."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each imports what stands to its left, never the other way.
ORDER = (
    "errors",
    "config",
    "formats",
    "artifacts",
    "data",
    "losses",
    "tokenizer",
    "chat",
    "models",
    "adapters",
    "reports",
    "inference",
    "training",
    "web",
    "rl",
    "evaluation",
)
FORMER = {"stagewise.row_quantisation"}  # names that saved model cards hold
WITHOUT_TORCH = ("errors", "config", "formats")
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"template"}
MOST_MODULES = 18  # of a folder


def imports(path: Path) -> set[str]:
    """The modules that a file imports; `from stagewise.chat import thinking` counts as stagewise.chat.thinking."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            members = {f"{module}.{alias.name}" for alias in node.names}
            names |= (members & set(MODULES)) or {module}
    return names


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {dotted(path): path for path in sorted((ROOT / "stagewise").rglob("*.py")) if path.name != "__init__.py"}
IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def place(name: str) -> int:
    part = name.split(".")[1]
    assert part in ORDER, f"{name} stands in no folder of the order"
    return ORDER.index(part)


@pytest.mark.parametrize("name", sorted(set(MODULES) - FORMER))
def test_a_module_imports_only_what_stands_to_its_left(name):
    for imported in IMPORTS[name] & set(MODULES):
        assert place(imported) <= place(name), f"{name} imports {imported}"


def test_there_is_no_circle_inside_a_folder():
    done: set[str] = set()

    def follow(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " imports ".join([*above[above.index(name) :], name])
        if name not in done:
            for imported in sorted(IMPORTS[name] & set(MODULES)):
                follow(imported, (*above, name))
            done.add(name)

    for name in sorted(MODULES):
        follow(name, ())


def test_a_folder_holds_a_readable_number_of_modules():
    folders = [path for path in (ROOT / "stagewise").rglob("*") if path.is_dir() and path.name != "__pycache__"]
    for folder in folders:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MOST_MODULES, folder


def test_the_package_imports_nothing_from_the_root():
    for name, imported in IMPORTS.items():
        assert not imported & (SCRIPTS | {"template"}), name


def test_these_import_no_torch():
    for name, imported in IMPORTS.items():
        if name.split(".")[1] in WITHOUT_TORCH:
            assert not {each.split(".")[0] for each in imported} & {"torch", "transformers"}, name


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_scripts_never_import_scripts(name):
    assert not imports(ROOT / f"{name}.py") & SCRIPTS
