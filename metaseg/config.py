"""Where the configs are, and what is checked of a composed one before any work begins."""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from metaseg.engine import check_optimizer
from metaseg.errors import ConfigError, WeightsError
from metaseg.initialisation import read_about
from metaseg.ranks import is_distributed
from metaseg.texts import is_plain, read_yaml
from metaseg.trust import OWN_UPDATE, check_trusted
from metaseg.update import Update

MODES = ("fit_test", "fit", "test", "uho", "search", "curves")
SEARCHES = ("uho", "search")  # modes of which several workers may share a study
DDP = "pytorch_lightning.strategies.DDPStrategy"
_NODES = ("algo", "dataset", "model", "update", "trainer", "engine", "evaluate", "uho", "search", "curves")
_LEARNING_NODES = ("algo.method", "algo.outer", "algo.inner")
_LARGEST = torch.finfo(torch.float32).max
_SEEDS = 2**63  # that torch's generators take
_NUMBERS = (  # of an update procedure
    *("lr", "steps", "batch_size", "weight_decay", "l1", "dropout", "augment"),
    *("loss.label_smoothing", "loss.darc1"),
)


def sweep_name() -> str | None:
    """The name that the jobs of this multirun share, of their folder's last two parts; None for a run alone."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return "/".join(Path(HydraConfig.get().sweep.dir).parts[-2:])


def chosen(group: str) -> str | None:
    """The preset that was chosen of a group of the configuration; None where Hydra has not been the one to choose."""
    return HydraConfig.get().runtime.choices.get(group) if HydraConfig.initialized() else None


def swept() -> str:
    """What this job of a multirun was given of what varies, but algorithm and seed, as " update.lr=0.1"; else ""."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return ""
    hydra, parser = HydraConfig.get(), OverridesParser.create()
    asked = OmegaConf.load(Path(hydra.sweep.dir) / "multirun.yaml").hydra.overrides.task
    varied = {o.key_or_group for o in parser.parse_overrides(list(asked)) if o.is_sweep_override()} - {"algo", "seed"}
    return "".join(f" {word}" for word in hydra.overrides.task if word.partition("=")[0].lstrip("+~") in varied)


for resolver in (sweep_name, swept, chosen):  # of conf/logger/wandb.yaml
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def config_dir() -> Path:
    """The folder `conf`: inside the installed package, or at the top of a checkout."""
    installed = Path(__file__).parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "conf"


def check_overrides(arguments: Sequence[str], name: str = "config") -> None:
    """Refuse command-line overrides of keys that do not exist; Hydra's own message names no neighbour.

    Args:
        arguments: the command line's words.
        name: of the primary config.

    Raises:
        ConfigError: naming the nearest keys.
    """
    try:
        overrides = OverridesParser.create().parse_overrides([a for a in arguments if not a.startswith("-")])
        listed = OmegaConf.select(OmegaConf.load(config_dir() / f"{name}.yaml"), "defaults")
        groups = {str(group) for entry in listed if OmegaConf.is_dict(entry) for group in entry}
        chosen = [f"{o.key_or_group}={_first_value(o)}" for o in overrides if o.key_or_group in groups and o.value()]
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            config = compose(name, overrides=chosen)
    except HydraException:
        return  # Hydra's own parsing says it well: bad syntax, or a preset that does not exist and those that do
    keys = set(_keys(OmegaConf.to_container(config)))
    known = groups | keys
    for override in overrides:
        key = override.key_or_group
        if override.is_add() or override.is_force_add() or key in known or key.startswith("hydra"):
            continue
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or sorted(groups)
        adding = f" To add a new key: +{key}=…" if name == "config" else ""
        raise ConfigError(f"there is no key '{key}'; did you mean {' or '.join(near)}?{adding}")


