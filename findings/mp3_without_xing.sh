#!/usr/bin/env bash
# soundfile 0.14.0 (libsndfile) on an MP3 with a variable bit rate and no Xing header.
#
# Guess: SoundFile.frames is the number of samples that the file holds, and read() returns all of them. A Xing header is
# optional in MPEG audio; streams and joined files have none.
# Behaviour: frames is an estimate from the size of the first frames, read() stops there, and no error is raised. Two
# seconds of noise and six of silence are read as less than two seconds; FFmpeg (PyAV) decodes all eight.
#
# Output seen: libsndfile 1.44 s, PyAV 8.05 s
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet soundfile==0.14.0 av==18.1.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import io

import av
import numpy as np
import soundfile

RATE = 44100
noise = np.random.default_rng(0).uniform(-0.9, 0.9, 2 * RATE)
wave = np.concatenate([noise, np.zeros(6 * RATE)]).astype(np.float32)
out = io.BytesIO()
soundfile.write(out, wave, RATE, format="MP3", bitrate_mode="VARIABLE", compression_level=0.3)
data = out.getvalue()

# The first frame of an MPEG 1 layer 3 file from this encoder holds the Xing header; the sound begins after it.
start = data.index(b"\xff\xfb")
kbps = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)[data[start + 2] >> 4]
first = 144_000 * kbps // RATE + (data[start + 2] >> 1 & 1)
assert b"Xing" in data[start : start + first] or b"Info" in data[start : start + first]
bare = data[start + first :]

with soundfile.SoundFile(io.BytesIO(bare)) as file:
    heard = len(file.read()) / RATE
with av.open(io.BytesIO(bare), format="mp3") as container:
    whole = sum(frame.samples for frame in container.decode(audio=0)) / RATE
print(f"libsndfile {heard:.2f} s, PyAV {whole:.2f} s")
assert heard < 3 and whole > 7.9, "the behaviour has changed"
PY
