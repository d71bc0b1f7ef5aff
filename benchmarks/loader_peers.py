"""How other loaders read the shards of benchmarks/loader.py: with the transforms that their users write.

Run as a script, this serves one peer in its own Python environment: each input line starts a round.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
# A sample's media file to encoder input.
Transform = Callable[[bytes], Tensor]


def picture(image: Any, side: int) -> Tensor:
    """Resize with Pillow and normalise as torchvision's ToTensor and Normalize do, [3, side, side]."""
    from PIL import Image

    resized = image.resize((side, side), Image.Resampling.BICUBIC)
    scaled = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous().float().div(255)
    return scaled.sub_(MEAN).div_(STD)


def image_transform(side: int) -> Transform:
    """A JPEG to [3, side, side]."""
    from PIL import Image

    return lambda data: picture(Image.open(io.BytesIO(data)).convert("RGB"), side)


def audio_transform(rate: int) -> Transform:
    """A recording to CLAP's features, [1, frames, mels], with transformers' extractor and soxr, librosa's resampler."""
    import soundfile
    import soxr
    from transformers import ClapFeatureExtractor

    extractor = ClapFeatureExtractor(truncation="rand_trunc", padding="pad", frequency_min=50, frequency_max=14000)

    def transform(data: bytes) -> Tensor:
        wave, given = soundfile.read(io.BytesIO(data), dtype="float32")
        wave = soxr.resample(wave if wave.ndim == 1 else wave.mean(axis=1), given, rate)
        return extractor(wave, sampling_rate=rate, return_tensors="pt")["input_features"][0].float()

    return transform


def video_transform(side: int, times: list[float]) -> Transform:
    """A video to the frames at some times, [frames, 3, side, side], decoded from its start to the last of them."""
    import av

    def transform(data: bytes) -> Tensor:
        pictures, shown, order = [], None, iter(sorted(times))
        wanted = next(order, None)
        with av.open(io.BytesIO(data)) as container:
            container.streams.video[0].thread_count = 1
            for frame in container.decode(video=0):
                while shown is not None and wanted is not None and frame.time > wanted:
                    pictures.append(picture(shown.to_image(), side))
                    wanted = next(order, None)
                if wanted is None:
                    break
                shown = frame
        while wanted is not None:
            pictures.append(picture(shown.to_image(), side))
            wanted = next(order, None)
        return torch.stack(pictures)

    return transform


def transform_of(modality: str, settings: dict[str, Any]) -> Transform:
    """The transform of a modality."""
    made = {"image": image_transform, "audio": audio_transform, "video": video_transform}
    return made[modality](**settings)


def with_webdataset(folder: Path, ending: str, batch: int, transform: Transform, tokenize: Any) -> Iterator[Any]:
    """Batches of encoder inputs and token IDs."""
    import webdataset

    def collate(samples: list[tuple[Tensor, list[int]]]) -> tuple[Tensor, list[list[int]]]:
        return torch.stack([media for media, _ in samples]), [tokens for _, tokens in samples]

    data = webdataset.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False)
    read = data.shuffle(100).to_tuple(ending, "txt").map_tuple(transform, lambda text: tokenize(text.decode()))
    yield from read.batched(batch, collation_fn=collate)


def with_energon(folder: Path, ending: str, batch: int, transform: Transform, tokenize: Any) -> Iterator[Any]:
    """The same with megatron-energon."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        Sample,
        WorkerConfig,
        basic_sample_keys,
        edataclass,
        get_loader,
        get_val_dataset,
        stateless,
    )

    @edataclass
    class Loaded(Sample):
        media: Tensor
        tokens: list[int]

    @stateless
    def cook(sample: Any) -> Any:
        text = sample["txt"] if isinstance(sample["txt"], str) else sample["txt"].decode()
        return Loaded(**basic_sample_keys(sample), media=transform(sample[ending]), tokens=tokenize(text))

    class LoaderTask(DefaultTaskEncoder):
        cookers: ClassVar = [Cooker(cook)]
        # Files as bytes.
        decoder = None

        def batch(self, samples: Any) -> Any:
            return torch.stack([sample.media for sample in samples]), [sample.tokens for sample in samples]

        def encode_batch(self, batch: Any) -> Any:
            return batch

    configuration = WorkerConfig(rank=0, world_size=1, num_workers=0)
    data = get_val_dataset(
        folder, split_part="train", worker_config=configuration, batch_size=batch, task_encoder=LoaderTask()
    )
    yield from get_loader(data)


def prepare_energon(folder: Path) -> None:
    """Write the description of a folder that energon reads."""
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    names = [path.name for path in sorted(folder.glob("*.tar"))]
    WebdatasetPreparator.prepare_dataset(folder, names, split_parts_ratio=[("train", 1.0)], workers=1)
    description = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    (folder / ".nv-meta" / "dataset.yaml").write_text(description)


def counted(batches: Iterator[Any]) -> int:
    """Read all batches; return the number of samples."""
    return sum(len(media) for media, _ in batches)


def serve(folder: Path, modality: str, ending: str, batch: int, settings: dict[str, Any], tokenizer: str) -> None:
    """Answer each line of the input with the CPU seconds and samples of one pass with energon."""
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    prepare_energon(folder)
    tokenize = partial(AutoTokenizer.from_pretrained(tokenizer).encode, add_special_tokens=False)
    transform = transform_of(modality, settings)
    print(json.dumps(importlib.metadata.version("megatron-energon")), flush=True)
    for _ in sys.stdin:
        begun = time.process_time()
        count = counted(with_energon(folder, ending, batch, transform, tokenize))
        print(json.dumps([time.process_time() - begun, count]), flush=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    serve(Path(given.pop("folder")), **given)
