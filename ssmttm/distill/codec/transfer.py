"""Initial weights of a student decoder, sliced from its teacher's by channel energy.

A `SpectralDecoder` is sliced from a `TinyCodec`, a `ConvDecoder` from a DAC. The codebook projections and the layer
after them are merged into one `LatentConv`. With equal sizes the student decodes as its teacher does, up to rounding.
Shapes: B batch, K codebooks of width c, T frames, D and D' channels of teacher and student.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmttm.codecs import Codec, StudentCodec, TinyCodec
from ssmttm.codecs.students.decoders import ConvDecoder, SpectralDecoder
from ssmttm.distill.channels import input_energy, top_channels
from ssmttm.distill.layer_map import layer_map
from ssmttm.errors import UserError


@torch.no_grad()
def transfer_decoder(teacher: Codec, student: StudentCodec, batches: Sequence[Tensor]) -> list[str]:
    """Initialise a student's decoder from its teacher's, with channel energies measured on batches of codes [B, K, T].
    Returns the names of the parameters that were set: none if the decoders are of different kinds."""
    decoder = student.decoder
    if isinstance(teacher, TinyCodec) and isinstance(decoder, SpectralDecoder):
        weights = _slice_spectral(teacher, decoder, batches)
    elif isinstance(decoder, ConvDecoder) and _is_dac(teacher):
        weights = _slice_conv(teacher, decoder, batches)
    else:
        return []
    for name, value in weights.items():
        parameter = decoder.get_parameter(name)
        assert parameter.shape == value.shape, (name, parameter.shape, value.shape)
        parameter.copy_(value)
    return [f"decoder.{name}" for name in weights]


def _decode(teacher: Codec, batches: Sequence[Tensor]) -> None:
    for codes in batches:
        teacher.decode(codes)


# --- TinyCodec to SpectralDecoder ---------------------------------------------------------------------------------


def _slice_spectral(teacher: TinyCodec, decoder: SpectralDecoder, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    _check_spectral(teacher, decoder)
    stacks = {"coarse": teacher.decoder_coarse, "fine": teacher.decoder_fine}
    blocks: dict[str, Any] = {}  # by the student's names
    for name, stack in stacks.items():
        numbers = layer_map("even", len(getattr(decoder, name)), len(stack))
        blocks |= {f"{name}.{index}": stack[number - 1] for index, number in enumerate(numbers)}
    inputs = {"coarse": [*teacher.decoder_coarse, teacher.up], "fine": [*teacher.decoder_fine, teacher.head]}
    inputs |= {name: [block.contract] for name, block in blocks.items()}
    energies = input_energy(inputs, lambda: _decode(teacher, batches))
    width, hidden_width = decoder.config.width, decoder.config.width * decoder.config.expansion
    kept = {name: top_channels(energies[name], width) for name in stacks}  # [D'] each
    coarse, fine = kept["coarse"], kept["fine"]
    norms = {block.norm: kept[name.split(".")[0]] for name, block in blocks.items()}
    fitted = _fit_norms(teacher, batches, norms | {teacher.head.norm: fine})

    widen = teacher.widen.weight[coarse]
    project_out: Any = teacher.quantiser.project_out
    columns = [widen @ torch.cat([linear.weight, linear.bias[:, None]], 1) for linear in project_out]  # [D', c + 1]
    up_weight = teacher.up.weight.unflatten(0, (2, -1))[:, fine][..., coarse]  # [2, D', D']
    head = teacher.head.project
    weights = {
        "first.weight": torch.cat(columns, 1)[:, : decoder.first.in_channels, None],
        "first.bias": teacher.widen.bias[coarse],
        "up.weight": up_weight.flatten(0, 1),
        "up.bias": teacher.up.bias.view(2, -1)[:, fine].flatten(),
        "head.norm.weight": fitted[teacher.head.norm][0], "head.norm.bias": fitted[teacher.head.norm][1],
        "head.project.weight": head.weight[:, fine], "head.project.bias": head.bias,
    }  # fmt: skip
    for name, block in blocks.items():
        hidden = top_channels(energies[name], hidden_width)
        sliced = _slice_block(block, kept[name.split(".")[0]], hidden, fitted[block.norm])
        weights |= {f"{name}.{key}": value for key, value in sliced.items()}
    return weights


def _check_spectral(teacher: TinyCodec, decoder: SpectralDecoder) -> None:
    ours, theirs = decoder.config, teacher.config
    _check_equal("kernel", ours.kernel, theirs.kernel)
    _check_equal("look_ahead", ours.look_ahead, theirs.decoder_look_ahead)
    _check_equal("upsampling", ours.upsampling, 2)
    _check_equal("window", len(decoder.head.stft.window), theirs.window)
    _check_at_most("width", ours.width, theirs.decoder_width)
    _check_at_most("width * expansion", ours.width * ours.expansion, theirs.decoder_width * theirs.expansion)
    for i in (0, 1):
        _check_at_most(f"blocks[{i}]", ours.blocks[i], theirs.decoder_blocks[i])


def _slice_block(block: Any, kept: Tensor, hidden: Tensor, norm: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """A ConvNeXtBlock."""
    return {
        "depthwise.weight": block.depthwise.weight[kept], "depthwise.bias": block.depthwise.bias[kept],
        "norm.weight": norm[0], "norm.bias": norm[1],
        "expand.weight": block.expand.weight[hidden][:, kept], "expand.bias": block.expand.bias[hidden],
        "contract.weight": block.contract.weight[kept][:, hidden], "contract.bias": block.contract.bias[kept],
        "scale": block.scale[kept],
    }  # fmt: skip


def _fit_norms(
    teacher: TinyCodec, batches: Sequence[Tensor], norms: Mapping[nn.LayerNorm, Tensor]
) -> dict[nn.LayerNorm, tuple[Tensor, Tensor]]:
    """Weight and bias [D'] of layer norms over the kept channels that on average reproduce the norm over all: mean and
    standard deviation of fewer channels differ."""
    statistics: dict[nn.LayerNorm, list[Tensor]] = {norm: [] for norm in norms}

    def measure(norm: nn.LayerNorm, inputs: tuple[Tensor]) -> None:
        x, kept = inputs[0], inputs[0][..., norms[norm]]
        std, kept_std = (v.var(-1, correction=0).add(norm.eps).sqrt() for v in (x, kept))
        ratio, shift = kept_std / std, (kept.mean(-1) - x.mean(-1)) / std
        statistics[norm].append(torch.stack([ratio, shift]).flatten(1).mean(1))

    with contextlib.ExitStack() as hooks:
        for norm in norms:
            hooks.enter_context(norm.register_forward_pre_hook(measure))
        _decode(teacher, batches)
    fitted = {}
    for norm, kept in norms.items():
        ratio, shift = torch.stack(statistics[norm]).mean(0)
        weight = norm.weight[kept]
        fitted[norm] = weight * ratio, norm.bias[kept] + weight * shift
    return fitted


# --- DAC to ConvDecoder -------------------------------------------------------------------------------------------


def _is_dac(codec: Codec) -> bool:
    from ssmttm.codecs.hf import DacCodec  # transformers' models are slow to import

    return isinstance(codec, DacCodec)


def _slice_conv(teacher: Any, decoder: Any, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """From a DacCodec to a ConvDecoder."""
    config, theirs = teacher.model.config, teacher.model.decoder
    _check_equal("ratios", list(decoder.config.ratios), list(config.upsampling_ratios))
    _check_at_most("width", decoder.config.width, config.decoder_hidden_size)
    units = [[block.res_unit1, block.res_unit2, block.res_unit3] for block in theirs.block]
    inputs = {"0": [theirs.block[0]]}  # "i": residual channels before block i; "i.u": inside its unit u
    for i, following in enumerate([*theirs.block[1:], theirs.snake1]):
        inputs[f"{i + 1}"] = [*units[i], following]
        inputs |= {f"{i}.{u}": [unit.conv2] for u, unit in enumerate(units[i])}
    energies = input_energy(inputs, lambda: _decode(teacher, batches), axis=1)
    kept = [top_channels(energies[f"{i}"], width) for i, width in enumerate(decoder.config.widths)]

    n_codebooks = len(decoder.conv1.weight[0]) // (decoder.conv1.codebook_dim + 1)
    layers = teacher.model.quantizer.quantizers[:n_codebooks]
    columns = [torch.cat([la.out_proj.weight[..., 0], la.out_proj.bias[:, None]], 1) for la in layers]  # [., c + 1]
    first = torch.einsum("dhj,hc->dcj", theirs.conv1.weight[kept[0]], torch.cat(columns, 1))  # [D', K (c + 1), 7]
    weights = {
        "conv1.weight": first, "conv1.bias": theirs.conv1.bias[kept[0]],
        "snake1.alpha": theirs.snake1.alpha[:, kept[-1]],
        "conv2.weight": theirs.conv2.weight[:, kept[-1]], "conv2.bias": theirs.conv2.bias,
    }  # fmt: skip
    for i, block in enumerate(theirs.block):
        before, after = kept[i], kept[i + 1]
        sliced = {
            "snake1.alpha": block.snake1.alpha[:, before],
            "conv_t1.weight": block.conv_t1.weight[before][:, after], "conv_t1.bias": block.conv_t1.bias[after],
        }  # fmt: skip
        for u, unit in enumerate(units[i]):
            inner = after if decoder.config.depthwise else top_channels(energies[f"{i}.{u}"], len(after))
            of_unit = _slice_unit(unit, after, inner, decoder.config.depthwise)
            sliced |= {f"res_unit{u + 1}.{key}": value for key, value in of_unit.items()}
        weights |= {f"block.{i}.{key}": value for key, value in sliced.items()}
    return weights


def _slice_unit(unit: Any, outer: Tensor, inner: Tensor, depthwise: bool) -> dict[str, Tensor]:
    """A residual unit; a depthwise one keeps the diagonal of the convolution."""
    taps = unit.conv1.weight[outer, outer][:, None] if depthwise else unit.conv1.weight[inner][:, outer]
    return {
        "snake1.alpha": unit.snake1.alpha[:, outer], "conv1.weight": taps, "conv1.bias": unit.conv1.bias[inner],
        "snake2.alpha": unit.snake2.alpha[:, inner],
        "conv2.weight": unit.conv2.weight[outer][:, inner], "conv2.bias": unit.conv2.bias[outer],
    }  # fmt: skip


def _check_equal(key: str, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        raise UserError(
            f"weight transfer needs codec_student.{key}={theirs}, as of the teacher, got {ours}: change it, or set "
            "codec_student.transfer=false"
        )


def _check_at_most(key: str, ours: int, theirs: int) -> None:
    if ours > theirs:
        raise UserError(
            f"codec_student.{key} is {ours}, its teacher's {theirs}: weights are cut, not grown; choose at most "
            f"{theirs}, or set codec_student.transfer=false"
        )
