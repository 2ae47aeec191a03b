"""What the READMEs say of the repository is so: files, flags, names in the code, messages, figures of the defaults."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import INSTRUMENT, ROOT, parse

import model
import prepare_data
import slowrun
import tiny.train as tiny
import train
import two_hour.train as two_hour
import unlimited.train as unlimited
from records import instruments, judge, leaderboard, referee, submit
from slowrun.data import unread_split
from slowrun.machine import GIB
from slowrun.plan import Sizes, StepPlan
from slowrun.rules import OFFICIAL_TRAIN_TOKENS
from tools import bench, imports

README = (ROOT / "README.md").read_text()
RECORDS_PAGE = (ROOT / "records" / "README.md").read_text()
PACKAGE = {name: importlib.import_module(f"slowrun.{name}") for name in INSTRUMENT if name != "__init__"}
MODULES = {
    "README.md": {"train": train, "model": model} | PACKAGE,
    "tiny/README.md": {"train": tiny},
    "two_hour/README.md": {"train": two_hour},
    "unlimited/README.md": {"train": unlimited},
}
EACH = pytest.mark.parametrize("readme", MODULES)
PAGES = [*MODULES, "records/README.md", "CONTRIBUTING.md"]
EACH_PAGE = pytest.mark.parametrize("readme", PAGES)


@EACH_PAGE
def test_links_lead_somewhere(readme):
    text = (ROOT / readme).read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {"#" + heading.lower().replace(" ", "-") for heading in headings}
    folder = (ROOT / readme).parent
    assert len(links) > 3
    assert [link for link in links if link not in anchors and not (folder / link.split("#")[0]).exists()] == []


@EACH_PAGE
def test_flags_exist(readme, capsys):
    for script in (
        train,
        tiny,
        two_hour,
        unlimited,
        prepare_data,
        instruments,
        leaderboard,
        referee,
        submit,
        bench,
        imports,
    ):
        with pytest.raises(SystemExit):
            script.main(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    others = {"--standalone", "--nproc", "--nnodes", "--rdzv", "--shutdown-timeout"}  # of torchrun
    others |= {"--fast", "--checkout", "--tolerance"}  # of tests/trace.py
    flags = set(re.findall(r"(?<![-\w])--[a-z-]*[a-z]", (ROOT / readme).read_text()))
    assert len(flags) > 5 and flags - others <= known


@pytest.mark.parametrize("readme", [name for name in MODULES if name != "unlimited/README.md"])
def test_the_small_model_is_accepted(readme):
    text, track = (ROOT / readme).read_text(), MODULES[readme]["train"]
    (command,) = re.findall(r"^python \S*train.py (--data-dir my_data(?:.*\\\n)*.*)", text, re.MULTILINE)
    assert track.Config(**parse(track, shlex.split(command.replace("\\\n", " ")))).n_embd == 64


@EACH
def test_names_in_the_code_exist(readme):
    modules = "|".join(["train", "model", *PACKAGE])
    names = re.findall(rf"`({modules})\.([\w.]+)`", (ROOT / readme).read_text())
    names = [(module, path) for module, path in names if path not in ("py", "json")]
    assert len(names) > 3
    for module, path in names:
        value = MODULES[readme][module]
        for name in path.split("."):
            assert hasattr(value, name), path
            value = getattr(value, name)


def test_the_scripts_have_the_same_sections():
    """So that a difference of two tracks shows the science; the model of the root track is in a file of its own."""
    sections = {}
    for track in (train, tiny, two_hour, unlimited):
        sections[track] = re.findall(r"^# =+\n# (\w+(?: \w+)*)", Path(track.__file__).read_text(), re.MULTILINE)
    of_all = ["Config", "Optimizer", "Schedules", "Data order", "Training step", "Readout", "main"]
    assert sections[train] == of_all
    assert sections[tiny] == sections[two_hour] == ["Config", "Model", *of_all[1:]]
    assert sections[unlimited] == ["Config", "Model", *of_all[1:5], "Chain", "Selection", *of_all[5:]]


def test_the_map_is_complete():
    """Every script and folder of the repository is on it, and fits on a screen."""
    block = README.split("## Repository")[1].split("```")[1]
    listed = set(re.findall(r"^([\w./]+)", block, re.MULTILINE))
    there = {path.name + "/" * path.is_dir() for path in ROOT.iterdir() if not path.name.startswith((".", "_"))}
    scripts = {name for name in there if name.endswith(".py")} | {"slowrun/", "records/", "tests/", "tools/", "docs/"}
    scripts |= {f"{folder}/train.py" for folder in ("tiny", "two_hour", "unlimited")}
    assert listed - {"Makefile"} == scripts and len(block.splitlines()) < 25
    assert all((ROOT / path).exists() for path in listed)


def test_the_table_of_the_instrument_is_complete():
    """In the order of the docstring, and with every module."""
    section = README.split("## Repository")[1].split("\n## ")[0]
    rows = re.findall(r"^\| \[(\w+)\.py\]\(slowrun/(\w+)\.py\) \|", section, re.MULTILINE)
    order = re.findall(r"^    (\w+)  ", slowrun.__doc__, re.MULTILINE)
    assert rows == [(name, name) for name in order] and set(order) == PACKAGE.keys()


def test_the_picture_of_the_imports_is_current():
    graph = imports.read_graph()
    assert imports.problems(graph) == []
    assert imports.digest(graph) in imports.PICTURE.read_text(), "draw it again: python tools/imports.py"


def test_an_import_that_goes_up_is_found(monkeypatch, capsys):
    graph = imports.read_graph()
    graph["slowrun.data"] = {"slowrun.world", "slowrun.session"}
    graph["slowrun.plan"] = graph["slowrun.plan"] | {"slowrun.kernels"}
    graph["records.draw"] = {"records.leaderboard"}
    graph["slowrun.new"] = set()
    monkeypatch.setattr(imports, "read_graph", lambda: graph)
    assert imports.main(["--text"]) == 1
    errors = capsys.readouterr().err
    for message in (
        "slowrun.data imports slowrun.session, which is not below it",
        "slowrun.plan imports slowrun.kernels, which is not below it",
        "imports form a cycle",
        "slowrun.new has no place in the picture",
    ):
        assert message in errors


def test_the_table_of_the_referee_is_complete():
    """In the order of the docstring, and in its words."""
    rows = re.findall(r"^\| \[\w+\.py\]\(judge/(\w+)\.py\) \| (.+) \|$", RECORDS_PAGE.replace("`", ""), re.MULTILINE)
    assert rows == re.findall(r"^    (\w+) +(.+)$", judge.__doc__, re.MULTILINE)


def test_messages_in_the_troubleshooting_exist():
    """The words between what varies are in the code."""
    scripts = ["train.py", "model.py", "tiny/train.py", "two_hour/train.py", "unlimited/train.py", "prepare_data.py"]
    files = [(ROOT / file).read_text() for file in (*scripts, *(f"slowrun/{name}.py" for name in INSTRUMENT))]
    code = re.sub(r'"\s*f?"', "", "".join(files))  # joins strings that stand one behind the other
    section = README.split("## Troubleshooting")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)
    assert len(messages) > 8
    for message in messages:
        for part in re.split(r"\.\.\.,?|: | varlen |head fp8 | nan | training |train_loss|\S+/\S+", message):
            assert part.strip() in code, message


def test_the_figures_of_the_defaults():
    config, text = train.Config(), " ".join(README.split())
    assert f"at the end of each of its {config.num_epochs} epochs" in text
    assert f"the first {config.val_sequences:,} validation sequences" in text
    assert f"({config.val_sequences * config.sequence_len:,} targets)" in text
    assert f"**Cap**: {config.time_cap_min:g} minutes" in text and f"every {config.checkpoint_min:g} minutes" in text


def count(track, dtype: torch.dtype = torch.bfloat16, **changes) -> tuple[StepPlan, Sizes]:
    """The plan and the sizes of a run on the official data."""
    config = track.Config(**changes)
    return track.make_plan(config, unread_split(OFFICIAL_TRAIN_TOKENS)), track.count_sizes(config, dtype)


def memory_gib(track, dtype: torch.dtype = torch.bfloat16, **changes) -> tuple[float, float]:
    """What one process needs without its activations, and with them."""
    plan, sizes = count(track, dtype, **changes)
    stages = plan.stages.values()
    static = max(sizes.static_bytes(1, stage) for stage in stages)
    return static / GIB, max(sum(sizes.held_bytes(1, stage).values()) for stage in stages) / GIB


def test_the_memory_that_the_script_counts():
    def gib(track, dtype, **changes) -> list[str]:
        return [f"{value:.0f} GiB" for value in memory_gib(track, dtype, **changes)]

    (static, needed), (_, small) = gib(train, torch.bfloat16), gib(train, torch.bfloat16, device_batch=1)
    assert f"counts {static} for weights, gradients and optimizer and estimates {needed} in all" in README
    assert f"in smaller passes: {small} by the same" in README
    assert f"would need {gib(train, torch.float32)[1]} in float32" in README
    plan, sizes = count(train)
    assert f"a run is {plan.flops[-1] / 1e18:.1f} EFLOP" in README
    gigabytes = sizes.checkpoint_bytes / 1e9, sizes.member_bytes / 1e9, sizes.disk_bytes(True) / 1e9
    disk = "a checkpoint takes about {:.0f} GB and a member of the readout {:.1f} GB: a run needs up to {:.0f} GB"
    assert disk.format(*gigabytes) in README
    (_, needed), (_, small) = gib(tiny, torch.bfloat16), gib(tiny, torch.bfloat16, device_batch=4)
    assert f"The tiny track takes {needed}," in README
    text = (ROOT / "tiny/README.md").read_text()
    assert f"one GPU takes {needed} by the script's own estimate, {small} with `--device-batch 4`" in text


def test_the_figures_of_the_two_hour_track():
    c, text = two_hour.Config(), " ".join((ROOT / "two_hour/README.md").read_text().split())
    assert f"{c.time_cap_min:g} minutes on 8" in text and f"H100, {c.num_epochs} epochs over" in text
    assert f"dropout {c.dropout} and stochastic depth {c.stochastic_depth}" in text and not c.meta_gradient
    assert f"layer replay from epoch {c.replay_from_epoch}, cycles" in text and f"over the last {c.swa_epochs} " in text
    assert f"of the last {c.readout_epochs} epochs, averaged" in text and f"`{c.window_schedule}`" in text
    stages = [f"{s.windows} " for s in c.window_stages]
    assert all(stage in text for stage in stages)
    (_, needed), (_, small) = memory_gib(two_hour), memory_gib(two_hour, device_batch=1)
    assert f"takes {needed:.0f} GiB by the script's own estimate, {small:.0f} GiB with `--device-batch 1`" in text
    plan, sizes = count(two_hour)
    member, checkpoint = sizes.member_bytes / GIB, sizes.checkpoint_bytes / GIB
    assert f"weights of {c.readout_epochs} epochs for the readout, {member:.3g} GiB each" in text
    assert f"the last two checkpoints, {checkpoint:.3g} GiB each" in text
    assert f"up to {sizes.disk_bytes(True) / GIB:.3g} GiB." in text
    assert f"In the end {c.readout_epochs * member:.3g} GiB stay" in text
    assert f"a run is {plan.flops[-1] / 1e18:.1f} EFLOP" in text


def test_the_other_ensemble_is_accepted():
    text = (ROOT / "unlimited/README.md").read_text()
    (command,) = re.findall(r"unlimited/train.py (--chains(?:.*\\\n)*.*)", text)
    config = unlimited.Config(**parse(unlimited, shlex.split(command.replace("\\\n", " "))))
    assert (config.members, config.average, config.cycles) == ("independent", "logit", 8)


def test_the_figures_of_the_unlimited_track():
    c, text = unlimited.Config(), " ".join((ROOT / "unlimited/README.md").read_text().split())
    assert f"documents, {c.fitness_tokens:,} tokens, never trained on" in text
    assert f"(wider: C {c.n_embd}, {c.n_head} heads, layers {c.replay_start} to {c.replay_end - 1} five times)" in text
    assert c.replay_loops == 4 and f"in cycles of {c.cycle_epochs} epochs" in text
    assert f"falls linearly from 1 to {c.lr_low} and the weight decay rises from {c.decay_low} to 1" in text
    assert f"clipped to a norm of {c.clip:g}" in text and f"after {c.teach_after} cycles the last snapshot" in text
    assert f"a step has {c.batch_tokens:,} tokens, in the others {c.outer_batch_tokens:,}" in text
    assert f"of {c.perturb_first} of the parameter's own" in text and f"falling to {c.perturb_last} (" in text
    shares = f"{1 - c.teach_weight:.2f} of the usual one and {c.teach_weight} of the divergence"
    assert shares in text and f"at temperature {c.teach_temperature}" in text
    splits = {"val": c.val_sequences, "holdout": c.val_sequences, "fitness": c.fitness_tokens // (c.sequence_len + 1)}
    splits = {name: unread_split(count * (c.sequence_len + 1)) for name, count in splits.items()}
    sizes = unlimited.count_sizes(c, torch.bfloat16, splits, num_groups=5)
    kept = (sizes.members * sizes.member_bytes + sizes.score_bytes) / GIB
    assert f"{sizes.members} of {sizes.member_bytes / GIB:.3g} GiB, with their losses {kept:,.0f} GiB" in text
    assert f"of {sizes.checkpoint_bytes / GIB:.0f} GiB; two, and one being written" in text
    plan = unlimited.make_plan(c, unread_split(48_739 * (c.sequence_len + 1)))
    flops = plan.flops[-1]
    hours = flops / (0.4 * 989e12 * 8) / 3600
    assert f"{flops / 1e21:.2f} ZFLOP a chain: {hours:.0f} h on 8" in text
    assert f"{c.chains * hours / 24:.0f} days on one node, {hours:.0f} h on five (counted)" in README
    small = unlimited.count_sizes(unlimited.Config(device_batch=1), torch.bfloat16, splits, num_groups=1)
    stages = plan.stages.values()
    needed = [
        max(sum(sizes.held_bytes(processes, stage).values()) for stage in stages) / GIB
        for sizes, processes in ((sizes, 8), (sizes, 1), (small, 1))
    ]
    assert f"{needed[0]:.0f} GiB by the script's own estimate on 8 GPUs, {needed[1]:.0f} GiB on one" in text
    assert f"there {needed[2]:.0f} GiB with `--device-batch 1`" in text


def test_the_figures_of_the_tiny_track():
    c, text = tiny.Config(), " ".join((ROOT / "tiny/README.md").read_text().split())
    assert f"{c.time_cap_min:g} minutes on 8" in text and f"H100, {c.num_epochs} epochs over" in text
    assert f"{c.n_layer} layers of width {c.n_embd}, {c.n_head} heads, SwiGLU of {c.hidden}" in text
    assert f"logits capped at {c.logit_cap:g}" in text and f"Dropout of {c.dropout} " in text
    assert f"in the last {100 * (1 - c.late_passes_from):.0f}% of the steps" in text
    assert f"with weights 1, {c.mtp_weight_1} and {c.mtp_weight_2};" in text
    assert f"the last two fall to 0 by {100 * c.mtp_until:g}% of the steps" in text
    assert f"multiplied by {c.lr_multiplier}." in text
    assert f"the last {100 * c.warmdown:.0f}% of the steps, and within the last {c.swa_epochs} epochs in cycles" in text
    assert f"decay is {c.weight_decay} for {c.decay_hold_epochs} epochs," in text
    assert f"falls to {c.decay_low} until epoch {c.decay_low_epochs}, and rises to {c.decay_end} at the" in text
    assert f"each virtual rank's {c.micro_batch} sequences" in text and f"are moved by {c.meta_step} down" in text
    assert f"ends of the last {c.readout_epochs} epochs, averaged 1:2:3:4" in text
