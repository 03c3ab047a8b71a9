"""From one device to a pod: mesh, logical-axis rules, rows of a data set, several processes.

Arrays carry logical axis names ("images", "classes", "heads", ...), one rules table maps these to the axes of
a mesh, and nothing else names a mesh axis. Computation is `jax.jit` on arrays with a `NamedSharding`; the mesh axes
are of type Auto, so that the compiler places the collectives.

    mesh = parallel.make_mesh()                              # all devices along "data"
    model = jaxzs.load(name, mesh=mesh, placement="fully_sharded")   # read shard by shard
    x, mask = parallel.shard_rows(features, mesh)            # [N,E], padded to a multiple of the devices
    result = jaxzs.proxy.fit(x, text_proxies, mask=mask)     # the same numbers as on one device

Several processes: every process runs the same script, and calls `parallel.initialize()` before anything else of JAX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxzs import peers
from jaxzs.errors import ConfigError, DataError

DATA, MODEL = "data", "model"  # the two axes of every mesh made here
Rules = Mapping[str, str]

# Rows of a data set and their pseudo labels lie over "data", classes over "model".
DATA_RULES: Rules = {"images": DATA, "classes": MODEL}


# --- mesh and rules -----------------------------------------------------------------------------------


def make_mesh(*, data: int = -1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes "data" and "model", both of type Auto.

    data, model: devices along each axis; data=-1 takes all that are left. devices: default all of all processes.
    Raises `ConfigError` when the numbers do not fit the devices.

    >>> mesh = parallel.make_mesh()  # all devices along "data"
    >>> mesh.shape["data"] == jax.device_count(), mesh.shape["model"]
    (True, 1)
    >>> parallel.make_mesh(model=1000)
    Traceback (most recent call last):
    jaxzs.errors.ConfigError: ... devices cannot be split 1000 ways along 'model'
    """
    listed = list(jax.devices() if devices is None else devices)
    if model < 1 or len(listed) % model:
        raise ConfigError(f"{len(listed)} devices cannot be split {model} ways along 'model'")
    along_data = len(listed) // model if data == -1 else data
    if along_data * model != len(listed):
        raise ConfigError(
            f"a mesh of data={along_data} x model={model} needs {along_data * model} devices, there are "
            f"{len(listed)}; pass data=-1 to use all"
        )
    # Auto by name: jax.make_mesh would default to Explicit, where sharded contractions raise.
    return jax.make_mesh((along_data, model), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2, devices=listed)


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules = DATA_RULES
) -> PartitionSpec:
    """Where an array lies: logical axis names and lengths -> PartitionSpec of the mesh.

    An axis without a rule, one whose mesh axis is taken already, and one that the mesh axis does not divide evenly
    stay whole.

    Raises `ConfigError` when names and lengths differ in number.

    >>> mesh = parallel.make_mesh(devices=jax.devices()[:1])
    >>> tuple(parallel.partition_spec(("images", None), (8, 3), mesh))
    ('data', None)
    """
    if len(axes) != len(shape):
        raise ConfigError(f"{len(axes)} axis names {tuple(axes)} for an array of shape {tuple(shape)}")
    used: list[str | None] = []
    for name, length in zip(axes, shape, strict=True):
        target = rules.get(name) if name is not None else None
        # Not on this mesh, taken by an axis before, or not to be divided evenly: the array is whole along this axis.
        fits = target in mesh.axis_names and target not in used and length % mesh.shape[target] == 0
        used.append(target if fits else None)
    return PartitionSpec(*used)


def sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], rules: Rules = DATA_RULES) -> NamedSharding:
    """`partition_spec` as a `NamedSharding` on `mesh`.

    Arguments and errors as `partition_spec`.

    >>> mesh = parallel.make_mesh()
    >>> tuple(parallel.sharding(mesh, ("images", None), (mesh.size, 3)).spec)
    ('data', None)
    """
    return NamedSharding(mesh, partition_spec(axes, shape, mesh, rules))


# --- rows of a data set -----------------------------------------------------------------------------------


def padded_length(num_rows: int, multiple: int) -> int:
    """The next multiple of `multiple`, at least one.

    >>> parallel.padded_length(30, 8)
    32
    """
    return multiple * max(1, math.ceil(num_rows / multiple))


