"""The instrument, with which every result is measured, and a library of what all scripts need.

    session   a run from its command line to its result: what a script's main calls
    folder    the run folder: atomic writes, log, metrics, lock, checkpoints, curve
    scoring   validation, and what is computed from its losses
    rules     the rules of each track: data, cap, hardware
    config    flags from a dataclass, settings of records
    data      splits on disk, the orders of epochs, the loader of training batches
    clock     what is timed, and the decision about the cap
    plan      the steps and stages of a run, and the memory, disk and traffic they need
    machine   memory, disks, names and speed of devices; the profiler
    world     processes: groups, virtual ranks, collective operations, seeds

These are frozen: a record never changes them. The library may be replaced by a record, in its script:

    sharded   masters and gradients in buckets, and the optimizer state, sharded over the processes
    weights   compute weights: made from the masters, and their gradients pulled back to the masters
    kernels   attention, dropout, the loss of the head, products in fp8; each with a plain twin

Scripts import any of these. A module of the first list imports only modules below it, a module of the library only
modules of the first list, and none imports a script. docs/imports.svg is a picture of it.
"""
