"""The Slurm script with programs that stand in for Slurm's: a job that is told to stop saves, and is queued again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fp8repro.training.checkpoint import list_checkpoints, read_checkpoint

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm.sbatch"
# One task a process, as srun starts them; like Slurm, it gives the largest exit code.
SRUN = """\
#!/bin/bash
shift
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids="$pids $!"
done
echo $pids > "$STANDIN/pids"
worst=0
for pid in $pids; do wait $pid; code=$?; [ $code -gt $worst ] && worst=$code; done
exit $worst
"""
SCONTROL = '#!/bin/bash\nif [ "$1" = requeue ]; then echo "$2" > "$STANDIN/requeued"; else echo 127.0.0.1; fi\n'


def submit(folder: Path, run_dir: Path, *settings: str) -> subprocess.Popen[str]:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    place = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": place, "STANDIN": str(folder), "SLURM_NTASKS": "2", "SLURM_JOB_ID": "4711"}
    environment |= {"SLURM_JOB_NODELIST": "node1", "SLURM_CPUS_PER_TASK": "1"}
    environment["MASTER_PORT"] = str(20_000 + os.getpid() % 20_000)
    command = ["bash", str(SCRIPT), "model=resnet18", "trainer.batch_size=32", "logger=none", f"run_dir={run_dir}"]
    return subprocess.Popen(
        [*command, *settings], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_mistake_ends_the_job_for_good(tmp_path: Path) -> None:
    job = submit(tmp_path, tmp_path / "run", "modle=resnet18")
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 2, output
    assert "modle: unknown setting" in output
    assert not (tmp_path / "requeued").exists()


@pytest.mark.long
def test_a_job_whose_time_is_up_saves_and_is_queued_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = submit(tmp_path, run_dir, "trainer.epochs=50")
    deadline = time.monotonic() + 200
    while not (run_dir / "metrics.jsonl").exists() and job.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for pid in (tmp_path / "pids").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output
    assert (tmp_path / "requeued").read_text() == "4711\n"
    (saved,) = list_checkpoints(run_dir / "checkpoints")
    step = read_checkpoint(saved)["step"]
    # Queued again, it goes on from there.
    job = submit(tmp_path, run_dir, "trainer.epochs=50", f"trainer.max_steps={step + 2}")
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output
    assert read_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])["step"] == step + 2
