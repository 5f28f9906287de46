"""Whether other processes train with this one, which TF_CONFIG or SLURM's srun tells, and their addresses."""
import json
import os
import re

import tensorflow as tf

from oasis.files import OasisError, code_digests
from oasis.replicas import Process


def make_process(names, timeout, settings, precision):
    """This process on the devices with these names, and the others that train with it, if there are any.

    timeout: see Workers. Settings, precision, code, TensorFlow and number of devices must be the same on all workers.
    """
    addresses, index = find_cluster()
    if not addresses:
        return Process(names)
    from oasis.workers import Workers  # one process alone does not need it
    facts = {"": settings, "code": code_digests("*.py", "oasis/*.py"), "TensorFlow": tf.__version__,
             "precision": precision, "devices": len(names)}
    return Workers(names, addresses, index, timeout, facts)


def find_cluster():
    """Return (addresses "host:port" of all workers, the index of this one), or ([], 0) if there is only this process.

    They come from TF_CONFIG, or else from the variables of SLURM's srun with more than one task. Raises OasisError if
    these are not valid.
    """
    if os.environ.get("TF_CONFIG"):
        addresses, index = read_tf_config(os.environ["TF_CONFIG"])
    elif os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        addresses, index = read_slurm()
    else:
        return [], 0
    return (addresses, index) if len(addresses) > 1 else ([], 0)


def read_tf_config(text):
    example = '{"cluster": {"worker": ["host0:12345", "host1:12345"]}, "task": {"type": "worker", "index": 0}}'
    try:
        config = json.loads(text)
        cluster, task = config.get("cluster", {}), config.get("task", {})
        chiefs, workers = cluster.get("chief", []), cluster.get("worker", [])
        if cluster and (set(cluster) - {"chief", "worker"} or task["type"] not in cluster):
            raise ValueError("the task types are worker and chief")
        index = len(chiefs) * (task.get("type") == "worker") + int(task.get("index", 0))
        addresses = [*chiefs, *workers]
        ports = [re.fullmatch(r".+:(\d{1,5})", address) for address in addresses]
        if addresses and (not 0 <= index < len(addresses) or not all(port and int(port[1]) < 2**16 for port in ports)):
            raise ValueError("its index or an address is not valid")
        if len(set(addresses)) < len(addresses):
            raise ValueError("it names an address twice")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OasisError(f"TF_CONFIG cannot be used ({type(error).__name__}: {error}). "
                         f"It should look like {example}") from error
    return addresses, index


def read_slurm():
    """The result of find_cluster from SLURM's variables, which TensorFlow's SlurmClusterResolver reads."""
    # Two jobs on a node must not use the same port. The system itself assigns no ports below 32768.
    first_port = 10000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000
    try:
        # By default the resolver counts the GPUs with nvidia-smi and divides them among the tasks. SLURM has divided
        # them already, and there may be none.
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
            port_base=first_port, gpus_per_node=10**4, gpus_per_task=1, auto_set_gpu=False)
        addresses = resolver.cluster_spec().as_dict()["worker"]
        # The resolver's own index is SLURM's rank. It would be wrong: the resolver sorts hosts as text, n10 before n2.
        index = addresses.index(f"{os.environ['SLURMD_NODENAME']}:{first_port + int(os.environ['SLURM_LOCALID'])}")
    except (RuntimeError, ValueError, KeyError) as error:
        raise OasisError(f"SLURM's environment variables do not describe this job step ({type(error).__name__}: "
                         f"{error}). Start the script with srun, or set TF_CONFIG.") from error
    return addresses, index
