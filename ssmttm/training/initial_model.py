"""Fine-tuning: a training that takes its model, pattern and null condition from the model of `init`."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssmttm.errors import UserError
from ssmttm.generation.loading import ModelFolder, open_model_folder

NULL_CONDITIONS = ("empty_caption", "no_tokens")  # those that a training batch can have


def with_model_of_init(config: DictConfig) -> DictConfig:
    """The config with the sections `model` and `pattern` of `init`, if `model_from_init` asks for it.

    Keys of the config's own model section that differ from the defaults, such as model.dropout=0.1, are kept.

    Raises:
        UserError: `init` is not set, is no language model, or cannot be trained further.
    """
    if not config.get("model_from_init"):
        return config
    if not config.init:
        raise UserError("init is not set: give the model to start from, such as init=tiny_lm or a run folder")
    folder = open_initial_model(config)
    schema = OmegaConf.get_type(config.model)
    default = OmegaConf.structured(schema)
    own = {key: value for key, value in config.model.items() if value != default[key]}
    resolved = config.copy()
    resolved.model = OmegaConf.merge(default, folder.config.model, own)
    if config.pattern == OmegaConf.structured(OmegaConf.get_type(config)).pattern:
        resolved.pattern = folder.config.pattern
    return resolved


def open_initial_model(config: DictConfig) -> ModelFolder:
    """The model of `init`: a run, a checkpoint, an exported or imported folder, or an embedded model. Raises UserError
    as `with_model_of_init`."""
    folder = open_model_folder(config.init)
    if folder.card.get("weights"):
        raise UserError(f"init={config.init} has {folder.card['weights']} weights: start from the original model")
    if folder.null_condition not in NULL_CONDITIONS:
        raise UserError(f"init={config.init} has the null condition {folder.null_condition}, which cannot be trained")
    if folder.distilled_guidance_scale != 1:
        raise UserError(
            f"init={config.init} has guidance distilled into it, which fine-tuning would undo: use its teacher"
        )
    return folder


def check_store(folder: ModelFolder, store: str, info: Mapping[str, Any]) -> None:
    """Raises UserError unless a store was made with the codec and the text encoder of the model."""
    for kind, option in (("codec", "--codec"), ("text", "--text")):
        theirs, ours = folder.provenance(kind), info[kind]
        if theirs["fingerprint"] != ours["fingerprint"]:
            raise UserError(
                f"{folder.name} was trained with the {kind} {theirs['name']}, {store} was made with {ours['name']}: "
                f"prepare it with {option} {folder.source(kind)}"
            )
