"""The environment in which the peers run: their own versions, apart from ours.

It owns how that environment is made; it must not know what is compared.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from figures import ROOT

PEERS = ROOT / "build" / "peers"
REQUIREMENTS = ROOT / "bench" / "peers.txt"


def peers_python() -> Path:
    """The interpreter of the peers' environment, made where it is missing or made for other versions."""
    made, wanted = PEERS / "requirements.txt", REQUIREMENTS.read_text(encoding="utf-8")
    python = PEERS / "venv" / "bin" / "python"
    if made.exists() and made.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making the peers' environment in {PEERS / 'venv'}", file=sys.stderr)
    shutil.rmtree(PEERS / "venv", ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", PEERS / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", REQUIREMENTS], check=True)
    made.write_text(wanted, encoding="utf-8")
    return python
