#!/usr/bin/env bash
# bitsandbytes 0.50.2 beside kernels 0.17.2, on a CPU with AVX-512 BF16 (avx512_bf16 in /proc/cpuinfo).
#
# Guess: importing bitsandbytes reads files of the installed package only.
# Behaviour: the import asks the HuggingFace Hub about a kernel (kernels-community/quantization-bitsandbytes) that fuses
# dequantization and product, whether it will be used or not. Without the package kernels, or without a network, it logs a
# warning and goes on; with HF_HUB_OFFLINE=1 it asks nobody. On other CPUs nothing is asked, and this script says so.
#
# Output seen: hosts asked for at import: online ['huggingface.co'], HF_HUB_OFFLINE=1 [], without kernels []
set -euo pipefail
if ! grep -q avx512_bf16 /proc/cpuinfo; then
    echo "this CPU has no AVX-512 BF16: bitsandbytes does not look for the kernel here"
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
"$folder/venv/bin/pip" install --quiet --target "$folder/kernels" kernels==0.17.2
cat > "$folder/run.py" <<'PY'
import socket

hosts = set()


def no_address(host, *ignored, **also_ignored):
    hosts.add(host)
    raise socket.gaierror(socket.EAI_NONAME, "no network in this test")


socket.getaddrinfo = no_address
import bitsandbytes  # noqa: E402, F401

print(sorted(hosts))
PY
export CUDA_VISIBLE_DEVICES="" HF_HOME="$folder/home"
python=("$folder/venv/bin/python" -W ignore "$folder/run.py")
online=$(PYTHONPATH="$folder/kernels" HF_HUB_OFFLINE=0 "${python[@]}" 2>/dev/null)
offline=$(PYTHONPATH="$folder/kernels" HF_HUB_OFFLINE=1 "${python[@]}" 2>/dev/null)
without=$("${python[@]}" 2>/dev/null)
echo "hosts asked for at import: online $online, HF_HUB_OFFLINE=1 $offline, without kernels $without"
if [[ "$online $offline $without" != "['huggingface.co'] [] []" ]]; then
    echo "the behaviour has changed"
    exit 1
fi
