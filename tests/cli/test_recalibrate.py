"""`stillnorm recalibrate` promises: the data's statistics in a file, nothing else changed, or none.

Under torchrun: the file of one process, one voice, and no rank that ends well when another failed.
"""

from __future__ import annotations

import copy
import io
import json
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillnorm.cli.main import main

CODE = """
import os
from collections import OrderedDict

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

print("printed on import")
RANK = int(os.environ.get("RANK", 0))


def unseeded():
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 4, 3),
            bn1=nn.BatchNorm2d(4),
            act=nn.ReLU(),
            conv2=nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last),
            bn2=nn.BatchNorm2d(4),
        )
    )


def net():
    torch.manual_seed(0)
    return unseeded()


def tied():
    model = net()
    model.again = nn.Conv2d(4, 4, 1)
    model.again.weight = nn.Parameter(model.conv2.weight[:, :, :1, :1].detach())
    model.again.bias = model.conv2.bias
    return model


class Extra(nn.BatchNorm2d):
    def get_extra_state(self):
        return "not a tensor"

    def set_extra_state(self, state):
        pass


def bare():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))


def extra():
    return nn.Sequential(nn.Conv2d(3, 4, 3), Extra(4))


def data(sizes=(9, 9, 9, 9, 2)):
    g = torch.Generator().manual_seed(1)
    return [3 + i + 2 * torch.randn(n, 3, 8, 8, generator=g) for i, n in enumerate(sizes)]


def stream():
    yield from data()


def many():
    return data((4,) * 40)


def named():
    return [{"image": x} for x in data()]


def of_named(model, batch):
    return model(batch["image"])


def shuffled():
    return DataLoader(TensorDataset(torch.cat(data())), batch_size=7, shuffle=True)


def sharded():
    rows = TensorDataset(torch.cat(data()))
    return DataLoader(rows, batch_size=7, sampler=DistributedSampler(rows))


def nan():
    batches = data()
    batches[2][0] = float("nan")
    return batches


def empty():
    return []


def odd(model, batch):
    if len(batch) == 2:
        raise ValueError("an odd batch")
    return model(batch)


def only_on_rank_0():
    if RANK:
        raise OSError("no such disk")
    return data()
"""

BEFORE = b"what was there before"


@pytest.fixture
def files(project):
    (project / "cal.py").write_text(CODE)
    (project / "old.safetensors").write_bytes(BEFORE)
    return project


@pytest.fixture
def code():
    scope = {}
    exec(CODE, scope)
    return scope


def command(data="data", net="net"):
    return "recalibrate", f"cal.py:{net}", "--data", f"cal.py:{data}"


def received(net, batches, train):
    """What each norm receives, in float64: (values, channels)."""
    net = copy.deepcopy(net).double().train(train)
    seen = {name: [] for name in ("bn1", "bn2")}
    for name, values in seen.items():
        net.get_submodule(name).register_forward_pre_hook(
            lambda module, args, values=values: values.append(args[0].transpose(0, 1).flatten(1))
        )
    with torch.no_grad():
        for batch in batches:
            net(batch.double())
    return {name: torch.cat(values, 1).T for name, values in seen.items()}


def expected(net, batches, method, layers=("bn1", "bn2")):
    """The tensors that the file should hold."""
    net = copy.deepcopy(net).eval()
    for name in layers:  # in the order of the forward
        values = received(net, batches, train=method == "pooled")[name]
        norm = net.get_submodule(name)
        if method == "sequential":
            norm.running_mean.copy_(values.mean(0))
            norm.running_var.copy_(values.var(0))
        else:
            net.register_buffer(f"{name}_mean", values.mean(0).float())
            net.register_buffer(f"{name}_var", values.var(0).float())
    state = {key: t.clone() for key, t in net.state_dict().items()}
    for name in layers:
        if method == "pooled":
            state[f"{name}.running_mean"] = state.pop(f"{name}_mean")
            state[f"{name}.running_var"] = state.pop(f"{name}_var")
        state[f"{name}.num_batches_tracked"] += len(batches)
    return state


