"""The sampling engine: seeds, guidance, padding, cached steps against the full forward, chunks, continuation."""

import itertools

import pytest
import torch

from ssmttm.errors import UserError
from ssmttm.generation.engine import draw_uniforms, generate, generate_frames
from ssmttm.generation.request import Sampling
from ssmttm.models.token_lm import TokenLM, TokenLMConfig
from ssmttm.patterns import PATTERNS, get_pattern
from ssmttm.text.condition import TextCondition

K, V, E = 4, 48, 12
PLAIN = Sampling(temperature=1.0, top_k=0, top_p=1.0, guidance_scale=1.0)
GUIDED = Sampling(temperature=0.9, top_k=20, top_p=0.95, guidance_scale=3.0)


def make_model(**changes) -> TokenLM:
    torch.manual_seed(0)
    sizes = dict(n_codebooks=K, codebook_size=V, d_model=32, n_layers=2, d_state=8, headdim=16, text_dim=E, dropout=0.0)
    model = TokenLM(TokenLMConfig(**(sizes | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2.0)  # so that the output depends clearly on the input
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def captions(*lengths) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, E, generator=generator) * 2 for length in lengths]


TEXTS = captions(5, 9, 2, 7)
NULL = TextCondition.stack(captions(1))
SEEDS = [11, 7, 7, 2**32 - 1]
DELAY = get_pattern("delay", n_codebooks=K)


def sample(model, items, sampling=GUIDED, n_frames=30, pattern=DELAY, **more):
    """Codes of some of TEXTS, each with its own seed."""
    text = TextCondition.stack([TEXTS[i] for i in items])
    return generate(model, text, NULL, pattern, n_frames, sampling, [SEEDS[i] for i in items], **more)


all_patterns = pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(get_pattern(name, n_codebooks=K, leading=n), id=f"{name}-{n}")
        for name, n in itertools.product(PATTERNS, (0, 2))
    ],
)


class Spy:
    """Records the inputs and states of the model."""

    def __init__(self, model, monkeypatch):
        self.prefills, self.steps, self.states, self.controls_seen = [], [], [], []
        real_prefill, real_step, real_state = model.prefill, model.step, model.init_state

        def prefill(codes, text, state, controls):
            self.prefills.append((codes.clone(), text))
            self.controls_seen.append(controls)
            return real_prefill(codes, text, state, controls)

        def step(codes, state, controls):
            self.steps.append(codes.clone())
            self.controls_seen.append(controls)
            return real_step(codes, state, controls)

        def init_state(*args, **kwargs):
            self.states.append(real_state(*args, **kwargs))
            return self.states[-1]

        monkeypatch.setattr(model, "prefill", prefill)
        monkeypatch.setattr(model, "step", step)
        monkeypatch.setattr(model, "init_state", init_state)

    def inputs(self, rows):
        """[rows, K, positions] of all items, the prefill's positions first."""
        head = torch.stack([codes for codes, _ in self.prefills], 1).flatten(0, 1)
        return torch.cat([head, torch.stack(self.steps, -1)[:rows]], dim=-1)


