"""What becomes of each of Megatron's flags in this entry point: one table, and the refusals that follow from it."""
