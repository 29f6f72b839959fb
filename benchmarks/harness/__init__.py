"""What the benchmarks share.

layers           real layer shapes, by name
timing           the timer: contestants take turns, medians are compared
verify           every result is checked against float64 before it is timed
peers            what the float32 operators are compared with; int8_peers: the int8 operators
register_limits  upper bounds of the arithmetic, measured on this processor (register_limits.cpp has the loops)
memory           peak memory of a training step
cuda_device      timer, bounds and memory on a GPU
report           the machine, means, CSV files, plots
gpu_day_*        gpu_day.py: runner (time and results of the parts), parts (their commands), parsers, summary; what the
                 parts run: environment, build, kernels (one call of each), counters, epoch; rehearsal, without a GPU
"""
