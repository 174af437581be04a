"""Package metadata. `requirements.lock` holds the exact versions that the README's two commands install."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent

CORE = [
  "absl-py>=2.3",
  "array-record>=0.8.3",
  "av>=16",
  "chex>=0.1.91",
  "etils[epath]>=1.12",
  "flatbuffers>=25",  # jax.export writes with it
  "flax>=0.12.2,<0.13",
  "fsspec>=2025.1",  # epath goes through it to a bucket
  "ftfy>=6.3",
  "grain>=0.2.16,<0.3",
  "jax>=0.10,<0.11",
  "ml-collections>=1.1",
  "ml-dtypes>=0.5",
  "numpy>=2.1",
  "optax>=0.2.6",
  "orbax-checkpoint>=0.12,<0.13",
  "protobuf>=6",  # reads sentencepiece's models
  "pyarrow>=20",  # manifests in parquet; tensorflow-datasets brings it anyway
  "rich>=14",
  "safetensors>=0.6",
  "scipy>=1.13",  # jax brings it anyway
  "sentencepiece>=0.2.1",
  "tensorboardX>=2.6.4",
  # as_data_source over ArrayRecord; TensorFlow itself is never imported
  "tensorflow-datasets>=4.9.9",
  "tokenizers>=0.23,<0.24",  # prompts into ids as transformers does; never downloads
]

EXTRAS = {
  "test": [
    "hypothesis>=6.140",
    "pytest>=9",
    "pytest-xdist>=3.8",
    "ruff>=0.14",
    "scikit-video>=1.1.11",
    "gcp-storage-emulator>=2026.7",
    "gcsfs>=2026.9",
    "starlette>=1.0",
    "uvicorn>=0.40",
  ],
  "oracle": [
    "torch==2.13.0",
    "diffusers>=0.42,<0.43",
    "transformers>=5.20,<6",
    "accelerate>=1.12",
    "peft>=0.17",
  ],
  "tpu": ["jax[tpu]>=0.10,<0.11"],
  "gcs": ["gcsfs>=2026.9"],  # paths on gs://
  "serve": ["starlette>=1.0", "uvicorn>=0.40"],  # launch.serve
}

setuptools.setup(
  name="sora_jax",
  version=re.search(r'__version__ = "(.+)"', (ROOT / "sora_jax" / "__init__.py").read_text()).group(1),
  description="Text to video of the Sora kind: train, sample, check and trust, in JAX for TPU pods.",
  long_description=(ROOT / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11",
  packages=setuptools.find_namespace_packages(
    include=["sora_jax", "sora_jax.*", "data", "data.*", "launch", "launch.*", "configs", "configs.*"]
  ),
  package_data={
    "sora_jax": ["assets/**"],
    "launch": ["*.sh"],
    "launch.tpu": ["*.sh", "*.yaml", "Dockerfile*"],
    "launch.reports": ["*.html"],
    "launch.serve": ["page.*"],
  },
  install_requires=CORE,
  extras_require=EXTRAS,
)
