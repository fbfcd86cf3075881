"""Listening tests: a balanced blind design, an analysis that recovers simulated listeners, a run in a real browser."""

import csv
import json
import math
import random
import shutil
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
import yaml
from scipy.optimize import minimize

from ssmttm import audio
from ssmttm.cli.main import main
from ssmttm.errors import UserError, run_cli
from ssmttm.files import write_text
from ssmttm.listening.analyse import (
    Answers,
    Preference,
    Rating,
    bradley_terry,
    mean_ratings,
    pairwise_wins,
    read_answers,
    report,
)
from ssmttm.listening.design import find_systems, plan, williams
from ssmttm.listening.page import make_test
from ssmttm.listening.webmushra import export

RATE = 24_000
PROMPTS = ["a slow waltz", "a fast jig", "calm </script> piano"]


def write_clip(path, prompt, hertz, seconds=0.4, channels=1, gain=0.3):
    time = torch.arange(round(seconds * RATE)) / RATE
    audio.write(path, gain * torch.sin(2 * torch.pi * hertz * time).repeat(channels, 1), RATE)
    write_text(path.with_suffix(".json"), json.dumps({"prompt": prompt}))


@pytest.fixture
def folders(tmp_path):
    for i, system in enumerate(("mamba-secret", "transformer-secret", "truth-secret")):
        for j, prompt in enumerate(PROMPTS):
            write_clip(tmp_path / system / f"{j}.wav", prompt, 220 * (i + 1) + 20 * j, gain=0.1 * (i + 1))
    return {folder.name: folder for folder in sorted(tmp_path.iterdir())}


# --- the design -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(2, 8))
def test_williams_design_is_balanced(n):
    rows = williams(n)
    assert all(sorted(row) == list(range(n)) for row in rows)
    for place in range(n):
        assert len(set(Counter(row[place] for row in rows).values())) == 1
    follows = Counter(pair for row in rows for pair in pairwise(row))
    assert len(follows) == n * (n - 1) and len(set(follows.values())) == 1


def test_plan_is_balanced_over_positions_and_pair_orders():
    names = {prompt: {system: f"{prompt}/{system}" for system in "abc"} for prompt in PROMPTS}
    places, sides = Counter(), Counter()
    for listener in range(1, 13):
        trials = plan(PROMPTS, names, "both", listener)
        assert len(trials) == len(PROMPTS) * (3 + 3)
        for prompt in PROMPTS:
            rated = [t.clips[0][-1] for t in trials if t.kind == "mos" and t.prompt == prompt]
            assert sorted(rated) == ["a", "b", "c"]
            places.update(enumerate(rated))
            pairs = [tuple(clip[-1] for clip in t.clips) for t in trials if t.kind == "pair" and t.prompt == prompt]
            assert sorted(map(tuple, map(sorted, pairs))) == [("a", "b"), ("a", "c"), ("b", "c")]
            sides.update(pairs)
    assert len(places) == 9 and set(places.values()) == {12}
    assert len(sides) == 6 and set(sides.values()) == {18}
    assert plan(PROMPTS, names, "both", 1) == plan(PROMPTS, names, "both", 1)
    orders = {tuple(t.prompt for t in plan(PROMPTS, names, "mos", listener)) for listener in range(1, 13)}
    assert len(orders) > 3


# --- the page -------------------------------------------------------------------------------------------------------


def test_page_is_blind_and_self_contained(tmp_path, folders):
    (page, key), notes = make_test(folders, tmp_path / "out")
    text = page.read_text()
    assert "secret" not in text and "http" not in text and text.count("</script>") == 2 and notes == []
    test = json.loads(text.split('type="application/json">')[1].split("</script>")[0].replace("<\\/", "</"))
    known = json.loads(key.read_text())
    assert set(test["clips"]) == set(known["clips"]) and len(test["clips"]) == 9 and len(test["plans"]) == 24
    assert Counter(clip["system"] for clip in known["clips"].values()) == dict.fromkeys(folders, 3)
    by_name = sorted(known["clips"])
    assert [known["clips"][n]["system"] for n in by_name] != sorted(known["clips"][n]["system"] for n in by_name)
    for trials in test["plans"]:
        assert all(known["clips"][clip]["prompt"] == trial["prompt"] for trial in trials for clip in trial["clips"])


