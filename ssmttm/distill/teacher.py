"""A frozen language model as a teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ssmttm.errors import UserError
from ssmttm.generation.loading import ModelFolder, load_language_model, open_model_folder
from ssmttm.generation.request import Sampling
from ssmttm.models import TokenLM
from ssmttm.models.controls import Controls
from ssmttm.text.condition import TextCondition

NULL_CONDITIONS = ("empty_caption", "no_tokens")


class Teacher:
    """A trained TokenLM: a run, a checkpoint, an exported or imported folder, or an embedded model. With a guidance
    scale other than 1 its logits are guided, with `null_text`, one row, and no controls as the null condition."""

    def __init__(self, name: str, guidance_scale: float = 1.0, null_text: TextCondition | None = None) -> None:
        self.folder: ModelFolder = open_model_folder(name)
        model = load_language_model(self.folder).requires_grad_(False)
        assert isinstance(model, TokenLM)
        self.model = model
        distilled = self.folder.distilled_guidance_scale
        if guidance_scale != 1 and distilled != 1:
            raise UserError(
                f"guidance {distilled:g} is already distilled into the teacher {self.folder.name}, and so into its "
                "students: set distill.guidance_scale=1"
            )
        if null_text is not None and self.folder.null_condition == "no_tokens":
            null_text = null_text._replace(mask=torch.zeros_like(null_text.mask))
        self.guidance_scale, self.null_text = guidance_scale, null_text
        self.fingerprint = self.folder.weights_sha256[:16]

    @torch.no_grad()
    def __call__(
        self, codes: Tensor, text: TextCondition, controls: Controls, return_hidden_states_of: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Guided logits [B, K, S, V], without the special token, and the conditional hidden states [B, S, W] after the
        given blocks. Arguments as in `TokenLM.forward`."""
        size = self.model.config.codebook_size
        controls = controls.supported_by(self.model.config)
        model = self.model.to(codes.device)
        unconditional = None
        if self.guidance_scale != 1:
            assert self.null_text is not None
            null = self.null_text.to(codes.device)
            null = TextCondition(*(part.expand(len(codes), *part.shape[1:]) for part in null))
            unconditional = model(codes, null)[..., :size]
        # last, so that hooks record the conditional pass
        output = model(codes, text, return_hidden_states_of, controls)
        logits, hidden_states = output if return_hidden_states_of else (output, [])
        logits = logits[..., :size]
        if unconditional is not None:
            logits = unconditional + self.guidance_scale * (logits - unconditional)
        return logits, hidden_states

    def flops(self, n_positions: int, n_text_tokens: int) -> int:
        """Forward FLOPs of one sequence."""
        conditional = self.model.flops(n_positions, n_text_tokens)
        if self.guidance_scale == 1:
            return conditional
        assert self.null_text is not None
        return conditional + self.model.flops(n_positions, self.null_text.mask.shape[1])

    def student_metadata(self, metadata: Mapping[str, Any], **extra: Any) -> dict[str, Any]:
        """Metadata of a student's training data, with the teacher's entry, licences and null condition added."""
        entry = {
            "name": self.folder.name, "weights_sha256": self.folder.weights_sha256,
            "guidance_scale": self.guidance_scale, "distilled_guidance_scale": self.folder.distilled_guidance_scale,
        }  # fmt: skip
        if self.folder.sampling != Sampling():
            entry["sampling"] = asdict(self.folder.sampling)
        licences = (self.folder.licences or {}) | metadata["licences"]
        text = metadata["text"] | {"null_condition": self.folder.null_condition}
        return {**metadata, "licences": licences, "text": text, "teacher": entry | extra}

    @property
    def student_sampling(self) -> Sampling:
        """Settings for sampling the student: the teacher's, without guidance if that is distilled into the student."""
        sampling = self.folder.sampling
        return sampling if self.guidance_scale == 1 else replace(sampling, guidance_scale=1.0)

    def check_student(self, config: Mapping[str, Any], pattern: str, store_info: Mapping[str, Any]) -> None:
        """Check a student's model config, interleaving pattern and store against the teacher's."""
        name = self.folder.name
        for key in ("n_codebooks", "codebook_size", "text_dim"):
            theirs = getattr(self.model.config, key)
            if config[key] != theirs:
                raise UserError(
                    f"the student has model.{key}={config[key]}, its teacher {name} has {theirs}: set "
                    f"model.{key}={theirs}"
                )
        self.check_null_condition()
        if pattern != self.folder.config.pattern:
            raise UserError(
                f"pattern={pattern}, but the teacher {name} was trained with {self.folder.config.pattern}: set "
                f"pattern={self.folder.config.pattern}"
            )
        self.check_store(store_info)

    def check_null_condition(self) -> None:
        """Raises UserError unless distillation supports the teacher's null condition."""
        if self.folder.null_condition not in NULL_CONDITIONS:
            raise UserError(
                f"the teacher {self.folder.name} has the null condition {self.folder.null_condition}, distillation "
                f"supports {' and '.join(NULL_CONDITIONS)}: choose another teacher"
            )

    def check_store(self, store_info: Mapping[str, Any]) -> None:
        """Raises UserError unless the store was made with the teacher's codec and text encoder."""
        for kind in ("codec", "text"):
            theirs, ours = self.folder.provenance(kind), store_info[kind]
            if theirs["fingerprint"] != ours["fingerprint"]:
                raise UserError(
                    f"the teacher {self.folder.name} was trained with {kind} {theirs['name']} "
                    f"({theirs['fingerprint']}), the store was made with {ours['name']} ({ours['fingerprint']}): "
                    "prepare the store with the former"
                )
