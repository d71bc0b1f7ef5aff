"""`anymal prepare --encode`: HuggingFace folders against transformers itself, plug-ins, resumes and refusals."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from tiny import flac, png
from vq_models import MODELS, emu3

from megatron_anymal.cli.prepare import main
from megatron_anymal.data.codes import CodesKind
from megatron_anymal.data.media_tokenizers import MediaTokenizer, open_tokenizer
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_index import ShardIndex


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emu3(tmp_path_factory.mktemp("vq") / "emu3")


def manifest(folder: Path, lines: list[dict[str, Any]], files: dict[str, bytes]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "m.jsonl")


def stored(folder: Path) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar.getmembers():
                members[member.name] = tar.extractfile(member).read()
    return members


def array(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data))


@pytest.mark.parametrize("kind", MODELS)
def test_sounds_have_the_codes_that_transformers_gives(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    model.save_pretrained(tmp_path)
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 4000).astype(np.float32)
    tokenizer = open_tokenizer("speech", str(tmp_path))
    assert isinstance(tokenizer, MediaTokenizer)
    [codes, other] = tokenizer.encode([wave, wave[:2400]])
    with torch.no_grad():
        more = {"bandwidth": 16.0} if kind == "encodec" else {}
        expected = model.encode(torch.from_numpy(wave)[None, None], **more).audio_codes
        shape = expected[None] if kind == "encodec" and expected.ndim == 3 else expected
        decoded = model.decode(shape, [None]) if kind == "encodec" else model.decode(audio_codes=expected)
    assert (codes == expected.reshape(-1, expected.shape[-1]).numpy()).all()
    assert codes.shape[0] == len(tokenizer.codebooks) and set(tokenizer.codebooks) == {16}
    assert other.shape[1] < codes.shape[1] and tokenizer.sampling_rate == 8000
    np.testing.assert_allclose(tokenizer.decode([codes])[0], decoded.audio_values.reshape(-1).numpy(), atol=1e-6)


def test_pictures_have_the_codes_that_transformers_gives(pictures: Path) -> None:
    from transformers import Emu3VQVAE

    model = Emu3VQVAE.from_pretrained(pictures).eval()
    tokenizer = open_tokenizer("picture", str(pictures))
    items = [np.asarray(Image.open(io.BytesIO(png(seed, (20, 12)))).convert("RGB")) for seed in (1, 2)]
    resized = [np.asarray(Image.fromarray(item).resize((16, 16), Image.Resampling.BICUBIC)) for item in items]
    pixels = (torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255 - 0.4) / 0.3
    with torch.no_grad():
        expected = model.encode(pixels, torch.tensor([[16, 16]] * 2)).image_tokens
        shown = model.decode(torch.stack(expected))
    picture_codes = tokenizer.encode(items)
    assert [one.tolist() for one in picture_codes] == [one.reshape(1, -1).tolist() for one in expected]
    assert len(np.unique(picture_codes[0])) > 1 and picture_codes[0].shape == (1, 16)
    pixels = (shown.permute(0, 2, 3, 1) * 0.3 + 0.4).clamp(0, 1) * 255
    assert np.abs(np.stack(tokenizer.decode(picture_codes)) - pixels.numpy()).max() <= 0.5 + 1e-3


def prepare(source: str, out: Path, tokenizer: str, *more: str) -> None:
    assert main(["--manifest", source, "--out", str(out), "--tokenizer", tokenizer, *more]) == 0


def lines(count: int) -> list[dict[str, Any]]:
    """Drawings: a picture to be encoded in the answer, another that stays as it is in the question."""
    answer = [{"text": "one"}, {"media": "y.png", "modality": "picture"}]
    asked = [{"text": "what is"}, {"media": "x.png"}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return [{"key": f"k{number}", "messages": turns} for number in range(count)]


FILES = {"x.png": png(1), "y.png": png(2, (24, 16))}


def test_media_of_a_manifest_become_codes(pictures: Path, tmp_path: Path, tokenizer_folder: str) -> None:
    source = manifest(tmp_path / "source", lines(3), FILES)
    prepare(source, tmp_path / "out", tokenizer_folder, "--encode", f"picture={pictures}", "--filter", "min_side=8")
    members = stored(tmp_path / "out")
    tokenizer = open_tokenizer("picture", str(pictures))
    [expected] = tokenizer.encode([np.asarray(Image.open(io.BytesIO(FILES["y.png"])).convert("RGB"))])
    assert members["k0.0.png"] == FILES["x.png"]
    assert (array(members["k0.1.codes.npy"]) == expected).all()
    assert json.loads(members["k0.json"])["messages"][1]["content"][1] == {
        "media": "1.codes.npy",
        "modality": "picture",
        "tokenizer_hash": tokenizer.hash,
    }
    index = ShardIndex(str(tmp_path / "out"))
    assert CodesKind("picture", "answer", 1, tokenizer.hash) in map(CodesKind.parse, index.kinds_used())


def test_filters_see_the_media_before_they_are_encoded(pictures: Path, tmp_path: Path, tokenizer_folder: str) -> None:
    source = manifest(tmp_path / "source", [*lines(1), {"key": "p", "media": "y.png", "text": "a"}], FILES)
    more = ["--encode", f"picture={pictures}", "--filter", "min_side=12"]
    prepare(source, tmp_path / "out", tokenizer_folder, *more)
    # x.png has 8 x 8 pixels.
    assert {name.partition(".")[0] for name in stored(tmp_path / "out")} == {"p"}


def test_a_name_that_is_a_kind_encodes_all_media_of_it(tmp_path: Path, tokenizer_folder: str) -> None:
    torch.manual_seed(0)
    MODELS["dac"]().save_pretrained(tmp_path / "dac")
    part = [{"media": "a.flac"}, {"text": "one"}]
    source = manifest(tmp_path / "source", [{"key": "k", "parts": part}], {"a.flac": flac(1)})
    prepare(source, tmp_path / "out", tokenizer_folder, "--encode", f"audio={tmp_path / 'dac'}")
    wave, rate = soundfile.read(io.BytesIO(flac(1)), dtype="float32")
    [expected] = open_tokenizer("audio", str(tmp_path / "dac")).encode([wave])
    assert rate == 8000 and (array(stored(tmp_path / "out")["k.0.codes.npy"]) == expected).all()


PLUGIN = """
import numpy as np
calls = []
class Brightness:
    kind, sampling_rate, codebooks, hash = "image", 0, (256,), "{hash}"
    def encode(self, items):
        calls.append(len(items))
        if len(calls) == {stop}:
            raise KeyboardInterrupt
        return [np.array([[item.min(), item.max()]], {dtype}) for item in items]
    def decode(self, codes):
        raise NotImplementedError
