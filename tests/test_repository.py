"""What README.md says of the repository is so: files, flags, names in the code, messages, figures of the defaults."""

import re

import pytest
from conftest import ROOT

import model
import prepare_data
import train

README = (ROOT / "README.md").read_text()


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("https://")]
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {"#" + heading.lower().replace(" ", "-") for heading in headings}
    assert len(links) > 8
    assert [link for link in links if link not in anchors and not (ROOT / link).exists()] == []


def test_flags_exist(capsys):
    for script in (train, prepare_data):
        with pytest.raises(SystemExit):
            script.main(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    others = {"--standalone", "--nproc", "--shutdown-timeout", "--fix"}  # of torchrun and tests/copies.py
    flags = set(re.findall(r"--[a-z-]*[a-z]", README))
    assert len(flags) > 25 and flags - others <= known


def test_the_small_model_is_accepted():
    (command,) = re.findall(r"^python train.py (--data-dir my_data(?:.*\\\n)*.*)", README, re.MULTILINE)
    given, _ = train.parse_arguments(command.replace("\\\n", " ").split())
    assert train.Config(**given).n_layer == 6


def test_names_in_the_technique_index_exist():
    section = README.split("## Techniques")[1].split("\n## ")[0]
    names = re.findall(r"`(train|model)\.([\w.]+)`", section)
    assert len(names) > 20
    for module, path in names:
        value = {"train": train, "model": model}[module]
        for name in path.split("."):
            assert hasattr(value, name), path
            value = getattr(value, name)


def test_messages_in_the_troubleshooting_exist():
    """The words between what varies are in the code."""
    files = [(ROOT / file).read_text() for file in ("train.py", "model.py", "prepare_data.py")]
    code = re.sub(r'"\s*f?"', "", "".join(files))  # joins strings that stand one behind the other
    section = README.split("## Troubleshooting")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)
    assert len(messages) > 8
    for message in messages:
        for part in re.split(r"\.\.\.|: | varlen | nan | training |\S+/\S+", message):
            assert part.strip() in code, message


def test_the_figures_of_the_defaults():
    config, text = train.Config(), " ".join(README.split())
    assert f"at the end of each of its {config.num_epochs} epochs" in text
    assert f"the first {config.val_sequences:,} validation sequences" in text
    assert f"({config.val_sequences * config.sequence_len:,} targets)" in text
    assert f"**Cap**: {config.time_cap_min:g} minutes" in text and f"every {config.checkpoint_min:g} minutes" in text
