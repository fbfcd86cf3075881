"""The keys of a training's config: types, defaults and meaning. One class a task, with the task's own sections only."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from ssmttm.config.optim import (
    AdamWConfig,
    CodecDistillModuleRates,
    CodecModuleRates,
    DistillModuleRates,
    LMModuleRates,
    ScheduleConfig,
    TextDistillModuleRates,
)


@dataclass
class DataConfig:
    store: str | None = None  # folder of a store, made by `python -m data_prep`
    batch_size: int = 16  # items of the global batch, over all devices and micro-batches
    batch_size_schedule: list[list[int]] = field(default_factory=list)  # [step, size] from which it is another one


@dataclass
class CodesDataConfig(DataConfig):
    """Of tasks that learn from codes and captions."""

    frames: int = 250  # code frames per item
    frames_schedule: list[list[int]] = field(default_factory=list)  # as batch_size_schedule, in training
    text_encoder: str | None = None  # the text encoder that the store must be made with; null: any
    fixed_crops: bool = False  # the same crop, caption and dropout of a segment in every epoch
    caption_dropout: float = 0.1  # probability that a caption is replaced by the empty one
    tempo_dropout: float = 0.3  # with model.tempo: dropout probability of the tempo
    chroma_dropout: float = 0.3  # with model.chroma: dropout probability of the melody
    key_dropout: float = 0.3  # with model.key: dropout probability of the key
    metre_dropout: float = 0.3  # with model.metre: dropout probability of the metre
    bar_position_dropout: float = 0.3  # with model.bar_position: dropout probability of the bar position
    timing_dropout: float = 0.3  # with model.timing: of the time since the start, and by itself of that until the end
    caption_swap: float = 0.0  # with controls: probability that a caption is another segment's, so that controls count


@dataclass
class AudioDataConfig(DataConfig):
    """Of tasks that learn from audio."""

    seconds: float = 1.0  # audio per item
    cache: str | None = None  # folder for the store's audio as 16-bit samples, written if missing; null: decode files


@dataclass
class TrainConfig:
    steps: int = 1000  # optimiser steps
    minutes: float | None = None  # train for about so long, whatever `steps` is; null: by steps
    precision: str = "auto"  # auto | fp32 | bf16; auto: bf16 if the GPU or CPU supports it
    micro_batch_size: int | None = None  # items per device and forward pass; null: the device's part of the batch
    log_every: int = 10  # steps between log lines; 0 is never, also for the *_every keys below
    eval_every: int = 200  # steps between validations
    eval_batches: int = 8  # batches of a validation
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    sample_every: int = 0  # steps between audio samples
    recompute: str = "none"  # none | selective | full: what the backward of a block computes again, to save memory
    compile: bool = False  # compile the blocks by torch.compile
    async_checkpoints: bool = True  # a thread writes them, while the training goes on
    skip_outliers: float | None = None  # skip a step whose loss or gradient norm is so many deviations too high
    skip_limit: int = 10  # skipped steps in a row after which the run is rolled back, or stops
    rollbacks: int = 0  # how often it is rolled back to its last checkpoint, without the batches since then
    rollback_lr: float = 0.5  # factor of the learning rates after each time
    stall_seconds: float = 300.0  # a rank names what it has been doing for longer; 0: never
    profile: str | None = None  # steps to profile into RUN/profile, such as 10:15
    ema_decay: float | None = 0.999  # of the averaged weights for validation, samples and export; null: no averaging
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])  # tensorboard, wandb, trackio


@dataclass
class DiffusionTrainConfig(TrainConfig):
    sample_seconds: float = 5.0  # duration of the audio samples


@dataclass
class LMTrainConfig(TrainConfig):
    sample_seconds: float = 5.0  # duration of the audio samples
    label_smoothing: float = 0.0
    codebook_weights: list[float] | None = None  # loss weight by codebook, such as [4,3,2,1]; null: equal
    prompts: list[str] = field(
        default_factory=lambda: [
            "a slow waltz in D minor on a music box",
            "fast energetic drum and bass with a driving synth bass",
            "calm solo piano in a major key",
        ]
    )  # of the audio samples; their seeds are fixed


@dataclass
class LMLosses:
    cross_entropy: float = 1.0  # mean over codebooks
    z_loss: float = 0.0  # squared log of the softmax's denominator (arXiv 2204.02311), mean over codebooks
    tags: float = 0.0  # tag classification; 0: no tag head
    controls: float = 0.1  # of tempo, key and metre given the caption, with model.predict_controls


@dataclass
class DiffusionLosses:
    denoising: float = 1.0


@dataclass
class CodecLosses:
    mel: float = 15.0
    spectrum: float = 1.0
    pitch: float = 2.0  # magnitudes of the low band in a long window, with codec_training.fast_losses
    notes: float = 4.0  # magnitude in each semitone, likewise
    flux: float = 5.0  # change of magnitudes from frame to frame, likewise
    codebook: float = 1.0
    commitment: float = 0.25
    kl: float = 2.0e-4  # of a VAE's latents from a standard normal, summed over channels
    adversarial: float = 0.5
    feature: float = 2.0
    discriminator: float = 1.0


@dataclass
class CodecDistillLosses:
    """Without those of the quantiser, which is the teacher's."""

    mel: float = 15.0
    spectrum: float = 1.0
    adversarial: float = 0.5
    feature: float = 2.0
    discriminator: float = 1.0
    decoder: float = 1.0  # square error of the projected decoder stages, relative to the teacher's energy


