"""The precision of convolutions and matrix products. Sums and the flow's state are always float32."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # settings know the names of precisions without it
    import torch

Device = Literal["auto", "cpu", "gpu"]
"""What workers compute on; `auto` is `gpu` if the cluster has one."""
Precision = Literal["float32", "mixed", "bfloat16", "float16"]
"""Precision of scoring. `mixed`, for CPUs, is float32 where the backbone's maps are large, since the flow
would take the rounding errors there for anomalies, and bfloat16 behind. float16 is for GPUs, and as exact."""
PrecisionSetting = Literal["auto", "float32", "mixed", "bfloat16", "float16"]
TrainingPrecision = Literal["auto", "float32", "bfloat16"]


def multiplies_bfloat16(device: "torch.device") -> bool:
    """Whether the device multiplies bfloat16 in hardware; without that, bfloat16 is no faster."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def resolved(setting: PrecisionSetting, device: "torch.device") -> Precision:
    """The precision in which a model scores on this device.

    Raises:
        ValueError: the setting is for other devices.
    """
    if device.type == "cuda":
        # float16 is as exact as `mixed`, and faster.
        return "float16" if setting == "auto" or setting == "mixed" else setting
    if setting == "float16":
        raise ValueError("float16 is for GPUs; on CPUs, choose mixed or bfloat16")
    if setting == "auto":
        return "mixed" if multiplies_bfloat16(device) else "float32"
    return setting


def uses_bfloat16(precision: TrainingPrecision, device: "torch.device") -> bool:
    """Whether convolutions run in bfloat16 in training; weights, sums and the loss stay in float32."""
    return multiplies_bfloat16(device) if precision == "auto" else precision == "bfloat16"
