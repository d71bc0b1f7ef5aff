"""Checks of `anymal doctor`: what is installed, the cost of what is missing, and the command that fixes it.

Needs only the standard library, so that it also runs in a broken installation. torch is imported only on a machine with
a GPU; elsewhere its shared libraries are loaded, which shows a build that does not fit the machine.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_anymal.dependencies.installed import (
    apex_kind,
    has_nvidia_driver,
    has_transformer_engine_extension,
    is_importable,
    version_of,
)
from megatron_anymal.dependencies.megatron_line import of_python, why_no_resiliency

OK, MISSING, BROKEN, OUT_OF_RANGE, FOREIGN = "ok", "missing", "broken", "out of range", "not NVIDIA's"
NOT_DETERMINISTIC = "not deterministic"
# Transformer Engine reads it when layers are built; the trainer sets it to 0 if it is not set.
_NONDETERMINISTIC = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"


@dataclass(frozen=True)
class Requirement:
    """A package the trainer uses.

    Attributes:
        distribution: its name for pip.
        module: the module to look for.
        versions: the supported range, as in setup.py; "" for any version.
        extra: the extra that installs it; "" if it is always installed.
        cost: what does not work without it.
        breaks: a version out of range breaks what every installation needs.
    """

    distribution: str
    module: str
    versions: str
    extra: str
    cost: str
    breaks: bool = False

    @property
    def required(self) -> bool:
        """Whether it belongs to every installation."""
        return not self.extra


# The line of megatron-core that belongs to this Python.
LINE = of_python()
REQUIREMENTS = (
    Requirement("torch", "torch", ">=2.11,<2.14", "", "nothing runs"),
    Requirement("megatron-core", "megatron.core", f"=={LINE.version}", "", "nothing runs"),
    *([Requirement("triton", "triton", ">=3", "", "megatron-core does not import")] if LINE.needs_triton else []),
    Requirement("nemo_toolkit", "nemo", "==3.0.0", "", "`anymal pretrain` does not start"),
    Requirement("lightning", "lightning", "<=2.4.0", "", "`anymal pretrain` does not start; installed by nemo_toolkit"),
    Requirement("transformers", "transformers", ">=5.0,<6", "", "no encoders, no tokenizers"),
    Requirement("psutil", "psutil", ">=5.9", "", "megatron-core's checkpoint writer dies and the rank hangs"),
    Requirement("webdataset", "webdataset", ">=1.0,<2", "", "`anymal prepare` writes no shards"),
    Requirement("av", "av", ">=15.0,<19", "", "video cannot be read"),
    Requirement("soundfile", "soundfile", ">=0.12", "", "audio cannot be read"),
    Requirement("soxr", "soxr", ">=0.5", "", "audio cannot be resampled"),
    Requirement("simplejpeg", "simplejpeg", ">=1.9", "", "resize_backend=torch cannot read JPEG"),
    Requirement(
        "transformer-engine",
        "transformer_engine",
        ">=2.11,<2.12",
        "te",
        "no FP8; slower bf16 on GPUs (AnyMAL reports 40 % more throughput with it)",
    ),
    Requirement("flash-attn", "flash_attn", ">=2.7,<3", "flash", "slower attention over packed documents on GPUs"),
    Requirement("apex", "apex", "", "apex", "no fused AdamW on GPUs without Transformer Engine"),
    Requirement(
        "nvidia-resiliency-ext",
        "nvidia_resiliency_ext",
        LINE.resiliency,
        "resiliency",
        "`anymal launch --launcher=ft` does not start; torchrun, the default, does"
        + (f"; with an older version megatron-core {LINE.version} does not import" if LINE.checks_resiliency else ""),
        LINE.checks_resiliency,
    ),
    Requirement("bitsandbytes", "bitsandbytes", ">=0.50.2,<0.51", "nf4", "model.base_quantization=nf4 is refused"),
    Requirement("s3fs", "s3fs", ">=2024.12", "s3", "datasets on S3 (s3://) cannot be read"),
    Requirement("gcsfs", "gcsfs", ">=2024.12", "gcs", "datasets on Google Cloud Storage (gs://) cannot be read"),
    Requirement("pyarrow", "pyarrow", ">=15.0", "huggingface", "`anymal prepare --from huggingface` reads nothing"),
    Requirement("wandb", "wandb", "", "wandb", "exp_manager.create_wandb_logger=true fails"),
)


@dataclass(frozen=True)
class Finding:
    """One row of the table; `fix` is empty if nothing is wrong."""

    # Package or part of the system.
    part: str
    # Installed version; "-" if there is none.
    version: str
    # OK, MISSING, BROKEN, OUT_OF_RANGE, FOREIGN or NOT_DETERMINISTIC.
    state: str
    # Whether it belongs to every installation.
    required: bool
    # What does not work without it.
    cost: str
    # Command or advice that fixes it.
    fix: str
    # What does not work with it even if nothing is wrong.
    lacks: tuple[str, ...] = ()


def examine() -> list[Finding]:
    """Check every requirement, in the order of the table."""
    return [
        _python(),
        *(_package(part) for part in REQUIREMENTS[:1]),
        _cuda(),
        *(_package(part) for part in REQUIREMENTS[1:]),
        *_determinism(),
    ]


def _python() -> Finding:
    fits = (3, 11) <= sys.version_info[:2] < (3, 13)
    fix = "" if fits else "create a virtual environment with Python 3.11 or 3.12"
    return Finding(
        "python", platform.python_version(), OK if fits else OUT_OF_RANGE, True, "packages do not install", fix
    )


def _cuda() -> Finding:
    cost = "training runs on the CPU over gloo: for tests and small models"
    fix = "on a machine with NVIDIA GPUs: install the driver and a CUDA build of torch"
    if not is_importable("torch"):
        return Finding("CUDA", "-", MISSING, False, cost, fix)
    try:
        version = _cuda_of_torch()
        if not has_nvidia_driver():
            return Finding("CUDA", version, MISSING, False, cost, fix)
        from megatron_anymal import backend

        available = backend.capabilities()
    except Exception as error:  # A broken torch can raise anything, and the other checks must still run.
        return Finding("CUDA", "-", BROKEN, False, _short(error), "pip install --force-reinstall torch")
    if not available.cuda_devices:
        return Finding("CUDA", version, MISSING, False, cost, fix)
    assert available.compute_capability is not None
    capability = ".".join(str(number) for number in available.compute_capability)
    formats = " and ".join([*(["bf16"] if available.bf16 else []), *(["FP8"] if available.fp8 else [])]) or "fp32 only"
    shown = (
        f"{version}, {len(available.cuda_devices)} x {available.cuda_devices[0]} (capability {capability}, {formats})"
    )
    return Finding("CUDA", shown, OK, False, cost, "")


def _cuda_of_torch() -> str:
    """Load torch's libraries without importing it, which takes seconds, and return its CUDA version, or "-".

    Raises:
        OSError: a library is missing or does not fit this machine.
        AttributeError: torch's version file is damaged.
    """
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    [library, *_] = [*(folder / "lib").glob("libtorch_python.*"), *(folder / "lib").glob("torch_python.dll")]
    if not has_nvidia_driver():
        # With a driver, torch itself is imported; its CUDA libraries may only be found by its own search.
        ctypes.CDLL(str(library))
    # A file of constants; imported by its path, since its package would be imported first.
    versions = importlib.util.spec_from_file_location("torch_version", folder / "version.py")
    assert versions is not None and versions.loader is not None
    module = importlib.util.module_from_spec(versions)
    versions.loader.exec_module(module)
    return str(module.cuda or "-")


def _package(part: Requirement) -> Finding:
    version, state, fix = version_of(part.distribution), OK, ""
    if part.distribution == "apex":
        state = _apex_state()
        version = version if state == FOREIGN else (version or "-")
    elif not is_importable(part.module):
        # A distribution without its module is a broken installation.
        state = BROKEN if version else MISSING
    elif part.distribution == "transformer-engine":
        state = _transformer_engine_state()
    if state == OK and version and not _in_range(version, part.versions):
        state = OUT_OF_RANGE
    if state != OK:
        fix = _fix(part, state)
    lacks = LINE.lacks if part.distribution == "megatron-core" else ()
    required = part.required or (part.breaks and state == OUT_OF_RANGE)
    return Finding(part.distribution, version or "-", state, required, part.cost, fix, lacks)


def _apex_state() -> str:
    kind = apex_kind()
    if kind == "foreign":
        return FOREIGN
    if kind == "":
        return MISSING
    return OK if is_importable("amp_C") else BROKEN


def _transformer_engine_state() -> str:
    if not has_transformer_engine_extension():
        return BROKEN
    if not has_nvidia_driver():
        # It cannot be checked; the CUDA row gives the cost of that.
        return OK
    try:
        from megatron_anymal import backend

        available = backend.capabilities()
        return OK if available.transformer_engine or not available.cuda_devices else BROKEN
    except Exception:  # A broken torch can raise anything, and the other checks must still run.
        return BROKEN


def _determinism() -> list[Finding]:
    """The table row on whether the backward pass of Transformer Engine's attention is bitwise reproducible; no row if
    the package is not installed.
    """
    if not is_importable("transformer_engine"):
        return []
    value = os.environ.get(_NONDETERMINISTIC, "0")
    state = OK if value == "0" else NOT_DETERMINISTIC
    fix = "" if state == OK else f"unset {_NONDETERMINISTIC}, unless you prefer the faster backward pass of attention"
    cost = "a resumed run on GPUs does not repeat bit for bit"
    return [Finding(_NONDETERMINISTIC, value, state, False, cost, fix)]


def _fix(part: Requirement, state: str) -> str:
    if part.distribution == "apex":
        build = (
            "NVCC_APPEND_FLAGS='--threads 4' APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
            "pip install --no-build-isolation -e '.[apex]'"
        )
        if state == FOREIGN:
            return f"pip uninstall -y apex (an unrelated authentication toolkit), then {build}"
        return f"{'pip uninstall -y apex (built without its CUDA kernels), then ' if state == BROKEN else ''}{build}"
    if part.extra == "wandb":
        return "pip install wandb"
    if part.extra == "resiliency" and (reason := why_no_resiliency(LINE)):
        if state == MISSING:
            return f"none on this system: {reason}"
        return f"pip uninstall -y {part.distribution}; a version that fits cannot be installed: {reason}"
    force = " --force-reinstall" if state == BROKEN else ""
    if part.required:
        return f"pip install{force} '{part.distribution}{part.versions}'"
    isolation = " --no-build-isolation" if part.extra in ("te", "flash") else ""
    return f"pip install{force}{isolation} -e '.[{part.extra}]'"


def _in_range(version: str, versions: str) -> bool:
    if not versions:
        return True
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True  # torch and transformers install packaging; if they are missing, their own rows give the fix.
    return SpecifierSet(versions, prereleases=True).contains(version.partition("+")[0])


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