@pytest.mark.parametrize("sampling", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_item_codes_are_the_same_alone_and_in_any_batch(model, sampling):
    alone = {i: sample(model, [i], sampling) for i in range(4)}
    for items in [(0, 1), (1, 0), (3, 0, 2), (0, 1, 2, 3), (3, 2, 1, 0)]:
        together = sample(model, items, sampling)
        for row, item in enumerate(items):
            assert torch.equal(together[row], alone[item][0]), f"item {item} in {items}"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sampling", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_item_logits_are_bitwise_equal_in_any_batch(sampling, threads, monkeypatch):
    """So that the test above holds for long clips: there is no rounding difference that could grow."""
    torch.set_num_threads(threads)
    try:
        model = make_model(d_model=128, headdim=32, d_state=16)
        logits_of = {}
        for items in [(0,), (1, 0), (2, 0, 1, 3)]:
            outputs = []
            step, prefill = TokenLM.step, TokenLM.prefill
            monkeypatch.setattr(model, "step", lambda *a, s=step, h=outputs: h.append(s(model, *a)) or h[-1])
            monkeypatch.setattr(model, "prefill", lambda *a, p=prefill, h=outputs: h.append(p(model, *a)) or h[-1])
            sample(model, items, sampling, n_frames=6)
            row = items.index(0)
            n = len(items)
            rows = slice(row, None if sampling is PLAIN else n + row + 1, n)
            logits_of[items] = [outputs[row], *(logits[rows][: 1 + (sampling is GUIDED)] for logits in outputs[n:])]
        alone = logits_of.pop((0,))
        for items, logits in logits_of.items():
            assert all(torch.equal(a, b) for a, b in zip(alone, logits, strict=True)), items
    finally:
        torch.set_num_threads(1)


def test_codes_depend_on_seed_and_caption(model):
    codes = sample(model, [0, 1, 2, 3])
    for a, b in itertools.combinations(range(4), 2):
        assert not torch.equal(codes[a], codes[b])  # 1 and 2 share a seed, not a caption
    text = TextCondition.stack([TEXTS[0], TEXTS[0]])
    same_caption = generate(model, text, NULL, DELAY, 30, PLAIN, [3, 4])
    assert not torch.equal(same_caption[0], same_caption[1])


@pytest.mark.parametrize(("name", "same"), [("delay", 25 - K + 1), ("parallel", 25), ("flatten", 25)])
def test_longer_clip_begins_with_the_codes_of_a_shorter_one(model, name, same):
    """With delay, except the last K - 1 frames: their finer codes follow the padding that ends the shorter one."""
    shorter, longer = (sample(model, [0, 1], n_frames=n, pattern=get_pattern(name, K)) for n in (25, 40))
    assert torch.equal(shorter[..., :same], longer[..., :same])


def test_coarse_first_shares_only_the_first_codebook_with_a_shorter_clip(model):
    shorter, longer = (sample(model, [0], n_frames=n, pattern=get_pattern("coarse_first", K)) for n in (25, 40))
    assert torch.equal(shorter[:, 0], longer[:, 0, :25])
    assert not torch.equal(shorter[:, 1:], longer[:, 1:, :25])


def test_uniforms_depend_on_the_seed_only():
    both, one = draw_uniforms([5, 9], 40, K), draw_uniforms([9], 25, K)
    assert both.shape == (40, 2, K) and both.dtype == torch.float64
    assert torch.equal(both[:25, 1], one[:, 0])
    assert not torch.equal(both[:, 0], both[:, 1])


def test_guidance_one_runs_conditional_rows_only(model, monkeypatch):
    spy = Spy(model, monkeypatch)
    sample(model, [0, 1], PLAIN)
    assert [len(codes) for codes, _ in spy.prefills] == [1, 1]
    assert all(torch.equal(text.embeddings[0], TEXTS[i]) for i, (_, text) in enumerate(spy.prefills))


def test_guidance_one_is_the_limit_of_guidance(model):
    close = Sampling(top_k=0, guidance_scale=1.0 + 1e-9)
    assert torch.equal(sample(model, [0, 1], close), sample(model, [0, 1], PLAIN))


def test_guidance_zero_ignores_the_caption(model):
    none = Sampling(top_k=0, guidance_scale=0.0)
    text = TextCondition.stack([TEXTS[0], TEXTS[1]])
    codes = generate(model, text, NULL, DELAY, 20, none, [4, 4])
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(sample(model, [0], GUIDED, 20), sample(model, [0], PLAIN, 20))


def test_conditional_and_null_rows_are_paired_by_value(model):
    """Each item has its own null condition: swapping the items swaps the codes."""
    nulls = captions(3, 6)

    def run(items):
        text, null = (TextCondition.stack([rows[i] for i in items]) for rows in (TEXTS, nulls))
        return generate(model, text, null, DELAY, 30, GUIDED, [SEEDS[i] for i in items])

    forward, swapped = run([0, 1]), run([1, 0])
    assert torch.equal(forward, swapped.flip(0))
    assert torch.equal(forward[1], run([1])[0])
    crossed = generate(
        model, TextCondition.stack(TEXTS[:2]), TextCondition.stack(nulls[::-1]), DELAY, 30, GUIDED, SEEDS[:2]
    )
    assert not torch.equal(forward, crossed)


@all_patterns
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_greedy_sampling_is_the_argmax_of_the_full_forward(model, pattern, scale):
    text = TextCondition.stack(TEXTS[:3])
    codes = generate(model, text, NULL, pattern, 21, Sampling(top_k=1, guidance_scale=scale), [0, 1, 2])
    sequence = pattern.build(codes, model.special_token_id)  # [B, K, S]
    inputs = torch.cat([torch.full_like(sequence[..., :1], model.special_token_id), sequence[..., :-1]], dim=-1)
    with torch.no_grad():
        conditional = model(inputs, text)[..., :V]
        null = model(inputs, TextCondition(NULL.embeddings.expand(3, -1, -1), NULL.mask.expand(3, -1)))[..., :V]
    greedy = (null + scale * (conditional - null)).argmax(-1)
    assert torch.equal(pattern.revert(greedy), codes)


@pytest.mark.parametrize("name", PATTERNS)
def test_special_token_is_never_sampled(name, monkeypatch):
    model = make_model(predict_special=True)
    step, prefill = model.step, model.prefill

    def favour_special_token(logits):
        assert logits.shape[-1] == V + 1
        return logits.index_fill(-1, torch.tensor([V]), 50.0)

    monkeypatch.setattr(model, "step", lambda *inputs: favour_special_token(step(*inputs)))
    monkeypatch.setattr(model, "prefill", lambda *inputs: favour_special_token(prefill(*inputs)))
    codes = sample(model, [0, 1], PLAIN, 40, get_pattern(name, n_codebooks=K))
    assert codes.shape == (2, K, 40)
    assert codes.min() >= 0 and codes.max() < V


@all_patterns
def test_pattern_padding_is_enforced_and_sampled_codes_are_the_next_inputs(model, pattern, monkeypatch):
    spy = Spy(model, monkeypatch)
    n_frames, special = 12, model.special_token_id
    codes = sample(model, [0, 1], GUIDED, n_frames, pattern)
    inputs = spy.inputs(rows=4)  # the start column, then the sequence without its last position
    assert inputs.shape == (4, K, pattern.sequence_length(n_frames))
    assert torch.equal(inputs[:2], inputs[2:])
    sequence = inputs[:2, :, 1:]
    valid = pattern.mask(n_frames)[:, :-1]
    assert (inputs[..., 0] == special).all()
    assert (sequence[:, ~valid] == special).all() and (sequence[:, valid] != special).all()
    assert torch.equal(sequence, pattern.build(codes, special)[..., :-1])


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_of(part)
    elif hasattr(value, "__dict__"):
        yield from tensors_of(vars(value))


def test_state_does_not_grow_with_length(model, monkeypatch):
    spy = Spy(model, monkeypatch)
    sizes = []
    for n_frames in (5, 60):
        sample(model, [0], PLAIN, n_frames)
        sizes.append(sum(t.numel() for t in tensors_of(spy.states[-1])))
    assert sizes[0] == sizes[1] > 0
    assert len(spy.prefills) == 2 and all(codes.shape[-1] == 1 for codes, _ in spy.prefills)
    assert len(spy.steps) == 5 + 60 + 2 * (K - 2)  # one per position but the first, which is the prefill's


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("chunk_frames", [1, 4, 7, 100])
def test_chunks_concatenate_to_the_whole(model, name, chunk_frames):
    text, pattern = TextCondition.stack(TEXTS[:2]), get_pattern(name, n_codebooks=K)
    chunks = list(generate_frames(model, text, NULL, pattern, 23, GUIDED, SEEDS[:2], chunk_frames=chunk_frames))
    assert torch.equal(torch.cat(chunks, -1), sample(model, [0, 1], n_frames=23, pattern=pattern))
    assert all(chunk.shape[-1] >= min(chunk_frames, 23) for chunk in chunks[:-1])
    if chunk_frames == 1:
        assert [chunk.shape[-1] for chunk in chunks] == [1] * 23


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("delay", [K - 1, K, K + 1]),
        ("parallel", [0, 1, 2]),
        ("flatten", [K - 1, 2 * K - 1, 3 * K - 1]),
        ("coarse_first", [50, 51, 52]),
    ],
)
def test_frame_is_yielded_once_its_last_codebook_is_sampled(model, name, steps, monkeypatch):
    spy, pattern = Spy(model, monkeypatch), get_pattern(name, n_codebooks=K, leading=2)
    frames = generate_frames(model, TextCondition.stack(TEXTS[:1]), NULL, pattern, 50, PLAIN, [0])
    for wanted in steps:
        assert next(frames).shape[-1] == 1
        assert len(spy.steps) == wanted


