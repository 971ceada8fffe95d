"""What the package needs from the machine: atomic files, maps, threads, processes, and Megatron without CUDA."""
