"""The `ssmttm` command."""

import pytest

from ssmttm.cli.main import main
from ssmttm.errors import run_cli
from ssmttm.ops.backend import KERNELS


def test_info_names_each_operation_and_why_it_runs_as_it_does(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(operation in printed for operation in KERNELS) and "CUDA" in printed


def test_a_missing_run_is_a_clear_error(tmp_path, capsys):
    assert run_cli(lambda: main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")])) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "evaluate" in capsys.readouterr().out
