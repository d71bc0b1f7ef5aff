#!/usr/bin/env bash
# megatron-core 0.19.2 with nvidia-resiliency-ext 0.4.1, the newest release that installs with a glibc older than 2.39.
#
# Guess: the package is optional; a release that megatron-core cannot use is treated as absent, and saving with
# async_strategy="mcore" works.
# Behaviour: the check for its presence also reads its version, which 0.4.1 does not define there. The error is not caught
# and occurs while megatron-core is imported: no checkpoint can be read or written. Without the package, everything works.
#
# Output seen: with 0.4.1: AttributeError: module 'nvidia_resiliency_ext' has no attribute '__version__'; without: imports
set -euo pipefail
release=0.19.2 python=python3.12
source "$(dirname "$0")/megatron_core_on_cpu.sh" psutil==7.2.2 nvidia-resiliency-ext==0.4.1
imports() {
    { "$folder/venv/bin/python" -W ignore -c "import megatron.core.dist_checkpointing" 2>&1 || true; } | sed -n 's/^\([A-Za-z]*Error\)/\1/p'
}
with=$(imports)
"$folder/venv/bin/pip" uninstall --quiet --yes nvidia-resiliency-ext
without=$(imports)
echo "with 0.4.1: $with; without: ${without:-imports}"
[[ $with == AttributeError:* && -z $without ]] || { echo "the behaviour has changed"; exit 1; }
