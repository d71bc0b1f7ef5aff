"""Run the benchmarks as a user does, with small sizes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fork_server
import pytest
from engine import train
from ranks import run_ranks
from tiny import make_config

ROOT = Path(__file__).parents[2]
SIZES = {
    "hidden": 32,
    "layers": 2,
    "heads": 4,
    "key-value-heads": 2,
    "ffn": 48,
    "vocabulary": 64,
    "documents": 4,
    "document-tokens": 16,
    "batches": 2,
    "warm-up": 1,
    "rounds": 3,
}


def run(*words: str, tests: bool = False, timeout: float = 240.0) -> str:
    """Run a benchmark and return its standard output; with `tests`, put the tests' modules on its path, as its help
    says."""
    folders = [ROOT, ROOT / "tests", ROOT / "tests" / "faults"] if tests else [ROOT]
    path = os.pathsep.join(map(str, folders))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = fork_server.python(*words, cwd=ROOT, environment=environment, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Printed output and JSON results of benchmarks/step.py."""
    out = tmp_path_factory.mktemp("benchmarks") / "results.json"
    sizes = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    return run("benchmarks/step.py", "--out", str(out), *sizes), json.loads(out.read_text())


def test_step_tells_what_it_measured(step: Any) -> None:
    printed, report = step
    for words in (
        "2 CPU cores" if os.cpu_count() == 2 else "CPU cores",
        "torch",
        "megatron-core",
        "floor",
        "the bar of",
    ):
        assert words in printed, words
    assert set(report["versions"]) >= {"torch", "megatron-core"} and report["date"] in printed
    assert set(report["rounds"]) == {f"{side}, {kind}" for side in ("ours", "bare") for kind in ("frozen", "trained")}
    for turns in report["rounds"].values():
        assert len(turns["wall"]) == len(turns["cpu"]) == SIZES["rounds"] and min(turns["wall"]) > 0


def test_step_counts_the_products_that_torch_counts(step: Any) -> None:
    """Per token, both sides need the 4N or 6N operations of the formula; our head is counted per target, and a small
    projector is added."""
    _, report = step
    hidden, ffn, tokens = SIZES["hidden"], SIZES["ffn"], SIZES["documents"] * SIZES["document-tokens"]
    layers, head = 2 * (3 * hidden * hidden + 3 * hidden * ffn), SIZES["vocabulary"] * hidden
    # Output projection and feed-forward of the last layer, which needs them at the targets only.
    last = hidden * hidden + 3 * hidden * ffn
    # The begin token and the two soft tokens are not targets.
    targets = tokens - 3 * SIZES["documents"]
    # The logits of a trained head are computed twice.
    for kind, per_token, per_target in (("frozen", 4, 4), ("trained", 6, 8)):
        ours, bare = report["frozen_against_trained"][kind], report["ours_against_bare"][kind]
        assert bare["bare_products_counted"] == per_token * (layers + head) * tokens
        # Three features of 50 values form a soft token; two soft tokens per document. Counted like a trained weight.
        projector = 6 * 3 * 50 * hidden * 2 * SIZES["documents"]
        by_hand = per_token * (layers * tokens - last * (tokens - targets)) + per_target * head * targets + projector
        assert ours["products_counted"] == ours["products"] == by_hand


def test_step_compares_bytes(step: Any) -> None:
    _, report = step
    sides = [report["frozen_against_trained"][kind] for kind in ("frozen", "trained")]
    frozen, trained = (side["stored_bytes"] for side in sides)
    assert trained["gradients"] == trained["weights"] > 4 * frozen["gradients"]
    # Optimizer moments are not padded.
    assert frozen["moments"] < 2 * frozen["gradients"] and frozen["others"] == trained["others"] == 0
    assert sides[1]["saved_bytes"] > 1.2 * sides[0]["saved_bytes"]


