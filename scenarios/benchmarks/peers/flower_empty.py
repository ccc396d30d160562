"""What Flower's simulation costs beside training: each client returns the arrays that it was sent.

python -m scenarios.benchmarks.peers.flower_empty MEGABYTES, then begin CLIENTS

One node per client, of 100; beyond 100 clients each is asked several times per round.
"""

import sys

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from scenarios.benchmarks.peers.federation import Federation, reply, simulate
from scenarios.benchmarks.peers.session import answer

NODES, TENSORS = 100, 20

app = ClientApp()


@app.train()
def echo(message: Message, _: Context) -> Message:
    return reply(message, message.content["arrays"], 1)


def main() -> None:
    server, length = ServerApp(), round(float(sys.argv[1]) * 1e6 / TENSORS / 4)

    @server.main()
    def obey(grid: Grid, _: Context) -> None:
        def begin(clients: str) -> Federation:
            asked = min(int(clients), NODES)
            turns, rest = divmod(int(clients), asked)
            if rest:
                raise SystemExit(f"more than {NODES} clients: a multiple of {NODES}")
            arrays = ArrayRecord([np.ones(length, np.float32) for _ in range(TENSORS)])
            return Federation(grid, NODES, asked, arrays, ConfigRecord(), turns)

        answer(begin, for_a_second=True)

    simulate(server, app, NODES)


if __name__ == "__main__":
    from scenarios.benchmarks.peers import flower_empty  # by its name, as in flower.py

    flower_empty.main()
