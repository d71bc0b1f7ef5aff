"""`anymal inspect --html`: the page shows what the loader returns, and nothing in the data can break it."""

from __future__ import annotations

import base64
import copy
import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from browser import BROWSERS
from manifests import shards_of
from PIL import Image
from ranks import run_ranks
from replicas import replica_data
from tiny import flac, make_config, make_conversations, make_shards, npy, png
from tokenizer_folders import byte_level, save
from transformers import PreTrainedTokenizerFast

from megatron_anymal.cli import inspection_page
from megatron_anymal.cli.data_page.contents import ShownMedia
from megatron_anymal.cli.data_page.markup import text, token_text
from megatron_anymal.cli.data_page.media import item as media_item
from megatron_anymal.cli.data_page.numbers import RunView
from megatron_anymal.cli.data_page.style import STYLE
from megatron_anymal.cli.inspect import main
from megatron_anymal.config import DatasetConfig, EncoderConfig, ModalityConfig, RunConfig, StageConfig
from megatron_anymal.data.configured_modality import LoadedModality
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.records import DataError, PlannedMedia
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.modalities import Modality, build_modality
from megatron_anymal.modalities.video import VideoModality
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import build
from megatron_anymal.train.encoder_costs import FILE, agree_on_costs

VOID = {"meta", "img", "br", "hr", "input"}
HOSTILE = "</sub></mark><script>alert(1)</script>&lt;\u202eevil\n\"quoted\" 'x'"


@dataclass
class Token:
    """An entry of a token list: a token, or a media item's soft tokens."""

    tag: str
    position: str = ""
    shown: str = ""
    number: int = -1


@dataclass
class Article:
    """A sample on the page."""

    name: str = ""
    looks: str = ""
    words: str = ""
    pictures: list[bytes] = field(default_factory=list)
    documents: list[list[Token]] = field(default_factory=list)


class Page(HTMLParser):
    """Reads a page; fails if an element is not closed, or closed out of order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.articles: list[Article] = []
        self.words = ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in values.items()]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "article":
            self.articles.append(Article(looks=values.get("class", "")))
        elif "article" in self.open:
            article = self.articles[-1]
            if tag == "img":
                article.pictures.append(base64.b64decode(values["src"].partition("base64,")[2]))
            elif values.get("class") == "tokens":
                article.documents.append([])
            elif self.in_tokens and tag in ("span", "mark", "a"):
                article.documents[-1].append(Token(tag))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert self.open[-1] == "svg", tag

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    @property
    def in_tokens(self) -> bool:
        return bool(self.articles and self.articles[-1].documents) and self.open[-2:-1] == ["div"]

    def handle_data(self, data: str) -> None:
        self.words += data
        if "article" not in self.open:
            return
        article = self.articles[-1]
        article.words += data
        if self.open[-1] == "h3":
            article.name += data
        tokens = article.documents[-1] if article.documents else []
        if tokens and self.open[-1] == "sup":
            tokens[-1].position = data
        elif tokens and self.open[-1] == "sub":
            tokens[-1].number = int(data)
        elif tokens and self.open[-1] in ("span", "mark", "a"):
            tokens[-1].shown += data


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Byte-level BPE, which keeps every text."""
    folder = tmp_path_factory.mktemp("bytes") / "tokenizer"
    save(folder, byte_level())
    return str(folder)