def test_inference_mode_does_not_leak_out_of_the_generator(model):
    frames = generate_frames(model, TextCondition.stack(TEXTS[:1]), NULL, DELAY, 4, PLAIN, [0])
    next(frames)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("leading", [0, 2])
@pytest.mark.parametrize("n_given", [1, 8, 20])
@pytest.mark.parametrize(("name", "per_frame"), [("delay", 1), ("parallel", 1), ("flatten", K), ("coarse_first", 1)])
def test_continuation_of_own_codes_equals_uninterrupted_sampling(model, name, per_frame, n_given, leading, monkeypatch):
    pattern = get_pattern(name, n_codebooks=K, leading=leading)
    whole = sample(model, [0, 1], n_frames=20, pattern=pattern)
    spy = Spy(model, monkeypatch)
    continued = sample(model, [0, 1], n_frames=20, pattern=pattern, prompt_codes=whole[..., :n_given])
    assert torch.equal(continued, whole)
    prefilled = 1 + leading + n_given * per_frame if n_given < 20 else pattern.sequence_length(20)
    assert spy.prefills[0][0].shape[-1] == prefilled


@all_patterns
def test_continuation_keeps_and_depends_on_the_prompt_codes(model, pattern):
    """With prompt codes that the model would not have sampled."""
    whole = sample(model, [0], n_frames=12, pattern=pattern)
    prompt = (whole[..., :5] + 1) % V
    chunks = generate_frames(
        model, TextCondition.stack(TEXTS[:1]), NULL, pattern, 12, GUIDED, SEEDS[:1], prompt_codes=prompt
    )
    continued = torch.cat(list(chunks), -1)
    assert torch.equal(continued[..., :5], prompt)
    assert not torch.equal(continued[..., 5:], whole[..., 5:])


@all_patterns
def test_single_frame(model, pattern):
    assert sample(model, [0], n_frames=1, pattern=pattern).shape == (1, K, 1)


def test_model_with_nan_weights_is_an_error():
    model = make_model()
    with torch.no_grad():
        next(p for p in model.parameters() if p.dim() == 2).fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        sample(model, [0])


def test_model_in_training_mode_is_an_error(model):
    model.train()
    try:
        with pytest.raises(ValueError, match="eval"):
            sample(model, [0])
    finally:
        model.eval()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0},
        {"top_p": 1.01}, {"top_p": float("nan")}, {"guidance_scale": -0.1}, {"guidance_scale": float("nan")},
        {"guidance_scale": float("inf")},
    ],
)  # fmt: skip
def test_sampling_settings_out_of_range_are_errors(wrong):
    with pytest.raises(UserError, match=next(iter(wrong)).split("_scale")[0]):
        Sampling(**wrong)
