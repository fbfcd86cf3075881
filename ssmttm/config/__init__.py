"""Configs: Hydra groups under `configs/`, composed from overrides such as `experiment=tiny train.steps=100`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssmttm.errors import UserError

_PACKAGED = Path(__file__).parents[1] / "configs"
CONFIG_DIR = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "configs"

RENAMED_KEYS = {
    "optim.player_lr": "optim.module_lr",
    "model.sketch_codebooks": "model.n_coarse_codebooks",
    "diffusion.sketch_dropout": "diffusion.coarse_dropout",
    "diffusion.sketch_noise": "diffusion.coarse_noise_aug",
    "diffusion.sketch_scale": "diffusion.coarse_guidance_scale",
    "codec_training.revive_every": "codec_training.restart_every",
    "codec_training.revive_until": "codec_training.restart_until",
    "painter": "second_stage",
}
# In overrides only: the configs of older models and runs have these keys.
RENAMED_GROUPS = {"text.name": "data.text_encoder", "text": "data.text_encoder"}
RENAMED_SCHEDULE = {
    "optim.warmup_steps": "schedule.warmup_steps",
    "optim.min_lr": "schedule.min_lr",
    "optim.schedule_steps": "schedule.length",
}
RENAMED_EXPERIMENTS = {
    "paper_two_stage_sketch": "paper_stage1",
    "paper_two_stage_paint": "paper_stage2",
    "tiny_two_stage_sketch": "tiny_stage1",
    "tiny_two_stage_paint": "tiny_stage2",
    "tiny_melody_sketch": "tiny_stage1",
    "tiny_melody_paint": "tiny_stage2",
    "tiny_melody_stage1": "tiny_stage1",
    "tiny_melody_stage2": "tiny_stage2",
    "tiny_codec_v2": "tiny_codec",
}


def load(*overrides: str, root: str = "config") -> DictConfig:
    """Compose a root config with Hydra overrides; an unknown key can be neither read nor set.

    Args:
        overrides: `group=name` picks a file of a group (`experiment=tiny`), `key.path=value` sets a value.
        root: config (training), sweep, eval or compress.

    Raises:
        UserError: an override names no known group, file or key, or a key of another task; its value cannot be parsed,
            or has the wrong type.
    """
    from hydra.errors import HydraException

    from ssmttm.config import messages

    messages.check_overrides(overrides, root)
    try:
        config = compose(root, overrides)
        _keep_text(config, overrides)
        OmegaConf.resolve(config)
        OmegaConf.set_struct(config, True)
        messages.check_keys(config, root)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(messages.describe(error, root, overrides)) from error
    return config


def compose(root: str, overrides: Sequence[str]) -> DictConfig:
    """Compose with Hydra; raises its errors and OmegaConf's."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from ssmttm.config.schema import register

    register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return hydra.compose(root, overrides=list(overrides))


def _keep_text(config: DictConfig, overrides: Sequence[str]) -> None:
    """Set text values as they were given, where Hydra reads them as numbers: run_dir=2024_01 is not 202401."""
    last = dict(text.lstrip("+").partition("=")[::2] for text in overrides)  # of a key that is given twice
    for key, given in last.items():
        value = OmegaConf.select(config, key) if re.fullmatch(r"[\w.]+", key) else None
        if isinstance(value, str) and value != given and re.fullmatch(r"[\w.+-]+", given):
            OmegaConf.update(config, key, given)


def model_section(config: DictConfig) -> DictConfig:
    """`config.model` of a training. Raises UserError for a task without a model section, such as codec."""
    if "model" not in config:
        raise UserError(f"task={config.task} has no section model: give an experiment of another task")
    return config.model


def override(key: str, value: object) -> str:
    """key=value for `load`, quoted so that the value may hold any character, such as the commas of a path."""
    quoted = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", r"\'"), str(value))
    return f"{key}='{quoted}'"


def names(group: str) -> list[str]:
    """The files of a config group, such as `names("experiment")`."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def read_config(path: Path) -> DictConfig:
    """The config.yaml of a run or a model folder. Raises UserError if it has a key that was renamed."""
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    for key in flatten(config):
        if new := new_key(key):
            raise UserError(f"{path} has the old config key {key}: rename it to {new} there")
    OmegaConf.set_struct(config, True)
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a nested config (DictConfig or dict) by dotted key; an empty mapping is a value."""
    nested: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def new_key(key: str, renamed: Mapping[str, str] = RENAMED_KEYS) -> str | None:
    """The present name of a renamed key (optim.player_lr.lm -> optim.module_lr.lm), None for any other key."""
    for old, new in renamed.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return None
