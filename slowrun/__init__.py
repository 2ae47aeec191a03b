"""The instrument: what every result is measured with, and the plumbing that no record wants to read.

    session   a run from its command line to its result; what scripts use
    folder    the run folder: atomic writes, log, metrics, lock, checkpoints, curve
    scoring   validation, and what is computed from its losses
    rules     what a record of each track must keep
    config    flags from a dataclass, settings of records
    data      splits on disk, the orders of epochs, the loader of training batches
    clock     what is timed, and the decision about the cap
    plan      what a run will do, and what it needs of a machine
    machine   memory, disks, names and speed of devices
    world     processes and what they agree on

These are frozen: a record never changes them. The library is what a record may replace by its own, in its script:

    sharded   masters, gradients and optimizer state, sharded over processes
    weights   compute weights, made from masters
    kernels   attention, dropout, the loss of the head, products in fp8; each with a plain twin

Scripts import session and the modules below it. No module imports one above it, and none imports a script.
"""
