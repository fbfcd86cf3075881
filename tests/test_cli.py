"""The `ssmttm` command."""

import pytest

import sample
from ssmttm.cli.flags import RENAMED_FLAGS
from ssmttm.cli.main import main
from ssmttm.errors import run_cli
from ssmttm.ops.backend import KERNELS


def test_info_lists_each_operation_with_the_reason_for_its_kernel(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(operation in printed for operation in KERNELS) and "CUDA" in printed


def test_export_of_a_missing_run_is_a_clear_error(tmp_path, capsys):
    assert run_cli(lambda: main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")])) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "evaluate" in capsys.readouterr().out


@pytest.mark.parametrize("old", RENAMED_FLAGS)
@pytest.mark.parametrize("joined", [True, False])
def test_renamed_flags_name_the_new_flag(old, joined, capsys):
    flag = [f"{old}=x"] if joined else [old, "x"]
    for command in (lambda: main(["export", "run", "out", *flag]), lambda: sample.main(["a waltz", *flag])):
        assert run_cli(command) == 2
        line = capsys.readouterr().err
        assert line == f"error: the flag {old} was renamed: write {RENAMED_FLAGS[old]}\n"


def test_renamed_flags_exist_under_their_new_names(capsys):
    for command in (lambda: main(["export", "--help"]), lambda: sample.main(["--help"])):
        with pytest.raises(SystemExit):
            command()
    printed = capsys.readouterr().out
    assert all(new in printed for new in RENAMED_FLAGS.values())
