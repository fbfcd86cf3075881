"""Helpers for tests of sample.py: running it, and checking its error line."""

from pathlib import Path

from ssmttm import audio
from ssmttm.errors import run_cli


def run_captured(main, arguments, capsys):
    """Run a command's main: (exit code, standard output, standard error). Earlier output is discarded."""
    capsys.readouterr()
    code = run_cli(lambda: main([str(argument) for argument in arguments]))
    out, err = capsys.readouterr()
    return code, out, err


def assert_user_error(result, *messages):
    """The command ended with exit code 2 and one error line with these messages, and wrote no audio."""
    code, out, err = result
    lines = [line for line in err.splitlines() if line.strip() and not line.lstrip("\r").startswith("sampling:")]
    assert code == 2 and out == "", err
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for message in messages:
        assert message in lines[0], lines[0]
    assert not [path for path in Path().rglob("*") if path.suffix in audio.WRITERS]
