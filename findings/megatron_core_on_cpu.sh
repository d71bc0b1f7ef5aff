# Sourced by findings about megatron-core: sets $folder, a temporary folder with megatron-core in a virtual environment and
# cuda_on_cpu.py. $release selects the version (default: 0.16.1), $python the Python (default: python3.11). Arguments are
# further packages to install.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${python:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 "$@"
"$folder/venv/bin/pip" install --quiet "megatron-core==${release:-0.16.1}"
cp "$(dirname "${BASH_SOURCE[0]}")/cuda_on_cpu.py" "$folder"
