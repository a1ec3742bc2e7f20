"""The command line: help with examples, errors in one line and status 2, the small commands."""

import json
from pathlib import Path

import pytest

from lowrank.cli import main, parser

COMMANDS = ["train", "eval", "chat", "init", "data", "merge", "export", "adapters", "quant", "domain", "doctor"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args([command, "--help"])
    assert stopped.value.code == 0
    assert f"example: lowrank {command}" in capsys.readouterr().out


def test_a_mistake_is_one_line_and_status_2(capsys) -> None:
    assert main(["train", "no-such-file.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lowrank: no configuration file") and error.count("\n") == 1


def test_init_prints_a_recipe_that_reads_back(tmp_path, capsys) -> None:
    from lowrank.training.config import read_config

    assert main(["init", "quickstart"]) == 0
    (tmp_path / "my.yaml").write_text(capsys.readouterr().out)
    assert read_config(tmp_path / "my.yaml").adapter == read_config("quickstart").adapter


def test_data_check_counts_and_names_the_bad_line(tmp_path, capsys) -> None:
    good = tmp_path / "good.jsonl"
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d", "kind": "trap"}]
    good.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", str(good)]) == 0
    assert "2 records (1 qa, 1 trap)" in capsys.readouterr().out
    good.write_text('{"instruction": "a", "output": "b"}\nnot json\n')
    assert main(["data", "check", str(good)]) == 2
    assert "good.jsonl, line 2: not valid JSON" in capsys.readouterr().err


def test_adapters_list_names_every_method(capsys) -> None:
    from lowrank.adapter import METHODS

    assert main(["adapters", "list"]) == 0
    out = capsys.readouterr().out
    assert all(line.split()[0] in METHODS for line in out.splitlines()) and len(out.splitlines()) == len(METHODS)


def test_adapters_test_proves_a_file_of_the_user_s_own(tmp_path, capsys) -> None:
    source = Path(__file__).parents[1] / "lowrank" / "methods" / "ia3.py"
    mine = tmp_path / "mine.py"
    mine.write_text(source.read_text().replace('@register("ia3")', '@register("mine")'))
    assert main(["adapters", "test", f"{mine}:IA3"]) == 0
    assert "proved" in capsys.readouterr().out
    mine.write_text(mine.read_text().replace("weight * self.ia3_l[:, None]", "weight"))
    assert main(["adapters", "test", f"{mine}:IA3"]) == 1
    assert "FAILS" in capsys.readouterr().out


def test_a_dense_merge_takes_no_calibration(capsys) -> None:
    assert main(["merge", "a-run", "--calibrate", "text.txt"]) == 2
    assert "--calibrate chooses the codes of --to nf4" in capsys.readouterr().err


def test_doctor_says_what_is_there(capsys) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "processor", "kernels", "cache"):
        assert word in out


def test_domain_build_writes_a_domain_that_trains(tmp_path, capsys) -> None:
    fixtures = Path(__file__).parent / "fixtures" / "data"
    knowledge, templates = next(fixtures.rglob("*.jsonl")), next(fixtures.rglob("*.yaml"))
    command = ["domain", "build", str(knowledge), "--templates", str(templates), "--to", str(tmp_path / "out")]
    assert main(command) == 0
    assert "train:" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "out" / "train.jsonl")]) == 0


def test_key_value_may_stand_behind_a_flag(tmp_path, capsys) -> None:
    folder = tmp_path / "none-here"
    assert main(["train", "smoke", "--resume", f"output_dir={folder}"]) == 2
    assert f"nothing to resume: {folder} holds no run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "smoke", "--resum", "x"])
