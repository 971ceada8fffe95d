"""What `megatron.training.pretrain` is given: datasets, forward step, learning rate, and checks before it starts.

Nothing is imported here: the submodules pull in torch and Megatron, which entry points must be free to delay.
"""
