import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.tensorflow
RUN = Path(__file__).parent / "multi_worker_run.py"


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("localhost", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start(folder, workers=1, pause=0):
    """Starts the processes of one job; their outputs go to files in `folder`."""
    folder.mkdir(exist_ok=True)
    addresses = [f"localhost:{port}" for port in free_ports(workers)]
    processes = []
    for index in range(workers):
        environment = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
        if workers > 1:
            environment["TF_CONFIG"] = json.dumps(
                {
                    "cluster": {"worker": addresses},
                    "task": {"type": "worker", "index": index},
                }
            )
        result = folder / f"worker_{index}.json"
        command = [sys.executable, str(RUN), str(folder / "run"), str(result)]
        with open(folder / f"worker_{index}.log", "w") as log:
            process = subprocess.Popen(
                [*command, str(pause)],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        processes.append(process)
    return processes


def finish(folder, processes):
    """The results of all workers, once they have ended well."""
    codes = [process.wait() for process in processes]
    logs = [(folder / f"worker_{i}.log").read_text() for i in range(len(codes))]
    assert codes == [0] * len(codes), "\n".join(log[-3000:] for log in logs)
    paths = [folder / f"worker_{index}.json" for index in range(len(codes))]
    return logs, [json.loads(path.read_text()) for path in paths]


def assert_same_results(results, alone):
    for result in results:
        assert result["replicas"] == 2
        assert "through `tlk.training.distribute_dataset`" in result["refused"]
        np.testing.assert_allclose(
            result["weights"], alone["weights"], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(result["evaluated"], alone["evaluated"], rtol=1e-5)
        for name, values in alone["history"].items():
            np.testing.assert_allclose(result["history"][name], values, rtol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    logs, results = finish(folder, start(folder))
    assert "OneDeviceStrategy on CPU:0" in logs[0]
    assert results[0]["replicas"] == 1
    return results[0]


@pytest.mark.slow
def test_two_workers_equal_one_process(alone, tmp_path):
    logs, results = finish(tmp_path, start(tmp_path, workers=2))
    assert "worker 1 of 2 workers, 2 replicas" in logs[1]
    assert_same_results(results, alone)


@pytest.mark.slow
def test_killed_worker(alone, tmp_path):
    processes = start(tmp_path, workers=2, pause=1)
    log = tmp_path / "worker_1.log"
    deadline = time.time() + 600
    while log.read_text().count("step") < 4 and time.time() < deadline:
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGKILL)
    assert processes[0].wait(timeout=600) == 1
    assert processes[1].wait() == -signal.SIGKILL
    text = (tmp_path / "worker_0.log").read_text()
    assert "WorkerLostError: Worker 0 of 2 lost another worker" in text
    assert "they go on from step" in text
    assert not (tmp_path / "worker_0.json").exists()

    # The same command again: what comes out is as if nothing had happened.
    _, results = finish(tmp_path, start(tmp_path, workers=2))
    assert_same_results(results, alone)
