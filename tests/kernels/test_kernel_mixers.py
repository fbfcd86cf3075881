"""Our mixers against mamba_ssm's modules from one state dict, and our mixers with the kernels against without."""

from importlib import import_module

import pytest
import torch
from environment import adapters, on_cuda, unrounded_mamba3
from errors import assert_near

from ssmttm.mixers.mamba1 import Mamba1
from ssmttm.mixers.mamba2 import Mamba2
from ssmttm.mixers.mamba3 import Mamba3

WIDTH = 32
MAMBA2 = {"headdim": 32, "d_state": 16, "chunk_size": 16}
SMALL = {Mamba1: {"d_state": 16}, Mamba2: MAMBA2}


@pytest.mark.parametrize(
    ("module", "name", "mixer", "options", "tolerance"),
    [
        ("mamba_simple", "Mamba", Mamba1, {}, 3e-6),
        ("mamba_simple", "Mamba", Mamba1, {"d_state": 4, "expand": 1, "dt_rank": 3, "d_conv": 3}, 3e-6),
        ("mamba2", "Mamba2", Mamba2, MAMBA2, 1e-4),
        ("mamba2", "Mamba2", Mamba2, MAMBA2 | {"ngroups": 2}, 1e-4),
        ("mamba3", "Mamba3", Mamba3, MAMBA2, 1e-4),
        ("mamba3", "Mamba3", Mamba3, MAMBA2 | {"ngroups": 2, "is_outproj_norm": True, "rope_fraction": 1.0}, 1e-4),
    ],
)
def test_a_mixer_is_mamba_ssms(module, name, mixer, options, tolerance):
    theirs = getattr(import_module(f"mamba_ssm.modules.{module}"), name)(WIDTH, **options)
    ours = mixer(WIDTH, **options)
    described = [[(key, value.shape, value.dtype) for key, value in m.state_dict().items()] for m in (theirs, ours)]
    assert described[0] == described[1]
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 18, WIDTH)
    with on_cuda(), unrounded_mamba3():
        expected = outputs_and_gradients(theirs, x, theirs)
    found = outputs_and_gradients(ours, x, ours)
    assert_near(f"`{mixer.__name__}`, mamba_ssm's `{name}`", found, expected, tolerance)


def outputs_and_gradients(function, x, model):
    inputs = x.clone().requires_grad_()
    y = function(inputs)
    names = ["x", *dict(model.named_parameters())]
    gradients = torch.autograd.grad(y.square().sum(), [inputs, *model.parameters()])
    return {"y": y.detach(), **{f"grad {name}": gradient for name, gradient in zip(names, gradients, strict=True)}}


@pytest.mark.parametrize("mixer", [Mamba1, Mamba2])
def test_masks_prefill_and_steps(mixer):
    model, x = mixer(WIDTH, **SMALL[mixer]), torch.randn(2, 19, WIDTH)
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[0, :4] = mask[0, 9:12] = mask[1] = False

    @torch.no_grad()
    def run():
        state = model.init_state(2)
        outputs = {"masked": model(x, mask=mask), "prefill": model(x[:, :17], state, mask[:, :17])}
        return outputs | {"step": model.step(x[:, 17], state), **vars(state)}

    with adapters():
        found = run()
    assert_near(f"`{mixer.__name__}` with masks, prefill, steps", found, run(), 2e-6)


@pytest.mark.parametrize("mixer", [Mamba1, Mamba2])
def test_gradients_of_a_forward_from_a_state(mixer):
    model, x = mixer(WIDTH, **SMALL[mixer]), torch.randn(1, 5, WIDTH)
    exact = mixer(WIDTH, **SMALL[mixer]).double()
    exact.load_state_dict(model.state_dict())

    def run(model, x):
        state = model.init_state(1)
        for tensor in vars(state).values():
            torch.nn.init.ones_(tensor)
        return outputs_and_gradients(lambda inputs: model(inputs, state), x, model) | vars(state)

    with adapters():
        found = run(model, x)
    assert_near(f"`{mixer.__name__}` from a state", found, run(exact, x.double()), 1e-5)


@pytest.mark.parametrize("mixer", [Mamba1, Mamba2])
def test_step_under_autocast(mixer):
    model, x = mixer(WIDTH, **SMALL[mixer]), torch.randn(1, WIDTH)

    def run():
        state = model.init_state(1)
        with torch.autocast("cpu", torch.bfloat16):
            return {"y": model.step(x, state), **vars(state)}

    with adapters():
        found = run()
    assert_near(f"`{mixer.__name__}`, steps in bfloat16", found, run(), 2e-2)
