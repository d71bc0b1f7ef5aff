"""The section `data:` of a configuration: datasets, packing, loading and object storage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from megatron_anymal.config.field_docs import add_field_docs

# Seconds between the first two attempts of a request to an object store, and the longest pause.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0


def is_remote(path: str) -> bool:
    """Whether a folder is on object storage: an address such as s3://bucket/folder."""
    return "://" in path and not path.startswith("file://")


def shows_credentials(address: str) -> bool:
    """Whether the address of a folder contains a password or a signature, which logs would show."""
    parts = urlsplit(address)
    return is_remote(address) and ("@" in parts.netloc or bool(parts.query))


@dataclass
class DatasetConfig:
    """One folder of shards with its index, made by `anymal prepare`."""

    path: str = ""
    """The folder."""
    weight: float = 1.0
    """Sampling weight relative to the other datasets of the mixture. With `data.schedule`: relative to the other
    datasets of its type."""
    type: str = ""
    """A name, such as image_text, by which stages of `data.schedule` can give a weight to several datasets at once."""


@dataclass
class StageConfig:
    """A stage of a run: how long it lasts and how it mixes the datasets."""

    name: str = ""
    """Name for logs. Empty: its number, from 1."""
    steps: int = 0
    """Optimizer steps. 0, in the last stage only: up to trainer.max_steps."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each dataset or type of datasets in `data.train`. A dataset that is missing here, or has weight 0, is
    left out of the stage."""
    by: str = "sample"
    """Weights are shares of samples (`sample`) or of LLM tokens (`token`), soft tokens and codes included."""

    def weights_of(self, datasets: Mapping[str, DatasetConfig]) -> dict[str, float]:
        """Weight of every dataset of `data.train`; a type's weight is divided by its datasets' own weights."""
        weights = dict.fromkeys(datasets, 0.0)
        for key, weight in self.weights.items():
            own = {name: dataset.weight for name, dataset in datasets.items() if dataset.type == key} or {key: 1.0}
            for name, share in own.items():
                weights[name] += weight * share / sum(own.values())
        return weights


@dataclass
class LimitsConfig:
    """Largest accepted inputs. Anything larger is left out of an index, or skipped in training, and reported by name.

    With the defaults, the worst accepted sample adds at most 512 MiB to a loader process.
    """

    max_load_bytes: int = 512 * 2**20
    """Size of a media file plus an estimate of what decoding it takes, in bytes: pixels x bytes per pixel of a
    picture's format; for a video, the frames that its codec and level let a decoder hold."""
    max_pixels: int = 30_000_000
    """Width x height of a picture."""
    max_frame_pixels: int = 8_900_000
    """Width x height of a video's frames; the default admits 4096 x 2160."""
    max_seconds: float = 14_400.0
    """Length of a video, a recording or an IMU signal: 4 hours. They are read block by block, so this bounds time."""
    max_values: int = 1_500_000_000
    """Numbers in an IMU file (rows x columns), or samples of a recording (frames x channels): 4 hours of 48 kHz
    stereo."""
    max_member_bytes: int = 256 * 2**20
    """Size of one member of a shard, or of one media file of a manifest, in bytes."""
    max_text_bytes: int = 2**20
    """Size of a sample's .txt or .json, or of one line of a manifest, in bytes."""
    max_json_depth: int = 32
    """Nesting depth of a sample's .json."""


DEFAULT_LIMITS = LimitsConfig()


@dataclass
class StorageConfig:
    """Reading of datasets on object storage: folders given by an address such as `s3://bucket/folder`."""

    attempts: int = 6
    """Attempts to read the same bytes before the run stops. The pauses between them double from 0.5 s to 30 s, with
    jitter."""
    timeout_seconds: float = 30.0
    """Longest time for one request of at most 8 MiB, in seconds."""
    connections: int = 8
    """Simultaneous requests of a process to one dataset."""
    read_ahead: int = 2
    """Micro-batches that a loader process requests before it needs them. 0: none."""
    gap_kib: int = 256
    """Members of a shard that are at most this far apart are read in one request, in KiB."""
    cache_folder: str = ""
    """Folder on a local disk for copies of indexes and for cached blocks; all processes of a node share it. Empty:
    anymal-cache-UID in the system's folder for temporary files."""
    cache_gib: float = 0.0
    """Largest size of the cached blocks of shards, in GiB (2**30 bytes); the least recently used ones are removed. 0:
    no blocks are cached, only indexes are copied."""
    cache_block_kib: int = 1024
    """Size of a cached block, in KiB: the cache reads whole aligned blocks."""

    def pause(self, failures: int) -> float:
        """Longest pause, in seconds, after a number of failed attempts."""
        return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (failures - 1))

    @property
    def longest_wait(self) -> float:
        """Seconds until a store that does not answer at all ends a run."""
        return self.attempts * self.timeout_seconds + sum(self.pause(n) for n in range(1, self.attempts))


@dataclass
class FeatureCacheConfig:
    """Cache of frozen encoders' features on a local disk: media in it are neither decoded nor encoded again."""

    gib: float = 0.0
    """Largest size of the features, in GiB (2**30 bytes); the least recently used ones are removed. 0: no cache."""
    folder: str = ""
    """Folder on a local disk, shared by all processes of a node and by all runs that name it. Empty:
    anymal-features-UID in the system's folder for temporary files."""
    modalities: list[str] = field(default_factory=list)
    """Modalities whose features are cached; their encoders must be frozen. Empty: all modalities."""

    def names(self, known: Iterable[str]) -> list[str]:
        """Cached modalities among all those of the model; none without a cache."""
        return [name for name in known if self.gib > 0 and (not self.modalities or name in self.modalities)]


@dataclass
class DataConfig:
    """Datasets, tokenizer, packing and loading."""

    train: dict[str, DatasetConfig] = field(default_factory=dict)
    """Training datasets by name; a weighted mixture."""
    validation: dict[str, DatasetConfig] = field(default_factory=dict)
    """Validation datasets by name."""
    schedule: list[StageConfig] = field(default_factory=list)
    """Stages of the run, each with its own mixture of the training datasets. Empty: their own weights throughout."""
    tokenizer: str = ""
    """Local folder of a HuggingFace tokenizer; the one that the indexes were made with."""
    seq_length: int = 4096
    """Longest document and longest pack, in tokens."""
    too_long: str = "refuse"
    """Samples longer than seq_length: `refuse` stops before training; `drop` leaves them out and counts them."""
    max_bad_share: float = 0.01
    """Fraction of a step's samples that may be unreadable (skipped, counted and named) before the run stops."""
    num_workers: int = 2
    """Loader processes per training process. 0 loads in the training process."""
    prefetch_steps: int = 2
    """Steps that the loader may run ahead."""
    worker_memory_limit_gib: float = 0.0
    """GiB by which a loader process may grow. If one grows by more, the loader processes of its rank are restarted
    between two steps, without a change in the data. 0: no limit."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Largest accepted inputs."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Reading of datasets on object storage."""
    feature_cache: FeatureCacheConfig = field(default_factory=FeatureCacheConfig)
    """Cache of frozen encoders' features."""

    @property
    def remote_paths(self) -> list[str]:
        """Folders of the datasets that are on object storage."""
        datasets = (*self.train.values(), *self.validation.values())
        return [dataset.path for dataset in datasets if is_remote(dataset.path)]


add_field_docs(__name__)
