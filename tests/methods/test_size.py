"""A method stays small enough to be read at once: code without blank lines, comments, docstrings and imports."""

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

from lowrank.adapter import METHODS

LINES = 40
LONGER = {"adalora": 66}  # its equation is short; what moves the budget while it trains takes the other half
FORMATTING = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(text: str) -> int:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in FORMATTING:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        docstring = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if docstring or isinstance(node, ast.Import | ast.ImportFrom):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_the_count() -> None:
    text = '"""A docstring\nof two lines."""\nimport os  # left out\n\n# a comment\nx = (\n    1,\n)\n'
    text += '\n\ndef f():\n    """No."""\n    return "a"  # 1\n'
    assert lines_of_code(text) == 5


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.place == "linear"))
def test_a_method_on_linear_layers_is_at_most_forty_lines(name: str) -> None:
    file = Path(sys.modules[METHODS[name].__module__].__file__)
    assert lines_of_code(file.read_text(encoding="utf-8")) <= LONGER.get(name, LINES)
