"""A folder of music with defects, duplicates and leaks, and the expected outcome for each file."""

import csv
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import soundfile as sf

from data_prep.builtin import compose, render
from ssmttm import audio

RATE = 24_000
SEED = 4021


@dataclass(frozen=True)
class Planted:
    """The folder and its expected outcome.

    Attributes:
        root: folder of the audio files and captions.csv.
        evaluation_sets: Song Describer's table, and a folder with a clip.
        kept: number of segments by the path of each kept track.
        rejected: kind by the path of each rejected track.
        captions: by path, of the tracks that have captions.
    """

    root: Path
    evaluation_sets: tuple[Path, Path]
    kept: dict[str, int]
    rejected: dict[str, str]
    captions: dict[str, list[str]]


@cache
def music(index: int) -> np.ndarray:
    """40 s of a piece, float32 [S] at 24 kHz."""
    return render(compose(SEED, index))


def save(path: Path, wav: np.ndarray, rate: int = RATE, channels: int = 1, **options: str) -> None:
    """Write mono music at another rate, on channels that differ slightly."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    mono = audio.resample(torch.from_numpy(wav), RATE, rate).numpy()
    copies = [np.roll(mono, 7 * channel) * 0.9**channel for channel in range(channels)]
    sf.write(path, np.stack(copies, axis=1), rate, **options)


def plant(folder: Path, ffmpeg: str | None = None) -> Planted:
    """Make the folder; with FFmpeg, including an .m4a."""
    root = folder / "music"
    kept = _good(root, ffmpeg)
    rejected = _duplicates(root) | _licences(root) | _evaluation(root, folder) | _defects(root, folder)
    lines = [
        ("rock/one.flac", "a song that is known", "CC-BY-4.0", "One", "Ann", "https://example.org/1", ""),
        ("rock/one.flac", "ein bekanntes Stück 🎵", "", "", "", "", ""),
        ("licences/nd.flac", "", "CC BY-ND 4.0", "", "", "", ""),
        ("licences/unknown.flac", "", "all rights reserved", "", "", "", ""),
        ("licences/versionless.flac", "", "CC BY", "", "", "", ""),
        ("evaluation/artist.flac", "", "", "", "", "", "jamendo:artist:11"),
        ("gone.wav", "", "CC0-1.0", "", "", "", ""),
        ("../away.wav", "", "CC0-1.0", "", "", "", ""),
    ]  # fmt: skip
    with open(root / "captions.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("path", "caption", "licence", "title", "author", "source_url", "artist"))
        table.writerows(lines)
    captions = {"rock/one.flac": ["a song that is known", "ein bekanntes Stück 🎵"]}
    evaluation_sets = (folder / "song_describer.csv", folder / "kept_out")
    rejected |= {"gone.wav": "missing", "../away.wav": "outside"}
    return Planted(root, evaluation_sets, kept, rejected, captions)


def _good(root: Path, ffmpeg: str | None) -> dict[str, int]:
    """Files of several formats, rates, channels and lengths; returns their number of 20 s segments."""
    save(root / "rock/one.flac", music(0), 44_100, 2)
    save(root / "rock/two.wav", music(1)[: 31 * RATE], 48_000, 2, subtype="PCM_24")
    save(root / "three.ogg", music(2), 32_000)
    save(root / "deep/er/four.mp3", music(3), 44_100, 2)
    save(root / "deep/er/five.aiff", np.concatenate([music(4), music(5)])[: 61 * RATE], 24_000)
    save(root / "six.wav", music(6)[: 22 * RATE], 96_000, 4, subtype="FLOAT")
    save(root / "sept ä.flac", music(7)[: 20 * RATE], 22_050)
    kept = {"rock/one.flac": 2, "rock/two.wav": 2, "three.ogg": 2, "deep/er/four.mp3": 2, "deep/er/five.aiff": 3,
            "six.wav": 1, "sept ä.flac": 1}  # fmt: skip
    if ffmpeg is not None:
        save(root / "tmp.wav", music(8), 44_100, 2)
        command = [ffmpeg, "-loglevel", "error", "-i", root / "tmp.wav", "-c:a", "aac", root / "eight.m4a"]
        subprocess.run(command, check=True)
        (root / "tmp.wav").unlink()
        kept["eight.m4a"] = 2
    return kept


def _duplicates(root: Path) -> dict[str, str]:
    """Copies: the same bytes, the same samples, re-encoded, trimmed and louder."""
    one = root / "rock/one.flac"
    (root / "copies").mkdir()
    shutil.copyfile(one, root / "copies/bytes.flac")
    samples, rate = sf.read(one, dtype="int16")
    sf.write(root / "copies/samples.wav", samples, rate)
    sf.write(root / "copies/encoded.mp3", samples.astype(np.float32) / 32768, rate)
    louder = np.clip(music(2)[int(3.3 * RATE) : -2 * RATE] * 2.0, -1, 1)
    save(root / "copies/louder.ogg", louder, 44_100, 2)
    return {f"copies/{name}": "duplicate" for name in ("bytes.flac", "samples.wav", "encoded.mp3", "louder.ogg")}


def _licences(root: Path) -> dict[str, str]:
    for index, name in enumerate(("nd", "unknown", "versionless"), 10):
        save(root / f"licences/{name}.flac", music(index))
    return {f"licences/{name}.flac": "licence" for name in ("nd", "unknown", "versionless")}


def _evaluation(root: Path, folder: Path) -> dict[str, str]:
    """A track by an artist of Song Describer, a track with a clip in an evaluation set, and a copy of it."""
    save(root / "evaluation/artist.flac", music(13))
    save(root / "evaluation/clip.flac", music(14))
    save(root / "evaluation/copy.ogg", music(14) * 0.6, 44_100)
    save(folder / "kept_out/clip.wav", music(14)[12 * RATE : 30 * RATE], 44_100, 2)
    (folder / "song_describer.csv").write_text(
        "caption_id,track_id,caption,is_valid_subset,familiarity,artist_id,album_id,path,duration\n"
        "1,900,a tune,True,0,11,5,00/900.mp3,120.0\n"
    )
    names = ("artist.flac", "clip.flac", "copy.ogg")
    return {f"evaluation/{name}": "evaluation" for name in names}


def _defects(root: Path, folder: Path) -> dict[str, str]:
    """Files with one defect each."""
    bad = root / "bad"
    bad.mkdir()
    (bad / "empty.wav").touch()
    (bad / "text.mp3").write_text("this is no music\n" * 99)
    save(bad / "short.flac", music(15)[: 2 * RATE])
    sf.write(bad / "silent.wav", np.zeros(25 * RATE), RATE)
    save(bad / "clipped.wav", np.clip(music(16) * 40, -1, 1))
    sf.write(bad / "nan.wav", np.where(np.arange(9 * RATE) == 99, np.nan, music(17)[: 9 * RATE]), RATE, subtype="FLOAT")
    sf.write(bad / "phase.wav", np.stack([music(18), -music(18)], axis=1), RATE)
    save(bad / "telephone.wav", music(19), 8_000)
    whole = (root / "rock/two.wav").read_bytes()
    (bad / "cut short.wav").write_bytes(whole[: len(whole) // 2])
    save(folder / "secret.wav", music(20))
    save(bad / "two\nlines.wav", music(21))
    (bad / "link.wav").symlink_to(folder / "secret.wav")
    return {
        "bad/empty.wav": "unreadable", "bad/text.mp3": "unreadable", "bad/short.flac": "short",
        "bad/silent.wav": "silent", "bad/clipped.wav": "clipped", "bad/nan.wav": "unreadable",
        "bad/phase.wav": "phase", "bad/telephone.wav": "bandwidth", "bad/cut short.wav": "unreadable",
        "bad/link.wav": "outside", "bad/two\nlines.wav": "metadata",
    }  # fmt: skip
