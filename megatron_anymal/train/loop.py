"""The training loop: resume, step, log, validate, save, stop. Everything is scheduled by the step count."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from megatron_anymal import backend
from megatron_anymal.checkpoint.async_writer import CheckpointWriter
from megatron_anymal.checkpoint.run_lock import run_lock
from megatron_anymal.checkpoint.store import Manifest
from megatron_anymal.config import ConfigError
from megatron_anymal.config.validation import max_time_seconds
from megatron_anymal.data.loader import steps
from megatron_anymal.data.loader_workers import LoaderMemory, worker_died
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.mix_stages import stage_lines
from megatron_anymal.data.shared_prompts import introduction
from megatron_anymal.data.step_plan import StepPlan
from megatron_anymal.model.unsharded_weights import hash_weights
from megatron_anymal.parallel import gather_numbers
from megatron_anymal.resilience import fault_injection, heartbeat, stop_signals
from megatron_anymal.resilience.events import record
from megatron_anymal.resilience.exit_codes import Exit
from megatron_anymal.resilience.failure_record import record_failure
from megatron_anymal.resilience.heartbeat import Phase
from megatron_anymal.resilience.nonfinite import SkippedSteps
from megatron_anymal.resilience.stragglers import look_for_stragglers
from megatron_anymal.telemetry import MetricsLogger, RunLog, describe
from megatron_anymal.train import restore
from megatron_anymal.train.build import DataSource, TrainState
from megatron_anymal.train.encoder_costs import agree_on_costs
from megatron_anymal.train.feature_cache import use_feature_cache
from megatron_anymal.train.memory_metrics import memory_metrics, own_memory
from megatron_anymal.train.optim import begin_state
from megatron_anymal.train.pass_times import own_passes, pass_metrics
from megatron_anymal.train.peer_copies import PeerCopies
from megatron_anymal.train.skipped_samples import SkippedSamples
from megatron_anymal.train.stage_encoding import with_coming
from megatron_anymal.train.step import stop_asked_for, train_step, validation_step
from megatron_anymal.train.step_metrics import MetricsWindow
from megatron_anymal.train.utilization import Peak, Utilization


def fit(
    state: TrainState,
    run_dir: Path,
    loggers: Sequence[MetricsLogger] = (),
    after_validation: Optional[Callable[[], None]] = None,
    peak: Optional[Peak] = None,
) -> Exit:
    """Train until trainer.max_steps, or checkpoint and stop on SIGTERM, SIGUSR1 or exp_manager.max_time_per_run.

    Args:
        after_validation: called on all ranks after each validation.
        peak: rate of a GPU, for MFU; None if unknown.

    Returns:
        DONE, or REQUEUE if the run was stopped before the last step.

    Raises:
        ConfigError: another job is using the run folder, or its checkpoint belongs to another run.
        NotFinite: the gradient was not finite in resilience.max_skipped_steps consecutive steps.
        DataError: more of a step's samples are unreadable than data.max_bad_share allows.
        StorageError: an object store cannot be read.
        CheckpointError: checkpoints exist and none is valid, or the last one could not be written.
        RuntimeError: a loader process died (WorkerDied), or the frozen Llama's weights have changed.
    """
    with (
        stop_signals.handle_stop_signals(),
        run_lock(run_dir, state.config.exp_manager.lock_timeout_seconds) as check_lock,
    ):
        return Trainer(state, run_dir, loggers, after_validation, check_lock, peak).fit()


class Trainer:
    """One execution of a run in its run folder.

    Raises:
        ConfigError: exp_manager.max_time_per_run is not of the form DD:HH:MM:SS.
    """

    def __init__(
        self,
        state: TrainState,
        run_dir: Path,
        loggers: Sequence[MetricsLogger],
        after_validation: Optional[Callable[[], None]] = None,
        check_lock: Callable[[], None] = lambda: None,
        peak: Optional[Peak] = None,
    ):
        self.state, self.config = state, state.config
        self.run_dir = run_dir
        self.checkpoints = run_dir / "checkpoints"
        self.log = RunLog(run_dir, loggers, active=state.layout.reports)
        self.after_validation = after_validation
        self.writer = CheckpointWriter(
            self.checkpoints, self.config.exp_manager.checkpoint, self.log.say, guard=check_lock
        )
        # Step and metrics of the last validation.
        self.validated: tuple[int, dict[str, float]] = (-1, {})
        self.skipped_steps = SkippedSteps(run_dir, self.config.resilience.max_skipped_steps, state.layout.reports)
        self.skipped_samples = SkippedSamples(
            run_dir,
            self.config.data.max_bad_share,
            state.layout.reports,
            self.log.say,
        )
        # Why to stop before the last step; "" to continue.
        self.stop = ""
        # Step of the checkpoint that this start continues from; 0 without one.
        self.saved_step = 0
        # The step in progress, counted from 1; 0 before the first.
        self.under_way = 0
        # Number of its stage in data.schedule, from 0; -1 before the first step.
        self.stage = -1
        stop_signals.stop_after(max_time_seconds(self.config.exp_manager))
        fault_injection.schedule(self.config.resilience.faults, state.layout.rank, run_dir)
        self.base_hash = self._hash_base()
        # DPO: hash of the checkpoint that the reference was loaded from.
        self.reference_hash = ""
        self.window = MetricsWindow()
        self.utilization = Utilization(state, peak)
        self.loader_memory = LoaderMemory(self.config.data.worker_memory_limit_gib)

    def fit(self) -> Exit:
        """Run to the end.

        Returns:
            DONE, or REQUEUE if the run was stopped before the last step.

        Raises:
            ConfigError, NotFinite, DataError, StorageError, CheckpointError, RuntimeError: as in the module-level
                `fit`.
        """
        processes = self.state.layout.world_size
        self._record("start", f"{processes} process(es)", processes=processes)
        fault_injection.inject("start", 0)
        heartbeat.beat(Phase.LOADING)
        self._start()
        try:
            self._train()
        except BaseException as error:
            worker = worker_died(error)
            if worker is not None:
                # So that the record contains its traceback.
                worker.__cause__ = error
            # Before waiting for other ranks, which may be gone.
            record_failure(self.run_dir, worker or error, self.under_way)
            self.writer.abandon()
            self.log.abandon()
            self.state.release()
            if worker is None:
                raise
            raise worker from error
        self.copies.close()
        self.features.finish()
        heartbeat.beat(Phase.CHECKPOINT)
        self.writer.finish()
        self._check_base()
        at, last = self.state.step, self.config.trainer.max_steps
        if at < last:
            self.log.say(f"{self.stop}: stopped at step {at} of {last}.")
            self._record("stopped", f"{self.stop}: at step {at} of {last}")
            return Exit.REQUEUE
        self._record("end", f"all {last} steps are done")
        return Exit.DONE

    def _train(self) -> None:
        first, last = self.state.step, self.config.trainer.max_steps
        # Stop requests received during setup.
        self._note_stop(stop_asked_for(self.state))
        if self._is_due_at_resume():
            heartbeat.beat(Phase.CHECKPOINT)
            self._save()
        steps_of_data = self._steps(self.state.train_data, first, last, training=True)
        batches = with_coming(steps_of_data, ahead=self.state.stage_encoding is not None)
        while self.state.step < last and not self.stop:
            self._enter_stage()
            self.under_way = self.state.step + 1
            heartbeat.beat(Phase.DATA, self.under_way)
            begun = time.monotonic()
            fault_injection.inject("data", self.under_way)
            plan, micro_batches, coming = next(batches)
            waited = time.monotonic() - begun
            self.features.count(micro_batches)
            result = train_step(self.state, plan, micro_batches, coming)
            took = time.monotonic() - begun
            self.window.add(took, waited, result)
            self.utilization.add(plan, micro_batches, reference=result.reference_computed)
            if self.state.step == first + 1:
                self._record("first_step", f"the first step of this start took {took:.2f} s")
            self._note_stop(result.stop)
            self.skipped_samples.note(self.state.step, plan, self.state.train_data.planner, result.bad)
            if self._every(self.config.trainer.log_every_n_steps):
                self._log_step()
            if self._every(self.config.trainer.val_check_interval):
                heartbeat.beat(Phase.VALIDATION)
                self._validate()
            self.writer.report()
            if self._every(self.config.exp_manager.checkpoint.every_n_train_steps) or self.stop:
                heartbeat.beat(Phase.CHECKPOINT)
                self._save()
            if result.skipped:
                whose = f" of {', '.join(result.skipped_alignments)}" if result.skipped_alignments else ""
                self.log.say(
                    f"warning: step {self.state.step}: the gradient{whose} is not finite; no weight{whose} was changed"
                )
                # Last, because it may end the run, which must have logged and saved by then.
                self.skipped_steps.note(self.state.step, self._samples(plan, result.skipped_alignments))
            # After everything that belongs to the step: a run that continues from it does not repeat it.
            self.copies.keep(took)

    def _start(self) -> None:
        self._introduce()
        agree_on_costs(self.state, self.run_dir, self.log.say)
        if self.config.job != "pretrain" and self.state.tokenizer.joins_headers:
            self.log.say(
                "warning: data.tokenizer merges the line breaks after a turn's header with the turn's content, so "
                "the ids before an answer differ between training and generation. Llama 3's tokenizer keeps them apart."
            )
        if self.config.job == "dpo":
            self.reference_hash = restore.read_reference(self.state, self.base_hash, self.run_dir, self.log.say)
        folder = restore.find_checkpoint(self.checkpoints, self.config.exp_manager, self.state.layout, self.log.say)
        source = folder.name if folder else ""
        if folder is not None:
            restore.resume(self.state, folder, self._manifest(), self.log.say)
        elif self.config.model.restore_from_path and self.config.job != "dpo":
            restore.weights_of(self.state, self.config.model.restore_from_path, self.base_hash, self.log.say)
        self.saved_step = self.state.step
        self.copies = PeerCopies(self.state, self._manifest(), self.log.say, self._record)
        if self.copies.resume():
            source = "memory"
        self.state.before_update = self.copies.settle
        if source:
            self._record("resume", f"from {source}, at step {self.state.step}", source=source)
        for kept in (self.log, self.skipped_samples, self.skipped_steps):
            kept.rewind(self.state.step)
        # After the encoders' weights were restored.
        self.features = use_feature_cache(self.state)

    def _introduce(self) -> None:
        """Log the layout, precision and kernels, which also reveals what a machine lacks."""
        layout, model, precision = self.state.layout, self.config.model, self.config.trainer.precision
        split = ", sequence parallel" if model.sequence_parallel else ""
        chunks = model.virtual_pipeline_model_parallel_size
        stages = f"{layout.pipeline_size}" + (f" ({chunks} virtual chunks each)" if chunks > 1 else "")
        trainable = sum(p.numel() for chunk in self.state.models for p in chunk.parameters() if p.requires_grad)
        kernel = backend.attention_kernel(model, precision)
        repeats = "" if backend.attention_repeats(kernel) else " (not deterministic)"
        self.log.say(
            f"{layout.world_size} process(es) on {layout.device.type}: tensor {layout.tensor_size} x pipeline "
            f"{stages} x context {layout.context_size} x data {layout.data_size}{split}; "
            f"precision {precision}, {backend.transformer_impl(model)} layers, "
            f"{kernel} attention{repeats}; rank 0 trains {trainable:,} parameters"
        )
        for line in (introduction(self.config.job, model, kernel), self.state.recompute, self.utilization.describe()):
            if line:
                self.log.say(line)

    def _steps(
        self, data: DataSource, start: int, stop: int, *, training: bool = False
    ) -> Iterator[tuple[StepPlan, list[MicroBatch]]]:
        return steps(
            data.planner,
            data.reader,
            replica=self.state.layout.data_rank,
            start=start,
            stop=stop,
            num_workers=self.config.data.num_workers,
            prefetch_steps=self.config.data.prefetch_steps,
            pin=self.state.layout.device.type == "cuda",
            before_read=fault_injection.in_loader if training and self.config.resilience.faults else None,
            # Validations end before their loader processes can grow.
            memory=self.loader_memory if training else None,
        )

    def _enter_stage(self) -> None:
        """Log the mixture of the next step's stage, if that is not the stage of the step before."""
        data, planner = self.config.data, self.state.train_data.planner
        number = planner.stage_of(self.state.step)
        if number != self.stage:
            self.stage = number
            if data.schedule:
                lines = stage_lines(data.train, data.schedule, self.config.trainer.max_steps, planner.stages)
                self.log.say(f"step {self.state.step + 1}: {lines[number]}")

    def _every(self, interval: int) -> bool:
        at_end = self.state.step == self.config.trainer.max_steps
        return at_end or (interval > 0 and self.state.step % interval == 0)

    def _is_due_at_resume(self) -> bool:
        """Whether to save before the first step: memory can be ahead of the checkpoints. Those that were due since the
        newest one were still being written when the run failed, and a stop would lose what memory holds."""
        step, interval = self.state.step, self.config.exp_manager.checkpoint.every_n_train_steps
        missed = self._every(0) or (interval > 0 and step // interval > self.saved_step // interval)
        return step > self.saved_step and (bool(self.stop) or missed)

    def _record(self, kind: str, text: str, **more: Any) -> None:
        """Record an event, on one rank for all."""
        if self.state.layout.reports:
            record(self.run_dir, kind, text, step=self.state.step, **more)

    def _note_stop(self, reason: str) -> None:
        if reason and not self.stop:
            self.stop = reason
            self._record("stop_requested", reason)

    def _samples(self, plan: StepPlan, alignments: Collection[str]) -> list[str]:
        """Return the names of all samples of a step, or of those of some alignments."""
        key = self.state.train_data.planner.key
        chosen = [number for number, name in enumerate(self.config.model.multiplex) if name in alignments]
        kept = slice(None) if plan.alignment is None else np.isin(plan.alignment, chosen)
        return [key(int(dataset), int(sample)) for dataset, sample in zip(plan.dataset[kept], plan.sample[kept])]

    def _log_step(self) -> None:
        steps, metrics = self.window.take()
        metrics["skipped_samples"] = float(self.skipped_samples.count)
        metrics.update(self.features.metrics())
        layout = self.state.layout
        parts = (
            own_memory(self.loader_memory, layout.device),
            own_passes(self.state.pass_times, steps, metrics),
            self.utilization.own_sums(),
            [self.state.own_time.take() / steps, layout.pipeline_rank],
        )
        # One exchange for all: what each of them costs is waiting for the last rank.
        every = gather_numbers([number for part in parts for number in part], layout.device)
        memory, passes, sums, own = every.split([len(part) for part in parts], dim=1)
        metrics.update(memory_metrics(memory))
        metrics.update(pass_metrics(passes))
        metrics.update(self.utilization.metrics(steps, metrics, sums.sum(0).tolist()))
        metrics["consumed_samples"] = float(self.config.model.samples_of(self.state.step))
        if self.config.data.schedule:
            metrics["stage"] = float(self.stage + 1)
        if layout.reports:
            name = self.state.train_data.planner.stages[self.stage].name
            eta = metrics["step_seconds"] * (self.config.trainer.max_steps - self.state.step)
            line = describe(metrics, step=self.state.step, max_steps=self.config.trainer.max_steps, eta=eta, stage=name)
            self.log.write(self.state.step, metrics, line)
        seconds, stages = own.T.tolist()
        ratio = self.config.resilience.straggler_ratio
        slow = look_for_stragglers(seconds, stages, self.state.step, layout, ratio, self.run_dir)
        if slow:
            self.log.say(f"warning: step {self.state.step}: slow ranks, in seconds of own work per step: {slow}")

    def _validate(self) -> None:
        data, batches = self.state.validation_data, self.config.trainer.limit_val_batches
        if data is None or batches == 0:
            return
        self.state.wait_for_param_gather()
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        kinds: dict[str, list[float]] = {}
        measures: list[dict[str, float]] = []
        for plan, micro_batches in self._steps(data, 0, batches):
            fault_injection.inject("validation", self.state.step)
            result = validation_step(self.state, plan, micro_batches)
            self._note_stop(result.stop)
            measures.append(result.measures)
            for name, count in result.counts_by_modality.items():
                sums[name] = sums.get(name, 0.0) + result.loss_by_modality[name] * count
                counts[name] = counts.get(name, 0) + count
            for kind, count in result.targets_by_kind.items():
                loss, targets = kinds.get(kind, (0.0, 0.0))
                kinds[kind] = [loss + result.loss_by_kind[kind] * count, targets + count]
        # Discarded: these are times of training only.
        self.state.own_time.take()
        self.state.pass_times.take()
        self.state.pass_times.take_encoding()
        if not counts:
            return
        metrics = {"val_loss": sum(sums.values()) / sum(counts.values())}
        metrics.update({f"val_loss/{name}": sums[name] / counts[name] for name in sums})
        metrics.update({f"val_target_loss/{kind}": loss / targets for kind, (loss, targets) in kinds.items()})
        metrics.update({f"val_{name}": sum(m[name] for m in measures) / len(measures) for name in measures[0]})
        shown = " ".join(f"{name.removeprefix('val_loss/')} {value:.4f}" for name, value in metrics.items())
        self.log.write(self.state.step, metrics, f"step {self.state.step} validation: {shown}")
        self.validated = (self.state.step, metrics)
        rules = self.config.exp_manager.checkpoint
        if rules.keep_best and rules.keep_best_metric not in metrics:
            raise ConfigError(
                f"exp_manager.checkpoint.keep_best_metric={rules.keep_best_metric!r} is not a validation metric; "
                f"the validation measured {', '.join(metrics)}."
            )
        if self.after_validation is not None:
            self.after_validation()

    def _save(self) -> None:
        self.log.save()
        self.state.wait_for_param_gather()
        begin_state(self.state.optimizer)
        self.writer.start(self.state, self._manifest())

    def _manifest(self) -> Manifest:
        """Build the manifest of a checkpoint of this step, without its files."""
        validated_at, metrics = self.validated
        return Manifest(
            step=self.state.step,
            consumed_samples=self.config.model.samples_of(self.state.step),
            config=self.config.to_dict(),
            llama=self.state.llama.to_dict(),
            base_hash=self.base_hash,
            data_fingerprint=self.state.train_data.planner.fingerprint(),
            files={},
            reference=self.reference_hash,
            metrics=metrics if validated_at == self.state.step else {},
            tokenizer=self.state.tokenizer.fingerprint(),
            data_content=self.state.train_data.planner.content(),
        )

    def _check_base(self) -> None:
        """Verify that the frozen Llama is unchanged, and record its hash."""
        after = self._hash_base()
        if after != self.base_hash:
            raise RuntimeError("The frozen Llama's weights changed during the run. Do not use its checkpoints.")
        if self.state.layout.reports and after:
            (self.run_dir / "language_model.json").write_text(json.dumps({"before": self.base_hash, "after": after}))

    def _hash_base(self) -> str:
        if not self.config.model.language_model.freeze:
            return ""
        return hash_weights(self.state.models, "language_model.")
