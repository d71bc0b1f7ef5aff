"""The page's section on contents: packs with their documents, samples with media and tokens."""

from __future__ import annotations

from megatron_anymal.cli.data_page import media, tokens
from megatron_anymal.cli.data_page.charts import stacked
from megatron_anymal.cli.data_page.contents import ShownPack, ShownSample
from megatron_anymal.cli.data_page.markup import count, notes, share, short, table, text
from megatron_anymal.cli.data_page.numbers import RunView, tally
from megatron_anymal.data.records import PlannedSample
from megatron_anymal.data.step_plan import StepPlan

# Packs of a step, and documents of a pack, that a table lists.
ROWS = 64
_KEY = (
    "<p class=key><span><i class=answer></i> targets</span><span><i class=prompt></i> other text</span>"
    "<span><i class=media></i> soft tokens</span><span><i class=filler></i> padding</span></p>"
)


def step_table(view: RunView, plan: StepPlan) -> str:
    """Fill of all packs of a step, in the order in which they run."""
    rows = []
    for number, round_of in enumerate(plan.in_order()):
        for replica, pack in enumerate(round_of):
            sums, length = tally(view, pack.samples), plan.padded_length
            other = sums.tokens - sums.targets - sums.soft
            parts = (
                ("answer", sums.targets),
                ("prompt", other),
                ("media", sums.soft),
                ("filler", length - sums.tokens),
            )
            numbers = map(count, (sums.samples, sums.tokens, sums.targets, sums.soft, sums.pieces))
            rows.append([str(number + 1), str(replica), stacked(parts, length), share(sums.tokens, length), *numbers])
    head = ("pack", "replica", "tokens", "real", "samples", "tokens", "targets", "soft tokens", "encoder inputs")
    more = f"<p class=quiet>{count(len(rows) - ROWS)} more packs not shown</p>" if len(rows) > ROWS else ""
    caption = (
        f"Packs in the order in which they run; each is padded to {count(plan.padded_length)} tokens, the longest of "
        "the step"
    )
    return _KEY + table(head, rows[:ROWS], caption, 3) + more


def pack(view: RunView, shown: ShownPack) -> str:
    """A pack and its shown samples."""
    plan = shown.micro_batch.plan
    real = sum(sample.length for sample in plan.samples)
    title = f"Step {shown.step + 1}, pack {shown.number + 1}, replica {shown.replica}"
    numbers = (
        f"{count(len(plan.samples))} sample(s), {count(real)} of {count(plan.padded_length)} tokens are real "
        f"({share(real, plan.padded_length)})"
    )
    return (
        f"<section id='pack-{shown.step}-{shown.replica}-{shown.number}'><h3>{title}</h3><p>{numbers}. Attention never "
        "crosses a boundary between documents, and positions start again at 0; the two answers of a pair may "
        f"continue the same prompt.</p>{_strip(view, shown)}"
        f"{_documents(view, shown)}{''.join(_sample(view, shown, sample) for sample in shown.samples)}</section>"
    )


def anchor(shown: ShownPack, position: int) -> str:
    """Link target of a sample."""
    return f"sample-{shown.step}-{position}"


def _strip(view: RunView, shown: ShownPack) -> str:
    """The documents of a pack side by side, with widths in proportion to their lengths; shown samples are links."""
    blocks, targets = [], {sample.planned.position for sample in shown.samples}
    lengths = iter(shown.micro_batch.document_lengths)
    for number, sample in enumerate(shown.micro_batch.plan.samples):
        name = text(view.planner.key(sample.dataset, sample.sample))
        look = " class=bad" if sample.position in shown.micro_batch.bad else ""
        for _ in sample.spans:
            length = next(lengths)
            attributes = f"{look} style='flex-grow:{length}' title='{name}: {count(length)} tokens'"
            if sample.position in targets:
                blocks.append(f"<a href='#{anchor(shown, sample.position)}'{attributes}>{number + 1}</a>")
            else:
                blocks.append(f"<span{attributes}>{number + 1}</span>")
    padding = sum(lengths)
    if padding:
        blocks.append(
            f"<span class=filler style='flex-grow:{padding}' title='padding: {count(padding)} tokens'></span>"
        )
    end = count(shown.micro_batch.plan.padded_length)
    axis = f"<div class=ends><span>0</span><span>tokens</span><span>{end}</span></div>"
    return f"<div class=strip>{''.join(blocks)}</div>{axis}"


