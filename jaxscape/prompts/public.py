"""Prompt sets that are downloaded from their public homes."""

from dataclasses import dataclass

from jaxscape.prompts.fields import NAMES, Prompts, prompts_of
from jaxscape.prompts.records import read_records
from jaxscape.runtime.public_files import PublicFile
from jaxscape.runtime.texts import shown_text


@dataclass(frozen=True)
class PublicSet:
    """Prompts in a public file: all of them, or those of the rows that have `value` in `column`."""

    file: PublicFile
    column: str = ""
    value: str = ""

    def load(self, name: str) -> Prompts:
        """The prompts.

        Arguments:
            name: the name of the set, for the line that says where the prompts were read.

        Raises:
            UserError: the file cannot be downloaded, or has another checksum.
        """
        records = read_records(str(self.file.path()), NAMES, "")
        if self.column:
            chosen = [record for record in records.entries if record.value[self.column] == self.value]
            records = records._replace(entries=chosen)
        return Prompts(prompts_of(records, name), f"{shown_text(name)} ({self.file.title}: {self.file.source})")


_GITHUB = "https://raw.githubusercontent.com"
_JAILBREAKBENCH = (
    "https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors/resolve/886acc352a31533ffbcf4ef22c744658688086fc/data"
)

ADVBENCH = PublicFile(
    "AdvBench",
    "advbench.csv",
    f"{_GITHUB}/llm-attacks/llm-attacks/098262edf85f807224e70ecd87b9d83716bf6b73/data/advbench/harmful_behaviors.csv",
    "6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1",
    "Zou et al., arXiv 2307.15043; MIT licence",
)
_HARMFUL_BEHAVIORS = PublicFile(
    "JailbreakBench's harmful behaviours",
    "jailbreakbench-harmful.csv",
    f"{_JAILBREAKBENCH}/harmful-behaviors.csv",
    "4a8ec6832056b631eb092dccc60d37a61c3d441268268888b3d006288afeffa1",
    "Chao et al., arXiv 2404.01318; MIT licence",
)
_BENIGN_BEHAVIORS = PublicFile(
    "JailbreakBench's benign behaviours",
    "jailbreakbench-benign.csv",
    f"{_JAILBREAKBENCH}/benign-behaviors.csv",
    "3cda234d21a991fa309bbfea4b6d9dae31ccdf8e9d452424b6a983e4fdc33468",
    "Chao et al., arXiv 2404.01318; MIT licence",
)
_HARMBENCH = PublicFile(
    "HarmBench",
    "harmbench.csv",
    f"{_GITHUB}/centerforaisafety/HarmBench/8e1604d1171fe8a48d8febecd22f600e462bdcdd"
    "/data/behavior_datasets/harmbench_behaviors_text_all.csv",
    "8d81accedd38eaaf8b760618622bb888417d1fd0c86eba65c427a16f1cbb4afc",
    "Mazeika et al., arXiv 2402.04249; MIT licence",
)
_STRONGREJECT = PublicFile(
    "StrongREJECT",
    "strongreject.csv",
    f"{_GITHUB}/alexandrasouly/strongreject/f7cad6c17e624e21d8df2278e918ae1dddb4cb56"
    "/strongreject_dataset/strongreject_dataset.csv",
    "4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381",
    "Souly et al., arXiv 2402.10260; MIT licence",
)
_XSTEST = PublicFile(
    "XSTest",
    "xstest.csv",
    f"{_GITHUB}/paul-rottger/xstest/d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d/xstest_prompts.csv",
    "11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a",
    "Röttger et al., arXiv 2308.01263; CC BY 4.0",
)
_MT_BENCH = PublicFile(
    "MT-Bench",
    "mt-bench.jsonl",
    f"{_GITHUB}/lm-sys/FastChat/587d5cfa1609a43d192cedb8441cac3c17db105d/fastchat/llm_judge/data/mt_bench/question.jsonl",
    "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    "Zheng et al., arXiv 2306.05685; Apache licence 2.0",
)

PUBLIC_SETS = {
    "advbench": PublicSet(ADVBENCH),
    "jailbreakbench": PublicSet(_HARMFUL_BEHAVIORS),
    "jailbreakbench-benign": PublicSet(_BENIGN_BEHAVIORS),
    # The other behaviours of HarmBench need a context or ask for copyrighted texts.
    "harmbench": PublicSet(_HARMBENCH, "FunctionalCategory", "standard"),
    "strongreject": PublicSet(_STRONGREJECT),
    "xstest": PublicSet(_XSTEST),
    "xstest-safe": PublicSet(_XSTEST, "label", "safe"),
    "xstest-unsafe": PublicSet(_XSTEST, "label", "unsafe"),
    "mt-bench": PublicSet(_MT_BENCH),
}
"""The public prompt sets by name."""
