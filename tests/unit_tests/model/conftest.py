"""Import Megatron once, before the tests of this folder do.

Its import says many things about its own code (deprecated modules, extras that are not installed); warnings of ours and
those that its functions give when they are called still count as failures.
"""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.training.models.gpt  # noqa: F401
