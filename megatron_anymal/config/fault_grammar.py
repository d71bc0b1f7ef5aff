"""The grammar of faults that a run rehearses: `resilience.faults=["kill:rank=1,step=7"]`.

A fault is KIND:KEY=VALUE,KEY=VALUE,...

  kill, exception, stop      end by SIGKILL, raise, be stopped (SIGSTOP)          keys: rank step place write every
  hang, gil, slow            sleep; hold Python's global lock; go on after a while  and seconds
  nan                        not a number in this rank's gradient                  keys: rank step every
  enospc, eio                the disk is full, or fails, at a write of a save      keys: rank step write every
  corrupt                    a byte of the newest checkpoint changes               keys: rank step place every
  loader_hang, loader_kill   a loader process hangs or is killed                   keys: rank step worker every

rank: 0 unless given. place: start, data, compute, update, validation or checkpoint (in the thread that writes one);
compute unless given. step: the one under way, counted from 1; without it the first time the place is reached. write: at
which chunk of a checkpoint, from 1. seconds: for ever unless given, for slow they must be. Each fault happens once per
run folder, and leaves a mark in RUN/faults/; with every=1 each time that it is reached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_anymal.config.schema import ConfigError, RunConfig

PLACES = ("start", "data", "compute", "update", "validation", "checkpoint")
_ANYWHERE = ("rank", "step", "place", "write", "every")
_LASTING = (*_ANYWHERE, "seconds")
_WRITING = ("rank", "step", "write", "every")
_LOADING = ("rank", "step", "worker", "every")
# Kind -> the keys it has.
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

    text: str
    kind: str
    rank: int = 0
    # 0: any.
    step: int = 0
    place: str = "compute"
    write: int = 1
    worker: int = 0
    every: int = 0
    seconds: float = _SEVERAL_YEARS


def parse(text: str) -> Fault:
    """Read an entry.

    Raises:
        ConfigError: an unknown kind or key, or a value that makes no sense; names it.
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


def check_faults(config: RunConfig) -> None:
    """Refuse faults that cannot happen.

    Raises:
        ConfigError: naming the entry and the mend.
    """
    for fault in map(parse, config.resilience.faults):
        where = f"resilience.faults: {fault.text!r}"
        if fault.rank >= config.world_size:
            raise ConfigError(f"{where}: there is no rank {fault.rank} among {config.world_size} process(es).")
        if fault.kind.startswith("loader_") and fault.worker >= config.data.num_workers:
            raise ConfigError(
                f"{where}: a rank has data.num_workers={config.data.num_workers} loader process(es), counted from 0. "
                "Raise it, or name another worker."
            )
