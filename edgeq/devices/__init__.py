"""Devices: what a machine is, what fits on it, and what it measures about itself.

    profile    a device's numbers with their sources, from profiles/*.toml
    detect     what this machine (or a copy of its /proc and /sys, or a dump) is
    doctor     what works on this machine, and how to fix what does not
    planner    will a model fit, and how fast would it be; facts reads a model's headers
    meters     power, energy, temperature, frequency
    transport  another machine

`cores` and `socs` hold what part numbers and kernels' words mean.
"""
