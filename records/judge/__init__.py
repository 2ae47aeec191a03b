"""What records/referee.py judges by. Each module imports only from those above it.

runs         run folders, their files as they are used, and their numbers
findings     PASS, FAIL and NOTE, the options and the state of a judgement
files        which files a folder has, result.json, the code, the instrument, eligibility
logs         the log and the losses that it and metrics.jsonl say
overlap      training documents in another split
data         the data files, and how many sequences they have
clock        step times, caps and the number of steps
scoring      weights, the process that scores a run, and the losses that it finds
worker       that process: it imports nothing of this repository
probes       what it measured besides: probabilities, causality, learning
submission   several runs as one record
verdict      all checks in their order, and what is made of them
"""
