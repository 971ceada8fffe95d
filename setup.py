"""Packaging of megatron_kaiyuan: what it needs, and what it can use when present.

The exact versions everything is tested with are in constraints.txt; tool settings are in pyproject.toml.
"""

import re
import subprocess
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

PACKAGE = "megatron_kaiyuan"

REQUIRES = [
    "megatron-core>=0.19.2,<0.20",
    "Jinja2>=3.1",  # the pages
    "numpy>=1.26",  # the data engine passes its tests with 1.26.4; a container may hold a 1.x
    # `a0`, because the NVIDIA containers call their builds 2.11.0a0, which is below 2.11 for a package manager.
    "torch>=2.11.0a0",
    "packaging",
    "plotly>=6",
    "psutil",  # megatron-core saves torch_dist checkpoints with it and does not ask for it
    "pyarrow>=17",
    "pydantic>=2",
    "PyYAML>=6",
    "rich>=13",
    "scipy>=1.13",  # Student's t in the report of quantile benchmarking
    "sentencepiece>=0.2",
    "tensorboard>=2.16",
    "tokenizers>=0.21",
    "transformers>=4.48",  # megatron-core's HuggingFaceTokenizer
    "xxhash>=3",  # checksums of checkpoints, at the speed of memory
]

# NVIDIA Apex is not here: no package registry holds it (the `apex` that one does hold is something else). It comes
# with the NVIDIA containers, or is built from its own repository with its CUDA extensions; it is used when it imports.
EXTRAS = {
    "te": ["transformer-engine[core_cu13,pytorch]>=2.12"],
    "liger": ["liger-kernel>=0.6"],
    "model": ["transformer-engine[core_cu13,pytorch]>=2.12", "liger-kernel>=0.6"],
    "hf": ["safetensors>=0.4", "transformers>=5.2"],  # to run what tools/convert_checkpoint.py exports
    "wandb": ["wandb"],
    "eval": [
        "accelerate>=1",
        "lm-eval>=0.4.13",
    ],  # tasks of tools/evaluate.py and quantile_benchmark.py; lm-eval's own hf
    "preprocess": ["gigatoken>=0.10", "orjson>=3.10", "tiktoken>=0.9", "zstandard>=0.23"],
    "test": [
        "hypothesis>=6.100",
        "mypy>=2",
        "pytest>=9",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.15",
        "types-PyYAML>=6",
    ],
}


def read_version() -> str:
    """The version in the package's `__init__.py`, read as text: importing it would need what is being installed."""
    text = (Path(__file__).parent / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if found is None:
        raise RuntimeError(f'{PACKAGE}/__init__.py has no line of the form __version__ = "1.2.3"; add it')
    return found.group(1)


class BuildWithCommit(build_py):
    """Writes the commit beside what is built: an installed package has no git to ask."""

    def run(self) -> None:
        """Build, and write the commit if this is a checkout with git."""
        super().run()
        here = Path(__file__).resolve().parent
        if self.editable_mode or not (here / ".git").exists():
            return
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            (Path(self.build_lib) / PACKAGE / "commit.txt").write_text(done.stdout, encoding="ascii")


setup(
    cmdclass={"build_py": BuildWithCommit},
    entry_points={"console_scripts": ["kaiyuan = megatron_kaiyuan.commands.kaiyuan:main"]},
    name=PACKAGE,
    version=read_version(),
    description="FP16-stable GPT pretraining with quality curricula on Megatron-Core",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    package_data={f"{PACKAGE}.reporting": ["templates/*.html"], f"{PACKAGE}.release": ["templates/*.md"]},
    python_requires=">=3.12",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
