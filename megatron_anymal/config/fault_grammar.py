"""Grammar of the faults to inject into a run: `resilience.faults=["kill:rank=1,step=7"]`.

A fault is KIND:KEY=VALUE,KEY=VALUE,...

  kill, exception, stop      SIGKILL; an exception; SIGSTOP                        keys: rank step place write every
  hang, gil, slow            sleep; hold Python's GIL; pause, then continue         and seconds
  nan                        NaN in this rank's gradient                           keys: rank step every
  enospc, eio                a checkpoint write fails: disk full, or I/O error     keys: rank step write every
  corrupt                    a byte of the newest checkpoint changes               keys: rank step place every
  loader_hang, loader_kill   a loader process hangs or is killed                   keys: rank step worker every

rank: default 0. place: start, data, compute, update, validation or checkpoint (in the thread that writes one); default
compute. step: the current step, counted from 1; default: the first time the place is reached. write: the chunk of the
checkpoint being written, counted from 1. seconds: default forever; required for slow. Each fault triggers once per run
folder and leaves a marker in RUN/faults/; with every=1 it triggers every time it is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_anymal.config.schema import ConfigError

PLACES = ("start", "data", "compute", "update", "validation", "checkpoint")
_ANYWHERE = ("rank", "step", "place", "write", "every")
_LASTING = (*_ANYWHERE, "seconds")
_WRITING = ("rank", "step", "write", "every")
_LOADING = ("rank", "step", "worker", "every")
# Kind -> its keys.
KINDS: dict[str, tuple[str, ...]] = {
    "kill": _ANYWHERE,
    "exception": _ANYWHERE,
    "stop": _ANYWHERE,
    "hang": _LASTING,
    "gil": _LASTING,
    "slow": _LASTING,
    "nan": ("rank", "step", "every"),
    "enospc": _WRITING,
    "eio": _WRITING,
    "corrupt": ("rank", "step", "place", "every"),
    "loader_hang": _LOADING,
    "loader_kill": _LOADING,
}
_SEVERAL_YEARS = 1e8


@dataclass(frozen=True)
class Fault:
    """One entry of resilience.faults."""

    # The entry as written in the configuration.
    text: str
    # A key of KINDS.
    kind: str
    # Rank that the fault hits.
    rank: int = 0
    # 0: any step.
    step: int = 0
    # One of PLACES.
    place: str = "compute"
    # Chunk of the checkpoint being written, counted from 1.
    write: int = 1
    # Loader process of the rank, counted from 0.
    worker: int = 0
    # 1: the fault triggers every time it is reached; 0: once per run folder.
    every: int = 0
    # Duration of a hang or pause.
    seconds: float = _SEVERAL_YEARS


def parse(text: str) -> Fault:
    """Parse one entry.

    Raises:
        ConfigError: an unknown kind or key, or an invalid value; the message names it.
    """
    kind, _, rest = text.partition(":")
    where = f"resilience.faults: {text!r}"
    if kind not in KINDS:
        raise ConfigError(f"{where}: unknown kind {kind!r}. Known: {', '.join(KINDS)}.")
    values: dict[str, Any] = {}
    for entry in filter(None, rest.split(",")):
        key, equals, value = entry.partition("=")
        if key not in KINDS[kind] or not equals:
            raise ConfigError(f"{where}: {kind!r} has no key {key!r}. It has: {', '.join(KINDS[kind])}, as KEY=VALUE.")
        if key in values:
            raise ConfigError(f"{where}: {key!r} is given twice.")
        values[key] = _value(key, value, where)
    if kind == "slow" and "seconds" not in values:
        raise ConfigError(f"{where}: 'slow' needs seconds=NUMBER.")
    if kind in ("enospc", "eio"):
        values["place"] = "checkpoint"
    if "step" in values and values.get("place") == "start":
        raise ConfigError(f"{where}: 'step' has no effect with place=start, which comes before all steps.")
    if "write" in values and values.get("place") != "checkpoint":
        raise ConfigError(f"{where}: 'write' has no effect without place=checkpoint.")
    return Fault(text, kind, **values)


def _value(key: str, value: str, where: str) -> Any:
    if key == "place":
        if value not in PLACES:
            raise ConfigError(f"{where}: place={value!r} is not one of {', '.join(PLACES)}.")
        return value
    kind: Callable[[str], Any] = float if key == "seconds" else int
    try:
        number = kind(value)
    except ValueError:
        raise ConfigError(f"{where}: {key}={value!r} is not a number.") from None
    if not number >= (1 if key in ("step", "write") else 0) or number > _SEVERAL_YEARS:
        raise ConfigError(f"{where}: {key}={value} is out of range.")
    return number


def check_faults(faults: Iterable[str], world_size: int, num_workers: int) -> None:
    """Reject faults that cannot happen.

    Args:
        faults: entries of `resilience.faults`.
        world_size: processes of the job.
        num_workers: `data.num_workers`, the loader processes of a rank.

    Raises:
        ConfigError: the message names the entry and the fix.
    """
    for fault in map(parse, faults):
        where = f"resilience.faults: {fault.text!r}"
        if fault.rank >= world_size:
            raise ConfigError(f"{where}: there is no rank {fault.rank} among {world_size} process(es).")
        if fault.kind.startswith("loader_") and fault.worker >= num_workers:
            raise ConfigError(
                f"{where}: a rank has data.num_workers={num_workers} loader process(es), counted from 0. "
                "Raise it, or name another worker."
            )
