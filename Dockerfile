# NVIDIA's PyTorch image 26.03 holds torch 2.11.0a0 on CUDA 13.2, the torch series of constraints.txt; 26.02 holds the
# same torch on CUDA 13.1, 26.04 holds torch 2.12. It also brings Transformer Engine and Apex, compiled for its torch.
# The versions are what users of those images report; this file itself has not been built where the tests run.
# Another image: docker build --build-arg BASE=nvcr.io/nvidia/pytorch:...
ARG BASE=nvcr.io/nvidia/pytorch:26.03-py3
FROM ${BASE}

# The image limits pip to its own versions (PIP_CONSTRAINT), which is what keeps its torch; ours would replace them.
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/megatron_kaiyuan

# First what the package needs, so that a change in its code does not install everything again. The versions are
# the image's and setup.py's ranges, which is why no version is named here.
COPY setup.py pyproject.toml LICENSE ./
COPY megatron_kaiyuan/__init__.py megatron_kaiyuan/
# hadolint ignore=DL3013
RUN pip install ".[preprocess,wandb,liger]"

COPY megatron_kaiyuan megatron_kaiyuan
RUN pip install --no-deps --force-reinstall . \
    && python -c "import torch, megatron.core, transformer_engine, apex, megatron_kaiyuan; print(torch.__version__)"

# For `docker run --user`: a user without a home directory still gets places to write caches to.
ENV XDG_CACHE_HOME=/tmp/cache \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    HF_HOME=/tmp/cache/huggingface

# `make demo`, `make test` and `make gpu-check` of a mounted checkout: KAIYUAN_PYTHON=python3 uses the image's Python.
# The examples leave the .venv of a mounted checkout alone: its torch is not the image's.
ENV KAIYUAN_IGNORE_VENV=1

WORKDIR /workspace
