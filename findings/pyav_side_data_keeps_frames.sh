#!/usr/bin/env bash
# PyAV 18.1.0: reading frame.side_data keeps the decoded frame in memory.
#
# Guess: VideoFrame.side_data only reads the frame's metadata (display matrix, closed captions); the frame is then freed
# with its last reference, like any other.
# Behaviour: the frame references the container of its side data, which references the frame, so the frame lives until
# Python's cyclic garbage collector runs. The collector counts objects, not bytes: a loop over a 1080p video that reads each
# frame's matrix keeps all of the video's frames (3 MB each). Without this access, or with SideDataContainer(frame), none
# are kept.
#
# Output seen: 60 frames of 1920 x 1080 decoded one by one: 170 MB more with side_data, 0 MB without
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import av
import numpy as np

path = f"{sys.argv[1]}/plain.mp4"
with av.open(path, "w") as output:
    track = output.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
    track.width, track.height, track.pix_fmt = 1920, 1080, "yuv420p"
    for number in range(60):
        grey = np.full((1080, 1920), number, dtype=np.uint8)
        output.mux(track.encode(av.VideoFrame.from_ndarray(grey, format="gray")))
    output.mux(track.encode(None))


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


def growth(look):
    """MB that decoding adds after the first frames, once the decoder has allocated its buffers."""
    start = 0.0
    with av.open(path) as container:
        container.streams.video[0].thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            if look:
                assert frame.side_data.get("DISPLAYMATRIX") is None
            if number == 5:
                start = resident()
            last = resident()
    return last - start


without, with_look = growth(False), growth(True)
print(f"60 frames of 1920 x 1080 decoded one by one: {with_look:.0f} MB more with side_data, {without:.0f} MB without")
assert with_look > 100 and without < 30, "the behaviour has changed"
PY
