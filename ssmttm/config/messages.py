"""What is wrong with an override or an experiment, in one line, and what to write instead."""

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from ssmttm import config as configs
from ssmttm.config.commands import LAUNCHERS
from ssmttm.errors import UserError, first_line

_TYPES: dict[Any, str] = {
    int: "an integer", float: "a number", bool: "true or false", str: "text", list: "a list", tuple: "a list",
}  # fmt: skip


def check_overrides(overrides: Iterable[str], root: str) -> None:
    """Raises UserError for an override of a renamed key, one without a key, and one that removes a key.

    An axis of a sweep's grid may be removed.
    """
    for text in overrides:
        if text.startswith("~") and not text.startswith("~sweep.grid."):
            raise UserError(f"{text}: a key cannot be removed; set it to another value, such as null")
        key, _, value = text.lstrip("+~").partition("=")
        if not key:
            raise UserError(f"{text!r} is no override: write key=value")
        renamed = configs.RENAMED_KEYS | configs.RENAMED_GROUPS | configs.RENAMED_SCHEDULE
        if new := configs.new_key(key, renamed):
            raise UserError(f"the config key {key} was renamed: write {new}={value}")


def check_keys(config: DictConfig, root: str) -> None:
    """Raises UserError if an override with + added a key to a config."""
    for section, keys in _sections(config):
        known = typing.get_type_hints(OmegaConf.get_type(keys))
        for key in keys.keys() - known.keys():
            raise UserError(_unknown_key(f"{section}{key!s}", root, config))


def describe(error: Exception, root: str, overrides: Sequence[str]) -> str:
    """The message for an error of Hydra or OmegaConf, raised while composing a root config with these overrides."""
    if isinstance(error, MissingConfigException):
        return _missing_config(error.missing_cfg_file or "")
    if isinstance(error, OverrideParseException):
        return _cannot_parse(error.override, overrides, root)
    text = first_line(error)
    if found := re.match("Ambiguous value for argument '(.*)'", text):
        return _cannot_parse(found[1], overrides, root)
    cause: Any = error.__cause__ or error.__context__
    if not isinstance(cause, OmegaConfBaseException):
        cause = error
    key = str(getattr(cause, "full_key", None) or "")
    found = re.match(r"Could not override '([^'@]+)'", text)
    if found and not key.startswith(found[1]):
        key = found[1]  # a group, or a key of a section that the task does not have
    if not key:
        return f"cannot compose the config: {text}"
    if isinstance(cause, ValidationError):
        return _wrong_type(cause, key, overrides)
    node = getattr(cause, "parent_node", None)
    composed = None if node is None else node._get_root()
    where = f"configs/{source[1]}.yaml: " if (source := re.match("In '(.*?)'", text)) else ""
    return where + _unknown_key(key, root, composed if isinstance(composed, DictConfig) else _composed(overrides, root))


def quoted_override(text: str) -> str:
    """An override with its value as a quoted text, as it must be written in a shell."""
    key, _, value = text.partition("=")
    written = configs.override(key, value.strip())
    return f'"{written}"' if not re.search(r'["$`\\!]', written) else "'" + written.replace("'", "'\"'\"'") + "'"


def _sections(config: DictConfig, prefix: str = "") -> Iterable[tuple[str, DictConfig]]:
    """The parts of a config that have a dataclass, each with the beginning of its keys."""
    if is_dataclass(OmegaConf.get_type(config)):
        yield prefix, config
    for key, value in config.items():
        if isinstance(value, DictConfig):
            yield from _sections(value, f"{prefix}{key!s}.")


def _missing_config(file: str) -> str:
    group, _, name = file.rpartition("/")
    if group == "experiment" and name in configs.RENAMED_EXPERIMENTS:
        return f"experiment={name} was renamed: write experiment={configs.RENAMED_EXPERIMENTS[name]}"
    known = configs.names(group)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {group}={close[0]}?" if close else f"choose from {', '.join(known)}"
    return f"no config {group}={name}: {hint}"


def _cannot_parse(text: str, overrides: Sequence[str], root: str) -> str:
    if text.startswith("-"):
        key, _, value = text.lstrip("-").partition("=")
        return f"unknown option {text}: write key=value, such as {key}={value or 'VALUE'}"
    if "=" not in text:
        before = [one for one in overrides[: overrides.index(text)] if "=" in one] if text in overrides else []
        if not before:
            return f"{text!r} is no override: write key=value"
        hint = quoted_override(f"{before[-1]} {text}")
        return f"{text!r} is no override: write key=value, and quote a value that has blanks, as {hint}"
    key, _, value = text.partition("=")
    list_hint = f'"{key}=[{value}]"'
    if re.fullmatch(r"[^\[\](){}'\"]*,[^\[\](){}'\"]*", value) and _type_of(key, overrides, root) is list:
        return f"cannot parse the override {text}: write a list in brackets, as {list_hint}"
    return f"cannot parse the override {text}: quote its value, as {quoted_override(text)}"


