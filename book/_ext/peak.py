"""Run in the kernel of each page by way of PYTHONSTARTUP: at its end, note the most memory it has taken.

The note lies in the folder that the environment variable BOOK_PEAKS names, under a digest of the page's code.
"""


def _watch_memory() -> None:
    import atexit
    import hashlib
    import os
    import resource
    import sys
    from pathlib import Path

    from IPython import get_ipython

    history = get_ipython().history_manager.input_hist_raw  # filled as cells are executed

    def note() -> None:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kibibytes on Linux
        processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)  # of the children the largest one
        peak = max(resource.getrusage(process).ru_maxrss for process in processes) * unit
        code = "\n".join(cell.strip() for cell in history if cell.strip())
        name = hashlib.sha256(code.encode()).hexdigest()[:16]
        (Path(os.environ["BOOK_PEAKS"]) / name).write_text(str(peak))

    atexit.register(note)


_watch_memory()
del _watch_memory
