"""A small checkpoint of the code of arXiv 2601.14786, and that model's forward as an independent reference."""

import torch
import torch.nn.functional as F

K, V, D, N, LAYERS, SPECIAL = 2, 16, 64, 8, 2, 16  # the vocabulary is V + 1
HEADS, INNER = 2, 128


def released_tensors(n_codebooks=K):
    """Random tensors with that code's names and shapes."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=g)

    tensors = {
        "condition_linear.weight": randn(D, 768, scale=0.05),
        "condition_linear.bias": randn(D),
        "condition_norm.weight": 1 + randn(D, scale=0.2),
        "condition_norm.bias": randn(D, scale=0.2),
    }
    for k in range(n_codebooks):
        tensors |= {f"embedding.{k}.weight": randn(V + 1, D), f"lm_head.{k}.weight": randn(V + 1, D, scale=0.1)}
    for i in range(LAYERS):
        mixer, ff = f"backbone.{i}.mamba.mamba", f"backbone.{i}.ff"
        tensors |= {
            f"backbone.{i}.mamba.norm.weight": 1 + randn(D, scale=0.2),
            f"{mixer}.dt_bias": randn(HEADS) - 1,
            f"{mixer}.A_log": randn(HEADS),
            f"{mixer}.D": randn(HEADS),
            f"{mixer}.in_proj.weight": randn(2 * INNER + 2 * N + HEADS, D, scale=D**-0.5),
            f"{mixer}.conv1d.weight": randn(INNER + 2 * N, 1, 4, scale=0.5),
            f"{mixer}.conv1d.bias": randn(INNER + 2 * N, scale=0.2),
            f"{mixer}.norm.weight": 1 + randn(INNER, scale=0.2),
            f"{mixer}.out_proj.weight": randn(D, INNER, scale=INNER**-0.5),
            f"{ff}.norm.weight": 1 + randn(D, scale=0.2),
            f"{ff}.feed_forward.0.weight": randn(2 * D, D, scale=D**-0.5),
            f"{ff}.feed_forward.0.bias": randn(2 * D, scale=0.2),
            f"{ff}.feed_forward.3.weight": randn(D, 2 * D, scale=D**-0.5),
            f"{ff}.feed_forward.3.bias": randn(D, scale=0.2),
        }
    return tensors


def released_forward(tensors, codes, text):
    """That code's forward: codes [B, K, S], T5 states [B, L, 768] -> logits [B, K, S + 1, V']."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    prefix = F.linear(text.double(), w["condition_linear.weight"], w["condition_linear.bias"])
    prefix = F.layer_norm(prefix, (D,), w["condition_norm.weight"], w["condition_norm.bias"], 1e-5)
    x = torch.cat([prefix, sum(w[f"embedding.{k}.weight"][codes[:, k]] for k in range(codes.shape[1]))], 1)
    phases = torch.arange(x.shape[1]).double()[:, None] / 10_000 ** (torch.arange(D // 2) / (D // 2 - 1)).double()
    x = x + torch.cat([phases.cos(), phases.sin()], 1)
    for i in range(LAYERS):
        h = F.rms_norm(x, (D,), w[f"backbone.{i}.mamba.norm.weight"], 1e-5)
        x = x + mamba2({name.rpartition("mamba.mamba.")[2]: w[name] for name in w if f"{i}.mamba.mamba" in name}, h)
        mlp = [w[f"backbone.{i}.ff.feed_forward.{part}"] for part in ("0.weight", "0.bias", "3.weight", "3.bias")]
        h = F.rms_norm(x, (D,), w[f"backbone.{i}.ff.norm.weight"], 1e-5)
        x = x + F.linear(F.gelu(F.linear(h, *mlp[:2])), *mlp[2:])
    x = x[:, prefix.shape[1] - 1 :]
    return torch.stack([x @ w[f"lm_head.{k}.weight"].T for k in range(codes.shape[1])], 1)


def mamba2(w, x):
    """Mamba-2 as a recurrence (arXiv 2405.21060), x [B, T, D]."""
    z, xBC, dt = (x @ w["in_proj.weight"].T).split([INNER, INNER + 2 * N, HEADS], -1)
    padded = F.pad(xBC.transpose(1, 2), (3, 0))
    xBC = F.silu(F.conv1d(padded, w["conv1d.weight"], w["conv1d.bias"], groups=INNER + 2 * N)).transpose(1, 2)
    u, B, C = xBC.split([INNER, N, N], -1)
    u, dt, A = u.unflatten(-1, (HEADS, -1)), F.softplus(dt + w["dt_bias"]), -w["A_log"].exp()
    state, ys = 0, []
    for t in range(x.shape[1]):
        new = dt[:, t, :, None, None] * u[:, t, :, :, None] * B[:, t, None, None, :]  # [B, H, P, N]
        state = (dt[:, t] * A).exp()[..., None, None] * state + new
        ys.append((state * C[:, t, None, None, :]).sum(-1) + w["D"][:, None] * u[:, t])
    gated = torch.stack(ys, 1).flatten(2) * F.silu(z)
    return F.rms_norm(gated, (INNER,), w["norm.weight"], 1e-5) @ w["out_proj.weight"].T


def save_checkpoint(path, tensors, **more):
    """A Lightning checkpoint as that code's trainer writes it."""
    section = {"layers": LAYERS, "vocab_size": V + 1, "codec_layer": K, "d_model": D, "drop_p": 0.3, "d_state": N}
    config = {
        "training": {"name": "x", "batch": 4, "model_size": {"total_params": 0.1}},
        "model": section | {"is_incontext": True} | more,
        "optimizer": {"optim_lr": 1e-4, "betas": (0.9, 0.999)},
    }
    state = {f"music_model.{name}": tensor for name, tensor in tensors.items()}
    content = {
        "epoch": 2,
        "global_step": 500,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state | {"text_encoder.shared.weight": torch.zeros(3, 5)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(500.0)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [{"base_lrs": [1e-4], "lr_lambdas": [None]}],
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.0), "dirpath": "x"}},
        "hyper_parameters": {"config": config},
    }
    torch.save(content, path)
    return path
