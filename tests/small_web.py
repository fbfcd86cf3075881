"""A pipeline without a model: its music is a sine whose pitch is the number of letters of the prompt."""

import copy
import threading
import time
from types import SimpleNamespace

import numpy as np
import torch

from ssmttm.errors import UserError
from ssmttm.generation.pretrained import PipelineParts
from ssmttm.generation.request import Sampling

RATE = 8000
PROMPT = "a waltz on a harp"
ADDRESS = "http://127.0.0.1:8000"


class SineSession:
    """Chunks of a sine of 20 Hz per letter; a snapshot is a copy. `drawn_bpm`: whether the model draws a tempo."""

    drawn_bpm = False

    def __init__(self, pipeline, prompt, seed, duration, chunk_seconds):
        self.pipeline, self.prompt, self.seed = pipeline, prompt, seed
        self.n_left = None if duration is None else round(duration * RATE)
        self.chunk = round(chunk_seconds * RATE)
        self.n_returned = 0
        self.sample_rate = RATE

    def next_chunk(self):
        self.pipeline.may_go_on.wait()
        self.pipeline.turns.append(self.prompt)
        time.sleep(self.pipeline.pace)
        if self.prompt == "a bug":
            raise ZeroDivisionError("planted")
        length = self.chunk if self.n_left is None else min(self.chunk, self.n_left)
        if length == 0:
            return None
        times = torch.arange(self.n_returned, self.n_returned + length) / RATE
        self.n_returned += length
        self.n_left = None if self.n_left is None else self.n_left - length
        loudness = 0.25 + 0.5 * (self.seed % 2)
        return loudness * torch.sin(2 * torch.pi * 20 * len(self.prompt) * times)[None]

    def change(self, prompt=None, guidance_scale=None, temperature=None, bpm=None):
        if bpm is not None:
            raise UserError("this model was not trained with bpm: leave it out")
        self.prompt = prompt or self.prompt

    @property
    def controls(self):
        return {"bpm": 10.0 * len(self.prompt), "drawn": ["bpm"]} if self.drawn_bpm else {}

    def snapshot(self):
        return copy.copy(self)


class SinePipeline:
    """What the server uses of `MusicPipeline`. `may_go_on` holds generations; `turns` are their prompts, in order;
    `pace` is the time of a chunk in seconds."""

    sampling, guidance_scale = PipelineParts.sampling, PipelineParts.guidance_scale

    def __init__(self, name="sine"):
        self.sample_rate, self.sampling_defaults, self.second_stage = RATE, Sampling(top_p=0.8), None
        self.metadata = {"model": {"name": name}, "training_data_licences": {"CC0-1.0": 1}}
        self.model = SimpleNamespace(config=SimpleNamespace(tempo=False))
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.turns, self.opened = [], []
        self.pace = 0.0

    def session(self, prompt, *, seed, duration, chunk_seconds, continue_from=None, **settings):
        self.may_go_on.wait()
        if prompt == "impossible":
            raise UserError("this model cannot\ndo that")
        self.opened.append({"prompt": prompt, "seed": seed, "continue_from": continue_from, **settings})
        return SineSession(self, prompt, seed, duration, chunk_seconds)

    def resume(self, snapshot, seed=None):
        session = copy.copy(snapshot)
        session.seed = session.seed if seed is None else seed
        return session


def pitch(samples):
    """The loudest frequency of samples [S] in Hz."""
    spectrum = np.abs(np.fft.rfft(np.asarray(samples, float) * np.hanning(len(samples))))
    return float(spectrum.argmax() * RATE / len(samples))


def wait_until(condition, seconds=5.0):
    """Wait for a condition of another thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)