@pytest.fixture(scope="module")
def shards(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Forty samples: image, audio, IMU, text only, and image with audio."""
    folder = tmp_path_factory.mktemp("page") / "mixed"
    return make_shards(folder, tokenizer, 40, ("image", "audio", "imu", "text", "mixed"))


def config_of(data: str, tokenizer: str, folder: Path) -> RunConfig:
    """A run on two replicas, written to FOLDER/tiny.yaml."""
    config = make_config(data, tokenizer, folder / "run")
    config.data.seq_length, config.trainer.devices = 256, 2
    write(config, folder)
    return config


def write(config: RunConfig, folder: Path) -> None:
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"defaults": ["anymal", "_self_"], **config.to_dict()}))


def page_of(folder: Path, *arguments: str, code: int = 0) -> tuple[str, Page]:
    """The page that the command writes: its source, and what is on it."""
    file = folder / "page.html"
    assert main(["--config-name=tiny", f"--config-path={folder}", "--html", str(file), *arguments]) == code
    source = file.read_text(encoding="utf-8")
    return source, Page(source)


def as_loaded(config: RunConfig, step: int) -> dict[str, tuple[MicroBatch, int]]:
    """Sample name -> the micro-batch that the training's reader returns, and the sample's position in the batch."""
    data = replica_data(config, config.trainer.devices)
    samples = {}
    for replica in range(config.trainer.devices):
        for plan in data.planner.plan(step).of_replica(replica):
            micro_batch = data.reader[plan]
            for sample in plan.samples:
                samples[data.planner.key(sample.dataset, sample.sample)] = (micro_batch, sample.position)
    return samples


def shown(article: Article) -> list[list[tuple[str, int, bool]]]:
    """Per document: position, id and whether it is a target, for every token; soft tokens are written out."""
    documents = []
    for tokens in article.documents:
        flat = []
        for token in tokens:
            first, _, last = token.position.partition("\u2013")
            positions = range(int(first), int(last or first) + 1)
            flat += [(str(at), token.number, token.tag == "mark") for at in positions]
        documents.append(flat)
    return documents


def loaded(micro_batch: MicroBatch, position: int) -> list[list[tuple[str, int, bool]]]:
    """The same from the loader's tensors."""
    assert micro_batch.branch is not None
    documents = []
    for branch in range(2):
        own = (micro_batch.sample_positions[0] == position) & (micro_batch.branch[0] == branch)
        ids, mask = micro_batch.tokens[0, own].tolist(), micro_batch.loss_mask[0, own].tolist()
        # The mask at a position determines whether the prediction of the next token counts.
        targets = [False, *(value == 1 for value in mask)]
        documents.append([(str(at), number, targets[at]) for at, number in enumerate(ids)])
    return [document for document in documents if document]


def test_tokens_and_mask_are_those_of_the_loader(shards: str, tokenizer: str, tmp_path: Path) -> None:
    config = config_of(shards, tokenizer, tmp_path)
    _, page = page_of(tmp_path, "--samples=8", "--step=3")
    expected = as_loaded(config, 2)
    assert len(page.articles) == len(expected) == 8 and {a.name for a in page.articles} == expected.keys()
    targets = 0
    for article in page.articles:
        tokens = shown(article)
        assert tokens == loaded(*expected[article.name]), article.name
        targets += sum(is_target for document in tokens for _, _, is_target in document)
    hf = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    for token in (t for a in page.articles for d in a.documents for t in d if t.tag != "a"):
        assert token.shown == (hf.decode([token.number]).replace(" ", "·").replace("\n", "↵") or "∅")
    assert targets > 20


def test_both_documents_of_a_pair_are_shown(tokenizer: str, tmp_path: Path) -> None:
    data = make_conversations(tmp_path / "pairs", tokenizer, 8, pairs=True)
    config = config_of(data, tokenizer, tmp_path)
    _, page = page_of(tmp_path)
    # The page is of a job that takes every kind of sample, which packs whole documents.
    config.job, config.model.dpo.share_prompt = "dpo", "never"
    expected = as_loaded(config, 0)
    assert len(page.articles) == 8
    for article in page.articles:
        assert len(article.documents) == 2 and "chosen" in article.words and "rejected" in article.words
        assert shown(article) == loaded(*expected[article.name])


def test_a_shared_prompt_is_shown_once(tokenizer: str, tmp_path: Path) -> None:
    data = make_conversations(tmp_path / "pairs", tokenizer, 8, pairs=True)
    config = config_of(data, tokenizer, tmp_path)
    config.job, config.model.lora.r, config.model.restore_from_path = "dpo", 2, "unused"
    for modality in config.model.modalities.values():
        modality.encoder.freeze = modality.projector.freeze = True
    write(config, tmp_path)
    _, page = page_of(tmp_path)
    whole = copy.deepcopy(config)
    whole.model.dpo.share_prompt = "never"
    expected = as_loaded(whole, 0)
    assert len(page.articles) == 8
    for article in page.articles:
        prompt, *answers = shown(article)
        assert len(answers) == 2 and "prompt" in article.words and "rejected" in article.words
        assert [prompt + answer for answer in answers] == loaded(*expected[article.name])


def pixels_of(picture: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(picture)))


