"""The raw pipeline on small recordings in the Kinect's formats: plan, faults, resume, and what is kept."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from d3lib import cli
from d3lib.data import kinect, nyu, raw
from d3lib.data.inpaint import fill_depth
from d3lib.errors import UserError

DIRECTORIES = ("bathroom_0001", "basement_0001b", "basement_0001a")
DAMAGED = b"P5 640 480 65535\n" + b"\0" * 100


def recorded(seed):
    """A depth and a colour file's bytes: a sloping wall with holes, and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:480, :640]
    disparity = (850 + x // 8 + y // 16).astype("<u2")
    top, left = rng.integers(100, 300, 2)
    disparity[top : top + 40, left : left + 30] = kinect.INVALID
    rgb = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8) // 4 + (x // 4)[..., None].astype(np.uint8)
    return b"P5 640 480 65535\n" + disparity.tobytes(), b"P6 640 480 255\n" + rgb.tobytes()


def recording(frames, directories=DIRECTORIES, start=1_300_000_000):
    """Member → bytes of a recording with so many frames a directory."""
    members = {}
    for place, directory in enumerate(directories):
        for number in range(frames):
            second = start + 1000 * place + number / 30
            depth, rgb = recorded(100 * place + number)
            members[f"{directory}/d-{second:.6f}-{number}.pgm"] = depth
            members[f"{directory}/r-{second + 0.01:.6f}-{number}.ppm"] = rgb
            members[f"{directory}/a-{second:.6f}-{number}.dump"] = b"\0" * 36
    return members


def zipped(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    members = recording(4)
    members |= {f"kitchen_9999/{name.split('/')[1]}": data for name, data in list(members.items())[:3]}
    return zipped(tmp_path_factory.mktemp("raw") / "part1.zip", members)


def pairs_of(plan):
    return {name: len(entry["pairs"]) for name, entry in plan["directories"].items()}


def kept(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "scenes").glob("[!.]*"))}


def test_the_subset_is_equally_spaced_over_all_training_pairs_in_order_of_name(archive, tmp_path):
    plan = raw.make_plan([archive], tmp_path, raw.Recipe(frames=6))
    assert (plan["available"], plan["chosen"]) == (12, 6)
    assert pairs_of(plan) == {"basement_0001a": 2, "basement_0001b": 2, "bathroom_0001": 2}
    assert [pair.split()[0].split("-")[2] for pair in plan["directories"]["bathroom_0001"]["pairs"]] == [
        "0.pgm",
        "2.pgm",
    ]
    assert list(plan["left_out"]) == ["kitchen_9999"]  # never a scene outside the official training list
    assert raw.read_plan(tmp_path) == plan


def test_all_takes_every_pair_and_extracted_folders_give_the_same_frames(archive, tmp_path):
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "extracted")
    whole = raw.make_plan([archive], tmp_path / "a", raw.Recipe())
    assert pairs_of(whole) == dict.fromkeys(sorted(DIRECTORIES), 4)
    for place in ("extracted", "extracted/basement_0001a"):
        plan = raw.make_plan([tmp_path / place], tmp_path / place.replace("/", "-"), raw.Recipe())
        for name, entry in plan["directories"].items():
            assert entry["pairs"] == whole["directories"][name]["pairs"]
    assert list(plan["directories"]) == ["basement_0001a"]


