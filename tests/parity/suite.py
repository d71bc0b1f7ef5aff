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
from parity.layouts import Layout
from parity.planted import Bug
from parity.reference import Trace, run_reference
from parity.runs import Difference, EngineRun, compare, configured, fingerprint, run_layout


class Suite:
    """Runs a fixed number of steps per layout; layouts with the same data and job share a reference."""

    def __init__(self, folder: Path, steps: int):
        """Write data and SFT runs to `folder`."""
        self.folder, self.steps = folder, steps
        self._tokenizer = make_tokenizer(folder / "tokenizer")
        self._data: dict[tuple[str, str], RunConfig] = {}
        self._clean: dict[Layout, Difference] = {}
        self._references: dict[Layout, tuple[EngineRun, Trace]] = {}

    def difference(self, layout: Layout, bug: Bug | None = None) -> Difference:
        """Return a layout's difference from the plain-torch reference, with a planted bug if one is given.

        Raises:
            AssertionError: the initial weights or the set of trained weights differ.
        """
        one, reference = self.reference(layout)
        if bug is not None:
            return compare(run_layout(self._config(layout), layout, self.steps, bug.plant), reference)
        if layout not in self._clean:
            run = one if layout == layout.alone else run_layout(self._config(layout), layout, self.steps)
            assert fingerprint(run.start) == fingerprint(one.start), f"{layout.name} starts from different weights"
            self._clean[layout] = compare(run, reference)
        return self._clean[layout]

    def reference(self, layout: Layout) -> tuple[EngineRun, Trace]:
        """Run the engine on one process and plain torch from the same weights, for the layout's data and job."""
        alone = layout.alone
        if alone not in self._references:
            config = self._config(alone)
            one = run_layout(config, alone, self.steps)
            wanted = configured(config, alone)
            self._references[alone] = one, run_reference(wanted, one.start, one.trainable, self.steps)
        return self._references[alone]

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
        folder = self.folder / "runs" / layout.name
        if not folder.exists():
            config = configured(self._config(layout), layout)
            config.exp_manager.explicit_log_dir, config.trainer.max_steps = str(folder), 2
            config.model.optim.lr = 1e-2
            run_ranks(layout.processes, _train_quietly, config, timeout=240)
        return str(folder)


def _train_quietly(config: RunConfig) -> None:
    with redirect_stdout(io.StringIO()):
        train(config)
