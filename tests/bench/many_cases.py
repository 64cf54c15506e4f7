# SPDX-License-Identifier: Apache-2.0
"""Runs many cases of one check and prints, as JSON, the resident bytes after so many: PORT COUNT COUNT ..."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import psutil

from harness.ports import read_ports, select_ports
from harness.runner import Options, plan, run_item, session


def main(port: str, counts: list[int]) -> None:
    here = Path.cwd()
    asked = Options(checks=["forward.logits"], backends=["torch-cpu"])
    items = [
        item
        for item in plan(select_ports(read_ports(here), [port], directory=here), asked)
        if item.route == "checkpoint"
    ]
    process, done, seed = psutil.Process(), 0, 0
    readings: dict[int, int] = {}
    with session() as shared:
        while len(readings) < len(counts):
            seed += 1
            result = run_item(items[0], Options(seed=seed), shared)
            if result.status != "passed":
                sys.exit(f"{result.status}: {result.reason}")
            done += result.examples
            if done >= counts[len(readings)]:
                gc.collect()
                readings[counts[len(readings)]] = process.memory_info().rss
    print(json.dumps(readings))


if __name__ == "__main__":
    main(sys.argv[1], [int(count) for count in sys.argv[2:]])