def test_directories_may_lie_deeper_and_a_hostile_path_is_only_a_name(tmp_path):
    members = {f"../../x/{name}": data for name, data in recording(1, ["basement_0001a"]).items()}
    path = zipped(tmp_path / "deep.zip", members)
    raw.make_plan([path], tmp_path / "out", raw.Recipe())
    assert raw.process(tmp_path / "out", workers=1)["written"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep.zip", "out"]


@pytest.mark.parametrize("frames", [0, -1])
def test_a_recipe_needs_a_positive_number_of_frames(frames):
    with pytest.raises(UserError, match="at least 1"):
        raw.Recipe(frames=frames)


def test_faults_of_the_input_are_named_before_anything_is_written(archive, tmp_path):
    broken = tmp_path / "broken.zip"
    broken.write_bytes(archive.read_bytes()[:-5000])
    again = zipped(tmp_path / "again.zip", recording(1, ["basement_0001a"]))
    for archives, recipe, text in (
        ([broken], raw.Recipe(), "broken.zip: not a readable zip"),
        ([tmp_path / "none.zip"], raw.Recipe(), "none.zip: no such archive"),
        ([archive, again], raw.Recipe(), "both hold basement_0001a"),
        ([archive, archive], raw.Recipe(), "the same name and size"),
        ([archive], raw.Recipe(frames=13), "12 synchronised pairs"),
        ([], raw.Recipe(), "no archives"),
    ):
        with pytest.raises(UserError, match=text):
            raw.make_plan(archives, tmp_path / "out", recipe)
    assert not (tmp_path / "out" / "plan.json").exists()


def test_another_plan_in_the_same_folder_is_refused(archive, tmp_path):
    raw.make_plan([archive], tmp_path, raw.Recipe(frames=6))
    raw.make_plan([archive], tmp_path, raw.Recipe(frames=6))
    with pytest.raises(UserError, match="another recipe"):
        raw.make_plan([archive], tmp_path, raw.Recipe(frames=5))


def test_frames_are_projected_cropped_and_filled_and_the_mask_says_what_was_measured(archive, tmp_path):
    raw.make_plan([archive], tmp_path, raw.Recipe(frames=3, lossless=True))
    assert raw.process(tmp_path, workers=1)["written"] == 3
    name, sample = next(raw.samples(tmp_path))
    depth_bytes, rgb_bytes = recorded(200)
    rgb, depth = kinect.project(kinect.read_ppm(rgb_bytes), kinect.read_pgm(depth_bytes))
    rgb, depth = rgb[44:471, 40:601], depth[44:471, 40:601]
    assert name.startswith("basement_0001a/1300002000.")
    assert (sample["rgb"] == rgb.transpose(2, 0, 1)).all() and sample["valid"].all()
    filled = fill_depth(rgb.transpose(2, 0, 1), depth)
    assert np.abs(sample["depth"][0] - filled).max() <= 0.00051
    with zipfile.ZipFile(tmp_path / "scenes" / "basement_0001a.zip") as scene:
        mask = np.asarray(Image.open(io.BytesIO(scene.read(f"{name.split('/')[1]}.mask.png"))))
    assert (mask == ((depth > 0) & (depth < 10))).all() and 0 < mask.mean() < 1


def test_without_filling_the_holes_stay_invalid(archive, tmp_path):
    raw.make_plan([archive], tmp_path, raw.Recipe(frames=3, fill=False))
    raw.process(tmp_path, workers=1)
    for _, sample in raw.samples(tmp_path):
        assert ((sample["depth"] > 0) == sample["valid"]).all() and 0.5 < sample["valid"].mean() < 1


def test_filling_before_cropping_fills_the_whole_frame_and_is_another_answer(archive, tmp_path):
    found = []
    for order in ("crop-fill", "fill-crop"):
        raw.make_plan([archive], tmp_path / order, raw.Recipe(frames=1, order=order))
        raw.process(tmp_path / order, workers=1)
        found.append(next(raw.samples(tmp_path / order))[1]["depth"][0])
    depth_bytes, rgb_bytes = recorded(200)
    rgb, depth = kinect.project(kinect.read_ppm(rgb_bytes), kinect.read_pgm(depth_bytes))
    filled = fill_depth(rgb.transpose(2, 0, 1), depth)[44:471, 40:601]
    assert np.abs(found[1] - filled).max() <= 0.00051 < np.abs(found[0] - found[1]).max()


def test_a_bad_frame_is_skipped_with_its_reason_and_never_fatal(tmp_path):
    members = recording(3, ["basement_0001a"])
    names = [name for name in members if name.endswith("pgm")]
    members[names[0]] = DAMAGED
    members[names[1]] = b"P5 640 480 65535\n" + np.full((480, 640), 2047, "<u2").tobytes()
    path = zipped(tmp_path / "part.zip", members)
    raw.make_plan([path], tmp_path / "out", raw.Recipe())
    summary = raw.process(tmp_path / "out", workers=1)
    assert summary["written"] == 1
    assert [row["frame"].split("/")[0] for row in summary["skipped"]] == ["basement_0001a"] * 2
    assert "truncated" in summary["skipped"][0]["reason"] and "no pixel" in summary["skipped"][1]["reason"]


def test_bytes_that_changed_inside_a_zip_cost_one_frame(archive, tmp_path):
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        info = next(
            info for info in file.infolist() if info.filename.endswith("ppm") and "basement_0001a" in info.filename
        )
    content[info.header_offset + 200_000] ^= 0xFF
    path = tmp_path / "flipped.zip"
    path.write_bytes(content)
    raw.make_plan([path], tmp_path / "out", raw.Recipe())
    summary = raw.process(tmp_path / "out", workers=1)
    assert (summary["written"], len(summary["skipped"])) == (11, 1)
    assert info.filename in summary["skipped"][0]["reason"]


def test_a_member_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path):
    members = recording(2, ["basement_0001a"])
    bomb = next(name for name in members if name.endswith("pgm"))
    members[bomb] = b"P5 640 480 65535\n" + b"\0" * (1 << 29)
    path = zipped(tmp_path / "bomb.zip", members)
    raw.make_plan([path], tmp_path / "out", raw.Recipe())
    start = time.perf_counter()
    tracemalloc.start()
    summary = raw.process(tmp_path / "out", workers=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (summary["written"], len(summary["skipped"])) == (1, 1) and time.perf_counter() - start < 30
    assert peak < 1 << 28  # half of what the member unpacks to


def test_a_killed_command_continues_and_ends_in_the_same_bytes(archive, tmp_path):
    for name in ("whole", "killed"):
        raw.make_plan([archive], tmp_path / name, raw.Recipe())
    raw.process(tmp_path / "whole", workers=1)
    scenes = tmp_path / "killed" / "scenes"
    # SIGKILL comes as soon as one scene is done and the next is begun: in the middle, however fast the machine is.
    code = """
import os, pathlib, signal, sys
from d3lib.data import raw
plain, place = raw.process_frame, pathlib.Path(sys.argv[1])
def deadly(*arguments):
    if list(place.glob("scenes/[!.]*.zip")) and list(place.glob("scenes/.*.part.zip")):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*arguments)
raw.process_frame = deadly
raw.process(place, workers=1)
"""
    finished = subprocess.run([sys.executable, "-c", code, str(tmp_path / "killed")])
    assert finished.returncode == -signal.SIGKILL
    assert len(list(scenes.glob(".*.part.zip"))) == 1
    done = kept(tmp_path / "killed")
    assert 1 <= len(done) < len(DIRECTORIES)
    stamps = {name: (scenes / name).stat().st_mtime_ns for name in done}
    raw.process(tmp_path / "killed", workers=1)
    assert kept(tmp_path / "killed") == kept(tmp_path / "whole") and not list(scenes.glob(".*.part.zip"))
    assert stamps == {name: (scenes / name).stat().st_mtime_ns for name in done}  # what was done is not done again


def test_several_processes_and_one_give_the_same_bytes(archive, tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        raw.make_plan([archive], tmp_path / name, raw.Recipe(frames=6))
        lines = []
        raw.process(tmp_path / name, workers=workers, progress=lines.append)
        assert lines[0].startswith("6 frames: about") and "6/6 frames" in lines[-1]
    assert kept(tmp_path / "one") == kept(tmp_path / "two")


def test_one_archive_at_a_time_is_the_same_work(tmp_path):
    first = zipped(tmp_path / "a.zip", recording(2, ["basement_0001a"]))
    second = zipped(tmp_path / "b.zip", recording(2, ["bathroom_0001"], 1_400_000_000))
    raw.make_plan([first, second], tmp_path / "out", raw.Recipe())
    raw.process(tmp_path / "out", archives=[second], workers=1)
    assert list(kept(tmp_path / "out")) == ["bathroom_0001.zip"]
    with pytest.raises(UserError, match="basement_0001a.zip: not done yet"):
        list(raw.samples(tmp_path / "out"))
    raw.process(tmp_path / "out", archives=[first], workers=1)
    assert len(list(raw.samples(tmp_path / "out"))) == 4
    with pytest.raises(UserError, match="plan with all archives"):
        raw.process(tmp_path / "out", archives=[tmp_path / "c.zip"])


def test_a_disk_that_is_too_small_is_refused_before_and_a_full_one_leaves_no_half_file(archive, tmp_path, monkeypatch):
    raw.make_plan([archive], tmp_path, raw.Recipe())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(raw.shutil, "disk_usage", lambda path: usage(1, 1, raw.DISK_RESERVE + 1000))
    with pytest.raises(UserError, match="are needed"):
        raw.process(tmp_path, workers=1)
    calls = iter([1 << 40])
    monkeypatch.setattr(raw.shutil, "disk_usage", lambda path: usage(1, 1, next(calls, 0)))
    with pytest.raises(UserError, match="the disk is full"):
        raw.process(tmp_path, workers=1)
    assert not any((tmp_path / "scenes").glob("*.zip"))
    monkeypatch.undo()
    assert raw.process(tmp_path, workers=1)["written"] == 12


def test_a_read_error_of_the_disk_is_no_fault_of_a_frame(archive, tmp_path, monkeypatch):
    raw.make_plan([archive], tmp_path, raw.Recipe())
    read, failing = zipfile.ZipFile.open, f"basement_0001a/d-{1_300_002_000 + 2 / 30:.6f}-2.pgm"

    def open_or_fail(file, name, *rest, **options):
        if name == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file, name, *rest, **options)

    monkeypatch.setattr(zipfile.ZipFile, "open", open_or_fail)
    with pytest.raises(UserError, match="1 directories are not done .basement_0001a.*Input/output error.*goes on"):
        raw.process(tmp_path, workers=1)
    assert list(kept(tmp_path)) == ["basement_0001b.zip", "bathroom_0001.zip"]
    monkeypatch.undo()
    summary = raw.process(tmp_path, workers=1)
    assert (summary["written"], summary["skipped"]) == (12, [])


def test_where_not_one_frame_is_fit_nothing_is_kept(tmp_path):
    members = recording(2, ["basement_0001a"])
    members = {name: DAMAGED if name.endswith("pgm") else data for name, data in members.items()}
    raw.make_plan([zipped(tmp_path / "part.zip", members)], tmp_path / "out", raw.Recipe())
    for _ in range(2):
        with pytest.raises(UserError, match="none of 2 frames is fit .basement_0001a.*truncated"):
            raw.process(tmp_path / "out", workers=1)
        assert not kept(tmp_path / "out")


def test_an_archive_that_changed_since_the_plan_is_refused(tmp_path):
    path = zipped(tmp_path / "a.zip", recording(1, ["basement_0001a"]))
    raw.make_plan([path], tmp_path / "out", raw.Recipe())
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match="changed since"):
        raw.process(tmp_path / "out")
    with zipfile.ZipFile(path) as file:
        file.extractall(tmp_path / "extracted")
    raw.make_plan([tmp_path / "extracted"], tmp_path / "other", raw.Recipe())
    next((tmp_path / "extracted").rglob("*.ppm")).unlink()
    with pytest.raises(UserError, match="changed since"):
        raw.process(tmp_path / "other", workers=1)


