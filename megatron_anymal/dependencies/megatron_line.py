"""The two supported releases of megatron-core ("lines"), one per Python version.

Only this module knows how they differ. Both read and write the same checkpoints.

    Python   megatron-core
    3.11     0.16.1
    3.12     0.19.2

Needs only the standard library until one of the functions about an imported megatron-core is called.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from typing import Any

# What tells parameter groups apart: exactly what 0.16.1 compares.
_GROUP_KEYS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")


@dataclass(frozen=True)
class MegatronLine:
    """A supported release of megatron-core.

    Attributes:
        version: the release.
        python: the Python version it is installed with, (major, minor).
        resiliency: the range of nvidia-resiliency-ext that fits.
        resiliency_glibc: the oldest glibc that its wheels run on, (major, minor).
        checks_resiliency: it does not import if an older version of that is installed.
        needs_triton: it imports triton, without requiring it.
        lacks: what does not work with it but does with the other line.
    """

    version: str
    python: tuple[int, int]
    resiliency: str
    resiliency_glibc: tuple[int, int]
    checks_resiliency: bool
    needs_triton: bool
    lacks: tuple[str, ...]


OLDER = MegatronLine(
    version="0.16.1",
    python=(3, 11),
    resiliency=">=0.4.1,<0.5",
    resiliency_glibc=(2, 31),
    checks_resiliency=False,
    needs_triton=False,
    lacks=("Transformer Engine 2.12 and later",),
)
NEWER = MegatronLine(
    version="0.19.2",
    python=(3, 12),
    resiliency=">=0.6,<0.7",
    resiliency_glibc=(2, 39),
    checks_resiliency=True,
    needs_triton=True,
    lacks=("model.recompute_modules=[layernorm] without a C++ compiler: it builds an extension at the first use",),
)
LINES = (OLDER, NEWER)


def of_python(python: tuple[int, int] = sys.version_info[:2]) -> MegatronLine:
    """Return the line that is installed with a version of Python.

    Args:
        python: major and minor number.
    """
    return NEWER if python >= NEWER.python else OLDER


def why_no_resiliency(line: MegatronLine) -> str:
    """Why nvidia-resiliency-ext cannot be installed on this system for a line, or "".

    Args:
        line: one of LINES.
    """
    library, version = platform.libc_ver()
    if library != "glibc":
        return f"its wheels need glibc, and this system has {library or 'another C library'}"
    if tuple(int(number) for number in version.split(".")[:2]) >= line.resiliency_glibc:
        return ""
    return f"its wheels need glibc {'.'.join(map(str, line.resiliency_glibc))}, and this system has {version}"


def match_parameter_groups(*more: str) -> None:
    """Make megatron-core's optimizers recognize their parameter groups in a checkpoint by what tells them apart here.

    0.19.2 also compares the rates that a group was built with, so that no run could continue with another one. Here the
    rates are set before each step.

    Args:
        more: further keys of every group.
    """
    from megatron.core.optimizer import distrib_optimizer, optimizer

    modules: tuple[Any, ...] = (distrib_optimizer, optimizer)
    for module in modules:
        module.param_group_identifier_keys = (*_GROUP_KEYS, *more)
