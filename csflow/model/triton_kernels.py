"""Triton kernels for the layers that inverted residual blocks are made of, on 16-bit maps with channels last.

Such layers do little arithmetic on large maps, so their time is that of reading and writing maps. Run one by
one, a convolution, its batch norm and its activation pass over memory five times, here twice; the scaling by
squeeze and excitation and the residual sum cost no pass of their own.

Dimension letters: B batch, C channels, H height, W width, K input channels, M pixels of all images, N output
channels, T tiles of a map.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNEL_MULTIPLE = 8
"""Channels come in multiples of 16 bytes, so that memory is read and written in pieces of that size."""
TILE_HEIGHT, TILE_WIDTH = 4, 16
"""Size of the tiles of a map that programs of the depthwise kernel compute."""


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "relu6":
        x = tl.minimum(tl.maximum(x, 0.0), 6.0)
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def _pointwise_kernel(
    x_pointer,
    weight_pointer,
    bias_pointer,
    gate_pointer,
    residual_pointer,
    y_pointer,
    rows,
    rows_of_image,
    inputs_by_8,
    outputs_by_8,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The compiler sees from the products that rows start at multiples of 16 bytes.
    inputs, outputs = inputs_by_8 * 8, outputs_by_8 * 8
    # Neighbouring programs read the same rows of x, and find them in the cache.
    columns = tl.cdiv(outputs, BLOCK_N)
    m = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = m.to(tl.int64)  # a batch of maps can have more than 2³¹ numbers
    in_rows, in_columns = (m < rows)[:, None], (n < outputs)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_inputs = k < inputs
        x = tl.load(
            x_pointer + row[:, None] * inputs + k[None, :], mask=in_rows & in_inputs[None, :], other=0.0
        )
        if GATE == "one":
            image = (tl.program_id(0) // columns) * BLOCK_M // rows_of_image
            gate = tl.load(gate_pointer + image * inputs + k, mask=in_inputs, other=0.0)
            x = (x.to(tl.float32) * gate[None, :]).to(x.dtype)
        elif GATE == "each":
            gate = tl.load(
                gate_pointer + (m // rows_of_image)[:, None] * inputs + k[None, :],
                mask=in_rows & in_inputs[None, :],
                other=0.0,
            )
            x = (x.to(tl.float32) * gate).to(x.dtype)
        weight = tl.load(
            weight_pointer + n[None, :] * inputs + k[:, None], mask=in_columns & in_inputs[:, None], other=0.0
        )
        total = tl.dot(x, weight, total)
    total = _activated(total + tl.load(bias_pointer + n, mask=n < outputs, other=0.0)[None, :], ACTIVATION)
    place = row[:, None] * outputs + n[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual_pointer + place, mask=in_rows & in_columns, other=0.0).to(tl.float32)
    tl.store(y_pointer + place, total.to(y_pointer.dtype.element_ty), mask=in_rows & in_columns)


def pointwise(
    x_BCHW: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor,
    activation: str,
    gate_BK: Tensor | None = None,
    residual_BCHW: Tensor | None = None,
) -> Tensor:
    """A 1 × 1 convolution: activation(weight · (gate · x) + bias) + residual.

    Args:
        x_BCHW: 16-bit, channels last, as the residual; channels are multiples of `CHANNEL_MULTIPLE`.
        weight_NK: of the dtype of x.
        bias_N: float32, as the gate.
    """
    batch, inputs, height, width = x_BCHW.shape
    outputs, places = len(weight_NK), height * width
    rows = batch * places
    y_BCHW = torch.empty(
        (batch, outputs, height, width),
        dtype=x_BCHW.dtype,
        device=x_BCHW.device,
        memory_format=torch.channels_last,
    )
    # All rows of a program are of one image if possible, so that it reads one row of the gate.
    block_m = 128 if places % 128 == 0 else 64
    block_n = min(128, max(32, triton.next_power_of_2(outputs)))
    gate = "none" if gate_BK is None else "one" if places % block_m == 0 else "each"
    _pointwise_kernel[(triton.cdiv(rows, block_m) * triton.cdiv(outputs, block_n),)](
        x_BCHW,
        weight_NK,
        bias_N,
        bias_N if gate_BK is None else gate_BK,
        y_BCHW if residual_BCHW is None else residual_BCHW,
        y_BCHW,
        rows,
        places,
        inputs // CHANNEL_MULTIPLE,
        outputs // CHANNEL_MULTIPLE,
        ACTIVATION=activation,
        GATE=gate,
        HAS_RESIDUAL=residual_BCHW is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=32 if inputs <= 32 else 64,
        num_warps=8 if block_m == block_n == 128 else 4,
        num_stages=3,
    )
    return y_BCHW


@triton.jit
def _depthwise_kernel(
    x_pointer,
    weight_pointer,
    bias_pointer,
    y_pointer,
    sum_pointer,
    height,
    width,
    out_height,
    out_width,
    channels_by_8,
    top,
    left,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = channels_by_8 * 8
    tiles_across = tl.cdiv(out_width, TILE_W)
    tile, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    place = tl.arange(0, TILE_H * TILE_W)
    out_y = (tile // tiles_across) * TILE_H + place // TILE_W
    out_x = (tile % tiles_across) * TILE_W + place % TILE_W
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = (c < channels)[None, :]
    x_of_image = x_pointer + image * height * width * channels + c[None, :]
    total = tl.zeros((TILE_H * TILE_W, BLOCK_C), tl.float32)
    for i in tl.static_range(KERNEL):
        for j in tl.static_range(KERNEL):
            y, x = out_y * STRIDE + i - top, out_x * STRIDE + j - left
            is_inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            weight = tl.load(weight_pointer + (i * KERNEL + j) * channels + c, mask=c < channels, other=0.0)
            value = tl.load(
                x_of_image + ((y * width + x) * channels)[:, None],
                mask=is_inside[:, None] & in_channels,
                other=0.0,
            )
            total += value.to(tl.float32) * weight[None, :]
    total = _activated(total + tl.load(bias_pointer + c, mask=c < channels, other=0.0)[None, :], ACTIVATION)
    is_wanted = ((out_y < out_height) & (out_x < out_width))[:, None] & in_channels
    y_of_image = y_pointer + image * out_height * out_width * channels + c[None, :]
    tl.store(
        y_of_image + ((out_y * out_width + out_x) * channels)[:, None],
        total.to(y_pointer.dtype.element_ty),
        mask=is_wanted,
    )
    if HAS_SUMS:
        # Sums of tiles are added up later, since atomic additions come in any order, and round accordingly.
        sums = tl.sum(tl.where(is_wanted, total, 0.0), axis=0)
        tiles = tl.num_programs(0)
        tl.store(sum_pointer + (image * tiles + tile) * channels + c, sums, mask=c < channels)


def depthwise(
    x_BCHW: Tensor,
    weight_KKC: Tensor,
    bias_C: Tensor,
    activation: str,
    stride: int,
    padding: tuple[int, int, int, int],
    with_means: bool,
) -> tuple[Tensor, Tensor | None]:
    """A convolution of each channel by itself, activation(weight * x + bias), and the means (B, C) of that.

    Args:
        x_BCHW: 16-bit, channels last; channels are a multiple of `CHANNEL_MULTIPLE`.
        weight_KKC: float32, as the bias and the means.
        padding: zeros above, below, left and right of x.
        with_means: whether to compute the means over each map; None is returned in their place otherwise.
    """
    batch, channels, height, width = x_BCHW.shape
    kernel, (top, bottom, left, right) = len(weight_KKC), padding
    out_height = (height + top + bottom - kernel) // stride + 1
    out_width = (width + left + right - kernel) // stride + 1
    y_BCHW = torch.empty(
        (batch, channels, out_height, out_width),
        dtype=x_BCHW.dtype,
        device=x_BCHW.device,
        memory_format=torch.channels_last,
    )
    tile_width = min(TILE_WIDTH, triton.next_power_of_2(out_width))
    tiles = triton.cdiv(out_height, TILE_HEIGHT) * triton.cdiv(out_width, tile_width)
    sum_BTC = torch.empty((batch, tiles, channels) if with_means else (0,), device=x_BCHW.device)
    block_c = min(64, max(16, triton.next_power_of_2(channels)))
    _depthwise_kernel[(tiles, triton.cdiv(channels, block_c), batch)](
        x_BCHW,
        weight_KKC,
        bias_C,
        y_BCHW,
        sum_BTC,
        height,
        width,
        out_height,
        out_width,
        channels // CHANNEL_MULTIPLE,
        top,
        left,
        KERNEL=kernel,
        STRIDE=stride,
        ACTIVATION=activation,
        HAS_SUMS=with_means,
        TILE_H=TILE_HEIGHT,
        TILE_W=tile_width,
        BLOCK_C=block_c,
        num_warps=4,
    )
    means_BC = sum_BTC.sum(1) / (out_height * out_width) if with_means else None
    return y_BCHW, means_BC
