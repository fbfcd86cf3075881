"""Fine-tuning and adapters: what is trained, the folder and peft's reading of it, merging, stacking, errors."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_runs import assert_same_runs, run_contents, train_with_stops
from small_stores import CODEBOOK_SIZE, FRAMES, N_CODEBOOKS, TEXT_DIM, lm_config, small_codec, write_codes_store

from ssmttm import adapters, checkpoint, config
from ssmttm.adapters import check_base, merge, read_adapter, unmerge
from ssmttm.cli.main import main
from ssmttm.errors import UserError
from ssmttm.export.model_folder import export
from ssmttm.files import file_sha256
from ssmttm.generation.loading import load_language_model, open_model_folder
from ssmttm.models import build_model
from ssmttm.ops.int8 import quantise
from ssmttm.text.condition import TextCondition
from ssmttm.training import adapters as training_adapters
from ssmttm.training import loop
from ssmttm.training.adapters import find_targets
from ssmttm.training.checkpointer import load_initial_weights
from ssmttm.training.tasks.lm import LanguageModelTask

SHORT = (
    "train.precision=fp32",
    f"data.frames={FRAMES}",
    "data.batch_size=4",
    "train.eval_every=0",
    "train.log_every=1",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def store(root):
    return write_codes_store(root / "store")


@pytest.fixture(scope="module")
def base(root, store):
    return export(loop.train(lm_config(store, root / "base_run", "train.steps=3")), root / "base", half=False)


def settings(store, base, run_dir, *overrides, experiment="lora"):
    return config.load(
        f"experiment={experiment}", f"init={base}", f"data.store={store}", f"run_dir={run_dir}", *SHORT,
        "schedule.warmup_steps=1", "optim.lr=0.02", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["lora", "dora"])
def trained(request, root, store, base):
    """A run of six steps and its adapter folder."""
    name = request.param
    run = loop.train(settings(store, base, root / f"{name}_run", f"adapter.method={name}", "train.steps=6"))
    return run, export(run, root / name)


def logits(model):
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(CODEBOOK_SIZE, (2, N_CODEBOOKS, 9), generator=g)
    text = TextCondition(torch.randn(2, 3, TEXT_DIM, generator=g), torch.ones(2, 3, dtype=torch.bool))
    with torch.no_grad():
        return model(codes, text)


def load_base(base):
    return load_language_model(open_model_folder(base))


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_near(found, expected):
    assert expected.std() > 0.1, "too small for this tolerance"
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_finetuning_takes_the_model_of_init(root, store, base):
    run = loop.train(settings(store, base, root / "tuned", "train.steps=3", "model.dropout=0.1", experiment="finetune"))
    written = checkpoint.read_config(run)
    assert written.model.d_model == 16 and written.model.text_dim == TEXT_DIM and written.model.dropout == 0.1
    before, after = load_base(base).state_dict(), load_base(run).state_dict()
    assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in before)
    card = json.loads((export(run, root / "tuned_model") / "card.json").read_text())
    assert card["init"]["weights_sha256"] == file_sha256(base / "model.safetensors")


def test_adapter_training_changes_the_adapter_only(trained, base):
    run, _ = trained
    tensors = checkpoint.read_tensors(checkpoint.latest_good(run), "ema")
    plain, layers = adapters.split_layers(tensors, 1.0)
    original = load_file(base / "model.safetensors")
    assert plain.keys() == original.keys() and all(torch.equal(plain[name], original[name]) for name in original)
    assert len(layers) == 2 * 2 + 1 and all(layer.B.any() for layer in layers.values())  # in_proj, out_proj, heads
    optimiser = checkpoint.read_tensors(checkpoint.latest_good(run), "optimizer")
    assert optimiser and all("lora_" in name for name in optimiser)


def test_adapter_folder_has_a_card_and_is_what_peft_reads(trained, base, capsys):
    run, folder = trained
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_card.json",
    }
    card = json.loads((folder / "adapter_card.json").read_text())
    assert card["base_model"]["name"] == "base" and card["licence"] == "CC0-1.0" and card["step"] == 6
    assert card["base_model"]["weights_sha256"] == file_sha256(base / "model.safetensors")
    assert "adapter" not in card["data"] and card["data"]["licences"]
    by_peft = PeftModel.from_pretrained(load_base(base), str(folder)).eval()
    merged = load_base(base)
    merge(merged, [(read_adapter(folder), 1.0)])
    assert_near(logits(merged), logits(by_peft))
    assert (logits(merged) - logits(load_base(base))).abs().max() > 0.05
    assert_near(logits(load_base(run)), logits(by_peft))  # a run opens as the merged model
    assert main(["export", str(run), str(folder.parent / f"{folder.name}_merged"), "--merge"]) == 0
    whole = open_model_folder(capsys.readouterr().out.strip())
    assert "adapter" not in whole.card["data"] and whole.card["init"]["name"] == "base"
    torch.testing.assert_close(logits(load_language_model(whole)), logits(by_peft), rtol=0, atol=0.02)  # float16


def test_merging_is_undone_bit_for_bit_and_scales_with_the_strength(trained, base):
    adapter, model = read_adapter(trained[1]), load_base(base)
    original = weights_of(model)
    before = merge(model, [(adapter, 1.0)])
    full = weights_of(model)
    unmerge(model, before)
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    changed = {name for name in full if not torch.equal(full[name], original[name])}
    assert changed == {f"{layer}.weight" for layer in adapter.layers}
    for strength in (0.0, 0.5, -1.0):
        before = merge(model, [(adapter, strength)])
        for name, value in model.state_dict().items():
            expected = original[name] + strength * (full[name] - original[name])
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
        unmerge(model, before)


def test_stacked_adapters_add_up_in_any_order(root, store, base, trained):
    run = loop.train(
        settings(store, base, root / f"other_{trained[1].name}", "train.steps=3", "adapter.targets=[fc1,in_proj]")
    )
    one, other = read_adapter(trained[1]), read_adapter(export(run, root / f"second_{trained[1].name}"))
    results = []
    for stack in ([(one, 0.7), (other, 0.4)], [(other, 0.4), (one, 0.7)]):
        model = load_base(base)
        original = weights_of(model)
        before = merge(model, stack)
        results.append(weights_of(model))
        unmerge(model, before)
        assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    for name, value in results[0].items():
        updates = [
            s * a.layers[layer].delta(original[name])
            for a, s in stack
            for layer in a.layers
            if name == f"{layer}.weight"
        ]
        torch.testing.assert_close(value, original[name] + sum(updates), rtol=0, atol=1e-6)
        torch.testing.assert_close(value, results[1][name], rtol=0, atol=1e-6)


def test_adapter_training_that_was_stopped_equals_an_unbroken_one(root, store, base, monkeypatch):
    """Also with recomputation, although no input of a frozen block has a gradient."""
    loop.train(settings(store, base, root / "unbroken", "train.steps=4"))
    other = settings(store, base, root / "stopped", "train.steps=4", "train.recompute=full")
    train_with_stops(other, LanguageModelTask, {2}, monkeypatch)
    assert_same_runs(run_contents(root / "unbroken"), run_contents(root / "stopped"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.rank=0"], "adapter.rank must be at least 1, got 0"),
        (["adapter.alpha=0"], "adapter.alpha must be above 0"),
        (["adapter.alpha=inf"], "adapter.alpha must be above 0 and finite, got inf"),
        (["adapter.dropout=1"], r"adapter.dropout must be in \[0, 1\)"),
        (["adapter.method=ia3"], "unknown adapter.method=ia3: choose from lora, dora"),
        (
            ["adapter.targets=[in_proj,k_proj]"],
            "adapter.targets has k_proj, no linear layer .* choose from fc1, fc2, heads",
        ),
        (["adapter.targets=[]"], "adapter.targets is empty"),
        (["init=null"], "init is not set: give the model to start from"),
        (["init=null", "model_from_init=false"], "needs the model that it is for: give init=MODEL"),
        (["init=tinyttm_tiny"], "has int8 weights: start from the original model"),
        (["init=tiny_lm"], "was trained with the codec tiny, .* was made with fake: prepare it with --codec"),
    ],
)
def test_settings_that_cannot_be_used_are_one_clear_line(store, base, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        loop.train(settings(store, base, tmp_path, "train.steps=1", *overrides))


@pytest.mark.parametrize(
    ("section", "entry", "message"),
    [
        ("teacher", {"distilled_guidance_scale": 3.0}, "has guidance distilled into it"),
        ("text", {"fingerprint": "1" * 16, "null_condition": "unmasked_padding"}, "null condition unmasked_padding"),
        ("text", {"name": "other", "fingerprint": "2" * 16}, "was trained with the text other"),
    ],
)
def test_models_that_cannot_be_trained_further_are_one_clear_line(store, base, tmp_path, section, entry, message):
    model = shutil.copytree(base, tmp_path / "model")
    card = json.loads((model / "card.json").read_text())
    card["data"][section] = entry
    (model / "card.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=message):
        loop.train(settings(store, model, tmp_path / "run", "train.steps=1"))


def test_adapters_that_do_not_fit_are_one_clear_line(trained, base, store, root, tmp_path):
    adapter, model = read_adapter(trained[1]), load_base(base)
    check_base(adapter, file_sha256(base / "model.safetensors"), "base")
    with pytest.raises(UserError, match=r"was trained on base \(weights .*\), not on tiny_lm \(0000.*\): use it with"):
        check_base(adapter, "0" * 64, "tiny_lm")
    original = weights_of(model)
    for strength in (math.nan, math.inf):
        with pytest.raises(UserError, match="must be a finite number"):
            merge(model, [(adapter, 1.0), (adapter, strength)])
    other = adapters.Adapter("other", {}, {"heads": adapters.LayerUpdate(torch.ones(1, 3), torch.ones(4, 1), 1.0)})
    with pytest.raises(UserError, match=r"adapter other has heads of \(4, 3\), which is \(64, 16\) in this model"):
        merge(model, [(adapter, 1.0), (other, 1.0)])
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="quantised or missing"):
        merge(quantise(model), [(adapter, 1.0)])
    with pytest.raises(UserError, match=r"no adapter \(it has no adapter_config.json\)"):
        read_adapter(base)
    with pytest.raises(UserError, match="has no adapter to merge"):
        export(root / "base_run", tmp_path / "out", merge=True)


def test_damaged_adapters_and_other_kinds_are_one_clear_line(trained, tmp_path):
    def copy(name, **changes):
        folder = tmp_path / name
        folder.mkdir()
        for path in trained[1].iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        values = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(values | changes))
        return folder

    with pytest.raises(UserError, match="only LoRA and DoRA"):
        read_adapter(copy("vera", peft_type="VERA"))
    with pytest.raises(UserError, match="has modules_to_save"):
        read_adapter(copy("saved", modules_to_save=["embedding"]))
    cut = copy("cut")
    (cut / "adapter_model.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(UserError, match="cannot read "):
        read_adapter(cut)
    (cut / "adapter_card.json").write_text("[")
    with pytest.raises(UserError, match="cannot read "):
        read_adapter(cut)


def test_adapter_without_peft_is_one_clear_line(store, base, tmp_path, monkeypatch):
    monkeypatch.setattr(training_adapters, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"adapter.method=lora needs peft: pip install ssmttm\[lora\]"):
        loop.train(settings(store, base, tmp_path, "train.steps=1"))
    loop.train(settings(store, base, tmp_path, "train.steps=1", experiment="finetune"))


def test_commands_of_the_documentation_compose():
    text = (Path(__file__).parent.parent / "docs/finetune.md").read_text()
    commands = re.findall(r"^python train.py (.*)$", text, re.MULTILINE)
    composed = [config.load(*command.split()) for command in commands]
    assert [c.adapter.method for c in composed] == ["lora", None, "lora"] and all(c.model_from_init for c in composed)
    assert [c.optim.lr for c in composed] == [2e-3, 2e-4, 2e-3] and composed[0].train.steps == 200


def test_adapter_leaves_the_control_predictor_as_it_is(root):
    """Its layers have the names of targets."""
    store = write_codes_store(root / "annotated", codec=small_codec(root / "codec"))
    predicting = ("model.tempo=true", "model.predict_controls=true", "train.steps=1")
    base = export(loop.train(lm_config(store, root / "predicting", *predicting)), root / "predicting_base", half=False)
    run = loop.train(settings(store, base, root / "predicting_adapter", "train.steps=1"))
    layers = adapters.split_layers(checkpoint.read_tensors(checkpoint.latest_good(run), "ema"), 1.0)[1]
    assert "heads" in layers and not [name for name in layers if "control_predictor" in name]
    assert "bpm" not in find_targets(load_base(base), None)


def test_init_takes_the_name_of_a_shipped_model():
    folder = open_model_folder("tiny_lm")
    model = build_model(folder.config.model)
    init = load_initial_weights("tiny_lm", model)
    assert init["name"] == "tiny_lm" and init["weights_sha256"] == file_sha256(folder.weights_file)
    expected = load_language_model(folder).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_default_targets_are_those_that_the_model_has(base):
    assert find_targets(load_base(base), None) == ["in_proj", "out_proj", "heads"]
