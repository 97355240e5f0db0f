"""What a worker's environment is decided by: who else works on the cores, control groups, SLURM."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from persistworld_cli.config.settings import LaunchSettings
from persistworld_cli.launch import environment
from persistworld_cli.launch.cgroups import cpu_limit
from persistworld_cli.launch.core_lock import claim_cores
from persistworld_cli.launch.environment import worker_environment

CPU = LaunchSettings(device="cpu")


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of four cores with two hyperthreads each, without limits."""
    monkeypatch.setattr(environment, "cpus", lambda: list(range(8)))
    monkeypatch.setattr(environment, "_siblings", lambda cpu: f"{cpu % 4},{cpu % 4 + 4}")
    monkeypatch.setattr(environment, "cpu_limit", lambda: None)


@pytest.mark.usefixtures("four_cores")
def test_threads_spin_only_where_nothing_else_runs() -> None:
    alone, beside = (worker_environment(CPU, {}, alone=alone) for alone in (True, False))
    waiting = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
    assert not alone.keys() & {*waiting, "OMP_WAIT_POLICY"} and beside.items() >= waiting.items()
    # threads that fill all cores keep their places: nothing is idle that they could move to
    assert alone["OMP_PROC_BIND"] == beside["OMP_PROC_BIND"] == "true"
    assert alone["OMP_NUM_THREADS"] == beside["OMP_NUM_THREADS"] == "4"  # the same numbers, to the last bit


@pytest.mark.usefixtures("four_cores")
def test_a_run_of_few_threads_is_bound_only_where_nothing_else_runs() -> None:
    two = LaunchSettings(device="cpu", threads=2)
    assert worker_environment(two, {}, alone=True)["OMP_PROC_BIND"] == "true"
    assert "OMP_PROC_BIND" not in worker_environment(two, {}, alone=False)  # or two runs share two cores of four


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_how_threads_wait_is_the_users_choice_first(name: str) -> None:
    child = worker_environment(CPU, {name: "7"}, alone=False)
    assert child[name] == "7" and child.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} == {name}


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(
    ("granted", "threads"), [("2", 1), ("4", 2), ("8", 4), ("64", 4), ("", 4), ("many", 4)]
)  # SLURM counts hyperthreads
def test_slurms_cores_are_all_that_is_used(granted: str, threads: int) -> None:
    assert worker_environment(CPU, {"SLURM_CPUS_PER_TASK": granted})["OMP_NUM_THREADS"] == str(threads)


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(("quota", "threads"), [(None, 4), (2.5, 3), (0.3, 1), (64.0, 4)])
def test_a_control_groups_quota_is_all_that_is_used(
    quota: float | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "cpu_limit", lambda: quota)
    assert worker_environment(CPU, {})["OMP_NUM_THREADS"] == str(threads)


def process(root: Path, cgroup: str, mounts: list[str]) -> Path:
    """A process's folder as of /proc, with its control groups."""
    folder = root / "proc"
    folder.mkdir()
    (folder / "cgroup").write_text(cgroup)
    (folder / "mountinfo").write_text("".join(f"{line}\n" for line in mounts))
    return folder


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_the_tightest_group_above_a_process_counts(tmp_path: Path) -> None:
    top = tmp_path / "unified"
    write(top / "slurm", cpu__max="300000 100000")
    write(top / "slurm" / "job", cpu__max="150000 100000")
    write(top / "slurm" / "job" / "step", cpu__max="max 100000")
    write(top / "elsewhere", cpu__max="10000 100000")
    mounts = ["22 1 0:21 / / rw - ext4 /dev/root rw", f"30 22 0:26 / {top} rw,nosuid shared:4 - cgroup2 cgroup2 rw"]
    assert cpu_limit(process(tmp_path, "0::/slurm/job/step\n", mounts)) == 1.5


def test_version_one_and_its_nested_groups(tmp_path: Path) -> None:
    top = tmp_path / "cpu,cpuacct"
    write(top, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    write(top / "docker" / "abc", cpu__cfs_quota_us="250000", cpu__cfs_period_us="100000")
    mounts = [
        f"30 22 0:26 / {top} rw - cgroup cgroup rw,cpu,cpuacct",
        f"31 22 0:27 / {tmp_path} rw - cgroup cgroup rw,cpuset",
        f"32 22 0:28 / {tmp_path} rw - cgroup2 cgroup2 rw",  # a hybrid: version 2 without the cpu controller
    ]
    groups = "5:cpuset:/\n4:cpu,cpuacct:/docker/abc\n0::/docker/abc\n"
    assert cpu_limit(process(tmp_path, groups, mounts)) == 2.5


def test_a_container_without_a_namespace_sees_its_own_group_mounted(tmp_path: Path) -> None:
    top = tmp_path / "cgroup"
    write(top, cpu__max="50000 100000")
    mounts = [f"30 22 0:26 /docker/abc {top} rw - cgroup2 cgroup2 rw"]
    assert cpu_limit(process(tmp_path, "0::/docker/abc\n", mounts)) == 0.5


def test_no_groups_no_limit(tmp_path: Path) -> None:
    assert cpu_limit(tmp_path / "nowhere") is None
    assert cpu_limit(process(tmp_path, "0::/\n", [f"30 22 0:26 / {tmp_path} rw - cgroup2 cgroup2 rw"])) is None


def hold(path: Path, cpus: list[int], ready: object, end: object) -> None:
    """Another run: claims some cores until it is told to end."""
    with claim_cores(cpus, path) as alone:
        ready.send(alone)  # type: ignore[attr-defined]
        end.recv()  # type: ignore[attr-defined]


def test_a_second_run_knows_of_the_first_until_that_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    spawn = multiprocessing.get_context("fork")
    told, tells = spawn.Pipe(duplex=False)
    ends, ending = spawn.Pipe(duplex=False)
    first = spawn.Process(target=hold, args=(path, [0, 1], tells, ends))
    first.start()
    assert told.recv() is True
    for cpus, alone in (([1, 2], False), ([2, 3], True), ([0], False)):  # some, none, one of the first one's cores
        with claim_cores(cpus, path) as found:
            assert found is alone
    ending.send(None)
    first.join()
    with claim_cores([0, 1], path) as found:
        assert found


def test_a_lock_that_cannot_be_taken_means_not_alone(tmp_path: Path) -> None:
    with claim_cores([0], tmp_path / "no" / "folder") as alone:
        assert not alone
    (tmp_path / "link").symlink_to(tmp_path / "target")  # never follow what another user may have put there
    with claim_cores([0], tmp_path / "link") as alone:
        assert not alone
    assert not (tmp_path / "target").exists()


def test_busy_cores_are_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("persistworld_cli.launch.core_lock.lock_path", lambda: tmp_path / "lock")
    monkeypatch.setattr(environment, "cpus", lambda: [1, 2])
    for shares, alone in (([100.0, 2.0, 4.0, 100.0], True), ([0.0, 90.0, 3.0, 0.0], False)):
        monkeypatch.setattr("psutil.cpu_percent", lambda interval, percpu, shares=shares: shares)
        with environment.cores_alone(CPU) as found:
            assert found is alone
    with environment.cores_alone(LaunchSettings(device="cuda")) as found:
        assert found and (tmp_path / "lock").exists()
