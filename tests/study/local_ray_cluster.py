"""A Ray cluster of several nodes on this machine that loses the nodes it is told to lose: for tests.

A process of its own, because the process that starts a node gets signal handlers (in its main thread only) and exit
hooks from Ray. `python local_ray_cluster.py FOLDER` starts a head without CPUs and two nodes with one each, and writes
FOLDER/address. Each line of its input is a node's id: that node is killed, then FOLDER/ID is made. At the end of its
input, and where it is killed itself, the cluster ends.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ray.cluster_utils import Cluster

STORE = {"object_store_memory": 100_000_000}


def main(folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **STORE})
    for _ in range(2):
        cluster.add_node(num_cpus=1, **STORE)
    (folder / "address.part").write_text(cluster.address)
    os.replace(folder / "address.part", folder / "address")
    for line in sys.stdin:
        cluster.remove_node(
            next(node for node in cluster.worker_nodes if node.node_id == line.strip()), allow_graceful=False
        )
        (folder / line.strip()).touch()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
