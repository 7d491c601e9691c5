"""torchrun for jobs that a scheduler may stop: if a signal ended the run, the exit status is 143.

    python -m tools.launcher --nproc_per_node 2 supervised_finetuning.py --model_name_or_path …

It takes torchrun's flags and differs from it in three ways. SIGUSR1 and SIGUSR2 are forwarded to the processes like
SIGTERM and SIGHUP, and a SIGHUP ignored because of nohup stays ignored. The processes get 10 minutes to finish their
step and save before they are killed; torchrun gives 30 seconds. And where torchrun exits with 1 after a signal, it
exits with 143, which tells a scheduler that the same command continues (Ctrl-C: 130).
"""

from __future__ import annotations

import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException

PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
SECONDS = "600"


def main(argv: list[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if not any(word.startswith("--signals") for word in words):
        handled = [name for name in PASSED_ON if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN]
        words = ["--signals_to_handle", ",".join(handled), *words]
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS)
    try:
        run.main(words)
    except SignalException as ended:
        print(f"ended by {ended.sigval.name}", file=sys.stderr)
        sys.exit(130 if ended.sigval == signal.SIGINT else 143)


if __name__ == "__main__":
    main()
