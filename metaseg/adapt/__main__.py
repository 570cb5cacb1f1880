"""Adapt to a few labelled images and predict others: `python -m metaseg.adapt init=… support=… query=… out=…`."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, track

import metaseg
from metaseg import practice
from metaseg.adapt.output import CARD, MODEL, Output
from metaseg.card import write_card
from metaseg.config import check_overrides, config_dir, expand_update
from metaseg.data.faults import Fault, fault_lines, told
from metaseg.data.source import UInt8
from metaseg.errors import ConfigError, DataError, UserError
from metaseg.pictures import Labelled, PictureError, find_labelled, find_pictures, read_picture
from metaseg.practice import Adapted, Initialisation
from metaseg.ship import shipped

PLACES = ("init", "support", "query", "out")
RAW = (*PLACES, "category")  # taken as they are: Hydra would read numbers, brackets, commas and quotes in them
SWITCHES = ("tile", "flips", "soft", "leave_one_out")


class Request(NamedTuple):
    """What the words of the command line ask for: the values of `conf/adapt.yaml`, and those of ω that they name."""

    config: DictConfig
    update: dict[str, Any]


def read_words(words: Sequence[str]) -> Request:
    """Compose `conf/adapt.yaml` with the command line's words.

    Raises:
        ConfigError: naming the nearest key of a mistyped one, or what is missing.
        HydraException: if they are no overrides.
    """
    for word in words:
        added = word.startswith("+") and not word.lstrip("+").startswith("update.")  # nothing would read it
        if "=" not in word or word.startswith(("-", "~")) or added:
            raise ConfigError(f"{word!r} is no key=value: --help lists the keys")
    raw = {key: value for key, _, value in (word.partition("=") for word in words) if key in RAW}
    others = expand_update([word for word in words if word.partition("=")[0] not in RAW])
    check_overrides(others, "adapt")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("adapt", overrides=others)
    for key, value in raw.items():
        given = None if value in ("", "null") else value
        config[key] = str(Path(given).expanduser()) if given and key in PLACES else given
    if config.out is None:
        raise ConfigError("out has no value: give out=PATH, a folder for the results; --help lists the keys")
    if config.support is None and config.query is None:
        raise ConfigError("nothing to do: give support=DIR to adapt, query=DIR to predict, or both")
    config.init = config.init or str(shipped())
    for key in SWITCHES:
        if not isinstance(config[key], bool) and not (key == "tile" and config.tile is None):
            raise ConfigError(f"{key}={config[key]}: give true or false")
    if not isinstance(config.seed, int):
        raise ConfigError(f"seed={config.seed}: give a whole number")
    named = [o.key_or_group.removeprefix("update.") for o in OverridesParser.create().parse_overrides(others)]
    whole = "update" in named and OmegaConf.to_container(config["update"], resolve=True)
    values = dict(whole) if isinstance(whole, dict) else {}
    for word, key in zip(others, named, strict=True):
        if word.lstrip("+").startswith("update."):
            values[key] = _plain(OmegaConf.select(config["update"], key))
    return Request(config, values)


class Found(NamedTuple):
    """What lies in the folders: images with masks, images to segment, and the faults of both folders."""

    labelled: list[Labelled]
    pictures: list[Path]
    faults: dict[str, list[Fault]]


def run(request: Request, console: Console) -> None:
    """Adapt if there is a support, predict if there is a query, and leave the results in `out`.

    Raises:
        UserError: if nothing could be done; what can is done, and the rest named on the console and in the record.
    """
    config, started = request.config, time.perf_counter()
    init = practice.load(config.init, image_size=config.image_size, device=config.device)
    if config.support is None and init.about.shots is None:
        raise ConfigError(f"init={config.init} is not adapted to anything yet: give support=DIR of labelled images")
    tile = init.about.tile if config.tile is None else bool(config.tile)
    _check_out(config)
    found = _find(config)
    names = [path.name for path in found.pictures]
    out = Output(Path(config.out), names, adapts=config.support is not None, soft=config.soft)

    record: dict[str, Any] = {"metaseg": metaseg.__version__, "command": _plain(config) | {"update": request.update}}
    model = init
    if config.support:
        model, learned = _adapt(init, found, request, tile, console)
        record |= learned
    out.make()
    about = {key: value for key, value in asdict(model.about).items() if key != "seen"}  # hundreds of classes
    record |= {"about": about, "predicted": {}}
    out.write_record(record)  # from now on the files here are known as ours, also if this run is interrupted
    if isinstance(model, Adapted):
        model.save(out.folder / MODEL)
        write_card(out.folder / MODEL, out.folder / CARD)

    adapted = time.perf_counter()
    out.clear()
    record["predicted"] = _predict(model, found, config, out, console)
    record["seconds"] = {
        "adapting": round(model.seconds, 2) if isinstance(model, Adapted) else 0.0,
        "predicting": round(time.perf_counter() - adapted, 2),
        "all": round(time.perf_counter() - started, 2),
    }
    record["faults"] = [
        {"in": where, "kind": fault.kind, "path": fault.path.as_posix(), "detail": fault.detail, "cure": fault.cure}
        for where, faults in found.faults.items()
        for fault in faults
    ]
    out.write_record(record)
    lines = list(_summary(record))
    out.write_index(Path(config.query or config.support).resolve().name, lines, list(record["predicted"]))
    for where, faults in found.faults.items():
        _say(console, told(faults, where))
    if names and not record["predicted"]:
        none = f"none of the {len(names)} images in query={config.query} could be used; see above"
        if not config.support:
            raise DataError(none)
        _say(console, [none])
    if config.query and not names:
        _say(console, [f"nothing to predict: all images in query={config.query} are labelled"])
    _say(console, [*lines, f"{out.folder / 'index.html'} shows them"])


def _check_out(config: DictConfig) -> None:
    """Refuse to write among the user's own images and masks, where the next run would take a prediction for a label."""
    out = Path(config.out).resolve()
    for key in ("support", "query"):
        place = Path(config[key]).resolve() if config[key] else None
        if place and out in (place, place / "images", place / "masks"):
            raise ConfigError(f"out={config.out} holds images or masks of yours ({key}): choose a folder of its own")


