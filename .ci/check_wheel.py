"""The wheel holds every tracked file of the package, and installing it brought no other framework."""

import subprocess
import sys
import zipfile
from importlib.metadata import distributions, version
from pathlib import Path

wheel = Path(sys.argv[1])
heavy = {d.metadata["Name"].lower() for d in distributions()} & {"torch", "tensorflow", "torchvision", "keras"}
assert not heavy, f"installing jaxzs brought {heavy}"
assert wheel.name.split("-")[1] == version("jaxzs"), (wheel.name, version("jaxzs"))
listed = subprocess.run(["git", "ls-files", "jaxzs"], capture_output=True, text=True)
missing = set(listed.stdout.split("\n")) - {""} - set(zipfile.ZipFile(wheel).namelist())
assert not missing, f"in the repository, not in the wheel: {sorted(missing)}"
print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, nothing of torch or TensorFlow")
