"""Engines of the decoding step: the fused one against torch, its formats, its choice, its build."""

import subprocess
import sys
import threading

import pytest
import torch
from far_device import FAR, far_device
from small_token_lms import VARIANTS, E, K, S, V, captions, randomised, small_token_lm

from benchmarks import gpu
from ssmttm import MusicPipeline
from ssmttm.cli.main import main
from ssmttm.errors import UserError
from ssmttm.generation import engines
from ssmttm.generation.engine import CodeSampler, TextConditions, draw_uniforms, generate
from ssmttm.generation.engines import captured, fused, library
from ssmttm.generation.engines.base import AddedEmbeddings
from ssmttm.generation.engines.fused import FusedEngine
from ssmttm.generation.engines.library import INSTRUCTION_SETS, Unavailable, instruction_set
from ssmttm.generation.engines.reference import TorchEngine
from ssmttm.generation.request import Request, Sampling
from ssmttm.models import TokenLM, TokenLMConfig
from ssmttm.models.controls import CONFIG_KEYS, Controls
from ssmttm.ops.int8 import dequantise_rows, quantise, quantise_rows
from ssmttm.patterns import get_pattern
from ssmttm.text.condition import TextCondition

PROMPT = "a slow waltz in D minor on a music box"
NOTHING = Controls()
WIDE = {"d_model": 48, "headdim": 8}
CHANGES = VARIANTS | {
    "mamba-1": {"layers": "mamba1", "d_state": 20},
    "mamba-1 and attention": {"layers": ["mamba1", "attention"], "block": "mamba", "n_layers": 1},
    "odd sizes": {"d_model": 18, "d_state": 7, "headdim": 6, "mlp_ratio": 1.5, "codebook_size": 13},
}


@pytest.fixture(scope="module", autouse=True)
def compiled():
    try:
        library.library()
    except Unavailable as error:
        pytest.skip(f"the fused step: {error}")


def processed(model, rows=2, length=5, controls=NOTHING):
    """A state after text and some codes, and codes to go on with, [rows, K, n]."""
    codes = torch.randint(model.config.codebook_size, (rows, K, S), generator=torch.Generator().manual_seed(1))
    state = model.init_state(rows)
    model.prefill(codes[..., :length], captions(*range(3, 3 + rows)), state, controls.select_frames(slice(length)))
    return state, codes


def steps_of(engine, state, codes, controls=NOTHING, length=5):
    """Logits of all steps, [n, rows, K, V']."""
    steps = engine.bind(state, len(codes))
    return torch.stack([steps.step(codes[..., s], controls, s) for s in range(length, codes.shape[-1])])


