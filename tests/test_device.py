"""What a run sets on its machine, and leaves as it was."""

import pytest
import torch
from commandline import run_fresh
from test_config import composed
from test_sweep import TINY

from csgd.pipeline.device import threads_of
from csgd.pipeline.spec import machine_of


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_are_those_of_one_run():
    with threads_of(machine_of(composed("threads=1"))):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), threads_of(machine_of(composed("threads=1"))):
        raise KeyError
    assert torch.get_num_threads() == 2


def test_ranks_share_the_threads_of_a_run(tmp_path):
    (tmp_path / "counted.py").write_text(
        "import torch, nets\nclass Net(nets.Plain):\n    def forward(self, x):\n"
        "        assert torch.get_num_threads() == 1\n        return super().forward(x)\n"
    )
    more = ["model._target_=counted.Net", "distributed.nproc=2", "threads=2", "wandb=disabled", "hydra.run.dir=out"]
    paths = f"{tmp_path}:{__file__.rpartition('/')[0]}"
    run_fresh(tmp_path, *TINY[1:-1], *more, "tolerance.logits=1e9", "tolerance.deviation=1e9", PYTHONPATH=paths)


def test_what_was_compiled_for_an_earlier_run_is_forgotten():
    """Torch compiles 8 networks of one class, and runs the ninth as it is."""
    counted = []
    for _ in range(10):
        with threads_of(machine_of(composed("compile=true"))):
            net = torch.nn.Linear(2, 2)
            torch.compile(net, backend=lambda graph, _: counted.append(1) or graph.forward)(torch.zeros(1, 2))
    assert len(counted) == 10


def test_a_machine_that_cannot_compile_says_so(tmp_path):
    done = run_fresh(tmp_path, *TINY[1:-1], "model=resnet20", "wandb=disabled", "compile=true", status=2, CXX="nowhere")
    assert done.stderr.startswith("error: compile=true: torch cannot compile here: ")
    assert done.stderr.count("\n") == 1
