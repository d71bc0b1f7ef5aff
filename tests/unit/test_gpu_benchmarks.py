"""Run the GPU benchmarks on the CPU as dry runs, and check everything that a CPU can check."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fork_server
import psutil
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "gpu"
MODELS = ("alignment_8b", "sft_8b", "dpo_8b", "alignment_70b_fp8")
# Several processes that import everything, on a machine that may be busy.
pytestmark = pytest.mark.timeout(1000)

# Arguments that lead to a refusal or to the help text.
ASKED = {
    "no card": [],
    "unknown": ["--dry-run", "--no-such"],
    "no folder": ["--dry-run", "--out", "/no/such/folder/reports.json"],
    "too few": ["--dry-run", "--rounds", "1"],
    "unknown shape": ["--dry-run", "--encoder", "vit_h"],
    "help": ["--help"],
}
# Import every benchmark with NeMo hidden, and call each with these arguments.
COMMANDS = """
import contextlib, importlib, io, json, sys
for name in ("nemo", "lightning", "pytorch_lightning", "omegaconf", "hydra"):
    sys.modules[name] = None
import torch
torch.cuda.is_available = lambda: False
reports = {}
for name in json.loads(sys.argv[1]):
    main = importlib.import_module(name).main
    for words in json.loads(sys.argv[3]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(words)
            except SystemExit as error:
                code = error.code
        reports[f"{name} {words}"] = [code, out.getvalue(), err.getvalue()]
for name in json.loads(sys.argv[2]):
    importlib.import_module(name)
print("FOUND" + json.dumps(reports))
"""


def run(*words: str, timeout: int = 900) -> subprocess.CompletedProcess[str]:
    """Run this Python in the repository's root without a visible GPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return fork_server.python(*words, cwd=ROOT, environment=environment, timeout=timeout)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """JSON results of a dry run of all benchmarks."""
    folder = tmp_path_factory.mktemp("gpu") / "made"
    done = run("benchmarks/gpu/all.py", "--dry-run", "--out", str(folder), "--only", "kernels")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert sorted(p.name for p in folder.iterdir()) == ["kernels.json", "kernels.txt"]
    assert "DRY RUN" in (folder / "kernels.txt").read_text()
    # What all.py starts for the others, without the time of their imports.
    for name in MODELS:
        done = run(f"benchmarks/gpu/{name}.py", "--dry-run", "--out", str(folder / f"{name}.json"))
        assert done.returncode == 0 and "DRY RUN" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_a_benchmark_ends_at_its_limit(tmp_path: Path) -> None:
    done = run("benchmarks/gpu/all.py", "--dry-run", "--out", str(tmp_path), "--only", "kernels", "--limit", "0.5")
    assert done.returncode == 1 and "== kernels: ENDED at its limit" in done.stdout, done.stdout + done.stderr
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    refused = run("benchmarks/gpu/all.py", "--dry-run", "--out", str(tmp_path), "--limit", "0")
    assert refused.returncode == 2 and "--limit must be a positive number of seconds; it is 0." in refused.stderr


def measured(reports: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """All cases that were measured."""
    return [case for name in MODELS for case in reports[name]["cases"] if "left_out" not in case]


def test_each_says_where_and_how_it_was_measured(reports: Any) -> None:
    for name, one in reports.items():
        assert f"benchmarks/gpu/{name}.py" in one["command"] and "--dry-run" in one["command"]
        assert one["dry_run"] is True and len(one["date"]) == 10 and one["card"]["name"] == "no GPU"
        assert {"torch", "megatron-core", "transformers", "transformer-engine", "flash-attn"} <= set(one["versions"])
        assert one["limits"]["bf16"] > 0 and one["limits"]["copy"] > 0
        assert one["limits"]["fp8"] is None and "8.9" in one["limits"]["fp8_left_out"]


def test_both_implementations_do_the_same_work(reports: Any) -> None:
    """In fp32, loss and gradient norm match those of transformers for all three jobs."""
    exact = [case for case in measured(reports) if case["precision"] == "32" and case["equality"]]
    assert {case["job"] for case in exact} == {"pretrain", "sft", "dpo"}
    for case in exact:
        assert case["equality"]["equal"]
        assert case["equality"]["loss"]["apart"] < 1e-4 and case["equality"]["gradient_norm"]["apart"] < 1e-3
        # Guard against equality because both are zero.
        assert case["equality"]["loss"]["ours"] > 0.1 and case["equality"]["gradient_norm"]["ours"] > 1e-3


def test_operations_by_hand_are_those_that_torch_counts(reports: Any) -> None:
    for case in measured(reports):
        assert set(case["counted"]) == set(case["sides"])
        for name, row in case["counted"].items():
            assert row["counted"] == pytest.approx(row["by_hand"], rel=1e-9), (case["name"], name)


def test_rates_are_work_over_time(reports: Any) -> None:
    for case in measured(reports):
        limit = reports[{"70b": "alignment_70b_fp8"}.get(case["llama"], "alignment_8b")]["limits"]["bf16"]
        for batch, work in zip(case["batches"], case["work"]):
            assert batch["targets"] < batch["tokens"] <= batch["padded_tokens"] and batch["images"] == batch["samples"]
            assert work["total"] == pytest.approx(sum(value for part, value in work.items() if part != "total"))
        seconds = case["sides"]["ours"]["seconds"]
        assert len(seconds["raw"]) == 2 and seconds["median"] == pytest.approx(statistics.median(seconds["raw"]))
        rates = [work["total"] / one for work, one in zip(case["work"], seconds["raw"])]
        assert case["sides"]["ours"]["operations_per_second"] == pytest.approx(statistics.median(rates))
        if case["job"] == "pretrain":
            share = case["sides"]["ours"]["share_of_bf16_rate"]
            assert share * limit == pytest.approx(statistics.median(rates))
        tokens = [batch["tokens"] / one for batch, one in zip(case["batches"], seconds["raw"])]
        assert case["sides"]["ours"]["tokens_per_second"] == pytest.approx(statistics.median(tokens))
        assert 0 <= case["data_wait"]["share"] <= 1 and case["data_wait"]["workers"] == 1


def test_what_cannot_run_here_is_named_with_its_reason(reports: Any) -> None:
    for name in MODELS:
        fp8 = [case for case in reports[name]["cases"] if case["precision"].startswith("fp8")]
        assert fp8 and all("needs Transformer Engine" in case["left_out"] for case in fp8)
    [large] = [case for case in measured(reports) if case["llama"] == "70b"]
    assert "141 GB" in large["left_out_sides"]["huggingface"] and set(large["sides"]) == {"ours", "bare", "media"}
    assert large["fits"] is True


def test_a_dry_run_gives_no_verdict(reports: Any) -> None:
    bars = [bar for case in measured(reports) for bar in case["bars"]]
    assert {bar["name"] for bar in bars} >= {"share of the bf16 rate", "time waiting for data"}
    assert all(bar["met"] is None and bar["value"] is not None for bar in bars)


def test_kernels_equal_eager_torch(reports: Any) -> None:
    parts = reports["kernels"]["parts"]
    assert set(parts) == {"RMSNorm", "SwiGLU", "RoPE", "packed attention", "cross-entropy"}
    for candidates in parts.values():
        assert {"eager torch", "Transformer Engine", "flash-attn"} <= set(candidates)
        for name, row in candidates.items():
            assert "failed" not in row, (name, row)
            if "absent" in row:
                assert row["absent"]
            else:
                assert row["equal"] and row["forward"]["seconds"] > 0
        assert sum("equal" in row for row in candidates.values()) >= 2


def test_one_side_after_the_other_and_a_profile(tmp_path: Path) -> None:
    out = tmp_path / "reports.json"
    words = ["--precision", "32", "--sides", "ours", "huggingface", "--apart", "--profile", "--recompute", "full"]
    done = run("benchmarks/gpu/alignment_8b.py", "--dry-run", "--out", str(out), *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [case] = json.loads(out.read_text())["cases"]
    # Recomputed on both sides, with the same results.
    assert case["equality"]["equal"] and set(case["sides"]) == {"ours", "huggingface"}
    assert {side["recompute"] for side in case["sides"].values()} == {"full"}
    assert case["counted"]["ours"]["counted"] == pytest.approx(case["counted"]["ours"]["by_hand"], rel=1e-9)
    beside = json.loads((tmp_path / f"reports.{case['name']}.profile.json").read_text())
    assert beside["top"][0]["share"] >= beside["top"][-1]["share"] > 0 and "profile of 3 steps" in done.stdout


def test_refusals_and_help_without_nemo() -> None:
    scripts = [*MODELS, "kernels"]
    others = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in scripts)
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n{COMMANDS}"
    done = run("-c", code, json.dumps(scripts), json.dumps(others), json.dumps(list(ASKED.values())))
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.split("FOUND")[1])
    refusals = {
        "no card": "{name}.py needs a CUDA device",
        "unknown": "unrecognized arguments: --no-such",
        "no folder": "there is no folder '/no/such/folder'",
    }
    of_models = {"too few": "--rounds must be at least 2", "unknown shape": "invalid choice: 'vit_h'"}
    for name in scripts:
        for case, message in {**refusals, **(of_models if name in MODELS else {})}.items():
            exit_code, _, output = answers[f"{name} {ASKED[case]}"]
            assert exit_code == 2 and message.format(name=name) in output, (name, case, output)
        # A single line.
        assert answers[f"{name} {ASKED['no card']}"][2].count("\n") == 1
        exit_code, output, _ = answers[f"{name} {ASKED['help']}"]
        assert exit_code == 0 and "--out FILE.json" in output
        if name in MODELS:
            assert "4 x parameters of the frozen Llama's layers x tokens" in output and "MFU =" in output


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the benchmarks' own modules."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(FOLDER))
    return __import__


def test_bars_have_verdicts_on_a_card(modules: Any) -> None:
    report, shapes = modules("report"), modules("shapes")
    case = shapes.Case("pretrain", "8b", "vit_l", 6, 4096, "bf16", packs=4, workers=8, dry_run=False)
    results = {
        "sides": {"ours": {"share_of_bf16_rate": 0.56}},
        "ratios": {"huggingface_over_ours": {"median": 1.29}, "ours_over_bare_and_media": {"median": 1.04}},
        "data_wait": {"share": 0.02},
    }
    assert [bar["met"] for bar in report.bars(case, results)] == [True, False, True, False]
    missing = {"sides": {}, "ratios": {}, "data_wait": None}
    assert [bar["met"] for bar in report.bars(case, missing)] == [None] * 4


def test_another_loss_is_noticed(modules: Any) -> None:
    measure, runs = modules("measure"), modules("runs")

    def side(loss: float, norm: float) -> Any:
        return runs.Side(lambda number: None, (loss, norm), "none", None)

    for theirs, equal in ((side(2.0, 1.0), True), (side(2.001, 1.0), False), (side(2.0, 1.01), False)):
        same = measure.equality({"ours": side(2.0, 1.0), "huggingface": theirs}, "32")
        assert same["equal"] is equal
    assert measure.equality({"ours": side(2.0, 1.0)}, "32") is None


class Card:
    """Stands in for a GPU on which some attempts run out of memory."""

    def __init__(self, fits: Any):
        # (side, recomputation, sides already in memory) -> whether it fits.
        self.fits, self.tried, self.held, self.recompute = fits, [], [], "none"

    def build_run(self, *ignored: Any) -> Any:
        return SimpleNamespace(state=SimpleNamespace(), recompute=self.recompute)

    def start(self, name: str, run: Any, recompute: str) -> Any:
        import torch

        self.tried.append((name, recompute, tuple(self.held)))
        if not self.fits(name, recompute, tuple(self.held)):
            raise torch.OutOfMemoryError("no room")
        self.held.append(name)
        return SimpleNamespace(step=lambda number: None, first=(1.0, 1.0), recompute=recompute)

    def time(self, modules: Any, monkeypatch: pytest.MonkeyPatch, *sides: str, apart: bool = False) -> Any:
        """Run measure.time_sides on this GPU."""
        measure = modules("measure")
        for name, replacement in {
            "build_run": self.build_run,
            "start": self.start,
            "release": lambda: None,
            "set_recompute": lambda config, recompute: setattr(self, "recompute", recompute),
            "take_turns": lambda steps, rounds, warm_up: dict.fromkeys(steps),
            "_note": self.note,
        }.items():
            monkeypatch.setattr(measure, name, replacement)
        options = measure.Options(sides, "bf16", 1, 2, ("none", "full"), apart, 1, False)
        return measure.time_sides(None, None, options)

    def note(self, timed: Any, run: Any, started: Any, options: Any) -> None:
        timed.sides |= started
        self.held.clear()


def test_what_does_not_fit_together_is_timed_alone(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(lambda name, recompute, held: name != "huggingface" or not held)
    timed = card.time(modules, monkeypatch, "ours", "bare", "huggingface")
    assert list(timed.sides) == ["ours", "bare", "huggingface"] and not timed.left_out
    tries = [("huggingface", recompute, ("ours", "bare")) for recompute in ("none", "full")]
    assert card.tried[2:] == [*tries, ("huggingface", "none", ())] and timed.equality["equal"]


def test_as_little_as_fits_is_computed_twice(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(lambda name, recompute, held: recompute == "full")
    timed = card.time(modules, monkeypatch, "ours", "bare", apart=True)
    assert {name: side.recompute for name, side in timed.sides.items()} == {"ours": "full", "bare": "full"}
    assert card.tried == [("ours", "none", ()), ("ours", "full", ()), ("bare", "full", ())]


def test_what_never_fits_is_named(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(lambda name, recompute, held: name != "ours")
    timed = card.time(modules, monkeypatch, "ours", "bare")
    assert list(timed.sides) == ["bare"] and timed.left_out == {"ours": "it does not fit in GPU memory"}


def test_idle_share(modules: Any) -> None:
    idle_share = modules("profiling").idle_share
    assert idle_share([(0, 2), (1, 3), (6, 8), (7, 7.5)]) == pytest.approx(3 / 8)
    assert idle_share([]) == 1.0


def test_sizes_on_a_card_are_the_published_ones(modules: Any) -> None:
    shapes = modules("shapes")
    large = shapes.Case("pretrain", "70b", "vit_g", 12, 4096, "fp8_primary", packs=2, workers=8, dry_run=False)
    assert large.llama_shape["num_hidden_layers"] == 80 and large.llama_shape["hidden_size"] == 8192
    assert large.encoder_shape["num_hidden_layers"] == 48 and large.encoder_shape["hidden_size"] == 1664
    config = shapes.make_config(large, Path("data"), mean_tokens=200.0)
    assert (config.model.fp8, config.model.fp8_primary_weights, config.trainer.precision) == ("hybrid", True, "bf16")
    assert config.model.modalities["image"].projector.num_layers == 12
    assert config.model.modalities["image"].projector.num_tokens == 64
    assert config.data.seq_length == 4096 and config.model.global_batch_size == 39
