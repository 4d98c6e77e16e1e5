"""A Ray cluster of a head and two nodes, as processes of this machine, until standard input ends.

`python -m tests.integration.three_nodes PORT` prints the folder of its session when it is ready.
"""

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    # The agent takes any free port: another cluster on this machine may have its usual one.
    ports = {"dashboard_port": int(sys.argv[1]), "dashboard_agent_listen_port": None}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True, **ports})
    try:
        for number in range(2):
            # Nodes of one machine have one session folder: without a folder of its own for what jobs bring along, each
            # would unpack a job over the files of which it runs on the others.
            nodes.add_node(num_cpus=2, runtime_env_dir_name=f"node_{number}")
        print(nodes.head_node.get_session_dir_path(), flush=True)
        sys.stdin.read()
    finally:
        nodes.shutdown()


if __name__ == "__main__":
    main()
