"""Export of a run or a checkpoint to a model folder: what sampling needs, and a card with its provenance."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ssmttm import checkpoint
from ssmttm.adapters import adapter_tensors, without_adapter, write_adapter
from ssmttm.codecs import Autoencoder, StudentCodec, StudentConfig, build_codec
from ssmttm.errors import UserError
from ssmttm.generation import loading
from ssmttm.licences import strictest
from ssmttm.model_folder import (
    SECOND_STAGE,
    TEXT_ENCODER,
    VAE,
    folder_to_write,
    is_exported,
    to_half,
    write_card,
    write_model_folder,
)
from ssmttm.text.encoders import load_text_encoder, quiet_transformers
from ssmttm.text.student import student_from_description

if TYPE_CHECKING:
    from ssmttm.codecs.vae import OobleckVAE


def export(run_dir: str | Path, out: str | Path, half: bool = True, merge: bool = False) -> Path:
    """Write a run or a checkpoint as a model folder without paths of this machine. Raises UserError if there is no good
    checkpoint, the disk is full, or `out` has a second stage of an earlier export.

    A training with an adapter is written as an adapter folder (`ssmttm.adapters`) or, with `merge`, as a whole model.

    A language model or a denoiser: config.yaml, model.safetensors (averaged weights if there are any) and card.json;
    of a denoiser of a VAE's latents also that VAE, in the subfolder `vae`. A codec, a VAE or a student of a codec:
    config.json and weights as `load_codec` or `load_vae` reads them, and card.json. A text student: its language model,
    with the student in the subfolder `text_encoder`.

    Args:
        run_dir: a run folder (its newest good checkpoint) or a checkpoint.
        out: a folder; files of these names in it are replaced.
        half: matrices in float16; vectors stay float32. Adapters stay float32.
        merge: see above; only for a training with an adapter.
    """
    source, out = checkpoint.find_model(run_dir), Path(out)
    if is_exported(source):
        raise UserError(f"{run_dir} is an exported model already: use it as it is, or give a run folder")
    _check_no_second_stage(out)
    config, state = checkpoint.read_config(source), checkpoint.read_state(source)
    weights, adapter = checkpoint.load_weights(source), state["data"].get("adapter")
    if merge and adapter is None:
        raise UserError(f"{run_dir} has no adapter to merge: export it without --merge")
    if adapter is not None and not merge:
        with folder_to_write(out) as folder:
            write_adapter(folder, adapter_tensors(weights), *_adapter_config_and_card(out.name, state))
        return out
    weights = without_adapter(weights, state)
    state = state | {"data": {key: value for key, value in state["data"].items() if key != "adapter"}}
    card = _card(out.name, config.task, state)
    with folder_to_write(out) as folder:
        if config.task in ("codec", "distill_codec"):
            _load_codec(config, state, weights).save(folder, half=half)
        elif config.task == "distill_text":
            card |= _write_text_student(source, folder, card["data"], half)
        else:
            if "vae" in card["data"]:
                vae = _load_vae(card["data"]["vae"])
                vae.save(folder / VAE)
                card["data"] |= {"vae": {"name": f"./{VAE}", "fingerprint": vae.fingerprint}}
            write_model_folder(folder, to_half(weights) if half else weights, _shared_config(config, state))
        write_card(folder, card)
    return out


def export_stages(run_dir: str | Path, out: str | Path, second_stage: str | Path | None, merge: bool = False) -> Path:
    """`export`, or `export_two_stages` if there is a second stage."""
    if second_stage is None:
        return export(run_dir, out, merge=merge)
    return export_two_stages(run_dir, second_stage, out, merge)


def export_two_stages(first_stage: str | Path, second_stage: str | Path, out: str | Path, merge: bool = False) -> Path:
    """Write a two-stage model as one folder: the first stage as `export` does, the second in its subfolder. Raises
    UserError if as `export`; the two do not fit each other. Unless the disk is full, nothing is written then."""
    first = loading.open_model_folder(first_stage)
    second = loading.open_second_stage_folder(first, second_stage)
    assert second is not None
    for folder in (first, second):
        checkpoint.read_state(folder.path)  # an exported folder has none
    if "adapter" in first.card["data"] and not merge:
        raise UserError(f"{first_stage} trains an adapter: export it alone, or with --merge as a part of this model")
    loading.check_stages(first, loading.load_language_model(first), loading.load_denoiser(second))
    if "vae" in second.card["data"]:
        _load_vae(second.card["data"]["vae"])
    _check_no_second_stage(Path(out))
    export(first_stage, out, merge=merge)
    export(second_stage, Path(out) / SECOND_STAGE)
    return Path(out)


def _load_codec(config: DictConfig, state: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    if config.task == "codec":
        codec: Autoencoder = build_codec(config.codec)
    else:
        codec = StudentCodec(StudentConfig(**state["data"]["student"]))
    codec.load_state_dict(weights)
    return codec


def _card(name: str, task: str, state: dict[str, Any]) -> dict[str, Any]:
    licences = state["init"].get("licences", {}) | state["data"]["licences"]
    return {
        "name": name, "task": task, "step": state["step"], "samples_seen": state["samples_seen"],
        "training_seconds": round(state["seconds"]), "parameters": state["parameters"],
        "data": state["data"] | {"licences": licences}, "licence": strictest(licences), "init": state["init"],
        "metrics": state["valid"], "config_hash": state["config_hash"], "versions": state["versions"],
    }  # fmt: skip


def _adapter_config_and_card(name: str, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """adapter_config.json and adapter_card.json."""
    data = dict(state["data"])
    config, base = data.pop("adapter"), state["init"]
    card = _card(name, "adapter", state | {"data": data}) | {"base_model": base}
    for key in ("init", "parameters"):  # of the base model
        card.pop(key)
    return config | {"base_model_name_or_path": base["name"]}, card


def _shared_config(config: DictConfig, state: dict[str, Any]) -> DictConfig:
    """The config without paths of this machine."""
    local = ("run_dir", "init", "resume", "teacher")
    shared = OmegaConf.masked_copy(config, [str(key) for key in config if key not in local])
    OmegaConf.update(shared, "data.store", state["data"]["store"])
    if OmegaConf.select(shared, "distill.cache"):
        OmegaConf.update(shared, "distill.cache", None)
    return shared


def _write_text_student(source: Path, folder: Path, data: dict[str, Any], half: bool) -> dict[str, Any]:
    """Write the language model and text_encoder/ of a text student's checkpoint.

    Returns:
        Card entries that differ: the language model's parameters, and the student as its text encoder.
    """
    blueprint, weights = data["blueprint"], checkpoint.load_weights(source, module_name="lm")
    encoder, tokenizer = student_from_description(blueprint["encoder"])
    checkpoint.load_into(encoder, checkpoint.load_weights(source), source)
    with quiet_transformers():
        encoder.save(folder / TEXT_ENCODER, tokenizer, half)
    config = OmegaConf.create(blueprint["lm"])
    write_model_folder(folder, to_half(weights) if half else weights, config)
    text = {"name": f"./{TEXT_ENCODER}", "fingerprint": load_text_encoder(folder / TEXT_ENCODER).fingerprint}
    data = {key: value for key, value in data.items() if key != "blueprint"} | {"text": data["text"] | text}
    return {"parameters": sum(value.numel() for value in weights.values()), "data": data}


def _load_vae(vae: dict[str, Any]) -> "OobleckVAE":
    """The VAE of a denoiser's training data. Raises UserError if it is not the one that it was trained with."""
    from ssmttm.codecs.vae import load_vae

    loaded = load_vae(vae["name"])
    if loaded.fingerprint != vae["fingerprint"]:
        raise UserError(
            f"the denoiser was trained with the latents of VAE {vae['name']!r} ({vae['fingerprint']}), which is now "
            f"{loaded.fingerprint}: restore the original"
        )
    return loaded


def _check_no_second_stage(out: Path) -> None:
    if (out / SECOND_STAGE).exists():
        raise UserError(f"{out / SECOND_STAGE} is the second stage of an earlier export: remove it")
