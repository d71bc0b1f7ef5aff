"""Exports work in an environment with transformers but without this project, for both supported versions."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from engine import train
from ranks import run_ranks
from tiny import make_config, make_conversations, png

from checkpoint_tools import export_hf
from checkpoint_tools.verifying.samples import choose_samples
from megatron_anymal.config import LoraConfig, RunConfig
from megatron_anymal.generation.checkpoint_generator import NativeGenerator
from megatron_anymal.generation.prompts import prompt_of_files, read_prompts
from megatron_anymal.generation.sampling import Sampling

PIPELINE = Path(__file__).parents[1] / "unit" / "hf" / "ask_pipeline.py"
LIBRARIES = ["transformers=={transformers}", "peft", "pillow", "soundfile", "soxr", "av<19"]
# Runs in that environment. Prints the answers to all prompts, and the largest difference between the logits of merged
# weights and of separate peft adapters.
SCRIPT = """
import json, sys, torch, transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoProcessor
try:
    import megatron_anymal
    sys.exit("the trainer is installed here")
except ModuleNotFoundError:
    pass
merged, apart, prompts = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(merged, trust_remote_code=True, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(merged, trust_remote_code=True)
prompts = [json.loads(line) for line in open(prompts)]
answers = []
for prompt in prompts:
    inputs = processor(prompt)
    answers.append(processor.answers(model.generate(**inputs, max_new_tokens=8), inputs)[0])
inputs = processor(prompts)
together = processor.answers(model.generate(**inputs, max_new_tokens=8), inputs)
adapted = AutoModelForCausalLM.from_pretrained(apart, trust_remote_code=True, dtype=torch.float32).eval()
adapted = PeftModel.from_pretrained(adapted, apart + "/adapter").eval()
inputs = processor(prompts[0])
with torch.no_grad():
    difference = (adapted(**inputs).logits - model(**inputs).logits).abs().max().item()
print(json.dumps({
    "version": transformers.__version__, "answers": answers, "together": together, "difference": difference,
}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> RunConfig:
    """An SFT run on several kinds of samples."""
    folder = tmp_path_factory.mktemp("fresh")
    make_conversations(folder / "data", tokenizer_folder, 24)
    config = make_config(str(folder / "data"), tokenizer_folder, folder / "sft")
    config.job, config.data.seq_length, config.trainer.max_steps = "sft", 96, 3
    # With a higher learning rate, the model would only give empty answers.
    config.model.lora, config.model.optim.lr = LoraConfig(r=4, alpha=64.0), 1e-3
    run_ranks(1, train, config)
    return config


def exported_and_asked(run: RunConfig, folder: Path) -> list[str]:
    """Write two exports and prompts to `folder`, and return the trainer's own answers."""
    source = run.exp_manager.explicit_log_dir
    plain = ["--checkpoint", source, "--out", str(folder / "apart"), "--adapter", "separate"]
    assert export_hf.main(plain) == 0
    assert export_hf.main(["--checkpoint", source, "--out", str(folder / "merged")]) == 0
    samples = choose_samples(run.model, run.data, [], 3, llama_only=False)
    prompts = [sample.to_json(folder / f"media_{number}") for number, sample in enumerate(samples)]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(prompt) for prompt in prompts))
    (folder / "a.png").write_bytes(png(5, (20, 10)))
    generator = NativeGenerator.of_run(source)
    asked = [prompt_of_files([str(folder / "a.png")], [], None, "what is this", chat=chat) for chat in (True, False)]
    return generator.answer([*read_prompts(str(folder / "prompts.jsonl")), *asked], Sampling(max_new_tokens=8))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("wanted", ["4.57.6", "5.*"])
def test_an_export_answers_as_the_trainer_does(run: RunConfig, wanted: str, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", wanted)
    [[*expected, chat, plain]] = run_ranks(1, exported_and_asked, run, tmp_path, timeout=300)
    arguments = [tmp_path / "merged", tmp_path / "apart", tmp_path / "prompts.jsonl"]
    done = subprocess.run(
        [python, "-I", "-c", SCRIPT, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert report["version"].startswith(wanted.rstrip("*"))
    assert report["answers"] == report["together"] == [answer.strip() for answer in expected]
    assert len(set(report["answers"])) > 3
    assert report["difference"] < 1e-5
    # The script turns deprecation warnings into errors.
    done = subprocess.run(
        [python, "-I", PIPELINE, tmp_path / "merged", tmp_path / "a.png", "8"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    asked = json.loads(done.stdout.splitlines()[-1])
    assert asked["answers"] == dict.fromkeys(asked["answers"], chat.strip())
    assert asked["plain"] == dict.fromkeys(asked["plain"], plain.strip())


def environment(folder: Path, transformers: str) -> str:
    """Create an environment with torch, transformers and the media libraries, and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet"]
    for packages in ([f"torch=={version('torch').partition('+')[0]}"], LIBRARIES):
        done = subprocess.run(
            [*install, *(p.format(transformers=transformers) for p in packages)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"pip cannot install {packages} here: {done.stderr.strip().splitlines()[-1]}")
    return python
