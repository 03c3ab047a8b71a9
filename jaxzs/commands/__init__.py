"""What `jaxzs COMMAND` runs: options as dataclasses, heavy imports inside the functions.

Exit codes: finished; finished, but some inputs could not be used (they are listed); wrong input, nothing was done;
interrupted (what is kept is said).
"""

FINISHED, INCOMPLETE, FAILED, INTERRUPTED = 0, 1, 2, 130