@dataclass
class DistillLosses:
    cross_entropy: float = 1.0  # mean over codebooks
    kl: float = 1.0  # divergence from the teacher's distributions
    hidden: float = 0.0  # distance between the projected hidden states of mapped blocks


@dataclass
class TextDistillLosses:
    cross_entropy: float = 1.0  # mean over codebooks
    kl: float = 1.0  # divergence from the distributions with the original encoder
    text: float = 1.0  # distance between the projected text states of student and teacher


@dataclass
class TagHeadConfig:
    """The auxiliary tag classifier, used in training only; see losses.tags."""

    block: int = 4  # block after which it reads the hidden states, counted from 1
    min_share: float = 0.005  # smallest fraction of the segments that a tag must have


@dataclass
class DiffusionConfig:
    objective: str = "flow"  # flow | v | regression: the training target
    coarse_dropout: float = 0.1  # dropout probability of the coarse codes; see data.caption_dropout for the caption
    coarse_noise_aug: float = 0.5  # noise augmentation of the coarse latents: standard deviation drawn from [0, this]
    sampler: str | None = None  # flow: euler, heun, dpm_solver; v: dpm_solver, ddim, ddpm; null: the first of these
    steps: int = 8  # sampling steps
    guidance_scale: float = 3.0  # of the caption, in the second stage; 1: no guidance
    coarse_guidance_scale: float = 3.0  # of the coarse codes; equal scales take two passes per step, others three


@dataclass
class AdversarialConfig:
    adversarial_start: int | None = 6000  # first step with the discriminator; null: never
    fast_losses: bool = False  # spectral losses as in `fast_distances`, with the losses `pitch` and `notes`
    adversarial_items: int | None = None  # items of a micro-batch with the discriminator; null: all


@dataclass
class CodecTrainingConfig(AdversarialConfig):
    restart_every: int = 50  # steps between restarts of unused codebook entries
    restart_until: int = 8500  # no restarts from this step on
    start: str | None = None  # a smaller codec whose weights this one starts from, see `TinyCodec.grow_from`


@dataclass
class TransferConfig:
    """Initialise the student from its teacher."""

    layers: Any = None  # as distill.layer_map; null: none
    width: str | None = None  # first | importance


@dataclass
class DistillConfig:
    temperature: float = 1.0  # of both distributions; a teacher cache holds one temperature
    divergence: str = "forward"  # forward | reverse | bidirectional, between teacher and student
    skew: float = 0.0  # fraction of the other distribution mixed in, in [0, 1)
    guidance_scale: float = 1.0  # of the teacher; above 1 the student learns the guided distribution
    layer_map: Any = "even"  # teacher block for each student block: even | first | last | ends | a list, counted from 1
    mixer_steps: int = 0  # first steps, which match single mixers on the teacher's hidden states
    hidden_steps: int = 0  # steps after these, which match hidden states only
    weighting: str = "static"  # static | magnitude | gradient | uncertainty, see ssmttm/distill/weighting.py
    cache: str | None = None  # folder written by `ssmttm cache-teacher`: stored logits instead of forward passes
    transfer: TransferConfig = field(default_factory=TransferConfig)


@dataclass
class CodecStudentConfig:
    """The student decoder, see ssmttm/codecs/students/decoders.py."""

    kind: str = "spectral"  # spectral: ConvNeXt and inverse STFT | conv: as in DAC
    width: int = 192  # channels; conv: before the first upsampling, each of which halves them
    transfer: bool = True  # initialise from the teacher's most active channels, if its decoder is of the same kind
    blocks: tuple[int, int] = (3, 2)  # spectral: number at the frame rate, and at upsampling times the frame rate
    look_ahead: tuple[int, int] = (1, 0)  # spectral: future taps in each of these blocks
    expansion: int = 2  # spectral
    kernel: int = 7  # spectral
    upsampling: int = 2  # spectral: STFT hops per frame
    window: int | None = None  # spectral: samples; null: two frames
    ratios: list[int] | None = None  # conv: strides of the upsamplings; null: the teacher's
    depthwise: bool = False  # conv: depthwise convolutions of kernel 7


@dataclass
class TextStudentConfig:
    """A smaller text encoder; model and pattern are the teacher's."""

    encoder: str | None = None  # initial weights: minilm, a T5 or BERT of the hub, a folder; null: the teacher's
    n_layers: int | None = None  # layers kept, evenly spaced; null: all
    d_model: int | None = None  # leading channels kept, a multiple of the head size; null: all
    d_ff: int | None = None  # leading hidden units kept in the MLPs; null: all
    trim: bool = True  # reduce the vocabulary to the tokens of the store's captions
    joint_step: int | None = None  # first step that also trains the language model; null: never


