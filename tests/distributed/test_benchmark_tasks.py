"""`anymal evaluate --task` from the command line: every task, several processes, kill and resume."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fork_server
import pytest
from benchmark_data import COUNT, MAKERS, make_all, video_file
from engine import train
from ranks import run_ranks
from tiny import SPECIAL, VIDEOMAE, make_config, modalities

from megatron_anymal.config import EncoderConfig, ModalityConfig, ProjectorConfig
from megatron_anymal.evaluation.readers import samples_of
from megatron_anymal.evaluation.samples import build_prompt
from megatron_anymal.evaluation.task_files import find_task
from megatron_anymal.generation.checkpoint_generator import NativeGenerator
from megatron_anymal.generation.sampling import Sampling


@pytest.fixture(scope="module")
def run_dir(mixed_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with all four modalities and a checkpoint."""
    folder = tmp_path_factory.mktemp("benchmarked")
    config = make_config(mixed_shards, tokenizer_folder, folder)
    config.model.modalities = modalities()
    config.model.modalities["video"] = ModalityConfig(
        encoder=EncoderConfig(type="videomae", config=VIDEOMAE),
        projector=ProjectorConfig(
            type="resampler", num_layers=1, num_tokens=2, hidden_size=16, num_attention_heads=4, ffn_multiplier=2
        ),
        options={"clip_seconds": 1.0, "max_clips": 2},
        placeholder=SPECIAL[5],
    )
    run_ranks(1, train, config)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of every task."""
    folder = tmp_path_factory.mktemp("benchmarks") / "data"
    make_all(folder, video_file())
    return folder


def evaluate(run_dir: Path, root: Path, out: Path, *words: str, world: int = 1) -> tuple[int, str]:
    """Run the command line on all tasks that `words` name; return the exit code and what rank 0 printed."""
    command = ["-m", "megatron_anymal", "evaluate", "--checkpoint", run_dir, "--data-root", root, "--out", out, *words]
    if world == 1:
        done = fork_server.python(*command, cwd=out.parent)
        return done.returncode, done.stdout + done.stderr
    log = out.with_suffix(".log")
    ranks = fork_server.job(*command, world=world, log=log, cwd=out.parent)
    try:
        codes = [rank.wait(240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.process.kill()
    return max(codes), log.read_text()


def answers_of(out: Path) -> dict[str, dict[str, tuple[str, list[float]]]]:
    """Task -> key -> text and likelihoods of a result."""
    tasks = json.loads((out / "results.json").read_text())["tasks"]
    return {
        name: {row["key"]: (row["text"], row["log_likelihoods"]) for row in task["answers"]}
        for name, task in tasks.items()
    }


# The captions' metrics that do not need SPICE's downloads.
WITHOUT = ("--without-metric", "spice", "spider")
SOME = ("--task", "vqav2", "mmbench", "hateful_memes", "--likelihood")


@pytest.fixture(scope="module")
def alone(run_dir: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of every task on one process."""
    out = tmp_path_factory.mktemp("alone") / "all"
    code, output = evaluate(run_dir, root, out, "--task", *MAKERS, "--likelihood", *WITHOUT)
    assert code == 0, output
    (out / "printed.txt").write_text(output)
    return out


def test_every_task_is_scored(alone: Path) -> None:
    results = json.loads((alone / "results.json").read_text())
    assert list(results["tasks"]) == list(MAKERS)
    for name, task in results["tasks"].items():
        assert task["samples"] == len(task["answers"]) >= 4, name
        for metric, score in task["scores"].items():
            values = [row["values"][metric] for row in task["answers"]]
            if metric != "auroc":
                assert score["value"] == pytest.approx(100 * sum(values) / len(values)), name
    texts = [row["text"] for task in results["tasks"].values() for row in task["answers"]]
    assert len(set(texts)) > 3, "too few distinct answers"
    parts = results["tasks"]["mvbench"]["breakdown"]
    assert set(parts) == {"action_sequence", "moving_count"} and parts["moving_count"]["samples"] == 2
    likely = results["tasks"]["hateful_memes"]["answers"][0]
    assert len(likely["log_likelihoods"]) == 2 and max(likely["log_likelihoods"]) < 0


def test_reports_stand_beside_the_paper(alone: Path) -> None:
    output = (alone / "printed.txt").read_text()
    row = next(line for line in output.splitlines() if line.startswith("VQAv2"))
    assert row.split()[-4:] == ["71.0", "78.7", "Table", "1"]
    text = (alone / "results.md").read_text()
    assert "| AnyMAL 70B | 78.7 |" in text and "| this model |" in text and "| Gemini Ultra | 77.8 |" in text
    page = (alone / "results.html").read_text()
    assert "data:image/jpeg;base64," in page and "<script" not in page and "src='http" not in page
    assert page.count("<article>") >= 4 * len(MAKERS)


def plain_answers(run_dir: Path, root: Path) -> list[Any]:
    """In a rank: answers and likelihoods of MMBench, one sample and one candidate at a time."""
    generator = NativeGenerator.of_run(str(run_dir))
    answers = []
    for sample in samples_of(find_task("mmbench"), root / "mmbench")[0]:
        prompt = build_prompt(sample)
        [text] = generator.answer([prompt], Sampling(16))
        scores = [generator.log_likelihoods([prompt], [[letter]])[0][0] for letter in sample.candidates]
        answers.append((sample.key, text.strip(), scores))
    return answers


def test_answers_do_not_depend_on_batches(run_dir: Path, root: Path, alone: Path) -> None:
    [expected] = run_ranks(1, plain_answers, run_dir, root)
    answers = answers_of(alone)["mmbench"]
    assert len(expected) == len(answers) == COUNT
    for key, text, scores in expected:
        assert answers[key][0] == text and answers[key][1] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("layout", [["--tensor-model-parallel-size", "1"], [], ["--pipeline-model-parallel-size", "2"]])
