"""Configs: Hydra groups under `configs/`, composed from overrides such as `experiment=tiny train.steps=100`."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssmttm.errors import UserError

_PACKAGED = Path(__file__).parent / "configs"
CONFIG_DIR = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parent.parent / "configs"

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
RENAMED_EXPERIMENTS = {
    "paper_two_stage_sketch": "paper_stage1",
    "paper_two_stage_paint": "paper_stage2",
    "tiny_two_stage_sketch": "tiny_stage1",
    "tiny_two_stage_paint": "tiny_stage2",
    "tiny_melody_sketch": "tiny_melody_stage1",
    "tiny_melody_paint": "tiny_melody_stage2",
}


def load(*overrides: str, root: str = "config") -> DictConfig:
    """Compose a root config with Hydra overrides; an unknown key can be neither read nor set.

    Args:
        overrides: `group=name` picks a file of a group (`experiment=tiny`), `key.path=value` sets a value.
        root: config (training), sweep, eval or compress.

    Raises:
        UserError: an override names no known group, file or key, or its value cannot be parsed.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException

    for text in overrides:
        _check_not_renamed(text)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        try:
            config = compose(root, overrides=list(overrides))
            OmegaConf.resolve(config)
        except MissingConfigException as error:
            raise UserError(_missing_config(error.missing_cfg_file or "")) from error
        except ConfigCompositionException as error:
            raise UserError(_bad_override(error, flatten(compose(root)))) from error
        except OverrideParseException as error:
            reason = _first_line(error)
            raise UserError(f"cannot parse the override {error.override!r} ({reason}): write key=value") from error
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"cannot compose the config: {_first_line(error)}") from error
    OmegaConf.set_struct(config, True)
    return config


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
        if new := _new_key(key):
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


def _new_key(key: str) -> str | None:
    """The present name of a renamed key (optim.player_lr.lm -> optim.module_lr.lm), None for any other key."""
    for old, new in RENAMED_KEYS.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return None


def _check_not_renamed(text: str) -> None:
    key, _, value = text.lstrip("+~").partition("=")
    if new := _new_key(key):
        raise UserError(f"the config key {key} was renamed: write {new}={value}")


def _missing_config(file: str) -> str:
    group, _, name = file.rpartition("/")
    if group == "experiment" and name in RENAMED_EXPERIMENTS:
        return f"experiment={name} was renamed: write experiment={RENAMED_EXPERIMENTS[name]}"
    known = names(group)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {group}={close[0]}?" if close else f"choose from {', '.join(known)}"
    return f"no config {group}={name}: {hint}"


def _bad_override(error: BaseException, known: Mapping[str, Any]) -> str:
    cause = error.__cause__ or error
    key = str(getattr(cause, "full_key", None) or "")
    if not key:
        return f"cannot compose the config: {_first_line(cause)}"
    if new := _new_key(key):
        return f"the config key {key} was renamed to {new}"
    keys = [*known, *{name.rpartition(".")[0] for name in known}]
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "configs/ lists all keys"
    return f"unknown config key {key!r}: {hint}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
