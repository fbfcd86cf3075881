"""`ssmttm compress`: train the students that a recipe names, one part after the other, and put them together.

    WORK/lm/  WORK/text/  WORK/codec/   the trainings, each a run folder
    OUT/                                the student system, a model folder; sizes.md tells it from its teacher
"""

import os
import signal
import subprocess
from pathlib import Path

from omegaconf import DictConfig

from ssmttm import config as configs
from ssmttm.compress.assemble import assemble
from ssmttm.compress.sizes import comparison, components
from ssmttm.errors import PREEMPTED, USER_ERROR, Preempted, UserError
from ssmttm.files import write_text
from ssmttm.generation.loading import open_model_folder
from ssmttm.generation.pipeline import MusicPipeline
from ssmttm.launch.training_job import TRAIN, launch_command
from ssmttm.signals import INTERRUPT, stop_requests

PARTS = ("lm", "text", "codec")


def compress(settings: DictConfig) -> Path:
    """Follow a recipe; trainings that are done are not done again.

    Args:
        settings: configs/compress.yaml, composed.

    Returns:
        OUT.

    Raises:
        UserError: no recipe, no teacher or store, OUT is there already, or what a training refuses.
        Preempted, KeyboardInterrupt: as of a training; its checkpoint is written.
        CalledProcessError: a training crashed.
    """
    out = check(settings)
    for part, keys in trainings(settings).items():
        print(f"\n{part}: train.py {' '.join(keys)}", flush=True)
        run([*launch_command(settings.accelerate, port=0), str(TRAIN), *keys], part)
    runs = {part: Path(settings.work) / part for part in PARTS if settings.recipe[part] is not None}
    language = runs.get("text") or runs.get("lm") or Path(open_model_folder(settings.teacher).path)
    assemble(language, runs.get("codec"), out, int8=settings.recipe.int8)
    teacher, student = (MusicPipeline.from_pretrained(folder, "cpu") for folder in (settings.teacher, out))
    write_text(out / "sizes.md", comparison(components(teacher), components(student)) + "\n")
    return out


def trainings(settings: DictConfig) -> dict[str, list[str]]:
    """What train.py is told for each part: the language model's teacher is the recipe's, the text encoder is fitted to
    the language model that goes on, the decoder to the teacher's codec.

    Raises:
        UserError: keys that train.py does not know.
    """
    language, found = str(settings.teacher), {}
    work = Path(settings.work)
    for part in PARTS:
        keys = settings.recipe[part]
        if keys is None:
            continue
        teacher = open_model_folder(settings.teacher).source("codec") if part == "codec" else language
        given = {"teacher": teacher, "data.store": settings.store, "run_dir": work / part}
        found[part] = [*keys, *(configs.override(key, value) for key, value in given.items())]
        configs.load(*found[part])
        if part == "lm":
            language = str(work / part)
    return found


def run(command: list[str], part: str) -> None:
    """A training as a process of its own, which is asked to stop when this one is.

    Raises:
        UserError, Preempted, KeyboardInterrupt: it ended so. CalledProcessError: it crashed.
    """
    with stop_requests() as stopped:
        process = subprocess.Popen(command, start_new_session=True)
        asked = False
        while (code := _waited(process)) is None:
            if stopped() and not asked:
                os.killpg(process.pid, signal.SIGTERM)
                asked = True
        if stopped() == INTERRUPT:
            raise KeyboardInterrupt
        if stopped() or code == PREEMPTED:
            raise Preempted(f"the training of the {part} has written a checkpoint: run the same command to go on")
    if code == USER_ERROR:
        raise UserError(f"the training of the {part} cannot go on, as it says above: mend that and run the same again")
    if code:
        raise subprocess.CalledProcessError(code, command)


def _waited(process: "subprocess.Popen[bytes]", seconds: float = 0.2) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def check(settings: DictConfig) -> Path:
    """OUT. Raises UserError for what cannot be followed, before anything is trained."""
    recipe = settings.recipe
    if not recipe.name:
        raise UserError(f"no recipe is named: give recipe=NAME, one of {', '.join(configs.names('recipe'))}")
    for key in ("teacher", "store"):
        if not settings[key]:
            raise UserError(f"{key} is not set: give {key}={'tiny_lm' if key == 'teacher' else 'STORE'}")
    if all(recipe[part] is None for part in PARTS) and not recipe.int8:
        raise UserError(f"the recipe {recipe.name} changes nothing: name a training for one of {', '.join(PARTS)}")
    out = Path(settings.out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: give out=DIR, a new folder")
    open_model_folder(settings.teacher)
    return out
