"""lmms-eval and lm-evaluation-harness give an export the answers, accuracy and likelihoods of `anymal evaluate`.

They are installed from PyPI into an environment of their own. That takes minutes, so these tests are marked slow.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fork_server
import pyarrow.parquet as pq
import pytest
from benchmark_data import parquet
from hf_parts import make_config, make_model, sections, write_export
from tiny import WORDS, make_tokenizer

from examples.quickstart.media import DIGITS, IMAGE_SIDE, enlarge, split_digits
from megatron_anymal.data.chat_format import open_prompt, parse_messages
from megatron_anymal.data.prompt_encoder import MediaFile
from megatron_anymal.data.records import TextPart
from megatron_anymal.generation.export_generator import ExportedGenerator
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.sampling import Sampling

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guides" / "evaluation.md").read_text()
COUNT = 48
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of an environment with both harnesses and this package, installed as the guide says."""
    folder = tmp_path_factory.mktemp("harnesses") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    installed, extra = version("torch"), f"{ROOT}[lmms-eval]"
    assert 'pip install -e ".[lmms-eval]"' in PAGE and '"lm-eval[hf]>=0.4.9,<0.5"' in PAGE
    # One after the other, as on the page: pip does not find what fits all at once.
    for words in ([f"torch=={installed.partition('+')[0]}"], ["-e", extra], ["lm-eval[hf]>=0.4.9,<0.5"]):
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot install {words} here: {done.stderr.strip().splitlines()[-1]}")
    if "+cpu" in installed:
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    return folder / "bin"