def test_archives_are_known_again_in_any_order_and_on_another_disk(tmp_path):
    for disk in ("one", "two"):
        (tmp_path / disk).mkdir()
        zipped(tmp_path / disk / "a.zip", recording(1, ["basement_0001a"]))
        zipped(tmp_path / disk / "b.zip", recording(1, ["bathroom_0001"]))
    raw.make_plan([tmp_path / "one" / "b.zip", tmp_path / "one" / "a.zip"], tmp_path / "out", raw.Recipe())
    shutil.rmtree(tmp_path / "one")
    moved = [tmp_path / "two" / "a.zip", tmp_path / "two" / "b.zip"]
    raw.make_plan(moved, tmp_path / "out", raw.Recipe())
    assert raw.process(tmp_path / "out", archives=moved, workers=1)["written"] == 2
    zipped(tmp_path / "two" / "b.zip", recording(2, ["bathroom_0001"]))
    with pytest.raises(UserError, match="other archives"):
        raw.make_plan(moved, tmp_path / "out", raw.Recipe())


def extracted(folder, members):
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_folders_behind_links_are_found_and_links_that_lead_back_end(tmp_path):
    extracted(tmp_path / "disk", recording(1, ["basement_0001a"]))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "basement_0001a").symlink_to(tmp_path / "disk" / "basement_0001a")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    assert pairs_of(raw.make_plan([tmp_path / "in"], tmp_path / "out", raw.Recipe())) == {"basement_0001a": 1}
    assert raw.process(tmp_path / "out", workers=1)["written"] == 1


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    extracted(tmp_path / "in", recording(1, ["basement_0001a", "bathroom_0001"]))
    scandir = os.scandir

    def list_or_fail(path):
        if str(path).endswith("bathroom_0001"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", list_or_fail)
    with pytest.raises(OSError, match="bathroom_0001"):
        raw.make_plan([tmp_path / "in"], tmp_path / "out", raw.Recipe())
    assert not (tmp_path / "out").exists()


def test_a_directory_that_one_archive_holds_twice_is_refused(tmp_path):
    members = recording(1, ["basement_0001a"])
    path = zipped(tmp_path / "a.zip", members | {f"copy/{name}": data for name, data in members.items()})
    with pytest.raises(UserError, match="a.zip/basement_0001a and .*a.zip/copy/basement_0001a both hold"):
        raw.make_plan([path], tmp_path / "out", raw.Recipe())


def test_a_name_that_is_not_utf_8_is_left_out_by_name(tmp_path):
    extracted(tmp_path / "in", recording(1, ["basement_0001a", "bathroom_0001"]))
    try:
        os.rename(tmp_path / "in" / "bathroom_0001", os.fsencode(tmp_path / "in") + b"/caf\xe9_0001")
        os.makedirs(os.fsencode(tmp_path / "in") + b"/\xff")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    extracted(tmp_path, recording(1, ["basement_0001b"]))
    os.rename(tmp_path / "basement_0001b", os.fsencode(tmp_path / "in") + b"/\xff/basement_0001b")
    plan = raw.make_plan([tmp_path / "in"], tmp_path / "out", raw.Recipe())
    assert plan["left_out"] == {
        r"caf\udce9_0001": "not a directory of the official training scenes",
        r"\udcff/basement_0001b": "a name that is not UTF-8; rename the folder",
    }
    assert raw.process(tmp_path / "out", workers=1)["written"] == 1


def test_a_damaged_scene_is_made_again(archive, tmp_path):
    raw.make_plan([archive], tmp_path, raw.Recipe(frames=3))
    raw.process(tmp_path, workers=1)
    before = kept(tmp_path)
    victim = tmp_path / "scenes" / "bathroom_0001.zip"
    victim.write_bytes(victim.read_bytes()[:1000])
    raw.process(tmp_path, workers=1)
    assert kept(tmp_path) == before


def test_a_damaged_picture_is_found_and_the_same_commands_make_it_anew(archive, tmp_path):
    raw.make_plan([archive], tmp_path, raw.Recipe(frames=3))
    raw.process(tmp_path, workers=1)
    before = kept(tmp_path)
    victim = tmp_path / "scenes" / "bathroom_0001.zip"
    content = bytearray(victim.read_bytes())
    content[50_000] ^= 0xFF
    victim.write_bytes(content)
    with pytest.raises(UserError, match="bathroom_0001.zip: .* was damaged .*makes it anew"):
        raw.make_store(tmp_path, tmp_path / "store", (64, 80))
    assert not victim.exists()
    raw.process(tmp_path, workers=1)
    assert kept(tmp_path) == before and len(raw.make_store(tmp_path, tmp_path / "store", (64, 80))) == 3


def test_a_scene_of_another_choice_of_frames_is_made_again(archive, tmp_path):
    raw.make_plan([archive], tmp_path, raw.Recipe())
    raw.process(tmp_path, workers=1)
    (tmp_path / "plan.json").unlink()  # and the scenes stay
    raw.make_plan([archive], tmp_path, raw.Recipe(frames=3))
    with pytest.raises(UserError, match="not done yet"):
        list(raw.samples(tmp_path))
    assert raw.process(tmp_path, workers=1)["written"] == 3


@pytest.fixture(scope="module")
def long_recording(tmp_path_factory):
    """Three directories of 400 times the same frame: minutes of work, to be in the middle of it."""
    folder = tmp_path_factory.mktemp("long")
    for name, content in zip(("d.pgm", "r.ppm"), recorded(0), strict=True):
        (folder / name).write_bytes(content)
    for name in DIRECTORIES:
        (folder / "in" / name).mkdir(parents=True)
        for number in range(400):
            for file in ("d.pgm", "r.ppm"):
                target = folder / "in" / name / f"{file[0]}-{1000 + number}.0-{number}{file[1:]}"
                os.link(folder / file, target)
    return folder / "in"


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_a_command_that_is_told_to_end_takes_its_processes_with_it(long_recording, tmp_path, signals):
    command = [sys.executable, "-m", "d3lib", "data", "nyu-raw", str(long_recording), "--frames", "all", "--workers"]
    process = subprocess.Popen(
        [*command, "2", "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    place = raw.folder_of(tmp_path / "data", raw.Recipe()) / "scenes"
    deadline = time.monotonic() + 120
    while len(list(place.glob(".*.part.zip"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    for number in signals:
        process.send_signal(number)
        time.sleep(1)
    output = process.communicate(timeout=30)[0]  # which waits for whoever holds its standard output
    assert "Traceback" not in output and not list(place.glob("[!.]*.zip"))
    if signals[0] == signal.SIGINT:
        assert process.returncode == 130
        assert "2 directories are being finished; interrupt again" in output and "the same command" in output
    else:
        assert process.returncode == -signals[0]


def test_an_interrupt_finishes_what_is_begun_and_begins_no_more(archive, tmp_path):
    command = [sys.executable, "-m", "d3lib", "data", "nyu-raw", str(archive), "--frames", "all", "--workers", "2"]
    process = subprocess.Popen([*command, "--out", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    place = raw.folder_of(tmp_path / "data", raw.Recipe()) / "scenes"
    deadline = time.monotonic() + 120
    while len(list(place.glob(".*.part.zip"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert [path.name for path in sorted(place.glob("[!.]*.zip"))] == ["basement_0001a.zip", "basement_0001b.zip"]


def test_sets_that_differ_in_anything_have_different_names_and_the_papers_have_theirs(tmp_path):
    size = (256, 320)
    assert raw.store_of(tmp_path, raw.Recipe(12000), size).name == "nyu-12k-256x320"
    assert raw.store_of(tmp_path, raw.Recipe(), size).name == "nyu-230k-256x320"
    recipes = [
        raw.Recipe(frames, order, alpha, fill, lossless)
        for frames in (None, 12000, 7)
        for order in ("crop-fill", "fill-crop")
        for alpha in (1.0, 0.5)
        for fill in (True, False)
        for lossless in (True, False)
    ]
    for where in (lambda recipe: raw.store_of(tmp_path, recipe, size), lambda recipe: raw.folder_of(tmp_path, recipe)):
        assert len(set(map(where, recipes))) == len(recipes)


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_the_command_makes_a_store_and_does_nothing_twice(archive, tmp_path, capsys):
    command = ("data", "nyu-raw", archive, "--frames", 3, "--out", tmp_path, "--size", "64x80", "--workers", 1)
    assert run(*command) == 0
    first = capsys.readouterr().out
    assert "3 of 12 synchronised pairs" in first and "3 frames, 0 skipped" in first and "warning" not in first
    from d3lib.data.shards import open_store

    store = open_store(tmp_path / "data" / "nyu-3-64x80")
    store.verify()
    assert [name.split("/")[0] for name in store.names] == ["basement_0001a", "basement_0001b", "bathroom_0001"]
    assert {nyu.scene_of(name) for name in store.names} == {"basement_0001", "bathroom_0001"}
    assert tuple(store[0]["rgb"].shape) == (3, 64, 80) and bool(store[0]["valid"].all())
    assert store.source["directories"] == "3 of 284" and len(store.source["code"]) == 64
    stamp = (tmp_path / "data" / "nyu-3-64x80" / "store.json").stat().st_mtime_ns
    assert run(*command) == 0
    assert (tmp_path / "data" / "nyu-3-64x80" / "store.json").stat().st_mtime_ns == stamp
    assert (
        json.loads((raw.folder_of(tmp_path / "data", raw.Recipe(3)) / "plan.json").read_text())["content"]["chosen"]
        == 3
    )


def test_a_part_of_the_archives_is_not_called_the_papers_set_without_a_word(archive, tmp_path, capsys):
    assert run("data", "nyu-raw", archive, "--frames", "all", "--out", tmp_path, "--step", "plan") == 0
    assert "3 of the 284 training directories" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [("none.zip",), ("{archive}", "--frames", "99"), ("{archive}", "--frames", "few"), ("{archive}", "--workers", "0"),
     ("{archive}", "--order", "sideways"), ("{archive}", "--alpha", "0"),
     ("{archive}", "--step", "store"), ("{archive}", "--size", "0x80"),
     ("{archive}", "--alpha", "1e-300"), ("/dev/zero",),
     ("{archive}", "--frames", "3", "--profile", "missing"), ("{archive}", "--profile", ".", "--step", "plan"),
     ("{archive}", "--profile", ".", "--workers", "2")],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(arguments, archive, tmp_path, capsys):
    arguments = [argument.format(archive=archive) for argument in arguments]
    try:
        code = run("data", "nyu-raw", *arguments, "--out", tmp_path)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and len(error.strip().splitlines()) == 1 and "Traceback" not in error


def test_a_killed_worker_costs_time_and_no_frame(archive, tmp_path):
    psutil = pytest.importorskip("psutil")
    for name in ("whole", "hit"):
        raw.make_plan([archive], tmp_path / name, raw.Recipe())
    raw.process(tmp_path / "whole", workers=1)
    code = (
        "import sys, pathlib; from d3lib.data import raw\n"
        "if __name__ == '__main__': print(raw.process(pathlib.Path(sys.argv[1]), workers=2)['written'])"
    )
    script = tmp_path / "work.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "hit")], stdout=subprocess.PIPE, text=True)
    scenes, killed = tmp_path / "hit" / "scenes", False
    while process.poll() is None and not killed:
        if list(scenes.glob(".*.part.zip")):
            for child in psutil.Process(process.pid).children():
                if any("spawn_main" in word for word in child.cmdline()):
                    child.kill()
                    killed = True
                    break
        time.sleep(0.01)
    assert killed and process.wait(120) == 0 and process.stdout.read().strip() == "12"
    assert kept(tmp_path / "hit") == kept(tmp_path / "whole")


def test_a_recording_of_rooms_in_both_cameras_geometry_comes_back_as_the_truth(tmp_path):
    from d3lib.data.rooms import recording

    directories = {"living_room_0001a": [(1000, 0), (1001, 0)], "study_0001": [(1002, 0)]}
    if not set(directories) <= set(nyu.training_directories()):
        names = [name for name in nyu.training_directories() if name.endswith("a")][:2]
        directories = dict(zip(names, directories.values(), strict=True))
    recording.record(tmp_path / "rooms.zip", directories)
    raw.make_plan([tmp_path / "rooms.zip"], tmp_path / "out", raw.Recipe(fill=False, lossless=True))
    raw.process(tmp_path / "out", workers=1)
    found = dict(raw.samples(tmp_path / "out"))
    frames = [frame for name in sorted(directories) for frame in directories[name]]
    assert [name.split("/")[0] for name in found] == [n for n in sorted(directories) for _ in directories[n]]
    for sample, frame in zip(found.values(), frames, strict=True):
        rgb, depth = recording.truth(*frame)
        rgb, depth = rgb[:, 44:471, 40:601].astype(float), depth[44:471, 40:601]
        valid = sample["valid"][0]
        error = np.abs(sample["depth"][0] - depth)[valid]
        assert valid.mean() > 0.6 and np.median(error) < 0.01 and (error > 0.2).mean() < 0.02
        # the picture was distorted, undistorted and is the same scene: far nearer to it than to itself shifted
        near = np.abs(sample["rgb"] - rgb).mean()
        assert near < 0.7 * np.abs(np.roll(sample["rgb"], 4, 2) - rgb).mean()


@pytest.mark.slow
def test_a_cluster_does_one_job_an_archive_and_writes_the_same_store(tmp_path, capfd):
    first = zipped(tmp_path / "a {b}.zip", recording(2, ["basement_0001a"]))
    second = zipped(tmp_path / "c.zip", recording(2, ["bathroom_0001"], 1_400_000_000))
    profile = tmp_path / "profile"
    profile.mkdir()
    (profile / "config.yaml").write_text("jobs: 2\n")
    command = ("data", "nyu-raw", first, second, "--frames", "4", "--size", "64x80", "--out")
    assert run(*command, tmp_path / "one") == 0
    assert run(*command, tmp_path / "{jobs}", "--profile", profile) == 0
    shutil.rmtree(tmp_path / "{jobs}" / "data" / "nyu-4-64x80")
    assert run(*command, tmp_path / "{jobs}", "--profile", profile) == 0
    from d3lib.data.shards import open_store

    stores = [open_store(tmp_path / name / "data" / "nyu-4-64x80") for name in ("one", "{jobs}")]
    assert stores[0].digest == stores[1].digest and len(stores[0]) == 4


def test_a_worker_stays_below_400_megabytes(archive, tmp_path):
    raw.make_plan([archive], tmp_path, raw.Recipe(frames=6))
    code = (
        "import sys, pathlib; from d3lib.data import raw\n"
        "raw.process(pathlib.Path(sys.argv[1]), workers=1)\n"
        "assert 'torch' not in sys.modules\n"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    if not os.path.exists("/proc/self/status"):
        pytest.skip("peak memory is read from /proc, which this system lacks")
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(shown.stdout) < 400_000  # kB
