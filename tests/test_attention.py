"""Self- and cross-attention: MusicGen's from copied weights, rotary positions, the growing cache, dropout, padding."""

import pytest
import torch
from torch.nn.functional import layer_norm
from transformers import MusicgenDecoderConfig
from transformers.models.musicgen.modeling_musicgen import MusicgenDecoderLayer
from transformers.models.roformer.modeling_roformer import RoFormerSelfAttention, RoFormerSinusoidalPositionalEmbedding

from ssmttm.errors import UserError
from ssmttm.mixers import Attention
from ssmttm.models.cross_attention import CrossAttention
from ssmttm.ops.rotary import rotary

D, T = 24, 37


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def make(kind=Attention, **options):
    torch.manual_seed(0)
    options = {"n_heads": 3, **options}
    return kind(D, **options).double(), torch.randn(4, T, D, dtype=torch.float64)


@pytest.fixture(scope="module")
def musicgen():
    """A decoder layer of MusicGen's in float64, with weights large enough that attention is far from even."""
    torch.manual_seed(0)
    config = MusicgenDecoderConfig(hidden_size=D, num_attention_heads=3, ffn_dim=32, attn_implementation="eager")
    layer = MusicgenDecoderLayer(config, layer_idx=0).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def test_self_attention_equals_musicgen(musicgen):
    attention, x = make()
    attention.load_state_dict(musicgen.self_attn.state_dict())
    causal = torch.full((T, T), -torch.inf, dtype=x.dtype).triu(1)[None, None]
    expected, _ = musicgen.self_attn(x, attention_mask=causal)
    close(attention(x), expected)
    even, _ = musicgen.self_attn(x * 1e-6, attention_mask=causal)
    assert (expected - 1e6 * even).abs().max() > 0.1  # the scores count


def test_cross_attention_equals_musicgen(musicgen):
    attention, x = make(CrossAttention, bias=False)
    attention.load_state_dict(musicgen.encoder_attn.state_dict())
    text, mask = torch.randn(4, 9, D, dtype=x.dtype), torch.arange(9) < torch.tensor([9, 4, 1, 6])[:, None]
    scores = torch.zeros(4, 1, 1, 9, dtype=x.dtype).masked_fill(~mask[:, None, None], -torch.inf)
    expected, _ = musicgen.encoder_attn(x, key_value_states=text, attention_mask=scores)
    close(attention(x, attention.project_keys(text, mask)), expected)


def test_decoder_layer_equals_musicgen(musicgen):
    """Both attentions where they stand in a layer, step by step."""
    (own, x), (cross, _) = make(), make(CrossAttention, bias=False)
    own.load_state_dict(musicgen.self_attn.state_dict())
    cross.load_state_dict(musicgen.encoder_attn.state_dict())
    text, mask = torch.randn(4, 9, D, dtype=x.dtype), torch.ones(4, 9, dtype=torch.bool)
    causal = torch.full((T, T), -torch.inf, dtype=x.dtype).triu(1)[None, None]
    expected = musicgen(x, attention_mask=causal, encoder_hidden_states=text)
    state, keys, outputs = own.init_state(4), cross.project_keys(text, mask), []

    def normed(h, norm):
        return layer_norm(h, (D,), norm.weight, norm.bias)

    with torch.no_grad():
        for column in x.unbind(1):
            h = column + own.step(normed(column, musicgen.self_attn_layer_norm), state)
            h = h + cross.step(normed(h, musicgen.encoder_attn_layer_norm), keys)
            hidden = musicgen.activation_fn(musicgen.fc1(normed(h, musicgen.final_layer_norm)))
            outputs.append(h + musicgen.fc2(hidden))
    close(torch.stack(outputs, 1), expected, 1e-11)


def test_rotary_equals_roformer():
    torch.manual_seed(0)
    x = torch.randn(2, 300, 3, 8)
    table = RoFormerSinusoidalPositionalEmbedding(300, 8)
    angles = table.create_weight()[None, None]  # [1, 1, 300, 8]
    expected, _ = RoFormerSelfAttention.apply_rotary_position_embeddings(angles, x.transpose(1, 2), x.transpose(1, 2))
    close(rotary(x, torch.arange(300)[None]), expected.transpose(1, 2), 1e-4)
    close(rotary(x[:, 7:8], torch.tensor([[7], [7]])), expected.transpose(1, 2)[:, 7:8], 1e-5)
    rounded = rotary(x.bfloat16(), torch.arange(300)[None])
    assert rounded.dtype == torch.bfloat16
    close(rounded.float(), expected.transpose(1, 2), 0.05)  # positions and angles are not rounded