def test_step_vs_transformers(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    small = ("--case", "quickstart", "--samples", "8", "--batches", "2", "--checked-steps", "2", "--warm-up", "0")
    printed = run("benchmarks/step_vs_transformers.py", *small, "--rounds", "2", "--out", str(out))
    case = json.loads(out.read_text())["cases"]["quickstart"]
    assert "floor: LlamaForCausalLM" in printed and "the bar of 1.0" in printed
    assert case["llama"]["hidden_size"] == 128 and len(case["losses"]) == 2
    for losses in case["losses"]:
        assert losses.keys() == {"anymal", "packed", "rows"}
        assert losses == pytest.approx({name: losses["anymal"] for name in losses}, rel=1e-5)
    assert case["losses"][0]["anymal"] != case["losses"][1]["anymal"]
    assert all(ratio["median"] > 0 for ratio in case["ratios"].values()) and case["ratios"].keys() == {
        "packed",
        "rows",
    }
    # The sums of the losses and the gradient norm.
    assert case["operations"]["anymal"]["waits"] == 2 and case["operations"]["rows"]["operations"] > 500


def test_alignment_and_sft_vs_transformers(tmp_path: Path) -> None:
    """Losses and gradients are those of transformers and peft."""
    out = tmp_path / "results.json"
    sizes = {"hidden": 64, "layers": 2, "heads": 4, "key-value-heads": 2, "ffn": 96, "vocabulary": 512}
    steps = {"documents": 4, "soft-tokens": 8, "text-divisor": 8, "batches": 2, "checked-steps": 2, "warm-up": 0}
    words = [word for name, size in {**sizes, **steps}.items() for word in (f"--{name}", str(size))]
    cases = ("--case", "alignment", "--case", "sft")
    printed = run("benchmarks/step_vs_transformers.py", *cases, *words, "--rounds", "2", "--out", str(out))
    assert "the bar of 1.5" in printed and "the bar of 1.3" in printed
    for case in json.loads(out.read_text())["cases"].values():
        assert case["llama"]["hidden_size"] == 64 and 0 < case["labels"] < case["tokens"]
        for losses in case["losses"]:
            assert losses == pytest.approx({name: losses["anymal"] for name in losses}, rel=1e-5)
        differences = case["gradient_differences"]
        assert len(differences) == 3 and 0 < max(differences.values()) < 1e-5
        # The batch that is counted is the first one. Logits at a position: a product forward and one back.
        flops = {name: counts["flops"] for name, counts in case["operations"].items()}
        [documents], targets = case["documents"][0], case["counted_labels"]
        other = sum(documents) - targets
        assert flops["packed"] - flops["packed, kept logits"] == 4 * 512 * 64 * other
        # Attention over the whole pack, and the last layer at all positions.
        assert flops["packed, kept logits"] > flops["anymal"]


def test_head(tmp_path: Path) -> None:
    out = tmp_path / "head.json"
    small = ("--hidden", "32", "--vocabulary", "512", "--tokens", "64", "--chunk", "2048", "--rounds", "2")
    printed = run("benchmarks/head.py", "--out", str(out), *small)
    report = json.loads(out.read_text())
    ways = report["heads"]
    for name in ("labels only", "labels only, chunked"):
        assert ways[name]["loss_difference"] < 1e-14 and ways[name]["gradient_difference"] < 1e-14
    # First a quarter of the logits, then chunks of four rows.
    peaks = [way["peak_bytes"] for way in ways.values()]
    assert peaks[0] > 64 * 512 * 4 and peaks[0] > 2 * peaks[1] > 2 * peaks[2]
    backward = report["backward"]
    assert backward["losses_equal"] and backward["gradients_equal"] and backward["largest_gradient"] == 0
    assert backward["peak_bytes"]["skipped"] < 0.7 * backward["peak_bytes"]["made"]
    assert "bitwise equal" in printed


def test_packing(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    printed = run("benchmarks/packing.py", "--index", "100000", "--out", str(out))
    report = json.loads(out.read_text())
    assert [row["samples"] for row in report["packs"]] == [1024, 1024, 26_880, 26_880]
    bars = report["bars"]
    for row in report["packs"]:
        assert row["packs"] == -(-row["fewest"] // row["multiple"]) * row["multiple"]
        assert bars["share"] <= row["share"] <= row["highest_share"] <= 1
        assert 1 <= row["cost_over_replicas"] <= bars["cost_over_replicas"]
    for by in report["balanced_by"].values():
        assert by["operations"] < 1.005 < by["input size"]
    [plan] = report["plans"]
    assert plan["samples"] == 100_000 and len(plan["seconds"]) == 10 and min(plan["shares"]) >= bars["share"]
    assert plan["memory"]["peak"] < bars["memory"]
    assert "real tokens at least 0.99" in printed and "100,000 samples" in printed


def test_indexing_is_timed_beside_its_floors(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    sizes = ("--shards", "2", "--samples", "20", "--rounds", "2", "--rows", "10000", "30000")
    workers = ("--worker-shards", "2", "--worker-samples", "10", "--worker-rounds", "1")
    printed = run("benchmarks/indexing.py", *sizes, *workers, "--out", str(out))
    assert all(name in printed for name in ("tarfile", "webdataset", "anymal", "ratio", "us per sample to fill"))
    report = json.loads(out.read_text())
    assert report["samples"] == 40 and {len(turns) for turns in report["microseconds_per_sample"].values()} == {2}
    assert report["workers"]["processes"] == 1 and len(report["workers"]["ratios"]["whole"]) == 1
    assert report["rows"]["per_sample"]["index_bytes"] > 100 and report["rows"]["runs"][1]["samples"] == 30_000


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_the_loader_takes_turns_with_webdataset(kind: str, tmp_path: Path) -> None:
    """The benchmark itself compares the encoder inputs of all sides."""
    out = tmp_path / "results.json"
    printed = run("benchmarks/loader.py", "--only", kind, "--rounds=2", "--samples=4", "--out", str(out), tests=True)
    results = json.loads(out.read_text())["kinds"][kind]
    sides = {"webdataset", *({"anymal, pillow", "anymal, torch"} if kind == "image" else {"anymal"})}
    assert results["samples_per_cpu_second"].keys() == sides and "x webdataset" in printed
    rates = results["samples_per_cpu_second"].values()
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in rates)
    assert results["floors_ms"] and all(min(times) > 0 for times in results["parts_ms"].values())


def test_index_scale(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    printed = run("benchmarks/index_scale.py", "--samples", "60000", "--steps", "2", "--out", str(out))
    report = json.loads(out.read_text())
    assert "60,000 samples" in printed and "without bounds" in printed and report["index_bytes"] > 60_000 * 90
    assert len(report["seconds"]["plan"]) == len(report["seconds"]["bare reads"]) == 2
    assert str(tmp_path) not in out.read_text()


def test_damaged_shards_lose_nothing_in_silence(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    printed = run("benchmarks/damaged_shards.py", "--shards", "30", "--out", str(out), tests=True)
    report = json.loads(out.read_text())
    assert report["megatron_anymal"]["samples_lost_in_silence"] == 0
    # If the comparison could not show any loss, it would prove nothing.
    assert report["webdataset"]["samples_lost_in_silence"] > 0
    assert "--energon-python" in printed and "| webdataset |" in printed


def test_startup(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    shown = run(
        "benchmarks/startup.py",
        "--rounds=1",
        "--only=doctor",
        "--only=generate --help",
        f"--against={ROOT}",
        f"--out={out}",
    )
    rows = json.loads(out.read_text())["rows"]
    assert rows.keys() == {"doctor", "generate --help"}
    for name, row in rows.items():
        assert name in shown and row.keys() == {"this", "other"}
        for side in row.values():
            assert side["cpu"] > 0 and side["wall"] > 0 and len(side["rounds"]) == 1


@pytest.mark.slow
def test_recovery(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    printed = run(
        "benchmarks/recovery.py",
        "--processes",
        "1",
        "2",
        "--kills=2",
        "--base-gb=0.05",
        f"--out={out}",
        tests=True,
        timeout=280,
    )
    jobs = json.loads(out.read_text())["jobs"]
    assert [(job["processes"], job["keep_survivors"]) for job in jobs] == [(1, True), (2, True), (2, False)]
    for job in jobs:
        recoveries = job["recoveries"]
        assert len(recoveries) == 2 and {recovery["way"] for recovery in recoveries} == {"standby"}
        kept = job["processes"] == 2 and job["keep_survivors"]
        assert [recovery["stayed"] for recovery in recoveries] == [int(kept)] * 2
        for recovery in recoveries:
            phases = [recovery[name] for name in ("ending", "pause", "joining", "restoring", "first_step")]
            assert recovery["total"] == pytest.approx(sum(phases)) and recovery["source"].startswith("memory")
    assert "first step" in printed and "forked anew" in printed


def test_plan_accuracy(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    printed = run("benchmarks/plan_accuracy.py", "--out", str(out), tests=True)
    report = json.loads(out.read_text())
    rows = report["published"]["rows"]
    assert len(rows) == 11 and f"mean absolute error {report['published']['mean_error']:.1%}" in printed
    # Predictions have the published order of magnitude, whatever their exact values.
    assert all(0.4 < row["predicted"] / row["published"] < 2 for row in rows)
    assert str(tmp_path) not in out.read_text()


def test_plan_ranking(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    printed = run("benchmarks/plan_ranking.py", "--layouts=4", "--turns=1", "--out", str(out), tests=True)
    report = json.loads(out.read_text())
    rows = report["rows"]
    # Recomputation takes longer, two replicas less time, and tensor parallelism has collectives besides.
    for key in ("predicted", "measured"):
        assert rows[2][key] < rows[0][key] < rows[1][key] and rows[2][key] < rows[3][key]
    assert f"rank correlation over 4 layouts: {report['rank_correlation']:.3f}" in printed
    costs = report["costs"]
    assert costs.keys() == {"1", "2", "4"} and costs["1"]["collective"] == 0
    assert all(costs[processes]["collective"] > 0 for processes in "24")
    assert str(tmp_path) not in out.read_text()


@pytest.mark.slow
def test_encoder_placement(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    printed = run("benchmarks/encoder_placement.py", "--turns=2", "--out", str(out), tests=True)
    report = json.loads(out.read_text())
    # 19 and 23.3 slots of three units each: see the benchmark's configuration.
    assert report["floor"] == pytest.approx(57 / 70)
    assert report["floor"] - 0.02 < report["ratio"]["fastest"] <= 0.85
    assert f"ratio {report['ratio']['fastest']:.3f}, floor 0.814, bar 0.85" in printed
    assert str(tmp_path) not in out.read_text()


def test_feature_cache(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    sizes = ("--layers=1", "--encoder-layers=1", "--width=64", "--rounds=2", "--entries=20")
    printed = run("benchmarks/feature_cache.py", *sizes, "--out", str(out), tests=True)
    report = json.loads(out.read_text())
    assert 0 < report["encoder_share"] < 1 and report["reading"]["entries"] == 20
    assert f"{report['speedup']['median']:.2f} x (bar 1.35)" in printed
    assert set(report["rounds"]) == {"off", "warm"} and all(len(turns) == 2 for turns in report["rounds"].values())


def test_alignments_in_one_run_need_fewer_passes(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    # Too short a sleep for the bar.
    words = ("benchmarks/multiplex.py", "--turns=2", "--milliseconds=0.01", "--out", str(out))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = fork_server.python(*words, cwd=ROOT, environment=environment, timeout=240)
    report = json.loads(out.read_text())
    assert done.returncode == (report["ratio"]["fastest"] > report["bar"]), done.stderr[-4000:]
    assert f"floor {report['floor']:.3f}, bar 0.8" in done.stdout
    counts = report["counts"]
    assert (counts["together"]["steps"], counts["separate"]["steps"]) == (5, 20)
    assert counts["together"]["micro_batches"] < counts["separate"]["micro_batches"]
    assert 0.5 < report["floor"] < 0.75 < report["floor_with_ends"] < 1 and report["losses_apart"] < 1e-6


def test_a_shared_prompt_gives_the_same_first_step_in_fewer_tokens(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    own = {"pairs": 4, "prompt-tokens": 80, "answer-tokens": 6, "warm-up": 1, "rounds": 2}
    model = {name: SIZES[name] for name in ("hidden", "layers", "heads", "key-value-heads", "ffn", "vocabulary")}
    sizes = [word for name, size in (model | own).items() for word in (f"--{name}", str(size))]
    printed = run("benchmarks/shared_prompt.py", "--out", str(out), *sizes)
    report = json.loads(out.read_text())
    assert "the bar of 1.5" in printed and "pairs per CPU second" in printed
    assert report["tokens"] == {"whole": 4 * 2 * (80 + 6), "shared": 4 * (80 + 2 * 6 + 1)}
    for value in ("loss", "grad_norm"):
        whole, shared = (report["first_step"][side][value] for side in ("whole", "shared"))
        assert shared == pytest.approx(whole, rel=1e-6)


def test_samples_classified_together_are_the_same_and_take_less_time() -> None:
    report = json.loads(run("benchmarks/integrity_filter.py", "--samples", "64", "--rounds", "1", tests=True))
    assert report["ratio"]["samples_per_processor_second"] > 1.2
    assert report["together"]["samples_per_second"] > 0 and "versions" in report


def test_answers_are_the_same_with_media_read_ahead(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> None:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.trainer.max_steps = config.exp_manager.checkpoint.every_n_train_steps = 1
    run_ranks(1, train, config)
    out = tmp_path / "results.json"
    words = ["--checkpoint", str(tmp_path / "run"), "--data", mixed_shards, "--batch-size", "4", "--rounds", "2"]
    printed = run("benchmarks/answering.py", *words, "--out", str(out))
    report = json.loads(out.read_text())
    assert "the same answers" in printed and report["samples"] > 4
    assert 0 < report["reading"] < report["seconds"]["between"] and report["floor"] > 0


def test_clients_at_once_are_answered_faster_than_one_by_one() -> None:
    sizes = {"clients": 16, "tokens": 8, "hidden": 64, "layers": 2, "rounds": 1}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    report = json.loads(run("benchmarks/serving.py", *words, tests=True))
    assert report["sizes"] == sizes and report["ratio_processor"] > 1.5
    assert report["together"]["tokens_per_second"] > report["one_by_one"]["tokens_per_second"]
