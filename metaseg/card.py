"""The card of an initialisation: what it is, how good, where its limits are; Markdown with Hugging Face's front matter.

Every line is a fact out of the initialisation's own metadata or the `results.json` beside it. What neither says, the
card does not say.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from metaseg.data.source import SPLITS
from metaseg.errors import printable
from metaseg.initialisation import About, read_about
from metaseg.texts import read_json

_IN_CODE = str.maketrans({"`": "'", "|": "\\|"})  # so that neither code nor the cell around it ends
_MARKS = re.compile(r"[^\w .-]|(?<![^\W_])_|_(?![^\W_])")  # all that is not of words; fomaml_star is one


class Known(NamedTuple):
    """What is known of a data set beyond its name, as sentences: its pictures, what for, what not for, its licence."""

    pictures: str
    good: str
    bad: str
    licence: str


EMOJI = Known(
    "θ learned from emoji artwork in random pose, size and light on procedural backgrounds.",
    "Good for drawn objects of a new kind, alone or among others: icons, stickers, signs.",
    "Not tried on photographs, nor in medicine, from the air or on text: expect less, ask `leave_one_out` how much, "
    "and meta-train on FSS-1000 or data of your own. Parts thinner than a few pixels at its image size are lost.",
    "The pictures were drawn from artwork of OpenMoji (https://openmoji.org, CC BY-SA 4.0) and Twemoji "
    "(https://github.com/jdecked/twemoji, CC BY 4.0).",
)
DATA = {"emoji": EMOJI}


def _known(dataset: str) -> Known:
    name = _text(dataset)
    unknown = f"θ learned from the images of {name}; of other images nothing is known here."
    licence = f"The licence of {name}'s images is not known to metaseg: ask whoever made them."
    return DATA.get(dataset, Known(unknown, "", "", licence))


def write_card(init: Path, path: Path | None = None) -> Path:
    """Write the card of an `init.safetensors` (or `.ckpt`) to `path`, by default to card.md beside it; returns where.

    Raises:
        WeightsError: if the initialisation is unreadable.
    """
    path = path or init.with_name("card.md")
    about, results = read_about(init), read_results(init)
    try:
        text = card(about, results)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):  # a results.json of no run's
        text = card(about, None)
    path.write_text(text, encoding="utf-8")
    return path


def read_results(init: Path) -> dict[str, Any] | None:
    """The results.json beside an initialisation; None if there is none, or it is of another θ or another ω."""
    try:
        results: dict[str, Any] = read_json(init.parent / "results.json")
    except (FileNotFoundError, ValueError):
        return None
    about = read_about(init)
    names = ("algo", "seed", "meta_steps", "update")
    same = isinstance(results, dict) and all(results.get(name) == getattr(about, name) for name in names)
    return results if same and about.shots is None else None


def card(about: About, results: dict[str, Any] | None) -> str:
    """The card's text.

    Args:
        about: what is known of θ.
        results: of its `results.json`; None if its error was not estimated.
    """
    body = "\n\n".join(
        [_what(about, results), _numbers(results), _update(about), _limits(about, results), _licence(about)]
    )
    return f"---\n{OmegaConf.to_yaml(_front_matter(about, results))}---\n\n{body}\n"


def _front_matter(about: About, results: dict[str, Any] | None) -> dict[str, Any]:
    front: dict[str, Any] = {
        "license": "other",
        "license_name": "see-licence-below",
        "library_name": "metaseg-lightning",
        "pipeline_tag": "image-segmentation",
        "tags": ["few-shot-segmentation", "meta-learning", _name(about.algo)],
    }
    if results and results["test"]:
        test, name = results["test"], _name(results["dataset"])
        iou = {"type": "iou", "name": "mean of per-image object IoU, on test tasks", "value": test["iou"]["mean"]}
        result = {
            "task": {"type": "image-segmentation"},
            "dataset": {"name": name, "type": name, "split": "test"},
            "metrics": [iou],
        }
        front["model-index"] = [{"name": _name(f"{about.algo}-{about.dataset}"), "results": [result]}]
    return front


def _what(about: About, results: dict[str, Any] | None) -> str:
    if about.shots is None:
        title = f"{_text(about.algo)} on {_text(about.dataset)}: an initialisation for few-shot segmentation"
        purpose = "To be adapted to a new kind of object from a few labelled images."
    else:
        title = f"A segmentation network adapted from {about.shots} labelled image{'s' * (about.shots > 1)}"
        purpose = "The facts below are of the initialisation that it was adapted from."
    table = "\n".join(f"| {name} | {value} |" for name, value in _facts(about, results).items())
    return f"# {title}\n\n{purpose}\n\n| | |\n| --- | --- |\n{table}"


def _facts(about: About, results: dict[str, Any] | None) -> dict[str, str]:
    model = {key: value for key, value in about.model.items() if key not in ("_target_", "weights")}
    weights = about.model.get("weights")
    facts = {
        "network": f"{_text(str(about.model.get('_target_')).rpartition('.')[2])}: "
        + ", ".join(_code(f"{key}={value}") for key, value in model.items()),
        "weights before": "random" if weights is None else _text(Path(str(weights)).name),
        "algorithm": f"{_text(about.algo)}, {about.meta_steps} meta-steps, seed {about.seed}",
    }
    if about.meta_steps:
        seen = about.seen or {}
        counts = ", ".join(f"{len(seen[split])} {split} classes" for split in SPLITS if seen.get(split))
        facts["meta-trained on"] = f"{_text(about.dataset)}{f' ({counts})' if counts else ''}"
        facts["splits' SHA-256"] = _code(about.splits_sha256)
    if about.image_size is not None:
        facts["image size"] = f"{about.image_size}² pixels"
    if results and results["git_commit"]:
        facts["commit"] = _code(results["git_commit"])
    return facts


def _numbers(results: dict[str, Any] | None) -> str:
    if results is None:
        return "## Numbers\n\nNone: no results.json of it lies beside it."
    drawn = results["episodes"]
    lines = [
        "## Numbers\n",
        f"On {_text(results['dataset'])} at {drawn['image_size']:d}²: {results['shots']:d} support and "
        f"{drawn['queries']:d} query images an episode, {drawn['draws']:d} a task, batch norm "
        f"{_code(results['batchnorm'])}. In %; IoU is the mean of "
        "per-image object IoU, its interval a bootstrap over tasks, of one seed.\n",
        "| split | tasks | IoU | 95 % | before adaptation | mIoU (class) | FB-IoU |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(split, results[split]) for split in reversed(SPLITS) if results[split]]
    if results["val"] and (results["meta_steps"] or len(results.get("val_iou_by_lr", {})) > 1):
        lines.append("\nChoices were made on the val tasks, so their IoU flatters.")
    if searched := results.get("uho"):
        best = _percent(searched["val_iou"])
        lines.append(f"\nω is the best of {searched['trials']:d} trials on val tasks; its IoU there, {best}, flatters.")
    return "\n".join(lines)


def _row(split: str, part: dict[str, Any]) -> str:
    low, high = map(_percent, part["iou"]["ci95"])
    others = (part[name] for name in ("iou_before_adaptation", "miou_class", "fb_iou"))
    values = [split, f"{part['tasks']:d}", _percent(part["iou"]["mean"]), f"[{low}, {high}]", *map(_percent, others)]
    return f"| {' | '.join(values)} |"


def _update(about: About) -> str:
    title = "Recommended update procedure ω" if about.shots is None else "Update procedure ω that adapted it"
    yaml = OmegaConf.to_yaml(about.update).replace("`", "'")  # or the code would end there
    return f"## {title}\n\n```yaml\n{yaml}```"


def _limits(about: About, results: dict[str, Any] | None) -> str:
    limits = [
        "One kind of object at a time: each pixel is object or background.",
        "It predicts in windows of its image size, at the images' own scale."
        if about.tile
        else "Images are squashed to a square, whatever their proportions.",
    ]
    if about.meta_steps:
        known = _known(about.dataset)
        limits += [sentence for sentence in (known.pictures, known.good, known.bad) if sentence]
    if results and (tested := results["test"] or results["val"]):
        before, after = _percent(tested["iou_before_adaptation"]), _percent(tested["iou"]["mean"])
        limits.append(
            f"Adapt it before use: IoU is {before} % before and {after} % after it, with {results['shots']:d} shots."
        )
    if about.update.get("batchnorm") == "batch":
        limits.append(
            "ω predicts by the statistics of images that are predicted together (transductive); "
            "an exported network does so by its running ones."
        )
    return "## Use and limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _licence(about: About) -> str:
    parts = ["metaseg's code: MIT."]
    if about.meta_steps:
        parts.append(_known(about.dataset).licence)
    if about.model.get("weights") == "imagenet":
        backbone = _text(about.model.get("backbone"))
        parts.append(f"The backbone began from published ImageNet weights of {backbone}, under a licence of their own.")
    return "## Licence\n\n" + "\n".join(f"- {part}" for part in parts)


def _text(said: object) -> str:
    """What a file says, as text in one line: what Markdown or HTML could take for a mark of theirs is an entity."""
    return _MARKS.sub(lambda found: f"&#{ord(found[0])};", printable(str(said)))


def _name(said: object) -> str:
    """What a file says, as a name in the front matter: of words alone, for some pages show it as Markdown, too."""
    return _MARKS.sub("-", printable(str(said)))


def _code(said: object) -> str:
    """What a file says, as code in one line: it ends nowhere before its end."""
    return f"`{printable(str(said)).translate(_IN_CODE)}`"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
