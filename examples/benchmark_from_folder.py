"""A small benchmark in the format of VQAv2, made of prepared samples with one picture each.

    python -m examples.benchmark_from_folder --samples FOLDER --out FOLDER [--limit N]

Each sample's last text is its answer, given by ten annotators who agree; the text before it is its question. Samples
with several texts before the answer, such as conversations of several turns, are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Write OUT/data/validation-00000-of-00001.parquet."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmark_from_folder", description=__doc__)
    parser.add_argument("--samples", required=True, help="a prepared folder of pictures with questions")
    parser.add_argument("--out", required=True, help="folder of the benchmark")
    parser.add_argument("--limit", type=int, default=24, help="number of samples")
    arguments = parser.parse_args(argv)
    from pyarrow import Table, parquet

    from megatron_anymal.data.records import DataError
    from megatron_anymal.generation.evaluation import read_questions

    try:
        questions = read_questions(arguments.samples)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    single = [question for question in questions if len(_texts(question)) < 2]
    rows = [_row(number, question) for number, question in enumerate(single[: arguments.limit])]
    file = Path(arguments.out) / "data" / "validation-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(Table.from_pylist(rows), file)
    left_out = len(questions) - len(single)
    print(f"wrote {len(rows)} questions to {file}; {left_out} of {len(questions)} samples have several texts: left out")
    return 0


def _texts(question: Any) -> list[str]:
    return [part.text for part in question.prompt.parts if hasattr(part, "text") and not part.control]


def _row(number: int, question: Any) -> dict[str, Any]:
    answers = [{"answer": question.answer, "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
    [picture] = question.prompt.media
    return {
        "question_id": number,
        "question_type": "what is",
        "question": "".join(_texts(question)),
        "answers": answers,
        "image": {"bytes": picture.data, "path": f"{question.key}.{picture.extension}"},
    }


if __name__ == "__main__":
    raise SystemExit(main())
