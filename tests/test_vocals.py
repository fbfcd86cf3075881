"""Voices: an audio classifier that detects them, a separator that takes them out, both small and of random weights."""

import json
import pickle
import shutil
import warnings

import pytest
import torch
from demucs.hdemucs import HDemucs
from demucs.htdemucs import HTDemucs
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, ASTModel

from data_prep.audio import vocals
from data_prep.audio.separator import Separator
from data_prep.audio.vocals import VocalDetection, VocalDetector, VocalRemoval, mentions_vocals
from ssmttm.errors import UserError

RATE = 8000
SIZES = dict(channels=8, nfft=512, depth=2, t_layers=1, t_heads=2, bottom_channels=16, samplerate=RATE)
STEMS = ("drums", "vocals", "other")


def write_separator(path, stems=STEMS, seed=0, kind=HTDemucs, klass=None, segment=None, **sizes):
    """As demucs exports it."""
    torch.manual_seed(seed)
    sizes = (SIZES if kind is HTDemucs else dict(channels=4, samplerate=RATE)) | sizes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind(sources=list(stems), segment=1, **sizes)
    kwargs = sizes | {"sources": list(stems), "segment": segment or {"_type": "fraction", "numerator": 3,
                                                                     "denominator": 2}}  # fmt: skip
    metadata = {"klass": klass or f"{kind.__module__}.{kind.__name__}", "args": "[]",
                "kwargs": json.dumps(kwargs | {"a_parameter_of_old": 1})}  # fmt: skip
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path, metadata)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_separator(tmp_path_factory.mktemp("separator") / "small.safetensors")


@pytest.fixture(scope="module")
def separator(weights):
    return Separator(str(weights))


class Fixed(torch.nn.Module):
    """A separator that puts everything into one stem."""

    def __init__(self, stem, stems=STEMS):
        super().__init__()
        self.stem, self.stems = stems.index(stem), len(stems)

    def forward(self, mix):
        made = mix.new_zeros(len(mix), self.stems, *mix.shape[1:])
        made[:, self.stem] = mix
        return made


def that_gives(separator, stem, monkeypatch):
    member = separator._members[0]
    monkeypatch.setattr(separator, "_members", [member._replace(model=Fixed(stem))])


def noise(channels, samples, seed=0):
    return 0.1 * torch.randn(channels, samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 2])
def test_separator_removes_vocals_stem(separator, channels, monkeypatch):
    that_gives(separator, "vocals", monkeypatch)
    made = separator.remove_vocals(noise(channels, 5 * RATE), RATE)
    assert made.shape == (channels, 5 * RATE) and made.abs().max() == 0


@settings(deadline=None, max_examples=15)
@given(channels=st.sampled_from([1, 2]), samples=st.integers(1, 5 * RATE))
def test_separator_keeps_other_stems_at_every_length(weights, channels, samples):
    separator = vocals._separator(VocalRemoval(str(weights)))
    with pytest.MonkeyPatch.context() as patch:
        that_gives(separator, "other", patch)
        wav = noise(channels, samples)
        torch.testing.assert_close(separator.remove_vocals(wav, RATE), wav, atol=1e-6, rtol=1e-4)


def test_separator_result_is_sum_of_other_stems(separator):
    wav = noise(2, separator.window)
    level = wav.std(correction=0)
    with torch.inference_mode():
        stems = separator._members[0].model((wav / level)[None])[0]
    expected = (stems[0] + stems[2]) * level
    torch.testing.assert_close(separator.remove_vocals(wav, RATE), expected, atol=1e-5, rtol=1e-3)
    assert expected.std() > 1e-4


def test_separator_keeps_sample_rate(separator, monkeypatch):
    that_gives(separator, "drums", monkeypatch)
    time = torch.arange(3 * 22_050 + 7) / 22_050
    wav = 0.3 * torch.sin(2 * torch.pi * 440 * time)[None]
    made = separator.remove_vocals(wav, 22_050)
    assert made.shape == wav.shape
    torch.testing.assert_close(made[:, 2000:-2000], wav[:, 2000:-2000], atol=2e-3, rtol=0)


