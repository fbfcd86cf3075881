"""Diffusion against independent references: diffusers' schedules, known optima, guidance by hand."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_denoisers import C, captions, conditions, denoiser, noisy

from ssmttm.diffusion.guidance import guided
from ssmttm.diffusion.objectives import OBJECTIVES, get_objective
from ssmttm.diffusion.samplers import SAMPLERS, SamplerSettings, sample
from ssmttm.errors import UserError
from ssmttm.models.controls import Controls
from ssmttm.models.latent_denoiser import LatentDenoiser
from ssmttm.text.condition import TextCondition

MEAN, SPREAD = 1.5, 0.5  # of the data whose optimal prediction is known
ALL = [(objective, sampler) for objective, samplers in SAMPLERS.items() for sampler in samplers]
DIFFUSIONS = [pair for pair in ALL if pair[0] != "regression"]
shapes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9))
over_samplers = pytest.mark.parametrize(("objective", "sampler"), ALL)


def generators(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def drawn(shape, steps, seed):
    """Clean latents, noise, and whole steps of 1,000 for each item."""
    g = torch.Generator().manual_seed(seed)
    return *(torch.randn(shape, generator=g) for _ in range(2)), torch.tensor(steps)


def shares(objective, time):
    """What is left of the signal and what has come of noise, float64 [B, 1, 1]; of v by arXiv 2102.09672."""
    time = time.double()[:, None, None]
    if objective == "flow":
        return 1 - time, time
    level = (((torch.arange(1001).double() / 1000 + 0.008) / 1.008) * math.pi / 2).cos().square()  # equation 17
    kept = (level[1:] / level[:-1]).clamp(min=0.001).cumprod(0)  # no step may drown more than 99.9 %
    kept = kept[(1000 * time).round().long().clamp(max=999)]
    return kept.sqrt(), (1 - kept).sqrt()


def told(objective, noisy, clean, time):
    """What a network must say at `noisy` if the latents are `clean`."""
    signal, spread = shares(objective, time)
    noise = (noisy - signal * clean) / spread
    return {"v": signal * noise - spread * clean, "flow": noise - clean, "regression": clean}[objective].float()


def knowing(objective, clean, seen=None):
    """A network that knows the clean latents; `seen` takes in what it is asked."""

    def predict(noisy, time):
        if seen is not None:
            seen.append((noisy.clone(), time.clone()))
        return clean.expand_as(noisy) if objective == "regression" else told(objective, noisy, clean, time)

    return predict


def optimal(objective):
    """The best a network can say about latents that are all drawn from N(MEAN, SPREAD^2)."""

    def predict(noisy, time):
        signal, spread = shares(objective, time)
        variance = signal.square() * SPREAD**2 + spread.square()
        clean = MEAN + signal * SPREAD**2 / variance * (noisy - signal * MEAN)
        return told(objective, noisy, clean, time)

    return predict


# --- objectives -----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(shapes.flatmap(lambda s: st.tuples(st.just(s), st.lists(st.integers(0, 999), min_size=s[0], max_size=s[0]))))
@example(((1000, 1, 1), list(range(1000))))
def test_v_is_diffusers_cosine_schedule(case):
    clean, noise, steps = drawn(*case, seed=1)
    reference = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    ours, time = get_objective("v"), steps / 1000
    torch.testing.assert_close(ours.noisy(clean, noise, time), reference.add_noise(clean, noise, steps))
    torch.testing.assert_close(ours.target(clean, noise, time), reference.get_velocity(clean, noise, steps))
    signal, spread = shares("v", time)
    torch.testing.assert_close(ours.noisy(clean, noise, time), (signal * clean + spread * noise).float())


@settings(max_examples=25, deadline=None)
@given(shapes.flatmap(lambda s: st.tuples(st.just(s), st.lists(st.integers(0, 999), min_size=s[0], max_size=s[0]))))
@example(((1000, 1, 1), list(range(1000))))
def test_flow_is_diffusers_straight_line_and_its_slope(case):
    clean, noise, steps = drawn(*case, seed=2)
    reference, ours = FlowMatchEulerDiscreteScheduler(), get_objective("flow")
    named = reference.timesteps[steps]
    time = named / 1000
    torch.testing.assert_close(ours.noisy(clean, noise, time), reference.scale_noise(clean, named, noise))
    _, slope = torch.func.jvp(lambda t: ours.noisy(clean, noise, t), (time,), (torch.ones_like(time),))
    torch.testing.assert_close(ours.target(clean, noise, time), slope)


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=20, deadline=None)
@given(times=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=4), frames=st.integers(1, 9))
def test_a_right_answer_gives_back_the_clean_latents_at_any_time(name, times, frames):
    objective, times = get_objective(name), [0.0, 1.0, *times]
    clean, noise, _ = drawn((len(times), 3, frames), 0, seed=3)
    time = torch.tensor(times)
    mixed, target = objective.noisy(clean, noise, time), objective.target(clean, noise, time)
    torch.testing.assert_close(objective.clean(mixed, target, time), clean, rtol=0, atol=2e-6)


def test_time_runs_from_clean_to_noise():
    clean, noise, _ = drawn((1, 2, 5), 0, seed=4)
    for name in ("v", "flow"):
        at = [get_objective(name).noisy(clean, noise, torch.tensor([time])) for time in (0.0, 1.0)]
        torch.testing.assert_close(at[0], clean, rtol=0, atol=0.03)
        torch.testing.assert_close(at[1], noise, rtol=0, atol=1e-3)
    assert not get_objective("regression").noisy(clean, noise, torch.ones(1)).any()


@pytest.mark.parametrize("name", ["v", "flow"])
def test_times_are_drawn_evenly_from_the_whole_process(name):
    torch.manual_seed(0)
    times = get_objective(name).draw_times(50_000)
    counts = torch.histc(times, 20, 0, 1)
    assert times.shape == (50_000,) and times.min() >= 0 and times.max() < 1
    assert (counts - 2500).abs().max() < 250  # five standard deviations
    if name == "v":
        assert (times * 1000).round().unique().numel() == 1000
        torch.testing.assert_close((times * 1000).round() / 1000, times)


@pytest.mark.parametrize("name", ["v", "flow"])
def test_the_best_straight_lines_have_the_least_loss_that_there_can_be(name):
    """Of Gaussian data the target is linear in what is seen, so a line for each small interval of time learns it."""
    torch.manual_seed(0)
    objective, n, buckets = get_objective(name), 400_000, 200
    clean, noise, time = MEAN + SPREAD * torch.randn(n, 1, 1), torch.randn(n, 1, 1), objective.draw_times(n)
    seen, target = (part.double().flatten() for part in (
        objective.noisy(clean, noise, time), objective.target(clean, noise, time)))  # fmt: skip
    bucket = (time * buckets).long()

    def mean(values):
        return torch.zeros(buckets).double().index_add(0, bucket, values) / bucket.bincount(minlength=buckets)

    slope = (mean(seen * target) - mean(seen) * mean(target)) / (mean(seen.square()) - mean(seen).square())
    said = slope[bucket] * seen + (mean(target) - slope * mean(seen))[bucket]
    signal, spread = shares(name, (torch.arange(1000) + (0.5 if name == "flow" else 0)) / 1000)
    least = SPREAD**2 / (signal.square() * SPREAD**2 + spread.square())  # variance of the target where x is known
    assert (said - target).square().mean().item() == pytest.approx(least.mean().item(), rel=0.02)


# --- samplers -------------------------------------------------------------------------------------------------------


@over_samplers
@pytest.mark.parametrize("steps", [1, 2, 7, 16])
def test_a_network_that_knows_the_answer_is_believed(objective, sampler, steps):
    """For any number of steps, so what the network is told of the noise is the noise that there is."""
    clean, noise, _ = drawn((3, 2, 5), 0, seed=5)
    asked, given = [], SamplerSettings(objective, sampler, steps)
    made = sample(knowing(objective, clean, asked), given, noise, generators(3))
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, clean, rtol=0, atol=1e-5)
    assert given.evaluations == len(asked)
    assert given.evaluations == {"direct": 1, "heun": 2 * steps - 1}.get(sampler, steps)
    times = [time[0].item() for _, time in asked]
    assert times == sorted(times, reverse=True) and 0.998 < times[0] <= 1 and times[-1] > 0
    if sampler == "euler":
        assert times == pytest.approx([1 - step / steps for step in range(steps)])


@pytest.mark.parametrize(("objective", "sampler"), [pair for pair in DIFFUSIONS if pair[1] != "ddpm"])
@pytest.mark.parametrize("steps", [200, 300])
def test_many_steps_without_new_noise_carry_noise_to_data_by_the_known_map(objective, sampler, steps):
    """The probability flow between two Gaussians is the straight map MEAN + SPREAD * noise."""
    noise = torch.randn(1, 2, 200, generator=generators(1)[0])
    made = sample(optimal(objective), SamplerSettings(objective, sampler, steps), noise, generators(1))
    torch.testing.assert_close(made, MEAN + SPREAD * noise, rtol=0, atol=0.03)


def test_fresh_noise_on_the_way_keeps_mean_and_spread():
    noise = torch.randn(4, 4, 1500, generator=generators(1, first=9)[0])
    made = sample(optimal("v"), SamplerSettings("v", "ddpm", 300), noise, generators(4))
    assert made.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert made.std().item() == pytest.approx(SPREAD, rel=0.03)
    assert torch.corrcoef(torch.stack([made.flatten(), noise.flatten()]))[0, 1] < 0.5


@pytest.mark.parametrize("steps", [4, 20, 50])
def test_ddim_is_diffusers_ddim_where_its_steps_are_whole(steps):
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


def test_an_items_fresh_noise_is_its_own_generators():
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
def test_samplers_that_add_no_noise_need_no_generator(objective, sampler):
    noise = torch.randn(2, 2, 6, generator=generators(1)[0])
    given = SamplerSettings(objective, sampler, 3)
    with torch.random.fork_rng():
        first = sample(optimal(objective) if objective != "regression" else knowing(objective, noise), given, noise, [])
        before = torch.get_rng_state()
        sample(knowing(objective, noise), given, noise, generators(2))
        assert torch.equal(torch.get_rng_state(), before) and first.shape == noise.shape


@over_samplers
def test_known_frames_come_out_as_they_are_and_are_shown_as_noisy_as_the_rest(objective, sampler):
    clean, noise, _ = drawn((2, 3, 8), 0, seed=6)
    known, asked = torch.randn(2, 3, 3, generator=generators(1)[0]), []
    given = SamplerSettings(objective, sampler, 4)
    made = sample(knowing(objective, clean, asked), given, noise, generators(2), known)
    assert torch.equal(made[..., :3], known)
    assert torch.equal(sample(knowing(objective, clean), given, noise, generators(2), noise), noise)  # all are known
    torch.testing.assert_close(made[..., 3:], clean[..., 3:], rtol=0, atol=1e-5)
    if objective == "regression":
        assert not asked[0][0].any()
        return
    for seen, time in asked:
        signal, spread = shares(objective, time)
        wanted = signal * known + spread * noise[..., :3]
        torch.testing.assert_close(seen[..., :3].double(), wanted, rtol=0, atol=3e-4)


def test_the_first_sampler_is_an_objectives_default():
    assert [SamplerSettings(objective).name for objective in SAMPLERS] == ["dpm_solver", "euler", "direct"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("ddpm",), "unknown diffusion.objective 'ddpm': choose from v, flow, regression"),
        (("v", "euler"), "no sampler 'euler' for objective v: choose dpm_solver, ddim, ddpm"),
        (("flow", "ddim"), "no sampler 'ddim' for objective flow"),
        (("regression", "ddpm"), "no sampler 'ddpm' for objective regression"),
        (("flow", None, 0), "0 sampling steps"),
        (("v", "ddpm", -3), "-3 sampling steps"),
        (("v", "ddpm", 1001), "1001 sampling steps: give 1 to 1,000"),
    ],
)
def test_mistakes_are_one_line(arguments, says):
    with pytest.raises(UserError, match=says) as caught:
        SamplerSettings(*arguments)
    assert "\n" not in str(caught.value)


# --- guidance -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return denoiser(chroma=True, tempo=True)


FRAMES = 9
NULL = captions(2, seed=5)


def full_conditions():
    """Captions, a sketch that is withheld from one item, its noise, a melody, a tempo and padding."""
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


def rows_of(model, monkeypatch):
    """How many rows each call of the model has, as it is called."""
    rows, forward = [], LatentDenoiser.forward
    monkeypatch.setattr(model, "forward", lambda x, *more: rows.append(len(x)) or forward(model, x, *more))
    return rows


@torch.no_grad()
@pytest.mark.parametrize(
    ("scale", "coarse_guidance_scale", "passes"),
    [(1, 1, 1), (0, 1, 1), (0, 0, 1), (3, 1, 2), (1, 0, 3), (2, 2, 2), (1, 1.5, 3), (3, 2, 3), (0.5, 0, 3)],
)
def test_guidance_is_the_formula_by_hand(model, monkeypatch, scale, coarse_guidance_scale, passes):
    given, (x, time) = full_conditions(), noisy(FRAMES)
    both = model(x, time, given)
    coarse_codes = model(x, time, given.with_text(nulls(3)))
    none = model(x, time, replace(given, text=nulls(3), has_coarse=torch.zeros(3, dtype=torch.bool)))
    rows = rows_of(model, monkeypatch)
    found = guided(model, given, NULL, scale, coarse_guidance_scale)(x, time)
    assert rows == [3 * passes]
    wanted = none + coarse_guidance_scale * (coarse_codes - none) + scale * (both - coarse_codes)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert min((part - other).abs().max() for part, other in ((both, coarse_codes), (coarse_codes, none), (both, none))) > 0.01
    if passes == 1:
        assert torch.equal(found, {(1, 1): both, (0, 1): coarse_codes, (0, 0): none}[scale, coarse_guidance_scale])


@torch.no_grad()
def test_each_item_has_its_own_null_condition(model):
    given, (x, time) = full_conditions(), noisy(FRAMES)
    each = captions(3, 1, 2, seed=6)
    found = guided(model, given, each, 2.5)(x, time)
    wanted = 2.5 * model(x, time, given) - 1.5 * model(x, time, given.with_text(each))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    shared = TextCondition(*(part[:1] for part in each))
    assert not torch.allclose(guided(model, given, shared, 2.5)(x, time)[1:], found[1:], atol=1e-3)


@torch.no_grad()
def test_guided_sampling_ends_where_its_prediction_points(model):
    """One Euler step of a flow is noise less the prediction."""
    given, (noise, _) = full_conditions(), noisy(FRAMES)
    predict = guided(model, given, NULL, 2.0)
    assert noise.shape == (3, C, FRAMES)
    made = sample(predict, SamplerSettings("flow", "euler", 1), noise, generators(3))
    torch.testing.assert_close(made, noise - predict(noise, torch.ones(3)))
