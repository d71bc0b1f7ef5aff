"""`anymal launch`: start a job's processes on this node, monitor them, and restart them after failures.

For several nodes, run the same command on each, with its own --node-rank.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import sys
from collections.abc import Sequence, Set
from pathlib import Path

from megatron_anymal.config import ConfigError, ResilienceConfig, RunConfig, TrainerConfig, composed_ahead
from megatron_anymal.config.compose import config_folder
from megatron_anymal.config.validation import check
from megatron_anymal.dependencies.installed import has_nvidia_driver
from megatron_anymal.dependencies.megatron_line import of_python, why_no_resiliency
from megatron_anymal.launcher.job import Job
from megatron_anymal.launcher.supervisor import Supervisor

_JOBS = ("pretrain", "sft", "dpo")
_EPILOG = """examples:
  anymal launch pretrain --config-name=pretrain_8b_image
  anymal launch --node-rank=$SLURM_NODEID --rdzv-endpoint=$HEAD:29500 sft --config-name=sft_70b trainer.num_nodes=4

After a crash, a hang or the death of a process, the run is restarted from copies in memory or from its newest
checkpoint, as long as it makes progress. SIGTERM, SIGUSR1, Ctrl-C and the loss of the terminal (SIGHUP, unless under
nohup) stop it with a checkpoint (exit code 75); a second Ctrl-C ends it at once.
A report is written to report.md in the run's folder, and the output of the ranks to logs/."""


def main(argv: Sequence[str]) -> int:
    """Run a job to its end; return the exit code (exit_codes.py).

    Raises:
        ConfigError: a setting cannot work; raised before any process is started.
    """
    _check_verb(argv)
    options, unknown = _parser().parse_known_args(list(argv))
    if unknown:
        raise ConfigError(
            f"`anymal launch` has no option {unknown[0]}. Options of the job come after the job's name: "
            f"`anymal launch {options.verb} {unknown[0]} ...`."
        )
    config = _config(options.verb, options.arguments)
    encoders = {modality.encoder.type for modality in config.model.modalities.values()}
    job = _job(
        options, config.trainer, config.resilience, config.run_dir, encoders, config.exp_manager.resume_if_exists
    )
    return Supervisor(job).run()


def _check_verb(argv: Sequence[str]) -> None:
    """Check that a job is named, with a clearer message than argparse's."""
    if not {*_JOBS, "-h", "--help"}.isdisjoint(argv):
        return
    near = [name for word in argv for name in difflib.get_close_matches(word, _JOBS, n=1)]
    raise ConfigError(
        f"`anymal launch` needs the job to start, before the job's own arguments: `anymal launch "
        f"{near[0] if near else '|'.join(_JOBS)} --config-name=NAME [key=value ...]`."
    )


def _config(verb: str, arguments: Sequence[str]) -> RunConfig:
    parser = argparse.ArgumentParser(prog=f"anymal launch ... {verb}", allow_abbrev=False)
    parser.add_argument("--config-name", "-cn", required=True)
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("overrides", nargs="*")
    options, unknown = parser.parse_known_intermixed_args(list(arguments))
    if unknown:
        raise ConfigError(f"{unknown[0]} cannot be used with `anymal launch`. Use it with `anymal {verb}` directly.")
    folder = config_folder(options.config_path)
    config = composed_ahead.compose_ahead(options.config_name, folder, options.overrides).config
    if config.job != verb:
        raise ConfigError(
            f"--config-name={options.config_name} is for the job {config.job!r}. Start it with "
            f"`anymal launch ... {config.job}`, or set job={verb}."
        )
    check(config)
    return config