def test_separator_is_deterministic(weights):
    wav, other = noise(2, 4 * RATE), noise(2, 3 * RATE, seed=1)
    one = Separator(str(weights), batch=1)
    first = one.remove_vocals(wav, RATE)
    one.remove_vocals(other, RATE)
    assert torch.equal(one.remove_vocals(wav, RATE), first)
    torch.testing.assert_close(Separator(str(weights), batch=3).remove_vocals(wav, RATE), first, atol=1e-5, rtol=1e-4)


def test_separator_positions_are_not_random(tmp_path):
    shifting = write_separator(tmp_path / "shifting.safetensors", t_sin_random_shift=1000)
    wav = noise(2, RATE)
    made = [Separator(str(shifting)).remove_vocals(wav, RATE) for _ in range(2)]
    assert torch.equal(*made)


def test_separator_memory_is_bounded_by_window(weights, monkeypatch):
    separator, shapes = Separator(str(weights), batch=4), []
    separate = separator._separate
    monkeypatch.setattr(separator, "_separate", lambda windows: shapes.append(windows.shape) or separate(windows))
    separator.remove_vocals(noise(1, 12 * RATE), RATE)
    assert {shape[1:] for shape in shapes} == {(2, separator.window)} and max(shape[0] for shape in shapes) == 4