def test_rotary_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    at = [(3, 1), (1003, 1001), (4, 1)]
    scores = [float((rotary(q, torch.tensor([[i]])) * rotary(k, torch.tensor([[j]]))).sum()) for i, j in at]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9) and abs(scores[0] - scores[2]) > 1e-3
    attention, x = make(rotary=True)
    assert (attention(x) - make()[0](x)).abs().max() > 1e-3


def test_attention_cache_holds_rows_of_different_lengths():
    """Each row as if alone: rotary positions and the mask are counted from its own start."""
    attention, x = make(rotary=True)
    lengths = [0, 3, 20, 30]
    mask = torch.arange(30) < torch.tensor(lengths)[:, None]
    state = attention.init_state(4)
    with torch.no_grad():
        attention(x[:, :30], state, mask)
        assert state.lengths.tolist() == lengths and state.longest == 30
        found = torch.cat([attention(x[:, 30:33], state), attention.step(x[:, 33], state)[:, None]], 1)
        for row, length in enumerate(lengths):
            alone = torch.cat([x[row, :length], x[row, 30:34]])[None]
            close(found[row], attention(alone)[0, length:])


def test_attention_cache_grows_by_doubling():
    attention, x = make()
    attention, x = attention.float(), x.float()
    state = attention.init_state(4)
    sizes, moves = [], 0
    for t in range(300):
        place = state.keys.data_ptr()
        attention.step(x[:, t % T], state)
        moves += state.keys.data_ptr() != place
        sizes.append(state.keys.shape[1])
    assert sorted(set(sizes)) == [64, 128, 256, 512] and moves == 3
    assert sizes.index(128) == 64 and sizes.index(256) == 128  # only when it is full
    assert state.longest == 300 and (state.lengths == 300).all() and not state.keys[:, 300:].any()
    copy = state.clone()
    attention.step(x[:, 0], state)
    assert (copy.longest, copy.lengths[0], state.longest) == (300, 300, 301) and not copy.keys[:, 300:].any()


def test_attention_cache_written_rows_bring_their_length():
    """Into an empty cache longer rows than it has slots, then shorter ones over longer."""
    attention, x = make()
    long = torch.cat([x, x, x], 1)  # [4, 111, D]
    state, parts = attention.init_state(4), [attention.init_state(2) for _ in range(2)]
    with torch.no_grad():
        for part, length in zip(parts, (100, 3), strict=True):
            attention(long[:2, :length], part)
        state.write_rows(slice(0, 2), parts[0])
        state.write_rows(slice(2, 4), parts[0])
        assert state.longest == 100
        state.write_rows(slice(2, 4), parts[1])
        for _ in range(2):
            y = attention.step(x[:, 0], state)
            close(y[:2], attention.step(x[:2, 0], parts[0]))
            close(y[2:], attention.step(x[2:, 0], parts[1]))
        state.write_rows(slice(0, 2), parts[1])
        assert state.longest == 5


def test_attention_step_attends_to_whole_blocks():
    """A row's output does not depend, bit for bit, on another row that is a little longer."""
    attention, x = make()
    attention, x = attention.float(), x.float()
    together, alone = attention.init_state(2), attention.init_state(2)
    mask = torch.arange(30) < torch.tensor([[11], [30]])
    attention(x[:2, :30], together, mask)
    attention(x[:2, :30], alone, mask & torch.tensor([[True], [False]]))
    for t in range(30, T):
        assert torch.equal(attention.step(x[:2, t], together)[0], attention.step(x[:2, t], alone)[0])


@pytest.mark.parametrize("kind", [Attention, CrossAttention])
def test_attention_dropout_is_for_training_only(kind):
    attention, x = make(kind, dropout=0.5)
    keys = [attention.project_keys(x[:, :9], torch.ones(4, 9, dtype=torch.bool))] if kind is CrossAttention else []
    assert not torch.equal(attention(x, *keys), attention(x, *keys))
    attention.eval()
    plain = make(kind)[0]
    close(attention(x, *keys), plain(x, *keys))
    if kind is Attention:
        state = attention.init_state(4)
        prefilled = attention(x[:, :30], state)
        close(torch.cat([prefilled, attention(x[:, 30:], state)], 1), plain(x))


