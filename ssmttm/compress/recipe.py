"""`ssmttm compress`: train the students of a recipe one after the other and assemble them.

WORK/lm/  WORK/text/  WORK/codec/   run folders of the trainings
OUT/                                model folder of the student system; sizes.md compares it with its teacher
"""

import signal
import subprocess
from pathlib import Path

from omegaconf import DictConfig

from ssmttm import config as configs
from ssmttm.compress.assemble import assemble
from ssmttm.compress.sizes import comparison, components
from ssmttm.errors import PREEMPTED, USER_ERROR, Preempted, UserError
from ssmttm.files import directory_lock, write_text
from ssmttm.generation.loading import open_model_folder, open_second_stage_folder
from ssmttm.generation.pipeline import MusicPipeline
from ssmttm.launch.job import run_command, train_command
from ssmttm.signals import INTERRUPT, stop_requests

PARTS = ("lm", "text", "codec")


def compress(settings: DictConfig) -> Path:
    """Run a recipe, the composed configs/compress.yaml, and return OUT; finished trainings are skipped.

    Raises:
        UserError: invalid settings, another compression in the same folder, or a training that failed.
        Preempted, KeyboardInterrupt: a signal came; the same call resumes.
    """
    out = check_settings(settings)
    with directory_lock(Path(settings.work), "compression"):
        for part, keys in training_overrides(settings).items():
            print(f"\n{part}: train.py {' '.join(keys)}", flush=True)
            run_training([*train_command(settings.accelerate, port=0), *keys], part)
        runs = {part: Path(settings.work) / part for part in PARTS if settings.recipe[part] is not None}
        original = open_model_folder(settings.teacher)
        language = runs.get("text") or runs.get("lm") or original.path
        second = open_second_stage_folder(original, None)
        second_path = None if second is None else second.path
        assemble(language, runs.get("codec"), out, settings.recipe.int8, second_path)
    teacher, student = (MusicPipeline.from_pretrained(folder, "cpu") for folder in (settings.teacher, out))
    write_text(out / "sizes.md", comparison(components(teacher), components(student)) + "\n")
    return out


def training_overrides(settings: DictConfig) -> dict[str, list[str]]:
    """Overrides of train.py for each part. The text encoder's teacher is the new language model, if there is one; the
    decoder's teacher is the codec of the recipe's teacher."""
    language, overrides = str(settings.teacher), {}
    work = Path(settings.work)
    for part in PARTS:
        keys = settings.recipe[part]
        if keys is None:
            continue
        teacher = open_model_folder(settings.teacher).source("codec") if part == "codec" else language
        paths = {"teacher": teacher, "data.store": settings.store, "run_dir": work / part}
        overrides[part] = [*keys, *(configs.override(key, value) for key, value in paths.items())]
        configs.load(*overrides[part])  # an unknown key is an error
        if part == "lm":
            language = str(work / part)
    return overrides


def run_training(command: list[str], part: str) -> None:
    """Run a training as a process, to which a request to stop is passed on; raise as the training ended."""
    with stop_requests() as received:
        code = run_command(command, received)
    if received() == INTERRUPT:
        raise KeyboardInterrupt
    if received() or code == PREEMPTED:
        raise Preempted(f"the training of {part} was stopped at a checkpoint: run the same command to resume")
    if code == USER_ERROR:
        raise UserError(f"the training of {part} failed with the error above: fix it and run the same command again")
    if code < 0:
        name = signal.Signals(-code).name
        raise UserError(f"the training of {part} was killed by {name} (out of memory?): run the same command to resume")
    if code:
        raise subprocess.CalledProcessError(code, command)


def check_settings(settings: DictConfig) -> Path:
    """Check a recipe before any training and return OUT."""
    recipe = settings.recipe
    if not recipe.name:
        raise UserError(f"recipe is not set: set recipe=NAME, one of {', '.join(configs.names('recipe'))}")
    for key in ("teacher", "store"):
        if not settings[key]:
            raise UserError(f"{key} is not set: set {key}={'tiny_lm' if key == 'teacher' else 'STORE'}")
    if all(recipe[part] is None for part in PARTS) and not recipe.int8:
        raise UserError(f"the recipe {recipe.name} changes nothing: set a training for one of {', '.join(PARTS)}")
    out = Path(settings.out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: set out=DIR, a new folder")
    teacher = open_model_folder(settings.teacher)
    second = open_second_stage_folder(teacher, None)
    if second is not None and recipe.text is not None and not teacher.config.model.get("predict_controls"):
        raise UserError(
            f"the second stage of {teacher.name} reads the text encoder's states, which a student of it keeps only for "
            "a language model with model.predict_controls: set recipe.text=null"
        )
    return out
