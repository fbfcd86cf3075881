"""The keys of the configs of `ssmttm evaluate`, `ssmttm sweep` and `ssmttm compress`: types, defaults and meaning."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class EmbedderWeights:
    """A file, folder or hub name by embedder; null: the embedder's own."""

    tiny: str | None = None
    log_mel: str | None = None
    codec: str | None = None
    clap: str | None = None
    ast: str | None = None
    panns: str | None = None
    vggish: str | None = None
    passt: str | None = None
    muq_mulan: str | None = None
    audiobox: str | None = None


@dataclass
class ProtocolConfig:
    """A protocol, a file of configs/eval."""

    name: str | None = None
    source: str | None = None  # builtin: captions and annotations of a store; table: a file of prompts
    n: int | None = None  # prompts; null: all
    seconds: float = 10.0  # duration of the clips; references are truncated to it
    name_of: str = "{name}"  # table: template of a prompt's name, from the columns
    caption: str = "caption"  # table: the column of the caption
    keep: dict[str, Any] = field(default_factory=dict)  # table: only rows with these values
    # table: templates of a prompt's own reference under `references`; []: all audio there, as one set
    audio: list[str] = field(default_factory=lambda: ["{name}"])
    concepts: str | None = None  # table: the column of a prompt's concepts, a list or separated by commas
    embedders: list[str] = field(default_factory=lambda: ["tiny", "log_mel"])
    weights: EmbedderWeights = field(default_factory=EmbedderWeights)
    judge: str | None = None  # folder or hub name of a Qwen2-Audio that is asked for the concepts; null: no ccs
    published: dict[str, dict[str, float]] = field(default_factory=dict)  # results by system, not measured here
    source_of_published: str | None = None
    # by embedder: sha256 of the file of weights that the published results were measured with; others give a note
    published_weights: dict[str, str] = field(default_factory=dict)


@dataclass
class EvaluateConfig:
    checkpoint: str | None = None  # a run, a checkpoint or an exported model; null: the shipped model
    second_stage: str | None = None  # of a two-stage model, if it is not in the folder of the first stage
    audio: str | None = None  # evaluate this folder of audio, named after prompts or with metadata sidecars
    store: str | None = None  # builtin: store with the held-out captions
    prompts: str | None = None  # table: the benchmark's captions (CSV, TSV, JSON, Parquet, or .txt with one a line)
    references: str | None = None  # table: folder of the benchmark's audio; null: only metrics without references
    n: int | None = None  # number of prompts; null: the protocol's
    seed: int = 0  # of the choice of prompts and of sampling
    guidance: float | None = None  # guidance scale; null, also of the next three: the model's
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    batch: int = 10  # clips sampled together
    adherence: bool = True  # builtin: prompt adherence by attribute classifiers
    music_metrics: bool = True  # music metrics of the clips and of the references
    out: str = "runs/eval/${eval.name}"
    eval: ProtocolConfig = field(default_factory=ProtocolConfig)


@dataclass
class BudgetConfig:
    """At most one; all null: the experiment's own train.steps."""

    steps: int | None = None
    flops: float | None = None  # of training, forward and backward
    seconds: float | None = None  # of training; each job times its first steps and runs as many as fit


@dataclass
class GridConfig:
    """A sweep, a file of configs/sweep."""

    name: str | None = None
    experiment: str | None = None  # base of every job, a file of configs/experiment
    overrides: list[str] = field(default_factory=list)  # of every job
    grid: dict[str, Any] = field(default_factory=dict)  # axes, combined: KEY: [values], or NAME: {label: [overrides]}
    seeds: list[int] = field(default_factory=lambda: [0])
    match: Any = None  # {parameters: 300M, vary: n_layers}: fit every model to one size
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    search: Any = None  # not a grid: {trials, direction, parameters: {KEY: {low, high, log} | [choices]}}, by Optuna
    evaluate: list[str] | None = None  # overrides of `ssmttm evaluate` for each trained model, as [eval=builtin, n=64]
    metric: str = "valid/loss"  # a name in metrics.jsonl: compared in reports, optimised by a search


@dataclass
class LauncherConfig:
    """Processes of this machine, several at a time."""

    kind: str = "local"
    parallel: int | None = None  # jobs at a time; null: as many as GPUs or CPU cores, or Ray's resources, allow
    gpus: int = 1  # per job, if there are any
    threads: int = 1  # CPU cores per job, if there is no GPU
    retries: int = 1  # of a job that crashed
    accelerate: str | None = None  # path of a file of configs/accelerate; null: one process


@dataclass
class RayLauncherConfig(LauncherConfig):
    kind: str = "ray"
    address: str | None = None  # as for ray.init; null starts Ray on this machine


@dataclass
class SlurmLauncherConfig(LauncherConfig):
    kind: str = "slurm"
    partition: str | None = None
    account: str | None = None
    time: str = "24:00:00"


@dataclass
class SweepConfig:
    store: str | None = None  # the data of every job
    out: str = "runs/sweeps/${sweep.name}"
    sweep: GridConfig = field(default_factory=GridConfig)
    launcher: LauncherConfig = MISSING


@dataclass
class RecipeConfig:
    """A recipe, a file of configs/recipe: the parts of a student system."""

    name: str | None = None
    lm: list[str] | None = None  # overrides of train.py for a student language model; null: keep the teacher's
    text: list[str] | None = None  # ... for a student text encoder, whose teacher is the new language model
    codec: list[str] | None = None  # ... for a student codec decoder
    int8: bool = False  # quantise the language model's linear layers to int8


@dataclass
class CompressConfig:
    teacher: str | None = None  # a run, a checkpoint, an exported or imported folder, or an embedded model
    store: str | None = None  # training data, made with the teacher's codec and text encoder
    work: str = "runs/compress/${recipe.name}"  # run folders of the trainings; the same command resumes them
    accelerate: str | None = None  # path of a file of configs/accelerate, for several devices
    out: str = "exported/${recipe.name}"  # model folder of the student system, must be new
    recipe: RecipeConfig = field(default_factory=RecipeConfig)


COMMANDS = {"evaluate_config": EvaluateConfig, "sweep_config": SweepConfig, "compress_config": CompressConfig}
LAUNCHERS = {"local": LauncherConfig, "ray": RayLauncherConfig, "slurm": SlurmLauncherConfig}
