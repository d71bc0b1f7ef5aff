"""Compare a checkpoint's run with the run that continues it: differences are harmless, or refused unless allowed.

Every configuration key counts as affecting training results, except those listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from megatron_anymal.checkpoint.store import Manifest
from megatron_anymal.config import ConfigError
from megatron_anymal.config.parsing import leaves
from megatron_anymal.config.validation import CHANGES

# Layout, run length, logging and file locations. Data and tokenizer are compared by content, not by path.
HARMLESS = (
    "trainer.num_nodes",
    "trainer.devices",
    "trainer.gpu",
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
    "model.encoder_costs",
    "model.encoder_placement",
    "model.modalities.*.cost_per_piece",
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
    "data.schedule",
    "data.validation.*",
    "data.validation",
    "data.tokenizer",
    "data.max_bad_share",
    "data.num_workers",
    "data.prefetch_steps",
    "data.storage.*",
    "data.feature_cache.*",
    "data.worker_memory_limit_gib",
)
# Keys of a Llama's configuration that do not describe the model.
_NOTES = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")

# Settings that are harmless only as long as the data are the same.
_DATA = ("data.train", "data.schedule")

# Sections whose entries may be added and removed.
_ADDED = ("model.modalities.", "model.discrete.", "model.multiplex.", "data.train", "data.validation")


def check_changes(saved: Manifest, current: Manifest, allowed: Collection[str], say: Callable[[str], None]) -> None:
    """Compare a checkpoint's manifest with the one this run would write now.

    Args:
        saved: the checkpoint's manifest.
        current: this run's manifest.
        allowed: members of config.validation.CHANGES that may differ.
        say: prints the differences that are harmless or allowed.

    Raises:
        ConfigError: there is a difference that affects training results; names every key, old -> new.
    """
    differences = {kind: "; ".join(_of_kind(kind, saved, current)) for kind in CHANGES}
    moved = _schedule(saved.config, current.config)
    harmless = [
        line
        for key, line in _config_lines(saved.config, current.config)
        if _is_harmless(key, current.config)
        and not (moved and key == "trainer.max_steps")
        and not (differences["data"] and key.startswith(_DATA))
    ]
    if harmless:
        say(f"changed since the checkpoint, without effect on training results: {'; '.join(harmless)}")
    for kind in CHANGES:
        if differences[kind] and kind in allowed:
            say(f"warning: changed since the checkpoint, allowed by resilience.allow_changes: {differences[kind]}")
    refused = [kind for kind in CHANGES if differences[kind] and kind not in allowed]
    if refused:
        lines = "; ".join(differences[kind] for kind in refused)
        raise ConfigError(
            f"The checkpoint of step {saved.step} belongs to a run with different settings that affect training "
            f"results: {lines}. Revert these changes, start a new run in another folder (model.restore_from_path), or "
            f"allow them with resilience.allow_changes=[{','.join(refused)}]."
        )


def _of_kind(kind: str, saved: Manifest, current: Manifest) -> list[str]:
    if kind == "config":
        lines = _config_lines(saved.config, current.config)
        learned = [line for key, line in lines if not _is_harmless(key, current.config)]
        return learned + _order(saved.config, current.config) + _schedule(saved.config, current.config)
    if kind == "tokenizer":
        # Older checkpoints have no tokenizer hash.
        return _hashes("data.tokenizer (its content)", saved.tokenizer, current.tokenizer) if saved.tokenizer else []
    if kind == "base":
        return _hashes("the Llama's weights", saved.base_hash, current.base_hash) + _llama(saved.llama, current.llama)
    return _data(saved, current)


def _data(saved: Manifest, current: Manifest) -> list[str]:
    """Compare the order of the samples and, if the checkpoint recorded it, what is in them."""
    order = "data (its shards, weights, data.schedule, model.seed or model.global_batch_size)"
    lines = [
        f"{line}, so that resuming would repeat or lose samples"
        for line in _hashes(order, saved.data_fingerprint, current.data_fingerprint)
    ]
    if saved.data_content:
        content = _hashes("data (its keys, texts or media)", saved.data_content, current.data_content)
        lines += [f"{line}, so that resuming would train on other samples" for line in content]
    settings = [line for key, line in _config_lines(saved.config, current.config) if key.startswith(_DATA)]
    return lines + settings if lines else []


def _hashes(name: str, saved: str, current: str) -> list[str]:
    return [] if saved == current else [f"{name} {saved[:12] or 'none'} -> {current[:12] or 'none'}"]


def _config_lines(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(dotted key, "key old -> new") for every difference; keys missing from older configurations are left out."""
    old, new = dict(leaves(saved)), dict(leaves(current))
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if key in old and key in new:
            if old[key] != new[key]:
                lines.append((key, f"{key} {old[key]!r} -> {new[key]!r}"))
        elif key.startswith(_ADDED):
            lines.append((key, f"{key} {old.get(key, 'none')!r} -> {new.get(key, 'none')!r}"))
    return lines


def _is_harmless(key: str, current: Mapping[str, Any]) -> bool:
    if key in ("data.seq_length", "model.dpo.share_prompt"):
        # With "refuse" they only shape the packs; otherwise they also decide which samples are dropped.
        return bool(current["data"]["too_long"] == "refuse")
    if key.endswith("optim.sched.decay_steps"):
        # Checked by _schedule.
        return True
    return any(fnmatchcase(key, pattern) for pattern in HARMLESS)


def _order(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Compare the order of kinds of discrete media, which decides their ids."""
    old, new = (list(config["model"].get("discrete", {})) for config in (saved, current))
    return [f"the order of model.discrete {old} -> {new}"] if sorted(old) == sorted(new) and old != new else []


def _schedule(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Compare where the schedules end: at decay_steps or, if that is not set, at the last step."""
    old, new = _schedule_ends(saved), _schedule_ends(current)
    return [
        f"the learning-rate schedule now ends at step {new[key, last]} instead of {old[key, last]} "
        f"({key}.sched.decay_steps, or {last} if that is 0): set {key}.sched.decay_steps={old[key, last]} to keep it"
        for key, last in old
        if 0 not in (old[key, last], new.get((key, last), 0)) and old[key, last] != new[key, last]
    ]


def _schedule_ends(config: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    """(key of the optimizer, key of its last step) -> last step of its schedule; 0 if the rate is constant."""
    total = config["trainer"]["max_steps"]
    sections = {("model.optim", "trainer.max_steps"): (config["model"]["optim"], total)}
    for name, one in config["model"].get("multiplex", {}).items():
        key = f"model.multiplex.{name}"
        last = "trainer.max_steps" if not one["max_steps"] else f"{key}.max_steps"
        sections[f"{key}.optim", last] = one["optim"], one["max_steps"] or total
    if len(sections) > 1:
        # It has no effect.
        del sections["model.optim", "trainer.max_steps"]
    return {
        keys: 0 if optim["sched"]["name"] == "constant" else optim["sched"]["decay_steps"] or end
        for keys, (optim, end) in sections.items()
    }


def _llama(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    old = {key: value for key, value in leaves(dict(saved)) if key not in _NOTES}
    new = dict(leaves(dict(current)))
    changed = [key for key, value in old.items() if new.get(key, value) != value]
    return [f"the Llama's {key} {old[key]!r} -> {new[key]!r}" for key in changed]
