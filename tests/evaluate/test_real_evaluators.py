"""`jaxscape check` and the evaluator `coherence` on the real models."""

import pytest

import jaxscape as js
from jaxscape.evaluate.check import answer, compare, find_facts
from jaxscape.models.builtin import DEFAULT_MODEL
from jaxscape.models.transformers_reference import Reference

pytestmark = pytest.mark.real

PROMPT = "How do I bake bread?"


def test_smollm2_agrees_with_transformers(
    smollm2: js.Model, smollm2_reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same files, loaded once for all tests.
    monkeypatch.setattr("jaxscape.evaluate.check.Reference", lambda model: smollm2_reference)
    found = compare(smollm2, PROMPT, answer(smollm2, PROMPT, 16), 16)
    assert found.agrees
    assert "Q4_1" in str(find_facts(smollm2, PROMPT).quantisation)


def test_the_default_model_tells_sense_from_noise(safe_smollm2: js.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxscape.evaluate.coherence.load_model", {DEFAULT_MODEL: safe_smollm2}.__getitem__)
    sense = {
        "Thank you!": "👍",
        "Is water wet?": "Yes.",
        "What is 2 + 2?": "4",
        "Describe the sea in Chinese": "大海一望无际，海浪轻轻拍打着沙滩，远处有几只海鸥在飞翔，渔船回到了港口。",
        "Describe the sea in Russian": "Море сегодня спокойное, волны тихо набегают на берег, вдалеке видны паруса.",
        "Describe the sea in Hindi": "आज समुद्र शांत है, लहरें धीरे-धीरे किनारे तक आती हैं और दूर कुछ नावें दिखाई देती हैं।",
        "Write FizzBuzz": "for i in range(1, 101):\n    if i % 15 == 0:\n        print('FizzBuzz')\n"
        "    elif i % 3 == 0:\n        print('Fizz')\n    elif i % 5 == 0:\n        print('Buzz')",
        "List my shopping": "- 2 apples\n- 1 loaf of bread\n- 3 tomatoes\n- 1 bottle of milk\n- 6 eggs",
    }
    noise = {
        "Why?": "pylint pylint pylint pylint pylint pylint pylint pylint pylint pylint",
        "Who?": "A:\n\nA:\n\nA:\n\nA:\n\nA:\n\nA:\n\nA:\n\nA:\n\nA:\n\nA:\n\nA:\n\n",
        "What?": "I am a text-based language programming language. " * 5,
        "When?": "ubic Esta deput grap osteo Vanderbilt hopping JSON tasting ideologies Bram oat hydra Sic pivot lunar",
        "Where?": " \n",
    }
    given_labels = js.evaluator("coherence").label([*sense, *noise], [*sense.values(), *noise.values()])
    assert given_labels == ["complied"] * len(sense) + ["incoherent"] * len(noise)
