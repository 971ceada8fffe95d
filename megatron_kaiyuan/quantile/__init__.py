"""Quantile benchmarking: train one small model on slices at score quantiles of each dataset, compare, propose a plan.

`study` reads the file, `slices` cuts, `runs` names the runs and writes their plans, `training` trains them,
`evaluation` and `tasks` measure, `analysis` decides what the numbers show, `proposal` turns that into a plan and `page`
into something to look at. Cutting and reporting import neither torch nor Megatron.
"""
