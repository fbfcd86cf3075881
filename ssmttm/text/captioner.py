"""An audio language model that puts music into words: Qwen2-Audio (arXiv 2407.10759) through transformers.

Shapes: S samples.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmttm.errors import UserError
from ssmttm.hub import checkpoint_folder, fingerprint_of
from ssmttm.text.encoders import quiet_transformers

PROMPT = (
    "Describe this music in two or three sentences: its instruments, genre, mood, tempo and rhythm, and where it "
    "would fit. Write only the description, in English."
)
_FILES = ("*.json", "merges.txt", "chat_template*", "model*.safetensors")


class AudioCaptioner:
    """Captions of audio, by greedy decoding: the same audio gives the same words.

    Args:
        weights: a folder of transformers with safetensors, or a hub name.
        device: where it runs; on a CPU in float32, else in the precision of the weights.
        prompt: what it is asked.
        batch: clips at a time.
        max_new_tokens: where a caption is cut, back to its last whole sentence.

    Attributes:
        sample_rate: Hz of the audio that it takes.
        seconds: of a longer clip it hears the beginning only.

    Raises:
        UserError: there is no such checkpoint, or it is no Qwen2-Audio.
    """

    def __init__(
        self,
        weights: str = "Qwen/Qwen2-Audio-7B-Instruct",
        device: str = "cpu",
        prompt: str = PROMPT,
        batch: int = 4,
        max_new_tokens: int = 256,
    ) -> None:
        self.folder, self.batch, self.max_new_tokens = captioner_folder(weights), batch, max_new_tokens
        self.processor, model = _load(self.folder, torch.float32 if device == "cpu" else "auto")
        self.model = model.to(device).eval().requires_grad_(False)
        self.sample_rate = int(self.processor.feature_extractor.sampling_rate)
        self.seconds = float(self.processor.feature_extractor.chunk_length)
        question = [{"type": "audio", "audio_url": ""}, {"type": "text", "text": prompt}]
        self._question: str = self.processor.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over weights, config and tokenizer."""
        return captioner_fingerprint(self.folder)

    def captions(self, wavs: Iterable[Tensor]) -> Iterator[str]:
        """A caption of each clip, in order; empty where the model says nothing.

        Args:
            wavs: float32 [S] each, S >= 1, at `sample_rate`; read a batch at a time.
        """
        rest = iter(wavs)
        while clips := list(islice(rest, self.batch)):
            yield from self._answer(clips)

    @torch.inference_mode()
    def _answer(self, clips: list[Tensor]) -> list[str]:
        inputs = self.processor(
            text=[self._question] * len(clips),
            audio=[clip.cpu().numpy() for clip in clips],
            sampling_rate=self.sample_rate,
            padding=True,
            return_tensors="pt",
        ).to(self.model.device)
        inputs["input_features"] = inputs["input_features"].to(self.model.dtype)
        made = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens)
        answers = made[:, inputs["input_ids"].shape[1] :]  # [B, at most max_new_tokens]
        texts = self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        ends = _as_list(self.model.generation_config.eos_token_id)
        ended = [bool(torch.isin(answer, torch.tensor(ends, device=answer.device)).any()) for answer in answers]
        return [text.strip() if whole else _whole_sentences(text) for text, whole in zip(texts, ended, strict=True)]


def captioner_folder(weights: str) -> Path:
    """The folder of a captioner's checkpoint, fetched if need be. Raises UserError if there is none."""
    return checkpoint_folder(weights, _FILES, "audio captioner")


def captioner_fingerprint(folder: Path) -> str:
    """16 hex digits over all that decides a captioner's words, without loading it."""
    return fingerprint_of(sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.txt")]))


def _load(folder: Path, dtype: torch.dtype | str) -> tuple[Any, Any]:
    with quiet_transformers():
        from transformers import AutoConfig, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

        safe: dict[str, Any] = {"trust_remote_code": False}
        try:
            kind = AutoConfig.from_pretrained(folder, **safe).model_type
            if kind != "qwen2_audio":
                raise UserError(f"{folder} is a {kind!r} model: a captioner is a Qwen2-Audio")
            processor = Qwen2AudioProcessor.from_pretrained(folder, **safe)
            model = Qwen2AudioForConditionalGeneration.from_pretrained(folder, use_safetensors=True, dtype=dtype)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"the audio captioner in {folder} cannot be loaded: {reason}") from error
    processor.tokenizer.padding_side = "left"
    choices = model.generation_config
    choices.do_sample, choices.temperature, choices.top_p, choices.top_k = False, None, None, None
    if choices.pad_token_id is None:
        choices.pad_token_id = processor.tokenizer.pad_token_id
    return processor, model


def _as_list(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _whole_sentences(text: str) -> str:
    """A text that was cut, up to its last full stop; as it is where it has none."""
    end = max(text.rfind(mark) for mark in ".!?")
    return (text[: end + 1] if end > 0 else text).strip()