def tensors(state):
    inner = [sublayer.inner for block in state.blocks for sublayer in block if sublayer.inner is not None]
    return [value for part in inner for value in vars(part).values() if torch.is_tensor(value)]


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", CHANGES)
def test_fused_steps_equal_torchs(name):
    model = randomised(small_token_lm(**CHANGES[name])).eval()
    state, codes = processed(model)
    fused_state = state.clone()
    expected = steps_of(TorchEngine(model), state, codes)
    found = steps_of(FusedEngine(model), fused_state, codes)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert fused_state.position == state.position
    for ours, theirs in zip(tensors(fused_state), tensors(state), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_fused_steps_add_controls_and_positions():
    model = randomised(small_token_lm(chroma=True, tempo=True, positions="sinusoidal")).eval()
    controls = Controls(torch.rand(2, 12, S), torch.tensor([90.0, torch.nan]))
    state, codes = processed(model, controls=controls)
    expected = steps_of(TorchEngine(model), state.clone(), codes, controls)
    torch.testing.assert_close(steps_of(FusedEngine(model), state, codes, controls), expected, rtol=0, atol=2e-5)
    other = Controls(controls.chroma, torch.tensor([120.0, torch.nan]))
    found = steps_of(FusedEngine(model), processed(model, controls=controls)[0], codes, other)
    assert not torch.allclose(found[:, 0], expected[:, 0], atol=1e-3)


def test_changed_controls_are_embedded_anew():
    model = randomised(small_token_lm(chroma=True, tempo=True, key=True)).eval()
    steps = FusedEngine(model).bind(model.init_state(4), 2, n_conditional=2)
    for bpm in (torch.tensor([90.0, 100.0]), torch.tensor([90.0, 120.0]), None):
        controls = Controls(torch.rand(2, 12, S), bpm, torch.tensor([3, -1]))
        found = steps.added.compute(steps, controls, 2, 3)  # [n, rows, D]
        rows = steps.controls_of_rows(controls, slice(2, 5))
        expected = model.embed_frames(rows), model.embed_items(rows)
        expected = sum(expected[0]) + sum(embedding[:, None] for embedding in expected[1])
        torch.testing.assert_close(found, expected.transpose(0, 1), rtol=0, atol=1e-5)
        assert torch.equal(steps.added.compute(steps, controls, 3, 2), found[1:])
    with pytest.raises(UserError, match="takes bpm of shape"):
        steps.added.compute(steps, Controls(bpm=torch.ones(3)), 0, 1)


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_fused_steps_of_other_instruction_sets_equal_torchs(isa, monkeypatch):
    """Compiled with little optimisation, which is quicker; the processor's own is that of the other tests."""
    names = list(INSTRUCTION_SETS)
    if names.index(isa) <= names.index(instruction_set()):
        pytest.skip("this processor does not have it, or it is the one of the other tests")
    monkeypatch.setattr(library, "FLAGS", tuple(flag.replace("-O3", "-O1") for flag in library.FLAGS))
    monkeypatch.setattr(fused, "library", library.library.__wrapped__)
    model = randomised(small_token_lm(layers=["mamba2", "attention", "mamba1"], n_layers=3)).eval()
    state, codes = processed(model)
    expected = steps_of(TorchEngine(model), state.clone(), codes)
    torch.testing.assert_close(steps_of(FusedEngine(model, isa=isa), state.clone(), codes), expected, rtol=0, atol=2e-5)
    assert relative_error(steps_of(FusedEngine(model, "int8", isa=isa), state, codes), expected) < 0.05


def test_tuning_for_a_processor_changes_no_bit(monkeypatch):
    monkeypatch.setattr(library, "FLAGS", tuple(flag.replace("-O3", "-O1") for flag in library.FLAGS))
    monkeypatch.setattr(fused, "library", library.library.__wrapped__)
    model = randomised(small_token_lm(n_layers=2)).eval()
    state, codes = processed(model)
    found = []
    for tuning in ((), ("-DAMD",)):
        monkeypatch.setattr(library, "TUNING", {library._processor("vendor_id"): tuning})
        states = state.clone(), state.clone()
        logits = [
            steps_of(FusedEngine(model, name), own, codes) for name, own in zip(("fp32", "int8"), states, strict=True)
        ]
        found.append([*logits, *tensors(states[0]), *tensors(states[1])])
    assert all(map(torch.equal, *found))


def rounded(model, weights):
    """A copy whose linear layers but the text's have weights rounded to a format, in float32."""
    other = small_token_lm(**WIDE).eval()
    other.load_state_dict(model.state_dict())
    for part in (*other.blocks.modules(), other.heads):
        if isinstance(part, torch.nn.Linear):
            int8 = dequantise_rows(*quantise_rows(part.weight))
            part.weight.data = part.weight.bfloat16().float() if weights == "bf16" else int8
    return other


@pytest.mark.parametrize(("weights", "tolerance"), [("bf16", 2e-5), ("int8", 5e-3)])
def test_packed_weights_change_logits_by_their_rounding(weights, tolerance):
    """Against torch with weights rounded likewise; int8 also rounds activations, to 15 bits."""
    model = randomised(small_token_lm(**WIDE)).eval()
    state, codes = processed(model)
    plain = steps_of(TorchEngine(model), state.clone(), codes)
    found = steps_of(FusedEngine(model, weights), state.clone(), codes)
    expected = steps_of(TorchEngine(rounded(model, weights)), state.clone(), codes)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert (found - plain).abs().max() > 4 * tolerance


@pytest.mark.parametrize("weights", engines.WEIGHTS)
@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_row_has_the_same_bits_alone_and_in_a_batch(weights, rows):
    model = randomised(small_token_lm(layers=["mamba2", "attention", "mamba1"], n_layers=3, positions="rotary")).eval()
    state, codes = processed(model, 7)
    engine = FusedEngine(model, weights)
    together = steps_of(engine, state.clone(), codes)
    part = model.init_state(rows)
    for target, source in zip(part.blocks, state.blocks, strict=True):
        for ours, theirs in zip(target, source, strict=True):
            if theirs.inner is not None:
                ours.inner.write_rows(slice(None), _rows_of(theirs.inner, slice(1, 1 + rows)))
    part.position = state.position
    assert torch.equal(steps_of(engine, part, codes[1 : 1 + rows]), together[:, 1 : 1 + rows])


def _rows_of(state, rows):
    part = state.clone()
    for name, value in vars(state).items():
        if torch.is_tensor(value):
            setattr(part, name, value[rows].clone())
    return part


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_threads_change_no_bit(weights):
    model = randomised(TokenLM(TokenLMConfig(**dict(n_codebooks=K, codebook_size=V, d_model=256, n_layers=1,
                                                    d_state=16, headdim=32, text_dim=E)))).eval()  # fmt: skip
    state, codes = processed(model)
    expected = steps_of(FusedEngine(model, weights), state.clone(), codes)
    assert torch.equal(steps_of(FusedEngine(model, weights, threads=3), state, codes), expected)


@pytest.mark.parametrize("sampling", [
    Sampling(), Sampling(top_k=3), Sampling(top_k=0, top_p=0.8), Sampling(temperature=0.7, top_k=20, min_p=0.1),
    Sampling(guidance_scale=0.3, top_k=1), Sampling(guidance_scale=1.0),
])  # fmt: skip
def test_fused_draws_equal_torchs(sampling):
    model = small_token_lm(codebook_size=100, predict_special=True).eval()
    guided = sampling.guidance_scale != 1.0
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        logits = 3 * torch.randn(4, K, 101, generator=generator)
        uniforms = torch.rand(2, K, generator=generator, dtype=torch.float64)
        expected = TorchEngine(model).draw(logits, uniforms, sampling, guided)
        assert torch.equal(FusedEngine(model).draw(logits, uniforms, sampling, guided), expected)


@pytest.mark.parametrize("changes", [{}, {"layers": "attention", "positions": "rotary"}])
def test_fused_and_torch_steps_may_take_turns_on_one_state(changes):
    model = randomised(small_token_lm(**changes)).eval()
    state = model.init_state(2)
    codes = torch.randint(V, (2, K, 150), generator=torch.Generator().manual_seed(1))
    model.prefill(codes[..., :1], captions(3, 5), state)
    other = state.clone()
    expected = steps_of(TorchEngine(model), other, codes, length=1)
    fused_steps, torch_steps = FusedEngine(model).bind(state, 2), TorchEngine(model).bind(state, 2)
    found = [(torch_steps if s // 40 % 2 else fused_steps).step(codes[..., s], NOTHING, s) for s in range(1, 150)]
    torch.testing.assert_close(torch.stack(found), expected, rtol=0, atol=3e-5)


def test_code_without_an_embedding_is_an_error():
    model = small_token_lm().eval()
    state, codes = processed(model)
    steps = FusedEngine(model).bind(state, 2)
    for wrong in (-1, V + 1):
        with pytest.raises(IndexError, match=r"codes must be in \[0, 16\]"):
            steps.step(codes[..., 5] * 0 + wrong, NOTHING, 0)
    assert state.position == 5


def test_ties_at_the_last_kept_code_are_kept():
    model = small_token_lm().eval()
    logits = torch.zeros(1, K, V)
    logits[..., 5:9] = 2.0
    uniforms = (torch.full((1, K), u).double() for u in (0.0, 0.3, 0.6, 0.9))
    drawn = {tuple(FusedEngine(model).draw(logits, u, Sampling(top_k=2), False)[0].tolist()) for u in uniforms}
    assert drawn == {(code,) * K for code in (5, 6, 7, 8)}


@pytest.mark.parametrize("changes", [{}, {"layers": ["mamba2", "attention"]}, {"positions": "sinusoidal"}])
def test_same_seed_gives_the_same_tokens_as_torch(changes):
    model = small_token_lm(init_std=0.3, **changes).eval()
    text, null, pattern = captions(4, 6), captions(1), get_pattern("delay", n_codebooks=K)
    arguments = (model, text, null, pattern, 90, Sampling(top_k=8), [5, 6])
    expected = generate(*arguments)
    assert torch.equal(generate(*arguments, engine=FusedEngine(model)), expected)
    prompted = generate(*arguments, prompt_codes=expected[..., :40], engine=FusedEngine(model))
    assert torch.equal(prompted[..., :40], expected[..., :40])


@torch.inference_mode()
def test_draws_of_a_clip_equal_torchs_but_for_uniforms_at_a_boundary():
    """The embedded model with guidance, on the codes that the fused engine sampled: torch's logits are equal to 1e-4,
    and its draws the same unless a uniform is within rounding of where two codes meet."""
    pipe = MusicPipeline.from_pretrained(device="cpu")
    engine, model, pattern, sampling = pipe.engine("fused"), pipe.model, pipe.pattern, Sampling()
    conditions = pipe.text_conditions(Request.create(PROMPT, 1.0, 7, sampling))
    text = TextCondition.stack([c.embeddings[0, c.mask[0]] for c in (conditions.texts[0], conditions.null_text)])
    sequence = pattern.build(pipe_codes(pipe, "fused", 300), model.special_token_id)  # [1, K, S]
    start = torch.full((1, sequence.shape[1], 1), model.special_token_id)
    inputs = torch.cat([start, sequence[..., :-1]], -1).expand(2, -1, -1)
    expected = model(inputs, text).permute(2, 0, 1, 3)  # [S, 2, K, V]
    state = model.init_state(2)
    first = model.prefill(inputs[..., :1], text, state)
    steps = engine.bind(state, 1)
    found = [first, *(steps.step(inputs[:1, :, s], NOTHING, s) for s in range(1, inputs.shape[-1]))]
    assert max((ours - theirs).abs().max() for ours, theirs in zip(found, expected, strict=True)) < 1e-4
    uniforms = draw_uniforms([7], len(found), sequence.shape[1])
    n_moved = 0
    for s, logits in enumerate(found):
        ours = engine.draw(logits, uniforms[s], sampling, True)  # [1, K]
        sampled = sequence[..., s] != model.special_token_id
        assert torch.equal(ours[sampled], sequence[..., s][sampled])
        near = [(uniforms[s] + d).clamp(0, 1 - 1e-9) for d in (-1e-4, 0.0, 1e-4)]
        below, theirs, above = (engine.draw(expected[s], u, sampling, True) for u in near)
        assert ((below <= ours) & (ours <= above)).all()
        n_moved += int((ours != theirs).sum())
    assert n_moved < 0.001 * sequence.numel()


def pipe_codes(pipe, engine, frames):
    conditions = pipe.text_conditions(Request.create(PROMPT, 1.0, 7, Sampling()))
    arguments = pipe.model, conditions.texts[0], conditions.null_text, pipe.pattern, frames, Sampling(), [7]
    return generate(*arguments, engine=pipe.engine(engine))


def test_copied_sampler_goes_on_independently():
    model = small_token_lm(init_std=0.3, layers=["mamba2", "attention"]).eval()
    conditions, pattern = TextConditions([captions(4)], captions(1)), get_pattern("delay", n_codebooks=K)
    sampler = CodeSampler(model, conditions, pattern, 200, Sampling(), [1], engine=FusedEngine(model))
    sampler.next_frames(70)
    copy = sampler.clone()
    expected = [sampler.next_frames(40), sampler.next_frames(40)]
    assert torch.equal(copy.next_frames(40), expected[0]) and torch.equal(copy.next_frames(40), expected[1])


def test_int8_costs_little_on_the_embedded_model():
    """Cross-entropy of codes that the model itself sampled, by steps: int8 against float32."""
    pipe = MusicPipeline.from_pretrained(device="cpu")
    codes = pipe.pattern.build(pipe_codes(pipe, "fused", 60), pipe.model.special_token_id)[..., :60]
    start = torch.full((1, codes.shape[1], 1), pipe.model.special_token_id)
    state = pipe.model.init_state(1)
    pipe.model.prefill(start, pipe.text_encoder.encode([PROMPT]), state)
    target = codes[0, :, 1:].T  # [S, K]
    valid = target != pipe.model.special_token_id
    losses = []
    for weights in ("fp32", "int8"):
        steps = pipe.engine("fused", weights).bind(state.clone(), 1)
        logits = torch.stack([steps.step(codes[..., s], NOTHING, s)[0] for s in range(59)])
        losses.append(torch.nn.functional.cross_entropy(logits[valid], target[valid]))
    assert abs(losses[1] - losses[0]) < 0.01 and losses[0] != losses[1]


class CapturedEngine(TorchEngine):
    """What runs on a GPU; on a CPU each replay calls the function."""

    def bind(self, state, n_items, n_conditional=None):
        return captured.CapturedSteps(self, state, n_items, n_conditional)


@pytest.mark.parametrize("changes", [
    {}, {"tempo": True, "chroma": True}, {"positions": "sinusoidal", "conditioning": "cross_attention"},
    {"conditioning": "adaln", "layers": "mamba1"},
])  # fmt: skip
def test_captured_steps_sample_the_tokens_of_single_ones(changes, monkeypatch):
    monkeypatch.setattr(captured, "MAX_POSITIONS", 16)
    model = small_token_lm(init_std=0.3, **changes).eval()
    controls = Controls(torch.rand(2, 12, 50)) if model.config.chroma else NOTHING
    pattern, texts = get_pattern("delay", n_codebooks=K), (captions(4, 6), captions(1))
    for sampling in (Sampling(top_k=8), Sampling(top_p=0.9, guidance_scale=1.0)):
        arguments = (model, *texts, pattern, 50, sampling, [5, 6])
        engine = CapturedEngine(model)
        engine.batched_prefill = True
        assert torch.equal(
            generate(*arguments, controls=controls, engine=engine), generate(*arguments, controls=controls)
        )


def test_captured_step_waits_for_nothing_from_the_host():
    model = small_token_lm(positions="sinusoidal").eval().to(FAR)
    steps = captured.CapturedSteps(TorchEngine(model), model.init_state(4, device=FAR), 2)
    with far_device(), torch.inference_mode():
        steps._advance(Sampling(top_k=3, top_p=0.9, min_p=0.1, temperature=0.8), True)


def test_gpu_script_runs_on_a_cpu():
    device = torch.device("cpu")
    assert gpu.check(gpu.SIZES["debug"], device)["tokens_equal"]
    times = gpu.step_times(gpu.SIZES["debug"], device, 1e9, 1)
    assert len(times) == 12 and all(row["ms"] > 0 and row["share_of_limit"] > 0 for row in times.values())


ALL_CONTROLS = {key: True for key in CONFIG_KEYS.values()}


def engine_of(name, model):
    if name == "ort":
        return pytest.importorskip("ssmttm.generation.engines.onnx_runtime").OrtEngine(model)
    return {"torch": TorchEngine, "captured": CapturedEngine, "fused": FusedEngine}[name](model)


@pytest.mark.parametrize("name", ["torch", "captured", "fused", "ort"])
@pytest.mark.parametrize("n_prompts", [1, 2])
def test_null_rows_have_no_controls(name, n_prompts, monkeypatch):
    """Without the conditional rows (a guidance of 0), controls change nothing, in prefill and in steps."""
    model = randomised(small_token_lm(**ALL_CONTROLS)).eval()
    engine, pattern = engine_of(name, model), get_pattern("delay", n_codebooks=K)
    weights = torch.tensor([[0.7, 0.2], [0.3, 0.8]]) if n_prompts == 2 else None
    conditions = TextConditions([captions(3, 4), captions(5, 2)][:n_prompts], captions(2, 3), weights)
    values = torch.rand(2, 16, 20, generator=torch.Generator().manual_seed(4))
    controls = Controls(
        values[:, :12], torch.tensor([60.0, 131.0]), torch.tensor([3, 20]), torch.tensor([2, 4]), values[:, 12:14],
        10 * values[:, 14:],
    )  # fmt: skip
    prompt = torch.randint(V, (2, K, 6), generator=torch.Generator().manual_seed(5))

    def run(guidance, given):
        sampling = Sampling(guidance_scale=guidance, top_k=0)
        sampler = CodeSampler(model, conditions, pattern, 20, sampling, [5, 6], prompt, given, engine=engine)
        return sampler.next_frames(20)

    assert torch.equal(run(0.0, controls), run(0.0, NOTHING))
    different = (run(2.0, controls) != run(2.0, NOTHING)).flatten(1).any(1)
    assert different.tolist() == [True, True]


def test_model_with_self_attention_is_not_captured():
    assert captured.can_capture(small_token_lm(conditioning="cross_attention"))
    assert not captured.can_capture(small_token_lm(layers=["mamba2", "attention"]))


@pytest.mark.parametrize("changes", [
    {}, {"layer_scale": 0.3, "positions": "sinusoidal"}, {"chroma": True, "tempo": True},
    {"block": "mamba", "final_norm": False, "predict_special": True}, {"mlp_bias": False},
])  # fmt: skip
def test_onnx_runtime_steps_equal_torchs(changes):
    onnx_runtime = pytest.importorskip("ssmttm.generation.engines.onnx_runtime")
    model = randomised(small_token_lm(**changes)).eval()
    state, codes = processed(model)
    ort_state = state.clone()
    expected = steps_of(TorchEngine(model), state, codes)
    found = steps_of(onnx_runtime.OrtEngine(model), ort_state, codes)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    for ours, theirs in zip(tensors(ort_state), tensors(state), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("quantised", [False, True])
def test_onnx_runtime_int8_steps_are_near_torchs(quantised):
    onnx_runtime = pytest.importorskip("ssmttm.generation.engines.onnx_runtime")
    model = randomised(small_token_lm(d_model=64, headdim=16, d_state=16)).eval()
    state, codes = processed(model)
    expected = steps_of(TorchEngine(model), state.clone(), codes)
    engine = onnx_runtime.OrtEngine(quantise(model) if quantised else model, "fp32" if quantised else "int8")
    assert engine.weights == "int8" and 1e-4 < relative_error(steps_of(engine, state, codes), expected) < 0.08


def test_onnx_runtime_int8_is_nearer_with_the_engines_blocks_than_with_larger_ones(monkeypatch):
    onnx_runtime = pytest.importorskip("ssmttm.generation.engines.onnx_runtime")
    model = randomised(small_token_lm(d_model=64, headdim=16, d_state=16)).eval()
    state, codes = processed(model)
    expected = steps_of(TorchEngine(model), state.clone(), codes)
    errors = []
    for block in (onnx_runtime.BLOCK, 2 * onnx_runtime.BLOCK):
        monkeypatch.setattr(onnx_runtime, "BLOCK", block)
        errors.append(relative_error(steps_of(onnx_runtime.OrtEngine(model, "int8"), state.clone(), codes), expected))
    assert errors[0] < 0.9 * errors[1]


def test_onnx_runtime_goes_on_from_the_fused_engines_state():
    onnx_runtime = pytest.importorskip("ssmttm.generation.engines.onnx_runtime")
    model = randomised(small_token_lm()).eval()
    state, codes = processed(model)
    expected = steps_of(TorchEngine(model), state.clone(), codes)[5:]
    steps_of(FusedEngine(model), state, codes[..., :10])
    found = steps_of(onnx_runtime.OrtEngine(model), state, codes, length=10)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_bf16_weights_of_a_quantised_model_are_an_error():
    model = quantise(small_token_lm(d_model=64, headdim=16).eval())
    with pytest.raises(UserError, match="was quantised to int8, which all engines read: leave weights=bf16 out"):
        engines.build(model, weights="bf16")
    assert engines.build(model, weights="int8").weights == engines.build(model).weights == "int8"


def test_auto_takes_the_fused_engine_and_says_so():
    engine = engines.build(small_token_lm().eval())
    assert engine.name == "fused" and "fastest" in engine.reason and instruction_set() in engine.reason


def test_info_tells_which_engines_are_usable(capsys):
    main(["info"])
    lines = capsys.readouterr().out.splitlines()
    usable = {line.split()[0]: line for line in lines[-3:]}
    assert list(usable) == ["fused", "ort", "torch"]
    assert "yes" in usable["fused"] and f"compiled for {instruction_set()}" in usable["fused"]


def test_model_that_is_not_in_the_library_runs_on_torch_with_the_reason():
    model = small_token_lm(layers="mamba3").eval()
    engine = engines.build(model)
    assert engine.name == "torch" and "Mamba3" in engine.reason
    with pytest.raises(UserError, match=r"engine=fused cannot run this model: .*Mamba3"):
        engines.build(model, "fused")
    with pytest.raises(UserError, match="no engine runs this model with int8 weights"):
        engines.build(model, "auto", "int8")


@pytest.mark.parametrize("name", ["fused", "ort"])
def test_model_with_wrapped_layers_or_hooks_runs_on_torch(name):
    class Wrapped(torch.nn.Linear):
        """Such as an adapter's."""

    model = small_token_lm().eval()
    model.blocks[0].sublayers[0].inner.in_proj.__class__ = Wrapped
    with pytest.raises(UserError, match="a layer is a Wrapped"):
        engines.build(model, name)
    model = small_token_lm().eval()
    model.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="has hooks"):
        engines.build(model, name)


@pytest.mark.parametrize(("engine", "weights", "message"), [
    ("fast", "fp32", "unknown engine 'fast': choose from auto, fused, ort, torch"),
    ("auto", "int4", "unknown weights 'int4': choose from fp32, bf16, int8"),
    ("torch", "bf16", "engine=torch cannot run this model: it does not read bf16 weights"),
])  # fmt: skip
def test_unknown_engine_or_weights_are_errors(engine, weights, message):
    with pytest.raises(UserError, match=message):
        engines.build(small_token_lm().eval(), engine, weights)


def test_quantised_model_stays_int8_in_every_engine():
    model = quantise(randomised(small_token_lm(d_model=48, headdim=8)).eval())
    assert engines.build(model).weights == engines.build(model, "torch").weights == "int8"
    state, codes = processed(model)
    expected = steps_of(TorchEngine(model), state.clone(), codes)
    assert relative_error(steps_of(FusedEngine(model), state, codes), expected) < 0.03  # torch's rounds more


def test_engine_is_built_again_when_weights_change():
    model, cache = small_token_lm().eval(), engines.EngineCache()
    first = cache.get(model, "auto", "fp32")
    assert cache.get(model, "auto", "fp32") is first
    with torch.no_grad():
        model.heads.weight.mul_(2)
    assert cache.get(model, "auto", "fp32") is not first


def test_pipeline_tells_the_engine_in_the_metadata():
    pipe = MusicPipeline.from_pretrained(device="cpu")
    output = pipe(PROMPT, duration=0.2, weights="int8")
    assert output.metadata["engine"]["name"] == "fused" and output.metadata["engine"]["weights"] == "int8"
    with pytest.raises(UserError, match="unknown engine"):
        pipe(PROMPT, duration=0.2, engine="fastest")


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    """An empty cache folder, and nothing loaded yet."""
    monkeypatch.setenv("SSMTTM_CACHE", str(tmp_path))
    library.library.cache_clear()
    yield tmp_path
    library.library.cache_clear()


def test_missing_compiler_falls_back_to_torch(fresh_build, monkeypatch):
    monkeypatch.setattr(library, "_compiler", lambda: None)
    engine = engines.build(small_token_lm(layers="attention").eval())
    assert engine.name == "torch" and "no C++ compiler was found" in engine.reason


def test_failing_compiler_falls_back_to_torch_and_leaves_nothing(fresh_build, monkeypatch, tmp_path):
    script = tmp_path / "cxx"
    script.write_text("#!/bin/sh\necho 'error: out of luck' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(library, "_compiler", lambda: str(script))
    engine = engines.build(small_token_lm(layers="attention").eval())
    assert engine.name == "torch" and "out of luck" in engine.reason
    assert [path.name for path in fresh_build.iterdir()] == ["cxx"]


def test_cache_folder_that_cannot_be_written_falls_back_to_torch(fresh_build, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SSMTTM_CACHE", str(tmp_path / "file" / "folder"))
    engine = engines.build(small_token_lm(layers="attention").eval())
    assert engine.name == "torch" and "cannot be built in the cache folder" in engine.reason


def test_damaged_library_falls_back_to_torch(fresh_build, monkeypatch):
    monkeypatch.setattr(library, "_compiler", _fake_compiler(fresh_build, "not a library"))
    engine = engines.build(small_token_lm(layers="attention").eval())
    assert engine.name == "torch" and "cannot be loaded" in engine.reason


def test_parallel_builds_compile_apart_and_leave_one_library(fresh_build, monkeypatch):
    monkeypatch.setattr(library, "_compiler", _fake_compiler(fresh_build, "a library", "sleep 0.1"))
    found = []
    threads = [threading.Thread(target=lambda: found.append(library._build("baseline"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and found[0].read_text() == "a library"
    assert [path.name for path in fresh_build.glob("step-*")] == [found[0].name]


def _fake_compiler(folder, output, before=""):
    """A program that takes a compiler's arguments and writes `output` to what follows -o."""
    script = folder / "fake"
    script.write_text(f"#!{sys.executable}\nimport sys, subprocess\nsubprocess.run({before!r}, shell=True)\n"
                      f"open(sys.argv[sys.argv.index('-o') + 1], 'w').write({output!r})\n")  # fmt: skip
    script.chmod(0o755)
    return lambda: str(script)


def test_source_compiles_for_arm():
    """With a cross-compiler, where there is one."""
    compiler = "aarch64-linux-gnu-g++"
    if subprocess.run(["which", compiler], capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler} is not installed")
    command = [compiler, *library.FLAGS, "-fsyntax-only", str(library.SOURCE)]
    assert subprocess.run(command, check=False).returncode == 0


def test_embeddings_of_a_block_are_computed_again_for_other_controls():
    model = randomised(small_token_lm(tempo=True))
    state, _ = processed(model, rows=1, length=5, controls=Controls(bpm=torch.tensor([90.0])))
    steps = FusedEngine(model).bind(state, 1)
    slow, fast = (Controls(bpm=torch.tensor([bpm])) for bpm in (90.0, 160.0))
    added = AddedEmbeddings(model)
    found = [added.compute(steps, controls, 0, 4) for controls in (slow, fast, slow)]
    assert torch.equal(found[1], AddedEmbeddings(model).compute(steps, fast, 0, 4)) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
