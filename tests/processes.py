"""Programs and trainings in processes of their own, on the CPU."""

import os
import runpy
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ssmttm import config

ROOT = Path(__file__).parents[1]


def train_in_two_processes(settings: DictConfig, run_dir: Path, program: Sequence[str] = ("train.py",)) -> None:
    """Run the same training in another run folder, by train.py or another program."""
    settings = OmegaConf.merge(settings, {"run_dir": str(run_dir)})
    overrides = [f"{key}={'null' if value is None else value}" for key, value in flat(settings).items()]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu2.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, "--main_process_port", "0", *program, *base(settings), *overrides],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-6000:]
    assert "2 x cpu" in result.stdout


def base(settings: DictConfig) -> list[str]:
    """The experiment and task that the overrides of a training start from."""
    return ["experiment=debug", f"task={settings.task}"]


def flat(settings: DictConfig) -> dict[str, object]:
    """The keys in which these settings differ from `base`, by dotted name."""
    defaults = config.load(*base(settings))
    different = {}

    def walk(node: DictConfig, other: DictConfig, prefix: str) -> None:
        for key in node:
            if OmegaConf.is_dict(node[key]):
                walk(node[key], other[key], f"{prefix}{key}.")
            elif node[key] != other[key]:
                different[f"{prefix}{key}"] = node[key]

    walk(settings, defaults, "")
    return different


def run_ranks(count: int, train: Callable[[int], None], folder: Path) -> None:
    """Run a function in forked processes that are the ranks of one training, without starting a new Python.

    Each rank's output is in folder/rank-N.txt. Raises AssertionError with it if a rank fails.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os._exit(_run_rank(rank, count, port, train, folder / f"rank-{rank}.txt"))
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    outputs = [(folder / f"rank-{rank}.txt").read_text() for rank in range(count)]
    assert codes == [0] * count, "\n".join(outputs)


def run_program(arguments: Sequence[str], folder: Path) -> tuple[int, str]:
    """Run `python *arguments`, a script or -m and a module, in a folder, forked: no import is repeated.

    Returns its exit code and its output.
    """
    output = folder / "output.txt"
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        os._exit(_forked(partial(_run_main, list(arguments)), output))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, output.read_text()


def _run_main(arguments: list[str]) -> None:
    if "accelerate" in sys.modules:
        _reset_accelerate()  # a program has none of the state that a training in this process left
    is_module = arguments[0] == "-m"
    sys.argv = arguments[1:] if is_module else arguments
    if is_module:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")


def _run_rank(rank: int, count: int, port: int, train: Callable[[int], None], output: Path) -> int:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    _reset_accelerate()
    return _forked(partial(train, rank), output)


def _reset_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def _forked(function: Callable[[], None], output: Path) -> int:
    """Call a function in a forked process, with its output in a file. Returns the exit code."""
    with output.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        try:
            function()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001 - also of pytest.fail: the output is read by the parent
            traceback.print_exc()
            return 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        return 0
