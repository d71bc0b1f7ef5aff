"""`anymal plan goodput`: what it prints, what it refuses, and how long it takes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_anymal.__main__ import main
from megatron_anymal.planning.goodput import shares
from megatron_anymal.planning.goodput_inputs import GPUS, INPUTS, job_of, resolve
from megatron_anymal.resilience.events import record


def answer(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["plan", "goodput", "--json", *options]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_the_model_gets_what_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "mtbf_per_gpu_hours": 20_000.0,
        "step_seconds": 3.0,
        "save_every": 200,
        "stall_seconds": 2.0,
        "write_seconds": 40.0,
        "detection_seconds": 5.0,
        "processes_seconds": 7.0,
        "groups_seconds": 11.0,
        "restore_seconds": 13.0,
        "first_step_seconds": 17.0,
        "lost_node_seconds": 300.0,
        "lost_node_share": 0.25,
        "peer_every": 10,
        "peer_stall_seconds": 0.5,
        "peer_restore_seconds": 1.5,
        "peer_coverage": 0.9,
    }
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    report = answer(capsys, *words, "--gpus=4096")
    assert {name: entry["value"] for name, entry in report["inputs"].items() if entry["origin"] == "given"} == options
    [row] = report["results"]
    assert row["mtbf_seconds"] == pytest.approx(20_000 * 3600 / 4096)
    assert row["recovery_seconds"] == pytest.approx(5 + 7 + 11 + 13 + 17 + 0.25 * 300)
    assert row["peer_recovery_seconds"] == pytest.approx(5 + 7 + 11 + 1.5 + 17 + 0.25 * 300)
    expected = shares(job_of(resolve(options, {}), 4096), 200)
    assert {name: row["present"][name] for name in dataclasses.asdict(expected)} == dataclasses.asdict(expected)
    assert row["best"]["steps"] % 10 == 0 and row["best"]["ratio"] > row["present"]["ratio"]
    assert row["best"]["seconds"] == 3.0 * row["best"]["steps"]


def test_mtbf_of_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    report = answer(capsys, "--mtbf-per-node-hours=5000", "--gpus-per-node=4", "--gpus=1022", "--gpus=16")
    assert [(row["gpus"], row["nodes"]) for row in report["results"]] == [(16, 4), (1022, 256)]
    assert [row["mtbf_seconds"] for row in report["results"]] == [5000 * 3600 / 4, 5000 * 3600 / 256]
    assert "mtbf_per_gpu_hours" not in report["inputs"]


def test_defaults_say_that_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    report = answer(capsys)
    assert [row["gpus"] for row in report["results"]] == list(GPUS)
    assert all(entry["origin"].startswith("default: ") for entry in report["inputs"].values())
    # 54 days / 419 interruptions.
    assert report["results"][-1]["mtbf_seconds"] == pytest.approx(54 * 86400 / 419)
    assert main(["plan", "goodput"]) == 0
    text = capsys.readouterr().out
    for name, entry in report["inputs"].items():
        [line] = [line for line in text.splitlines() if line.startswith(f"  {name} ")]
        assert line.endswith(entry["origin"])
    best = report["results"][-1]["best"]
    assert f"Set exp_manager.checkpoint.every_n_train_steps={best['steps']}." in text


def test_from_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, "start", "", time=0.0, rank=-1, attempt=1)
    record(tmp_path, "start", "", time=9.0, rank=0, attempt=1, processes=24)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "step_seconds": 0.5}\n')
    report = answer(capsys, f"--run={tmp_path}", "--write-seconds=4")
    assert [row["gpus"] for row in report["results"]] == [24]
    origins = {name: entry["origin"].partition(":")[0] for name, entry in report["inputs"].items()}
    assert origins["step_seconds"] == origins["processes_seconds"] == "measured"
    assert origins["write_seconds"] == "given" and origins["restore_seconds"] == "default"
    assert report["inputs"]["stall_seconds"]["value"] == pytest.approx(0.7 * 0.5)
    assert report["notes"] == ["No failure in 9s."]


REFUSED = {
    "gpus": (["--gpus=0"], ["--gpus=0", "1 or more"]),
    "negative": (["--stall-seconds=-1"], ["--stall-seconds=-1", "0 or more"]),
    "zero": (["--step-seconds=0"], ["--step-seconds=0", "above 0"]),
    "zero-mtbf": (["--mtbf-per-gpu-hours=0"], ["--mtbf-per-gpu-hours=0", "above 0"]),
    "not-a-number": (["--write-seconds=nan"], ["--write-seconds=nan", "finite"]),
    "infinite": (["--mtbf-per-node-hours=inf"], ["--mtbf-per-node-hours=inf", "finite"]),
    "share": (["--lost-node-share=1.5"], ["--lost-node-share=1.5", "at most 1"]),
    "coverage": (["--peer-every=5", "--peer-coverage=1"], ["--peer-coverage=1", "at most 0.9999"]),
    "two-mtbf": (["--mtbf-per-gpu-hours=9", "--mtbf-per-node-hours=9"], ["are mutually exclusive"]),
    "peers": (["--peer-stall-seconds=1"], ["--peer-stall-seconds", "--peer-every"]),
    "multiple": (["--save-every=100", "--peer-every=7"], ["--save-every=100", "--peer-every=7", "Try --save-every=98"]),
    "run": (["--run=/nowhere"], ["--run", "/nowhere"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, words = REFUSED[name]
    assert main(["plan", "goodput", *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)


def test_words_for_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["goodput", "--gpus=many"], ["godput"], []):
        with pytest.raises(SystemExit) as ended:
            main(["plan", *words])
        assert ended.value.code == 2
    assert "--gpus" in capsys.readouterr().err


HOPELESS = {
    "nothing-finished": (["--mtbf-per-gpu-hours=10"], ["16,384 GPUs: a failure comes every 2.2s", "is ever finished"]),
    "recovery": (["--mtbf-per-gpu-hours=2000"], ["most recoveries are interrupted"]),
    "interval": (["--mtbf-per-gpu-hours=10000"], ["the present save interval, 51m50s, is longer than the mean time"]),
    "writing": (["--save-every=2"], ["writing a save takes 33s, longer than the present interval of 12s"]),
}


@pytest.mark.parametrize("name", HOPELESS)
def test_warnings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, words = HOPELESS[name]
    assert main(["plan", "goodput", "--gpus=16384", *options]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    for word in words:
        assert any(word in line for line in warnings), warnings
    assert main(["plan", "goodput", "--gpus=16384", "--save-every=50"]) == 0
    text = capsys.readouterr().out
    assert "warning" not in text and "The present save interval is the best one on 16,384 GPUs." in text


def test_help_names_every_input(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "goodput", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for item in INPUTS:
        assert item.option in text and " ".join(item.source.split()) in text, item.name


def test_it_answers_at_once_and_loads_no_heavy_library() -> None:
    code = (
        "import sys, time; begun = time.process_time(); from megatron_anymal.__main__ import main; "
        "code = main(['plan', 'goodput', '--peer-every', '5', '--json']); "
        "heavy = [name for name in ('torch', 'numpy', 'yaml') if name in sys.modules]; "
        "print(heavy, time.process_time() - begun, file=sys.stderr); sys.exit(code)"
    )
    took = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0 and done.stderr.startswith("[] "), done.stderr
        took.append(float(done.stderr.split()[-1]))
    # Processor seconds: 0.1 on a quiet machine, several times that on one whose cores are shared.
    assert min(took) < 0.6
