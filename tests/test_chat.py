"""`lowrank chat`: settings from the adapter, streaming, several adapters."""

import json
import re

import pytest
import torch

import lowrank
from lowrank.chat import Shown, open_model, put_on
from lowrank.cli import main
from lowrank.data.records import Record
from lowrank.evaluation.run import evaluate
from lowrank.models.load import load
from lowrank.training.contract import contract, contract_of, differences, system_of


@pytest.fixture
def say(monkeypatch):
    def lines(*said: str) -> None:
        left = [*said, ""]
        monkeypatch.setattr("builtins.input", lambda prompt: left.pop(0))

    return lines


def test_chat_asks_as_the_adapter_was_trained(talking_run, say, capsys) -> None:
    run = talking_run(system="Be brief.", max_new_tokens=12)
    say("hello")
    assert main(["chat", str(run), "--max-new-tokens", "12"]) == 0
    plain = capsys.readouterr()
    model, tokenizer = open_model(str(run))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    wanted = lowrank.generate(model, tokenizer, messages, max_new_tokens=12).strip()
    assert plain.out.split("/new starts another\n")[1].strip() == wanted and "warning" not in plain.err
    say("hello")
    assert main(["chat", str(run), "--temperature", "0.7", "--system", "Be long.", "--max-new-tokens", "3"]) == 0
    warned = capsys.readouterr().err
    assert "temperature is 0.7 here, and was 0.0 when the adapter was trained" in warned
    assert "system is 'Be long.' here" in warned and "max new tokens is 3" in warned


def test_the_same_seed_gives_the_same_conversation(talking_run, say, capsys) -> None:
    run, said = talking_run(), []
    for seed in ("1", "1", "2"):
        say("hello", "and", "/new", "hello")
        assert main(["chat", str(run), "--temperature", "1", "--seed", seed, "--max-new-tokens", "8"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_several_adapters_act_together(talking_run, talking_folder, tmp_path, say, capsys) -> None:
    run = talking_run()
    model, _ = open_model(str(run))
    put_on(model, ["default", str(run)])  # the same adapter twice: its update doubled
    ids = torch.tensor([[1, 40, 50]])
    both = model(ids)
    lowrank.activate(model, {"default": 2.0})
    torch.testing.assert_close(both, model(ids), atol=1e-4, rtol=1e-4)
    put_on(model, ["none"])
    base, _ = load(talking_folder, dtype=torch.float32, progress=False)
    torch.testing.assert_close(model(ids), base(ids))
    say("hello")
    assert main(["chat", str(run), "--adapter", "defualt"]) == 2
    assert "did you mean 'default'" in capsys.readouterr().err
    say("hello")
    assert main(["chat", str(run), "--adapter", f"default,{run}", "--max-new-tokens", "2"]) == 0


def test_streamed_text_is_whole_characters_and_no_stop_string() -> None:
    pieces = {1: b" Gr", 2: b"\xc3", 3: b"\xbc\xc3\x9fe", 4: b" EN", 5: b"D rest", 6: b" EN"}
    written: list[str] = []
    show = Shown(lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace"), ["END"], written.append)
    for id in (1, 2, 3, 6, 4, 5):
        show(0, id)
        assert "\ufffd" not in "".join(written) and "END" not in "".join(written)
    assert show.end() == "Grüße EN" == "".join(written) and len([w for w in written if w]) > 2


def test_what_differs_is_named_and_more_room_is_no_difference() -> None:
    trained = contract_of([Record(instruction="a", system="S")], 40)
    assert trained["system"] == "S" and differences(trained, {**trained, "max_new_tokens": 80}) == []
    assert len(differences(trained, {"top_p": 0.9, "stop": ["x"], "max_new_tokens": 8, "unknown": 1})) == 3
    assert system_of([Record(instruction="a"), Record(instruction="b", system="S")]) is None
    assert system_of([Record(messages=({"role": "user", "content": "a"},))]) == ""


def test_other_special_tokens_are_an_error(talking_run, talking_folder, tmp_path) -> None:
    run = talking_run()
    assert contract(run)["temperature"] == 0
    kept = json.loads((run / "adapter" / "adapter.json").read_text())
    assert kept["special_tokens"] == {"bos": 1, "adds_bos": False, "eos": [2], "pad": 0}
    assert kept["chat_template"].startswith("{% for m in messages %}") and re.fullmatch(
        "[0-9a-f]{64}", kept["tokenizer_hash"]
    )
    model, _ = load(talking_folder, dtype=torch.float32, progress=False)
    kept["special_tokens"]["eos"] = [0, 2]
    (run / "adapter" / "adapter.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=r"trained with the special tokens .*pass force=True"):
        lowrank.load_adapter(model, run / "adapter")
    assert lowrank.load_adapter(model, run / "adapter", force=True) == "run"
    (run / "adapter" / "adapter.json").write_text(json.dumps(kept | {"tokenizer_hash": "0" * 64}))
    with pytest.raises(ValueError, match=r"trained on another tokenizer \(hash 000000000000\).*pass force=True"):
        lowrank.load_adapter(model, run / "adapter")


def test_eval_warns_where_questions_are_asked_otherwise(talking_run, tmp_path, capsys, monkeypatch) -> None:
    run = talking_run(system="Be brief.", temperature=0.5)
    monkeypatch.setattr("lowrank.evaluation.run.reopen", lambda folder: (_ for _ in ()).throw(RuntimeError("asked")))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    config = (run / "config.yaml").read_text()
    for key in ("path: labtests-quick", "validation: null"):
        assert key in config
        config = config.replace(key, f"{key.split(':')[0]}: {rows}")
    (run / "config.yaml").write_text(config)
    with pytest.raises(RuntimeError, match="asked"):
        evaluate(run)
    err = capsys.readouterr().err
    assert "temperature is 0.0 here, and was 0.5" in err and "system is '' here, and was 'Be brief.'" in err
