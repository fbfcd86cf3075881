"""Imports run one way, heavy packages stay behind their adapter, `import ssmttm` is light, nothing unpickles."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("ssmttm/**/*.py"), *ROOT.glob("data_prep/**/*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_import_contracts_of_pyproject_hold():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def test_every_module_imports():
    for path in FILES:
        if path.stem != "__main__":
            importlib.import_module(module_name(path))


def test_import_of_the_package_is_light():
    code = "import sys, ssmttm; sys.exit(bool({'torch', 'numpy', 'transformers', 'hydra'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_data_preparation_imports_no_package_that_few_stores_need():
    code = "import sys, data_prep.pipeline; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("package", ["ssmttm", "ssmttm.audio", "data_prep.builtin"])
def test_attribute_error_inside_a_module_imported_on_first_use_keeps_its_cause(package, monkeypatch):
    """From `__getattr__` an AttributeError would read "cannot import name", without its cause."""
    name = {"ssmttm": "MusicPipeline", "ssmttm.audio": "read", "data_prep.builtin": "compose"}[package]

    def broken(module):
        raise AttributeError("module 'numpy' has no attribute 'float'")

    monkeypatch.setattr("ssmttm.errors.import_module", broken)
    monkeypatch.delitem(vars(importlib.import_module(package)), name, raising=False)
    with pytest.raises(ImportError, match="cannot be imported: module 'numpy' has no attribute 'float'") as caught:
        getattr(importlib.import_module(package), name)
    assert isinstance(caught.value.__cause__, AttributeError)


def test_no_file_uses_pickle():
    for path in FILES:
        source = path.read_text()
        assert "import pickle" not in source and "allow_pickle=True" not in source, path
        if "torch.load(" in source:
            assert "weights_only=True" in source, path