def pad_rows(rows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Zeros behind the rows up to `length`: [N,...] -> ([length,...], mask [length] bool, False for padding).

    Raises `DataError` when there are more rows than that.

    >>> rows, mask = parallel.pad_rows(np.ones((3, 2)), 4)
    >>> rows.shape, mask.tolist()
    ((4, 2), [True, True, True, False])
    """
    if len(rows) > length:
        raise DataError(f"{len(rows)} rows do not fit into {length}")
    padded = np.zeros((length, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return padded, np.arange(length) < len(rows)


def shard_rows(rows: Any, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Rows that this process holds whole, spread over "data": [N,...] -> (padded [N',...], mask [N'] bool).

    N' is the next multiple of the devices along "data". With several processes every one passes the same rows;
    where each holds only its own part use `rows_of_processes`.

    rows: any array [N,...] that fits on the host.

    >>> mesh = parallel.make_mesh()
    >>> rows, mask = parallel.shard_rows(np.ones((30, 4), np.float32), mesh)
    >>> rows.shape[0] % mesh.size, int(mask.sum())
    (0, 30)
    """
    host = np.asarray(rows)
    padded, mask = pad_rows(host, padded_length(len(host), mesh.shape[DATA]))
    # By callback and not `device_put`: each process fills only the devices that it has.
    place = lambda x: jax.make_array_from_callback(  # noqa: E731
        x.shape, sharding(mesh, ("images", *[None] * (x.ndim - 1)), x.shape), lambda index: x[index]
    )
    return place(padded), place(mask)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """One copy of every array of a pytree on every device of the mesh.

    >>> parallel.replicate(np.eye(2, dtype=np.float32), parallel.make_mesh()).is_fully_replicated
    True
    """

    def place(x: Any) -> jax.Array:
        host = np.asarray(x)
        where = NamedSharding(mesh, PartitionSpec())  # no axis is divided
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(place, tree)


def map_rows(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function(shared, *rows)` with every device working on its own rows: nothing is exchanged between them.

    shared: a pytree that every device holds whole. rows: pytrees of arrays that start with the axis of rows, of a
    multiple of the devices; so must all results. They are divided over all axes of the mesh. For functions whose loops
    depend on the rows, such as tagging: sharded by the compiler, every device would wait for the slowest.

    >>> mesh = parallel.make_mesh()
    >>> scaled = parallel.map_rows(lambda scale, x: scale * x, mesh)
    >>> scaled(np.float32(2), np.ones((mesh.size, 1), np.float32)).shape == (mesh.size, 1)
    True
    """
    whole, divided = PartitionSpec(), PartitionSpec(mesh.axis_names)  # rows over both axes of the mesh together

    def run(shared: Any, *rows: Any) -> Any:
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(whole, *[divided] * len(rows)),
            out_specs=divided,
            check_vma=False,  # loops inside may start from constants, which are the same everywhere
        )(shared, *rows)

    return jax.jit(run)


# --- several processes ------------------------------------------------------------------------------------


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: int = 20,
) -> bool:
    """Join the other processes of this run; to be called before any other use of JAX.

    On TPU pods, SLURM and Open MPI no argument is needed:

        TPU pod   gcloud compute tpus tpu-vm ssh NAME --worker=all --command "python run.py"
        SLURM     srun --ntasks-per-node=1 python run.py
        Open MPI  mpirun -n 4 python run.py

    Elsewhere give the address "host:port" of process 0, the number of processes and this one's number.
    When one dies, or ends by an error, the others end after `heartbeat_timeout` seconds (at once if it was process 0):
    with exit code 2 and a line that says which one; chunks and states that are on disk are kept.
    Returns whether there are several processes. Raises `ConfigError` when it comes too late, or for half the arguments.

    >>> several = parallel.initialize()  # doctest: +SKIP
    >>> parallel.initialize("10.0.0.1:1234")
    Traceback (most recent call last):
    jaxzs.errors.ConfigError: give all of coordinator_address, num_processes and process_id, or none of them ...
    """
    given = [value is not None for value in (coordinator_address, num_processes, process_id)]
    if any(given) and not all(given):
        raise ConfigError(
            "give all of coordinator_address, num_processes and process_id, or none of them where the "
            "cluster says so itself (TPU pod, SLURM, Open MPI)"
        )
    # A script and the command that it calls may both ask.
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    try:
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id, heartbeat_timeout_seconds=heartbeat_timeout
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cannot join the other processes: {str(error).rstrip('.')}",
            python="call parallel.initialize() first in the script; outside of a TPU pod, SLURM or Open MPI pass the "
            "three arguments",
            command="start it on a TPU pod, by srun or by mpirun; on one machine leave --distributed out",
        ) from error
    several = jax.process_count() > 1
    if several:
        peers.watch(heartbeat_timeout)
    return several


def is_main_process() -> bool:
    """Whether this process writes reports: process 0.

    >>> parallel.is_main_process()
    True
    """
    return jax.process_index() == 0


def process_rows(num_rows: int, mesh: Mesh) -> tuple[int, int, int]:
    """Which rows of a data set this process reads: (first, end, rows after padding of the whole array).

    Rows are padded to a multiple of the devices along "data"; those of [first, end) that lie beyond `num_rows` are
    padding. Over all processes the ranges cover the rows exactly once.
    Raises `ConfigError` when the mesh does not give this process neighbouring rows.

    >>> parallel.process_rows(30, parallel.make_mesh(devices=jax.devices()[:1]))  # a single process reads all
    (0, 30, 30)
    """
    total = padded_length(num_rows, mesh.shape[DATA])
    where = sharding(mesh, ("images",), (total,))
    held = where.addressable_devices_indices_map((total,)).values()
    # Devices along "model" hold the same rows.
    pieces = {index[0].indices(total)[:2] for index in held if index is not None}
    first, end = min(start for start, _ in pieces), max(stop for _, stop in pieces)
    # A gap between them holds rows of other processes, and one range could not name what to read.
    if sum(stop - start for start, stop in pieces) != end - first:
        raise ConfigError(
            "the devices of this process do not hold neighbouring rows; order the devices of the mesh by "
            "process: make_mesh(devices=sorted(jax.devices(), key=lambda d: (d.process_index, d.id)))"
        )
    return first, end, total


def rows_of_processes(local_rows: np.ndarray, num_rows: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """A global array from what each process has read: rows [first, min(end, N)) of `process_rows(N, mesh)`.

    Returns (rows [N',...], mask [N'] bool), sharded over "data". Nothing is sent between processes.
    Raises `DataError` when a process brings another number of rows than is its own.

    >>> mesh = parallel.make_mesh()
    >>> first, end, _ = parallel.process_rows(30, mesh)
    >>> own = np.ones((min(end, 30) - first, 4), np.float32)  # what this process has read
    >>> rows, mask = parallel.rows_of_processes(own, 30, mesh)
    >>> int(mask.sum())
    30
    """
    first, end, total = process_rows(num_rows, mesh)
    expected = max(0, min(end, num_rows) - first)  # the last processes may hold nothing but filling
    if len(local_rows) != expected:
        raise DataError(
            f"process {jax.process_index()} brings {len(local_rows)} rows, its part of {num_rows} are the "
            f"{expected} from {first}"
        )
    padded, mask = pad_rows(np.asarray(local_rows), end - first)

    def place(x: np.ndarray) -> jax.Array:
        shape = (total, *x.shape[1:])
        where = sharding(mesh, ("images", *[None] * (x.ndim - 1)), shape)
        return jax.make_array_from_process_local_data(where, x, shape)

    return place(padded), place(mask)


def gather(x: jax.Array) -> np.ndarray:
    """The whole of a global array, on the host of every process.

    A collective where other processes hold parts of it: all of them must call it. Raises `PeerError` when one is gone.

    >>> rows, _ = parallel.shard_rows(np.ones((30, 4), np.float32), parallel.make_mesh())
    >>> float(parallel.gather(rows).sum())
    120.0
    """
    # What is whole on every device is read from one of them here; only a divided array must travel.
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x.addressable_data(0) if x.is_fully_replicated else x)
    from jax.experimental import multihost_utils

    with peers.exchanging():
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))  # the global shape, no axis of processes


def gather_each(x: np.ndarray) -> np.ndarray:
    """What every process has in its place of a small array, of the same shape everywhere: [...] -> [processes,...].

    A collective, as `gather`. Raises `PeerError` when another process is gone.

    >>> parallel.gather_each(np.array([3, 1])).tolist()
    [[3, 1]]
    """
    if jax.process_count() == 1:
        return x[None]
    from jax.experimental import multihost_utils

    with peers.exchanging():
        return np.asarray(multihost_utils.process_allgather(x))


def same_everywhere(x: np.ndarray) -> bool:
    """Whether every process has come here with the same small array; True with a single one.

    >>> parallel.same_everywhere(np.array([3, 1]))
    True
    """
    return bool((gather_each(x) == x[None]).all())  # [processes,...] against [1,...]


def barrier(name: str) -> None:
    """Wait until every process has come here; nothing happens with a single one.

    name: equal in all of them; tells several barriers apart. Raises `PeerError` when another process is gone.

    >>> parallel.barrier("features are written")
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        with peers.exchanging():
            multihost_utils.sync_global_devices(name)


_MOVED = ("parameter_axes", "parameter_shardings", "place_parameters", "placer")


def __getattr__(name: str) -> Any:
    if name in _MOVED:
        raise AttributeError(f"jaxzs.parallel knows nothing of CLIP any more; write jaxzs.clip.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
