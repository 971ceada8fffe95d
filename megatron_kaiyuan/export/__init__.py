"""Checkpoints to and from Hugging Face's layout: names, shapes, config, and a model file that needs only transformers.

Nothing is imported here: `configuration_kaiyuan.py` and `modeling_kaiyuan.py` are copied beside exported weights and
must stand alone.
"""
