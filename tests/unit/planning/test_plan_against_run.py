"""A run against its plan: the terms, the one that is off, and where the comparison is printed."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from fork_server import python
from test_layout_search import make_config
from tiny import make_config as make_run
from tiny import make_shards

from megatron_anymal.__main__ import main
from megatron_anymal.config import RunConfig
from megatron_anymal.planning.layouts.comparison import (
    Terms,
    compare,
    config_of_run,
    measured_terms,
    predicted_terms,
)
from megatron_anymal.planning.layouts.hardware import load_hardware
from megatron_anymal.planning.layouts.prediction import predict
from megatron_anymal.processes.process_memory import GIB
from megatron_anymal.train.pass_times import PASS_METRICS

H100 = load_hardware("h100-80gb")


def configured(**model: Any) -> RunConfig:
    config = make_config(4, pipeline_model_parallel_size=2, **model)
    config.model.language_model.config.update(hidden_size=4096, intermediate_size=14336, num_attention_heads=32)
    config.data.seq_length = 4096
    return config


def write_metrics(run_dir: Path, terms: Terms, memory: float) -> None:
    """A first line with its warm-up, two lines with these terms, and one of a validation."""
    run_dir.mkdir(exist_ok=True)
    names = (terms.forward, terms.backward, terms.gradients, terms.update, terms.idle)
    row = {**dict(zip(PASS_METRICS, names)), "step_seconds": terms.step, "data_wait_share": terms.data / terms.step}
    row["device_memory_gib"] = memory / GIB
    warm_up = {**row, "forward_seconds": 100.0}
    lines = [warm_up, row, row, {"val_loss": 1.0}]
    (run_dir / "metrics.jsonl").write_text("\n".join(json.dumps({"step": n, **line}) for n, line in enumerate(lines)))


@pytest.mark.parametrize("recompute", [{}, {"recompute_granularity": "full", "recompute_num_layers": 3}])
def test_the_terms_are_those_of_the_predicted_step(recompute: dict[str, Any]) -> None:
    _, prediction = predict(configured(**recompute), H100)
    terms, step = predicted_terms(prediction.step), prediction.step
    assert terms.step == pytest.approx(step.seconds) and min(vars(terms).values()) >= 0
    assert terms.forward + terms.backward == pytest.approx(statistics.fmean(step.pipeline.busy))
    # Two products back for one forward, and with recomputation the forward pass again.
    assert (3.0 if recompute else 2.0) - 0.6 < terms.backward / terms.forward < (3.0 if recompute else 2.0) + 0.4
    # Beside the bubble, messages.
    assert step.bubble * step.seconds <= terms.idle * (1 + 1e-9)
    assert prediction.choice.recompute.granularity == recompute.get("recompute_granularity", "")


@pytest.mark.parametrize("term", ["forward", "backward", "gradients", "update", "idle", "data"])
def test_the_term_that_is_off_is_named(term: str, tmp_path: Path) -> None:
    config = configured()
    _, prediction = predict(config, H100)
    terms = predicted_terms(prediction.step)
    most = prediction.choice.held[prediction.choice.worst].total
    changed = Terms(**{**vars(terms), term: getattr(terms, term) + 0.3 * terms.step})
    write_metrics(tmp_path, changed, 1.1 * most)
    assert measured_terms(tmp_path).terms.step == pytest.approx(changed.step) and measured_terms(tmp_path).lines == 2
    text = compare(config, H100, tmp_path)
    titles = {"forward": "forward passes", "data": "waiting for data", "idle": "bubble, messages, host"}
    last = text.splitlines()[-1]
    assert "(+30.0%); largest contribution: " in last and titles.get(term, "") in last
    assert f"{most / 1e9:.2f} GB predicted, {1.1 * most / 1e9:.2f} GB measured (+10.0%)" in text
    assert str(prediction.layout) in text.splitlines()[0]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> Path:
    """The configuration of a tiny run that names its GPU, and its data."""
    folder = tmp_path_factory.mktemp("compared")
    data = make_shards(folder / "data", tokenizer_folder, 16, ("text",))
    config = make_run(data, tokenizer_folder, folder / "run")
    config.model.modalities, config.model.language_model.freeze = {}, False
    config.trainer.max_steps, config.trainer.gpu = 3, "h100-80gb"
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"defaults": ["anymal", "_self_"], **config.to_dict()}))
    return folder


def test_a_run_says_where_it_stands_at_its_end(run_of: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-m", "megatron_anymal", "pretrain", f"--config-path={run_of}", "--config-name=tiny"]
    dry = python(*words, "--dry-run", cwd=run_of, timeout=240)
    assert dry.returncode == 0, dry.stderr
    assert "Plan for 1 x H100 80GB SXM (trainer.gpu), from the index of" in dry.stdout
    assert "s per step" in dry.stdout and "fits in 76.4 GB" in dry.stdout
    done = python(*words, cwd=run_of, timeout=240)
    assert done.returncode == 0, done.stderr
    start = done.stdout.index("Against the plan for 1 x H100 80GB SXM, TP1 PP1 CP1, recompute none")
    report = done.stdout[start:].strip()
    assert "not measured on a CPU" in report
    assert main(["plan", f"--run={run_of / 'run'}"]) == 0
    assert capsys.readouterr().out.strip() == report
    assert main(["plan", f"--run={run_of / 'run'}", "--gpu=a100-80gb"]) == 0
    assert "1 x A100" in capsys.readouterr().out
    rows = [json.loads(line) for line in (run_of / "run" / "metrics.jsonl").read_text().splitlines()]
    median = statistics.median(row["step_seconds"] for row in rows[1:])
    [step] = [line for line in report.splitlines() if line.startswith("step ")]
    assert float(step.split()[3].removesuffix("s")) == pytest.approx(median, rel=0.1)
    # The run and the plan count the same operations.
    _, prediction = predict(config_of_run(run_of / "run"), H100)
    [line] = [line for line in report.splitlines() if line.startswith("operations: ")]
    rates = [float(word) for word in re.findall(r"([\d.e-]+) (?:TFLOP/s|\(MFU)", line)]
    assert rates[1] == pytest.approx(statistics.median(row["tflops_per_gpu"] for row in rows[1:]), rel=0.01)
    # Row by row: on a busy machine the steps of a run differ in time, but not in operations.
    operations = statistics.median(row["tflops_per_gpu"] * row["step_seconds"] for row in rows[1:])
    assert rates[0] * prediction.step.seconds == pytest.approx(operations, rel=0.2)
    assert "MFU relative to a peak of 66.9 TFLOP/s per GPU (fp32, trainer.gpu=h100-80gb)" in done.stdout
    assert all(row["mfu"] == row["tflops_per_gpu"] / 66.9 for row in rows)


def test_mistakes(run_of: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    cases = [
        (["plan", "--run=/nowhere"], "there is no folder '/nowhere'"),
        (["plan", f"--run={tmp_path / 'empty'}"], "has no checkpoint yet"),
        (["plan", "--run=/nowhere", "--gpu=h100"], "Did you mean h100-80gb?"),
        (
            ["pretrain", f"--config-path={run_of}", "--config-name=tiny", "trainer.gpu=h10"],
            "trainer.gpu=h10: no such GPU. Did you mean h100-80gb?",
        ),
    ]
    for words, text in cases:
        assert main(words) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert text in line
