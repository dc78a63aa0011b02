"""What a terminal of any width shows of a table."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tunesmith.screen import Screen


@pytest.mark.parametrize("soft_wrap", [False, True])
@pytest.mark.parametrize("width", [80, 60])
def test_a_table_wider_than_the_terminal_wraps_and_loses_nothing(width: int, soft_wrap: bool) -> None:
    reasons = "123 exact duplicate, 45 conflicting completion, 1234 near duplicate, 3 empty completion, 77 leakage"
    rows = [["train", "12345", "8000", reasons, "12 possible personal data, 2 possible secret"]]
    headers, shown = ["split", "read", "kept", "left out", "flagged"], io.StringIO()
    Screen(console=Console(file=shown, width=width, soft_wrap=soft_wrap)).table(headers, rows)
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = shown.getvalue().split()
    assert sorted(words) == sorted(" ".join([*headers, *rows[0]]).split())
    assert words.index("train") < words.index("12345") < words.index("8000")