def test_images_are_shown_as_the_encoder_receives_them(shards: str, tokenizer: str, tmp_path: Path) -> None:
    config = config_of(shards, tokenizer, tmp_path)
    config.trainer.devices = 1
    write(config, tmp_path)
    _, page = page_of(tmp_path, "--step=2", "--samples=16", "model.global_batch_size=16")
    images = [article for article in page.articles if re.search("/(image|mixed)-", article.name)]
    assert len(images) >= 3
    for article in images:
        # The source has the encoder's 8 x 8 pixels, so normalising and back must return them.
        number = int(article.name.rpartition("-")[2])
        np.testing.assert_array_equal(pixels_of(article.pictures[0]), pixels_of(png(number)))


def test_tiles_stand_in_their_grid(tokenizer: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    parts = [{"media": "a.png", "modality": "image"}, {"text": "one"}]
    data = shards_of(tmp_path / "tiles", tokenizer, [{"key": "a", "parts": parts}], {"a.png": out.getvalue()})
    config_of(data, tokenizer, tmp_path)
    _, page = page_of(tmp_path)
    overview, *tiles = map(pixels_of, page.articles[0].pictures)
    assert overview.shape == (8, 8, 3) and len(tiles) == 9
    for number, tile in enumerate(tiles):
        row, column = divmod(number, 3)
        np.testing.assert_array_equal(tile, pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8])


def pieces_of(micro_batch: MicroBatch, position: int, modality: str) -> np.ndarray:
    """A sample's encoder inputs among those of its micro-batch."""
    counts = {s.position: sum(m.pieces for m in s.media if m.modality == modality) for s in micro_batch.plan.samples}
    ends = dict(zip(counts, np.cumsum(list(counts.values()))))
    return micro_batch.media[modality].pieces[ends[position] - counts[position] : ends[position]].numpy()


def test_motion_and_sound_are_shown_as_the_encoder_receives_them(shards: str, tokenizer: str, tmp_path: Path) -> None:
    config = config_of(shards, tokenizer, tmp_path)
    source, page = page_of(tmp_path, "--sample=imu-00002", "--sample=audio-00001")
    expected = {name: sample for step in range(6) for name, sample in as_loaded(config, step).items()}
    [signal] = pieces_of(*expected["mix/imu-00002"], "imu")
    curves = re.findall(r"<path class='line s\d' d='M([^']*)'><title>", source)
    assert len(curves) == len(signal) == 6
    for axis, path in enumerate(curves):
        # One plot for each sensor, on a scale of its own.
        sensor = signal[:3] if axis < 3 else signal[3:]
        heights = np.array([float(point.split()[1]) for point in path.split("L")])
        values = sensor.max() - heights / 100 * np.ptp(sensor)
        np.testing.assert_allclose(values, signal[axis], atol=1e-3 * np.ptp(sensor))
    [mel] = pieces_of(*expected["mix/audio-00001"], "audio")
    [picture] = next(article.pictures for article in page.articles if "audio" in article.name)
    # The loudest pixel is the lightest; low frequencies are at the bottom.
    light = pixels_of(picture).sum(axis=2)
    assert (
        light.shape == mel.T.shape and light.argmax() == mel.T[::-1].argmax() and light.argmin() == mel.T[::-1].argmin()
    )
    assert f"dark {mel.min():.0f} dB to light {mel.max():.0f} dB" in page.words