def _wrong_type(error: Any, key: str, overrides: Sequence[str]) -> str:
    key = re.sub(r"\[\d+\]$", "", key)
    given = [text.partition("=")[2] for text in overrides if text.lstrip("+").partition("=")[0] == key]
    root = error.parent_node._get_root()
    wanted = _type_hint(OmegaConf.select(root, key.rpartition(".")[0]) if "." in key else root, key)
    if wanted is None or not given:
        return f"{key}: {first_line(error)}"
    message = f"{key} must be {_type_name(wanted)}, got {given[-1]}"
    if _plain_type(wanted) is str and re.match(r"[\[{]", given[-1]):
        message += f": quote it, as {quoted_override(f'{key}={given[-1]}')}"
    return message


def _type_of(key: str, overrides: Sequence[str], root: str) -> type | None:
    """The type of a key, from the config with the groups that the overrides choose."""
    composed = _composed(overrides, root)
    value = OmegaConf.select(composed, key, default=None)
    hint = _type_hint(OmegaConf.select(composed, key.rpartition(".")[0]) if "." in key else composed, key)
    return _plain_type(hint) if hint is not None else list if OmegaConf.is_list(value) else type(value)


def _composed(overrides: Sequence[str], root: str) -> DictConfig:
    """A config with the experiment, task and launcher of the overrides, or as much of it as can be composed."""
    chosen = [text for text in overrides if re.match("(task|experiment|launcher)=", text)]
    for attempt in (chosen, [text for text in chosen if text.startswith("task=")]):
        try:
            return configs.compose(root, attempt)
        except (HydraException, OmegaConfBaseException):
            continue
    return configs.compose(root, [])


def _type_hint(node: Any, key: str) -> Any:
    """The annotation of a key in the dataclass of its section, None if it has none."""
    section = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
    if section is None or not is_dataclass(section):
        return None
    return typing.get_type_hints(section).get(key.rpartition(".")[2])


def _plain_type(hint: Any) -> Any:
    """list[float] | None -> list."""
    if isinstance(hint, types.UnionType):
        hint = next(one for one in hint.__args__ if one is not type(None))
    return typing.get_origin(hint) or hint


def _type_name(hint: Any) -> str:
    name = _TYPES.get(_plain_type(hint), "a section")
    return f"{name} or null" if isinstance(hint, types.UnionType) else name


def _unknown_key(key: str, root: str, composed: DictConfig) -> str:
    """The message for a key that this root config, task or launcher does not have."""
    if new := configs.new_key(key):
        return f"the config key {key} was renamed to {new}"
    if root == "sweep":
        having = [kind for kind in LAUNCHERS if key in _keys(configs.compose(root, [f"launcher={kind}"]))]
        if having:
            return f"{key} is a key of launcher={', '.join(having)}: leave it out, or choose that launcher"
    if root != "config":
        return f"unknown config key {key!r}: {_suggestion(key, {'': _keys(composed) - {key}})}"
    for group in ("optim", "schedule"):
        having = [kind for kind in configs.names(group) if key in _keys(configs.compose(root, [f"{group}={kind}"]))]
        if having and key not in _keys(composed) and key.startswith(f"{group}."):
            kind = composed[group].kind
            return f"{key} is a key of {group}={', '.join(having)}, not of {group}={kind}: leave it out, or choose that"
    task = composed.task
    by_task = {task: _keys(composed) - {key}}
    others = [name for name in configs.names("task") if name != task]
    by_task |= {name: _keys(configs.compose("config", [f"task={name}"])) for name in others}
    having = [name for name in others if key in by_task[name]]
    if having:
        return f"{key} is a key of task={', '.join(having)}, not of task={task}: leave it out, or choose that task"
    return f"unknown config key {key!r}: {_suggestion(key, by_task)}"


def _suggestion(key: str, by_task: Mapping[str, set[str]]) -> str:
    """The nearest key, of the first task if it has one that is as near."""
    best, score, of = "", 0.5, ""
    for task, keys in by_task.items():
        for known in sorted(keys):
            ratio = difflib.SequenceMatcher(None, key, known).ratio()
            if known.endswith(f".{key}"):
                ratio = 1.0
            if ratio > score:
                best, score, of = known, ratio, task
    if not best:
        return "configs/ and the dataclasses of ssmttm/config list all keys"
    own = of == next(iter(by_task))
    return f"did you mean {best}?" if own else f"did you mean {best}, a key of task={of}?"


def _keys(config: DictConfig) -> set[str]:
    """All keys of a config, and its sections."""
    nested: Any = OmegaConf.to_container(config)
    keys = set(configs.flatten({key: value for key, value in nested.items() if key != "hydra"}))
    return keys | {".".join(key.split(".")[:n]) for key in keys for n in range(1, key.count(".") + 1)}
