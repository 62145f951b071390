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

    from d3lib.provenance import peak_memory

    history = get_ipython().history_manager.input_hist_raw  # filled as cells are executed

    def note() -> None:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kibibytes on Linux
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit  # of the largest one
        code = "\n".join(cell.strip() for cell in history if cell.strip())
        name = hashlib.sha256(code.encode()).hexdigest()[:16]
        (Path(os.environ["BOOK_PEAKS"]) / name).write_text(str(max(peak_memory("cpu"), children)))

    atexit.register(note)


_watch_memory()
del _watch_memory
