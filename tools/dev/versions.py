#!/usr/bin/env python3
"""What the Python that runs this has: a line with the versions that matter, or what it lacks and how to get it.

For KAIYUAN_PYTHON (Makefile): a Python of a container or a module system, with torch, Transformer Engine and Apex of
its own. Nothing is installed.
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHOWN = ("torch", "triton", "megatron-core", "transformer-engine", "apex", "transformers")
IMPORTED_AS = {"transformer-engine": "transformer_engine", "apex": "apex"}
"""Packages that may be there without a record of their version: built in an image, or unpacked beside it."""
TEST_RUNNERS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis")


def main() -> int:
    """Print the versions, and return 1 where something is lacking."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", action="store_true", help="also look for what the tests need")
    args = parser.parse_args()
    lacking = missing_requirements(tests=args.tests)
    if lacking:
        print(advice(lacking), file=sys.stderr)
        return 1
    print(f"env: {sys.executable}, nothing is installed: {versions()}", flush=True)
    return 0


def versions() -> str:
    """Python, CUDA and the packages that decide about speed, in one line."""
    named = [
        ("Python", sys.version.split()[0]),
        *((name, version_of(name)) for name in SHOWN),
        ("CUDA", cuda_of_torch()),
    ]
    return ", ".join(f"{name} {version}" for name, version in named)


def cuda_of_torch() -> str:
    """The CUDA that torch was built with, read from its files: importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    text = file.read_text(encoding="utf-8") if file is not None and file.is_file() else ""
    found = re.search(r"^cuda\b.*= '([^']+)'", text, flags=re.MULTILINE)
    return found.group(1) if found else "none"


def version_of(package: str) -> str:
    """The installed version, or `none`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        module = IMPORTED_AS.get(package)
        return "of unknown version" if module and importlib.util.find_spec(module) else "none"


def missing_requirements(*, tests: bool) -> dict[str, str]:
    """Return the requirements of setup.py that this Python does not meet, with the installed version."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return {"packaging": "none"}
    asked = required() + [entry for entry in extra("test") if tests and Requirement(entry).name in TEST_RUNNERS]
    missing = {}
    for line in asked:
        requirement, found = Requirement(line), version_of(Requirement(line).name)
        if found == "none" or not requirement.specifier.contains(found, prereleases=True):
            missing[line] = found
    return missing


def advice(lacking: dict[str, str]) -> str:
    """What to do, in one sentence that leaves the packages that are there as they are."""
    told = ", ".join(f"{line} (found: {found})" for line, found in lacking.items())
    python = shlex.quote(os.environ.get("KAIYUAN_PYTHON", sys.executable))
    wanted = " ".join(shlex.quote(line) for line in lacking)
    return (
        f"env: {python} lacks {told}; install it beside what is there, whose versions stay: {python} -m pip install "
        f"--constraint <({python} -m pip list --format=freeze) {wanted}"
    )


def required() -> list[str]:
    """`REQUIRES` of setup.py, read without running it."""
    return list(ast.literal_eval(_value("REQUIRES")))


def extra(name: str) -> list[str]:
    """One of `EXTRAS` of setup.py."""
    return list(ast.literal_eval(_value("EXTRAS"))[name])


def _value(name: str) -> ast.expr:
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return node.value
    raise RuntimeError(f"setup.py has no {name}")


if __name__ == "__main__":
    sys.exit(main())
