"""No file imports upwards, and importing hullgeo is light: no backend, no heavy library."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hullgeo

ROOT = Path(__file__).parent.parent
PACKAGE = Path(hullgeo.__file__).parent
# What hullgeo may load beyond jax and the standard library.
LIGHT = {"hullgeo", "jaxtyping", "wadler_lindig"}


def layers() -> dict[str, int]:
    """The table of docs/design.md: rows `| layer | `file.py`, `file.py` | what they hold |`."""
    found = {}
    for line in (ROOT / "docs" / "design.md").read_text().splitlines():
        if row := re.match(r"\|\s*(\d+)\s*\|([^|]+)\|", line):
            for name in re.findall(r"`(\w+)\.py`", row[2]):
                assert name not in found, f"{name}.py stands twice in docs/design.md"
                found[name] = int(row[1])
    return found


def imported_modules(source: str) -> set[str]:
    """Modules of the package that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        names |= {name.split(".")[1] for name in dotted if name.startswith("hullgeo.")}
    return names


def test_every_file_has_a_layer():
    files = {path.stem for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert files <= set(layers()), f"{files - set(layers())} have no row in docs/design.md"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_file_imports_upwards(path):
    if path.stem == "__init__":
        return
    table = layers()
    for name in imported_modules(path.read_text()) & set(table):
        assert path.stem in table, "it has no row in docs/design.md"
        assert table[name] < table[path.stem], (
            f"{path.name} (layer {table[path.stem]}) imports {name}.py (layer {table[name]})"
        )


def test_the_import_reader_sees_every_form():
    source = """
import hullgeo.plots
from hullgeo import _check, hull
def lazy():
    from hullgeo.report import write_report
"""
    assert imported_modules(source) == {"plots", "_check", "hull", "report"}


def test_init_only_re_exports():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    names = []
    for node in tree.body[1:]:
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in node.names), ast.unparse(node)
            names += [(node.module, alias.name) for alias in node.names]
        else:
            assert ast.unparse(node).startswith("__version__ = ")
    assert names == sorted(names)


@pytest.mark.parametrize("folder", ["experiments", "benchmarks"])
def test_experiments_and_benchmarks_use_public_names_only(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hullgeo"):
                parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                parts = [
                    part
                    for alias in node.names
                    if alias.name.startswith("hullgeo")
                    for part in alias.name.split(".")
                ]
            else:
                continue
            private = [part for part in parts if part.startswith("_")]
            assert not private, f"{path.name} uses {private}"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_nothing_heavy():
    loaded = run_python(
        "import sys, jax, jax.numpy\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        "import hullgeo\n"
        "after = {name.split('.')[0] for name in sys.modules}\n"
        "print(*(after - before - sys.stdlib_module_names))\n"
    )
    assert set(loaded.split()) <= LIGHT
    assert "hullgeo" in loaded.split()


def test_importing_starts_no_backend():
    # The number of CPU devices can only be chosen while no backend has started.
    devices = run_python(
        "import jax, hullgeo\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "print(len(jax.devices('cpu')))\n"
    )
    assert devices.strip() == "3"
