"""Diffusion objectives, samplers and guidance against diffusers' schedules, known optima and formulas."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_denoisers import C, captions, conditions, denoiser, noisy

from ssmttm.diffusion.guidance import guided_predictor
from ssmttm.diffusion.objectives import OBJECTIVES, get_objective
from ssmttm.diffusion.samplers import SAMPLERS, SamplerSettings, sample
from ssmttm.errors import UserError
from ssmttm.models.controls import Controls
from ssmttm.models.latent_denoiser import LatentDenoiser
from ssmttm.text.condition import TextCondition

MEAN, STD = 1.5, 0.5  # of the data whose optimal prediction is known
ALL = [(objective, sampler) for objective, samplers in SAMPLERS.items() for sampler in samplers]
DIFFUSIONS = [pair for pair in ALL if pair[0] != "regression"]
shapes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9))
over_samplers = pytest.mark.parametrize(("objective", "sampler"), ALL)


def generators(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def draw_batch(shape, steps, seed):
    """Clean latents, noise, and steps out of 1,000 for each item."""
    g = torch.Generator().manual_seed(seed)
    return *(torch.randn(shape, generator=g) for _ in range(2)), torch.tensor(steps)


def noise_scales(objective, time):
    """Scales of the signal and of the noise, float64 [B, 1, 1]; for v by arXiv 2102.09672."""
    time = time.double()[:, None, None]
    if objective == "flow":
        return 1 - time, time
    level = (((torch.arange(1001).double() / 1000 + 0.008) / 1.008) * math.pi / 2).cos().square()  # equation 17
    alpha = (level[1:] / level[:-1]).clamp(min=0.001).cumprod(0)  # betas are at most 0.999
    alpha = alpha[(1000 * time).round().long().clamp(max=999)]
    return alpha.sqrt(), (1 - alpha).sqrt()


def exact_prediction(objective, noisy, clean, time):
    """The correct prediction at `noisy` if the latents are `clean`."""
    signal, sigma = noise_scales(objective, time)
    noise = (noisy - signal * clean) / sigma
    return {"v": signal * noise - sigma * clean, "flow": noise - clean, "regression": clean}[objective].float()


def exact_network(objective, clean, calls=None):
    """A network that knows the clean latents; its inputs are appended to `calls`."""

    def predict(noisy, time):
        if calls is not None:
            calls.append((noisy.clone(), time.clone()))
        return clean.expand_as(noisy) if objective == "regression" else exact_prediction(objective, noisy, clean, time)

    return predict


def optimal(objective):
    """The optimal prediction for latents drawn from N(MEAN, STD^2)."""

    def predict(noisy, time):
        signal, sigma = noise_scales(objective, time)
        variance = signal.square() * STD**2 + sigma.square()
        clean = MEAN + signal * STD**2 / variance * (noisy - signal * MEAN)
        return exact_prediction(objective, noisy, clean, time)

    return predict


# --- objectives -----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(shapes.flatmap(lambda s: st.tuples(st.just(s), st.lists(st.integers(0, 999), min_size=s[0], max_size=s[0]))))
@example(((1000, 1, 1), list(range(1000))))
def test_v_objective_equals_diffusers_cosine_schedule(case):
    clean, noise, steps = draw_batch(*case, seed=1)
    reference = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    ours, time = get_objective("v"), steps / 1000
    torch.testing.assert_close(ours.add_noise(clean, noise, time), reference.add_noise(clean, noise, steps))
    torch.testing.assert_close(ours.target(clean, noise, time), reference.get_velocity(clean, noise, steps))
    signal, sigma = noise_scales("v", time)
    torch.testing.assert_close(ours.add_noise(clean, noise, time), (signal * clean + sigma * noise).float())


@settings(max_examples=25, deadline=None)
@given(shapes.flatmap(lambda s: st.tuples(st.just(s), st.lists(st.integers(0, 999), min_size=s[0], max_size=s[0]))))
@example(((1000, 1, 1), list(range(1000))))
def test_flow_objective_equals_diffusers_interpolation_and_its_slope(case):
    clean, noise, steps = draw_batch(*case, seed=2)
    reference, ours = FlowMatchEulerDiscreteScheduler(), get_objective("flow")
    timesteps = reference.timesteps[steps]
    time = timesteps / 1000
    torch.testing.assert_close(ours.add_noise(clean, noise, time), reference.scale_noise(clean, timesteps, noise))
    _, slope = torch.func.jvp(lambda t: ours.add_noise(clean, noise, t), (time,), (torch.ones_like(time),))
    torch.testing.assert_close(ours.target(clean, noise, time), slope)


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=20, deadline=None)
@given(times=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=4), frames=st.integers(1, 9))
def test_objective_recovers_clean_latents_from_exact_prediction(name, times, frames):
    objective, times = get_objective(name), [0.0, 1.0, *times]
    clean, noise, _ = draw_batch((len(times), 3, frames), 0, seed=3)
    time = torch.tensor(times)
    mixed, target = objective.add_noise(clean, noise, time), objective.target(clean, noise, time)
    torch.testing.assert_close(objective.predict_clean(mixed, target, time), clean, rtol=0, atol=2e-6)


def test_objective_time_runs_from_clean_to_noise():
    clean, noise, _ = draw_batch((1, 2, 5), 0, seed=4)
    for name in ("v", "flow"):
        ends = [get_objective(name).add_noise(clean, noise, torch.tensor([time])) for time in (0.0, 1.0)]
        torch.testing.assert_close(ends[0], clean, rtol=0, atol=0.03)
        torch.testing.assert_close(ends[1], noise, rtol=0, atol=1e-3)
    assert not get_objective("regression").add_noise(clean, noise, torch.ones(1)).any()


@pytest.mark.parametrize("name", ["v", "flow"])
def test_objective_samples_times_uniformly(name):
    torch.manual_seed(0)
    times = get_objective(name).training_times(torch.rand(50_000))
    counts = torch.histc(times, 20, 0, 1)
    assert times.shape == (50_000,) and times.min() >= 0 and times.max() < 1
    assert (counts - 2500).abs().max() < 250  # five standard deviations
    if name == "v":
        assert (times * 1000).round().unique().numel() == 1000
        torch.testing.assert_close((times * 1000).round() / 1000, times)


@pytest.mark.parametrize("name", ["v", "flow"])
def test_objective_optimal_linear_predictions_have_the_minimal_loss(name):
    """For Gaussian data the target is linear in the input, so a line per small interval of time is optimal."""
    torch.manual_seed(0)
    objective, n, buckets = get_objective(name), 400_000, 200
    clean, noise = MEAN + STD * torch.randn(n, 1, 1), torch.randn(n, 1, 1)
    time = objective.training_times(torch.rand(n))
    inputs, target = (part.double().flatten() for part in (
        objective.add_noise(clean, noise, time), objective.target(clean, noise, time)))  # fmt: skip
    bucket = (time * buckets).long()

    def mean(values):
        return torch.zeros(buckets).double().index_add(0, bucket, values) / bucket.bincount(minlength=buckets)

    slope = (mean(inputs * target) - mean(inputs) * mean(target)) / (mean(inputs.square()) - mean(inputs).square())
    prediction = slope[bucket] * inputs + (mean(target) - slope * mean(inputs))[bucket]
    signal, sigma = noise_scales(name, (torch.arange(1000) + (0.5 if name == "flow" else 0)) / 1000)
    minimal = STD**2 / (signal.square() * STD**2 + sigma.square())  # variance of the target where x is known
    assert (prediction - target).square().mean().item() == pytest.approx(minimal.mean().item(), rel=0.02)


# --- samplers -------------------------------------------------------------------------------------------------------


@over_samplers
@pytest.mark.parametrize("steps", [1, 2, 7, 16])
def test_sampler_recovers_clean_latents_with_exact_network(objective, sampler, steps):
    """For any number of steps, so the time given to the network matches the actual noise."""
    clean, noise, _ = draw_batch((3, 2, 5), 0, seed=5)
    calls, given = [], SamplerSettings(objective, sampler, steps)
    sampled = sample(exact_network(objective, clean, calls), given, noise, generators(3))
    assert sampled.dtype == torch.float32
    torch.testing.assert_close(sampled, clean, rtol=0, atol=1e-5)
    assert given.n_evaluations == len(calls)
    assert given.n_evaluations == {"direct": 1, "heun": 2 * steps - 1}.get(sampler, steps)
    times = [time[0].item() for _, time in calls]
    assert times == sorted(times, reverse=True) and 0.998 < times[0] <= 1 and times[-1] > 0
    if sampler == "euler":
        assert times == pytest.approx([1 - step / steps for step in range(steps)])


@pytest.mark.parametrize(("objective", "sampler"), [pair for pair in DIFFUSIONS if pair[1] != "ddpm"])
@pytest.mark.parametrize("steps", [200, 300])
def test_sampler_without_added_noise_follows_the_probability_flow(objective, sampler, steps):
    """The probability flow between two Gaussians is the map MEAN + STD * noise."""
    noise = torch.randn(1, 2, 200, generator=generators(1)[0])
    sampled = sample(optimal(objective), SamplerSettings(objective, sampler, steps), noise, generators(1))
    torch.testing.assert_close(sampled, MEAN + STD * noise, rtol=0, atol=0.03)


def test_ddpm_sampler_keeps_mean_and_standard_deviation():
    noise = torch.randn(4, 4, 1500, generator=generators(1, first=9)[0])
    sampled = sample(optimal("v"), SamplerSettings("v", "ddpm", 300), noise, generators(4))
    assert sampled.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert sampled.std().item() == pytest.approx(STD, rel=0.03)
    assert torch.corrcoef(torch.stack([sampled.flatten(), noise.flatten()]))[0, 1] < 0.5


@pytest.mark.parametrize("steps", [4, 20, 50])
def test_ddim_sampler_equals_diffusers_at_integer_steps(steps):
    noise = torch.randn(2, 3, 7, generator=generators(1)[0])
    reference = DDIMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing",
        clip_sample=False,
    )  # fmt: skip
    reference.set_timesteps(steps)
    x, predict = noise, optimal("v")
    for timestep in reference.timesteps:
        x = reference.step(predict(x, torch.full((2,), timestep / 1000)), timestep, x).prev_sample
    found = sample(predict, SamplerSettings("v", "ddim", steps), noise, generators(2))
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


def test_ddpm_sampler_uses_each_items_generator():
    noise = torch.randn(3, 2, 6, generator=generators(1)[0])

    def run(items, seeds):
        given = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample(optimal("v"), SamplerSettings("v", "ddpm", 5), noise[items], given)

    together = run([0, 1, 2], [7, 8, 9])
    torch.manual_seed(99)
    for item, seed in ((0, 7), (1, 8), (2, 9)):
        assert torch.equal(run([item], [seed])[0], together[item])
    other = run([0, 1, 2], [7, 1000, 9])
    assert torch.equal(other[[0, 2]], together[[0, 2]]) and not torch.equal(other[1], together[1])


@pytest.mark.parametrize(("objective", "sampler"), [pair for pair in ALL if pair[1] != "ddpm"])
def test_sampler_without_added_noise_needs_no_generator(objective, sampler):
    noise = torch.randn(2, 2, 6, generator=generators(1)[0])
    given = SamplerSettings(objective, sampler, 3)
    with torch.random.fork_rng():
        network = exact_network(objective, noise) if objective == "regression" else optimal(objective)
        first = sample(network, given, noise, [])
        before = torch.get_rng_state()
        sample(exact_network(objective, noise), given, noise, generators(2))
        assert torch.equal(torch.get_rng_state(), before) and first.shape == noise.shape


@over_samplers
def test_sampler_keeps_known_frames_and_noises_them_in_between(objective, sampler):
    clean, noise, _ = draw_batch((2, 3, 8), 0, seed=6)
    known, calls = torch.randn(2, 3, 3, generator=generators(1)[0]), []
    given = SamplerSettings(objective, sampler, 4)
    sampled = sample(exact_network(objective, clean, calls), given, noise, generators(2), known)
    assert torch.equal(sampled[..., :3], known)
    all_known = sample(exact_network(objective, clean), given, noise, generators(2), noise)
    assert torch.equal(all_known, noise)
    torch.testing.assert_close(sampled[..., 3:], clean[..., 3:], rtol=0, atol=1e-5)
    if objective == "regression":
        assert not calls[0][0].any()
        return
    for noisy_input, time in calls:
        signal, sigma = noise_scales(objective, time)
        wanted = signal * known + sigma * noise[..., :3]
        torch.testing.assert_close(noisy_input[..., :3].double(), wanted, rtol=0, atol=3e-4)


@over_samplers
def test_sampler_keeps_known_frames_at_both_ends(objective, sampler):
    clean, noise, _ = draw_batch((2, 3, 8), 0, seed=6)
    known, calls = torch.randn(2, 3, 5, generator=generators(1)[0]), []
    before, after = known[..., :2], known[..., 2:]
    given = SamplerSettings(objective, sampler, 4)
    sampled = sample(exact_network(objective, clean, calls), given, noise, generators(2), before, after)
    assert torch.equal(sampled[..., :2], before) and torch.equal(sampled[..., 5:], after)
    torch.testing.assert_close(sampled[..., 2:5], clean[..., 2:5], rtol=0, atol=1e-5)
    for noisy_input, time in calls if objective != "regression" else ():
        signal, sigma = noise_scales(objective, time)
        wanted = signal * after + sigma * noise[..., 5:]
        torch.testing.assert_close(noisy_input[..., 5:].double(), wanted, rtol=0, atol=3e-4)


@pytest.mark.parametrize(("objective", "sampler"), [pair for pair in ALL if pair[0] != "regression"])
def test_strength_starts_from_noised_latents_and_makes_the_last_steps(objective, sampler):
    clean, noise, _ = draw_batch((2, 3, 8), 0, seed=6)
    start, calls = torch.randn(2, 3, 8, generator=generators(1)[0]), []
    given = SamplerSettings(objective, sampler, 8)
    network = exact_network(objective, clean, calls)
    sampled = sample(network, given, noise, generators(2), start=start, strength=0.5)
    torch.testing.assert_close(sampled, clean, rtol=0, atol=1e-5)
    assert len(calls) == SamplerSettings(objective, sampler, 4).n_evaluations
    noisy_input, time = calls[0]
    whole = []
    sample(exact_network(objective, clean, whole), given, noise, generators(2))
    torch.testing.assert_close(time, whole[-len(calls)][1])
    signal, sigma = noise_scales(objective, time)
    torch.testing.assert_close(noisy_input.double(), signal * start + sigma * noise, rtol=0, atol=3e-4)
    full = sample(optimal(objective), given, noise, generators(2), start=start)
    assert torch.equal(full, sample(optimal(objective), given, noise, generators(2)))


@pytest.mark.parametrize(
    ("strength", "message"),
    [(0.0, "strength must be in"), (1.1, "strength must be in"), (float("nan"), "strength"), (0.2, "none of 4 steps")],
)
def test_strength_out_of_range_is_an_error(strength, message):
    noise = torch.zeros(1, 2, 3)
    with pytest.raises(UserError, match=message):
        sample(optimal("flow"), SamplerSettings("flow", None, 4), noise, [], start=noise, strength=strength)
    with pytest.raises(UserError, match="objective regression has no steps"):
        sample(optimal("flow"), SamplerSettings("regression"), noise, [], start=noise, strength=strength)


def test_sampler_default_is_the_first_of_the_objective():
    assert [SamplerSettings(objective).name for objective in SAMPLERS] == ["dpm_solver", "euler", "direct"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ddpm",), "unknown diffusion.objective 'ddpm': choose from v, flow, regression"),
        (("v", "euler"), "unknown sampler 'euler' for objective v: choose from dpm_solver, ddim, ddpm"),
        (("flow", "ddim"), "unknown sampler 'ddim' for objective flow"),
        (("regression", "ddpm"), "unknown sampler 'ddpm' for objective regression"),
        (("flow", None, 0), r"sampling steps must be in \[1, 1000\], got 0"),
        (("v", "ddpm", -3), "got -3"),
        (("v", "ddpm", 1001), r"must be in \[1, 1000\], got 1001"),
    ],
)
def test_sampler_settings_errors_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        SamplerSettings(*arguments)
    assert "\n" not in str(caught.value)


# --- guidance -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return denoiser(chroma=True, tempo=True)


FRAMES = 9
NULL = captions(2, seed=5)


def full_conditions():
    """Captions, coarse latents that are dropped for one item, their noise, a melody, a tempo and padding."""
    mask = torch.ones(3, FRAMES, dtype=torch.bool)
    mask[1, 6:] = False
    return conditions(
        FRAMES,
        has_coarse=torch.tensor([True, True, False]),
        coarse_noise_aug=torch.tensor([0.0, 0.3, 0.1]),
        controls=Controls(
            torch.rand(3, 12, FRAMES, generator=generators(1)[0]), torch.tensor([90.0, torch.nan, 140.0])
        ),
        mask=mask,
    )


def nulls(count):
    return TextCondition(NULL.embeddings.expand(count, -1, -1), NULL.mask.expand(count, -1))


def record_batch_sizes(model, monkeypatch):
    """The batch size of each call of the model."""
    rows, forward = [], LatentDenoiser.forward
    monkeypatch.setattr(model, "forward", lambda x, *more: rows.append(len(x)) or forward(model, x, *more))
    return rows


@torch.no_grad()
@pytest.mark.parametrize(
    ("scale", "coarse_guidance_scale", "passes"),
    [(1, 1, 1), (0, 1, 1), (0, 0, 1), (3, 1, 2), (1, 0, 3), (2, 2, 2), (1, 1.5, 3), (3, 2, 3), (0.5, 0, 3)],
)
def test_guidance_equals_its_formula(model, monkeypatch, scale, coarse_guidance_scale, passes):
    given, (x, time) = full_conditions(), noisy(FRAMES)
    both = model(x, time, given)
    without_text = replace(given, text=nulls(3), controls=Controls())
    coarse = model(x, time, without_text)
    none = model(x, time, replace(without_text, has_coarse=torch.zeros(3, dtype=torch.bool)))
    rows = record_batch_sizes(model, monkeypatch)
    found = guided_predictor(model, given, NULL, scale, coarse_guidance_scale)(x, time)
    assert rows == [3 * passes]
    wanted = none + coarse_guidance_scale * (coarse - none) + scale * (both - coarse)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    pairs = ((both, coarse), (coarse, none), (both, none))
    assert min((part - other).abs().max() for part, other in pairs) > 0.01
    if passes == 1:
        assert torch.equal(found, {(1, 1): both, (0, 1): coarse, (0, 0): none}[scale, coarse_guidance_scale])


@torch.no_grad()
def test_guidance_null_condition_per_item(model):
    given, (x, time) = full_conditions(), noisy(FRAMES)
    each = captions(3, 1, 2, seed=6)
    found = guided_predictor(model, given, each, 2.5)(x, time)
    without_text = replace(given, text=each, controls=Controls())
    wanted = 2.5 * model(x, time, given) - 1.5 * model(x, time, without_text)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    shared = TextCondition(*(part[:1] for part in each))
    assert not torch.allclose(guided_predictor(model, given, shared, 2.5)(x, time)[1:], found[1:], atol=1e-3)


@torch.no_grad()
def test_guided_sampling_step_follows_the_prediction(model):
    """One Euler step of a flow is noise minus the prediction."""
    given, (noise, _) = full_conditions(), noisy(FRAMES)
    predict = guided_predictor(model, given, NULL, 2.0)
    assert noise.shape == (3, C, FRAMES)
    sampled = sample(predict, SamplerSettings("flow", "euler", 1), noise, generators(3))
    torch.testing.assert_close(sampled, noise - predict(noise, torch.ones(3)))
