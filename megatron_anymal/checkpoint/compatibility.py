"""What differs between a checkpoint's run and the one that continues it: harmless, or refused unless allowed.

All of the configuration counts as changing what is learned, but for what is listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from megatron_anymal.checkpoint.store import Manifest
from megatron_anymal.config import ConfigError
from megatron_anymal.config.parsing import leaves
from megatron_anymal.config.validation import CHANGES

# Layout, clock, logs, files. Data and tokenizer are compared by their content, not by their place.
HARMLESS = (
    "trainer.num_nodes",
    "trainer.devices",
    "trainer.max_steps",
    "trainer.log_every_n_steps",
    "trainer.val_check_interval",
    "trainer.limit_val_batches",
    "trainer.sampled_answers",
    "exp_manager.*",
    "resilience.*",
    "model.*_parallel_size",
    "model.sequence_parallel",
    "model.num_layers_in_*_pipeline_stage",
    "model.overlap_p2p_comm",
    "model.micro_batch_size",
    "model.recompute_*",
    "model.memory_gb",
    "model.transformer_impl",
    "model.attention",
    "model.ddp.*",
    "model.dpo.reference",
    "model.restore_from_path",
    "model.plugins",
    "model.language_model.path",
    "model.language_model.load_weights",
    "model.language_model.checkpoint",
    "model.modalities.*.encoder.max_pieces_per_call",
    "data.train.*",
    "data.validation.*",
    "data.validation",
    "data.tokenizer",
    "data.max_bad_share",
    "data.num_workers",
    "data.prefetch_steps",
)
# Notes of transformers about itself, in a Llama's configuration.
_NOTES = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")


def check_changes(there: Manifest, here: Manifest, allowed: Collection[str], say: Callable[[str], None]) -> None:
    """Compare a checkpoint with what this run would write now.

    Args:
        allowed: of config_checks.CHANGES.
        say: is told what differs and does not matter, or is allowed.

    Raises:
        ConfigError: something differs that changes what is learned; names every key, old -> new.
    """
    found = {kind: "; ".join(_of_kind(kind, there, here)) for kind in CHANGES}
    harmless = [line for key, line in _config_lines(there.config, here.config) if _is_harmless(key, here.config)]
    if harmless:
        say(f"changed since the checkpoint, without effect on what is learned: {'; '.join(harmless)}")
    for kind in CHANGES:
        if found[kind] and kind in allowed:
            say(f"warning: changed since the checkpoint, allowed by resilience.allow_changes: {found[kind]}")
    refused = [kind for kind in CHANGES if found[kind] and kind not in allowed]
    if refused:
        lines = "; ".join(found[kind] for kind in refused)
        raise ConfigError(
            f"The checkpoint of step {there.step} belongs to a run that differs in what is learned: {lines}. Restore "
            "that, start a new run in another folder (model.restore_from_path), or allow it with "
            f"resilience.allow_changes=[{','.join(refused)}]."
        )


def _of_kind(kind: str, there: Manifest, here: Manifest) -> list[str]:
    if kind == "config":
        lines = _config_lines(there.config, here.config)
        learned = [line for key, line in lines if not _is_harmless(key, here.config)]
        return learned + _schedule(there.config, here.config)
    if kind == "tokenizer":
        # Checkpoints of before have no such note.
        return _hashes("data.tokenizer (its content)", there.tokenizer, here.tokenizer) if there.tokenizer else []
    if kind == "base":
        return _hashes("the Llama's weights", there.base_hash, here.base_hash) + _llama(there.llama, here.llama)
    name = "data (its content, weights, model.seed or model.global_batch_size)"
    changed = _hashes(name, there.data_fingerprint, here.data_fingerprint)
    return [f"{line}, so that resuming would repeat or lose samples" for line in changed]


def _hashes(name: str, there: str, here: str) -> list[str]:
    return [] if there == here else [f"{name} {there[:12] or 'none'} -> {here[:12] or 'none'}"]


def _config_lines(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Dotted key, "key old -> new" of all that differs; keys that a run of before had not yet are left out."""
    old, new = dict(leaves(there)), dict(leaves(here))
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if key in old and key in new:
            if old[key] != new[key]:
                lines.append((key, f"{key} {old[key]!r} -> {new[key]!r}"))
        elif key.startswith(("model.modalities.", "data.train", "data.validation")):
            lines.append((key, f"{key} {old.get(key, 'none')!r} -> {new.get(key, 'none')!r}"))
    return lines


def _is_harmless(key: str, here: Mapping[str, Any]) -> bool:
    if key == "data.seq_length":
        # It decides which samples are left out, or only how long packs are.
        return bool(here["data"]["too_long"] == "refuse")
    if key == "model.optim.sched.decay_steps":
        # See _schedule.
        return True
    return any(fnmatchcase(key, pattern) for pattern in HARMLESS)


def _schedule(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The schedule's end follows trainer.max_steps unless it has its own."""
    ends = []
    for config in (there, here):
        sched = config["model"]["optim"]["sched"]
        ends.append(0 if sched["name"] == "constant" else sched["decay_steps"] or config["trainer"]["max_steps"])
    if ends[0] == ends[1] or 0 in ends:
        return []
    return [f"the schedule's end (model.optim.sched.decay_steps, or trainer.max_steps) {ends[0]} -> {ends[1]}"]


def _llama(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    old = {key: value for key, value in leaves(dict(there)) if key not in _NOTES}
    new = dict(leaves(dict(here)))
    changed = [key for key, value in old.items() if new.get(key, value) != value]
    return [f"the Llama's {key} {old[key]!r} -> {new[key]!r}" for key in changed]
