"""The Triton kernels of inverted residual blocks: interpreted, and compiled for a GPU, without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

INTERPRETED = """
import torch
from timm.layers import BatchNormAct2d
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite
from torch import nn

from csflow.model.fused_blocks import FusedBlock, with_fused_blocks

torch.manual_seed(0)
torch.set_grad_enabled(False)

def check(name, block, shape):
    for module in block.eval().modules():
        if isinstance(module, BatchNormAct2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.3)
    x = torch.randn(shape).half()
    network = nn.Sequential(block)
    expected = network(x.float())
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.half()
    fused = with_fused_blocks(network)
    assert type(fused[0]) is FusedBlock, name
    with torch.autocast("cpu", torch.float16):
        actual = fused(x.contiguous(memory_format=torch.channels_last))
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    off = ((actual.float() - expected).norm() / expected.norm()).item()
    assert off < 2e-3, (name, off)  # of float16

expanded = dict(exp_ratio=6.0, norm_layer=BatchNormAct2d, act_layer=nn.SiLU)
squeezed = expanded | dict(se_layer=SqueezeExcite)
check("squeezed, TensorFlow's padding",
    InvertedResidual(16, 24, stride=2, pad_type="same", **squeezed), (2, 16, 9, 7))
check("squeezed, all rows of a program of one image", InvertedResidual(16, 24, **squeezed), (2, 16, 16, 8))
check("squeezed, half a tile", InvertedResidual(16, 24, **squeezed), (2, 16, 8, 8))
check("residual", InvertedResidual(16, 16, **expanded | dict(act_layer=nn.ReLU6)), (3, 16, 5, 18))
check("kernel of 5", InvertedResidual(8, 24, dw_kernel_size=5, stride=2, **expanded), (2, 8, 12, 20))
check("not expanded",
    DepthwiseSeparableConv(16, 16, norm_layer=BatchNormAct2d, act_layer=nn.ReLU), (2, 16, 9, 7))
"""


def test_a_fused_block_computes_what_the_block_computes():
    # Triton decides when it is imported whether to interpret.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from csflow.model import triton_kernels as kernels

def compiled(kernel, pointers, constants, capability):
    signature = {}
    for name in kernel.arg_names:
        kind = pointers.get(name, "i32")
        signature[name] = "constexpr" if name in constants else kind
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in pointers}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]

half, single = "*fp16", "*fp32"
for capability in (75, 80, 90):
    pointers = {"x_pointer": half, "weight_pointer": half, "bias_pointer": single, "gate_pointer": single}
    pointers |= {"residual_pointer": half, "y_pointer": half}
    sizes = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "ACTIVATION": "silu", "HAS_RESIDUAL": True}
    for gate in ("none", "one", "each"):
        ptx = compiled(kernels._pointwise_kernel, pointers, sizes | {"GATE": gate}, capability)
        assert "st.global.v4" in ptx  # 16 bytes at a time
    pointers = {"x_pointer": half, "weight_pointer": single, "bias_pointer": single, "y_pointer": half}
    pointers["sum_pointer"] = single
    sizes = {"KERNEL": 3, "STRIDE": 2, "ACTIVATION": "relu6", "HAS_SUMS": True}
    sizes |= {"TILE_H": 4, "TILE_W": 16, "BLOCK_C": 64}
    ptx = compiled(kernels._depthwise_kernel, pointers, sizes, capability)
    assert "ld.global.v4" in ptx
"""


def test_the_kernels_compile_for_gpus_without_one(tmp_path: Path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
