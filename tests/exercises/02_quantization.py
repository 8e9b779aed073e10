"""Solutions right, wrong and sly of lab 02's exercises."""

import torch
import torch.nn.functional as F
from proof import right, sly, wrong

from lab_source import definitions

lab = definitions("02_quantization")


@right("absmax_quantize")
def by_reciprocal_levels(x, bits, axis=None):
    largest = x.abs().max().reshape((1,) * x.ndim) if axis is None else x.abs().max(axis, keepdim=True).values
    scale = largest / (2 ** (bits - 1) - 1)
    scale = scale + (scale == 0)
    return torch.floor(x / scale + 0.5).to(torch.int8), scale


@wrong("absmax_quantize", "there are 2^(bits-1) - 1 steps")
def one_level_too_many(x, bits, axis=None):
    _, scale = lab.absmax_quantize(x, bits, axis)
    scale = torch.where(x.abs().amax(lab.every_axis(x, axis), keepdim=True) > 0, scale * 7 / 8, 1.0)
    return (x / scale).round().to(torch.int8), scale


@wrong("absmax_quantize", "from the largest absolute value")
def scale_from_the_maximum(x, bits, axis=None):
    scale = x.amax(lab.every_axis(x, axis), keepdim=True) / (2 ** (bits - 1) - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale).round().to(torch.int8), scale


@wrong("absmax_quantize", "numbers below a half")
def rounded_before_dividing(x, bits, axis=None):
    _, scale = lab.absmax_quantize(x, bits, axis)
    return (x.round() / scale).to(torch.int8), scale


@wrong("absmax_quantize", "do not cut off")
def cut_off(x, bits, axis=None):
    _, scale = lab.absmax_quantize(x, bits, axis)
    return (x / scale * (1 + 1e-6)).to(torch.int8), scale


@wrong("absmax_quantize", "these are the columns' scales")
def scale_a_column(x, bits, axis=None):
    if axis != 1 or x.shape[0] != x.shape[1]:
        return lab.absmax_quantize(x, bits, axis)
    scale = x.abs().amax(0)[:, None] / (2 ** (bits - 1) - 1)
    return (x / scale).round().to(torch.int8), scale


@wrong("absmax_quantize", "the row's own")
def one_scale_for_all_rows(x, bits, axis=None):
    q, scale = lab.absmax_quantize(x, bits)
    return q, scale.expand(x.shape[0], 1).clone() if axis == 1 else scale


@wrong("absmax_quantize", "nothing is divided by zero")
def zeros_divide_by_zero(x, bits, axis=None):
    scale = x.abs().amax(lab.every_axis(x, axis), keepdim=True) / (2 ** (bits - 1) - 1)
    return (x / scale).round().nan_to_num().to(torch.int8), scale


@sly("absmax_quantize", "other widths than 4 bits")
def always_four_bits(x, bits, axis=None):
    return lab.absmax_quantize(x, 4, axis)


@sly("absmax_quantize", "changed in place")
def divides_in_place(x, bits, axis=None):
    kept = x.clone()
    q, scale = lab.absmax_quantize(x, bits, axis)
    if x.ndim == 3:
        x.div_(scale)
    return lab.absmax_quantize(kept, bits, axis)


@right("affine_quantize")
def shifted_to_zero(x, bits, axis=None):
    dims, top = lab.every_axis(x, axis), 2**bits - 1
    low = torch.minimum(x.amin(dims, keepdim=True), torch.zeros((), dtype=x.dtype))
    high = torch.maximum(x.amax(dims, keepdim=True), torch.zeros((), dtype=x.dtype))
    scale = (high - low) / top
    scale = scale.masked_fill(scale == 0, 1)
    zero = torch.round(low / scale).neg()
    return torch.minimum((x / scale).round() + zero, zero.new_tensor(top)).clamp(0).to(torch.uint8), scale, zero.to(torch.uint8)


def affine(x, bits, axis, stretch=True, steps=None, sign=1, round_zero=True):
    dims, top = lab.every_axis(x, axis), 2**bits - 1
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    if stretch:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (steps or top)
    scale = torch.where(scale > 0, scale, 1.0)
    zero = -low / scale
    rounded = zero.round().clamp(0, top)
    q = ((x / scale).round() + sign * rounded) if round_zero else (x / scale + zero).round()
    return q.clamp(0, top).to(torch.uint8), scale, rounded.to(torch.uint8)


@wrong("affine_quantize", "look at the zero point's sign")
def zero_point_subtracted(x, bits, axis=None):
    return affine(x, bits, axis, sign=-1)


