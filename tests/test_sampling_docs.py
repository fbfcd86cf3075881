"""The Python blocks and the commands of docs/sampling_live.md run in their order, and the example."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import sample
from ssmttm import MusicPipeline, audio

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "docs" / "sampling_live.md").read_text(), re.DOTALL)
LOADED: dict[tuple, MusicPipeline] = {}


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """Embedded models are loaded once for all blocks."""
    real = MusicPipeline.from_pretrained.__func__

    def from_pretrained(cls, name=None, device=None, **options):
        if name is not None or any(options.values()):
            return real(cls, name, device, **options)
        if name not in LOADED:
            LOADED[name] = real(cls, name, device)
        return LOADED[name]

    monkeypatch.setattr(MusicPipeline, "from_pretrained", classmethod(from_pretrained))


@pytest.mark.timeout(200)
def test_blocks_run_in_order(tmp_path, monkeypatch, capfdbinary):
    monkeypatch.chdir(tmp_path)
    names, n_commands = {}, 0
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "sampling_live.md", "exec"), names)
            continue
        for command in block.strip().splitlines():
            program, script, *words = shlex.split(command.partition(" > ")[0])
            assert (program, script) == ("python", "sample.py")
            capfdbinary.readouterr()
            assert sample.main(words) == 0, command
            if target := command.partition(" > ")[2]:
                Path(target).write_bytes(capfdbinary.readouterr().out)
            n_commands += 1
    assert n_commands == 6
    wav, rate = audio.read("live.wav")
    assert wav.shape == (1, 2 * rate) and wav.square().mean().sqrt() > 1e-3
    assert Path("live.pcm").read_bytes() == Path("live.wav").read_bytes()[44:]
    assert audio.read("longer.wav")[0].shape[-1] == 9 * rate and audio.read("loop.wav")[0].shape[-1] == 4 * rate
    as_dict = names["out"].as_dicts()[0]
    assert as_dict["audio"].shape == (1, 24_000) and as_dict["sampling_rate"] == 24_000
    assert names["same"].model.embedding.weight.element_size() == 2


def test_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["live_session.py"])
    runpy.run_path(str(ROOT / "examples" / "live_session.py"), run_name="__main__")
    assert len({path.read_bytes() for path in tmp_path.glob("*.wav")}) == 4
