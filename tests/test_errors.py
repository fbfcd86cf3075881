"""The line that a user reads of another package's exception."""

import pytest

from ssmttm.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no such size"), "no such size"),
        (RuntimeError("\n \n  size mismatch\n\tfor weight"), "size mismatch"),
        (OSError(), "OSError"),
        (ValueError(" \n"), "ValueError"),
    ],
)
def test_first_line_of_an_error_is_its_message_or_its_type(error, line):
    assert first_line(error) == line