def test_page_clips_have_equal_loudness(tmp_path, folders):
    import base64

    for folder in folders.values():
        for path in folder.glob("*.wav"):
            prompt = json.loads(path.with_suffix(".json").read_text())["prompt"]
            write_clip(path, prompt, 440, 2.0, gain=random.random())
    (page, _), _ = make_test(folders, tmp_path / "out")
    test = json.loads(page.read_text().split('type="application/json">')[1].split("</script>")[0])
    levels = []
    for i, uri in enumerate(test["clips"].values()):
        (tmp_path / f"{i}.mp3").write_bytes(base64.b64decode(uri.split(",")[1]))
        levels.append(audio.integrated_loudness(*audio.read(tmp_path / f"{i}.mp3")))
    assert max(levels) - min(levels) < 0.5 and levels[0] == pytest.approx(-20, abs=0.6)


def test_make_test_notes_mismatches(tmp_path, folders):
    write_clip(folders["mamba-secret"] / "9.wav", "only here", 300)
    (folders["truth-secret"] / "0.wav").write_bytes(b"broken")
    write_clip(folders["truth-secret"] / "1.wav", PROMPTS[1], 300, channels=2)
    (_, key), notes = make_test(folders, tmp_path / "out")
    text = "\n".join(notes)
    assert "only here" in text and "0.wav" in text and "channels differ" in text
    assert {clip["prompt"] for clip in json.loads(key.read_text())["clips"].values()} == set(PROMPTS[1:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a=A"], "at least two systems"),
        (["a=A", "a=B"], "twice"),
        (["a", "b=B"], "NAME=FOLDER"),
        (["a=A", "b=EMPTY"], "no audio"),
        (["a=A", "b=OTHER"], "in common"),
    ],
)
def test_listen_make_rejects_bad_systems(tmp_path, words, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, prompt in (("A", "x"), ("B", "x"), ("OTHER", "y")):
        write_clip(tmp_path / folder / "0.wav", prompt, 300)
    (tmp_path / "EMPTY").mkdir()
    assert run_cli(lambda: main(["listen", "make", "--out", "out", "--systems", *words])) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_make_test_rejects_unknown_kinds_and_axes(tmp_path, folders):
    with pytest.raises(UserError, match="both"):
        make_test(folders, tmp_path / "out", kind="abx")
    with pytest.raises(UserError, match="loudness"):
        make_test(folders, tmp_path / "out", axes=("loudness",))
    with pytest.raises(UserError, match="--listeners must be at least 1, got 0"):
        make_test(folders, tmp_path / "out", listeners=0)
    with pytest.raises(UserError, match="both"):
        export(folders, tmp_path / "out", kind="abx")
    assert not (tmp_path / "out").exists()


def test_find_systems_notes_second_clip_of_prompt(folders):
    write_clip(folders["mamba-secret"] / "second.wav", PROMPTS[0], 300)
    common, skipped = find_systems(folders)
    assert len(common) == 3 and common[PROMPTS[0]]["mamba-secret"].name == "0.wav"
    assert len(skipped) == 1 and "second.wav: 0.wav has the same prompt" in skipped[0]


def test_find_systems_takes_the_first_prompts(folders):
    common, _ = find_systems(folders, 2)
    assert list(common) == list(find_systems(folders)[0])[:2]
    for number in (0, 4):
        with pytest.raises(UserError, match=f"--prompts must be 1 to 3, .* got {number}"):
            find_systems(folders, number)


def test_find_systems_matches_by_file_name_without_sidecars(tmp_path):
    for system in "ab":
        write_clip(tmp_path / system / "waltz.wav", "", 300)
        (tmp_path / system / "waltz.json").unlink()
    assert list(find_systems({s: tmp_path / s for s in "ab"})[0]) == ["waltz"]


# --- the analysis ---------------------------------------------------------------------------------------------------


def simulated(strength, games, seed=0):
    """Simulated preferences of listeners with these strengths."""
    rng, names = random.Random(seed), list(strength)
    found = []
    for i in range(games):
        a, b = rng.sample(names, 2)
        wins = rng.random() < 1 / (1 + math.exp(strength[b] - strength[a]))
        found.append(Preference(f"l{i % 12}", a, b, float(wins)))
    return found


def test_bradley_terry_maximises_likelihood():
    preferences = simulated({"a": 0.0, "b": 0.5, "c": 1.5}, 300)
    preferences += [Preference("t", "a", "c", 0.5)] * 7
    wins = np.zeros((3, 3))
    for p in preferences:
        a, b = "abc".index(p.first), "abc".index(p.second)
        wins[a, b] += p.score
        wins[b, a] += 1 - p.score
    wins += 0.25 * (1 - np.eye(3))

    def cost(strength):
        gaps = strength[:, None] - strength[None]
        return (wins * np.log1p(np.exp(-gaps))).sum()

    best = minimize(cost, np.zeros(3), tol=1e-12).x
    np.testing.assert_allclose(bradley_terry(list("abc"), preferences), best - best.mean(), atol=1e-4)


def test_bradley_terry_recovers_simulated_strengths():
    found = bradley_terry(["a", "b", "c"], simulated({"a": -1.0, "b": 0.0, "c": 1.0}, 4000))
    np.testing.assert_allclose(found, [-1, 0, 1], atol=0.12)
    always = bradley_terry(["a", "b"], [Preference("x", "a", "b", 1.0)] * 20)
    assert 2 < always[0] < 6 and always.sum() == pytest.approx(0)
    tied = bradley_terry(["a", "b"], [Preference("x", "a", "b", 0.5)] * 20)
    np.testing.assert_allclose(tied, 0, atol=1e-9)


def test_pairwise_wins_counts_and_p_value():
    preferences = [Preference("x", "a", "b", 1.0)] * 9
    preferences += [Preference("x", "b", "a", 1.0), Preference("x", "b", "a", 0.5)]
    ((a, b, wins, losses, ties, p_value),) = pairwise_wins(preferences)
    assert (a, b, wins, losses, ties) == ("a", "b", 9, 1, 1) and p_value == pytest.approx(2 * 11 / 1024)


def test_mean_ratings_have_intervals_over_listeners():
    ratings = [Rating(f"l{i}", "a", "quality", 2 if i % 2 else 4) for i in range(8) for _ in range(3)]
    ratings += [Rating("l0", "b", "quality", 5)]
    found = mean_ratings(ratings)
    mean, low, high, n = found["a", "quality"]
    assert (mean, n) == (3.0, 24) and found["b", "quality"][0] == 5
    alone = np.std([2, 4] * 4) / math.sqrt(8) * 1.96
    assert (high - low) / 2 == pytest.approx(alone, rel=0.25), "the answers of a listener are dependent"
    assert math.isnan(found["b", "quality"][1]), "no interval for one listener"
    text = report(Answers([Rating("l0", "b", "quality", 5)], [Preference("l0", "a", "b", 1.0)], []))
    assert text.count("one listener") == 3 and "nan" not in text


def answers_of(test, key, listener, rate):
    """The answer file of a listener who rates each system by `rate`."""
    answers = []
    for trial in test["plans"][listener - 1]:
        systems = [key["clips"][clip]["system"] for clip in trial["clips"]]
        if trial["kind"] == "mos":
            given = {axis: rate[systems[0]] for axis in test["axes"]}
        else:
            a, b = (rate[system] for system in systems)
            given = {"choice": "0" if a > b else "1" if b > a else "tie"}
        answers.append({**trial, "given": given, "seconds": 3.0})
    return {"test": test["id"], "listener": listener, "answers": answers}


def test_read_answers_and_report_of_answer_files(tmp_path, folders, capsys):
    (page, key_file), _ = make_test(folders, tmp_path / "out")
    test = json.loads(page.read_text().split('type="application/json">')[1].split("</script>")[0].replace("<\\/", "</"))
    key, rate = json.loads(key_file.read_text()), {"mamba-secret": 4, "transformer-secret": 2, "truth-secret": 4}
    files = []
    for listener in (1, 2, 3):
        saved = answers_of(test, key, listener, rate)
        if listener == 3:
            saved["answers"] = saved["answers"][:4]
        files.append(tmp_path / f"{listener}.json")
        files[-1].write_text(json.dumps(saved))
    (tmp_path / "duplicate.json").write_text(files[0].read_text())
    (tmp_path / "other.json").write_text(json.dumps({**json.loads(files[0].read_text()), "test": "x"}))
    (tmp_path / "junk.csv").write_text("no")
    files += [tmp_path / "duplicate.json", tmp_path / "other.json", tmp_path / "junk.csv"]
    for listener, change in ((7, {"choice": "2"}), (8, {"quality": "9"}), (9, {"quality": "good"})):
        saved = answers_of(test, key, 1, rate)
        kind = "pair" if "choice" in change else "mos"
        next(answer for answer in saved["answers"] if answer["kind"] == kind)["given"] |= change
        files.append(tmp_path / f"{listener}.json")
        files[-1].write_text(json.dumps({**saved, "listener": listener}))
    found = read_answers(files, key_file)
    notes = "\n".join(found.notes)
    for word in ("has already answered", "another test", "junk.csv", "listener 3 answered"):
        assert word in notes
    assert {r.listener for r in found.ratings} == {"1", "2", "3"} and notes.count("not a file of answers") == 4
    means = mean_ratings(found.ratings)
    assert all(means[system, "quality"][0] == value for system, value in rate.items())
    text = report(found)
    assert text.index("mamba-secret") and "tie is half a win" in text
    words = [*map(str, files[:3]), "--key", str(key_file), "--out", str(tmp_path / "r.md")]
    assert main(["listen", "analyse", *words]) == 0
    assert (tmp_path / "r.md").read_text().splitlines()[0] == "# Listening test" and "r.md" in capsys.readouterr().out


def test_read_answers_rejects_missing_answers_and_key(tmp_path, folders):
    (_, key), _ = make_test(folders, tmp_path / "out")
    with pytest.raises(UserError, match="no answers"):
        read_answers([tmp_path / "nowhere.json"], key)
    with pytest.raises(UserError, match="not the key"):
        read_answers([], tmp_path / "nowhere.json")


def test_webmushra_export_writes_pages_and_clips(tmp_path, folders, capsys):
    words = [f"{name}={folder}" for name, folder in folders.items()]
    write_clip(folders["mamba-secret"] / "9.wav", "only here", 300)
    assert main(["listen", "webmushra", "--systems", *words, "--out", str(tmp_path / "out")]) == 0
    assert "skipped: only here" in capsys.readouterr().out
    test = yaml.safe_load((tmp_path / "out" / "listening.yaml").read_text())
    kinds = [page["type"] if isinstance(page, dict) else page[0] for page in test["pages"]]
    assert kinds == ["generic", "volume", "random", "random", "finish"]
    ratings, pairs = test["pages"][2][1:], test["pages"][3][1:]
    assert len(ratings) == 9 * 3 and len(pairs) == 9
    named = {Path(file).name for page in ratings + pairs for file in page["stimuli"].values()}
    assert named == {path.name for path in (tmp_path / "out" / "listening").glob("*.wav")} and len(named) == 9
    text = (tmp_path / "out" / "listening.yaml").read_text()
    assert "secret" not in text and "<" not in text.replace("<br>", ""), "webMUSHRA interprets the prompt as HTML"
    assert all("reference" not in page and page["mustRate"] for page in ratings + pairs)
    key = yaml.safe_load((tmp_path / "out" / "key.yaml").read_text())
    assert len(key) == 9
    compared = Counter(frozenset(key[name]["system"] for name in page["stimuli"]) for page in pairs)
    assert len(compared) == 3 and set(compared.values()) == {3}


def test_webmushra_export_skips_unreadable_clips(tmp_path, folders):
    (folders["truth-secret"] / "0.wav").write_bytes(b"broken")
    (_, clips, key), notes = export(folders, tmp_path / "out", "pairs")
    assert len(yaml.safe_load(key.read_text())) == len(list(clips.glob("*.wav"))) == 6
    assert len(notes) == 1 and "0.wav" in notes[0]


@pytest.mark.parametrize("write", [make_test, export])
def test_listening_test_names_and_leaves_out_clips_without_music(tmp_path, folders, write):
    wav, _ = audio.read(folders["truth-secret"] / "0.wav")
    sf.write(folders["truth-secret"] / "0.wav", torch.cat([wav, -wav]).T.numpy(), RATE)
    sf.write(folders["mamba-secret"] / "2.wav", 20_000 * wav.T.numpy(), RATE, subtype="FLOAT")
    _, notes = write(folders, tmp_path / "out")
    assert len(notes) == 2 and any("0.wav" in note and "cancel" in note for note in notes)
    assert any("2.wav" in note and "full scale" in note for note in notes)
    for j in range(3):
        audio.write(folders["mamba-secret"] / f"{j}.wav", torch.zeros(1, RATE), RATE)
    with pytest.raises(UserError, match=r"usable clip.*silent"):
        write(folders, tmp_path / "out")


# --- a real browser -------------------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("there is no Chromium with its driver here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("headless=new", "no-sandbox", "autoplay-policy=no-user-gesture-required", "window-size=900,1000"):
        options.add_argument(f"--{word}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "saved")})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def listen_to_all(browser):
    """Play every clip on the page to its end."""
    browser.execute_async_script("""
        const ended = (sound) => new Promise((end) => { sound.addEventListener("ended", end); sound.play(); });
        Promise.all([...document.querySelectorAll("audio")].map(ended)).then(() => arguments[0]());
    """)


def answer(browser, rate):
    """Answer the trial on the page by `rate`."""
    listen_to_all(browser)
    clips = browser.execute_script("return plan()[state.answers.length].clips")
    values = [rate[clip] for clip in clips]
    if len(clips) == 1:
        for radio in browser.find_elements("css selector", f"input[value='{values[0]}']"):
            radio.click()
    else:
        choice = "0" if values[0] > values[1] else "1" if values[1] > values[0] else "tie"
        browser.find_element("css selector", f"input[value='{choice}']").click()


def test_page_in_browser(tmp_path, folders, browser):
    (page, key_file), _ = make_test(folders, tmp_path / "out", listeners=4)
    key, taste = json.loads(key_file.read_text()), {"mamba-secret": 5, "transformer-secret": 2, "truth-secret": 3}
    rate = {name: taste[clip["system"]] for name, clip in key["clips"].items()}
    browser.set_script_timeout(20)
    browser.get(f"file://{page}?p=2")
    begin = browser.find_element("id", "begin")
    assert not begin.is_enabled()
    listen_to_all(browser)
    begin.click()
    total = browser.execute_script("return plan().length")
    for index in range(total):
        assert f"{index + 1} of {total}" in browser.find_element("tag name", "h2").text
        go = browser.find_element("id", "next")
        if index == 0:
            for radio in browser.find_elements("css selector", "input[value='3']") or browser.find_elements(
                "css selector", "input[value='tie']"
            ):
                radio.click()
            assert not go.is_enabled(), "only after listening"
        answer(browser, rate)
        assert go.is_enabled()
        go.click()
        if index == 3:  # the listener returns later
            browser.get(f"file://{page}?p=2")
            listen_to_all(browser)
            browser.find_element("id", "begin").click()
    for kind in ("json", "csv"):
        browser.find_element("id", kind).click()
        for _ in range(100):
            if saved := list((tmp_path / "saved").glob(f"*.{kind}")):
                break
            time.sleep(0.1)
        found = read_answers(saved, key_file)
        assert not found.notes and len(found.ratings) == 27 and len(found.preferences) == 9
        means = mean_ratings(found.ratings)
        assert all(means[system, "adherence"][0] == value for system, value in taste.items())
        strength = dict(zip(sorted(taste), bradley_terry(sorted(taste), found.preferences), strict=True))
        assert strength["mamba-secret"] > strength["truth-secret"] > strength["transformer-secret"]
    rows = list(csv.DictReader((next((tmp_path / "saved").glob("*.csv"))).open()))
    assert len(rows) == 36 and {row["listener"] for row in rows} == {"2"}