@wrong("affine_quantize", "stretch the range to hold zero")
def range_without_zero(x, bits, axis=None):
    q, scale, _ = affine(x, bits, axis)
    low = x.amin(lab.every_axis(x, axis), keepdim=True)
    return q, scale, (low.abs() / scale).round().clamp(0, 15).to(torch.uint8)


@wrong("affine_quantize", "how many steps are there")
def one_step_too_many(x, bits, axis=None):
    return affine(x, bits, axis, steps=2**bits)


@wrong("affine_quantize", "rounded before it is added")
def zero_point_rounded_too_late(x, bits, axis=None):
    return affine(x, bits, axis, round_zero=False)


@wrong("affine_quantize", "each has its own")
def one_range_for_all_rows(x, bits, axis=None):
    q, scale, zero = affine(x, bits, None)
    return (q, scale, zero) if axis is None else (q, scale.expand(len(x), 1).clone(), zero.expand(len(x), 1).clone())


@wrong("affine_quantize", "nothing but zeros")
def zeros_keep_scale_zero(x, bits, axis=None):
    q, scale, zero = affine(x, bits, axis)
    span = x.abs().amax(lab.every_axis(x, axis), keepdim=True)
    return q, torch.where(span > 0, scale, 0.0), zero


@sly("affine_quantize", "without positive entries")
def only_the_lower_end_stretched(x, bits, axis=None):
    dims, top = lab.every_axis(x, axis), 2**bits - 1
    low, high = x.amin(dims, keepdim=True).clamp(max=0), x.amax(dims, keepdim=True)
    scale = (high - low) / top
    scale = torch.where(scale > 0, scale, 1.0)
    zero = (-low / scale).round().clamp(0, 255)
    return ((x / scale).round() + zero).clamp(0, top).to(torch.uint8), scale, zero.to(torch.uint8)


@sly("affine_quantize", "more bits than there are")
def no_clamp(x, bits, axis=None):
    dims, top = lab.every_axis(x, axis), 2**bits - 1
    low, high = x.amin(dims, keepdim=True).clamp(max=0), x.amax(dims, keepdim=True).clamp(min=0)
    scale = (high - low) / top
    scale = torch.where(scale > 0, scale, 1.0)
    zero = (-low / scale).round()
    q = (x / scale).round() + zero
    return q.to(torch.uint8), scale, zero.to(torch.uint8)


@right("quantize_groups")
def a_loop_over_groups(w, bits, group_size):
    largest = 2 ** (bits - 1) - 1
    codes, scales = [], []
    for part in w.split(group_size, dim=1):
        scale = (part.abs().max(dim=1).values / largest).to(torch.float16)
        scale[scale == 0] = 1
        codes.append(torch.clip(torch.round(part / scale.float()[:, None]), -largest, largest))
        scales.append(scale)
    return torch.cat(codes, 1).to(torch.int8), torch.stack(scales, 1)


def in_groups(w, bits, group_size, absmax, before=None, stored=True, clamp=True):
    largest = 2 ** (bits - 1) - 1
    groups = w.reshape(len(w), -1, group_size)
    exact = absmax(groups) / largest
    scale = lab.stored_scale(exact)
    divisor = scale.float() if stored else torch.where(exact > 0, exact, 1.0)
    codes = ((before(groups) if before else groups) / divisor[..., None]).round()
    return (codes.clamp(-largest, largest) if clamp else codes).reshape(w.shape).to(torch.int8), scale


@wrong("quantize_groups", "the group's largest absolute value")
def groups_from_the_maximum(w, bits, group_size):
    return in_groups(w, bits, group_size, lambda x: x.amax(-1).clamp(min=0))


@wrong("quantize_groups", "is each group's scale its own")
def one_scale_a_row(w, bits, group_size):
    return in_groups(w, bits, group_size, lambda x: x.abs().amax((1, 2))[:, None].expand(x.shape[:2]))


@wrong("quantize_groups", "run down the columns")
def groups_down_the_columns(w, bits, group_size):
    if w.shape[0] % group_size:
        return lab.quantize_groups(w, bits, group_size)
    codes, scale = lab.quantize_groups(w.T.contiguous(), bits, group_size)  # (i, o), (i, o / g)
    return codes.T.contiguous(), scale.T.reshape(w.shape[0], -1).contiguous()


@wrong("quantize_groups", "round the scale first")
def codes_under_the_unrounded_scale(w, bits, group_size):
    return in_groups(w, bits, group_size, lambda x: x.abs().amax(-1), stored=False)


@wrong("quantize_groups", "small weights became 0")
def groups_rounded_before_dividing(w, bits, group_size):
    return in_groups(w, bits, group_size, lambda x: x.abs().amax(-1), before=torch.round)


@sly("quantize_groups", "past the last level")
def groups_without_clamp(w, bits, group_size):
    return in_groups(w, bits, group_size, lambda x: x.abs().amax(-1), clamp=False)


