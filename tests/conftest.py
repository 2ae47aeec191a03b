"""What the tests share: the scripts under test, the golden numbers, small data, a small configuration."""

import importlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from slowrun.clock import Clock
from slowrun.config import parse_flags
from slowrun.data import Split, sha256_file
from slowrun.folder import RunFolder, write_json
from slowrun.session import exit_code
from slowrun.session import launch as run_and_exit

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # the models are tiny
INSTRUMENT = (  # the modules of slowrun/
    "__init__", "clock", "config", "data", "folder", "kernels", "machine", "plan", "rules", "scoring", "session",
    "sharded", "weights", "world",
)  # fmt: skip
# Track -> module; a new track adds itself here and below
TRACKS = {"limited": "train", "tiny": "tiny.train", "two_hour": "two_hour.train"}
UNLIMITED = {"unlimited": "unlimited.train"}  # whose runs are of another kind: tests/test_unlimited.py
ALL_TRACKS = pytest.mark.parametrize("track", TRACKS | UNLIMITED, indirect=True)

V = 97  # vocabulary of the small data; the BOS is 96
COMMON = {
    "vocab_size": V, "sequence_len": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "num_epochs": 2, "swa_epochs": 1,
    "readout_epochs": 2, "batch_tokens": 1024, "micro_batch": 2, "eval_batch": 8, "log_every": 5, "dropout": 0.0,
    "lr_multiplier": 1.0, "weight_decay": 0.3,
}  # fmt: skip
SMALL = {  # flags of a run of 11 steps, two epochs of 5.5 steps, that takes a second or two
    "limited": COMMON | {"replay_start": 1, "replay_end": 2, "replay_from_epoch": 2},
    "tiny": COMMON | {"late_passes_from": 0.5, "decay_hold_epochs": 0, "decay_low_epochs": 1, "ema_every": 2},
}
SMALL["two_hour"] = SMALL["limited"] | {"window_schedule": "1-1:4,12;2-3:12,28;4-12:20,32"}
SMALL["two_hour"] |= {"meta_gradient": True, "stochastic_depth": 0.0}
SMALL["unlimited"] = {  # two chains of three cycles, of 10, 5 and 10 steps, the last two with a teacher
    name: value
    for name, value in SMALL["limited"].items()
    if name not in ("num_epochs", "swa_epochs", "readout_epochs", "replay_from_epoch")
} | {
    "chains": 2, "cycles": 3, "cycle_epochs": 1, "teach_after": 1, "fitness_tokens": 500, "outer_batch_tokens": 512,
    "replay_loops": 1, "processes_per_chain": 1,
}  # fmt: skip
NOISE = {"limited": {"dropout": 0.1, "stochastic_depth": 0.1}, "tiny": {"dropout": 0.1}}  # flags of what is random
NOISE["two_hour"] = NOISE["limited"]
# What the model switches late in a run, and how it is called before and after
STAGES = {
    "limited": ({"replay": False}, {"replay": True}),
    "tiny": ({"passes": 1}, {"passes": 2}),
    "two_hour": ({"replay": False, "windows": [4, 12]}, {"replay": True, "windows": [12, 28]}),
    "unlimited": ({"replay": False}, {"replay": True}),
}
MICRO_STEPS = {"limited": {}, "tiny": {"micro_batch": 4}, "two_hour": {}}  # as the record has, where SMALL has others


def name_of(track) -> str:
    """The name of a track, by the module of its script."""
    return next(name for name, module in (TRACKS | UNLIMITED).items() if module == track.__name__)


@pytest.fixture(params=TRACKS)
def track(request):
    """The module of a track's script; tests with this argument run once for each track."""
    return importlib.import_module((TRACKS | UNLIMITED)[request.param])


def golden(name: str) -> dict:
    return json.loads((Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden")) / f"{name}.json").read_text())


def golden_split() -> tuple[Split, dict]:
    """The training split of data.json, and what stands there of it."""
    expected = golden("data")
    random = np.random.RandomState(expected["seed"])
    lengths = random.randint(3, 60, size=expected["num_docs"])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    tokens = random.randint(0, 50256, size=lengths.sum()).astype(np.uint16)
    tokens[starts] = 50256
    assert len(tokens) == expected["num_tokens"]
    return Split(tokens, starts, 43, ""), expected


@pytest.fixture(scope="session")
def gpt2():
    """The GPT-2 tokenizer, if its vocabulary is at hand (TIKTOKEN_CACHE_DIR) or can be downloaded."""
    import prepare_data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data.time, "sleep", lambda seconds: None)
        try:
            return prepare_data.GPT2Tokenizer()
        except ValueError as error:
            return pytest.skip(f"the GPT-2 vocabulary is not at hand: {str(error).splitlines()[0][:120]}")


def flags(**values) -> list[str]:
    """{"n_layer": 4, "meta_gradient": False} -> ["--n-layer=4", "--no-meta-gradient"]"""
    named = {name.replace("_", "-"): value for name, value in values.items()}
    return [
        f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
        for name, value in named.items()
    ]


def write_data(folder: Path, tokens: dict[str, int], seed: int = 0) -> Path:
    """Splits of a Markov chain over 96 tokens in documents of 5 to 60, with meta.json."""
    import prepare_data

    random = np.random.RandomState(seed)
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, count in tokens.items():
        starts = np.concatenate([[0], np.cumsum(random.randint(5, 60, size=count))])
        starts = starts[starts < count - 1]
        values = np.empty(count, dtype=np.uint16)
        for i in range(count):
            values[i] = (values[i - 1] * 5 + random.randint(0, 4)) % (V - 1) if i else 0
        values[starts] = V - 1
        path = folder / f"fineweb_{split}.pt"
        prepare_data.save_split(path, values, starts.astype(np.int64), V - 1, split)
        splits[split] = {"tokens": count, "documents": len(starts), "sha256": sha256_file(path)}
    lengths = [1 + i % 4 for i in range(V - 1)] + [0]
    meta = {"source": "test", "revision": "0", "tokenizer": "test", "vocab_size": V, "bos_id": V - 1}
    write_json(folder / "meta.json", meta | {"splits": splits, "token_bytes": lengths})
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), {"val": 1700, "train": 6000, "holdout": 1500})


