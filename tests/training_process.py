"""The small run as a program of its own, to be killed or started by torchrun: DIR OUT JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from training_models import run

from edgellm.training import StepReport


def main() -> None:
    directory, out, how = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    at = how.pop("kill_at", 0)

    def strike(report: StepReport) -> None:
        if report.step == at:
            os.kill(os.getpid(), signal.SIGKILL)

    run(directory, out, on_progress=strike, **how)


if __name__ == "__main__":
    main()