def expand_update(arguments: Sequence[str]) -> list[str]:
    """Replace `update=PATH` by an override for each value of the update procedure that the file holds.

    A YAML file holds one, as UHO leaves it; an `init.safetensors` the one that is recommended for its θ. Both may come
    from anywhere, so they name no code but what `trust.PARTS` has.

    Raises:
        ConfigError: if there is no such file, or it holds no update procedure.
        WeightsError: if it is an `init.safetensors` that metaseg did not write, or names any other code.
    """
    expanded: list[str] = []
    for argument in arguments:
        path = Path(argument.removeprefix("update=")).expanduser()
        if not argument.startswith("update=") or path.suffix not in (".yaml", ".yml", ".safetensors"):
            expanded.append(argument)
            continue
        if not path.is_file():
            raise ConfigError(f"{argument}: there is no such file; to choose a preset give its name without .yaml")
        try:
            values = read_yaml(path) if path.suffix != ".safetensors" else read_about(path).update
        except WeightsError:
            raise
        except (OSError, ValueError) as error:
            raise ConfigError(f"{argument} cannot be read ({error}): give an update.yaml that mode=uho left") from error
        if not isinstance(values, dict) or "optimizer" not in values or not is_plain(values):
            raise ConfigError(
                f"{argument} holds no update procedure; mode=uho writes one, update.yaml, and every run's "
                "init.safetensors has one"
            )
        check_trusted({"update": values}, path, OWN_UPDATE)
        expanded += [f"++update.{key}={json.dumps(value)}" for key, value in _leaves(values)]
    return expanded


def expand_workers(arguments: Sequence[str]) -> list[str]:
    """Make of the mode's `workers=N` a multirun over `worker`, by joblib if no launcher is named.

    Raises:
        ConfigError: if it names the folder of a single run.
    """
    given = dict(argument.partition("=")[::2] for argument in arguments)
    modes = (given["mode"],) if "mode" in given else SEARCHES  # which a preset may have chosen, too
    wanted = [given[key] for mode in modes if (key := f"{mode}.workers") in given]
    if not wanted or not wanted[0].isdecimal() or int(wanted[0]) < 2 or "worker" in given:
        return list(arguments)
    if "hydra.run.dir" in given:
        raise ConfigError(
            f"hydra.run.dir={given['hydra.run.dir']}: {wanted[0]} workers are a multirun, which has a folder each: "
            f"give hydra.sweep.dir={given['hydra.run.dir']}"
        )
    more = [f"worker={','.join(map(str, range(int(wanted[0]))))}"]
    if "hydra/launcher" not in given:
        more.append("hydra/launcher=joblib")
        if "hydra.launcher.n_jobs" not in given:
            more.append(f"hydra.launcher.n_jobs={wanted[0]}")
    return [*([] if {"-m", "--multirun"} & given.keys() else ["-m"]), *arguments, *more]