class Half:
    kind = "image"
"""


def plugin(folder: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> str:
    folder.mkdir(exist_ok=True)
    filled = {"hash": "h1", "stop": 0, "dtype": "np.int64", **values}
    (folder / "brightness.py").write_text(PLUGIN.format(**filled))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "brightness", raising=False)
    return "picture=brightness:Brightness"


def calls() -> int:
    return len(sys.modules["brightness"].calls)


def test_an_interrupted_encoding_continues(
    tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, size = manifest(tmp_path / "source", lines(6), FILES), ["--samples-per-shard", "2", "--encode"]
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", tokenizer_folder, *size, plugin(tmp_path / "a", monkeypatch, stop=5))
    prepare(source, tmp_path / "out", tokenizer_folder, *size, plugin(tmp_path / "b", monkeypatch))
    assert calls() == 2
    prepare(source, tmp_path / "whole", tokenizer_folder, *size, plugin(tmp_path / "c", monkeypatch))
    assert calls() == 6 and stored(tmp_path / "out") == stored(tmp_path / "whole")


def test_another_tokenizer_starts_again(tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, size = manifest(tmp_path / "source", lines(6), FILES), ["--samples-per-shard", "2", "--encode"]
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", tokenizer_folder, *size, plugin(tmp_path / "a", monkeypatch, stop=5))
    prepare(source, tmp_path / "out", tokenizer_folder, *size, plugin(tmp_path / "b", monkeypatch, hash="h2"))
    assert calls() == 6


def test_parts_give_the_shards_of_one_command(
    tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = plugin(tmp_path / "a", monkeypatch)
    source, size = manifest(tmp_path / "source", lines(5), FILES), ["--samples-per-shard", "2", "--encode", spec]
    for part in ("1/2", "2/2"):
        prepare(source, tmp_path / "parts", tokenizer_folder, *size, "--part", part)
    assert main(["--merge", str(tmp_path / "parts")]) == 0
    prepare(source, tmp_path / "whole", tokenizer_folder, *size)
    assert stored(tmp_path / "parts") == stored(tmp_path / "whole")
    for name in ("samples.npy", "media.npy"):
        assert (tmp_path / "parts/index" / name).read_bytes() == (tmp_path / "whole/index" / name).read_bytes()


def test_a_bad_picture_costs_its_sample(tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = plugin(tmp_path / "a", monkeypatch)
    bad = {"key": "bad", "parts": [{"media": "bad.png", "modality": "picture"}, {"text": "one"}]}
    source = manifest(tmp_path / "source", [*lines(1), bad], {**FILES, "bad.png": FILES["x.png"][:40]})
    prepare(source, tmp_path / "out", tokenizer_folder, "--encode", spec, "--max-bad-share", "0.5")
    [entry] = ShardIndex(str(tmp_path / "out")).left_out()
    assert (entry.key, entry.code) == ("bad", "media") and "(.png) cannot be decoded" in entry.reason


def test_codes_of_a_plugin_are_checked(tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = plugin(tmp_path / "a", monkeypatch, dtype="np.float32")
    source = manifest(tmp_path / "source", lines(1), FILES)
    with pytest.raises(DataError, match=r"the tokenizer of 'picture' returned float32 of shape \(1, 2\)"):
        prepare(source, tmp_path / "out", tokenizer_folder, "--encode", spec)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["picture"], "--encode 'picture' is not of the form NAME=TOKENIZER"),
        (["picture=missing"], "there is no such folder, and it is not of the form module:Class"),
        (["picture=EMPTY"], "has no config.json"),
        (["picture=nothing_here:A"], "No module named 'nothing_here'.*PYTHONPATH"),
        (["picture=json:A"], "has no attribute 'A'"),
        (["picture=brightness:Half"], "lacks a part of MediaTokenizer"),
        (["picture=LLAMA"], "it holds a 'llama' model. Known are emu3_vqgan, encodec, mimi, dac"),
        (["a=json:A", "a=json:B"], "--encode names 'a' twice"),
    ],
)
def test_what_cannot_encode_is_refused(
    given: list[str], says: str, tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin(tmp_path / "a", monkeypatch)
    for name in ("EMPTY", "LLAMA"):
        (tmp_path / name).mkdir()
    (tmp_path / "LLAMA/config.json").write_text('{"model_type": "llama"}')
    filled = [
        text.replace("EMPTY", str(tmp_path / "EMPTY")).replace("LLAMA", str(tmp_path / "LLAMA")) for text in given
    ]
    options = [word for text in filled for word in ("--encode", text)]
    source = manifest(tmp_path / "source", lines(1), FILES)
    with pytest.raises(DataError, match=says):
        prepare(source, tmp_path / "out", tokenizer_folder, *options)
    assert not list((tmp_path).glob("out/*.tar"))


def test_shards_are_not_encoded_in_place(tmp_path: Path, tokenizer_folder: str) -> None:
    with pytest.raises(DataError, match="--encode has no effect without --manifest or --from"):
        main(["--index-only", str(tmp_path), "--tokenizer", tokenizer_folder, "--encode", "a=json:A"])
