"""The page: one HTML file that needs no scripts, external files or network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_anymal.cli.data_page import samples
from megatron_anymal.cli.data_page.charts import bar, histogram
from megatron_anymal.cli.data_page.contents import ShownPack, read_packs
from megatron_anymal.cli.data_page.markup import count, file_size, notes, share, short, table, text
from megatron_anymal.cli.data_page.numbers import (
    MEASURED_STEPS,
    DatasetNumbers,
    RunView,
    Tally,
    dataset_numbers,
    fill,
    planned_samples,
    tally,
)
from megatron_anymal.cli.data_page.style import STYLE
from megatron_anymal.data.left_out import CODES, LeftOut
from megatron_anymal.data.lint import kind_name
from megatron_anymal.data.mix_stages import stage_lines
from megatron_anymal.data.step_plan import StepPlan

# Number of examples named for each reason to leave something out.
_NAMES = 3
_SECTIONS = {"index": "Index", "left-out": "Left out", "mixture": "Mixture", "step": "Step", "samples": "Samples"}


@dataclass(frozen=True)
class WrittenPage:
    """Summary of a written page."""

    # Number of samples on the page.
    samples: int
    # Number of packs that contain them.
    packs: int
    # Name of each sample that cannot be read, and the reason.
    bad: list[tuple[str, str]]


def write_page(file: Path, view: RunView, chosen: Sequence[tuple[int, int]]) -> WrittenPage:
    """Write the page for some samples of a run and the packs that contain them.

    Args:
        file: path of the page; an existing file is replaced.
        chosen: step (from 0) and position in its batch of each sample.

    Raises:
        OSError: the file cannot be written.
    """
    step = min((step for step, _ in chosen), default=0)
    numbers, packs = dataset_numbers(view), list(read_packs(view, chosen))
    of_stage = view.planner.steps_of(view.planner.stage_of(step), view.max_steps)
    plans = [view.planner.plan(at) for at in of_stage[:MEASURED_STEPS]]
    body = [
        _head(view, numbers, packs),
        _index(view, numbers),
        _left_out(numbers),
        _mixture(view, plans),
        _step(view, view.planner.plan(step)),
        _samples(view, packs),
    ]
    title = f"Data of {text(view.name)}"
    links = "".join(f"<a href='#{target}'>{name}</a>" for target, name in _SECTIONS.items())
    file.write_text(
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{title}</title><style>{STYLE}</style></head><body><nav aria-label=Sections>{links}</nav>"
        f"<main><h1>{title}</h1>{''.join(body)}</main></body></html>\n",
        encoding="utf-8",
    )
    shown = [sample for pack in packs for sample in pack.samples]
    return WrittenPage(len(shown), len(packs), [(sample.name, sample.bad) for sample in shown if sample.bad])


def _head(view: RunView, numbers: Sequence[DatasetNumbers], packs: Sequence[ShownPack]) -> str:
    layout, shown = view.planner.layout, [sample for pack in packs for sample in pack.samples]
    lost = sum(not entry.is_note for one in numbers for entry in one.index.left_out())
    bad = sum(bool(sample.bad) for sample in shown)
    tiles = (
        (count(sum(len(one.lengths) for one in numbers)), f"samples in {len(numbers)} dataset(s)"),
        (count(sum(int(one.lengths.sum()) for one in numbers)), "LLM tokens, soft tokens included"),
        (count(lost), "samples and members left out"),
        (count(sum(int((one.lengths > layout.seq_length).sum()) for one in numbers)), "samples too long"),
        (count(len(shown)), f"samples on this page, {bad or 'none'} bad"),
    )
    settings = (
        ("data.seq_length", count(layout.seq_length)),
        ("model.global_batch_size", count(view.planner.global_batch_size)),
        ("model.micro_batch_size", count(layout.micro_batch_size)),
        ("replicas", count(layout.data_parallel_size)),
        ("model.seed", str(view.planner.seed)),
        ("trainer.max_steps", count(view.max_steps)),
        ("data.tokenizer", f"<code>{short(view.tokenizer.name)}</code>"),
    )
    shown_tiles = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in tiles)
    return (
        "<p>Samples and packs as the model sees them: planned by the run's planner and read by its loader.</p>"
        f"<div class=tiles>{shown_tiles}</div>{notes(settings)}"
    )


def _index(view: RunView, numbers: Sequence[DatasetNumbers]) -> str:
    rows = []
    for one in numbers:
        index, kinds = one.index, one.index.sample_kinds()
        items = zip(*np.unique(index.media["kind"], return_counts=True))
        media = (
            ", ".join(f"{text(kind_name(index.header.kinds[kind]))} {count(number)}" for kind, number in items)
            or "none"
        )
        documents = ", ".join(f"{kind} {count(number)}" for kind, number in kinds.items())
        too_long = int((one.lengths > view.planner.layout.seq_length).sum())
        ignored = sum(index.members.get("ignored", {}).values())
        shards = f"{count(len(index.header.shards))}, {file_size(sum(index.header.shard_bytes))}"
        cells = (documents, media, shards, count(len(index)), count(ignored), count(too_long))
        rows.append([text(one.name), f"<code>{short(index.folder, 60)}</code>", *cells])
    head = ("dataset", "folder", "sample kinds", "media items", "shards", "samples", "ignored members", "too long")
    limit = view.planner.layout.seq_length
    lengths = "".join(
        histogram(one.lengths, f"<b>{text(one.name)}</b>: length", "LLM tokens", limit, "data.seq_length")
        for one in numbers
    )
    costs = "".join(
        histogram(one.costs[one.costs > 0], f"<b>{text(one.name)}</b>: encoder cost", "units of work")
        for one in numbers
        if (one.costs > 0).any()
    )
    if costs:
        costs = (
            "<h3>Encoder cost per sample with media</h3><p>The planner balances packs by tokens and by this cost.</p>"
            f"<div class=plots>{costs}</div>"
        )
    return (
        f"<section id=index><h2>Index</h2>{table(head, rows, 'Contents of the indexes', 5)}<h3>Length per sample</h3>"
        "<p>Soft tokens included. A dashed line marks data.seq_length if it is in range.</p>"
        f"<div class=plots>{lengths}</div>{costs}</section>"
    )


def _left_out(numbers: Sequence[DatasetNumbers]) -> str:
    """Entries left out of the indexes, and notes, by code."""
    entries = [(one.name, entry) for one in numbers for entry in one.index.left_out()]
    by_code: dict[str, list[tuple[str, LeftOut]]] = {}
    for name, entry in entries:
        by_code.setdefault(entry.code, []).append((name, entry))
    rows = []
    for code, left_out in sorted(by_code.items(), key=lambda item: -len(item[1])):
        names = "".join(f"<li>{text(name)}: {short(entry, 240)}</li>" for name, entry in left_out[:_NAMES])
        meaning = CODES.get(code, "") + (" (nothing is left out)" if left_out[0][1].is_note else "")
        rows.append([f"<code>{text(code)}</code>", text(meaning), f"<ul>{names}</ul>", count(len(left_out))])
    shown = (
        table(("code", "meaning", "first entries", "count"), rows, "Left out when the indexes were made", 3)
        if rows
        else "<p>Nothing was left out when the indexes were made.</p>"
    )
    return f"<section id=left-out><h2>Left out</h2>{shown}</section>"


def _mixture(view: RunView, plans: Sequence[StepPlan]) -> str:
    """Shares of datasets and modalities, and the fill of packs, over the first steps of the stage."""
    planned = [sample for plan in plans for sample in planned_samples(plan)]
    stage = view.planner.stages[view.planner.stage_of(plans[0].step)]
    whole, weights = tally(view, planned), stage.weights
    first = f"first {len(plans)} steps" + (f" of stage {text(stage.name)}" if stage.name else "")
    rows = []
    for number, name in enumerate(view.datasets):
        own = tally(view, [sample for sample in planned if sample.dataset == number])
        rows.append([text(name), share(weights[number], sum(weights)), *_shares(own, whole)])
    head = ("samples", "tokens", "targets", "encoder inputs", "encoder cost")
    by_dataset = table(("dataset", "weight", *head), rows, f"Shares of the datasets in the {first}")
    rows = []
    for name in [*view.loaded, *(view.codes.sections if view.codes else ()), "text"]:
        own = tally(view, [s for s in planned if (s.media[0].modality if s.media else "text") == name])
        if own.samples:
            rows.append([text(name), *_shares(own, whole)])
    caption = f"Shares of the modalities in the {first}, by a sample's first media item"
    fills = [fill(plan) for plan in plans]
    packs = [sum(len(replica) for replica in plan.micro_batches) for plan in plans]
    dropped = sum(len(plan.dropped) for plan in plans)
    filled = (
        f"<p>{sum(fills) / len(fills):.1%} of the computed tokens are real, {min(fills):.1%} in the worst step. A step "
        f"has {_from_to(packs)} pack(s). "
        f"{count(dropped) if dropped else 'No'} sample(s) are longer than a pack.</p>"
    )
    by_modality = table(("modality", *head), rows, caption)
    lines = stage_lines(view.datasets, view.schedule, view.max_steps, view.planner.stages)
    stages = f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>" if lines else ""
    return f"<section id=mixture><h2>Mixture</h2>{stages}{filled}{by_dataset}{by_modality}</section>"


def _from_to(counts: Sequence[int]) -> str:
    return count(min(counts)) if min(counts) == max(counts) else f"{count(min(counts))} to {count(max(counts))}"


def _shares(own: Tally, whole: Tally) -> list[str]:
    pairs = (
        (own.samples, whole.samples),
        (own.tokens, whole.tokens),
        (own.targets, whole.targets),
        (own.pieces, whole.pieces),
        (own.cost, whole.cost),
    )
    return [bar(part, all_, share(part, all_)) for part, all_ in pairs]


def _step(view: RunView, plan: StepPlan) -> str:
    dropped = [view.planner.key(int(plan.dataset[at]), int(plan.sample[at])) for at in plan.dropped]
    names = ", ".join(f"<code>{short(name)}</code>" for name in dropped[:_NAMES])
    more = f" and {count(len(dropped) - _NAMES)} more" if len(dropped) > _NAMES else ""
    left_out = f"<p class=why>Longer than data.seq_length, so not in a pack: {names}{more}</p>" if dropped else ""
    return f"<section id=step><h2>Step {plan.step + 1}</h2>{left_out}{samples.step_table(view, plan)}</section>"


def _samples(view: RunView, packs: Sequence[ShownPack]) -> str:
    options = (
        "<div class=options><label><input type=checkbox id=ids checked> token ids (below)</label>"
        "<label><input type=checkbox id=positions checked> positions in the document (above)</label></div>"
    )
    key = (
        "<div class=tokens><span>token</span><mark>target</mark><a href='#samples'>media</a></div><p>A <b>target</b> "
        "has a thick lower border: the loss counts its prediction, which is made at the position before it. Other "
        "tokens are only context. Spaces show as \u00b7, line breaks as \u21b5, and parts of a character as \ufffd.</p>"
    )
    shown = "".join(samples.pack(view, pack) for pack in packs)
    return f"<section id=samples><h2>Samples</h2>{key}{options}{shown}</section>"
