"""Prompts reserved for evaluation: true, varied, and unlike every training caption."""

import ast
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

from data_prep.builtin import captions, compose, write_captions
from data_prep.builtin.composition.annotations import excerpt
from data_prep.builtin.paraphrases import TEMPLATES, write_paraphrases
from data_prep.builtin.words import TEMPO

ROOT = Path(__file__).parents[1]


@cache
def excerpts():
    return tuple(excerpt(compose(21, i), start, start + 20) for i in range(150) for start in (0.0, 20.0))


def plain(text: str) -> str:
    """Lower case, words and signs only, single spaces."""
    return " ".join(re.findall(r"[\w'#/]+", text.lower()))


def matches(template: str, text: str) -> bool:
    """Whether the fixed words of a template stand in a text in their order, with something in every slot."""
    runs = [plain(run) for run in re.split(r"\{\w+\}", template)]
    rest, at = f" {plain(text)} ", 0
    if not rest.startswith(f" {runs[0]}") or not rest.endswith(f"{runs[-1]} "):
        return False
    for run in filter(None, runs):
        found = rest.find(f" {run} ", at)
        if found < 0:
            return False
        at = found + len(run) + 1
    return True


def trigrams(template: str) -> set[tuple[str, ...]]:
    """Three words in a row, slots not among them."""
    found = set()
    for run in re.split(r"\{\w*\}", template.lower()):
        words = re.findall(r"[\w']+", run)
        found |= set(zip(words, words[1:], words[2:], strict=False))
    return found


def test_paraphrases_are_forty_or_more_distinct_templates() -> None:
    assert len(set(TEMPLATES)) == len(TEMPLATES) >= 40
    assert all(len(re.findall(r"\{\w+\}", template)) >= 2 for template in TEMPLATES)


def test_paraphrases_are_matched_by_no_training_caption() -> None:
    texts = [text for i, truth in enumerate(excerpts()) for text in write_captions(truth, i)]
    for text in texts:
        assert not [template for template in TEMPLATES if matches(template, text)], text
    own = [text for i, truth in enumerate(excerpts()) for text in write_paraphrases(truth, i)]
    assert all(any(matches(template, text) for template in TEMPLATES) for text in own), "templates match their own"
    assert not {plain(text) for text in own} & {plain(text) for text in texts}


def test_paraphrases_share_no_wording_with_training_templates() -> None:
    nodes = ast.walk(ast.parse(Path(captions.__file__).read_text()))
    training = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    known = set().union(*(trigrams(text) for text in training))
    for template in TEMPLATES:
        assert not trigrams(template) & known, template


def test_paraphrases_are_imported_by_no_training_code() -> None:
    for path in [*ROOT.glob("ssmttm/**/*.py"), *ROOT.glob("data_prep/**/*.py"), ROOT / "train.py"]:
        if "evaluation" in path.parts or path.name == "paraphrases.py" or not path.is_file():
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any("paraphrases" in name.split(".") for name in names), path


def test_paraphrases_state_only_true_facts() -> None:
    all_tempo = {word for words in TEMPO.values() for word in words if word != "quick"} | {"speedy", "languid"}
    allowed = {name: set(words) for name, words in TEMPO.items()}
    allowed["slow"] |= {"languid"}
    allowed["fast"] |= {"speedy"}
    for i, truth in enumerate(excerpts()):
        for text in write_paraphrases(truth, i):
            assert "{" not in text and "  " not in text
            told = text.replace("neither fast nor slow", "")
            heard = {w for w in all_tempo if re.search(rf"(?<![\w-]){w}(?![\w-])", told)}
            assert heard <= allowed[truth["tempo_class"]], text
            assert all(m == truth["metre"] for m in re.findall(r"\d/\d", text)), text
            assert all(int(n) == truth["bpm"] for n in re.findall(r"\b\d{2,3}\b", text)), text
            modes = set(re.findall(r"major|minor|dorian|mixolydian", text))
            assert modes <= {truth["mode"]}, text
            assert "drums" not in text or truth["drums"], text


def test_paraphrases_vary_and_repeat_by_seed() -> None:
    truth = excerpts()[0]
    assert write_paraphrases(truth, 1) == write_paraphrases(truth, 1) != write_paraphrases(truth, 2)
    sets = [write_paraphrases(truth, seed) for seed in range(50)]
    assert all(len(set(texts)) == 4 for texts in sets)
    assert sum(a != b for a, b in pairwise(sets)) == 49
