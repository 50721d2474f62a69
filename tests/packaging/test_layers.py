"""Who imports whom: the demonstration stands on the library, and the library knows nothing of it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import mfac_kernels as mk

PACKAGE = Path(mk.__file__).parent


def imported(path: Path) -> set[str]:
    """The absolute names that a file imports, wherever in it they stand."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import, which this test does not resolve"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_library_does_not_load_the_training_programs() -> None:
    program = (
        "import sys, mfac_kernels; print([name for name in sys.modules if name.startswith('mfac_kernels.training')])"
    )
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout == "[]\n"


def test_nothing_below_the_command_line_names_the_training_programs() -> None:
    library = [
        path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in ("cli.py", "training")
    ]
    assert len(library) > 20
    for path in library:
        assert not [name for name in imported(path) if f"{name}.".startswith("mfac_kernels.training.")], path


def test_the_command_line_does() -> None:
    """The two tests above look for a name that exists."""
    assert "mfac_kernels.training.datasets" in imported(PACKAGE / "cli.py")