def _find(config: DictConfig) -> Found:
    support, query = (Path(place) if place else None for place in (config.support, config.query))
    labelled, faults = find_labelled(support, config.category) if support else ([], [])
    if query and not query.exists():
        raise DataError(f"query={query}: there is no such file or folder")
    pictures, strays = find_pictures(query) if query else ([], [])
    if query and not pictures:
        raise DataError(f"query={query} holds no images: give a folder of JPEG, PNG, WebP, BMP or TIFF files")
    if support and query and support.resolve() == query.resolve():
        known = {one.image for one in labelled}
        pictures, strays = [path for path in pictures if path not in known], []
        faults = [fault for fault in faults if fault.kind != "image without a mask"]  # it is to be found
    return Found(labelled, pictures, {"support": faults, "query": strays})


def _predict(model: Initialisation, found: Found, config: DictConfig, out: Output, console: Console) -> dict[str, Any]:
    """Predict and write what can be read; returns the predicted images' part of the record, by name."""
    predicted = {}
    for path in track(found.pictures, "predicting", console=console, disable=not found.pictures):
        try:
            picture = read_picture(path)
        except PictureError as error:
            found.faults["query"].append(error.at(Path(path.name)))
            continue
        probability = model.predict(picture, soft=True, tile=config.tile, flips=config.flips)
        try:
            out.write_prediction(path.name, picture, probability)
        except OSError as error:
            cure = "shorten the image's name, or make room for the results"
            found.faults["query"].append(Fault("result not written", Path(path.name), cure, str(error.strerror)))
            continue
        predicted[path.name] = {"share_of_object": float(np.mean(probability > 0.5))}
    return predicted


