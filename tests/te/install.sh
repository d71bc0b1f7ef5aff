#!/usr/bin/env bash
# Install Transformer Engine into an environment that has a CUDA build of torch. Neither a GPU nor a CUDA toolkit is
# needed: PyPI has the core as a wheel, and the torch extension as source, which a C++ compiler builds in a few minutes.
# Besides torch, the build needs CUDA's headers and nvcc (only to query its version), which are on PyPI as well.
#
#   tests/te/install.sh PYTHON [FOLDER]
#
# PYTHON is the environment's interpreter. FOLDER keeps the wheel of the extension: a wheel for this Python is reused;
# otherwise it is built there. CUDA_HOME, if set, names a CUDA toolkit to take the headers from.
set -euo pipefail
python=$1 wheels=${2:-}

refuse() {
    echo "Transformer Engine is not installed: $1" >&2
    exit 1
}

cuda=$("$python" -c "import torch; print(torch.version.cuda or '')") || refuse "$python cannot import torch."
[[ -n $cuda ]] || refuse "torch here is a CPU build, and the torch extension needs a CUDA build. Remove this \
environment and use PyPI's torch: make test-te TE_PYTHON=python3.12 TE_TORCH=torch==2.11.0"
tag=$("$python" -c "import sys; print(f'cp{sys.version_info[0]}{sys.version_info[1]}')")
if [[ -z $wheels ]]; then
    wheels=$(mktemp -d)
    trap 'rm -rf "$wheels"' EXIT
fi

if ! compgen -G "$wheels/transformer_engine_torch-*-$tag-*.whl" > /dev/null; then
    compiler=${CXX:-g++}
    command -v "$compiler" > /dev/null ||
        refuse "its torch extension is built from source, and there is no C++ compiler (${compiler@Q}). Install one, or \
give a folder that has a wheel of the extension for this Python: make test-te TE_WHEELS=FOLDER"
    site=$("$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/nvidia
    if [[ -z ${CUDA_HOME:-} ]]; then
        [[ $cuda == 13.* ]] ||
            refuse "torch here is built for CUDA $cuda, and PyPI's headers are used for CUDA 13 only. Set CUDA_HOME to a \
toolkit of that version."
        # pip picks the version that torch requires.
        "$python" -m pip install --quiet "cuda-toolkit[cccl,crt,nvcc,profiler]"
        export CUDA_HOME=$site/cu13
    fi
    export CPATH=$site/cudnn/include:$site/nccl/include${CPATH:+:$CPATH}
    # Do not ask GitHub for a wheel first.
    export NVTE_PYTORCH_FORCE_BUILD=TRUE
    # With ninja, several files are compiled in parallel.
    "$python" -m pip install --quiet ninja
    PATH=$(cd "$(dirname "$python")" && pwd):$PATH
    "$python" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir="$wheels" "transformer_engine_torch>=2.11,<2.12"
fi
"$python" -m pip install --quiet --no-build-isolation --find-links="$wheels" -e ".[te]"
