"""The loop: resume, step, log, validate, save, stop. The engine's step is the only clock."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist

from megatron_anymal import backend
from megatron_anymal.checkpoint import state as checkpoint_state
from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.store import CheckpointError, Manifest
from megatron_anymal.config import ConfigError
from megatron_anymal.config_checks import max_time_seconds
from megatron_anymal.data.batches import StepPlan
from megatron_anymal.data.loader import steps
from megatron_anymal.data.types import DataError, MicroBatch
from megatron_anymal.model.lora import keep_reference
from megatron_anymal.model.weights import hash_weights
from megatron_anymal.telemetry import MetricsLogger, RunLog, describe
from megatron_anymal.train.build import DataSource, TrainState
from megatron_anymal.train.reference import ReferenceAnswers
from megatron_anymal.train.step import StepResult, train_step, validation_step


def fit(
    state: TrainState,
    run_dir: Path,
    loggers: Sequence[MetricsLogger] = (),
    after_validation: Optional[Callable[[], None]] = None,
) -> None:
    """Train until trainer.max_steps, or until exp_manager.max_time_per_run with a checkpoint.

    Args:
        after_validation: called on all ranks after each validation.

    Raises:
        DataError: more of a step's samples are unreadable than data.max_bad_share allows.
    """
    Run(state, run_dir, loggers, after_validation).fit()


class Run:
    """One execution of a run in its folder."""

    def __init__(
        self,
        state: TrainState,
        run_dir: Path,
        loggers: Sequence[MetricsLogger],
        after_validation: Optional[Callable[[], None]] = None,
    ):
        self.state, self.config = state, state.config
        self.run_dir = run_dir
        self.checkpoints = run_dir / "checkpoints"
        self.ledger = run_dir / "skipped_samples.jsonl"
        self.log = RunLog(run_dir, loggers, active=state.layout.reports)
        self.after_validation = after_validation
        self.started = time.monotonic()
        self.base_hash = self._hash_base()
        # DPO: of the checkpoint that the reference was read from.
        self.reference_hash = ""
        # Step times since the last log line, and what they counted.
        self.window: list[tuple[float, float, StepResult]] = []
        self.skipped = 0

    def fit(self) -> None:
        """See the function of this name."""
        self._start()
        first, last = self.state.step, self.config.trainer.max_steps
        batches = self._steps(self.state.train_data, first, last)
        while self.state.step < last:
            begun = time.monotonic()
            plan, micro_batches = next(batches)
            waited = time.monotonic() - begun
            result = train_step(self.state, plan, micro_batches)
            self.window.append((time.monotonic() - begun, waited, result))
            self._account(plan, result)
            if self._every(self.config.trainer.log_every_n_steps):
                self._log_step()
            if self._every(self.config.trainer.val_check_interval):
                self._validate()
            out_of_time = self._out_of_time()
            if self._every(self.config.exp_manager.checkpoint.every_n_train_steps) or out_of_time:
                self._save()
            if out_of_time and self.state.step < last:
                self.log.say(f"exp_manager.max_time_per_run is over: stopped at step {self.state.step} of {last}.")
                break
        self._check_base()

    def _start(self) -> None:
        self._introduce()
        manager = self.config.exp_manager
        if self.config.job == "dpo":
            self._read_reference()
        folder, problems = self._find_checkpoint() if manager.resume_if_exists else (None, [])
        for problem in problems:
            self.log.say(f"warning: {problem} Going back to an older checkpoint.")
        if folder is not None:
            self._resume(folder)
        elif manager.resume_if_exists and not manager.resume_ignore_no_checkpoint:
            raise CheckpointError(
                f"There is no checkpoint in {str(self.checkpoints)!r}, and exp_manager.resume_ignore_no_checkpoint is "
                "false."
            )
        elif self.config.model.restore_from_path and self.config.job != "dpo":
            self._restore(self.config.model.restore_from_path)
        self.log.rewind(self.state.step + 1)

    def _find_checkpoint(self) -> tuple[Optional[Path], list[str]]:
        """Rank 0 reads and checks the files, and decides for all."""
        found: list[Any] = [None]
        if self.state.layout.reports:
            try:
                found = [store.newest_valid(self.checkpoints)]
            except CheckpointError as error:
                found = [error]
        dist.broadcast_object_list(found, src=0)
        if isinstance(found[0], CheckpointError):
            raise found[0]
        return found[0]

    def _introduce(self) -> None:
        """Say what runs where: what is missing on a machine shows here first."""
        layout = self.state.layout
        split = ", sequence parallel" if self.config.model.sequence_parallel else ""
        parts = self.config.model.virtual_pipeline_model_parallel_size
        stages = f"{layout.pipeline_size}" + (f" (each in {parts} parts)" if parts > 1 else "")
        trainable = sum(p.numel() for model in self.state.models for p in model.parameters() if p.requires_grad)
        self.log.say(
            f"{layout.world_size} process(es) on {layout.device.type}: tensor {layout.tensor_size} x pipeline "
            f"{stages} x context {layout.context_size} x data {layout.data_size}{split}; "
            f"precision {self.config.trainer.precision}, {backend.transformer_impl(self.config)} layers, attention "
            f"by {backend.attention_kernel(self.config)}; rank 0 trains {trainable:,} parameters"
        )

    def _resume(self, folder: Path) -> None:
        manifest = store.read_manifest(folder)
        if manifest.data_fingerprint != self.state.train_data.planner.fingerprint():
            raise ConfigError(
                f"{str(folder)!r} was trained on other data, weights, seed or global batch size: resuming would repeat "
                "or lose samples. Restore them, or start a new run with model.restore_from_path."
            )
        if manifest.base_hash != self.base_hash:
            raise ConfigError(f"{str(folder)!r} was trained on a Llama with other weights than this one.")
        checkpoint_state.check_lora(self.config.model.lora, manifest, folder)
        if manifest.reference != self.reference_hash:
            raise ConfigError(
                f"{str(folder)!r} was held to another reference than model.restore_from_path="
                f"{self.config.model.restore_from_path!r} gives now. Name the checkpoint that it began with, or start "
                "a new run."
            )
        self.state.step = checkpoint_state.load(self.state, folder)
        self.log.say(f"resumed from {folder} at step {self.state.step}")

    def _restore(self, path: str) -> Manifest:
        folder = store.resolve(path)
        manifest = store.read_manifest(folder)
        missing = checkpoint_state.restore(self.state, folder, self.base_hash, self.state.optimizer)
        new = [name for name in missing if ".lora." not in name]
        note = f"; not in it, so newly drawn: {', '.join(new[:3])} and others" if new else ""
        note += "; the adapters are new" if len(new) < len(missing) else ""
        self.log.say(f"weights from {folder}{note}")
        return manifest

    def _read_reference(self) -> None:
        """The SFT model is where the policy starts, and what it is held to from then on, after every resume."""
        manifest = self._restore(self.config.model.restore_from_path)
        if not manifest.config["model"].get("lora", {}).get("r"):
            raise ConfigError(
                f"model.restore_from_path={self.config.model.restore_from_path!r} was trained without adapters, which "
                "the job dpo continues. Name an SFT run with model.lora.r above 0."
            )
        self.reference_hash = hashlib.sha256(json.dumps(manifest.files, sort_keys=True).encode()).hexdigest()
        keep_reference(self.state.models)
        kept = self.run_dir / "reference" if self.config.model.dpo.reference == "cached" else None
        identity = [self.reference_hash, manifest.base_hash, self.config.trainer.precision]
        self.state.reference = ReferenceAnswers(kept, identity, self.state.layout.device)

    def _steps(self, data: DataSource, start: int, stop: int) -> Iterator[tuple[StepPlan, list[MicroBatch]]]:
        return steps(
            data.planner,
            data.reader,
            replica=self.state.layout.data_rank,
            start=start,
            stop=stop,
            num_workers=self.config.data.num_workers,
            prefetch_steps=self.config.data.prefetch_steps,
        )

    def _every(self, interval: int) -> bool:
        at_end = self.state.step == self.config.trainer.max_steps
        return at_end or (interval > 0 and self.state.step % interval == 0)

    def _account(self, plan: StepPlan, result: StepResult) -> None:
        """Write skipped samples down; stop where there are too many."""
        if not result.bad and not result.dropped:
            return
        planner = self.state.train_data.planner
        left_out = [
            (planner.key(int(plan.dataset[p]), int(plan.sample[p])), "longer than data.seq_length")
            for p in plan.dropped
        ]
        entries = [*result.bad.items(), *left_out]
        self.skipped += len(entries)
        if self.state.layout.reports:
            with self.ledger.open("a") as file:
                for name, why in entries:
                    file.write(json.dumps({"step": self.state.step, "sample": name, "reason": why}) + "\n")
        for name, why in result.bad.items():
            self.log.say(f"skipped {name}: {why}")
        share = len(result.bad) / self.config.model.global_batch_size
        if share > self.config.data.max_bad_share:
            raise DataError(
                f"step {self.state.step}: {len(result.bad)} of {self.config.model.global_batch_size} samples cannot be "
                f"read, above data.max_bad_share={self.config.data.max_bad_share}. They are listed in {self.ledger}."
            )

    def _log_step(self) -> None:
        seconds = sum(s for s, _, _ in self.window)
        waited = sum(w for _, w, _ in self.window)
        last = self.window[-1][2]
        metrics = {
            "loss": last.loss,
            **{f"loss/{name}": value for name, value in last.loss_by_modality.items()},
            **{f"targets/{name}": float(n) for name, n in last.counts_by_modality.items()},
            **last.measures,
            "grad_norm": last.grad_norm,
            "lr": last.lr,
            "tokens_per_second": sum(r.tokens for _, _, r in self.window) / seconds,
            "real_token_share": sum(r.tokens for _, _, r in self.window)
            / sum(r.padded_tokens for _, _, r in self.window),
            "step_seconds": seconds / len(self.window),
            "data_wait_share": waited / seconds,
            "skipped_samples": float(self.skipped),
            "consumed_samples": float(self.state.step * self.config.model.global_batch_size),
        }
        eta = metrics["step_seconds"] * (self.config.trainer.max_steps - self.state.step)
        line = describe(metrics, step=self.state.step, max_steps=self.config.trainer.max_steps, eta=eta)
        self.log.write(self.state.step, metrics, line)
        self.window.clear()

    def _validate(self) -> None:
        data, batches = self.state.validation_data, self.config.trainer.limit_val_batches
        if data is None or batches == 0:
            return
        self.state.settle()
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        measures: list[dict[str, float]] = []
        for plan, micro_batches in self._steps(data, 0, batches):
            result = validation_step(self.state, plan, micro_batches)
            measures.append(result.measures)
            for name, count in result.counts_by_modality.items():
                sums[name] = sums.get(name, 0.0) + result.loss_by_modality[name] * count
                counts[name] = counts.get(name, 0) + count
        if not counts:
            return
        metrics = {"val_loss": sum(sums.values()) / sum(counts.values())}
        metrics.update({f"val_loss/{name}": sums[name] / counts[name] for name in sums})
        metrics.update({f"val_{name}": sum(m[name] for m in measures) / len(measures) for name in measures[0]})
        shown = " ".join(f"{name.removeprefix('val_loss/')} {value:.4f}" for name, value in metrics.items())
        self.log.write(self.state.step, metrics, f"step {self.state.step} validation: {shown}")
        if self.after_validation is not None:
            self.after_validation()

    def _out_of_time(self) -> bool:
        """Whether the time is up; rank 0's clock decides for all."""
        limit = max_time_seconds(self.config)
        if limit is None:
            return False
        over = torch.tensor(
            [time.monotonic() - self.started > limit], dtype=torch.int32, device=self.state.layout.device
        )
        dist.broadcast(over, src=0)
        return bool(over)

    def _save(self) -> None:
        begun = time.monotonic()
        self.log.save()
        self.state.settle()
        manifest = Manifest(
            step=self.state.step,
            consumed_samples=self.state.step * self.config.model.global_batch_size,
            config=self.config.to_dict(),
            llama=self.state.llama.to_dict(),
            base_hash=self.base_hash,
            data_fingerprint=self.state.train_data.planner.fingerprint(),
            files={},
            reference=self.reference_hash,
        )
        keep = self.config.exp_manager.checkpoint.keep_last
        folder = checkpoint_state.save(self.state, self.checkpoints, manifest, keep)
        self.log.say(f"saved {folder} in {time.monotonic() - begun:.1f} s")

    def _check_base(self) -> None:
        """Write down that the frozen Llama is still what it was."""
        after = self._hash_base()
        if after != self.base_hash:
            raise RuntimeError("The frozen Llama's weights changed during the run: its checkpoints are not to be used.")
        if self.state.layout.reports and after:
            (self.run_dir / "language_model.json").write_text(json.dumps({"before": self.base_hash, "after": after}))

    def _hash_base(self) -> str:
        if not self.config.model.language_model.freeze:
            return ""
        return hash_weights(self.state.models, "language_model.")
