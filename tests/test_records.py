"""The history can be run: each published record's settings are its recipe, and each technique of it is as described."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import COMMON, ROOT, SMALL, TRACKS, FakeTime, V, flags, parse, read_metrics, run_to_end, write_data

import model as root
import tiny.train as tiny
import train
import two_hour.train as two_hour
import unlimited.train as unlimited
from slowrun import config as run_config
from slowrun import folder as run_folder
from slowrun.data import load_split

MODULES = {"limited": train, "tiny": tiny, "two_hour": two_hour}

# The recipes, forward: what the first record has, in all that later ones change, and what each then changes. The files
# in records/ say it backward, by what differs from the current record.
START = {
    "limited": {
        "num_epochs": 12, "micro_batch": 4, "lr_multiplier": 0.25, "matrix_lr": 0.08, "scalar_lr": 0.5,
        "embedding_lr": 0.3, "head_lr": 0.004, "weight_decay": 1.6, "decay_schedule": False, "dropout": 0.1,
        "stochastic_depth": 0.0, "warmdown": 0.5, "warmdown_shape": "linear", "logit_cap": 15.0, "mlp": "relu2",
        "value_embedding": "table", "proj_init": "zero", "u_net": False, "head_gates": False, "head_mixes": False,
        "exclusive": False, "shuffle": "none", "readout": "last", "swa_epochs": 0, "replay_from_epoch": 0,
        "replay_start": 15, "replay_end": 21, "mtp_weight": 0.0, "row_norm": False, "meta_gradient": False,
        "n_layer": 30, "n_embd": 1792, "n_head": 14, "window_pattern": "SSSL", "seed": 42, "batch_tokens": 524288,
    },
    "tiny": {
        "num_epochs": 16, "micro_batch": 16, "lr_multiplier": 1.0, "matrix_lr": 0.04, "scalar_lr": 0.25,
        "embedding_lr": 0.15, "head_lr": 0.001, "weight_decay": 0.8, "decay_schedule": False, "dropout": 0.1,
        "warmdown": 0.5, "logit_cap": 15.0, "mlp": "relu2", "u_net": False,
        "head_gates": False, "half_rotary": False, "key_offset": False, "resid_init": 1.0, "xsa_layers": 0,
        "shuffle": "micro_steps", "readout": "last", "swa_epochs": 0, "late_passes": 1, "mtp_weight_1": 0.0,
        "mtp_weight_2": 0.0, "head": "plain", "meta_gradient": False, "n_layer": 16, "n_embd": 1024, "n_head": 8,
        "window_pattern": "SSSL", "seed": 42, "batch_tokens": 524288,
    },
}  # fmt: skip
CHANGES = {
    "limited": {
        2: {"shuffle": "micro_steps"},
        3: {"value_embedding": "projection"},
        4: {"mlp": "swiglu"},
        5: {"u_net": True},
        6: {"head_gates": True},
        7: {"replay_from_epoch": 10, "replay_loops": 1, "warmdown": 0.4},
        8: {"replay_loops": 2},
        9: {"exclusive": True},
        10: {"matrix_lr": 0.04, "scalar_lr": 0.1, "embedding_lr": 0.15, "head_lr": 0.002, "warmdown": 0.2},
        11: {"exclusive": False, "readout": "ema", "replay_from_epoch": 7, "logit_cap": 10.0, "weight_decay": 1.3},
        12: {"readout": "average", "readout_epochs": 3},
        13: {"swa_epochs": 3},
        14: {"proj_init": "normal"},
        15: {"stochastic_depth": 0.05},
        16: {"mtp_weight": 0.3, "num_epochs": 11},
        17: {"head_mixes": True, "mix_lr": 0.02},
        18: {"row_norm": True},
        19: {"shuffle": "documents"},
        20: {"decay_schedule": True, "warmdown_shape": "sqrt"},
        21: {"meta_gradient": True, "meta_step": 0.5, "dropout": 0.05, "stochastic_depth": 0.0},
    },
    "tiny": {
        2: {"mlp": "swiglu"},
        3: {"u_net": True},
        4: {"head_gates": True},
        5: {"warmdown": 0.6},
        6: {"half_rotary": True, "key_offset": True, "resid_init": 1.1},
        7: {
            "decay_schedule": True, "decay_hold_epochs": 2, "decay_low_epochs": 8, "decay_low": 0.1, "decay_end": 1.25
        },
        8: {"readout": "ema", "ema_epoch_decay": 0.15, "ema_every": 10},
        9: {"micro_batch": 32, "lr_multiplier": 0.8, "swa_epochs": 4, "readout": "average", "readout_epochs": 4},
        10: {"shuffle": "documents"},
        11: {"xsa_layers": 6},
        12: {
            "late_passes": 2, "late_passes_from": 0.7, "num_epochs": 15, "warmdown": 0.4, "decay_end": 0.93,
            "xsa_layers": 0,
        },
        13: {
            "xsa_layers": -1, "mtp_weight_1": 0.5, "mtp_weight_2": 0.25, "mtp_until": 0.66, "head": "auto",
            "num_epochs": 16, "warmdown": 0.6, "decay_end": 1.25, "late_passes": 1,
        },
        14: {"num_epochs": 15, "warmdown": 0.4, "decay_end": 0.93, "late_passes": 2},
        15: {"meta_gradient": True, "meta_step": 0.5},
    },
    "two_hour": {
        2: {"head_mixes": True, "mix_lr": 0.02},
        3: {"row_norm": True},
        4: {"decay_schedule": True, "warmdown_shape": "sqrt"},
        5: {"window_schedule": "1-6:256,768;7-13:768,1792;14-22:1280,2048"},
        6: {"shuffle": "documents"},
    },
}  # fmt: skip
TRAINED_LONGER = {"num_epochs": 22, "replay_from_epoch": 14, "swa_epochs": 8, "readout_epochs": 11}
RECORDS = [
    (track, number) for track, last in (("limited", 21), ("tiny", 15), ("two_hour", 6)) for number in range(1, last + 1)
]
EACH = pytest.mark.parametrize(("name", "number"), RECORDS)


def recipe(name: str, number: int) -> dict:
    """All that the records of a track differ in, of one of them."""
    values = dict(START.get(name, {}))
    if name == "two_hour":  # limited 16, trained longer, with the limited track's windows
        values = recipe("limited", 16) | TRAINED_LONGER | {"window_schedule": "1-22:1024,2048"}
    for later in range(2, number + 1):
        values |= CHANGES[name][later]
    return values


def read_record(track, number: int) -> dict:
    return run_config.read_record(track.Config, ROOT / "records" / track.TRACK, number)


def settings(name: str, number: int) -> dict:
    return read_record(MODULES[name], number)


@EACH
def test_settings_are_the_recipe(name, number):
    config = MODULES[name].Config(**settings(name, number))
    expected = recipe(name, number)
    assert {key: getattr(config, key) for key in expected} == expected
    assert all(value != getattr(MODULES[name].Config, key) for key, value in settings(name, number).items())


def test_every_setting_that_a_file_names_is_in_a_recipe():
    for name, number in RECORDS:
        assert settings(name, number).keys() <= recipe(name, number).keys(), (name, number)


def test_two_neighbours_differ_in_what_the_later_one_changed():
    """So that a reader learns the change from the difference of two short files."""
    for name, number in RECORDS:
        if number > 1:
            before, after = (
                dataclasses.asdict(MODULES[name].Config(**settings(name, n))) for n in (number - 1, number)
            )
            changed = {key for key in after if after[key] != before[key]}
            assert changed and changed <= CHANGES[name][number].keys(), (name, number, changed)


def expected_parameters(name: str, number: int) -> int:
    """Counted by the recipe, not by the model."""
    c = recipe(name, number)
    V, L, C, H, hidden = 50304, c["n_layer"], c["n_embd"], c["n_head"], {1792: 4864, 1024: 2816}[c["n_embd"]]
    mlp = 8 * C * C if c["mlp"] == "relu2" else 3 * C * hidden
    with_ve, blocks = L // 2, L
    total = 2 * V * C + 2 * L + with_ve * 32 * H
    total += with_ve * (V * C if c.get("value_embedding") == "table" else C * C) + (L // 2) * c["u_net"]
    if c.get("mtp_weight"):
        total, blocks = total + 2 * C * C, L + 1
    total += blocks * (4 * C * C + mlp + 12 * H * c["head_gates"] + 3 * H * H * c.get("head_mixes", False))
    if name == "tiny":
        total += H * (L if c["xsa_layers"] < 0 else c["xsa_layers"])
    return total


@EACH
def test_parameters_at_full_size(name, number):
    with torch.device("meta"):
        parameters = MODULES[name].GPT(MODULES[name].Config(**settings(name, number))).parameters()
    assert sum(p.numel() for p in parameters) == expected_parameters(name, number)


def test_the_published_sizes():
    assert [round(expected_parameters("limited", n) / 1e9, 1) for n in (1, 2, 3, 21)] == [2.7, 2.7, 1.4, 1.4]
    assert 0.3e9 < expected_parameters("tiny", 1) < 0.32e9


@pytest.fixture(scope="session")
def few_tokens(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("few"), {"val": 400, "train": 2400, "holdout": 400})


def toy_flags(name: str, number: int, data: Path, runs: Path) -> list[str]:
    """Flags that make a record a run of 4 steps. Only sizes: techniques are the record's, what it is without is off."""
    full, sizes = (
        recipe(name, number),
        {key: SMALL[name][key] for key in SMALL[name].keys() - {"weight_decay", "dropout"}},
    )
    sizes = {key: value for key, value in sizes.items() if full.get(key, True)}
    sizes |= {"data_dir": str(data), "runs_dir": str(runs), "run_name": "run", "device": "cpu", "weight_decay": 0.3}
    if name == "two_hour" and ";" not in full["window_schedule"]:
        sizes["window_schedule"] = "1-9:16,32"
    if full.get("xsa_layers", 0) > 0:
        sizes["xsa_layers"] = 1
    unused = []
    if not full["decay_schedule"]:  # their defaults do not fit, and need not
        unused = ["decay_hold_epochs", "decay_low_epochs"]
    for key in [
        "meta_gradient",
        "stochastic_depth",
        *unused,
        *(["readout_epochs"] if full["readout"] != "average" else []),
    ]:
        sizes.pop(key, None)
    return ["--record", str(number), *flags(**sizes)]


