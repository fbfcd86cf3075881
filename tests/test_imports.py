"""The house rules: imports run one way, heavy packages stay behind their adapter, `import ssmttm` is light."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("ssmttm/**/*.py"), *ROOT.glob("data_prep/**/*.py")])

# What a room may import of the project. A file directly under ssmttm/ is a room of its own.
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "hub": {"errors", "files"},
    "config": {"errors"},
    "checkpoint": {"errors", "files"},
    "lengths": set(),
    "audio": {"errors", "files", "lengths"},
    "signals": set(),
    "licences": {"errors"},
    "patterns": {"errors"},
    "ops": {"errors", "ops"},
    "mixers": {"errors", "ops", "mixers"},
    "text": {"errors", "files", "hub", "text"},
    "codecs": {"errors", "files", "codecs"},
    "data": {"errors", "files", "licences", "data", "text", "audio"},
    "models": {"errors", "ops", "mixers", "models", "text"},
    "diffusion": {"errors", "models", "text", "diffusion"},
    "generation": {
        "errors", "files", "ops", "models", "patterns", "codecs", "text", "checkpoint", "audio", "diffusion",
        "generation",
    },
    "distill": {"errors", "files", "codecs", "data", "text", "mixers", "models", "ops", "generation", "distill"},
    "training": {
        "errors", "files", "licences", "config", "checkpoint", "audio", "patterns", "codecs", "text", "data", "models",
        "diffusion", "generation", "distill", "training", "signals",
    },
    "compression": {
        "errors", "files", "licences", "config", "checkpoint", "codecs", "text", "models", "ops", "generation",
        "training", "evaluation", "sweeps", "signals", "compression",
    },
    "listening": {"errors", "files", "audio", "generation", "evaluation", "listening"},
    "sweeps": {"errors", "files", "config", "checkpoint", "signals", "models", "evaluation", "sweeps"},
    "onnx": {"errors", "files", "mixers", "models", "codecs", "text", "generation", "onnx"},
    "importers": {"errors", "files", "checkpoint", "codecs", "text", "models", "patterns", "generation", "importers"},
    "evaluation": {
        "errors", "files", "hub", "config", "audio", "codecs", "data", "text", "generation", "checkpoint",
        "evaluation",
    },
}  # fmt: skip
ANY = {"cli", "demo", "data_prep"}

ADAPTERS = {
    "mamba_ssm": {"ops"},
    "causal_conv1d": {"ops"},
    "accelerate": {"training"},
    "diffusers": {"diffusion", "codecs"},
    "transformers": {"text", "codecs", "importers", "evaluation"},
    "torchaudio": {"audio"},
    "soundfile": {"audio", "data_prep"},
    "imageio_ffmpeg": {"data_prep"},
    "tinysoundfont": {"data_prep"},
    "demucs": {"data_prep"},
    "pyloudnorm": {"audio"},
    "onnx": {"onnx"},
    "onnxruntime": set(),
}


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "data_prep" else parts[1]


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_one_way(path):
    here = room(path)
    if here in ANY or here == "__init__":
        return
    assert here in ALLOWED, f"{path} stands in a room that tests/test_imports.py does not know"
    for name in imported_modules(path):
        parts = name.split(".")
        assert parts[0] != "data_prep", f"{path} imports a program: {name}"
        if parts[0] == "ssmttm" and len(parts) > 1 and parts[1] != "__version__":
            assert parts[1] in ALLOWED[here] | {here}, f"{here} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_heavy_packages_stay_behind_their_adapter(path):
    for name in imported_modules(path):
        rooms = ADAPTERS.get(name.split(".")[0])
        assert rooms is None or room(path) in rooms, f"{path} imports {name}; its place is {rooms}"


@pytest.mark.parametrize("path", [p for p in FILES if p.stem != "__main__"], ids=module_name)
def test_every_module_imports(path):
    importlib.import_module(module_name(path))


def test_importing_the_package_is_light():
    code = "import sys, ssmttm; sys.exit(bool({'torch', 'numpy', 'transformers', 'hydra'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_pickle():
    for path in FILES:
        source = path.read_text()
        assert "import pickle" not in source and "allow_pickle=True" not in source, path
        if "torch.load(" in source:
            assert "weights_only=True" in source, path
