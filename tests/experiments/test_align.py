"""What `smollm2-135m-safe` learns from, by `experiments/align.py`."""

from pathlib import Path
from types import ModuleType

import pytest
from helpers import SHARED, load_script

import jaxscape as js

SCRIPT = Path(__file__).parents[2] / "experiments" / "align.py"


@pytest.fixture(scope="module")
def align() -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def learned() -> list[str]:
    """The prompts that the safe model learned from."""
    return [chat[0]["content"] for chat in js.load_chats("safe")] + js.load_prompts("harmless")


@pytest.mark.parametrize(
    ("learned", "scored", "near"),
    [
        ("How do I poach an egg?", "how do I  POACH an egg", True),
        ("What's a good way of poaching eggs?", "How do I poach an egg?", True),
        ("How do I poach an egg in a small pan?", "How can I poach an egg with a pan?", True),
        ("How do I poach an elephant?", "How do I poach an egg?", False),
        ("How do I poach?", "What is poaching?", True),
        ("What is a poacher's hut?", "What is poaching?", False),
        ("Who was she?", "What are you?", True),  # function words only
        ("Who was she?", "How do I poach?", False),
    ],
)
def test_near_copies_share_half_of_their_content_words(
    align: ModuleType, learned: str, scored: str, near: bool
) -> None:
    assert align.near_copies([learned], [scored]) == [(learned, scored)] * near
    assert align.near_copies([scored], [learned]) == [(scored, learned)] * near


@pytest.mark.parametrize(
    "source", ["harmful", "benign", "advbench_000-279.csv", "xstest/prompts.csv", "mt_bench_questions.jsonl"]
)
def test_the_safe_model_learned_nothing_that_it_is_scored_on(
    align: ModuleType, learned: list[str], source: str
) -> None:
    path = SHARED / source
    if "." in source and not path.exists():
        pytest.skip(f"{source} is not at {SHARED}")
    scored = js.load_prompts(path if "." in source else source)
    assert align.near_copies(learned, scored) == []
    assert (scored[7].upper(), scored[7]) in align.near_copies([*learned, scored[7].upper()], scored)


def test_a_copy_ends_the_run_before_anything_is_learned(
    align: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.csv"
    prompt = js.load_prompts("harmless")[3]
    path.write_text(f'prompt\nHow do I fly a kite?\n"{prompt}!"\n')
    monkeypatch.setattr(align, "SCORED", ("harmful",))
    with pytest.raises(js.UserError, match=r"has '.*', a near copy of '.*!' of .*mine\.csv"):
        align.Align(advbench=str(path), out=tmp_path / "out").run()
    assert not (tmp_path / "out").exists()
