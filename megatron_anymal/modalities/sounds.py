"""Audio files as blocks of samples, read with libsndfile or PyAV in memory that does not grow with the recording."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_anymal.config import LimitsConfig
from megatron_anymal.modalities.base import MediaError, require_within
from megatron_anymal.modalities.containers import opened_container, require_duration, stream_seconds
from megatron_anymal.modalities.libraries import library
from megatron_anymal.modalities.sound_headers import (
    behind_id3,
    flac_states_length,
    is_wav_or_aiff,
    mp3_states_length,
    ogg_links,
    require_whole,
)

# Formats that are read with libsndfile. It supports others, for which the stated length has not been verified.
FORMATS = ("WAV", "WAVEX", "RF64", "AIFF", "FLAC", "OGG", "MP3")
# Values (samples x channels) per block; for four times as many, the memory is new each time and costs a fifth more.
BLOCK = 2**16
# Recordings have at most a few megahertz. For much higher rates, a resampler computes filters for seconds.
HIGHEST_RATE = 16_000_000


@dataclass
class Sound:
    """An open audio file.

    Attributes:
        rate: sampling rate in Hz.
        channels: maximum number of channels.
        stated: samples per channel as stated in the header; None if unknown or only an estimate.
        blocks: [samples, channels] float32 in -1 to 1; can be iterated once.
    """

    rate: int
    channels: int
    stated: int | None
    blocks: Iterator[np.ndarray]

    def count(self, limits: LimitsConfig) -> int:
        """Number of samples per channel; decodes the file if the header does not state it.

        Raises:
            MediaError: there are no samples, or more than the limits allow.
        """
        total = self.stated or 0
        self._require_within(limits, total)
        if self.stated is None:
            for block in self.blocks:
                total += len(block)
                self._require_within(limits, total)
        if total < 1:
            raise MediaError("contains no audio (0 samples)")
        return total

    def _require_within(self, limits: LimitsConfig, samples: int) -> None:
        require_duration(limits, samples / self.rate)
        values = samples * self.channels
        what = f"has {values} samples ({samples} x {self.channels} channels) or more"
        require_within(limits, "max_values", values, what, "cut it")

    def mono(self, wanted: int) -> Iterator[np.ndarray]:
        """The mean of the channels, in blocks of [samples] float32; at most `wanted` samples.

        Raises:
            MediaError: there are fewer samples than the header states, or non-finite values.
        """
        expected = wanted if self.stated is None else min(wanted, self.stated)
        done = 0
        for block in self.blocks:
            block = block[: expected - done]
            finite = np.isfinite(block).all(axis=1)
            if not finite.all():
                raise MediaError(f"sample {done + int(np.flatnonzero(~finite)[0])} is not finite")
            done += len(block)
            yield block.mean(axis=1) if block.shape[1] > 1 else block[:, 0]
            if done >= expected:
                return
        if self.stated is not None:
            raise MediaError(f"ends after {done} of {expected} samples: it is cut off")


@contextmanager
def opened(data: bytes, limits: LimitsConfig) -> Iterator[Sound]:
    """Open the audio file in `data`; the format is detected from its content.

    Raises:
        MediaError: the data is not a readable audio file. Decoding errors in the body of the `with` statement are
            converted as well.
    """
    if not data:
        raise MediaError("is empty (0 bytes)")
    first = behind_id3(data)
    if is_wav_or_aiff(data):
        require_whole(data)
        reader = _with_libsndfile([data])
    elif data[:4] == b"OggS":
        reader = _with_libsndfile(ogg_links(data))
    elif flac_states_length(data[first:]) or mp3_states_length(data[first:]):
        reader = _with_libsndfile([data])
    else:
        reader = _with_pyav(data, limits)
    with reader as sound:
        yield sound


class _SoundBytes(io.BytesIO):
    """An in-memory file. In damaged files, libsndfile seeks to negative offsets and expects -1 in return."""

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        try:
            return super().seek(offset, whence)
        # An exception in libsndfile's callback would be printed instead of propagated.
        except ValueError:
            return -1


@contextmanager
def _with_libsndfile(links: list[bytes]) -> Iterator[Sound]:
    soundfile = library("soundfile")
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(soundfile.SoundFile(_SoundBytes(link))) for link in links]
            for file in files:
                if file.format not in FORMATS:
                    raise MediaError(f"is {file.format} audio, which is not supported: convert it to WAV or FLAC")
                if file.samplerate < 1:
                    raise MediaError("states a sampling rate of 0 Hz")
            rates = sorted({file.samplerate for file in files})
            if len(rates) > 1:
                raise MediaError(f"has several sampling rates ({rates} Hz): convert it to a single rate")
            stated = sum(file.frames for file in files)
            yield Sound(rates[0], max(file.channels for file in files), stated, _libsndfile_blocks(files))
    except (soundfile.SoundFileError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        # The full message contains the repr of the in-memory file; `error_string` is only the reason.
        why = getattr(error, "error_string", None) or str(error)
        raise MediaError(f"cannot be decoded as audio: it is damaged or has another format ({why})") from error


def _libsndfile_blocks(files: Iterable[Any]) -> Iterator[np.ndarray]:
    for file in files:
        while True:
            # A new array each time, because the consumer may keep it.
            out = np.empty((max(1, BLOCK // file.channels), file.channels), dtype=np.float32)
            block = file.read(out=out)
            if len(block):
                yield block
            if len(block) < len(out):
                break


@contextmanager
def _with_pyav(data: bytes, limits: LimitsConfig) -> Iterator[Sound]:
    with opened_container(data, "audio", limits) as (container, stream):
        stream_seconds(container, stream, limits)
    with opened_container(data, "audio", limits) as (container, stream):
        frames = container.decode(stream)
        # The rate must come from a decoded frame: the header of HE-AAC states half of it.
        first = next(frames, None)
        if first is None or first.sample_rate < 1:
            raise MediaError("contains no audio (0 samples)")
        yield Sound(first.sample_rate, first.layout.nb_channels, None, _pyav_blocks(first, frames))


def _pyav_blocks(first: Any, others: Iterator[Any]) -> Iterator[np.ndarray]:
    resampler = library("av").AudioResampler(format="fltp", layout=first.layout, rate=first.sample_rate)
    frame, seconds = first, 0.0
    while frame is not None:
        if frame.is_corrupt:
            raise MediaError(f"is damaged at {seconds:.2f} s")
        if frame.sample_rate != first.sample_rate:
            raise MediaError(f"changes its sampling rate at {seconds:.2f} s: convert it to a single rate")
        seconds += frame.samples / frame.sample_rate
        for out in resampler.resample(frame):
            yield out.to_ndarray().T
        frame = next(others, None)


def resample(blocks: Iterable[np.ndarray], rate: int, target: int) -> np.ndarray:
    """Resample a mono waveform, given as blocks of [samples] float32, to another rate in Hz.

    Uses soxr's "HQ" filter, whose delay is removed. For noise below 0.9 of the lower Nyquist frequency its error is
    under -70 dB; what would alias is attenuated by more than 125 dB. The result does not depend on the block size.

    Raises:
        MediaError: the rate is impossible.
    """
    if rate > HIGHEST_RATE:
        raise MediaError(f"states a sampling rate of {rate} Hz, above {HIGHEST_RATE}: its header is wrong")
    if rate == target:
        return np.concatenate([np.zeros(0, dtype=np.float32), *blocks])
    stream = library("soxr").ResampleStream(rate, target, 1, dtype="float32", quality="HQ")
    count, chunks = 0, []
    for block in blocks:
        count += len(block)
        chunks.append(stream.resample_chunk(np.ascontiguousarray(block)))
    chunks.append(stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
    return to_length(np.concatenate(chunks), round(count * target / rate))


def to_length(wave: np.ndarray, samples: int) -> np.ndarray:
    """Cut [n] to a length, or append zeros: [samples]."""
    return wave[:samples] if len(wave) >= samples else np.pad(wave, (0, samples - len(wave)))
