"""What only a GPU shows, in processes of their own: `make gpu-check`, or `KAIYUAN_GPU_TESTS=cuda pytest tests/gpu`.

Every body takes its device from the fixture `device`, so `KAIYUAN_GPU_TESTS=cpu` runs all of them without a GPU, on the
CPU platform and in Triton's interpreter, at smaller sizes.
"""
