"""What `jaxzs COMMAND` runs: options as dataclasses, heavy imports inside the functions."""
