"""Every config composes, its model builds, and an invalid override is one clear line."""

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError

from ssmttm import config
from ssmttm.errors import UserError, run_cli
from ssmttm.models import build_model
from ssmttm.models.latent_denoiser import Conditions
from ssmttm.text.condition import TextCondition


@pytest.mark.parametrize("experiment", config.names("experiment"))
def test_experiment_composes_and_its_model_builds(experiment):
    loaded = config.load(f"experiment={experiment}")
    if loaded.task != "codec":
        with torch.device("meta"):
            model = build_model(loaded.model)
        assert sum(p.numel() for p in model.parameters()) > 0


DENOISERS = [name for name in config.names("model") if "denoiser" in name]


@pytest.mark.parametrize("name", DENOISERS)
def test_denoiser_config_takes_a_training_step(name):
    torch.manual_seed(0)
    small = ["model.n_layers=1", "model.d_model=72", "model.headdim=24", "model.n_heads=3", "model.unet_blocks=1"]
    model = build_model(config.load(f"model={name}", *small).model)
    c = model.config
    noisy, coarse = torch.randn(2, c.noisy_channels, 11), torch.randn(2, c.coarse_channels, 11)
    conditions = Conditions(coarse, TextCondition.stack([torch.randn(n, c.text_dim) for n in (3, 5)]))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def loss():
        return (model(noisy, torch.tensor([0.2, 0.9]), conditions) - noisy).square().mean()

    before = loss()
    before.backward()
    optimizer.step()
    assert loss().item() < before.item()


@pytest.mark.parametrize("name", [name for name in config.names("model") if name not in DENOISERS])
def test_model_config_takes_a_training_step(name):
    """With one layer, so that the largest fits a laptop."""
    torch.manual_seed(0)
    model = build_model(config.load(f"model={name}", "model.n_layers=1").model)
    codes = torch.randint(model.config.codebook_size, (2, model.config.n_codebooks, 9))
    text = TextCondition.stack([torch.randn(n, model.config.text_dim) for n in (3, 5)])
    optimizer = torch.optim.SGD(model.eval().parameters(), 0.1)

    def loss():
        logits = model(codes, text).flatten(0, 2)
        return torch.nn.functional.cross_entropy(logits, codes.flatten())

    before = loss()
    before.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    optimizer.step()
    assert loss().item() < before.item()


@pytest.mark.parametrize("path", ["plain", "a, b = [c]", "it's", r"C:\here", "C:\\", r"a\'b", "{x: 1}", "null"])
def test_override_quotes_any_path(path):
    assert config.load(config.override("data.store", path)).data.store == path


def test_paper_prefix_simba_has_281_042_176_parameters():
    loaded = config.load("experiment=paper_prefix_simba")
    assert (loaded.model.n_layers, loaded.model.d_model, loaded.model.n_codebooks) == (24, 1024, 1)
    with torch.device("meta"):
        model = build_model(loaded.model)
    assert sum(p.numel() for p in model.parameters()) == 281_042_176


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("train.stepz=3", "train.steps"),
        ("nonsense=3", "nonsense"),
        ("experiment=tinny", "experiment=tiny"),
        ("model=", "model"),
        ("train.steps=[", "train.steps"),
    ],
)
def test_invalid_override_is_one_clear_line(override, hint):
    with pytest.raises(UserError) as caught:
        config.load(override)
    assert hint in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("optim.player_lr.lm=1e-4", "optim.module_lr.lm=1e-4"),
        ("+diffusion.sketch_noise=1", "diffusion.coarse_noise_aug=1"),
        ("diffusion={sketch_dropout: 0.2}", "diffusion.coarse_dropout"),
        ("painter=runs/x", "second_stage=runs/x"),
        *((f"experiment={old}", f"experiment={new}") for old, new in config.RENAMED_EXPERIMENTS.items()),
        *((f"{old}=3", f"{new}=3") for old, new in config.RENAMED_KEYS.items()),
    ],
)
def test_renamed_override_names_the_new_one(old, new):
    with pytest.raises(UserError, match="renamed") as caught:
        config.load(old)
    assert str(caught.value).endswith(new) and "\n" not in str(caught.value)


def test_renamed_keys_and_experiments_exist_under_their_new_names():
    known = set(config.RENAMED_EXPERIMENTS.values())
    assert known <= set(config.names("experiment")) and not known & set(config.RENAMED_EXPERIMENTS)
    roots = [config.load("experiment=tiny_stage2"), config.load(root="eval")]
    for new in config.RENAMED_KEYS.values():
        assert any(OmegaConf.select(root, new, default=KeyError) is not KeyError for root in roots), new


def test_unknown_key_cannot_be_read():
    with pytest.raises(ConfigAttributeError):
        _ = config.load().train.stepz


def test_run_cli_exit_codes(capsys):
    def user_error():
        raise UserError("what\nwhere")

    def interrupted():
        raise KeyboardInterrupt

    def full_disk():
        raise OSError(28, "No space left on device", "out.wav")

    assert run_cli(lambda: None) == 0
    assert run_cli(user_error) == 2
    assert run_cli(interrupted) == 130
    assert run_cli(full_disk) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: what where" and "out.wav" in lines[2] and len(lines) == 3