def _adapt(
    init: Initialisation, found: Found, request: Request, tile: bool, console: Console
) -> tuple[Adapted, dict[str, Any]]:
    """The model adapted to the sound ones of the labelled images, and its part of the record; others are faults."""
    config = request.config
    folder, faults = Path(config.support), found.faults["support"]
    sound, views = [], []
    for one in found.labelled:
        try:
            views.append(init.views(*one.read(), tile=tile))
            sound.append(one)
        except PictureError as error:
            at = error.path or (one.mask if isinstance(one.mask, Path) else one.image)
            faults.append(error.at(at.relative_to(folder)))
    if not sound:
        missing = fault_lines(faults) or ["there are no images with masks; --help says how they are named"]
        raise DataError("\n".join([f"nothing in support={folder} can be used:", *missing]))
    options = {"tile": tile, "seed": config.seed, "update": request.update}
    with _bar(console, "adapting") as progress:
        model = init.adapt_to(views, **options, progress=progress)
    learned: dict[str, Any] = {
        "support": [one.image.relative_to(folder).as_posix() for one in sound],
        "steps": model.steps,
        "support_loss": list(model.losses),
        "held_out_iou": [list(score) for score in model.held_out],
        "leave_one_out": None,
    }
    if config.leave_one_out and len(sound) < 2:
        console.print("leave_one_out: no estimate, for it needs two labelled images or more")
    elif config.leave_one_out:
        files = _Files(sound, 0), _Files(sound, 1)
        with _bar(console, f"leaving one out, {len(sound)} adaptations") as progress:
            ious = init.leave_one_out(*files, **options, flips=config.flips, progress=progress)
        by_image = dict(zip(learned["support"], ious, strict=True))
        learned["leave_one_out"] = {"iou": float(np.mean(ious)), "by_image": by_image}
    return model, learned


def _summary(record: Mapping[str, Any]) -> Iterator[str]:
    about, estimate = record["about"], record.get("leave_one_out")
    if "support" in record:
        size, losses = about["image_size"], record["support_loss"]
        what = f"{len(record['support'])} labelled images at {size}², {record['steps']} steps"
        yield f"adapted to {what}: support loss {losses[0]:.3f} → {losses[-1]:.3f}"
    if record.get("held_out_iou"):
        step, score = max(record["held_out_iou"], key=lambda one: one[1])
        yield f"steps chosen on a held-out share of them: IoU {100 * score:.1f} % at step {step}"
    if estimate:
        yield f"IoU to expect: {100 * estimate['iou']:.1f} %, each labelled image predicted from the others"
    if record["predicted"]:
        yield f"{len(record['predicted'])} images predicted, {record['seconds']['all']:.0f} s in all"


def _say(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


class _Files:
    """The images (part 0) or masks (part 1) of files, each read when it is its turn: all may not fit into memory."""

    def __init__(self, labelled: Sequence[Labelled], part: int) -> None:
        self.labelled, self.part = labelled, part

    def __iter__(self) -> Iterator[UInt8]:
        return (one.read()[self.part] for one in self.labelled)


@contextmanager
def _bar(console: Console, what: str) -> Iterator[Callable[[practice.Progress], None]]:
    """A progress bar with the support loss and, under early stopping, the held-out IoU."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None, said="")

        def tell(at: practice.Progress) -> None:
            held_out = "" if at.held_out is None else f", held-out IoU {100 * at.held_out:.0f} %"
            said = f"step {at.step}, support loss {at.loss:.3f}{held_out}"
            title = f"{what}: choosing the steps" if at.searching else what
            bar.update(task, description=title, completed=at.step, total=at.steps, said=said)

        yield tell


def _help() -> str:
    """The keys with their comments, as the YAML files have them."""
    own, omega = ((config_dir() / name).read_text(encoding="utf-8") for name in ("adapt.yaml", "update/sgd.yaml"))
    head, _, keys = own.partition("defaults:")
    values = [f"  {line}" for line in omega.splitlines() if not line.startswith(("#", "_target_"))]
    update = "update: # as init recommends; or a preset, a file, or values (update.steps=50) of these, here sgd's:"
    return "\n".join([head + keys.partition("\n\n")[2] + update, *values, ""])


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def main() -> None:
    """Run from the command line; what the user can mend ends in its message alone, with exit code 1."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        sys.stdout.write(_help())
        return
    try:
        run(read_words(words), Console(stderr=True))
    except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
        sys.exit(f"metaseg: {error}")


if __name__ == "__main__":
    main()
