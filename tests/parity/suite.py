"""What the suite does: references, runs under layouts, planted bugs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tiny import make_tokenizer

from megatron_anymal.config import AnyMALConfig
from parity.data import make_parity_shards, parity_config
from parity.layouts import Layout
from parity.planted import Bug
from parity.reference import Trace, run_reference
from parity.runs import Difference, EngineRun, compare, configured, fingerprint, run_layout


class Suite:
    """Runs of one number of steps, with the references they share."""

    def __init__(self, folder: Path, steps: int):
        """Keep data in `folder`."""
        self.folder, self.steps = folder, steps
        self._tokenizer = make_tokenizer(folder / "tokenizer")
        self._configs: dict[str, AnyMALConfig] = {}
        self._clean: dict[Layout, Difference] = {}
        self._references: dict[tuple[str, str, bool], tuple[EngineRun, Trace]] = {}

    def difference(self, layout: Layout, bug: Bug | None = None) -> Difference:
        """How far a layout's run is from the reference in plain torch.

        Raises:
            AssertionError: it did not start from the same weights, or trains others.
        """
        one, reference = self.reference(layout)
        if bug is not None:
            return compare(run_layout(self._config(layout.media), layout, self.steps, bug.plant), reference)
        if layout not in self._clean:
            same = layout == _alone(layout)
            run = one if same else run_layout(self._config(layout.media), layout, self.steps)
            assert fingerprint(run.start) == fingerprint(one.start), f"{layout.name} starts from other weights"
            self._clean[layout] = compare(run, reference)
        return self._clean[layout]

    def reference(self, layout: Layout) -> tuple[EngineRun, Trace]:
        """The engine on one process, and plain torch from the same weights, for what a layout reads and trains."""
        key = (layout.media, layout.trains, layout.tied_head)
        if key not in self._references:
            config = self._config(layout.media)
            one = run_layout(config, _alone(layout), self.steps)
            wanted = configured(config, _alone(layout))
            self._references[key] = one, run_reference(wanted, one.start, one.trainable, self.steps)
        return self._references[key]

    def _config(self, media: str) -> AnyMALConfig:
        if media not in self._configs:
            shards = make_parity_shards(self.folder / media.replace(" ", "_"), self._tokenizer, media)
            self._configs[media] = parity_config(shards, self._tokenizer, media)
        return self._configs[media]


def _alone(layout: Layout) -> Layout:
    return replace(Layout(), media=layout.media, trains=layout.trains, tied_head=layout.tied_head)
