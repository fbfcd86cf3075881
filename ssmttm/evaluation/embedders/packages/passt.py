"""PaSST through the package hear21passt: the AudioSet tagger of the KL that Audiocraft publishes."""

import contextlib
import io
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmttm.errors import UserError, first_line
from ssmttm.evaluation.embedders.base import windows
from ssmttm.evaluation.embedders.weights import import_package, load_weights, model_fingerprint

CLASSES, WIDTH = 527, 768


class PasstEmbedder:
    """PaSST (arXiv 2110.05069): 768 values and AudioSet's 527 classes for every 10 s.

    `weights`: a file with the package's names (passt-s-f128-p16-s10-ap.476-swa.pt or the same in safetensors); None: as
    the package fetches it.
    """

    name, sample_rate, seconds, dim = "passt", 32_000, 10.0, WIDTH
    settings: Mapping[str, Any] = {}

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        base = import_package("passt", "hear21passt", "hear21passt.base")
        with _quiet():
            if weights is None:
                try:
                    self.model = base.get_basic_model(mode="all")
                except OSError as error:
                    reason = first_line(error)
                    raise UserError(
                        f"the weights of passt cannot be downloaded ({reason}): set eval.weights.passt=FILE"
                    ) from error
            else:
                mel = base.AugmentMelSTFT(
                    n_mels=128, sr=self.sample_rate, win_length=800, hopsize=320, n_fft=1024, freqm=48, timem=192,
                    htk=False, fmin=0.0, fmax=None, norm=1, fmin_aug_range=10, fmax_aug_range=2000,
                )  # fmt: skip
                net = base.get_model_passt(arch="passt_s_swa_p16_128_ap476", pretrained=False)
                load_weights(net, weights, "passt", ignore=())
                self.model = base.PasstBasicWrapper(mel=mel, net=net, mode="all")
        self.model.to(device).eval()
        self.classes = [f"AudioSet {i}" for i in range(CLASSES)]
        self.fingerprint = model_fingerprint(self.model, self.settings)

    def embed(self, wav: Tensor) -> Tensor:
        """Windows of 10 s: wav [B, S] -> [B, W, 768]."""
        return self._predict(wav)[..., CLASSES:]

    def posteriors(self, wav: Tensor) -> Tensor:
        """Softmax over AudioSet's classes, averaged over windows: wav [B, S] -> [B, 527]."""
        return self._predict(wav)[..., :CLASSES].softmax(-1).mean(1)

    @torch.inference_mode()
    def _predict(self, wav: Tensor) -> Tensor:
        """Logits and values of each window, [B, W, 527 + 768]."""
        clips = windows(wav, round(self.seconds * self.sample_rate))  # [B, W, s]
        with _quiet():
            outputs = self.model(clips.flatten(0, 1).contiguous().to(self.model.device()))
        return outputs.float().cpu().unflatten(0, clips.shape[:2])


@contextlib.contextmanager
def _quiet() -> Any:
    """Without the package's prints of shapes and its warnings about them."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
