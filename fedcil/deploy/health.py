"""Whether a Flower process answers. ``python -m fedcil.deploy.health URL [CA]`` is the health check of containers.

Loads next to nothing, since it is a new process every few seconds.
"""

from __future__ import annotations

import socket
import ssl
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1"
LOCAL_NAMES = (LOOPBACK, "localhost")  # of this machine
ANSWER_S = 3.0


def healthy(url: str, ca: Path | None = None) -> bool:
    """``https://host:port/health`` (trusted by ``ca``), ``http://...``, or ``tcp://host:port``: somebody listens.
    What is on this machine is not asked through a proxy.
    """
    context = ssl.create_default_context(cafile=str(ca)) if ca else None
    parts = urlsplit(url)
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
    if parts.hostname in LOCAL_NAMES:
        handlers.append(urllib.request.ProxyHandler({}))
    try:
        if parts.scheme == "tcp":
            socket.create_connection((parts.hostname, parts.port), ANSWER_S).close()
            return True
        with urllib.request.build_opener(*handlers).open(url, timeout=ANSWER_S) as answer:
            return bool(answer.status == 200)
    except (OSError, HTTPException):  # the second: somebody else listens there
        return False


if __name__ == "__main__":
    sys.exit(0 if healthy(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None) else 1)