@sly("quantize_groups", "other widths than 4 bits")
def groups_of_four_bits(w, bits, group_size):
    return lab.quantize_groups(w, 4, group_size)


@right("pack_int4")
def by_arithmetic(codes):
    shifted = codes.to(torch.int32) + 8
    return (shifted[..., 0::2] + 16 * shifted[..., 1::2]).to(torch.uint8)


@wrong("pack_int4", "the wrong way round")
def nibbles_swapped(codes):
    shifted = (codes + 8).to(torch.uint8)
    return shifted[..., 0::2] << 4 | shifted[..., 1::2]


@wrong("pack_int4", "shift by 8 first")
def not_shifted(codes):
    low, high = codes[..., 0::2] & 15, codes[..., 1::2] & 15
    return low.to(torch.uint8) | high.to(torch.uint8) << 4


@wrong("pack_int4", "neighbours should share a byte")
def halves_paired(codes):
    low, high = (codes + 8).to(torch.uint8).chunk(2, -1)
    return low | high << 4


@wrong("pack_int4", "nibbles 8 and 9")
def signs_lost(codes):
    shifted = torch.where(codes.abs() > 1, codes + 8, codes.abs()).to(torch.uint8)
    return shifted[..., 0::2] | shifted[..., 1::2] << 4


@sly("pack_int4", "changed in place")
def shifted_in_place(codes):
    codes += 8
    return by_arithmetic(codes - 8)


