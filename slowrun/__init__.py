"""The instrument: what every result is measured with, and the plumbing that no record wants to read.

    session   a run from its command line to its result; what scripts use
    folder    the run folder: atomic writes, log, metrics, lock, checkpoints, curve
    scoring   validation, and what is computed from its losses
    rules     what a record of each track must keep
    config    flags from a dataclass, settings of records
    data      splits on disk, the orders of epochs, the loader of training batches
    clock     what is timed, and the decision about the cap
    machine   memory, disks, names and speed of devices
    world     processes and what they agree on

Scripts import session and the modules below it. No module imports one above it, and none imports a script.
"""
