"""Blocks that are recomputed in the backward, or compiled, have the losses and gradients of plain ones."""

import pytest
import torch

from ssmttm import config
from ssmttm.errors import UserError
from ssmttm.mixers import Mamba2
from ssmttm.models import build_model
from ssmttm.models.latent_denoiser import Conditions
from ssmttm.ops.ssd import chunked
from ssmttm.text.condition import TextCondition
from ssmttm.training.recompute import set_up_blocks

SIZES = ("model.d_model=32", "model.headdim=8", "model.d_state=8", "model.n_heads=2", "model.n_layers=2")


def loss_of(model):
    torch.manual_seed(1)
    c = model.config
    text = TextCondition.stack([torch.randn(n, c.text_dim) for n in (3, 5)])
    if hasattr(c, "codebook_size"):
        codes = torch.randint(c.codebook_size, (2, c.n_codebooks, 70))
        return model(codes, text).float().square().mean()
    conditions = Conditions(torch.randn(2, c.coarse_channels, 70), text)
    return model(torch.randn(2, c.noisy_channels, 70), torch.tensor([0.2, 0.9]), conditions).square().mean()


def gradients(model):
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    loss = loss_of(model)
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def build(*overrides):
    torch.manual_seed(0)
    model = build_model(config.load(*overrides[:1], *SIZES, *overrides[1:]).model).train()
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():  # layers that begin as zero hide what is behind them
            torch.nn.init.normal_(parameter, std=0.1)
    return model


MODELS = {
    **{name: ("model=debug", f"model.layers={name}", "model.dropout=0.1") for name in ("mamba1", "mamba2", "mamba3")},
    "cross attention": ("model=debug", "model.layers=[s4d,attention]", "model.conditioning=cross_attention"),
    "denoiser": ("task=diffusion", "model=tiny_denoiser_ssm", "model.dropout=0.1", "model.time_dim=16"),
}


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_without_recomputation(name, mode):
    model = build(*MODELS[name])
    expected = gradients(model)
    set_up_blocks(model, mode, compiled=False)
    for key, value in gradients(model).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("mode", ["none", "full"])
def test_compiled_blocks_have_the_same_gradients(mode, monkeypatch):
    """With torch's graphs, but without the code that would be generated from them, which takes minutes."""
    for name in ("_training_forward", "_backward"):
        monkeypatch.setattr(chunked, name, getattr(chunked, name))  # restored at the end
    compiled, calls = torch.compile, []

    def count(graph, inputs):
        calls.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled(function, backend=count))
    model = build("model=debug", "model.n_layers=1")
    expected = gradients(model)
    set_up_blocks(model, mode, compiled=True)
    for key, value in gradients(model).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-7)
    assert len(calls) >= 2 and any(nodes > 60 for nodes in calls)  # the scan's backward is among them


def saved_bytes(model):
    """What autograd keeps for the backward, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model)
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


def test_recomputation_keeps_less_and_full_least():
    kept = {}
    for mode in ("none", "full"):
        model = build(*MODELS["mamba2"])
        set_up_blocks(model, mode, compiled=False)
        kept[mode] = saved_bytes(model)
    assert kept["full"] < 0.25 * kept["none"]


def test_selective_recomputes_scans_but_no_matrix_product(monkeypatch):
    counts = {}

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[function] = counts.get(function, 0) + 1
            return function(*args, **(kwargs or {}))

    forward, scans = chunked._training_forward, []
    monkeypatch.setattr(chunked, "_training_forward", lambda *operands: (scans.append(1), forward(*operands))[1])
    aten, found = torch.ops.aten, {}
    for mode in ("none", "selective", "full"):
        model = build("model=debug")
        set_up_blocks(model, mode, compiled=False)
        loss = loss_of(model)
        counts.clear()
        scans.clear()
        with Count():
            loss.backward()
        found[mode] = counts.get(aten.mm.default, 0) + counts.get(aten.addmm.default, 0), len(scans)
    assert found["none"][0] == found["selective"][0] < found["full"][0]
    assert [found[mode][1] for mode in ("none", "selective", "full")] == [0, 2, 2]


def test_scans_outside_of_selective_blocks_stay_visible():
    """A counter of operations sees those of another model's scan after blocks of this one were set up, which has
    operations of its own."""
    wrapped, other = build("model=debug"), build("model=debug")
    set_up_blocks(wrapped, "selective", compiled=False)
    one, two = (model.blocks[0].sublayers[0].inner.operations for model in (wrapped, other))
    assert all(one[name] is not two[name] for name in two) and two is Mamba2.operations
    seen = set()

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function)
            return function(*args, **(kwargs or {}))

    model = build("model=debug")
    with torch.no_grad(), Seen():
        loss_of(model)
    assert torch.ops.aten.cumsum.default in seen, "of the decays"


def test_blocks_without_gradients_stay_plain():
    model = build("model=debug")
    expected = loss_of(model).item()
    set_up_blocks(model, "full", compiled=False)
    with torch.no_grad():
        assert loss_of(model).item() == expected


@pytest.mark.parametrize(
    ("mode", "compiled", "message"),
    [("some", False, "unknown train.recompute=some"), ("selective", True, "set train.compile=false")],
)
def test_unusable_settings_are_one_clear_line(mode, compiled, message):
    with pytest.raises(UserError, match=message):
        set_up_blocks(build("model=debug"), mode, compiled)


def test_model_without_blocks_is_one_clear_line():
    with pytest.raises(UserError, match="this model has none"):
        set_up_blocks(torch.nn.Linear(3, 3), "full", compiled=False)
