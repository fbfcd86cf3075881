"""A student decoder's first weights, cut from its codec's decoder: the channels that are most active are kept.

A `SpectralDecoder` is cut from a `TinyCodec`, a `ConvDecoder` from a DAC. The projections of the codebooks and what
follows them become one `LatentConv`. With equal sizes the student decodes as its teacher does, to rounding.
Shapes: B batch, K codebooks of width c, T frames, D and D' channels of teacher and student.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmttm.codecs import Codec, StudentCodec, TinyCodec
from ssmttm.codecs.spectral import ConvNeXtBlock, Stack
from ssmttm.codecs.students.decoders import ConvDecoder, SpectralDecoder
from ssmttm.distill.channels import most
from ssmttm.distill.layer_map import layer_map
from ssmttm.errors import UserError


@torch.no_grad()
def transfer_decoder(teacher: Codec, student: StudentCodec, batches: Sequence[Tensor]) -> list[str]:
    """Fill a student's decoder with what it can take from its teacher's.

    Args:
        teacher: the codec whose codes the student decodes.
        batches: codes [B, K, T] by which the activity of channels is measured.

    Returns:
        The names of the student's parameters that were set: none where the kinds of decoders differ.

    Raises:
        UserError: the student is wider or deeper somewhere, or differs where nothing can be cut.
    """
    decoder = student.decoder
    if isinstance(teacher, TinyCodec) and isinstance(decoder, SpectralDecoder):
        taken = _cut_spectral(teacher, decoder, batches)
    elif isinstance(decoder, ConvDecoder) and _is_dac(teacher):
        taken = _cut_conv(teacher, decoder, batches)
    else:
        return []
    for name, value in taken.items():
        parameter = decoder.get_parameter(name)
        assert parameter.shape == value.shape, (name, parameter.shape, value.shape)
        parameter.copy_(value)
    return [f"decoder.{name}" for name in taken]


def channel_energy(
    teacher: Codec, batches: Sequence[Tensor], probes: Mapping[str, Sequence[nn.Module]], axis: int
) -> dict[str, Tensor]:
    """Mean squares, channel by channel, of what goes into modules while the teacher decodes.

    Args:
        probes: by name, the modules whose inputs are added up.
        axis: of the channels in these inputs.

    Returns:
        By name, [D].
    """
    energies: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            energy = inputs[0].float().square().movedim(axis, -1).flatten(0, -2).mean(0)
            energies[name] = energies.get(name, 0) + energy

        return hook

    _watched(teacher, batches, {module: note(name) for name, modules in probes.items() for module in modules})
    return energies


def _watched(teacher: Codec, batches: Sequence[Tensor], hooks: Mapping[nn.Module, Callable[..., None]]) -> None:
    """Decode batches of codes while each module's hook sees what goes into it."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        for codes in batches:
            teacher.decode(codes)
    finally:
        for handle in handles:
            handle.remove()


# --- TinyCodec to SpectralDecoder ---------------------------------------------------------------------------------