def _leaves(node: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def inner_config(config: DictConfig) -> DictConfig:
    """ω while meta-training: `update`, with what `algo.inner` says instead, key by key."""
    # shallow on purpose: another optimizer replaces the whole node, arguments included
    return OmegaConf.create({**dict(config["update"]), **dict(config.algo.inner)})


def make_update(config: DictConfig, name: str = "update") -> Update:
    """Instantiate an update procedure.

    Raises:
        ConfigError: if it has a field that there is none of.
    """
    fields = [field.name for field in dataclasses.fields(Update)]
    for key in map(str, config):
        if key != "_target_" and key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
            raise ConfigError(f"{name} has no field '{key}'; did you mean {near[0]}?")
    numbers = {key: OmegaConf.select(config, key, default=0) for key in _NUMBERS}
    wrong = [key for key, value in numbers.items() if not _is_number(value)]
    if wrong:
        raise ConfigError(f"{name}.{wrong[0]}={numbers[wrong[0]]}: give a number")
    try:
        update = instantiate(config, _convert_="all")
    except (InstantiationException, TypeError) as error:  # a TypeError of such as _partial_=5
        if isinstance(error.__cause__, ConfigError):
            raise ConfigError(str(error.__cause__).replace("update.", f"{name}.", 1)) from error
        raise ConfigError(f"{name} cannot be made of these values: {error.__cause__ or error}") from error
    assert isinstance(update, Update)
    try:
        update.make_optimizer([torch.zeros(2, 2)], [])
        float(update.schedule(0.0))
    except Exception as error:  # each optimizer has its own checks of its options
        raise ConfigError(f"{name}.optimizer or {name}.schedule has an option that it cannot use: {error}") from error
    return update


def device_of(config: DictConfig) -> torch.device:
    """Where the trainer would put the network."""
    wants = config.trainer.accelerator in ("auto", "gpu", "cuda")
    return torch.device("cuda" if wants and torch.cuda.is_available() else "cpu")


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration in plain containers."""
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def config_sha256(config: DictConfig) -> str:
    """SHA-256 (hex) of what decides a run's numbers: two runs of one hash and one commit agree."""
    keys: tuple[str, ...] = ("mode", "seed", "ckpt_path", "algo", "dataset", "update", "model", "evaluate")
    container = plain(config)
    keys += (config.mode,) if config.mode in ("uho", "search", "curves") else ()
    named = {key: container[key] for key in keys} | {"max_steps": config.trainer.max_steps}
    for key in ("cache_dir", "workers"):
        named["dataset"].pop(key, None)
    for key in ("rungs", "processes", "panels"):  # looks on the way, and ways to the same numbers
        named["evaluate"].pop(key)
    for key in ("workers", "storage"):
        named.get(config.mode, {}).pop(key, None)
    named["engine"] = {key: value for key, value in container["engine"].items() if key != "lanes"}
    if trains(config):
        named["ckpt_path"] = None  # resumed, it ends as it would have
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def training_values(config: DictConfig) -> dict[str, Any]:
    """What decides a meta-training and its choice of a checkpoint, by dotted key; a resumed run must have the same.

    Not the network, the seed and the splits, which `initialisation.About` has.
    """
    container = plain(config)
    named = {key: container[key] for key in ("algo", "update")} | {"trainer": {"max_steps": config.trainer.max_steps}}
    deciding = ("shots", "queries", "draws", "val_tasks", "validations", "seed")
    named["evaluate"] = {key: container["evaluate"][key] for key in deciding}
    return dict(_leaves(named))


def initialisations(config: DictConfig) -> list[Path]:
    """The files that a run takes θ from; not those by which it goes on with its own meta-training."""
    named = [None if trains(config) else config.ckpt_path, config.model.get("weights")]
    named += (config.curves.inits or {}).values() if config.mode == "curves" else []
    return [path for name in named if name and (path := Path(str(name)).expanduser()).is_file()]


def trains(config: DictConfig) -> bool:
    """Whether the run meta-trains."""
    return config.mode in ("fit_test", "fit", "search") and config.algo.method is not None


def check(config: DictConfig) -> None:
    """Refuse impossible combinations, before data are read or anything is written.

    Raises:
        ConfigError: on the first one, with its cure.
    """
    _check_nodes(config, _NODES)
    if config.algo.get("method") is not None:
        _check_nodes(config, _LEARNING_NODES)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} has no value: give {missing[0]}=…")
    for broken, cure in _rules(config):
        if broken:
            raise ConfigError(cure)
    updates = [make_update(config["update"])]
    if trains(config):
        updates.append(make_update(inner_config(config), "algo.inner"))
        _check_outer(config)
        _check_trainer(config)
    if config.engine["_target_"] == "metaseg.engine.auto":
        for update in updates:
            check_optimizer(update)


def _check_nodes(config: DictConfig, nodes: Sequence[str]) -> None:
    for node in nodes:
        value = OmegaConf.select(config, node)
        if not OmegaConf.is_dict(value):
            group = node.partition(".")[0]
            raise ConfigError(
                f"{node}={value}: it holds values of its own; change them one by one, as {node}.NAME=VALUE, or choose "
                f"a preset, {group}=NAME"
            )