@dataclass
class AdapterConfig:
    """An adapter on the linear layers of `init` is trained instead of the model's weights, with peft."""

    method: str | None = None  # lora (arXiv 2106.09685) | dora (arXiv 2402.09353); null: none, all weights are trained
    rank: int = 16
    alpha: float = 32.0  # the update is multiplied by alpha / rank
    dropout: float = 0.0
    targets: list[str] | None = None  # names of linear layers; null: in_proj, out_proj, q_proj, k_proj, v_proj, heads


@dataclass
class TaskConfig:
    """The keys of every task."""

    task: str = MISSING
    seed: int = 0
    run_dir: str = "runs/${task}"  # checkpoints, metrics.jsonl, tensorboard, samples
    init: str | None = None  # start from the weights of a run, a folder, a shipped model or a hub name; null: random
    resume: str | None = "auto"  # auto: newest good checkpoint of run_dir | none: run_dir must be empty | a checkpoint
    data: DataConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: AdamWConfig = field(default_factory=AdamWConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    losses: Any = MISSING  # weight by name; a loss of the task without a weight is logged only


@dataclass
class LMConfig(TaskConfig):
    task: str = "lm"
    pattern: str = "delay"  # codebook interleaving: delay | parallel | flatten | coarse_first
    model: Any = MISSING  # configs/model; keys: ssmttm/config/model.py
    data: CodesDataConfig = field(default_factory=CodesDataConfig)
    train: LMTrainConfig = field(default_factory=LMTrainConfig)
    optim: AdamWConfig = field(default_factory=lambda: AdamWConfig(module_lr=LMModuleRates()))
    losses: LMLosses = field(default_factory=LMLosses)
    tag_head: TagHeadConfig = field(default_factory=TagHeadConfig)
    model_from_init: bool = False  # take model and pattern from `init`; keys of model that are set still count
    adapter: AdapterConfig = field(default_factory=AdapterConfig)


@dataclass
class DiffusionTaskConfig(TaskConfig):
    task: str = "diffusion"
    model: Any = MISSING  # configs/model; keys: ssmttm/config/model.py
    data: CodesDataConfig = field(default_factory=CodesDataConfig)
    train: DiffusionTrainConfig = field(default_factory=DiffusionTrainConfig)
    losses: DiffusionLosses = field(default_factory=DiffusionLosses)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)


@dataclass
class CodecTaskConfig(TaskConfig):
    task: str = "codec"
    codec: Any = MISSING  # configs/codec; keys: ssmttm/config/codec.py
    data: AudioDataConfig = field(default_factory=AudioDataConfig)
    optim: AdamWConfig = field(default_factory=lambda: AdamWConfig(module_lr=CodecModuleRates()))
    losses: CodecLosses = field(default_factory=CodecLosses)
    codec_training: CodecTrainingConfig = field(default_factory=CodecTrainingConfig)


@dataclass
class DistillTaskConfig(TaskConfig):
    task: str = "distill"
    teacher: str | None = None  # a run, a checkpoint, an exported or imported folder, or an embedded model
    pattern: str = "delay"  # the teacher's
    model: Any = MISSING  # configs/model; keys: ssmttm/config/model.py
    data: CodesDataConfig = field(default_factory=CodesDataConfig)
    train: LMTrainConfig = field(default_factory=LMTrainConfig)
    optim: AdamWConfig = field(default_factory=lambda: AdamWConfig(module_lr=DistillModuleRates()))
    losses: DistillLosses = field(default_factory=DistillLosses)
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass
class CodecDistillConfig(TaskConfig):
    task: str = "distill_codec"
    teacher: str | None = None  # a codec or its folder
    data: AudioDataConfig = field(default_factory=AudioDataConfig)
    optim: AdamWConfig = field(default_factory=lambda: AdamWConfig(module_lr=CodecDistillModuleRates()))
    losses: CodecDistillLosses = field(default_factory=CodecDistillLosses)
    codec_training: AdversarialConfig = field(default_factory=AdversarialConfig)
    codec_student: CodecStudentConfig = field(default_factory=CodecStudentConfig)


@dataclass
class TextDistillConfig(TaskConfig):
    task: str = "distill_text"
    teacher: str | None = None  # a run, a checkpoint, an exported or imported folder, or an embedded model
    data: CodesDataConfig = field(default_factory=CodesDataConfig)
    train: LMTrainConfig = field(default_factory=LMTrainConfig)
    optim: AdamWConfig = field(default_factory=lambda: AdamWConfig(module_lr=TextDistillModuleRates()))
    losses: TextDistillLosses = field(default_factory=TextDistillLosses)
    text_student: TextStudentConfig = field(default_factory=TextStudentConfig)


TASKS = (LMConfig, DiffusionTaskConfig, CodecTaskConfig, DistillTaskConfig, CodecDistillConfig, TextDistillConfig)
