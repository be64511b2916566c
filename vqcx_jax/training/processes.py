"""Several processes that train one model, each with its own devices, as on a TPU pod."""

import jax

from vqcx_jax.errors import UserError


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Connects this process with the others, before anything else uses a device.

    Args:
        coordinator: HOST:PORT of process 0. None: JAX finds it, and the other two, on TPU pods and
            under SLURM, Open MPI or Kubernetes.
        num_processes, process_id: how many there are, and which one this is; with coordinator only.

    Raises:
        UserError: some of the three are missing; there is nothing that JAX could find; the others
            did not come.
    """
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < 3:
        raise UserError(f"{', '.join(missing)}: must be given, too, or none of {', '.join(given)}")
    if num_processes is not None and process_id is not None and process_id >= num_processes:
        raise UserError(f"process_id={process_id}: must be below num_processes={num_processes}")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"distributed=true: {reason}") from error
