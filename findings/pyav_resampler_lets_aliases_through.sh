#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg's resampler with its default filter): 48 kHz audio resampled to 16 kHz for a speech encoder.
#
# Guess: AudioResampler removes frequencies above half the new rate and keeps those below, as resamplers for training data
# do, down to the noise of 16-bit audio (-96 dB).
# Behaviour: the default filter is short. Tones up to an eighth above the limit reappear below it, as aliases at frequencies
# that the recording does not have, and the top tenth of the band is attenuated. PyAV added options for FFmpeg's filter
# after the same complaint, https://github.com/PyAV-Org/PyAV/pull/2296; the default is unchanged.
#
# Output seen: alias of 8200 Hz at 7800 Hz: PyAV -15 dB, soxr -131 dB; alias of 8600 Hz at 7400 Hz: PyAV -31 dB,
# soxr -142 dB; level of 7200 Hz: PyAV -1.0 dB, soxr -0.0 dB
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 soxr==1.1.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import av
import numpy as np
import soxr

FROM, TO, SECONDS = 48000, 16000, 4


def by_pyav(wave):
    frame = av.AudioFrame.from_ndarray(wave[None], format="flt", layout="mono")
    frame.sample_rate = FROM
    resampler = av.AudioResampler(format="flt", layout="mono", rate=TO)
    frames = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([part.to_ndarray()[0] for part in frames])


def by_soxr(wave):
    return soxr.resample(wave, FROM, TO, quality="HQ")


def level(resample, tone, at):
    """Level at `at` Hz, in dB, after resampling a tone of 0 dB."""
    wave = np.sin(2 * np.pi * tone * np.arange(FROM * SECONDS) / FROM).astype(np.float32)
    middle = resample(wave).astype(np.float64)[TO : TO * (SECONDS - 1)]
    window = np.blackman(len(middle))
    part = abs(np.sum(middle * window * np.exp(-2j * np.pi * at * np.arange(len(middle)) / TO)))
    return 20 * np.log10(2 * part / window.sum() + 1e-12)


found = {}
for tone, at in ((8200, 7800), (8600, 7400), (7200, 7200)):
    for name, resample in (("PyAV", by_pyav), ("soxr", by_soxr)):
        found[name, tone] = level(resample, tone, at)
shown = [
    f"{what}: PyAV {found['PyAV', tone]:.{digits}f} dB, soxr {found['soxr', tone]:.{digits}f} dB"
    for tone, what, digits in (
        (8200, "alias of 8200 Hz at 7800 Hz", 0),
        (8600, "alias of 8600 Hz at 7400 Hz", 0),
        (7200, "level of 7200 Hz", 1),
    )
]
print("; ".join(shown))
assert found["PyAV", 8600] > -50 and found["soxr", 8600] < -90, "the behaviour has changed"
PY