@pytest.fixture
def small(track, data_dir, tmp_path) -> dict:
    """Fields of Config for a small run in a folder of its own."""
    return SMALL[name_of(track)] | {
        "data_dir": str(data_dir),
        "runs_dir": str(tmp_path / "runs"),
        "run_name": "run",
        "device": "cpu",
    }


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing takes a fourth of a small run: pictures are of one byte, but in tests marked as drawing."""
    from matplotlib.figure import Figure

    if "draws" not in request.keywords:
        monkeypatch.setattr(Figure, "savefig", lambda figure, path, **style: Path(path).write_bytes(b"."))


def parse(track, arguments: list[str]) -> dict:
    """The fields of Config that a command line of a track's script gives."""
    of_record = getattr(track, "record_sizes", None)
    script = Path(track.__file__)
    return parse_flags(name_of(track), track.Config, track.DEMO, arguments, script, "", of_record).values


def script_of(track) -> str:
    """The path of a track's script in the repository."""
    return str(Path(track.__file__).relative_to(ROOT))


def run_main(script, arguments: list[str]) -> int:
    """The exit code of a script; script: its module."""
    return exit_code(partial(script.main, arguments), script.__file__)


def refusal(script, arguments: list[str]) -> str:
    """Why a script refuses a command line."""
    with pytest.raises(ValueError) as caught:
        script.main(arguments)
    return str(caught.value)


@contextmanager
def on_call(owner, name: str, count: int, action: Callable[[], Any]) -> Iterator[None]:
    """Call action() right before the call of this number of a function of a class or module."""
    function = getattr(owner, name)
    calls = itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == count:
            action()
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, wrapped)
        yield


def interrupt(script, method: str, count: int, number: int = signal.SIGTERM):
    """A context in which this process gets a signal when a method of the script's Training is called."""
    return on_call(script.Training, method, count, partial(signal.raise_signal, number))


@contextmanager
def fake_clock(script, scorer_s: float = 0.0) -> Iterator[None]:
    """A context in which time passes for the clock of runs as said here only.

    An optimizer step takes a second, a call of Training.scorer scorer_s, a batch of validation 100 s, and a checkpoint
    an hour.
    """
    time_s = [1000.0]

    def slowed(function, seconds: float):
        def wrapped(*args, **kwargs):
            time_s[0] += seconds
            return function(*args, **kwargs)

        return wrapped

    make_scorer = slowed(script.Training.scorer, scorer_s)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clock, "now", staticmethod(lambda: time_s[0]))
        patch.setattr(script.Training, "step", slowed(script.Training.step, 1.0))
        patch.setattr(script.Training, "scorer", lambda *args: slowed(make_scorer(*args), 100.0))
        patch.setattr(RunFolder, "save_checkpoint", slowed(RunFolder.save_checkpoint, 3600.0))
        yield


def read_metrics(folder: Path) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl as (lines of steps, lines of validations)."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "dt_s" in line], [line for line in lines if "val_loss" in line]


