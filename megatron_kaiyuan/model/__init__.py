"""FP16-stable GPT on Megatron-Core: options, layers, specs, output head and numeric meters.

Nothing is imported here: the submodules pull in torch and Megatron, which entry points must be free to delay.
"""
