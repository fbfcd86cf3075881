"""Audio that nothing can be measured of is named, in metrics, listening tests and melodies alike."""

import math

import numpy as np
import pytest
import soundfile as sf
import torch

from ssmttm import audio
from ssmttm.errors import UserError

RATE = 24_000


def noise(*shape: int) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def tune(seconds: float = 2.0) -> torch.Tensor:
    """Decaying notes, [1, S]."""
    time = torch.arange(round(seconds * RATE)) / RATE
    hertz = 220 * 2 ** ((time * 4).floor() * 5 % 24 / 12)
    return 0.4 * (torch.sin(2 * math.pi * hertz * time) * torch.exp(-4 * (time % 0.25)))[None]


DEFECTIVE = {
    "silence": (torch.zeros(1, RATE), "silent"),
    "stereo silence": (torch.zeros(2, RATE), "silent"),
    "dither": (noise(2, RATE) * 1e-4, "silent"),
    "a constant": (torch.full((1, RATE), 0.3), "constant"),
    "a constant with dither": (0.3 + noise(1, RATE) * 1e-4, "constant"),
    "two constants": (torch.cat([torch.full((1, RATE), 0.3), torch.full((1, RATE), -0.2)], 1), "constant"),
    "opposite constants": (torch.tensor([[0.3], [-0.3]]).expand(2, RATE), "constant"),
    "16-bit scale": (20_000 * tune(), "times full scale"),
    "8-bit scale": (100 * tune(), "times full scale"),
    "24-bit scale, soft": (2**23 * 1e-3 * tune(), "times full scale"),
    "three times full scale": (3 / 0.4 * tune(), "times full scale"),
    "one spike": (torch.cat([tune(), torch.full((1, 1), 1e4)], 1), "times full scale"),
    "inverted channel": (torch.cat([tune(), -tune()]), "cancel"),
    "inverted channel, softer": (torch.cat([tune(), -0.7 * tune()]), "cancel"),
    "inverted channel with offset": (torch.cat([tune(), -tune()]) + 0.3, "cancel"),
    "inverted channels of four": (torch.cat([tune(), -tune(), tune(), -tune()]), "cancel"),
    "NaN": (tune().index_fill(1, torch.tensor([5]), math.nan), "NaN"),
    "infinity": (tune().index_fill(1, torch.tensor([5]), math.inf), "NaN or infinite"),
    "nothing": (torch.zeros(1, 0), "no samples"),
    "one sample": (torch.full((1, 1), 0.5), "constant"),
}
MUSIC = {
    "mono": tune(),
    "soft": tune() * 0.02,
    "two equal channels": tune().repeat(2, 1),
    "unrelated channels": noise(2, RATE),
    "eight unrelated channels": noise(8, RATE),
    "one dead channel": torch.cat([tune(), torch.zeros_like(tune())]),
    "wide": torch.cat([tune() + noise(1, 2 * RATE), tune() - noise(1, 2 * RATE)]),
    "offset": tune() + 0.3,
    "single samples above full scale": torch.where(torch.arange(2 * RATE) % 1000 == 0, 1.3, tune()),
    "mostly silence": torch.cat([torch.zeros(1, 9 * RATE), tune()], 1),
    "a low note": 0.3 * torch.sin(2 * math.pi * 30 * torch.arange(RATE) / RATE)[None],
    "a short clip": tune()[:, :240],
}


@pytest.mark.parametrize("name", DEFECTIVE)
def test_defect_names_what_is_wrong(name):
    wav, reason = DEFECTIVE[name]
    assert reason in audio.defect(wav, RATE)
    with pytest.raises(UserError, match=f"clip.wav .*{reason}"):
        audio.check_music(wav, RATE, "clip.wav")


@pytest.mark.parametrize("name", MUSIC)
@pytest.mark.parametrize("rate", [8_000, 24_000, 96_000])
def test_defect_accepts_music(name, rate):
    assert audio.defect(MUSIC[name], rate) is None


def test_read_music_checks_the_part_that_is_used(tmp_path):
    wav = torch.cat([torch.zeros(1, 2 * RATE), tune()], 1)
    path = audio.write(tmp_path / "late.wav", wav, RATE)
    assert torch.equal(audio.read_music(path)[0], audio.read(path)[0])
    assert audio.read_music(path, seconds=3.0)[0].shape == (1, 3 * RATE)
    with pytest.raises(UserError, match=r"late\.wav .*silent"):
        audio.read_music(path, seconds=2.0)


def test_read_music_mixes_and_resamples_as_read_does(tmp_path):
    path = tmp_path / "stereo.wav"
    sf.write(path, np.stack([tune()[0].numpy(), 0.5 * tune()[0].numpy()], 1), RATE)
    for sample_rate in (None, 16_000):
        for mono in (True, False):
            (ours, rate), (expected, expected_rate) = (
                read(path, sample_rate, mono=mono) for read in (audio.read_music, audio.read)
            )
            assert torch.equal(ours, expected) and rate == expected_rate
