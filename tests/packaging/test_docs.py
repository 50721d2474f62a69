"""The documentation has every public name, docstrings are read as they are meant, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import mfac_kernels as mk

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MODULES = {"layers", "ops", "pinn", "pruning"}  # each has a section or a page


def documented(page: str) -> set[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return set(re.findall(r"^\.\. auto(?:class|function|data):: (\w+)$", text, flags=re.M))


def docstrings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docstrings", DOCS / "docstrings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_name_of_the_package_is_documented() -> None:
    assert documented("api.md") == set(mk.__all__) - MODULES


def test_every_op_is_documented() -> None:
    assert documented("api-ops.md") == set(mk.ops.__all__)


@pytest.mark.parametrize("name", ["preconditioners.layers", "pinn", "pruning"])
def test_modules_are_documented_whole(name: str) -> None:
    assert any(
        f".. automodule:: mfac_kernels.{name}\n" in page.read_text(encoding="utf-8") for page in DOCS.glob("*.md")
    )


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.is_file(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_records_are_among_the_pages() -> None:
    assert (DOCS / "results").resolve() == ROOT / "benchmarks" / "results"


def test_the_citation_names_this_version() -> None:
    assert f"\nversion: {mk.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_one_list_of_pythons() -> None:
    project, make = ((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "Makefile"))
    wheels = re.search(r"^PYTHONS \?= (.*)$", make, flags=re.M)
    assert wheels is not None
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert wheels.group(1).split() == [f"python{version}" for version in named]
    assert f'requires-python = ">={named[0]}"' in project


@pytest.mark.parametrize(
    "given, expected",
    [
        ("With |g| and a* of x_ and ``|g|_``.", r"With \|g\| and a\* of x\_ and ``|g|_``."),
        ("See :func:`gram_`, b.", "See :func:`gram_`, b."),
        ("As\n\n    a * b\n\n    c\n\nand so on.", "As\n\n::\n\n    a * b\n\n    c\n\nand so on."),
        ("Args:\n    x: |x|\n\n    y: two.", "Args:\n    x: \\|x\\|\n\n    y: two."),
        ("Returns:\n    the mask: of b.", ":returns:\n    the mask: of b."),
    ],
    ids=["markup in mathematics", "roles", "indented", "sections", "returns"],
)
def test_docstrings_become_what_they_look_like(given: str, expected: str) -> None:
    assert "\n".join(docstrings().rst(given.split("\n"))) == expected
