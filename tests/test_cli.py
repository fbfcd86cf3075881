"""The `ssmttm` command."""

import itertools
import sys
from pathlib import Path

import pytest

import sample
from ssmttm import config
from ssmttm.audio import torchaudio_adapter
from ssmttm.cli.flags import RENAMED_FLAGS
from ssmttm.cli.main import main
from ssmttm.errors import run_cli
from ssmttm.ops.backend import KERNELS


def test_info_lists_each_operation_with_the_reason_for_its_kernel(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(operation in printed for operation in KERNELS) and "CUDA" in printed
    assert torchaudio_adapter.describe() in printed


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


@pytest.mark.parametrize("order", itertools.permutations(["eval=builtin", "--guidance 7", "store=S", "out=O"]))
def test_evaluate_takes_options_and_overrides_in_any_order(order, monkeypatch):
    loaded = []
    monkeypatch.setattr(config, "load", lambda *overrides, root: loaded.append((set(overrides), root)) or sys.exit())
    with pytest.raises(SystemExit):
        main(["evaluate", *" ".join(order).split()])
    assert loaded == [({"eval=builtin", "store=S", "out=O", "guidance=7"}, "eval")]


def test_size_takes_options_between_overrides(capsys):
    orders = [
        ["experiment=tiny", "--parameters", "5M", "model.d_model=128"],
        ["--parameters", "5M", "model.d_model=128", "experiment=tiny"],
    ]
    printed = []
    for order in orders:
        assert main(["size", *order, "--vary", "n_layers"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "model.n_layers=" in printed[0]


@pytest.mark.parametrize("order", [["OUT", "task=distill"], ["task=distill", "--top-k", "8", "OUT"]])
def test_cache_teacher_takes_its_folder_anywhere(order, monkeypatch):
    calls = []
    monkeypatch.setattr("ssmttm.training.tasks.distill_lm.cache_teacher", lambda *call: calls.append(call))
    assert main(["cache-teacher", *order]) == 0
    settings, out, _ = calls[0]
    assert settings.task == "distill" and out == Path("OUT")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["size", "experiment=tiny_codec"], "task=codec has no section model"),
        (["cache-teacher", "task=distill"], "give one output folder, got 0"),
        (["cache-teacher", "OUT", "task=lm"], "task=lm learns from no logits"),
        (["evaluate", "--store", "a, b", "storee=x"], "unknown config key 'storee': did you mean store?"),
        (["compress", "recipe=tinyttm_tiny", "out=a, b"], "\"out='a, b'\""),
        (["sweep", "sweep=backbones_tiny", "store=a [b]"], "\"store='a [b]'\""),
    ],
)
def test_wrong_overrides_of_a_command_are_one_clear_line(command, message, capsys):
    assert run_cli(lambda: main(command)) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


@pytest.mark.parametrize("command", [["evaluate", "store=S", "--guidence", "7"], ["info", "x", "y"]])
def test_unknown_option_is_an_error(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err