def test_two_processes_give_the_same(layout: list[str], run_dir: Path, root: Path, alone: Path, tmp_path: Path) -> None:
    code, output = evaluate(run_dir, root, tmp_path / "out", *SOME, *layout, world=2)
    assert code == 0, output
    expected, answers = answers_of(alone), answers_of(tmp_path / "out")
    journals = sorted(path.name for path in (tmp_path / "out" / "vqav2").glob("*.jsonl"))
    copies = 2 if "--tensor-model-parallel-size" in layout else 1
    assert journals == [f"answers.{n}.jsonl" for n in range(copies)] and ("copies" in output) == (copies > 1)
    for task in answers:
        assert answers[task].keys() == expected[task].keys()
        for key, (text, scores) in answers[task].items():
            assert text == expected[task][key][0]
            assert scores == pytest.approx(expected[task][key][1], abs=1e-4)


def lines_of(out: Path) -> list[str]:
    """Complete lines of all journals."""
    texts = [path.read_text() for path in sorted(out.rglob("answers.*.jsonl"))]
    return [line for text in texts for line in text.splitlines(keepends=True) if line.endswith("\n")]


def test_a_killed_evaluation_continues(run_dir: Path, root: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["-m", "megatron_anymal", "evaluate", "--checkpoint", run_dir, "--data-root", root, "--out", out, *SOME]
    process = fork_server.Interpreter(*words, "--batch-size", 1, output=(tmp_path / "log",), cwd=tmp_path)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None and len(lines_of(out)) < 7:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(240)
    before = lines_of(out)
    assert 7 <= len(before) < 3 * COUNT, (tmp_path / "log").read_text()
    # Killed within a write.
    with (out / "vqav2" / "answers.0.jsonl").open("a") as file:
        file.write('{"key": "cut o')
    code, output = evaluate(run_dir, root, out, *SOME, "--batch-size", "4", "--without-metric", "auroc")
    assert code == 0, output
    keys = Counter(json.loads(line)["key"] for line in lines_of(out))
    assert set(before) <= set(lines_of(out)) and len(keys) == 3 * COUNT and max(keys.values()) == 1
    expected = answers_of(alone)
    for task, rows in answers_of(out).items():
        assert {key: text for key, (text, _) in rows.items()} == {k: text for k, (text, _) in expected[task].items()}


def test_nothing_is_answered_twice(run_dir: Path, root: Path, alone: Path) -> None:
    before, lines = (alone / "results.json").read_text(), lines_of(alone)
    words = ("--task", *MAKERS, "--likelihood", *WITHOUT, "--against", str(alone))
    code, output = evaluate(run_dir, root, alone, *words)
    assert code == 0 and "to answer" not in output and lines_of(alone) == lines, output
    assert (alone / "results.json").read_text() == before
    differences = [line for line in output.splitlines() if "+0.00 to +0.00" in line]
    assert len(differences) >= len(MAKERS) and "1.0000" in differences[0]


def test_limits_and_sampling(run_dir: Path, root: Path, tmp_path: Path) -> None:
    sampled = ("--temperature", "1.0", "--seed", "3")
    code, output = evaluate(run_dir, root, tmp_path / "few", "--task", "vqav2", "--limit", "4", *sampled)
    assert code == 0, output
    code, output = evaluate(run_dir, root, tmp_path / "all", "--task", "vqav2", *sampled, "--batch-size", "2")
    assert code == 0, output
    few, everything = answers_of(tmp_path / "few")["vqav2"], answers_of(tmp_path / "all")["vqav2"]
    # A draw depends on the sample alone, not on the others that are answered along with it.
    assert len(few) == 4 and sum(bool(text) for text, _ in few.values()) >= 2 and few.items() <= everything.items()
    code, output = evaluate(run_dir, root, tmp_path / "all", "--task", "vqav2")
    assert code == 2 and "holds answers with sampling=" in output and "--out" in output, output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "vqa2"], "Did you mean 'vqav2'?"),
        (["--task", "vqav2", "--without-metric", "cidre"], "Did you mean 'cider'?"),
        (["--task", "vqav2", "--without-metric", "vqa_accuracy"], "leaves no metric"),
        (["--task", "vqav2", "--permute-media"], "--permute-media cannot be combined with --task"),
        (["--task", "vqav2=/none"], "There is no data folder '/none'"),
        (["--task", "vqav2", "--against", "/none.json"], "There are no results '/none.json'"),
        (["--task", "vqav2", "--limit", "0"], "--limit=0"),
        (["--task", "hateful_memes", "--limit", "1"], "one label only"),
        ([], "Name either benchmarks with --task or prepared folders with --data"),
    ],
)
def test_refusals(words: list[str], message: str, run_dir: Path, root: Path, tmp_path: Path) -> None:
    code, output = evaluate(run_dir, root, tmp_path / "out", *words)
    assert code == 2 and message in output and output.count("\n") == 1, output


def test_own_task_files(run_dir: Path, root: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(
        "title: Own\nsource: here\nfiles: rows.jsonl\nprompt: vqa\nkey: id\nmedia: {column: file}\n"
        "texts: {question: ask}\nreferences: answers\nmetrics: [anls, exact_match]\n"
    )
    picture = root / "coco_captions" / "val2014" / "COCO_val2014_000000000001.jpg"
    row = {"id": 1, "ask": "what is this?", "file": str(picture), "answers": ["two"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    words = ("--task-folder", str(tmp_path / "tasks"), "--task", f"own={tmp_path}")
    code, output = evaluate(run_dir, root, tmp_path / "out", *words)
    assert code == 0 and "ANLS" in output, output
