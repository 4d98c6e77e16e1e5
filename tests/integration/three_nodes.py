"""A Ray cluster of a head and two nodes, as processes of this machine, until standard input ends.

`python -m tests.integration.three_nodes PORT` prints the folder of its logs when it is ready. For each line that it
reads it kills a node, starts another, and prints a line.
"""

import sys
from pathlib import Path

from ray.cluster_utils import Cluster


def main() -> None:
    # The agent takes any free port: another cluster on this machine may have its usual one.
    ports = {"dashboard_port": int(sys.argv[1]), "dashboard_agent_listen_port": None}
    head = {"num_cpus": 0, "include_dashboard": True, **ports}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=2)
        print(Path(nodes.head_node.get_session_dir_path(), "logs"), flush=True)
        for _ in sys.stdin:
            nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
            nodes.add_node(num_cpus=2)
            print("replaced", flush=True)
    finally:
        nodes.shutdown()


if __name__ == "__main__":
    main()
