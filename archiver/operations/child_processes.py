"""Child processes that exit with their parent."""

import multiprocessing
import os
import signal
import threading


def exit_with_parent() -> None:
    """Exit this process when its parent process exits."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()
