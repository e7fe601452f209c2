"""Several machines: a launcher on each, here two of them on one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sfgrpo.run import records
from sfgrpo.trainer import Trainer
from tests.support import reaching

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_nodes_do_what_one_process_does(tmp_path: Path) -> None:
    """Without ssh, with a rank each."""
    changes = {"run.iterations": "2", "eval.every": "1", "sample.prompts_per_iteration": "2"}
    alone = reaching.recipe(tmp_path, lora="null", **changes)
    both = tmp_path / "both"
    path, hosts = tmp_path / "recipe.yaml", tmp_path / "hostfile"
    path.write_text(json.dumps(alone.model_dump(mode="json")))
    hosts.write_text("node-0 slots=1\nnode-1 slots=1\n")
    environment = {
        **os.environ, "PYTHONPATH": os.getcwd(), "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    command = [
        "deepspeed", "--hostfile", str(hosts), "--no_ssh", "--master_addr", "127.0.0.1",
        "--master_port", str(free_port()),
    ]  # fmt: skip
    training = ["--module", "sfgrpo.train", str(path), "--run.output_dir", str(both)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = [
        subprocess.Popen([*command, "--node_rank", str(rank), *training], env=environment, **pipes)
        for rank in range(2)
    ]
    Trainer(alone).train()
    for node in nodes:
        output, _ = node.communicate(timeout=200)
        assert node.returncode == 0, output
    for log in ("metrics.jsonl", "eval.jsonl"):
        pairs = zip(records.read(tmp_path / "run" / log), records.read(both / log), strict=True)
        for one, two in pairs:
            for name in one.keys() - {"loss", "ratio_min", "ratio_max"}:
                if "drift" not in name:
                    assert two[name] == pytest.approx(one[name], rel=2e-3, abs=2e-5), name