def _job(
    options: argparse.Namespace,
    trainer: TrainerConfig,
    limits: ResilienceConfig,
    run_dir: Path,
    encoders: Set[str],
    resumes: bool,
) -> Job:
    processes = options.nproc_per_node or trainer.devices
    nodes = options.nnodes or trainer.num_nodes
    for name, given, key, wanted in (
        ("--nproc-per-node", processes, "trainer.devices", trainer.devices),
        ("--nnodes", nodes, "trainer.num_nodes", trainer.num_nodes),
    ):
        if given != wanted:
            raise ConfigError(f"{name}={given}, but {key}={wanted}. Set both to the same value: {key}={given}.")
    if nodes > 1:
        _check_nodes(options, nodes)
    elif options.spare:
        raise ConfigError("--spare needs --nnodes above 1: a spare takes the place of one of several nodes.")
    if options.launcher == "ft" and importlib.util.find_spec("nvidia_resiliency_ext") is None:
        line = of_python()
        reason = why_no_resiliency(line)
        way = f"Install it with `pip install 'nvidia-resiliency-ext{line.resiliency}'`, or omit"
        raise ConfigError(
            "--launcher=ft needs the package nvidia-resiliency-ext, which is not installed. "
            f"{f'It cannot be installed here: {reason}. Omit' if reason else way} --launcher=ft: torchrun's agent does "
            "the same job."
        )
    return Job(
        run_dir=run_dir,
        limits=limits,
        program=["-m", "megatron_anymal", options.verb, *options.arguments],
        processes=processes,
        nodes=nodes,
        node=-1 if options.spare else options.node_rank or 0,
        spare=options.spare,
        endpoint=options.rdzv_endpoint,
        identity=options.rdzv_id,
        rdzv_timeout=options.rdzv_timeout,
        local_addr=options.local_addr,
        launcher=options.launcher,
        grace_seconds=options.grace_seconds,
        standby=limits.standby and sys.platform == "linux",
        # On a GPU, a kernel may still wait for a rank that is gone.
        keep_survivors=limits.keep_survivors and not has_nvidia_driver(),
        peer_memory=limits.peer_memory and sys.platform == "linux",
        # On several nodes, each one's copies are on the next one too.
        keep_memory=resumes and nodes == 1,
        preload=tuple(f"transformers.models.{name}.modeling_{name}" for name in sorted(encoders)),
    )


def _check_nodes(options: argparse.Namespace, nodes: int) -> None:
    host, _, port = options.rdzv_endpoint.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"--nnodes={nodes} needs --rdzv-endpoint=HOST:PORT, an address of node 0 and a free port on it, the same "
            f"on all nodes; it is {options.rdzv_endpoint!r}."
        )
    if options.spare:
        if options.node_rank is not None:
            raise ConfigError(
                f"--spare cannot be combined with --node-rank={options.node_rank}. Leave one of the two out."
            )
        return
    if options.node_rank is None or not 0 <= options.node_rank < nodes:
        raise ConfigError(f"--nnodes={nodes} needs --node-rank, a different one from 0 to {nodes - 1} on each node.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anymal launch",
        usage="anymal launch [options] {pretrain,sft,dpo} --config-name=NAME [key=value ...]",
        description="Start a job's processes on this node, monitor them, and restart them when that can help.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--nproc-per-node", type=int, help="processes on this node; default: trainer.devices")
    parser.add_argument("--nnodes", type=int, help="nodes; default: trainer.num_nodes")
    parser.add_argument("--node-rank", type=int, help="rank of this node, from 0")
    parser.add_argument(
        "--spare", action="store_true", help="wait, with everything imported, to take the place of a node that is lost"
    )
    parser.add_argument("--rdzv-endpoint", default="", help="HOST:PORT of node 0; only for several nodes")
    parser.add_argument("--rdzv-id", default="anymal", help="name of the job at that endpoint")
    parser.add_argument(
        "--rdzv-timeout", type=float, default=600.0, help="seconds to wait for the other nodes before giving up"
    )
    parser.add_argument("--local-addr", default="", help="address of this node for the others; default: its hostname")
    parser.add_argument(
        "--grace-seconds", type=float, help="time between the scheduler's stop signal and its kill, passed to the ranks"
    )
    parser.add_argument(
        "--launcher", choices=("torchrun", "ft"), default="torchrun", help="agent that starts the ranks"
    )
    parser.add_argument("verb", choices=_JOBS, help="the job")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the job")
    return parser