@EACH
def test_every_record_trains(name, number, few_tokens, tmp_path):
    """A few steps; the loss falls, the readout is the declared one, and the members give it again."""
    track = MODULES[name]
    assert track.main(toy_flags(name, number, few_tokens, tmp_path)) == 0
    steps, _ = read_metrics(tmp_path / "run")
    result = json.loads((tmp_path / "run/result.json").read_text())
    losses, c = [line["train_loss"] for line in steps], recipe(name, number)
    assert len(steps) == 4 and all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.02
    saved = json.loads((tmp_path / "run/config.json").read_text())["config"]
    techniques = [key for key, value in c.items() if isinstance(value, str | bool) and key != "window_schedule"]
    numbers = ("mtp_weight", "stochastic_depth", "late_passes", "mtp_weight_1", "dropout")
    techniques += [key for key in numbers if key in c]
    assert {key: saved[key] for key in techniques} == {key: c[key] for key in techniques}
    for key in {"replay_from_epoch", "swa_epochs", "xsa_layers"} & c.keys():
        assert bool(saved[key]) == bool(c[key]), key
    declared = {"average": ("probability_average", "weight_average"), "last": ("last", "last")}
    declared["ema"] = ("last_blended", "exponential_moving_average")
    assert result["val_loss"] == result["readouts"][declared[c["readout"]][name == "tiny"]]
    sequences = torch.from_numpy(load_split(str(few_tokens), "val", V, 32).sequences(33).astype(np.int64))
    probabilities = 0
    for weight, log_probs in track.load_members(tmp_path / "run", "cpu"):
        found = log_probs(sequences[:, :-1]).gather(-1, sequences[:, 1:, None])
        probabilities = probabilities + weight * found.double().exp()
    assert -probabilities.log().mean().item() == pytest.approx(result["val_loss"], abs=1e-6)


