"""`python -m benchmarks.language_models RUN`: what a run of language models came to, as a record to keep.

Of a finished run directory of `ban-fast train`: its perplexities, learning curves, settings and machine, and the
perplexity of the training text's word frequencies alone, which a model that learned anything of order is below. A run
smaller than the paper's says what was cut. One file a run, in `benchmarks/results/language_models/`.
"""

import argparse
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from ban_fast.config import Config
from ban_fast.data import Corpus, load_corpus
from ban_fast.evaluation import RunDirectory
from ban_fast.report import describe
from benchmarks import machine

RESULTS = Path(__file__).resolve().parent / "results" / "language_models"


def main() -> int:
    """Write the record, and print where and the least of it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.language_models", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("run", type=Path, help="a finished run directory")
    parser.add_argument("--data-dir", type=Path, help="where the text lies, if not where the run had it")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the record")
    parser.add_argument("--cut", help="what the text is of a larger one, which the run can't know")
    options = parser.parse_args()
    made = record(RunDirectory(options.run), options.data_dir, options.cut)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / file_name(made)
    machine.write(path, json.dumps(made, indent=1) + "\n")
    print(f"wrote {path}\n{made['scaled_down'] or 'of the full size'}; unigram test {made['unigram']['test']:.2f}")
    for each in made["generations"]:
        print(f"{describe.generation(each['generation'])}: {describe.headline(each['test'])}")
    return 0


def record(run: RunDirectory, data_dir: Path | None = None, cut: str | None = None) -> dict[str, Any]:
    """Everything of a run that another machine's can be held against; no path. `cut`: what its text is of a larger."""
    values, results, environment = run.config(), run.results(), run.environment()
    config = Config.from_dict(values)
    corpus = load_corpus(
        config.data.name,
        directory=data_dir or config.data.directory,
        level="character" if config.text.level == "character" else "word",
    )
    values["data"] |= {"directory": None, "name": Path(config.data.name).name}
    values["teacher"]["cache_directory"] = None
    return {
        "kind": "language models",
        "scaled_down": _scaled_down(values, cut),
        "unfinished": describe.unfinished(values, results),
        "unigram": {split: unigram_perplexity(corpus, split) for split in ("valid", "test")},
        "trained_on": environment,
        "recorded_on": machine.describe("cpu"),
        "config": values,
        "generations": results["generations"],
        "ensembles": results["ensembles"],
        "curves": {str(number): run.metrics(number) for number in run.generations()},
    }


def _scaled_down(values: dict[str, Any], cut: str | None) -> str | None:
    said = describe.scaled_down(values)
    if cut is None:
        return said
    return f"scaled down: {cut}" if said is None else f"{said}, {cut}"


def unigram_perplexity(corpus: Corpus, split: str) -> float:
    """Of a split's tokens after its first, each by its share of the training text, one more than it has."""
    counts = Counter(corpus.train.tolist())
    total = len(corpus.train) + len(corpus.vocabulary)
    tokens = getattr(corpus, split).tolist()[1:]
    return math.exp(-sum(math.log((counts[token] + 1) / total) for token in tokens) / len(tokens))


def file_name(made: dict[str, Any]) -> str:
    """Text, network, what students learn from, machine and commit."""
    config, trained_on = made["config"], made["trained_on"]
    objective = config["objective"]
    weights = [str(objective[name]) for name in ("kd_weight", "label_weight") if objective[name] is not None]
    words = (config["data"]["name"], config["model"]["name"], objective["name"], *weights, trained_on["device"])
    commit = (trained_on.get("git_commit") or "unknown")[:10]
    return f"{re.sub(r'[^a-z0-9]+', '-', '-'.join(words).lower()).strip('-')}-{commit}.json"


if __name__ == "__main__":
    raise SystemExit(main())
