"""A Ray cluster of a head and two nodes, as processes of this machine, until standard input ends.

`python -m tests.integration.three_nodes PORT` prints the folder of its session when it is ready. Of what it reads, the
line `add` starts a node and the line `kill` kills one; it answers each with `done`.
"""

import sys
from typing import Any

from ray.cluster_utils import Cluster


def main() -> None:
    # The agent takes any free port: another cluster on this machine may have its usual one.
    ports = {"dashboard_port": int(sys.argv[1]), "dashboard_agent_listen_port": None}
    # A killed node is taken for dead after five seconds, not fifteen.
    config = {"_system_config": {"health_check_period_ms": 1000}}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True, **ports, **config})
    try:
        for number in range(2):
            add(nodes, number)
        print(nodes.head_node.get_session_dir_path(), flush=True)
        for number, line in enumerate(sys.stdin, start=2):
            if line.strip() == "add":
                add(nodes, number)
            else:
                nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
            print("done", flush=True)
    finally:
        nodes.shutdown()


def add(nodes: Any, number: int) -> None:
    # Nodes of one machine have one session folder: without a folder of its own for what jobs bring along, each would
    # unpack a job over the files of which it runs on the others.
    nodes.add_node(num_cpus=2, runtime_env_dir_name=f"node_{number}")


if __name__ == "__main__":
    main()
