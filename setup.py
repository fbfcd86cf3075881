"""Packaging. `pip install -e .` needs no compiler, no CUDA and no Triton; kernels and rarer needs are extras."""

from setuptools import find_packages, setup

EXTRAS = {
    "cuda": ["mamba-ssm>=2.3", "causal-conv1d>=1.5"],
    # Resampling on a GPU, and decoding of AAC and others. These two go with the torch of a CUDA build; beside a torch
    # for CPUs they do not load and are passed over. torchcodec needs FFmpeg's shared libraries (4 to 9).
    "audio": ["torch>=2.11", "torchaudio>=2.11,<2.12", "torchcodec>=0.17,<0.18"],
    "data": ["tinysoundfont>=0.3.6", "pretty_midi>=0.2.11"],
    "vocals": ["demucs>=4.1"],
    "ffmpeg": ["imageio-ffmpeg>=0.6"],
    "export": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"],
    "sweep": ["optuna>=4"],
    "ray": ["ray>=2.56"],
    "web": ["fastapi>=0.120", "uvicorn>=0.35", "websockets>=14", "python-multipart>=0.0.20"],
    "track": ["wandb>=0.20", "trackio>=0.20"],
    "lora": ["peft>=0.17"],
    "snac": ["snac>=1.2.1"],
    "dev": [
        "pytest>=8",
        "pytest-xdist",
        "pytest-timeout",
        "hypothesis",
        "mlcroissant>=1.1",
        "webdataset>=1",
        "ruff",
        "mypy",
        "import-linter>=2.1",
        "librosa>=0.11",
        "pyloudnorm>=0.1.1",
        "optuna>=4",
        "snac>=1.2.1",
    ],
}

setup(
    name="ssmttm",
    version="0.1.0",
    description="Text-to-music models with state-space backbones: train, compress, evaluate, sample",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["ssmttm*", "data_prep*"]), "ssmttm.configs"],
    package_dir={"ssmttm.configs": "configs"},
    package_data={
        "ssmttm": ["assets/**/*", "generation/engines/*.cpp", "reports/templates/*", "web/static/*"],
        "ssmttm.configs": ["**/*.yaml"],
        "data_prep": ["reports/*.json"],
    },
    install_requires=[
        "torch>=2.6",
        "numpy>=2",
        "einops>=0.8",
        "transformers>=5",
        "diffusers>=0.36",
        "accelerate>=1.10",
        "safetensors>=0.5",
        "huggingface_hub>=1",
        "hydra-core>=1.3",
        "soundfile>=0.13",
        "soxr>=0.5",
        "pyarrow>=18",
        "scipy>=1.13",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "tensorboard>=2.18",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["ssmttm = ssmttm.cli.main:entry"]},
)
