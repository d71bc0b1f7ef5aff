"""The work of `anymal inspect --html`: chooses samples of a run and writes their page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_anymal.cli.data_page.contents import choose, occurrence
from megatron_anymal.cli.data_page.markup import file_size
from megatron_anymal.cli.data_page.numbers import RunView
from megatron_anymal.cli.data_page.page import write_page
from megatron_anymal.cli.inspection import build_run, find_sample, planner_of
from megatron_anymal.config import RunConfig
from megatron_anymal.data.records import DataError
from megatron_anymal.modalities import load_plugins
from megatron_anymal.model.memory.encoder_sizes import measured_encoders
from megatron_anymal.train.encoder_costs import FILE, passes, read_costs

# Samples that are shown unless --samples says otherwise.
_SAMPLES = 8


def inspect_page(arguments: argparse.Namespace, config: RunConfig) -> int:
    """Write the page that the verb's arguments ask for; return 1 if a sample on it cannot be read.

    Raises:
        DataError: an argument is out of range, a sample is not used, or the data cannot be planned.
        ConfigError: a plug-in or a modality cannot be used.
        OSError: the file cannot be written.
    """
    file, last = Path(arguments.html), config.trainer.max_steps
    if file.is_dir() or not file.parent.is_dir():
        raise DataError(f"--html={arguments.html} is not a file in a folder that exists. Correct the path.")
    samples = _SAMPLES if arguments.samples is None else arguments.samples
    step = 1 if arguments.step is None else arguments.step
    if samples < 1 or not 1 <= step <= last:
        raise DataError(
            f"--samples={samples} must be at least 1, and --step={step} between 1 and {last}, the last step."
        )
    load_plugins([*arguments.plugin, *config.model.plugins])
    run = build_run(config)
    view = RunView(
        name=arguments.config_name,
        planner=planner_of(run, config.data.train, config.data.schedule),
        tokenizer=run.reading.tokenizer,
        loaded={modality.name: run.reading.loaded[modality.kind] for modality in run.modalities},
        codes=run.reading.codes,
        datasets=config.data.train,
        schedule=config.data.schedule,
        max_steps=config.trainer.max_steps,
    )
    view.planner.use_encoder_costs(_encoder_costs(config, view))
    chosen = _named(view, arguments.sample) if arguments.sample else choose(view, step - 1, samples)
    page = write_page(file, view, chosen)
    for name, why in page.bad:
        print(f"bad: {name}: {why}")
    print(f"wrote {file}: {page.samples} sample(s) in {page.packs} pack(s), {file_size(file.stat().st_size)}")
    return 1 if page.bad else 0


def _encoder_costs(config: RunConfig, view: RunView) -> dict[str, float]:
    """Costs of one piece by which the run balances its packs; of operations as long as it has not measured them."""
    sections = config.model.modalities
    if config.model.encoder_costs == "configured":
        return {name: section.cost_per_piece for name, section in sections.items()}
    if config.model.encoder_costs == "measured":
        kept = read_costs(config.run_dir / FILE)
        if kept.keys() == sections.keys():
            return kept
        print(f"the run has not measured its encoders yet (no {FILE}): packs are planned by their operations")
    modalities = {name: entry.modality for name, entry in view.loaded.items()}
    counted = measured_encoders(config.model, config.trainer.precision, modalities, operations=True)
    return {
        name: passes(trains=not section.encoder.freeze) * sizes.operations
        for name, (section, sizes) in zip(sections, counted)
    }


def _named(view: RunView, names: Sequence[str]) -> list[tuple[int, int]]:
    """Step and position of samples of a run, given by their keys or numbers in any of its datasets."""
    chosen = []
    for name in names:
        matches, missing = [], ""
        for number, index in enumerate(view.planner.indexes):
            try:
                matches.append(occurrence(view, number, find_sample(index, name)))
            except DataError as error:
                missing = missing or str(error)
        if not matches:
            raise DataError(missing)
        chosen += matches
    return chosen