def shown_item(modality: Modality, pieces: np.ndarray, size: tuple[float, float], room: float = 1.0) -> Article:
    """A media item as it stands in an article."""
    media = ShownMedia(PlannedMedia("name", len(pieces)), None, size, 1000, pieces)
    item = media_item(media, LoadedModality(modality, 2, 7), 0, "sample", room)
    return Page(f"<article>{item}</article>").articles[0]


def test_frames_have_their_times() -> None:
    encoder = EncoderConfig(type="clip", config={"image_size": 8, "patch_size": 4})
    options = {"num_frames": 2, "clip_seconds": 1.0}
    video = build_modality("video", ModalityConfig(encoder=encoder, options=options))
    assert isinstance(video, VideoModality)
    frames = np.random.default_rng(3).integers(0, 255, (3, 2, 8, 8, 3), dtype=np.uint8)
    normalised = np.empty((3, 2, 3, 8, 8), np.float32)
    video.pixels.normalise(frames, normalised)
    article = shown_item(video, normalised, (3.0, 25.0))
    for picture, frame in zip(article.pictures, frames.reshape(6, 8, 8, 3), strict=True):
        np.testing.assert_array_equal(pixels_of(picture), frame)
    assert re.findall(r"\d\.\d\d s", article.words) == [f"{at:.2f} s" for at in (0.25, 0.75, 1.25, 1.75, 2.25, 2.75)]
    halved = shown_item(video, np.concatenate([normalised] * 5), (15.0, 25.0), room=0.5)
    assert len(halved.pictures) == 10 and "20 more pictures not shown" in halved.words


class Plugin(Modality):
    """A modality that the page does not know."""

    probe = count_pieces = decode = piece_shape = None  # type: ignore[assignment]

    def __init__(self) -> None: ...


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 8, 8), (2, 50), (1, 5, 4, 3, 2)])
def test_other_modalities_are_shown_as_numbers(shape: tuple[int, ...]) -> None:
    pieces = np.random.default_rng(4).normal(size=shape).astype(np.float32)
    Plugin.__abstractmethods__ = frozenset()
    article = shown_item(Plugin(), pieces, (8.0, 8.0))
    assert len(article.pictures) == (0 if len(shape) < 3 else len(pieces))
    assert f"numbers from {pieces.min():.3g} to {pieces.max():.3g}" in article.words and "size 8, 8" in article.words


@pytest.fixture
def hostile(tokenizer: str, tmp_path: Path) -> Path:
    """A run whose key, text, media name, attribute and folder contain HTML, and whose last shard is cut off."""
    media = {"a.png": png(1), "b.npy": npy(2), "c.flac": flac(3)}
    lines = [
        {"key": f"<img src=x onerror=alert({n})>'", "parts": [{"media": name, **more}, {"text": HOSTILE}]}
        for n, (name, more) in enumerate(
            {"a.png": {}, "b.npy": {"rate": 50, "note": "<i onclick='x'>\u202e"}, "c.flac": {}}.items()
        )
    ]
    lines += [{"key": f"plain-{n}", "parts": [{"text": "one two"}]} for n in range(5)]
    folder = shards_of(tmp_path / "<b>data", tokenizer, lines, media)
    config_of(folder, tokenizer, tmp_path)
    return tmp_path


def test_nothing_in_the_data_becomes_markup(hostile: Path) -> None:
    source, page = page_of(hostile, "--samples=16")
    assert len(page.articles) == 8
    tags = {tag for tag, _, _ in page.attributes} | set(re.findall(r"<([a-z0-9]+)", source))
    assert not tags & {"script", "b onclick", "iframe", "object", "embed", "link", "base", "form"}
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    # Characters that reverse the text around them are written out.
    assert "\u202e" not in source and "\\u202e" in page.words
    [evil] = [article for article in page.articles if "alert(1)" in article.name]
    assert evil.name == "mix/<img src=x onerror=alert(1)>'"
    assert any("note=<i onclick='x'>\\u202e" in article.words for article in page.articles)
    written = "".join(token.shown for token in evil.documents[0])
    assert "</sub></mark><script>alert(1)</script>&lt;" in written and "evil↵\"quoted\"·'x'" in written


