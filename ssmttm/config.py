"""Configs: Hydra groups under `configs/`, composed from overrides such as `experiment=tiny train.steps=100`."""

import difflib
import re
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


def load(*overrides: str, root: str = "config") -> DictConfig:
    """Compose a root config, such as `configs/config.yaml` for a training, with Hydra overrides.

    Args:
        overrides: `group=name` picks a file of a group (`experiment=tiny`), `key.path=value` sets a value.
        root: the root's name: config (training), sweep or eval.

    Returns:
        The composed config, resolved; an unknown key can be neither read nor set.

    Raises:
        UserError: an override names no known group, file or key, or its value cannot be read.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        try:
            config = compose(root, overrides=list(overrides))
            OmegaConf.resolve(config)
        except MissingConfigException as error:
            raise UserError(_missing_config(error, overrides)) from error
        except ConfigCompositionException as error:
            raise UserError(_bad_override(error, root)) from error
        except OverrideParseException as error:
            raise UserError(f"{error.override!r} cannot be read ({_first_line(error)}): write key=value") from error
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"the config cannot be composed: {_first_line(error)}") from error
    OmegaConf.set_struct(config, True)
    return config


def override(key: str, value: object) -> str:
    """key=value for `load`, whatever signs the value holds, such as the commas and blanks of a path."""
    quoted = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", r"\'"), str(value))
    return f"{key}='{quoted}'"


def names(group: str) -> list[str]:
    """The files of a config group, such as `names("experiment")`."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def _missing_config(error: MissingConfigException, overrides: tuple[str, ...]) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    known = names(group)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {group}={close[0]}?" if close else f"there are: {', '.join(known)}"
    return f"no config {group}={name}: {hint}"


def _bad_override(error: ConfigCompositionException, root: str) -> str:
    cause = error.__cause__ or error
    text = _first_line(cause)
    key = getattr(cause, "full_key", None)
    if key:
        close = difflib.get_close_matches(str(key), _all_keys(root), n=1, cutoff=0.5)
        every = f"all keys stand in configs/{root}.yaml and the files of its groups"
        hint = f"did you mean {close[0]}?" if close else every
        return f"unknown config key {key!r}: {hint}"
    return f"the config cannot be composed: {text}"


def _all_keys(root: str) -> list[str]:
    """Every dotted key of a root's defaults."""
    with_defaults = compose(root)
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