def _documents(view: RunView, shown: ShownPack) -> str:
    rows, at = [], 0
    lengths = iter(shown.micro_batch.document_lengths)
    linked = {sample.planned.position for sample in shown.samples}
    for number, sample in enumerate(shown.micro_batch.plan.samples):
        name = short(view.planner.key(sample.dataset, sample.sample), 60)
        if sample.position in linked:
            name = f"<a href='#{anchor(shown, sample.position)}'>{name}</a>"
        state = "not read" if sample.position in shown.micro_batch.bad else "read"
        for branch, length in enumerate(sample.spans):
            which = f" {_branch(sample, branch)}" if len(sample.documents) > 1 else ""
            first, at = at, at + next(lengths)
            end = first + length - 1
            rows.append([f"{number + 1}{which}", name, f"{count(first)}\u2013{count(end)}", count(length), state])
    more = f"<p class=quiet>{count(len(rows) - ROWS)} more documents not shown</p>" if len(rows) > ROWS else ""
    head = ("document", "sample", "positions in the pack", "tokens", "state")
    listed = table(head, rows[:ROWS], "Positions count from the start of the pack", 2)
    return f"<details><summary>Documents of this pack</summary>{listed}{more}</details>"


def _branch(sample: PlannedSample, number: int) -> str:
    names = ("prompt", "chosen", "rejected") if sample.shared else ("chosen", "rejected")
    return names[number] if len(sample.documents) > 1 else ""


def _sample(view: RunView, shown: ShownPack, sample: ShownSample) -> str:
    own, planned = anchor(shown, sample.planned.position), sample.planned
    about = [
        ("position in the batch", count(planned.position)),
        ("tokens", count(planned.length)),
        ("targets", count(planned.targets)),
        ("encoder inputs", count(sum(len(item.pieces) for item in sample.media))),
        ("tokens of the pack", ", ".join(f"{count(s.start)}\u2013{count(s.stop - 1)}" for s in sample.documents)),
    ]
    if sample.bad:
        body = (
            f"<p class=why><b>Cannot be read:</b> {short(sample.bad, 2000)}</p><p>Training leaves it out of the loss, "
            "counts it, and stops if the share of such samples in a step exceeds <code>data.max_bad_share</code>.</p>"
        )
    else:
        body = _media(view, sample, own) + _tokens(view, shown, sample, own)
    look = " class=bad" if sample.bad else ""
    return f"<article{look} id='{own}'><h3>{short(sample.name)}</h3>{notes(about)}{body}</article>"


def _media(view: RunView, sample: ShownSample, own: str) -> str:
    shown = sample.media[: media.ITEMS]
    room = 1 / max(1, len(shown))
    items = "".join(media.item(one, view.loaded[one.planned.modality], at, own, room) for at, one in enumerate(shown))
    hidden = len(sample.media) - len(shown)
    more = f"<p class=quiet>{count(hidden)} more media items not shown</p>" if hidden else ""
    return f"<div class=media>{items}</div>{more}" if items else ""


def _tokens(view: RunView, shown: ShownPack, sample: ShownSample, own: str) -> str:
    written = []
    for number, span in enumerate(sample.documents):
        branch = _branch(sample.planned, number)
        title = f"<p><b>{branch}</b></p>" if branch else ""
        first = sample.planned.shared if number else 0
        written.append(f"{title}{tokens.document(view, shown, sample, span, own, first)}")
    return "".join(written)