def _cut_spectral(teacher: TinyCodec, decoder: SpectralDecoder, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    _check_spectral(teacher, decoder)
    stacks = {"coarse": teacher.decoder_coarse, "fine": teacher.decoder_fine}
    sources = {name: _mapped(stacks[name], getattr(decoder, name)) for name in stacks}
    blocks = [block for of_stack in sources.values() for block in of_stack]
    probes = {"coarse": [*teacher.decoder_coarse, teacher.up], "fine": [*teacher.decoder_fine, teacher.head]}
    probes |= {f"hidden {index}": [block.contract] for index, block in enumerate(blocks)}
    energies = channel_energy(teacher, batches, probes, axis=-1)
    width, hidden_width = decoder.config.width, decoder.config.width * decoder.config.expansion
    kept = {name: most(energies[name], len(energies[name]), width) for name in stacks}  # [D'] each
    hidden = [most(e, len(e), hidden_width) for e in (energies[f"hidden {i}"] for i in range(len(blocks)))]
    norms = {block.norm: kept[name] for name, of_stack in sources.items() for block in of_stack}
    fitted = _fitted_norms(teacher, batches, norms | {teacher.head.norm: kept["fine"]})

    widen, quantiser = teacher.widen.weight[kept["coarse"]], teacher.quantiser
    columns = [torch.cat([p.weight, p.bias[:, None]], 1) for p in quantiser.project_out]  # [width, c + 1] each
    first = torch.cat([widen @ column for column in columns], 1)[..., None]  # [D', all K (c + 1), 1]
    taken = {"first.weight": first[:, : decoder.first.in_channels], "first.bias": teacher.widen.bias[kept["coarse"]]}
    for name, of_stack in sources.items():
        for index, block in enumerate(of_stack):
            cut = _cut_block(block, kept[name], hidden.pop(0), fitted[block.norm])
            taken |= {f"{name}.{index}.{key}": value for key, value in cut.items()}
    up = teacher.up.weight.unflatten(0, (2, -1))[:, kept["fine"]][..., kept["coarse"]]  # [2, D', D']
    taken |= {"up.weight": up.flatten(0, 1), "up.bias": teacher.up.bias.view(2, -1)[:, kept["fine"]].flatten()}
    taken["head.norm.weight"], taken["head.norm.bias"] = fitted[teacher.head.norm]
    head = teacher.head.project
    return taken | {"head.project.weight": head.weight[:, kept["fine"]], "head.project.bias": head.bias}


def _check_spectral(teacher: TinyCodec, decoder: SpectralDecoder) -> None:
    ours, theirs = decoder.config, teacher.config
    equal = {
        "kernel": (ours.kernel, theirs.kernel), "look_ahead": (ours.look_ahead, theirs.decoder_look_ahead),
        "upsampling": (ours.upsampling, 2), "window": (len(decoder.head.stft.window), theirs.window),
    }  # fmt: skip
    for key, (own, wanted) in equal.items():
        if own != wanted:
            raise UserError(_unlike(key, own, wanted))
    at_most = {
        "width": (ours.width, theirs.decoder_width),
        "width * expansion": (ours.width * ours.expansion, theirs.decoder_width * theirs.expansion),
        **{f"blocks[{i}]": (ours.blocks[i], theirs.decoder_blocks[i]) for i in (0, 1)},
    }  # fmt: skip
    for key, (own, most_) in at_most.items():
        if own > most_:
            raise UserError(_too_large(key, own, most_))


def _mapped(teacher: Stack, student: Stack) -> list[ConvNeXtBlock]:
    """The teacher's block for each of the student's, evenly."""
    return [teacher[number - 1] for number in layer_map("even", len(student), len(teacher))]


def _cut_block(
    block: ConvNeXtBlock, kept: Tensor, hidden: Tensor, norm: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    return {
        "depthwise.weight": block.depthwise.weight[kept], "depthwise.bias": block.depthwise.bias[kept],
        "norm.weight": norm[0], "norm.bias": norm[1],
        "expand.weight": block.expand.weight[hidden][:, kept], "expand.bias": block.expand.bias[hidden],
        "contract.weight": block.contract.weight[kept][:, hidden], "contract.bias": block.contract.bias[kept],
        "scale": block.scale[kept],
    }  # fmt: skip


def _fitted_norms(
    teacher: TinyCodec, batches: Sequence[Tensor], norms: Mapping[nn.LayerNorm, Tensor]
) -> dict[nn.LayerNorm, tuple[Tensor, Tensor]]:
    """Weight and bias [D'] of norms over the kept channels alone, so that these come out as of the norm over all: on
    average, as mean and spread over fewer channels are others."""
    seen: dict[nn.LayerNorm, list[Tensor]] = {norm: [] for norm in norms}

    def look(norm: nn.LayerNorm, inputs: tuple[Tensor]) -> None:
        (x,), few = inputs, inputs[0][..., norms[norm]]
        spread, of_few = (v.var(-1, correction=0).add(norm.eps).sqrt() for v in (x, few))
        seen[norm].append(torch.stack([of_few / spread, (few.mean(-1) - x.mean(-1)) / spread]).flatten(1).mean(1))

    _watched(teacher, batches, dict.fromkeys(norms, look))
    fitted = {}
    for norm, kept in norms.items():
        ratio, shift = torch.stack(seen[norm]).mean(0)
        weight = norm.weight[kept]
        fitted[norm] = weight * ratio, norm.bias[kept] + weight * shift
    return fitted


# --- DAC to ConvDecoder -------------------------------------------------------------------------------------------


def _is_dac(codec: Codec) -> bool:
    from ssmttm.codecs.hf import DacCodec  # transformers' models are slow to import

    return isinstance(codec, DacCodec)


def _cut_conv(teacher: Any, decoder: ConvDecoder, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """teacher: a DacCodec."""
    config, theirs = teacher.model.config, teacher.model.decoder
    if decoder.config.ratios != tuple(config.upsampling_ratios):
        raise UserError(_unlike("ratios", list(decoder.config.ratios), list(config.upsampling_ratios)))
    if decoder.config.width > config.decoder_hidden_size:
        raise UserError(_too_large("width", decoder.config.width, config.decoder_hidden_size))
    after = [*theirs.block[1:], theirs.snake1]
    probes = {"stream 0": [theirs.block[0]]}
    for i, block in enumerate(theirs.block):
        units = [block.res_unit1, block.res_unit2, block.res_unit3]
        probes[f"stream {i + 1}"] = [*units, after[i]]
        probes |= {f"unit {i} {u}": [unit.conv2] for u, unit in enumerate(units)}
    energies = channel_energy(teacher, batches, probes, axis=1)
    kept = [most(e, len(e), n) for n, e in ((n, energies[f"stream {i}"]) for i, n in enumerate(decoder.config.widths))]

    layers = teacher.model.quantizer.quantizers[: len(decoder.conv1.weight[0]) // (decoder.conv1.codebook_dim + 1)]
    columns = [torch.cat([la.out_proj.weight[..., 0], la.out_proj.bias[:, None]], 1) for la in layers]  # [., c + 1]
    first = torch.einsum("dhj,hc->dcj", theirs.conv1.weight[kept[0]], torch.cat(columns, 1))  # [D', K (c + 1), 7]
    taken = {"conv1.weight": first, "conv1.bias": theirs.conv1.bias[kept[0]]}
    for i, block in enumerate(theirs.block):
        stream = kept[i + 1]
        cut = {
            "snake1.alpha": block.snake1.alpha[:, kept[i]],
            "conv_t1.weight": block.conv_t1.weight[kept[i]][:, stream], "conv_t1.bias": block.conv_t1.bias[stream],
        }  # fmt: skip
        for u, unit in enumerate([block.res_unit1, block.res_unit2, block.res_unit3]):
            energy = energies[f"unit {i} {u}"]
            inner = stream if decoder.config.depthwise else most(energy, len(energy), len(stream))
            of_unit = _cut_unit(unit, stream, inner, decoder.config.depthwise)
            cut |= {f"res_unit{u + 1}.{key}": value for key, value in of_unit.items()}
        taken |= {f"block.{i}.{key}": value for key, value in cut.items()}
    return taken | {
        "snake1.alpha": theirs.snake1.alpha[:, kept[-1]],
        "conv2.weight": theirs.conv2.weight[:, kept[-1]], "conv2.bias": theirs.conv2.bias,
    }  # fmt: skip


def _cut_unit(unit: nn.Module, stream: Tensor, inner: Tensor, depthwise: bool) -> dict[str, Tensor]:
    """A depthwise unit keeps what each channel takes from itself."""
    taps = unit.conv1.weight[stream, stream][:, None] if depthwise else unit.conv1.weight[inner][:, stream]
    return {
        "snake1.alpha": unit.snake1.alpha[:, stream], "conv1.weight": taps, "conv1.bias": unit.conv1.bias[inner],
        "snake2.alpha": unit.snake2.alpha[:, inner],
        "conv2.weight": unit.conv2.weight[stream][:, inner], "conv2.bias": unit.conv2.bias[stream],
    }  # fmt: skip


def _unlike(key: str, own: Any, wanted: Any) -> str:
    return (
        f"codec_student.{key} is {own}, its teacher's {wanted}, and no weights can be cut from it: set the teacher's, "
        "or codec_student.transfer=false"
    )


def _too_large(key: str, own: int, most_: int) -> str:
    return (
        f"codec_student.{key} is {own}, its teacher's {most_}: weights are cut, not grown; give as much or less, or "
        "set codec_student.transfer=false"
    )
