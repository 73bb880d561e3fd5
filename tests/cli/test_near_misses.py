"""Errors of the command line that name what was probably meant."""

from pathlib import Path

import pytest

from jaxscape.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("scna", "Unknown verb 'scna' (did you mean scan?): choose scan, measure"),
        ("scan --setps 2", "Unknown option --setps (did you mean --steps"),
        (
            "scan --max-tokens=2",
            "Unknown option --max-tokens (did you mean --max-new-tokens?): see jaxscape scan",
        ),
        ("scan --num_promts 2", "Unknown option --num-promts (did you mean --num-prompts"),
        ("scan --GPU", "Unknown option --GPU (did you mean --gpu"),
        ("plot --figrue x run", "Unknown option --figrue (did you mean --figure?)"),
        ("scan --zzz 2", "Unknown option --zzz: see jaxscape scan --help"),
        ("scan --dtype floot16", "Unknown value of --dtype 'floot16' (did you mean float16"),
        ("scan --form=factorized", "Unknown value of --form 'factorized' (did you mean factorised?): choose auto,"),
        ("scan --ndim 3", "Unknown value of --ndim '3': choose 1, 2."),
        ("finetune --method lorra --data safe", "Unknown value of --method 'lorra' (did you mean lora?)"),
        ("radius --of complies", "Unknown value of --of 'complies' (did you mean complied?)"),
        ("scan --model smolm2-135m-safe --num-prompts 1 --cpu", "(did you mean smollm2-135m-safe or smollm2-135m?)"),
        ("check smollm2-135 --cpu", "There is no model 'smollm2-135' (did you mean smollm2-135m"),
        ("plan --model llama2-7b", "Unknown model 'llama2-7b' (did you mean llama-2-7b"),
        ("scan --prompts advbenhc", "There is no prompt set 'advbenhc' (did you mean advbench?): give harmful,"),
        ("measure --harmless harmles --num-prompts 1", "no prompt set 'harmles' (did you mean harmless, harmful or"),
        ("finetune --data advbnech:80", "There is no training set 'advbnech' (did you mean advbench?)"),
        ("scan --evaluator xtest", "Unknown evaluator 'xtest' (did you mean xstest?)"),
        ("scan --direction gausian:0", "Unknown direction 'gausian:0' (did you mean gaussian:SEED"),
        ("measure --measures frist-token", "Unknown measure 'frist-token' (did you mean first-token?)"),
        ("scan --system-prompt lama2", "There is no system prompt 'lama2' (did you mean llama2?)"),
        ("scan --prompts {tmp}/a.csv --prompt-column gaol", "no column 'gaol' among 'id', 'goal' (did you mean goal?)"),
        ("scan --evaluator {tmp}/own.py:scroe", "There is no 'scroe' in {tmp}/own.py (did you mean score?)"),
        ("plot --figure landscpe {tmp}", "Unknown figure 'landscpe' (did you mean landscape?): choose landscape"),
    ],
)
def test_a_misspelled_name_is_one_sentence_with_the_near_misses(
    arguments: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("id,goal\n1,Why?\n")
    (tmp_path / "own.py").write_text("def score(prompts, answers):\n    return [1.0] * len(answers)\n")
    with pytest.raises(SystemExit) as stop:
        main(arguments.replace("{tmp}", str(tmp_path)).split())
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("jaxscape: ")
    assert err.count("\n") == 1
    assert message.replace("{tmp}", str(tmp_path)) in err
    assert {path.name for path in tmp_path.iterdir()} <= {"a.csv", "own.py", "__pycache__"}


@pytest.mark.parametrize("arguments", ["scan --dtype", "scan --dtype --cpu", "scan --steps two", "plot", "scan stray"])
def test_what_tyro_reports_ends_with_2_too(arguments: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    assert "--help" in capfd.readouterr().err