def assert_same(file, want, tolerance=1e-6):
    """Statistics to a tolerance, all else bit for bit."""
    got = load_file(file)
    assert set(got) == set(want)
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype
        if "running" in key:
            torch.testing.assert_close(got[key], tensor, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(got[key], tensor), key


@pytest.mark.parametrize("method", ["pooled", "sequential"])
def test_the_file_has_the_statistics_of_the_data_and_all_else_as_it_was(run, files, code, method):
    result = run(*command(), "--method", method, "--out", "new.safetensors")
    assert result.exit_code == 0, result.output
    assert_same(files / "new.safetensors", expected(code["net"](), code["data"](), method), 1e-5)
    assert result.stdout.startswith("2 layers recalibrated on 5 batches, 38 samples")
    assert "moved most " in result.stdout
    assert result.stderr.endswith("the model with these statistics: new.safetensors\n")


def test_without_out_nothing_is_written(run, files):
    before = sorted(files.rglob("*.*"))
    result = run(*command())
    assert result.exit_code == 0
    assert result.stdout.startswith("2 layers recalibrated")
    assert "nothing is written: --out" in result.stderr
    assert sorted(f for f in files.rglob("*.*") if f.suffix != ".pyc") == before


def test_as_json(run, files):
    told = json.loads(run(*command(), "--format", "json").stdout)
    assert [layer["path"] for layer in told["layers"]] == ["bn1", "bn2"]
    assert (told["method"], told["batches"], told["samples"]) == ("pooled", 5, 38)


def test_layers(run, files, code):
    args = (*command(), "--method", "sequential", "--out", "new.safetensors")
    assert run(*args, "--layers", "b*2").exit_code == 0
    want = expected(code["net"](), code["data"](), "sequential", layers=["bn2"])
    assert_same(files / "new.safetensors", want, 1e-5)
    several = json.loads(
        run(*command(), "--layers", "bn1", "--layers", "bn2", "--format", "json").stdout
    )
    assert len(several["layers"]) == 2


def test_weights_and_a_file_that_was_there(run, files, code):
    trained = code["unseeded"]()
    save_file({k: t.contiguous() for k, t in trained.state_dict().items()}, files / "w.safetensors")
    for out in ("old.safetensors", "w.safetensors"):
        result = run(*command(), "--weights", "w.safetensors", "--out", out)
        assert result.exit_code == 0, result.output
        assert_same(files / out, expected(trained, code["data"](), "pooled"), 1e-5)


def test_forward_and_max_batches(run, files, code):
    args = (*command("named"), "--forward", "cal.py:of_named", "--max-batches", "3")
    assert run(*args, "--out", "new.safetensors").exit_code == 0
    want = expected(code["net"](), code["data"]()[:3], "pooled")
    assert_same(files / "new.safetensors", want, 1e-5)


def test_tolerance_stops_early(run, files):
    told = json.loads(run(*command("many"), "--tolerance", "9", "--format", "json").stdout)
    assert told["batches"] == 8


def test_device(run, files):
    assert run(*command(), "--device", "cpu", "--out", "new.safetensors").exit_code == 0
    assert run(*command(), "--out", "same.safetensors").exit_code == 0
    assert (files / "new.safetensors").read_bytes() == (files / "same.safetensors").read_bytes()


def test_tensors_under_two_names_are_written_under_both(run, files, code):
    assert run(*command(net="tied"), "--out", "new.safetensors").exit_code == 0
    got, want = load_file(files / "new.safetensors"), code["tied"]().state_dict()
    assert sorted(got) == sorted(want)
    assert torch.equal(got["again.bias"], got["conv2.bias"])
    assert torch.equal(got["again.weight"], want["again.weight"])


@pytest.mark.parametrize(
    ("args", "fact"),
    [
        ((*command(), "--forward", "cal.py:odd"), "an odd batch"),
        (command("nan"), "batch 2: bn1 receives NaN"),
        (command("empty"), "there is no batch"),
        ((*command(), "--weights", "none.pt"), "none.pt cannot be read: No such file"),
        (("recalibrate", "cal.py:net", "--data", "none.py:data"), "there is no file none.py"),
        ((*command(), "--layers", "bn9"), "bn9"),
        (command(net="extra"), "1._extra_state is a str"),
        (command(net="bare"), "there is no layer to recalibrate"),
    ],
    ids=["forward", "nan", "empty", "weights", "data", "layers", "extra-state", "no-norm"],
)
def test_what_fails_is_told_and_no_file_is_touched(fails, files, args, fact):
    before = sorted(files.glob("*.*"))
    for out in ("new.safetensors", "old.safetensors"):
        assert fact in fails(*args, "--out", out)[0]
    assert sorted(files.glob("*.*")) == before
    assert (files / "old.safetensors").read_bytes() == BEFORE


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((*command(), "--out", "new.pt"), ".safetensors only"),
        ((*command(), "--out", "none/new.safetensors"), "there is no folder none"),
        (command()[:2], "Missing option '--data'"),
        ((*command(), "--tolerance", "0"), "--tolerance"),
    ],
)
def test_bad_usage_is_told_before_anything_is_loaded(run, files, args, said):
    result = run(*args)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert "printed" not in result.stderr


