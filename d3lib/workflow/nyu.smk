# NYU's raw archives on a cluster: one job per archive, then one that writes the store.
# `d3lib data nyu-raw ... --profile FOLDER` makes the plan and calls it with --configfile.
import shlex
import sys
from pathlib import Path

FOLDER = Path(config["folder"])
ARCHIVES = {f"{number:03d}-{Path(path).stem}": path for number, path in enumerate(config["archives"])}
D3LIB = f"{shlex.quote(sys.executable)} -m d3lib data nyu-raw {shlex.join(config['options'])}"


rule store:
    input:
        [FOLDER / "done" / name for name in ARCHIVES],
    output:
        touch(FOLDER / "done" / "store"),
    params:
        archives=shlex.join(ARCHIVES.values()),
    shell:
        "{D3LIB} --step store {params.archives}"


rule archive:
    # The directories of one archive, on all cores of the job; what is done already is left alone.
    output:
        touch(FOLDER / "done" / "{archive}"),
    params:
        archive=lambda w: ARCHIVES[w.archive],
    threads: config["threads"]
    shell:
        "{D3LIB} --step process --workers {threads} {params.archive:q}"
