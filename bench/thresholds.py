"""Writes the limits of one-shot out of records: ``thresholds.py RECORD.json...``.

The records are of ``op.py --algorithms one_shot two_shot`` on a mesh of GPUs. The limit of a record
replaces the entry for the record's device kind and number of ranks in one_shot_max_bytes.json of
this checkout. ``op.py --write-thresholds`` measures and writes at once.
"""

import argparse
import collections
import itertools
import json
import math
import operator
import sys
from pathlib import Path
from typing import Any

import common
import report

from jax_gemma_arf._src.operands import BRANCHES, THRESHOLDS

#: Of this checkout, which an installed package may not be.
FILE = common.REPOSITORY / "jax_gemma_arf" / "_src" / THRESHOLDS.name


def one_shot_max_bytes(record: report.Record) -> int:
    """Returns the largest timed size for one-shot, in bytes of partial sums on one rank.

    It is the size at which the gain of one-shot in kernel time, log(two-shot / one-shot) added up
    over all sizes to there, is largest, so that one noisy line does not end the range.

    Raises:
      ValueError: if the record did not time both algorithms over a mesh, or not on both sides of
        the limit.
    """
    if record["facts"].get("mode") != "mesh":
        raise ValueError("the record must be of a mesh of GPUs: loopback has no wire")
    gains: dict[int, float] = collections.defaultdict(float)
    for (op, width, tokens), rows in common.grouped(
        record["rows"], "op", "hidden", "tokens"
    ).items():
        kernel_us = {
            row["implementation"]: row["kernel_us"]
            for row in rows
            if row.get("kernel_us") and row.get("matches")
        }
        if {"fused one_shot", "fused two_shot"} <= kernel_us.keys():
            size = BRANCHES[f"fused_{op}"] * 2 * tokens * width
            gains[size] += math.log(kernel_us["fused two_shot"] / kernel_us["fused one_shot"])
    if not gains:
        raise ValueError("no line has both; time them with --algorithms one_shot two_shot")
    sizes = sorted(gains)
    totals = itertools.accumulate(gains[size] for size in sizes)
    gain, limit = max(zip(totals, sizes), key=operator.itemgetter(0))
    if gain <= 0 or limit == sizes[-1]:
        raise ValueError(
            f"{'two' if gain <= 0 else 'one'}-shot is faster at all sizes from {sizes[0]} to "
            f"{sizes[-1]} bytes; time {'fewer' if gain <= 0 else 'more'} --tokens as well"
        )
    return limit


def entry(record: report.Record) -> dict[str, Any]:
    """Returns the limit of a record, and where it was measured."""
    machine = record["machine"]
    measured = {"record": record["name"], "created": record["created"]}
    measured |= {key: machine[key] for key in ("gpus", "driver", "versions", "commit")}
    return {"bytes": one_shot_max_bytes(record), "measured": measured}


def write(record: report.Record, file: Path = FILE) -> None:
    """Puts the limit of a record into a file of limits, and prints it."""
    limits = json.loads(file.read_text())
    kind, ranks = record["facts"]["device"], str(record["facts"]["ranks"])
    try:
        limits.setdefault(kind, {})[ranks] = entry(record)
    except ValueError as error:
        sys.exit(f"{record['name']}: {error}")
    common.save(limits, file)
    print(f"one-shot up to {limits[kind][ranks]['bytes']} bytes, {kind}, {ranks} ranks: {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the limits of one-shot out of records.")
    parser.add_argument("records", type=Path, nargs="+")
    for path in parser.parse_args().records:
        write(report.read(path))


if __name__ == "__main__":
    main()
