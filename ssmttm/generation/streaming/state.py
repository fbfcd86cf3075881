"""A moment of a stream on disk: a safetensors file with all that the stream goes on from, hashes of its model, and a
checksum of all this.

Tensors are named by their place in a nested dict or list; everything else is JSON in the file's header.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssmttm.codecs.autoencoder import weights_fingerprint
from ssmttm.errors import UserError
from ssmttm.files import atomic_write
from ssmttm.generation.request import Request, Sampling
from ssmttm.generation.streaming.session import Snapshot
from ssmttm.models.token_lm import LMState

if TYPE_CHECKING:
    from ssmttm.generation.pipeline import MusicPipeline

_FORMAT = "ssmttm state 3"
_TENSOR = "__tensor__"  # in place of a tensor in the JSON


def save_snapshot(path: str | Path, snapshot: Snapshot, pipeline: "MusicPipeline") -> Path:
    """Write a snapshot atomically."""
    session = snapshot.session
    request, engine = session.request, session.generator.sampler.engine
    second_stage = session.generator.second_stage
    content = {
        "request": {field.name: getattr(request, field.name) for field in fields(request)}
        | {"sampling": asdict(request.sampling)},
        "diffusion_steps": None if second_stage is None else second_stage.stage.settings.sampler.steps,
        "engine": [engine.name, engine.weights],
        "session": session.state(),
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    described = _without_tensors(content, "state", tensors)
    header = {"format": _FORMAT, "model": json.dumps(model_hashes(pipeline)), "state": json.dumps(described)}
    header["sha256"] = _checksum(header, tensors)
    with atomic_write(Path(path)) as temporary:
        save_file(tensors, temporary, metadata=header)
    return Path(path)


def load_snapshot(path: str | Path, pipeline: "MusicPipeline") -> Snapshot:
    """Read a snapshot. Raises UserError if the file is missing, damaged or no saved state, or of another model."""
    try:
        with safe_open(path, framework="pt") as file:
            header, names = file.metadata() or {}, file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise UserError(f"there is no state {path}: check the path") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged, or no state saved by save_state: save it again") from error
    if header.get("format") != _FORMAT:
        raise UserError(f"{path} is no state saved by save_state of this version: save it again")
    if header.pop("sha256", None) != _checksum(header, tensors):
        raise UserError(f"{path} is damaged: its content does not match its checksum; save it again")
    try:
        _check_model(path, json.loads(header["model"]), model_hashes(pipeline))
        content = _with_tensors(json.loads(header["state"]), "state", tensors)
        request = Request(**content["request"] | {"sampling": Sampling(**content["request"]["sampling"])})
        return Snapshot(pipeline.restored_session(request, content))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: a part of the state is missing ({error}); save it again") from error


def model_hashes(pipeline: "MusicPipeline") -> dict[str, str]:
    """Fingerprints of all that a state depends on: the weights, as they are now, and the names of their formats."""
    hashes = {
        "language model": weights_fingerprint(pipeline.model.state_dict()), "codec": pipeline.codec.fingerprint,
        "text encoder": pipeline.text_encoder.fingerprint,
    }  # fmt: skip
    if pipeline.second_stage is not None:
        hashes["second stage"] = weights_fingerprint(pipeline.second_stage.model.state_dict())
        if pipeline.second_stage.vae is not None:
            hashes["VAE"] = pipeline.second_stage.vae.fingerprint
    return hashes


def fill_state(state: LMState, values: Any) -> LMState:
    """Put saved values into a new state of the same model, in place where the shapes are equal, as engines rely on the
    layout of its memory."""
    filled = _filled(state, values)
    assert isinstance(filled, LMState)
    return filled


def _checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(dict(sorted(header.items()))).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _filled(target: Any, values: Any) -> Any:
    if isinstance(target, list):
        return [_filled(own, value) for own, value in zip(target, values, strict=True)]
    if is_dataclass(target):
        for field in fields(target):
            setattr(target, field.name, _filled(getattr(target, field.name), values[field.name]))
        return target
    if isinstance(target, Tensor):
        values = values.to(target.device)
        return target.copy_(values) if values.shape == target.shape else values
    return values


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON, with its tensors moved to `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return _TENSOR
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _without_tensors(part, f"{name}.{key}", tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(part, f"{name}.{number}", tensors) for number, part in enumerate(value)]
    return value


def _with_tensors(value: Any, name: str, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_without_tensors`, with dataclasses as dicts."""
    if value == _TENSOR:
        return tensors[name]
    if isinstance(value, dict):
        return {key: _with_tensors(part, f"{name}.{key}", tensors) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_tensors(part, f"{name}.{number}", tensors) for number, part in enumerate(value)]
    return value


def _check_model(path: str | Path, saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    for part in sorted(saved.keys() | own.keys()):
        if saved.get(part) != own.get(part):
            found = f"{part} {saved.get(part, 'none')}, not {own.get(part, 'none')}"
            raise UserError(f"the state {path} is of another model ({found}): load the model that it was saved of")
