"""The parity suite: reference runs, runs under layouts, and runs with planted bugs."""

from __future__ import annotations

import copy
import io
from contextlib import redirect_stdout
from pathlib import Path

from engine import train
from ranks import run_ranks
from tiny import make_tokenizer

from megatron_anymal.config import RunConfig
from parity.data import make_parity_shards, parity_config
from parity.discrete import codes_in_documents
from parity.layouts import Layout
from parity.planted import Bug
from parity.reference import Trace, run_reference
from parity.runs import Difference, EngineRun, compare, configured, fingerprint, run_layout


class Suite:
    """Runs a fixed number of steps per layout; layouts with the same data and job share a reference."""

    def __init__(self, folder: Path, steps: int, bug_steps: int | None = None):
        """Write data and SFT runs to `folder`.

        Args:
            steps: steps of a run without a bug.
            bug_steps: steps of a run with a planted bug; by default as many.
        """
        self.folder, self.steps, self.bug_steps = folder, steps, bug_steps or steps
        self._tokenizer = make_tokenizer(folder / "tokenizer")
        self._data: dict[tuple[str, str], RunConfig] = {}
        self._clean: dict[Layout, Difference] = {}
        self._ones: dict[Layout, EngineRun] = {}
        self._references: dict[tuple[Layout, int], Trace] = {}

    def difference(self, layout: Layout, bug: Bug | None = None) -> Difference:
        """Return a layout's difference from the plain-torch reference, with a planted bug if one is given.

        Raises:
            AssertionError: the initial weights or the set of trained weights differ.
        """
        one = self._one(layout.alone)
        if bug is not None:
            run = run_layout(self._config(layout), layout, self.bug_steps, bug.plant)
            return compare(run, self._reference(layout.alone, self.bug_steps))
        if layout not in self._clean:
            run = one if layout == layout.alone else run_layout(self._config(layout), layout, self.steps)
            assert fingerprint(run.start) == fingerprint(one.start), f"{layout.name} starts from different weights"
            self._clean[layout] = compare(run, self._reference(layout.alone, self.steps))
        return self._clean[layout]

    def run(self, layout: Layout, steps: int) -> EngineRun:
        """Run the engine under a layout."""
        return run_layout(self._config(layout), layout, steps)

    def _one(self, alone: Layout) -> EngineRun:
        """Run the engine on one process."""
        if alone not in self._ones:
            self._ones[alone] = run_layout(self._config(alone), alone, self.steps)
        return self._ones[alone]

    def _reference(self, alone: Layout, steps: int) -> Trace:
        """Run plain torch from the weights that the engine starts from."""
        if (alone, steps) not in self._references:
            config, one = configured(self._config(alone), alone), self._one(alone)
            with codes_in_documents(config.model):
                self._references[alone, steps] = run_reference(config, one.start, one.trainable, steps)
        return self._references[alone, steps]

    def _config(self, layout: Layout) -> RunConfig:
        """Return the configuration with the layout's data and, for DPO, the SFT run to start from."""
        key = layout.job, layout.media
        if key not in self._data:
            shards = make_parity_shards(self.folder / "-".join(key).replace(" ", "_"), self._tokenizer, *key)
            self._data[key] = parity_config(shards, self._tokenizer, *key)
        config = copy.deepcopy(self._data[key])
        if layout.job == "dpo":
            config.model.restore_from_path = self._sft_run(layout.sft)
        return config

    def _sft_run(self, layout: Layout) -> str:
        """Return the folder of a short SFT run that moves the adapters well away from their initial values."""
        folder = self.folder / "runs" / f"{layout.name}-{layout.layers}"
        if not folder.exists():
            config = configured(self._config(layout), layout)
            config.exp_manager.explicit_log_dir, config.trainer.max_steps = str(folder), 2
            config.model.optim.lr = 1e-2
            run_ranks(layout.processes, _train_quietly, config)
        return str(folder)


def _train_quietly(config: RunConfig) -> None:
    with redirect_stdout(io.StringIO()):
        train(config)