def test_separator_bag_is_weighted_mean(tmp_path):
    for seed, name in enumerate(("one", "two", "three")):
        write_separator(tmp_path / f"{name}.safetensors", seed=seed)
    table = [[1.0, 0.0, 1.0], [3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    (tmp_path / "bag.yaml").write_text(json.dumps({"models": ["one", "two", "three"], "weights": table}))
    bag = Separator(str(tmp_path))
    assert len(bag._members) == 2, "the third one has a say in the vocals only"
    windows = noise(2, bag.window)[None]
    one, two = (member.model(windows)[0] for member in bag._members)
    expected = one[0] / 4 + two[0] * 3 / 4 + one[2]
    torch.testing.assert_close(bag._separate(windows)[0], expected, atol=1e-6, rtol=1e-4)


def test_separator_reads_hybrid_demucs(tmp_path):
    file = write_separator(tmp_path / "hybrid.safetensors", kind=HDemucs, segment=2)
    separator = Separator(str(file))
    assert separator.window == 2 * RATE
    assert separator.remove_vocals(noise(2, 5 * RATE), RATE).shape == (2, 5 * RATE)


def test_vocal_settings_pickle_and_metadata(weights):
    removal = pickle.loads(pickle.dumps(VocalRemoval(str(weights))))  # noqa: S301
    facts = json.loads(json.dumps(removal.metadata()))
    assert facts["window_seconds"] == 1.5 and len(facts["fingerprint"]) == 16
    assert removal.modification == "vocals removed with small"
    wav = noise(1, RATE)
    assert torch.equal(removal.remove(wav, RATE), Separator(str(weights)).remove_vocals(wav, RATE))
    assert vocals._separator(removal) is vocals._separator(VocalRemoval(str(weights)))


def test_separator_needs_vocals_stem(tmp_path):
    with pytest.raises(UserError, match="stems drums, other, not vocals"):
        Separator(str(write_separator(tmp_path / "a.safetensors", stems=("drums", "other"))))
    with pytest.raises(UserError, match="stems vocals, not vocals and others"):
        Separator(str(write_separator(tmp_path / "b.safetensors", stems=("vocals",))))


def test_separator_rejects_unknown_classes(tmp_path, weights):
    with safe_open(weights, framework="pt") as file:
        metadata, state = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    evil = tmp_path / "evil.safetensors"
    for klass in ("subprocess.Popen", "os.system", "demucs.solver.Solver", ""):
        save_file(state, evil, metadata | {"klass": klass, "args": '["touch", "ran"]', "kwargs": "{}"})
        with pytest.raises(UserError, match="names the class"):
            Separator(str(evil))
    save_file(state, evil, metadata | {"structure": '{"_class": "os.system"}'})
    with pytest.raises(UserError, match="quantised"):
        Separator(str(evil))
    save_file(state, evil, metadata | {"kwargs": json.dumps({"sources": ["vocals", "x"], "channels": 16})})
    with pytest.raises(UserError, match="cannot be loaded"):
        Separator(str(evil))
    evil.write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match="cannot be loaded"):
        Separator(str(evil))


def test_separator_rejects_pickles_unread(tmp_path):
    (tmp_path / "htdemucs.th").write_bytes(b"not even a pickle")
    with pytest.raises(UserError, match="is a pickle"):
        Separator(str(tmp_path / "htdemucs.th"))


def test_separator_rejects_inconsistent_bags(tmp_path, weights):
    shutil.copy(weights, tmp_path / "one.safetensors")
    write_separator(tmp_path / "other.safetensors", stems=("vocals", "drums", "other"))
    with pytest.raises(UserError, match=r"2 \.safetensors files and no \.yaml"):
        Separator(str(tmp_path))
    for text, words in {
        "models: [../one]": "names the model '../one'", "models: [none]": "names the model 'none'",
        "models: []": "names no model", "- one": "is not a list of separators",
        "models: [one, other]": "differ in stems, rate or channels",
        "{models: [one], weights: [[1, 1]]}": "do not fit", "{models: [one], weights: [[1, 1, 0]]}": "do not fit",
        "models: !!python/object/apply:os.getcwd []": "is not a list of separators",
    }.items():  # fmt: skip
        (tmp_path / "bag.yaml").write_text(text)
        with pytest.raises(UserError, match=words):
            Separator(str(tmp_path))


def test_separator_hub_names(monkeypatch, tmp_path, weights):
    asked = []

    def fetch(name, revision, allow_patterns):
        asked.append(name)
        shutil.copy(weights, tmp_path / "955717e8.safetensors")
        (tmp_path / "htdemucs.yaml").write_text("models: ['955717e8']")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    Separator("htdemucs")
    Separator("someone/htdemucs_ft")
    assert asked == ["adefossez/HTDemucs", "someone/HTDemucs-ft"]
    with pytest.raises(UserError, match=r"no separator \./nowhere"):
        Separator("./nowhere")


def test_separator_without_demucs_names_what_to_install(monkeypatch, weights):
    monkeypatch.setitem(__import__("sys").modules, "demucs.htdemucs", None)
    with pytest.raises(UserError, match=r"pip install 'ssmttm\[vocals\]'"):
        Separator(str(weights))


# The names of AudioSet's classes are what a classifier of it has.
@pytest.mark.parametrize("name", ["Male singing", "Speech", "Rapping", "Choir", "Vocal music", "female_vocal", "vocals",
                                  "Yodeling", "A capella", "Chant", "Hubbub, speech noise, speech babble", "voice",
                                  "Narration, monologue", "Speech synthesizer"])  # fmt: skip
def test_mentions_vocals_of_vocal_classes(name):
    assert mentions_vocals(name)


@pytest.mark.parametrize("name", ["Singing bowl", "Bird vocalization, bird call, bird song", "Music", "no_vocals",
                                  "non-vocal", "nonvocal", "instrumental", "without voice", "Wrapping paper", "Piano",
                                  "Single-lens", "Strap"])  # fmt: skip
def test_mentions_vocals_of_other_classes(name):
    assert not mentions_vocals(name)


def write_classifier(folder, labels=("Music", "Singing bowl", "Speech", "Male singing"), loud=None, **more):
    """An AST of random weights; with `loud`, one whose probability of that class grows with the loudness."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_length=1024)
    config = ASTConfig(**sizes, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)}, **more)
    ASTForAudioClassification(config).save_pretrained(folder)
    ASTFeatureExtractor(max_length=1024).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture
def loud_is_vocal(monkeypatch):
    """The classifier finds vocals where the window is loud."""

    def probabilities(self, wav):
        assert wav.shape[1] <= 10 * self.sample_rate
        found = torch.zeros(len(wav), len(self.classes))
        found[:, 3] = (wav.abs().amax(1) > 0.5).float() * 0.8
        found[:, :2] = 1.0
        return found

    monkeypatch.setattr("ssmttm.evaluation.embedders.audio_classifier.AudioClassifier.probabilities", probabilities)


@pytest.mark.parametrize("second", [0, 9, 12, 24.9])
def test_vocal_detector_finds_vocals_anywhere(classifier, loud_is_vocal, second):
    wav = torch.zeros(2, 25 * 22_050)
    wav[:, int(second * 22_050) :][:, :1000] = 0.9
    detection = VocalDetection(classifier)
    assert detection.probability(wav, 22_050) == pytest.approx(0.8)
    rejection = detection.rejection(wav, 22_050)
    assert (rejection.kind, rejection.reason) == ("vocals", "it has singing or speech (probability 0.80)")
    assert detection.rejection(torch.zeros(1, 22_050), 22_050) is None
    assert VocalDetection(classifier, threshold=0.81).rejection(wav, 22_050) is None


def test_vocal_detector_uses_classifier_probabilities(classifier):
    detector = VocalDetector(classifier)
    wav = noise(1, 25 * 16_000)
    windows = torch.stack([wav[0, :160_000], wav[0, 160_000:320_000], wav[0, 240_000:]])
    model = ASTForAudioClassification.from_pretrained(classifier).eval()
    inputs = ASTFeatureExtractor(max_length=1024)(list(windows.numpy()), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits.sigmoid()
    assert detector.probability(wav, 16_000) == pytest.approx(float(expected[:, 2:].max()), abs=1e-5)
    stereo = torch.cat([wav, wav])
    assert detector.probability(stereo, 16_000) == pytest.approx(detector.probability(wav, 16_000), abs=1e-5)
    alone = detector.classifier.probabilities(windows[1:2])
    torch.testing.assert_close(detector.classifier.probabilities(windows)[1:2], alone, atol=1e-5, rtol=0)


def test_vocal_detector_short_segments(classifier):
    assert 0 <= VocalDetection(classifier).probability(noise(1, 3000), 16_000) <= 1


def test_vocal_detector_classes(classifier, tmp_path):
    facts = json.loads(json.dumps(VocalDetection(classifier).metadata()))
    assert facts["labels"] == ["Speech", "Male singing"] and len(facts["fingerprint"]) == 16
    assert VocalDetector(classifier, ("Music",)).labels == ["Music"]
    with pytest.raises(UserError, match="has no class 'Song': it has Music"):
        VocalDetector(classifier, ("Song",))
    with pytest.raises(UserError, match=r"no class of .* mentions vocals"):
        VocalDetector(write_classifier(tmp_path, ("Music", "no vocals")))


def test_vocal_detector_softmax_classes(tmp_path):
    two = VocalDetector(write_classifier(tmp_path / "two", ("instrumental", "vocal")))
    assert two.classifier.exclusive
    torch.testing.assert_close(two.classifier.probabilities(noise(2, 16_000)).sum(1), torch.ones(2))
    three = write_classifier(tmp_path / "three", ("a", "b", "voice"), problem_type="single_label_classification")
    assert VocalDetector(three).classifier.exclusive


def test_vocal_detector_rejects_non_classifiers(tmp_path, classifier):
    ASTModel(ASTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path / "bare")
    ASTFeatureExtractor().save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="contains ASTModel: give an audio classifier"):
        VocalDetector(str(tmp_path / "bare"))
    with pytest.raises(UserError, match="there is no audio classifier folder"):
        VocalDetector(str(tmp_path / "nowhere"))
    copy = shutil.copytree(classifier, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match=r"no model\*\.safetensors"):
        VocalDetector(str(copy))
    with pytest.raises(UserError, match="threshold"):
        VocalDetection(classifier, threshold=0.0)


def test_vocal_models_hub_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"audio classifier 'MIT/ast-.*' cannot be fetched"):
        VocalDetection().metadata()
    with pytest.raises(UserError, match="separator 'adefossez/HTDemucs' cannot be fetched"):
        VocalRemoval().metadata()