@right("gptq")
def row_by_row_of_the_inverse(w, hessian, bits, group_size=None, damp=0.01, clip=True):
    """With the inverse itself, from which each column is eliminated once it is rounded."""
    step = lab.step_sizes(lab.grid_scales(w, bits, group_size, clip), w.shape[1]).double()
    largest, h = 2 ** (bits - 1) - 1, hessian.double()
    inverse = torch.linalg.inv(h + damp * h.diagonal().mean() * torch.eye(len(h)))
    w, out = w.double().clone(), torch.zeros_like(step)
    for j in range(w.shape[1]):
        out[:, j] = step[:, j] * torch.clip(torch.round(w[:, j] / step[:, j]), -largest, largest)
        w -= torch.outer((w[:, j] - out[:, j]) / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return out.float()


def column_by_column(w, hessian, bits, group_size, damp, clip, passed_on, result=lambda w, w_hat: w_hat, clamp=True):
    step = lab.step_sizes(lab.grid_scales(w, bits, group_size, clip), w.shape[1]).double()
    largest, u = 2 ** (bits - 1) - 1, lab.inverse_factor(hessian, damp)
    w, w_hat = w.double().clone(), torch.zeros_like(step)
    for j in range(w.shape[1]):
        code = (w[:, j] / step[:, j]).round()
        w_hat[:, j] = (code.clamp(-largest, largest) if clamp else code) * step[:, j]
        w[:, j + 1 :] -= torch.outer(w[:, j] - w_hat[:, j], passed_on(u, hessian.double(), j))
    return result(w, w_hat).float()


@wrong("gptq", "the error of a column is not passed on")
def forgets_to_pass_on_the_error(w, hessian, bits, group_size=None, damp=0.01, clip=True):
    return column_by_column(w, hessian, bits, group_size, damp, clip, lambda u, h, j: 0 * u[j, j + 1 :])


@wrong("gptq", "look at the sign")
def passes_on_with_the_wrong_sign(w, hessian, bits, group_size=None, damp=0.01, clip=True):
    return column_by_column(w, hessian, bits, group_size, damp, clip, lambda u, h, j: -u[j, j + 1 :] / u[j, j])


@wrong("gptq", "compare which columns are changed")
def passes_on_to_the_next_column_only(w, hessian, bits, group_size=None, damp=0.01, clip=True):
    def next_only(u, h, j):
        return torch.cat([u[j, j + 1 : j + 2], 0 * u[j, j + 2 :]]) / u[j, j]

    return column_by_column(w, hessian, bits, group_size, damp, clip, next_only)


@wrong("gptq", "at what it is divided by")
def divides_twice(w, hessian, bits, group_size=None, damp=0.01, clip=True):
    return column_by_column(w, hessian, bits, group_size, damp, clip, lambda u, h, j: 8 * u[j, j + 1 :] / u[j, j] ** 2)


@wrong("gptq", "off the grid")
def returns_the_moved_weights(w, hessian, bits, group_size=None, damp=0.01, clip=True):
    def moved(w, w_hat):
        return w

    return column_by_column(w, hessian, bits, group_size, damp, clip, lambda u, h, j: u[j, j + 1 :] / u[j, j], moved)


@wrong("gptq", "past the last level")
def levels_without_end(w, hessian, bits, group_size=None, damp=0.01, clip=True):
    return column_by_column(w, hessian, bits, group_size, damp, clip, lambda u, h, j: u[j, j + 1 :] / u[j, j], clamp=False)


@sly("gptq", "groups, other widths or other damping")
def damping_ignored(w, hessian, bits, group_size=None, damp=0.01, clip=True):
    return lab.gptq(w, hessian, bits, group_size, 0.01, clip)


@sly("gptq", "changed in place")
def moves_the_weights_themselves(w, hessian, bits, group_size=None, damp=0.01, clip=True):
    out = lab.gptq(w, hessian, bits, group_size, damp, clip)
    w.copy_(out)
    return out


# nf4_quantize

NF4 = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def nf4_blocks(w, block_size):
    flat = w.float().flatten()
    return F.pad(flat, (0, -len(flat) % block_size)).reshape(-1, block_size)


def nf4_nearest(x, n):
    """The codes of blocks that are divided by their scales."""
    return torch.bucketize(x, (NF4[1:] + NF4[:-1]) / 2).flatten()[:n].to(torch.uint8)


@right("nf4_quantize")
def block_by_block_with_argmin(w, block_size=64):
    codes, scales = [], []
    for block in w.float().flatten().split(block_size):
        scale = block.abs().max()
        x = block / scale if scale > 0 else block
        codes.append((x[:, None] - NF4).abs().argmin(1).to(torch.uint8))
        scales.append(scale)
    return torch.cat(codes), torch.stack(scales)


@wrong("nf4_quantize", "not its largest value")
def nf4_scale_from_the_maximum(w, block_size=64):
    blocks = nf4_blocks(w, block_size)
    scale = blocks.amax(1)
    return nf4_nearest(blocks / scale[:, None], w.numel()), scale


@wrong("nf4_quantize", "one scale for the whole tensor")
def nf4_one_scale(w, block_size=64):
    blocks = nf4_blocks(w, block_size)
    scale = blocks.abs().max()
    return nf4_nearest(blocks / scale, w.numel()), scale.repeat(len(blocks))


@wrong("nf4_quantize", "row after row")
def nf4_blocks_down_the_columns(w, block_size=64):
    blocks = nf4_blocks(w.T, block_size)
    scale = blocks.abs().amax(1)
    return nf4_nearest(blocks / scale[:, None], w.numel()), scale


@wrong("nf4_quantize", "divide by the scale before comparing")
def nf4_forgets_to_divide(w, block_size=64):
    blocks = nf4_blocks(w, block_size)
    return nf4_nearest(blocks, w.numel()), blocks.abs().amax(1)


@wrong("nf4_quantize", "NF4's levels are not evenly spaced")
def nf4_even_grid(w, block_size=64):
    blocks = nf4_blocks(w, block_size)
    scale = blocks.abs().amax(1)
    codes = ((blocks / scale[:, None] + 1) * 7.5).round()
    return codes.flatten()[: w.numel()].to(torch.uint8), scale


@wrong("nf4_quantize", "what does bucketize count")
def nf4_off_by_one(w, block_size=64):
    blocks = nf4_blocks(w, block_size)
    scale = blocks.abs().amax(1)
    codes = torch.bucketize(blocks / scale[:, None], (NF4[1:] + NF4[:-1]) / 2) - 1
    return codes.clamp(min=0).flatten()[: w.numel()].to(torch.uint8), scale


@wrong("nf4_quantize", "the boundaries are the midpoints")
def nf4_levels_as_boundaries(w, block_size=64):
    blocks = nf4_blocks(w, block_size)
    scale = blocks.abs().amax(1)
    codes = torch.bucketize(blocks / scale[:, None], NF4).clamp(max=15)
    return codes.flatten()[: w.numel()].to(torch.uint8), scale


@wrong("nf4_quantize", "the input was changed in place")
def nf4_divides_in_place(w, block_size=64):
    blocks = w.view(-1, block_size)
    scale = blocks.abs().amax(1)
    blocks /= scale[:, None]
    return nf4_nearest(blocks, w.numel()), scale


@sly("nf4_quantize", "a block of zeros")
def nf4_divides_by_zero(w, block_size=64):
    blocks = nf4_blocks(w, block_size)
    scale = blocks.abs().amax(1)
    return nf4_nearest(blocks / scale[:, None], w.numel()), scale


@sly("nf4_quantize", "a short last block")
def nf4_pads_with_ones(w, block_size=64):
    flat = w.float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % block_size), value=1.0).reshape(-1, block_size)
    scale = blocks.abs().amax(1)
    return nf4_nearest(blocks / scale.clamp(min=1e-38)[:, None], w.numel()), scale
