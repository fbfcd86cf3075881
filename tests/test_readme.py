"""The README's commands run in their order at a reduced size; those too large for a test only compose their config."""

import re
import shlex
from pathlib import Path

import pytest
import soundfile
import torch
from processes import run_program

from ssmttm import audio, config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for kind, block in BLOCKS if not kind for line in block.splitlines() if line]
TWO_STEPS = ["model.n_layers=1", "train.steps=2", "train.eval_every=0", "data.batch_size=2"]
SMALLER = {
    "--repaint": ["--repaint", "0.3:0.6"],
    "sample.py": ["--duration", "1"],
    "data_prep builtin": ["--hours", "0.03"],
    "experiment=tiny ": ["experiment=debug", "train.steps=2", "train.eval_every=0"],
    "experiment=lora": ["train.steps=2", "train.eval_every=0", "train.sample_every=0", "data.batch_size=2"],
    "experiment=tiny_stage1": [*TWO_STEPS, "tag_head.block=1", "schedule.warmup_steps=1", "schedule.decay_steps=1"],
    "experiment=tiny_stage2": [*TWO_STEPS, "schedule.warmup_steps=1", "schedule.decay_steps=1"],
    "experiment=tinyttm_lm": TWO_STEPS,
    "ssmttm compress": [
        "recipe.lm=['experiment=tinyttm_lm','model.n_layers=1','train.steps=2','train.eval_every=0','data.batch_size=2']",
        "recipe.text=['experiment=tinyttm_text','train.steps=2','text_student.joint_step=1','train.eval_every=0','data.batch_size=2']",
        "recipe.codec=['experiment=tinyttm_codec','train.steps=2','train.eval_every=0','data.batch_size=2']",
    ],
    "experiment=tiny_codec": [
        "codec=debug", "codec.sample_rate=24000", "codec.hop_length=960", "codec.window=1920", "train.steps=2",
        "schedule.warmup_steps=1", "schedule.decay_steps=1",
        "train.sample_every=0", "train.eval_every=0", "data.batch_size=2",
    ],
    "sweep=backbones_tiny": [
        "~sweep.grid.backbone", "+sweep.grid={optim.lr:[0.001]}", "sweep.experiment=debug", "sweep.seeds=[0]",
        "sweep.budget.steps=2", "sweep.metric=loss",
        "sweep.overrides=['train.eval_every=0','train.log_every=1']",
    ],
}  # fmt: skip
ONLY_COMPOSED = ("accelerate launch", "experiment=paper")
ELSEWHERE = ("make ", "ssmttm evaluate", "ssmttm onnx", "ssmttm web")  # in tests of their own


def small(command):
    extra = [more for part, more in SMALLER.items() if part in f"{command} "]
    return [*shlex.split(command), *(extra[0] if extra else [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my_music").mkdir()
    wave = 0.3 * torch.sin(torch.arange(24_000 * 5) * 0.06)
    audio.write(folder / "my_music" / "tone.wav", wave, 24_000)
    (folder / "my_music" / "captions.csv").write_text("path,caption,licence\ntone.wav,a steady tone,CC-BY-4.0\n")
    return folder


def test_readme_has_commands_of_every_user():
    programs = ("make demo", "make test", "sample.py", "builtin", "folder", "train.py", "evaluate", "sweep report")
    for word in (*programs, "--second-stage"):
        assert any(word in command for command in COMMANDS), word


@pytest.mark.timeout(600)
def test_readme_commands_run_in_order(folder):
    ran = 0
    for command in COMMANDS:
        if any(part in command for part in ONLY_COMPOSED):
            config.load(*[word for word in shlex.split(command) if "=" in word])
            continue
        if any(part in command for part in ELSEWHERE):
            continue
        program, *arguments = small(command)
        if program == "ssmttm":
            program, arguments = "python", ["-m", "ssmttm.cli.main", *arguments]
        assert program == "python", command
        if arguments[0].endswith(".py"):
            arguments[0] = str(ROOT / arguments[0])
        code, output = run_program(arguments, folder)
        assert code == 0, f"{command}\n{output[-2000:]}"
        ran += 1
    assert ran >= 5
    assert (folder / "runs" / "sweeps" / "backbones_tiny" / "report" / "report.html").is_file()
    assert soundfile.info(folder / "waltz.wav").duration == pytest.approx(1.0, abs=0.01)


def test_readme_python_example_runs():
    example = next(block for kind, block in BLOCKS if kind == "python")
    exec(compile(re.sub(r"duration=\d+\.0", "duration=1.0", example), "README", "exec"), {})
