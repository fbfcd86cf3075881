"""A frozen language model as a teacher: its logits and streams for what its student is shown."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssmttm.errors import UserError
from ssmttm.files import file_sha256
from ssmttm.generation.loading import ModelFolder, load_model, open_model_folder
from ssmttm.models import TokenLM
from ssmttm.models.controls import Controls
from ssmttm.text.condition import TextCondition

NULL_CONDITIONS = ("empty_caption", "no_tokens")


class Teacher:
    """A trained TokenLM: a run, a checkpoint, an exported or imported folder, or the name of an embedded model.

    Args:
        name: which.
        guidance_scale: its logits are those that a sampler with this guidance draws from; 1 takes them as they are.
        null_text: the null condition, one row; needed with guidance.

    Raises:
        UserError: there is no such model.
    """

    model: TokenLM

    def __init__(self, name: str, guidance_scale: float = 1.0, null_text: TextCondition | None = None) -> None:
        self.folder: ModelFolder = open_model_folder(name)
        self.model = load_model(self.folder).requires_grad_(False)
        if guidance_scale != 1 and self.folder.distilled_guidance_scale != 1:
            raise UserError(
                f"the teacher {self.folder.name} has guidance {self.folder.distilled_guidance_scale:g} within already: set "
                "distill.guidance_scale=1, its students have it too"
            )
        if null_text is not None and self.folder.null_condition == "no_tokens":
            null_text = null_text._replace(mask=torch.zeros_like(null_text.mask))
        self.guidance_scale, self.null_text = guidance_scale, null_text
        self.fingerprint = file_sha256(self.folder.weights_file)[:16]

    @torch.no_grad()
    def __call__(
        self, codes: Tensor, text: TextCondition, controls: Controls, return_hidden_states_of: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits [B, K, S, V] of the codes alone, without a logit for the special token, guided; and streams behind
        these blocks, [B, S, W] each, not guided. Arguments as of `TokenLM.forward`."""
        size = self.model.config.codebook_size
        controls = controls.supported_by(self.model.config)
        model = self.model.to(codes.device)
        without = None
        if self.guidance_scale != 1:
            rows = self.null_text.to(codes.device)
            null = TextCondition(*(part.expand(len(codes), *part.shape[1:]) for part in rows))
            without = model(codes, null, controls=controls)[..., :size]
        said = model(codes, text, return_hidden_states_of, controls)  # last: what listens to the teacher is to hear this
        logits, hidden_states = said if return_hidden_states_of else (said, [])
        logits = logits[..., :size]
        return logits if without is None else without + self.guidance_scale * (logits - without), hidden_states

    def flops(self, n_positions: int, n_text_tokens: int) -> int:
        """Forward FLOPs of one sequence."""
        null = 0 if self.guidance_scale == 1 else self.model.flops(n_positions, self.null_text.mask.shape[1])
        return self.model.flops(n_positions, n_text_tokens) + null

    def facts(self) -> dict[str, Any]:
        """What a student's card must know: name, hash of the weights, guidance."""
        return {
            "name": self.folder.name, "weights_sha256": file_sha256(self.folder.weights_file),
            "guidance_scale": self.guidance_scale, "distilled_guidance_scale": self.folder.distilled_guidance_scale,
        }  # fmt: skip

    @property
    def guidance_of_student(self) -> float:
        """What its student is sampled with: once, by whoever has it within."""
        return self.folder.guidance_scale if self.guidance_scale == 1 else 1.0

    def check_student(self, model: Any, pattern: str, info: dict[str, Any]) -> None:
        """Check that a student speaks of the same codes and hears the same text.

        Args:
            model: the student's config.
            pattern: the student's interleaving.
            info: of the store that it learns from.

        Raises:
            UserError: codec, text encoder, number or size of codebooks, pattern or text width differ.
        """
        ours, theirs, name = model, self.model.config, self.folder.name
        for key in ("n_codebooks", "codebook_size", "text_dim"):
            if ours[key] != getattr(theirs, key):
                raise UserError(
                    f"the student has model.{key}={ours[key]}, its teacher {name} {getattr(theirs, key)}: set "
                    f"model.{key}={getattr(theirs, key)}"
                )
        self.check_null_condition()
        if pattern != self.folder.config.pattern:
            raise UserError(f"pattern={pattern}, but the teacher {name} learnt {self.folder.config.pattern}: set that")
        self.check_store(info)

    def check_null_condition(self) -> None:
        """Raises UserError if its captions are read in a way that no student here learns."""
        if self.folder.null_condition not in NULL_CONDITIONS:
            raise UserError(
                f"the teacher {self.folder.name} reads captions as {self.folder.null_condition}, a student can learn from "
                f"{' and '.join(NULL_CONDITIONS)}: give another teacher"
            )

    def check_store(self, info: dict[str, Any]) -> None:
        """Raises UserError unless a store was made with the teacher's codec and text encoder."""
        name = self.folder.name
        for kind in ("codec", "text"):
            theirs_made, made = self.folder.fact(kind), info[kind]
            if theirs_made["fingerprint"] != made["fingerprint"]:
                raise UserError(
                    f"the teacher {name} was trained with {kind} {theirs_made['name']} ({theirs_made['fingerprint']}), "
                    f"the store was made with {made['name']} ({made['fingerprint']}): prepare the store with the former"
                )
