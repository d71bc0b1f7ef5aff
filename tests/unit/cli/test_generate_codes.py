"""`anymal generate` and `anymal evaluate` with media as codes: files of every kind, prompts with media, refusals."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from codes import codes
from discrete_model import discrete_generator
from hf_parts import write_export
from PIL import Image
from tiny import png
from vq_models import MODELS, emu3

from megatron_anymal.cli import evaluate, generate
from megatron_anymal.config import ConfigError, DiscreteConfig
from megatron_anymal.data.code_grammar import CodeItem
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.media_tokenizers import open_tokenizer
from megatron_anymal.data.records import DataError
from megatron_anymal.generation.evaluation import read_questions
from megatron_anymal.generation.export_generator import ExportedGenerator
from megatron_anymal.generation.sampling import CodeSampling, Sampling
from megatron_anymal.hf.processing_anymal import AnyMALProcessor

SOUNDS = ("encodec", "mimi", "dac")


class Folders:
    """An exported model, its tokenizers, and their codes."""

    def __init__(self, folder: Path, tokenizer_folder: str):
        self.model, self.picture, self.sounds = folder / "model", emu3(folder / "emu3"), folder / "sounds"
        for name in SOUNDS:
            torch.manual_seed(0)
            MODELS[name]().save_pretrained(self.sounds / name)
        self.tokenizer = open_tokenizer("picture", str(self.picture))
        discrete = {
            "picture": DiscreteConfig(codebooks=[64], codes_per_item=16, tokenizer_hash=self.tokenizer.hash),
            # Two of its codebooks: the last levels of a residual quantizer may be left out.
            **{name: DiscreteConfig(codebooks=[16, 16]) for name in SOUNDS},
        }
        generator = discrete_generator(tokenizer_folder, discrete)
        write_export(self.model, generator._model, tokenizer_folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> Folders:
    return Folders(tmp_path_factory.mktemp("codes"), tokenizer_folder)


def run(main: Any, folders: Folders, capsys: pytest.CaptureFixture, *more: str) -> str:
    assert main([f"--checkpoint={folders.model}", "--device=cpu", *more]) == 0
    return capsys.readouterr().out


def test_a_drawing_is_the_picture_that_transformers_decodes(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from transformers import Emu3VQVAE

    asked = ["--text=seven", "--modalities=picture", "--max-new-tokens=18", f"--media-out={tmp_path}/m"]
    output = run(generate.main, folders, capsys, *asked)
    assert (
        f"picture: {tmp_path}/m/0-1.picture.codes.npy (codes; --media-tokenizer picture=TOKENIZER turns them" in output
    )
    written = np.load(tmp_path / "m/0-1.picture.codes.npy")
    assert written.shape == (1, 16) and len(np.unique(written)) > 1
    output = run(generate.main, folders, capsys, *asked, f"--media-tokenizer=picture={folders.picture}")
    assert output.splitlines() == ["[picture 1]", f"picture: {tmp_path}/m/0-1.png"]
    model = Emu3VQVAE.from_pretrained(folders.picture).eval()
    with torch.no_grad():
        shown = model.decode(torch.from_numpy(written.astype(np.int64)).reshape(1, 4, 4))[0]
    expected = (shown.permute(1, 2, 0) * 0.3 + 0.4).clamp(0, 1) * 255
    assert np.abs(np.asarray(Image.open(tmp_path / "m/0-1.png")) - expected.numpy()).max() <= 0.5 + 1e-3
    assert "codes " in run(generate.main, folders, capsys, *asked[:-1])
    processor = AnyMALProcessor.from_pretrained(folders.model)
    parts = ["a seven: ", CodeItem("picture", written)]
    saved = processor.save_media(parts, str(tmp_path / "saved"), {"picture": str(folders.picture)})
    assert saved == [{"text": "a seven: "}, {"media": "0-1.png", "modality": "picture"}]
    assert (tmp_path / "saved/0-1.png").read_bytes() == (tmp_path / "m/0-1.png").read_bytes()


@pytest.mark.parametrize("name", SOUNDS)
def test_sounds_are_wav_files(name: str, folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    more = [f"--modalities={name}", "--max-new-tokens=40", f"--media-out={tmp_path}", "--text=a sound"]
    run(generate.main, folders, capsys, *more)
    run(generate.main, folders, capsys, *more, f"--media-tokenizer={name}={folders.sounds / name}")
    wave, rate = soundfile.read(tmp_path / "0-1.wav")
    [expected] = open_tokenizer(name, str(folders.sounds / name)).decode([np.load(tmp_path / f"0-1.{name}.codes.npy")])
    assert rate == 8000 and len(wave) == len(expected)
    np.testing.assert_allclose(wave, expected.clip(-1, 1), atol=1e-4)


def test_frames_are_a_video(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import av

    asked = ["--modalities=picture", "--max-new-tokens=72", f"--media-out={tmp_path}", "--text=one"]
    asked += ["--code-sampling=picture:top_p=1.0,temperature=1.2", "--temperature=100"]
    tokenizer = f"--media-tokenizer=picture={folders.picture}"
    count, seed = 0, 0
    while count < 2:
        seed += 1
        more = [*asked, f"--seed={seed}"]
        single = run(generate.main, folders, capsys, *more, tokenizer).splitlines()
        count = single[0].count("[picture")
        assert len(single) == 1 + count
    assert run(generate.main, folders, capsys, *more, tokenizer, "--video=picture=4").splitlines()[1:] == [
        f"picture: {tmp_path}/0-1.mp4"
    ]
    with av.open(str(tmp_path / "0-1.mp4")) as video:
        assert video.streams.video[0].average_rate == 4
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    pictures = [np.asarray(Image.open(tmp_path / f"0-{n}.png")).astype(int) for n in range(1, count + 1)]
    assert len(frames) == count
    # Colours have half the resolution.
    assert all(np.abs(frame.mean((0, 1)) - picture.mean((0, 1))).max() < 6 for frame, picture in zip(frames, pictures))


def test_interleaved_answers_are_lists_of_parts(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = [{"parts": [{"text": word}]} for word in ("one", "two", "seven", "a sound", "walk", "run", "motion")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = [f"--prompts={tmp_path}/prompts.jsonl", f"--out={tmp_path}/answers.jsonl", f"--media-out={tmp_path}/m"]
    more += ["--temperature=1.4", "--max-new-tokens=60", "--modalities=text,picture,dac", "--code-sampling=dac:top_k=3"]
    run(generate.main, folders, capsys, *more, f"--media-tokenizer=picture={folders.picture}")
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    kinds = [[part.get("modality", "text") for part in row.get("parts", [])] for row in rows]
    assert any("text" in one and "picture" in one for one in kinds) and any("dac" in one for one in kinds)
    assert all("encodec" not in one for one in kinds)
    for row in rows:
        items = [part for part in row.get("parts", []) if "media" in part]
        for number, part in enumerate(items, start=1):
            ending = "png" if part["modality"] == "picture" else "dac.codes.npy"
            assert part["media"] == f"{tmp_path}/m/{row['prompt']}-{number}.{ending}" and Path(part["media"]).is_file()
            assert f"[{part['modality']} {number}]" in row["answer"]


def test_pictures_in_prompts_become_codes(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.png").write_bytes(png(1, (20, 12)))
    tokenizer = f"--media-tokenizer=picture={folders.picture}"
    asked = ["--modality=picture", "--text=what is this", "--max-new-tokens=12", "--modalities=text"]
    output = run(generate.main, folders, capsys, f"--media={tmp_path}/a.png", *asked, tokenizer)
    [item] = folders.tokenizer.encode([np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))])
    (tmp_path / "a.codes.npy").write_bytes(codes(item))
    with pytest.raises(DataError, match=r"of an unknown tokenizer, but model\.discrete\.picture\.tokenizer_hash="):
        run(generate.main, folders, capsys, f"--media={tmp_path}/a.codes.npy", *asked)
    part = {"media": "a.codes.npy", "modality": "picture", "tokenizer_hash": folders.tokenizer.hash}
    line = {"parts": [part, {"text": "what is this"}]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line) + "\n")
    prompts = [f"--prompts={tmp_path}/prompts.jsonl", *asked[2:]]
    assert output.strip() and run(generate.main, folders, capsys, *prompts) == output
    (tmp_path / "b.png").write_bytes(png(2, (20, 12)))
    assert run(generate.main, folders, capsys, f"--media={tmp_path}/b.png", *asked, tokenizer) != output


def test_a_conversation_with_drawings(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(png(1, (20, 12)))
    lines = iter(["one", f"/picture {tmp_path}/a.png", "and this", "/quit"])
    monkeypatch.setattr(generate, "_read_line", lambda shown: next(lines))
    more = ["--interactive", "--modalities=picture", "--max-new-tokens=18", f"--media-out={tmp_path}/m"]
    output_lines = run(
        generate.main, folders, capsys, *more, f"--media-tokenizer=picture={folders.picture}"
    ).splitlines()
    assert output_lines[1:] == [
        "[picture 1]",
        f"picture: {tmp_path}/m/turn1-1.png",
        "[picture 1]",
        f"picture: {tmp_path}/m/turn2-1.png",
    ]


def prepared(folder: Path, tokenizer_folder: str, answers: list[np.ndarray], hash: str) -> str:
    """Samples "seven ..." -> a drawing, and a drawing -> "one"."""
    folder.mkdir()
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        for number, answer in enumerate(answers):
            item = {"media": "0.codes.npy", "modality": "picture", "tokenizer_hash": hash}
            text = {"text": " ".join(["seven"] * (number + 1)), "loss": False}
            parts = [text, {**item, "loss": True}] if number % 2 else [item, {"text": "one"}]
            value = {"parts": parts}
            for name, data in (("json", json.dumps(value).encode()), ("0.codes.npy", codes(answer))):
                member = tarfile.TarInfo(f"k{number}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    make_index(str(folder), IndexOptions(tokenizer_folder))
    return str(folder)


def test_evaluation_compares_codes(
    folders: Folders, tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture
) -> None:
    config = json.loads((folders.model / "config.json").read_text())
    generator = ExportedGenerator.of_folder(str(folders.model), config, "cpu", "auto", trust_remote_code=False)
    sampling = Sampling(18, modalities=("picture",), codes={"picture": CodeSampling(temperature=0.0)})
    zeros = [np.zeros((1, 16), int)] * 6
    asked = read_questions(prepared(tmp_path / "zeros", tokenizer_folder, zeros, folders.tokenizer.hash))
    assert [question.modality for question in asked] == ["picture"] * 6
    assert [question.answer for question in asked] == ["one", "[picture 1]"] * 3
    drawn = [reply.items[0].codes for reply in generator.replies([question.prompt for question in asked], sampling)]
    right = [drawn[n] if n != 3 else zeros[n] for n in range(6)]
    data = prepared(tmp_path / "drawn", tokenizer_folder, right, folders.tokenizer.hash)
    more = [f"--data={data}", "--modalities=picture", "--max-new-tokens=18", f"--out={tmp_path}/scores.json"]
    output = run(evaluate.main, folders, capsys, *more, "--code-sampling=picture:temperature=0")
    result = json.loads((tmp_path / "scores.json").read_text())
    # The questions about a drawing are answered with drawings, so no answer is "one".
    assert result["scores"]["trained"]["picture"]["accuracy"] == 2 / 6
    assert f"{2 / 6:.1%} of 6 exact" in output and "grammatical without enforcement: " in output
    rows = result["answers"]["trained"]
    assert rows[1]["expected_parts"] == rows[1]["given_parts"] == [{"modality": "picture", "codes": right[1].tolist()}]
    assert rows[3]["given_parts"][0]["codes"] == drawn[3].tolist() and rows[0]["expected"] == "one"


REFUSED: list[tuple[list[str], str]] = [
    (
        ["--modalities=text,sound"],
        "--modalities: 'sound' is not in the model.discrete of this model, which can generate: text",
    ),
    (["--modalities=,"], "--modalities names nothing"),
    (["--code-sampling=sound:top_p=0.5"], "--code-sampling: 'sound' is not in the model.discrete"),
    (["--code-sampling=picture"], "--code-sampling 'picture' is not of the form NAME:KEY=VALUE"),
    (["--code-sampling=picture:warmth=1"], "with the keys temperature, top_p, top_k, repetition_penalty"),
    (["--code-sampling=picture:top_p=2"], "--code-sampling picture: top_p=2.0 must be above 0 and at most 1"),
    (["--media-tokenizer=picture"], "--media-tokenizer 'picture' is not of the form NAME=TOKENIZER"),
    (["--media-tokenizer=sound=a:B"], "--media-tokenizer: 'sound' is not in the model.discrete"),
    (["--media-tokenizer=picture=missing"], "--media-tokenizer picture=missing: there is no such folder"),
    (["--video=picture"], "--video 'picture' is not of the form NAME=RATE"),
    (["--video=picture=5"], "--video picture needs --media-tokenizer picture=TOKENIZER and --media-out FOLDER"),
    (["--media-out=FILE"], "--media-out .* is a file"),
    (["--media-tokenizer=picture=DAC"], "has codebooks of .* codes, but model.discrete.picture.codebooks is"),
    (["--media-tokenizer=picture=OTHER"], "has the hash .*, but the model's codes are of .*tokenizer_hash"),
    (["--modalities=picture"], r"An answer of 9 token\(s\) has no room for an item of picture"),
]


@pytest.mark.parametrize(("given", "says"), REFUSED)
def test_what_cannot_work_is_refused(
    given: list[str], says: str, folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    other = emu3(tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    names = {"FILE": str(tmp_path / "file"), "DAC": str(folders.sounds / "dac"), "OTHER": str(other)}
    options = [
        one.rpartition("=")[0] + "=" + names.get(one.rpartition("=")[2], one.rpartition("=")[2]) for one in given
    ]
    with pytest.raises((ConfigError, DataError), match=says):
        run(generate.main, folders, capsys, "--text=one", "--max-new-tokens=9", *options)


def test_items_that_do_not_fit_are_told(folders: Folders, capsys: pytest.CaptureFixture) -> None:
    assert generate.main([f"--checkpoint={folders.model}", "--device=cpu", "--text=one", "--max-new-tokens=9"]) == 0
    stderr = capsys.readouterr().err
    assert (
        "warning: --max-new-tokens=9 is less than the 18 tokens of an item of 'picture', so that none is begun"
        in stderr
    )
