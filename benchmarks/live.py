"""Streams of the embedded model on one CPU thread: memory, latency, forks, states, seams.

python benchmarks/live.py [--minutes 10] [--engine auto] [--out results.json]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from ssmttm import MusicPipeline
from ssmttm.generation.streaming.session import StreamSession

PROMPTS = ("a slow waltz in D minor on a music box", "fast energetic drum and bass", "a calm solo piano")


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def play(session: StreamSession, seconds: float) -> list[Tensor]:
    """The chunks up to a position of at least that many seconds."""
    chunks = []
    while session.position < seconds and (chunk := session.next_chunk()) is not None:
        chunks.append(chunk)
    return chunks


def memory(pipe: MusicPipeline, engine: str, minutes: float) -> dict[str, float]:
    """Resident memory after 20 s and at the end of an endless stream."""
    session = pipe.session(PROMPTS[0], engine=engine)
    play(session, 20)
    early, started = resident_bytes(), time.perf_counter()
    play_and_forget(session, 60 * minutes)
    seconds = time.perf_counter() - started
    late = resident_bytes()
    return {
        "after_20_s_mb": early / 1e6, "at_the_end_mb": late / 1e6, "ratio": late / early,
        "times_real_time": (60 * minutes - 20) / seconds,
    }  # fmt: skip


def play_and_forget(session: StreamSession, seconds: float) -> None:
    while session.position < seconds:
        session.next_chunk()


def latency(pipe: MusicPipeline, engine: str, n: int = 7) -> dict[str, float]:
    """Seconds from the call to the first audio, and audio from a change to the first sample that differs."""
    first, change, wait = [], [], []
    for seed in range(n):
        started = time.perf_counter()
        session = pipe.session(PROMPTS[seed % 3], seed=seed, engine=engine)
        session.next_chunk()
        first.append(time.perf_counter() - started)
        play(session, 4)
        moment = session.snapshot()
        same = torch.cat(play(pipe.resume(moment), session.position + 2), -1)
        changed_session = pipe.resume(moment)
        started = time.perf_counter()
        changed_session.change(prompt=PROMPTS[(seed + 1) % 3])
        wait.append(time.perf_counter() - started)
        changed = torch.cat(play(changed_session, session.position + 2), -1)
        n_samples = min(same.shape[-1], changed.shape[-1])
        differs = ((same - changed)[:, :n_samples].abs().amax(0) > 1e-3).nonzero()
        change.append(differs[0].item() / pipe.sample_rate if len(differs) else float("inf"))
    return {
        "first_audio_s_median": statistics.median(first), "first_audio_s_max": max(first),
        "change_heard_after_s_max": max(change), "change_call_s_median": statistics.median(wait),
    }  # fmt: skip


def forks(pipe: MusicPipeline, engine: str) -> dict[str, float | bool]:
    """A fork against a new session that is continued to the same moment."""
    session = pipe.session(PROMPTS[0], seed=1, engine=engine)
    play(session, 5)
    moment = session.snapshot()
    rest = torch.cat(play(session, 8), -1)
    started = time.perf_counter()
    fork = pipe.resume(moment)
    seconds = time.perf_counter() - started
    again = torch.cat(play(fork, 8), -1)
    separate = pipe.session(PROMPTS[0], seed=1, engine=engine)
    whole = torch.cat(play(separate, 8), -1)
    saved = pipe.resume(pipe.load_state(pipe.save_state("moment.safetensors", moment)))
    restored = torch.cat(play(saved, 8), -1)
    size = Path("moment.safetensors").stat().st_size
    Path("moment.safetensors").unlink()
    return {
        "resume_s": seconds, "fork_equals_original": torch.equal(rest, again),
        "fork_equals_separate_run": torch.equal(whole[:, -rest.shape[-1] :], again),
        "saved_state_equals": torch.equal(restored, rest), "state_file_mb": size / 1e6,
    }  # fmt: skip


def flux(wav: Tensor) -> Tensor:
    """Mean rise of the log magnitude from each frame of the codec (40 ms) to the next, [1, S] -> [T - 1]."""
    frames = wav[0].unfold(0, 1920, 960) * torch.hann_window(1920)
    return torch.log1p(100 * torch.fft.rfft(frames).abs()).diff(dim=0).clamp_min(0).mean(1)


def seams(pipe: MusicPipeline, engine: str) -> dict[str, list[float]]:
    """Flux at the seam of a continuation and of a loop, as its quantile among that of the other frames; and how many of
    the loop's 120 bpm bar lines have more."""
    continuation, loop, plain, bars = [], [], [], []
    for seed, prompt in enumerate(PROMPTS * 2):
        clip = pipe(prompt, duration=4.0, seeds=seed, engine=engine).audios[0, :, : 4 * 24_000 - 333]
        longer = flux(pipe(prompt, duration=3.0, seeds=seed, continue_from=clip, engine=engine).audios[0])
        continuation.append(quantile(longer, clip.shape[-1] // 960))
        for looped, found in ((True, loop), (False, plain)):
            wav = pipe(prompt, bars=4, bpm=120.0, seeds=seed, loop=looped, engine=engine).audios[0]
            twice = flux(torch.cat([wav, wav], -1))
            found.append(quantile(twice, wav.shape[-1] // 960))
            if looped:
                lines = torch.stack([twice[bar * 50 - 2 : bar * 50 + 2].amax() for bar in (1, 2, 3, 4)])
                bars.append((lines[:3] >= lines[3]).float().mean().item())
    return {"continuation": continuation, "loop": loop, "no_loop": plain, "bar_lines_with_more_flux": bars}


def quantile(values: Tensor, seam: int) -> float:
    """The fraction of windows of four frames whose greatest flux is at most that at the seam."""
    windows = values.unfold(0, 4, 1).amax(1)
    return (windows <= values[seam - 2 : seam + 2].amax()).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = MusicPipeline.from_pretrained(device="cpu")
    pipe(PROMPTS[0], duration=1.0, engine=args.engine)
    results = {
        "latency": latency(pipe, args.engine), "forks": forks(pipe, args.engine),
        "memory": memory(pipe, args.engine, args.minutes), "seams": seams(pipe, args.engine),
    }  # fmt: skip
    text = json.dumps(results, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
