"""The batch's profiles, and the one for SLURM on a real scheduler: on this machine, with a GPU that is only claimed.

That drill runs if asked for by name, `pytest -m slurm`, as root: it installs Debian's slurm-wlm where there is none,
and ends the daemons that it started.
"""

import importlib.util
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from d3lib.artefacts import digest_file
from d3lib.batch import SNAKEFILE
from d3lib.experiments import all_runs

PROFILES = SNAKEFILE.parent / "profiles"
ETC = Path("/etc/slurm")  # the tools look here: a job's steps forget SLURM_CONF
ITEM = "lam_eigen"  # three runs of one second
CONFIGURATION = """ClusterName=drill
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MinJobAge=86400
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=32000 Gres=gpu:1
PartitionName=drill Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""  # processors and memory that the profile's jobs fit into, whatever the machine has, and one GPU


def test_runs_take_turns_on_the_gpu_of_the_local_profile(tmp_path):
    (tmp_path / "Snakefile").write_text("""
rule all:
    input: "a", "b", "c"

rule run:
    output: "{name}"
    resources: gpu=lambda w: config.get("gpus_per_run", 0)
    shell: "date +%s.%N > {output}; sleep 0.3; date +%s.%N >> {output}"
""")
    command = [sys.executable, "-m", "snakemake", "--directory", str(tmp_path), "--cores", "3", "--quiet", "all"]
    command += ["--snakefile", str(tmp_path / "Snakefile"), "--profile", str(PROFILES / "local")]
    subprocess.run(command, check=True)
    spans = sorted([float(text) for text in (tmp_path / name).read_text().split()] for name in "abc")
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


@pytest.mark.parametrize("name", ["local", "slurm"])
def test_a_profile_speaks_of_rules_that_exist(name):
    text = "".join((SNAKEFILE.parent / file).read_text() for file in ("Snakefile", "nyu.smk"))
    profile = yaml.safe_load((PROFILES / name / "config.yaml").read_text())
    named = {*profile.get("set-resources", {}), *profile.get("set-threads", {})}
    assert named <= set(re.findall(r"^rule (\w+):", text, re.MULTILINE)), "Snakemake ignores the others"


def asked(*command):
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def wait_for(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} after {seconds} s"
        time.sleep(0.5)
    return found


def free_ports():
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A cluster of one node while the tests of this module run."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.fail("the drill needs root on Debian or Ubuntu, where it may install and start SLURM", pytrace=False)
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.fail("the drill needs the extra slurm: pip install -c constraints.txt -e '.[slurm]'", pytrace=False)
    if shutil.which("slurmctld") is None or shutil.which("munged") is None:
        apt = ["apt-get", "-qq", "-y", "--no-install-recommends"]
        subprocess.run([*apt, "update"], check=True)
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run([*apt, "install", "munge", "slurm-wlm"], env=environment, check=True)
    place, ours = tmp_path_factory.mktemp("slurm"), [ETC / "slurm.conf", ETC / "gres.conf"]
    if any(path.exists() and not path.is_symlink() for path in ours):
        pytest.fail(f"{ETC} holds a configuration: this machine is part of a cluster", pytrace=False)
    text = CONFIGURATION.format(host=socket.gethostname().split(".")[0], ports=free_ports(), place=place)
    (place / "slurm.conf").write_text(text)
    os.mknod(place / "gpu0", 0o20666, os.makedev(1, 3))  # /dev/null by another name
    (place / "gres.conf").write_text(f"Name=gpu File={place}/gpu0\n")
    (place / "munge.key").write_bytes(os.urandom(128))
    (place / "munge.key").chmod(0o600)
    (place / "state").mkdir()
    for path in ours:
        path.unlink(missing_ok=True)
        path.symlink_to(place / path.name)
    munge = ["munged", "-F", "-f", f"--key-file={place}/munge.key", f"--socket={place}/munge.socket"]
    munge += [f"--pid-file={place}/munge.pid", f"--log-file={place}/munge.log", f"--seed-file={place}/munge.seed"]
    daemons = []
    try:
        for number, command in enumerate([munge, ["slurmctld", "-D"], ["slurmd", "-D"]]):
            with (place / f"{number}.log").open("wb") as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
            if number == 0:
                wait_for((place / "munge.socket").exists, 20, "munged")
        wait_for(lambda: "idle" in subprocess.getoutput("sinfo -h -o %T"), 60, f"idle node (see {place})")
        yield
        cancel_everything()
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        for path in ours:
            path.unlink()


def cancel_everything():
    asked("scancel", "--user=root")
    wait_for(lambda: not asked("squeue", "-h"), 60, "empty queue")


def jobs():
    """Each job SLURM was given so far: number -> its rule, what of it, its state, and the GPUs it asked for."""
    fields = {}
    for block in re.findall(r"^JobId=.*", asked("scontrol", "show", "job", "-o"), re.MULTILINE):
        rule = re.search(r"Comment=rule_(\w+?)(?:_wildcards_(\S+))?\s", block)
        gpus = re.search(r"TresPerJob=gres:gpu:(\d+)", block)
        fields[int(re.search(r"JobId=(\d+)", block)[1])] = {
            "rule": rule[1],
            "of": rule[2],
            "state": re.search(r"JobState=(\w+)", block)[1],
            "gpus": int(gpus[1]) if gpus else 0,
        }
    return fields


def finished(rule):
    return [job["of"] for job in jobs().values() if (job["rule"], job["state"]) == (rule, "COMPLETED")]


@pytest.mark.slurm
@pytest.mark.slow
def test_a_batch_on_slurm_goes_on_after_its_driver_and_its_jobs_were_killed(slurm, tmp_path):
    profile = tmp_path / "profile"  # the one that ships, with one line more, as the book advises
    shutil.copytree(PROFILES / "slurm", profile)
    with (profile / "config.yaml").open("a") as file:
        file.write("slurm-init-seconds-before-status-checks: 5\n")
    place = tmp_path / "runs" / "drill"
    batch = ["--budget", "drill", "--only", ITEM, "--out", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "d3lib", "reproduce", *batch, "--profile", str(profile)]
    keys = set(all_runs("drill", ITEM))
    assert len(keys) >= 3

    with (tmp_path / "first.log").open("wb") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: driver.poll() is not None or finished("run"), 900, "finished run")
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    cancel_everything()
    before = {path: (digest_file(path), path.stat().st_mtime_ns) for path in place.glob("*/record.json")}
    assert 1 <= len(before) < len(keys), (tmp_path / "first.log").read_text()
    done, first = finished("run"), jobs()

    again = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stdout
    assert {path.parent.name for path in place.glob("*/record.json")} == keys
    second = {number: job for number, job in jobs().items() if number not in first}
    assert {job["state"] for job in second.values()} == {"COMPLETED"}
    redone = {job["of"] for job in second.values() if job["rule"] == "run"}
    assert redone == keys - set(done)
    for path, known in before.items():
        if path.parent.name in done:
            assert (digest_file(path), path.stat().st_mtime_ns) == known
    assert Counter(finished("run")) == Counter(keys), "each run ended once, as a job of SLURM"
    assert all(job["gpus"] == (job["rule"] == "run") for job in jobs().values()), "a GPU for training, and only for it"
    assert not [job for job in second.values() if job["rule"] == "store"], "the rooms were rendered once"

    status = asked(sys.executable, "-m", "d3lib", "status", *batch)
    assert f"{len(keys)} runs: {len(keys)} done" in status
    print(f"\n{len(first)} jobs before the kill, {len(second)} after; runs finished before it: {len(done)}\n{status}")
