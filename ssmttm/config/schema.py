"""Registers the dataclasses of the config tree with Hydra, where files of configs/ name them in their defaults."""

from dataclasses import make_dataclass
from functools import cache

from hydra.core.config_store import ConfigStore

from ssmttm.config.codec import TinyCodecConfig
from ssmttm.config.commands import COMMANDS, LAUNCHERS
from ssmttm.config.model import LatentDenoiserConfig, TokenLMConfig
from ssmttm.config.optim import OPTIMISERS, SCHEDULES
from ssmttm.config.training import TASKS


@cache
def register() -> None:
    """`{task}_config` of the group task; the kinds of the groups model and codec, with the key `kind`; the configs of
    commands and `{kind}_launcher`."""
    store = ConfigStore.instance()
    for task in TASKS:
        store.store(f"{task.task}_config", task, group="task", package="_global_")
    for group, classes in (("optim", OPTIMISERS), ("schedule", SCHEDULES)):
        for keys in classes:
            store.store(f"{keys.kind}_config", keys, group=group)
    kinds = [("model", "token_lm", TokenLMConfig), ("model", "latent_denoiser", LatentDenoiserConfig),
             ("codec", "tiny", TinyCodecConfig)]  # fmt: skip
    for group, kind, keys in kinds:
        name = "tiny_codec" if kind == "tiny" else kind  # configs/codec/tiny.yaml has that name
        store.store(name, make_dataclass(keys.__name__, [("kind", str, kind)], bases=(keys,)), group=group)
    for name, command in COMMANDS.items():
        store.store(name, command)
    for kind, launcher in LAUNCHERS.items():
        store.store(f"{kind}_launcher", launcher, group="launcher")
