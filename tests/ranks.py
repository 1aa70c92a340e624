"""A pool of processes that stay, each a rank of one training run after another: starting them takes longer than a run."""

from __future__ import annotations

import io
import multiprocessing
import os
import queue
import socket
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT = 120  # seconds, for one run


class Ranks:
    """`run(n, function, *arguments)` calls the function, which a module of tests/ has, on n ranks as torchrun would."""

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["preloaded"])
        self.workers: list = []

    def run(self, n: int, function, *arguments, **options) -> list:
        """Each rank's (result, output, error): error is None or the text of its exception."""
        while len(self.workers) < n:
            self.workers.append(self._start())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(n):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0, "TORCHELASTIC_RESTART_COUNT": 0}
            self.workers[rank][1].put(({key: str(value) for key, value in environment.items()}, function, arguments, options))
        try:
            return [self.workers[rank][2].get(timeout=TIMEOUT) for rank in range(n)]
        except queue.Empty:
            self.close()  # one hangs: all start anew for the next run
            raise TimeoutError(f"{function.__name__}{arguments}: a rank was not done after {TIMEOUT} s") from None

    def _start(self):
        inbox, outbox = self.context.Queue(), self.context.Queue()
        process = self.context.Process(target=serve, args=(inbox, outbox), daemon=True)
        process.start()
        return process, inbox, outbox

    def close(self) -> None:
        for process, _, _ in self.workers:
            process.kill()
            process.join()
        self.workers = []


def serve(inbox, outbox) -> None:
    """Run what comes in, for ever."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    torch.set_num_threads(1)
    parent = os.getppid()
    while True:
        try:
            environment, function, arguments, options = inbox.get(timeout=5)
        except queue.Empty:
            if os.getppid() != parent:  # the tests were killed: no process is left behind
                return
            continue
        os.environ.update(environment)
        output = io.StringIO()
        result = error = None
        with redirect_stdout(output), redirect_stderr(output):
            try:
                result = function(*arguments, **options)
            except BaseException:
                error = output.getvalue() + traceback.format_exc()
        outbox.put((result, output.getvalue(), error))
