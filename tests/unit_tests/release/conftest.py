"""Import Megatron once, before the tests of this folder do; see the same file of the model tests."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.training.models.gpt  # noqa: F401
