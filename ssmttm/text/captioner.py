"""An audio language model that captions music and answers questions about it: Qwen2-Audio (arXiv 2407.10759) through
transformers.

Shapes: S samples.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmttm.errors import UserError, first_line
from ssmttm.hub import checkpoint_folder, fingerprint_of
from ssmttm.text.encoders import quiet_transformers

PROMPT = (
    "Describe this music in two or three sentences: its instruments, genre, mood, tempo and rhythm, and where it "
    "would fit. Write only the description, in English."
)
_FILES = ("*.json", "merges.txt", "chat_template*", "model*.safetensors")


class AudioCaptioner:
    """Captions audio, or answers questions about it, by greedy decoding, so that the same audio gives the same text.

    `weights` is a transformers folder with safetensors, or a hub name. On a CPU the model runs in float32, else in the
    precision of the weights. Captions longer than `max_new_tokens` are cut after their last full sentence. Input audio
    has `sample_rate` Hz; beyond `seconds` it is ignored.

    Raises:
        UserError: no such checkpoint, or not a Qwen2-Audio model.
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
        self.prompt = prompt

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a hash of weights, config and tokenizer."""
        return captioner_fingerprint(self.folder)

    def captions(self, wavs: Iterable[Tensor]) -> Iterator[str]:
        """A caption for each clip, in order; empty if the model generates nothing.

        Args:
            wavs: float32 [S] each, S >= 1, at `sample_rate`; read one batch at a time.
        """
        yield from self.answers((wav, self.prompt) for wav in wavs)

    def answers(self, questions: Iterable[tuple[Tensor, str]]) -> Iterator[str]:
        """The answer to each question about a clip, in order; empty if the model generates nothing.

        Args:
            questions: clips as in `captions`, each with a question or instruction; read one batch at a time.
        """
        remaining = iter(questions)
        while batch := list(islice(remaining, self.batch)):
            yield from self._generate(batch)

    def _chat(self, text: str) -> str:
        """A user's message of one clip and a text, as the model expects it."""
        content = [{"type": "audio", "audio_url": ""}, {"type": "text", "text": text}]
        message = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False))

    @torch.inference_mode()
    def _generate(self, batch: list[tuple[Tensor, str]]) -> list[str]:
        inputs = self.processor(
            text=[self._chat(text) for _, text in batch],
            audio=[clip.cpu().numpy() for clip, _ in batch],
            sampling_rate=self.sample_rate,
            padding=True,
            return_tensors="pt",
        ).to(self.model.device)
        inputs["input_features"] = inputs["input_features"].to(self.model.dtype)
        output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens)
        tokens = output[:, inputs["input_ids"].shape[1] :]  # [B, at most max_new_tokens]
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        eos = self.model.generation_config.eos_token_id
        ends = torch.tensor([] if eos is None else eos, device=tokens.device)
        complete = torch.isin(tokens, ends).any(1).tolist()
        return [text.strip() if end else _full_sentences(text) for text, end in zip(texts, complete, strict=True)]


def captioner_folder(weights: str) -> Path:
    """The folder of a captioner's checkpoint, downloaded if needed. Raises UserError if there is none."""
    return checkpoint_folder(weights, _FILES, "audio captioner")


def captioner_fingerprint(folder: Path) -> str:
    """16 hex digits of a hash of all files that determine the captions, without loading the model."""
    return fingerprint_of(sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.txt")]))


def _load(folder: Path, dtype: torch.dtype | str) -> tuple[Any, Any]:
    with quiet_transformers():
        from transformers import AutoConfig, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

        try:
            kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
            if kind != "qwen2_audio":
                raise UserError(f"{folder} is a {kind!r} model: a captioner is a Qwen2-Audio model")
            processor = Qwen2AudioProcessor.from_pretrained(folder, trust_remote_code=False)
            model = Qwen2AudioForConditionalGeneration.from_pretrained(folder, use_safetensors=True, dtype=dtype)
        except (OSError, ValueError, KeyError) as error:
            reason = first_line(error)
            raise UserError(f"the audio captioner in {folder} cannot be loaded: {reason}") from error
    processor.tokenizer.padding_side = "left"
    generation = model.generation_config
    generation.do_sample, generation.temperature, generation.top_p, generation.top_k = False, None, None, None
    if generation.pad_token_id is None:
        generation.pad_token_id = processor.tokenizer.pad_token_id
    return processor, model


def _full_sentences(text: str) -> str:
    """A truncated text up to its last full stop, or unchanged if it has none."""
    end = max(text.rfind(mark) for mark in ".!?")
    return (text[: end + 1] if end > 0 else text).strip()
