"""The parts of records/referee.py, which judges runs.

    verdict     every check, in order, and the verdict
    submission  several runs as one submission: the same experiment, the seeds, significance
    probes      probabilities, causality, learning: what the worker measured besides the losses
    scoring     the weights, the worker's process, and the losses computed from its predictions
    clock       step times, caps, and the number of steps
    data        the data files, their sequences, and documents in two splits
    logs        the log, and every loss that a run wrote down
    files       the kinds of files, config.json and result.json, the script and its slowrun/
    findings    PASS, FAIL and NOTE, the options, and the state of a judgement
    runs        run folders as they are read, and checked numbers
    overlap     the search for training documents in another split
    worker      the process that runs a run's own code; it imports nothing of this repository

Each module imports only those below it.
"""