# ------------------------------------------------------------------------------- the bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(files, monkeypatch):
    """Run the program with stderr on a terminal; return what stood there, and stdout."""

    def run(*args):
        terminal, out = Terminal(), io.StringIO()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(sys, "stdout", out)
        main(args, standalone_mode=False)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()), out.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return run


def test_the_bar_tells_batches_rate_and_error(terminal):
    drawn, out = terminal(*command())
    assert re.search(r"━ 5/5 batches, \d+ samples/s, standard error 0\.\d+ +\d:\d\d:\d\d", drawn)
    assert "printed on import" in drawn
    assert out.startswith("2 layers recalibrated")
    assert "━" not in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((*command(), "--max-batches", "3"), r" 3/3 batches, "),
        ((*command("stream"), "--max-batches", "4"), r" 4/4 batches, "),
        (command("stream"), r" 5 batches, "),
        ((*command(), "--tolerance", "0.01"), r"standard error \S+, goal 0\.01 "),
        ((*command(), "--method", "sequential"), r" checking 2 layers, \d+ samples/s, "),
    ],
)
def test_the_bar_tells_what_is_known(terminal, args, said):
    assert re.search(said, terminal(*args)[0])


# ------------------------------------------------------------------------------- torchrun


def torchrun(args, cwd):
    """Run the program as two ranks, as torchrun does, but keep what each says apart."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "stillnorm", *args],
            cwd=cwd,
            env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        said = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *streams) for rank, streams in zip(ranks, said, strict=True)]


def test_torchrun_writes_the_file_of_one_process(run, files):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += ["--local-addr", "127.0.0.1", "--nproc-per-node", "2", "-m", "stillnorm"]
    done = subprocess.run(
        [*start, *command(), "--out", "two.safetensors"],
        cwd=files,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    alone = run(*command(), "--out", "one.safetensors")
    assert done.stdout == alone.stdout
    assert done.stderr.count("printed on import") == 1
    assert_same(files / "two.safetensors", load_file(files / "one.safetensors"), 1e-6)


def test_ranks_agree_on_the_weights_and_on_a_shuffled_order(files, code):
    """Else a batch would count twice and another not at all, of two models."""
    args = [*command("shuffled", "unseeded"), "--method", "sequential", "--out", "new.safetensors"]
    (first, out, err), (second, *silent) = torchrun(args, files)
    assert (first, second) == (0, 0), err
    assert "6 batches, 38 samples" in out
    assert silent == ["", ""]
    net = code["unseeded"]()
    net.load_state_dict(load_file(files / "new.safetensors"))
    for name, values in received(net, code["data"](), train=False).items():
        norm = net.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, values.mean(0).float(), rtol=1e-5, atol=1e-5)


def test_a_loader_that_shards_already_is_not_shared_again(files):
    (first, out, err), (second, *_) = torchrun([*command("sharded"), "--max-batches", "5"], files)
    assert (first, second) == (0, 0), err
    assert "on 5 batches, 33 samples" in out


@pytest.mark.parametrize(
    ("args", "fact"),
    [
        (command("only_on_rank_0"), "rank 1 failed: cal.py:only_on_rank_0 raised OSError"),
        (command("nan"), "batch 1: bn1 receives NaN"),
    ],
    ids=["rank 1, loading", "rank 0, running"],
)
def test_what_fails_on_one_rank_fails_on_all_and_rank_0_says_so(files, args, fact):
    (first, out, err), (second, *silent) = torchrun([*args, "--out", "old.safetensors"], files)
    assert (first, second) == (2, 2), err
    assert out == ""
    assert f"error: {fact}" in err
    assert err.count("error: ") == 1
    assert silent == ["", ""]
    assert (files / "old.safetensors").read_bytes() == BEFORE
