"""Every config composes, its model builds, and an invalid override is one clear line."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError

from ssmttm import config
from ssmttm.errors import UserError, run_cli
from ssmttm.models import build_model
from ssmttm.models.control_predictor import prediction_losses
from ssmttm.models.controls import Controls
from ssmttm.models.latent_denoiser import Conditions
from ssmttm.text.condition import TextCondition
from ssmttm.training.tasks.lm import unpack_output


@pytest.mark.parametrize("experiment", config.names("experiment"))
def test_experiment_composes_and_its_model_builds(experiment):
    loaded = config.load(f"experiment={experiment}")
    if "model" in loaded:
        with torch.device("meta"):
            model = build_model(loaded.model)
        assert sum(p.numel() for p in model.parameters()) > 0


DENOISERS = [name for name in config.names("model") if "denoiser" in name]


@pytest.mark.parametrize("name", DENOISERS)
def test_denoiser_config_takes_a_training_step(name):
    torch.manual_seed(0)
    small = ["model.n_layers=1", "model.d_model=72", "model.headdim=24", "model.n_heads=3", "model.unet_blocks=1"]
    model = build_model(config.load("task=diffusion", f"model={name}", *small).model)
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
    controls = Controls.create(2, 9, 25.0, bpm=120, key="D minor", metre="3/4")
    controls = replace(controls, timing=torch.tensor([[[1.0] * 9, [2.0] * 9], [[torch.nan] * 9] * 2]))
    predicts = model.control_predictor is not None
    optimizer = torch.optim.SGD(model.eval().parameters(), 0.1)

    def loss():
        given = controls.supported_by(model.config)
        logits, _, predicted = unpack_output(model(codes, text, controls=given, predict_controls=predicts))
        losses = prediction_losses(predicted, controls).values()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 2), codes.flatten()) + sum(losses)

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


@pytest.mark.parametrize("task", config.names("task"))
def test_task_has_its_own_keys_only(task):
    with pytest.raises(UserError, match=f"is a key of task=.*, not of task={task}"):
        config.load(f"task={task}", "text_student.trim=false" if task == "codec" else "codec_training.restart_every=3")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["losses.mel=99"], "losses.mel is a key of task=codec, distill_codec, not of task=lm"),
        (["+losses.mel=99"], "losses.mel is a key of task=codec, distill_codec, not of task=lm"),
        (["distill.temperature=9"], "distill.temperature is a key of task=distill, not of task=lm"),
        (["data.seconds=2"], "data.seconds is a key of task=codec, distill_codec, not of task=lm"),
        (["optim.module_lr.lm=1"], "optim.module_lr.lm is a key of task=distill_text, not of task=lm"),
        (["experiment=tiny_codec", "model.n_layers=3"], "model.n_layers is a key of task=diffusion, distill, lm"),
        (["experiment=tiny_codec", "model=tiny"], "model is a key of task=diffusion, distill, lm, not of task=codec"),
        (["experiment=tiny_stage2", "model.positions=none"], "a key of task=distill, lm, not of task=diffusion"),
        (["experiment=tinyttm_lm", "task=lm"], "configs/experiment/tinyttm_lm.yaml: distill is a key of task=distill"),
        (["experiment=tiny_codec", "codec_training.restart_evry=3"], "did you mean codec_training.restart_every?"),
        (["codec_training.restart_evry=3"], "did you mean codec_training.restart_every, a key of task=codec?"),
        (["steps=3"], "did you mean train.steps?"),
        (["train={stepz: 3}"], "unknown config key 'train.stepz': did you mean train.steps?"),
        (["task=diffusion", "diffusion={sketch_dropout: 0.2}"], "was renamed to diffusion.coarse_dropout"),
        (["train.steps=many"], "train.steps must be an integer, got many"),
        (["train.steps=2.5"], "train.steps must be an integer, got 2.5"),
        (["train.steps=null"], "train.steps must be an integer, got null"),
        (["optim.momentum=0.9"], "optim.momentum is a key of optim=muon, not of optim=adamw"),
        (["experiment=tiny", "schedule.decay_steps=9"], "is a key of schedule=wsd, not of schedule=cosine"),
        (["optim=adamwx"], "optim=adamwx"),
        (["optim.lr=true"], "optim.lr must be a number, got true"),
        (["model.tempo=3.5"], "model.tempo must be true or false, got 3.5"),
        (["model.layer_scale=[1]"], "model.layer_scale must be a number or null, got [1]"),
        (["train.codebook_weights=[4,x]"], "train.codebook_weights must be a list or null, got [4,x]"),
        (["train.prompts=a waltz"], "train.prompts must be a list, got a waltz"),
        (["experiment=tiny_codec", "codec.hop_length=x"], "codec.hop_length must be an integer, got x"),
        (["data=default"], "data must be a section, got default"),
        (["~train.steps"], "a key cannot be removed"),
        (["=3"], "'=3' is no override"),
        (["--steps=3"], "unknown option --steps=3: write key=value, such as steps=3"),
    ],
)
def test_wrong_key_or_value_is_one_clear_line(overrides, message):
    with pytest.raises(UserError) as caught:
        config.load(*overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    ["a, b", "a,b", "my music (2)", "live [take 1]", "[live]", "{x}", "lr=0.1", "it's", "ü#1", "$x (a)", "a`b", '(c"'],
)
def test_value_that_must_be_quoted_is_answered_with_the_quoted_form(given):
    with pytest.raises(UserError) as caught:
        config.load(f"data.store={given}")
    message = str(caught.value)
    hint = message.split(", as ")[1]
    printed = subprocess.run(["sh", "-c", f"printf %s {hint}"], capture_output=True, text=True, check=True).stdout
    assert config.load(printed).data.store == given and "\n" not in message


def test_blank_that_was_not_quoted_in_the_shell_is_answered_with_the_quoted_form():
    with pytest.raises(UserError, match=r"\"data.store='my music'\"$"):
        config.load("seed=1", "data.store=my", "music")


def test_list_without_brackets_is_answered_with_brackets():
    with pytest.raises(UserError, match=r'write a list in brackets, as "train.codebook_weights=\[4,3,2\]"$'):
        config.load("train.codebook_weights=4,3,2")


@pytest.mark.parametrize("name", ["2024_01", "007", "1e3", "true"])
def test_text_value_is_kept_as_given(name):
    assert config.load(f"run_dir={name}", "teacher=null", "task=distill").run_dir == name


def test_the_last_value_of_a_key_counts():
    assert config.load("run_dir=first", "run_dir=runs/last").run_dir == "runs/last"


def test_composing_imports_no_torch():
    code = "import sys; from ssmttm import config; config.load('experiment=tiny'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


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
        ("text=flan_t5", "data.text_encoder=flan_t5"),
        ("text.name=t5-base", "data.text_encoder=t5-base"),
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
    for old, new in config.RENAMED_SCHEDULE.items():
        with pytest.raises(UserError, match=f"{old} was renamed: write {new}=5"):
            config.load(f"{old}=5")
    roots = [*(config.load(f"task={task}") for task in config.names("task")), config.load(root="eval")]
    for new in [*config.RENAMED_KEYS.values(), *config.RENAMED_GROUPS.values(), *config.RENAMED_SCHEDULE.values()]:
        assert any(OmegaConf.select(root, new, default=KeyError) is not KeyError for root in roots), new


@pytest.mark.parametrize(
    ("root", "override", "message"),
    [
        ("eval", "tempature=1", "unknown config key 'tempature': did you mean temperature?"),
        ("eval", "eval.sekonds=3", "unknown config key 'eval.sekonds': did you mean eval.seconds?"),
        ("eval", "n=ten", "n must be an integer or null, got ten"),
        ("eval", "adherence=perhaps", "adherence must be true or false, got perhaps"),
        ("eval", "+sed=1", "unknown config key 'sed': did you mean seed?"),
        ("sweep", "sweep.budget.stepz=3", "unknown config key 'sweep.budget.stepz': did you mean sweep.budget.steps?"),
        ("sweep", "launcher.time=1", "launcher.time is a key of launcher=slurm: leave it out, or choose that launcher"),
        ("sweep", "launcher.retries=many", "launcher.retries must be an integer, got many"),
        ("compress", "recipe.int9=true", "unknown config key 'recipe.int9': did you mean recipe.int8?"),
        ("compress", "recipe.lm=tiny", "recipe.lm must be a list or null, got tiny"),
        ("compress", "~teacher", "~teacher: a key cannot be removed; set it to another value, such as null"),
    ],
)  # fmt: skip
def test_keys_of_commands_are_checked_as_those_of_trainings(root, override, message):
    with pytest.raises(UserError) as caught:
        config.load(override, root=root)
    assert str(caught.value) == message


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
