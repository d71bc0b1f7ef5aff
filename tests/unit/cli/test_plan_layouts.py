"""`anymal plan`: what it prints, writes and refuses, and how much it takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny import make_config

from megatron_anymal.__main__ import main
from megatron_anymal.config import DatasetConfig, StageConfig
from megatron_anymal.config.compose import compose, default_config_dir
from megatron_anymal.config.parsing import leaves
from megatron_anymal.data.planner import BatchLayout
from megatron_anymal.dry_run.simulate import _ALONE, examine
from megatron_anymal.planning.layouts.hardware import load_hardware
from megatron_anymal.planning.layouts.prediction import predict
from megatron_anymal.planning.layouts.problem import build_problem
from megatron_anymal.planning.layouts.workload import pack_load
from megatron_anymal.train.build import build_data, build_inputs

ROOT = Path(__file__).parents[3]
TEXT = ("plan", "--config-name=pretrain_8b_image", "--gpus=64", "--gpu=h100-80gb")
WITHOUT_MEDIA = ("~model.modalities.image", "model.language_model.freeze=false")


def answer(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main([*TEXT, "--json", *options, *WITHOUT_MEDIA]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_figures_follow_from_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    report = answer(capsys, "--sample-tokens=1024", "--label-share=0.5", "model.global_batch_size=512")
    assert report["workload"]["tokens"] == 512 * 1024 and report["workload"]["labels"] == 512 * 512
    seconds = [row["seconds"] for row in report["layouts"]]
    assert len(seconds) == 10 and seconds == sorted(seconds)
    gpu = load_hardware("h100-80gb")
    for row in report["layouts"]:
        layout = row["layout"]
        ranks = layout["tensor_model_parallel_size"] * layout["pipeline_model_parallel_size"]
        assert row["replicas"] * ranks * layout["context_parallel_size"] == 64
        assert row["tokens_per_second"] == pytest.approx(512 * 1024 / row["seconds"])
        assert row["days"] == pytest.approx(100_000 * row["seconds"] / 86400)
        assert row["gpu_hours"] == pytest.approx(64 * 24 * row["days"])
        most = max(
            sum(held[kind] for kind in ("weights", "gradients", "optimizer", "activations", "working"))
            for held in row["held_by_stage"]
        )
        assert row["memory_gb"] == pytest.approx(most / 1e9) and row["memory_gb"] + row["free_gb"] == pytest.approx(
            76.446
        )
        # 7.5e9 parameters outside embedding and head, 6 operations for each parameter and token; half the head.
        operations = (6 * 6.98e9 + 3 * 128256 * 4096) * 512 * 1024
        peak = gpu.peak("fp8" if layout["fp8"] else "bf16")
        assert row["mfu"] == pytest.approx(operations / (row["seconds"] * 64 * peak), rel=0.02)
        assert row["number_format"] == ("fp8" if layout["fp8"] else "bf16")
        assert 0 <= row["bubble"] < 1 and 0 <= row["exposed"] < 1 and row["mfu"] < 1
    assert {row["number_format"] for row in report["layouts"]} == {"fp8"}


def test_kept_keys_stay(capsys: pytest.CaptureFixture[str]) -> None:
    report = answer(capsys, "--keep=fp8", "--keep=context_parallel_size", "--best=3")
    assert len(report["layouts"]) == 3
    assert {(row["layout"]["fp8"], row["layout"]["context_parallel_size"]) for row in report["layouts"]} == {("", 1)}


def test_the_text_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    report = answer(capsys)
    assert main([*TEXT, *WITHOUT_MEDIA]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("layout "))
    for line, row in zip(lines[start + 1 :], report["layouts"]):
        assert line.startswith(row["name"]) and f" {row['tokens_per_second']:,.0f} " in line
        assert (f"{row['mfu']:.1%} of fp8" in line) == bool(row["layout"]["fp8"])
    assert "76.4 GB of each may be used" in lines[0] and f"{report['allowed']:,} layouts are allowed" in "\n".join(
        lines
    )


def test_the_written_configuration_runs_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It holds differences only, and its dry run needs the memory that the plan states."""
    target = tmp_path / "planned.yaml"
    options = ("--gpus=128", "--gpu=h100-80gb", "--keep=fp8", "--json", f"--write={target}", "model.seed=7")
    assert main(["plan", "--config-name=sft_70b", *options]) == 0
    [best, *_] = json.loads(capsys.readouterr().out)["layouts"]
    body = yaml.safe_load(target.read_text())
    assert body.pop("defaults") == ["sft_70b", "_self_"]
    assert body["trainer"]["num_nodes"] == 16 and "devices" not in body["trainer"] and body["model"]["seed"] == 7
    composed = compose("planned", tmp_path, []).config
    base = compose("sft_70b", default_config_dir(), []).config
    for name, value in best["layout"].items():
        assert getattr(composed.model, name) == value
        assert (name in body["model"]) == (getattr(base.model, name) != value), name
    memory = examine(composed).memory
    assert memory is not None
    assert [stage.total for stage in memory.choice.held] == [
        sum(held[kind] for kind in ("weights", "gradients", "optimizer", "activations", "working"))
        for held in best["held_by_stage"]
    ]


