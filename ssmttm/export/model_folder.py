"""The inference form of a trained model: what sampling needs, and a card that says what it was made from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from ssmttm import checkpoint
from ssmttm.codecs import StudentCodec, StudentConfig, build_codec
from ssmttm.errors import UserError
from ssmttm.files import atomic_write
from ssmttm.generation.loading import (
    SECOND_STAGE,
    check_stages,
    load_denoiser,
    load_model,
    open_model_folder,
    open_second_stage_folder,
)
from ssmttm.licences import strictest
from ssmttm.text.encoders import load_text_encoder, quiet_transformers
from ssmttm.text.student import student_from_description

TEXT_ENCODER = "text_encoder"  # of an exported model, the folder of a text encoder of its own


def export(run_dir: str | Path, out: str | Path, half: bool = True) -> Path:
    """Write the inference form of a run or a checkpoint; paths of this machine stay out of it.

    A language model or a denoiser: config.yaml, model.safetensors (averaged weights where there are any) and card.json.
    A codec or a student of one: config.json and model.safetensors as `load_codec` reads them, and card.json. A text
    student: the language model that reads it, with the student in its folder `text_encoder`.

    Args:
        run_dir: a run folder (its newest good checkpoint) or a checkpoint.
        out: a folder; files of these names in it are replaced.
        half: matrices in float16; vectors stay float32.

    Raises:
        UserError: there is no good checkpoint, the disk is full, or `out` holds a second stage of an earlier export,
            which would be taken for this model's.
    """
    folder, out = checkpoint.find_model(run_dir), Path(out)
    _check_no_second_stage(out)
    config, state, weights = (
        checkpoint.read_config(folder),
        checkpoint.read_state(folder),
        checkpoint.load_weights(folder),
    )
    out.mkdir(parents=True, exist_ok=True)
    licences = state["init"].get("licences", {}) | state["data"]["licences"]
    card = {
        "name": out.name,
        "task": config.task,
        "step": state["step"],
        "samples_seen": state["samples_seen"],
        "training_seconds": round(state["seconds"]),
        "parameters": state["parameters"],
        "data": state["data"] | {"licences": licences},
        "licence": strictest(licences),
        "init": state["init"],
        "metrics": state["valid"],
        "config_hash": state["config_hash"],
        "versions": state["versions"],
    }
    if config.task in ("codec", "distill_codec"):
        learnt = config.task == "codec"
        codec = build_codec(config.codec) if learnt else StudentCodec(StudentConfig(**state["data"]["student"]))
        codec.load_state_dict(weights)
        codec.save(out, half=half)
    elif config.task == "distill_text":
        card |= write_text_student(folder, out, card["data"], half)
    else:
        here = ("run_dir", "init", "resume", "teacher")
        kept = OmegaConf.masked_copy(config, [key for key in config if key not in here])
        OmegaConf.update(kept, "data.store", state["data"]["store"])
        if OmegaConf.select(kept, "distill.cache"):
            OmegaConf.update(kept, "distill.cache", None)
        with atomic_write(out / "model.safetensors") as path:
            save_file(shrunk(weights, half), path)
        with atomic_write(out / "config.yaml") as path:
            path.write_text(OmegaConf.to_yaml(kept))
    with atomic_write(out / "card.json") as path:
        path.write_text(json.dumps(card, indent=2) + "\n")
    return out


def export_two_stages(coarse_codes: str | Path, second_stage: str | Path, out: str | Path) -> Path:
    """Write a model of two stages as one folder: the first as `export` does, the second in its folder `painter`.

    Raises:
        UserError: as `export`; the two do not fit each other. Unless the disk is full, nothing is written then.
    """
    first = open_model_folder(coarse_codes)
    second = open_second_stage_folder(first, second_stage)
    for folder in (first, second):
        checkpoint.read_state(folder.path)  # which an exported folder has not
    check_stages(first, load_model(first), load_denoiser(second))
    _check_no_second_stage(Path(out))
    export(coarse_codes, out)
    export(second_stage, Path(out) / SECOND_STAGE)
    return Path(out)


def _check_no_second_stage(out: Path) -> None:
    if (out / SECOND_STAGE).exists():
        raise UserError(f"{out / SECOND_STAGE} is the second stage of an earlier export: remove it, or give another folder")


def write_text_student(folder: Path, out: Path, data: dict[str, Any], half: bool) -> dict[str, Any]:
    """Write config.yaml, model.safetensors and text_encoder/ of a checkpoint of a text student.

    Returns:
        What its card says otherwise: the language model's parameters, and which text encoder it reads.
    """
    blueprint, weights = data["blueprint"], checkpoint.load_weights(folder, module_name="lm")
    encoder, tokenizer = student_from_description(blueprint["encoder"])
    checkpoint.load_into(encoder, checkpoint.load_weights(folder), folder)
    with quiet_transformers():
        encoder.save(out / TEXT_ENCODER, tokenizer, half)
    with atomic_write(out / "model.safetensors") as path:
        save_file(shrunk(weights, half), path)
    with atomic_write(out / "config.yaml") as path:
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(blueprint["lm"])))
    text = {"name": f"./{TEXT_ENCODER}", "fingerprint": load_text_encoder(out / TEXT_ENCODER).fingerprint}
    data = {key: value for key, value in data.items() if key != "blueprint"} | {"text": data["text"] | text}
    return {"parameters": sum(value.numel() for value in weights.values()), "data": data}


def shrunk(weights: Mapping[str, Tensor], half: bool) -> dict[str, Tensor]:
    """With `half`, matrices in float16."""
    return {
        name: value.to(torch.float16) if half and value.is_floating_point() and value.ndim > 1 else value
        for name, value in weights.items()
    }