def test_nothing_is_loaded_from_elsewhere(hostile: Path) -> None:
    source, page = page_of(hostile)
    for tag, name, value in page.attributes:
        if name in ("src", "srcset", "data", "action", "poster", "background"):
            assert tag == "img" and value.startswith("data:image/"), (tag, name, value)
        if name == "href":
            assert value.startswith("#"), value
    style = source.partition("<style>")[2].partition("</style>")[0]
    assert style == STYLE and not re.search(r"url\(|@import|//", style)
    targets = [value for _, name, value in page.attributes if name == "id"]
    assert len(targets) == len(set(targets))
    assert {value[1:] for _, name, value in page.attributes if name == "href"} <= set(targets)


def test_unreadable_samples_are_shown_with_the_reason(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_shards(tmp_path / "damaged", tokenizer, 8, ("image", "text"))
    index = ShardIndex(data)
    for number, name in ((0, "media"), (1, "text")):
        row = index.media_rows(number)[0] if name == "media" else index.samples[number]
        at = int(row["offset"] if name == "media" else row["text_offset"])
        with (Path(data) / index.header.shards[index.samples[number]["shard"]]).open("r+b") as file:
            file.seek(at + 4)
            file.write(b"\0\0\0\0")
    config_of(data, tokenizer, tmp_path)
    _, page = page_of(tmp_path, code=1)
    assert len(page.articles) == 8
    bad = {article.name: article for article in page.articles if article.looks == "bad"}
    assert bad.keys() == {"mix/image-00000", "mix/text-00001"}
    output = capsys.readouterr().out
    for name, article in bad.items():
        assert "differ from those indexed" in article.words and not article.documents and not article.pictures
        assert re.search(rf"^bad: {name}: .*differ from those indexed", output, re.M)
    assert "8 sample(s) in 2 pack(s)" in output


def test_a_missing_shard_makes_all_its_samples_bad(tokenizer: str, tmp_path: Path) -> None:
    data = make_shards(tmp_path / "lost", tokenizer, 8, ("image", "text"))
    (Path(data) / ShardIndex(data).header.shards[0]).unlink()
    config_of(data, tokenizer, tmp_path)
    _, page = page_of(tmp_path, code=1)
    assert len(page.articles) == 8 and all("cannot be read" in article.words for article in page.articles)


def test_what_was_left_out_is_named(tokenizer: str, tmp_path: Path) -> None:
    from megatron_anymal.data.index_builder import IndexOptions
    from megatron_anymal.data.index_folder import make_index

    data = Path(make_shards(tmp_path / "cut", tokenizer, 16, ("image",)))
    shard = sorted(data.glob("*.tar"))[-1]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size * 3 // 5])
    make_index(str(data), IndexOptions(tokenizer), max_bad_share=1.0)
    entries = [entry for entry in ShardIndex(str(data)).left_out() if not entry.is_note]
    assert entries
    config_of(str(data), tokenizer, tmp_path)
    _, page = page_of(tmp_path)
    assert all(f"mix: {entry}" in page.words for entry in entries[:3])
    assert f"{len(entries)}samples and members left out" in page.words


def test_numbers_are_those_of_the_plan(shards: str, tokenizer: str, tmp_path: Path) -> None:
    config = config_of(shards, tokenizer, tmp_path)
    longest = int(replica_data(config, 2).planner.plan(1).length.max())
    config.data.seq_length, config.data.too_long = longest - 1, "drop"
    write(config, tmp_path)
    source, page = page_of(tmp_path, "--step=2")
    planner = replica_data(config, 2).planner
    plan = planner.plan(1)
    cells = re.search(r"<section id=step>.*?<tbody>(.*?)</tbody>", source, re.S)
    assert cells
    rows = [re.findall(r"(?:<td class=n>)([^<]*)</td>", row) for row in cells[1].split("</tr>")[:-1]]
    samples = [pack.samples for replica in (0, 1) for pack in plan.of_replica(replica)]
    packs = [[sum(sample.length for sample in own), sum(sample.targets for sample in own)] for own in samples]
    assert sorted([int(row[2]), int(row[3])] for row in rows) == sorted(packs)
    assert {row[0] for row in rows} >= {f"{max(tokens for tokens, _ in packs) / plan.padded_length:.1%}"}
    assert plan.dropped
    for position in plan.dropped:
        assert planner.key(int(plan.dataset[position]), int(plan.sample[position])) in page.words
    # Every sample is in one bar of the histogram.
    [bars] = re.findall(r"length<br>.*?<div class=bars>(.*?)</div>", source)
    assert sum(int(n) for n in re.findall(r"LLM tokens: (\d+)'", bars)) == 40


@pytest.fixture
def staged(shards: str, tokenizer: str, tmp_path: Path) -> RunConfig:
    """A run with two stages, written to a file: four steps of the mix, then mostly text."""
    config = config_of(shards, tokenizer, tmp_path)
    config.trainer.max_steps = 30
    config.data.train["text"] = DatasetConfig(make_shards(tmp_path / "text", tokenizer, 24, ("text",)))
    config.data.schedule = [StageConfig("one", 4, {"mix": 1}), StageConfig("two", 26, {"mix": 1, "text": 3})]
    write(config, tmp_path)
    return config


@pytest.mark.parametrize(
    ("step", "caption", "share"),
    [(4, "first 4 steps of stage one", "0.0%"), (5, "first 20 steps of stage two", "75.0%")],
)
def test_the_mixture_is_that_of_the_steps_stage(
    staged: RunConfig, tmp_path: Path, step: int, caption: str, share: str
) -> None:
    source, _ = page_of(tmp_path, f"--step={step}")
    assert f"Shares of the datasets in the {caption}" in source
    assert "<li>stage 2 of 2, two: steps 5 to 30, mix 25.00%, text 75.00% of the samples</li>" in source
    row = re.search(r"Shares of the datasets.*?<tr><t[hd][^>]*>text</t[hd]>(.*?)</tr>", source, re.DOTALL)
    assert row and re.findall(r">([^<>]+%|\u2013)<", row[1])[0] == share


def test_a_sample_is_found_in_a_later_stage(staged: RunConfig, tmp_path: Path) -> None:
    planner = replica_data(staged, 2).planner
    plans = [planner.plan(step) for step in range(4, 12)]
    step, row = next((p.step, int(s)) for p in plans for d, s in zip(p.dataset, p.sample) if d == 1)
    source, _ = page_of(tmp_path, f"--sample={planner.key(1, row).partition('/')[2]}")
    assert f"<h2>Step {step + 1}</h2>" in source


def costs_of_the_run(config: RunConfig) -> dict[str, float]:
    """In a rank: the costs that training plans with."""
    state = build(config, initialize(config))
    agree_on_costs(state, config.run_dir, print)
    return state.train_data.planner.encoder_costs


def costs_of_the_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    views: list[RunView] = []
    original = inspection_page.write_page
    monkeypatch.setattr(
        inspection_page, "write_page", lambda file, view, chosen: (views.append(view), original(file, view, chosen))[1]
    )
    page_of(folder)
    return views[-1].planner.encoder_costs


def test_packs_are_balanced_by_the_runs_costs(
    shards: str, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(shards, tokenizer, tmp_path)
    config.model.modalities["image"].encoder.freeze = False
    config.model.language_model.config["vocab_size"] = 400
    write(config, tmp_path)
    [expected] = run_ranks(1, costs_of_the_run, _on_one(config))
    assert len(set(expected.values())) > 1
    assert costs_of_the_page(tmp_path, monkeypatch) == pytest.approx(expected)
    # Measured, before and after the run's first start.
    config.model.encoder_costs = "measured"
    write(config, tmp_path)
    assert costs_of_the_page(tmp_path, monkeypatch) == pytest.approx(expected)
    assert "the run has not measured its encoders yet" in capsys.readouterr().out
    kept = {name: 1.0 + number for number, name in enumerate(expected)}
    config.run_dir.mkdir(exist_ok=True)
    (config.run_dir / FILE).write_text(json.dumps({"seconds_per_piece": kept}))
    assert costs_of_the_page(tmp_path, monkeypatch) == kept
    config.model.encoder_costs = "configured"
    for number, modality in enumerate(config.model.modalities.values()):
        modality.cost_per_piece = 5.0 - number
    write(config, tmp_path)
    assert costs_of_the_page(tmp_path, monkeypatch) == {name: 5.0 - n for n, name in enumerate(expected)}


def _on_one(config: RunConfig) -> RunConfig:
    alone = copy.deepcopy(config)
    alone.trainer.devices = 1
    return alone


def test_limits_of_the_run_hold(shards: str, tokenizer: str, tmp_path: Path) -> None:
    config = config_of(shards, tokenizer, tmp_path)
    config.data.limits.max_member_bytes = 150
    write(config, tmp_path)
    _, page = page_of(tmp_path, "--samples=40", code=1)
    bad = {name for name, (batch, position) in as_loaded(config, 0).items() if position in batch.bad}
    assert bad and {article.name for article in page.articles if "max_member_bytes=150" in article.words} == bad


def test_sound_is_shown_in_decibels() -> None:
    options = {"piece_seconds": 1.0, "sampling_rate": 8000, "mel_mean": -20.0, "mel_std": 10.0, "n_mels": 16}
    audio = build_modality("audio", ModalityConfig(encoder=EncoderConfig(type="identity"), options=options))
    pieces = np.zeros((1, *audio.piece_shape), np.float32)
    pieces[0, 0, 0], pieces[0, 1, 1] = -3.0, 2.0
    assert "dark -50 dB to light 0 dB" in shown_item(audio, pieces, (1.0, 8000.0)).words


def test_a_chosen_sample_is_shown_in_its_pack(
    shards: str, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(shards, tokenizer, tmp_path)
    planner = replica_data(config, 2).planner
    # Used in the last step, which is therefore its first.
    last = planner.plan(4)
    name = planner.key(int(last.dataset[0]), int(last.sample[0]))
    _, page = page_of(tmp_path, "--sample", name.partition("/")[2])
    assert [article.name for article in page.articles] == [name] and "Step 5, pack" in page.words
    with pytest.raises(DataError, match=r"--sample: the run ends at trainer\.max_steps=1, before it uses"):
        page_of(tmp_path, "--sample", name.partition("/")[2], "trainer.max_steps=1")
    with pytest.raises(DataError, match="--sample 999"):
        page_of(tmp_path, "--sample", "999")


def test_what_a_page_needs(shards: str, tokenizer: str, tmp_path: Path) -> None:
    config_of(shards, tokenizer, tmp_path)
    with pytest.raises(DataError, match="--html shows the packs of a run: name it with --config-name"):
        main([shards, "--tokenizer", tokenizer, "--html", str(tmp_path / "page.html")])
    with pytest.raises(DataError, match="--step=7 between 1 and 6, the last step"):
        page_of(tmp_path, "--step=7")
    with pytest.raises(DataError, match="is not a file in a folder that exists"):
        main(["--config-name=tiny", f"--config-path={tmp_path}", "--html", str(tmp_path / "none" / "page.html")])
    for option in ("--samples=3", "--step=1"):
        with pytest.raises(DataError, match="--samples and --step choose what --html shows"):
            main(["--config-name=tiny", f"--config-path={tmp_path}", option])
    with pytest.raises(DataError, match="--samples=0 must be at least 1"):
        page_of(tmp_path, "--samples=0")


def test_a_page_of_sixteen_large_samples_is_small(tokenizer: str, tmp_path: Path) -> None:
    media, lines = {}, []
    for number in range(16):
        # Noise, which no codec can compress; four tiles a side, and more tokens than are shown.
        media[f"{number}.png"] = png(number, (400, 400))
        lines.append({"key": f"n{number}", "parts": [{"media": f"{number}.png"}, {"text": "walk! " * 300}]})
    config = config_of(shards_of(tmp_path / "large", tokenizer, lines, media), tokenizer, tmp_path)
    config.model.modalities["image"].encoder.config.update(image_size=100, patch_size=10)
    config.data.seq_length, config.model.global_batch_size = 2048, 16
    write(config, tmp_path)
    source, page = page_of(tmp_path, "--samples=16")
    assert len(page.articles) == 16 and len(page.articles[0].pictures) == 17
    assert 1_000_000 < len(source.encode()) <= 3_000_000
    for article in page.articles:
        [tokens] = article.documents
        [gap] = [token for token in tokens if "not shown" in token.shown]
        hidden = int(gap.shown.split()[0].replace(",", ""))
        ids = [int(token.position.partition("\u2013")[0]) for token in tokens if token is not gap]
        assert len(tokens) == 401 and ids == sorted(ids)
        assert max(ids) + 1 == hidden + sum(1 for token in tokens if token is not gap) - 1 + 17 * 2


def test_texts_are_escaped() -> None:
    assert text("<b a='\"'>\u202e\x00") == "&lt;b a=&#x27;&quot;&#x27;&gt;\\u202e\\x00"
    assert html.unescape(text("naïve 数 \n")) == "naïve 数 \n"
    assert token_text(" \n\t\u2028<") == "·↵⇥\\u2028&lt;" and token_text("") == "∅"


def luminance(colour: str) -> float:
    """WCAG's relative luminance of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    channels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_read(theme: int) -> None:
    colours = dict(re.findall(r"--([\w-]+):(#[0-9a-f]+)", re.findall(r":root\{.*?\}", STYLE, re.S)[theme]))
    pairs = [("text", "ground"), ("quiet", "ground"), ("quiet", "panel"), ("link", "ground"), ("text", "target")]
    pairs += [("quiet", "target"), ("text", "soft"), ("quiet", "soft"), ("bad", "bad-ground"), ("ground", "c0")]
    for front, back in pairs:
        light, dark = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)


def in_browser(source: str, width: int, folder: Path, browser: str) -> dict[str, float]:
    """Measure a page in a frame of a width, without a network."""
    script = """<script>onload=()=>{const d=document.querySelector('iframe').contentDocument,e=d.documentElement;
    const all=[...d.querySelectorAll('a,input,summary,[tabindex]')].filter(x=>x.checkVisibility());
    const wide=[...d.querySelectorAll('article,h2,h3,p,figure,.strip,.tokens>*')];
    document.body.append(Object.assign(document.createElement('pre'),{textContent:JSON.stringify({
    scroll:e.scrollWidth,width:e.clientWidth,articles:d.querySelectorAll('article').length,
    focused:all.filter(x=>(x.focus(),d.activeElement===x)).length,focusable:all.length,
    broken:[...d.images].filter(i=>!i.complete||!i.naturalWidth).length,images:d.images.length,
    outside:wide.filter(x=>x.getBoundingClientRect().right>e.clientWidth+1).length})}))}</script>"""
    frame = (
        f"<iframe style='border:0;width:{width}px;height:900px' srcdoc='{html.escape(source, quote=True)}'></iframe>"
    )
    (folder / "frame.html").write_text(f"<!doctype html><meta charset=utf-8>{script}<body>{frame}", encoding="utf-8")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1400,1000", "--dump-dom"]
    done = subprocess.run([*command, f"file://{folder / 'frame.html'}"], capture_output=True, text=True, timeout=240)
    [measured] = re.findall(r"<pre>(\{.*?\})</pre>", done.stdout) or [done.stderr]
    return json.loads(html.unescape(measured))


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(hostile: Path, width: int) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser on PATH: none of {', '.join(BROWSERS)}")
    source, page = page_of(hostile)
    seen = in_browser(source, width, hostile, browser)
    assert seen["articles"] == len(page.articles) == 8 and seen["images"] >= 2 and seen["broken"] == 0
    # Only tables scroll sideways, by themselves.
    assert seen["scroll"] == seen["width"] <= width and seen["outside"] == 0
    assert seen["focused"] == seen["focusable"] > 10