# Job, configuration, GPUs, GPU, keys of `model` to keep, other overrides, whether layers are recomputed.
WRITTEN: dict[str, tuple[str, str, int, str, dict[str, Any], tuple[str, ...], bool]] = {
    "pre-training": (
        "pretrain",
        "pretrain_8b_image",
        16,
        "a100-80gb",
        {},
        ("model.language_model.freeze=false",),
        False,
    ),
    "chunks": (
        *("sft", "sft_70b", 64, "h100-80gb"),
        {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_size": 4, "fp8": "''"},
        ("trainer.sampled_answers=0",),
        False,
    ),
    "preferences": ("dpo", "dpo_70b", 16, "h100-80gb", {"fp8": "''"}, (), False),
    "uneven stages": (
        *("dpo", "dpo_8b", 16, "h100-80gb"),
        {
            "pipeline_model_parallel_size": 4,
            "num_layers_in_first_pipeline_stage": 6,
            "num_layers_in_last_pipeline_stage": 6,
        },
        (),
        False,
    ),
    "context": (
        *("pretrain", "pretrain_70b_image", 64, "h100-80gb"),
        {
            "context_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "tensor_model_parallel_size": 4,
            "sequence_parallel": "true",
            "fp8": "''",
        },
        ("data.seq_length=32768",),
        True,
    ),
    "FP8": (
        *("pretrain", "pretrain_70b_image_fp8", 64, "h200-141gb"),
        {
            "fp8": "hybrid",
            "context_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "tensor_model_parallel_size": 1,
        },
        (),
        True,
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_dry_run_of_the_written_winner_needs_the_planned_memory(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a user does it: plan, write, dry run."""
    job, config, gpus, gpu, kept, overrides, recomputed = WRITTEN[name]
    target = tmp_path / "planned.yaml"
    words = [f"--config-name={config}", f"--gpus={gpus}", f"--gpu={gpu}", "--json", f"--write={target}"]
    words += [word for key, value in kept.items() for word in (f"--keep={key}", f"model.{key}={value}")]
    assert main(["plan", *words, *overrides]) == 0
    [best, *_] = json.loads(capsys.readouterr().out)["layouts"]
    assert all(str(best["layout"][key]).lower() == str(value).strip("'") for key, value in kept.items())
    assert bool(best["recompute"]["granularity"]) == recomputed
    body = yaml.safe_load(target.read_text())
    given, base = compose("planned", tmp_path, []).config, compose(config, default_config_dir(), []).config
    before = dict(leaves(base.to_dict()))
    changed = {key for key, value in leaves(given.to_dict()) if before.get(key) != value}
    assert {key for key, _ in leaves(body)} - {"defaults"} == changed and given.trainer.gpu == gpu
    assert main([job, f"--config-path={tmp_path}", "--config-name=planned", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    [counted] = re.findall(r"^([\d.]+) GB on stage \d+ fits in", shown, re.M)
    assert float(counted) == pytest.approx(best["memory_gb"], rel=0.01)
    [planned] = re.findall(r"^  ([\d.]+) GB on a rank of stage \d+ fits in", shown, re.M)
    assert float(planned) == pytest.approx(best["memory_gb"], rel=0.01)
    [seconds] = re.findall(r"^  ([\d.e+-]+)s per step", shown, re.M)
    assert float(seconds) == pytest.approx(best["seconds"], rel=0.01)


@pytest.mark.parametrize("gpu", ["h100-80gb", "h200-141gb"])
@pytest.mark.parametrize(
    "name", ["dpo_70b", "sft_70b", "pretrain_70b_image", "pretrain_70b_audio", "pretrain_70b_video"]
)
def test_shipped_runs_fit_the_gpus_that_their_comments_name(name: str, gpu: str) -> None:
    problem, candidate = predict(compose(name, default_config_dir(), []).config, load_hardware(gpu))
    assert candidate.choice.held[candidate.choice.worst].total <= problem.memory


def test_the_shipped_fp8_run_fits_an_h200_only() -> None:
    config = compose("pretrain_70b_image_fp8", default_config_dir(), []).config
    for gpu, fits in (("h200-141gb", True), ("h100-80gb", False)):
        problem, candidate = predict(config, load_hardware(gpu))
        assert (candidate.choice.held[candidate.choice.worst].total <= problem.memory) == fits


def test_a_run_with_stages_is_planned_by_its_mean_step(
    mixed_shards: str, text_shards: str, tokenizer_folder: str, tmp_path: Path
) -> None:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.data.train["text"] = DatasetConfig(text_shards)
    config.model.global_batch_size, config.trainer.max_steps = 320, 9
    config.data.schedule = [StageConfig("first", 1, {"mix": 1}), StageConfig("last", 8, {"mix": 1, "text": 9}, "token")]
    problem, notes = build_problem(config, load_hardware("h100-80gb"), [])
    tokenizer, modalities = build_inputs(config.model, config.data)
    planner = build_data(config, _ALONE, tokenizer, modalities, "train").planner
    means = [planner.plan(step).documents.sum() for step in range(9)]
    assert problem.work.tokens == pytest.approx(np.mean(means), rel=0.02)
    assert problem.work.origin.endswith("the mean over all stages of data.schedule")
    assert "stage 2 of 2, last: steps 2 to 9, mix 10.00%, text 90.00% of the tokens" in notes
    # Not that of one stage.
    assert problem.work.tokens < 0.9 * means[0]


def test_lengths_come_from_an_index(
    mixed_shards: str, capsys: pytest.CaptureFixture[str], tokenizer_folder: str, tmp_path: Path
) -> None:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    # One epoch, so that the expected sums are those of every step.
    config.model.global_batch_size = 40
    work = build_problem(config, load_hardware("h100-80gb"), [])[0].work

    tokenizer, modalities = build_inputs(config.model, config.data)
    plan = build_data(config, _ALONE, tokenizer, modalities, "train").planner.plan(0)
    assert work.samples == 40 and work.tokens == pytest.approx(plan.documents.sum())
    assert work.squares == pytest.approx((plan.documents**2).sum()) and work.labels == pytest.approx(plan.targets.sum())
    planned = [item for position in range(len(plan.targets)) for item in plan.media.of(position)]
    pieces = {name: sum(item.pieces for item in planned if item.modality == name) for name in work.pieces}
    assert work.pieces == pytest.approx(pieces) and mixed_shards in work.origin
    load = pack_load(work, BatchLayout.of(config.model, config.data.seq_length, 1))
    batches = plan.micro_batches[0]
    assert load.number == len(batches) and load.tokens == pytest.approx(plan.padded_length, rel=0.1)


REFUSED = {
    "unknown GPU": (["--gpu=h100"], ["--gpu=h100", "Did you mean h100-80gb?"]),
    "GPUs that fill no node": (["--gpus=100"], ["--gpus=100", "96 or 104", "--nodes-of"]),
    "no GPUs": (["--gpus=0"], ["--gpus=0", "1 or more"]),
    "data without an index": (["--data=/nowhere"], ["--data=/nowhere", "anymal prepare --index-only"]),
    "NVFP4, of which no rate is known": (["model.fp4=e2m1"], ["model.fp4=e2m1", "no rate", "model.fp4=''"]),
    "FP8 on a GPU without it": (["--gpu=a100-80gb", "model.fp8=hybrid"], ["model.fp8=hybrid", "A100", "--gpu"]),
    "a key that is not searched": (["--keep=seed"], ["--keep=seed", "tensor_model_parallel_size"]),
    "a folder for --write": (["--write=/nowhere/x.yaml"], ["--write=/nowhere/x.yaml", "no folder"]),
    "no layout to print": (["--best=0"], ["--best=0", "1 or more"]),
    "negative tokens": (["--sample-tokens=-1"], ["--sample-tokens=-1", "0 or more"]),
    "a share above 1": (["--label-share=1.5"], ["--label-share=1.5", "at most 1"]),
    "two sources": (["--data=HERE", "--sample-tokens=5"], ["cannot be combined with --data"]),
    "tokens above a pack": (["--sample-tokens=5000"], ["--sample-tokens=5000", "data.seq_length=4096"]),
    "a folder for --html": (["--html=/nowhere/x.html"], ["--html=/nowhere/x.html", "no folder"]),
    "kept keys that allow nothing": (
        ["--keep=tensor_model_parallel_size", "model.tensor_model_parallel_size=16"],
        ["no layout of 64 GPUs", "tensor_model_parallel_size=16", "--keep"],
    ),
    "no configuration": (["--config-name=nothing"], ["nothing.yaml"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, words = REFUSED[name]
    assert main([*TEXT, *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)


def test_a_configured_layout_need_not_fit_the_planned_job(capsys: pytest.CaptureFixture[str]) -> None:
    """It is replaced, unless it is kept; and a kept one is checked against the planned number of GPUs."""
    options = ["plan", "--config-name=pretrain_8b_image", "--gpu=h100-80gb", "--json", *WITHOUT_MEDIA]
    assert main([*options, "--gpus=8", "model.tensor_model_parallel_size=5"]) == 0
    eight = ["model.tensor_model_parallel_size=8", "--keep=tensor_model_parallel_size"]
    assert main([*options, "--gpus=8", *eight, "trainer.devices=1", "trainer.num_nodes=1"]) == 0
    assert main([*options, "--gpus=16", "model.overlap_p2p_comm=false"]) == 0
    capsys.readouterr()
    assert main([*options, "--gpus=4", *eight]) == 2
    assert "4 processes do not divide" in capsys.readouterr().err


def test_missing_options(capsys: pytest.CaptureFixture[str]) -> None:
    for words, missing in (
        (["--gpus=8"], "--config-name"),
        (["--config-name=x", "--gpu=y"], "--gpus"),
        (["gopdut"], "gopdut"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["plan", *words])
        assert ended.value.code == 2 and missing in capsys.readouterr().err


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpus=8", "--gpu=h100-80gb", "--keep=fp8", *WITHOUT_MEDIA]
    assert main(["plan", "--config-name=pretrain_70b_image", *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(r"no layout fits\. The nearest: TP8\+SP .*GB too much on stage \d .*weights", line)
    assert "--gpus" in line and "lora.r=8" in line


def test_a_page_with_two_timelines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main([*TEXT, f"--html={page}", *WITHOUT_MEDIA]) == 0
    text = page.read_text()
    assert text.count("<section>") == 2 and text.count('aria-label="timeline"') == 2
    assert "prefers-color-scheme: dark" in text
    # Nothing is loaded from anywhere.
    assert not re.search(r"(src|href)=|url\(|@import", text)


@pytest.mark.parametrize(("batch", "whole"), [(16, True), (8192, False)])
def test_timelines_are_legible_and_comparable(
    batch: int, whole: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few enough passes to tell them apart; one time axis if the steps are whole; every stage's curve has its key."""
    page = tmp_path / "page.html"
    kept = ["--keep=pipeline_model_parallel_size", "model.pipeline_model_parallel_size=8", "--keep=fp8"]
    assert main([*TEXT, f"--html={page}", *kept, *WITHOUT_MEDIA, f"model.global_batch_size={batch}", "--json"]) == 0
    layouts = json.loads(capsys.readouterr().out)["layouts"][:2]
    text = page.read_text()
    for section, row in zip(text.split("<section>")[1:], layouts):
        chunks = row["layout"]["virtual_pipeline_model_parallel_size"]
        passes = len(re.findall(r'<rect class="(?:forward|backward)"', section)) / 8
        assert passes <= max(96, 2 * chunks * 2 * 8)
        assert ("The whole step" in section) == whole and section.count('class="curve"') == 8
        assert [int(key) for key in re.findall(r"</span>(\d+)", section)] == list(range(8))
    ends = {max(re.findall(r">([\d.]+) s</text>", section), key=float) for section in text.split("<section>")[1:]}
    assert (len(ends) == 1) == whole


def test_refusals_are_quick() -> None:
    code = "import time; begun = time.process_time(); from megatron_anymal.__main__ import main; import sys; "
    code += "code = main(sys.argv[1:]); print(time.process_time() - begun); sys.exit(code)"
    for option in ("--gpu=h100", "--gpus=100", "--data=/nowhere"):
        taken = []
        for _ in range(3):
            done = subprocess.run([sys.executable, "-c", code, *TEXT, option], capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == 2
            taken.append(float(done.stdout))
        # 0.1 s on a quiet machine.
        assert min(taken) < 0.6, option


PEAK = "from megatron_anymal.processes.process_memory import peak_resident_bytes as peak; "


@pytest.fixture(scope="module")
def torch_alone() -> float:
    """Peak of a process that only imports torch, in bytes: 0.24 GB if it is built for CPUs, 0.65 GB if for CUDA."""
    code = f"import torch; {PEAK} print(peak())"
    return float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout)


@pytest.mark.parametrize("gpus", [16, 1024, 16384])
def test_70b_within_bounds_of_time_and_memory(gpus: int, torch_alone: float) -> None:
    code = "import sys, time; from megatron_anymal.__main__ import main; code = main(sys.argv[1:]); "
    code += f"{PEAK} print('MEASURED', time.process_time(), peak()); sys.exit(code)"
    words = ["plan", "--config-name=pretrain_70b_image", f"--gpus={gpus}", "--gpu=h100-80gb"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    seconds, peak = map(float, done.stdout.rpartition("MEASURED ")[2].split())
    # About 10 s for the most GPUs on a quiet machine; a busy one counts twice as many.
    assert seconds < 40
    # 1 GB with torch's build for CPUs. Its build for CUDA maps more libraries, whichever command imports it.
    assert peak - torch_alone < 7.5e8