def write_benchmark(file: Path, answers: dict[str, str]) -> None:
    """Write questions about the quickstart's held-out pictures, in the format of VQAv2.

    Args:
        answers: to some questions, by their key; the answer to all others is the digit.
    """
    rows: list[dict[str, Any]] = []
    for n, (scan, label) in enumerate(zip(*split_digits(1234, COUNT)["held_out"])):
        picture = io.BytesIO()
        enlarge(scan, IMAGE_SIDE).save(picture, "PNG")
        answer = answers.get(str(n), DIGITS[label])
        rows.append(
            {
                "question_id": n,
                "question_type": "what is",
                "question": " ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 3 + n % 5)),
                "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)],
                "image": {"bytes": picture.getvalue(), "path": f"{n}.png"},
            }
        )
    parquet(file, rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with an export, and a benchmark that it answers in part."""
    folder = tmp_path_factory.mktemp("work")
    tokenizer = make_tokenizer(folder / "tokenizer")
    write_export(folder / "exported", make_model(make_config(sections("towers"), tokenizer)), tokenizer)
    file = folder / "runs" / "quickstart" / "benchmark" / "data" / "validation-00000-of-00001.parquet"
    write_benchmark(file, {})
    given = evaluated(folder, "first")
    assert len({text for text, _ in given.values()}) > 20, "too few distinct answers"
    write_benchmark(file, {key: text for number, (key, (text, _)) in enumerate(given.items()) if number % 3})
    return folder


def evaluated(folder: Path, out: str) -> dict[str, tuple[str, float]]:
    """Key -> answer and VQA accuracy, by `anymal evaluate`."""
    words = ["--checkpoint=exported", "--device=cpu", "--task", "vqav2=runs/quickstart/benchmark", f"--out={out}"]
    done = fork_server.python("-m", "megatron_anymal", "evaluate", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / out / "results.json").read_text())["tasks"]["vqav2"]["answers"]
    return {row["key"]: (row["text"], row["values"]["vqa_accuracy"]) for row in rows}


def run_program(programs: Path, words: list[str], folder: Path) -> str:
    """Run a harness without the network; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "huggingface")}
    command = [str(programs / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def line_of(start: str, part: str) -> list[str]:
    """Words of a command of the guide."""
    [line] = [line for line in PAGE.splitlines() if line.startswith(start) and part in line]
    return shlex.split(line)


def test_lmms_eval_gives_the_answers_of_evaluate(programs: Path, folder: Path) -> None:
    words = [
        str(ROOT / word) if word == "examples/lmms_eval_tasks" else word for word in line_of("lmms-eval", "anymal_vqa")
    ]
    shown = run_program(programs, words, folder)
    [path] = (folder / "runs" / "quickstart" / "lmms_eval").rglob("*_samples_anymal_vqa.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    answers = {str(row["doc_id"]): (row["filtered_resps"].strip(), row["exact_match"]) for row in rows}
    expected = evaluated(folder, "second")
    assert answers == expected and len(answers) == COUNT
    accuracy = sum(value for _, value in answers.values()) / COUNT
    assert 0.6 < accuracy < 0.9 and f"{accuracy:.4f}" in shown


def test_lmms_eval_asks_in_a_users_turn(programs: Path, folder: Path) -> None:
    words = [
        str(ROOT / word) if word == "examples/lmms_eval_tasks" else word for word in line_of("lmms-eval", "anymal_chat")
    ]
    run_program(programs, [word.replace("runs/quickstart/exported", "exported") for word in words], folder)
    [path] = (folder / "runs" / "quickstart" / "lmms_eval").rglob("*_samples_anymal_chat.jsonl")
    answers = {row["doc_id"]: row["filtered_resps"].strip() for row in map(json.loads, path.read_text().splitlines())}
    config = json.loads((folder / "exported" / "config.json").read_text())
    generator = ExportedGenerator.of_folder(str(folder / "exported"), config, "cpu", "auto", trust_remote_code=False)
    prompts = []
    for number, row in enumerate(pq.read_table(folder / "runs" / "quickstart" / "benchmark" / "data").to_pylist()):
        picture = {"media": f"{number}.png", "modality": "image"}
        turn = {"role": "user", "content": [{"text": row["question"]}, picture]}
        prompts.append(Prompt(open_prompt(parse_messages([turn], "")), [MediaFile(row["image"]["bytes"], "png")]))
    assert list(answers.values()) == [text.strip() for text in generator.answer(prompts, Sampling(max_new_tokens=16))]
    assert len(set(answers.values())) > 10


def test_lmms_eval_names_a_mistake(programs: Path, folder: Path) -> None:
    words = [word.replace("pretrained=exported", "pretrained=tokenizer") for word in line_of("lmms-eval", "anymal_vqa")]
    words = [str(ROOT / word) if word == "examples/lmms_eval_tasks" else word for word in words]
    # lmms-eval only reports errors, and exits with code 0.
    assert "There is no checkpoint in 'tokenizer'" in run_program(programs, words, folder)


WORDS_TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_lm_eval_gives_the_likelihoods_of_this_package(programs: Path, folder: Path) -> None:
    (folder / "tasks").mkdir()
    (folder / "tasks" / "words.yaml").write_text(WORDS_TASK)
    rows = [
        {"question": " ".join(WORDS[n : n + 2 + n % 6]), "options": WORDS[n % 7 : n % 7 + 4], "answer": n % 4}
        for n in range(16)
    ]
    (folder / "words.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = ["words" if word == "hellaswag" else word for word in line_of("lm_eval", "hellaswag")]
    more = ["--include_path", "tasks", "--device", "cpu", "--log_samples", "--output_path", "lm_eval"]
    run_program(programs, [*words, *more], folder)
    [path] = (folder / "lm_eval").rglob("samples_words_*.jsonl")
    samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"])
    config = json.loads((folder / "exported" / "config.json").read_text())
    generator = ExportedGenerator.of_folder(str(folder / "exported"), config, "cpu", "auto", trust_remote_code=False)
    for row, sample in zip(rows, samples, strict=True):
        prompt = Prompt([TextPart(str(row["question"]))], [])
        [expected] = generator.log_likelihoods([prompt], [[f" {option}" for option in row["options"]]])  # type: ignore[attr-defined]
        assert [float(response[0][0]) for response in sample["resps"]] == pytest.approx(expected, abs=1e-4)
