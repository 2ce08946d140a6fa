"""Runs of several processes: two nodes by torchrun, tasks of SLURM; metrics do not depend on how many share them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="the extra [train] is not installed")
pytest.importorskip("sklearn", reason="the extra [train] is not installed")
pytest.importorskip("jsonargparse", reason="the extra [train] is not installed")

from sfr_ext import cli
from sfr_ext.train.records import read_rows

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")

FEW = "--data digits --limit 128 --epochs 1 --accelerator cpu --no-progress --no-tensorboard".split()
SHARES = ["--strategy", "fsdp2"]
# The command with a network without batch statistics: each process would have its own.
WITHOUT_STATISTICS = """if True:
    import sys
    from torch import nn
    from sfr_ext import cli
    from sfr_ext.train import run

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer1 = nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.ReLU())
            self.layer2 = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU())
            self.fc = nn.Linear(8, 10)

        def forward(self, x):
            return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))

    run.build_model = lambda *shape: (Net(), ("layer1", "layer2"))
    sys.exit(cli.main(sys.argv[1:]))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def started(command: list[str], **environment: str) -> subprocess.Popen[str]:
    few = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **few, **environment},
    )


def ended(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What they printed; all must end well."""
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, said, strict=True):
        assert process.returncode == 0, errors
    return [out for out, _ in said]


def result_of(out: Path) -> dict[str, float]:
    result: dict[str, float] = json.loads((out / "result.json").read_text())
    return result


@pytest.fixture(scope="module")
def by_lightning(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The same two processes, started by Lightning."""
    out = tmp_path_factory.mktemp("lightning")
    ended([started(["-m", "sfr_ext", "train", *FEW, "--batch-size", "32", "--devices", "2", "--out", str(out)])])
    return result_of(out)


def same(ours: dict[str, float], theirs: dict[str, float]) -> None:
    assert ours["devices"] == theirs["devices"] == 2
    for key in ("test_accuracy", "train_accuracy"):
        assert ours[key] == pytest.approx(theirs[key], abs=1e-12)


def test_two_nodes_by_torchrun(by_lightning: dict[str, float], tmp_path: Path) -> None:
    """The command of docs/training.md, with one process on each node, both nodes here."""
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d"]
    torchrun += ["--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--local_addr", "127.0.0.1"]
    train = ["-m", "sfr_ext", "train", *FEW, "--batch-size", "32", "--nodes", "2", "--devices", "1"]
    nodes = [started([*torchrun, *train, "--out", str(tmp_path)]) for _ in range(2)]
    assert "".join(ended(nodes)).count("wrote") == 1
    same(result_of(tmp_path), by_lightning)


def test_tasks_of_slurm(by_lightning: dict[str, float], tmp_path: Path) -> None:
    """As srun starts them: the processes know from their environment alone which of them they are."""
    slurm = {
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_LOCALID": "0",
        "MASTER_PORT": str(free_port()),
    }
    train = ["-m", "sfr_ext", "train", *FEW, "--batch-size", "32", "--nodes", "2", "--devices", "1"]
    tasks = [
        started([*train, "--out", str(tmp_path)], **slurm, SLURM_PROCID=str(rank), SLURM_NODEID=str(rank))
        for rank in range(2)
    ]
    assert "".join(ended(tasks)).count("wrote") == 1
    same(result_of(tmp_path), by_lightning)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--validation", "0.25", "--ema", "0.5"],
        [*SHARES],
        [*SHARES, "--validation", "0.25", "--optimizer", "adamw", "--lr", "0.01", "--accumulate", "2"],
    ],
    ids=["plain", "validation and ema", "shares", "shares, validation and adamw"],
)
def test_metrics_do_not_depend_on_the_number_of_processes(more: list[str], tmp_path: Path) -> None:
    """One process with batches of 32 and two with 16: the same images make each step. One has nothing to share out."""
    found = []
    for devices, size in ((1, 32), (2, 16)):
        out = tmp_path / str(devices)
        own = more[len(SHARES) :] if devices == 1 and more[:2] == SHARES else more
        options = [*FEW, *own, "--arm", "sfr", "--no-augment", "--epochs", "2", "--batch-size", str(size)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if devices == 2 else []
        script = tmp_path / "run.py"
        script.write_text(WITHOUT_STATISTICS)
        ended([started([*launcher, str(script), "train", *options, "--devices", str(devices), "--out", str(out)])])
        found.append((read_rows(out / "metrics.csv"), result_of(out)))
    (one, result), (two, other) = found
    assert result["devices"] == 1 and other["devices"] == 2
    for row, theirs in zip(one, two, strict=True):
        assert row["step"] == theirs["step"]
        for key in row:
            if "seconds" not in key:
                assert row[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), key
    assert result["test_accuracy"] == pytest.approx(other["test_accuracy"], abs=1e-12)


def test_checkpoints_of_shares_go_on_with_either_strategy(tmp_path: Path) -> None:
    """They hold whole tensors, those of the optimiser too: what follows is the same but for rounding."""
    script, out = tmp_path / "run.py", tmp_path / "shares"
    script.write_text(WITHOUT_STATISTICS)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), "train"]
    ended([started([*launcher, *FEW, *SHARES, "--batch-size", "16", "--devices", "2", "--out", str(out)])])
    content = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    kinds = {type(x) for x in [*content["state_dict"].values(), *content["optimizer_states"][0]["state"][0].values()]}
    assert kinds == {torch.Tensor}
    rows = []
    for strategy in ("ddp", "fsdp2"):
        on = ["--resume", str(out / "checkpoints" / "last.ckpt"), "--strategy", strategy, "--epochs", "2"]
        other = tmp_path / strategy
        ended([started([*launcher, *FEW, *on, "--batch-size", "16", "--devices", "2", "--out", str(other)])])
        rows.append(read_rows(other / "metrics.csv")[-1])
    for key in rows[0]:
        if "seconds" not in key:
            assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-3, abs=1e-6), key


def test_shares_are_refused_with_what_needs_whole_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    for more, word in ((["--ema", "0.9"], "--ema"), (["--monitor"], "--monitor"), (["--compile"], "--compile")):
        assert cli.main(["train", *FEW, *SHARES, *more]) == 2
        assert f"--strategy fsdp2 does not go with {word}" in capsys.readouterr().err