def _check_outer(config: DictConfig) -> None:
    """Have the outer optimizer take two steps, as meta-training will; what is NaN in it shows in the second."""
    theta = torch.zeros(2, requires_grad=True, device=device_of(config))
    theta.grad = torch.full_like(theta, 1e-3)
    try:
        optimizer = instantiate(config.algo.outer, _convert_="all")([theta])
        for _ in range(2):
            optimizer.step()
        if not torch.isfinite(theta).all():
            raise ValueError("it makes NaN of numbers")
    except Exception as error:  # each optimizer has its own checks of its options
        raise ConfigError(
            f"algo.outer cannot take a meta-step ({error.__cause__ or error}): mend its options, or choose one of "
            "torch.optim whose step needs nothing but gradients, as torch.optim.SGD or Adam"
        ) from error


def _check_trainer(config: DictConfig) -> None:
    """Make the trainer once; meta-training makes its own, with what only it knows."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    try:
        instantiate(config.trainer, callbacks=None, **dict.fromkeys(quiet, False))
    except Exception as error:  # Lightning's own kinds, among others
        raise ConfigError(f"trainer cannot be made of these values: {error.__cause__ or error}") from error


def _rules(config: DictConfig) -> Iterator[tuple[bool, str]]:
    mode, path, evaluation = config.mode, config.ckpt_path, config.evaluate
    learns = config.algo.method is not None
    yield not isinstance(config.algo.name, str), f"algo.name={config.algo.name}: give a name, as algo.name=mine"
    yield mode not in MODES, f"mode={mode}: choose {', '.join(MODES)}"
    yield mode == "fit" and not learns, f"algo={config.algo.name} has nothing to fit: use mode=fit_test or mode=test"
    yield (
        mode == "search" and not learns,
        f"algo={config.algo.name} has nothing to meta-train, so nothing to search: use algo=reptile, fomaml, "
        "fomaml_star or joint; for its update procedure mode=uho",
    )
    yield (
        mode == "search" and path is not None,
        f"ckpt_path={path}: each trial of mode=search meta-trains anew, so leave it null; the same command goes on "
        "with the study, and model.weights=PATH begins all trials from other weights",
    )
    yield (
        mode in ("test", "uho") and learns and path is None,
        f"mode={mode} of algo={config.algo.name} needs ckpt_path=PATH of a .ckpt or init.safetensors; for the ImageNet "
        "initialisation itself use algo=finetune",
    )
    yield path is not None and not Path(str(path)).is_file(), f"ckpt_path={path}: there is no such file"
    yield (
        trains(config) and path is not None and not str(path).endswith(".ckpt"),
        f"ckpt_path={path}: resume from a .ckpt of a run's checkpoints folder; to start meta-training from these "
        f"weights use model.weights={path}",
    )
    yield (
        mode in ("fit_test", "fit") and not learns and path is not None,
        f"algo={config.algo.name} trains nothing, so ckpt_path has no use: to test it, add mode=test",
    )
    size = config.dataset.get("image_size")
    yield (
        size is not None and (not isinstance(size, int) or size < 32 or size % 16 != 0),
        f"dataset.image_size={size}: give a multiple of 16 from 32 on; EfficientLab works at stride 16",
    )
    for name, least in {"shots": 1, "queries": 1, "draws": 1, "validations": 1, "panels": 0}.items():
        yield _whole(f"evaluate.{name}", evaluation[name], least)
    for name, least in {"train_tasks": 0, "val_tasks": 1, "test_tasks": 1}.items():
        yield _whole(f"evaluate.{name}", evaluation[name], least, null="for all tasks")
    yield (
        evaluation.rungs != [] and not _ascending(evaluation.rungs),
        f"evaluate.rungs={evaluation.rungs}: give ascending steps from 1, as [1,5,10], or [] for none",
    )
    lrs = evaluation.lrs
    usable = OmegaConf.is_list(lrs) and lrs and all(_is_number(lr) and lr > 0 for lr in lrs)
    yield (
        not (lrs is None or usable),
        f"evaluate.lrs={lrs}: give a list of numbers above 0, as [0.02,0.05], or null to test update.lr",
    )
    yield from _uho_rules(config)
    yield from _search_rules(config)
    yield from _curves_rules(config)
    for name in ("seed", "evaluate.seed"):
        seed = OmegaConf.select(config, name)
        yield _whole(name, seed, 0)
        yield seed >= _SEEDS, f"{name}={seed}: give less than 2**63"
    yield _whole("checkpoint_every", config.checkpoint_every, 1, "meta-steps")
    yield _whole("workers", config.workers, 0)
    yield (
        not (_is_number(config.max_dropped) and 0 <= config.max_dropped <= 1),
        f"max_dropped={config.max_dropped}: give a share of the episodes, from 0 to 1",
    )
    if learns:
        yield _whole("trainer.max_steps", config.trainer.max_steps, 1, "meta-steps, or algo=finetune for none")
        lr = config.algo.outer.lr
        yield not _is_number(lr) or lr <= 0, f"algo.outer.lr={lr}: give a number above 0"
        final = config.algo.final_lr
        yield not _is_number(final) or final < 0, f"algo.final_lr={final}: give 0 or more"
        yield _whole("algo.meta_batch", config.algo.meta_batch, 1)
    yield from _logger_rules(config.logger or {})
    engine = config.engine
    yield _whole("evaluate.processes", evaluation.processes, 1, null="for one a thread")
    yield _whole("engine.lanes", engine.get("lanes", 1), 1)
    precision = engine.get("precision", "fp32")
    yield precision not in ("bf16", "fp32"), f"engine.precision={precision}: choose bf16 or fp32"
    accelerator = config.trainer.accelerator
    yield (
        accelerator in ("gpu", "cuda") and not torch.cuda.is_available(),
        f"trainer.accelerator={accelerator}, but torch sees no CUDA device: use trainer=cpu or trainer=auto",
    )
    trainer = config.trainer
    yield _whole("trainer.log_every_n_steps", trainer.get("log_every_n_steps"), 0, "meta-steps", "for Lightning's own")
    if not is_distributed(config):
        yield (
            trainer.devices != 1,
            f"trainer.devices={trainer.devices}: give trainer.devices=1, or trainer=ddp for more",
        )
        return
    ddp = OmegaConf.is_dict(trainer.strategy) and trainer.strategy.get("_target_") == DDP
    yield not ddp, f"trainer.strategy={trainer.strategy}: choose trainer=ddp for several processes"
    yield (
        mode == "search" or not trains(config),
        f"trainer=ddp is one meta-training, which mode={mode} of algo={config.algo.name} is not: use trainer=auto",
    )
    devices = trainer.devices
    yield (
        accelerator == "cpu" and not (isinstance(devices, int) and devices >= 1),
        f"trainer.devices={devices}: on the CPU give the number of processes, as trainer.devices=2",
    )


def _uho_rules(config: DictConfig) -> Iterator[tuple[bool, str]]:
    uho, update, searches = config.uho, config["update"], config.mode == "uho"
    yield not _ascending(uho.steps), f"uho.steps={uho.steps}: give ascending steps from 1, as [10,30]"
    yield (
        searches and config.evaluate.lrs is not None,
        f"evaluate.lrs={config.evaluate.lrs}: mode=uho searches the learning rate itself, so leave it null",
    )
    yield (
        searches and OmegaConf.is_dict(update.schedule) and update.schedule["_target_"] != "metaseg.update.Constant",
        "mode=uho scores an adaptation on its way as if it ended there, which a schedule over all steps forbids: "
        "use update.schedule._target_=metaseg.update.Constant",
    )
    yield searches and update.stopping is not None, "mode=uho chooses the steps itself: leave update.stopping null"


def _search_rules(config: DictConfig) -> Iterator[tuple[bool, str]]:
    """Of both modes that search, and of their workers."""
    mode, worker = config.mode, config.worker
    for search in SEARCHES:
        for name in ("trials", "random", "workers"):
            yield _whole(f"{search}.{name}", config[search][name], 1)
    yield _whole("worker", worker, 0, null="for a run alone")
    yield (
        worker is not None and mode not in SEARCHES,
        f"worker={worker}, but mode={mode}: only mode=uho and mode=search have workers",
    )
    wanted = config[mode].workers if mode in SEARCHES else 1
    yield (
        wanted > 1 and worker is None,
        f"{mode}.workers={wanted} belongs on the command line, which makes a multirun of it; from elsewhere start "
        f"each worker with {mode}.workers=1 worker=0 and so on",
    )
    yield (
        mode == "search" and config.evaluate.lrs is not None,
        f"evaluate.lrs={config.evaluate.lrs}: mode=search compares trials at their one update.lr, which search.space "
        "may hold, so leave it null",
    )


def _curves_rules(config: DictConfig) -> Iterator[tuple[bool, str]]:
    curves, draws_them = config.curves, config.mode == "curves"
    inits = curves.inits if OmegaConf.is_dict(curves.inits) else {}
    for name in ("k", "steps"):
        yield not _ascending(curves[name]), f"curves.{name}={curves[name]}: give ascending numbers from 1, as [1,5,10]"
    for name in ("queries", "draws"):
        yield _whole(f"curves.{name}", curves[name], 1)
    yield _whole("curves.tasks", curves.tasks, 1, null="for all tasks")
    yield (
        draws_them and not inits,
        "mode=curves compares initialisations: name them, as "
        "'curves.inits={reptile:RUN/init.safetensors,imagenet:imagenet}'",
    )
    for name, path in inits.items() if draws_them else ():
        yield (
            path not in ("imagenet", "random") and not Path(str(path)).is_file(),
            f"curves.inits.{name}={path}: there is no such file; give an init.safetensors, imagenet or random",
        )
    yield (
        draws_them and curves.baseline is not None and curves.baseline not in inits,
        f"curves.baseline={curves.baseline} is none of curves.inits: {', '.join(map(str, inits))}",
    )
    yield (
        draws_them and (config.ckpt_path is not None or config.evaluate.lrs is not None),
        "mode=curves takes its initialisations from curves.inits, and their learning rates from these files: leave "
        "ckpt_path and evaluate.lrs null",
    )


def _logger_rules(logger: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    for name in ("project", "name", "group", "job_type"):
        value = logger.get(name)
        yield not isinstance(value, str | None), f"logger.{name}={value}: give a text, a number in quotes ('\"5\"')"
    tags = logger.get("tags", [])
    texts = OmegaConf.is_list(tags) and all(isinstance(tag, str) for tag in tags)
    yield not (tags == [] or texts), f"logger.tags={tags}: give a list of texts, as logger.tags=[night]"


def _whole(name: str, value: Any, least: int, of: str = "", null: str = "") -> tuple[bool, str]:
    """The rule that `value` is a whole number from `least` on, or null if `null` says what that is for."""
    is_whole = _is_whole(value)
    holds = (is_whole and value >= least) or (value is None and null != "")
    cure = ("" if is_whole else "a whole number, ") + f"{least} or more" + (f" {of}" if of else "")
    return not holds, f"{name}={value}: give {cure}" + (f", or null {null}" if null else "")


def _is_number(value: Any) -> bool:
    """Whether it is a number that float32 holds, so not NaN or infinite; YAML's true is none, though a Python int."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_whole(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int)


def _ascending(numbers: Any) -> bool:
    """Whether it is a list of whole numbers from 1 on, each larger than the one before."""
    whole = OmegaConf.is_list(numbers) and len(numbers) > 0 and all(_is_whole(n) and n >= 1 for n in numbers)
    return whole and list(numbers) == sorted(set(numbers))


def _first_value(override: Override) -> Any:
    """The value of an override, or the first of a sweep's."""
    if override.is_sweep_override():
        return next(iter(override.sweep_string_iterator()))
    return override.get_value_element_as_str()


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all nodes of plain containers."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")
