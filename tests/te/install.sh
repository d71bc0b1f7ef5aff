#!/usr/bin/env bash
# Install Transformer Engine into an environment that has a CUDA build of torch. Neither a GPU nor a CUDA toolkit is
# needed: PyPI has the core as a wheel, and the torch extension as source, which a C++ compiler builds in some minutes.
# What it includes besides torch is on PyPI, too: CUDA's headers and nvcc, which is only asked for its version.
#
#   tests/te/install.sh PYTHON [FOLDER]
#
# PYTHON is the environment's interpreter; FOLDER may have a wheel of the extension, which is then not built.
# CUDA_HOME, if set, names a CUDA toolkit to take the headers from.
set -euo pipefail
python=$1 wheels=${2:-}

refuse() {
    echo "Transformer Engine is not installed: $1" >&2
    exit 1
}

cuda=$("$python" -c "import torch; print(torch.version.cuda or '')") || refuse "$python cannot import torch."
[[ -n $cuda ]] || refuse "torch here is a build for CPUs, and the torch extension needs one for CUDA. Install PyPI's, \
with Python 3.12: make test-te TE_PYTHON=python3.12 TE_TORCH=torch==2.11.0"
if [[ -n $wheels ]]; then
    compgen -G "$wheels/transformer_engine_torch-*.whl" > /dev/null ||
        refuse "there is no transformer_engine_torch-*.whl in ${wheels@Q}, which TE_WHEELS names. Without TE_WHEELS it is built."
    "$python" -m pip install --quiet --no-build-isolation --find-links="$wheels" -e ".[te]"
    exit
fi

site=$("$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/nvidia
compiler=${CXX:-g++}
command -v "$compiler" > /dev/null ||
    refuse "its torch extension is built from source, and there is no C++ compiler (${compiler@Q}). Install one, or name \
a folder with a wheel of the extension: make test-te TE_WHEELS=FOLDER"
if [[ -z ${CUDA_HOME:-} ]]; then
    [[ $cuda == 13.* ]] ||
        refuse "torch here is built for CUDA $cuda, and PyPI's headers are used for CUDA 13 only. Set CUDA_HOME to a toolkit."
    # In the version that torch requires.
    "$python" -m pip install --quiet "cuda-toolkit[cccl,crt,nvcc,profiler]"
    export CUDA_HOME=$site/cu13
fi
export CPATH=$site/cudnn/include:$site/nccl/include${CPATH:+:$CPATH}
# Do not ask GitHub for a wheel first.
export NVTE_PYTORCH_FORCE_BUILD=TRUE
# Compiles several files at a time, if it is found.
"$python" -m pip install --quiet ninja
PATH=$(cd "$(dirname "$python")" && pwd):$PATH
"$python" -m pip install --quiet --no-build-isolation -e ".[te]"
