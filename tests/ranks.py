"""A pool of processes that stay, each a rank of one training run after another: starting them takes longer than a run."""

from __future__ import annotations

import io
import multiprocessing
import os
import queue
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
TIMEOUT = 300  # seconds, for one run on a machine that is busy with others


def meeting_point() -> tuple[TCPStore, dict[str, str]]:
    """A store where ranks can meet, as torchrun has one, and the environment that tells them where. Its port is the one that
    it is given: a port that was free a moment ago may be taken."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT))
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return store, environment


class Ranks:
    """`run(n, function, *arguments)` calls the function, which a module of tests/ has, on n ranks as torchrun would."""

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["preloaded"])
        self.workers: list = []

    def run(self, n: int, function, *arguments, **options) -> list:
        """Each rank's (result, output, error): error is None or the text of its exception."""
        if not self.workers:
            self.answers = self.context.Queue()
        while len(self.workers) < n:
            self.workers.append(self._start())
        store, environment = meeting_point()
        environment |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "GROUP_RANK": "0", "TORCHELASTIC_RESTART_COUNT": "0"}
        for rank, (_, inbox) in enumerate(self.workers[:n]):
            inbox.put(({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, function, arguments, options))
        answers: dict[int, tuple] = {}
        while len(answers) < n:
            failed = any(error for _, _, error in answers.values())
            try:
                rank, *answer = self.answers.get(timeout=30 if failed else TIMEOUT)
            except queue.Empty:
                self.close()  # one hangs: all start anew for the next run
                if not failed:
                    raise TimeoutError(f"{function.__name__}{arguments}: a rank was not done after {TIMEOUT} s") from None
                waiting = (None, "", "ended, since it waited for a rank that had failed")
                answers = {rank: answers.get(rank, waiting) for rank in range(n)}
            else:
                answers[rank] = tuple(answer)
        return [answers[rank] for rank in range(n)]

    def _start(self):
        inbox = self.context.Queue()
        process = self.context.Process(target=serve, args=(inbox, self.answers), daemon=True)
        process.start()
        return process, inbox

    def close(self) -> None:
        for process, _ in self.workers:
            process.kill()
            process.join()
        self.workers = []


def serve(inbox, answers) -> None:
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
        answers.put((int(environment["RANK"]), result, output.getvalue(), error))
