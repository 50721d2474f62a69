"""The package's docstrings as reStructuredText.

They are plain text with a few habits: what is indented in prose is a formula or code; "Args:" and its like begin
sections; there are double backticks and roles. Sections are left to napoleon. The rest is made explicit here, so that
no docstring needs a mark that a reader of the source would stumble over.
"""

from __future__ import annotations

import re
from typing import Any

# Headings of napoleon's sections, with the entries that are indented below them.
SECTION = re.compile(r"(Args|Arguments|Attributes|Raises|Returns|Yields):$")
# What is left as it is: literals and roles; and what would be markup but is mathematics: |g|, a*, x_.
MARKUP = re.compile(r"(:[a-z:]+:`[^`]*`|``.*?``)|([|*`])|(?<=\w)(_)(?!\w)", re.S)


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def escaped(text: str) -> str:
    return MARKUP.sub(lambda match: match[1] or "\\" + (match[2] or match[3]), text)


def rst(lines: list[str]) -> list[str]:
    """Prose escaped, indented blocks literal, sections as they are but for the escapes."""
    made: list[str] = []
    section = literal = False
    before = ""  # the line before
    for line in lines:
        indented = bool(line.strip()) and indentation(line) > 0
        if line.strip() and not indented:
            section, literal = bool(SECTION.match(line)), False
        elif indented and not section and not before.strip() and not literal:
            made += ["::", ""]
            literal = True
        if line == "Returns:":  # to napoleon, what precedes a colon in its text is a type
            line = ":returns:"
        made.append(line if literal else escaped(line))
        before = line
    return made


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's hook: changes ``lines`` in place."""
    lines[:] = rst(lines)
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # a comment, or napoleon takes what precedes a colon in the first line for a type
