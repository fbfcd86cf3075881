"""VGGish and PANNs' CNN14, for weights that are at hand: the first FAD's network, and a strong tagger of AudioSet.

Parameter names are those of the published PyTorch files, which are read as tensors only.
"""

from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ssmttm.errors import UserError
from ssmttm.evaluation.embedders.base import windows
from ssmttm.files import file_sha256


class VggishEmbedder(nn.Module):
    """VGGish (arXiv 1609.09430): 128 values for every 0.96 s, without the PCA that YouTube-8M adds.

    Args:
        weights: a .safetensors or .pth file with the names of torchvggish (features.0.weight, embeddings.0.weight ...).
        device: where it runs.

    Raises:
        UserError: no file is given, or it does not hold these weights.
    """

    name, sample_rate, seconds, dim = "vggish", 16_000, 0.96, 128

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool"):
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        sizes = (512 * 4 * 6, 4096, 4096, 128)
        pairs = pairwise(sizes)
        self.embeddings = nn.Sequential(*(m for a, b in pairs for m in (nn.Linear(a, b), nn.ReLU())))
        self.fingerprint = _fill(self, weights, "vggish", ignore=("pproc.",))
        self.to(device).eval()

    @torch.inference_mode()
    def embed(self, wav: Tensor) -> Tensor:
        """Windows of 0.96 s: wav [B, S] -> [B, W, 128].

        Raises:
            UserError: a clip is shorter than one window.
        """
        device = self.embeddings[0].weight.device
        cut = windows(wav, round(self.seconds * self.sample_rate))  # [B, W, s]
        padded = F.pad(cut.flatten(0, 1), (0, 240))  # so that the last of 96 frames is whole
        frames = padded.unfold(-1, 400, 160)[:, :96] * torch.hann_window(400)  # [n, 96, 400]
        mel = torch.log(torch.fft.rfft(frames, 512).abs() @ _htk_mel(64, 512, 16_000, 125.0, 7500.0).T + 0.01)
        hidden = self.features(mel[:, None].to(device)).permute(0, 2, 3, 1).flatten(1)
        return self.embeddings(hidden).cpu().unflatten(0, cut.shape[:2])


class PannsEmbedder(nn.Module):
    """CNN14 of PANNs (arXiv 1912.10211): 2,048 values and AudioSet's 527 classes.

    Args:
        weights: a .safetensors or .pth file with the published names (conv_block1.conv1.weight, fc1.weight ...).
        device: where it runs.

    Raises:
        UserError: no file is given, or it does not hold these weights.
    """

    name, sample_rate, seconds, dim = "panns", 32_000, 10.0, 2048

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(64)
        sizes = (1, 64, 128, 256, 512, 1024, 2048)
        for i, (before, after) in enumerate(pairwise(sizes), start=1):
            setattr(self, f"conv_block{i}", _PannsBlock(before, after))
        self.fc1 = nn.Linear(2048, 2048)
        self.fc_audioset = nn.Linear(2048, 527)
        self.classes = [f"AudioSet {i}" for i in range(527)]
        front = ("spectrogram_extractor.", "logmel_extractor.")  # a window and a filter bank, computed here
        self.fingerprint = _fill(self, weights, "panns", ignore=front)
        self.to(device).eval()

    def embed(self, wav: Tensor) -> Tensor:
        """Windows of 10 s: wav [B, S] -> [B, W, 2048].

        Raises:
            UserError: a clip is shorter than one window.
        """
        return self._predict(wav)[0]

    def posteriors(self, wav: Tensor) -> Tensor:
        """AudioSet's classes: the sigmoids, made to sum to 1, the windows' mean: wav [B, S] -> [B, 527]."""
        odds = self._predict(wav)[1].sigmoid()
        return (odds / odds.sum(-1, keepdim=True)).mean(1)

    @torch.inference_mode()
    def _predict(self, wav: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings and logits of each window."""
        device = self.fc1.weight.device
        cut = windows(wav, round(self.seconds * self.sample_rate))  # [B, W, s]
        window = torch.hann_window(1024)
        spectrum = torch.stft(cut.flatten(0, 1), 1024, 320, window=window, return_complex=True, pad_mode="reflect")
        bank = _slaney_mel(64, 1024, 32_000, 50.0, 14_000.0)
        mel = 10 * (bank @ spectrum.abs().square()).clamp_min(1e-10).log10()  # [n, 64, T]
        hidden = self.bn0(mel.to(device)[..., None]).permute(0, 3, 2, 1)  # [n, 1, T, 64]
        for i in range(1, 7):
            hidden = getattr(self, f"conv_block{i}")(hidden, pool=2 if i < 6 else 1)
        hidden = hidden.mean(3)  # [n, 2048, T / 32]
        pooled = F.relu(self.fc1(hidden.amax(2) + hidden.mean(2)))
        return tuple(found.cpu().unflatten(0, cut.shape[:2]) for found in (pooled, self.fc_audioset(pooled)))


class _PannsBlock(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)

    def forward(self, x: Tensor, pool: int) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.avg_pool2d(x, pool)


def _fill(module: nn.Module, weights: str | None, name: str, ignore: tuple[str, ...]) -> str:
    """Load a file's tensors into a module; gives 16 hex digits of the file's sha256."""
    if weights is None or not Path(weights).is_file():
        raise UserError(f"embedder {name} has no weights of its own: give eval.weights.{name}=FILE, safetensors or pth")
    path = Path(weights)
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            tensors = tensors.get("model", tensors)
        module.load_state_dict({key: value for key, value in tensors.items() if not key.startswith(ignore)})
    except (SafetensorError, RuntimeError, AttributeError, ValueError, EOFError) as error:
        raise UserError(f"{path} does not hold the weights of {name}: {str(error).splitlines()[0]}") from error
    return file_sha256(path)[:16]


@lru_cache(maxsize=2)
def _htk_mel(n_mels: int, n_fft: int, rate: int, low: float, high: float) -> Tensor:
    """Triangles evenly spaced in HTK mel, linear in mel, none at 0 Hz. [n_mels, n_fft / 2 + 1]."""

    def mel(hertz: Tensor) -> Tensor:
        return 1127 * torch.log1p(hertz / 700)

    bins = mel(torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64))
    low_mel, high_mel = mel(torch.tensor([low, high], dtype=torch.float64)).tolist()
    edges = torch.linspace(low_mel, high_mel, n_mels + 2, dtype=torch.float64)[:, None]
    bank = torch.minimum(
        (bins - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    )
    bank = bank.clamp_min(0)
    bank[:, 0] = 0
    return bank.float()


@lru_cache(maxsize=2)
def _slaney_mel(n_mels: int, n_fft: int, rate: int, low: float, high: float) -> Tensor:
    """Triangles of unit area, evenly spaced in Slaney's mel (linear under 1 kHz). [n_mels, n_fft / 2 + 1]."""
    step = torch.log(torch.tensor(6.4, dtype=torch.float64)) / 27

    def mel(hertz: Tensor) -> Tensor:
        return torch.where(hertz < 1000, hertz * 3 / 200, 15 + torch.log(hertz.clamp_min(1) / 1000) / step)

    def hertz_of(mels: Tensor) -> Tensor:
        return torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp(step * (mels - 15)))

    ends = mel(torch.tensor([low, high], dtype=torch.float64)).tolist()
    edges = hertz_of(torch.linspace(ends[0], ends[1], n_mels + 2, dtype=torch.float64))[:, None]
    hertz = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    bank = torch.minimum(
        (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    )
    return (bank.clamp_min(0) * 2 / (edges[2:] - edges[:-2])).float()
