"""The page docs/add-a-method.md is run: its file, through the suite and through attach, merge, save and load."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank
from lowrank.adapter import METHODS
from lowrank.conformance import check, listing, load_method, run, table

PAGE = Path(__file__).parents[2] / "docs" / "add-a-method.md"


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)[1])
    before = dict(METHODS)
    yield tmp_path / "mine.py"
    METHODS.clear()
    METHODS.update(before)
    sys.modules.pop("lowrank_user_mine", None)


def test_the_file_of_the_page_is_a_method(mine, tmp_path) -> None:
    code = [line for line in mine.read_text().split('"""', 2)[2].splitlines() if line.strip()]
    assert len(code) < 40
    method = load_method(f"{mine}:Reflect")
    verdicts = check(method)
    assert all(v.holds is not False for v in verdicts), table(verdicts)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6))
    x = torch.randn(3, 8)
    lowrank.attach(model, method.Config(start=0.5), ["0"])
    y = model(x)
    lowrank.save_adapter(model, tmp_path / "saved")
    lowrank.merge(model)
    torch.testing.assert_close(model(x), y)
    lowrank.unmerge(model)
    lowrank.detach(model)
    lowrank.load_adapter(model, tmp_path / "saved")
    assert torch.equal(model(x), y)


def test_the_command_shows_the_theorems_and_says_whether_they_hold(mine, capsys) -> None:
    assert run(f"{mine}:Reflect") == 0
    shown = capsys.readouterr().out
    assert "proved  merge == forward, square and not" in shown and "every theorem that applies is proved" in shown
    broken = mine.with_name("broken.py")
    broken.write_text(mine.read_text().replace("weight - self.s", "weight - 2 * self.s").replace("reflect", "broken"))
    assert run(f"{broken}:Reflect") == 1
    assert "FAILS   merge == forward, square and not: 24 -> 40, dense: off by" in capsys.readouterr().out
    METHODS.pop("broken", None)


def test_the_listing_names_every_method_with_its_paper() -> None:
    lines = listing().splitlines()
    assert [line.split()[0] for line in lines] == sorted(METHODS)
    assert any("arXiv:2106.09685" in line for line in lines)


def test_a_method_of_the_package_is_found_by_name() -> None:
    assert load_method("lora") is METHODS["lora"]


@pytest.mark.parametrize(
    "content, which, error, message",
    [
        (None, "mine.py:X", FileNotFoundError, "no file"),
        ("import nothing_of_that_name", "mine.py:X", ValueError, "does not import: ModuleNotFoundError"),
        ("def broken(:", "mine.py:X", ValueError, "does not import: SyntaxError"),
        ("X = 3", "mine.py:X", ValueError, "no Adapter class 'X'; it has none"),
    ],
)
def test_a_file_that_holds_no_method_is_a_clear_error(tmp_path, content, which, error, message) -> None:
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    with pytest.raises(error, match=message):
        load_method(f"{tmp_path}/{which}")


def test_an_unknown_name_lists_the_methods() -> None:
    with pytest.raises(ValueError, match=r"no method 'lorra'.*adalora.*mine.py:MyMethod"):
        load_method("lorra")