ENSEMBLES = {  # what the ensembles' records changed, from eight models of limited 2 on
    2: {"chains": 8, "cycles": 1, "cycle_epochs": 12, "selection": "uniform", "average": "logit", "teach_after": 0},
    3: {"value_embedding": "projection", "mlp": "swiglu"},
    4: {"u_net": True, "head_gates": True},
    5: {"cycle_epochs": 18},
    6: {
        "chains": 1, "cycles": 8, "members": "independent", "teach_after": 1, "teach_weight": 0.5,
        "teach_temperature": 1.0,
    },
    7: {
        "cycles": 10, "first_cycle_epochs": 18, "cycle_epochs": 24, "teach_weight": 0.7, "replay_from": 0.75,
        "replay_start": 15, "replay_end": 21, "replay_loops": 3, "leave_out_first": True,
    },
    8: {"cycles": 12, "teach_weight": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("number", ENSEMBLES)
def test_settings_of_the_ensembles_are_the_recipe(number):
    config, schedules = unlimited.Config(**read_record(unlimited, number)), ("warmdown", "warmdown_shape", "readout")
    expected = {key: value for key, value in recipe("limited", 2).items() if hasattr(config, key)}
    expected = {key: value for key, value in expected.items() if key not in (*schedules, "replay_start", "replay_end")}
    expected |= {"outer_batch_tokens": 524288, "clip": 0.0, "warmdown": 0.5, "lr_low": 0.0, "decay_low": 1.0}
    expected["replay_from"] = 1.0
    for later in range(2, number + 1):
        expected |= ENSEMBLES[later]
    assert {key: getattr(config, key) for key in expected} == expected
    assert read_record(unlimited, 12) == {}


def test_a_record_of_ensembles_trains(few_tokens, tmp_path):
    """The last whose settings this script has: a chain of taught models, the first left out, logits averaged."""
    sizes = {key: SMALL["unlimited"][key] for key in COMMON.keys() & SMALL["unlimited"].keys() - {"dropout"}}
    sizes |= {"replay_start": 1, "replay_end": 2, "cycles": 3, "cycle_epochs": 1, "first_cycle_epochs": 1}
    sizes |= {"outer_batch_tokens": 1024, "fitness_tokens": 300, "data_dir": str(few_tokens), "runs_dir": str(tmp_path)}
    assert unlimited.main(["--record=8", "--run-name=run", "--device=cpu", *flags(**sizes)]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["candidates"], result["mixing"], result["leave_out_first"]) == (2, "logit", True)
    assert result["val_loss"] == result["readouts"]["logit_average"] < math.log(V)


def small_model(track, **changes):
    sizes = {"replay_start": 2, "replay_end": 3} if track is not tiny else {}
    model = track.GPT(track.Config(**SMALL[track.TRACK] | {"n_layer": 4} | sizes | changes)).double()
    torch.manual_seed(0)
    model.init_weights()
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("name", TRACKS)
def test_no_position_of_the_oldest_model_sees_the_future(name):
    changes = {key: value for key, value in settings(name, 1).items() if key in root.GPTConfig.__dataclass_fields__}
    changes |= {key: settings(name, 1)[key] for key in ("half_rotary", "key_offset", "xsa_layers") if name == "tiny"}
    model = small_model(MODULES[name], **changes | {"exclusive": True} if name != "tiny" else changes)
    tokens = torch.randint(V, (2, 32), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 17:] = (changed[0, 17:] + 1) % V
    before, after = model.log_probs(tokens), model.log_probs(changed)
    assert torch.equal(before[0, :17], after[0, :17]) and torch.equal(before[1], after[1])
    assert not torch.allclose(before[0, 17], after[0, 17])


@pytest.mark.parametrize("i", [0, 1])
def test_exclusive_attention_in_a_layer(i):
    """Written out, in a layer without a value embedding and in one with: what stays is at right angles to the value."""
    model = small_model(train, exclusive=True, head_mixes=False)
    w, x, ve = model.weights()[f"h.{i}"], torch.randn(2, 8, 32).double(), torch.randn(2, 8, 32).double()
    ve = ve if "ve_gate" in w else None
    assert (ve is None) == (i == 0)
    v = F.linear(x, w["qkv"])[..., 64:].view(2, 8, 2, 16)
    if ve is not None:
        v = v + 2 * torch.sigmoid(F.linear(x, w["ve_gate"]))[..., None] * ve.view(2, 8, 2, 16)
    settings = {key: value for key, value in model._settings(32).items() if key != "dropout_p"}
    found = root.attention(w, x, ve, model.rotary(8), **settings)
    qk = (t.view(2, 8, 2, 16) for t in F.linear(x, w["qkv"])[..., :64].chunk(2, dim=-1))
    y = root.attend(*(root.norm(root.rotate(t, model.rotary(8))) for t in qk), v, 32, "sdpa")
    y = y - (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True) * v
    y = y * torch.sigmoid(F.linear(x[..., :12], w["attn_gate"]))[..., None]
    torch.testing.assert_close(found, F.linear(y.flatten(2), w["attn_proj"]))


def test_initial_values():
    for normal in (True, False):
        fresh = train.GPT(train.Config(**SMALL["limited"] | {"proj_init": "normal" if normal else "zero"}))
        fresh.init_weights()
        projections = [p for name, p in fresh.named_parameters() if "c_proj" in name]
        assert len(projections) == 6 and all(bool(p.any()) == normal for p in projections)
    for value in (1.0, 1.1):
        fresh = tiny.GPT(tiny.Config(**SMALL["tiny"] | {"resid_init": value}))
        fresh.init_weights()
        assert fresh.resid_lambdas.tolist() == [pytest.approx(value)] * 2


def test_row_norm_is_the_configs():
    for name, track, on in (("limited", train, True), ("limited", train, False), ("tiny", tiny, False)):
        config = track.Config(**SMALL[name] | ({"row_norm": on} if track is train else {}))
        names = [name for name, _ in track.GPT(config).named_parameters()]
        groups = track.optimizer_groups(config, names)
        assert {group["row_norm"] for group in groups if group["kind"] == "muon"} == {on}


def test_memory_and_disk_of_the_settings():
    """At full size in bfloat16, on 8 processes: what tables and an average add, counted by hand."""

    def sizes(**changes) -> tuple[int, float, float]:
        config = train.Config(**changes)
        total, static, _ = train.memory_gib(config, 8, torch.bfloat16)
        return total, static * 2**30, train.disk_gib(config, torch.bfloat16)[1] * 2**30

    (total, static, checkpoint), tables, ema = sizes(), sizes(value_embedding="table"), sizes(readout="ema")
    table = 15 * 50304 * 1792
    more = table - 15 * 1792**2
    assert tables[0] - total == more and ema[0] == total
    # masters and two gradients; moments, two of tables; a moved copy of what is no table; bfloat16 for computing
    assert tables[1] - static == pytest.approx(4 * (3 * more + (more + table) / 8 + more - table) + 2 * more)
    assert ema[1] - static == pytest.approx(4 * total / 8) and ema[2] - checkpoint == pytest.approx(4 * total)


def test_squared_relu():
    model = small_model(train, mlp="relu2")
    mlp, x = model.transformer.h[0].mlp, torch.randn(2, 5, 32).double()
    assert mlp.c_fc.weight.shape == (128, 32) and mlp.c_gate is None
    expected = F.linear(F.linear(x, mlp.c_fc.weight).clamp_min(0) ** 2, mlp.c_proj.weight)
    torch.testing.assert_close(root.mlp(model.weights()["h.0"], x), expected)


def test_value_tables():
    model = small_model(train, value_embedding="table")
    tokens, w = torch.randint(V, (2, 8)), model.weights()
    assert sorted(model.ve_tables) == ["1", "3"] and len(model.ve_projs) == 0
    found = root.value_embedding(w["io"], 3, tokens, torch.zeros(2, 8, 32).double())
    assert torch.equal(found, model.ve_tables["3"].weight[tokens])
    groups = train.optimizer_groups(train.Config(**SMALL["limited"]), [name for name, _ in model.named_parameters()])
    group, wte = (next(g for g in groups if n in g["params"]) for n in ("ve_tables.3.weight", "transformer.wte.weight"))
    assert group == wte | {"params": ["ve_tables.3.weight"]} and group["kind"] == "adamw" and not group["moved"]
    in_bfloat16 = root.build(model.config, torch.device("cpu"), torch.bfloat16)
    assert in_bfloat16.ve_tables["1"].weight.dtype == torch.bfloat16 != in_bfloat16.lm_head.weight.dtype
    fresh = train.GPT(model.config)
    fresh.init_weights()
    limit = (3 / 32) ** 0.5
    assert 0.99 * limit < fresh.ve_tables["1"].weight.abs().max() <= limit
    assert train.flops_per_token(model.config, False) < train.flops_per_token(small_model(train).config, False)


def test_parts_that_are_off_leave_no_parameters():
    off = {"u_net": False, "head_gates": False}
    for track, more in ((train, {"head_mixes": False}), (tiny, {"xsa_layers": 0})):
        names = " ".join(name for name, _ in small_model(track, **off | more).named_parameters())
        assert not any(part in names for part in ("skip_weights", "attn_gate", "_mix", "xsa_alphas"))
    assert small_model(tiny, xsa_layers=3).xsa_alphas.shape == (3, 2)


def test_layers_beyond_the_first_have_no_exclusive_attention():
    some, tokens = small_model(tiny, xsa_layers=2), torch.randint(V, (1, 8))
    every = small_model(tiny)
    names = dict(every.named_parameters())
    for name, p in some.named_parameters():
        p.data.copy_(names[name][:2] if name == "xsa_alphas" else names[name])
    assert not torch.allclose(some.log_probs(tokens), every.log_probs(tokens))
    every.xsa_alphas.data[2:] = 0
    torch.testing.assert_close(some.log_probs(tokens), every.log_probs(tokens))


def test_full_rotary_and_no_key_offset():
    where = torch.device("cpu"), torch.float64
    for found, expected in zip(
        tiny.rotary_tables(9, 16, False, *where), root.rotary_tables(9, 16, *where), strict=True
    ):
        assert torch.equal(found, expected)
    model = small_model(tiny, half_rotary=False)
    assert torch.equal(model.rotary(9)[0], tiny.rotary_tables(9, 16, False, *where)[0])
    config = small_model(tiny, key_offset=False)
    assert not any(config._settings(window)["offset"] for window in (16, 32))
    assert [small_model(tiny)._settings(window)["offset"] for window in (16, 32)] == [False, True]


def test_schedules_without_the_later_techniques():
    old = train.Config(**settings("limited", 10))
    N = 1000
    assert [train.warmdown(old, step, N) for step in (0, 800, 900, 999)] == pytest.approx([1, 1, 0.5, 0.005])
    assert {train.lr_multiplier(old, step, N) / train.warmdown(old, step, N) for step in range(N)} == {1.0}
    assert {train.weight_decay_multiplier(old, step, N) for step in range(N)} == {1.0}
    assert {tiny.weight_decay_multiplier(tiny.Config(**settings("tiny", 6)), step, N) for step in range(N)} == {1.0}
    assert train.warmdown(train.Config(), 950, N) == pytest.approx(0.25**0.5)


@pytest.mark.parametrize("shuffle", ["none", "micro_steps"])
def test_fixed_orders(shuffle, data_dir):
    """Sequences permuted once by the file's seed; micro-steps, from epoch 2 on, permuted cumulatively by the epoch."""
    config = train.Config(**SMALL["limited"] | {"data_dir": str(data_dir), "shuffle": shuffle, "micro_batch": 1})
    split = load_split(str(data_dir), "train", V, 32)
    plan, sequences = train.Plan(config, 181), split.tokens[: 181 * 33].reshape(181, 33)
    order = np.random.RandomState(43).permutation(181)[:176].reshape(22, 8)
    for epoch in range(1, 5):
        if shuffle == "micro_steps" and epoch > 1:
            order = order[torch.randperm(22, generator=torch.Generator().manual_seed(epoch)).numpy()]
        assert np.array_equal(train.epoch_sequences(config, split, epoch), sequences[order.ravel()])
    batch = train.make_loader(plan, split, range(8)).batch(0)
    assert np.array_equal(batch[:, 0], sequences[np.random.RandomState(43).permutation(181)[:8]])


def test_the_moving_average_of_the_weights(data_dir, tmp_path):
    """Against the weights of each step: a copy after round(0.9 N) steps, 5% of every tenth after it; 0.3 of it."""
    values = SMALL["limited"] | {
        "data_dir": str(data_dir),
        "runs_dir": str(tmp_path),
        "readout": "ema",
        "num_epochs": 48,
    }
    values |= {"swa_epochs": 0, "batch_tokens": 512, "meta_gradient": False, "replay_from_epoch": 0, "device": "cpu"}
    trainer, _ = train.set_up(flags(**values))
    N, p = trainer.plan.num_steps, trainer.model.lm_head.weight
    assert N == 528
    after = {}
    for step in range(N):  # the updates do not matter here, only when the weights enter
        p.data.fill_(step)
        trainer.optimizer.zero_grad()
        train.update_weights(trainer.optimizer, trainer.plan, step)
        after[step + 1] = p.detach().clone()
    expected = after[475]
    for done in (485, 495, 505, 515, 525):
        expected = 0.95 * expected + 0.05 * after[done]
    trainer.step = N
    train.blend_with_average(trainer)
    torch.testing.assert_close(
        trainer.unsaved["blend.safetensors"]["lm_head.weight"], 0.7 * after[528] + 0.3 * expected
    )
    trainer.run.close()


def test_a_run_that_ends_before_its_average_begins(data_dir, tmp_path):
    values = SMALL["limited"] | {
        "data_dir": str(data_dir),
        "runs_dir": str(tmp_path),
        "run_name": "run",
        "device": "cpu",
    }
    trainer, _ = train.set_up(flags(**values | {"readout": "ema"}))
    FakeTime(trainer)
    object.__setattr__(trainer.config, "time_cap_min", 7.5 / 60)
    trainer.fit()
    assert trainer.stopped_by == "time_cap" and train.finish(trainer) == 0
    assert "the last weights are read out" in (tmp_path / "run/log.txt").read_text()
    cut_short = next(loss for name, loss in trainer.readouts.items() if name.endswith("_cut_short"))
    assert trainer.readouts["last_blended"] == pytest.approx(cut_short, abs=1e-6)
    trainer.run.close()


def test_an_average_survives_a_resume(data_dir, tmp_path):
    values = SMALL["limited"] | {
        "data_dir": str(data_dir),
        "runs_dir": str(tmp_path),
        "readout": "ema",
        "device": "cpu",
    }
    assert train.main(flags(**values | {"run_name": "whole"})) == 0
    trainer, _ = train.set_up(flags(**values | {"run_name": "run", "checkpoint_min": 0.0}))
    fit_until(trainer, 10)  # of 11, and the average begins after 10
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    whole, resumed = (json.loads((tmp_path / run / "result.json").read_text()) for run in ("whole", "run"))
    assert resumed["readouts"] == pytest.approx(whole["readouts"], abs=1e-6)


def fit_until(trainer, step: int) -> None:
    """Train so many steps, and stop as by a signal."""
    settle = trainer.settle

    def settle_and_stop(keep: int) -> None:
        settle(keep)
        trainer.signal = "SIGTERM" if trainer.step == step else ""

    trainer.settle = settle_and_stop
    trainer.fit()
    trainer.run.close()
    assert trainer.step == step and trainer.stopped_by == "signal"


@pytest.mark.parametrize("name", [*MODULES, "unlimited"])
def test_toy_sizes_leave_a_records_techniques(name):
    """Every record's demo can be built, has what the record has, and differs from the one before, but for a length."""
    track, before = (MODULES | {"unlimited": unlimited})[name], None
    numbers = [n for of, n in RECORDS if of == name] or [*ENSEMBLES, 12]
    for number in numbers:
        config = track.Config(**parse(track, [f"--record={number}", "--demo"]))
        assert (config.n_embd, config.sequence_len, config.eval_initial) == (
            64,
            128,
            track.DEMO.get("eval_initial", False),
        )
        full = track.Config(**read_record(track, number))
        for key, value in dataclasses.asdict(full).items():
            if isinstance(value, str | bool) and key not in {*track.DEMO, "window_schedule"}:
                assert getattr(config, key) == value, key
        for key in ("replay_from_epoch", "swa_epochs", "teach_after", "replay_loops", "xsa_layers", "stochastic_depth"):
            assert bool(getattr(config, key, 0)) == bool(getattr(full, key, 0)), key
        assert config != before or (name, number) == ("unlimited", 5), number
        before = config


def test_flags_and_toy_sizes_come_before_a_records_settings():
    config = train.Config(**parse(train, ["--record=7", "--demo", "--warmdown=0.3"]))
    assert (config.n_embd, config.num_epochs) == (train.DEMO["n_embd"], train.DEMO["num_epochs"])
    assert (config.warmdown, config.logit_cap, config.head_gates, config.head_mixes) == (0.3, 15.0, True, False)
    assert (config.replay_from_epoch, config.stochastic_depth, config.swa_epochs) == (4, 0.0, 0)
    early = train.Config(**parse(train, ["--record=3", "--demo"]))
    assert (early.replay_from_epoch, early.mlp, early.readout) == (0, "relu2", "last")


def test_a_record_trains_on_two_processes_as_on_one(few_tokens, tmp_path):
    """The oldest, whose tables are sharded and whose order is fixed, with a sharded average; from the command line."""
    arguments = [*toy_flags("limited", 1, few_tokens, tmp_path), "--dtype=float64", "--readout=ema", "--num-epochs=4"]
    assert train.main([*arguments, "--run-name=one"]) == 0
    run_to_end("train.py", [*arguments, "--run-name=two"], processes=2)
    one, two = ([line["train_loss"] for line in read_metrics(tmp_path / run)[0]] for run in ("one", "two"))
    assert len(one) == 8 and one == pytest.approx(two, abs=1e-9)
    one, two = (json.loads((tmp_path / run / "result.json").read_text())["readouts"] for run in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-9) and one["last_blended"] != one["epoch_4"]


@pytest.mark.parametrize("name", ["limited", "tiny"])
def test_a_result_of_an_average_that_could_not_be_saved(name, few_tokens, tmp_path, monkeypatch):
    """The disk is full when all is done: resuming reads out the same weights."""
    track, honest = MODULES[name], run_folder.write_json

    def fail_once(path, content) -> None:
        if path.name == "result.json":
            monkeypatch.setattr(run_folder, "write_json", honest)
            raise OSError("No space left on device")
        honest(path, content)

    number = {"limited": 11, "tiny": 8}[name]
    arguments = toy_flags(name, number, few_tokens, tmp_path)
    assert track.main([*arguments, "--run-name=whole"]) == 0
    monkeypatch.setattr(run_folder, "write_json", fail_once)
    assert track.main(arguments) == 1 and not (tmp_path / "run/result.json").exists()
    assert track.main(["--resume", str(tmp_path / "run")]) == 0
    whole, resumed = (json.loads((tmp_path / run / "result.json").read_text()) for run in ("whole", "run"))
    assert resumed["readouts"] == pytest.approx(whole["readouts"], abs=1e-6)
    assert len(list((tmp_path / "run/final").glob("*.safetensors"))) == 1


def test_settings_files_have_no_gaps():
    for name, track in (MODULES | {"unlimited": unlimited}).items():
        entries = json.loads((ROOT / "records" / name / "records.json").read_text())["records"]
        published = [entry["number"] for entry in entries if entry["kind"] == "published"]
        files = sorted(Path(ROOT / "records" / name).glob("[0-9][0-9]-*.json"))
        numbers = [int(path.name[:2]) for path in files]
        assert numbers == (published if name != "unlimited" else [*ENSEMBLES, 12]), track.TRACK
        for path, number in zip(files, numbers, strict=True):
            content = json.loads(path.read_text())
            assert content.keys() == {"record", "change", "settings", "assumed"}
            assert (content["record"], content["change"]) == (number, entries[number - 1]["change"])
