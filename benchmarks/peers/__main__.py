"""``python -m benchmarks.peers [NAME ...]``: builds the environments of these libraries, by default of all."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.peers.environments import PEERS, build, environments

_HELP = "Builds the environments of these libraries, by default of all. `python -m benchmarks.compare` runs them."


def main(names: Sequence[str]) -> int:
    """Build the environments of the peers or environments with these names. Returns the exit code."""
    known = environments()
    by_name = known | {peer.name: peer.environment for peer in PEERS.values()}
    if {"-h", "--help"} & set(names):
        print(f"usage: python -m benchmarks.peers [NAME ...]\n\n{_HELP}\n\nnames: {', '.join(by_name)}")
        return 0
    if unknown := [name for name in names if name not in by_name]:
        print(f"error: unknown peer {', '.join(map(repr, unknown))}; valid: {', '.join(by_name)}", file=sys.stderr)
        return 2
    chosen = list(dict.fromkeys(by_name[name] for name in names)) or list(known.values())
    failed = build(chosen, lambda line: print(line, flush=True))
    if failed:
        print(f"error: not built: {', '.join(failed)}; the others can be used", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
