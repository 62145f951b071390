# NYU's raw archives on a cluster: one job per archive, then one that writes the store.
# `d3lib data nyu-raw ... --profile FOLDER` makes the plan and calls it with --configfile, in the plan's folder.
# Paths are the user's and may hold braces: they are never part of a pattern, and lambdas keep them from being formatted.
import re
import shlex
import sys
from pathlib import Path

ARCHIVES = {
    f"{number:03d}-{re.sub(r'[^A-Za-z0-9_.-]', '-', Path(path).name)}": path
    for number, path in enumerate(config["archives"])
}
D3LIB = f"{shlex.quote(sys.executable)} -m d3lib data nyu-raw {shlex.join(config['options'])}"


rule store:
    input:
        [f"done/{name}" for name in ARCHIVES],
    output:
        touch("done/store"),
    params:
        archives=lambda w: shlex.join(ARCHIVES.values()),
    shell:
        "{D3LIB} --step store {params.archives}"


rule archive:
    # The directories of one archive, on all cores of the job; what is done already is left alone.
    output:
        touch("done/{archive}"),
    params:
        archive=lambda w: ARCHIVES[w.archive],
    threads: config["threads"]
    shell:
        "{D3LIB} --step process --workers {threads} {params.archive:q}"