def test_attention_cache_may_have_another_dtype():
    attention, x = make()
    attention, x = attention.bfloat16(), x.bfloat16()
    state, same = attention.init_state(4, dtype=torch.float32), attention.init_state(4)
    for each in (state, same):
        attention(x[:, :5], each)
    assert state.keys.dtype == torch.float32 and same.keys.dtype == torch.bfloat16
    for function in (lambda s: attention(x[:, 5:8], s), lambda s: attention.step(x[:, 8], s)):
        found, expected = function(state), function(same)
        assert found.dtype == torch.bfloat16
        close(found.float(), expected.float(), 0.02)


def test_attention_parameters_and_biases():
    released = Attention(1024, out_bias=True)  # of the cross-attending Transformer of arXiv 2601.14786
    assert sum(p.numel() for p in released.parameters()) == 4_195_328
    biases = {name for name, _ in Attention(D, 3, bias=True).named_parameters() if name.endswith("bias")}
    assert biases == {"q_proj.bias", "k_proj.bias", "v_proj.bias"}


@pytest.mark.parametrize("where", ["left", "right", "scattered"])
def test_cross_attention_padding_changes_nothing(where):
    attention, x = make(CrossAttention)
    slots = {"left": [5, 6, 7, 8], "right": [0, 1, 2, 3], "scattered": [1, 4, 5, 8]}[where]
    text = torch.randn(4, 4, D, dtype=x.dtype)
    padded, mask = torch.full((4, 9, D), 1e3, dtype=x.dtype), torch.zeros(4, 9, dtype=torch.bool)
    padded[:, slots], mask[:, slots] = text, True
    plain = attention.project_keys(text, torch.ones(4, 4, dtype=torch.bool))
    close(attention(x, attention.project_keys(padded, mask)), attention(x, plain))
    close(attention.step(x[:, 0], attention.project_keys(padded, mask)), attention(x, plain)[:, 0])


def test_cross_attention_uses_text_and_gives_zero_without():
    attention, x = make(CrossAttention, bias=False)
    text = torch.randn(4, 9, D, dtype=x.dtype, requires_grad=True)
    mask = torch.arange(9) < torch.tensor([9, 4, 0, 6])[:, None]
    y = attention(x, attention.project_keys(text, mask))
    fewer = attention(x, attention.project_keys(text, mask & (torch.arange(9) != 2)))
    assert ((y - fewer).abs().amax(2)[[0, 1, 3]] > 1e-6).all()
    assert y.isfinite().all() and not y[2].any() and not attention(x, attention.init_state(4)).any()
    y.square().sum().backward()
    assert text.grad.isfinite().all() and not text.grad[~mask].any() and text.grad[mask].any(-1).all()
    assert all(p.grad.isfinite().all() for p in attention.parameters())


def test_cross_attention_written_rows_serve_as_alone():
    attention, x = make(CrossAttention)
    state = attention.init_state(4)
    for row, length in ((0, 200), (1, 3), (2, 0), (3, 9)):
        part = attention.project_keys(torch.randn(1, length, D, dtype=x.dtype), torch.ones(1, length, dtype=torch.bool))
        state.write_rows(slice(row, row + 1), part)
        expected = attention(x[row : row + 1], part) if length else attention(x[2:3], attention.init_state(1))
        close(attention(x, state)[row : row + 1], expected)
    shorter = attention.project_keys(x[:1, :2], torch.ones(1, 2, dtype=torch.bool))
    state.write_rows(slice(0, 1), shorter)
    close(attention(x, state)[:1], attention(x[:1], shorter))


def test_attention_rejects_invalid_options():
    for kind in (Attention, CrossAttention):
        with pytest.raises(UserError, match="n_heads must divide d_model = 24, got 5"):
            kind(D, 5)
        with pytest.raises(UserError, match="n_heads"):
            kind(D, 0)
    with pytest.raises(UserError, match="even head width, got d_model / n_heads = 3"):
        Attention(D, 8, rotary=True)
    attention, x = make(CrossAttention)
    with pytest.raises(UserError, match="the state has batch size 2, the input 4"):
        attention(x, attention.init_state(2))
