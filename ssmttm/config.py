"""Configs: Hydra groups under `configs/`, composed from overrides such as `experiment=tiny train.steps=100`."""

import difflib
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssmttm.errors import UserError

_PACKAGED = Path(__file__).parent / "configs"
CONFIG_DIR = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parent.parent / "configs"


def load(*overrides: str) -> DictConfig:
    """Compose `configs/config.yaml` with Hydra overrides.

    Args:
        overrides: `group=name` picks a file of a group (`experiment=tiny`), `key.path=value` sets a value.

    Returns:
        The composed config, resolved; an unknown key can be neither read nor set.

    Raises:
        UserError: an override names no known group, file or key, or its value cannot be read.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        try:
            config = compose("config", overrides=list(overrides))
            OmegaConf.resolve(config)
        except MissingConfigException as error:
            raise UserError(_missing_config(error, overrides)) from error
        except ConfigCompositionException as error:
            raise UserError(_bad_override(error)) from error
        except OverrideParseException as error:
            raise UserError(f"{error.override!r} cannot be read ({_first_line(error)}): write key=value") from error
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"the config cannot be composed: {_first_line(error)}") from error
    OmegaConf.set_struct(config, True)
    return config


def names(group: str) -> list[str]:
    """The files of a config group, such as `names("experiment")`."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def _missing_config(error: MissingConfigException, overrides: tuple[str, ...]) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    known = names(group)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {group}={close[0]}?" if close else f"there are: {', '.join(known)}"
    return f"no config {group}={name}: {hint}"


def _bad_override(error: ConfigCompositionException) -> str:
    cause = error.__cause__ or error
    text = _first_line(cause)
    key = getattr(cause, "full_key", None)
    if key:
        close = difflib.get_close_matches(str(key), _all_keys(), n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else "see `python train.py --help` and configs/config.yaml"
        return f"unknown config key {key!r}: {hint}"
    return f"the config cannot be composed: {text}"


def _all_keys() -> list[str]:
    """Every dotted key of the default config."""
    with_defaults = compose("config")
    keys: list[str] = []

    def walk(node: DictConfig, prefix: str) -> None:
        for key in node:
            keys.append(f"{prefix}{key}")
            if isinstance(node._get_node(key), DictConfig):
                walk(node[key], f"{prefix}{key}.")

    walk(with_defaults, "")
    return keys


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
