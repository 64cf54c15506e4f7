# SPDX-License-Identifier: Apache-2.0
"""A server of one directory, to be measured from outside: prints its port, ends with its standard input. DIRECTORY"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from harness.hub.faults import Faults
from harness.hub.journal import Journal
from harness.hub.messages import FilePart, Request, Response
from harness.hub.wire import Wire


def main(directory: Path) -> None:
    def handler(asked: Request) -> Response:
        file = directory / asked.path[0]
        if asked.method == "PUT":
            digest = hashlib.sha256()
            with file.open("wb", buffering=0) as opened:
                for chunk in asked.body.chunks(limit=2**40):
                    digest.update(chunk)
                    opened.write(chunk)
            return Response(headers={"ETag": f'"{digest.hexdigest()}"'})
        headers = {"ETag": f'"{asked.path[0]}"', "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
        return Response(headers=headers, content=FilePart(path=file, start=0, stop=file.stat().st_size))

    wire = Wire(handler, faults=Faults(), journal=Journal(), log=print, move=print)
    wire.start()
    print(wire.port, flush=True)
    sys.stdin.read()
    wire.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
