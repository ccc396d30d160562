"""What Flower's simulation costs beside training: each client returns the arrays that it was sent.

python -m scenarios.benchmarks.peers.flower_empty CLIENTS MEGABYTES _

One node per client; beyond 100 clients each of 100 nodes is asked several times per round.
"""

import sys

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from scenarios.benchmarks.peers.flower import Federation, reply, simulate
from scenarios.benchmarks.peers.session import answer
from scenarios.benchmarks.timing import times_in_a_second

NODES, TENSORS = 100, 20

app = ClientApp()


@app.train()
def echo(message: Message, _: Context) -> Message:
    return reply(message, message.content["arrays"], 1)


def main() -> None:
    clients, megabytes = int(sys.argv[1]), float(sys.argv[2])
    nodes = min(clients, NODES)
    turns, rest = divmod(clients, nodes)
    if rest:
        raise SystemExit(f"more than {NODES} clients: a multiple of {NODES}")
    server = ServerApp()

    @server.main()
    def obey(grid: Grid, _: Context) -> None:
        length = round(megabytes * 1e6 / TENSORS / 4)
        arrays = ArrayRecord([np.ones(length, np.float32) for _ in range(TENSORS)])
        federation = Federation(grid, nodes, arrays, ConfigRecord(), turns)
        answer(federation, times_in_a_second(federation.round))

    simulate(server, app, nodes)


if __name__ == "__main__":
    from scenarios.benchmarks.peers import flower_empty  # by its name, as in flower.py

    flower_empty.main()