def read_result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def outcome(folder: Path) -> tuple[list[dict], dict, dict]:
    """Metrics, result and final weights of a run, without what may differ between two runs of the same settings."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    of_a_run = {"run", "run_id", "dt_s", "train_time_s", "wall_time_s", "tokens_per_s", "peak_memory_gib"}
    metrics = [{key: value for key, value in line.items() if key not in of_a_run} for line in metrics]
    result = {key: value for key, value in read_result(folder).items() if key not in of_a_run}
    final = {path.stem: load_file(path) for path in sorted((folder / "final").glob("*.safetensors"))}
    return metrics, result, final


def assert_same_outcome(folder: Path, reference: Path) -> None:
    """Bit for bit."""
    (metrics, result, final), (expected_metrics, expected_result, expected_final) = outcome(folder), outcome(reference)
    assert metrics == expected_metrics
    assert result == expected_result
    assert final.keys() == expected_final.keys()
    for member, weights in expected_final.items():
        assert final[member].keys() == weights.keys()
        for name, tensor in weights.items():
            assert torch.equal(final[member][name], tensor), (member, name)


def assert_agree(folder: Path, reference: Path, tolerance: float = 1e-9) -> None:
    """Metrics, losses and final weights to a tolerance, because sums over processes are rounded in another order."""
    (metrics, result, final), (expected_metrics, expected_result, expected_final) = outcome(folder), outcome(reference)
    for line, expected in zip(metrics, expected_metrics, strict=True):
        assert line.keys() == expected.keys()
        for name, value in expected.items():
            is_exact = not isinstance(value, float)
            assert line[name] == (value if is_exact else pytest.approx(value, abs=tolerance)), (name, line["step"])
    for name in ("readouts", "val_loss", "val_bpb", "best_val_loss", "holdout_loss", "holdout_bpb"):
        assert result[name] == pytest.approx(expected_result[name], abs=tolerance), name
    for name in ("stopped_by", "steps", "tokens", "val_tokens", "val_bytes", "parameters", "code_sha256"):
        assert result[name] == expected_result[name], name
    assert final.keys() == expected_final.keys()
    for member, weights in expected_final.items():
        for name, tensor in weights.items():
            assert (final[member][name] - tensor).abs().max() < 10 * tolerance, (member, name)


def in_own_process(module: str, arguments: list[str], rank: int, size: int, port: int, kill_at: int) -> None:
    """What on_processes runs in each of them."""
    torch.set_num_threads(1)
    if size > 1:
        shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
    script = importlib.import_module(module)
    sys.argv = [script.__file__, *arguments]
    kill = on_call(script.Training, "step", kill_at, partial(os.kill, os.getpid(), signal.SIGKILL))
    with kill if kill_at else nullcontext(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        run_and_exit(partial(script.main, arguments))


def on_processes(script, arguments: list[str], count: int = 1, kill_at: int = 0) -> list[int]:
    """Run a script on so many processes, without torchrun -> their exit codes. kill_at: the step that kill -9 ends.

    A server that has imported torch forks them, which saves seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", script.__name__])
    with pytest.MonkeyPatch.context() as patch:  # the server does not know of pytest's path
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    calls = [(script.__name__, arguments, rank, count, port, kill_at) for rank in range(count)]
    processes = [context.Process(target=in_own_process, args=call) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    return [process.exitcode for process in processes]


def launch(script: str, arguments: list[str], processes: int = 1, **options) -> subprocess.Popen:
    """Start a script as a user would, with torchrun if there are several processes."""
    command = [sys.executable, str(ROOT / script)]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command.append(str(ROOT / script))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("WANDB_API_KEY", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *arguments], env=environment, **pipes, **options)


def run_to_end(script: str, arguments: list[str], processes: int = 1, **options) -> str:
    process = launch(script, arguments, processes, **options)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    return output


def golden_values(parameters: dict[str, torch.Tensor], param_seed: int, n_embd: int) -> dict[str, torch.Tensor]:
    """Values for parameters by name, as tests/golden/README.md says, in their dtypes."""
    values = {}
    for k, name in enumerate(sorted(parameters)):
        shape = tuple(parameters[name].shape)
        z = np.random.RandomState(param_seed + k).standard_normal(shape)
        if name.endswith("wte.weight"):
            value = z
        elif name.endswith("_mix"):
            value = np.eye(shape[0]) + 0.1 * z
        elif name.endswith("lm_head.weight"):
            value = z / np.sqrt(n_embd)
        elif name.endswith(("resid_lambdas", "skip_weights")):
            value = 1 + 0.1 * z
        elif len(shape) == 2 and not name.endswith("xsa_alphas"):
            value = z / np.sqrt(shape[1])
        else:
            value = 0.1 + 0.1 * z
        values[name] = torch.from_numpy(value).to(parameters[name].dtype)
    return values


def set_golden_parameters(model: torch.nn.Module, param_seed: int, n_embd: int) -> None:
    """Fill a model with golden_values."""
    parameters = dict(model.named_parameters())
    for name, value in golden_values(parameters, param_seed, n_embd).items():
        parameters[name].data.copy_(value)


def figures(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Two figures per tensor, as tests/golden/README.md says: its norm and its product with a fixed random one."""
    result = {}
    for k, name in enumerate(sorted(tensors)):
        x = tensors[name].detach().double().numpy()
        fixed = np.random.RandomState(9000 + k).standard_normal(x.shape)
        result[name] = (float(np.sqrt((x**2).sum())), float((x * fixed).sum()))
    return result


def assert_figures(tensors: dict[str, torch.Tensor], expected: dict[str, list[float]], tolerance: float) -> None:
    found = figures(tensors)
    assert found.keys() == expected.keys()
    for name, (norm, product) in expected.items():
        assert abs(found[name][0] - norm) <= tolerance * norm, name
        assert abs(found[name][1] - product) <= tolerance * norm, name
