"""The quickstart's inputs: media, corpus, tokenizer, image encoder and shards, all under one folder."""

from __future__ import annotations

from pathlib import Path

from megatron_anymal.data.indexing import IndexOptions
from megatron_anymal.data.prepare import make_index, write_shards
from megatron_anymal.quickstart.corpus import train_tokenizer, write_corpus
from megatron_anymal.quickstart.media import SPLITS, Sizes, write_media
from megatron_anymal.quickstart.vision import train_image_encoder

MODALITIES = ("image", "video", "audio", "imu")


def prepare_quickstart(folder: Path, sizes: Sizes | None = None, encoder_steps: int = 500) -> None:
    """Make everything the quickstart's configurations name, unless it is there already.

    FOLDER/media          files and manifests
    FOLDER/tokenizer      a small byte-pair tokenizer, trained on the corpus
    FOLDER/image_encoder  a small CLIP vision tower, trained contrastively on the training images
    FOLDER/data/NAME      shards with an index: text, and each modality's train and held_out
    """
    finished = folder / "prepared"
    if finished.is_file():
        print(f"{folder} is prepared already; delete it to start over")
        return
    manifests = write_media(folder / "media", sizes=sizes)
    corpus = write_corpus(folder / "media" / "text.jsonl")
    tokenizer = str(folder / "tokenizer")
    train_tokenizer(corpus, tokenizer)
    train_image_encoder(manifests["image"]["train"], tokenizer, folder / "image_encoder", encoder_steps)
    sources = {"text": corpus}
    sources.update({f"{name}_{split}": manifests[name][split] for name in MODALITIES for split in SPLITS})
    for name, manifest in sources.items():
        out = str(folder / "data" / name)
        write_shards(str(manifest), out, overwrite=True)
        make_index(out, IndexOptions(tokenizer))
    finished.touch()
